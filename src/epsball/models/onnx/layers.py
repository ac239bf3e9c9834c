"""ONNX operators with weights or windows: products, convolutions, pooling, normalization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from epsball.models.onnx.node import Node, Unsupported

Pads = list[tuple[int, int]]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def filled(function: Callable[[Tensor], Tensor], x: Tensor, least: int) -> Tensor:
    """`function` of at least so many rows on a CPU, the rest zeros that are cut off again.

    Kernels for very small batches add in another order; see `core/steady.py`, which does this for layers that are modules.
    """
    if x.device.type != "cpu" or not 0 < len(x) < least:
        return function(x)
    return function(torch.cat([x, x.new_zeros(least - len(x), *x.shape[1:])]))[: len(x)]


def gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """alpha A' B' + beta C."""
    left = a.transpose(0, 1) if node.get("transA", 0) else a
    right = b.transpose(0, 1) if node.get("transB", 0) else b
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    if alpha == beta == 1 and c is not None and c.ndim == 1:
        return filled(lambda rows: torch.addmm(c, rows, right), left, 16)
    product = filled(lambda rows: rows @ right, left, 16)
    product = product if alpha == 1 else alpha * product
    return product if c is None or beta == 0 else product + (c if beta == 1 else beta * c)


def matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Products of matrices, as NumPy's."""
    return filled(lambda rows: rows @ b, a, 16) if a.ndim == b.ndim == 2 else a @ b


def _steps(node: Node, n: int) -> tuple[list[int], list[int]]:
    return list(node.get("strides") or [1] * n), list(node.get("dilations") or [1] * n)


def _pads(node: Node, sizes: Sequence[int], reach: Sequence[int], strides: Sequence[int]) -> Pads:
    """(before, after) per axis; `reach` is the length of the window with its gaps."""
    auto = node.get("auto_pad") or "NOTSET"
    if auto == "VALID":
        return [(0, 0) for _ in sizes]
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(sizes, strides, reach, strict=True)]
        return [(t // 2, t - t // 2) if auto == "SAME_UPPER" else (t - t // 2, t // 2) for t in total]
    flat = list(node.get("pads") or [0] * (2 * len(sizes)))
    return list(zip(flat[: len(sizes)], flat[len(sizes) :], strict=True))


def _pad(x: Tensor, pads: Pads, value: float = 0.0) -> Tensor:
    if not any(before or after for before, after in pads):
        return x
    return F.pad(x, [n for pair in reversed(pads) for n in pair], value=value)


def _axes(node: Node, x: Tensor) -> int:
    if not 3 <= x.ndim <= 5:
        raise Unsupported(f"{node.kind} on {x.ndim} axes")
    return x.ndim - 2


def conv(node: Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Convolution in one to three dimensions."""
    n = _axes(node, x)
    strides, dilations = _steps(node, n)
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    pads = _pads(node, x.shape[2:], reach, strides)
    even = [before for before, after in pads if before == after >= 0]  # what the convolution pads by itself is faster
    x, own = (x, even) if len(even) == n else (_pad(x, pads), [0] * n)
    return filled(lambda rows: _CONV[n](rows, w, b, strides, own, dilations, node.get("group", 1)), x, 4)


def conv_transpose(node: Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """The transpose of a convolution: the whole result first, then the padding is cut off."""
    n = _axes(node, x)
    strides, dilations = _steps(node, n)
    extra = list(node.get("output_padding") or [0] * n)
    function, group = _CONV_TRANSPOSE[n], node.get("group", 1)
    whole = filled(lambda rows: function(rows, w, b, strides, 0, 0, group, dilations), x, 4)
    if any(extra):  # cells past the end: nothing reaches them but the bias
        tail = [(0, e) for e in extra]
        whole = _pad(whole, tail) if b is None else _pad(whole - b.view(-1, *[1] * n), tail) + b.view(-1, *[1] * n)
    auto = node.get("auto_pad") or "NOTSET"
    wanted = node.get("output_shape") or ([s * k for s, k in zip(x.shape[2:], strides, strict=True)] if "SAME" in auto else None)
    if wanted is None:
        cut = _pads(node, whole.shape[2:], [1] * n, strides)
    else:
        total = [have - want for have, want in zip(whole.shape[2:], wanted[-n:], strict=True)]
        if min(total) < 0:
            raise Unsupported("ConvTranspose with an output_shape beyond the result")
        cut = [(t // 2, t - t // 2) if auto == "SAME_UPPER" else (t - t // 2, t // 2) for t in total]
    return _pad(whole, [(-before, -after) for before, after in cut])


def _window(node: Node, x: Tensor) -> tuple[list[int], list[int], list[int], Pads, Pads]:
    """Kernel, strides, dilations, padding, and how much more the last windows need in ceil mode (negative: that much is left over)."""
    n, kernel = _axes(node, x), list(node.get("kernel_shape"))
    strides, dilations = _steps(node, n)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = _pads(node, x.shape[2:], reach, strides)
    more: Pads = []
    for size, (before, after), s, r in zip(x.shape[2:], pads, strides, reach, strict=True):
        room = size + before + after - r
        count = (-(-room // s) if node.get("ceil_mode", 0) else room // s) + 1
        if node.get("ceil_mode", 0) and (count - 1) * s >= size + before:  # a window must start inside the input
            count -= 1
        more.append((0, (count - 1) * s - room))
    return kernel, strides, dilations, pads, more


def max_pool(node: Node, x: Tensor) -> Tensor:
    """Largest value of each window."""
    kernel, strides, dilations, pads, more = _window(node, x)
    padded = _pad(_pad(x, pads, -torch.inf), more, -torch.inf)
    result: Tensor = _MAX_POOL[x.ndim - 2](padded, kernel, strides, 0, dilations)
    return result


def average_pool(node: Node, x: Tensor) -> Tensor:
    """Mean of each window; padding counts only with `count_include_pad`."""
    kernel, strides, dilations, pads, more = _window(node, x)
    if any(d != 1 for d in dilations):
        raise Unsupported("AveragePool with dilations")
    pool, ones = _AVG_POOL[x.ndim - 2], torch.ones_like(x[:1, :1])
    counted = _pad(_pad(ones, pads, float(node.get("count_include_pad", 0))), more)
    return pool(_pad(_pad(x, pads), more), kernel, strides) / pool(counted, kernel, strides)


def global_average_pool(node: Node, x: Tensor) -> Tensor:
    """Mean over all axes but the first two, which stay with length 1."""
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def global_max_pool(node: Node, x: Tensor) -> Tensor:
    """Maximum over all axes but the first two, which stay with length 1."""
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


def batch_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Normalization by stored statistics."""
    node.refuse("training_mode")
    if node.opset < 9 and node.get("spatial", 1) != 1:
        raise Unsupported("BatchNormalization with spatial=0")
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, node.get("epsilon", 1e-5))


def instance_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Each channel of each sample normalized by itself."""
    shape, axes = (-1, *[1] * (x.ndim - 2)), tuple(range(2, x.ndim))
    centered = x - x.mean(axes, keepdim=True)
    epsilon: float = node.get("epsilon", 1e-5)
    spread = (centered.square().mean(axes, keepdim=True) + epsilon).sqrt()
    return centered / spread * scale.view(shape) + bias.view(shape)


def layer_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Normalization over the axes from `axis` on."""
    axis = node.get("axis", -1) % x.ndim
    normal = F.layer_norm(x, x.shape[axis:], None, None, node.get("epsilon", 1e-5)) * scale
    return normal if bias is None else normal + bias


def group_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Normalization over groups of channels; before version 21 there is one scale a group, then one a channel."""
    groups, channels = node.get("num_groups"), x.shape[1]
    normal = F.group_norm(x, groups, None, None, node.get("epsilon", 1e-5))
    if node.opset < 21:
        scale, bias = (v.repeat_interleave(channels // groups) for v in (scale, bias))
    shape = (-1, *[1] * (x.ndim - 2))
    return normal * scale.view(shape) + bias.view(shape)


def local_response_norm(node: Node, x: Tensor) -> Tensor:
    """Each value divided by a power of the squares around it, across channels."""
    size, channels = node.get("size"), x.shape[1]
    pads = [((size - 1) // 2, size // 2)] + [(0, 0)] * (x.ndim - 2)
    squares = _pad(x.square(), pads)
    total = torch.stack([squares[:, i : i + channels] for i in range(size)]).sum(0)
    divisor: Tensor = (node.get("bias", 1.0) + node.get("alpha", 1e-4) / size * total) ** node.get("beta", 0.75)
    return x / divisor


def lp_norm(node: Node, x: Tensor) -> Tensor:
    """x over its L1 or L2 norm along an axis."""
    norm: Tensor = torch.linalg.vector_norm(x, node.get("p", 2), node.get("axis", -1), keepdim=True)
    return x / norm


def einsum(node: Node, *inputs: Tensor) -> Tensor:
    """Sums of products by index letters."""
    return torch.einsum(node.get("equation"), *inputs)


def depth_to_space(node: Node, x: Tensor) -> Tensor:
    """Channels laid out as blocks of pixels."""
    b, c, h, w = x.shape
    k = node.get("blocksize")
    if node.get("mode", "DCR") == "DCR":
        return x.reshape(b, k, k, c // k**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, c // k**2, h * k, w * k)
    return x.reshape(b, c // k**2, k, k, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // k**2, h * k, w * k)


def space_to_depth(node: Node, x: Tensor) -> Tensor:
    """Blocks of pixels laid out as channels."""
    b, c, h, w = x.shape
    k = node.get("blocksize")
    return x.reshape(b, c, h // k, k, w // k, k).permute(0, 3, 5, 1, 2, 4).reshape(b, c * k * k, h // k, w // k)


def flatten(node: Node, x: Tensor) -> Tensor:
    """Two axes: those before `axis`, and the rest."""
    axis = node.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(prod(x.shape[:axis]), prod(x.shape[axis:]))
