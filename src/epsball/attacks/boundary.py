"""The Boundary Attack: a random walk along the boundary, each step a little to the side and a little toward the clean input."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.decision import Found, bisect, interval, inward_path, label_only, look, start_near
from epsball.attacks.registry import register
from epsball.core import Attack, Problem, Projects, Reading
from epsball.core.rows import per_sample
from epsball.core.rule import normalized
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.threats import L2

_EVERY = 5  # steps between two questions about the sphere
_AROUND, _NEARER = 0.3, 0.2  # rates of success that step sizes follow: with 1/2 and 1/4 distances are a sixth longer


@register(
    paper="Brendel, Rauber & Bethge 2018, arXiv 1712.04248",
    access=Access.LABELS,
    threats=("l2",),
    kind="smallest",
    cost="at most steps forwards, 1 forward to judge",
)
def boundary(
    steps: int = 5000,
    sideways: float = 0.1,
    toward: float = 0.03,
    tries: int = 50,
    starts: Tensor | None = None,
    threat: Projects | None = None,
) -> Attack:
    """Boundary Attack, Algorithm 1 and section 2.3: z' on the sphere around x through z, then a share of the way to x.

    z' = x + r unit(z - x + delta r eta), eta Gaussian, orthogonal to z - x and of length 1, r = ||z - x||; the candidate is
    x + (1 - eps)(z' - x), kept if it fools the model. Per sample, delta follows a success rate of 0.3 of z' itself and eps one
    of 0.2 of the candidate.

    Args:
        steps: queries per sample. sideways: first delta. toward: first eps; shares of the distance to x.
        tries: random directions that are tried for a nearer start, one query each where there is none; at most a tenth of steps.
        starts: (N, ...) inputs to start from, tried nearest first; a `Targeted` goal wants some of the target's class.
        threat: L2.

    Cost: at most steps forwards per sample, 1 forward to judge; one question in six is about z'.

    Differs from the released code: random directions are tried for a nearer start; step sizes follow every single answer, ever
    more calmly, instead of statistics of the last hundred; the rates are 0.3 and 0.2 instead of 1/2 and 1/4.
    """
    for word, value in (("sideways", sideways), ("toward", toward)):
        if not 0 < value < 1:
            raise BadInput(f"{word}: {value}: must be between 0 and 1")
    if tries < 0:
        raise BadInput(f"tries: {tries}: must be 0 or more")
    search = Walk(steps, sideways, toward, tries, starts)
    return label_only("boundary", threat or L2(), (L2,), search, steps + 1, steps)


@dataclass(frozen=True)
class _Walking:
    found: Found
    delta: Tensor  # (B,) float64
    eps: Tensor  # (B,) float64
    number: int = 0

    @property
    def z(self) -> Tensor:
        """The smallest success, to be judged at the end."""
        return self.found.z


@dataclass(frozen=True)
class Walk:
    """See `boundary`."""

    budget: int
    sideways: float
    toward: float
    tries: int
    starts: Tensor | None

    def init(self, problem: Problem, steps: int) -> _Walking:
        """Nothing asked yet."""
        ones = torch.ones_like(problem.radius)
        return _Walking(Found.nothing(problem, self.budget), self.sideways * ones, self.toward * ones)

    def step(self, problem: Problem, state: _Walking) -> tuple[Reading, _Walking]:
        """The best so far; then a start on the boundary, or one step along it."""
        after = self._begin(problem, state) if state.number == 0 else self._walk(problem, state)
        return state.found.reading(problem), replace(after, number=state.number + 1)

    def _begin(self, problem: Problem, state: _Walking) -> _Walking:
        found = start_near(problem, state.found, self.starts, min(self.tries, self.budget // 10))
        ones = torch.ones_like(problem.radius)
        _, found = bisect(problem, found, inward_path(problem, found.z), 0 * ones, ones, 1e-3 * ones, found.some)
        return replace(state, found=found)

    def _walk(self, problem: Problem, s: _Walking) -> _Walking:
        """One candidate for every sample, and at times its point on the sphere."""
        if not bool((s.found.left(problem) > 0).any()):
            return s
        x, found = problem.x, s.found
        low, high = interval(problem)
        change = (found.z - x).double()
        noise = problem.key.fold("step", s.number).normal(problem.ids, x).double().masked_fill(high <= low, 0.0)
        unit = normalized(change, 2)
        eta = normalized(noise - per_sample((noise * unit).flatten(1).sum(1), unit) * unit, 2)
        length = torch.where(found.some, found.size, 0.0)
        around = per_sample(length, unit) * normalized(unit + per_sample(s.delta, unit) * eta, 2)
        eps, delta, pace = s.eps, s.delta, 1 + 0.2 / math.sqrt(1 + s.number / 100)
        if s.number % _EVERY == 0:
            asked, hit, found = look(problem, found, (x + around.to(x.dtype)).clamp(low, high), found.some)
            delta = _follow(delta, asked, hit, _AROUND, pace**_EVERY).clamp(max=1.0)
        candidate = (x + (per_sample(1 - eps, unit) * around).to(x.dtype)).clamp(low, high)
        asked, hit, found = look(problem, found, candidate, found.some)
        return replace(s, found=found, delta=delta, eps=_follow(eps, asked, hit, _NEARER, pace).clamp(max=0.5))


def _follow(size: Tensor, asked: Tensor, hit: Tensor, rate: float, pace: float) -> Tensor:
    """A step size that stands still on average where a share `rate` of the answers are successes."""
    return torch.where(asked, size * torch.where(hit, pace, pace ** (-rate / (1 - rate))), size)
