"""Gradients of models that give none, feature by feature: for inputs of few features as good as a gradient, and hardly dearer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.apgd import apgd
from epsball.attacks.minimal import limits
from epsball.attacks.registry import register
from epsball.attacks.vertices import Vertices, vertices
from epsball.core import Attack, Descent, Objective, Problem, Projects, Reading, valid
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L1, L2, Linf

_TOGETHER = 64
"""Features that one call asks about, for one sample."""


@dataclass(frozen=True)
class Coordinates:
    """The slope of the score along every feature: its difference at two points, `share` of the radius below and above, cut to the box.

    Zero where one of the answers is no number. Cost: 2 forwards per feature, and 1 to judge.
    """

    share: float

    def __call__(self, problem: Problem, z: Tensor) -> Reading:
        """One slope (B, ...), and the honest answer at z."""
        with problem.victim:
            flat, (low, high) = z.flatten(1), (end.flatten(1) for end in limits(problem))
            step = (self.share * problem.radius).to(flat)[:, None]
            ends = torch.maximum(flat - step, low), torch.minimum(flat + step, high)
            parts = [self._part(problem, flat, ends, start) for start in range(0, flat.shape[1], _TOGETHER)]
            return replace(problem.judge(z), gradient=torch.cat(parts, 1).reshape(z.shape))

    def _part(self, problem: Problem, flat: Tensor, ends: tuple[Tensor, Tensor], start: int) -> Tensor:
        """(B, K) slopes along the features from number `start` on."""
        places = torch.arange(start, min(start + _TOGETHER, flat.shape[1]), device=flat.device)
        rows = torch.arange(len(flat), device=flat.device).repeat_interleave(2 * len(places))
        at = torch.stack([end[:, places] for end in ends], 2).flatten(1)
        points = flat[rows].scatter_(1, places.repeat_interleave(2).repeat(len(flat))[:, None], at.reshape(-1, 1))
        there = problem.take(rows).judge(points.reshape(len(rows), *problem.x.shape[1:]))
        scores = there.score.masked_fill(~valid(there.output), torch.nan).reshape(len(flat), len(places), 2)
        width = (ends[1] - ends[0])[:, places]
        slope = (scores[..., 1] - scores[..., 0]).to(flat) / width
        return torch.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0)


@register(
    paper="Chen et al. 2017, arXiv 1708.03999, eq. 6; on the search of Croce & Hein 2020, arXiv 2003.01690",
    access=Access.SCORES,
    threats=("linf", "l2", "l1"),
    cost="steps * (2 forwards per feature and 1), 1 forward to judge",
)
def differences(steps: int = 40, threat: Projects | None = None, objective: Objective = margin, share: float = 0.1) -> Attack:
    """APGD, under L1 `vertices`, on gradients by differences along every feature (`Coordinates`).

    Random search asks hundreds of queries for what a gradient tells at once; of 30 features this one takes 61.

    Args:
        steps: looks. threat: Linf, L2 or L1; Linf unless given. objective: what is climbed.
        share: of the radius, to either side: small ones for smooth models, large ones for such as go in steps.

    Raises:
        BadInput: a share outside (0, 1], or another threat.
    """
    if not 0 < share <= 1:
        raise BadInput(f"share: {share}: must lie above 0 and be at most 1")
    threat = threat or Linf()
    if not isinstance(threat, Linf | L2 | L1):
        raise BadInput(f"threat '{threat.name}': has no features to change by themselves: use linf, l2 or l1")
    search = vertices(steps, threat, objective) if isinstance(threat, L1) else apgd(steps, threat=threat, objective=objective)
    assert isinstance(search, Attack)
    assert isinstance(search.strategy, Descent | Vertices)
    return replace(search, name="differences", strategy=replace(search.strategy, gradient=Coordinates(share)), access=Access.SCORES)
