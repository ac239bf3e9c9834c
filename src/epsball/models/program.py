"""torch.export programs: looked through before they are loaded, because loading one can run code.

``torch.export.load`` falls back to pickle for some members, evaluates shape expressions as Python and resolves the name of
any operation under ``torch``. So an untrusted program may hold only plain tensors, tensor operations and arithmetic. This is
a filter for what ordinary exports contain, no sandbox.
"""

from __future__ import annotations

import io
import json
import logging
import re
import types
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from epsball.data.files import one_line, open_zip, regular_file
from epsball.errors import BadInput, Untrusted

_OPERATION = re.compile(
    r"torch\.ops\.(aten|prims|higher_order\.(cond|wrap_with_set_grad_enabled|wrap_with_autocast)$)(\.(?!from_file|__)\w+){0,2}"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|torch\.sym_\w+|math\.(ceil|floor|trunc|sqrt)"
)
_SYMBOL = re.compile(r"Symbol\('[A-Za-z]\w*'(, \w+=(True|False))*\)")
_FUNCTIONS = {"FloorDiv", "ModularIndexing", "PythonMod", "Mod", "CleanDiv", "CeilDiv", "CeilToInt", "FloorToInt", "Max", "Min"}
_FUNCTIONS |= {"Add", "Mul", "Pow", "Integer", "Rational", "IntTrueDiv", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "True", "False"}
_ARITHMETIC = re.compile(r"[\w\s+\-*/%(),<>=!|&]*")


def _safe_expression(text: str) -> bool:
    """Whether a shape expression is arithmetic on symbols such as s77 and nothing else."""
    rest = _SYMBOL.sub("s0", text)
    words = re.findall(r"[A-Za-z_]\w*", rest)
    return _ARITHMETIC.fullmatch(rest) is not None and all(w in _FUNCTIONS or re.fullmatch(r"[a-z]+\d+", w) for w in words)


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    stack = [value]
    while stack:
        found = stack.pop()
        if isinstance(found, dict):
            yield from found.items()
            stack += found.values()
        elif isinstance(found, list):
            stack += found


def _suspicions(archive: zipfile.ZipFile) -> Iterator[str]:
    """Whatever in the archive could run code while it is loaded or called."""
    for name in archive.namelist():
        base = name.rpartition("/")[2]
        if base.endswith(".pt"):
            try:
                torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)
            except Exception:  # refused, for whatever reason
                yield f"the pickle {base!r}"
        elif base.startswith(("custom_obj", "opaque_obj")):
            yield f"the object {base!r}"
        elif base.endswith(".json"):
            yield from _json_suspicions(json.loads(archive.read(name)))


def _json_suspicions(content: Any) -> Iterator[str]:
    for key, value in _walk(content):
        if key == "target" and isinstance(value, str) and not _OPERATION.fullmatch(value):
            yield f"the operation {value[:60]!r}"
        elif key == "expr_str" and not _safe_expression(str(value)):
            yield f"the expression {str(value)[:60]!r}"
        elif key == "use_pickle" and value:
            yield "pickled tensors"
        elif key == "guards_code" and value:
            yield "guard code"
        elif key == "range_constraints" and isinstance(value, dict) and not all(_safe_expression(str(k)) for k in value):
            yield "range constraints that are no symbols"


def _look_through(path: Path) -> None:
    with open_zip(path, "model") as archive:
        try:
            found = next(_suspicions(archive), None)
        except (ValueError, RecursionError, OSError, RuntimeError, MemoryError, zlib.error, zipfile.BadZipFile) as exc:
            raise BadInput(f"model: {str(path)!r} is damaged ({one_line(exc, 60)}); export it again") from exc
    if found is not None:
        why = f"holds {found}, which can run code"
        raise Untrusted(f"model: {str(path)!r} {why}; pass --trust-code if you exported it yourself")


def _no_modes(self: nn.Module, mode: bool = True) -> nn.Module:
    # an exported graph is fixed: it has no train and eval behavior, and torch raises where both are asked for
    return self


def _fixed_batch(program: torch.export.ExportedProgram, path: Path) -> int | None:
    names = program.graph_signature.user_inputs
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    value = inputs[0].meta.get("val") if len(inputs) == 1 else None
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        raise BadInput(f"model: {str(path)!r} does not take one batch of inputs (it has {len(names)}); export a model of one tensor")
    batch = value.shape[0]
    return batch if isinstance(batch, int) else None


def _in_training(program: torch.export.ExportedProgram) -> bool:
    places = {"dropout.default": 2, "batch_norm.default": 5}
    for node in program.graph.nodes:
        at = places.get(str(node.target).removeprefix("aten."))
        if at is not None and len(node.args) > at and node.args[at] is True:
            return True
    return False


def load_program(path: str | Path, trust_code: bool = False) -> tuple[nn.Module, int | None, list[str]]:
    """A ``.pt2`` file as a module, the batch size it is fixed to (None: any), and notes.

    Raises:
        BadInput: a missing or damaged file, or a program that does not take exactly one batch.
        Untrusted: the file holds something that can run code, and ``trust_code`` is off.
    """
    found = regular_file(path, "model")
    if not trust_code:
        _look_through(found)
    log = logging.getLogger("torch.export")
    before = log.disabled
    log.disabled = True  # it prints a traceback where the one line below says it all
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(found)
            graph = program.module()
    except Exception as exc:  # the loader raises nearly anything on a damaged file
        raise BadInput(f"model: {str(found)!r} is no exported program ({one_line(exc, 100)}); write it with torch.export.save") from exc
    finally:
        log.disabled = before
    for part in graph.modules():
        part.train = part.eval = types.MethodType(_no_modes, part)  # type: ignore[method-assign]
    batch = _fixed_batch(program, found)
    notes = [f"{found.name} is an exported program" + (f" for batches of exactly {batch}" if batch is not None else "")]
    if _in_training(program):
        notes.append("the program was exported in training mode (dropout or batch norm is active); call model.eval() before exporting")
    return graph, batch, notes
