"""Adversarial weight perturbation: the loss is made small all around the weights, too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from epsball.defenses.training.batch import Batch, Logs
from epsball.defenses.training.inner import Adversarial
from epsball.defenses.training.team import shared_out
from epsball.errors import BadInput


@dataclass(frozen=True)
class Awp:
    """The loss of `inner` at weights w + v, v the worst step of length gamma * ||w|| in every layer. Gradients are taken at w + v.

    v = gamma * ||w|| * g / ||g|| for each weight of two or more axes, g the gradient of the loss at x_adv. Wu, Xia & Wang 2020,
    arXiv 2004.05884, one step as in the released code. There the optimizer also steps (and decays) from w + v and v
    is taken off again; here it steps from w with the gradient of w + v.

    Args:
        inner: pgd, trades, mart, alp. gamma: 0.01 for PGD training, 0.005 for TRADES, in the paper.

    Raises:
        BadInput: sharded weights.

    Cost: that of `inner`, and once more its forwards and backwards outside the search.
    """

    inner: Adversarial
    gamma: float = 0.01

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """Search, worst weights, loss there."""
        if shared_out(model):
            raise BadInput("awp: the weights are sharded, and a step within each layer needs them whole: train without `fully_shard`")
        x_adv = self.inner.search(model, x, y, batch)
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1}
        statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}  # the look changes copies only
        loss, _ = self.inner.formula(lambda z: functional_call(model, statistics, (z,)), x, x_adv, y, batch)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        worst = {name: p + _step(p.detach(), g, self.gamma) for (name, p), g in zip(weights.items(), gradients, strict=True)}
        return self.inner.formula(lambda z: functional_call(model, worst, (z,)), x, x_adv, y, batch)


def _step(weight: Tensor, gradient: Tensor, gamma: float) -> Tensor:
    step: Tensor = gamma * weight.norm() / (gradient.norm() + 1e-20) * gradient
    return step
