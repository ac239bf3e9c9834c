"""Auto-PGD (Croce & Hein 2020, arXiv 2003.01690; L1 form 2021, arXiv 2103.01208): no step size to tune."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.combine import EveryTarget, Order, restarted
from epsball.attacks.registry import register
from epsball.attacks.targets import malt
from epsball.core import (
    Attack,
    AttackLike,
    Descent,
    Gradient,
    Halving,
    Objective,
    Problem,
    Projects,
    Reading,
    Strategy,
    autograd,
)
from epsball.core.rows import per_sample
from epsball.objectives import cross_entropy, dlr, dlr_targeted
from epsball.threats import L1, Linf

_NORMS = ("linf", "l2", "l1")
_MORE = (*_NORMS, "flow", "color", "color-luv", "rigid", "patch", "compose")


@dataclass(frozen=True)
class _Sparse:
    z: Tensor
    best_z: Tensor
    best_gradient: Tensor
    best_score: Tensor
    step: Tensor
    share: Tensor
    changed: Tensor
    looks: int
    since_check: int
    period: int


@dataclass(frozen=True)
class SparseAscent:
    """APGD for L1 (Croce & Hein 2021, Algorithm 1): signs of the largest gradient entries, as many as the best point suggests.

    Every 4 % of the steps the share of moved features becomes that of the best point over 1.5. Where the best point grew
    clearly sparser (by 5 %) the step returns to the radius and the search to the best point; elsewhere the step shrinks
    by 1.5, down to a tenth of the radius. Like the released code it rounds the number of moved features up.
    """

    gradient: Gradient = autograd
    noise: bool = True
    first_share: float = 0.2

    def init(self, problem: Problem, steps: int) -> _Sparse:
        """At a random point, with 20 % of the features moving."""
        z = problem.threat.start(problem.x, problem.radius, problem.key if self.noise else None, problem.ids)
        score = torch.full(problem.radius.shape, -torch.inf, device=z.device)
        share = torch.full_like(score, self.first_share)
        changed = torch.full_like(score, float(z[0].numel()))
        return _Sparse(z, z, torch.zeros_like(z), score, problem.radius.clone(), share, changed, 0, 0, max(int(0.04 * steps), 1))

    def step(self, problem: Problem, state: _Sparse) -> tuple[Reading, _Sparse]:
        """One look, then one sparse step."""
        reading = self.gradient(problem, state.z)
        score = torch.nan_to_num(reading.score, nan=-torch.inf)
        better = score > state.best_score
        wide = per_sample(better, state.z) > 0
        s = replace(
            state,
            best_score=torch.where(better, score, state.best_score),
            best_z=torch.where(wide, reading.z, state.best_z),
            best_gradient=torch.where(wide, reading.gradient, state.best_gradient),
            looks=state.looks + 1,
            since_check=state.since_check + (state.looks > 0),
        )
        z, gradient = reading.z, reading.gradient
        if s.since_check == s.period:
            s, sparser = self._adapt(problem, s)
            back = per_sample(sparser, z) > 0
            z, gradient = torch.where(back, s.best_z, z), torch.where(back, s.best_gradient, gradient)
        direction = self._direction(torch.nan_to_num(gradient, nan=0.0), s.share)
        moved = problem.threat.project(problem.x, z + per_sample(s.step, z) * direction, problem.radius)
        return reading, replace(s, z=moved)

    def _adapt(self, problem: Problem, s: _Sparse) -> tuple[_Sparse, Tensor]:
        features = s.z[0].numel()
        changed = (s.best_z != problem.x).flatten(1).sum(1).to(s.share)
        sparser = changed / s.changed < 0.95
        step = torch.where(sparser, problem.radius, s.step / 1.5).clamp(min=problem.radius / 10)
        return replace(s, step=step, share=changed / features / 1.5, changed=changed, since_check=0), sparser

    def _direction(self, gradient: Tensor, share: Tensor) -> Tensor:
        flat = gradient.flatten(1)
        features = flat.shape[1]
        place = ((1 - share) * features).clamp(0, features - 1).long()
        least = flat.abs().sort(1).values.gather(1, place[:, None])
        signs = torch.where(flat.abs() >= least, flat.sign(), torch.zeros_like(flat))
        return (signs / signs.abs().sum(1, keepdim=True).clamp(min=1)).reshape(gradient.shape)


def _search(threat: Projects, noise: bool) -> Strategy:
    # The paper of 2021 gives L1 a search of its own: a halved step cannot find the right sparsity.
    return SparseAscent(noise=noise) if isinstance(threat, L1) else Descent(Halving(), inertia=0.75, noise=noise)


@register(paper="Croce & Hein 2020, arXiv 2003.01690", threats=_MORE, cost="restarts * (steps forwards and backwards, 1 forward to judge)")
def apgd(
    steps: int = 100,
    restarts: int = 1,
    threat: Projects | None = None,
    objective: Objective = cross_entropy,
    noise: bool = True,
) -> AttackLike:
    """Auto-PGD: momentum 0.75, step size from 2 * radius that halves and rewinds where progress stalls."""
    threat = threat or Linf()
    return restarted(Attack("apgd", threat, objective, _search(threat, noise), steps), restarts)


@register(
    paper="Croce & Hein 2020, arXiv 2003.01690, section 4",
    threats=_MORE,
    cost="restarts * (steps forwards and backwards, 1 forward to judge)",
)
def apgd_dlr(steps: int = 100, restarts: int = 1, threat: Projects | None = None) -> AttackLike:
    """Auto-PGD on the difference of logits ratio, which no scale or shift of the logits can blind. 3 classes or more."""
    threat = threat or Linf()
    return restarted(Attack("apgd_dlr", threat, dlr, _search(threat, True), steps), restarts)


@register(
    paper="Croce & Hein 2020, arXiv 2003.01690, section 4; order of targets: Melamed et al. 2024, arXiv 2407.02240",
    threats=_NORMS,
    targeted=False,
    cost="1 forward, (targets + 4) backwards; then targets * (steps forwards and backwards, 1 forward to judge)",
)
def apgd_t(
    steps: int = 100,
    targets: int = 9,
    threat: Projects | None = None,
    objective: Objective = dlr_targeted,
    order: Order = malt,
) -> AttackLike:
    """Auto-PGD aimed at the most promising other classes in turn, on the targeted DLR loss; targets in MALT order."""
    threat = threat or Linf()
    return EveryTarget(Attack("apgd_t", threat, objective, _search(threat, True), steps), targets, order, name="apgd_t")
