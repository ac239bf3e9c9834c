"""The door: names, files and arrays in, a run folder and a report out. The command line and `epsball.audit` both enter here."""

from __future__ import annotations

import datetime
import platform
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epsball import __version__, report
from epsball.auditing.plan import EFFORTS, default_threats
from epsball.auditing.results import Report
from epsball.auditing.run import Plan, Progress, audit_subjects
from epsball.auditing.sheet import Subject
from epsball.auditing.verify import Line, check_model
from epsball.core import Victim
from epsball.data import Dataset, from_arrays, load_data
from epsball.errors import BadInput
from epsball.models import ModelSpec, load_adapted, normalization, wrap
from epsball.models.digits import NAMES as DIGITS
from epsball.store import evidence
from epsball.threats import parse_threat

Model = Victim | Callable[[Tensor], Any] | str
Data = Dataset | tuple[Any, Any] | str


@dataclass(frozen=True)
class Loaded:
    """A model with the words that load it again and what was done to it."""

    victim: Victim
    spec: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())


def open_model(model: Model, *, batch_size: int | None = None, device: str = "cpu", name: str | None = None, **options: Any) -> Loaded:
    """A victim from anything that can be one; `options` are those of `epsball.load_model` and need a source."""
    if isinstance(model, str):
        adapted, notes = load_adapted(model, **options)
        adapted = adapted.to(device)
        box = tuple(float(b) for b in options.get("box", (0.0, 1.0)))
        victim = wrap(adapted, box=(box[0], box[1]), batch_size=batch_size, name=name or _short(model))
        spec = ModelSpec.from_dict({"source": model, **{key: value for key, value in options.items() if value is not None}})
        return Loaded(victim, spec.to_dict(), tuple(f"{victim.name}: {note}" for note in notes))
    victim = model if isinstance(model, Victim) else wrap(model, batch_size=batch_size, name=name)
    if name:
        victim.name = name
    return Loaded(victim, {"source": f"python object {type(victim.model).__name__}"})


def _short(source: str) -> str:
    """A name that fits a table: the last part of a path, with its function."""
    return source.rsplit("/", 1)[-1]


def open_data(data: Data, *, n: int | None, seed: int, box: tuple[float, float]) -> Dataset:
    """A data set from a name, a path or a pair of arrays."""
    if isinstance(data, Dataset):
        return data
    if isinstance(data, str):
        return load_data(data, n=n, seed=seed, box=box)
    if not isinstance(data, tuple) or len(data) != 2:
        raise BadInput(f"data: {type(data).__name__}: give a pair (x, y), a name or a path")
    return from_arrays(data[0], data[1], n=n, seed=seed, box=box)


def open_run(out: str | Path | None) -> Path:
    """The folder of a new run, made and shown to be writable before anything is computed.

    Raises:
        BadInput: it cannot be made or written.
    """
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    folder = Path(out) if out is not None else Path("runs") / f"{now}-{secrets.token_hex(2)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(f"out '{folder}': cannot be written ({error.strerror}): choose another folder") from error
    return folder


def versions() -> dict[str, str]:
    """What a number depends on."""
    found = {"epsball": __version__, "python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in ("torch", "numpy", "scipy", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def audit(
    model: Model | Mapping[str, Model] | None = None,
    data: Data = "digits",
    threats: Sequence[str] | str | None = None,
    *,
    effort: str = "default",
    seed: int = 0,
    n: int | None = None,
    out: str | Path | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> Report:
    """How robust is it, really? Audits one or several models and writes report.json, report.html and the evidence.

    Args:
        model: a `Victim` from `wrap` or `load_model`, a module or function, a source as on the command line, or a mapping of
            names to any of these; None audits the two packaged digit classifiers.
        data: (x, y) arrays or tensors, a `Dataset`, a builtin name or a path.
        threats: as "linf:2/255,8/255" or "l2:0.5"; None takes the field's usual ones for the shape of the input.
        effort: fast, default or max. seed: of everything random. n: at most so many samples, spread over the classes.
        out: folder of the run; None makes a new one under runs/.
        batch_size: most rows per call. progress: who listens. command: recorded in the report.

    Returns:
        The report; `report.robust_accuracy["linf", 8/255]` has .value, .low, .high, .certified, .flags, .forwards and .backwards.

    Raises:
        BadInput: in one line, whatever cannot be used. KeyboardInterrupt: before anything was known; later, the report is
            returned with `partial` set.
    """
    if effort not in EFFORTS:
        raise BadInput(f"effort '{effort}': unknown: use one of {', '.join(EFFORTS)}")
    chosen: Mapping[str, Model] = dict.fromkeys(DIGITS, "") if model is None else model if isinstance(model, Mapping) else {"": model}
    loaded = [open_model(m or name, batch_size=batch_size, name=name or None) for name, m in chosen.items()]
    return audit_loaded(
        loaded, data, threats, effort=effort, seed=seed, n=n, out=out, batch_size=batch_size, progress=progress, command=command
    )


def audit_loaded(
    loaded: Sequence[Loaded],
    data: Data,
    threats: Sequence[str] | str | None,
    *,
    effort: str,
    seed: int,
    n: int | None,
    out: str | Path | None,
    batch_size: int | None,
    progress: Progress | None,
    command: str,
    dataset: Dataset | None = None,
) -> Report:
    """`audit` for models that are open already."""
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    box = _numbers(loaded[0].victim)
    dataset = dataset or open_data(data, n=n, seed=seed, box=box)
    texts = [threats] if isinstance(threats, str) else list(threats or default_threats(tuple(dataset.x.shape[1:]), box[1] - box[0]))
    plan = Plan(tuple(parse_threat(text) for text in texts), effort, seed)
    _distinct([spec.name for spec in plan.threats])
    folder = open_run(out)
    subjects = [_subject(one, dataset, batch_size) for one in loaded]
    settings = {"threats": " ".join(texts), "effort": effort, "seed": str(seed), "n": str(len(dataset.x)), "batch_size": str(batch_size)}
    header = {"seed": seed, "settings": settings, "versions": versions()}
    done = audit_subjects(subjects, plan, folder / evidence.NAME, header, progress)
    result = Report(
        models=done.models,
        seed=seed,
        effort=effort,
        versions=versions(),
        run=str(folder),
        command=command,
        settings=settings,
        started=started.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - clock,
        partial=done.partial,
        notes=[*dataset.notes, *(note for one in loaded for note in one.notes)],
    )
    report.write_json(result, folder / "report.json")
    report.write(result, folder / evidence.NAME, folder / "report.html")
    return result


def _numbers(victim: Victim) -> tuple[float, float]:
    low, high = (torch.as_tensor(bound) for bound in victim.box)
    return float(low.min()), float(high.max())


def _distinct(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BadInput(f"threat '{name}': given twice: put its radii into one, as {name}:0.1,0.2")
        seen.add(name)


def _subject(loaded: Loaded, data: Dataset, batch_size: int | None) -> Subject:
    victim = loaded.victim
    if victim.batch_size is None:
        # Enough to keep cores busy; memory running out halves it.
        victim.batch_size = batch_size or max(1, min(512, 2**25 // max(1, data.x[0].numel())))
    return Subject(
        victim=victim,
        x=data.x,
        y=data.y,
        index=data.indices,
        data=data.name,
        source=loaded.spec,
        class_names=data.class_names,
        normalization=normalization(victim, data.x.ndim),
        notes=loaded.notes,
    )


def verify(run: str | Path, models: Sequence[Model] | None = None) -> list[Line]:
    """Re-checks a run's claims from its evidence with freshly loaded models, in one forward pass.

    Args:
        run: the folder of a run. models: in the order of the report; None loads them the way the run did.

    Returns:
        One line per claim; `line.holds` says whether a fresh look agrees.

    Raises:
        BadInput: no evidence, or a model that has to be given because the run got it as a Python object.
    """
    folder = Path(run)
    arrays, header = evidence.read(folder / evidence.NAME)
    claimed = report.read_json(folder / "report.json")
    lines = []
    for number, settings in enumerate(header["models"]):
        victim = _again(settings, None if models is None else models[number])
        told = claimed.models[number]
        claims = {(r.threat, r.radius_text): r.robust_accuracy.count for r in told.results} | {("clean", ""): told.clean_accuracy.count}
        lines += check_model(number, arrays, header, victim, claims)
    return lines


def _again(settings: Mapping[str, Any], model: Model | None) -> Victim:
    if model is not None:
        return open_model(model, name=settings["name"]).victim
    spec = dict(settings["spec"])
    if str(spec.get("source", "python object")).startswith("python object"):
        raise BadInput(f"model '{settings['name']}': was a Python object: give it again, epsball.verify(run, [model]) or --model")
    options = {key: value for key, value in ModelSpec.from_dict(spec).to_dict().items() if key != "source"}
    return open_model(spec["source"], name=settings["name"], **options).victim
