"""sigma-zero: gradient descent on a smooth count of changed features, with a threshold that adapts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.minimal import limits, offered, soft_margin
from epsball.attacks.registry import register
from epsball.core import Attack, Gradient, Objective, Problem, Projects, Reading, autograd
from epsball.core.rows import per_sample
from epsball.core.rule import normalized
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L0
from epsball.threats.rounding import Memo


@register(
    paper="Cina et al. 2024, arXiv 2402.01879",
    threats=("l0f", "l0"),
    kind="smallest",
    cost="steps forwards and backwards, 1 forward to judge",
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

    Differs from the paper: all rival classes are climbed before the best one alone (`soft_margin`), for smaller changes at equal
    cost. The paper is untargeted; a target only changes the margin. A finite radius keeps the largest changes that fit for the look
    and leaves the change that is descended alone.
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
    tight: bool  # some radius is below what the box allows
    memo: Memo
    looks: int
    steps: int


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
        zero = torch.zeros_like(z)
        tight = bool((problem.radius < problem.threat.reach(problem.x)).any())
        return _Count(z, zero, zero, zero, torch.full_like(problem.radius, self.threshold), tight, Memo(), 0, steps)

    def step(self, problem: Problem, state: _Count) -> tuple[Reading, _Count]:
        """One look, one step of Adam, one cut."""
        sharp = replace(problem, objective=soft_margin(10 * 100 ** (state.looks / state.steps), state.memo)) if self.soft else problem
        reading, x, looks = self.gradient(sharp, state.z), problem.x, state.looks + 1
        hit = problem.goal.reached(reading.output)
        push = torch.nan_to_num(reading.gradient, nan=0.0, posinf=0.0, neginf=0.0)
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
        change.mul_(_together(problem.threat, change.square()) >= per_sample(threshold, change).square())
        z = (x + change).clamp_(low, high)
        if state.tight:
            # The count falls toward the radius from above: looks at the changes themselves, and only the last is cut to the radius.
            z = problem.threat.project(x, z, problem.radius) if looks == state.steps else z
            reading = offered(problem, reading, problem.threat.size(x, state.z) <= problem.radius)
        return reading, _Count(z, change, first, second, threshold, state.tight, state.memo, looks, state.steps)


def _together(threat: Projects, squares: Tensor) -> Tensor:
    """Sums over the channels of a pixel where pixels are counted; else the features as they are."""
    if isinstance(threat, L0) and not threat.features and squares.ndim >= 4:
        return squares.sum(1, keepdim=True).expand_as(squares)
    return squares
