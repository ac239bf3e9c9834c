"""Interpolated adversarial training (Lamb, Verma, Kannala & Bengio 2019, arXiv 1906.06784): robustness at a smaller clean error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epsball.attacks import pgd as attack
from epsball.auditing.results import ModelReport
from epsball.auditing.statistics import mcnemar, paired_difference
from epsball.core import Tally, Victim
from epsball.data import Dataset
from epsball.defenses.training import (
    Adversarial,
    Against,
    Course,
    Loss,
    Record,
    Search,
    Standard,
    by_clean,
    by_robust,
    checkpoint,
    iat,
    pgd,
    small,
)
from epsball.defenses.training.fgsm import Mix
from epsball.report.text import percent
from epsball.reproduce import figures, nets, robust
from epsball.reproduce.base import NOT_READ, Figure, Finding, Line, Setting, experiment, percent_of
from epsball.threats import Linf

PAPER = "Lamb, Verma, Kannala & Bengio 2019, arXiv 1906.06784"
RADIUS, TEXT = 8 / 255, "8/255"
ROWS, HELD, SEEN, AUDITED, EPOCHS = 10_000, 500, 5_000, 1000, 20
STEPS, SHARE = 7, 0.25
STANDARD, PGD, HALF, IAT = "standard", "PGD-7", "PGD-7 and clean", "IAT"
LOSSES: dict[str, Loss] = {
    STANDARD: Standard(),
    PGD: pgd(STEPS, SHARE),
    HALF: Adversarial(Search(STEPS, SHARE), Mix(0.5)),
    IAT: iat(STEPS, SHARE),
}
"""HALF, (J(x) + J(x_adv)) / 2, is IAT without its interpolation: what it gains comes from the clean half alone."""
PUBLISHED = {STANDARD: "4.43 %", PGD: "12.32 %", HALF: NOT_READ, IAT: "6.45 %"}
"""Clean errors in the paper's abstract."""
BEHIND = "error behind PGD-10"


KEPT, LAST = "kept", "last"


@dataclass(frozen=True)
class Trained:
    """One training: the networks of two epochs in eval mode, KEPT by held-out images and the LAST; the records of both; all records."""

    nets: dict[str, nn.Module]
    records: dict[str, Record]
    history: tuple[Record, ...]


@dataclass(frozen=True)
class Measured:
    """What one network does: wrong (N,) bool, on test images; the same behind PGD-10; its audit."""

    wrong: Tensor
    behind: Tensor
    audit: ModelReport


def trained(name: str, train: Dataset, held: Dataset, setting: Setting) -> Trained:
    """The small network, always the same but for the loss. The last weights are those of the training's checkpoint."""
    epochs = robust.QUICK_EPOCHS if setting.quick else EPOCHS
    course = Course(epochs=epochs, merit=by_clean if name == STANDARD else by_robust)
    shape, against, loss, place = tuple(train.x.shape[1:]), Against(Linf(), RADIUS), LOSSES[name], f"iat-{name}"
    fitted = robust.trained(place, lambda: small(shape, 10, setting.seed), loss, train, held, against, course, setting)
    last = small(shape, 10, setting.seed)
    folder = robust.folder_of(place, last, loss, train, against, course, setting)
    last.load_state_dict(checkpoint.under(checkpoint.load(folder / checkpoint.NAME)[0], "average"))
    records = {KEPT: fitted.best, LAST: fitted.history[-1]}
    return Trained({KEPT: fitted.model, LAST: last.eval()}, records, fitted.history)


def errors(net: nn.Module, test: Dataset, setting: Setting) -> tuple[Tensor, Tensor]:
    """(N,) bool: wrong; wrong behind PGD-10, the same noise for every network. Cost: 12 forwards and 10 backwards for what stands."""
    with Victim(net, box=(0.0, 1.0), batch_size=512) as victim:
        clean = victim.outputs(test.x, Tally.zeros(len(test.x)))
        outcome = attack(steps=10)(victim, test.x, test.y, RADIUS, setting.seed, clean=clean)
    wrong = clean.argmax(1) != test.y
    return wrong, wrong | outcome.reached | outcome.flags["invalid"]


def measured(net: nn.Module, test: Dataset, few: Dataset, setting: Setting) -> Measured:
    """Clean and behind PGD-10 on all test images, audited on `few`."""
    return Measured(*errors(net, test, setting), robust.audited(net, few, f"linf:{TEXT}", "default", setting))


def _only(first: Tensor, second: Tensor) -> tuple[int, int]:
    """How many rows are true in the first alone, and in the second alone."""
    return int((first & ~second).sum()), int((second & ~first).sum())


def difference(first: Tensor, second: Tensor) -> str:
    """The first error less the second, of the same images (N,) bool.

    >>> difference(torch.tensor([True] * 6 + [False] * 4), torch.tensor([False] * 10))
    '60.0 points [15.6, 83.2], exact McNemar p = 0.031, n = 10'
    """
    (one, two), n = _only(first, second), len(first)
    low, high = paired_difference(one, two, n)
    return f"{100 * (one - two) / n:.1f} points [{100 * low:.1f}, {100 * high:.1f}], exact McNemar p = {mcnemar(one, two):.2g}, n = {n:,}"


def shows(plain: Measured, own: Measured) -> bool:
    """Whether the second has surely the smaller clean error and not surely the larger one behind PGD-10: the published effect."""
    less = paired_difference(*_only(plain.wrong, own.wrong), len(plain.wrong))[0] > 0
    return less and paired_difference(*_only(own.behind, plain.behind), len(own.behind))[0] <= 0


def _lines(name: str, epoch: str, one: Measured) -> tuple[Line, ...]:
    n, paper, words = len(one.wrong), PUBLISHED[name], f"{name}, {epoch}"
    why = "" if paper == NOT_READ else "another network, far fewer images and epochs"
    left = robust.error(one.audit.results[0].robust_accuracy)
    return (
        Line(f"{words}: clean error", paper, percent_of(int(one.wrong.sum()), n), why),
        Line(f"{words}: {BEHIND}", NOT_READ, percent_of(int(one.behind.sum()), n)),
        Line(f"{words}: robust error, audited", "no audit published", left, robust.flags(one.audit)),
    )


def _between(a: str, b: str, epoch: str, found: dict[tuple[str, str], Measured], paper: str = NOT_READ) -> tuple[Line, ...]:
    """One training less another, image by image."""
    one, two = found[a, epoch], found[b, epoch]
    return (
        Line(f"{a} less {b}, {epoch}: clean error", paper, difference(one.wrong, two.wrong)),
        Line(f"{a} less {b}, {epoch}: {BEHIND}", NOT_READ, difference(one.behind, two.behind)),
    )


def _picture(runs: dict[str, Trained]) -> Figure:
    """The way of every robust training through both errors."""
    curves = [
        figures.Curve(name, [100 * (1 - record.clean) for record in run.history], [100 * (1 - record.robust) for record in run.history])
        for name, run in runs.items()
        if name != STANDARD
    ]
    told = "Both errors on held-out images, epoch by epoch: lower is more robust, further left is right more often on clean images."
    return Figure("ways", figures.lines("Clean and robust error in training", told, curves, "clean error, %", f"{BEHIND}, %"), told)


def _verdict(found: dict[tuple[str, str], Measured]) -> str:
    """Whether the published effect is there."""

    def points(one: Tensor, two: Tensor) -> str:
        return f"{100 * float(one.double().mean() - two.double().mean()):+.1f}"

    told = []
    for epoch in (KEPT, LAST):
        plain, own = found[PGD, epoch], found[IAT, epoch]
        seen = "shows" if shows(plain, own) else "does not show"
        told.append(f"{epoch}: {points(own.wrong, plain.wrong)} and {points(own.behind, plain.behind)} points, it {seen}")
    return (
        f"The published effect is a smaller clean error of {IAT} than of adversarial training at similar robustness. {IAT} against {PGD}, "
        f"clean error and {BEHIND}, {'; '.join(told)} (95 %)."
    )


def _notes(runs: dict[str, Trained], train: Dataset, held: Dataset) -> tuple[str, ...]:
    told = "; ".join(
        f"{name} epoch {record.epoch}, {percent(1 - record.clean)} and {percent(1 - record.robust)}"
        for name, run in runs.items()
        for record in run.records.values()
    )
    size = sum(weights.numel() for weights in small(tuple(train.x.shape[1:]), 10).parameters())
    return (
        f"Kept: the epoch with the best robust accuracy behind PGD-10 (in standard training, clean accuracy) on {len(held.x)} held-out "
        f"images, so few that the choice is partly chance. Last: the last epoch, whatever these say. Clean error and {BEHIND} "
        f"on the held-out images: {told}.",
        f"One network of {size:,} parameters, from the same weights; {len(train.x):,} images, {EPOCHS} epochs, {STEPS} steps of search of "
        f"{SHARE:g} radii, AdamW 3e-3, one cycle, batches of 128, averaged weights, no augmentation. One training each.",
        f"'{HALF}' trains on (J(x) + J(x_adv)) / 2: IAT without interpolation.",
        "The paper's figures are those of its abstract (CIFAR-10); its tables were not read, nor which epoch and which PGD it reports.",
    )


@experiment("iat", title="Clean error of interpolated adversarial training, CIFAR-10, Linf 8/255", paper=PAPER, needs=("cifar",), minutes=7)
def interpolated(setting: Setting) -> Finding:
    """What standard, PGD and interpolated training of one network pay in clean error, and what an audit leaves of them."""
    data = nets.cifar(setting, 100 if setting.quick else SEEN)
    few = nets.cifar(setting, setting.count(AUDITED, quick=20)).test
    rest, held = robust.split(data.train, HELD, setting)
    train = nets.rows(rest, torch.arange(min(ROWS, len(rest.x))))
    runs = {name: trained(name, train, held, setting) for name in LOSSES}
    found = {(name, epoch): measured(net, data.test, few, setting) for name, run in runs.items() for epoch, net in run.nets.items()}
    lines = [line for (name, epoch), one in found.items() for line in _lines(name, epoch, one)]
    for epoch in (KEPT, LAST):
        lines += [*_between(PGD, IAT, epoch, found, "5.87 points"), *_between(HALF, IAT, epoch, found)]
    return Finding(tuple(lines), (_picture(runs),), (_verdict(found), *_notes(runs, train, held)))
