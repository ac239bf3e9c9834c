"""Perceptually aligned gradients as a training goal: input gradients that point to what a class looks like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.defenses.training.batch import Batch, Logs
from epsball.defenses.training.inner import input_gradient
from epsball.errors import BadInput

Direction = Callable[[Tensor, Tensor], Tensor]
"""(x (B, ...), classes (B,)) -> (B, ...): where the gradient of the class should point; only its direction counts.

A score model, the gradient of log p(x | class) by x, is one.
"""
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PerceptuallyAligned:
    """J(x) + weight * sum over all classes c of mean(1 - cos(gradient of log p(c | x), direction(x, c))).

    Ganz, Kawar & Elad 2022, arXiv 2207.11378, section 4. The gradient is that of the log-probability, as in the released code; its
    coefficient 1.5 multiplies the same sum over ten classes, and drowns the cross-entropy of small networks in short trainings. One
    forward serves all classes, in training mode. No adversarial input is made, and the radius is not used: whether alignment makes
    robust is for an audit to say.

    Args:
        direction: of every class, see `one_image`, `class_mean`, `nearest`; or a score model. weight: lambda of the paper.

    Cost: 1 forward; a backward by the input per class, and 1 through all of it, double backward included.
    """

    direction: Direction = field(repr=False)
    weight: float = 0.5
    name: str = "own"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """Cross-entropy and the angles."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            output = model(leaf)
            known = output.log_softmax(1)
            angles = [self._angle(input_gradient(known[:, c], leaf, create_graph=True), x, c) for c in range(known.shape[1])]
        misaligned = torch.stack(angles).sum(0).mean()
        return batch.cross_entropy(output, y) + self.weight * misaligned, {"misaligned": misaligned.detach() / len(angles)}

    def _angle(self, gradient: Tensor, x: Tensor, c: int) -> Tensor:
        """(B,) 1 - cos."""
        with torch.no_grad():
            wanted = self.direction(x, torch.full((len(x),), c, device=x.device))
        return 1 - F.cosine_similarity(gradient.flatten(1), wanted.flatten(1).to(gradient), eps=1e-12)


@dataclass(frozen=True)
class Toward:
    """images[class] - x. `images` (C, ...): one for each class."""

    images: Tensor

    def __call__(self, x: Tensor, classes: Tensor) -> Tensor:
        """(B, ...)."""
        return self.images.to(x)[classes.to(x.device)] - x


@dataclass(frozen=True)
class ToNearest:
    """The nearest other sample of the class, minus x. x (N, ...), y (N,): the samples to look among. Cost: N distances a sample."""

    x: Tensor
    y: Tensor

    def __call__(self, x: Tensor, classes: Tensor) -> Tensor:
        """(B, ...)."""
        found = torch.empty_like(x)
        for c in torch.unique(classes):
            rows, among = classes == c, self.x[self.y == c].to(x)
            apart = torch.cdist(x[rows].flatten(1), among.flatten(1))
            found[rows] = among[apart.where(apart > 1e-6, torch.inf).argmin(1)]  # not x itself
        return found - x


def _classes(y: Tensor) -> range:
    known = set(y.tolist())
    missing = [c for c in range(max(known) + 1) if c not in known]
    if missing:
        raise BadInput(f"data: no sample of class {missing[0]}: directions need one of every class")
    return range(max(known) + 1)


def one_image(data: Pair, weight: float = 0.5) -> PerceptuallyAligned:
    """Toward one image of each class, the first in the data. See `PerceptuallyAligned`."""
    x, y = data
    return PerceptuallyAligned(Toward(torch.stack([x[y == c][0] for c in _classes(y)])), weight, "one image")


def class_mean(data: Pair, weight: float = 0.5) -> PerceptuallyAligned:
    """Toward the mean image of each class. See `PerceptuallyAligned`."""
    x, y = data
    return PerceptuallyAligned(Toward(torch.stack([x[y == c].mean(0) for c in _classes(y)])), weight, "class mean")


def nearest(data: Pair, weight: float = 0.5) -> PerceptuallyAligned:
    """Toward the nearest other training sample of each class. See `PerceptuallyAligned`."""
    x, y = data
    _classes(y)
    return PerceptuallyAligned(ToNearest(x, y), weight, "nearest")
