"""Local linearity regularization: the loss is flat and linear all over the ball."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.defenses.training.batch import Batch, Logs, Model
from epsball.defenses.training.inner import Adversarial, Objective, Search, input_gradient, still


def nonlinearity(model: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """|l(z) - l(x) - (z - x) . gradient l(x)|. Cost: 1 forward and backward for l(x)."""
    with still(model), torch.enable_grad():
        leaf = x.detach().requires_grad_()
        loss = F.cross_entropy(model(leaf), y, reduction="none")
        gradient = input_gradient(loss, leaf)
    known = loss.detach()
    return lambda z, output: _gap(F.cross_entropy(output, y, reduction="none"), known, z - x, gradient)


def _gap(away: Tensor, here: Tensor, change: Tensor, gradient: Tensor) -> Tensor:
    return (away - here - (change * gradient).flatten(1).sum(1)).abs()


@dataclass(frozen=True)
class Llr:
    """J(x) + gap_weight * mean |l(x_adv) - l(x) - d . g| + slope_weight * mean |d . g|, d = x_adv - x, g = gradient l(x)."""

    gap_weight: float = 4.0
    slope_weight: float = 3.0

    def __call__(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """The gradient is differentiated by the weights."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            output = model(leaf)
            here = F.cross_entropy(output, y, reduction="none")
            gradient = input_gradient(here, leaf, create_graph=True)
        away = F.cross_entropy(model(x_adv), y, reduction="none")
        gap = _gap(away, here, x_adv - x, gradient).mean()
        slope = ((x_adv - x) * gradient).flatten(1).sum(1).abs().mean()
        loss = batch.cross_entropy(output, y) + self.gap_weight * gap + self.slope_weight * slope
        return loss, {"gap": gap.detach(), "slope": slope.detach()}


def llr(gap_weight: float = 4.0, slope_weight: float = 3.0, steps: int = 2, share: float = 0.5) -> Adversarial:
    """Adversarial robustness through local linearization. Qin et al. 2019, arXiv 1907.02610.

    Args:
        gap_weight, slope_weight: lambda and mu of the paper. steps, share: of the search for the largest gap, from a uniform start:
            at x itself the gap is 0 and has no direction.

    Cost: steps + 3 forwards; steps + 2 backwards by the input, and 1 through the rest, double backward included.
    """
    return Adversarial(Search(steps, share, climb=nonlinearity), Llr(gap_weight, slope_weight))
