"""Xiao et al. 2018, arXiv 1801.02612: images whose pixels are moved; Engstrom et al. 2019, arXiv 1712.02779: rigid motions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epsball.attacks import noise
from epsball.attacks.combine import Cascade, SmallestRadius
from epsball.attacks.spatial import rotation_translation, stadv
from epsball.core import AttackLike, Victim
from epsball.data import Dataset
from epsball.reproduce import aimed, figures, nets
from epsball.reproduce.aimed import RECALLED
from epsball.reproduce.base import Figure, Finding, Line, Setting, experiment, mean_of, percent_of
from epsball.threats.flow import Rigid, roughness

PAPER = "Xiao, Zhu, Li, He, Liu & Song 2018, arXiv 1801.02612; Engstrom et al. 2019, arXiv 1712.02779"
PIXELS = 2.0
DIGITS = tuple(str(number) for number in range(10))
NOTES = (
    "The papers' figures are recalled, not read: Table 1 of Xiao et al., the MNIST rows of Engstrom et al.",
    "Networks A, B and C: layers as in the released code of arXiv 1705.07204, from which the paper took them; "
    "two epochs on 12,000 training images here.",
    "The paper's search is L-BFGS on an unbounded flow with weight 0.05 of the roughness; here ascent inside a bound on the "
    "longest displacement, with weight 0.01 unless a row says otherwise.",
    "Least displacement: per sample, by bisection of the bound.",
)


def network_a() -> nn.Module:
    """Two convolutions of 64 channels, 5 x 5, and a hidden layer of 128."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 5),
        nn.ReLU(),
        nn.Conv2d(64, 64, 5),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * 20 * 20, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
    )


def network_b() -> nn.Module:
    """Three strided convolutions behind dropout; no hidden layer."""
    return nn.Sequential(
        nn.Dropout(0.2),
        nn.Conv2d(1, 64, 8, stride=2, padding=3),
        nn.ReLU(),
        nn.Conv2d(64, 128, 6, stride=2),
        nn.ReLU(),
        nn.Conv2d(128, 128, 5),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def network_c() -> nn.Module:
    """Two convolutions of 128 and 64 channels, 3 x 3, and a hidden layer of 128."""
    return nn.Sequential(
        nn.Conv2d(1, 128, 3),
        nn.ReLU(),
        nn.Conv2d(128, 64, 3),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * 24 * 24, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
    )


@dataclass(frozen=True)
class Case:
    """A network and the paper's accuracy and success."""

    name: str
    build: Callable[[], nn.Module]
    accuracy: str
    success: str


CASES = (
    Case("A", network_a, "98.58 %", "99.95 %"),
    Case("B", network_b, "98.94 %", "99.98 %"),
    Case("C", network_c, "99.11 %", "100.00 %"),
)


def displacements(flow: Tensor) -> Tensor:
    """(N, 2, H, W) -> (N, H, W): how far each pixel is read from its place."""
    return flow.double().square().sum(1).sqrt()


def told(hits: aimed.Hits) -> str:
    """Success by a fresh look."""
    return percent_of(int(hits.reached.sum()), len(hits.reached))


def success(case: Case, net: nn.Module, aim: aimed.Aim, setting: Setting) -> list[Line]:
    """At the default weight; and where that misses, once more without the penalty."""
    steps, where = 5 if setting.quick else 100, f"up to {PIXELS:g} pixels"
    first = aimed.attacked(stadv(steps), net, aim, PIXELS, setting)
    both = aimed.attacked(Cascade((stadv(steps), stadv(steps, weight=0.0))), net, aim, PIXELS, setting)
    paper = case.success + RECALLED
    return [
        Line(f"stAdv on {case.name}, weight 0.01, {where}", paper, told(first), "ascent in a bound instead of L-BFGS"),
        Line(
            f"stAdv on {case.name}, weight 0.01, then 0, {where}",
            paper,
            told(both),
            "where the penalty outweighs the margin, it is left out",
        ),
    ]


def flows(name: str, net: nn.Module, aim: aimed.Aim, setting: Setting) -> tuple[list[Line], aimed.Hits]:
    """The paper's weight, no penalty, and the least displacement that does it, with its statistics."""
    steps = 5 if setting.quick else 100
    heavy = aimed.attacked(stadv(steps, weight=0.05), net, aim, 5.0, setting)
    least = aimed.attacked(SmallestRadius(stadv(5 if setting.quick else 40), 2 if setting.quick else 7), net, aim, 5.0, setting)
    moved = displacements(least.z[least.reached]).flatten(1)
    rough = roughness(least.z[least.reached]).tolist()
    not_given = "not given"
    return [
        Line(
            f"stAdv on {name}, weight 0.05, up to 5 pixels",
            "as above: the paper's weight",
            told(heavy),
            "every step moves all pixels alike, so flows get rough and the penalty stops them; L-BFGS finds smooth ones",
        ),
        Line(f"stAdv on {name}, least longest displacement, pixels", not_given, mean_of(least.sizes, 2), "bisected; of the successes"),
        Line(f"stAdv on {name}, mean displacement there, pixels", not_given, mean_of(moved.mean(1).tolist(), 2)),
        Line(f"stAdv on {name}, roughness there (eq. 4)", not_given, mean_of(rough, 0), "each pair of neighbors counts twice"),
    ], least


def still_right(attack: AttackLike, net: nn.Module, data: Dataset, setting: Setting) -> str:
    """Accuracy under an untargeted attack at radius 1, by a fresh look."""
    found = attack(Victim(net, batch_size=256), data.x, data.y, 1.0, setting.seed)
    return percent_of(int((nets.answers(net, found.x_adv).argmax(1) == data.y).sum()), len(data.y))


def motions(data: nets.Data, sample: Dataset, setting: Setting) -> list[Line]:
    """LeNet under rotations up to 30 degrees and translations up to 3 pixels: one at random, the worst of ten, the worst of the grid."""
    net = nets.fitted("lenet", nets.lenet, data.train, setting, epochs=2)
    setting.say("LeNet: rotations and translations")
    grid = rotation_translation(3, 3) if setting.quick else rotation_translation()
    why = "another network; theirs has more channels and a hidden layer of 1,024, and trained longer"
    kinds = (
        ("one random motion", noise(1, Rigid()), "94.23 %"),
        ("worst of 10 random motions", noise(10, Rigid()), "73.32 %"),
        (f"worst of {27 if setting.quick else 775} motions", grid, "26.02 %"),
    )
    return [
        Line("accuracy of LeNet, not moved", "99.31 %" + RECALLED, percent_of(*nets.accuracy(net, data.test)), why),
        *(Line(f"accuracy of LeNet, {what}", paper + RECALLED, still_right(a, net, sample, setting), why) for what, a, paper in kinds),
    ]


def picture(aim: aimed.Aim, hits: aimed.Hits, net: nn.Module) -> Figure:
    """Ten digits, how far their pixels moved, and what became of them."""
    columns = range(min(10, len(aim)))
    said = nets.answers(net, hits.x_adv).argmax(1)
    far = displacements(hits.z)
    grid = (
        [figures.Tile(aim.x[i].numpy(), DIGITS[int(aim.labels[i])]) for i in columns],
        [figures.Tile((far[i] / far[i].amax().clamp(min=1e-12)).numpy(), f"{hits.size[i]:.2f} px") for i in columns],
        [figures.Tile(hits.x_adv[i].numpy(), DIGITS[int(said[i])]) for i in columns],
    )
    caption = "Test images; how far each pixel is read from its place (bright is far, the longest below); the moved images with B's answer."
    return Figure("images", figures.images("stAdv at its least displacement", caption, grid, names=("clean", "flow", "moved")), caption)


@experiment("stadv", title="stAdv: images changed by moving pixels; rotations and translations", paper=PAPER, minutes=8)
def run(setting: Setting) -> Finding:
    """Table 1 on three networks; flow statistics on B; the grid of rigid motions on a LeNet."""
    count = setting.count(100, 3)
    data = nets.mnist(setting, aimed.pool(setting, count))
    part = nets.rows(data.train, torch.arange(min(12_000, len(data.train.y))))
    table: list[Line] = []
    drawn: list[Figure] = []
    for case in CASES[1:2] if setting.quick else CASES:
        net = nets.fitted(f"stadv-{case.name.lower()}", case.build, part, setting, epochs=2)
        clean = percent_of(*nets.accuracy(net, data.test))
        table.append(Line(f"accuracy of {case.name}", case.accuracy + RECALLED, clean, "less training"))
        aim = aimed.at_random(aimed.right(net, data.test, count), setting)
        setting.say(f"{case.name}: stAdv on {len(aim)} samples")
        table += success(case, net, aim, setting)
        if case.name == "B":
            lines, least = flows("B", net, aim, setting)
            table += lines
            drawn += [picture(aim, least, net), spread(least)]
    table += motions(data, nets.rows(data.test, torch.arange(count)), setting)
    return Finding(tuple(table), tuple(drawn), NOTES)


def spread(hits: aimed.Hits) -> Figure:
    """How long the longest displacement has to be."""
    caption = "Least longest displacement of stAdv's successes on B, in pixels."
    return Figure("displacement", figures.histogram("stAdv", caption, [("B", hits.sizes)], "pixels", 20), caption)
