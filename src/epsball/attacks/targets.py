"""In which order to try target classes."""

from __future__ import annotations

import torch
from torch import Tensor

from epsball.core import Projects, Tally, Victim
from epsball.core.gradient import logit_gradients


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
        classes = torch.cat([own[:, None], others], 1)
        _, logits, slopes = logit_gradients(victim, part, books, lambda output: output.gather(1, classes))
        base, columns = next(slopes), []
        for logit, slope in zip(logits[:, 1:].unbind(1), slopes, strict=True):
            difference = slope - base
            dual = (difference * threat.steepest(part, part, difference)).flatten(1).sum(1)
            gap = logits[:, 0] - logit
            columns.append(torch.where(dual > 0, gap / dual, torch.full_like(gap, torch.inf)))
        return torch.stack(columns, 1)

    far: Tensor = victim.split(distances, x, labels, candidates, tally)
    return candidates.gather(1, far.argsort(dim=1, stable=True)[:, :count])
