"""One step of an ONNX graph in plain values, and what is said of a step that cannot be taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
}
"""The number of an element type in an ONNX file -> the type in torch."""


class Unsupported(Exception):
    """An operator, or an option of one, that the interpreter does not know; the text names it."""


@dataclass(frozen=True)
class Node:
    """One operator of the graph.

    kind: name of the operator, with its domain in front where that is not the standard one. inputs, outputs: names of values;
    an empty input is left out. attributes: numbers, texts, lists and tensors. opset: version of the operator set.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    opset: int

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or what stands in for it."""
        return self.attributes.get(name, default)

    def refuse(self, *names: str) -> None:
        """`Unsupported` where one of these attributes is set to anything but 0."""
        for name in names:
            if self.get(name, 0):
                raise Unsupported(f"{self.kind} with {name}={self.get(name)}")


def whole(values: Tensor) -> list[int]:
    """A tensor of whole numbers as a list."""
    return [int(v) for v in values.reshape(-1).tolist()]


def axes_of(node: Node, given: Tensor | None) -> list[int] | None:
    """Axes, an input in newer operator sets and an attribute in older ones."""
    return whole(given) if given is not None else node.get("axes")


def at_most(count: int, limit: int = 2**30) -> None:
    """A small file must not ask for a tensor that fills the memory; said so that who splits batches makes them smaller."""
    if count > limit:
        raise torch.OutOfMemoryError(f"out of memory: a tensor of {count} elements")
