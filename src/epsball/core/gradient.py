"""Where gradients come from: functions (Problem, z) -> Reading. All are per sample; scores are summed only here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from epsball.core.problem import Problem, Reading
from epsball.core.threat import Z
from epsball.core.victim import Tally, Victim

Gradient = Callable[[Problem, Z], Reading]


def autograd(problem: Problem, z: Z) -> Reading:
    """The exact gradient of the objective by z. Cost: 1 forward and 1 backward row per sample."""

    def read(part: Problem, z_part: Z) -> Reading:
        leaf = z_part.detach().requires_grad_()
        with torch.enable_grad():
            x_adv = part.threat.apply(part.x, leaf)
            output = part.victim.differentiable(x_adv, part.tally)
            score = part.objective(part, leaf, x_adv, output)
            if score.requires_grad:
                (gradient,) = torch.autograd.grad(score.sum(), leaf, allow_unused=True)
                part.tally.count_backward(part.victim.draws)
            else:
                gradient = None
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        return Reading(z_part, z_part if x_adv is leaf else x_adv.detach(), output.detach(), score.detach(), gradient)

    with problem.victim:
        reading: Reading = problem.victim.split(read, problem, z)
    return reading


def logit_gradients(
    victim: Victim, x: Tensor, tally: Tally, columns: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Iterator[Tensor]]:
    """Rows of the Jacobian, one at a time: gradients by x of each column of `columns(output)`.

    Call it inside `Victim.split`, and use up one gradient before the next is taken: K of them are never held at once.

    Args:
        victim: the model. x: inputs (B, ...). tally: their ledger.
        columns: from the output (B, C) to what is differentiated (B, K), row by row, say chosen logits or their differences.

    Returns:
        The output (B, C), the columns (B, K), and an iterator over K gradients (B, ...); zeros where nothing hangs on x.

    Cost: 1 forward row per sample, and 1 backward row per gradient taken.
    """
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        output = victim.differentiable(leaf, tally)
        values = columns(output)
        scores = values.unbind(1)

    def gradients() -> Iterator[Tensor]:
        for left, score in zip(range(len(scores) - 1, -1, -1), scores, strict=True):
            gradient = None
            if score.requires_grad:
                tally.count_backward(victim.draws)
                ones = torch.ones_like(score)
                (gradient,) = torch.autograd.grad(score, leaf, ones, retain_graph=left > 0, allow_unused=True)
            yield torch.zeros_like(leaf) if gradient is None else gradient

    return output.detach(), values.detach(), gradients()
