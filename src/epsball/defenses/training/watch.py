"""What is measured while a model trains: held-out clean and robust accuracy, and the signs of catastrophic overfitting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epsball.attacks import pgd
from epsball.certify import certify
from epsball.core import Projects, Tally, Victim
from epsball.core.victim import Bound


@dataclass(frozen=True)
class Record:
    """One line of the log, after an epoch.

    Attributes:
        epoch, step: how many are over. seconds: since the training (or its resumption) began.
        loss: mean over the epoch's steps. means: the loss's own means over the epoch; `adversarial` is the accuracy on its attacks.
        clean, robust: accuracy of the averaged weights on the held-out samples, without and under PGD.
        rate: learning rate of the last step. radius: of the last step. best: kept, so far. collapsed: catastrophic overfitting.
        certified: share of the held-out samples that interval bounds prove right within the radius, where that is asked for.
    """

    epoch: int
    step: int
    seconds: float
    loss: float
    means: dict[str, float]
    clean: float
    robust: float
    rate: float
    radius: float
    best: bool = False
    collapsed: bool = False
    certified: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def by_robust(record: Record) -> tuple[float, float]:
    """Which weights are best: by robust accuracy, then by clean accuracy."""
    return record.robust, record.clean


def by_certified(record: Record) -> tuple[float, float]:
    """Which weights are best, where bounds are trained: by the proven share, then by clean accuracy."""
    return record.certified or 0.0, record.clean


def by_clean(record: Record) -> tuple[float, float]:
    """Which weights are best, where no adversary is trained against: by clean accuracy, then by robust accuracy."""
    return record.clean, record.robust


def measure(
    model: nn.Module, x: Tensor, y: Tensor, threat: Projects, radius: float, box: tuple[Bound, Bound], seed: int, steps: int = 10
) -> tuple[float, float]:
    """(clean, robust) accuracy under one PGD run; the same noise every time, so that epochs can be compared.

    A short search: early stopping needs an order, not a verdict. Cost: steps + 2 forwards and steps backwards for what still stands.
    """
    with Victim(model, box=box, batch_size=512) as victim:
        x, y = x.to(victim.device), y.to(victim.device)
        clean = victim.outputs(x, Tally.zeros(len(x)))
        outcome = pgd(steps=steps, threat=threat)(victim, x, y, radius, seed, clean=clean)
    right = clean.argmax(1) == y
    stands = right & ~outcome.reached & ~outcome.flags["invalid"]
    return float(right.float().mean()), float(stands.float().mean())


def proven(model: nn.Module, x: Tensor, y: Tensor, threat: Projects, radius: float, box: tuple[Bound, Bound]) -> float:
    """Share of samples that `epsball certify --method interval` certifies. Cost: 3 forwards and a backward per class, in float64.

    Raises:
        BadInput: a layer without bounds, by its name.
    """
    with Victim(model, box=box, batch_size=512) as victim:
        parts = [certify(victim, *part, threat, radius, "interval") for part in zip(torch.split(x, 512), torch.split(y, 512), strict=True)]
    return sum(int(part.certified.sum()) for part in parts) / len(x)


def collapsed(before: Sequence[Record], now: Record) -> bool:
    """Catastrophic overfitting (Wong et al. 2020): the training's own attacks fail ever more, a real one ever less.

    True where robust accuracy is below half of its best so far, while the accuracy on the training's own adversarial inputs is no
    lower than it was at that best.
    """
    known = [record for record in before if "adversarial" in record.means]
    if not known or "adversarial" not in now.means:
        return False
    best = max(known, key=lambda record: record.robust)
    return now.robust < 0.5 * best.robust and now.means["adversarial"] >= best.means["adversarial"]
