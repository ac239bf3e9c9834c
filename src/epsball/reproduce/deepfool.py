"""Moosavi-Dezfooli et al. 2016, arXiv 1511.04599: how far the boundary is, by DeepFool, by FGSM and by L-BFGS."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epsball.attacks import deepfool, fgsm, lbfgs
from epsball.core import AttackLike, Victim
from epsball.data import Dataset
from epsball.reproduce import figures, nets
from epsball.reproduce.aimed import RECALLED
from epsball.reproduce.base import Figure, Finding, Line, Setting, experiment, mean_of, percent_of
from epsball.threats import L2, Linf

PAPER = "Moosavi-Dezfooli, Fawzi & Frossard 2016, arXiv 1511.04599"
NOWHERE = (-math.inf, math.inf)
NET = "other training and, on CIFAR-10, another network"
NOTES = (
    "rho = mean of |r| / |x| over all samples whose answer changed; the label is the network's own answer, as in the paper's definition.",
    "The paper's figures are recalled, not read: its Tables 1 (L2) and 2 (Linf).",
    "FGSM's strength is searched on a grid of 80 values from 0.001 to 2, a factor of 1.1 apart, per sample (its first success) or as "
    "the one value that fools 90 % of the samples at once.",
    "Rows without 'no box' stay in [0, 1]; the paper does not speak of a box.",
)


@dataclass(frozen=True)
class Case:
    """One network and the paper's figures: test error, then rho under L2 and Linf by DeepFool and FGSM, and by L-BFGS under L2."""

    name: str
    net: nn.Module
    test: Dataset
    error: str
    deep: tuple[str, str]
    sign: tuple[str, str]
    lbfgs: str


def lengths(change: Tensor, p: float) -> Tensor:
    """(N,) float64."""
    length: Tensor = torch.linalg.vector_norm(change.double().flatten(1), p, dim=1)
    return length


def shares(x: Tensor, x_adv: Tensor, p: float) -> Tensor:
    """|r| / |x| per sample."""
    return lengths(x_adv.double() - x.double(), p) / lengths(x, p)


def changed(net: nn.Module, x: Tensor, x_adv: Tensor) -> Tensor:
    """(N,) bool: whose answer is another."""
    return nets.answers(net, x).argmax(1) != nets.answers(net, x_adv).argmax(1)


@dataclass(frozen=True)
class Walk:
    """What one search found: shares |r| / |x| under its norm (N,), and whose answer a fresh look finds changed (N,)."""

    rho: Tensor
    fooled: Tensor

    def told(self) -> str:
        """The mean with its interval, and how many were fooled where not all were."""
        said = mean_of(self.rho[self.fooled].tolist(), 3)
        return said if bool(self.fooled.all()) else f"{said}; fooled {percent_of(int(self.fooled.sum()), len(self.fooled))}"


def walked(attack: AttackLike, net: nn.Module, x: Tensor, p: float, box: tuple[float, float], setting: Setting) -> Walk:
    """Any search for the smallest change, from the network's own answers."""
    reach = float("inf") if box == (0.0, 1.0) else 100.0
    found = attack(Victim(net, box=box, batch_size=256), x, nets.answers(net, x).argmax(1), reach, setting.seed)
    return Walk(shares(x, found.x_adv, p), changed(net, x, found.x_adv))


def signed(net: nn.Module, x: Tensor, box: tuple[float, float], setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """FGSM at every strength of the grid: fooled (E, N), and |r| / |x| under L2 and Linf, (E, N) each."""
    grid = torch.logspace(math.log10(0.001), math.log10(2.0), 8 if setting.quick else 80, dtype=torch.float64)
    victim, labels = Victim(net, box=box, batch_size=1000), nets.answers(net, x).argmax(1)
    rows = []
    for radius in grid.tolist():
        x_adv = fgsm()(victim, x, labels, radius, setting.seed).x_adv
        rows.append((changed(net, x, x_adv), shares(x, x_adv, 2), shares(x, x_adv, math.inf)))
    fooled, two, most = (torch.stack(column) for column in zip(*rows, strict=True))
    return fooled, two, most


def earliest(fooled: Tensor, rho: Tensor) -> Walk:
    """Per sample: its first success on the grid, both (E, N) from weak to strong."""
    first = fooled.int().argmax(0, keepdim=True)
    return Walk(rho.gather(0, first).squeeze(0), fooled.any(0))


def at_ninety(fooled: Tensor, rho: Tensor) -> str:
    """The weakest strength at which 90 % are fooled, for all samples at once."""
    enough = (fooled.double().mean(1) >= 0.9).nonzero().squeeze(1)
    return mean_of(rho[enough[0]].tolist(), 3) if len(enough) else "no strength of the grid fools 90 %"


def measured(case: Case, setting: Setting) -> tuple[list[Line], dict[str, Tensor]]:
    """The table of one network, and what its histogram shows."""
    net, x = case.net, case.test.x
    setting.say(f"{case.name}: DeepFool, FGSM and L-BFGS on {len(x)} samples")
    correct, n = nets.accuracy(net, case.test)
    two, most = (walked(deepfool(threat=t), net, x, p, (0.0, 1.0), setting) for t, p in ((L2(), 2.0), (Linf(), math.inf)))
    free, free_most = (walked(deepfool(threat=t), net, x, p, NOWHERE, setting) for t, p in ((L2(), 2.0), (Linf(), math.inf)))
    fooled, sign_two, sign_most = signed(net, x, (0.0, 1.0), setting)
    loose, loose_two, loose_most = signed(net, x, NOWHERE, setting)
    few = x[: max(1, len(x) // 2)]
    quasi = walked(lbfgs(5, 2) if setting.quick else lbfgs(), net, few, 2.0, (0.0, 1.0), setting)
    best = earliest(fooled, sign_two)
    deep, sign = ([figure + RECALLED for figure in pair] for pair in (case.deep, case.sign))
    table = [
        Line(f"{case.name}: test error", case.error + RECALLED, percent_of(n - correct, n), NET),
        Line(f"{case.name}: rho L2, DeepFool", deep[0], two.told(), NET),
        Line(f"{case.name}: rho L2, DeepFool, no box", deep[0], free.told(), NET),
        Line(f"{case.name}: rho L2, L-BFGS", case.lbfgs + RECALLED, quasi.told(), "batched, c bisected; more looks than the paper's"),
        Line(f"{case.name}: rho L2, FGSM, each sample's least strength", sign[0], best.told(), "the paper: see the next row"),
        Line(f"{case.name}: rho L2, FGSM, one strength that fools 90 %", sign[0], at_ninety(fooled, sign_two), NET),
        Line(f"{case.name}: rho L2, FGSM, one strength, no box", sign[0], at_ninety(loose, loose_two), NET),
        Line(f"{case.name}: rho Linf, DeepFool", deep[1], most.told(), NET),
        Line(f"{case.name}: rho Linf, DeepFool, no box", deep[1], free_most.told(), NET),
        Line(f"{case.name}: rho Linf, FGSM, each sample's least strength", sign[1], earliest(fooled, sign_most).told(), NET),
        Line(f"{case.name}: rho Linf, FGSM, one strength, no box", sign[1], at_ninety(loose, loose_most), NET),
    ]
    return table, {"DeepFool": two.rho[two.fooled], "FGSM": best.rho[best.fooled], "L-BFGS": quasi.rho[quasi.fooled]}


def cases(setting: Setting, count: int) -> tuple[Case, ...]:
    """Three networks of the paper's tables, the third one only alike."""
    digits, photos = nets.mnist(setting, count), nets.cifar(setting, count)
    small = nets.fitted("mlp-500-150", lambda: nets.mlp(500, 150), digits.train, setting, epochs=4)
    convolved = nets.fitted("lenet", nets.lenet, digits.train, setting, epochs=2)
    colored = nets.fitted_cifar(photos, setting)
    return (
        Case("MNIST, LeNet", convolved, digits.test, "1 %", ("0.20", "0.10"), ("1.0", "0.26"), "0.25"),
        Case("MNIST, FC500-150-10", small, digits.test, "1.7 %", ("0.11", "0.04"), ("0.39", "0.11"), "0.12"),
        Case("CIFAR-10, batch norm", colored, photos.test, "22.6 %", ("0.030", "0.015"), ("0.13", "0.028"), "0.039"),
    )


def picture(case: Case, setting: Setting) -> Figure:
    """Ten images, DeepFool's change made visible, and the changed images."""
    x = case.test.x[:: max(1, len(case.test.x) // 8)][:8]
    said = nets.answers(case.net, x).argmax(1)
    x_adv = deepfool()(Victim(case.net), x, said, float("inf"), setting.seed).x_adv
    after = nets.answers(case.net, x_adv).argmax(1)
    seen = [(0.5 + change / (2 * change.abs().amax().clamp(min=1e-12))).numpy() for change in x_adv - x]
    share = shares(x, x_adv, 2)
    grid = (
        [figures.Tile(x[i].numpy(), str(int(said[i]))) for i in range(len(x))],
        [figures.Tile(seen[i], f"{share[i]:.2g}") for i in range(len(x))],
        [figures.Tile(x_adv[i].numpy(), str(int(after[i]))) for i in range(len(x))],
    )
    caption = f"{case.name}: clean images and answers; DeepFool's L2 change, stretched to full contrast, with |r| / |x|; changed images."
    return Figure("images", figures.images("DeepFool", caption, grid, names=("clean", "change", "changed")), caption)


@experiment(
    "deepfool",
    title="DeepFool: the distance to the boundary against FGSM and L-BFGS",
    paper=PAPER,
    needs=("mnist", "cifar"),
    minutes=7,
)
def run(setting: Setting) -> Finding:
    """Tables 1 and 2: rho, the mean relative distance."""
    table: list[Line] = []
    drawn: list[Figure] = []
    for case in cases(setting, setting.count(200, 20)):
        lines, found = measured(case, setting)
        table += lines
        caption = f"{case.name}: |r| / |x| under L2 of the samples whose answer changed."
        groups = [(name, [min(float(v), 1.5) for v in values]) for name, values in found.items()]
        name = "rho-" + case.name.split(", ")[-1].lower().replace(" ", "-")
        drawn.append(Figure(name, figures.histogram(case.name, caption, groups, "|r| / |x|, capped at 1.5"), caption))
        if not drawn[1:]:
            drawn.append(picture(case, setting))
    return Finding(tuple(table), tuple(drawn), NOTES)
