"""The door: names, files and arrays in, a run folder and a report out. The command line and `epsball.audit` both enter here."""

from __future__ import annotations

import copy
import datetime
import platform
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epsball import __version__, report
from epsball.auditing.plan import EFFORTS, default_threats
from epsball.auditing.results import Report
from epsball.auditing.run import Plan, Progress, audit_subjects
from epsball.auditing.sheet import Subject
from epsball.auditing.stopping import Limits
from epsball.auditing.union import unions
from epsball.auditing.verify import Line, check_model
from epsball.certify.bracket import METHODS
from epsball.core import Victim
from epsball.data import Dataset, from_arrays, load_data
from epsball.data.sample import subset
from epsball.errors import BadInput
from epsball.models import ModelSpec, load_adapted, normalization, told, wrap
from epsball.models.digits import NAMES as DIGITS
from epsball.models.http import Address, is_address
from epsball.models.weights import check_finite
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
    """A victim from anything that can be one; `options` are those of `epsball.load_model` and need a source.

    A victim that is given is copied, so that the run's batch size and name stay with the run.

    Raises:
        BadInput: a batch size below 1, weights that are not finite, whatever cannot be a model.
    """
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise BadInput(f"batch_size: {batch_size!r}: must be None or a whole number above 0")
    if isinstance(model, str):
        adapted, notes = load_adapted(model, **options)
        adapted = adapted.to(device)
        box = tuple(float(b) for b in options.get("box", (0.0, 1.0)))
        victim = wrap(adapted, box=(box[0], box[1]), batch_size=batch_size, name=name or _short(model))
        spec = ModelSpec.from_dict({"source": model, **{key: value for key, value in options.items() if value is not None}})
        return Loaded(victim, spec.to_dict(), tuple(f"{victim.name}: {note}" for note in notes))
    victim = copy.copy(model) if isinstance(model, Victim) else wrap(model, box=options.get("box", (0.0, 1.0)))
    victim.name = name or victim.name
    victim.batch_size = victim.fixed_batch or batch_size or victim.batch_size
    if isinstance(victim.model, nn.Module):
        check_finite([*victim.model.named_parameters(), *victim.model.named_buffers()], victim.name)
    return Loaded(victim, victim.source or {"source": f"python object {victim.name}"})


def _short(source: str) -> str:
    """A name that fits a table: the last part of a path, with its function; the model's own name behind an address."""
    return Address.parse(source).name if is_address(source) else source.rsplit("/", 1)[-1]


def open_data(data: Data, *, n: int | None, seed: int, box: tuple[float, float]) -> Dataset:
    """A data set from a name, a path or a pair of arrays; `n` samples of it, chosen by `seed`."""
    if isinstance(data, Dataset):
        if n is None or n >= len(data.x):
            return data
        rows = torch.from_numpy(subset(data.y.numpy(), n, seed))
        note = f"{n} of {len(data.x)} samples, chosen by seed {seed}"
        return replace(data, x=data.x[rows], y=data.y[rows], indices=data.indices[rows], notes=(*data.notes, note))
    if isinstance(data, str):
        return load_data(data, n=n, seed=seed, box=box)
    if not isinstance(data, tuple) or len(data) != 2:
        raise BadInput(f"data: {type(data).__name__}: give a pair (x, y), a name or a path")
    return from_arrays(data[0], data[1], n=n, seed=seed, box=box)


@contextmanager
def open_run(out: str | Path | None) -> Iterator[Path]:
    """The folder of a new run, made and shown to be writable before anything is computed.

    Where the run fails, folders that were made for it and are still empty go away again.

    Raises:
        BadInput: it cannot be made or written.
    """
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    folder = Path(out) if out is not None else Path("runs") / f"{now}-{secrets.token_hex(2)}"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        _remove_empty(made)
        said = getattr(error, "strerror", None) or error
        raise BadInput(f"out '{folder}': cannot be written ({said}): choose another folder") from error
    try:
        yield folder
    except BaseException:
        _remove_empty(made)
        raise


def _remove_empty(folders: Iterable[Path]) -> None:
    """Innermost first; stops at the first that holds anything."""
    for folder in folders:
        try:
            folder.rmdir()
        except (OSError, ValueError):
            return


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
    drop: bool = True,
    max_queries: int | None = None,
    certify: str | None = None,
    max_seconds: float | None = None,
    max_forwards: int | None = None,
    until_width: float | None = None,
    fail_under: float | None = None,
    union: bool = False,
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
        batch_size: most rows per call. drop: stop working on a sample once it is broken; no verdict depends on it.
        max_queries: for models without gradients, most rows per sample and radius that the search asks; None leaves that to the
            effort: 300, 2,000 or 10,000.
        certify: interval, crown or best (`epsball.certify`): proves a lower bound beside the attacks, under norms; None does not.
        max_seconds, max_forwards: budgets, of time and of rows that attacks send forward; what has run then counts, and is still an
            upper bound. Cheap attacks run at every radius before dear ones.
        until_width: a fraction: audits samples in random order, in growing blocks, until every interval is at most that wide; 0.02 is
            2 points. fail_under: a percentage that every robust accuracy has to reach: ends as soon as one surely does not.
        union: asks for the robust accuracy under all threats at once, too, from the attacks that run anyway.
        progress: who listens. command: recorded in the report.

    Returns:
        The report; `report.robust_accuracy["linf", 8/255]` has .value, .low, .high, .certified, .flags, .forwards and .backwards.

    Raises:
        BadInput: in one line, whatever cannot be used. KeyboardInterrupt: before anything was known; later, the report is
            returned with `partial` set.
    """
    if effort not in EFFORTS:
        raise BadInput(f"effort '{effort}': unknown: use one of {', '.join(EFFORTS)}")
    chosen: Mapping[str, Model] = dict.fromkeys(DIGITS, "") if model is None else model if isinstance(model, Mapping) else {"": model}
    if not chosen:
        raise BadInput("model: an empty mapping: give at least one model")
    limits = Limits(max_seconds, max_forwards, until_width, None if fail_under is None else fail_under / 100)
    with torch.inference_mode(False):  # a caller in inference mode would leave attacks without gradients
        loaded = [open_model(m or name, batch_size=batch_size, name=name or None) for name, m in chosen.items()]
        dataset = open_data(data, n=n, seed=seed, box=_numbers(loaded[0].victim))
        return audit_loaded(
            loaded,
            dataset,
            threats,
            effort=effort,
            seed=seed,
            out=out,
            batch_size=batch_size,
            drop=drop,
            max_queries=max_queries,
            certify=certify,
            limits=limits,
            union=union,
            progress=progress,
            command=command,
        )


def audit_loaded(
    loaded: Sequence[Loaded],
    dataset: Dataset,
    threats: Sequence[str] | str | None,
    *,
    effort: str,
    seed: int,
    out: str | Path | None,
    batch_size: int | None,
    progress: Progress | None,
    command: str,
    drop: bool = True,
    max_queries: int | None = None,
    certify: str | None = None,
    limits: Limits | None = None,
    union: bool = False,
) -> Report:
    """`audit` for models and data that are open already."""
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    texts = _texts(threats, dataset, _numbers(loaded[0].victim))
    if max_queries is not None and (not isinstance(max_queries, int) or max_queries < 1):
        raise BadInput(f"max_queries: {max_queries!r}: must be None or a whole number above 0")
    method = next((known for known in METHODS if known == certify), None)
    if method is None and certify is not None:
        raise BadInput(f"certify: '{certify}': unknown: use one of {', '.join(METHODS)}")
    limits = limits or Limits()
    plan = Plan(tuple(parse_threat(text) for text in texts), effort, seed, drop, max_queries, method, limits, union)
    _distinct([spec.name for spec in plan.threats])
    if union:
        unions(plan.threats)
    subjects = [_subject(one, dataset, batch_size) for one in loaded]
    asked = {"max_queries": max_queries, "certify": certify, **limits.asked, "union": True if union else None}
    settings = {"threats": " ".join(texts), "effort": effort, "seed": str(seed), "n": str(len(dataset.x)), "batch_size": str(batch_size)}
    settings |= {name: str(value) for name, value in asked.items() if value is not None}
    header = {"seed": seed, "settings": settings, "versions": versions()}
    with open_run(out) as folder:
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
            canaries=done.canaries,
            partial=done.partial,
            notes=[*dataset.notes, *(note for one in loaded for note in (*one.notes, *told(one.victim)))],
        )
        report.write_json(result, folder / "report.json")
        report.write(result, folder / evidence.NAME, folder / "report.html")
    return result


def _numbers(victim: Victim) -> tuple[float, float]:
    low, high = (torch.as_tensor(bound) for bound in victim.box)
    return float(low.min()), float(high.max())


def _texts(threats: Sequence[str] | str | None, data: Dataset, box: tuple[float, float]) -> list[str]:
    """Threat strings as given, or the usual ones."""
    if isinstance(threats, str):
        return [threats]
    texts = list(threats or default_threats(tuple(data.x.shape[1:]), box[1] - box[0]))
    for text in texts:
        if not isinstance(text, str):
            raise BadInput(f"threats: {text!r} is no threat string: write it as 'linf:8/255,0.1'")
    return texts


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
        population=data.total if data.total >= len(data.x) else None,
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
    stored = header.get("models", []) if isinstance(header, dict) else []
    if len(stored) != len(claimed.models):
        raise BadInput(f"run '{folder}': {len(claimed.models)} models in report.json, {len(stored)} in the evidence: not of one run")
    if models is not None and len(models) != len(stored):
        raise BadInput(f"model: {len(models)} given, the run has {len(stored)}: give each one once, in the order of the report")
    lines = []
    for number, (settings, claim) in enumerate(zip(stored, claimed.models, strict=True)):
        with torch.inference_mode(False):
            victim = _again(settings, None if models is None else models[number])
            lines += check_model(number, arrays, settings, victim, claim)
    return lines


def _again(settings: Mapping[str, Any], model: Model | None) -> Victim:
    """The model of a run: as the run loaded it, or `model`, read with the run's own options."""
    spec = dict(settings["spec"])
    options: dict[str, Any] = {"box": tuple(settings["box"])}
    if not str(spec.get("source", "python object")).startswith("python object"):
        options = {key: value for key, value in ModelSpec.from_dict(spec).to_dict().items() if key != "source"}
        model = spec["source"] if model is None else model
        if not (isinstance(model, str) and is_address(model)):
            del options["endpoint"]
    if model is None:
        raise BadInput(f"model '{settings['name']}': was a Python object: give it again, epsball.verify(run, [model]) or --model")
    return open_model(model, name=settings["name"], **options).victim
