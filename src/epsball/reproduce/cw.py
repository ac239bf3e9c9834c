"""Carlini & Wagner 2017, arXiv 1608.04644: the smallest targeted changes under L0, L2 and Linf, on MNIST and CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from epsball.attacks import cw_l0, cw_l2, cw_linf, fmn
from epsball.core import Attack
from epsball.data import Dataset
from epsball.reproduce import aimed, figures, nets
from epsball.reproduce.aimed import RECALLED
from epsball.reproduce.base import Figure, Finding, Line, Setting, experiment, mean_of, percent_of
from epsball.threats import named

PAPER = "Carlini & Wagner 2017, arXiv 1608.04644"
NET = "another network (see the notes); their pixels span 1 too, so distances compare"
NOTES = (
    "The paper's figures are recalled, not read: its Table IV, 1,000 images, all attacks at 100 % success.",
    "Distances are means over the successes. Best and worst case: the nearest and the farthest of all nine targets of an image.",
    "MNIST network: the layers of the released code (convolutions 32, 32, 64, 64; 200, 200), two epochs instead of 50. "
    "CIFAR-10: a smaller network with batch norm, four epochs on 30,000 JPEG-compressed training images; the paper's is right on 80 %.",
    "FMN (arXiv 2102.12827) searches the same samples by another method: where both agree, the distance is that of the network, "
    "not a shortfall of the search.",
)


@dataclass(frozen=True)
class Case:
    """One norm: its attack and unit, and the paper's means (average, best and worst case)."""

    norm: str
    digits: int
    mnist: tuple[str, str, str]
    cifar: tuple[str, str, str]

    def attack(self, quick: bool) -> Attack:
        """The norm's own; a few looks only in quick runs."""
        make = {"l0": cw_l0, "l2": cw_l2, "linf": cw_linf}[self.norm]
        return make(steps=10, rounds=3) if quick else make()


CASES = (
    Case("l2", 3, ("1.76", "1.36", "2.60"), ("0.33", "0.17", "0.51")),
    Case("l0", 1, ("16", "8.5", "33"), ("13", "5.9", "24")),
    Case("linf", 4, ("0.16", "0.13", "0.23"), ("0.013", "0.0092", "0.019")),
)


def network() -> nn.Module:
    """The released code's MNIST network; `train_models.py` of carlini/nn_robust_attacks."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 200),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, 10),
    )


@dataclass(frozen=True)
class Measured:
    """One norm on one network: at random targets, by FMN there too, and at all targets of fewer images (9 rows an image)."""

    case: Case
    random: aimed.Hits
    check: aimed.Hits
    every: aimed.Hits

    def extreme(self, worst: bool) -> list[float]:
        """The farthest or the nearest target of every image all of whose targets were reached."""
        size, done = self.every.size.reshape(-1, 9), self.every.reached.reshape(-1, 9).all(1)
        return [float(v) for v in (size.amax(1) if worst else size.amin(1))[done]]


def lines(where: str, one: Measured, published: tuple[str, str, str]) -> tuple[Line, ...]:
    """Success, the three means, and FMN's."""
    name, digits = f"{where}, {one.case.norm}", one.case.digits
    average, best, worst = (figure + RECALLED for figure in published)
    reached, every = one.random.reached, one.every.reached
    return (
        Line(f"{name}: success, random target", "100 %" + RECALLED, percent_of(int(reached.sum()), len(reached))),
        Line(f"{name}: mean distance, random target", average, mean_of(one.random.sizes, digits), NET),
        Line(f"{name}: the same by FMN", "not measured", mean_of(one.check.sizes, digits), "a check of the search on the same samples"),
        Line(f"{name}: success, all nine targets", "100 %" + RECALLED, percent_of(int(every.sum()), len(every))),
        Line(f"{name}: mean distance, nearest of nine targets", best, mean_of(one.extreme(worst=False), digits), NET),
        Line(f"{name}: mean distance, farthest of nine targets", worst, mean_of(one.extreme(worst=True), digits), NET),
    )


def measured(where: str, net: nn.Module, random: aimed.Aim, every: aimed.Aim, setting: Setting) -> list[Measured]:
    """All three norms."""
    found = []
    for case in CASES:
        attack, second = case.attack(setting.quick), fmn(steps=20 if setting.quick else 200, threat=named(case.norm))
        setting.say(f"{where}: {attack.name} on {len(random)} samples at a random target, {len(every.x) // 9} at all targets")
        hits = (aimed.attacked(a, net, aim, float("inf"), setting) for a, aim in ((attack, random), (second, random), (attack, every)))
        found.append(Measured(case, *hits))
    return found


def picture(where: str, net: nn.Module, data: Dataset, random: aimed.Aim, found: list[Measured]) -> Figure:
    """Test images, and the same images sent to their random target under each norm."""
    columns = range(min(8, len(random)))
    classes = data.class_names or tuple(str(number) for number in range(10))
    grid = [[figures.Tile(random.x[i].numpy(), classes[int(random.labels[i])]) for i in columns]]
    for one in found:
        said = nets.answers(net, one.random.x_adv).argmax(1)
        grid.append([figures.Tile(one.random.x_adv[i].numpy(), f"{classes[int(said[i])]}, {one.random.size[i]:.2g}") for i in columns])
    caption = f"{where}: test images, and what C&W made of them for a random target; below each the network's answer and the distance."
    drawn = figures.images(f"C&W on {where}", caption, grid, names=("clean", *(one.case.norm for one in found)))
    return Figure(where.lower(), drawn, caption)


@experiment("cw", title="C&W: the smallest targeted changes under L0, L2 and Linf", paper=PAPER, needs=("mnist", "cifar"), minutes=8)
def run(setting: Setting) -> Finding:
    """Table IV: mean distances of the three attacks on both data sets."""
    count, few = setting.count(60, 3), 1 if setting.quick else 8
    size = aimed.pool(setting, count)
    digits, photos = nets.mnist(setting, size), nets.cifar(setting, size)
    cases = (
        ("MNIST", nets.fitted("cw-mnist", network, digits.train, setting, epochs=2), digits.test, "99.5 %"),
        ("CIFAR", nets.fitted_cifar(photos, setting), photos.test, "80 %"),
    )
    table: list[Line] = []
    drawn: list[Figure] = []
    for where, net, test, published in cases:
        correct, n = nets.accuracy(net, test)
        sample = aimed.right(net, test, count)
        random, every = aimed.at_random(sample, setting), aimed.at_all(sample, few)
        found = measured(where, net, random, every, setting)
        table.append(Line(f"{where}: accuracy", published + RECALLED, percent_of(correct, n), NET))
        table += [line for one in found for line in lines(where, one, one.case.mnist if where == "MNIST" else one.case.cifar)]
        drawn.append(picture(where, net, test, random, found))
    return Finding(tuple(table), tuple(drawn), NOTES)
