"""Training without an adversary: cross-entropy, and cross-entropy under Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epsball.defenses.training.batch import Batch, Logs


@dataclass(frozen=True)
class Standard:
    """Mean cross-entropy at x. Cost: 1 forward, 1 backward."""

    def __call__(self, model: torch.nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """-log p(y | x)."""
        return batch.cross_entropy(model(x), y), {}


@dataclass(frozen=True)
class GaussianNoise:
    """Mean cross-entropy at x + sigma * N(0, 1), drawn anew at every step: what randomized smoothing certifies.

    The noisy input is not cut to the box, as smoothing does not cut it either. Cost: 1 forward, 1 backward.
    Cohen et al. 2019, arXiv 1902.02918, section 3.3.
    """

    sigma: float = 0.25

    def __call__(self, model: torch.nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """-log p(y | x + noise)."""
        return batch.cross_entropy(model(x + self.sigma * batch.normal(x)), y), {}
