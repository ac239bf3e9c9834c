"""Layers as a search needs them: on the CPU their gradients by the input alone, in the forms that are fastest there.

Convolutions of few input channels, as the first layers of most networks are, give them as matrix products that are added up where they
came from: oneDNN takes a multiple of the time. Others with a stride give them as one convolution without a stride, whose channels are the
places within a stride. Large linear layers are asked of oneDNN, which is twice as fast as MKL on some processors. All are the same sums
in another order.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Pair = tuple[int, int]

FEW = 4
"""Most input channels at which matrix products are faster."""
_TOGETHER = 2**18
"""Most entries of the products that are held at once: more do not stay near the processor."""


class _Conv(torch.autograd.Function):
    """conv2d with a gradient by its input alone; `turned`: what `_interleaved` wants in the place of the weights, None for `_folded`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, turned: Tensor | None, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor:
        ctx.save_for_backward(weight if turned is None else turned)
        ctx.shape, ctx.dtype, ctx.how, ctx.turned = x.shape[1:], x.dtype, (stride, padding, dilation), turned is not None
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,), weight = gradients, ctx.saved_tensors[0].to(gradients[0].dtype)
        if ctx.turned:
            return _interleaved(g, weight, ctx.shape, *ctx.how[:2]).to(ctx.dtype), *[None] * 6
        return _folded(g, weight, ctx.dtype, ctx.shape[1:], *ctx.how), *[None] * 6


def convolved(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `layer` answers; where that pays and nobody else asks, with a faster gradient by `x`, and none by the weights.

    It pays for up to `FEW` channels of float32 on the CPU with frozen weights. Nothing is changed where calls are watched, traced,
    compiled or transformed, nor for tensors of other types.
    """
    plain = type(x) is Tensor and x.ndim == 4 and x.dtype is weight.dtype is torch.float32 and x.device.type == "cpu"
    frozen = torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad and (bias is None or not bias.requires_grad)
    ours = plain and frozen and folds(layer) and not _watched()
    how = layer.stride, layer.padding, layer.dilation
    output: Tensor = _Conv.apply(x, weight, None, bias, *how) if ours else nn.Conv2d._conv_forward(layer, x, weight, bias)  # type: ignore[no-untyped-call]
    return output


def folds(layer: nn.Conv2d) -> bool:
    """Whether matrix products give this layer's gradient, and faster."""
    return layer.padding_mode == "zeros" and layer.in_channels <= FEW and layer.groups == 1 and not isinstance(layer.padding, str)


def _watched() -> bool:
    """Whether somebody follows the calls of layers: modes, function transforms, forward derivatives, tracers, compilers."""
    c = torch._C
    transformed = c._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    return c._is_torch_function_mode_enabled() or transformed or c._get_tracing_state() is not None or torch.compiler.is_compiling()


def _folded(g: Tensor, weight: Tensor, dtype: torch.dtype, size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """weight^T g (B, kernel entries, places), sample by sample, each entry added where it came from."""
    kernels = weight.flatten(1).t().contiguous()
    rows = max(1, _TOGETHER // (len(kernels) * g.shape[2:].numel()))
    some = g.split(rows)  # type: ignore[no-untyped-call]
    shares = (torch.bmm(kernels.expand(len(part), -1, -1), part.flatten(2)).to(dtype) for part in some)
    parts = [F.fold(share, size, weight.shape[2:], dilation, padding, stride) for share in shares]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _strided(weight: Tensor, stride: Pair, dilation: Pair) -> bool:
    """Whether `_interleaved` is faster: up to 32 channels where the stride divides the kernel, so that none of its places is empty."""
    if torch.compiler.is_compiling() or stride == (1, 1) or dilation != (1, 1):
        return False
    whole = all(k % s == 0 for k, s in zip(weight.shape[2:], stride, strict=True))
    return weight.shape[1] <= 32 and whole and weight.is_contiguous()


def _turned(weight: Tensor, size: Pair, stride: Pair, padding: Pair) -> Tensor:
    """(O, C, ...) -> (C * places in a stride, O, taps): row s * n + p of the input meets the rows p, p + s, ... of the kernel."""
    (down, right), taps = stride, []
    for n, p, s, k in zip(size, padding, stride, weight.shape[2:], strict=True):
        last = (n + 2 * p - k) // s * s  # the row where the last kernel begins
        taps.append(-(-(n + 2 * p - last) // s))
    rows, columns = taps
    kernel = F.pad(weight, (0, columns * right - weight.shape[3], 0, rows * down - weight.shape[2]))
    kernel = kernel.reshape(*weight.shape[:2], rows, down, columns, right).permute(1, 3, 5, 0, 2, 4)
    return kernel.flatten(0, 2).flip(2, 3)


def _interleaved(g: Tensor, turned: Tensor, shape: tuple[int, int, int], stride: Pair, padding: Pair) -> Tensor:
    """A convolution without a stride gives the gradient of each place of the stride; they are put side by side."""
    y = F.conv2d(g, turned, padding=(turned.shape[2] - 1, turned.shape[3] - 1))
    last = not y.is_contiguous()
    places = _places(*shape, stride, (y.shape[2], y.shape[3]), padding, last)
    return (y.permute(0, 2, 3, 1) if last else y).flatten(1).index_select(1, places).view(len(g), *shape)


@lru_cache(maxsize=64)
def _places(channels: int, high: int, wide: int, stride: Pair, each: Pair, padding: Pair, last: bool) -> Tensor:
    """Where the entries of an input (channels, high, wide) stand among (channels, *stride, *each), which have its padding, too."""
    outs = channels * math.prod(stride)
    every = torch.arange(outs * math.prod(each)).view(*each, outs).permute(2, 0, 1) if last else torch.arange(outs * math.prod(each))
    rows = every.reshape(channels, *stride, *each).permute(0, 3, 1, 4, 2).flatten(3, 4).flatten(1, 2)
    return rows[:, padding[0] : padding[0] + high, padding[1] : padding[1] + wide].flatten()


class _Linear(torch.autograd.Function):
    """x weight^T + bias by oneDNN, and its gradient by x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x.to_mkldnn(), weight, bias).to_dense()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (weight,) = ctx.saved_tensors
        return _Linear.apply(gradients[0], weight.t(), None), None, None  # type: ignore[no-untyped-call]


def _large(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is asked: float32 matrices for which going there costs little beside the product. Not behind compilers."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return x.ndim == 2 and x.dtype is weight.dtype is torch.float32 and len(x) * weight.numel() >= 2**22


class ByInput(TorchFunctionMode):
    """Within it such layers give no gradient to their weights: for searches, which ask for that of the input alone.

    Enter the same one at every step: what it makes of weights it makes once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The calls of `nn.Conv2d` and `nn.Linear` are answered here, all others as ever."""
        if not kwargs and not types:
            if func is F.conv2d and len(args) == 7 and args[0].ndim == 4 and args[0].device.type == "cpu":
                return self._convolved(*args)
            if func is F.linear and len(args) == 3 and args[0].device.type == "cpu" and _large(*args[:2]):
                return _Linear.apply(args[0], args[1].detach(), _fixed(args[2]))  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Any, dilation: Pair, groups: int) -> Tensor:
        plain = groups == 1 and not isinstance(padding, str)
        few = plain and weight.shape[1] <= FEW
        strided = plain and not few and _strided(weight, stride, dilation)
        if not few and not strided:
            return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        turned = self._kept(weight, x.shape[2:], stride, padding) if strided else None
        output: Tensor = _Conv.apply(x, weight.detach(), turned, _fixed(bias), stride, padding, dilation)  # type: ignore[no-untyped-call]
        return output

    def _kept(self, weight: Tensor, *how: Any) -> Tensor:
        name = (id(weight), weight._version, *how)
        if name not in self._made:
            self._made[name] = weight, _turned(weight.detach(), *how)  # beside the weights, so that no others come to have their id
        return self._made[name][1]


def _fixed(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()
