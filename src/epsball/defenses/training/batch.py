"""The words of robust training: a loss, and what it knows about the step besides inputs and labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from epsball.core import Key, Projects
from epsball.defenses.training.team import ALONE, Team

Model = Callable[[Tensor], Tensor]
Logs = dict[str, Tensor]


@dataclass
class Past:
    """What a loss keeps of every sample of the training data (count of them) from one visit to the next: the same in all workers."""

    count: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """One step of training.

    Attributes:
        threat: inside the box of the data. radius: (B,) float64, as it is at this step of the warm-up.
        generator: all noise of this step; on the CPU, so that devices agree.
        smoothing: label smoothing of the cross-entropy that trains, in [0, 1).
        memory: tensors that a loss keeps from step to step, a row a sample; they are part of every checkpoint.
        share: how much of the whole radius this step's is: 0 when the warm-up begins, 1 behind it.
        team: these rows are one worker's part of the batch, and so is its noise: all workers together draw what one process draws.
        places: (B,) of the samples in the training data. past: what is known of these; part of every checkpoint.
    """

    threat: Projects
    radius: Tensor
    generator: torch.Generator
    smoothing: float = 0.0
    memory: dict[str, Tensor] = field(default_factory=dict)
    share: float = 1.0
    team: Team = ALONE
    places: Tensor | None = None
    past: Past = field(default_factory=Past)

    def radii(self, share: float) -> Tensor:
        """`share` times the radius (B,); the radius itself is always the same tensor, whose bounds a threat remembers."""
        return self.radius if share == 1 else share * self.radius

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform in [0, 1), shape of `like`."""
        return self._own(torch.rand(self._all(like), generator=self.generator)).to(like.device, like.dtype)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, shape of `like`."""
        return self._own(torch.randn(self._all(like), generator=self.generator)).to(like.device, like.dtype)

    def shuffled(self, like: Tensor) -> Tensor:
        """(B,) a random order of the rows of `like`; each worker's rows stay with it."""
        order = torch.randperm(len(like) * self.team.size, generator=self.generator)
        first = self.team.rank * len(like)
        return (order[(order >= first) & (order < first + len(like))] - first).to(like.device)

    def recall(self, name: str, like: Tensor) -> Tensor:
        """What was kept of these samples under that name, shaped and typed as `like` (B, ...); NaN where nothing was."""
        kept = self.past.kept.get(name)
        return torch.full_like(like, torch.nan) if kept is None else kept[self.places].to(like.dtype)

    def keep(self, name: str, value: Tensor) -> None:
        """Keeps value (B, ...) of these samples, in float16; samples without a place have no next visit."""
        if self.places is None:
            return
        low, kept = self.team.joined(value.half()), self.past.kept
        if name not in kept:
            kept[name] = torch.full((self.past.count, *low.shape[1:]), torch.nan, dtype=low.dtype, device=low.device)
        kept[name][self.team.joined(self.places)] = low

    def _all(self, like: Tensor) -> tuple[int, ...]:
        return (len(like) * self.team.size, *like.shape[1:])

    def _own(self, drawn: Tensor) -> Tensor:
        return self.team.part(drawn)

    def cross_entropy(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean over the batch, with label smoothing; y (B,) labels or (B, C) probabilities."""
        return F.cross_entropy(output, y, label_smoothing=self.smoothing)


class Loss(Protocol):
    """What a method of training is: a number to make smaller."""

    def __call__(self, model: torch.nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """The mean loss over x (B, ...) with labels y (B,), differentiable by the weights; and means worth a line in the log.

        `logs["adversarial"]` is the accuracy on the loss's own adversarial inputs, where it makes some.
        """


class Formula(Protocol):
    """A loss whose adversarial inputs are already there. It only calls the model."""

    def __call__(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """As `Loss`; x_adv (B, ...) is detached."""


def accuracy(output: Tensor, y: Tensor) -> Tensor:
    """Share of rows whose top class is y, without gradient."""
    return (output.detach().argmax(1) == y).float().mean()


def generator(key: Key) -> torch.Generator:
    """A generator of its own for every key: nothing random has to be remembered from one step to the next."""
    seed = int.from_bytes(hashlib.blake2b(repr(key.path).encode(), digest_size=8).digest(), "little") % 2**63
    return torch.Generator().manual_seed(seed)
