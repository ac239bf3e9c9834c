"""A detector: one more class that says 'attacked'."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.defenses.training import Batch, Logs, Search
from epsball.defenses.training.inner import clean
from verdicts.bases import fitted, network, seeded
from verdicts.case import FGSM, Case, as_it_is
from verdicts.search import Climb, Judge

REJECT = 10
FROM_CLEAN = Search(1, 1.0, start=clean)


@dataclass(frozen=True)
class Rejecting:
    """Cross-entropy at x, at FGSM inputs and at corners of the ball, the last two with the label 'reject'."""

    search: Search = FROM_CLEAN

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        noise = (x + batch.radius.view(-1, 1, 1, 1).float() * batch.normal(x).sign()).clamp(0, 1)
        reject = torch.full_like(y, REJECT)
        attacked = [self.search(model, x, y, batch), noise]
        return batch.cross_entropy(model(x), y) + sum(F.cross_entropy(model(z), reject) for z in attacked) / 2, {}


def unless_rejected(model: nn.Module) -> Judge:
    """Broken where the answer is neither the label nor 'reject'."""

    @torch.no_grad()
    def judge(z: Tensor, y: Tensor) -> Tensor:
        answer = model(z).argmax(1)
        return (answer != y) & (answer != REJECT)

    return judge


CASES = (
    Case(
        "detector",
        "Grosse et al. 2017, arXiv 1702.06280",
        "overstated",
        lambda: fitted("detector", seeded(lambda: network(classes=11)), Rejecting(), epochs=6),
        FGSM,
        (
            Climb(as_it_is, "past-reject", restarts=5),
            Climb(as_it_is, "cross-entropy", restarts=1),
            Climb(as_it_is, "aimed", steps=100),
        ),
        lenient=unless_rejected,
        note="naive counts a rejected input as not broken; all others count it as broken, for nothing tells them what a class means",
    ),
)
