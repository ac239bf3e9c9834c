"""Catastrophic overfitting (Kim, Lee & Lee 2021, arXiv 2010.01799): training by one step that forgets every attack but its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from epsball.attacks import fgsm, pgd
from epsball.core import Tally, Victim
from epsball.data import Dataset
from epsball.defenses.training import Adversarial, Against, Course, Loss, Record, Search, fast, fit, small
from epsball.defenses.training import pgd as pgd_training
from epsball.defenses.training.inner import clean
from epsball.defenses.training.pgd import at_adversarial
from epsball.reproduce import figures, nets
from epsball.reproduce.base import NOT_READ, Figure, Finding, Line, Setting, experiment, percent_of
from epsball.threats import Linf

PAPER = "Kim, Lee & Lee 2021, arXiv 2010.01799"
RADIUS, LEAST = 0.3, 0.05
TRAININGS: tuple[tuple[str, Loss], ...] = (
    ("FGSM", Adversarial(Search(1, 1.0, start=clean), at_adversarial)),
    ("FGSM, random start", fast()),
    ("two steps of PGD", pgd_training(steps=2, share=0.6)),
)


@dataclass(frozen=True)
class Point:
    """Held-out samples that are right after `step` steps: as they are, behind one step of FGSM, behind ten steps of PGD."""

    step: int
    plain: int
    fgsm: int
    pgd: int


@dataclass
class Watch:
    """Looks at the moving weights every `every` steps, and notes the alarms of the training, which looks once an epoch."""

    model: nn.Module
    held: tuple[Tensor, Tensor]
    every: int
    points: list[Point] = field(default_factory=list)
    alarms: list[int] = field(default_factory=list)

    def __call__(self, step: int, steps: int, record: Record | None) -> None:
        """After a step."""
        if record is not None and record.collapsed:
            self.alarms.append(step)
        if step % self.every == 0 or step == steps:
            self.points.append(self.look(step))

    def look(self, step: int) -> Point:
        """Clean, FGSM and PGD-10 at the whole radius; the noise is the same every time."""
        x, y = self.held
        with Victim(self.model, batch_size=512) as victim:
            known = victim.outputs(x, Tally.zeros(len(x)))
            right = known.argmax(1) == y
            stands = [right & ~found(victim, x, y, RADIUS, 0, clean=known).reached for found in (fgsm(), pgd(steps=10))]
        return Point(step, int(right.sum()), int(stands[0].sum()), int(stands[1].sum()))


def collapse(points: list[Point], n: int) -> int | None:
    """First step where PGD accuracy is below half of its best so far while FGSM accuracy is no lower than it was at that best.

    Bests of 5 % and less do not count.
    """
    for at, now in enumerate(points):
        best = max(points[: at + 1], key=lambda point: point.pgd)
        if best.pgd > LEAST * n and now.pgd < 0.5 * best.pgd and now.fgsm >= best.fgsm:
            return now.step
    return None


def watched(loss: Loss, train: Dataset, test: Dataset, setting: Setting) -> tuple[Watch, int]:
    """Trains the small network for 8 epochs (2 in quick runs); what was seen on the test samples, and how many steps it took."""
    model = small(tuple(train.x.shape[1:]), 10, seed=setting.seed)
    course = Course(epochs=2 if setting.quick else 8)
    per_epoch = len(train.x) // course.batch
    watch = Watch(model, (test.x, test.y), max(1, per_epoch // 10))
    fit(model, loss, (train.x, train.y), (test.x, test.y), Against(Linf(), RADIUS), course, setting.seed, progress=watch)
    return watch, per_epoch * course.epochs


@experiment("overfitting", title="Catastrophic overfitting of training by one step, MNIST, Linf 0.3", paper=PAPER, minutes=6)
def overfitting(setting: Setting) -> Finding:
    """PGD accuracy drops within a few hundred steps while FGSM accuracy goes up; a start at random or a second step changes that."""
    data = nets.mnist(setting, setting.count(500, quick=50))
    n = len(data.test.x)
    seen: dict[str, Watch] = {}
    lines: list[Line] = []
    for name, loss in TRAININGS:
        setting.say(f"training by {name}")
        watch, steps = watched(loss, data.train, data.test, setting)
        seen[name] = watch
        lines += _lines(name, watch, steps, n)
    notes = (
        f"The paper's column is from its abstract, which names neither data nor radius. Ours: radius {RADIUS}, grown over the first fifth "
        "of the steps, AdamW 3e-3, one cycle, batches of 128.",
        f"Accuracy of the moving weights on {n} test samples, every tenth of an epoch. They choose nothing here.",
        "Collapse: PGD accuracy below half of its best, FGSM accuracy no lower than at that best. The training looks once an epoch, at "
        "averaged weights, and says so in its log by the same rule.",
    )
    return Finding(tuple(lines), _pictures(seen, n), notes)


def _lines(name: str, watch: Watch, steps: int, n: int) -> tuple[Line, ...]:
    last, best = watch.points[-1], max(watch.points, key=lambda point: point.pgd)
    plain, at = name == "FGSM", collapse(watch.points, n)
    none = "not reported"
    return (
        Line(f"{name}: FGSM accuracy at the end", "toward 100 %" if plain else NOT_READ, percent_of(last.fgsm, n)),
        Line(f"{name}: PGD-10 accuracy at the end", "0 %" if plain else NOT_READ, percent_of(last.pgd, n)),
        Line(f"{name}: PGD-10 accuracy at its best", NOT_READ, f"{percent_of(best.pgd, n)}, step {best.step:,}"),
        Line(
            f"{name}: step of the collapse",
            "after a few epochs" if plain else NOT_READ,
            f"none in {steps:,}" if at is None else f"{at:,} of {steps:,}",
        ),
        Line(
            f"{name}: first alarm in the training's log", none, f"step {watch.alarms[0]:,}" if watch.alarms else f"none in {steps:,} steps"
        ),
    )


def _pictures(seen: dict[str, Watch], n: int) -> tuple[Figure, ...]:
    """Three accuracies of the FGSM training, and PGD accuracy of all trainings."""
    watch = seen["FGSM"]
    steps, at = [float(point.step) for point in watch.points], collapse(watch.points, n)
    columns = (("clean", "plain"), ("FGSM", "fgsm"), ("PGD-10", "pgd"))
    three = [figures.Curve(name, steps, [100 * getattr(point, part) / n for point in watch.points]) for name, part in columns]
    marks = [float(step) for step in (at, *watch.alarms[:1]) if step is not None]
    told = "Accuracy on test samples while FGSM training without a random start runs."
    one = figures.lines("Catastrophic overfitting", told, three, "step", "right, %", marks)
    curves = [
        figures.Curve(name, [float(point.step) for point in other.points], [100 * point.pgd / n for point in other.points])
        for name, other in seen.items()
    ]
    many = figures.lines("PGD accuracy of three trainings", "PGD-10 accuracy while three trainings run.", curves, "step", "right, %")
    return (
        Figure("fgsm", one, f"{told} Dashed: the collapse, and the first alarm in the training's log."),
        Figure("pgd", many, "PGD-10 accuracy of the three trainings."),
    )
