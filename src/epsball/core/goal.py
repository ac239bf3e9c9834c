"""What the adversary wants. Success is judged here, on the model's answer, and never inferred from a loss."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from epsball.core.rows import Rows, take
from epsball.errors import BadInput


def valid(output: Tensor) -> Tensor:
    """(B,) bool: rows whose every score is finite. A NaN or infinite answer is no answer, hence no class."""
    if tame(output):
        return torch.ones(len(output), dtype=torch.bool, device=output.device)
    return torch.isfinite(output).flatten(1).all(1)


def tame(output: Tensor) -> bool:
    """Whether every row is valid for sure, the usual case, seen at once: nothing infinite sums to a finite number."""
    return math.isfinite(float(output.detach().sum()))


def _answered(claimed: Tensor, output: Tensor) -> Tensor:
    """`claimed` (B,) bool where the answer is one."""
    return claimed if tame(output) else claimed & valid(output)


class Goal(Protocol):
    """A per-sample aim with B rows."""

    def reached(self, output: Tensor) -> Tensor:
        """(B,) bool from the model's output (B, C); False wherever the output is not finite."""

    def take(self, rows: Rows) -> Goal:
        """The same goal for some of the rows."""


@dataclass(frozen=True)
class Untargeted:
    """Any class but `labels` (B,)."""

    labels: Tensor

    def reached(self, output: Tensor) -> Tensor:
        """True where the top class is not the label."""
        return _answered(output.argmax(1) != self.labels, output)

    def take(self, rows: Rows) -> Untargeted:
        """Rows of the labels."""
        return Untargeted(self.labels[rows])


@dataclass(frozen=True)
class Targeted:
    """Exactly the class `labels` (B,): the adversary's target."""

    labels: Tensor

    def reached(self, output: Tensor) -> Tensor:
        """True where the top class is the target."""
        return _answered(output.argmax(1) == self.labels, output)

    def take(self, rows: Rows) -> Targeted:
        """Rows of the targets."""
        return Targeted(self.labels[rows])


@dataclass(frozen=True)
class Aimed:
    """Any class but `labels` (B,), searched in the direction of `targets` (B,): the inner goal of APGD-T and FAB-T."""

    labels: Tensor
    targets: Tensor

    def reached(self, output: Tensor) -> Tensor:
        """True where the top class is not the label, whether or not it is the target."""
        return Untargeted(self.labels).reached(output)

    def take(self, rows: Rows) -> Aimed:
        """Rows of labels and targets."""
        return Aimed(self.labels[rows], self.targets[rows])


@dataclass(frozen=True)
class LabelsChanged:
    """Multi-label: at least one watched decision of `labels` (B, C) in {0, 1} changes; a score above 0 means "present".

    `watched` (C,) bool chooses the labels that count; None means all.
    """

    labels: Tensor
    watched: Tensor | None = None

    def signed(self, output: Tensor) -> Tensor:
        """(B, C): how firmly each watched decision is still right; +inf where nobody watches."""
        firm = (2 * self.labels.to(output.dtype) - 1) * output
        return firm if self.watched is None else firm.masked_fill(~self.watched, torch.inf)

    def reached(self, output: Tensor) -> Tensor:
        """True where a watched decision differs from its label."""
        wrong = (output > 0) != (self.labels > 0)
        if self.watched is not None:
            wrong = wrong & self.watched
        return _answered(wrong.any(1), output)

    def take(self, rows: Rows) -> LabelsChanged:
        """Rows of the labels; the watched set is shared."""
        return LabelsChanged(take(self.labels, rows), self.watched)


def as_goal(goal: Goal | Tensor) -> Goal:
    """Plain labels mean untargeted: (B,) classes, or (B, C) zeros and ones for multi-label models."""
    if isinstance(goal, Tensor):
        goal = LabelsChanged(goal) if goal.ndim == 2 else Untargeted(goal)
    if not callable(getattr(goal, "reached", None)):
        raise BadInput(f"goal: {type(goal).__name__}: give a tensor of labels or a Goal")
    return _indexing(goal)


def _indexing(goal: Goal) -> Goal:
    """Class numbers of any integer width as int64, which alone can index."""
    wide = {}
    for name in ("labels", "targets"):
        numbers = getattr(goal, name, None)
        if isinstance(numbers, Tensor) and numbers.ndim == 1 and not numbers.is_floating_point() and numbers.dtype is not torch.int64:
            wide[name] = numbers.long()
    return dataclasses.replace(goal, **wide) if wide else goal  # type: ignore[type-var]
