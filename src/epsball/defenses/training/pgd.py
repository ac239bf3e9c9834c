"""Adversarial training: cross-entropy at the worst input that a search finds; one step or many."""

from __future__ import annotations

from torch import Tensor

from epsball.defenses.training.batch import Batch, Logs, Model, accuracy
from epsball.defenses.training.inner import Adversarial, Around, Search


def at_adversarial(model: Model, x: Tensor, x_adv: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
    """-log p(y | x_adv)."""
    output = model(x_adv)
    return batch.cross_entropy(output, y), {"adversarial": accuracy(output, y)}


def pgd(steps: int = 10, share: float = 0.25) -> Adversarial:
    """Min over weights, max over the ball. Madry et al. 2018, arXiv 1706.06083.

    Args:
        steps: of the search, from a uniform start. share: step over radius; 0.25 is 2/255 in 8/255.

    The inner batch norm is in eval mode, where the paper's code has one; BOT (Pang et al. 2021, arXiv 2010.00467) finds that better.
    Cost: steps + 1 forwards and backwards.
    """
    return Adversarial(Search(steps, share), at_adversarial)


def fast(share: float = 1.25) -> Adversarial:
    """One step of 1.25 radii from a uniform start, projected. Wong et al. 2020, arXiv 2001.03994, Algorithm 3.

    Cost: 2 forwards and backwards.
    """
    return Adversarial(Search(1, share), at_adversarial)


def n_fgsm(noise: float = 2.0, share: float = 1.0) -> Adversarial:
    """Noise of up to `noise` radii, then one step of `share` radii, not projected onto the ball.

    x_adv = x + eta + share * radius * sign(gradient at x + eta), eta uniform. de Jorge et al. 2022, arXiv 2202.01181, Algorithm 1.
    The box still holds; the noise is cut to it first, as in the released code. Cost: 2 forwards and backwards.
    """
    return Adversarial(Search(1, share, start=Around(noise), reach=noise + share), at_adversarial)
