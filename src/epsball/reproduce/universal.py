"""Moosavi-Dezfooli et al. 2017, arXiv 1610.08401: one change that fools a network on most images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from epsball.attacks import deepfool
from epsball.attacks.universal import Universal, UniversalGradient, UniversalSum, cross_model_table, fooled
from epsball.reproduce import figures, nets
from epsball.reproduce.aimed import RECALLED
from epsball.reproduce.base import Figure, Finding, Line, Setting, experiment, percent_of
from epsball.threats import L2, Linf

PAPER = "Moosavi-Dezfooli, Fawzi, Fawzi & Frossard 2017, arXiv 1610.08401"
SHARE = 2000 / 50_000  # of the mean L2 length of an ImageNet image: the paper's L2 radius
LINF = 10 / 255
WHY = "CIFAR-10 and small networks instead of ImageNet"
NOTES = (
    "The paper's figures are recalled, not read: its Tables 1 and 2, ImageNet, 10,000 fit images; range over six networks.",
    "Fooled: the network's own answer changes, whatever the true class. Fit and test images are disjoint.",
    "The L2 radius is the same share of the mean length of an image as in the paper, 2,000 of about 50,000 (recalled).",
    "Sum: a running sum of DeepFool's changes, 64 images at once where the paper takes one after another, five passes. "
    "The parts have little in common here: over 500 images on the network with batch norm their sum is 6.0 % as long as all of them "
    "end to end (independent directions: 4.5 %), so the sum grows slowly. Batches of 1, 4 or 32 do alike.",
    "Gradient: one shared change climbed by mini-batches (arXiv 1811.11304), ten passes.",
)


@dataclass(frozen=True)
class Fitted:
    """One change: the network and the search it comes from, and whom of the test images it fools there (N,)."""

    network: str
    search: str
    found: Universal
    hit: Tensor

    @property
    def name(self) -> str:
        """Of rows and columns."""
        return f"{self.network}, {self.search}"


def searches(norm: Linf | L2, quick: bool) -> dict[str, UniversalSum | UniversalGradient]:
    """Both searches under one norm."""
    passes = 1 if quick else 10
    by_sum = UniversalSum(deepfool(), norm, rate=0.95, passes=1 if quick else 5, batch_size=64, reach=float("inf"))
    return {"sum": by_sum, "gradient": UniversalGradient(norm, passes=passes)}


def noise_like(delta: Tensor, radius: float, setting: Setting) -> Tensor:
    """A change of the same Linf size without a search: a random sign everywhere."""
    draw = torch.Generator().manual_seed(setting.seed)
    return radius * (2.0 * torch.randint(0, 2, delta.shape, generator=draw) - 1)


def told(hit: Tensor) -> str:
    """A fooling rate with its interval."""
    return percent_of(int(hit.sum()), len(hit))


def measured(net: nn.Module, name: str, norm: Linf | L2, radius: float, fit: Tensor, test: Tensor, setting: Setting) -> list[Fitted]:
    """Both searches on one network under one norm."""
    found = []
    for search, make in searches(norm, setting.quick).items():
        setting.say(f"{name}: {search} under {norm.name}, {len(fit)} fit images")
        one = make(net, fit, radius, setting.seed)
        found.append(Fitted(name, search, one, fooled(net, test, one.delta)))
    return found


def lines(norm: str, paper: str, found: list[Fitted]) -> list[Line]:
    """Fooling rates on test images, and on the fit set where the paper gives them."""
    table = []
    for one in found:
        table.append(Line(f"{norm}, {one.name}: fooled test images", paper, told(one.hit), WHY))
        forwards, backwards = (rows / len(one.found.fooled) for rows in (one.found.queries, one.found.backwards))
        cost = f"{forwards:.0f} forwards and {backwards:.0f} backwards per fit image"
        table.append(Line(f"{norm}, {one.name}: fooled fit images", "not given per norm", told(one.found.fooled), cost))
    return table


def crossed(nets_by_name: dict[str, nn.Module], found: list[Fitted], x: Tensor) -> Figure:
    """Fitted on one network, measured on another."""
    table = cross_model_table(nets_by_name, {one.name: one.found.delta for one in found}, x)
    names, columns = list(table), list(nets_by_name)
    values = [[table[source][name] for name in columns] for source in names]
    caption = f"Fooling rates in percent on {len(x):,} test images under Linf 10/255: change fitted on (rows), measured on (columns)."
    drawn = figures.matrix("Universal changes across networks", caption, names, columns, values, corner="fitted on")
    return Figure("cross", drawn, caption)


def visible(delta: Tensor) -> NDArray[np.float32]:
    """Gray where nothing changes, the largest change black or white."""
    return (0.5 + delta / (2 * delta.abs().amax().clamp(min=1e-12))).numpy()


def pictures(net: nn.Module, shown: Fitted, found: list[Fitted], x: Tensor, classes: tuple[str, ...]) -> tuple[Figure, Figure]:
    """All changes, and the one `shown` on some images."""
    names = list(dict.fromkeys(one.network for one in found))
    rows = [[figures.Tile(visible(one.found.delta), one.search) for one in found if one.network == name] for name in names]
    first = "Universal changes under Linf 10/255, stretched to full contrast."
    x = x[:8]
    x_adv = (x + shown.found.delta).clamp(0, 1)
    before, after = (nets.answers(net, inputs).argmax(1).tolist() for inputs in (x, x_adv))
    grid = [
        [figures.Tile(x[i].numpy(), classes[before[i]]) for i in range(len(x))],
        [figures.Tile(x_adv[i].numpy(), classes[after[i]]) for i in range(len(x))],
    ]
    second = f"Test images with {shown.network}'s answers, without and with the one change of the search '{shown.search}'."
    return (
        Figure("changes", figures.images("Universal changes", first, rows, side=128, names=names), first),
        Figure("images", figures.images("Images with a universal change", second, grid, names=("clean", "changed")), second),
    )


@experiment("universal", title="Universal changes: one for all images", paper=PAPER, needs=("cifar",), minutes=8)
def run(setting: Setting) -> Finding:
    """Tables 1 and 2: fooling rates under Linf and L2, and across networks."""
    count = setting.count(1000, 60)
    data = nets.cifar(setting, count)
    fit, test = data.train.x[: 40 if setting.quick else 2000], data.test.x
    both: dict[str, nn.Module] = {
        "batch norm": nets.fitted_cifar(data, setting),
        "strided": nets.fitted("cifar-cnn", nets.cifar_cnn, data.train, setting, epochs=4, rate=2e-3),
    }
    table = [Line(f"accuracy of {name}", "not comparable", percent_of(*nets.accuracy(net, data.test)), WHY) for name, net in both.items()]
    flat = [one for name, net in both.items() for one in measured(net, name, Linf(), LINF, fit, test, setting)]
    table += lines("Linf 10/255", "77.8 to 93.7 %" + RECALLED, flat)
    signs = noise_like(fit[0], LINF, setting)
    for name, net in both.items():
        floor = fooled(net, test, signs)
        table.append(Line(f"Linf 10/255, {name}: random signs", "about 10 %" + RECALLED, told(floor), "no search: the floor"))
    radius = SHARE * float(fit.double().flatten(1).norm(dim=1).mean())
    round_ones = measured(both["batch norm"], "batch norm", L2(), radius, fit, test, setting)
    table += lines(f"L2 {radius:.2f}", "83 to 90.3 %" + RECALLED, round_ones)
    classes = data.test.class_names or tuple(str(number) for number in range(10))
    return Finding(tuple(table), (*pictures(both["batch norm"], flat[1], flat, test, classes), crossed(both, flat, test)), NOTES)
