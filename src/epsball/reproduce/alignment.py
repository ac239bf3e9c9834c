"""Perceptually aligned gradients (Ganz, Kawar & Elad 2022, arXiv 2207.11378): measured, pictured, and whether they make robust."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.attacks import pgd
from epsball.auditing.results import ModelReport, Rate
from epsball.core import Targeted, Victim
from epsball.data import Dataset
from epsball.defenses.training import Against, Course, Direction, Loss, Standard, by_clean, by_robust, class_mean, nearest, small
from epsball.defenses.training import pgd as pgd_training
from epsball.reproduce import figures, nets, robust
from epsball.reproduce.base import NOT_READ, Figure, Finding, Line, Setting, experiment, mean_of, percent_of
from epsball.threats import L2

PAPER = "Ganz, Kawar & Elad 2022, arXiv 2207.11378"
ROWS, SHOWN, HELD, AUDITED, SEEN = 10_000, 40_000, 300, 300, 200
RADIUS, FAR = 1.5, 6.0
THREATS = ("l2:1.5", "linf:0.1")
STANDARD, PGD, MEAN, NEAREST = "standard", "PGD, L2 1.5", "PAG, class mean", "PAG, nearest"
CLASSES = 10


@dataclass(frozen=True)
class Seen:
    """What a network shows: cosines of its input gradients with two directions, (N,) each; pictures aimed at `targets`, (N, ...)."""

    mean: Tensor
    nearest: Tensor
    pictures: Tensor
    alike: Tensor


def losses(data: Dataset) -> dict[str, Callable[[], Loss]]:
    """The trainings by name; PAG looks at the data for its directions."""
    pair = (data.x, data.y)
    return {
        STANDARD: Standard,
        PGD: lambda: pgd_training(steps=5, share=0.35),
        MEAN: lambda: class_mean(pair),
        NEAREST: lambda: nearest(pair),
    }


def trained(name: str, loss: Loss, data: Dataset, held: Dataset, setting: Setting) -> nn.Module:
    """The small network; the radius is used by PGD training, and measures the others."""
    course = Course(epochs=max(1, SHOWN // len(data.x)), merit=by_robust if name == PGD else by_clean)
    shape = tuple(data.x.shape[1:])
    against, folder = Against(L2(), RADIUS), f"alignment-{name.replace(', ', '-')}"
    return robust.trained(folder, lambda: small(shape, CLASSES, setting.seed), loss, data, held, against, course, setting).model


def alignment_of(net: nn.Module, x: Tensor, direction: Direction) -> Tensor:
    """(N,) cosine of the gradient of log p(c | x) with the direction to class c, mean over all classes c. Cost: C backwards a sample."""
    leaf = x.detach().requires_grad_()
    known = net(leaf).log_softmax(1)
    cosines = []
    for c in range(known.shape[1]):
        (gradient,) = torch.autograd.grad(known[:, c].sum(), leaf, retain_graph=True)
        wanted = direction(x, torch.full((len(x),), c))
        cosines.append(F.cosine_similarity(gradient.flatten(1), wanted.flatten(1), eps=1e-12))
    return torch.stack(cosines).mean(0)


def aimed(net: nn.Module, x: Tensor, targets: Tensor, seed: int) -> Tensor:
    """Where 60 steps of PGD under L2 6 arrive that raise log p(target); all steps are taken, but from where the target is the top class."""
    attack = pgd(steps=60, step=0.3, threat=L2())
    return attack(Victim(net), x, Targeted(targets), FAR, seed=seed, drop=False).x_adv


def nearest_class(x: Tensor, data: Dataset) -> Tensor:
    """(N,) class of the nearest training image: a judge without a gradient."""
    return data.y[torch.cdist(x.flatten(1), data.x.flatten(1)).argmin(1)]


def look(net: nn.Module, test: Dataset, data: Dataset, setting: Setting) -> Seen:
    """Cosines and pictures on test images, aimed at the next class."""
    pair, targets = (data.x, data.y), (test.y + 1) % CLASSES
    pictures = aimed(net, test.x, targets, setting.seed)
    return Seen(
        alignment_of(net, test.x, class_mean(pair).direction),
        alignment_of(net, test.x, nearest(pair).direction),
        pictures,
        nearest_class(pictures, data) == targets,
    )


def _lines(name: str, net: nn.Module, seen: Seen, data: nets.Data, found: ModelReport) -> tuple[Line, ...]:
    """Errors, cosines, the judge's word, and what the audit leaves."""
    right, n = nets.accuracy(net, data.test)
    hits = int(seen.alike.sum())
    audits = (
        Line(f"{name}: robust accuracy, {one.threat} {one.radius_text}, audited", NOT_READ, _rate(one.robust_accuracy), robust.flags(found))
        for one in found.results
    )
    return (
        Line(f"{name}: standard error", NOT_READ, percent_of(n - right, n)),
        Line(f"{name}: cosine of gradients with class mean - x", NOT_READ, mean_of(seen.mean.tolist(), 3)),
        Line(f"{name}: cosine of gradients with nearest of the class - x", NOT_READ, mean_of(seen.nearest.tolist(), 3)),
        Line(f"{name}: aimed pictures whose nearest training image is of the target class", NOT_READ, percent_of(hits, len(seen.alike))),
        *audits,
    )


def _rate(rate: Rate) -> str:
    return percent_of(rate.count, rate.n)


def _picture(test: Dataset, seen: dict[str, Seen]) -> Figure:
    """One test image of each class where there is one, and where each network's gradient takes it."""
    chosen = [int((test.y == c).nonzero()[0, 0]) for c in range(CLASSES) if bool((test.y == c).any())]
    clean = [figures.Tile(test.x[at].numpy(), f"{int(test.y[at])} to {(int(test.y[at]) + 1) % CLASSES}") for at in chosen]
    rows = [[figures.Tile(one.pictures[at].numpy()) for at in chosen] for one in seen.values()]
    told = f"Test images, and the same behind 60 steps toward the next class within L2 {FAR:g}, by each network's own gradients."
    return Figure("pictures", figures.images("Aimed pictures", told, [clean, *rows], names=("clean", *seen)), told)


def _finding(stands: dict[str, tuple[float, ...]], seen: dict[str, Seen]) -> tuple[str, ...]:
    """Cosines beside audits: robust networks are aligned; are aligned networks robust?"""
    said = [
        f"{name}: cosine {float(one.mean.mean()):.2f} with class means, {float(one.nearest.mean()):.2f} with nearest images; "
        + ", ".join(f"{100 * value:.1f} % stand at {threat}" for threat, value in zip(THREATS, stands[name], strict=True))
        for name, one in seen.items()
    ]
    best = max((MEAN, NEAREST), key=lambda name: stands[name][0])
    return (
        f"Does alignment make robust? The better of both, {best}, stands for {100 * stands[best][0]:.1f} % at {THREATS[0]}, where standard "
        f"training leaves {100 * stands[STANDARD][0]:.1f} % and PGD training {100 * stands[PGD][0]:.1f} %.",
        *said,
    )


@experiment("alignment", title="Perceptually aligned gradients and robustness, both ways, MNIST", paper=PAPER, minutes=10)
def alignment(setting: Setting) -> Finding:
    """Cosines, pictures and audits of four trainings: does alignment make robust, as robustness makes aligned?"""
    data = nets.mnist(setting, 10_000)
    few = nets.mnist(setting, setting.count(AUDITED, quick=20)).test
    shown = nets.rows(few, torch.arange(min(SEEN, len(few.x))))
    train, held = robust.split(data.train, HELD, setting)
    train = nets.rows(train, torch.arange(min(ROWS, len(train.x))))
    lines: list[Line] = []
    seen: dict[str, Seen] = {}
    stands: dict[str, tuple[float, ...]] = {}
    for name, loss in losses(train).items():
        net = trained(name, loss(), train, held, setting)
        seen[name] = look(net, shown, train, setting)
        found = robust.audited(net, few, THREATS, "default", setting)
        stands[name] = tuple(one.robust_accuracy.value for one in found.results)
        lines += _lines(name, net, seen[name], data, found)
    notes = (
        *_finding(stands, seen),
        f"{len(train.x):,} training images of a network of 166,406 parameters, {SHOWN // ROWS} epochs, one training each; PGD: 5 steps of "
        "0.35 radii under L2; PAG: weight 0.5, 10 classes. Not the paper's networks or data: its columns stay unread.",
        f"Cosines: mean over all 10 classes of the gradient of log p(class), on {len(shown.x)} test images. Aimed pictures: the next "
        f"class, L2 {FAR:g}; the judge is the nearest of the training images. What a network takes for the target already "
        "is left as it is.",
    )
    return Finding(tuple(lines), (_picture(shown, seen),), notes)
