"""Nothing is wrong with these: an audit that warns here cries wolf."""

from __future__ import annotations

from torch import nn

from epsball.defenses import training
from verdicts.bases import adversarial, fitted, network, seeded, standard
from verdicts.case import PGD, Case, thorough


def linear() -> nn.Module:
    """One layer, with the decay of a support vector machine."""
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))


def smooth() -> nn.Module:
    """Two hidden layers of 128 with GELU."""
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)))


def control(name: str, paper: str, model: object, radius: float = 0.2, note: str = "") -> Case:
    """A case without a secret."""
    assert callable(model)
    return Case(name, paper, "control", model, PGD, thorough(), radius=radius, official=100, note=note)


CASES = (
    control("standard", "none", standard),
    control("PGD", "Madry et al. 2018, arXiv 1706.06083", adversarial, note="PGD-7"),
    control(
        "TRADES",
        "Zhang et al. 2019, arXiv 1901.08573",
        lambda: fitted("trades", seeded(network), training.trades(2.0, 5), epochs=6, by=training.by_robust),
        note="beta = 2, 5 steps",
    ),
    control(
        "CURE",
        "Moosavi-Dezfooli et al. 2019, arXiv 1811.09716",
        lambda: fitted("cure", seeded(lambda: network(relu=nn.Softplus)), training.Cure(), epochs=5),
        radius=0.1,
        note="low curvature",
    ),
    control(
        "Gaussian noise",
        "Cohen et al. 2019, arXiv 1902.02918",
        lambda: fitted("noise", seeded(network), training.GaussianNoise(0.5), epochs=5),
        radius=0.1,
        note="sigma = 0.5 in training, one answer without noise",
    ),
    control(
        "linear",
        "none",
        lambda: fitted("linear", linear(), training.pgd(1, 1.0), epochs=3, radius=0.1, by=training.by_robust),
        radius=0.1,
        note="one layer, one PGD step",
    ),
    control(
        "GELU",
        "none",
        lambda: fitted("gelu", smooth(), training.pgd(5, 0.3), epochs=6, radius=0.1, by=training.by_robust),
        radius=0.1,
        note="two hidden layers, PGD-5",
    ),
)
