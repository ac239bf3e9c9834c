"""The one training loop: short, in one straight line, and the same bits again after a stop at any place.

Nothing random is remembered: the order of an epoch and the noise of a step come from (seed, epoch) and (seed, step). Several workers
(`torchrun`) share the rows of each batch; together they take the step that one process takes, to within rounding.
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
from epsball.defenses.training import checkpoint, team
from epsball.defenses.training.batch import Batch, Loss, Past, generator
from epsball.defenses.training.course import Against, Course
from epsball.defenses.training.inner import still
from epsball.defenses.training.schedule import keep, warmed
from epsball.defenses.training.team import Team
from epsball.defenses.training.watch import Record, collapsed, measure, proven
from epsball.errors import BadInput, EpsballError

Pair = tuple[Tensor, Tensor]
Progress = Callable[[int, int, Record | None], Any]
"""(step, steps, the epoch's record at its end): called after every step; may raise to stop, once the checkpoint is written."""
Prepare = Callable[[nn.Module], nn.Module]
"""Wraps a model for several workers: DDP, `fully_shard`."""
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
    """What a checkpoint holds; `moving` and `shown` are model and average as `prepare` made them: what is trained and measured."""

    model: nn.Module
    average: nn.Module
    moving: nn.Module
    shown: nn.Module
    optimizer: torch.optim.Optimizer
    past: Past
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
    prepare: Prepare | None = None,
) -> Fitted:
    """Trains a model, measures it after every epoch on held-out samples, and leaves it with its best weights.

    Args:
        model: (B, ...) in the box -> (B, C) logits; trained in place, on its device. loss: the method.
        data, held: (x, y) with y (N,) labels; disjoint. against: the adversary. course: how; `Course()` unless given.
        seed: of order and noise; the weights to start from are the model's own.
        folder: where checkpoint and log.jsonl go; a checkpoint of the same training that lies there is resumed, bit for bit.
        progress: called after every step. save_every: seconds between checkpoints within an epoch; one is written at its end anyway.
        prepare: wraps the model for several workers (DDP, `fully_shard`). None: gradients are averaged here, which suits every loss.

    In a process group every worker calls this with the same arguments and the same weights. It takes its own rows of each batch (of
    `course.batch` rows in all), so that the steps are those of one process to within rounding, whatever the number of workers, for
    losses that are means over samples. What looks across rows sees a worker's own: batch norm (whose running statistics are averaged),
    mixing partners, weight perturbation; dropout differs. Rank 0 writes and the folder is read by all; measuring is done by each.
    A model that is wrapped already is taken as it is; sharded weights cannot be copied, so it wants `average=0`.

    Raises:
        BadInput: data that cannot be used, or a checkpoint of another training.
        EpsballError: the loss is no longer finite.

    Cost: that of the loss for every row of every epoch, and 12 forwards and 10 backwards for every held-out sample and epoch.
    """
    course, workers = course or Course(), Team.here()
    workers.check(course.batch, course.accumulate)
    _check_data(data, held)
    name = "" if folder is None else _name(loss, data, against, course, seed, model)
    run = _start(model, course, prepare, len(data[0]))  # before any forward: sharded weights stay gathered behind one
    _check_output(run.moving, data, held)
    per_epoch = max(1, len(data[0]) // course.batch) * course.replays
    workers.wait()
    if folder is not None and (folder / checkpoint.NAME).exists():
        _resume(run, folder / checkpoint.NAME, name, workers)
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
            x, y, places = (part.to(device) for part in (data[0][rows], data[1][rows], rows))
            with _layers_draw_from(_own(key.fold("layers", run.step), workers), device):
                _step(run, loss, x, y, places, against, course, key, run.step / steps, workers)
            record = None
            if run.step % per_epoch == 0:
                record = _measure(run, held, against, course, seed, time.perf_counter() - started, per_epoch, steps, workers)
                early = _tired(run.history, course)
            if folder is not None and (record is not None or _agreed(time.perf_counter() - saved >= save_every, workers, device)):
                _save(run, folder, name, workers)
                saved = time.perf_counter()
            try:
                if progress is not None:
                    progress(run.step, steps, record)
            except BaseException:  # between two steps everything fits together; a worker alone cannot gather what the others hold
                if folder is not None and workers.size == 1:
                    _save(run, folder, name, workers)
                raise
    team.load(model, run.best)
    return Fitted(model, next(r for r in reversed(run.history) if r.best), tuple(run.history), early)


def _own(key: Key, workers: Team) -> Key:
    """Layers of several workers draw apart."""
    return key if workers.size == 1 else key.fold(workers.rank)


def _agreed(wish: bool, workers: Team, device: torch.device) -> bool:
    """What the leader wishes."""
    return wish if workers.size == 1 else bool(workers.told(torch.tensor(wish, dtype=torch.uint8, device=device)))


def _check_data(data: Pair, held: Pair) -> None:
    """One-line errors for what cannot be trained on."""
    for name, (x, y) in (("data", data), ("held", held)):
        if len(x) == 0 or len(x) != len(y):
            raise BadInput(f"{name}: {len(x)} inputs and {len(y)} labels: give one label per input, and at least one")
        if y.ndim != 1 or y.is_floating_point():
            raise BadInput(f"{name}: labels {y.dtype} of shape {tuple(y.shape)}: training needs one class per input")


def _check_output(model: nn.Module, data: Pair, held: Pair) -> None:
    """One-line errors for what cannot be trained."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with still(model), torch.no_grad():
        output = model(data[0][:1].to(device))
    most = max(int(y.max()) for _, y in (data, held))
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] <= most:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise BadInput(f"model: gives {shape} for one input, labels go up to {most}: scores (B, C) for every class are needed")


def _start(model: nn.Module, course: Course, prepare: Prepare | None, count: int) -> _Run:
    if not any(p.requires_grad for p in model.parameters()):
        raise BadInput("model: has no weights that can be trained: give an nn.Module with parameters that require gradients")
    if course.average and team.shared_out(model):
        raise BadInput(f"average: {course.average}: a model that is sharded already cannot be copied: set 0, or give `prepare` instead")
    average = copy.deepcopy(model) if course.average else model
    moving = model if prepare is None else prepare(model)
    shown = moving if average is model else average if prepare is None else prepare(average)
    trained = [p for p in model.parameters() if p.requires_grad]  # behind `prepare`, which may put others in their places
    return _Run(model, average, moving, shown, course.optimizer(trained, course.rate, course.decay), Past(count))


def _step(
    run: _Run, loss: Loss, x: Tensor, y: Tensor, places: Tensor, against: Against, course: Course, key: Key, progress: float, workers: Team
) -> None:
    """One step of the optimizer on one batch, of which each worker takes its rows."""
    noise = generator(key.fold("noise", run.step))
    if course.augment is not None:
        x = course.augment(x, noise)
    threat, grown = against.threat.within(against.box), warmed(progress, course.warmup)
    for group in run.optimizer.param_groups:
        group["lr"] = course.rate * course.schedule(progress)
    run.optimizer.zero_grad()
    for chunk in zip(*(whole.chunk(course.accumulate) for whole in (x, y, places)), strict=True):
        (part, labels, own), share = (workers.part(whole) for whole in chunk), len(chunk[0]) / len(x)
        radii = torch.full((len(part),), against.radius * grown, dtype=torch.float64, device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=course.half):
            batch = Batch(threat, radii, noise, course.smoothing, run.memory, grown, workers, own, run.past)
            value, logs = loss(run.moving, part, labels, batch)
        (share * value).backward()  # type: ignore[no-untyped-call]
        for name, mean in {**logs, "loss": value.detach()}.items():
            run.sums[name] = run.sums.get(name, torch.zeros((), dtype=torch.float64)) + share * mean.double().cpu()
    if not team.averages_itself(run.moving):
        workers.average_gradients(p for p in run.model.parameters() if p.requires_grad)
    if course.clip is not None:
        nn.utils.clip_grad_norm_(run.model.parameters(), course.clip)
    run.optimizer.step()
    workers.average_statistics(run.model)
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


def _measure(
    run: _Run, held: Pair, against: Against, course: Course, seed: int, seconds: float, per_epoch: int, steps: int, workers: Team
) -> Record:
    """The epoch's record; keeps the weights if they are the best so far."""
    device = next(run.model.parameters()).device
    means = {name: float(total) / per_epoch for name, total in _shared(run.sums, workers, device).items()}
    loss, run.sums = means.pop("loss"), {}
    if not math.isfinite(loss):
        raise EpsballError(f"loss: {loss} in the epoch that ended at step {run.step}: lower the rate, or set clip")
    shares = [*measure(run.shown, *held, against.threat, against.radius, against.box, seed)]
    if course.certify:
        shares.append(proven(run.shown, *held, against.threat, against.radius, against.box))
    clean, robust, *rest = workers.told(torch.tensor(shares, dtype=torch.float64, device=device)).tolist()
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
        certified=rest[0] if rest else None,
    )
    best = not run.history or course.merit(record) > max(course.merit(known) for known in run.history)
    record = replace(record, best=best, collapsed=collapsed(run.history, record))
    run.history.append(record)
    if best:
        run.best = {name: team.whole(tensor) for name, tensor in run.average.state_dict().items()}
    return record


def _shared(sums: dict[str, Tensor], workers: Team, device: torch.device) -> dict[str, Tensor]:
    """The workers' means."""
    return {name: workers.mean(total.to(device)).cpu() for name, total in sums.items()}


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


def _save(run: _Run, folder: Path, name: str, workers: Team) -> None:
    """All workers gather, the leader writes."""
    device = next(run.model.parameters()).device
    parts = {
        "model": run.model.state_dict(),
        "average": run.average.state_dict() if run.average is not run.model else {},
        "optimizer": checkpoint.optimizer_tensors(run.optimizer),
        "past": run.past.kept,
        "memory": {entry: workers.joined(value) for entry, value in run.memory.items()},
        "sums": _shared(run.sums, workers, device),
        "best": run.best,
    }
    tensors = {entry: team.whole(value) for part, held in parts.items() for entry, value in checkpoint.prefixed(part, held).items()}
    if not workers.leads:
        return
    plain = {"training": name, "step": run.step, "history": [record.to_dict() for record in run.history]}
    checkpoint.save(folder / checkpoint.NAME, tensors, plain)
    lines = "".join(json.dumps(record.to_dict()) + "\n" for record in run.history)
    checkpoint.write(folder / "log.jsonl", lines.encode())


def _resume(run: _Run, path: Path, name: str, workers: Team) -> None:
    tensors, plain = checkpoint.load(path)
    if plain.get("training") != name:
        raise BadInput(f"checkpoint '{path}': belongs to another training: give its options again, or choose another folder")
    team.load(run.model, checkpoint.under(tensors, "model"))
    if run.average is not run.model:
        team.load(run.average, checkpoint.under(tensors, "average"))
    checkpoint.restore_optimizer(run.optimizer, checkpoint.under(tensors, "optimizer"))
    device = next(run.model.parameters()).device
    run.memory.update({entry: workers.part(value).to(device) for entry, value in checkpoint.under(tensors, "memory").items()})
    run.past.kept.update({entry: value.to(device) for entry, value in checkpoint.under(tensors, "past").items()})
    run.sums, run.best = checkpoint.under(tensors, "sums"), checkpoint.under(tensors, "best")
    run.step, run.history = plain["step"], [Record(**record) for record in plain["history"]]
