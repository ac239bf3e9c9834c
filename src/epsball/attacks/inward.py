"""From an input that fools the model inward to the clean one: the last phases of the search for the smallest change."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.apgd import apgd
from epsball.attacks.combine import SmallestRadius, merged, nothing, opened
from epsball.attacks.minimal import offered
from epsball.attacks.registry import register
from epsball.core import Attack, Drop, Goal, Gradient, Key, Model, Outcome, Problem, Projects, Reading, Victim, Watch, autograd
from epsball.core.attack import recipe
from epsball.core.rows import per_sample
from epsball.core.rule import normalized
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L0, L1, L2, Linf


@dataclass(frozen=True)
class _Way:
    """Where a walk stands: at z inside `radius` (B,); `best` (B,) is the smallest success, +inf before the first."""

    z: Tensor
    radius: Tensor
    best: Tensor
    slope: Tensor
    looks: int
    steps: int


def first_points(problem: Problem, start: Tensor | None) -> Tensor:
    """`start`, one point (B, ...) per input still searched; None: the clean inputs.

    Raises:
        BadInput: another shape.
    """
    if start is None:
        return problem.x
    if start.shape != problem.x.shape:
        raise BadInput(f"start: {tuple(start.shape)} for inputs {tuple(problem.x.shape)}: give one point per input still searched")
    return start.to(problem.x)


def _begin(problem: Problem, start: Tensor | None, steps: int) -> _Way:
    z = problem.threat.project(problem.x, first_points(problem, start), torch.full_like(problem.radius, torch.inf))
    return _Way(z, problem.threat.size(problem.x, z), torch.full_like(problem.radius, torch.inf), torch.zeros_like(z), 0, max(steps, 1))


def _seen(problem: Problem, reading: Reading, state: _Way) -> tuple[Tensor, Tensor]:
    """(whether this look is a success (B,), the smallest size of all successes (B,))."""
    hit = problem.goal.reached(reading.output)
    size = problem.threat.size(problem.x, reading.z)
    return hit, torch.where(hit, torch.minimum(state.best, size), state.best)


_NEAR = 1.1
"""A ball so many times the budget is near: the last look, which is inside the budget whatever the ball, may still succeed."""


def _fall(looks: int, steps: int) -> float:
    """Half a cosine from 1 to a hundredth."""
    return 0.01 + 0.99 * (1 + math.cos(math.pi * looks / steps)) / 2


@dataclass(frozen=True)
class Inward:
    """A step along the gradient, then back into a ball that shrinks at a success and grows elsewhere, from `start` (B, ...).

    The start may lie outside the budget: until the walk is inside, `run` is shown the clean input; it ends inside. Where a success
    at every look left would not bring the ball near the budget, the search is over.

    The update is FMN's (Pintor et al. 2021, arXiv 2102.12827, Algorithm 1) from an adversarial start; steps are shares of the
    smallest success so far, along the sign of the gradient under Linf and the gradient itself elsewhere.

    Attributes:
        start: where each sample begins. share: first step, in sizes of the smallest success. gamma: first share by which the
            ball moves. Both fall like half a cosine, to a hundredth.
    """

    start: Tensor
    share: float = 0.3
    gamma: float = 0.05
    gradient: Gradient = autograd

    def init(self, problem: Problem, steps: int) -> _Way:
        """At the start."""
        return _begin(problem, self.start, steps)

    def step(self, problem: Problem, state: _Way) -> tuple[Reading, _Way]:
        """One look, one move."""
        reading = self.gradient(problem, state.z)
        hit, best = _seen(problem, reading, state)
        fall = _fall(state.looks, state.steps)
        gamma, known = self.gamma * fall, torch.isfinite(best)
        grown = torch.where(known, torch.minimum(state.radius * (1 + gamma), best * (1 - gamma / 2)), state.radius * (1 + gamma))
        radius = torch.where(hit, torch.minimum(state.radius, best) * (1 - gamma), grown)
        push = torch.nan_to_num(reading.gradient, nan=0.0)
        direction = push.sign() if isinstance(problem.threat, Linf) else normalized(push, 2)
        length = self.share * fall * torch.where(known, best, state.radius)
        over = radius * self._shrink(state.looks + 1, state.steps) > _NEAR * problem.radius
        last = torch.minimum(radius, problem.radius) if state.looks + 1 == state.steps else radius
        z = problem.threat.project(problem.x, state.z + per_sample(length, push) * direction, last)
        inside = problem.threat.size(problem.x, state.z) <= problem.radius
        shown = (
            offered(problem, reading, inside) if bool(inside.any()) else Reading(problem.x, problem.x, problem.clean, problem.clean_score)
        )
        return replace(shown, over=over & ~inside), replace(state, z=z, radius=radius, best=best, looks=state.looks + 1)

    def _shrink(self, looks: int, steps: int) -> float:
        """By what factor the ball shrinks if every look left is a success."""
        return math.prod(1 - self.gamma * _fall(look, steps) for look in range(looks, steps))


@dataclass(frozen=True)
class Corners:
    """For counted threats: always one pixel fewer than the best, on the pixels of largest gain, each at the end of its interval.

    The gain of a pixel is what the averaged gradient promises for moving it from its clean value to the better end of its
    interval: the optimum of a linear model. Gradients are taken where the search stands, so interactions correct the choice.

    Attributes:
        start: where each sample begins, None at the clean input. gamma: share of the pixels given up at once, at least one.
        memory: of the average.
    """

    start: Tensor | None = None
    gamma: float = 0.03
    memory: float = 0.8
    gradient: Gradient = autograd

    def init(self, problem: Problem, steps: int) -> _Way:
        """At the start."""
        return _begin(problem, self.start, steps)

    def step(self, problem: Problem, state: _Way) -> tuple[Reading, _Way]:
        """One look, one choice of pixels."""
        x, threat, reading = problem.x, problem.threat, self.gradient(problem, state.z)
        if not isinstance(threat, L0):
            raise BadInput(f"threat '{threat.name}': does not count pixels: use l0 or l0f")
        _, best = _seen(problem, reading, state)
        fewer = torch.minimum(best - 1, (best * (1 - self.gamma)).floor()).clamp(min=1.0)
        radius = torch.where(torch.isfinite(best), fewer, problem.radius)
        slope = self.memory * state.slope + (1 - self.memory) * normalized(reading.gradient, 2)
        low, high = threat.room.interval(x)
        z = threat.most(x, torch.where(slope > 0, high, low), slope, radius)
        return reading, replace(state, z=z, radius=radius, best=best, slope=slope, looks=state.looks + 1)


@register(
    paper="epsball; counts as in PGD_0, arXiv 1909.05040; averages as in MI-FGSM, arXiv 1710.06081",
    threats=("l0", "l0f"),
    kind="smallest",
    cost="steps forwards and backwards, 1 forward to judge",
)
def corners(steps: int = 100, memory: float = 0.8, threat: Projects | None = None) -> Attack:
    """From the clean input: always one pixel fewer than the best so far, those of the largest promised gain (`Corners`).

    Args:
        steps: looks. memory: of the averaged gradient, 0 to below 1. threat: L0.
    """
    if not 0 <= memory < 1:
        raise BadInput(f"memory: {memory}: must be 0 or more and less than 1")
    return Attack("corners", threat or L0(), margin, Corners(memory=memory), steps, smallest=True)


@dataclass(frozen=True, repr=False)
class OutsideIn:
    """See `outside_in`. With `smallest` the walk goes on after the first success inside the radius."""

    threat: Projects
    far: SmallestRadius
    steps: int
    smallest: bool = False
    name: str = "outside_in"

    def __call__(
        self,
        model: Model,
        x: Tensor,
        goal: Goal | Tensor,
        radius: float | Tensor,
        seed: int | Key = 0,
        *,
        clean: Tensor | None = None,
        drop: Drop = True,
        watch: Watch | None = None,
    ) -> Outcome:
        """As `Attack.__call__`. Where the box has no end nothing is far, nothing is searched and nothing spent."""
        with Victim.of(model) as victim:
            case = opened(victim, x, goal, radius, clean, seed)
            whole = nothing(case, self.threat.within(victim.box), self.steps)
            rows = (~whole.reached & ~whole.flags["invalid"]).nonzero().squeeze(1)
            reach = self.far.threat.within(victim.box).reach(case.x)[rows]
            if not len(rows) or not bool(torch.isfinite(reach).all()):
                return whole
            part = case.take(rows)
            c = replace(part, key=part.key.fold(self.name))
            # Dropping, whatever was asked: a search that goes on after its first success ends elsewhere, and so would the walk.
            away = replace(c, radius=reach).run(self.far, True, watch)
            # From 40 times as far as the end, say: exp(-gamma * steps / 2) is how far the ball can shrink.
            gamma, share = min(7.5 / max(self.steps, 1), 0.3), 0.1 if isinstance(self.threat, L1) else 0.3
            walk = inward(self.threat, away.x_adv, self.steps, share, gamma, smallest=self.smallest)
            found = c.run(walk, drop[rows] if isinstance(drop, Tensor) else drop, watch)
            spent = replace(found, queries=found.queries + away.queries, backwards=found.backwards + away.backwards)
        return merged(whole, rows, spent, smallest=self.smallest)

    def __repr__(self) -> str:
        return recipe(self)


@register(
    paper="epsball; parts: APGD arXiv 2003.01690, FMN arXiv 2102.12827",
    threats=("linf", "l2", "l1"),
    cost="steps and at most (rounds + 1) * far more forwards and backwards, 1 forward to judge",
)
def outside_in(steps: int = 150, threat: Projects | None = None, far: int = 20, rounds: int = 4) -> OutsideIn:
    """Fools the model far away by a few signed steps, then walks inward (`Inward`) until it is inside the radius.

    Near the clean input gradients can mislead: in a network trained against Linf they are all but zero along the changes that
    matter under L2 and L1. They do not from the other side of the boundary.

    Args:
        steps: of the walk. threat: Linf, L2 or L1. far: signed steps of the search far away. rounds: by which that is bisected.
    """
    threat = threat or L2()
    if not isinstance(threat, (Linf, L2, L1)):
        raise BadInput(f"threat '{threat.name}': has no ball to shrink: use linf, l2 or l1")
    if steps < 0:
        raise BadInput(f"steps: {steps}: must be 0 or more")
    away = SmallestRadius(apgd(min(far, steps), threat=Linf(threat.room), objective=margin), rounds)
    return OutsideIn(threat, away, steps)


def inward(threat: Projects, start: Tensor, steps: int, share: float, gamma: float, smallest: bool = True) -> Attack:
    """The walk that suits the threat, as an attack on exactly the samples that `start` (B, ...) holds.

    Cost: steps forwards and backwards, 1 forward to judge.
    """
    walk = Corners(start) if isinstance(threat, L0) else Inward(start, share, gamma)
    return Attack("inward", threat, margin, walk, steps, smallest)
