"""The Open Inference Protocol v2 over HTTP: metadata, tensors as JSON, and the binary tensor extension."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsball.errors import BadInput
from epsball.models.http.faults import BROKEN, Fault

Array = NDArray[Any]
LENGTH = "inference-header-content-length"
"""Bytes of the JSON part of a body; raw tensors follow it."""
DIGITS = {"FP16": "%.5g", "FP32": "%.9g", "FP64": "%.17g"}
"""As many digits as bring every number back bit by bit; several times faster than json.dumps."""
TYPES = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"} | {
    f"{s}INT{n}": f"<{s.lower() or 'i'}{n // 8}" for s in ("", "U") for n in (8, 16, 32, 64)
}


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives.

    Attributes:
        source, kind, shape: name, type and shape with the batch first of the input; shape None where the server does not say.
        output: name of the output to read; None where the server does not say and nobody named one. labels: it holds one label a row.
        width: scores a row, None where not known. batch: the only batch size it takes, None for any.
    """

    source: str
    kind: str
    shape: tuple[int, ...] | None
    output: str | None
    labels: bool
    width: int | None

    @property
    def batch(self) -> int | None:
        """Rows of every request, where the model is fixed to a number."""
        return self.shape[0] if self.shape and self.shape[0] > 0 else None


def signature(metadata: Any, where: str, output: str | None, classes: int | None) -> Signature:
    """Reads what GET v2/models/NAME says.

    Args:
        metadata: the parsed JSON. where: the address, for messages. output, classes: as in `Endpoint`.

    Raises:
        BadInput: several inputs, an input or output that cannot be used.
    """
    inputs, outputs = (_tensors(metadata, part, where) for part in ("inputs", "outputs"))
    if len(inputs) > 1:
        raise BadInput(f"model: {where} takes {len(inputs)} inputs ({_names(inputs)}); serve a model of one batch of inputs")
    name, kind, shape = inputs[0] if inputs else ("input", "FP32", None)
    if kind not in TYPES:
        raise BadInput(f"model: {where} takes {kind}; serve it with numbers as input, such as FP32")
    if output is not None and outputs and output not in [found[0] for found in outputs]:
        raise BadInput(f"endpoint: output {output!r}: {where} gives {_names(outputs)}; name one of them")
    chosen = _choose(outputs, output, where) if outputs else (output, "FP32", None)
    labels = classes is not None
    if not labels and _single(chosen[1], chosen[2]):
        raise BadInput(f"model: {where} gives one label a row in {chosen[0]!r}; say how many classes there are, --endpoint classes=N")
    width = classes if labels else chosen[2][1] if chosen[2] and len(chosen[2]) > 1 and chosen[2][1] > 0 else None
    return Signature(name, kind, shape, chosen[0], labels, width)


Tensor = tuple[str, str, tuple[int, ...] | None]
"""Name, type and shape as metadata lists them."""


def _tensors(metadata: Any, part: str, where: str) -> list[Tensor]:
    try:
        listed = [(str(t["name"]), str(t["datatype"]), tuple(map(int, t.get("shape") or ())) or None) for t in metadata.get(part) or ()]
        words = [word for name, kind, _ in listed for word in (name, kind)]
        if not all(word.isprintable() and 0 < len(word) <= 200 for word in words):  # they go into messages and reports
            raise ValueError("names")
    except (TypeError, KeyError, ValueError, AttributeError) as exc:
        raise BadInput(f"model: {where} does not describe its {part}; it must speak the Open Inference Protocol v2") from exc
    return listed


def _names(tensors: Sequence[Tensor]) -> str:
    return ", ".join(name for name, _, _ in tensors)[:120]


def _choose(outputs: Sequence[Tensor], wanted: str | None, where: str) -> Tensor:
    """The output that was named, or "logits", or the first of floating point, or the first of numbers."""
    if wanted is not None:
        return next(found for found in outputs if found[0] == wanted)
    numbers = [found for found in outputs if found[1] in TYPES]
    if not numbers:
        raise BadInput(f"model: {where} gives {_names(outputs)}, none of them numbers; serve the scores as FP32")
    floats = [found for found in numbers if found[1].startswith("FP")]
    return next((found for found in floats if found[0] == "logits"), (floats or numbers)[0])


def _single(kind: str, shape: tuple[int, ...] | None) -> bool:
    return "INT" in kind and shape is not None and math.prod(shape[1:]) == 1


def encode(rows: Array, found: Signature, name: str, binary: bool) -> tuple[bytes, dict[str, str]]:
    """The body and headers of a question.

    Args:
        rows: (B, ...) in the type of the input. name: of the request, which the answer repeats. binary: tensors as raw bytes.
    """
    tensor: dict[str, Any] = {"name": found.source, "shape": list(rows.shape), "datatype": found.kind}
    question: dict[str, Any] = {"id": name}
    if found.output is not None:
        question["outputs"] = [{"name": found.output, "parameters": {"binary_data": True}} if binary else {"name": found.output}]
    if binary:
        raw = rows.tobytes()
        question["inputs"] = [tensor | {"parameters": {"binary_data_size": len(raw)}}]
        head = json.dumps(question).encode()
        return head + raw, {"content-type": "application/octet-stream", LENGTH: str(len(head))}
    numbers = ",".join([DIGITS.get(found.kind, "%d")] * rows.size) % tuple(rows.reshape(-1).tolist())
    text = f'{json.dumps(question)[:-1]}, "inputs": [{json.dumps(tensor)[:-1]}, "data": [{numbers}]}}]}}'
    return text.encode(), {"content-type": "application/json"}


def decode(body: bytes, headers: Mapping[str, str], found: Signature, rows: int, name: str) -> Array:
    """(rows, C) scores of an answer, float32 or float64; labels become one-hot rows.

    Raises:
        Fault: cut off, not JSON, another question's, the wrong number of rows or scores, no numbers, labels that cannot be.
    """
    try:
        head = int(headers.get(LENGTH, len(body)))
        answer, raw = json.loads(body[:head]), body[head:]
        if answer.get("id") not in (None, "", name):
            raise Fault(BROKEN, "the answer belongs to another question")
        values, kind = _values(answer["outputs"], raw, found.output)
    except Fault:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as exc:
        raise Fault(BROKEN, f"the answer is not what the protocol asks for ({type(exc).__name__})") from exc
    if values.ndim == 0 or len(values) != rows or values.size == 0 or values.size != rows * max(values.shape[1:], default=1):
        raise Fault(BROKEN, f"answers of shape {values.shape} for {rows} rows; one row of scores each is needed")
    scores = values.reshape(rows, -1)
    if found.labels:
        return _one_hot(scores, found.width or 0)
    if found.width is not None and scores.shape[1] != found.width:
        raise Fault(BROKEN, f"{scores.shape[1]} scores a row where {found.width} belong")
    if "INT" in kind and scores.shape[1] == 1:
        raise BadInput("endpoint: classes: the server gives one label a row; say how many classes there are, --endpoint classes=N")
    return scores.astype(np.float32 if kind in ("FP16", "FP32") else np.float64)


def _values(outputs: Sequence[Mapping[str, Any]], raw: bytes, wanted: str | None) -> tuple[Array, str]:
    """The wanted tensor of an answer and its type; raw tensors lie one after the other, in the order of the outputs."""
    start, blobs, tensors = 0, {}, {str(output["name"]): output for output in outputs}
    for name, output in tensors.items():
        size = (output.get("parameters") or {}).get("binary_data_size")
        if size is not None:
            blobs[name] = raw[start : start + int(size)]
            start += int(size)
    listed: list[Tensor] = [(name, str(output["datatype"]), None) for name, output in tensors.items()]
    name = _choose(listed, None, "the answer")[0] if wanted is None else wanted
    kind, shape = str(tensors[name]["datatype"]), tuple(int(n) for n in tensors[name]["shape"])
    if name in blobs:
        values: Array = np.frombuffer(blobs[name], TYPES[kind])
    else:
        values = np.array(tensors[name]["data"], dtype=np.float64)  # null becomes NaN
    return values.reshape(shape), kind


def _one_hot(labels: Array, classes: int) -> Array:
    if labels.shape[1] != 1 or not bool(np.isin(labels, np.arange(classes)).all()):
        raise Fault(BROKEN, f"answers {labels[:3].tolist()} are not one label below {classes} a row")
    hot: Array = (labels == np.arange(classes)).astype(np.float32)
    return hot
