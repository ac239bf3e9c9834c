"""In which order to try target classes."""

from __future__ import annotations

import torch
from torch import Tensor

from epsball.core import Projects, Tally, Victim


def by_logit(victim: Victim, x: Tensor, labels: Tensor, clean: Tensor, threat: Projects, count: int, tally: Tally) -> Tensor:
    """(B, count) classes by falling clean score, without the label: AutoAttack's order. Costs nothing."""
    return clean.scatter(1, labels[:, None], -torch.inf).topk(count, dim=1).indices


def malt(victim: Victim, x: Tensor, labels: Tensor, clean: Tensor, threat: Projects, count: int, tally: Tally) -> Tensor:
    """(B, count) classes by the distance to their linearized boundary, nearest first.

    Logit gap over the dual norm of the difference of the logit gradients (Melamed et al. 2024, arXiv 2407.02240), with the
    threat's own dual norm; all candidates are the `count` + 3 best classes by logit.

    Cost: 1 forward row, and 1 backward row per candidate and one for the label.
    """
    candidates = by_logit(victim, x, labels, clean, threat, min(count + 3, clean.shape[1] - 1), tally)

    def distances(part: Tensor, own: Tensor, others: Tensor, books: Tally) -> Tensor:
        leaf = part.detach().requires_grad_()
        with torch.enable_grad():
            output = victim.differentiable(leaf, books)

        def gradient(classes: Tensor) -> Tensor:
            books.count_backward()
            score = output.gather(1, classes[:, None]).sum()
            return torch.autograd.grad(score, leaf, retain_graph=True)[0] if score.requires_grad else torch.zeros_like(leaf)

        base, columns = gradient(own), []
        for column in others.unbind(1):
            difference = gradient(column) - base
            dual = (difference * threat.steepest(part, part, difference)).flatten(1).sum(1)
            gap = (output.gather(1, own[:, None]) - output.gather(1, column[:, None])).detach().squeeze(1)
            columns.append(torch.where(dual > 0, gap / dual, torch.full_like(gap, torch.inf)))
        return torch.stack(columns, 1)

    far: Tensor = victim.split(distances, x, labels, candidates, tally)
    return candidates.gather(1, far.argsort(dim=1, stable=True)[:, :count])
