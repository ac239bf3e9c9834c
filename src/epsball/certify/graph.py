"""A network as a short list of parts, read off by tracing it (torch.fx). What no part stands for is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.grad import conv2d_input

from epsball.certify.ops import Curve, Function, Map, MaxPool, Op, Relu, Sum
from epsball.core import Victim
from epsball.errors import BadInput
from epsball.models.adapt import Adapted

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Node:
    """One part, the places of its inputs, and the shape of its output, one sample's."""

    op: Op
    inputs: tuple[int, ...]
    shape: Shape


@dataclass(frozen=True, eq=False)
class Graph:
    """Parts in order; place 0 is the input, the last one gives the scores (C,)."""

    nodes: tuple[Node, ...]

    @property
    def top(self) -> int:
        """The place of the scores."""
        return len(self.nodes) - 1

    def bends(self) -> list[int]:
        """The places that feed a part that is not linear."""
        fed = (place for node in self.nodes for place in node.inputs if not node.op.linear)
        return sorted(set(fed))

    def straight(self, place: int) -> int:
        """Between the input and this place: 2 for more than straight steps, 1 for steps one of which mixes features, else 0."""
        mixing = 0
        while place:
            op = self.nodes[place].op
            if not isinstance(op, Map):
                return 2
            mixing += not op.diagonal
            place = self.nodes[place].inputs[0]
        return min(mixing, 2)


def trace(victim: Victim, x: Tensor) -> Graph:
    """The parts of a model in eval mode, for inputs like x (B, ...).

    Linear, Conv1d, Conv2d, BatchNorm, ReLU, LeakyReLU, tanh, sigmoid, average, adaptive average and max pooling, flatten and
    reshape, permute, mean, dropout, sums of two parts, sums and products with constants; what `epsball.wrap` adds. Where gradients are on,
    they flow to the weights: training by bounds lives on it.

    Raises:
        BadInput: a part that is none of these, by its name; a model that cannot be traced. Randomized smoothing needs no parts.
    """
    model = victim.model
    if not isinstance(model, nn.Module) or victim.lens is not None:
        raise BadInput(f"model '{victim.name}': {type(model).__name__} is no module that can be traced: use --method smoothing")
    builder = _Builder(
        victim.name, victim.device, [Node(_rearranged(lambda x: x, tuple(x.shape[1:]), diagonal=True), (), tuple(x.shape[1:]))]
    )
    if not isinstance(model, Adapted):
        builder.read(model, x[:1].to(victim.dtype))
        return builder.done()
    if model.outputs != "logits":
        raise BadInput(f"model '{victim.name}': its outputs are {model.outputs}: give a model that returns logits")
    shown = x[:1]
    if model.normalizes:
        view = (-1, *[1] * (x.ndim - 2))
        builder.shift(0, -model.mean.double().view(view))
        builder.scale(1, 1 / model.std.double().view(view))
        shown = model._normalize(shown)
    builder.read(model.module, shown.to(victim.dtype))
    builder.order(model.order)
    return builder.done()


def _rearranged(apply: Function, shape: Shape, fan: int = 0, diagonal: bool = False) -> Map:
    return Map(apply, apply, shape, fan, diagonal=diagonal)


@dataclass
class _Builder:
    """Parts so far, and where each node of the trace is found among them."""

    name: str
    device: torch.device
    nodes: list[Node]
    places: dict[fx.Node, int] = field(default_factory=dict)

    def add(self, op: Op, *inputs: int, shape: Shape | None = None) -> int:
        """A part of the shape of its first input unless told."""
        self.nodes.append(Node(op, inputs, self.nodes[inputs[0]].shape if shape is None else shape))
        return len(self.nodes) - 1

    def shift(self, place: int, constant: Tensor) -> int:
        """x + constant."""
        shape = self.nodes[place].shape
        return self.add(Map(lambda x: x, lambda x: x, shape, 1, constant.broadcast_to(shape), diagonal=True), place)

    def scale(self, place: int, factor: Tensor) -> int:
        """factor * x."""
        size = factor.abs()
        return self.add(Map(lambda x: factor * x, lambda x: size * x, self.nodes[place].shape, 2, diagonal=True), place)

    def order(self, order: Tensor | None) -> None:
        """What `wrap` does with the scores: a single one becomes (0, z), columns change places."""
        place = len(self.nodes) - 1
        if self.nodes[place].shape == (1,):
            place = self.add(_rearranged(lambda x: nn.functional.pad(x, (1, 0)), (1,)), place, shape=(2,))
        if order is not None:
            shape = self.nodes[place].shape
            self.add(_rearranged(lambda x: x.index_select(1, order), shape), place, shape=(len(order),))

    def done(self) -> Graph:
        """The graph."""
        if len(self.nodes[-1].shape) != 1:
            raise BadInput(f"model '{self.name}': returns {self.nodes[-1].shape} for one input: scores (C,) are needed")
        return Graph(tuple(self.nodes))

    def read(self, module: nn.Module, shown: Tensor) -> None:
        """Adds what a module does to the part that was added last; shown (1, ...) is an example of its input."""
        try:
            traced = fx.symbolic_trace(module)
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadInput(f"model '{self.name}': cannot be traced ({said}): use --method smoothing") from error
        with torch.no_grad():
            ShapeProp(traced).propagate(torch.cat([shown, shown]))
        modules = dict(traced.named_modules())
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                self.places[node] = len(self.nodes) - 1
            elif node.op == "output":
                self._output(node)
            elif "tensor_meta" in node.meta and node.op != "get_attr":
                self._read(node, modules, traced)
            elif any(isinstance(a, fx.Node) and a in self.places for a in node.args) and _called(node) not in ("size", "dim", "getattr"):
                raise self._unknown(node)

    def _output(self, node: fx.Node) -> None:
        answer = node.args[0]
        if not isinstance(answer, fx.Node) or answer not in self.places:
            raise BadInput(f"model '{self.name}': returns {type(answer).__name__}: certified bounds need one tensor of scores")
        if self.places[answer] != len(self.nodes) - 1:  # parts behind it are not used
            self.nodes = self.nodes[: self.places[answer] + 1]

    def _unknown(self, node: fx.Node) -> BadInput:
        words = f"layer '{node.target}'" if node.op == "call_module" else f"operation '{_called(node)}' ({node.name})"
        return BadInput(f"model '{self.name}': {words} has no certified bounds: use --method smoothing, or auto-lirpa")

    def _read(self, node: fx.Node, modules: Mapping[str, nn.Module], traced: fx.GraphModule) -> None:
        shape = tuple(node.meta["tensor_meta"].shape)
        if shape[:1] != (2,):
            raise self._unknown(node)
        if node.op == "call_module":
            module = modules[str(node.target)]
            made = MODULES.get(type(module), _nothing)(module, self._shape(node), shape[1:])
        elif _called(node) in ARITHMETIC:
            self.places[node] = self._arithmetic(node, traced, shape[1:])
            return
        else:
            made = FUNCTIONS.get(_called(node), _no_call)(self._call(node), self._shape(node), shape[1:])
        if made is None:
            raise self._unknown(node)
        self.places[node] = self.add(made, self._place(node, 0), shape=shape[1:])

    def _place(self, node: fx.Node, index: int) -> int:
        found = node.args[index] if index < len(node.args) else None
        if not isinstance(found, fx.Node) or found not in self.places:
            raise self._unknown(node)
        return self.places[found]

    def _shape(self, node: fx.Node) -> Shape:
        return self.nodes[self._place(node, 0)].shape

    def _call(self, node: fx.Node) -> Call:
        given = (*node.args[1:], *node.kwargs.values())
        return Call(_called(node), node.args[1:], dict(node.kwargs), any(isinstance(a, fx.Node) for a in given))

    def _arithmetic(self, node: fx.Node, traced: fx.GraphModule, shape: Shape) -> int:
        """Sums of two parts; sums and products with constants."""
        kind = ARITHMETIC[_called(node)]
        if node.kwargs or len(node.args) != 2:
            raise self._unknown(node)
        known = [isinstance(a, fx.Node) and a in self.places for a in node.args]
        if all(known) and kind in ("add", "sub"):
            first, second = self._place(node, 0), self._place(node, 1)
            if self.nodes[first].shape == self.nodes[second].shape:
                return self.add(Sum(1 if kind == "add" else -1), first, second)
        if sum(known) != 1:
            raise self._unknown(node)
        place, constant = self._place(node, known.index(True)), self._constant(node, node.args[known.index(False)], traced)
        if self.nodes[place].shape != shape:
            raise self._unknown(node)
        if kind in ("add", "sub"):
            sign = -1 if kind == "sub" else 1
            if known[0]:
                return self.shift(place, sign * constant)
            return self.shift(
                place if sign > 0 else self.scale(place, torch.tensor(-1.0, dtype=torch.float64, device=self.device)), constant
            )
        if kind == "div" and not known[0]:
            raise self._unknown(node)
        return self.scale(place, constant if kind == "mul" else 1 / constant)

    def _constant(self, node: fx.Node, given: Any, traced: fx.GraphModule) -> Tensor:
        if isinstance(given, fx.Node) and given.op == "get_attr":
            found: Any = traced
            for part in str(given.target).split("."):
                found = getattr(found, part)
            if isinstance(found, Tensor):
                rank = len(node.meta["tensor_meta"].shape)
                found = found.double()
                found = found.squeeze(0) if found.ndim == rank and len(found) == 1 else found
                if found.ndim < rank:
                    return torch.as_tensor(found)
        if isinstance(given, int | float):
            return torch.tensor(float(given), dtype=torch.float64, device=self.device)
        raise self._unknown(node)


@dataclass(frozen=True)
class Call:
    """A function or method with its arguments behind the first; `open` says that some of them are not constants."""

    name: str
    args: tuple[Any, ...]
    named: dict[str, Any]
    open: bool

    def get(self, index: int, name: str, default: Any) -> Any:
        """An argument by place or name."""
        return self.args[index] if index < len(self.args) else self.named.get(name, default)


def _called(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def _nothing(module: nn.Module, given: Shape, out: Shape) -> Op | None:
    return None


def _no_call(call: Call, given: Shape, out: Shape) -> Op | None:
    return None


def _linear(module: nn.Linear, given: Shape, out: Shape) -> Op:
    weight = module.weight.double()
    size, bias = weight.abs(), None if module.bias is None else module.bias.double()
    return Map(lambda x: x @ weight.T, lambda x: x @ size.T, given, weight.shape[1], bias, transpose=lambda a: a @ weight)


def _conv(module: nn.Conv1d | nn.Conv2d, given: Shape, out: Shape) -> Op:
    weight = module.weight.double()
    size, bias = weight.abs(), None if module.bias is None else module.bias.double().view(-1, *[1] * (len(out) - 1))
    forward: Callable[..., Tensor] = module._conv_forward
    fan = weight[0].numel()
    plain = module.padding_mode == "zeros" and not isinstance(module.padding, str) and isinstance(module, nn.Conv2d)
    how = (module.stride, module.padding, module.dilation, module.groups)
    back = (lambda a: conv2d_input((len(a), *given), weight, a, *how)) if plain else None  # type: ignore[no-untyped-call]
    return Map(lambda x: forward(x, weight, None), lambda x: forward(x, size, None), given, fan, bias, tiled=True, transpose=back)


def _norm(module: nn.BatchNorm1d | nn.BatchNorm2d, given: Shape, out: Shape) -> Op | None:
    if module.running_mean is None or module.running_var is None:
        return None  # statistics of the batch: samples would depend on one another
    scale = (module.running_var.double() + module.eps).rsqrt()
    scale = scale * (1.0 if module.weight is None else module.weight.double())
    shift = torch.zeros_like(scale) if module.bias is None else module.bias.double()
    inner, view = (scale * module.running_mean.double()), (-1, *[1] * (len(out) - 1))
    factor, size = scale.view(view), scale.abs().view(view)
    bias = (shift - inner).view(view)
    slip = (shift.abs() + inner.abs()).view(view).broadcast_to(out)
    return Map(lambda x: factor * x, lambda x: size * x, given, 8, bias.broadcast_to(out), diagonal=True, slip=slip)


def _relu(slope: float) -> Op | None:
    return Relu(slope) if 0 <= slope < 1 else None


_TANH = Curve(torch.tanh, lambda x: 1 - x.tanh().square())
_SIGMOID = Curve(torch.sigmoid, lambda x: x.sigmoid() * (1 - x.sigmoid()))


def _same(given: Shape) -> Op:
    return _rearranged(lambda x: x, given, diagonal=True)


def _reshaped(given: Shape, out: Shape) -> Op:
    return _rearranged(lambda x: x.reshape(len(x), *out), given, diagonal=True)


def _averaged(function: Function, given: Shape, out: Shape) -> Op:
    """Averages of windows that are at most one longer than a whole share: adaptive pooling, means."""
    padded = (*(1,) * (len(given) - len(out)), *out)
    fan = math.prod(math.ceil(a / b) + 1 for a, b in zip(given, padded, strict=True) if a != b)
    return _rearranged(function, given, fan)


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * axes


def _average(function: Function, kernel: Any, given: Shape) -> Op:
    return _rearranged(function, given, math.prod(_per_axis(kernel, len(given) - 1)) + 1)


def _max(kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool, given: Shape, out: Shape) -> Op | None:
    axes = len(given) - 1
    if ceil or axes not in (1, 2):
        return None
    kernel, step, pad, gap = (_per_axis(v, axes) for v in (kernel, kernel if stride in (None, []) else stride, padding, dilation))
    one = () if axes == 2 else (1,)
    places = torch.arange(1.0, math.prod(given[1:]) + 1, dtype=torch.float64).reshape(1, 1, *one, *given[1:])
    zero = () if axes == 2 else (0,)
    seen = nn.functional.unfold(places, (*one, *kernel), (*one, *gap), (*zero, *pad), (*one, *step))[0].T.long() - 1
    return MaxPool(torch.where(seen < 0, math.prod(given[1:]), seen), out[1:])


def _max_module(m: Any, given: Shape, out: Shape) -> Op | None:
    return None if m.return_indices else _max(m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, given, out)


def _max_call(call: Call, given: Shape, out: Shape) -> Op | None:
    if call.open or call.named.get("return_indices"):
        return None
    kernel, stride, padding = call.get(0, "kernel_size", None), call.get(1, "stride", None), call.get(2, "padding", 0)
    return _max(kernel, stride, padding, call.get(3, "dilation", 1), call.get(4, "ceil_mode", False), given, out)


def _plain(call: Call, given: Shape, out: Shape) -> Op | None:
    """Averages and rearrangements whose arguments are constants."""
    if call.open:
        return None
    if call.name == "mean":
        dims = _per_axis(call.get(0, "dim", None), 1)
        kept = bool(call.get(1, "keepdim", False))
        if None in dims or call.named.get("dtype") is not None or any(d % (len(given) + 1) == 0 for d in dims):
            return None
        fan = math.prod(given) // math.prod(out)
        return _rearranged(lambda x: x.mean(dims, keepdim=kept), given, fan)
    if call.name == "permute":
        order = call.args[0] if isinstance(call.args[0], tuple | list) else call.args
        return None if order[0] != 0 else _rearranged(lambda x: x.permute(*order), given)
    if call.name == "avg_pool2d":
        function = nn.functional.avg_pool2d
        return _average(lambda x: function(x, *call.args, **call.named), call.get(0, "kernel_size", None), given)
    adaptive = {"adaptive_avg_pool2d": nn.functional.adaptive_avg_pool2d, "adaptive_avg_pool1d": nn.functional.adaptive_avg_pool1d}
    return _averaged(lambda x: adaptive[call.name](x, *call.args, **call.named), given, out)


def _dropped(call: Call, given: Shape, out: Shape) -> Op | None:
    return _same(given) if call.get(1, "training", True) is False else None


MODULES: dict[type, Callable[[Any, Shape, Shape], Op | None]] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.BatchNorm1d: _norm,
    nn.BatchNorm2d: _norm,
    nn.ReLU: lambda m, given, out: _relu(0.0),
    nn.LeakyReLU: lambda m, given, out: _relu(m.negative_slope),
    nn.Tanh: lambda m, given, out: _TANH,
    nn.Sigmoid: lambda m, given, out: _SIGMOID,
    nn.AvgPool1d: lambda m, given, out: _average(m.forward, m.kernel_size, given),
    nn.AvgPool2d: lambda m, given, out: _average(m.forward, m.kernel_size, given),
    nn.AdaptiveAvgPool1d: lambda m, given, out: _averaged(m.forward, given, out),
    nn.AdaptiveAvgPool2d: lambda m, given, out: _averaged(m.forward, given, out),
    nn.MaxPool1d: _max_module,
    nn.MaxPool2d: _max_module,
    nn.Flatten: lambda m, given, out: _reshaped(given, out),
    nn.Unflatten: lambda m, given, out: _reshaped(given, out),
    **{kind: lambda m, given, out: _same(given) for kind in (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)},
}
"""Layers, by their exact type: a subclass may compute anything."""

FUNCTIONS: dict[str, Callable[[Call, Shape, Shape], Op | None]] = {
    **dict.fromkeys(("relu", "relu_"), lambda call, given, out: _relu(0.0)),
    "leaky_relu": lambda call, given, out: None if call.open else _relu(call.get(0, "negative_slope", 0.01)),
    "tanh": lambda call, given, out: _TANH,
    "sigmoid": lambda call, given, out: _SIGMOID,
    **dict.fromkeys(("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze"), lambda call, given, out: _reshaped(given, out)),
    "contiguous": lambda call, given, out: _same(given),
    "dropout": _dropped,
    "max_pool2d": _max_call,
    "max_pool1d": _max_call,
    **dict.fromkeys(("mean", "permute", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_avg_pool1d"), _plain),
}
"""Functions and methods, by name. What each does is checked: the graph must answer what the model answers."""

ARITHMETIC = {"add": "add", "iadd": "add", "sub": "sub", "isub": "sub", "mul": "mul", "imul": "mul", "truediv": "div", "div": "div"}
