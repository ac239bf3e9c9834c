"""Interpolated adversarial training (Lamb, Verma, Kannala & Bengio 2019, arXiv 1906.06784): robustness at a smaller clean error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from epsball.attacks import pgd as attack
from epsball.auditing.results import ModelReport
from epsball.auditing.statistics import mcnemar, paired_difference
from epsball.core import Key, Tally, Victim
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
from epsball.defenses.training.batch import Batch, Logs
from epsball.defenses.training.fgsm import Mix
from epsball.defenses.training.interpolated import mixup
from epsball.report.text import percent
from epsball.reproduce import figures, nets, robust
from epsball.reproduce.base import NOT_READ, Figure, Finding, Line, Setting, experiment, percent_of
from epsball.threats import Linf

PAPER = "Lamb, Verma, Kannala & Bengio 2019, arXiv 1906.06784"
SEEN, AUDITED = 5_000, 1000
STANDARD, MIXUP, PGD, HALF, IAT = "standard", "mixup", "PGD", "PGD and clean", "IAT"


def mixed(model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
    """Mixup without an adversary: the clean half of IAT."""
    return mixup(model, x, y, batch)[0], {}


def losses(steps: int, share: float) -> dict[str, Loss]:
    """By name. HALF, (J(x) + J(x_adv)) / 2, is IAT without its interpolation: what it gains comes from the clean half alone."""
    half = Adversarial(Search(steps, share), Mix(0.5))
    return {STANDARD: Standard(), MIXUP: mixed, PGD: pgd(steps, share), HALF: half, IAT: iat(steps, share)}


BASELINES, ROBUST = (PGD, HALF), (PGD, HALF, IAT)
NAMES = (STANDARD, MIXUP, *ROBUST)
PUBLISHED = {STANDARD: "clean 4.43 %", MIXUP: NOT_READ, PGD: "clean 12.32 %", HALF: "clean 12.32 %", IAT: "clean 6.45 %"}
"""Clean errors in the paper's abstract; its adversarial training is one of PGD and HALF."""
BEHIND = "behind PGD-10"
KEPT, LAST = "kept", "last"
EFFECT = (
    "The published effect is a smaller clean error than that of adversarial training at similar robustness. It counts as shown where the "
    "clean error is surely smaller (95 %) and the error behind PGD-10 not surely larger."
)
AGAIN = 2
"""Parts whose setting was chosen are trained once more, with a seed that lies so far behind the first: the next seed chose the setting."""


def wide(shape: tuple[int, ...], seed: int) -> nn.Module:
    """Like `small`, of twice the channels and 256 hidden units; weights by the seed."""
    channels, height, width = shape

    def build() -> nn.Module:
        first, second = nn.Conv2d(channels, 32, 4, stride=2, padding=1), nn.Conv2d(32, 64, 4, stride=2, padding=1)
        hidden, last = nn.Linear(64 * (height // 4) * (width // 4), 256), nn.Linear(256, 10)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), hidden, nn.ReLU(), last)

    return robust.fresh(build, Key.of(seed))


class Block(nn.Module):
    """Two convolutions behind batch norm and ReLU, and a way around them (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.second = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
        )
        self.around = nn.Identity() if stride == 1 and before == after else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) -> (B, after, H / stride, W / stride)."""
        out: Tensor = self.second(self.first(x)) + self.around(x)
        return out


def residual(shape: tuple[int, ...], seed: int) -> nn.Module:
    """Three blocks of 32, 64 and 128 channels at half, a quarter and an eighth of the size; weights by the seed."""

    def build() -> nn.Module:
        first = nn.Conv2d(shape[0], 32, 4, stride=2, padding=1, bias=False)
        last = (nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
        return nn.Sequential(first, Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2), *last)

    return robust.fresh(build, Key.of(seed))


@dataclass(frozen=True)
class Regime:
    """What all trainings of one part share.

    Attributes:
        name: of folders. rows: training images. held: more of them, which choose the kept epoch. radius: of Linf, in units of 1/255.
        course: how they train. build: (shape, seed) -> network. steps, share: of the search in training, each step in radii.
        again: whether a second seed is trained, because pilots chose the setting.
    """

    name: str
    rows: int
    held: int
    radius: int
    course: Course
    build: Callable[[tuple[int, ...], int], nn.Module]
    steps: int = 7
    share: float = 0.25
    again: bool = True

    def words(self) -> str:
        """For the table."""
        return f"{self.rows:,} images, {self.radius}/255, PGD-{self.steps}"


MANY = Regime("iat", 10_000, 500, 8, Course(epochs=20), lambda shape, seed: small(shape, 10, seed), again=False)
FEW = Regime("iat-few", 4_000, 200, 4, Course(epochs=30, rate=2e-3, average=0.999), wide)
DEEP = Regime("iat-deep", 5_000, 200, 8, Course(epochs=60, average=0.999), residual, steps=3, share=0.5)
PARTS = (MANY, FEW, DEEP)


@dataclass(frozen=True)
class Trained:
    """One training: the networks of two epochs in eval mode, KEPT by held-out images and the LAST; the records of both; all records."""

    nets: dict[str, nn.Module]
    records: dict[str, Record]
    history: tuple[Record, ...]


@dataclass(frozen=True)
class Wrong:
    """What one network gets wrong of the test images, (N,) bool each: clean, and behind PGD-10."""

    clean: Tensor
    behind: Tensor


Runs = dict[str, Trained]
Found = dict[tuple[str, str], Wrong]
Audits = dict[tuple[str, str], ModelReport]
"""By name and epoch."""


def trained(name: str, regime: Regime, train: Dataset, held: Dataset, setting: Setting) -> Trained:
    """One training of the regime's network. The last weights are those of the training's checkpoint."""
    epochs = robust.QUICK_EPOCHS if setting.quick else regime.course.epochs
    course = replace(regime.course, epochs=epochs, merit=by_robust if name in ROBUST else by_clean)
    against, loss, place = Against(Linf(), regime.radius / 255), losses(regime.steps, regime.share)[name], f"{regime.name}-{name}"

    def build() -> nn.Module:
        return regime.build(tuple(train.x.shape[1:]), setting.seed)

    fitted = robust.trained(place, build, loss, train, held, against, course, setting)
    last = build()
    folder = robust.folder_of(place, last, loss, train, against, course, setting)
    last.load_state_dict(checkpoint.under(checkpoint.load(folder / checkpoint.NAME)[0], "average"))
    records = {KEPT: fitted.best, LAST: fitted.history[-1]}
    return Trained({KEPT: fitted.model, LAST: last.eval()}, records, fitted.history)


def all_trained(names: Iterable[str], regime: Regime, data: Dataset, setting: Setting) -> Runs:
    """A training for every name, on the same images."""
    rest, held = robust.split(data, regime.held, setting)
    train = nets.rows(rest, torch.arange(min(regime.rows, len(rest.x))))
    return {name: trained(name, regime, train, held, setting) for name in names}


def wrong(net: nn.Module, test: Dataset, radius: float, seed: int) -> Wrong:
    """The same noise for every network. Cost: 12 forwards and 10 backwards for what stands."""
    with Victim(net, box=(0.0, 1.0), batch_size=512) as victim:
        answers = victim.outputs(test.x, Tally.zeros(len(test.x)))
        outcome = attack(steps=10)(victim, test.x, test.y, radius, seed, clean=answers)
    clean = answers.argmax(1) != test.y
    return Wrong(clean, clean | outcome.reached | outcome.flags["invalid"])


def all_wrong(runs: Runs, regime: Regime, test: Dataset, setting: Setting) -> Found:
    """Both networks of every training."""
    each = [(name, epoch, net) for name, run in runs.items() for epoch, net in run.nets.items()]
    return {(name, epoch): wrong(net, test, regime.radius / 255, setting.seed) for name, epoch, net in each}


def _only(first: Tensor, second: Tensor) -> tuple[int, int]:
    """How many rows are true in the first alone, and in the second alone."""
    return int((first & ~second).sum()), int((second & ~first).sum())


def difference(first: Tensor, second: Tensor) -> str:
    """The first error less the second, of the same images (N,) bool.

    >>> difference(torch.tensor([True] * 6 + [False] * 4), torch.tensor([False] * 10))
    '60.0 points [15.6, 83.2], p = 0.031'
    """
    (one, two), n = _only(first, second), len(first)
    low, high = paired_difference(one, two, n)
    return f"{100 * (one - two) / n:.1f} points [{100 * low:.1f}, {100 * high:.1f}], p = {mcnemar(one, two):.2g}"


def shows(plain: Wrong, own: Wrong) -> bool:
    """Whether the second has surely the smaller clean error and not surely the larger one behind PGD-10: the published effect."""
    less = paired_difference(*_only(plain.clean, own.clean), len(plain.clean))[0] > 0
    return less and paired_difference(*_only(own.behind, plain.behind), len(own.behind))[0] <= 0


def _lines(regime: Regime, found: Found, audits: Audits) -> Iterable[Line]:
    """Three errors of every network."""
    for (name, epoch), one in found.items():
        n, audit = len(one.clean), audits[name, epoch]
        ours = f"clean {percent_of(int(one.clean.sum()), n)}; {BEHIND} {percent_of(int(one.behind.sum()), n)}; audited "
        left = robust.error(audit.results[0].robust_accuracy)
        why = f"another network, far fewer images and epochs; audit: {robust.flags(audit)}"
        yield Line(f"{regime.words()}; {name}, {epoch}: errors", PUBLISHED[name], ours + left, why)


def _between(regime: Regime, found: Found, seed: int) -> Iterable[Line]:
    """Each baseline less IAT, image by image."""
    for epoch in (KEPT, LAST):
        for name in BASELINES:
            one, two = found[name, epoch], found[IAT, epoch]
            ours = f"clean {difference(one.clean, two.clean)}; {BEHIND} {difference(one.behind, two.behind)}; n = {len(one.clean):,}"
            words = f"{regime.words()}, seed {seed}; {name} less {IAT}, {epoch}"
            yield Line(words, "clean 5.87 points", ours, "it shows" if shows(one, two) else "it does not show")


def _picture(regime: Regime, runs: Runs) -> Figure:
    """The way of every robust training through both errors."""
    curves = [
        figures.Curve(name, [100 * (1 - record.clean) for record in run.history], [100 * (1 - record.robust) for record in run.history])
        for name, run in runs.items()
        if name in ROBUST
    ]
    told = f"{regime.words()}: both errors on held-out images, epoch by epoch. Lower is more robust, further left more often right."
    drawn = figures.lines("Clean and robust error in training", told, curves, "clean error, %", f"error {BEHIND}, %")
    return Figure(f"ways{regime.name.removeprefix(MANY.name)}", drawn, told)


def _verdict(regime: Regime, seeds: dict[int, Found]) -> str:
    """Where the published effect is."""

    def points(one: Tensor, two: Tensor) -> str:
        return f"{100 * float(one.double().mean() - two.double().mean()):+.1f}"

    first = next(iter(seeds.values()))
    plain, own = first[STANDARD, LAST].clean, first[MIXUP, LAST].clean
    alone = f"{MIXUP} alone less {STANDARD}, {LAST}, clean error: {difference(own, plain)}"
    told = []
    for epoch in (LAST, KEPT):
        for name in BASELINES:
            pairs = [(found[name, epoch], found[IAT, epoch]) for found in seeds.values()]
            moves = ", ".join(f"{points(two.clean, one.clean)} and {points(two.behind, one.behind)}" for one, two in pairs)
            count = sum(shows(*pair) for pair in pairs)
            told.append(f"{IAT} less {name}, {epoch}: {moves}, shown in {count} of {len(pairs)}")
    places = f"seed{'s' if len(seeds) > 1 else ''} {' and '.join(map(str, seeds))}"
    return f"{regime.words()}, {places}; clean error and error {BEHIND}, points. {'; '.join([*told, alone])}."


def _note(regime: Regime, runs: Runs) -> str:
    """What was trained, and which epochs were taken."""
    told = "; ".join(
        f"{name} epoch {record.epoch}, {percent(1 - record.clean)} and {percent(1 - record.robust)}"
        for name, run in runs.items()
        for record in run.records.values()
    )
    own = runs[PGD].records[LAST].means["adversarial"]
    size = sum(weights.numel() for weights in runs[IAT].nets[LAST].parameters())
    course = regime.course
    return (
        f"{regime.words()}: a network of {size:,} parameters, {course.epochs} epochs, AdamW {course.rate:g}, averaged weights (decay "
        f"{course.average:g}); searches of {regime.steps} steps of {regime.share:g} radii; {PGD} ends with {percent(own)} of "
        "its training images right under its own attacks. "
        f"Clean error and error {BEHIND} on {regime.held} held-out images, kept and last: {told}."
    )


def _general() -> tuple[str, ...]:
    """What holds for all parts."""
    return (
        f"Kept: the epoch with the best robust accuracy {BEHIND} (without an adversary: clean accuracy) on held-out images, so few that "
        "the choice is partly chance. Last: the last epoch, whatever these say. p: exact McNemar.",
        "Every training: one cycle, batches of 128, no augmentation; the same first weights for all losses of a seed.",
        f"'{HALF}' trains on (J(x) + J(x_adv)) / 2: {IAT} without interpolation. The paper's figures are those of its abstract (CIFAR-10, "
        "8/255); it was not read further. D. Stutz's summary (shortscience.org) says that its adversarial training is of this kind.",
        f"{FEW.words()}: a setting in which trainings memorize. It was chosen with seed 1, one training for each loss, as one of two in "
        f"which both errors were smaller with {IAT} than with '{HALF}', though none surely. Tried and left, partly with 4 steps of search: "
        "1,000 images for 100 epochs (the other of the two) and 120, small network, 8/255, no averaged weights; 1,000 for 100, wide "
        "network, 4/255; 4,000 for 30 with AdamW 3e-3 and slower averages; 10,000, small network and wide one, 4/255; MNIST with 500 and "
        "with 300 labels, radius 0.2. The effect showed in none.",
        f"{DEEP.words()}: chosen with seed 1, on a network of the same kind, because mixup alone lowered its clean error there, and "
        f"{IAT} had surely less of it than '{HALF}'.",
    )


def measured(regime: Regime, data: nets.Data, few: Dataset, setting: Setting) -> tuple[Runs, Found, Audits]:
    """All trainings of a part, what they get wrong, and what an audit on `few` images says of every network."""
    runs = all_trained(NAMES, regime, data.train, setting)
    found = all_wrong(runs, regime, data.test, setting)
    threat = f"linf:{regime.radius}/255"
    each = [(name, epoch, net) for name, run in runs.items() for epoch, net in run.nets.items()]
    return runs, found, {(name, epoch): robust.audited(net, few, threat, "default", setting) for name, epoch, net in each}


@experiment("iat", title="Clean error of interpolated adversarial training, CIFAR-10, Linf", paper=PAPER, needs=("cifar",), minutes=110)
def interpolated(setting: Setting) -> Finding:
    """What standard, PGD and interpolated training pay in clean error, with many images and with few, and what an audit leaves of them."""
    data = nets.cifar(setting, 100 if setting.quick else SEEN)
    few = nets.cifar(setting, setting.count(AUDITED, quick=20)).test
    again = replace(setting, seed=setting.seed + AGAIN)
    lines, notes, verdicts, drawn = [], [], [], []
    for regime in PARTS:
        runs, found, audits = measured(regime, data, few, setting)
        seeds = {setting.seed: found}
        if regime.again:
            seeds[again.seed] = all_wrong(all_trained(ROBUST, regime, data.train, again), regime, data.test, again)
        lines += [*_lines(regime, found, audits), *(line for seed, one in seeds.items() for line in _between(regime, one, seed))]
        verdicts.append(_verdict(regime, seeds))
        notes.append(_note(regime, runs))
        drawn.append(_picture(regime, runs))
    return Finding(tuple(lines), tuple(drawn), (EFFECT, *verdicts, *notes, *_general()))
