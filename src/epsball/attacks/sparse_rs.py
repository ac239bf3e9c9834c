"""Sparse-RS: random search over which pixels to change, and to which corner of the box, or how far; patches are in `patch_search.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.patch_search import PatchSearch
from epsball.attacks.random_search import RandomSearch, margin_or_entropy
from epsball.attacks.registry import register
from epsball.core import Attack, Objective, Problem, Projects
from epsball.core.descent import Strategy
from epsball.core.rows import per_sample
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.threats import L0, L1, L2, Patch

_ENDS = (0, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries
_PARTS = (1, 2, 4, 5, 6, 8, 10, 12, 15, 20)
_HEIGHT = 0.75


@register(
    paper="Croce et al. 2022, arXiv 2006.12834",
    access=Access.SCORES,
    threats=("l0", "l0f", "l1", "l2", "patch"),
    cost="steps forwards",
)
def sparse_rs(
    steps: int = 5000,
    alpha: float = 0.3,
    threat: Projects | None = None,
    objective: Objective = margin_or_entropy,
    height: float | None = None,
) -> Attack:
    """Sparse-RS under L0: a set of floor(radius) pixels at corners of the box, improved by swaps, arXiv 2006.12834, Algorithm 1.

    A proposal lets a share of the set go, takes as many others, evenly drawn, and gives them random corners; the share
    falls from alpha to a twentieth of it along the table of appendix A.1. Under a patch of floor(radius) x floor(radius) pixels
    a window of it, at first a share alpha, gets another corner of the box, and every fourth query (tenth, toward a target) moves it.
    Under L1 and L2, which the paper leaves out, the set has as few features as use the radius up where each moves at most a share
    `height` of the box, all of them equally far: what only large changes turn, as a threshold, is out of reach of smaller ones.

    Args:
        steps: queries per sample, the first set included. alpha: share swapped at first, 0 .. 1 (released for patches: 0.4).
        threat: L0, pixels or features, L1, L2, or a patch. height: under L1 and L2, above 0 and at most 1; 0.75 unless given.

    Raises:
        BadInput: alpha or height outside 0 .. 1, a height under L0 or a patch, or another threat.

    Cost: at most steps forwards (1 where steps is 0), no backward.

    Differs from the paper: at least one pixel is swapped at each step; every sample has a set size, and draws, of its own. No
    pixel is given its own color, which would change nothing (the released code takes care of that where one pixel is swapped).
    """
    if steps < 0:
        raise BadInput(f"steps: {steps}: must be 0 or more")
    if not 0 < alpha <= 1:
        raise BadInput(f"alpha: {alpha}: must lie above 0 and be at most 1")
    if height is not None and not 0 < height <= 1:
        raise BadInput(f"height: {height}: must lie above 0 and be at most 1")
    threat = threat or L0()
    if not isinstance(threat, L0 | L1 | L2 | Patch):
        raise BadInput(f"threat '{threat.name}': no few pixels make it up: use l0, l0f, l1, l2 or patch")
    if height is not None and not isinstance(threat, L1 | L2):
        raise BadInput(f"height: {height}: under {threat.name} pixels move to corners of the box: leave it out, or use l1 or l2")
    few = Swaps(alpha) if isinstance(threat, L0) else Jumps(alpha, height or _HEIGHT)
    search: Strategy = PatchSearch(alpha) if isinstance(threat, Patch) else RandomSearch(few)
    return replace(Attack("sparse_rs", threat, objective, search, max(steps - 1, 0)), access=Access.SCORES)


@dataclass(frozen=True)
class Swaps:
    """Sets of pixels at corners."""

    alpha: float

    def most(self, problem: Problem) -> Tensor:
        """(B,) pixels of a set, whole numbers."""
        return problem.radius.floor()

    def first(self, problem: Problem) -> Tensor:
        """As many pixels as the radius allows, evenly drawn."""
        return self._set(problem, self._moved(problem, "first", 0), self._drawn(problem, "place", 0))

    def next(self, problem: Problem, best: Tensor, number: int, budget: int) -> Tensor:
        """Swaps a share of the set."""
        changed = pixels(problem.threat, best != problem.x).any(1)
        chance = self._drawn(problem, "place", number + 1)
        count = (self.alpha / part(number + 1, budget) * self.most(problem)).floor().clamp(min=1)[:, None]
        kept = changed & (_rank(chance.masked_fill(~changed, -1.0)) >= count)
        # what is kept comes first, then what was not in the set; what was let go comes last
        values = torch.where(_wide(problem, kept), best, self._moved(problem, "corner", number + 1))
        return self._set(problem, values, chance + 2.0 * kept - 2.0 * (changed & ~kept))

    def _drawn(self, problem: Problem, name: str, number: int) -> Tensor:
        return problem.key.fold(name, number).uniform(problem.ids, pixels(problem.threat, problem.x)[:, 0].float())

    def _set(self, problem: Problem, values: Tensor, worth: Tensor) -> Tensor:
        """`values` on the pixels of most worth, x elsewhere."""
        return torch.where(_wide(problem, _rank(worth) < self.most(problem)[:, None]), values, problem.x)

    def _up(self, problem: Problem, name: str, number: int) -> Tensor:
        return problem.key.fold(name, number).uniform(problem.ids, problem.x.float()) < 0.5

    def _moved(self, problem: Problem, name: str, number: int) -> Tensor:
        """A corner for each pixel; the opposite one where that is its own color."""
        low, high = problem.threat.room.interval(problem.x)  # type: ignore[attr-defined]
        up = self._up(problem, name, number)
        own = ~pixels(problem.threat, torch.where(up, high, low) != problem.x).any(1)
        return torch.where(up ^ _wide(problem, own), high, low)


@dataclass(frozen=True)
class Jumps(Swaps):
    """Sets of features that all move equally far, for norms that count how far."""

    height: float

    def most(self, problem: Problem) -> Tensor:
        """As few as use the radius up."""
        wide = self._wide(problem)
        mean = wide.sum(1) / (wide > 0).sum(1).clamp(min=1)
        steps = problem.radius / (self.height * mean.to(problem.radius))
        return ((steps.square() if isinstance(problem.threat, L2) else steps) - 1e-9).ceil().clamp(1, wide.shape[1])

    def _wide(self, problem: Problem) -> Tensor:
        """(B, features) float64: from bound to bound, 0 where nothing may change."""
        low, high = problem.threat.room.interval(problem.x)  # type: ignore[attr-defined]
        wide: Tensor = (high.double() - low.double()).flatten(1)
        return wide

    def _set(self, problem: Problem, values: Tensor, worth: Tensor) -> Tensor:
        chosen = super()._set(problem, values, worth.masked_fill(self._wide(problem) <= 0, -torch.inf))
        z: Tensor = problem.threat.project(problem.x, chosen, problem.radius)
        return z

    def _moved(self, problem: Problem, name: str, number: int) -> Tensor:
        """Up or down, where there is room."""
        low, high = problem.threat.room.interval(problem.x)  # type: ignore[attr-defined]
        many = self.most(problem)
        far = per_sample(problem.radius / (many.sqrt() if isinstance(problem.threat, L2) else many), problem.x).to(problem.x)
        above, below = high - problem.x, problem.x - low
        up = torch.where((above < far) | (below < far), above > below, self._up(problem, name, number))
        z: Tensor = problem.x + torch.where(up, far, -far)
        return z


def part(query: int, budget: int) -> int:
    """What alpha is divided by at the query of that number of `budget`: the released table for L0, stretched to the budget."""
    place = int(query / max(budget, 1) * 10000)
    return _PARTS[sum(place > end for end in _ENDS)]


def pixels(threat: Projects, values: Tensor) -> Tensor:
    """(B, channels, pixels), as the threat counts them."""
    joined = values.ndim >= 4 and threat.name == "l0"
    return values.flatten(2) if joined else values.reshape(len(values), 1, -1)


def _rank(chance: Tensor) -> Tensor:
    """Place of each entry by falling chance."""
    return chance.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _wide(problem: Problem, chosen: Tensor) -> Tensor:
    """(B, pixels) as a mask over the features."""
    return chosen[:, None, :].expand_as(pixels(problem.threat, problem.x)).reshape(problem.x.shape)
