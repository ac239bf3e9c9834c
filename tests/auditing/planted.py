"""Models whose truth is known, and what the tests ask of an audit's files."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import epsball as eb
from epsball.auditing.results import ModelReport
from epsball.core import content_ids
from epsball.data import Dataset
from epsball.models.digits import load
from epsball.store import evidence


@cache
def digits(n: int = 128) -> Dataset:
    return eb.load_data("digits", n=n)


class Around(nn.Module):
    """The standard digit classifier with something done before or after it."""

    def __init__(self, change: Callable[[nn.Module, Tensor], Tensor], name: str = "digits-standard") -> None:
        super().__init__()
        self.net = load(name)
        self.change = change
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.net, x)


class Caching(nn.Module):
    """Gives inputs that are close to one asked before the answer from then; what it keeps is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = load("digits-standard")
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        answers = []
        for one, scores in zip(x, self.net(x), strict=True):
            near = [there for seen, there in self.kept if float((seen - one.detach()).abs().mean()) < 0.03]
            if not near:
                self.kept.append((one.detach().clone(), scores.detach().clone()))
            answers.append(scores + (near[0] - scores).detach() if near else scores)
        return torch.stack(answers)


class Remembering(nn.Module):
    """Adds a wave to its scores that depends on how often it was asked."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = load("digits-standard")
        self.register_buffer("count", torch.zeros(()))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.net(x) + torch.sin(self.count) * torch.arange(10.0)


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


class Reversed(_Identity):
    """The identity, whose gradient points the wrong way."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Stubborn(_Identity):
    """The identity, whose backward pass raises something unusual."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ValueError("this layer has no backward pass")


def without_gradient(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def normalizing(net: nn.Module, z: Tensor) -> Tensor:
    """Expects (x - 0.5) / 0.5."""
    return net(z * 0.5 + 0.5)


def nan_where_dark(share: float) -> Callable[[nn.Module, Tensor], Tensor]:
    """NaN for the darkest `share` of the digits, as judged on each row alone."""
    threshold = torch.quantile(digits().x.flatten(1).mean(1), share)

    def change(net: nn.Module, x: Tensor) -> Tensor:
        dark = x.flatten(1).mean(1) < threshold.to(x)
        return net(x).masked_fill(dark[:, None], torch.nan)

    return change


def batch_normed(net: nn.Module, x: Tensor) -> Tensor:
    return net(torch.sigmoid(F.batch_norm(x, None, None, training=True)))


class BinaryLinear(nn.Module):
    """w x + b on flat inputs: one logit, whose robustness has a closed form."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.layer = nn.Linear(len(weight), 1)
        with torch.no_grad():
            self.layer.weight.copy_(weight[None])
            self.layer.bias.fill_(bias)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


def blobs(n: int = 40, features: int = 12, classes: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(x, y, weights): flat inputs in [0, 1], and the weights (classes, features) of a linear model that is mostly right."""
    random = np.random.default_rng([seed, 5])
    centers = random.uniform(0.3, 0.7, (classes, features))
    y = np.arange(n) % classes
    x = np.clip(centers[y] + random.normal(0, 0.15, (n, features)), 0, 1)
    return torch.from_numpy(x).float(), torch.from_numpy(y), torch.from_numpy(centers - centers.mean(0)).float()


def linear(weights: Tensor) -> nn.Module:
    """The linear model with those weights that is indifferent at 0.5."""
    layer = nn.Linear(weights.shape[1], len(weights))
    with torch.no_grad():
        layer.weight.copy_(4 * weights)
        layer.bias.copy_(-4 * weights.sum(1) * 0.5)
    return nn.Sequential(nn.Flatten(), layer).eval()


def unusual(model: ModelReport) -> dict[str, str]:
    """Findings that did not simply pass: id -> status."""
    return {f.id: f.status for f in model.findings if f.status != "pass"}


def verdicts(run: str | Path, threat: str, number: int = 0) -> dict[int, float]:
    """Content id of each sample -> smallest radius at which it is stored as broken; infinite where it stands."""
    arrays, _ = evidence.read(Path(run) / evidence.NAME)
    ids = content_ids(torch.from_numpy(evidence.expand(arrays[f"m{number}/x"]))).tolist()
    broken = dict.fromkeys(ids, float("inf"))
    rows, radii = arrays[f"m{number}/{threat}/rows"], arrays[f"m{number}/{threat}/radius"]
    for row, radius in zip(rows.tolist(), radii.tolist(), strict=True):
        broken[ids[row]] = radius
    return broken
