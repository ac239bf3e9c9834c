"""MART: adversarial training that looks harder at the samples that are wrong already."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from epsball.defenses.training.batch import Batch, Logs, Model, accuracy
from epsball.defenses.training.inner import Adversarial, Normal, Search
from epsball.defenses.training.trades import kl


@dataclass(frozen=True)
class Mart:
    """mean BCE(p(x_adv), y) + weight * mean KL(p(x) || p(x_adv)) * (1 - p_y(x)).

    BCE is -log p_y - log(1 - the largest other p). 1.0001 in the place of that 1 keeps it finite, as in the released code.
    """

    weight: float = 5.0

    def __call__(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """Two outputs, one loss."""
        output, output_adv = model(x), model(x_adv)
        rival = output_adv.softmax(1).scatter(1, y[:, None], 0.0).amax(1)
        boosted = batch.cross_entropy(output_adv, y) - (1.0001 - rival).log().mean()
        right = output.softmax(1).gather(1, y[:, None]).squeeze(1)
        return boosted + self.weight * (kl(output, output_adv) * (1 - right)).mean(), {"adversarial": accuracy(output_adv, y)}


def mart(weight: float = 5.0, steps: int = 10, share: float = 0.226) -> Adversarial:
    """Misclassification-aware adversarial training. Wang et al., ICLR 2020 (openreview rklOg6EFwS).

    Args:
        weight: lambda of the paper; 5 in the released code. steps, share: of the search, which climbs cross-entropy from
            x + 0.001 * N(0, 1); 10 steps of 0.007 at 0.031 there.

    Gradients also flow through 1 - p_y(x), as in the released code. Cost: steps + 2 forwards and backwards.
    """
    return Adversarial(Search(steps, share, start=Normal(0.001)), Mart(weight))
