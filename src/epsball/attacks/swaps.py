"""Local search under L1: part of the change goes from the features where it helps least to those where it promises most."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.inward import first_points
from epsball.attacks.minimal import limits
from epsball.attacks.registry import register
from epsball.core import Attack, Gradient, Objective, Problem, Projects, Reading, autograd, valid
from epsball.core.rows import rowwise
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L1

_ENDS = 128
"""Features of either kind, those that give and those that receive, among which tries choose."""
_GUARD = 1 - 1e-5
"""Share of the radius that tries fill: what single precision may be off by when it sums up a change."""


@dataclass(frozen=True)
class _Trial:
    """Where a search stands after `looks` looks: at z (B, ...); `idle` (B,): looks since the last that found a better point."""

    z: Tensor
    idle: Tensor
    looks: int


@dataclass(frozen=True)
class Swaps:
    """From `start` (B, ...): of `tries` changes of the change, each looked at without a gradient, the best, while there is a better one.

    A try takes up to a share of the budget away where <slope, change> is least, and spends it where the slope is largest, feature
    after feature to the end of its interval: pairwise steps of Frank & Wolfe (Lacoste-Julien & Jaggi 2015, arXiv 1511.05932,
    Algorithm 2), by feature. How much moves is drawn (uniform up to one of `shares` of the budget), and every slope is multiplied by
    its own draw (lognormal, `spread`), so that tries differ; gradients only tell of small changes, and these are not small.

    Large shares suit a search from the clean input, small ones one that goes on from where another ended (`benchmarks/l1_starts.py`).
    Cost: 1 forward and backward and `tries` forwards per look.

    Attributes:
        tries: looks without a gradient beside each with one. shares: of the budget, one try after another.
        start: where each sample begins, None at the clean input. spread: standard deviation of the logarithms of the factors.
        patience: looks in a row without a better point after which the search is over.
    """

    tries: int
    shares: tuple[float, ...]
    start: Tensor | None = None
    spread: float = 0.25
    patience: int = 3
    gradient: Gradient = autograd

    def init(self, problem: Problem, steps: int) -> _Trial:
        """At the start, drawn into the ball."""
        z = problem.threat.project(problem.x, first_points(problem, self.start), problem.radius)
        return _Trial(z, torch.zeros_like(problem.ids), 0)

    def step(self, problem: Problem, state: _Trial) -> tuple[Reading, _Trial]:
        """One look with a gradient, and one at every try."""
        here = self.gradient(problem, state.z)
        rows = torch.arange(len(problem), device=state.z.device)
        part = problem.take(rows.repeat_interleave(self.tries))
        there = part.judge(self._tries(problem, here, state.looks))
        worth = there.score.masked_fill(~valid(there.output), -torch.inf).reshape(len(rows), self.tries)
        best = worth.argmax(1) + self.tries * rows
        better = worth.amax(1) > here.score
        old, new = ((r.z, r.x_adv, r.output, r.score) for r in (here, there))
        found = Reading(*(torch.where(rowwise(better, a), b[best], a) for a, b in zip(old, new, strict=True)))
        idle = torch.where(better, torch.zeros_like(state.idle), state.idle + 1)
        z = problem.threat.project(problem.x, found.z, problem.radius)
        return replace(found, over=idle >= self.patience), _Trial(z, idle, state.looks + 1)

    def _tries(self, problem: Problem, here: Reading, looks: int) -> Tensor:
        """(B * tries, ...), those of a sample side by side, all inside box and ball."""
        n, x, z, slope = len(problem), problem.x.flatten(1), here.z.flatten(1), torch.nan_to_num(here.gradient).flatten(1)
        low, high = (end.flatten(1) for end in limits(problem))
        radius, most = _GUARD * problem.radius.to(x)[:, None], min(_ENDS, z.shape[1])
        drawn = problem.key.fold("swap", looks).normal(problem.ids, slope.new_empty(n, self.tries, 2 * most + 1))
        share = torch.special.ndtr(drawn[..., 0]) * slope.new_tensor(self.shares).repeat(self.tries)[: self.tries]  # uniform
        less, more = (self.spread * drawn[..., 1:]).exp().tensor_split(2, 2)
        tried = z[:, None].repeat(1, self.tries, 1)
        # Away from where the change helps least, but what the budget has left anyway.
        change = z - x
        keep = torch.where(change != 0, slope * change.sign(), torch.inf)
        worst = keep.topk(most, dim=1, largest=False).indices[:, None].expand_as(less)
        slack = (radius - change.abs().sum(1, keepdim=True)).clamp(min=0)
        held = _gathered(change, worst)
        away = _spent(held.abs(), less * _gathered(keep, worst), (share * radius - slack).clamp(min=0))
        tried.scatter_add_(2, worst, -away * held.sign())
        # To where it promises most.
        end = torch.where(slope > 0, high, low)
        steepest = torch.where(end != z, slope.abs(), -torch.inf).topk(most, dim=1).indices[:, None].expand_as(more)
        room = torch.minimum((_gathered(end, steepest) - tried.gather(2, steepest)).abs(), radius[..., None])
        free = (radius - (tried - x[:, None]).abs().sum(2)).clamp(min=0)
        steep = _gathered(slope, steepest)
        tried.scatter_add_(2, steepest, steep.sign() * _spent(room, -more * steep.abs(), free))
        legal: Tensor = tried.clamp_(low[:, None], high[:, None])
        return legal.reshape(n * self.tries, *problem.x.shape[1:])


def _gathered(values: Tensor, places: Tensor) -> Tensor:
    """(B, T, K): of values (B, F) those at places (B, T, K)."""
    return values[:, None].expand(-1, places.shape[1], -1).gather(2, places)


def _spent(room: Tensor, rank: Tensor, budget: Tensor) -> Tensor:
    """(B, T, K): the budget (B, T), given out by rising rank (B, T, K) until it is spent; no feature gets more than its room (B, T, K)."""
    order = rank.argsort(2)
    fits = room.gather(2, order)
    part = torch.minimum(fits, (budget[..., None] - (fits.cumsum(2) - fits)).clamp(min=0))
    return torch.zeros_like(part).scatter(2, order, part)


@register(
    paper="epsball; pairwise steps: Lacoste-Julien & Jaggi 2015, arXiv 1511.05932, Algorithm 2",
    threats=("l1",),
    cost="at most steps * (tries + 1) forwards and steps backwards, 1 forward to judge",
)
def swaps(
    steps: int = 20,
    threat: Projects | None = None,
    objective: Objective = margin,
    tries: int = 4,
    shares: tuple[float, ...] = (0.3, 1.0),
    start: Tensor | None = None,
) -> Attack:
    """Local search under L1: the best of a few changes of the change, looked at without a gradient, again and again (`Swaps`).

    Args:
        steps: looks with a gradient. threat: L1. objective: what is climbed. tries: looks without one, at each of them.
        shares: most of the budget that a try moves, one after another, above 0; (0.1, 0.3) where another search came close.
        start: (B, ...) where each sample begins, None at the clean input; as many as there are inputs to be searched, which those
            that are wrong already are not.

    Raises:
        BadInput: a threat other than L1, no try, or no share above 0.
    """
    threat = threat or L1()
    if not isinstance(threat, L1):
        raise BadInput(f"threat '{threat.name}': has no features to swap: use l1")
    if tries < 1:
        raise BadInput(f"tries: {tries}: must be 1 or more")
    if not shares or min(shares) <= 0:
        raise BadInput(f"shares: {shares}: must be one number above 0 or several, as in (0.3, 1)")
    return Attack("swaps", threat, objective, Swaps(tries, shares, start), steps)
