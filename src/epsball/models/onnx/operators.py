"""The table of ONNX operators: name -> function of (node, inputs), each checked against onnxruntime by a test of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from epsball.models.onnx import layers, resize, shapes
from epsball.models.onnx.node import Node, Unsupported, axes_of

Operator = Callable[..., Tensor | tuple[Tensor, ...]]


def _plain(function: Callable[..., Any]) -> Operator:
    """An operator without attributes."""
    return lambda node, *inputs: function(*inputs)


def _many(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """An operator on any number of inputs, by twos."""
    return lambda node, *inputs: functools.reduce(function, inputs)


def _div(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _mod(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b)


def _pow(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b).to(a.dtype)


def _clip(node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if node.opset < 11:
        return x.clamp(node.get("min"), node.get("max")) if {"min", "max"} & set(node.attributes) else x
    return x if low is None and high is None else torch.clamp(x, low, high)


def _prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


def _selu(node: Node, x: Tensor) -> Tensor:
    gamma: float = node.get("gamma", 1.0507009873554805)
    return gamma * F.elu(x, node.get("alpha", 1.6732632423543772))


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Operator:
    def call(node: Node, x: Tensor) -> Tensor:
        if node.opset >= 13:
            return function(x, node.get("axis", -1))
        axis = node.get("axis", 1) % x.ndim  # all axes from this one on count as one
        return function(x.flatten(axis), -1).reshape(x.shape)

    return call


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def call(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
        along = axes_of(node, axes)
        if not along and node.get("noop_with_empty_axes", 0):
            return x
        return function(x, along or list(range(x.ndim)), bool(node.get("keepdims", 1)))

    return call


def _arg(largest: bool) -> Operator:
    def call(node: Node, x: Tensor) -> Tensor:
        axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))
        last = node.get("select_last_index", 0)
        seen = x.flip(axis) if last else x
        best = seen.argmax(axis, keepdim=keep) if largest else seen.argmin(axis, keepdim=keep)
        return x.shape[axis] - 1 - best if last else best

    return call


def _top_k(node: Node, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.topk(x, int(k), node.get("axis", -1), bool(node.get("largest", 1)), bool(node.get("sorted", 1)))
    return found.values, found.indices


def _cum_sum(node: Node, x: Tensor, axis: Tensor) -> Tensor:
    node.refuse("exclusive", "reverse")
    return x.cumsum(int(axis))


def _dropout(node: Node, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Tensor:
    if training is not None and bool(training):
        raise Unsupported("Dropout in training mode")
    return x


ARITHMETIC: dict[str, Operator] = {
    "Add": _plain(torch.add),
    "Sub": _plain(torch.sub),
    "Mul": _plain(torch.mul),
    "Div": _div,
    "Mod": _mod,
    "Pow": _pow,
    "Sum": _many(torch.add),
    "Min": _many(torch.minimum),
    "Max": _many(torch.maximum),
    "Mean": lambda node, *inputs: functools.reduce(torch.add, inputs) / len(inputs),
    "Equal": _plain(torch.eq),
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le),
    "Not": _plain(torch.logical_not),
    "And": _plain(torch.logical_and),
    "Or": _plain(torch.logical_or),
    "Xor": _plain(torch.logical_xor),
    "Identity": lambda node, x: x,
    "Sqrt": _plain(torch.sqrt),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Log": _plain(torch.log),
    "Neg": _plain(torch.neg),
    "Abs": _plain(torch.abs),
    "Sign": _plain(torch.sign),
    "Reciprocal": _plain(torch.reciprocal),
    "Floor": _plain(torch.floor),
    "Ceil": _plain(torch.ceil),
    "Round": _plain(torch.round),
    "Sin": _plain(torch.sin),
    "Cos": _plain(torch.cos),
    "Tanh": _plain(torch.tanh),
    "Atan": _plain(torch.atan),
}

ACTIVATIONS: dict[str, Operator] = {
    "Relu": _plain(F.relu),
    "LeakyRelu": lambda node, x: F.leaky_relu(x, node.get("alpha", 0.01)),
    "PRelu": _prelu,
    "Elu": lambda node, x: F.elu(x, node.get("alpha", 1.0)),
    "Celu": lambda node, x: F.celu(x, node.get("alpha", 1.0)),
    "Selu": _selu,
    "ThresholdedRelu": lambda node, x: torch.where(x > node.get("alpha", 1.0), x, torch.zeros_like(x)),
    "Sigmoid": _plain(torch.sigmoid),
    "HardSigmoid": lambda node, x: (node.get("alpha", 0.2) * x + node.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda node, x: x * (x / 6 + 0.5).clamp(0, 1),
    "Clip": _clip,
    "Gelu": lambda node, x: F.gelu(x, approximate=node.get("approximate", "none")),
    "Softplus": _plain(F.softplus),
    "Softsign": _plain(F.softsign),
    "Mish": _plain(F.mish),
    "Softmax": _softmax(F.softmax),
    "LogSoftmax": _softmax(F.log_softmax),
}

REDUCTIONS: dict[str, Operator] = {
    "ReduceMean": _reduce(lambda x, along, keep: x.mean(along, keepdim=keep)),
    "ReduceSum": _reduce(lambda x, along, keep: x.sum(along, keepdim=keep)),
    "ReduceSumSquare": _reduce(lambda x, along, keep: x.square().sum(along, keepdim=keep)),
    "ReduceMax": _reduce(lambda x, along, keep: x.amax(along, keepdim=keep)),
    "ReduceMin": _reduce(lambda x, along, keep: x.amin(along, keepdim=keep)),
    "ReduceLogSumExp": _reduce(lambda x, along, keep: x.logsumexp(along, keepdim=keep)),
    "ReduceL1": _reduce(lambda x, along, keep: torch.linalg.vector_norm(x, 1, along, keepdim=keep)),
    "ReduceL2": _reduce(lambda x, along, keep: torch.linalg.vector_norm(x, 2, along, keepdim=keep)),
    "ArgMax": _arg(True),
    "ArgMin": _arg(False),
    "TopK": _top_k,
    "CumSum": _cum_sum,
}

LAYERS: dict[str, Operator] = {
    "Gemm": layers.gemm,
    "MatMul": layers.matmul,
    "Einsum": layers.einsum,
    "Conv": layers.conv,
    "ConvTranspose": layers.conv_transpose,
    "MaxPool": layers.max_pool,
    "AveragePool": layers.average_pool,
    "GlobalAveragePool": layers.global_average_pool,
    "GlobalMaxPool": layers.global_max_pool,
    "BatchNormalization": layers.batch_norm,
    "InstanceNormalization": layers.instance_norm,
    "LayerNormalization": layers.layer_norm,
    "GroupNormalization": layers.group_norm,
    "LRN": layers.local_response_norm,
    "LpNormalization": layers.lp_norm,
    "DepthToSpace": layers.depth_to_space,
    "SpaceToDepth": layers.space_to_depth,
    "Flatten": layers.flatten,
    "Dropout": _dropout,
    "Resize": resize.resize,
    "Upsample": resize.upsample,
}

SHAPES: dict[str, Operator] = {
    "Reshape": shapes.reshape,
    "Transpose": shapes.transpose,
    "Squeeze": shapes.squeeze,
    "Unsqueeze": shapes.unsqueeze,
    "Concat": shapes.concat,
    "Split": shapes.split,
    "Slice": shapes.slice_,
    "Gather": shapes.gather,
    "GatherElements": shapes.gather_elements,
    "Expand": shapes.expand,
    "Tile": shapes.tile,
    "Pad": shapes.pad,
    "Shape": shapes.shape,
    "Size": shapes.size,
    "ConstantOfShape": shapes.constant_of_shape,
    "Range": shapes.range_,
    "Where": shapes.where,
    "Cast": shapes.cast,
    "CastLike": shapes.cast_like,
    "Trilu": shapes.trilu,
    "NonZero": shapes.non_zero,
}

OPERATORS: dict[str, Operator] = {**ARITHMETIC, **ACTIVATIONS, **REDUCTIONS, **LAYERS, **SHAPES}
