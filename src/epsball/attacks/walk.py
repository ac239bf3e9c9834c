"""Searches that end at their first success (DeepFool, JSMA), and the linearized boundary that DeepFool and FAB walk to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from epsball.core import Aimed, Goal, Problem, Reading, Targeted, Untargeted, valid
from epsball.core.gradient import logit_gradients
from epsball.core.problem import same_rows
from epsball.core.rows import take
from epsball.core.rule import lengths
from epsball.core.victim import Tally
from epsball.errors import BadInput


class Move(Protocol):
    """One step of a walk."""

    def start(self, problem: Problem) -> Any:
        """What it remembers (rows of B) before the first step."""

    def go(self, problem: Problem, z: Tensor, output: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """The next legal point, given the model's output (B, C) at z, and what it remembers then."""


@dataclass(frozen=True)
class Trail:
    """Where a walk stands: the point, the last answer there, and which samples still walk."""

    z: Tensor
    output: Tensor
    score: Tensor
    walking: Tensor
    memory: Any
    looks: int = 0


def begin(problem: Problem, memory: Any = ()) -> Trail:
    """At the clean input, whose answer is known."""
    z = problem.threat.start(problem.x, problem.radius, None, problem.ids)
    score = problem.objective(problem, z, problem.threat.apply(problem.x, z), problem.clean)
    return Trail(z, problem.clean, score, torch.ones_like(problem.radius, dtype=torch.bool), memory)


def look(problem: Problem, trail: Trail) -> tuple[Reading, Trail, Tensor]:
    """Reads the model where samples still walk: the reading of all, the trail after it, and the rows (R,) that were looked at.

    The others keep their last reading. Cost: 1 forward row per walking sample, nothing at the first look.
    """
    rows = trail.walking.nonzero().squeeze(1)
    if trail.looks and len(rows):
        seen = same_rows(problem, trail.walking).judge(trail.z[rows])
        output, score = trail.output.index_copy(0, rows, seen.output), trail.score.index_copy(0, rows, seen.score)
        trail = replace(trail, output=output, score=score)
    x_adv = problem.threat.apply(problem.x, trail.z)
    return Reading(trail.z, x_adv, trail.output, trail.score), replace(trail, looks=trail.looks + 1), rows


@dataclass(frozen=True)
class UntilReached:
    """Moves each sample until its goal is reached, its answer is no number, or it no longer moves.

    Cost: 1 forward row and that of the move per step a sample needs; 1 forward row to judge a walk that the steps cut short.
    """

    move: Move

    def init(self, problem: Problem, steps: int) -> Trail:
        """At the clean input."""
        return begin(problem, self.move.start(problem))

    def step(self, problem: Problem, state: Trail) -> tuple[Reading, Trail]:
        """Look; those that have arrived leave, the others move."""
        reading, trail, _ = look(problem, state)
        over = problem.goal.reached(trail.output) | ~valid(trail.output)
        rows = (~over).nonzero().squeeze(1)
        if len(rows):
            part, memory = same_rows(problem, ~over), take(trail.memory, rows)
            z, memory = self.move.go(part, trail.z[rows], trail.output[rows], memory)
            over = over.index_copy(0, rows, (z == trail.z[rows]).flatten(1).all(1))
            trail = replace(trail, z=trail.z.index_copy(0, rows, z), memory=_put(trail.memory, rows, memory))
        return replace(reading, over=over), trail


def _put(tree: Any, rows: Tensor, part: Any) -> Any:
    """`tree` (a tensor, or a tuple of them) with `part` at `rows`."""
    if isinstance(tree, Tensor):
        return tree.index_copy(0, rows, part)
    return tuple(_put(one, rows, other) for one, other in zip(tree, part, strict=True))


@dataclass(frozen=True)
class Plane:
    """A boundary, linearized at z: the goal lies where value + <slope, y - z> > 0.

    Attributes:
        value: (B,). slope: (B, ...). distance: (B,) from z, in the threat's norm; +inf where the slope vanishes.
        distances: (B, K) of all boundaries among which this one is the nearest.
    """

    value: Tensor
    slope: Tensor
    distance: Tensor
    distances: Tensor


def may_change(problem: Problem) -> Tensor:
    """(B, ...) bool: features that the box and the mask leave any room at all."""
    low, high = problem.threat.room.interval(problem.x)  # type: ignore[attr-defined]
    free: Tensor = low < high
    return free


def crossings(goal: Goal, output: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Which boundaries lead to the goal: (own (B,), others (B, K)), to be crossed from class `own` to one of `others`.

    Untargeted: from the label to any of `candidates`. Aimed: from the label to the target. Targeted: from the class that is
    ahead to the target.

    Raises:
        BadInput: goals that are not about one class.
    """
    if isinstance(goal, Untargeted):
        return goal.labels, candidates
    if isinstance(goal, Aimed):
        return goal.labels, goal.targets[:, None]
    if isinstance(goal, Targeted):
        return output.scatter(1, goal.labels[:, None], -torch.inf).argmax(1), goal.labels[:, None]
    raise BadInput(f"goal: {type(goal).__name__}: has no boundary between two classes: use an attack that climbs an objective")


def best_others(goal: Goal, clean: Tensor, count: int) -> Tensor:
    """(B, at most count) classes by falling clean score, without the label; what `crossings` takes as candidates."""
    labels = getattr(goal, "labels", None)
    if not isinstance(labels, Tensor) or labels.ndim != 1:
        raise BadInput(f"goal: {type(goal).__name__}: has no boundary between two classes: use an attack that climbs an objective")
    return clean.scatter(1, labels[:, None], -torch.inf).topk(min(count, clean.shape[1] - 1), dim=1).indices


def nearest_plane(problem: Problem, z: Tensor, own: Tensor, others: Tensor, q: float) -> Plane:
    """The nearest of the linearized boundaries between `own` (B,) and each of `others` (B, K); ties go to the first.

    Distances are |value| / q-norm of the slope over the features that may change; the slope is 0 on the others.
    Cost: 1 forward and K backward rows per sample, one slope held at a time.
    """

    def nearest(at: Tensor, free: Tensor, mine: Tensor, theirs: Tensor, books: Tally) -> Plane:
        _, values, slopes = logit_gradients(problem.victim, at, books, lambda o: o.gather(1, theirs) - o.gather(1, mine[:, None]))
        value, slope, least, far = values[:, 0], torch.zeros_like(at), torch.full_like(values[:, 0], torch.inf), []
        for column, raw in zip(values.unbind(1), slopes, strict=True):
            steep = torch.nan_to_num(raw, nan=0.0, posinf=0.0, neginf=0.0).mul_(free)
            size = lengths(steep, q)
            far.append(torch.where(size > 0, column.abs() / size, torch.inf))
            win = far[-1] < least
            value, least, rows = torch.where(win, column, value), torch.where(win, far[-1], least), win.nonzero().squeeze(1)
            slope.index_copy_(0, rows, steep[rows])
        return Plane(value, slope, least, torch.stack(far, 1))

    plane: Plane = problem.victim.split(nearest, z, may_change(problem), own, others, problem.tally)
    return plane
