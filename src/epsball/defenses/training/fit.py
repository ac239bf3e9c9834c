"""The one training loop: short, in one straight line, and the same bits again after a stop at any place.

Nothing random is remembered: the order of an epoch and the noise of a step come from (seed, epoch) and (seed, step).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epsball.core import Key
from epsball.core.attack import recipe
from epsball.defenses.training import checkpoint
from epsball.defenses.training.batch import Batch, Loss, generator
from epsball.defenses.training.course import Against, Course
from epsball.defenses.training.inner import still
from epsball.defenses.training.schedule import keep, warmed
from epsball.defenses.training.watch import Record, collapsed, measure
from epsball.errors import BadInput, EpsballError

Pair = tuple[Tensor, Tensor]
Progress = Callable[[int, int, Record | None], Any]
"""(step, steps, the epoch's record at its end): called after every step; may raise to stop, once the checkpoint is written."""
SAVE_EVERY = 60.0
"""Seconds between checkpoints within an epoch."""


@dataclass(frozen=True)
class Fitted:
    """A finished training.

    Attributes:
        model: the module that was given, in the modes it had, with the best weights. best: where they were found.
        history: one record per epoch. early: stopped before the last epoch.
    """

    model: nn.Module
    best: Record
    history: tuple[Record, ...]
    early: bool


@dataclass
class _Run:
    """What a checkpoint holds."""

    model: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    history: list[Record] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)


def fit(
    model: nn.Module,
    loss: Loss,
    data: Pair,
    held: Pair,
    against: Against,
    course: Course | None = None,
    seed: int = 0,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
    save_every: float = SAVE_EVERY,
) -> Fitted:
    """Trains a model, measures it after every epoch on held-out samples, and leaves it with its best weights.

    Args:
        model: (B, ...) in the box -> (B, C) logits; trained in place, on its device. loss: the method.
        data, held: (x, y) with y (N,) labels; disjoint. against: the adversary. course: how; `Course()` unless given.
        seed: of order and noise; the weights to start from are the model's own.
        folder: where checkpoint and log.jsonl go; a checkpoint of the same training that lies there is resumed, bit for bit.
        progress: called after every step. save_every: seconds between checkpoints within an epoch; one is written at its end anyway.

    Raises:
        BadInput: data that cannot be used, or a checkpoint of another training.
        EpsballError: the loss is no longer finite.

    Cost: that of the loss for every row of every epoch, and 12 forwards and 10 backwards for every held-out sample and epoch.
    """
    course = course or Course()
    per_epoch = _check(model, data, held, course)
    run = _start(model, course)
    name = _name(loss, data, against, course, seed, model)
    if folder is not None and (folder / checkpoint.NAME).exists():
        _resume(run, folder / checkpoint.NAME, name)
    key, steps, device = Key.of(seed).fold("training"), per_epoch * course.epochs, next(model.parameters()).device
    started = saved = time.perf_counter()
    early, order = _tired(run.history, course), None
    with _modes(model):
        while run.step < steps and not early:
            epoch, place = divmod(run.step, per_epoch)
            if order is None or place == 0:
                order = torch.randperm(len(data[0]), generator=generator(key.fold("order", epoch)))
            start = place // course.replays * course.batch
            rows = order[start : start + course.batch]
            with _layers_draw_from(key.fold("layers", run.step), device):
                _step(run, loss, data[0][rows].to(device), data[1][rows].to(device), against, course, key, run.step / steps)
            record = None
            if run.step % per_epoch == 0:
                record = _measure(run, held, against, course, seed, time.perf_counter() - started, per_epoch, steps)
                early = _tired(run.history, course)
            if folder is not None and (record is not None or time.perf_counter() - saved >= save_every):
                _save(run, folder, name)
                saved = time.perf_counter()
            try:
                if progress is not None:
                    progress(run.step, steps, record)
            except BaseException:  # between two steps everything fits together
                if folder is not None:
                    _save(run, folder, name)
                raise
    model.load_state_dict(run.best)
    return Fitted(model, next(r for r in reversed(run.history) if r.best), tuple(run.history), early)


def _check(model: nn.Module, data: Pair, held: Pair, course: Course) -> int:
    """One-line errors for what cannot be trained on; returns the steps of an epoch."""
    for name, (x, y) in (("data", data), ("held", held)):
        if len(x) == 0 or len(x) != len(y):
            raise BadInput(f"{name}: {len(x)} inputs and {len(y)} labels: give one label per input, and at least one")
        if y.ndim != 1 or y.is_floating_point():
            raise BadInput(f"{name}: labels {y.dtype} of shape {tuple(y.shape)}: training needs one class per input")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with still(model), torch.no_grad():
        output = model(data[0][:1].to(device))
    most = max(int(y.max()) for _, y in (data, held))
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] <= most:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise BadInput(f"model: gives {shape} for one input, labels go up to {most}: scores (B, C) for every class are needed")
    return max(1, len(data[0]) // course.batch) * course.replays


def _start(model: nn.Module, course: Course) -> _Run:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise BadInput("model: has no weights that can be trained: give an nn.Module with parameters that require gradients")
    average = copy.deepcopy(model) if course.average else model
    return _Run(model, average, course.optimizer(trained, course.rate, course.decay))


def _step(run: _Run, loss: Loss, x: Tensor, y: Tensor, against: Against, course: Course, key: Key, progress: float) -> None:
    """One step of the optimizer on one batch."""
    noise = generator(key.fold("noise", run.step))
    if course.augment is not None:
        x = course.augment(x, noise)
    threat, radius = against.threat.within(against.box), against.radius * warmed(progress, course.warmup)
    for group in run.optimizer.param_groups:
        group["lr"] = course.rate * course.schedule(progress)
    run.optimizer.zero_grad()
    for part, labels in zip(x.chunk(course.accumulate), y.chunk(course.accumulate), strict=True):
        radii = torch.full((len(part),), radius, dtype=torch.float64, device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=course.half):
            value, logs = loss(run.model, part, labels, Batch(threat, radii, noise, course.smoothing, run.memory))
        share = len(part) / len(x)
        (share * value).backward()  # type: ignore[no-untyped-call]
        for name, mean in {**logs, "loss": value.detach()}.items():
            run.sums[name] = run.sums.get(name, torch.zeros((), dtype=torch.float64)) + share * mean.double().cpu()
    if course.clip is not None:
        nn.utils.clip_grad_norm_(run.model.parameters(), course.clip)
    run.optimizer.step()
    run.step += 1
    if run.average is not run.model:
        _average(run.average, run.model, keep(course.average, run.step))


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, kept: float) -> None:
    """Weights and floating-point statistics drift toward the model's; counters are copied."""
    for mean, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(new, 1 - kept)
        else:
            mean.copy_(new)


def _measure(run: _Run, held: Pair, against: Against, course: Course, seed: int, seconds: float, per_epoch: int, steps: int) -> Record:
    """The epoch's record; keeps the weights if they are the best so far."""
    means = {name: float(total) / per_epoch for name, total in run.sums.items()}
    loss, run.sums = means.pop("loss"), {}
    if not math.isfinite(loss):
        raise EpsballError(f"loss: {loss} in the epoch that ended at step {run.step}: lower the rate, or set clip")
    clean, robust = measure(run.average, *held, against.threat, against.radius, against.box, seed)
    progress = (run.step - 1) / steps
    record = Record(
        epoch=run.step // per_epoch,
        step=run.step,
        seconds=seconds,
        loss=loss,
        means=means,
        clean=clean,
        robust=robust,
        rate=course.rate * course.schedule(progress),
        radius=against.radius * warmed(progress, course.warmup),
    )
    best = not run.history or course.merit(record) > max(course.merit(known) for known in run.history)
    record = replace(record, best=best, collapsed=collapsed(run.history, record))
    run.history.append(record)
    if best:
        run.best = {name: tensor.detach().clone() for name, tensor in run.average.state_dict().items()}
    return record


def _tired(history: list[Record], course: Course) -> bool:
    since = next((age for age, record in enumerate(reversed(history)) if record.best), 0)
    return course.patience is not None and since >= course.patience


@contextmanager
def _modes(model: nn.Module) -> Iterator[None]:
    """Training mode, and each module's own mode again afterwards; gradients left behind are removed."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in model.parameters():
            parameter.grad = None


@contextmanager
def _layers_draw_from(key: Key, device: torch.device) -> Iterator[None]:
    """Dropout and its kin draw from the key; the global generators are left as they were."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        seeded = generator(key)
        torch.set_rng_state(seeded.get_state())
        if on_cuda:
            torch.cuda.set_rng_state(torch.Generator(device).manual_seed(seeded.initial_seed()).get_state(), device)
        yield


def _name(loss: Loss, data: Pair, against: Against, course: Course, seed: int, model: nn.Module) -> str:
    """Two trainings of this name have the same steps."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in data:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    shapes = [tuple(p.shape) for p in model.parameters()]
    return f"{recipe(loss)} {recipe(course)} {recipe(against)} seed {seed} data {digest.hexdigest()} weights {shapes}"


def _save(run: _Run, folder: Path, name: str) -> None:
    parts = {
        "model": run.model.state_dict(),
        "average": run.average.state_dict() if run.average is not run.model else {},
        "optimizer": checkpoint.optimizer_tensors(run.optimizer),
        "memory": run.memory,
        "sums": run.sums,
        "best": run.best,
    }
    tensors = {entry: value for part, held in parts.items() for entry, value in checkpoint.prefixed(part, held).items()}
    plain = {"training": name, "step": run.step, "history": [record.to_dict() for record in run.history]}
    checkpoint.save(folder / checkpoint.NAME, tensors, plain)
    lines = "".join(json.dumps(record.to_dict()) + "\n" for record in run.history)
    checkpoint.write(folder / "log.jsonl", lines.encode())


def _resume(run: _Run, path: Path, name: str) -> None:
    tensors, plain = checkpoint.load(path)
    if plain.get("training") != name:
        raise BadInput(f"checkpoint '{path}': belongs to another training: give its options again, or choose another folder")
    run.model.load_state_dict(checkpoint.under(tensors, "model"))
    if run.average is not run.model:
        run.average.load_state_dict(checkpoint.under(tensors, "average"))
    checkpoint.restore_optimizer(run.optimizer, checkpoint.under(tensors, "optimizer"))
    device = next(run.model.parameters()).device
    run.memory.update({entry: value.to(device) for entry, value in checkpoint.under(tensors, "memory").items()})
    run.sums, run.best = checkpoint.under(tensors, "sums"), checkpoint.under(tensors, "best")
    run.step, run.history = plain["step"], [Record(**record) for record in plain["history"]]
