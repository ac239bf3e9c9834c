"""sigma-zero: gradient descent on a smooth count of changed features, with a threshold that adapts; spare features leave at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.minimal import limits, offered, soft_margin
from epsball.attacks.registry import register
from epsball.core import Attack, Gradient, Objective, Problem, Projects, Reading, autograd
from epsball.core.rows import per_sample, rowwise
from epsball.core.rule import normalized
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L0
from epsball.threats.rounding import Memo


@register(
    paper="Cina et al. 2024, arXiv 2402.01879",
    threats=("l0f", "l0"),
    kind="smallest",
    cost="steps forwards, 9 in 10 with a backward, 1 forward to judge",
)
def sigma_zero(
    steps: int = 300,
    step: float = 1.0,
    sigma: float = 1e-3,
    threshold: float = 0.3,
    adapt: float = 0.01,
    threat: Projects | None = None,
    objective: Objective | None = None,
) -> Attack:
    """sigma-zero, Algorithm 1: Adam on max(-margin, 0) + mean(d^2 / (d^2 + sigma)), d the change; then small changes are cut to 0.

    The gradient is scaled to Linf norm 1. The rate falls from `step` to a tenth of it along a cosine. Changes below a
    threshold are dropped; it starts at `threshold` and rises by `adapt` * rate where the goal is reached, else falls.

    Args:
        steps: looks. The paper runs 1000, its released code 100 by default. step, threshold: in units of the input, for a
        box of width 1. sigma: how sharp the smooth count is.
        threat: L0 counting features, as in the paper, or pixels: then the channels of a pixel are counted and cut together.
        objective: what is climbed; None is `soft_margin`, ever sharper. The paper's is the margin.

    Differs from the paper, for smaller changes at equal cost: all rival classes are climbed before the best one alone
    (`soft_margin`), and the last tenth of the looks takes features out of the best success, those of the least |change * gradient|
    first, once its changes are driven to the ends of their intervals. The paper is untargeted; a target only changes the margin. A
    finite radius keeps the largest changes that fit for the last look and leaves the change that is descended alone.
    """
    if sigma <= 0:
        raise BadInput(f"sigma: {sigma}: must be above 0")
    strategy = SmoothCount(objective is None, step, sigma, threshold, adapt)
    return Attack("sigma_zero", threat or L0(features=True), objective or margin, strategy, steps, smallest=True)


@dataclass(frozen=True)
class _Count:
    z: Tensor
    change: Tensor
    first: Tensor
    second: Tensor
    threshold: Tensor
    best: Tensor  # the smallest success so far, x before the first
    size: Tensor  # (B,) its size, +inf before the first
    worth: Tensor  # |gradient| there, +inf for what was taken out in vain
    tight: bool  # some radius is below what the box allows
    memo: Memo
    looks: int
    steps: int  # of descent
    last: int


@dataclass(frozen=True)
class SmoothCount:
    """See `sigma_zero`. `soft`: climbs `soft_margin`, else the attack's objective."""

    soft: bool
    step_size: float
    sigma: float
    threshold: float
    adapt: float
    gradient: Gradient = autograd

    def init(self, problem: Problem, steps: int) -> _Count:
        """No change."""
        z = problem.threat.start(problem.x, problem.radius, None, problem.ids)
        zero, none = torch.zeros_like(z), torch.full_like(problem.radius, torch.inf)
        tight = bool((problem.radius < problem.threat.reach(problem.x)).any())
        threshold = torch.full_like(problem.radius, self.threshold)
        return _Count(z, zero, zero, zero, threshold, z, none, zero, tight, Memo(), 0, steps - steps // 10, steps)

    def step(self, problem: Problem, state: _Count) -> tuple[Reading, _Count]:
        """One look; then a step of Adam and a cut, or at the end another feature less."""
        reading, state = (self._descended if state.looks < state.steps else self._spared)(problem, state)
        if state.tight:
            # The count falls toward the radius from above: looks at the changes themselves, and only the last is cut to the radius.
            reading = offered(problem, reading, problem.threat.size(problem.x, reading.z) <= problem.radius)
            if state.looks == state.last:
                state = replace(state, z=problem.threat.project(problem.x, state.z, problem.radius))
        return reading, state

    def _descended(self, problem: Problem, state: _Count) -> tuple[Reading, _Count]:
        sharp = replace(problem, objective=soft_margin(10 * 100 ** (state.looks / state.steps), state.memo)) if self.soft else problem
        reading, x, looks = self.gradient(sharp, state.z), problem.x, state.looks + 1
        hit = problem.goal.reached(reading.output)
        push = torch.nan_to_num(reading.gradient, nan=0.0, posinf=0.0, neginf=0.0)
        state = _kept(problem, state, push, hit)
        squares = _together(problem.threat, state.change.square())
        smooth = (state.change * (2 * self.sigma / x[0].numel())).div_((squares + self.sigma).square_())
        gradient = normalized(smooth.addcmul_(push, per_sample(~hit, push), value=-1), torch.inf)
        first, second = torch.lerp(state.first, gradient, 0.1), (0.999 * state.second).addcmul_(gradient, gradient, value=0.001)
        rate = self.step_size * (0.1 + 0.9 * (1 + math.cos(math.pi * (looks - 1) / state.steps)) / 2)
        metric = second.sqrt().div_(math.sqrt(1 - 0.999**looks)).add_(1e-8)
        low, high = limits(problem)
        change = torch.addcdiv(state.change, first, metric, value=-rate / (1 - 0.9**looks)).add_(x).clamp_(low, high).sub_(x)
        turn = torch.where(hit, self.adapt * rate, -self.adapt * rate)
        threshold = (state.threshold + turn).clamp(0, 1)
        large = _together(problem.threat, change.square()) - per_sample(threshold, change).square()
        change.mul_(large.sign_().clamp_(min=0.0))
        z = (x + change).clamp_(low, high)
        return reading, replace(state, z=z, change=change, first=first, second=second, threshold=threshold, looks=looks)

    def _spared(self, problem: Problem, state: _Count) -> tuple[Reading, _Count]:
        """A look without a gradient: what was taken out stays out where the goal is still reached."""
        reading, x, looks = problem.judge(state.z), problem.x, state.looks + 1
        size = problem.threat.size(x, state.z)
        won = problem.goal.reached(reading.output) & (size <= state.size)
        wide = rowwise(won, x)
        vain = (state.z == x) & (state.best != x) & ~wide
        best, size = torch.where(wide, state.z, state.best), torch.where(won, size, state.size)
        found = rowwise(torch.isfinite(size), x)  # the others stay where they are
        if state.looks == state.steps:  # the last point of the descent: nothing has been taken out yet
            z = torch.where(found, _driven(problem, best), state.z)
            return reading, replace(state, z=z, best=best, size=size, looks=looks)
        worth = state.worth.masked_fill(vain, torch.inf)
        force = torch.where(best != x, (best - x).abs() * worth, 0.0)
        force = _together(problem.threat, force).flatten(1)
        tried = ~((force < torch.inf) & (best != x).flatten(1))
        ranked = force.masked_fill(tried, torch.inf).sort(dim=1).values
        count = ((~tried).sum(1, keepdim=True) - 1).clamp(min=0) // max(state.last - looks, 1)
        least = ranked.gather(1, count)
        leaving = ((force <= least) & (least < torch.inf)).reshape(x.shape)
        z = torch.where(found, torch.where(leaving, x, best), state.z)
        over = tried.all(1) if not state.tight else None
        return replace(reading, over=over), replace(state, z=z, best=best, size=size, worth=worth, looks=looks)


def _kept(problem: Problem, state: _Count, gradient: Tensor, hit: Tensor) -> _Count:
    """The best successes so far, with this look."""
    if not bool(hit.any()):
        return state
    size = problem.threat.size(problem.x, state.z)
    rows = (hit & (size < state.size)).nonzero().squeeze(1)
    if not len(rows):
        return state
    best, worth = state.best.index_copy(0, rows, state.z[rows]), state.worth.index_copy(0, rows, gradient[rows].abs())
    return replace(state, best=best, worth=worth, size=state.size.index_copy(0, rows, size[rows]))


def _driven(problem: Problem, z: Tensor) -> Tensor:
    """Every changed feature at the end of its interval, where it has one."""
    low, high = limits(problem)
    ends = torch.where(z > problem.x, high, torch.where(z < problem.x, low, problem.x))
    return torch.where(torch.isfinite(ends), ends, z)


def _together(threat: Projects, squares: Tensor) -> Tensor:
    """Sums over the channels of a pixel where pixels are counted; else the features as they are."""
    if isinstance(threat, L0) and not threat.features and squares.ndim >= 4:
        return squares.sum(1, keepdim=True).expand_as(squares)
    return squares
