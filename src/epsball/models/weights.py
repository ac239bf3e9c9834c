"""Weights in: safetensors or torch checkpoints, unwrapped, checked, and loaded strictly. No pickle runs unless it is trusted."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epsball.data.files import one_line, open_zip, regular_file
from epsball.errors import BadInput, Untrusted

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar", ".th")
# the plain weights come before their averages
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights")
_AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema", "params_ema", "ema")
_PREFIXES = ("module.", "model.", "_orig_mod.")
State = dict[str, Tensor]


def untrusted(path: Path, why: str) -> Untrusted:
    """The one line for a file that would run code."""
    return Untrusted(f"weights: {str(path)!r} {why}; save a plain state dict or .safetensors, or pass --trust-code if the file is your own")


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, MemoryError) as exc:
        raise BadInput(f"weights: {str(path)!r} is not a valid safetensors file ({one_line(exc, 90)}); write it again") from exc


def _is_script(path: Path) -> bool:
    with open_zip(path, "weights") as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_checkpoint(path: Path, trust_code: bool) -> Any:
    """``torch.load``, weights only unless trusted; its messages of many lines are turned into one."""
    if tuple(int(v) for v in torch.__version__.split(".")[:2]) < (2, 6):
        raise BadInput(f"weights: torch {torch.__version__} runs code in weights_only files (CVE-2025-32434); install torch>=2.6")
    if path.stat().st_size == 0:
        raise BadInput(f"weights: {str(path)!r} is empty; write it again")
    if zipfile.is_zipfile(path) and _is_script(path):
        raise BadInput(f"weights: {str(path)!r} is a TorchScript program, not weights; save model.state_dict() instead")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=not trust_code)
    except pickle.UnpicklingError as exc:
        text = str(exc)
        if not trust_code and ("GLOBAL" in text or "Unsupported" in text or "globals" in text):
            raise untrusted(path, "holds a pickle that would run code when loaded") from exc
        raise BadInput(f"weights: {str(path)!r} is no torch checkpoint; write it again with torch.save(model.state_dict(), ...)") from exc
    except Exception as exc:  # a damaged file raises nearly anything: KeyError, EOFError, OSError, RuntimeError
        raise BadInput(f"weights: {str(path)!r} is damaged or no torch checkpoint ({one_line(exc, 60)}); write it again") from exc


def read_weights(path: str | Path, trust_code: bool = False) -> Any:
    """The content of a weights file: named tensors, or a checkpoint that wraps them.

    Raises:
        BadInput: a missing, damaged or unknown file.
        Untrusted: a pickle that would run code, unless ``trust_code``.
    """
    suffix = Path(path).suffix.lower()
    if suffix != ".safetensors" and suffix not in TORCH_SUFFIXES:
        raise BadInput(f"weights: {str(path)!r} has an unknown extension; give .safetensors or {', '.join(TORCH_SUFFIXES)}")
    found = regular_file(path, "weights")
    return _read_safetensors(found) if suffix == ".safetensors" else _read_checkpoint(found, trust_code)


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def unwrap(content: Any, path: str | Path, expected: Iterable[str]) -> tuple[State, list[str]]:
    """The named tensors inside a checkpoint, wrapper keys and common prefixes removed, with a note for each removal.

    Args:
        content: what the file held.
        path: for messages.
        expected: the model's own names; a prefix that they carry too is kept.
    """
    notes: list[str] = []
    if isinstance(content, nn.Module):  # only a trusted pickle can hold one
        content = content.state_dict()
        notes.append("the file holds a whole model; only its weights were taken")
    while isinstance(content, Mapping) and not _is_state(content):
        keys = [k for k in (*_WRAPPERS, *_AVERAGES) if isinstance(content.get(k), Mapping)]
        keys = keys or [k for k, v in content.items() if _is_state(v)]
        if not keys or (keys[0] not in (*_WRAPPERS, *_AVERAGES) and len(keys) > 1):
            break
        average = next((k for k in keys[1:] if k in _AVERAGES), None)
        passed = f", and the averaged ones under {average!r} were left aside" if average else ""
        notes.append(f"weights were taken from {str(keys[0])!r} in the checkpoint{passed}")
        content = content[keys[0]]
    if not _is_state(content):
        held = ", ".join(repr(str(k)) for k in list(content)[:6]) if isinstance(content, Mapping) else type(content).__name__
        raise BadInput(f"weights: {str(path)!r} holds no state dict (found {held or 'nothing'}); save model.state_dict()")
    state, prefix = _strip({str(k): v for k, v in content.items()}, set(expected))
    if prefix:
        notes.append(f"the prefix {prefix!r} was removed from the names of the weights")
    return state, notes


def _strip(state: State, expected: set[str]) -> tuple[State, str]:
    removed = ""
    while not expected & set(state):
        prefix = next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None)
        if prefix is None:
            break
        state = {k.removeprefix(prefix): v for k, v in state.items()}
        removed += prefix
    return state, removed


def _list(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(n) for n in names[:3]) + rest


def load_weights(module: nn.Module, path: str | Path, trust_code: bool = False) -> list[str]:
    """Read ``path`` and put its tensors into ``module``, strictly: every name and shape must fit. Returns notes.

    Raises:
        BadInput: missing or unexpected names, wrong shapes or types, NaN or infinite values, an unreadable file.
        Untrusted: as in `read_weights`.
    """
    own = module.state_dict()
    state, notes = unwrap(read_weights(path, trust_code), path, own)
    check_finite(state.items(), str(path))
    wrong = [k for k in state if k in own and _misfit(own[k], state[k])]
    if wrong:
        k = wrong[0]
        had, want = (f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (state[k], own[k]))
        raise BadInput(f"weights: {_list(wrong)} in {str(path)!r} do not fit: {had} where the model has {want}; use the matching factory")
    try:
        result = module.load_state_dict(state, strict=False)
    except Exception as exc:  # a model's own loading hook can raise anything
        raise BadInput(f"weights: {str(path)!r} does not fit the model ({one_line(exc)}); use the matching factory") from exc
    faults = [f"{what} {_list(keys)}" for what, keys in (("missing", result.missing_keys), ("unexpected", result.unexpected_keys)) if keys]
    if faults:
        raise BadInput(f"weights: {str(path)!r} does not fit the model: {'; '.join(faults)}; use the factory that the weights came from")
    return [f"{len(state)} tensors were loaded from {Path(path).name}, every name and shape fits", *notes]


def _misfit(own: Any, new: Tensor) -> bool:
    if not isinstance(own, Tensor):
        return True
    if torch.nn.parameter.is_lazy(own):  # takes its shape from the weights
        return False
    return own.shape != new.shape or own.is_floating_point() != new.is_floating_point() or own.is_complex() != new.is_complex()


def check_finite(tensors: Iterable[tuple[str, Any]], where: str) -> None:
    """`BadInput` naming the first tensor that holds NaN or an infinity; attention masks of -inf are let through."""
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor) or torch.nn.parameter.is_lazy(tensor) or not tensor.is_floating_point():
            continue
        values = tensor.detach()
        bad = ~values.isfinite()
        if "mask" in name:
            bad &= ~values.isneginf()
        if count := int(bad.sum()):
            raise BadInput(f"weights: tensor {name!r} of {where!r} has {count} NaN or infinite values; train or export the model again")
