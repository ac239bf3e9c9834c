"""Primal-dual proximal gradient descent (PDPGD): the weight between size and success is a dual variable that is learned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from epsball.attacks.minimal import less, level, limits
from epsball.attacks.registry import register
from epsball.core import Attack, Gradient, Problem, Projects, Reading, autograd
from epsball.core.rows import per_sample
from epsball.core.rule import lengths
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L1, L2, Linf


@register(
    paper="Matyasko & Chau 2021, arXiv 2106.01538",
    threats=("linf", "l2", "l1"),
    kind="smallest",
    cost="steps forwards and backwards, 1 forward to judge",
)
def pdpgd(
    steps: int = 300,
    step: float = 0.1,
    last: float = 0.01,
    dual_step: float = 0.1,
    dual_last: float = 0.1,
    ratio: float = 0.01,
    inner: int = 5,
    threat: Projects | None = None,
) -> Attack:
    """PDPGD, Algorithm 1: Adam on softplus(-margin), then the proximal map of the norm, weighted by the dual variables' ratio.

    The dual variables (l_0, l_1) = softmax(0, m) weigh the norm and the loss; m rises where the goal is missed and falls where
    it is reached, and an average of the weights is used. The proximal step is taken in Adam's own metric by `inner`
    iterations of proximal gradient descent (arXiv 1910.10094).

    Args:
        steps: looks. step: rate of Adam in units of the input, falling geometrically to `last` times it.
        dual_step: rate of m, falling linearly to `dual_last` times it. ratio: l_0 / l_1 at the start, under Linf in units of the
            first gradient's 1-norm.

    Differs from the paper under Linf: there the weights that balance are of the size of that 1-norm, a sum over all features, and
    from a ratio of 0.01 alone m would still be on its way when the steps are over.

    The form without proximal steps (PDGD) and the L0 map (l_2/3) are not here: `sigma_zero` covers L0.
    """
    if inner < 1:
        raise BadInput(f"inner: {inner}: must be 1 or more")
    strategy = PrimalDual(step, last, dual_step, dual_last, ratio, inner)
    return Attack("pdpgd", threat or L2(), margin, strategy, steps, smallest=True)


@dataclass(frozen=True)
class _Dual:
    z: Tensor
    change: Tensor
    first: Tensor
    second: Tensor
    weight: Tensor  # (B,) m
    share: Tensor  # (B,) averaged l_0
    unit: Tensor | None  # (B,) of l_0 / l_1
    looks: int
    steps: int


@dataclass(frozen=True)
class PrimalDual:
    """See `pdpgd`."""

    step_size: float
    last: float
    dual_step: float
    dual_last: float
    ratio: float
    inner: int
    gradient: Gradient = autograd
    average: float = 0.9
    extreme: float = 1e-6

    def init(self, problem: Problem, steps: int) -> _Dual:
        """No change; nearly all weight on success."""
        z = problem.threat.start(problem.x, problem.radius, None, problem.ids)
        zero, weight = torch.zeros_like(z), torch.full_like(problem.radius, -math.log(self.ratio))
        return _Dual(z, zero, zero, zero, weight, torch.sigmoid(-weight), None, 0, steps)

    def step(self, problem: Problem, state: _Dual) -> tuple[Reading, _Dual]:
        """One look, one primal step, one dual step."""
        reading, looks = self.gradient(problem, state.z), state.looks + 1
        push = torch.nan_to_num(reading.gradient, nan=0.0, posinf=0.0, neginf=0.0)
        unit = _unit(problem.threat, push) if state.unit is None else state.unit
        gradient = push.mul_(-per_sample(torch.sigmoid(-torch.nan_to_num(reading.score)), push))
        first, second = torch.lerp(state.first, gradient, 0.1), (0.999 * state.second).addcmul_(gradient, gradient, value=0.001)
        metric = second.sqrt().div_(math.sqrt(1 - 0.999**looks)).add_(1e-8)
        rate = self.step_size * self.last ** (state.looks / state.steps)
        change = self._inside(problem, torch.addcdiv(state.change, first, metric, value=-rate / (1 - 0.9**looks)))
        change = self._proximal(problem, change, metric, rate * unit * state.share / (1 - state.share))
        left = (state.steps - looks) / max(state.steps - 1, 1)
        dual_rate = self.dual_step * (left * (1 - self.dual_last) + self.dual_last)
        limit = -math.log(self.extreme)
        weight = (state.weight - dual_rate * torch.nan_to_num(reading.score).sign()).clamp(-limit, limit)
        share = self.average * state.share + (1 - self.average) * torch.sigmoid(-weight)
        z = problem.threat.project(problem.x, problem.x + change, problem.radius)
        return reading, _Dual(z, change, first, second, weight, share, unit, looks, state.steps)

    def _proximal(self, problem: Problem, change: Tensor, metric: Tensor, weight: Tensor) -> Tensor:
        """argmin over y of weight * norm(y) + <metric, (y - change)^2> / 2, by steps of 1 / (largest metric)."""
        largest = metric.flatten(1).amax(1)
        scaled, amount, y = metric / per_sample(largest, metric), weight / largest, change
        for _ in range(self.inner):
            y = self._inside(problem, shrunk(problem.threat, torch.addcmul(y, scaled, y - change, value=-1), amount))
        return y

    def _inside(self, problem: Problem, change: Tensor) -> Tensor:
        """In place: `change` as far as the box allows."""
        low, high = limits(problem)
        return change.add_(problem.x).clamp_(low, high).sub_(problem.x)


def _unit(threat: Projects, gradient: Tensor) -> Tensor:
    """(B,) float64: the 1-norm of the gradient under Linf, else 1; also 1 where nothing has a slope."""
    steep = (lengths(gradient, 1) if isinstance(threat, Linf) else torch.ones_like(gradient.flatten(1)[:, 0])).double()
    return torch.where((steep > 0) & torch.isfinite(steep), steep, torch.ones_like(steep))


def shrunk(threat: Projects, change: Tensor, amount: Tensor) -> Tensor:
    """The proximal map of amount (B,) * norm: cut toward 0 (L1), shortened (L2), clipped so that `amount` is cut off in all (Linf)."""
    wide = per_sample(amount, change)
    if isinstance(threat, L1):
        return less(change, wide)
    if isinstance(threat, L2):
        length = per_sample(lengths(change, 2), change)
        return change * (1 - wide / length.clamp(min=1e-30)).clamp(min=0)
    if isinstance(threat, Linf):
        most = level(change.abs(), wide)
        return torch.minimum(torch.maximum(change, -most), most)
    raise BadInput(f"threat '{threat.name}': has no proximal map here: use linf, l2 or l1")
