"""An ONNX graph as a module of torch: the same scores, and gradients to the input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epsball.errors import BadInput
from epsball.models.onnx.node import Node, Unsupported
from epsball.models.onnx.operators import OPERATORS

LIKE = "like:input"
"""The name of a value of the input's own type, which follows the module to other types."""


@dataclass(frozen=True)
class Program:
    """What a file says, in plain values.

    nodes: in an order in which they can run. constants: initializers and the values of Constant nodes. source, shape, dtype: name,
    shape (None for an axis of any length) and type of the one input. output: name of the one value that is wanted.
    """

    nodes: tuple[Node, ...]
    constants: Mapping[str, Tensor]
    source: str
    shape: tuple[int | None, ...] | None
    dtype: torch.dtype
    output: str


def _needed(program: Program) -> list[Node]:
    """The nodes that the output depends on."""
    wanted, kept = {program.output}, []
    for node in reversed(program.nodes):
        if wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def _last_uses(nodes: Sequence[Node], keep: str) -> list[set[str]]:
    """The values that nobody reads any more after each node."""
    seen, dead = {keep, ""}, []
    for node in reversed(nodes):
        dead.append({*node.inputs, *node.outputs} - seen)
        seen |= dead[-1]
    return dead[::-1]


def _buffer_name(number: int, value: Tensor) -> str:
    # Attention masks may hold -inf, weights may not: who looks for values that are not finite tells them by the name.
    masks = value.is_floating_point() and bool(value.isneginf().any())
    return f"mask_{number}" if masks else f"value_{number}"


class Graph(nn.Module):
    """An ONNX graph in torch, differentiable; its constants are buffers, so that it moves between devices and types.

    Args:
        program: the graph.

    Raises:
        Unsupported: an operator that is not in `OPERATORS`; on a call, an option of one that is not known.

    Cost: one forward of the graph. Values are dropped after their last use.
    """

    like: Tensor

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.source, self.output, self.shape = program.source, program.output, program.shape
        self.nodes = _needed(program)
        unknown = sorted({node.kind for node in self.nodes} - set(OPERATORS))
        if unknown:
            raise Unsupported(f"operator {', '.join(unknown[:5])}")
        self.dead = _last_uses(self.nodes, self.output)
        self.register_buffer("like", torch.zeros((), dtype=program.dtype), persistent=False)
        self.places: dict[str, str] = {LIKE: "like"}
        used = {name for node in self.nodes for name in node.inputs} | {program.output}
        for number, (name, value) in enumerate((n, v) for n, v in program.constants.items() if n in used):
            self.places[name] = _buffer_name(number, value)
            self.register_buffer(self.places[name], value)

    def forward(self, x: Tensor) -> Tensor:
        """The wanted output for a batch."""
        self._check(x)
        values: dict[str, Tensor | None] = {self.source: x.to(self.like.dtype)}
        for node, dead in zip(self.nodes, self.dead, strict=True):
            made = OPERATORS[node.kind](node, *self._inputs(node, values))
            values.update(zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=False))
            for name in dead:
                values.pop(name, None)
        result = values.get(self.output)
        if result is None:
            raise Unsupported(f"a graph that does not compute its output {self.output!r}")
        return result

    def _inputs(self, node: Node, values: Mapping[str, Tensor | None]) -> Iterable[Tensor | None]:
        for name in node.inputs:
            if name and name not in values and name not in self.places:
                raise Unsupported(f"{node.kind} reading {name!r}, an output that is not computed")
            yield None if not name else values[name] if name in values else getattr(self, self.places[name])

    def _check(self, x: Tensor) -> None:
        if self.shape is None:
            return
        fits = x.ndim == len(self.shape) and all(want in (None, have) for want, have in zip(self.shape, x.shape, strict=True))
        if not fits:
            wants = ", ".join("any" if n is None else str(n) for n in self.shape)
            raise BadInput(f"model: input of shape {tuple(x.shape)}, but the ONNX file wants ({wants}); give data of that shape")
