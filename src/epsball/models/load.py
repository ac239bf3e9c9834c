"""The door for models: a source on the command line in, an adapted module in eval mode out."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from epsball.core import Access
from epsball.data.files import one_line, regular_file
from epsball.data.pixels import check_box
from epsball.errors import BadInput
from epsball.models.adapt import Adapted, Outputs
from epsball.models.http import Endpoint, HttpModel, is_address
from epsball.models.sklearn import Estimator, is_estimator, load_estimator
from epsball.models.weights import TORCH_SUFFIXES, check_finite, load_weights

FORMS = "package.module:function, file.py:function, a .pt2, .onnx or .joblib file, http://HOST/v2/models/NAME or a builtin name"
WHOLE = (".pt2", ".onnx", ".joblib")
"""Files that carry their own weights."""


@dataclass(frozen=True)
class ModelSpec:
    """How a model was loaded, in plain values, so that it can be loaded again: ``load_model(**spec.to_dict())``.

    The fields are the arguments of `load_model`.
    """

    source: str
    weights: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    box: tuple[float, float] = (0.0, 1.0)
    outputs: Outputs = "logits"
    class_order: tuple[int, ...] | None = None
    trust_code: bool = False
    endpoint: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Only strings, numbers, lists, booleans and None."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @staticmethod
    def from_dict(values: dict[str, Any], *, trust_code: bool = False) -> ModelSpec:
        """The inverse of `to_dict`, except for trust and for tokens: a stored file cannot grant them, only the caller can.

        Raises:
            BadInput: unknown or missing fields, or values of the wrong type.
        """
        known = {f.name for f in fields(ModelSpec)}
        if not isinstance(values, dict) or "source" not in values or set(values) - known:
            raise BadInput(f"model spec: {one_line(ValueError(str(values)), 80)!r} is no model; its fields are {', '.join(sorted(known))}")
        plain = {**values, "trust_code": trust_code}
        for name in ("source", "weights", "outputs"):
            if not isinstance(plain.get(name, ""), str) and not (name == "weights" and plain[name] is None):
                raise BadInput(f"model spec: {name} is {plain[name]!r}, not text; give the text")
        for name, kind in (("mean", float), ("std", float), ("box", float), ("class_order", int)):
            if plain.get(name) is not None:
                plain[name] = _numbers(name, plain[name], kind)
        if plain.get("endpoint") is not None:
            plain["endpoint"] = Endpoint.of(plain["endpoint"]).stored()
        if "box" in plain:
            plain["box"] = check_box(plain["box"])
        return ModelSpec(**plain)


def _numbers(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(v, (int, kind)) and not isinstance(v, bool) for v in listed):
        raise BadInput(f"model spec: {name} is {value!r}, not a list of numbers; give the numbers")
    return tuple(kind(v) for v in listed)


def builtin_models() -> dict[str, Callable[[], nn.Module]]:
    """Builtin names and their factories; read only when a builtin name is asked for."""
    try:
        found: dict[str, Callable[[], nn.Module]] = importlib.import_module("epsball.models.digits").BUILTIN
    except ModuleNotFoundError as exc:
        if exc.name != "epsball.models.digits":
            raise
        return {}
    return found


@contextmanager
def _quiet_randomness() -> Iterator[None]:
    """Global generators seeded alike for every load, and put back afterwards: a factory cannot disturb the caller.

    Random initial weights are therefore the same each time that a model is loaded.
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            torch.default_generator.manual_seed(0)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


@contextmanager
def _import_path(folder: Path) -> Iterator[None]:
    """``folder`` first on ``sys.path``, for the length of an import and of the factory's own imports."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _import_file(path: Path) -> ModuleType:
    name = f"epsball_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _from_factory(place: str, function: str) -> tuple[Any, list[str]]:
    """Import ``place`` (a module name or a .py file) and call ``function`` in it without arguments."""
    is_file = place.endswith(".py")
    path = regular_file(place, "model").resolve() if is_file else None
    with _import_path(path.parent if path else Path.cwd()):
        importlib.invalidate_caches()
        try:
            found: Any = _import_file(path) if path else importlib.import_module(place)
        except (Exception, SystemExit) as exc:  # user code raises what it likes
            kind, text = type(exc).__name__, one_line(exc)
            raise BadInput(f"model: {place!r} cannot be imported ({kind}: {text}); check the name and the working folder") from exc
        for name in function.split("."):
            found = getattr(found, name, None)
        if found is None:
            raise BadInput(f"model: {place!r} has no {function!r}; name a function that returns the model")
        if isinstance(found, nn.Module) or is_estimator(found):
            return found, [f"the model is the object {function} of {place}"]
        if not callable(found):
            raise BadInput(f"model: {function!r} in {place!r} is {type(found).__name__}, not a function; name one that returns the model")
        try:
            made = found()
        except (Exception, SystemExit) as exc:
            kind, text = type(exc).__name__, one_line(exc)
            raise BadInput(f"model: {function}() in {place!r} raised {kind}: {text}; it is called without arguments") from exc
    if not callable(made) and not is_estimator(made):
        raise BadInput(f"model: {function}() in {place!r} returned {type(made).__name__}; return an nn.Module or a function of a batch")
    return made, [f"the model was made by {function}() of {place}"]


def _refuse(source: str) -> None:
    """Sources that look like something else than what is supported, each with its way out."""
    suffix = Path(source).suffix.lower()
    if "://" in source:
        raise BadInput(f"model: {source!r} is an address of another kind than http://HOST/v2/models/NAME; give one, or a file")
    if suffix == ".py":
        raise BadInput(f"model: {source!r} names no function; give {source}:FUNCTION, which returns the model")
    if suffix == ".safetensors" or suffix in TORCH_SUFFIXES:
        raise BadInput(f"model: {source!r} looks like weights; name a factory as the model and pass this file with --weights")


@dataclass(frozen=True)
class _Opened:
    """The bare model of a source, what may be seen of it, the batch size it is fixed to, and notes."""

    model: Any
    notes: list[str]
    fixed_batch: int | None = None
    access: Access = Access.GRADIENT


def _open_file(source: str, trust_code: bool) -> _Opened:
    """A whole model in a file; its readers are slow to import."""
    if source.lower().endswith(".pt2"):
        from epsball.models.program import load_program

        graph, batch, notes = load_program(source, trust_code)
        return _Opened(graph, notes, batch)
    if source.lower().endswith(".onnx"):
        from epsball.models.onnx import load_onnx

        file = load_onnx(source)
        return _Opened(file.module, file.notes, file.fixed_batch, file.access)
    estimator = Estimator(load_estimator(source, trust_code))
    return _Opened(estimator, [f"{Path(source).name} is a pickle that was trusted", *estimator.notes], access=estimator.access)


def _open(source: str, trust_code: bool, endpoint: Endpoint | Mapping[str, Any] | None) -> _Opened:
    if is_address(source):
        served = HttpModel(source, endpoint)
        return _Opened(served, served.notes(), access=served.access)
    if endpoint is not None:
        raise BadInput(f"endpoint: given, but {source!r} is no address; leave it out or give http://HOST/v2/models/NAME")
    if source.lower().endswith(WHOLE):
        return _open_file(source, trust_code)
    _refuse(source)
    place, _, function = source.rpartition(":")
    if place and function:
        made, notes = _from_factory(place, function)
        if is_estimator(made):
            estimator = Estimator(made)
            return _Opened(estimator, [*notes, *estimator.notes], access=estimator.access)
        if isinstance(made, HttpModel):
            return _Opened(made, [*notes, *made.notes()], access=made.access)
        return _Opened(made, notes)
    known = builtin_models()
    if source not in known:
        names = f" ({', '.join(sorted(known))})" if known else ""
        raise BadInput(f"model: {source!r} is unknown; give {FORMS}{names}")
    return _Opened(known[source](), [f"{source} is a builtin model"])


def load_model(
    source: str,
    weights: str | None = None,
    *,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    box: tuple[float, float] = (0.0, 1.0),
    outputs: Outputs = "logits",
    class_order: Sequence[int] | None = None,
    trust_code: bool = False,
    endpoint: Endpoint | Mapping[str, Any] | None = None,
) -> tuple[Adapted, list[str]]:
    """Load a model, adapt it, and say in sentences what was done.

    Args:
        source: ``package.module:function`` or ``file.py:function`` (called without arguments; the working folder or the file's
            own folder is importable meanwhile), a ``.pt2`` file of `torch.export`, an ``.onnx`` file, a ``.joblib`` file of a
            scikit-learn estimator (needs ``trust_code``), an address ``http://HOST/v2/models/NAME`` of a server that speaks the Open
            Inference Protocol v2, or a builtin name. A function may also return an estimator.
        weights: a ``.safetensors`` file or a torch checkpoint, loaded strictly; wrappers such as {"state_dict": ...} and
            prefixes such as ``module.`` are removed.
        mean, std, outputs, class_order: as in `Adapted`.
        box: the range of valid inputs, low < high; only checked here.
        trust_code: allow files that run code when loaded (pickles).
        endpoint: how an address is asked, an `Endpoint` or its options as a mapping; for addresses only.

    Returns:
        The model in eval mode, and notes. Global random generators are left as they were.

    Raises:
        BadInput: in one line, whatever cannot be used.
        Untrusted: a file that would run code.
    """
    check_box(box)
    if not isinstance(source, str) or not source:
        raise BadInput(f"model: {source!r} is no source; give {FORMS}")
    with _quiet_randomness():
        opened = _open(source, trust_code, endpoint)
        made, notes = opened.model, opened.notes
        adapted = Adapted(made, mean, std, outputs, class_order, opened.fixed_batch, opened.access)
        if weights is not None:
            if source.lower().endswith(WHOLE) or is_address(source):
                raise BadInput(f"weights: {weights!r} given, but {source!r} carries its own; leave --weights out")
            if not isinstance(made, nn.Module) or isinstance(made, Estimator):
                raise BadInput(f"weights: {weights!r} given, but {source!r} returns a plain function or an estimator; return an nn.Module")
            notes += load_weights(made, weights, trust_code)
    if weights is None:
        check_finite(chain(adapted.module.named_parameters(), adapted.module.named_buffers()), source)
        own = isinstance(made, nn.Module) and not isinstance(made, (Estimator, HttpModel))
        if own and ":" in source and not source.lower().endswith(WHOLE):
            notes.append("no weights file was given: the model has the weights that its function gave it")
    if adapted.normalizes:
        notes.append(f"inputs are normalized by mean {_show(adapted.mean)} and std {_show(adapted.std)} inside the model")
    if outputs == "probabilities":
        notes.append("the model returns probabilities; their logarithm is used as logits")
    if class_order is not None:
        notes.append("the model's columns were put into the data's class order")
    return adapted.eval(), notes


def _show(values: torch.Tensor) -> str:
    return ", ".join(f"{v:g}" for v in values.tolist()[:4]) + (", ..." if len(values) > 4 else "")
