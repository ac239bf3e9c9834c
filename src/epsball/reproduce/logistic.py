"""Goodfellow, Shlens & Szegedy 2015, arXiv 1412.6572, section 5: logistic regression on threes and sevens, four ways to regularize it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from epsball.core import Key
from epsball.data import Dataset
from epsball.defenses.training.logistic import Penalty, fit_logistic
from epsball.reproduce import figures, nets
from epsball.reproduce.base import Figure, Finding, Line, Setting, experiment, percent_of
from epsball.reproduce.fgsm import EVERYWHERE, PAPER, SOURCE, step

RADIUS = 0.25
FITS: tuple[tuple[str, Penalty, float], ...] = (
    ("plain", "none", 0.0),
    ("adversarial, closed form, eps 0.25", "adversarial", RADIUS),
    ("L1 decay, coefficient 0.25", "l1", RADIUS),
    ("L1 decay, coefficient 0.0025", "l1", 0.0025),
    ("noise of +-0.25", "signs", RADIUS),
    ("uniform noise within 0.25", "uniform", RADIUS),
)


def binary(data: Dataset) -> Dataset:
    """Threes and sevens only, with labels 0 and 1."""
    chosen = nets.rows(data, (data.y == 3) | (data.y == 7))
    return replace(chosen, y=(chosen.y == 7).long())


def classifier(weight: Tensor, bias: Tensor) -> nn.Module:
    """Logits (0, w . x + b)."""
    linear = nn.Linear(len(weight), 2)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([torch.zeros_like(weight), weight]))
        linear.bias.copy_(torch.stack([torch.zeros_like(bias), bias]))
    return nn.Sequential(nn.Flatten(), linear).eval()


def fitted(setting: Setting, train: Dataset, penalty: Penalty, strength: float) -> tuple[Tensor, Tensor]:
    """Weight and bias on the training set; the noise comes from the seed."""
    draws = nets.generator(Key.of(setting.seed).fold("logistic", penalty))
    return fit_logistic(train.x.flatten(1), 2 * train.y - 1, penalty, strength, draws, steps=20 if setting.quick else 300)


def _lines(name: str, penalty: Penalty, strength: float, weight: Tensor, net: nn.Module, train: Dataset, test: Dataset) -> tuple[Line, ...]:
    """Errors before and behind one step of FGSM, which is the worst input of a linear model, and the size of the weights."""
    none, plain, decayed = "not reported", penalty == "none", penalty == "l1" and strength == 0.0025
    why = "how long the paper trained is not said; ours: 300 steps of Adam on all samples" if plain else ""
    (right, n), (trained, of) = nets.accuracy(net, test), nets.accuracy(net, train)
    free, boxed = step(net, test, RADIUS, EVERYWHERE), step(net, test, RADIUS, (0.0, 1.0))
    told = "over 5 %" if decayed else none
    return (
        Line(f"error before, {name}", "1.6 %" if plain else none, percent_of(n - right, n), why),
        Line(
            f"error on the training set, {name}", told, percent_of(of - trained, of), "the paper's is a maxout network" if decayed else ""
        ),
        Line(f"error at Linf 0.25, not clipped, {name}", "99 %" if plain else none, free.error(), why),
        Line(f"error at Linf 0.25, clipped to [0, 1], {name}", none, boxed.error()),
        Line(f"L1 norm of the weights, {name}", none, f"{float(weight.abs().sum()):.1f}"),
    )


@experiment("logistic", title="Adversarial logistic regression against L1 decay and noise, MNIST 3 and 7", paper=PAPER, minutes=1.5)
def logistic(setting: Setting) -> Finding:
    """Section 5: the adversarial loss in closed form, beside what it is often taken for."""
    data = nets.mnist(setting, setting.count(10_000, quick=400))
    train, test = binary(data.train), binary(data.test)
    lines: list[Line] = []
    tiles: list[figures.Tile] = []
    for name, penalty, strength in FITS:
        setting.say(f"fitting {name}")
        weight, bias = fitted(setting, train, penalty, strength)
        lines += _lines(name, penalty, strength, weight, classifier(weight, bias), train, test)
        tiles.append(
            figures.Tile((0.5 + 0.5 * weight / weight.abs().amax().clamp(min=1e-12)).view(1, 28, 28).numpy(), name.partition(",")[0])
        )
    told = "Weights of each fit, grey is 0 and each picture has a scale of its own."
    notes = (
        SOURCE,
        "The closed form knows no box, so its radius is that of the unclipped step. L1 decay stands outside the softplus.",
        "A coefficient of L1 decay and a radius are not the same unit of penalty; 0.25 and 0.0025 are those that the paper names.",
    )
    return Finding(tuple(lines), (Figure("weights", figures.images("Weights", told, [tiles]), told),), notes)
