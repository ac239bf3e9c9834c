"""Auto-PGD (Croce & Hein 2020, arXiv 2003.01690; L1 form 2021, arXiv 2103.01208): no step size to tune."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.combine import EveryTarget, Order, restarted
from epsball.attacks.minimal import offered
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
from epsball.core.rows import per_sample, rowwise
from epsball.errors import BadInput
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
        wide = rowwise(better, state.z)
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
            back = rowwise(sparser, z)
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


@dataclass(frozen=True)
class _Ball:
    """The search in one of the balls, of `radius` (B,); `hit` (B,): some look in it reached the goal."""

    now: _Sparse
    radius: Tensor
    hit: Tensor
    number: int
    looks: int
    steps: int

    @property
    def z(self) -> Tensor:
        """Where the search looks next."""
        return self.now.z


@dataclass(frozen=True)
class FromLarger:
    """`SparseAscent` in balls `scales` times the budget, one after another, each from the best point of the one before, projected.

    In a large ball the features that matter show themselves; smaller ones keep the best of them. The last ball takes 40 % of the
    steps and the others the same share each: 30, 30 and 40 % as in the released AutoAttack. Unlike there, a search that reached its
    goal nowhere in a larger ball is over, for a smaller one lies inside it. Outside the budget `run` is shown the clean input.
    """

    scales: tuple[float, ...] = (3.0, 2.0, 1.0)
    search: SparseAscent = SparseAscent()

    def init(self, problem: Problem, steps: int) -> _Ball:
        """At a random point of the first ball."""
        number = self._number(0, steps)
        radius = self.scales[number] * problem.radius
        noise = problem.key if self.search.noise else None
        start = problem.threat.start(problem.x, radius, noise, problem.ids)
        return self._enter(problem, start, radius, number, 0, steps)

    def step(self, problem: Problem, state: _Ball) -> tuple[Reading, _Ball]:
        """One look, one sparse step; at the end of a ball the best point goes on in the next."""
        reading, now = self.search.step(replace(problem, radius=state.radius), state.now)
        hit, looks = state.hit | problem.goal.reached(reading.output), state.looks + 1
        number = self._number(looks, state.steps)
        if state.number < len(self.scales) - 1:
            inside = problem.threat.size(problem.x, reading.z) <= problem.radius
            reading = replace(offered(problem, reading, inside), over=~hit if number > state.number else None)
        if number == state.number:
            return reading, replace(state, now=now, hit=hit, looks=looks)
        radius = self.scales[number] * problem.radius
        start = problem.threat.project(problem.x, now.best_z, radius)
        return reading, self._enter(problem, start, radius, number, looks, state.steps)

    def _number(self, looks: int, steps: int) -> int:
        """Of the ball of the next look; after the last step that of the budget, where the last iterate is judged."""
        larger = len(self.scales) - 1
        return min(looks * larger // max(math.ceil(0.6 * steps), 1), larger) if looks < steps else larger

    def _enter(self, problem: Problem, start: Tensor, radius: Tensor, number: int, looks: int, steps: int) -> _Ball:
        length = [self._number(look, steps) for look in range(steps)].count(number)
        now = replace(self.search, noise=False).init(problem, length)
        changed = (start != problem.x).flatten(1).sum(1).to(now.share)
        share = changed / start[0].numel() / 1.5
        now = replace(now, z=start, best_z=start, step=radius.clone(), share=share, changed=changed)
        return _Ball(now, radius, torch.zeros(len(start), dtype=torch.bool, device=start.device), number, looks, steps)


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
) -> EveryTarget:
    """Auto-PGD aimed at the most promising other classes in turn, on the targeted DLR loss; targets in MALT order."""
    threat = threat or Linf()
    return EveryTarget(Attack("apgd_t", threat, objective, _search(threat, True), steps), targets, order, name="apgd_t")


@register(
    paper="Croce & Hein 2021, arXiv 2103.01208; larger balls as in the released AutoAttack",
    threats=("l1",),
    cost="restarts * (at most steps forwards and backwards, 1 forward to judge)",
)
def from_larger(
    steps: int = 100,
    restarts: int = 1,
    threat: Projects | None = None,
    objective: Objective = cross_entropy,
    scales: tuple[float, ...] = (3.0, 2.0, 1.0),
) -> AttackLike:
    """Auto-PGD under L1 in balls that shrink to the budget (`FromLarger`): finds sparse changes that no step inside the budget leads to.

    Args:
        steps: looks, over all balls. restarts: runs. threat: L1. objective: what is climbed.
        scales: radii of the balls in budgets, falling, the last 1.

    Raises:
        BadInput: a threat other than L1, or scales that do not fall to 1.
    """
    threat = threat or L1()
    if not isinstance(threat, L1):
        raise BadInput(f"threat '{threat.name}': needs no larger balls: use l1")
    if not scales or scales[-1] != 1 or list(scales) != sorted(set(scales), reverse=True):
        raise BadInput(f"scales: {scales}: must fall and end at 1, as in (3, 2, 1)")
    return restarted(Attack("from_larger", threat, objective, FromLarger(scales), steps), restarts)
