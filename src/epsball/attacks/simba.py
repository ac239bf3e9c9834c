"""SimBA: one orthonormal direction after the other, forward or backward, whichever helps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from epsball.attacks.random_search import worth
from epsball.attacks.registry import register
from epsball.attacks.square import as_image
from epsball.core import Attack, Objective, Problem, Projects, Reading
from epsball.core.rows import per_sample, rowwise
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.objectives import cross_entropy
from epsball.threats import L2


class Basis(Protocol):
    """An orthonormal set of directions in the space of one sample."""

    def chances(self, problem: Problem) -> Tensor:
        """(B, K): each sample takes its K directions by falling chance."""

    def direction(self, like: Tensor, number: Tensor) -> Tensor:
        """(B, ...) directions `number` (B,), each of length 1."""


@dataclass(frozen=True)
class Features:
    """Single features, in random order."""

    def chances(self, problem: Problem) -> Tensor:
        """Evenly drawn."""
        return problem.key.fold("order").uniform(problem.ids, problem.x.flatten(1).float())

    def direction(self, like: Tensor, number: Tensor) -> Tensor:
        """1 at one feature."""
        return torch.zeros_like(like).flatten(1).scatter(1, number[:, None], 1.0).reshape(like.shape)


@lru_cache(maxsize=16)
def cosines(n: int) -> Tensor:
    """(n, n) float64: row k is the k-th vector of the orthonormal DCT-II."""
    k, place = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None]
    rows = torch.cos(math.pi * k * (place + 0.5) / n) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows


@dataclass(frozen=True)
class Waves:
    """Two-dimensional cosines of one channel: the lowest `share` per axis in random order first, then rings of higher ones."""

    share: float = 0.125

    def chances(self, problem: Problem) -> Tensor:
        """Drawn evenly within a ring, rings in order of frequency."""
        n, c, h, w = as_image(problem.x).shape
        drawn = problem.key.fold("order").uniform(problem.ids, torch.empty(n, c, h, w, device=problem.x.device))
        rings = [torch.div(torch.arange(side, device=drawn.device), max(side * self.share, 1.0), rounding_mode="floor") for side in (h, w)]
        return (drawn - torch.maximum(rings[0][:, None], rings[1][None])).flatten(1)

    def direction(self, like: Tensor, number: Tensor) -> Tensor:
        """One frequency of one channel."""
        c, h, w = as_image(like).shape[1:]
        rows, columns = cosines(h).to(like.device)[number // w % h], cosines(w).to(like.device)[number % w]
        wave = (rows[:, :, None] * columns[:, None, :])[:, None]
        channel = torch.arange(c, device=like.device) == (number // (h * w))[:, None]
        return (wave * channel[:, :, None, None]).reshape(like.shape).to(like.dtype)


def _attack(name: str, steps: int, step: float, threat: Projects | None, objective: Objective, basis: Basis) -> Attack:
    if steps < 0:
        raise BadInput(f"steps: {steps}: must be 0 or more")
    if not 0 < step < math.inf:
        raise BadInput(f"step: {step}: must be above 0")
    return replace(Attack(name, threat or L2(), objective, Simple(basis, step), max(steps - 1, 0)), access=Access.SCORES)


@register(paper="Guo et al. 2019, arXiv 1905.07121", access=Access.SCORES, threats=("l2", "linf"), cost="steps forwards")
def simba(steps: int = 5000, step: float = 0.2, threat: Projects | None = None, objective: Objective = cross_entropy) -> Attack:
    """SimBA: adds or subtracts `step` at one feature after the other, in random order, Guo et al. 2019, arXiv 1905.07121, Algorithm 1.

    Args:
        steps: queries per sample. step: of one feature, in units of the input (the paper's epsilon). threat: L2 or Linf.
        objective: log-probabilities rank points as the paper's probabilities.

    Raises:
        BadInput: negative steps, or a step that is not positive.

    Cost: at most steps forwards (1 where steps is 0), no backward; 1 or 2 per direction.

    Differs from the paper: every move is projected onto the ball, and after the last direction the first comes again.
    """
    return _attack("simba", steps, step, threat, objective, Features())


@register(paper="Guo et al. 2019, arXiv 1905.07121, section 3.2", access=Access.SCORES, threats=("l2", "linf"), cost="steps forwards")
def simba_dct(
    steps: int = 5000,
    step: float = 0.2,
    share: float = 0.125,
    threat: Projects | None = None,
    objective: Objective = cross_entropy,
) -> Attack:
    """SimBA-DCT: `simba` along cosine waves, low frequencies first, Guo et al. 2019, arXiv 1905.07121, section 3.2.

    Args:
        steps, step, threat, objective: as in `simba`. share: of the frequencies per axis that are taken first, in random
        order (the paper's 1/8); then those up to twice as high, and so on.

    Cost: at most steps forwards (1 where steps is 0), no backward; 1 or 2 per direction.

    Differs from the paper: as `simba`. A vector is an image of one row.
    """
    if not 0 < share <= 1:
        raise BadInput(f"share: {share}: must lie above 0 and be at most 1")
    return _attack("simba_dct", steps, step, threat, objective, Waves(share))


@dataclass(frozen=True)
class _Tried:
    z: Tensor
    best: Tensor
    worth: Tensor
    order: Tensor
    place: Tensor
    sign: Tensor


@dataclass(frozen=True)
class Simple:
    """Along each direction of a basis: forward, then backward if that did not help. Cost: 1 forward per look."""

    basis: Basis
    size: float

    def init(self, problem: Problem, steps: int) -> _Tried:
        """Forward along the first direction; the clean answer is known."""
        x = problem.threat.start(problem.x, problem.radius, None, problem.ids)
        order = self.basis.chances(problem).argsort(dim=1, descending=True, stable=True)
        place = torch.zeros_like(order[:, 0])
        sign = torch.ones_like(place)
        known = worth(problem, Reading(x, problem.x, problem.clean, problem.objective(problem, x, problem.x, problem.clean)))
        return _Tried(self._proposed(problem, x, order, place, sign), x, known, order, place, sign)

    def step(self, problem: Problem, state: _Tried) -> tuple[Reading, _Tried]:
        """One look, one move."""
        reading = problem.judge(state.z)
        found = worth(problem, reading)
        better = (found > state.worth) | torch.isposinf(found)
        best = torch.where(rowwise(better, state.z), state.z, state.best)
        back = (state.sign == 1) & ~better
        place = torch.where(back, state.place, state.place + 1)
        sign = torch.where(back, -1, 1)
        z = self._proposed(problem, best, state.order, place, sign)
        return reading, _Tried(z, best, torch.where(better, found, state.worth), state.order, place, sign)

    def _proposed(self, problem: Problem, best: Tensor, order: Tensor, place: Tensor, sign: Tensor) -> Tensor:
        number = order.gather(1, (place % order.shape[1])[:, None]).squeeze(1)
        change = self.size * per_sample(sign, best) * self.basis.direction(best, number)
        z: Tensor = problem.threat.project(problem.x, best + change, problem.radius)
        return z
