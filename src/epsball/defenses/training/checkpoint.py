"""One file that holds a training whole: tensors as safetensors, the rest as JSON in its header; written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epsball.defenses.training.team import like
from epsball.errors import BadInput

NAME = "checkpoint.safetensors"


def save(path: Path, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """A reader sees the old file or the whole new one.

    Raises:
        BadInput: the folder cannot be written.
    """
    from safetensors.torch import save as pack

    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}  # no two may share memory
    blob = pack(own, {"epsball": json.dumps(plain)})
    write(path, blob)


def write(path: Path, blob: bytes) -> None:
    """A file appears whole, or not at all.

    Raises:
        BadInput: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as stream:
            stream.write(blob)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"out '{path.parent}': cannot be written ({error.strerror or error}): choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` wrote.

    Raises:
        BadInput: damaged, or not written by `save`.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            plain: dict[str, Any] = json.loads((file.metadata() or {})["epsball"])
            return {name: file.get_tensor(name) for name in file.keys()}, plain  # noqa: SIM118  # no mapping
    except Exception as error:
        raise BadInput(f"checkpoint '{path}': unreadable ({type(error).__name__}): remove it to start anew") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`{place}.{name}` -> tensor, for every tensor that the optimizer keeps of every parameter."""
    state = optimizer.state_dict()["state"]
    return {f"{place}.{name}": value for place, kept in state.items() for name, value in kept.items() if isinstance(value, Tensor)}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, for an optimizer made alike."""
    state: dict[int, dict[str, Tensor]] = {}
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        place, _, entry = name.partition(".")
        state.setdefault(int(place), {})[entry] = like(value, owned[int(place)]) if value.shape == owned[int(place)].shape else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def under(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors whose names start with `part/`, without it."""
    return {name.removeprefix(f"{part}/"): value for name, value in tensors.items() if name.startswith(f"{part}/")}


def prefixed(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `under`."""
    return {f"{part}/{name}": value for name, value in tensors.items()}
