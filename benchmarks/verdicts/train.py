"""Defenses that are trained, or that only change the scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from epsball.defenses import training
from epsball.defenses.training.inner import Adversarial, Search, clean
from epsball.defenses.training.pgd import at_adversarial
from verdicts.bases import fitted, network, seeded, standard
from verdicts.case import FGSM, PGD, Case, as_it_is, straight, thorough, undefended


class Scaled(nn.Module):
    """Scores times a number."""

    def __init__(self, net: nn.Module, by: float) -> None:
        super().__init__()
        self.net, self.by = net, by

    def forward(self, x: Tensor) -> Tensor:
        return self.by * self.net(x)


class Probabilities(nn.Module):
    """A softmax so sharp that float32 rounds it to 0 and 1."""

    def __init__(self, net: nn.Module, by: float = 50.0) -> None:
        super().__init__()
        self.net, self.by = net, by

    def forward(self, x: Tensor) -> Tensor:
        return (self.by * self.net(x)).softmax(1)


class Winners(nn.Module):
    """k-WTA: only the largest share of a layer's activations stays."""

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        self.share = share

    def forward(self, a: Tensor) -> Tensor:
        flat = a.flatten(1)
        least = flat.topk(max(1, int(self.share * flat.shape[1])), dim=1).values[:, -1:]
        return (flat * (flat >= least)).reshape(a.shape)


def smeared(sigma: float) -> Any:
    """The gradient at a noisy point nearby; its sum over draws is that of a smoothed network."""
    return lambda model: lambda z: model(straight(z, z) + sigma * torch.randn_like(z))


def distilled() -> nn.Module:
    teacher = fitted("teacher", seeded(network), training.Tempered(100.0), epochs=6, rate=1e-2)
    return fitted("distilled", seeded(network, 1), training.Distilled(teacher, 100.0), epochs=6, rate=1e-2)


def fgsm_trained() -> nn.Module:
    """One step of the whole radius from the clean input, the weights of the last epoch."""
    loss = Adversarial(Search(1, 1.0, start=clean), at_adversarial)
    return fitted("fgsm", seeded(network), loss, epochs=10, radius=0.3, by=latest, average=0.0)


def latest(record: training.Record) -> tuple[float, float]:
    """The last weights are kept."""
    return record.epoch, 0.0


CASES = (
    Case(
        "distillation",
        "Papernot et al. 2016, arXiv 1511.04508",
        "masked",
        distilled,
        PGD,
        thorough(lambda m: lambda z: m(z) / 100),
        cause="scores",
        note="T = 100, deployed at T = 1",
    ),
    Case(
        "large scores",
        "Carlini & Wagner 2017, arXiv 1608.04644",
        "masked",
        lambda: Scaled(standard(), 1000.0).eval(),
        PGD,
        thorough(undefended),
        cause="scores",
        note="logits times 1,000",
    ),
    Case(
        "sharp softmax",
        "Carlini & Wagner 2017, arXiv 1608.04644",
        "masked",
        lambda: Probabilities(standard()).eval(),
        PGD,
        thorough(undefended),
        cause="scores",
        note="answers with probabilities that float32 rounds to 0 and 1",
    ),
    Case(
        "k-WTA",
        "Xiao et al. 2020, arXiv 1905.10510",
        "masked",
        lambda: fitted("winners", seeded(lambda: network(relu=Winners)), training.Standard(), epochs=5),
        PGD,
        (*thorough(smeared(0.1), smeared(0.03), draws=10, look=5)[:-1], *thorough(as_it_is)),
        cause="rough",
        note="a tenth of each layer stays",
    ),
    Case(
        "CLP",
        "Kannan et al. 2018, arXiv 1803.06373",
        "overstated",
        lambda: fitted("clp", seeded(network), training.CleanPairing(0.5, 0.5), epochs=8),
        PGD,
        thorough(),
        note="clean logit pairing, no adversary",
    ),
    Case(
        "LSQ",
        "Kannan et al. 2018, arXiv 1803.06373",
        "overstated",
        lambda: fitted("lsq", seeded(network), training.Squeezing(0.5, 0.5), epochs=8),
        PGD,
        thorough(),
        note="logit squeezing, no adversary",
    ),
    Case(
        "half PGD with ALP",
        "Kannan et al. 2018, arXiv 1803.06373",
        "overstated",
        lambda: fitted("alp", seeded(network), training.alp(0.5, 7), epochs=8, by=training.by_robust),
        PGD,
        thorough(),
        note="overstated, still robust",
    ),
    Case(
        "FGSM training",
        "Goodfellow et al. 2015, arXiv 1412.6572",
        "overstated",
        fgsm_trained,
        FGSM,
        thorough(),
        radius=0.3,
        note="no random start: catastrophic overfitting",
    ),
    Case(
        "label mix",
        "Lee et al. 2020, arXiv 2003.02484",
        "overstated",
        lambda: fitted("avmixup", seeded(network), training.avmixup(steps=1, share=1.0), epochs=10),
        PGD,
        thorough(),
        note="vertex mixup at one-step inputs",
    ),
)
