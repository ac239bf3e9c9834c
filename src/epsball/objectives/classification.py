"""What is climbed, for models that answer with scores: every objective gives (B,), higher always suits the adversary.

Untargeted goals move away from their label, targeted ones toward theirs, aimed ones toward their target.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from epsball.core import Aimed, LabelsChanged, Problem, Targeted, Untargeted
from epsball.core.threat import Z
from epsball.errors import BadInput

WITH_MARGIN = Untargeted | Targeted | Aimed | LabelsChanged
"""Goals that `margin` can read; others come with objectives of their own."""


def _pick(output: Tensor, labels: Tensor) -> Tensor:
    return output.gather(1, labels[:, None]).squeeze(1)


def _rival(output: Tensor, labels: Tensor) -> Tensor:
    """The largest score among the other classes."""
    return output.scatter(1, labels[:, None], -torch.inf).amax(1)


def cross_entropy(problem: Problem, z: Z, x_adv: Tensor, output: Tensor) -> Tensor:
    """-log p(label) where the label is to be left, log p(label) where it is to be hit; summed over labels if multi-label."""
    goal = problem.goal
    if isinstance(goal, LabelsChanged):
        return F.softplus(-goal.signed(output)).sum(1)
    if isinstance(goal, Untargeted):
        return F.cross_entropy(output, goal.labels, reduction="none")
    labels = goal.targets if isinstance(goal, Aimed) else _labels(problem, "cross_entropy")
    return -F.cross_entropy(output, labels, reduction="none")


def margin(problem: Problem, z: Z, x_adv: Tensor, output: Tensor) -> Tensor:
    """How far the goal is ahead, in logits: positive exactly where it is reached (Carlini & Wagner 2017, loss f6)."""
    goal = problem.goal
    if isinstance(goal, LabelsChanged):
        return -goal.signed(output).amin(1)
    if isinstance(goal, Untargeted):
        return _rival(output, goal.labels) - _pick(output, goal.labels)
    if isinstance(goal, Aimed):
        return _pick(output, goal.targets) - _pick(output, goal.labels)
    labels = _labels(problem, "margin")
    return _pick(output, labels) - _rival(output, labels)


def dlr(problem: Problem, z: Z, x_adv: Tensor, output: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, eq. 6): the margin over (first - third) largest logit. 3 classes or more."""
    return margin(problem, z, x_adv, output) / _spread(problem, output, "dlr", ranks=(2,))


def dlr_targeted(problem: Problem, z: Z, x_adv: Tensor, output: Tensor) -> Tensor:
    """Targeted DLR (Croce & Hein 2020, eq. 7): the margin over first - (third + fourth) / 2 largest logits.

    With 3 classes the fourth is left out, so that it still works.
    """
    ranks = (2, 3) if output.shape[1] > 3 else (2,)
    return margin(problem, z, x_adv, output) / _spread(problem, output, "dlr_targeted", ranks)


def _spread(problem: Problem, output: Tensor, name: str, ranks: tuple[int, ...]) -> Tensor:
    if isinstance(problem.goal, LabelsChanged):
        raise BadInput(f"objective '{name}': ranks the classes of one label, the model has many labels: use cross_entropy or margin")
    if output.shape[1] < 3:
        raise BadInput(f"objective '{name}': needs 3 classes, the model has {output.shape[1]}: use margin")
    top = output.topk(ranks[-1] + 1, dim=1).values
    lower = torch.stack([top[:, rank] for rank in ranks]).mean(0)
    return top[:, 0] - lower + 1e-12


def kl(problem: Problem, z: Z, x_adv: Tensor, output: Tensor) -> Tensor:
    """KL(p(x) || p(x_adv)), the inner objective of TRADES (Zhang et al. 2019); knows no label, so only untargeted."""
    if not isinstance(problem.goal, Untargeted):
        raise BadInput(f"objective 'kl': has no direction for {type(problem.goal).__name__}: use cross_entropy or margin")
    clean = problem.clean.log_softmax(1)
    return (clean.exp() * (clean - output.log_softmax(1))).sum(1)


def _labels(problem: Problem, name: str) -> Tensor:
    goal = problem.goal
    if not isinstance(goal, Targeted):
        raise BadInput(f"objective '{name}': cannot read the goal {type(goal).__name__}: write an objective for it")
    return goal.labels
