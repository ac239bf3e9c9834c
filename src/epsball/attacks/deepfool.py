"""DeepFool and SuperDeepFool: walk to the nearest linearized boundary until the class changes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.registry import register
from epsball.attacks.walk import Trail, UntilReached, begin, best_others, crossings, look, nearest_plane
from epsball.core import Attack, Problem, Projects, Reading, Untargeted, valid
from epsball.core.rows import per_sample, rowwise
from epsball.core.rule import normalized
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L2, Linf


@register(
    paper="Moosavi-Dezfooli et al. 2016, arXiv 1511.04599",
    threats=("l2", "linf"),
    kind="smallest",
    targeted=False,
    cost="per step a sample needs: 2 forwards (the first step 1), `candidates` backwards (3 from the third step on)",
)
def deepfool(steps: int = 50, overshoot: float = 0.02, candidates: int = 9, threat: Projects | None = None) -> Attack:
    """DeepFool, Algorithm 2: z <- z + (1 + overshoot) * |f| / ||w||_* * steepest(w) for the nearest class boundary f, w.

    With two classes this is the affine binary case, Algorithm 1: one step of |f| / ||w||_2 along w / ||w||_2. Under L2 the
    step follows w, under Linf its sign (section 3.3, q = 1). A sample leaves the batch at its first success.

    Args:
        steps: at most. overshoot: share added to each step, so that the boundary is crossed.
        candidates: how many other classes are tried, by clean logit; the released code tries 9. Each step goes on with the
            nearer half of them, three at least.
        threat: L2 or Linf.

    Differs from the paper, with the released code: the overshoot is applied while walking, not once at the end. Differs from
    the released code: iterates stay in box and radius, and instead of 1e-4 a thousandth of the change so far is added to a
    step, so that small distances stay exact. Differs from both: they try every class again at every step (on an MNIST CNN, 256
    images: 58.6 backwards instead of 26.5 for the same median size to four digits, under L2 and Linf).
    """
    return Attack("deepfool", threat or L2(), margin, UntilReached(ToNearest(overshoot, _positive(candidates))), steps, smallest=True)


def _positive(candidates: int) -> int:
    if candidates < 1:
        raise BadInput(f"candidates: {candidates}: must be 1 or more")
    return candidates


@dataclass(frozen=True)
class ToNearest:
    """Steps just over the nearest linearized boundary."""

    overshoot: float
    candidates: int
    least: float = 1e-3  # of the change so far, added to a step: where the box cuts every step short, it still gets across

    def start(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """The classes that are tried, (B, K), and the steps made, (B,)."""
        others = best_others(problem.goal, problem.clean, self.candidates)
        return others, torch.zeros_like(others[:, 0])

    def go(self, problem: Problem, z: Tensor, output: Tensor, memory: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Just over the nearest plane, then into the box. Cost: 1 forward and K backward rows, fewer from step to step."""
        others, made = memory
        count = max(3, others.shape[1] >> int(made.amax()))  # of samples that have made equally many steps
        threat, q = problem.threat, 1.0 if isinstance(problem.threat, Linf) else 2.0
        plane = nearest_plane(problem, z, *crossings(problem.goal, output, others[:, :count]), q)
        length = (1 + self.overshoot) * plane.distance + self.least * threat.size(problem.x, z)
        length = torch.where(torch.isfinite(plane.distance), length, 0.0)
        steepest = plane.slope.sign() if q == 1 else normalized(plane.slope, 2)
        if isinstance(problem.goal, Untargeted):
            order = plane.distances.argsort(dim=1, stable=True)
            others = torch.cat([others[:, :count].gather(1, order), others[:, count:]], 1)
        return threat.project(problem.x, z + per_sample(length, z) * steepest, problem.radius), (others, made + 1)


@register(
    paper="Abdollahpour et al. 2023, arXiv 2303.12481",
    threats=("l2",),
    kind="smallest",
    targeted=False,
    cost="rounds * (DeepFool's, 1 forward and 1 backward, `search` forwards)",
)
def superdeepfool(
    steps: int = 100,
    overshoot: float = 0.02,
    candidates: int = 5,
    rounds: int = 3,
    search: int = 6,
    back: float = 0.8,
    threat: Projects | None = None,
) -> Attack:
    """SuperDeepFool, SDF(inf, 1): DeepFool until the class changes, then along the normal of the boundary where it arrived.

    The smallest change is parallel to w, the gradient there of the new class's logit minus the label's. A round looks at
    x + t w / ||w||: t starts at the projection of DeepFool's point (Algorithm 2), grows by a quarter until the goal is reached,
    and is bisected then. The next round lets DeepFool walk on from `back` of that way and adds the unit normal found to w.

    Args:
        steps: looks at most. overshoot, candidates: as in `deepfool`. rounds: normals taken. search: looks
            along the last; half as many along those before, whose end is only a place to go on from. A fourth round, 8 looks and
            9 candidates make the change 1 % smaller for half as much again.

    Differs from the paper, which has no box and stops at the first projected point that reaches the goal: cut by the box such
    a point nearly always falls short, so the change is lengthened. Summing the normals is what the released code's running
    sum of projections does to the direction; its length is not doubled here.
    """
    for word, count in (("rounds", rounds), ("search", search)):
        if count < 1:
            raise BadInput(f"{word}: {count}: must be 1 or more")
    strategy = Orthogonal(ToNearest(overshoot, _positive(candidates)), rounds, search, back)
    return Attack("superdeepfool", threat or L2(), margin, strategy, steps, smallest=True)


@dataclass(frozen=True)
class _Turning:
    trail: Trail
    round: Tensor  # (B,) 0 before the first normal, then 1 .. rounds
    afoot: Tensor  # (B,) DeepFool walks; else a search along the normal
    asked: Tensor  # (B,) looks of this round
    normal: Tensor  # w (B, ...), a sum of unit normals
    t: Tensor  # (B,) looked at
    low: Tensor  # (B,) largest t that missed
    high: Tensor  # (B,) smallest t that reached, +inf before the first
    end: Tensor  # the last success

    @property
    def z(self) -> Tensor:
        """Where to look next."""
        return self.trail.z


@dataclass(frozen=True)
class Orthogonal:
    """DeepFool's walk, straightened: see `superdeepfool`. Each sample walks or searches by itself."""

    walk: ToNearest
    rounds: int
    search: int
    back: float

    def init(self, problem: Problem, steps: int) -> _Turning:
        """At the clean input."""
        trail, zero = begin(problem, self.walk.start(problem)), torch.zeros_like(problem.radius)
        none = zero.long()
        return _Turning(trail, none, none == 0, none, torch.zeros_like(trail.z), zero, zero, zero + torch.inf, trail.z)

    def step(self, problem: Problem, state: _Turning) -> tuple[Reading, _Turning]:
        """Look; then walk, turn, or go to the next t."""
        reading, trail, _ = look(problem, state.trail)
        hit = problem.goal.reached(trail.output)
        s = replace(
            state,
            low=torch.where(hit, state.low, torch.maximum(state.low, state.t)),
            high=torch.where(hit, torch.minimum(state.high, state.t), state.high),
            end=torch.where(rowwise(hit, state.end), trail.z, state.end),
        )
        most = torch.where(s.round == self.rounds, self.search, (self.search + 1) // 2)
        over = ~s.afoot & (s.asked >= most)
        walking = valid(trail.output) & ~(over & (s.round == self.rounds))
        stepping = s.afoot & ~hit & walking
        s = self._turned(problem, s, (s.afoot & hit & walking).nonzero().squeeze(1))
        t = torch.where(s.asked == 0, s.t, torch.where(torch.isfinite(s.high), (s.low + s.high) / 2, 1.25 * s.t))
        t = torch.where(over, self.back * t, t)
        along = problem.threat.project(problem.x, problem.x + per_sample(t, trail.z) * normalized(s.normal, 2), problem.radius)
        z = torch.where(rowwise(~s.afoot & walking, trail.z), along, trail.z)
        for first in (True, False):  # later walks try the nearest classes only
            z, trail = self._walked(problem, trail, z, (stepping & ((s.round == 0) == first)).nonzero().squeeze(1), first)
        walking &= ~stepping | (z != trail.z).flatten(1).any(1)
        return replace(reading, over=~walking), replace(s, t=t, asked=s.asked + 1, afoot=s.afoot | over, trail=replace(trail, z=z))

    def _walked(self, problem: Problem, trail: Trail, z: Tensor, rows: Tensor, first: bool) -> tuple[Tensor, Trail]:
        """`z` with DeepFool's step at `rows`, and the trail with their classes in the order found."""
        if not len(rows):
            return z, trail
        others, made = trail.memory
        known = others[rows], torch.full_like(made[rows], 0 if first else self.walk.candidates)
        moved, (ordered, _) = self.walk.go(problem.take(rows), trail.z[rows], trail.output[rows], known)
        return z.index_copy(0, rows, moved), replace(trail, memory=(others.index_copy(0, rows, ordered), made))

    def _turned(self, problem: Problem, s: _Turning, rows: Tensor) -> _Turning:
        """`rows` begin a round: one more normal, at their last success; t at the projection. Cost: 1 forward and 1 backward row."""
        if not len(rows):
            return s
        part, end = problem.take(rows), s.end[rows]
        own, _ = crossings(part.goal, s.trail.output[rows], s.trail.memory[0][rows])
        beyond = s.trail.output[rows].scatter(1, own[:, None], -torch.inf).argmax(1, keepdim=True)
        plane = nearest_plane(part, end, own, beyond, 2.0)
        total = s.normal[rows] + normalized(plane.slope, 2)
        t = ((end - part.x) * normalized(total, 2)).flatten(1).sum(1).double().clamp(min=0.0)
        return replace(
            s,
            round=s.round.index_add(0, rows, torch.ones_like(rows)),
            afoot=s.afoot.index_fill(0, rows, False),
            asked=s.asked.index_fill(0, rows, 0),
            normal=s.normal.index_copy(0, rows, total),
            t=s.t.index_copy(0, rows, t),
            low=s.low.index_copy(0, rows, t / 2),
            high=s.high.index_fill(0, rows, torch.inf),
        )
