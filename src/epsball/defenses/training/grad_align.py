"""GradAlign: FGSM training kept honest by gradients that point the same way all over the ball."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from epsball.defenses.training.batch import Batch, Logs, Model
from epsball.defenses.training.inner import Adversarial, Search, clean, input_gradient, uniform
from epsball.defenses.training.pgd import at_adversarial


@dataclass(frozen=True)
class Aligned:
    """J(x_adv) + weight * mean(1 - cos(gradient at x, gradient at x + eta)), eta uniform in the ball.

    Samples with a gradient of zero have no direction and are left out of the mean, as in the released code.
    """

    weight: float = 0.2

    def __call__(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """Both gradients are differentiated by the weights."""
        first, second = (_gradient(model, z, y).flatten(1) for z in (x, uniform(x, batch)))
        lengths = first.detach().norm(dim=1) * second.detach().norm(dim=1)
        rows = lengths > 0
        misaligned = (1 - F.cosine_similarity(first[rows], second[rows], eps=1e-30)).sum() / rows.sum().clamp(min=1)
        loss, logs = at_adversarial(model, x, x_adv, y, batch)
        return loss + self.weight * misaligned, {**logs, "misaligned": misaligned.detach()}


def _gradient(model: Model, z: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        return input_gradient(F.cross_entropy(model(leaf), y, reduction="none"), leaf, create_graph=True)


def grad_align(weight: float = 0.2) -> Adversarial:
    """FGSM training with gradient alignment. Andriushchenko & Flammarion 2020, arXiv 2007.02617.

    Args:
        weight: of the alignment; 0.2 is the paper's value for CIFAR-10 at 8/255; larger radii want more.

    Cost: 4 forwards; 1 backward for the attack, 2 for the gradients, and 1 through all of it, double backward included.
    """
    return Adversarial(Search(1, 1.0, start=clean), Aligned(weight))
