"""Nothing is wrong with these: an audit that warns here cries wolf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import nn

from epsball.data import Dataset
from epsball.defenses import training
from verdicts.bases import adversarial, color, fitted, network, samples, seeded, standard
from verdicts.case import PGD, Case, thorough


def linear() -> nn.Module:
    """One layer, with the decay of a support vector machine."""
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))


def smooth() -> nn.Module:
    """Two hidden layers of 128 with GELU."""
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)))


def control(
    name: str,
    paper: str,
    model: Callable[[], nn.Module],
    radius: float = 0.2,
    note: str = "",
    samples: Callable[[int, int], Dataset] = samples,
    held: Literal["", "right", "wrong"] = "",
) -> Case:
    """A case without a secret."""
    return Case(
        name,
        paper,
        "control",
        model,
        PGD,
        thorough(),
        radius=radius,
        official=20 if samples is color else 50 if held else 100,
        note=note,
        samples=samples,
        held=held,
    )


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
        "IBP",
        "Gowal et al. 2018, arXiv 1810.12715",
        lambda: fitted("ibp", seeded(network), training.ibp(), epochs=12, radius=0.1, by=training.by_robust),
        radius=0.1,
        note="certified training by intervals",
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
