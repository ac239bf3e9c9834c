"""What robustness costs: standard and robust error against the radius and the number of labels, by five trainings under one audit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log10

import torch

from epsball.auditing.results import Rate
from epsball.data import Dataset
from epsball.defenses.training import Against, Course, Fitted, Loss, Standard, avmixup, by_clean, by_robust, iat, pgd, small, trades
from epsball.report.svg import Point, Series
from epsball.report.text import percent
from epsball.reproduce import figures, nets, robust
from epsball.reproduce.base import NOT_READ, Figure, Finding, Line, Setting, experiment, percent_of
from epsball.threats import Linf

PAPER = "Lamb et al. 2019, arXiv 1906.06784; Lee, Lee & Yoon 2020, arXiv 2003.02484"
RADII, LABELS = (0.05, 0.1, 0.2, 0.3), (500, 2_000, 5_000, 20_000)
MIDDLE, USUAL, MOST = 0.2, 5_000, 20_000
STEPS, SHARE = 3, 0.45
SHOWN, HELD, AUDITED, FULL = 40_000, 300, 300, 1000
STANDARD = "standard"
LOSSES: dict[str, Callable[[], Loss]] = {
    STANDARD: Standard,
    "PGD": lambda: pgd(STEPS, SHARE),
    "TRADES": lambda: trades(6.0, STEPS, SHARE),
    "IAT": lambda: iat(STEPS, SHARE),
    "AVmixup": lambda: avmixup(steps=STEPS, share=SHARE),
}
THOROUGH = ("PGD", "IAT", "AVmixup")
"""Audited once more, with effort default, at radius 0.2 and 20,000 labels."""


@dataclass(frozen=True)
class Place:
    """One training: the loss by name, the radius it is trained and audited at, how many labeled images."""

    name: str
    radius: float
    labels: int

    def words(self) -> str:
        """For the table."""
        return f"{self.name}, eps {self.radius:g}, {self.labels:,} labels"


LEFT_OUT = (Place("TRADES", MIDDLE, 500), Place("AVmixup", MIDDLE, 500))


@dataclass(frozen=True)
class Measured:
    """What was found at one place.

    Attributes:
        clean: (right, all) of the test images. held: the training's own measure, PGD-10 on held-out images.
        robust: audited. flags: the audit's. trusted: by the audit itself.
    """

    clean: tuple[int, int]
    held: float
    robust: Rate
    flags: str
    trusted: bool

    def error(self) -> float:
        """Standard error."""
        return 1 - self.clean[0] / self.clean[1]


def places() -> tuple[Place, ...]:
    """Every training against the radius at 5,000 labels, then against labels at radius 0.2; two with 500 labels are left out."""
    radii = [Place(name, radius, USUAL) for name in LOSSES for radius in RADII]
    labels = [Place(name, MIDDLE, count) for name in LOSSES for count in LABELS if count != USUAL]
    return tuple(place for place in radii + labels if place not in LEFT_OUT)


def shown(data: Dataset, labels: int) -> tuple[Dataset, int]:
    """The first `labels` rows, again and again up to 5,000, and the epochs in which 40,000 rows are shown: equal steps for all."""
    chosen = torch.arange(min(labels, len(data.x))).repeat(max(1, USUAL // labels))
    return nets.rows(data, chosen), max(1, SHOWN // len(chosen))


def fitted(place: Place, data: Dataset, held: Dataset, setting: Setting) -> Fitted:
    """One training of the small network. Standard training does not look at the radius: one serves all."""
    plain = place.name == STANDARD
    chosen, epochs = shown(data, place.labels)
    course = Course(epochs=epochs, merit=by_clean if plain else by_robust)
    against = Against(Linf(), MIDDLE if plain else place.radius)
    name = f"tradeoff-{place.name}-{against.radius:g}-{place.labels}"
    shape = tuple(data.x.shape[1:])
    return robust.trained(name, lambda: small(shape, 10, setting.seed), LOSSES[place.name](), chosen, held, against, course, setting)


def measured(fit: Fitted, test: Dataset, few: Dataset, radii: Sequence[float], effort: str, setting: Setting) -> list[Measured]:
    """Standard error on all test images; robust accuracy, on `few` of them, at each radius."""
    threat = "linf:" + ",".join(f"{radius:g}" for radius in radii)
    found, clean = robust.audited(fit.model, few, threat, effort, setting), nets.accuracy(fit.model, test)
    return [Measured(clean, fit.best.robust, one.robust_accuracy, robust.flags(found), one.trustworthy) for one in found.results]


def everywhere(train: Dataset, held: Dataset, data: nets.Data, few: Dataset, setting: Setting) -> dict[Place, Measured]:
    """All places (every ninth in quick runs); with 5,000 labels, one standard training is measured at all radii."""
    known: dict[Place, Measured] = {}
    for place in places()[:: 9 if setting.quick else 1]:
        if place not in known:
            radii = RADII if place.name == STANDARD and place.labels == USUAL else (place.radius,)
            rates = measured(fitted(place, train, held, setting), data.test, few, radii, "fast", setting)
            known |= {Place(place.name, radius, place.labels): one for radius, one in zip(radii, rates, strict=True)}
    return known


def _line(place: Place, one: Measured) -> Line:
    right, n = one.clean
    held = "" if place.name == STANDARD else f"; PGD-10, held out: {percent(1 - one.held)}"
    told = f"standard {percent_of(n - right, n)}; robust {robust.error(one.robust)}{held}"
    return Line(f"{place.words()}: errors", NOT_READ, told, one.flags)


def _full_lines(name: str, one: Measured) -> tuple[Line, ...]:
    """The training's own figure beside the audit's."""
    words = Place(name, MIDDLE, MOST).words()
    return (
        Line(f"{words}: error under PGD-10, held out", NOT_READ, f"{percent(1 - one.held)}, n = {HELD}", "the training's own measure"),
        Line(f"{words}: robust error, effort default", "no audit published", robust.error(one.robust), one.flags),
    )


def _curves(known: dict[Place, Measured], against: Callable[[Place], float], fits: Callable[[Place], bool]) -> dict[str, list[Place]]:
    """Places of each training that lie on one axis, in order."""
    return {name: sorted((p for p in known if p.name == name and fits(p)), key=against) for name in LOSSES}


def _pictures(known: dict[Place, Measured]) -> tuple[Figure, ...]:
    """Two errors against two axes; labels stand on a scale of powers."""

    def by_labels(place: Place) -> float:
        return log10(place.labels) - 2

    axes = (
        ("radius", "eps", lambda p: p.radius, lambda p: p.labels == USUAL, [(r, f"{r:g}") for r in RADII], "5,000 labels"),
        ("labels", "labeled images", by_labels, lambda p: p.radius == MIDDLE, [(log10(n) - 2, f"{n:,}") for n in LABELS], "eps 0.2"),
    )
    drawn = []
    for name, label, against, fits, ticks, fixed in axes:
        lines = {kind: on for kind, on in _curves(known, against, fits).items() if on}
        rows = [Series(kind, index, tuple(_point(against(p), known[p]) for p in on)) for index, (kind, on) in enumerate(lines.items())]
        told = f"Robust error, audited, against {label}; {fixed}; bands are 95 % intervals, hollow points are not trusted by the audit."
        drawn.append(Figure(f"{name}-robust", figures.rates(f"Robust error against {label}", told, rows, ticks, label), told))
        curves = [figures.Curve(kind, [against(p) for p in on], [100 * known[p].error() for p in on]) for kind, on in lines.items()]
        scale = label if name == "radius" else "log10(labeled images) - 2"
        told = f"Standard error on all test images against {label}; {fixed}."
        picture = figures.lines(f"Standard error against {label}", told, curves, scale, "standard error, %")
        drawn.append(Figure(f"{name}-standard", picture, told))
    return tuple(drawn)


def _point(x: float, one: Measured) -> Point:
    return Point(x, 1 - one.robust.value, 1 - one.robust.high, 1 - one.robust.low, one.trusted)


def _findings(known: dict[Place, Measured], full: dict[str, Measured]) -> tuple[str, ...]:
    """What the figures say of interpolated training and of vertex mixup."""
    pairs = [(one, known.get(Place("PGD", p.radius, p.labels))) for p, one in known.items() if p.name == "IAT"]
    both = [(own, other) for own, other in pairs if other is not None]
    less = sum(own.error() < other.error() for own, other in both)
    weaker = sum(own.robust.value < other.robust.value for own, other in both)
    said = [
        f"IAT's standard error is smaller than PGD training's at {less} of {len(both)} places, its audited robust error larger at "
        f"{weaker} of them."
    ]
    for name, one in full.items():
        said.append(
            f"{name} under the full audit, eps 0.2, 20,000 labels: {percent(1 - one.held)} error by its own measure, "
            f"{percent(1 - one.robust.value)} audited, {'trusted' if one.trusted else 'not trusted'} by the audit ({one.flags})."
        )
    return tuple(said)


@experiment("tradeoff", title="Standard and robust error of five trainings, against radius and labels, MNIST", paper=PAPER, minutes=25)
def tradeoff(setting: Setting) -> Finding:
    """What each training pays; and two that nobody had audited."""
    data = nets.mnist(setting, 10_000)
    few = nets.mnist(setting, setting.count(AUDITED, quick=20)).test
    many = nets.mnist(setting, setting.count(FULL, quick=20)).test
    train, held = robust.split(data.train, HELD, setting)
    known = everywhere(train, held, data, few, setting)
    full = {}
    for name in THOROUGH[: 1 if setting.quick else None]:
        net = fitted(Place(name, MIDDLE, MOST), train, held, setting)
        full[name] = measured(net, data.test, many, (MIDDLE,), "default", setting)[0]
    lines = [_line(place, one) for place, one in known.items()]
    lines += [line for name, one in full.items() for line in _full_lines(name, one)]
    notes = (
        *_findings(known, full),
        f"{len(places()) - len(RADII) + 1} trainings of one network of 166,406 parameters, one each: {SHOWN:,} images shown to every one, "
        f"{STEPS} steps of search of {SHARE:g} radii, AdamW 3e-3, one cycle, batches of 128, averaged weights. {HELD} more labeled images "
        "choose the epoch. Short trainings: an order of methods, not their papers' figures.",
        f"Robust error: `epsball.audit` at effort fast, n = {AUDITED}, where no other is said; a lower bound on the true one. "
        "TRADES and AVmixup were not trained on 500 labels.",
    )
    return Finding(tuple(lines), _pictures(known), notes)
