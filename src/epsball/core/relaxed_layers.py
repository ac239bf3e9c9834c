"""Substitute derivatives of whole layers: those of 8-bit numbers, and singular value decompositions. Used by `core.relaxed_rules`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epsball.core.relaxed_call import AS_IT_IS, Call, Shadow

NARROW = 1e-4
"""Differences of singular values, and of their squares, below this share of the largest count as none."""
INTEGER_LAYERS = tuple(
    f"{kind}{end}" for kind in ("linear", "conv1d", "conv2d", "conv3d") for end in ("", "_relu", "_dynamic", "_relu_dynamic")
)
"""Operations that are layers of 8-bit numbers where their weights are packed."""


def integer_layer(call: Call) -> Shadow:
    """A layer with 8-bit weights (`torch.ops.quantized`): the same in floats, its own weights widened."""
    packed: Any = call.raw(1)
    if not isinstance(packed, torch.ScriptObject):
        return AS_IT_IS
    call.named("int8 layer")
    x, kind = call.twin(0), call.name.partition("_")[0]
    if kind == "linear":
        weight, bias = torch.ops.quantized.linear_unpack(packed)
        answer = torch.nn.functional.linear(x, weight.dequantize(), bias)
    else:
        weight, bias = getattr(torch.ops.quantized, f"{kind}_unpack")(packed)
        shape = [getattr(packed, name)() for name in ("stride", "padding", "dilation", "groups")]
        answer = getattr(torch.nn.functional, kind)(x, weight.dequantize(), bias, *shape)
    return answer.relu() if "relu" in call.name else answer


def integer_sum(call: Call) -> Shadow:
    """The sum of two 8-bit tensors: the sum."""
    if not isinstance(call.real, Tensor) or not call.real.is_quantized:
        return AS_IT_IS
    total: Tensor = call.twin(0) + call.twin(1)
    return total.relu() if "relu" in call.name else total


class SingularValues(torch.autograd.Function):
    """Singular values and vectors that are given, with a derivative that stays finite where singular values are equal.

    Townsend 2016 (differentiating the singular value decomposition) with 1 / d -> d / (d^2 + (`NARROW` s_1^2)^2) for differences d of
    squares, as Liao et al. 2019, arXiv 1903.09650, section III, broaden them. Shapes: x (..., m, n), u (..., m, k), s (..., k),
    vh (..., k, n).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The given ones."""
        ctx.save_for_backward(u, s, vh)
        return u.clone(), s.clone(), vh.clone()

    @staticmethod
    def backward(ctx: Any, du: Tensor, ds: Tensor, dvh: Tensor) -> tuple[Tensor, None, None, None]:
        """The slope of x."""
        u, s, vh = ctx.saved_tensors
        v, dv, square, best = vh.mH, dvh.mH, s.square(), s[..., :1].square().clamp_min(1e-30)
        apart = square.unsqueeze(-2) - square.unsqueeze(-1)
        f = apart / (apart.square() + (NARROW * best.unsqueeze(-1)).square())
        inverse = s / (square + NARROW * best)
        left, right = f * (u.mH @ du), f * (v.mH @ dv)
        inner = (left + left.mH) * s.unsqueeze(-2) + s.unsqueeze(-1) * (right + right.mH) + torch.diag_embed(ds)
        slope = u @ inner @ vh
        slope = slope + (du - u @ (u.mH @ du)) * inverse.unsqueeze(-2) @ vh
        slope = slope + u @ (inverse.unsqueeze(-1) * (dvh - (dvh @ v) @ vh))
        return slope, None, None, None


def singular_values(call: Call) -> Shadow:
    """Singular value decompositions whose values are close: a derivative that stays finite."""
    x = call.twin(0)
    if not isinstance(x, Tensor) or not isinstance(call.real, tuple) or len(call.real) != 3 or x.is_complex():
        return AS_IT_IS
    u, s, v = (part.detach() for part in call.real)
    if bool(((s[..., :-1] - s[..., 1:]) > NARROW * s[..., :1]).all()):
        return AS_IT_IS
    transposed, k = call.name == "svd", s.shape[-1]
    left, values, right = SingularValues.apply(x, u[..., :k], s, v[..., :k].mT if transposed else v[..., :k, :])  # type: ignore[no-untyped-call]
    call.named("svd")
    rest = (u[..., k:], v[..., k:] if transposed else v[..., k:, :])
    right = right.mT if transposed else right
    return torch.cat((left, rest[0]), -1), values, torch.cat((right, rest[1]), -1 if transposed else -2)
