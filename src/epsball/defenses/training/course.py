"""How a model is trained, whatever the loss: one value, whose repr is the recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from epsball.core import Projects
from epsball.core.victim import Bound
from epsball.defenses.training.schedule import Schedule, one_cycle
from epsball.defenses.training.watch import Record, by_robust
from epsball.errors import BadInput
from epsball.threats.parse import is_input

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""(x (B, ...), generator) -> x of the same shape, inside the box."""
MakeOptimizer = Callable[[Iterable[Tensor], float, float], torch.optim.Optimizer]
"""(parameters, rate, weight decay) -> optimizer."""


def sgd(parameters: Iterable[Tensor], rate: float, decay: float) -> torch.optim.Optimizer:
    """Momentum 0.9: what the published CIFAR recipes use, with rate 0.1."""
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=decay)


def adam(parameters: Iterable[Tensor], rate: float, decay: float) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (AdamW): for small networks, with rate 1e-3 to 3e-3."""
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)


@dataclass(frozen=True)
class Course:
    """How long, how fast, and which weights are kept.

    Attributes:
        epochs: passes over the data. batch: rows a step; what is left over at the end of an epoch is left out.
        rate: the largest learning rate. decay: weight decay. optimizer, schedule: functions.
        average: decay of the averaged weights (EMA), which are what is measured and kept; 0 keeps the weights themselves.
        smoothing: label smoothing of the training's cross-entropy. warmup: share of the steps over which the radius grows.
        clip: largest norm of the gradient of all weights. accumulate: a step is computed in so many parts.
        replays: every batch is shown so many times in a row (free adversarial training).
        half: compute in bfloat16 where autocast does. patience: stop after so many epochs without better weights.
        merit: which weights are better. augment: changes the inputs before the loss sees them.
        certify: prove what intervals can of the held-out samples, after every epoch.
    """

    epochs: int = 20
    batch: int = 128
    rate: float = 3e-3
    decay: float = 5e-4
    optimizer: MakeOptimizer = adam
    schedule: Schedule = one_cycle
    average: float = 0.9995
    smoothing: float = 0.0
    warmup: float = 0.2
    clip: float | None = None
    accumulate: int = 1
    replays: int = 1
    half: bool = False
    patience: int | None = None
    merit: Callable[[Record], tuple[float, float]] = by_robust
    augment: Augment | None = None
    certify: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate", "replays"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "must be 1 or more")
        for name in ("average", "smoothing"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) < 1, "must be in [0, 1)")
        _check("rate", self.rate, self.rate > 0, "must be above 0")
        _check("decay", self.decay, self.decay >= 0, "must be 0 or more")
        _check("warmup", self.warmup, 0 <= self.warmup <= 1, "must be in [0, 1]")
        _check("clip", self.clip, self.clip is None or self.clip > 0, "must be above 0, or None")
        _check("patience", self.patience, self.patience is None or self.patience >= 1, "must be 1 or more, or None")


def _check(name: str, value: object, fine: bool, rule: str) -> None:
    if not fine:
        raise BadInput(f"{name}: {value}: {rule}")


@dataclass(frozen=True)
class Against:
    """The adversary that a model is trained and measured against.

    Attributes:
        threat: linf, l2 or l1. radius: in its unit. box: legal range of the inputs.
    """

    threat: Projects
    radius: float
    box: tuple[Bound, Bound] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not is_input(self.threat) or self.threat.name not in ("linf", "l2", "l1"):
            raise BadInput(f"threat '{self.threat.name}': training knows linf, l2 and l1: choose one of them")
        _check("radius", self.radius, self.radius >= 0, "must be 0 or more")
