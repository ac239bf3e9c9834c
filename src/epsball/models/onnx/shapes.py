"""ONNX operators that move, cut, join, count and convert."""

from __future__ import annotations

from math import ceil, prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from epsball.models.onnx.node import TYPES, Node, Unsupported, at_most, axes_of, whole


def reshape(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    """0 keeps the axis of the input (unless `allowzero`), -1 takes what is left."""
    sizes = whole(shape)
    if not node.get("allowzero", 0):
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(sizes)


def transpose(node: Node, x: Tensor) -> Tensor:
    """Axes in the order `perm`; backwards by default."""
    return x.permute(node.get("perm") or list(range(x.ndim))[::-1])


def squeeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Drops axes of length 1."""
    found = axes_of(node, axes)
    gone = {a % x.ndim for a in found} if found is not None else {i for i, n in enumerate(x.shape) if n == 1}
    return x.reshape([n for i, n in enumerate(x.shape) if i not in gone])


def unsqueeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """New axes of length 1, at places counted in the result."""
    found = axes_of(node, axes) or []
    for axis in sorted(a % (x.ndim + len(found)) for a in found):
        x = x.unsqueeze(axis)
    return x


def concat(node: Node, *inputs: Tensor) -> Tensor:
    """Inputs joined along an axis."""
    return torch.cat(inputs, node.get("axis"))


def split(node: Node, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    """Pieces of the given lengths, or of equal length with a shorter one at the end."""
    axis, parts = node.get("axis", 0), node.get("num_outputs") or len(node.outputs)
    lengths = whole(sizes) if sizes is not None else node.get("split")
    return torch.split(x, lengths if lengths is not None else -(-x.shape[axis] // parts), axis)


def slice_(
    node: Node,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """x[start:end:step] along axes; attributes before version 10, inputs since."""
    begin = whole(starts) if starts is not None else node.get("starts")
    end = whole(ends) if ends is not None else node.get("ends")
    along = axes_of(node, axes) or list(range(len(begin)))
    stride = whole(steps) if steps is not None else [1] * len(begin)
    for first, last, axis, step in zip(begin, end, along, stride, strict=True):
        span = range(*slice(first, last, step).indices(x.shape[axis]))
        if step == 1:
            x = x.narrow(axis, span.start if len(span) else 0, len(span))
        else:
            x = x.index_select(axis, torch.tensor(list(span), dtype=torch.int64, device=x.device))
    return x


def gather(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    """x[..., indices, ...] along an axis."""
    axis = node.get("axis", 0) % x.ndim
    places = torch.where(indices < 0, indices + x.shape[axis], indices)
    return x.index_select(axis, places.reshape(-1)).reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def gather_elements(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    """One element for each index, along an axis."""
    axis = node.get("axis", 0) % x.ndim
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices).long())


def expand(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    """x repeated to a shape that broadcasts with its own."""
    wanted = np.broadcast_shapes(tuple(x.shape), tuple(whole(shape)))
    at_most(prod(wanted))
    return x.expand(wanted)


def tile(node: Node, x: Tensor, repeats: Tensor) -> Tensor:
    """x laid out again and again along each axis."""
    counts = whole(repeats)
    at_most(x.numel() * prod(counts))
    return x.repeat(counts)


def pad(node: Node, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    """Cells around x, of a constant or of x itself; negative numbers cut."""
    flat = whole(pads) if pads is not None else list(node.get("pads"))
    along = [a % x.ndim for a in whole(axes)] if axes is not None else list(range(x.ndim))
    before, after = [0] * x.ndim, [0] * x.ndim
    for axis, first, last in zip(along, flat[: len(along)], flat[len(along) :], strict=True):
        before[axis], after[axis] = first, last
    at_most(prod(max(n + b + a, 0) for n, b, a in zip(x.shape, before, after, strict=True)))
    mode = node.get("mode", "constant")
    if mode == "constant":
        filler = float(value) if value is not None and value.numel() else float(node.get("value", 0.0))
        return F.pad(x, [n for pair in list(zip(before, after, strict=True))[::-1] for n in pair], value=filler)
    for axis, size in enumerate(x.shape):
        if before[axis] or after[axis]:
            place = torch.arange(-before[axis], size + after[axis], device=x.device)
            x = x.index_select(axis, _inside(place, size, mode))
    return x


def _inside(place: Tensor, size: int, mode: str) -> Tensor:
    """Where a place outside 0..size-1 takes its value from."""
    if mode == "edge":
        return place.clamp(0, size - 1)
    if mode == "wrap":
        return place % size
    if mode != "reflect":
        raise Unsupported(f"Pad with mode {mode}")
    turn = max(2 * (size - 1), 1)
    folded = place % turn
    return torch.minimum(folded, turn - folded) if size > 1 else torch.zeros_like(place)


def shape(node: Node, x: Tensor) -> Tensor:
    """The lengths of the axes from `start` to `end`."""
    return torch.tensor(list(x.shape[node.get("start", 0) : node.get("end")]), dtype=torch.int64, device=x.device)


def size(node: Node, x: Tensor) -> Tensor:
    """How many elements x has."""
    return torch.tensor(x.numel(), dtype=torch.int64, device=x.device)


def constant_of_shape(node: Node, sizes: Tensor) -> Tensor:
    """A tensor of one value."""
    at_most(prod(whole(sizes)))
    value: Tensor = node.get("value", torch.zeros(1))
    return value.reshape(()).to(sizes.device).expand(whole(sizes))


def range_(node: Node, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """start, start + delta, ... below the limit."""
    count = max(ceil((float(limit) - float(start)) / float(delta)), 0)
    at_most(count)
    return start + delta * torch.arange(count, dtype=start.dtype, device=start.device)


def where(node: Node, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where the condition holds, b elsewhere."""
    return torch.where(condition, a, b)


def cast(node: Node, x: Tensor) -> Tensor:
    """x in another type."""
    if node.get("to") not in TYPES:
        raise Unsupported(f"Cast to element type {node.get('to')}")
    return x.to(TYPES[node.get("to")])


def cast_like(node: Node, x: Tensor, like: Tensor) -> Tensor:
    """x in the type of another value."""
    return x.to(like.dtype)


def trilu(node: Node, x: Tensor, k: Tensor | None = None) -> Tensor:
    """The upper or the lower triangle of matrices."""
    diagonal = 0 if k is None else int(k)
    return torch.triu(x, diagonal) if node.get("upper", 1) else torch.tril(x, diagonal)


def non_zero(node: Node, x: Tensor) -> Tensor:
    """Places that are not zero, one a column."""
    return x.nonzero().T
