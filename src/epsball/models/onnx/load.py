"""ONNX files, read as data: nothing in them is run but the operators they name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from epsball.core import Access
from epsball.data.files import one_line, regular_file
from epsball.errors import BadInput
from epsball.models.onnx.interpreter import LIKE, Graph, Program
from epsball.models.onnx.node import TYPES, Node, Unsupported
from epsball.models.onnx.runtime import Scores, need

MOST_BYTES = 2**31
"""A file holds one protobuf message, which cannot be longer; weights beyond it lie in files beside it."""
OLDEST = 7
TOLERANCE = {torch.float16: 1e-2}


@dataclass(frozen=True)
class Loaded:
    """A file as a module, what may be seen of it, the batch size it is fixed to (None: any), and notes."""

    module: nn.Module
    access: Access
    fixed_batch: int | None
    notes: list[str]


def load_onnx(path: str | Path) -> Loaded:
    """An ``.onnx`` file with gradients where every operator is known, with scores alone where not.

    The interpreter's answers to random inputs are compared with onnxruntime's: they differ by at most 1e-4 of the largest (1e-2 in
    float16), or the runtime is used.

    Args:
        path: the file; external data must lie in its folder. One input, whose first axis is the batch; of several outputs the one
            named "logits" is taken, else the first of floating point.

    Raises:
        BadInput: a missing or damaged file, data outside the folder, no or several inputs, no scores, packages not installed.
    """
    found = regular_file(path, "model")
    need("onnxruntime")
    program, why, notes = _read(found)
    scores, graph = Scores(found, program), None
    tried = _try(scores, program)
    batch = program.shape[0] if program.shape else None
    if not isinstance(tried, str) and len(tried[0]) == 1:
        batch = 1
    notes.insert(0, f"{found.name} is an ONNX graph" + (f" for batches of exactly {batch}" if batch is not None else ""))
    why = why or (tried if isinstance(tried, str) else None)
    if why is None and not isinstance(tried, str):
        try:
            graph = Graph(program)
            why = _difference(graph, *tried)
        except Unsupported as exc:
            why = f"{exc} is not known to the interpreter"
    if graph is None or why is not None:
        return Loaded(scores, Access.SCORES, batch, [*notes, f"{why}: scores by onnxruntime only, no gradients"])
    return Loaded(graph, Access.GRADIENT, batch, [*notes, "its answers on random inputs agree with onnxruntime's"])


def _read(path: Path) -> tuple[Program, str | None, list[str]]:
    """The program of a file, why it has no gradients (None: it may have), and notes."""
    onnx = need("onnx")
    if path.stat().st_size > MOST_BYTES:
        raise BadInput(f"model: {str(path)!r} is longer than 2 GiB; export it with external data")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as exc:  # protobuf's own errors
        raise BadInput(f"model: {str(path)!r} is damaged or no ONNX file ({one_line(exc, 60)}); export it again") from exc
    for tensor in _tensors(model):
        _inside(tensor, path)
    (source, shape, kind), (output, notes) = _input(model.graph, path), _output(model.graph, path)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx", 1))
    nodes, constants, why = [], {}, None
    if opset < OLDEST:
        why = f"operator set {opset} is older than {OLDEST}"
    elif not kind.is_floating_point:
        why = f"the input is of type {str(kind).removeprefix('torch.')}"
    else:
        try:
            constants = {t.name: _tensor(onnx, t, path) for t in model.graph.initializer}
            nodes = list(_nodes(onnx, model.graph, opset, constants, kind, path))
        except Unsupported as exc:
            why = f"{exc} is not known to the interpreter"
    return Program(tuple(nodes), constants, source, shape, kind, output), why, notes


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor of a file: of its graph, of the graphs inside it and of its functions."""
    stack, nodes = [model.graph], [node for function in model.functions for node in function.node]
    while stack or nodes:
        for attribute in (a for node in nodes for a in node.attribute):
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            stack += [attribute.g] if attribute.HasField("g") else []
            stack += attribute.graphs
        nodes = []
        if stack:
            graph = stack.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes = list(graph.node)


def _inside(tensor: Any, path: Path) -> None:
    """`BadInput` where data of a tensor lies outside the folder of the model, or is longer than its file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if not entries:
        return
    folder, where = path.parent.resolve(), entries.get("location", "")
    try:
        target = (folder / where).resolve()
        start, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except (OSError, ValueError, RuntimeError) as exc:
        raise BadInput(f"model: {str(path)!r}: external data {where[:80]!r} cannot be read; export it again") from exc
    if not target.is_relative_to(folder):
        raise BadInput(f"model: {str(path)!r}: external data {where[:80]!r} leaves the folder of the model; put it beside the model")
    if start < 0 or length < 0 or start + length > regular_file(target, "model").stat().st_size:
        raise BadInput(f"model: {str(path)!r}: external data {where[:80]!r} is shorter than the model says; export it again")


def _input(graph: Any, path: Path) -> tuple[str, tuple[int | None, ...] | None, torch.dtype]:
    given = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in given]
    if len(inputs) != 1:
        raise BadInput(f"model: {str(path)!r} does not take one batch of inputs (it has {len(inputs)}); export a model of one tensor")
    kind = inputs[0].type.tensor_type
    if kind.elem_type not in TYPES:
        raise BadInput(f"model: {str(path)!r} takes element type {kind.elem_type}; export it with float32 input")
    if not kind.HasField("shape"):
        return inputs[0].name, None, TYPES[kind.elem_type]
    shape = tuple(axis.dim_value if axis.dim_value > 0 else None for axis in kind.shape.dim)
    return inputs[0].name, shape, TYPES[kind.elem_type]


def _output(graph: Any, path: Path) -> tuple[str, list[str]]:
    kinds = {value.name: TYPES.get(value.type.tensor_type.elem_type) for value in graph.output}
    names = [name for name, kind in kinds.items() if kind is not None and kind.is_floating_point]
    if not names:
        raise BadInput(f"model: {str(path)!r} has no output of scores ({', '.join(kinds)[:80]}); export the logits as a float tensor")
    chosen = "logits" if "logits" in names else names[0]
    return chosen, [f"of the outputs {', '.join(kinds)} the scores are {chosen}"] if len(kinds) > 1 else []


def _tensor(onnx: Any, tensor: Any, path: Path) -> Tensor:
    if tensor.data_type not in TYPES:
        raise Unsupported(f"element type {onnx.TensorProto.DataType.Name(tensor.data_type)} of {tensor.name!r}")
    try:
        return torch.from_numpy(np.array(onnx.numpy_helper.to_array(tensor, base_dir=str(path.parent))))
    except Exception as exc:
        raise BadInput(f"model: {str(path)!r}: tensor {tensor.name!r} is damaged ({one_line(exc, 60)}); export it again") from exc


def _nodes(onnx: Any, graph: Any, opset: int, constants: dict[str, Tensor], kind: torch.dtype, path: Path) -> Iterator[Node]:
    """The nodes in plain values; Constant nodes go into `constants`."""
    for node in graph.node:
        name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        attributes = {a.name: _attribute(onnx, a, path) for a in node.attribute}
        inputs, outputs = tuple(node.input), tuple(node.output)
        if name == "Constant":
            constants[outputs[0]] = _constant(attributes)
            continue
        if name == "Cast" and TYPES.get(attributes.get("to", 0)) is kind:
            name, inputs = "CastLike", (*inputs, LIKE)  # follows the module to other types
        yield Node(name, inputs, outputs, attributes, opset)


def _constant(attributes: dict[str, Any]) -> Tensor:
    key, value = next(iter(attributes.items()), ("", None))
    if value is None or isinstance(value, str):
        raise Unsupported("a Constant that is no number")
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64 if "int" in key else torch.float32)


def _attribute(onnx: Any, attribute: Any, path: Path) -> Any:
    kinds = onnx.AttributeProto
    if attribute.type in (kinds.FLOAT, kinds.INT, kinds.FLOATS, kinds.INTS):
        value = onnx.helper.get_attribute_value(attribute)
        return value if attribute.type in (kinds.FLOAT, kinds.INT) else list(value)
    if attribute.type == kinds.STRING:
        return attribute.s.decode("utf-8", "replace")
    return _tensor(onnx, attribute.t, path) if attribute.type == kinds.TENSOR else None


def _try(scores: Scores, program: Program) -> tuple[Tensor, Tensor] | str:
    """Random inputs and onnxruntime's answers, for the first number of rows that the file takes; why not, if it takes none.

    Some exporters write a batch of any length and yet fix shapes inside to the one row that they were shown.
    """
    shape, why = program.shape or (None, None), ""
    for rows in (shape[0],) if shape and shape[0] else (3, 1):
        lengths = [rows, *(n or (3 if i == 0 else 32) for i, n in enumerate(shape[1:]))]
        if prod(lengths) > 2**28:
            return f"inputs of shape {tuple(lengths)} are too large to try"
        x = torch.from_numpy(np.random.default_rng(0).random(lengths)).to(program.dtype)
        try:
            want = scores(x)
        except BadInput as exc:
            why = f"no random input could be tried ({one_line(exc, 100)})"
            continue
        if len(want) == len(x):
            return x, want
        why = f"random inputs {tuple(x.shape)} give {tuple(want.shape)}"
    return why


def _difference(graph: Graph, x: Tensor, want: Tensor) -> str | None:
    """Why the interpreter's answers cannot stand for onnxruntime's; None if they can."""
    try:
        with torch.no_grad():
            have = graph(x)
    except Unsupported:
        raise
    except Exception as exc:
        return f"the interpreter fails ({one_line(exc, 100)})"
    if have.shape != want.shape or not want.numel():
        return f"the interpreter gives shape {tuple(have.shape)}, onnxruntime {tuple(want.shape)}"
    gap = float((have - want).double().abs().max() / want.double().abs().max().clamp(min=1e-30))
    limit = TOLERANCE.get(x.dtype, 1e-4)
    return None if gap <= limit else f"the interpreter differs from onnxruntime by {gap:.1g} of the largest score"
