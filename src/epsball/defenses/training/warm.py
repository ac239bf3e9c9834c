"""Warm starts: the search for a sample goes on where it ended in the epoch before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epsball.defenses.training.batch import Batch, Logs
from epsball.defenses.training.inner import Search, uniform
from epsball.defenses.training.pgd import at_adversarial

NAME = "warm.change"


def again(x: Tensor, batch: Batch) -> Tensor:
    """Where the search for each sample ended at its last visit, cut to the ball of now; uniform at its first."""
    change, fresh = batch.recall(NAME, x), uniform(x, batch)
    return torch.where(change.isnan(), fresh, batch.threat.project(x, x + change, batch.radius))


@dataclass(frozen=True)
class Warm:
    """-log p(y | x_adv), and x_adv - x is kept for the next visit."""

    search: Search

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """Search, keep, loss."""
        x_adv = self.search(model, x, y, batch)
        batch.keep(NAME, x_adv - x)
        return at_adversarial(model, x, x_adv, y, batch)


def atta(steps: int = 1, share: float = 0.4) -> Warm:
    """PGD training whose search takes few steps an epoch, and goes on in the next. Zheng et al. 2020, arXiv 1912.11969, ATTA.

    Args:
        steps: of the search, an epoch. share: step over radius.

    The changes of all samples are held in float16, two bytes a feature, in every checkpoint too. The paper starts them anew every few
    epochs and moves them with the image where it is augmented; here they stay, and belong to the place in the image. It wants some
    ten epochs or more, since one step from a uniform start is all that the first epoch sees.
    Cost: steps + 1 forwards and backwards.
    """
    return Warm(Search(steps, share, start=again))
