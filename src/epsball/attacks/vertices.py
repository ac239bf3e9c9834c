"""Conditional gradients under L1: from vertex to vertex of balls that shrink to the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from epsball.attacks.hopeless import Margins
from epsball.attacks.inward import first_points
from epsball.attacks.minimal import limits, offered
from epsball.attacks.registry import register
from epsball.core import Attack, Gradient, Objective, Problem, Projects, Reading, autograd
from epsball.core.rows import per_sample
from epsball.core.rule import normalized
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L1

_LARGER = 0.5
"""Share of the looks that larger balls take."""
_SORTED = 256
"""Features up to which sorting all takes no longer than finding the steepest."""
_CHECKS = (0.3, 0.6, 0.85, 1.0)
"""Shares of those after which a search that has reached its goal nowhere since the last check is over."""
_RECENT = 0.15
"""Share of the looks over which margins inside the budget are compared."""
_SWINGS = 2.0
"""A search inside the budget is over where its best margin is more of these below 0: largest less least of the recent margins."""


def vertex(problem: Problem, slope: Tensor, radius: Tensor) -> Tensor:
    """(B, ...): the point of the L1 ball of `radius` (B,) and the box where <slope, z> is largest.

    The features of largest slope go to the ends of their intervals, one after another, until the radius is spent. Exact.
    """
    low, high = limits(problem)
    end = torch.where(slope > 0, high, low)
    room = torch.minimum((end - problem.x).abs(), per_sample(radius, slope)).flatten(1)
    steep, most = slope.flatten(1).abs().masked_fill_(room == 0, -1.0), radius.to(room)
    if room.shape[1] <= _SORTED:
        move = _spent(steep.argsort(1, descending=True), room, most)
    else:  # few features usually do; who needs more is seen row by row, so that the batch decides nothing
        first = steep.topk(room.shape[1] // 8, dim=1).indices
        move, short = _spent(first, room, most), (room.gather(1, first).sum(1) < most).nonzero().squeeze(1)
        if len(short):
            move = move.index_copy(0, short, _spent(steep[short].argsort(1, descending=True), room[short], most[short]))
    return problem.x + move.reshape(slope.shape) * slope.sign()


def _spent(order: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """(B, F): the radius (B,), given out in this order (B, K) until it is spent; no feature gets more than its room (B, F)."""
    fits = room.gather(1, order)
    part = torch.minimum(fits, (radius[:, None] - (fits.cumsum(1) - fits)).clamp(min=0))
    return torch.zeros_like(room).scatter(1, order, part)


@dataclass(frozen=True)
class _Tour:
    """`first`, `share` (B,): radius of the first ball, in budgets, and first step. `slope` (B, ...): averaged unit gradients.

    `hit` (B,): some look since the last check reached the goal. `larger`: looks in larger balls. `margins`: those inside the budget.
    """

    z: Tensor
    first: Tensor
    share: Tensor
    slope: Tensor
    hit: Tensor
    margins: Margins
    looks: int
    larger: int
    steps: int


@dataclass(frozen=True)
class Vertices:
    """z <- P(z + share * (v - z)), v the best vertex of the ball for the averaged gradient (Frank & Wolfe 1956, with memory).

    The ball shrinks geometrically from `first` budgets to one over the first half of the looks: in large balls the features that
    matter show themselves. Which ball is large enough hangs on the model: 3 budgets for standard networks, 30, with shorter steps,
    for adversarially trained ones. So every run draws its own. Steps are as long as the ball is wide, so that nothing has to be tuned
    to it. Where no look since the last of four checks reached the goal in a larger ball, the search is over, for smaller balls lie
    inside it: many such short runs break more than few long ones. Inside the budget it is over where margins no longer swing far enough
    to reach the goal (`Margins.hopeless`). Outside the budget `run` is shown the clean input.

    Attributes:
        first: radii between which that of the first ball is drawn (uniform in its logarithm), in budgets, 1 or more.
        share: first step, in ways to the vertex, in the largest first ball and in the least; in proportion to the logarithm between. Where
            both are one ball, every run draws its step. Both may be (B,) for each sample.
        last: last step; half a cosine leads there. memory: of the averaged gradient.
        noise: from a random point of a first ball that is drawn; else from the clean input, in the largest.
        start: (B, ...) where each sample begins instead; None: as `noise` says.
    """

    first: tuple[float | Tensor, float | Tensor]
    share: tuple[float | Tensor, float | Tensor] = (0.5, 0.8)
    last: float = 0.25
    memory: float = 0.7
    gradient: Gradient = autograd
    noise: bool = True
    start: Tensor | None = None
    by_row: ClassVar = ("first", "share")

    def init(self, problem: Problem, steps: int) -> _Tour:
        """At the start, or at a random point of the first ball."""
        (least, most), (short, long) = self.first, self.share
        drawn = torch.ones_like(problem.radius)
        if self.noise:
            drawn = problem.key.fold("tour").uniform(problem.ids, drawn)
        first, share = least * (most / least) ** drawn, long + (short - long) * drawn
        if self.start is None:
            z = problem.threat.start(problem.x, first * problem.radius, problem.key if self.noise else None, problem.ids)
        else:
            z = problem.threat.project(problem.x, first_points(problem, self.start), first * problem.radius)
        larger, hit = round(_LARGER * steps) if bool((first > 1).any()) else 0, torch.zeros(len(z), dtype=torch.bool, device=z.device)
        margins = Margins.none(problem, 1 + max(round(_RECENT * steps), 2))
        return _Tour(z, first, share, torch.zeros_like(z), hit, margins, 0, larger, steps)

    def step(self, problem: Problem, state: _Tour) -> tuple[Reading, _Tour]:
        """One look, one step toward a vertex of the next ball."""
        reading = self.gradient(problem, state.z)
        looks, hit = state.looks + 1, state.hit | problem.goal.reached(reading.output)
        shown, larger = reading, state.larger
        if state.looks < larger:
            inside = problem.threat.size(problem.x, reading.z) <= problem.radius
            check = looks in {round(part * larger) for part in _CHECKS}
            shown = replace(offered(problem, reading, inside), over=~hit & (state.first > 1) if check else None)
            hit = torch.zeros_like(hit) if check else hit
        else:
            state = replace(state, margins=state.margins.seen(problem, reading))
            shown = replace(reading, over=state.margins.hopeless(_SWINGS))
        slope = self.memory * state.slope + normalized(reading.gradient, 2)
        radius = self._scale(state, looks) * problem.radius
        fall = (1 + math.cos(math.pi * state.looks / state.steps)) / 2
        share = self.last + (state.share - self.last) * fall
        moved = state.z + per_sample(share, state.z) * (vertex(problem, slope, radius) - state.z)
        z = problem.threat.project(problem.x, moved, radius)
        return shown, replace(state, z=z, slope=slope, hit=hit, looks=looks)

    def _scale(self, state: _Tour, looks: int) -> Tensor:
        """Radius (B,) of the ball of a look, in budgets."""
        return state.first ** (1 - looks / state.larger) if looks < state.larger else torch.ones_like(state.first)


@register(
    paper="epsball; the step is Frank & Wolfe's, 1956; larger balls as in arXiv 2103.01208 and the released AutoAttack",
    threats=("l1",),
    cost="at most steps forwards and backwards, 1 forward to judge",
)
def vertices(
    steps: int = 20, threat: Projects | None = None, objective: Objective = margin, first: tuple[float, float] = (3.0, 30.0)
) -> Attack:
    """Conditional gradients under L1 in balls that shrink to the budget (`Vertices`). Many short runs beat few long ones: `Restarts`.

    Args:
        steps: looks, over all balls. threat: L1. objective: what is climbed.
        first: least and largest radius of the first ball, in budgets, 1 or more; drawn for every run.

    Raises:
        BadInput: a threat other than L1, a first ball inside the budget, or a largest one smaller than the least.
    """
    threat = threat or L1()
    if not isinstance(threat, L1):
        raise BadInput(f"threat '{threat.name}': has no sparse vertices: use l1")
    if not 1 <= first[0] <= first[1]:
        raise BadInput(f"first: {first}: must be two rising numbers of 1 or more, as in (3, 30)")
    return Attack("vertices", threat, objective, Vertices(first), steps)
