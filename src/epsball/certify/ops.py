"""What a traced network is made of: each part bounds its output, its rounding error, and passes linear bounds backward.

An interval is a pair (low, high) of float64 tensors (B, ...). A rounding record is (low, high, error): the interval of exact
arithmetic, and how far the arithmetic of the model may be from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Record = tuple[Tensor, Tensor, Tensor]
Function = Callable[[Tensor], Tensor]
Back = tuple[tuple[Tensor, ...], Tensor]


class Op(Protocol):
    """One part. `linear` parts need no relaxation, and are given no intervals when they pass bounds backward."""

    linear: ClassVar[bool]

    def interval(self, *inputs: Pair) -> Pair:
        """The interval of the output from those of the inputs."""

    def error(self, unit: float, *inputs: Record) -> Tensor:
        """Largest rounding error of the output, from the records of the inputs; `unit` is the spacing of numbers at 1."""

    def back(self, a: Tensor, *inputs: Pair) -> Back:
        """Rows a (R, ...) of <a, output> become rows for each input and a constant (R,), never above <a, output>."""


def gamma(count: int, unit: float) -> float:
    """Relative error of `count` roundings in any order (Higham 2002, lemma 3.1)."""
    return count * unit / (1 - count * unit) if count * unit < 1 else float("inf")


def size(record: Record) -> Tensor:
    """The largest absolute value that the model's arithmetic can give."""
    low, high, error = record
    return torch.maximum(low.abs(), high.abs()) + error


def dot(a: Tensor, b: Tensor) -> Tensor:
    """(R,): the sum of products of each row."""
    return (a * b).flatten(1).sum(1)


def transposed(apply: Function, a: Tensor, shape: tuple[int, ...]) -> Tensor:
    """<a, apply(x)> = <transposed a, x> for a linear function of rows x (R, *shape), by autograd."""
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        x = torch.zeros(len(a), *shape, dtype=a.dtype, device=a.device, requires_grad=True)
        (found,) = torch.autograd.grad(apply(x), x, a, create_graph=further)
    return found


@dataclass(frozen=True, eq=False)
class Map:
    """apply(x) + bias: linear and convolution layers, batch norm, averages, rearrangements.

    Attributes:
        apply: linear in rows (R, *shape). magnitude: the same with absolute weights. bias: broadcasts against a row.
        shape: of one input. fan: roundings behind each output, 0 for none. diagonal: each output depends on one input.
        tiled: convolutions, whose fast algorithms (Winograd) mix the errors of neighbors.
        transpose: of `apply`, where it is cheaper than autograd.
        slip: what is rounded inside beside the bias, where more than one step makes it (batch norm).
    """

    apply: Function
    magnitude: Function
    shape: tuple[int, ...]
    fan: int = 0
    bias: Tensor | None = None
    diagonal: bool = False
    tiled: bool = False
    slip: Tensor | None = None
    transpose: Function | None = None
    linear: ClassVar[bool] = True

    def interval(self, *inputs: Pair) -> Pair:
        """Center and radius, mapped."""
        ((low, high),) = inputs
        center, radius = self.apply((low + high) / 2), self.magnitude((high - low) / 2)
        center = center if self.bias is None else center + self.bias
        return center - radius, center + radius

    def error(self, unit: float, *inputs: Record) -> Tensor:
        """|W| e + gamma (|W| |x| + |b|), where convolutions are granted twice the roundoff."""
        fresh, error = self.magnitude(size(inputs[0])), self.magnitude(inputs[0][2])
        if self.tiled:
            fresh = fresh.amax(dim=tuple(range(2, fresh.ndim)), keepdim=True)
        for constant in (self.bias, self.slip):
            fresh = fresh if constant is None else fresh + constant.abs()
        return error + (gamma(self.fan + 2, unit if self.tiled else unit / 2) * fresh if self.fan else 0.0)

    def back(self, a: Tensor, *inputs: Pair) -> Back:
        """The transposed map."""
        constant = a.new_zeros(len(a)) if self.bias is None else dot(a, self.bias.expand_as(a))
        return (transposed(self.apply, a, self.shape) if self.transpose is None else self.transpose(a),), constant


@dataclass(frozen=True)
class Sum:
    """first + sign * second."""

    sign: int = 1
    linear: ClassVar[bool] = True

    def interval(self, *inputs: Pair) -> Pair:
        """Ends add, or the far ends do."""
        (low, high), (low2, high2) = inputs
        return (low + low2, high + high2) if self.sign > 0 else (low - high2, high - low2)

    def error(self, unit: float, *inputs: Record) -> Tensor:
        """Both errors and one rounding."""
        first, second = inputs
        return first[2] + second[2] + unit * (size(first) + size(second))

    def back(self, a: Tensor, *inputs: Pair) -> Back:
        """To both."""
        return (a, self.sign * a), a.new_zeros(len(a))


def between(a: Tensor, lower: Pair, upper: Pair) -> Back:
    """<a, f(x)> from lines (slope, intercept) below and above f: the lower one where a is positive."""
    positive, negative = a.clamp(min=0.0), a.clamp(max=0.0)
    passed = positive * lower[0] + negative * upper[0]
    return (passed,), dot(positive, lower[1]) + dot(negative, upper[1])


@dataclass(frozen=True, eq=False)
class Relu:
    """max(x, slope * x), slope in [0, 1): ReLU is slope 0.

    Zhang et al. 2018, arXiv 1811.00866: the chord above; below, of the lines through 0, the one nearer to the function (slope 1 where
    high > -low). `lean` (R, ...) in [0, 1] says how far each row's line below is from `slope` toward 1 instead.
    """

    slope: float = 0.0
    lean: Tensor | None = None
    linear: ClassVar[bool] = False

    def _value(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.slope * x)

    def interval(self, *inputs: Pair) -> Pair:
        """It never falls."""
        ((low, high),) = inputs
        return self._value(low), self._value(high)

    def error(self, unit: float, *inputs: Record) -> Tensor:
        """No input error grows; where the output is 0 for sure there is none."""
        ((_, high, error),) = inputs
        return error + unit * size(inputs[0]) if self.slope else torch.where(high + error < 0, 0.0, error)

    def back(self, a: Tensor, *inputs: Pair) -> Back:
        """The two lines where the input may have either sign; the function itself elsewhere."""
        ((low, high),) = inputs
        mixed = (low < 0) & (high > 0)
        sure = torch.where(low >= 0, torch.ones_like(low), self.slope)
        chord = (high - self.slope * low) / torch.where(mixed, high - low, 1.0)
        lean = (high > -low).to(low) if self.lean is None else self.lean
        chosen = self.slope + (1 - self.slope) * lean
        above, below = torch.where(mixed, chord, sure), torch.where(mixed, chosen, sure)
        return between(a, (below, torch.zeros_like(low)), (above, torch.where(mixed, high - chord * high, 0.0)))


@dataclass(frozen=True)
class Curve:
    """tanh or sigmoid. Lines of the smaller end slope through either end: Singh et al. 2019, DeepPoly, doi 10.1145/3290354."""

    function: Function
    slope: Function
    linear: ClassVar[bool] = False

    def interval(self, *inputs: Pair) -> Pair:
        """It never falls."""
        ((low, high),) = inputs
        return self.function(low), self.function(high)

    def error(self, unit: float, *inputs: Record) -> Tensor:
        """No slope is above 1, no value either; eight units for the function itself."""
        return inputs[0][2] + 8 * unit

    def back(self, a: Tensor, *inputs: Pair) -> Back:
        """The two lines."""
        ((low, high),) = inputs
        slope = torch.minimum(self.slope(low), self.slope(high))
        below, above = self.function(low) - slope * low, self.function(high) - slope * high
        return between(a, (slope, below), (slope, above))


@dataclass(frozen=True, eq=False)
class MaxPool:
    """Largest of each window; `windows` (L, k) are places of the flattened image, one past its end for padding.

    Below: the input of highest low end. Above: the highest high end, or that input where no other can exceed it.
    """

    windows: Tensor
    shape: tuple[int, ...]
    linear: ClassVar[bool] = False

    def _seen(self, x: Tensor, padding: float) -> Tensor:
        """(B, C, ...) -> (B, C, L, k)."""
        flat = x.flatten(2)
        return torch.nn.functional.pad(flat, (0, 1), value=padding)[..., self.windows.to(x.device)]

    def _largest(self, x: Tensor, padding: float = -torch.inf) -> Tensor:
        return self._seen(x, padding).amax(-1).reshape(len(x), x.shape[1], *self.shape)

    def interval(self, *inputs: Pair) -> Pair:
        """It never falls."""
        ((low, high),) = inputs
        return self._largest(low), self._largest(high)

    def error(self, unit: float, *inputs: Record) -> Tensor:
        """The largest of each window."""
        return self._largest(inputs[0][2], 0.0)

    def back(self, a: Tensor, *inputs: Pair) -> Back:
        """To the input of highest low end."""
        ((low, high),) = inputs
        lows, highs = self._seen(low, -torch.inf), self._seen(high, -torch.inf)
        first = lows.argmax(-1, keepdim=True)
        others = highs.scatter(-1, first, -torch.inf).amax(-1)
        a = a.flatten(2)
        passes = (a >= 0) | (others <= lows.gather(-1, first).squeeze(-1))
        constant = dot(torch.where(passes, 0.0, a), highs.amax(-1))
        place = self.windows.to(a.device).expand(*lows.shape).gather(-1, first).squeeze(-1)
        flat = low.flatten(2)
        passed = torch.zeros_like(torch.nn.functional.pad(flat, (0, 1))).scatter_add(2, place, torch.where(passes, a, 0.0))
        return (passed[..., :-1].reshape(low.shape),), constant
