"""Certified training: the loss at the worst scores that bounds allow, so that `epsball certify` can prove what was learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epsball.certify.ball import Ball
from epsball.certify.graph import trace
from epsball.certify.intervals import interval_bounds
from epsball.certify.linear import margins
from epsball.core import Victim
from epsball.defenses.training.batch import Batch, Logs
from epsball.defenses.training.inner import still
from epsball.errors import BadInput


@dataclass(frozen=True)
class Certifiable:
    """k * J(x) + (1 - k) * J(worst scores within `reach` times the radius); k falls from 1 to `kappa` as the radius grows.

    The worst score of class j beside y is the least of score y minus score j that the bounds allow, the last linear layers exact
    ("elision"). Bounds are those of `epsball certify`: the same code, in float64, with gradients by the weights. `crown` is the
    share of the linear bound (CROWN over intervals) when the warm-up begins; it falls to 0 behind it.

    Args:
        kappa, crown: in [0, 1]. reach: 1.1 in the released code on MNIST (0.33 for 0.3).

    Batch norm bounds use the running statistics, which the clean pass updates. The model must be traceable and not wrapped (DDP).

    Raises:
        BadInput: a layer without bounds, by its name; numbers out of range.

    Cost: 1 forward and backward, and as much again 4 times in float64; with `crown` a backward per class more.
    """

    kappa: float = 0.5
    reach: float = 1.1
    crown: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("kappa", self.kappa), ("crown", self.crown)):
            if not 0 <= value <= 1:
                raise BadInput(f"{name}: {value}: must be in [0, 1]")
        if not self.reach > 0:
            raise BadInput(f"reach: {self.reach}: must be above 0")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """Clean and worst-case cross-entropy."""
        output, k = model(x), 1 - (1 - self.kappa) * batch.share
        least = worst_margins(model, x, y, batch, self.reach, self.crown * (1 - batch.share))
        worst = (-least).scatter(1, y[:, None], 0.0).to(output.dtype)
        loss = k * batch.cross_entropy(output, y) + (1 - k) * batch.cross_entropy(worst, y)
        return loss, {"certified": (least > 0).all(1).float().mean()}


def worst_margins(model: nn.Module, x: Tensor, y: Tensor, batch: Batch, reach: float, crown: float) -> Tensor:
    """(B, C) float64: lower bounds of score y minus each score over the ball, +inf at y, differentiable by the weights.

    (1 - crown) * interval bound + crown * linear bound, both over interval bounds of the hidden layers.
    """
    with still(model), torch.enable_grad():
        graph = trace(Victim.of(model), x)
    ball = Ball.of(batch.threat, x, reach * batch.radius)
    bounds = interval_bounds(graph, ball.interval)
    least = margins(graph, ball, bounds, y, through=False)
    if not crown:
        return least
    return torch.lerp(least, margins(graph, ball, bounds, y, through=True), crown).where(least < torch.inf, torch.inf)


def ibp(kappa: float = 0.5, reach: float = 1.1) -> Certifiable:
    """Interval bound propagation. Gowal et al. 2018, arXiv 1810.12715, section 3.

    The paper grows the radius and shrinks kappa from 1 to 0.5 over thousands of steps: give a long warm-up. Cost: see `Certifiable`.
    """
    return Certifiable(kappa, reach)


def crown_ibp(kappa: float = 0.5, reach: float = 1.1) -> Certifiable:
    """CROWN-IBP. Zhang et al. 2020, arXiv 1906.06316, section 3: linear bounds at first, intervals at last.

    Only the final bound is linear, its hidden layers are bounded by intervals. Cost: see `Certifiable`.
    """
    return Certifiable(kappa, reach, crown=1.0)
