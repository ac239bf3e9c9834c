"""Goodfellow, Shlens & Szegedy 2015, arXiv 1412.6572, appendix A: rubbish that a network takes for a digit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from epsball.attacks import fgsm
from epsball.core import Key, Targeted, Victim
from epsball.reproduce import figures, nets
from epsball.reproduce.base import NOT_READ, Figure, Finding, Line, Setting, experiment, mean_of, percent_of
from epsball.reproduce.fgsm import EVERYWHERE, PAPER, SOURCE, fitted_maxout, fitted_softmax

CLASSES = 10
STEP = 0.25


@experiment("rubbish", title="Gaussian rubbish and fooling images by one step, MNIST", paper=PAPER + ", appendix A", minutes=6)
def rubbish(setting: Setting) -> Finding:
    """An input that shows no digit counts as an error where any class has a probability above one half."""
    data = nets.mnist(setting, 10)
    count = setting.count(10_000, quick=100)
    noise = gaussian(setting.seed, count)
    maxout, softmax = fitted_maxout(setting, data), fitted_softmax(setting, data)
    lines = (
        *_taken("maxout", maxout, noise, "98.35 %", "92.8 %", "a network of the same size, trained in another way"),
        *_skew(maxout, noise),
        *_taken("softmax regression", softmax, noise, "59.8 %", "70.8 %", "longer training gives larger weights, hence more confidence"),
        *_clipped(maxout, softmax, noise),
        *_fooled("maxout", maxout, noise, setting),
        *_fooled("softmax regression", softmax, noise, setting),
    )
    picture = figures.images(
        "Fooling images",
        "Uniform noise and the same noise behind one step towards each digit, with the class and its probability.",
        _grid(maxout, setting),
        side=60,
        names=("noise", *(f"to {label}" for label in range(CLASSES))),
    )
    caption = f"Noise in [0, 1] and one clipped FGSM step of {STEP:g} towards each class, maxout network: five draws."
    return Finding(lines, (Figure("images", picture, caption),), (SOURCE,))


def gaussian(seed: int, count: int) -> Tensor:
    """(count, 1, 28, 28) standard normal, keyed by the row's number: x ~ N(0, I)."""
    return Key.of(seed).fold("rubbish").normal(torch.arange(count), torch.empty(count, 1, 28, 28))


def _taken(name: str, net: nn.Module, x: Tensor, error: str, sure: str, why: str) -> tuple[Line, ...]:
    found = nets.answers(net, x).softmax(1).amax(1)
    taken = found > 0.5
    return (
        Line(f"{name}: Gaussian noise taken for a digit (p > 0.5)", error, percent_of(int(taken.sum()), len(taken)), why),
        Line(f"{name}: mean confidence on those", sure, mean_of(found[taken].tolist(), 1, " %", 100), why),
    )


def _skew(net: nn.Module, x: Tensor) -> tuple[Line, ...]:
    found = nets.answers(net, x).softmax(1).max(1)
    counts = torch.bincount(found.indices[found.values > 0.5], minlength=CLASSES)
    total, most, least = int(counts.sum()), int(counts.argmax()), int(counts.argmin())
    why = "which digit rubbish looks like differs from training to training"
    return (
        Line("maxout: most frequent class of those", "45.3 % are 5s", f"{most}: {percent_of(int(counts[most]), total)}", why),
        Line("maxout: rarest class of those", "none is an 8", f"{least}: {percent_of(int(counts[least]), total)}", why),
    )


def _clipped(maxout: nn.Module, softmax: nn.Module, noise: Tensor) -> tuple[Line, ...]:
    lines = []
    for name, net in (("maxout", maxout), ("softmax regression", softmax)):
        taken = nets.answers(net, noise.clamp(0, 1)).softmax(1).amax(1) > 0.5
        said = percent_of(int(taken.sum()), len(taken))
        lines.append(Line(f"{name}: the same noise clipped to [0, 1]", "not reported", said, "legal images, half of their pixels black"))
    return tuple(lines)


def _fooled(name: str, net: nn.Module, noise: Tensor, setting: Setting) -> tuple[Line, ...]:
    """One FGSM step from each of some draws towards each of the ten classes; success means p(class) > 0.5."""
    x = noise[: 20 if setting.quick else 1000]
    shares = []
    for label in range(CLASSES):
        x_adv = towards(net, x, label, EVERYWHERE)
        shares.append(int((nets.answers(net, x_adv).softmax(1)[:, label] > 0.5).sum()))
    easy, hard = shares.index(max(shares)), shares.index(min(shares))
    n = len(x)
    cifar = "CIFAR-10 only: 100 % (frogs, trucks)", "CIFAR-10 only: 24.7 % (airplanes)"
    why = f"one unclipped FGSM step of {STEP:g} on N(0, I); p(target) > 0.5. The paper's figures are of another data set and step"
    return (
        Line(f"{name}: noise made a chosen digit by one step, all classes", NOT_READ, percent_of(sum(shares), n * CLASSES), why),
        Line(f"{name}: easiest class ({easy})", cifar[0], percent_of(shares[easy], n), why),
        Line(f"{name}: hardest class ({hard})", cifar[1], percent_of(shares[hard], n), why),
    )


def towards(net: nn.Module, x: Tensor, label: int, box: tuple[float, float]) -> Tensor:
    """x behind one FGSM step towards a class; unchanged where the network gives that class anyway."""
    goal = Targeted(torch.full((len(x),), label))
    return fgsm()(Victim(net, box=box, batch_size=1000), x, goal, STEP).x_adv


def _grid(net: nn.Module, setting: Setting) -> list[list[figures.Tile]]:
    x = Key.of(setting.seed).fold("fooling").uniform(torch.arange(5), torch.empty(5, 1, 28, 28))
    rows = [x, *(towards(net, x, label, (0.0, 1.0)) for label in range(CLASSES))]
    grid = []
    for row in rows:
        found = nets.answers(net, row).softmax(1).max(1)
        said = zip(row, found.indices.tolist(), found.values.tolist(), strict=True)
        grid.append([figures.Tile(image.numpy(), f"{c}, {100 * p:.0f} %") for image, c, p in said])
    return grid
