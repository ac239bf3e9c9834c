"""Defensive distillation: a teacher at temperature T, then a student of its soft answers at the same temperature."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from epsball.defenses.training.batch import Batch, Logs
from epsball.defenses.training.inner import still
from epsball.errors import BadInput


def _positive(temperature: float) -> None:
    if not temperature > 0:
        raise BadInput(f"temperature: {temperature}: must be above 0")


@dataclass(frozen=True)
class Tempered:
    """Mean cross-entropy of softmax(f(x) / T): how the teacher is trained. Cost: 1 forward, 1 backward."""

    temperature: float = 100.0

    def __post_init__(self) -> None:
        _positive(self.temperature)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """Hard labels."""
        return batch.cross_entropy(model(x) / self.temperature, y), {}


@dataclass(frozen=True)
class Distilled:
    """Mean cross-entropy of softmax(f(x) / T) against softmax(teacher(x) / T). Cost: 1 forward, 1 backward; 1 forward of the teacher.

    Papernot et al. 2016, arXiv 1511.04508, section 4. Deployed at T = 1 the student's gradients all but vanish in float32: that is
    masking, not robustness (Carlini & Wagner 2017, arXiv 1608.04644); an audit divides the logits and breaks it. Smoothing of labels
    acts on the soft labels, too.

    Args:
        teacher: trained by `Tempered` at the same T; the paper gives it the student's architecture. mark: digest of its weights.
    """

    teacher: nn.Module = field(repr=False)
    temperature: float = 100.0
    mark: str = field(init=False, default="")

    def __post_init__(self) -> None:
        _positive(self.temperature)
        object.__setattr__(self, "mark", digest(self.teacher))

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """Soft labels; y is not read."""
        with still(self.teacher), torch.no_grad():
            soft = (self.teacher(x) / self.temperature).softmax(1)
        return batch.cross_entropy(model(x) / self.temperature, soft), {}


def digest(model: nn.Module) -> str:
    """Of all weights and statistics: two students of one mark have the same teacher."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in model.state_dict().values():
        found.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return found.hexdigest()


def distilled(teacher: nn.Module, temperature: float = 100.0) -> Distilled:
    """A student of `teacher`. See `Distilled`."""
    return Distilled(teacher, temperature)
