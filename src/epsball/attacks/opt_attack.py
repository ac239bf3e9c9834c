"""Opt-Attack and Sign-OPT: the distance to the boundary as a function of the direction, brought down without gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from epsball.attacks.decision import CHUNK, Found, Path, bisect, label_only, look, look_many, nearer, ray, start
from epsball.attacks.registry import register
from epsball.core import Attack, Key, Problem, Projects, Reading
from epsball.core.rows import per_sample, rowwise
from epsball.core.rule import normalized
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.threats import L2


@register(
    paper="Cheng et al. 2019, arXiv 1807.04457",
    access=Access.LABELS,
    threats=("l2",),
    kind="smallest",
    cost="at most steps forwards, 1 forward to judge",
)
def opt_attack(
    steps: int = 5000,
    draws: int = 10,
    directions: int = 100,
    step: float = 0.2,
    beta: float = 0.01,
    starts: Tensor | None = None,
    threat: Projects | None = None,
) -> Attack:
    """Opt-Attack, Algorithms 1 and 2: descent on g(theta), the distance to the boundary along theta, by finite differences.

    gradient = mean over `draws` Gaussian u of (g(theta + beta u) - g(theta)) / beta * u (eq. 7); every g is a bisection.

    Args:
        steps: queries per sample. draws: u per estimate. directions: Gaussian directions tried first; the nearest is taken.
        step: first step on the unit sphere, doubled while it pays, quartered where it does not. beta: distance of u.
        starts: (N, ...) inputs to start from, tried nearest first; a `Targeted` goal wants some of the target's class.
        threat: L2.

    Cost: at most steps forwards per sample, 1 forward to judge; an estimate is about 10 forwards per u.

    Differs from the released code: the box cuts every point; a step is taken along the unit gradient, and asked for at the
    distance that it must beat before anything is bisected.
    """
    return _attack("opt_attack", Differences(draws), steps, directions, step, beta, starts, threat)


@register(
    paper="Cheng et al. 2020, arXiv 1909.10773",
    access=Access.LABELS,
    threats=("l2",),
    kind="smallest",
    cost="at most steps forwards, 1 forward to judge",
)
def sign_opt(
    steps: int = 1000,
    draws: int = 100,
    directions: int = 100,
    step: float = 0.2,
    beta: float = 0.01,
    starts: Tensor | None = None,
    threat: Projects | None = None,
) -> Attack:
    """Sign-OPT, Algorithm 1: as `opt_attack`, with the sign of g(theta + beta u) - g(theta) only, which is one query per u.

    gradient = mean of sign(g(theta + beta u) - g(theta)) u (eq. 4): the model is asked at distance g(theta) along theta + beta u.

    Args:
        steps: queries per sample. draws: u per estimate; the paper has 200. directions: Gaussian directions tried first.
        step: first step on the unit sphere, doubled while it pays, quartered where it does not. beta: distance of u.
        starts: (N, ...) inputs to start from, tried nearest first; a `Targeted` goal wants some of the target's class.
        threat: L2.

    Cost: at most steps forwards per sample, 1 forward to judge.

    Differs from the released code as `opt_attack` does, and the mean sign is taken off before the average, as in HopSkipJump.
    """
    return _attack("sign_opt", Signs(draws), steps, directions, step, beta, starts, threat)


def _attack(
    name: str,
    estimate: Estimate,
    steps: int,
    directions: int,
    step: float,
    beta: float,
    starts: Tensor | None,
    threat: Projects | None,
) -> Attack:
    if estimate.draws < 1:
        raise BadInput(f"draws: {estimate.draws}: must be 1 or more")
    if directions < 0:
        raise BadInput(f"directions: {directions}: must be 0 or more")
    for word, value in (("step", step), ("beta", beta)):
        if not value > 0:
            raise BadInput(f"{word}: {value}: must be above 0")
    search = DirectionSearch(steps, directions, estimate, step, beta, starts)
    return label_only(name, threat or L2(), (L2,), search, steps // (estimate.draws + 1) + 3, steps)


@dataclass(frozen=True)
class _Aim:
    """A direction theta (B, ...) of length 1 and the distance (B,) to the boundary along it, +inf before the first."""

    theta: Tensor
    distance: Tensor

    def where(self, better: Tensor, theta: Tensor, distance: Tensor) -> _Aim:
        """With others for the samples `better`."""
        return _Aim(torch.where(rowwise(better, theta), theta, self.theta), torch.where(better, distance, self.distance))


class Estimate(Protocol):
    """A gradient of the distance by the direction."""

    @property
    def draws(self) -> int:
        """Random vectors per estimate."""

    def __call__(self, problem: Problem, found: Found, aim: _Aim, beta: Tensor, key: Key) -> tuple[Tensor, _Aim, Found]:
        """The gradient (B, ...), zero for samples without budget; the best direction seen; what is found."""


@dataclass(frozen=True)
class Differences:
    """Cheng et al. 2019, eq. 7: every distance is measured."""

    draws: int

    def __call__(self, problem: Problem, found: Found, aim: _Aim, beta: Tensor, key: Key) -> tuple[Tensor, _Aim, Found]:
        """One crossing per u."""
        total, best = torch.zeros_like(aim.theta), aim
        for draw in range(self.draws):
            u = normalized(key.fold("draw", draw).normal(problem.ids, problem.x), 2)
            theta = normalized(aim.theta + per_sample(beta, u) * u, 2)
            known, distance, found = crossing(problem, found, ray(problem, theta), aim.distance, beta / 500, found.some)
            slope = torch.where(known, (distance - aim.distance) / beta, 0.0)
            total = total + per_sample(slope, u) * u
            best = best.where(known & (distance < best.distance), theta, distance)
        return total, best, found


@dataclass(frozen=True)
class Signs:
    """Cheng et al. 2020, eq. 4: one query per u."""

    draws: int
    reserve: int = 20  # queries for a step after the last estimate

    def __call__(self, problem: Problem, found: Found, aim: _Aim, beta: Tensor, key: Key) -> tuple[Tensor, _Aim, Found]:
        """All u in batches of a few."""
        counts = (found.left(problem) - self.reserve).clamp(0, self.draws) * found.some
        base, wide = aim.theta[:, None], (..., *([None] * (problem.x.ndim - 1)))
        like = problem.x.new_empty(1).expand(len(problem), CHUNK, *problem.x.shape[1:])
        signed, plain = torch.zeros_like(aim.theta, dtype=torch.float64), torch.zeros_like(aim.theta, dtype=torch.float64)
        score, many = torch.zeros_like(beta), torch.zeros_like(beta)
        for chunk in range(-(-int(counts.max()) // CHUNK)):
            u = normalized(key.fold("draw", chunk).normal(problem.ids, like).flatten(0, 1), 2).reshape(like.shape)
            theta = normalized((base + per_sample(beta, u) * u).flatten(0, 1), 2).reshape(u.shape)
            z = ray(problem, theta.transpose(0, 1))(aim.distance)
            asked, hit, found = look_many(problem, found, z.transpose(0, 1), counts - chunk * CHUNK)
            sign = torch.where(hit, -1.0, 1.0).double() * asked
            signed, plain = signed + (sign[wide] * u).sum(1), plain + (asked.double()[wide] * u).sum(1)
            score, many = score + sign.sum(1), many + asked.sum(1)
        mean = per_sample(score / many.clamp(min=1), signed)
        gradient = torch.where(mean.abs() == 1, signed, signed - mean * plain)
        return gradient.to(aim.theta.dtype), aim, found


def crossing(problem: Problem, found: Found, path: Path, near: Tensor, tolerance: Tensor, want: Tensor) -> tuple[Tensor, Tensor, Found]:
    """Where each path crosses the boundary, looked for around `near` (B,): known (B,) bool, distance (B,), found.

    The bracket grows from 1 % of `near`, doubling, at most to 0 or to twice `near`, beyond which it is not known.
    """
    asked, hit, found = look(problem, found, path(near), want)
    inside, width = hit, 0.01 * near
    low, high, growing = near, near, asked
    while bool(growing.any()):
        low = torch.where(growing & hit, (near - width).clamp(min=0.0), low)
        high = torch.where(growing & ~hit, near + width, high)
        asked_now, inside, found = look(problem, found, path(torch.where(hit, low, high)), growing & (hit | (width <= near)))
        growing = asked_now & (inside == hit)
        high, low = torch.where(growing & hit, low, high), torch.where(growing & ~hit, high, low)
        width = torch.where(growing, 2 * width, width)
    known = asked & (hit | (width <= near))
    distance, found = bisect(problem, found, path, low, high, tolerance, known)
    return known, distance, found


@dataclass(frozen=True)
class _Descending:
    found: Found
    aim: _Aim
    step: Tensor  # (B,) float64
    beta: Tensor  # (B,) float64
    number: int = 0

    @property
    def z(self) -> Tensor:
        """The smallest success, to be judged at the end."""
        return self.found.z


@dataclass(frozen=True)
class DirectionSearch:
    """See `opt_attack` and `sign_opt`."""

    budget: int
    directions: int
    estimate: Estimate
    first: float
    beta: float
    starts: Tensor | None

    def init(self, problem: Problem, steps: int) -> _Descending:
        """Nothing asked yet."""
        ones = torch.ones_like(problem.radius)
        aim = _Aim(torch.zeros_like(problem.x), torch.inf * ones)
        return _Descending(Found.nothing(problem, self.budget), aim, self.first * ones, self.beta * ones)

    def step(self, problem: Problem, state: _Descending) -> tuple[Reading, _Descending]:
        """The best so far; then the first directions, or one step of descent."""
        after = self._begin(problem, state) if state.number == 0 else self._descend(problem, state)
        return state.found.reading(problem), replace(after, number=state.number + 1)

    def _begin(self, problem: Problem, state: _Descending) -> _Descending:
        """The nearest boundary along a start and some Gaussian directions."""
        found = start(problem, state.found, self.starts)
        theta = normalized(found.z - problem.x, 2)
        length = torch.where(found.some, found.size, 0.0)
        distance, found = bisect(problem, found, ray(problem, theta), 0 * length, length, state.beta / 500 * length, found.some)
        aim = state.aim.where(found.some, theta, distance)
        for number in range(self.directions):
            theta = normalized(problem.key.fold("direction", number).normal(problem.ids, problem.x), 2)
            aim, _, found = self._try(problem, found, aim, theta, state.beta, found.some)
        return replace(state, found=found, aim=aim)

    def _try(self, problem: Problem, found: Found, aim: _Aim, theta: Tensor, beta: Tensor, want: Tensor) -> tuple[_Aim, Tensor, Found]:
        """Another direction, taken over where the boundary is nearer along it; which samples (B,) did."""
        present = torch.where(found.some, aim.distance, 0.0)
        _, distance, found = nearer(problem, found, ray(problem, theta), present, beta / 500 * present, want)
        better = want & (distance < present)
        return aim.where(better, theta, distance), better, found

    def _descend(self, problem: Problem, state: _Descending) -> _Descending:
        """One estimate, and the step along it that pays."""
        s = state
        present = _Aim(s.aim.theta, torch.where(s.found.some, s.aim.distance, 1.0))
        gradient, aim, found = self.estimate(problem, s.found, present, s.beta, problem.key.fold("estimate", s.number))
        slope = normalized(gradient, 2)
        able = found.some & (slope.flatten(1) != 0).any(1)
        aim, step, found = self._line(problem, replace(s, found=found, aim=aim), s.aim.theta, slope, able)
        stuck = able & (step < 1e-4)
        beta = torch.where(stuck, 0.1 * s.beta, s.beta).clamp(min=1e-8)
        aim = _Aim(aim.theta, torch.where(found.some, aim.distance, torch.inf))
        return replace(s, found=found, aim=aim, step=torch.where(stuck, 1.0, step), beta=beta)

    def _line(self, problem: Problem, s: _Descending, theta: Tensor, slope: Tensor, want: Tensor) -> tuple[_Aim, Tensor, Found]:
        """Steps from theta against the slope: twice as long while that pays; if none did, a quarter as long until one does."""
        aim, step, found, moved, able = s.aim, s.step, s.found, torch.zeros_like(want), want
        for growing in (True, False):
            for _ in range(15):
                step = step if growing else torch.where(want, step / 4, step)
                there = normalized(theta - per_sample(step, slope) * slope, 2)
                aim, better, found = self._try(problem, found, aim, there, s.beta, want)
                step = torch.where(want, 2 * step, step) if growing else step
                moved, want = moved | better, better if growing else want & ~better
                if not bool((want & (found.left(problem) > 0)).any()):
                    break
            want = able & ~moved
        return aim, step, found
