"""Sparse-RS: random search over which pixels to change, and to which corner of the box; patches are in `patch_search.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.patch_search import PatchSearch
from epsball.attacks.random_search import RandomSearch, margin_or_entropy
from epsball.attacks.registry import register
from epsball.core import Attack, Objective, Problem, Projects
from epsball.core.descent import Strategy
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.threats import L0, Patch

_ENDS = (0, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries
_PARTS = (1, 2, 4, 5, 6, 8, 10, 12, 15, 20)


@register(paper="Croce et al. 2022, arXiv 2006.12834", access=Access.SCORES, threats=("l0", "l0f", "patch"), cost="steps forwards")
def sparse_rs(
    steps: int = 5000,
    alpha: float = 0.3,
    threat: Projects | None = None,
    objective: Objective = margin_or_entropy,
) -> Attack:
    """Sparse-RS under L0: a set of floor(radius) pixels at corners of the box, improved by swaps, arXiv 2006.12834, Algorithm 1.

    A proposal lets a share of the set go, takes as many others, evenly drawn, and gives them random corners; the share
    falls from alpha to a twentieth of it along the table of appendix A.1. Under a patch of floor(radius) x floor(radius) pixels
    a window of it, at first a share alpha, gets another corner of the box, and every fourth query (tenth, toward a target) moves it.

    Args:
        steps: queries per sample, the first set included. alpha: share swapped at first, 0 .. 1 (released for patches: 0.4).
        threat: L0, pixels or features, or a patch.

    Raises:
        BadInput: alpha outside 0 .. 1, or another threat.

    Cost: at most steps forwards (1 where steps is 0), no backward.

    Differs from the paper: at least one pixel is swapped at each step; every sample has a set size, and draws, of its own. No
    pixel is given its own color, which would change nothing (the released code takes care of that where one pixel is swapped).
    """
    if steps < 0:
        raise BadInput(f"steps: {steps}: must be 0 or more")
    if not 0 < alpha <= 1:
        raise BadInput(f"alpha: {alpha}: must lie above 0 and be at most 1")
    threat = threat or L0()
    if not isinstance(threat, L0 | Patch):
        raise BadInput(f"threat '{threat.name}': counts no pixels: use l0, l0f or patch")
    search: Strategy = RandomSearch(Swaps(alpha)) if isinstance(threat, L0) else PatchSearch(alpha)
    return replace(Attack("sparse_rs", threat, objective, search, max(steps - 1, 0)), access=Access.SCORES)


@dataclass(frozen=True)
class Swaps:
    """Sets of pixels at corners."""

    alpha: float

    def first(self, problem: Problem) -> Tensor:
        """As many pixels as the radius allows, evenly drawn."""
        return _set(problem, self._corners(problem, "first", 0), self._drawn(problem, "place", 0))

    def next(self, problem: Problem, best: Tensor, number: int, budget: int) -> Tensor:
        """Swaps a share of the set."""
        changed = pixels(problem.threat, best != problem.x).any(1)
        chance = self._drawn(problem, "place", number + 1)
        count = (self.alpha / part(number + 1, budget) * problem.radius.floor()).floor().clamp(min=1)[:, None]
        kept = changed & (_rank(chance.masked_fill(~changed, -1.0)) >= count)
        # what is kept comes first, then what was not in the set; what was let go comes last
        values = torch.where(_wide(problem, kept), best, self._corners(problem, "corner", number + 1))
        return _set(problem, values, chance + 2.0 * kept - 2.0 * (changed & ~kept))

    def _drawn(self, problem: Problem, name: str, number: int) -> Tensor:
        return problem.key.fold(name, number).uniform(problem.ids, pixels(problem.threat, problem.x)[:, 0].float())

    def _corners(self, problem: Problem, name: str, number: int) -> Tensor:
        """A corner for each pixel; the opposite one where that is its own color."""
        low, high = problem.threat.room.interval(problem.x)  # type: ignore[attr-defined]
        up = problem.key.fold(name, number).uniform(problem.ids, problem.x.float()) < 0.5
        own = ~pixels(problem.threat, torch.where(up, high, low) != problem.x).any(1)
        return torch.where(up ^ _wide(problem, own), high, low)


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


def _set(problem: Problem, values: Tensor, worth: Tensor) -> Tensor:
    """`values` on the floor(radius) pixels of most worth, x elsewhere."""
    return torch.where(_wide(problem, _rank(worth) < problem.radius.floor()[:, None]), values, problem.x)
