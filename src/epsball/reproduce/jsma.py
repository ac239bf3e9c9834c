"""Papernot et al. 2016, arXiv 1511.07528: few features changed a lot, from every class to every other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from epsball.attacks import jsma
from epsball.attacks.jsma import logits, probabilities
from epsball.reproduce import aimed, figures, nets
from epsball.reproduce.aimed import RECALLED
from epsball.reproduce.base import Figure, Finding, Line, Setting, experiment, mean_of, percent_of

PAPER = "Papernot, McDaniel, Jha, Fredrikson, Celik & Swami 2016, arXiv 1511.07528"
GAMMA = 0.145
MOVES = 56  # floor(0.145 * 784 / 2): pairs that gamma allows
DIGITS = tuple(str(number) for number in range(10))
NOTES = (
    "97 % and 4.02 % are the abstract's, as public notes on the paper quote it. The other figures are recalled, not read.",
    "Distortion: changed features over 784, mean over the successes. gamma = 14.5 % allows 112 features, 56 pairs.",
    "Each image is aimed at all nine other classes, so samples of one image are not independent: the interval is a little too narrow.",
    "Saliency is over probabilities unless a row says logits; derivatives are multiplied by how far a feature can still move.",
)


@dataclass(frozen=True)
class Published:
    """The paper's success and distortion for one direction."""

    success: str
    distortion: str


INCREASE = Published("97.05 % (abstract: 97 %)", "4.02 % (abstract)")
DECREASE = Published("64.7 %" + RECALLED, "3.62 %" + RECALLED)


@dataclass(frozen=True)
class Measured:
    """One network, one direction."""

    name: str
    aim: aimed.Aim
    hits: aimed.Hits
    published: Published
    why: str

    def lines(self) -> tuple[Line, Line]:
        """Success and distortion."""
        reached, shares = self.hits.reached, [size / self.pixels for size in self.hits.sizes]
        return (
            Line(f"{self.name}: success", self.published.success, percent_of(int(reached.sum()), len(reached)), self.why),
            Line(f"{self.name}: distortion", self.published.distortion, mean_of(shares, 2, " %", 100), self.why),
        )

    @property
    def pixels(self) -> int:
        """Features of an input."""
        return self.aim.x[0].numel()

    def by_pair(self, values: Tensor, among: Tensor) -> list[list[float]]:
        """(10, 10): mean of `values` (N,) over the samples `among` (N,) of a source and a target class; NaN where there is none."""
        table = torch.full((10, 10), torch.nan, dtype=torch.float64)
        for source in range(10):
            for target in range(10):
                chosen = among & (self.aim.labels == source) & (self.aim.targets == target)
                if bool(chosen.any()):
                    table[source, target] = values[chosen].double().mean()
        rows: list[list[float]] = table.tolist()
        return rows


def heat(one: Measured) -> tuple[Figure, Figure]:
    """Success and distortion by source and target class."""
    success = one.by_pair(one.hits.reached, torch.ones_like(one.hits.reached))
    share = one.by_pair(100 * one.hits.size / one.pixels, one.hits.reached)
    texts = [[f"{value:.1f}" for value in row] for row in share]
    first = f"{one.name}: success in percent, source class by target class."
    second = f"{one.name}: mean distortion of the successes in percent."
    corner = "source, target"
    return (
        Figure("success", figures.matrix("JSMA: success", first, DIGITS, DIGITS, success, corner=corner), first),
        Figure("distortion", figures.matrix("JSMA: distortion", second, DIGITS, DIGITS, share, texts, 14.5, corner), second),
    )


def picture(one: Measured) -> Figure:
    """One image of each source class, sent to each target class; clean on the diagonal."""
    blank = torch.zeros_like(one.aim.x[0]).numpy()
    grid = []
    for source in range(10):
        row = []
        for target in range(10):
            here = (one.aim.labels == source) & ((one.aim.targets == target) if target != source else True)
            chosen = here.nonzero().squeeze(1)
            inputs = one.aim.x if target == source else one.hits.x_adv
            words = "" if target == source or not len(chosen) or bool(one.hits.reached[chosen[0]]) else "missed"
            row.append(figures.Tile(inputs[chosen[0]].numpy() if len(chosen) else blank, words))
        grid.append(row)
    caption = f"{one.name}: a test image of each class (rows) sent to each class (columns); the clean image is on the diagonal."
    return Figure("images", figures.images("JSMA: every class to every other", caption, grid, side=48, names=DIGITS), caption)


CASES = (
    ("ReLU LeNet", "lenet", nn.ReLU, (probabilities, logits)),
    ("tanh LeNet", "lenet-tanh", nn.Tanh, (probabilities,)),
)
DIRECTIONS = ((1.0, "features grow", INCREASE), (-1.0, "features shrink", DECREASE))


@experiment("jsma", title="JSMA: every class to every other by a few pixels", paper=PAPER, minutes=6)
def run(setting: Setting) -> Finding:
    """Success and distortion, features growing or shrinking, on two LeNets."""
    count = setting.count(50, 4)
    data = nets.mnist(setting, aimed.pool(setting, count))
    table, found = [], []
    for name, short, activation, kinds in CASES:
        net = nets.fitted(short, partial(nets.lenet, activation), data.train, setting, epochs=2)
        table.append(Line(f"{name}: accuracy", "98.93 %" + RECALLED, percent_of(*nets.accuracy(net, data.test)), "2 epochs of Adam"))
        aim = aimed.at_all(aimed.right(net, data.test, count), count)
        for outputs, (theta, direction, published) in product(kinds, DIRECTIONS):
            what = f"{name}, {direction}" + (", saliency of logits" if outputs is logits else "")
            setting.say(f"{what}: {len(aim)} pairs of image and target")
            attack = jsma(steps=8 if setting.quick else MOVES, theta=theta, gamma=GAMMA, outputs=outputs)
            hits = aimed.attacked(attack, net, aim, float("inf"), setting)
            why = "a weaker guide than probabilities" if outputs is logits else "another LeNet, other training"
            found.append(Measured(what, aim, hits, published, why))
            table += found[-1].lines()
    return Finding(tuple(table), (*heat(found[0]), picture(found[0])), NOTES)
