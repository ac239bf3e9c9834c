"""The first attack of all (Szegedy et al. 2014, arXiv 1312.6199): box-constrained L-BFGS, here for a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.minimal import Bracket, Round, first_weight, hushed, limits
from epsball.attacks.registry import register
from epsball.core import Attack, Gradient, Problem, Projects, Reading, Untargeted, autograd
from epsball.core.rows import rowwise
from epsball.core.threat import Z
from epsball.errors import BadInput
from epsball.objectives import cross_entropy
from epsball.threats import L2


def likelihood(problem: Problem, z: Z, x_adv: Tensor, output: Tensor) -> Tensor:
    """log p(target); untargeted log(1 - p(label)), which is bounded where the negated cross-entropy is not."""
    if not isinstance(problem.goal, Untargeted):
        return cross_entropy(problem, z, x_adv, output)
    others = output.scatter(1, problem.goal.labels[:, None], -torch.inf)
    return others.logsumexp(1) - output.logsumexp(1)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(1)


@dataclass(frozen=True)
class _Memory:
    """The last pairs, newest first: moves (B, m, F), and differences of the likelihood's gradient; pairs of zeros are empty.

    The curvature of the whole loss, 2 move + c * difference, is put together when it is needed: a new c spoils no pair.
    """

    moves: Tensor
    turns: Tensor

    def pushed(self, where: Tensor, move: Tensor, turn: Tensor) -> _Memory:
        """One pair more in the rows `where` (B,)."""
        wide = where[:, None, None]
        moves = torch.where(wide, torch.cat([move[:, None], self.moves[:, :-1]], 1), self.moves)
        return _Memory(moves, torch.where(wide, torch.cat([turn[:, None], self.turns[:, :-1]], 1), self.turns))

    def direction(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """-H g by the two-loop recursion (Nocedal & Wright, Algorithm 7.4), every row by itself; pairs without curvature are skipped."""
        bends = 2 * self.moves + weight[:, None, None] * self.turns
        curve = (self.moves * bends).sum(2)
        real = curve > 1e-10 * bends.square().sum(2)
        rho = torch.where(real, 1 / curve.where(real, torch.ones_like(curve)), torch.zeros_like(curve))
        q, alphas = gradient, []
        for i in range(self.moves.shape[1]):
            alphas.append(rho[:, i] * _dot(self.moves[:, i], q))
            q = q - alphas[-1][:, None] * bends[:, i]
        # Without any pair the loss counts as |d|^2, whose Hessian is 2.
        scale = torch.where(real[:, 0], curve[:, 0] / bends[:, 0].square().sum(1).clamp(min=1e-300), torch.full_like(weight, 0.5))
        r = scale[:, None] * q
        for i in reversed(range(self.moves.shape[1])):
            r = r + (alphas[i] - rho[:, i] * _dot(bends[:, i], r))[:, None] * self.moves[:, i]
        return -r


@dataclass(frozen=True)
class _Descent:
    """`z` is the best success, x where none. The search stands at `here` (B, F), float64, and tries `here` + `length` * `way`."""

    z: Tensor
    best: Tensor
    here: Tensor
    loss: Tensor
    slope: Tensor
    way: Tensor
    length: Tensor
    won: Tensor
    trial: Tensor
    memory: _Memory
    round: Round
    bracket: Bracket | None


@dataclass(frozen=True)
class ProjectedLbfgs:
    """Minimizes |x_adv - x|^2 - c log p(goal) in the box: a quasi-Newton direction over the free features, then a line search.

    Features at a bound that the gradient pushes outward stay out of the direction; a trial is clipped to the box and accepted
    by Armijo's rule, else tried again nearer by interpolation. One look is one trial of every sample; nobody waits for
    another's line search. A round ends after `steps` looks, or after steps / 5 without progress, and c is bisected.
    """

    steps: int
    rounds: int
    pairs: int = 8
    first: float = 2.0
    growth: float = 3.0
    gradient: Gradient = autograd

    def init(self, problem: Problem, steps: int) -> _Descent:
        """At the clean input."""
        flat = problem.x.double().flatten(1)
        nothing, zero = torch.full_like(problem.radius, torch.inf), torch.zeros_like(problem.radius)
        memory = _Memory(*(flat.new_zeros(len(flat), self.pairs, flat.shape[1]) for _ in range(2)))
        never, start = zero.bool(), problem.x.clone()
        return _Descent(start, nothing, flat, nothing, flat * 0, flat * 0, zero, never, start, memory, Round.first(nothing), None)

    def step(self, problem: Problem, state: _Descent) -> tuple[Reading, _Descent]:
        """One trial of every sample."""
        reading = self.gradient(problem, state.trial)
        bracket = state.bracket or Bracket.start(self.first * first_weight(reading))
        success = problem.goal.reached(reading.output)
        size = problem.threat.size(problem.x, state.trial)
        better = success & (size < state.best)
        at = replace(
            state,
            z=torch.where(rowwise(better, state.trial), state.trial, state.z),
            best=torch.where(better, size, state.best),
            bracket=bracket,
        )
        at, over = self._accept(problem, at, bracket, reading, success)
        at = self._aim(problem, at, bracket, over)
        return replace(hushed(problem, reading, success), over=at.round.number >= self.rounds), at

    def _accept(self, problem: Problem, state: _Descent, bracket: Bracket, reading: Reading, success: Tensor) -> tuple[_Descent, Tensor]:
        """Armijo: the trial becomes `here`, or the length shrinks to the minimum of the parabola, by half to a tenth."""
        x, trial = problem.x.double().flatten(1), state.trial.double().flatten(1)
        slope = -torch.nan_to_num(reading.gradient.double(), nan=0.0, posinf=0.0, neginf=0.0).flatten(1)
        loss = -torch.nan_to_num(reading.score.double(), nan=-torch.inf)
        move, weight = trial - state.here, bracket.weight
        old = (state.here - x).square().sum(1) + weight * state.loss
        new = (trial - x).square().sum(1) + weight * loss
        ahead = _dot(2 * (state.here - x) + weight[:, None] * state.slope, move)
        taken = (new <= old + 1e-4 * ahead) | torch.isinf(state.loss)
        parabola = -ahead / (2 * (new - old - ahead)).clamp(min=1e-300)
        length = state.length * torch.nan_to_num(parabola, nan=0.5).clamp(0.1, 0.5)
        here, wide = torch.where(taken[:, None], trial, state.here), taken[:, None]
        rnd = state.round.after(torch.where(taken, new, old), success)
        over = (rnd.looks >= self.steps) | (rnd.stale >= max(self.steps // 5, 1))
        won = torch.where(taken, success, state.won)
        return replace(
            state,
            here=here,
            loss=torch.where(taken, loss, state.loss),
            slope=torch.where(wide, slope, state.slope),
            memory=state.memory.pushed(taken & torch.isfinite(state.loss), move, slope - state.slope),
            length=torch.where(taken | over, torch.ones_like(length), length),
            way=torch.where(wide, torch.full_like(state.way, torch.nan), state.way),
            won=won,
            round=rnd,
        ), over

    def _aim(self, problem: Problem, state: _Descent, bracket: Bracket, over: Tensor) -> _Descent:
        """The next trial; a new direction where the last trial was taken or a new c begins."""
        low, high = (bound.double().flatten(1) for bound in limits(problem))
        x = problem.x.double().flatten(1)
        bracket, rnd = bracket.next(over, state.won, self.growth), state.round.restarted(over)
        gradient = 2 * (state.here - x) + bracket.weight[:, None] * state.slope
        stuck = ((state.here <= low) & (gradient > 0)) | ((state.here >= high) & (gradient < 0))
        free = gradient.masked_fill(stuck, 0.0)
        way = state.memory.direction(bracket.weight, free).masked_fill(stuck, 0.0)
        downhill = _dot(way, free) < 0
        way = torch.where(downhill[:, None], way, -0.5 * free)
        way = torch.where((over | torch.isnan(state.way[:, 0]))[:, None], way, state.way)
        trial = torch.minimum(torch.maximum(state.here + state.length[:, None] * way, low), high)
        trial = torch.where(torch.isfinite(trial), trial, state.here).to(problem.x.dtype).reshape(problem.x.shape)
        return replace(state, way=way, trial=trial, bracket=bracket, round=rnd)


@register(
    paper="Szegedy et al. 2014, arXiv 1312.6199, section 4.1",
    threats=("l2",),
    kind="smallest",
    cost="at most steps * rounds forwards and backwards",
)
def lbfgs(steps: int = 20, rounds: int = 10, threat: Projects | None = None) -> Attack:
    """Box-constrained L-BFGS: min |d|^2 - c log p(target) inside the box, c by bisection. Untargeted: log(1 - p(label)).

    Differences from the paper: the constant multiplies the likelihood, not the distance, and the distance is squared (smooth);
    c starts at twice what a linear model would need, and a round starts where the last one ended. The line search is
    Armijo's, per sample, over a projected direction instead of SciPy's subspace minimization.

    Args:
        steps: looks (trials) of a round, at most. rounds: values of c.
    """
    if rounds < 1:
        raise BadInput(f"rounds: {rounds}: must be 1 or more")
    return Attack("lbfgs", threat or L2(), likelihood, ProjectedLbfgs(steps, rounds), steps * rounds, smallest=True)
