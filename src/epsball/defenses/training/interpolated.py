"""Training between samples: interpolated adversarial training, and adversarial vertex mixup."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from epsball.core.rows import per_sample
from epsball.defenses.training.batch import Batch, Logs, Model, accuracy
from epsball.defenses.training.inner import Adversarial, Search


def mixup(model: Model, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """J at t * x_i + (1 - t) * x_j with the labels mixed alike, t uniform and one for the batch, j a random order; and the output."""
    share = torch.rand((), generator=batch.generator).item()
    order = batch.shuffled(x)
    output = model(share * x + (1 - share) * x[order])
    return share * batch.cross_entropy(output, y) + (1 - share) * batch.cross_entropy(output, y[order]), output


def interpolated(model: Model, x: Tensor, x_adv: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
    """(J(mixed x) + J(mixed x_adv)) / 2, each with an order and a share of its own."""
    loss, _ = mixup(model, x, y, batch)
    loss_adv, _ = mixup(model, x_adv, y, batch)
    return (loss + loss_adv) / 2, {}


def iat(steps: int = 7, share: float = 0.25) -> Adversarial:
    """Interpolated adversarial training. Lamb et al. 2019, arXiv 1906.06784, Algorithm 1, mixup with Beta(1, 1).

    x_adv is found at x itself, and mixed afterwards. Cost: steps + 2 forwards and backwards.
    """
    return Adversarial(Search(steps, share), interpolated)


@dataclass(frozen=True)
class Vertex:
    """J at t * x + (1 - t) * vertex, vertex = x + gamma * (x_adv - x), t uniform per sample; the label's share is mixed alike.

    A label with share s leaves (1 - s) / (C - 1) to every other class. The vertex leaves the ball, and is cut to the box as in the
    released code.
    """

    gamma: float = 2.0
    smooth: float = 1.0
    smooth_vertex: float = 0.1

    def __call__(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """One output between the two ends."""
        vertex = batch.threat.project(x, x + self.gamma * (x_adv - x), torch.full_like(batch.radius, torch.inf))
        share = batch.uniform(x.flatten(1)[:, 0])
        output = model(vertex + per_sample(share, x) * (x - vertex))
        right = share * self.smooth + (1 - share) * self.smooth_vertex
        return batch.cross_entropy(output, smoothed(y, right, output.shape[1])), {"adversarial": accuracy(output, y)}


def smoothed(y: Tensor, right: Tensor, classes: int) -> Tensor:
    """(B, C): `right` (B,) for the label, the rest shared among the others."""
    hot = F.one_hot(y, classes).to(right)
    return hot * right[:, None] + (1 - hot) * ((1 - right) / (classes - 1))[:, None]


def avmixup(gamma: float = 2.0, smooth: float = 1.0, smooth_vertex: float = 0.1, steps: int = 10, share: float = 0.25) -> Adversarial:
    """Adversarial vertex mixup. Lee, Lee & Yoon 2020, arXiv 2003.02484, Algorithm 1.

    Args:
        gamma: how far the vertex is, in changes. smooth, smooth_vertex: the label's share at x and at the vertex (lambda_1, lambda_2).

    Cost: steps + 1 forwards and backwards.
    """
    return Adversarial(Search(steps, share), Vertex(gamma, smooth, smooth_vertex))
