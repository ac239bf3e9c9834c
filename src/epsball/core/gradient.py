"""Where gradients come from: functions (Problem, z) -> Reading. All are per sample; scores are summed only here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from epsball.core.problem import Problem, Reading
from epsball.core.threat import Z

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
                part.tally.count_backward()
            else:
                gradient = None
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        return Reading(z_part, x_adv.detach(), output.detach(), score.detach(), gradient)

    with problem.victim:
        reading: Reading = problem.victim.split(read, problem, z)
    return reading
