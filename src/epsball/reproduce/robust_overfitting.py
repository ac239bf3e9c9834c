"""Robust overfitting (Rice, Wong & Kolter 2020, arXiv 2002.11569): PGD training that goes on too long, and the epoch that `fit` keeps."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from epsball.data import Dataset
from epsball.defenses.training import Against, Course, Fitted, Record, constant, fit, pgd, small
from epsball.defenses.training.watch import measure
from epsball.reproduce import figures, nets, robust
from epsball.reproduce.base import NOT_READ, Figure, Finding, Line, Setting, experiment, percent_of
from epsball.threats import Linf

PAPER = "Rice, Wong & Kolter 2020, arXiv 2002.11569"
RADIUS, TEXT = 8 / 255, "8/255"
ROWS, HELD, SEEN, AUDITED = 1000, 500, 500, 1000
EPOCHS, PATIENCE = 50, 10


@dataclass
class Watch:
    """Robust accuracy of the weights on test images after every epoch; the test images choose nothing."""

    model: nn.Module
    test: Dataset
    against: Against
    seed: int
    seen: list[float] = field(default_factory=list)
    last: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, step: int, steps: int, record: Record | None) -> None:
        """After a step."""
        if record is not None:
            found = measure(self.model, self.test.x, self.test.y, self.against.threat, self.against.radius, self.against.box, self.seed)
            self.seen.append(found[1])
        if step == steps:
            self.last = copy.deepcopy(self.model.state_dict())


def stopped(history: tuple[Record, ...], patience: int) -> int:
    """The epoch at which `Course(patience=...)` ends this training; the last where it does not."""
    since = 0
    for record in history:
        since = 0 if record.best else since + 1
        if since >= patience:
            return record.epoch
    return history[-1].epoch


def trained(data: Dataset, held: Dataset, test: Dataset, setting: Setting) -> tuple[Fitted, Watch]:
    """PGD training of the small network on 1,000 images at a constant rate; no averaged weights, no weight decay: they hold it back."""
    net = small(tuple(data.x.shape[1:]), 10, setting.seed)
    against = Against(Linf(), RADIUS)
    watch = Watch(net, test, against, setting.seed)
    epochs = robust.QUICK_EPOCHS if setting.quick else EPOCHS
    course = Course(epochs=epochs, batch=50, rate=1e-3, decay=0.0, schedule=constant, average=0.0, warmup=0.1)
    setting.say(f"training for {epochs} epochs of {len(data.x):,} images")
    pairs = (data.x, data.y), (held.x, held.y)
    return fit(net, pgd(steps=5, share=0.35), *pairs, against, course, setting.seed, progress=watch), watch


def _rate(share: float, n: int) -> str:
    return percent_of(round(share * n), n)


def _lines(
    name: str, net: nn.Module, record: Record, held: int, test: tuple[float, int], data: nets.Data, few: Dataset, setting: Setting
) -> tuple[Line, ...]:
    """One epoch's weights: what the training saw, and what the audit leaves."""
    found = robust.audited(net, few, f"linf:{TEXT}", "default", setting)
    rate, (right, n) = found.results[0].robust_accuracy, nets.accuracy(net, data.test)
    words = f"{name}, epoch {record.epoch}"
    return (
        Line(f"{words}: robust accuracy in training", NOT_READ, f"{100 * record.means['adversarial']:.1f} %, own attacks"),
        Line(f"{words}: robust accuracy, held out, PGD-10", NOT_READ, _rate(record.robust, held)),
        Line(f"{words}: robust accuracy, test, PGD-10", NOT_READ, _rate(*test)),
        Line(f"{words}: standard error, test", NOT_READ, percent_of(n - right, n)),
        Line(f"{words}: robust accuracy, test, audited", NOT_READ, percent_of(rate.count, rate.n), robust.flags(found)),
    )


def _picture(history: tuple[Record, ...], seen: list[float], marks: tuple[int, int]) -> Figure:
    epochs = [float(record.epoch) for record in history]
    curves = [
        figures.Curve("training, own attacks", epochs, [100 * record.means["adversarial"] for record in history]),
        figures.Curve("held out, PGD-10", epochs, [100 * record.robust for record in history]),
        figures.Curve("test, PGD-10", epochs, [100 * value for value in seen]),
    ]
    told = f"Robust accuracy of a training on {ROWS:,} images. Dashed: the epoch that is kept, and where a patience of {PATIENCE} stops."
    return Figure("epochs", figures.lines("Robust overfitting", told, curves, "epoch", "right, %", [float(mark) for mark in marks]), told)


@experiment(
    "robust-overfitting",
    title="Robust overfitting of PGD training, and early stopping, CIFAR-10, Linf 8/255",
    paper=PAPER,
    needs=("cifar",),
    minutes=5,
)
def robust_overfitting(setting: Setting) -> Finding:
    """Robust accuracy on new images peaks and falls while it rises on the training's own."""
    data = nets.cifar(setting, 5_000)
    few, test = (nets.cifar(setting, n).test for n in (setting.count(AUDITED, quick=20), setting.count(SEEN, quick=50)))
    rest, held = robust.split(data.train, HELD, setting)
    train = nets.rows(rest, torch.arange(min(ROWS, len(rest.x))))
    fitted, watch = trained(train, held, test, setting)
    last = small(tuple(train.x.shape[1:]), 10, setting.seed)
    last.load_state_dict(watch.last)
    best, end = fitted.best, fitted.history[-1]
    lines = (
        *_lines("kept by fit", fitted.model.eval(), best, len(held.x), (watch.seen[best.epoch - 1], len(test.x)), data, few, setting),
        *_lines("last", last.eval(), end, len(held.x), (watch.seen[-1], len(test.x)), data, few, setting),
    )
    stop = stopped(fitted.history, PATIENCE)
    notes = (
        f"The best robust accuracy on test images is that of epoch {1 + watch.seen.index(max(watch.seen))}, {100 * max(watch.seen):.1f} %; "
        f"`fit` keeps epoch {best.epoch} by held-out images, and a patience of {PATIENCE} ends the training after epoch {stop}.",
        f"{len(train.x):,} images, PGD with 5 steps of 0.35 radii, Adam 1e-3 at a constant rate, batches of 50, no averaged weights, no "
        f"weight decay; {len(held.x)} more images choose the epoch. One training.",
    )
    return Finding(lines, (_picture(fitted.history, watch.seen, (best.epoch, stop)),), notes)
