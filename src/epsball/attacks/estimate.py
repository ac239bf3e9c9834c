"""Gradients estimated from scores: NES and SPSA as gradient sources in the place of `autograd`, and bandits with priors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from epsball.attacks.registry import register
from epsball.attacks.square import as_image, signs
from epsball.core import Attack, Descent, Momentum, Objective, OfRadius, Problem, Projects, Reading, Steepest, Unit, chain, valid
from epsball.core.attack import recipe
from epsball.core.random import Key
from epsball.core.rows import per_sample
from epsball.core.rule import normalized
from epsball.core.threat import Z
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.objectives import cross_entropy, margin
from epsball.threats import L2, Linf

_PAIRS = 32  # antithetic pairs per sample and batch: bounds the memory of one look


def normal(key: Key, ids: Tensor, like: Tensor) -> Tensor:
    """u ~ N(0, 1)."""
    return key.normal(ids, like)


def rademacher(key: Key, ids: Tensor, like: Tensor) -> Tensor:
    """u = +-1."""
    return signs(key.uniform(ids, like))


@dataclass(frozen=True, repr=False)
class _Differences:
    """g_i = sum_j u_ji (f(z + s u_j) - f(z - s u_j)) / sum_j u_ji d_ji, with d_j the distance between the two points asked.

    Far from every bound d_ji = 2 s u_ji. At the edge of the box the points are cut to it, d_ji is shorter, and the quotient
    still tends to the exact slope of a linear f. A feature that no point moves has slope 0.
    """

    draws: int
    scale: float

    def estimate(self, problem: Problem, z: Z, draw: Any) -> Reading:
        """One honest look at z, then `draws` beside it."""
        reading = problem.judge(z)
        look = problem.tally.forwards[problem.tally.rows] // (self.draws + 1)  # looks cost the same: a clock that no batch shifts
        ids = problem.ids + look.to(problem.ids.device) * 0x5851F42D4C957F2D
        slope, moved = (torch.zeros(z.shape, dtype=torch.float64, device=z.device) for _ in range(2))
        for first in range(0, self.draws // 2, _PAIRS):
            numbers = range(first, min(first + _PAIRS, self.draws // 2))
            u = torch.stack([draw(problem.key.fold("direction", number), ids, z.float()) for number in numbers], 1).double()
            gain, distance = self._ask(problem, z, u)
            slope += (u * gain.reshape(*gain.shape, *([1] * (z.ndim - 1)))).sum(1)
            moved += (u * distance).sum(1)
        gradient = torch.where(moved > 0, slope / moved.clamp(min=1e-300), torch.zeros_like(slope))
        return replace(reading, gradient=gradient.to(z.dtype))

    def _ask(self, problem: Problem, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K) gains and (B, K, ...) distances between z + s u and z - s u, both inside the box."""
        n, count = u.shape[:2]
        part = problem.take(torch.arange(n, device=z.device).repeat_interleave(2 * count))
        center, step = z.double()[:, None, None], self.scale * torch.stack([u, -u], 2)
        asked = (center + step).flatten(0, 2).to(z.dtype)
        asked = part.threat.project(part.x, asked, part.threat.reach(part.x))
        reading = part.judge(asked)
        score = reading.score.double().masked_fill(~valid(reading.output), torch.nan).reshape(n, count, 2)
        ends = asked.double().reshape(n, count, 2, *z.shape[1:])
        return torch.nan_to_num(score[:, :, 0] - score[:, :, 1], nan=0.0, posinf=0.0, neginf=0.0), ends[:, :, 0] - ends[:, :, 1]


@dataclass(frozen=True, repr=False)
class Nes:
    """Natural evolution strategies: a gradient from antithetic Gaussian draws, Ilyas et al. 2018, arXiv 1804.08598, Algorithm 1.

    Args:
        draws: points asked beside z, an even number. sigma: their spread, in units of z.

    Raises:
        BadInput: draws below 2 or odd, sigma not positive.

    Cost: draws + 1 forwards per look. Differs from the paper: points stay inside the box, and each slope is divided by the
    distance really asked for, so that the estimate tends to the gradient there too.
    """

    draws: int = 50
    sigma: float = 1e-3

    def __post_init__(self) -> None:
        check(self.draws, "sigma", self.sigma)

    def __call__(self, problem: Problem, z: Z) -> Reading:
        """One look and an estimated gradient."""
        return _Differences(self.draws, self.sigma).estimate(problem, z, normal)

    def __repr__(self) -> str:
        return recipe(self)


@dataclass(frozen=True, repr=False)
class Spsa:
    """Simultaneous perturbation: a gradient from draws of +-1, Uesato et al. 2018, arXiv 1802.05666, Algorithm 1.

    Args:
        draws: points asked beside z, an even number. delta: how far each feature moves, in units of z.

    Raises:
        BadInput: draws below 2 or odd, delta not positive.

    Cost: draws + 1 forwards per look. Differs from the paper: points stay inside the box, as in `Nes`.
    """

    draws: int = 128
    delta: float = 0.01

    def __post_init__(self) -> None:
        check(self.draws, "delta", self.delta)

    def __call__(self, problem: Problem, z: Z) -> Reading:
        """One look and an estimated gradient."""
        return _Differences(self.draws, self.delta).estimate(problem, z, rademacher)

    def __repr__(self) -> str:
        return recipe(self)


def check(draws: int, name: str, value: float) -> None:
    """Refuses counts that are no pairs and steps that are not positive."""
    if draws < 2 or draws % 2:
        raise BadInput(f"draws: {draws}: must be an even number, 2 or more")
    if not 0 < value < float("inf"):
        raise BadInput(f"{name}: {value}: must be above 0")


def looks(steps: int, draws: int) -> tuple[int, int]:
    """(looks, draws of each) that `steps` queries allow beside the last one, which judges; fewer draws if not even one look fits."""
    if steps < 0:
        raise BadInput(f"steps: {steps}: must be 0 or more")
    if draws < 2:
        raise BadInput(f"draws: {draws}: must be 2 or more")
    draws = max(min(draws, steps - 2) // 2 * 2, 2)
    return max(steps - 1, 0) // (draws + 1), draws


@register(
    paper="Ilyas et al. 2018, arXiv 1804.08598",
    access=Access.SCORES,
    threats=("linf", "l2"),
    cost="steps forwards",
)
def nes(
    steps: int = 5000,
    draws: int = 50,
    sigma: float = 1e-3,
    share: float = 0.3,
    threat: Projects | None = None,
    objective: Objective = margin,
) -> Attack:
    """Query-limited attack: projected ascent on gradients estimated by `Nes`, Ilyas et al. 2018, arXiv 1804.08598, section 3.1.

    Args:
        steps: queries per sample. draws: queries per gradient, 2 or more; rounded down to even, and to what steps allow.
        sigma: spread of the draws, in units of the input. share: of the radius, length of a move. threat: Linf or L2.

    Cost: at most steps forwards (1 where steps is 0), no backward: (steps - 1) // (draws + 1) moves.

    Differs from the released code, whose momentum (0.9) it has: the margin instead of the cross-entropy, and moves that are
    a share of the radius instead of 0.01, halved on a plateau. APGD's step sizes, which rewind to the best point, break
    fewer samples: estimates are too noisy to judge a step by.
    """
    count, draws = looks(steps, draws)
    strategy = Descent(OfRadius(share), chain(Momentum(0.9), Steepest()), Nes(draws, sigma))
    return replace(Attack("nes", threat or Linf(), objective, strategy, count), access=Access.SCORES)


@register(
    paper="Uesato et al. 2018, arXiv 1802.05666",
    access=Access.SCORES,
    threats=("linf", "l2"),
    cost="steps forwards",
)
def spsa(
    steps: int = 5000,
    draws: int | None = None,
    delta: float = 0.01,
    share: float = 0.3,
    threat: Projects | None = None,
    objective: Objective = margin,
) -> Attack:
    """SPSA: Adam on gradients estimated by `Spsa`, projected, Uesato et al. 2018, arXiv 1802.05666, Algorithm 1.

    Args:
        steps: queries per sample. draws: queries per gradient, 2 or more; rounded down to even, and to what steps allow. None is a
            thirtieth of steps, from 8 to 128: with few queries many rough moves go farther than a few good ones.
        delta: how far each feature moves, in units of the input. share: of the radius, length of a move.
        threat: Linf or L2.

    Cost: at most steps forwards (1 where steps is 0), no backward: (steps - 1) // (draws + 1) moves.

    Differs from the paper: a move is a share of the radius (theirs is 0.01 at radii of 2 to 8 / 255), measured in the norm
    of the threat.
    """
    count, draws = looks(steps, min(max(steps // 30, 8), 128) if draws is None else draws)
    threat = threat or Linf()
    if not isinstance(threat, (Linf, L2)):
        raise BadInput(f"threat '{threat.name}': has no move for Adam: use linf or l2")
    rule = chain(Adam(), Unit(float("inf") if isinstance(threat, Linf) else 2.0))
    strategy = Descent(OfRadius(share), rule, Spsa(draws, delta))
    return replace(Attack("spsa", threat, objective, strategy, count), access=Access.SCORES)


@dataclass(frozen=True)
class Adam:
    """m / (sqrt(v) + 1e-8 * scale) with the averages of Kingma & Ba 2015, arXiv 1412.6980, Algorithm 1; any scale of gradients."""

    beta1: float = 0.9
    beta2: float = 0.999

    def start(self, problem: Problem, z: Z) -> tuple[Tensor, Tensor, int]:
        """Nothing seen yet."""
        zeros = torch.zeros(z.shape, dtype=torch.float64, device=z.device)
        return zeros, zeros, 0

    def turn(self, problem: Problem, z: Z, gradient: Z, memory: tuple[Tensor, Tensor, int]) -> tuple[Z, tuple[Tensor, Tensor, int]]:
        """One update of both averages."""
        first, second, count = memory
        exact = torch.nan_to_num(gradient.double(), nan=0.0, posinf=0.0, neginf=0.0)
        first = self.beta1 * first + (1 - self.beta1) * exact
        second = self.beta2 * second + (1 - self.beta2) * exact.square()
        count += 1
        root = (second / (1 - self.beta2**count)).sqrt()
        direction = first / (1 - self.beta1**count) / (root + 1e-8 * per_sample(root.flatten(1).amax(1), root) + 1e-300)
        return direction.to(z.dtype), (first, second, count)


@register(
    paper="Ilyas, Engstrom & Madry 2019, arXiv 1807.07978",
    access=Access.SCORES,
    threats=("linf", "l2"),
    cost="steps forwards",
)
def bandits(
    steps: int = 5000,
    grid: int = 50,
    explore: float | None = None,
    delta: float | None = None,
    rate: float | None = None,
    share: float = 0.5,
    threat: Projects | None = None,
    objective: Objective = cross_entropy,
) -> Attack:
    """Bandits with time and data priors: Ilyas, Engstrom & Madry 2019, arXiv 1807.07978, Algorithms 1 to 3.

    A belief v about the gradient outlives each step (time prior) and is constant on tiles of pixels (data prior). Each step
    asks at z + delta * unit(v +- explore * u), u normal of length about 1, and moves v along u by the slope: exponentiated
    gradients under Linf, plain ones under L2. Then z follows v.

    Args:
        steps: queries per sample. grid: tiles per side, at most one per pixel. explore: length of u. delta: distance asked at, in units of
        the input. rate: of learning v. Where not given: 1, 0.1 and 10 under Linf (released: rate 100, which breaks fewer
        small images), and the released 0.01, 0.01 and 0.1 under L2. share: of the radius, length of a move. threat: Linf or L2.

    Cost: at most steps forwards (1 where steps is 0), no backward: 3 per move.

    Differs from the released code: points asked stay inside the box, and a move is a share of the radius. A vector is an
    image of one row.
    """
    threat = threat or Linf()
    if not isinstance(threat, (Linf, L2)):
        raise BadInput(f"threat '{threat.name}': has no bandit: use linf or l2")
    defaults = (1.0, 0.1, 10.0) if isinstance(threat, Linf) else (0.01, 0.01, 0.1)
    explore, delta, rate = (usual if value is None else value for value, usual in zip((explore, delta, rate), defaults, strict=True))
    if steps < 0 or grid < 1 or min(explore, delta, rate, share) <= 0:
        raise BadInput(f"bandits: steps {steps}, grid {grid}: must be at least 0 and 1, and all lengths and rates above 0")
    strategy = Bandits(grid, explore, delta, rate, share)
    return replace(Attack("bandits", threat, objective, strategy, max(steps - 1, 0) // 3), access=Access.SCORES)


@dataclass(frozen=True)
class _Belief:
    z: Tensor
    v: Tensor
    number: int


@dataclass(frozen=True)
class Bandits:
    """See `bandits`."""

    grid: int
    explore: float
    delta: float
    rate: float
    share: float

    def init(self, problem: Problem, steps: int) -> _Belief:
        """No belief, no change."""
        z = problem.threat.start(problem.x, problem.radius, None, problem.ids)
        image = as_image(z)
        shape = [min(side, self.grid) for side in image.shape[2:]]
        return _Belief(z, torch.zeros(*image.shape[:2], *shape, device=z.device), 0)

    def step(self, problem: Problem, state: _Belief) -> tuple[Reading, _Belief]:
        """One honest look, two beside it, one move."""
        reading, z, v = problem.judge(state.z), state.z, state.v
        u = problem.key.fold("explore", state.number).normal(problem.ids, v) / v[0].numel() ** 0.5
        slope = self._slope(problem, z, v, u)
        v = self._learned(problem, v, per_sample(slope, u) * u)
        direction = problem.threat.steepest(problem.x, z, self._spread(v, z))
        moved = problem.threat.project(problem.x, z + per_sample(self.share * problem.radius, z) * direction, problem.radius)
        return reading, _Belief(moved, v, state.number + 1)

    def _spread(self, v: Tensor, like: Tensor) -> Tensor:
        """Tiles as pixels."""
        return F.interpolate(v, as_image(like).shape[2:], mode="nearest").reshape(like.shape).to(like.dtype)

    def _slope(self, problem: Problem, z: Tensor, v: Tensor, u: Tensor) -> Tensor:
        """(B,) float32: by how much one point is better than the other, per unit of explore * delta."""
        n = len(z)
        part = problem.take(torch.arange(n, device=z.device).repeat_interleave(2))
        ends = torch.stack([v + self.explore * u, v - self.explore * u], 1).flatten(0, 1)
        asked = z.repeat_interleave(2, 0) + self.delta * normalized(self._spread(ends, part.x), 2)
        asked = part.threat.project(part.x, asked, part.threat.reach(part.x))
        answer = part.judge(asked)
        score = answer.score.double().masked_fill(~valid(answer.output), torch.nan).reshape(n, 2)
        return torch.nan_to_num((score[:, 0] - score[:, 1]) / (self.explore * self.delta), nan=0.0, posinf=0.0, neginf=0.0).float()

    def _learned(self, problem: Problem, v: Tensor, gradient: Tensor) -> Tensor:
        """The belief after one more slope."""
        if isinstance(problem.threat, L2):
            return v + self.rate * gradient
        # exponentiated gradients on (1 + v) / 2: its odds grow by a factor of exp(2 * rate * g)
        odds = torch.atanh(v.double().clamp(-1 + 1e-7, 1 - 1e-7)) + self.rate * gradient.double()
        return torch.tanh(odds).float()
