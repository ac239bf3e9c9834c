"""Sparse-RS for patches: random search over what a square patch shows and where it lies."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.random_search import schedule, worth
from epsball.core import Problem, Reading, Targeted
from epsball.core.rows import rowwise
from epsball.errors import BadInput

_EARLY = 0.3  # of the queries ask about patches of their own: on small images single colors break most, and only the place matters
_FARTHEST = 0.75  # of the image, first move of the place, as in the released code


@dataclass(frozen=True)
class Painted:
    """A patch: `up` (B, C, H, W) bool says which end of the box it shows, from its own top left pixel on; `corner` (B, 2) is its place."""

    up: Tensor
    corner: Tensor

    def where(self, chosen: Tensor, other: Painted) -> Painted:
        """This one for the samples `chosen` (B,), the other elsewhere."""
        return Painted(torch.where(rowwise(chosen, self.up), self.up, other.up), torch.where(chosen[:, None], self.corner, other.corner))


@dataclass(frozen=True)
class Searching:
    """The patch that is asked next, the best so far, and its worth (B,)."""

    z: Tensor
    asked: Painted
    best: Painted
    worth: Tensor
    looks: int
    budget: int


@dataclass(frozen=True)
class PatchSearch:
    """Croce et al. 2022, section 5.1: in turn, a window of the patch gets a random color, and every few queries the patch moves.

    Cost: 1 forward per look. Differs from the released code: the search starts from the best of many fresh patches; once windows
    are one pixel, half the queries flip one channel of it, instead of all in the second half of what is then left.
    """

    alpha: float

    def init(self, problem: Problem, steps: int) -> Searching:
        """A patch of its own for every sample."""
        x = problem.threat.start(problem.x, problem.radius, None, problem.ids)
        low, high = problem.threat.room.interval(x)  # type: ignore[attr-defined]
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise BadInput("box: infinite: a patch shows its ends: declare the box of the model")
        first = self._anew(problem, 0)
        return Searching(_shown(problem, first), first, first, torch.full_like(problem.radius, -torch.inf), 0, steps)

    def _anew(self, problem: Problem, number: int) -> Painted:
        """At an even place; in turn of one color, and a mosaic of tiles as wide as half the root of the side."""
        key, x = problem.key.fold("anew", number), problem.x
        up = key.uniform(problem.ids, x.float()) < 0.5
        whole = torch.full_like(problem.radius, max(x.shape[2:]))
        tile = whole if number % 2 == 0 else torch.minimum((problem.radius.clamp(min=1).sqrt() / 2).ceil(), whole)
        at = [torch.arange(side, device=x.device) // tile[:, None].long() for side in x.shape[2:]]
        drawn = key.fold("place").uniform(problem.ids, x.new_empty(len(x), 2, dtype=torch.float32)).double()
        return Painted(_picked(up, at[0], at[1]), (drawn * (self._room(problem) + 1)).long())

    def step(self, problem: Problem, state: Searching) -> tuple[Reading, Searching]:
        """One look, one proposal."""
        reading = problem.judge(state.z)
        found = worth(problem, reading)
        better = (found > state.worth) | torch.isposinf(found)
        best = state.asked.where(better, state.best)
        early = state.looks + 1 < _EARLY * state.budget
        asked = self._anew(problem, state.looks + 1) if early else self._next(problem, best, state.looks, state.budget)
        return reading, Searching(
            _shown(problem, asked), asked, best, torch.where(better, found, state.worth), state.looks + 1, state.budget
        )

    def _room(self, problem: Problem) -> Tensor:
        """(B, 2) how far down and to the right the top left pixel may lie."""
        shape = torch.tensor(problem.x.shape[2:], device=problem.x.device)
        return (shape - _sides(problem)).clamp(min=0)

    def _next(self, problem: Problem, best: Painted, number: int, budget: int) -> Painted:
        like = problem.x.new_empty(len(problem), 4 + problem.x.shape[1], dtype=torch.float32)
        drawn = problem.key.fold("patch", number).uniform(problem.ids, like).double()
        far = int(_FARTHEST * (1 - number / max(budget, 1)) * problem.x.shape[2])
        if far > 0 and number % (10 if isinstance(problem.goal, Targeted) else 4) == 3:
            moved = best.corner + (drawn[:, :2] * (2 * far + 1)).long() - far
            return replace(best, corner=torch.minimum(moved.clamp(min=0), self._room(problem)))
        sides = _sides(problem)
        window = (math.sqrt(self.alpha * schedule(number, budget)) * sides).long().clamp(min=1)
        mask = _inside(problem.x, (drawn[:, :2] * (sides - window + 1)).long(), window)
        color = (drawn[:, 4:] < 0.5)[:, :, None, None].expand_as(best.up)
        painted = torch.where(mask, color, best.up)
        same = (painted == best.up).flatten(1).all(1)
        painted = torch.where(mask & rowwise(same, painted), ~color, painted)
        # one channel of one pixel, half the time once windows have shrunk to that
        channel = torch.arange(problem.x.shape[1], device=drawn.device) == (drawn[:, 2:3] * problem.x.shape[1]).long()
        single = (window.amax(1) == 1) & (drawn[:, 3] < 0.5)
        one = torch.where(mask & channel[:, :, None, None], ~best.up, best.up)
        return replace(best, up=torch.where(rowwise(single, one), one, painted))


def _sides(problem: Problem) -> Tensor:
    """(B, 2) height and width of the patch, as far as the image reaches."""
    shape = torch.tensor(problem.x.shape[2:], dtype=problem.radius.dtype, device=problem.radius.device)
    return torch.minimum(problem.radius.floor()[:, None], shape).long()


def _inside(x: Tensor, corner: Tensor, sides: Tensor) -> Tensor:
    """(B, 1, H, W) bool: inside rectangles of `sides` (B, 2) whose top left pixels are `corner` (B, 2)."""
    lines = []
    for axis, length in enumerate(x.shape[2:]):
        place = torch.arange(length, device=x.device) - corner[:, axis : axis + 1]
        lines.append((place >= 0) & (place < sides[:, axis : axis + 1]))
    return lines[0][:, None, :, None] & lines[1][:, None, None, :]


def _picked(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """values (B, C, H, W) at rows (B, H) and columns (B, W)."""
    down = values.gather(2, rows[:, None, :, None].expand_as(values))
    return down.gather(3, columns[:, None, None, :].expand_as(values))


def _shown(problem: Problem, patch: Painted) -> Tensor:
    """x with the patch on it."""
    x = problem.x
    low, high = problem.threat.room.interval(x)  # type: ignore[attr-defined]
    at = [
        (torch.arange(side, device=x.device) - patch.corner[:, axis : axis + 1]).clamp(0, side - 1) for axis, side in enumerate(x.shape[2:])
    ]
    paint = torch.where(_picked(patch.up, at[0], at[1]), high, low)
    return torch.where(_inside(x, patch.corner, _sides(problem)), paint, x)
