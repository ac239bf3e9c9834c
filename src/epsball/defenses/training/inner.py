"""The inner maximization of all methods: the steps of `epsball.core.Descent`, without judging, dropping and ledgers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.core import Projects
from epsball.core.by_input import ByInput
from epsball.core.rows import per_sample
from epsball.defenses.training.batch import Batch, Formula, Logs

Objective = Callable[[Tensor, Tensor], Tensor]
"""(z, output) -> (B,) score, higher suits the adversary."""
Climb = Callable[[nn.Module, Tensor, Tensor], Objective]
"""(model, x, y) -> what the search climbs; may ask the model once about the clean inputs."""
Start = Callable[[Tensor, Batch], Tensor]
"""(x, batch) -> where the search starts."""


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Eval mode of every submodule, put back module by module: batch norm keeps its statistics, dropout is off."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def input_gradient(score: Tensor, z: Tensor, *, create_graph: bool = False) -> Tensor:
    """Per-sample gradients of scores (B,) by z (B, ...); with `create_graph`, differentiable by the weights. No `.grad` is touched."""
    (gradient,) = torch.autograd.grad(score, z, torch.ones_like(score), create_graph=create_graph)
    return gradient


def perturb(
    model: nn.Module, x: Tensor, objective: Objective, threat: Projects, radius: Tensor, steps: int, step: Tensor, start: Tensor
) -> Tensor:
    """z <- P(z + step * steepest(gradient)), `steps` times from `start`; the last z, detached.

    Args:
        model: in any mode; asked in eval mode. x: clean inputs (B, ...) inside the threat's box. objective: what is climbed.
        threat: one whose variable is the input. radius, step: (B,) float64. start: (B, ...) legal.

    Cost: `steps` forwards and backwards per sample.
    """
    z, step, by_input = start.detach(), per_sample(step, x), ByInput()
    with still(model), torch.enable_grad():
        for _ in range(steps):
            z.requires_grad_()
            with by_input:
                output = model(z)
            gradient = input_gradient(objective(z, output), z)
            with torch.no_grad():
                z = threat.project(x, z + step * threat.steepest(x, z, gradient), radius)
    return z.detach()


# Where to start.


def clean(x: Tensor, batch: Batch) -> Tensor:
    """At x."""
    return x.clone()


def uniform(x: Tensor, batch: Batch) -> Tensor:
    """Uniform in [-radius, radius] for every feature, then into the ball: the whole ball under Linf, near its shell under L2."""
    return Around(1.0)(x, batch)


@dataclass(frozen=True)
class Normal:
    """x + sigma * N(0, 1), into the ball."""

    sigma: float = 0.001

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """A legal point."""
        z: Tensor = batch.threat.project(x, x + self.sigma * batch.normal(x), batch.radius)
        return z


@dataclass(frozen=True)
class Around:
    """Uniform in `share` times the ball: N-FGSM starts beyond it."""

    share: float

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """A point of the larger ball, inside the box."""
        radius = batch.radii(self.share)
        z: Tensor = batch.threat.project(x, x + per_sample(radius, x) * (2 * batch.uniform(x) - 1), radius)
        return z


# What to climb.


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """-log p(y)."""
    return lambda z, output: F.cross_entropy(output, y, reduction="none")


def divergence(model: nn.Module, x: Tensor, y: Tensor) -> Objective:
    """KL(p(x) || p(z)), the inner objective of TRADES. Cost: 1 forward for p(x)."""
    with still(model), torch.no_grad():
        known = model(x).log_softmax(1)
    return lambda z, output: (known.exp() * (known - output.log_softmax(1))).sum(1)


@dataclass(frozen=True)
class Search:
    """`steps` steps of `share` times the radius from `start`, within `reach` times the radius."""

    steps: int
    share: float
    start: Start = uniform
    climb: Climb = cross_entropy
    reach: float = 1.0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        """Adversarial inputs (B, ...), detached. Cost: `steps` forwards and backwards, and what `climb` asks."""
        objective, start = self.climb(model, x, y), self.start(x, batch)
        return perturb(model, x, objective, batch.threat, batch.radii(self.reach), self.steps, batch.radii(self.share), start)


@dataclass(frozen=True)
class Adversarial:
    """The smallest `formula` over the weights, at the inputs that `search` finds."""

    search: Search
    formula: Formula

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """Search, then the formula."""
        return self.formula(model, x, self.search(model, x, y, batch), y, batch)
