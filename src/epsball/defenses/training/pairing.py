"""Logit pairing: adversarial (ALP), clean (CLP) and squeezing (LSQ). Kannan et al. 2018, arXiv 1803.06373.

A caution: Engstrom et al. 2018 (arXiv 1807.10272) and Mosbach et al. 2018 (arXiv 1810.12042) broke the published models; CLP and
LSQ mask gradients more than they protect. They are here to be audited.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epsball.defenses.training.batch import Batch, Logs, Model, accuracy
from epsball.defenses.training.inner import Adversarial, Search


def distance(first: Tensor, second: Tensor) -> Tensor:
    """Mean over the batch of squared distances between rows of logits, summed over classes."""
    return (first - second).square().sum(1).mean()


@dataclass(frozen=True)
class Paired:
    """(J(x) + J(x_adv)) / 2 + weight * mean ||f(x) - f(x_adv)||^2: the mixed minibatch of the paper."""

    weight: float = 0.5

    def __call__(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """Two outputs, one loss."""
        output, output_adv = model(x), model(x_adv)
        apart = distance(output, output_adv)
        mixed = (batch.cross_entropy(output, y) + batch.cross_entropy(output_adv, y)) / 2
        return mixed + self.weight * apart, {"adversarial": accuracy(output_adv, y), "apart": apart.detach()}


def alp(weight: float = 0.5, steps: int = 10, share: float = 0.25) -> Adversarial:
    """Adversarial logit pairing. `weight` 0.5 is the paper's for ImageNet. Cost: steps + 2 forwards and backwards.

    The squares are summed over classes; code in TensorFlow that takes their mean has a weight larger by the number of classes.
    """
    return Adversarial(Search(steps, share), Paired(weight))


@dataclass(frozen=True)
class CleanPairing:
    """J(x') + weight * mean ||f(x'_i) - f(x'_j)||^2 over random pairs, x' = x + sigma * N(0, 1); the first half meets the second.

    An odd last row has no partner. Cost: 1 forward, 1 backward.
    """

    weight: float = 0.5
    sigma: float = 0.5

    def __call__(self, model: torch.nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """Rows come in random order, so that neighbors are random pairs."""
        output = model(x + self.sigma * batch.normal(x))
        half = len(x) // 2
        apart = distance(output[:half], output[half : 2 * half]) if half else output.sum() * 0
        return batch.cross_entropy(output, y) + self.weight * apart, {"apart": apart.detach()}


@dataclass(frozen=True)
class Squeezing:
    """J(x') + weight * mean ||f(x')||^2, x' = x + sigma * N(0, 1). Cost: 1 forward, 1 backward."""

    weight: float = 0.5
    sigma: float = 0.5

    def __call__(self, model: torch.nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """Small logits."""
        output = model(x + self.sigma * batch.normal(x))
        size = output.square().sum(1).mean()
        return batch.cross_entropy(output, y) + self.weight * size, {"size": size.detach()}
