"""HopSkipJump: the boundary's normal from a batch of yes-or-no answers, a step along it, and back to the boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.decision import CHUNK, Found, bisect, interval, inward_path, label_only, look, look_many, start_near
from epsball.attacks.registry import register
from epsball.core import Attack, Key, Problem, Projects, Reading
from epsball.core.rows import per_sample, rowwise
from epsball.core.rule import normalized
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.threats import L2, Linf


@register(
    paper="Chen, Jordan & Wainwright 2020, arXiv 1904.02144",
    access=Access.LABELS,
    threats=("l2", "linf"),
    kind="smallest",
    cost="at most steps forwards, 1 forward to judge",
)
def hop_skip_jump(
    steps: int = 1000,
    draws: int = 100,
    gamma: float = 0.01,
    tries: int = 50,
    starts: Tensor | None = None,
    threat: Projects | None = None,
) -> Attack:
    """HopSkipJump, Algorithm 2: g = mean of (phi_b - mean phi) u_b at x_t + delta u_b; x_t + xi v, v = g or sign(g); bisect to x.

    phi is +1 where the goal is reached and -1 elsewhere (eq. 9 and 16); xi = ||x_t - x|| / sqrt(t), halved until it succeeds;
    delta = gamma ||x_t - x||; bisections end at theta = gamma / sqrt(d) under L2 and gamma / d under Linf; `draws` sqrt(t) points
    for the t-th estimate; d counts the features that may change.

    Args:
        steps: queries per sample. draws: points of the first estimate. gamma: distance of the points of an estimate, in distances from x.
        tries: random directions that are tried for a nearer start, one query each where there is none; under L2 at most a
            tenth of steps, where an estimate gains more.
        starts: (N, ...) inputs to start from, tried nearest first; a `Targeted` goal wants some of the target's class.
        threat: L2 or Linf.

    Cost: at most steps forwards per sample, 1 forward to judge.

    Differs from the paper and the released code, where gamma is 1 / d: with d = 3,072 that is finer than float32 tells apart, and many
    queries come less near under Linf. ART has 0.01, too. It goes on from the smallest success instead of the last; noise of two kinds
    is tried for a start, and random directions for a nearer one; the last estimate leaves queries for its own step.
    """
    if draws < 1:
        raise BadInput(f"draws: {draws}: must be 1 or more")
    if not gamma > 0:
        raise BadInput(f"gamma: {gamma}: must be above 0")
    if tries < 0:
        raise BadInput(f"tries: {tries}: must be 0 or more")
    looks, spent = 1, 0
    while spent < steps:
        spent, looks = spent + _count(draws, looks) + 1, looks + 1
    return label_only("hop_skip_jump", threat or L2(), (L2, Linf), HopSkipJump(steps, draws, gamma, tries, starts), looks, steps)


def _count(draws: int, number: int) -> int:
    """Points of the estimate of iteration `number`, from 1."""
    return int(draws * math.sqrt(number))


@dataclass(frozen=True)
class _Standing:
    found: Found
    number: int = 0

    @property
    def z(self) -> Tensor:
        """The smallest success, to be judged at the end."""
        return self.found.z


@dataclass(frozen=True)
class HopSkipJump:
    """See `hop_skip_jump`."""

    budget: int
    draws: int
    gamma: float
    tries: int
    starts: Tensor | None

    def init(self, problem: Problem, steps: int) -> _Standing:
        """Nothing asked yet."""
        return _Standing(Found.nothing(problem, self.budget))

    def step(self, problem: Problem, state: _Standing) -> tuple[Reading, _Standing]:
        """The best so far; then a start, or one iteration of Algorithm 2."""
        found = state.found
        after = self._begin(problem, found) if state.number == 0 else self._hop(problem, found, state.number)
        return found.reading(problem), replace(state, found=after, number=state.number + 1)

    def _theta(self, problem: Problem) -> Tensor:
        """(B,) the tolerance of a bisection over [0, 1]."""
        low, high = interval(problem)
        d = (high > low).flatten(1).sum(1).clamp(min=1).double()
        return self.gamma / (d.sqrt() if problem.threat.name == "l2" else d)

    def _begin(self, problem: Problem, found: Found) -> Found:
        tries = min(self.tries, self.budget // 10) if problem.threat.name == "l2" else self.tries
        found = start_near(problem, found, self.starts, tries)
        return self._back(problem, found, found.z, found.some)

    def _back(self, problem: Problem, found: Found, far: Tensor, want: Tensor) -> Found:
        """To the boundary between x and `far`, which fools the model."""
        theta = self._theta(problem)
        zero, one = torch.zeros_like(theta), torch.ones_like(theta)
        return bisect(problem, found, inward_path(problem, far), zero, one, theta, want)[1]

    def _hop(self, problem: Problem, found: Found, number: int) -> Found:
        theta = self._theta(problem)
        low, high = interval(problem)
        size = torch.where(found.some, found.size, 1.0)
        width = torch.where(high > low, high - low, 0).flatten(1).amax(1).double()
        delta = 0.1 * width if number == 1 else self.gamma * size
        reserve = (-theta.log2()).ceil().long() + 4
        counts = (found.left(problem) - reserve).clamp(0, _count(self.draws, number)) * found.some
        here = found.z
        gradient, found = normal(problem, found, here, delta, counts, problem.key.fold("hop", number))
        direction = gradient.sign() if problem.threat.name == "linf" else gradient
        step, want = size / math.sqrt(number), counts > 0
        far, moved = here, torch.zeros_like(want)
        while True:
            there = (here + per_sample(step, here) * direction).clamp(low, high)
            asked, hit, found = look(problem, found, there, want & ~moved & (step > size * theta))
            if not bool(asked.any()):
                return self._back(problem, found, far, moved)
            far, moved, step = torch.where(rowwise(hit, far), there, far), moved | hit, step / 2


def normal(problem: Problem, found: Found, point: Tensor, delta: Tensor, counts: Tensor, key: Key) -> tuple[Tensor, Found]:
    """The boundary's normal at `point` (B, ...) from counts (B,) yes-or-no answers at distance delta (B,): unit rows (B, ...).

    HSJA, eq. 16: the mean of (phi - mean phi) u, u as it is after the cut to the box; plain phi u where all phi agree.

    Cost: counts forwards per sample.
    """
    low, high = (bound[:, None] for bound in interval(problem))
    around, free = point[:, None], (high > low).to(point.dtype)
    like = point.new_empty(1).expand(len(point), CHUNK, *point.shape[1:])
    total = torch.zeros_like(point, dtype=torch.float64), torch.zeros_like(point, dtype=torch.float64)
    score, many = torch.zeros_like(delta), torch.zeros_like(delta)
    for chunk in range(-(-int(counts.max()) // CHUNK)):
        draw = key.fold("draw", chunk)
        noise = draw.normal(problem.ids, like) if problem.threat.name == "l2" else 2 * draw.uniform(problem.ids, like) - 1
        unit = normalized((noise * free).flatten(0, 1), 2).reshape(noise.shape)
        z = torch.minimum(torch.maximum(around + per_sample(delta, noise) * unit, low), high)
        asked, hit, found = look_many(problem, found, z, counts - chunk * CHUNK)
        u = (z - around).double() / per_sample(delta.clamp(min=1e-300), z.double())
        phi = torch.where(hit, 1.0, -1.0).double() * asked
        wide = (..., *([None] * (point.ndim - 1)))
        total = total[0] + (phi[wide] * u).sum(1), total[1] + (asked.double()[wide] * u).sum(1)
        score, many = score + phi.sum(1), many + asked.sum(1)
    mean = per_sample(score / many.clamp(min=1), total[0])
    estimate = torch.where(mean.abs() == 1, total[0], total[0] - mean * total[1])
    return normalized(estimate, 2).to(point.dtype), found
