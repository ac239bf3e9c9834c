"""What stands in for tensors that lost their gradient: a side table for one forward pass. Used by `core.relaxed` alone.

A tensor's twin is a float tensor of the same value and shape that autograd can follow back to the input. Integers, masks,
detached tensors and arrays cannot carry a graph, so their twins are kept beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SHARE = 0.1
"""Width of a soft step, as a share of the mean distance from the step within a sample."""
SHARE_OF_ONE = 10.0
"""The same where a sample has but one number: a step of its own width would let nothing pass, and a gate between two networks is best
searched through both (`benchmarks/verdicts`, blurred look, n 100, seed 1: 24 stand by hand, 28 with 1, 25 with 10)."""
MOST_WAYS = 1024
"""Most ways between which a decision is followed."""
_TURNS = {3: ((1, 2, 0), (2, 0, 1)), 4: ((0, 2, 3, 1), (0, 3, 1, 2))}
"""Channels first to channels last and back, for one image and for a batch."""


class Stand(torch.autograd.Function):
    """The value of the first argument with the gradient of the second; `name` says why."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, shadow: Tensor, name: str) -> Tensor:
        """The model's own value, bit by bit."""
        ctx.label = name
        return real.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[None, Tensor, None]:
        """All of the slope goes to the shadow."""
        return None, slopes[0], None


def stand(real: Tensor, shadow: Tensor, name: str) -> Tensor:
    """`real` as a float tensor that runs backward as `shadow`."""
    with following():
        return _stood(real, shadow, name)


def following() -> ExitStack:
    """A block that autograd follows, whatever the model has switched off, and that nobody watches."""
    stack = ExitStack()
    for context in (torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.enable_grad()):
        stack.enter_context(context)
    return stack


def _stood(real: Tensor, shadow: Tensor, name: str) -> Tensor:
    value = real.detach().dequantize() if real.is_quantized else real.detach()
    value = value if value.is_floating_point() or value.is_complex() else value.to(shadow.dtype)
    twin: Tensor = Stand.apply(value, shadow.expand(real.shape), name)  # type: ignore[no-untyped-call]
    return twin


def custom(tensor: Tensor) -> bool:
    """Made by somebody's autograd function."""
    return isinstance(tensor.grad_fn, torch.autograd.function.BackwardCFunction)


@dataclass
class Entry:
    """A tensor, what stands for it, and the tensor's state when that was so."""

    tensor: Tensor
    twin: Tensor
    version: int
    alive: bool


@dataclass(frozen=True)
class Choice:
    """Indices (a tensor) that a selection along `dim` of `source` gave; `sign` is -1 where it looked for the smallest.

    `settled`: labels of what was selected; `source` holds the logarithms of their shares, along its last axis.
    """

    tensor: Tensor
    source: Tensor
    dim: int
    sign: float
    settled: bool = False

    def scores(self, chosen: int = 1) -> Tensor:
        """(..., K): the largest is chosen; of several, the last of them, before the others are as low as the lowest."""
        scores = (self.sign * self.source).movedim(self.dim, -1)
        if chosen == 1:
            return scores
        first = scores.detach().topk(min(chosen - 1, scores.shape[-1]), -1).indices
        return scores.scatter(-1, first, scores.detach().amin(-1, keepdim=True).expand(first.shape))


class Book:
    """The side table of one forward pass over `batch` rows.

    `distrust` prefers the operations inside custom autograd functions to the functions' own backward. It holds its tensors
    until the pass is over, so that no identity is used twice.
    """

    def __init__(self, batch: int, constants: Callable[[], Iterable[Tensor]], distrust: bool) -> None:
        self.batch, self.distrust = batch, distrust
        self.entries: dict[int, Entry] = {}
        self.gaps: dict[int, tuple[Tensor, Tensor]] = {}
        self.choices: dict[int, Choice] = {}
        self.places: dict[int, Choice] = {}
        self.tops: dict[int, tuple[Tensor, Tensor, Choice]] = {}
        self.margins: dict[int, tuple[Tensor, Tensor]] = {}
        self.forks: dict[int, tuple[Tensor, Tensor]] = {}
        self.squashed: dict[int, tuple[Tensor, Tensor, str]] = {}
        self.exits: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.noted: set[str] = set()
        self.touched = False
        self._constants = constants
        self._known: set[int] | None = None

    def twin(self, tensor: Any) -> Tensor | None:
        """What carries the gradient of `tensor`: its entry, itself, or nothing."""
        if not isinstance(tensor, Tensor):
            return None
        entry = self.entries.get(id(tensor))
        if entry is not None and (self.distrust or entry.alive or not custom(tensor)):
            if entry.version != _version(tensor):  # changed in place behind our back, by NumPy or an optimizer
                entry.twin, entry.version = stand(tensor, entry.twin, ""), _version(tensor)
            return entry.twin
        if tensor.requires_grad:
            return None if isinstance(tensor, nn.Parameter) else tensor
        return self.arrived(tensor) if self.exits else None

    def carried(self, tensor: Any) -> bool:
        """Whether more is known of a tensor than autograd knows."""
        return isinstance(tensor, Tensor) and (id(tensor) in self.choices or id(tensor) in self.gaps or self.hidden(tensor))

    def hidden(self, tensor: Any) -> bool:
        """Whether its gradient runs beside it, not through it."""
        twin = self.twin(tensor)
        return twin is not None and twin is not tensor

    def enter(self, tensor: Tensor, twin: Tensor) -> Tensor:
        """Keeps a twin beside its tensor."""
        self.touched = True
        self.entries[id(tensor)] = Entry(tensor, twin, _version(tensor), tensor.requires_grad)
        return tensor

    def gap(self, tensor: Any) -> Tensor | None:
        """How far each entry of a mask lies from its threshold, signed; None for what is no mask."""
        found = self.gaps.get(id(tensor))
        return found[1] if found else None

    def choice(self, tensor: Any) -> Choice | None:
        """Of what the tensor holds the indices."""
        return self.choices.get(id(tensor))

    def ranked(self, tensor: Any) -> Choice | None:
        """Whose ranks the tensor holds, rising with `source`."""
        return self.places.get(id(tensor))

    def steers(self, tensor: Any) -> None:
        """Notes that something hangs on a decision: one comparison for each sample, or one index, or the first few of an order."""
        choice, margin = self.choices.get(id(tensor)), self.margins.get(id(tensor))
        if id(tensor) in self.forks or (choice is None and margin is None):
            return
        if tensor.ndim == 0 or len(tensor) != self.batch:
            return
        with following():
            if margin is not None and tensor.numel() == self.batch:
                self.fork(tensor, torch.stack([torch.zeros_like(margin[1]), margin[1]], -1))
            elif choice is not None and not choice.settled:
                few, ways = tensor.numel() // self.batch, choice.source.shape[choice.dim]
                if few < ways and choice.source.numel() == self.batch * ways:
                    self.fork(tensor, choice.scores(few))

    def fork(self, tensor: Tensor, scores: Tensor) -> None:
        """Notes a decision between `scores` (B, ..., K), and what came of it, if it is one for each sample."""
        if scores.requires_grad and 2 <= scores.shape[-1] <= MOST_WAYS and scores.numel() == self.batch * scores.shape[-1]:
            self.forks[id(tensor)] = (tensor, scores.reshape(self.batch, -1))

    def decisions(self) -> list[Tensor]:
        """(B, K) scores of those that something hangs on, in order."""
        return [scores for _, scores in self.forks.values()]

    # Softness, always by sample: no neighbor in the batch may change a sample's gradient.

    def width(self, gap: Tensor) -> Tensor:
        """A fitting width of a soft step at `gap`: a share of its mean size within each sample, far more where a sample has but one."""
        size = gap.detach().abs()
        sizes = self.by_sample(torch.where(torch.isfinite(size), size, torch.zeros_like(size)))
        mean, share = sizes.mean(1), SHARE if sizes.shape[1] > 1 else SHARE_OF_ONE
        return self.spread(torch.where(mean > 0, share * mean, torch.ones_like(mean)), gap)

    def jumps(self, change: Tensor, gap: Tensor) -> Tensor:
        """Whether a switch at `gap` tears: somewhere in the sample the two sides differ by far more than the distance to the switch.

        A ReLU written as x * (x > 0) does not; a hard threshold does.
        """
        change, gap = torch.broadcast_tensors(change.detach(), gap)  # type: ignore[no-untyped-call]
        torn = self.by_sample((change.abs() > 3 * gap.abs()).to(change.dtype)).amax(1)
        return self.spread(torn, change) > 0

    def by_sample(self, tensor: Tensor) -> Tensor:
        """(samples, rest); one row where the first axis holds no samples."""
        rows = self.batch if tensor.ndim and tensor.shape[0] and tensor.shape[0] % self.batch == 0 else 1
        return tensor.reshape(rows, -1)

    def spread(self, values: Tensor, like: Tensor) -> Tensor:
        """One value per sample, in a shape that broadcasts against `like`."""
        if len(values) == 1:
            return values.reshape(())
        return values.repeat_interleave(like.shape[0] // len(values)).reshape(-1, *([1] * (like.ndim - 1)))

    # Round trips through NumPy and Python.

    def leave(self, tensor: Tensor) -> None:
        """A tensor becomes an array or a list."""
        if tensor.numel() > 1:
            twin = self.twin(tensor)
            self.exits += [] if twin is None else [twin]

    def arrived(self, tensor: Tensor) -> Tensor | None:
        """The twin of a tensor that came from an array: what left, if shapes agree, row by row or turned to channels last and back."""
        if tensor.numel() < 2 or tensor.requires_grad or tensor.untyped_storage().resizable() or self._constant(tensor):
            return None
        return self.link(tensor)

    def link(self, tensor: Tensor) -> Tensor | None:
        """Links a new tensor to the oldest arrays that fit and that nothing has come back from yet."""
        with following():
            return self._linked(tensor)

    def _linked(self, tensor: Tensor) -> Tensor | None:
        shape = tuple(tensor.shape)
        found = next((k for k, source in enumerate(self.exits) if fit(source, shape) is not None), None)
        if found is not None:
            used, source = [found], fit(self.exits[found], shape)
        else:
            used = [k for k, source in enumerate(self.exits) if fit(source, shape[1:]) is not None][: shape[0]] if shape else []
            rows = [fit(self.exits[k], shape[1:]) for k in used]
            source = torch.stack([row for row in rows if row is not None]) if used and len(used) == shape[0] else None
        if source is None:
            return None
        self.exits = [exit for k, exit in enumerate(self.exits) if k not in used]
        twin = stand(tensor, self._scaled(tensor, source), "numpy")
        self.enter(tensor, twin)
        return twin

    def _scaled(self, tensor: Tensor, source: Tensor) -> Tensor:
        """The source in the units of what came back: least squares within each sample, where the two go together."""
        old, new = self.by_sample(source.detach()), self.by_sample(tensor.detach().to(source.dtype))
        old, new = old - old.mean(1, keepdim=True), new - new.mean(1, keepdim=True)
        together, apart, size = (old * new).sum(1), old.square().sum(1), new.square().sum(1)
        slope = torch.where(together.square() > 0.25 * apart * size, together / apart.clamp_min(1e-12), torch.ones_like(apart))
        return source * self.spread(slope, source)

    def _constant(self, tensor: Tensor) -> bool:
        if self._known is None:
            self._known = {id(constant) for constant in self._constants()}
        return id(tensor) in self._known


def fit(source: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """`source` in `shape`, if only axes of length 1, the place of the channels or the flattening of rows differ."""
    if source.numel() != math.prod(shape):
        return None
    wanted = [n for n in shape if n != 1]
    for turned in (source, *(source.permute(order) for order in _TURNS.get(source.ndim, ()))):
        if [n for n in turned.shape if n != 1] == wanted:
            return turned.reshape(shape)
    return source.reshape(shape) if shape and len(source) == shape[0] else None


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
