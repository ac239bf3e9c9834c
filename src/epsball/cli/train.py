"""`epsball train`: makes a model robust, keeps all that is needed to go on after a stop, and says how to audit it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from epsball.data import Dataset
    from epsball.defenses.training import Against, Course, Fitted, Loss, Method, Record
    from epsball.defenses.training.team import Team

EXAMPLES = (
    "Examples: epsball train | epsball train --method trades --set beta=4 --data mnist.npz --threat linf:0.3 --epochs 15 --out runs/trades "
    "| epsball train net.py:make --data mnist.npz --threat l2:2 --optimizer sgd --lr 0.1 | epsball train --method ibp --threat linf:0.1 "
    "| torchrun --nproc-per-node 2 -m epsball train --out runs/two | epsball train --list"
)
MODEL_FILE, WEIGHTS_FILE = "model.py", "model.safetensors"


def train(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="package.module:factory, file.py:factory or a builtin name; a small network by default."),
    ] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="As in epsball train --list.")] = "pgd",
    settings: Annotated[list[str] | None, typer.Option("--set", "-s", metavar="NAME=VALUE", help="An option of the method.")] = None,
    data: Annotated[str, typer.Option("--data", "-d", help="As for audit; its split train.")] = "digits",
    threat: Annotated[str, typer.Option("--threat", "-t", help="NAME:RADIUS with linf, l2 or l1.")] = "linf:0.1",
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data; 30, or 4 for free, which repeats batches.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step; part of the recipe.")] = 64,
    rate: Annotated[float, typer.Option("--lr", help="Largest learning rate.")] = 3e-3,
    optimizer: Annotated[str, typer.Option(help="adam (decoupled decay) or sgd (momentum 0.9).")] = "adam",
    schedule: Annotated[str, typer.Option(help="one-cycle, cosine or constant.")] = "one-cycle",
    decay: Annotated[float, typer.Option("--weight-decay", help="Of all weights.")] = 5e-4,
    average: Annotated[float, typer.Option("--ema", help="Decay of the averaged weights, which are kept; 0 for none.")] = 0.9995,
    smoothing: Annotated[float, typer.Option("--label-smoothing", help="In [0, 1).")] = 0.0,
    warmup: Annotated[float | None, typer.Option(help="Share of the training over which the radius grows; 0.2, or 0.6 for ibp.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of the gradient.")] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Parts that a step is computed in, to save memory.")] = 1,
    replays: Annotated[int | None, typer.Option(min=1, help="Times that every batch is shown in a row; 8 for free, else 1.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 where that is safe.")] = False,
    patience: Annotated[int | None, typer.Option(min=1, help="Stop after so many epochs without better held-out accuracy.")] = None,
    certified: Annotated[
        bool | None, typer.Option("--certify/--no-certify", help="Prove held-out samples by intervals after each epoch; on for ibp.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", "-n", min=2, help="Training samples, held-out ones included; all by default.")] = None,
    held: Annotated[int | None, typer.Option("--held-out", min=1, help="Samples to choose the best epoch by; 10 %, at most 1000.")] = None,
    weights: Annotated[str | None, typer.Option("--weights", "-w", metavar="FILE", help="Weights of MODEL to start from.")] = None,
    mean: Annotated[str | None, typer.Option(metavar="M[,M,M]", help="Mean that MODEL's inputs are normalized by.")] = None,
    std: Annotated[str | None, typer.Option(metavar="S[,S,S]", help="Standard deviation that they are normalized by.")] = None,
    layout: Annotated[str, typer.Option(help="Axes of an image: auto, hw, hwc, chw or flat; raw: leave inputs as they are.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of order, noise and the small network's weights.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder; one with a checkpoint goes on there.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(metavar="DIR", help="Write TensorBoard events there, too.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="The methods with their papers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")] = False,
) -> None:
    """Train a robust model, and print the line that audits it. Without arguments: PGD training on the embedded digits, under a minute."""
    from epsball.defenses import training
    from epsball.door import open_run

    if list_:
        _list(as_json)
        return
    from epsball.cli.app import _options

    chosen, options = training.method(method), _options(settings or [], example="steps=7")
    chosen.check(options)
    own = {"epochs": epochs, "replays": replays, "warmup": warmup, "certify": certified}  # a method may want others than the usual ones
    asked = {
        "batch": batch_size,
        "rate": rate,
        "decay": decay,
        "average": average,
        "smoothing": smoothing,
        "clip": clip,
        "accumulate": accumulate,
        "half": bf16,
        "patience": patience,
        "optimizer": _one_of("optimizer", optimizer, {"adam": training.adam, "sgd": training.sgd}),
        "schedule": _one_of(
            "schedule", schedule, {"one-cycle": training.one_cycle, "cosine": training.cosine, "constant": training.constant}
        ),
        **{name: value for name, value in own.items() if value is not None},
    }
    course = training.Course(**{"epochs": 30, **chosen.course, **asked})
    against = _against(threat)
    dataset, parts = _parts(data, n, held, seed, layout)
    if _audited_on_itself(data, n, seed, layout, dataset):
        typer.echo(f"epsball: {data} has no test part of its own: audit on samples that this training does not see", err=True)
    with _workers(device, out) as (team, device), open_run(out) as folder:
        source, quiet = Source(model, weights, mean, std, device, team), as_json or not team.leads
        job = Job(source, dataset, parts, against, course, seed)
        with Live(quiet) as live, _between_steps(live), _boarded(tensorboard if team.leads else None, live) as progress:
            loss = job.loss(folder, chosen, options, live)
            adapted = source.load(folder, dataset, seed)
            fitted = job.fit(adapted, loss, folder, progress, live)
        if team.leads:
            line = source.finish(folder, adapted, data, layout, threat)
            _tell(fitted, folder, line, len(parts[1][0]), as_json, {"method": chosen.name, "threat": threat, "data": data, "seed": seed})


@contextmanager
def _workers(device: str, out: Path | None) -> Iterator[tuple[Team, str]]:
    """The process group that torchrun asks for, and this worker's device; alone, there is none."""
    from epsball.defenses.training import Team
    from epsball.errors import BadInput

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team(), device
        return
    from torch import cuda, distributed

    if out is None:
        raise BadInput("--out: is needed with several workers: give a folder that all of them see")
    on_gpu = device.startswith("cuda")
    if on_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Team.here(), device
    finally:
        distributed.destroy_process_group()


@contextmanager
def _boarded(folder: Path | None, live: Live) -> Iterator[Any]:
    """The live line, and TensorBoard where it is asked for."""
    if folder is None:
        yield live
        return
    from epsball.defenses.training import Board

    board = Board(folder)

    def both(step: int, steps: int, record: Record | None) -> None:
        board(step, steps, record)
        live(step, steps, record)

    try:
        yield both
    finally:
        board.close()


@dataclass(frozen=True)
class Job:
    """What is trained on what, and how."""

    source: Source
    dataset: Dataset
    parts: tuple[Any, Any]
    against: Against
    course: Course
    seed: int

    def loss(self, folder: Path, method: Method, options: dict[str, Any], live: Live) -> Loss:
        """The method's loss; a teacher that it needs is trained first, in a folder of its own."""
        from epsball.defenses import training

        given: dict[str, Any] = {"data": self.parts[0]}
        if "teacher" in method.needs:
            live.console.print("teacher first", markup=False, highlight=False)
            given["teacher"] = self.source.load(folder, self.dataset, self.seed)
            tempered = training.make("tempered", {name: value for name, value in options.items() if name == "temperature"})
            (folder / "teacher").mkdir(exist_ok=True)
            self.fit(given["teacher"], tempered, folder / "teacher", live, live)
        return training.make(method.name, options, **given)

    def fit(self, model: Any, loss: Loss, folder: Path, progress: Any, live: Live) -> Fitted:
        """One training, which Ctrl-C stops between two steps."""
        from epsball.cli import EXIT_INTERRUPTED
        from epsball.defenses import training

        try:
            return training.fit(
                model, loss, self.parts[0], self.parts[1], self.against, self.course, self.seed, folder=folder, progress=progress
            )
        except KeyboardInterrupt:
            where = folder.parent if folder.name == "teacher" else folder
            if self.source.team.leads:
                typer.echo(f"epsball: interrupted after step {live.step} of {live.steps}; {_again(folder, where)}", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None


@dataclass(frozen=True)
class Source:
    """Where the model comes from, in the words of the command line."""

    model: str | None
    weights: str | None
    mean: str | None
    std: str | None
    device: str
    team: Team

    def load(self, folder: Path, dataset: Dataset, seed: int) -> nn.Module:
        """The model on its device; the small network's code is written to the folder, so that the folder is whole."""
        from epsball.cli.app import _floats
        from epsball.defenses.training import checkpoint
        from epsball.errors import BadInput
        from epsball.models import load_adapted
        from epsball.models.load import WHOLE

        if self.model is None:
            if (self.weights, self.mean, self.std) != (None, None, None):
                raise BadInput("--weights, --mean and --std describe a MODEL: name it first")
            shape, classes = tuple(dataset.x.shape[1:]), max(len(dataset.class_names), int(dataset.y.max()) + 1)
            if self.team.leads:
                checkpoint.write(folder / MODEL_FILE, _code(shape, classes, seed).encode())
            self.team.wait()
        elif self.model.lower().endswith(WHOLE) or "://" in self.model:
            raise BadInput(f"model '{self.model}': cannot be trained: give package.module:factory, file.py:factory or a builtin name")
        adapted, _ = load_adapted(self.reference(folder), self.weights, mean=_floats("mean", self.mean), std=_floats("std", self.std))
        return adapted.to(self.device)

    def reference(self, folder: Path) -> str:
        """What names the model on any command line."""
        return self.model or f"{folder / MODEL_FILE}:make"

    def finish(self, folder: Path, adapted: Any, data: str, layout: str, threat: str) -> str:
        """Writes the weights; returns the line that audits them."""
        from epsball.defenses.training import checkpoint

        checkpoint.save(folder / WEIGHTS_FILE, adapted.module.state_dict(), {})
        words = ["epsball", "audit", self.reference(folder), "-w", str(folder / WEIGHTS_FILE), "-d", data, "-t", threat]
        words += [word for name, value in (("--mean", self.mean), ("--std", self.std)) if value is not None for word in (name, value)]
        words += ["--layout", layout] if layout != "auto" else []
        return shlex.join(words)


def _code(shape: tuple[int, ...], classes: int, seed: int) -> str:
    return (
        f'"""The network of {WEIGHTS_FILE} in this folder."""\n\n'
        "from epsball.defenses.training import small\n\n\n"
        f"def make():\n    return small({shape}, {classes}, seed={seed})\n"
    )


def _one_of(name: str, value: str, known: dict[str, Any]) -> Any:
    if value not in known:
        raise typer.BadParameter(f"--{name} '{value}': use one of {', '.join(known)}")
    return known[value]


def _against(text: str) -> Against:
    from epsball.defenses.training import Against
    from epsball.threats import parse_threat

    spec = parse_threat(text)
    if len(spec.radii) != 1:
        raise typer.BadParameter(f"--threat '{text}': {len(spec.radii)} radii: train at one, audit at as many as you like")
    return Against(spec.threat, spec.radii[0])


def _parts(data: str, n: int | None, held: int | None, seed: int, layout: str) -> tuple[Dataset, tuple[Any, Any]]:
    """The data set, and its training and held-out parts (x, y)."""
    import torch

    from epsball.data import load_data
    from epsball.data.sample import subset
    from epsball.errors import BadInput

    dataset = load_data(data, split="train", n=n, seed=seed, layout=layout)  # type: ignore[arg-type]
    count = len(dataset.x)
    wanted = min(1000, max(1, count // 10)) if held is None else held
    if wanted >= count:
        raise BadInput(f"--held-out {wanted}: of {count} samples: leave some to train on")
    outside = torch.zeros(count, dtype=torch.bool)
    outside[torch.from_numpy(subset(dataset.y.numpy(), wanted, seed))] = True
    return dataset, ((dataset.x[~outside], dataset.y[~outside]), (dataset.x[outside], dataset.y[outside]))


def _audited_on_itself(data: str, n: int | None, seed: int, layout: str, dataset: Dataset) -> bool:
    """Whether the split test, which the last line audits, is the training data again."""
    import torch

    from epsball.data import load_data
    from epsball.errors import BadInput

    try:
        other = load_data(data, split="test", n=n, seed=seed, layout=layout)  # type: ignore[arg-type]
    except BadInput:
        return True
    return other.total == dataset.total and torch.equal(other.x, dataset.x)


def _again(kept: Path, folder: Path) -> str:
    from epsball.defenses.training import checkpoint

    if not (kept / checkpoint.NAME).exists():
        return "nothing was saved yet"
    words = sys.argv[1:] if {"--out", "-o"} & {word.partition("=")[0] for word in sys.argv} else [*sys.argv[1:], "--out", str(folder)]
    return f"to go on from there: {shlex.join(['epsball', *words])}"


class Live:
    """Progress on stderr: a live line on a terminal, and one line an epoch anywhere else. Raises once it is asked to stop."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True, quiet=quiet)
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not sys.stderr.isatty(),
        )
        self.task = self.bar.add_task("training", total=1.0)
        self.step, self.steps, self.stop = 0, 0, False

    def __enter__(self) -> Live:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def __call__(self, step: int, steps: int, record: Record | None) -> None:
        """After a step."""
        self.step, self.steps = step, steps
        if record is not None:
            words = f"epoch {record.epoch}: loss {record.loss:.3f}, held out: clean {record.clean:.1%}, robust {record.robust:.1%}"
            words += "" if record.certified is None else f", certified {record.certified:.1%}"
            alarm = f"; CATASTROPHIC OVERFITTING by step {record.step}: the best weights so far are kept" if record.collapsed else ""
            self.bar.update(self.task, description=words)
            if self.bar.disable or alarm:
                self.console.print(words + alarm, markup=False, highlight=False, soft_wrap=True)
        self.bar.update(self.task, completed=step / steps)
        if self.stop:
            raise KeyboardInterrupt


@contextmanager
def _between_steps(live: Live) -> Iterator[None]:
    """The first Ctrl-C waits for the end of the step, so that the checkpoint is of this very step; the second does not."""

    def ask(number: int, frame: object) -> None:
        if live.stop:
            raise KeyboardInterrupt
        live.stop = True

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: Ctrl-C goes elsewhere
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _tell(fitted: Fitted, folder: Path, line: str, held: int, as_json: bool, facts: dict[str, Any]) -> None:
    best, alarms = fitted.best, [record.step for record in fitted.history if record.collapsed]
    if as_json:
        history = [asdict(record) for record in fitted.history]
        found = {**facts, "best": asdict(best), "early": fitted.early, "collapsed": alarms, "history": history, "out": str(folder)}
        sys.stdout.write(json.dumps({**found, "audit": line}) + "\n")
        return
    typer.echo(f"Best epoch {best.epoch} of {len(fitted.history)}{', stopped early' if fitted.early else ''}.")
    bounded = "" if best.certified is None else f", certified by intervals {best.certified:.1%}"
    typer.echo(f"On {held} held-out samples: clean {best.clean:.1%}, under a short PGD {best.robust:.1%}{bounded}. That is no verdict yet.")
    if alarms:
        typer.echo(f"Catastrophic overfitting was seen at step {alarms[0]}: a second step helps, --method pgd -s steps=2 -s share=0.6.")
    typer.echo(f"Weights: {folder / WEIGHTS_FILE}\nLog:     {folder / 'log.jsonl'}\nNext:    {line}")


def _list(as_json: bool) -> None:
    from epsball.defenses.training import METHODS

    if as_json:
        sys.stdout.write(
            json.dumps({"methods": [{"name": m.name, "paper": m.paper, "summary": m.summary} for m in METHODS.values()]}) + "\n"
        )
        return
    for found in METHODS.values():
        typer.echo(f"{found.name:14} {found.summary} ({found.paper})")
