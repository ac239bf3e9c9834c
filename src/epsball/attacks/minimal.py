"""The smallest change, found by moving the radius itself, per sample: DDN (L2) and FMN (L0, L1, L2, Linf)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.registry import register
from epsball.core import Attack, Gradient, Objective, Problem, Projects, Reading, autograd, valid
from epsball.core.rows import per_sample
from epsball.core.rule import normalized
from epsball.errors import BadInput
from epsball.objectives import cross_entropy, margin
from epsball.threats import L0, L2


def limits(problem: Problem) -> tuple[Tensor, Tensor]:
    """(low, high) of every feature, (B, ...): box, mask and budget as the threat knows them."""
    everything = torch.full_like(problem.radius, torch.inf)
    low, high = (problem.threat.project(problem.x, torch.full_like(problem.x, end), everything) for end in (-torch.inf, torch.inf))
    return low, high


def width(problem: Problem) -> Tensor:
    """(B,) float64: the widest legal interval of any feature, so that a step of 1 means the same in every box; 1 where unbounded."""
    low, high = limits(problem)
    wide = (high.double() - low.double()).flatten(1).amax(1)
    return torch.where(torch.isfinite(wide), wide, torch.ones_like(wide))


def _margin(reading: Reading) -> Tensor:
    """(B,) float64: |score|, +inf where it is no number."""
    return torch.nan_to_num(reading.score.double(), nan=torch.inf).abs()


def _annealed(first: float, last: float, share: float) -> float:
    """Half a cosine from `first` down to `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class _Shell:
    """Where a search stands: at z, inside `radius` (B,); `best` (B,) is the smallest success, +inf where none."""

    z: Tensor
    radius: Tensor
    limit: Tensor
    width: Tensor
    best: Tensor
    moves: int
    steps: int


def _begin(problem: Problem, steps: int, radius: Tensor) -> _Shell:
    limit = torch.minimum(problem.radius, problem.threat.reach(problem.x))
    nothing = torch.full_like(limit, torch.inf)
    return _Shell(problem.x.clone(), torch.minimum(radius, limit), limit, width(problem), nothing, 0, max(steps, 1))


@dataclass(frozen=True)
class DecoupledNorm:
    """DDN, Algorithm 1: a step along the unit gradient, then back onto a sphere that shrinks where the goal is reached and grows elsewhere.

    Attributes:
        gamma: share by which the sphere shrinks or grows. start: first radius, in box widths. step_size: first step, in radii but
            never more than in box widths; the last is a hundredth of it.
    """

    gamma: float = 0.05
    step_size: float = 1.0
    start: float = 1.0
    gradient: Gradient = autograd

    def init(self, problem: Problem, steps: int) -> _Shell:
        """At the clean input."""
        return _begin(problem, steps, self.start * width(problem))

    def step(self, problem: Problem, state: _Shell) -> tuple[Reading, _Shell]:
        """One look, one move."""
        x, reading = problem.x, self.gradient(problem, state.z)
        direction = self._direction(problem, reading, state.moves)
        length = _annealed(self.step_size, self.step_size / 100, state.moves / state.steps) * torch.minimum(state.width, state.radius)
        factor = torch.where(problem.goal.reached(reading.output), 1 - self.gamma, 1 + self.gamma)
        radius = torch.minimum(state.radius * factor, state.limit)
        change = state.z - x + per_sample(length, x) * direction
        z = problem.threat.project(x, x + per_sample(radius, x) * normalized(change, 2), radius)
        return reading, replace(state, z=z, radius=radius, moves=state.moves + 1)

    def _direction(self, problem: Problem, reading: Reading, move: int) -> Tensor:
        unit = normalized(reading.gradient, 2)
        lost = (unit.flatten(1) == 0).all(1).nonzero().squeeze(1)
        if not len(lost):
            return unit
        noise = problem.key.fold("lost", move).normal(problem.ids[lost], problem.x[lost])
        return unit.index_copy(0, lost, normalized(noise, 2))


@dataclass(frozen=True)
class AdaptiveNorm:
    """FMN, Algorithm 1: a step along the unit gradient of the margin, then back into a ball whose radius adapts.

    Until a first success the radius is the distance to the boundary by linear approximation, |margin| over the dual norm
    of the gradient; from then on it shrinks by gamma at a success and grows by gamma elsewhere. Counted threats (L0)
    start at 1 and move by gamma or by 1, whichever is more.

    Attributes:
        counts: the radius is a whole number (L0). gamma, last_gamma: first and last share by which it moves.
        step_size: first step, in box widths but never more than in (linear) L2 distances to the boundary; the last is a hundredth
            of it. Both follow half a cosine.
    """

    counts: bool
    gamma: float = 0.05
    last_gamma: float = 0.001
    step_size: float = 1.0
    gradient: Gradient = autograd

    def init(self, problem: Problem, steps: int) -> _Shell:
        """At the clean input; the first radius is chosen by the first look."""
        return _begin(problem, steps, torch.full_like(problem.radius, 1.0 if self.counts else torch.inf))

    def step(self, problem: Problem, state: _Shell) -> tuple[Reading, _Shell]:
        """One look, one move."""
        x, share = problem.x, state.moves / state.steps
        reading = self.gradient(problem, state.z)
        hit, size = problem.goal.reached(reading.output), problem.threat.size(x, state.z)
        best = torch.where(hit, torch.minimum(state.best, size), state.best)
        radius = self._radius(problem, reading, replace(state, best=best), hit, size, _annealed(self.gamma, self.last_gamma, share))
        steep = torch.linalg.vector_norm(torch.nan_to_num(reading.gradient, nan=0.0).double().flatten(1), dim=1)
        extent = torch.linalg.vector_norm((state.z.double() - x.double()).flatten(1), dim=1) + _margin(reading) / steep.clamp(min=1e-300)
        length = _annealed(self.step_size, self.step_size / 100, share) * torch.minimum(state.width, extent)
        moved = state.z + per_sample(length, x) * normalized(reading.gradient, 2)
        return reading, replace(state, z=problem.threat.project(x, moved, radius), radius=radius, best=best, moves=state.moves + 1)

    def _radius(self, problem: Problem, reading: Reading, state: _Shell, hit: Tensor, size: Tensor, gamma: float) -> Tensor:
        radius, best = state.radius, state.best
        if self.counts:
            fewer = torch.minimum(torch.minimum(radius - 1, (radius * (1 - gamma)).floor()), best).clamp(min=1.0)
            return torch.minimum(torch.where(hit, fewer, torch.maximum(radius + 1, (radius * (1 + gamma)).floor())), state.limit)
        steepest = problem.threat.steepest(problem.x, state.z, reading.gradient)
        slope = (torch.nan_to_num(reading.gradient, nan=0.0).double() * steepest.double()).flatten(1).sum(1)
        # A little past the boundary: a ball that only touches it, rounded inward, would never hold a success.
        ahead = (1 + gamma) * (size + _margin(reading) / slope.clamp(min=1e-300))
        outward = torch.where(torch.isfinite(best), radius * (1 + gamma), ahead)
        return torch.minimum(torch.where(hit, torch.minimum(radius * (1 - gamma), best), outward), state.limit)


@register(
    paper="Rony et al. 2019, arXiv 1811.09600", threats=("l2",), kind="smallest", cost="steps forwards and backwards, 1 forward to judge"
)
def ddn(steps: int = 100, gamma: float = 0.05, threat: Projects | None = None, objective: Objective = cross_entropy) -> Attack:
    """Decoupled direction and norm: the direction follows the gradient, the norm follows success. Smallest L2 change.

    z <- P(x + r * u / ||u||), u = z - x + a * g / ||g||; r <- (1 - gamma) r at a success, (1 + gamma) r elsewhere; a falls from 1
    to 0.01 along a cosine. A zero gradient is replaced by keyed noise, as in the released code. That code rounds every
    iterate to 8 bits; we do not. Lengths scale with the width of the box, and steps with radii below it: the paper's absolute
    0.01 is coarse where the boundary is near.

    Args:
        steps: looks. gamma: share by which the radius moves.
    """
    if not 0 < gamma < 1:
        raise BadInput(f"gamma: {gamma}: must be between 0 and 1")
    return Attack("ddn", threat or L2(), objective, DecoupledNorm(gamma), steps, smallest=True)


@register(
    paper="Pintor et al. 2021, arXiv 2102.12827",
    threats=("linf", "l2", "l1", "l0", "l0f"),
    kind="smallest",
    cost="steps forwards and backwards, 1 forward to judge",
)
def fmn(steps: int = 100, gamma: float = 0.05, step: float = 1.0, threat: Projects | None = None, objective: Objective = margin) -> Attack:
    """Fast minimum norm: the boundary distance by linear approximation, then a radius that adapts to success. L0, L1, L2, Linf.

    The dual norm of the paper is the slope along the threat's own steepest feasible direction, so features at the edge of
    the box do not count. Projections are exact onto ball and box together; the released code clips after projecting. The first
    radius goes a share gamma past the approximate boundary (the paper's own only touches it: on a linear model it never
    succeeds), and steps scale with the distance where that is below the width of the box.

    Args:
        steps: looks. gamma: first share by which the radius moves, 0.001 at the end. step: first step, L2, in box widths.
    """
    if not 0 < gamma < 1:
        raise BadInput(f"gamma: {gamma}: must be between 0 and 1")
    threat = threat or L2()
    return Attack("fmn", threat, objective, AdaptiveNorm(isinstance(threat, L0), gamma, step_size=step), steps, smallest=True)


# What the searches over a constant share (C&W, EAD, L-BFGS): rounds, a bisection and looks, all per sample.


def look(problem: Problem, z: Tensor, awake: Tensor, last: Reading | None, gradient: Gradient) -> Reading:
    """A reading at z of the samples `awake` (B,); the others keep their last one and cost nothing."""
    rows = awake.nonzero().squeeze(1)
    if last is None or len(rows) == len(z):
        return gradient(problem, z)
    if not len(rows):
        return last
    part = gradient(problem.take(rows), z[rows])
    fields = ("z", "x_adv", "output", "score", "gradient")
    return Reading(**{name: getattr(last, name).index_copy(0, rows, getattr(part, name)) for name in fields})


def at_rest(problem: Problem) -> Reading:
    """The clean input and its known answer: what a search has to show that is over."""
    clean = problem.objective(problem, problem.x, problem.x, problem.clean)
    return Reading(problem.x, problem.x, problem.clean, clean)


def offered(problem: Problem, reading: Reading, success: Tensor) -> Reading:
    """What `run` may keep: successes (B,), and answers that are no numbers; the clean input elsewhere, so that a failure returns it."""
    shown = success | ~valid(reading.output)
    wide, flat = per_sample(shown, reading.z) > 0, shown[:, None]
    clean = at_rest(problem)
    z = torch.where(wide, reading.z, clean.z)
    return Reading(z, z, torch.where(flat, reading.output, clean.output), torch.where(shown, reading.score, clean.score))


def first_weight(reading: Reading) -> Tensor:
    """(B,) float64: 2 |score| / ||g||^2, at which |d|^2 + weight * |score| has its minimum on the boundary of a linear model."""
    steep = torch.nan_to_num(reading.gradient.double(), nan=0.0, posinf=0.0, neginf=0.0).flatten(1).square().sum(1)
    weight = 2 * torch.nan_to_num(reading.score.double(), nan=0.0).abs() / steep.clamp(min=1e-300)
    return torch.where((weight > 0) & torch.isfinite(weight), weight, torch.ones_like(weight))


@dataclass(frozen=True)
class Bracket:
    """A constant per sample between one that failed and one that succeeded; float64 (B,)."""

    weight: Tensor
    lower: Tensor
    upper: Tensor

    @staticmethod
    def start(weight: Tensor) -> Bracket:
        """Nothing known yet."""
        return Bracket(weight, torch.zeros_like(weight), torch.full_like(weight, torch.inf))

    def next(self, over: Tensor, hit: Tensor, growth: float = 10.0) -> Bracket:
        """Where a round is `over` (B,): halves the interval, or multiplies by `growth` while nothing succeeded."""
        upper = torch.where(over & hit, torch.minimum(self.upper, self.weight), self.upper)
        lower = torch.where(over & ~hit, torch.maximum(self.lower, self.weight), self.lower)
        weight = torch.where(torch.isfinite(upper), (lower + upper) / 2, self.weight * growth)
        return Bracket(torch.where(over, weight, self.weight), lower, upper)


NEVER = 1 << 30


@dataclass(frozen=True)
class Round:
    """One sample's round, (B,) each: looks so far, looks since the lowest loss and since a success, number of rounds before it."""

    looks: Tensor
    stale: Tensor
    since: Tensor
    number: Tensor
    lowest: Tensor

    def after(self, loss: Tensor, success: Tensor) -> Round:
        """One look later. Progress is a loss lower by a thousandth."""
        gain = loss < 0.999 * self.lowest
        lowest = torch.where(gain, loss, self.lowest)
        stale = torch.where(gain, torch.zeros_like(self.stale), self.stale + 1)
        since = torch.where(success, torch.zeros_like(self.since), self.since + 1)
        return Round(self.looks + 1, stale, since, self.number, lowest)

    def restarted(self, over: Tensor) -> Round:
        """A new round where the last is `over` (B,)."""
        zero, never = torch.zeros_like(self.looks), torch.full_like(self.since, NEVER)
        lowest = self.lowest.masked_fill(over, torch.inf)
        looks, stale, since = (torch.where(over, *pair) for pair in ((zero, self.looks), (zero, self.stale), (never, self.since)))
        return Round(looks, stale, since, self.number + over, lowest)

    @staticmethod
    def first(like: Tensor) -> Round:
        """Nothing looked at yet."""
        zero = torch.zeros_like(like, dtype=torch.int64)
        return Round(zero, zero, zero + NEVER, zero, torch.full_like(like, torch.inf))
