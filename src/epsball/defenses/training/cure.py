"""CURE: low curvature of the loss along its own steepest direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from epsball.core.rule import normalized
from epsball.defenses.training.batch import Batch, Logs
from epsball.defenses.training.inner import input_gradient, still


def bend(score: Callable[[Tensor], Tensor], x: Tensor, h: float) -> Tensor:
    """(B,) ||gradient(x + h z) - gradient(x)||^2, z = sign(gradient) / ||sign(gradient)||_2: h^2 ||H z||^2 to first order.

    Args:
        score: (B, ...) -> (B,), asked twice. x: (B, ...). h: length of the step.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        gradient = input_gradient(score(leaf), leaf, create_graph=True)
        away = (x + h * normalized(gradient.detach().sign(), 2)).requires_grad_()
        return (input_gradient(score(away), away, create_graph=True) - gradient).flatten(1).square().sum(1)


@dataclass(frozen=True)
class Cure:
    """J(x) + weight * mean ||gradient(x + h z) - gradient(x)||^2, z the normalized sign of the gradient.

    Moosavi-Dezfooli et al. 2019, arXiv 1811.09716. h grows with the warm-up of the radius, as over the first five epochs there; the
    radius itself is not used. The released code takes the norm, not its square, of the gradient of the batch's mean, so that its
    weight hangs on the batch size, and h up to 3; here every sample has its own gradient, as in the paper. The released code also
    starts from a trained network. The curvature is taken in eval mode.

    Cost: 3 forwards; 2 backwards by the input, and 1 through all of it, double backward included.
    """

    weight: float = 4.0
    h: float = 1.5

    def __call__(self, model: torch.nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """Cross-entropy and curvature."""
        with still(model):
            curvature = bend(lambda z: F.cross_entropy(model(z), y, reduction="none"), x, batch.share * self.h).mean()
        return batch.cross_entropy(model(x), y) + self.weight * curvature, {"curvature": curvature.detach()}
