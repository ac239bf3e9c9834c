"""Elastic-net attack (Chen et al. 2018, arXiv 1709.04114): sparse changes by iterative shrinkage, the constant by bisection."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.minimal import Bracket, Round, finite, first_weight, hushed, less, limits, offered, width
from epsball.attacks.registry import register
from epsball.core import Attack, Gradient, Problem, Projects, Reading, autograd
from epsball.core.rows import per_sample, rowwise
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L1


@dataclass(frozen=True)
class _Shrunk:
    """`z` is the best success by the decision rule, x where none, with the model's answer and its score there.

    `begun` is the best when the round began, `here` the last shrunken point, `ahead` where the next look is.
    """

    z: Tensor
    best: Tensor
    begun: Tensor
    here: Tensor
    ahead: Tensor
    low: Tensor
    high: Tensor
    beta: Tensor
    round: Round
    bracket: Bracket | None
    output: Tensor
    score: Tensor


@dataclass(frozen=True)
class ElasticNet:
    """Minimizes |d|_2^2 + beta |d|_1 + c max(kappa - margin, 0): a gradient step on the smooth part, then shrinkage toward x by beta.

    A round ends after `steps` looks, or after steps / 5 but at least `patience` without progress. Looks that short rounds leave
    over go to more rounds, while these still gain.

    Attributes:
        steps: looks of one round. rounds: values of c that there are looks for. beta: weight of |d|_1, for a box of width 1. rate:
            first step size, falling with the root of the looks left. kappa: least margin of a success. fast: with momentum
            (FISTA), else ISTA. sparse: the decision rule is the smallest |d|_1, else the smallest elastic net. gain: share by
            which a round beyond `rounds` must make the best smaller, for another one.
    """

    steps: int
    rounds: int
    beta: float
    rate: float
    kappa: float
    fast: bool
    sparse: bool
    first: float = 2.0
    growth: float = 10.0
    gain: float = 0.01
    patience: int = 8
    gradient: Gradient = autograd

    def init(self, problem: Problem, steps: int) -> _Shrunk:
        """At the clean input."""
        low, high = limits(problem)
        x, nothing = problem.x, torch.full_like(problem.radius, torch.inf)
        score = torch.zeros_like(problem.clean[:, 0])
        beta = self.beta * width(problem)
        return _Shrunk(x.clone(), nothing, nothing, x, x, low, high, beta, Round.first(nothing), None, problem.clean, score)

    def step(self, problem: Problem, state: _Shrunk) -> tuple[Reading, _Shrunk]:
        """One look, one shrinkage."""
        reading = self.gradient(problem, state.ahead)
        bracket = state.bracket or self._start(state, reading)
        success = problem.goal.reached(reading.output) & (reading.score >= self.kappa)
        change = state.ahead - problem.x
        flat = change.flatten(1)
        ones, twos = flat.abs().sum(1).double(), flat.square().sum(1).double()
        net = twos + state.beta * ones
        measure = ones if self.sparse else net
        better = success & (measure < state.best)
        rnd = state.round.after(net + bracket.weight * (self.kappa - reading.score.double()).clamp(min=0.0), success)
        over = (rnd.looks >= self.steps) | (rnd.stale >= max(self.steps // 5, self.patience))
        here, ahead = self._shrink(problem, state, change, finite(reading.gradient), bracket.weight * ~success)
        bracket = bracket.next(over, rnd.since < rnd.stale.clamp(min=1), self.growth)
        rnd, best = rnd.restarted(over), torch.where(better, measure, state.best)
        done = over & (rnd.number >= self.rounds) & torch.isfinite(best) & (best >= (1 - self.gain) * state.begun)
        state = replace(
            state,
            z=_put(state.z, reading.z, better),
            best=best,
            begun=torch.where(over, best, state.begun),
            here=here,
            ahead=_put(ahead, here, over),
            round=rnd,
            bracket=bracket,
            output=torch.where(better[:, None], reading.output, state.output),
            score=torch.where(better, reading.score, state.score),
        )
        return self._shown(problem, state, reading, success, done), state

    def _shown(self, problem: Problem, state: _Shrunk, reading: Reading, success: Tensor, done: Tensor) -> Reading:
        """Successes; under the elastic-net rule only the last best, because `run` would rank successes by the threat's size."""
        if self.sparse:
            return hushed(problem, reading, success, done)
        last = done & torch.isfinite(state.best)
        z = torch.where(rowwise(last, state.z), state.z, reading.z)
        output, score = torch.where(last[:, None], state.output, reading.output), torch.where(last, state.score, reading.score)
        return replace(offered(problem, Reading(z, z, output, score), last), over=done)

    def _start(self, state: _Shrunk, reading: Reading) -> Bracket:
        """Twice what a linear model would need, and enough for the steepest feature to survive the first shrinkage twice over."""
        steepest = torch.nan_to_num(reading.gradient.double(), nan=0.0, posinf=0.0, neginf=0.0).flatten(1).abs().amax(1)
        least = torch.where(steepest > 0, 2 * state.beta / (self.rate * steepest).clamp(min=1e-300), torch.zeros_like(steepest))
        return Bracket.start(torch.maximum(self.first * first_weight(reading), least))

    def _shrink(self, problem: Problem, state: _Shrunk, change: Tensor, push: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(next point, point of the next look), eqs. 5 to 7; `push` counts by `weight` (B,). Both are x where nothing changes."""
        x, looks, beta = problem.x, state.round.looks.double(), per_sample(state.beta, problem.x)
        rate = self.rate * (1 - looks / max(self.steps, 1)).clamp(min=0.0).sqrt()
        change = (per_sample(1 - 2 * rate, x) * change).addcmul_(per_sample(rate * weight, x), push)
        here = torch.clamp(less(change, beta).add_(x), state.low, state.high)
        if not self.fast:
            return here, here
        drift = (here - state.here).mul_(per_sample(looks / (looks + 3), x))
        return here, torch.clamp(drift.add_(here), state.low, state.high)


def _put(old: Tensor, new: Tensor, chosen: Tensor) -> Tensor:
    """`old` (B, ...), and `new` (B, ...) where `chosen` (B,)."""
    rows = chosen.nonzero().squeeze(1)
    return old.index_copy(0, rows, new[rows]) if len(rows) else old


@register(
    paper="Chen et al. 2018, arXiv 1709.04114",
    threats=("l1",),
    kind="smallest",
    cost="at most steps * rounds forwards and backwards",
)
def ead(
    steps: int = 50,
    rounds: int = 9,
    beta: float = 0.03,
    kappa: float = 0.0,
    step: float = 0.01,
    rule: str = "l1",
    fast: bool = True,
    threat: Projects | None = None,
) -> Attack:
    """Elastic-net attack: min |d|_2^2 + beta |d|_1 + c max(kappa - margin, 0) by FISTA, c by bisection. Sparse, small L1 changes.

    Differences from the released code: the point that is looked at (y in the paper, inside the box) is the one that is judged and
    returned, which saves a forward; c starts at twice what a linear model would need instead of 1e-3, a round starts where the
    last one ended, samples abort and change rounds one by one.

    Args:
        steps: looks of a round, at most. rounds: values of c; more where rounds end early and still gain. beta: weight of |d|_1,
            for a box of width 1. kappa: least margin of a success, in logits. step: first step size. rule: which success is
            kept: the smallest "l1" norm or the smallest elastic net, "en". fast: FISTA, else ISTA.
    """
    if rounds < 1:
        raise BadInput(f"rounds: {rounds}: must be 1 or more")
    if rule not in ("l1", "en"):
        raise BadInput(f"rule: '{rule}': unknown: use l1 or en")
    if kappa < 0 or step <= 0 or beta < 0:
        raise BadInput(f"kappa: {kappa}, step: {step}, beta: {beta}: kappa and beta must be 0 or more, step more than 0")
    strategy = ElasticNet(steps, rounds, beta, step, kappa, fast, rule == "l1")
    return Attack("ead", threat or L1(), margin, strategy, steps * rounds, smallest=True)
