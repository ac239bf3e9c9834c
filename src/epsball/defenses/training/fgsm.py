"""FGSM training as the FGSM paper has it: a mix of the clean and the adversarial loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from epsball.defenses.training.batch import Batch, Logs, Model, accuracy
from epsball.defenses.training.inner import Adversarial, Search, clean


@dataclass(frozen=True)
class Mix:
    """alpha * J(x) + (1 - alpha) * J(x_adv)."""

    alpha: float = 0.5

    def __call__(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """Two cross-entropies."""
        output = model(x_adv)
        loss = self.alpha * batch.cross_entropy(model(x), y) + (1 - self.alpha) * batch.cross_entropy(output, y)
        return loss, {"adversarial": accuracy(output, y)}


def fgsm_mix(alpha: float = 0.5) -> Adversarial:
    """alpha * J(x) + (1 - alpha) * J(x + radius * sign(gradient)). Goodfellow et al. 2015, arXiv 1412.6572, section 6.

    The adversarial input is held fixed when the weights are differentiated, as in the paper. Overfits to its own attack where the
    radius is large: watch the log. Cost: 3 forwards and backwards, 1 of them to find the input.
    """
    return Adversarial(Search(1, 1.0, start=clean), Mix(alpha))
