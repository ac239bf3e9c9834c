"""One file that holds what a verdict rests on: inputs, labels, adversarial inputs and settings. Bytes and dictionaries only.

Tensors, for model number i (all little-endian safetensors, readable from any language):

- `m{i}/x` (N, ...): clean inputs, uint8 where they are exactly k/255, else float32; `m{i}/y` (N,) or (N, C) int64 labels.
- `m{i}/index` (N,) int64: position in the data source; `m{i}/correct` (N,) bool: right and finite on the clean input.
- `m{i}/{threat}/rows` (K,) int64: rows of x that were broken; `x_adv` (K, ...) float32: how; `radius` (K,) float64: the
  smallest audited radius at which it was; `size` (K,) float64; `predicted` (K,) int64: the class answered.
- `m{i}/{threat}/z` (K, ...) float32, only where x_adv is not the adversary's own variable: x_adv = threat(x, z) up to 1e-6 of the
  box, and `size` is that of z. For `flow` z is (K, 2, H, W), pixels down and right; for `color` and `color-luv` (K, 3, R1, R2, R3),
  displacements on a grid over the color cube, for gray images (K, 1, R1); for `rigid` (K, 3), degrees, pixels down, pixels right;
  for compositions such as `color+linf` (K, D), the flattened variables of the parts side by side, additive parts as changes.
- `m{i}/{threat}/invalid` (N,) float64: the smallest audited radius at which the search met a NaN or infinite answer,
  infinite where it met none. Such samples are not counted as robust.

The header field `epsball` is a JSON object with the settings of the run. Each of its `models` has `rounds`, whose `threat` and
`text` together are the threat strings that were audited: they say what a composition's parts were allowed.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from epsball.errors import BadInput

Arrays = dict[str, np.ndarray[Any, Any]]
NAME = "evidence.safetensors"


def compact(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint8 where that loses not one bit of the float32 input, else float32."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bytes_ = np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
    return bytes_ if np.array_equal(expand(bytes_), x) else x


def expand(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Inverse of `compact`: float32 inputs."""
    return x.astype(np.float32) / np.float32(255) if x.dtype == np.uint8 else x


def write(path: Path, arrays: Arrays, header: dict[str, Any]) -> None:
    """Writes the whole file or nothing: to a temporary name, flushed to disk, then renamed."""
    from safetensors.numpy import save

    blob = save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, {"epsball": json.dumps(header, sort_keys=True)})
    atomic(path, blob)


def atomic(path: Path, blob: bytes) -> None:
    """Replaces `path` by `blob` in one step that a crash cannot halve."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    except OSError as error:
        raise BadInput(f"file '{path}': cannot be written ({error.strerror}): choose another folder") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:  # a full disk
        Path(name).unlink(missing_ok=True)
        raise BadInput(f"file '{path}': cannot be written ({error.strerror}): make room or choose another folder") from error
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def header(path: Path) -> dict[str, Any]:
    """The settings alone, without reading any array.

    Raises:
        BadInput: as `read`.
    """
    return _open(path, arrays=False)[1]


def read(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """(arrays, header); a damaged or foreign file is one line.

    Raises:
        BadInput: no such file, cut short, or not written by epsball.
    """
    return _open(path, arrays=True)


def _open(path: Path, *, arrays: bool) -> tuple[Arrays, dict[str, Any]]:
    from safetensors import safe_open

    if not path.is_file():
        raise BadInput(f"evidence '{path}': not found: give the folder of a finished run")
    try:
        with safe_open(path, framework="numpy") as file:
            settings: dict[str, Any] = json.loads((file.metadata() or {})["epsball"])
            names = file.keys() if arrays else []
            return {name: file.get_tensor(name) for name in names}, settings
    except Exception as error:
        raise BadInput(f"evidence '{path}': unreadable ({type(error).__name__}): run the audit again") from error
