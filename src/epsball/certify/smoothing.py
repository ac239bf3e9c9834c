"""Randomized smoothing: a certificate in L2 for the classifier that votes under Gaussian noise, not for the model itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epsball.core import Key, Model, Tally, Victim, content_ids
from epsball.errors import BadInput

_ROWS = 4096
"""Most noisy inputs that are held at once."""


@dataclass(frozen=True)
class Smoothed:
    """What the smoothed classifier answers, and how far that holds.

    Attributes:
        prediction: (B,) int64; -1 where it abstains. radius: (B,) float64 in L2, 0 where it abstains.
        low: (B,) float64: lower confidence bound of the probability of the predicted class.
    """

    prediction: Tensor
    radius: Tensor
    low: Tensor


def smooth(model: Model, x: Tensor, sigma: float, n0: int = 100, n: int = 1000, alpha: float = 0.001, seed: int | Key = 0) -> Smoothed:
    """CERTIFY of randomized smoothing: g(x) = argmax_c P(f(x + noise) = c), noise ~ N(0, sigma^2 I).

    n0 draws choose the class c, n fresh ones bound its probability: p = Clopper-Pearson lower bound at 1 - alpha. Where p > 1/2, with
    probability at least 1 - alpha g answers c within the L2 radius sigma * Phi^-1(p); else it abstains. The claim is about g: the
    model f alone may be broken inside. The paper uses n = 100,000.

    Args:
        model: any model that gives labels. x: (B, ...). sigma: in units of the input. n0, n: draws. alpha: chance of error a sample.
        seed: noise is keyed by it, the sample's content and the draw.

    Raises:
        BadInput: sigma not above 0, no draws, alpha outside (0, 1).

    Cost: n0 + n forwards per sample.

    Differences from the paper: none in the algorithm; as there, noisy inputs are not clipped to the box.

    Cohen, Rosenfeld & Kolter 2019, arXiv 1902.02918, section 3.2.2.
    """
    if not (sigma > 0 and sigma < float("inf")) or min(n0, n) < 1 or not 0 < alpha < 1:
        raise BadInput(f"smoothing: sigma {sigma:g}, n0 {n0}, n {n}, alpha {alpha:g}: sigma above 0, draws from 1, alpha in (0, 1)")
    victim, key = Victim.of(model), Key.of(seed).fold("smoothing", repr(float(sigma)))
    x = x.to(victim.device)
    with victim:
        chosen = _counts(victim, x, sigma, n0, key.fold("choose")).argmax(1)
        count = _counts(victim, x, sigma, n, key.fold("count")).gather(1, chosen[:, None]).squeeze(1)
    low = lower(count, n, alpha)
    sure = low > 0.5
    radius = torch.where(sure, sigma * torch.special.ndtri(low), 0.0)
    return Smoothed(torch.where(sure, chosen, -1), radius, low)


def lower(count: Tensor, n: int, alpha: float) -> Tensor:
    """(B,) float64: one-sided Clopper-Pearson bound: the true share is below it with probability at most alpha.

    >>> round(float(lower(torch.tensor([100]), 100, 0.001)), 6)  # alpha ** (1 / n)
    0.933254
    """
    from scipy.special import betaincinv

    k = count.cpu().double().numpy()
    found = betaincinv(k.clip(min=1), n - k + 1, alpha)
    return torch.where(count > 0, torch.from_numpy(found).to(count.device), 0.0)


def _counts(victim: Victim, x: Tensor, sigma: float, n: int, key: Key) -> Tensor:
    """(B, C) int64: how often each class wins among n noisy copies of each sample. An answer that is no number wins nothing."""
    ids, total = content_ids(x), None
    copies = max(1, _ROWS // max(len(x), 1))
    for first in range(0, n, copies):
        draws = range(first, min(n, first + copies))
        noisy = torch.cat([x + sigma * key.fold(draw).normal(ids, x) for draw in draws])
        output = victim.outputs(noisy, Tally.zeros(len(noisy)))
        votes = torch.nn.functional.one_hot(output.argmax(1), output.shape[1]) * torch.isfinite(output).all(1, keepdim=True)
        votes = votes.reshape(len(draws), len(x), -1).sum(0)
        total = votes if total is None else total + votes
    assert total is not None
    return total
