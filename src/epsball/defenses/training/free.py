"""Free adversarial training: one backward pass moves the weights and the perturbation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epsball.core.rows import per_sample
from epsball.defenses.training.batch import Batch, Logs, accuracy
from epsball.errors import BadInput

MEMORY = "free.change"


@dataclass(frozen=True)
class Free:
    """Cross-entropy at x + change; its one backward pass also takes the change a whole radius further up.

    Shafahi et al. 2019, arXiv 1904.12843, Algorithm 1. Every batch is shown several times in a row: set `Course.replays` (the
    paper's m; 8 in the released code for CIFAR-10) and divide the epochs by it. The change stays when the next batch comes, as in the
    paper. Batch norm is in training mode, since the pass is shared.

    Raises:
        BadInput: batches of different sizes, as accumulation makes them.

    Cost: 1 forward, 1 backward.
    """

    def __call__(self, model: torch.nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """-log p(y | x + change)."""
        change = batch.memory.get(MEMORY, torch.zeros_like(x))
        if change.shape != x.shape:
            raise BadInput(f"free: a batch of {tuple(x.shape)} after one of {tuple(change.shape)}: accumulate must be 1")
        with torch.no_grad():
            start = batch.threat.project(x, x + change, batch.radius)
        leaf = start.detach().requires_grad_()

        def climb(gradient: Tensor) -> None:
            with torch.no_grad():
                z = start + per_sample(batch.radius, x) * batch.threat.steepest(x, start, gradient)
                batch.memory[MEMORY] = batch.threat.project(x, z, batch.radius) - x

        leaf.register_hook(climb)
        output = model(leaf)
        return batch.cross_entropy(output, y), {"adversarial": accuracy(output, y)}
