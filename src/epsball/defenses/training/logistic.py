"""Adversarial training of logistic regression in closed form: no search, the worst input is known."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from epsball.errors import BadInput

Penalty = Literal["none", "adversarial", "l1", "signs", "uniform"]
NOISES = ("signs", "uniform")


def adversarial_logistic(margin: Tensor, weight: Tensor, radius: float) -> Tensor:
    """(B,) softplus(radius * ||w||_1 - margin): the largest softplus(-y (w . z + b)) for z within `radius` of x under Linf, no box.

    Goodfellow et al. 2015, arXiv 1412.6572, section 5. The norm is not multiplied by y, and is inside the softplus: behind a large
    margin the penalty fades, where L1 decay, its neighbor outside of it, does not.

    Args:
        margin: (B,) y (w . x + b), y in {-1, 1}. weight: (F,). radius: 0 or more.

    Cost: none beside the margins.
    """
    return F.softplus(radius * weight.abs().sum() - margin)


def fit_logistic(
    x: Tensor, y: Tensor, penalty: Penalty, strength: float, generator: torch.Generator, steps: int = 300, rate: float = 0.02
) -> tuple[Tensor, Tensor]:
    """(weight (F,), bias ()) of logistic regression on x (N, F), y (N,) in {-1, 1}: full-batch Adam, the rate falling to 0.

    Args:
        penalty: none; adversarial, in closed form; l1: softplus(-margin) + strength * ||w||_1; signs, uniform: noise of +-strength or
            uniform in [-strength, strength] on every feature, drawn anew at every step. strength: radius, coefficient or size.

    Raises:
        BadInput: labels that are not -1 or 1, or no samples.

    Cost: `steps` forwards and backwards.
    """
    if not len(x) or not bool((y.abs() == 1).all()):
        raise BadInput("labels: logistic regression needs -1 and 1, and at least one sample")
    y = y.to(x)
    w, b = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True), torch.zeros((), dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([w, b], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        seen = x + strength * noise(x, penalty, generator) if penalty in NOISES else x
        loss = adversarial_logistic(y * (seen @ w + b), w, strength if penalty == "adversarial" else 0.0).mean()
        loss = loss + strength * w.abs().sum() if penalty == "l1" else loss
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return w.detach(), b.detach()


def noise(like: Tensor, penalty: Penalty, generator: torch.Generator) -> Tensor:
    """Signs for `signs`, else uniform in [-1, 1]; shape of `like`."""
    drawn = 2 * torch.rand(like.shape, generator=generator).to(like) - 1
    return drawn.sign() if penalty == "signs" else drawn
