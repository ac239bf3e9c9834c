"""Carlini & Wagner 2017, arXiv 1608.04644: L2, Linf and L0, each a weighted sum of a distance and of the margin, by Adam under a tanh."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from epsball.attacks.minimal import Bracket, Round, finite, first_weight, hushed, limits, width
from epsball.attacks.registry import register
from epsball.core import Attack, Gradient, Problem, Projects, Reading, autograd
from epsball.core.rows import per_sample, rowwise
from epsball.core.rule import lengths
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L0, L2, Linf

# The one search of all three norms.


@dataclass(frozen=True)
class Aim:
    """What a norm's schedule asks for now, (B,) each: weight of the margin, share of Adam's learning rate, who is done; its own memory.

    `allowed` (B, ...) bool: where x may change at all; None is everywhere.
    """

    weight: Tensor
    rate: Tensor
    done: Tensor
    memory: Any
    allowed: Tensor | None = None


class Schedule(Protocol):
    """How the distance is measured while searching, and what changes between two rounds."""

    @property
    def returns(self) -> bool:
        """Each round starts at the best success; else where the last one ended."""

    def start(self, problem: Problem, reading: Reading) -> Aim:
        """From the first look, which is at the clean input."""

    def distance(self, aim: Aim, change: Tensor) -> tuple[Tensor, Tensor]:
        """The smooth distance (B,) float64 and its gradient by the change (B, ...)."""

    def next(self, problem: Problem, aim: Aim, rnd: Round, reading: Reading, success: Tensor, late: Tensor) -> tuple[Aim, Tensor]:
        """After a look; `late` (B,): time is up or nothing improves. Returns what holds from now on, and whose round is over (B,)."""


@dataclass(frozen=True)
class _Walk:
    """`z` is the best success, x where none, `home` its w, and `begun` the best when the round began; the search itself stands at w.

    `half` (B, ...) leads from tanh w to the input, `low` and `high` bound it; `start` is the tanh w of x.
    """

    z: Tensor
    best: Tensor
    begun: Tensor
    home: Tensor
    w: Tensor
    start: Tensor
    half: Tensor
    low: Tensor
    high: Tensor
    mean: Tensor
    square: Tensor
    round: Round
    aim: Aim | None


@dataclass(frozen=True)
class TanhAdam:
    """Minimizes distance + weight * max(kappa - margin, 0) over w, x_adv = low + (high - low) (tanh(w) / edge + 1) / 2, by Adam.

    `edge` < 1 keeps the slope of tanh away from 0 for features that start at the end of their interval, as most of MNIST's
    do; w stays within |tanh w| <= edge, and a feature whose w never moved is exactly that of x. Adam's memory and the round
    counters are per sample; a round ends after `steps` looks, or after steps / 5 without progress; each round starts at
    the best success, or where the last one ended. Looks that short rounds leave over go to more rounds, while these still gain.

    Attributes:
        schedule: the norm. steps: looks of one round. rounds: rounds of full length that there are looks for. rate: Adam's
            learning rate in w. kappa: least margin of a success, in logits. gain: share by which a round beyond `rounds` must
            make the best smaller, for another one.
    """

    schedule: Schedule
    steps: int
    rounds: int
    rate: float
    kappa: float = 0.0
    edge: float = 0.98
    gain: float = 0.01
    gradient: Gradient = autograd

    def init(self, problem: Problem, steps: int) -> _Walk:
        """At the clean input."""
        x = problem.x
        low, high = limits(problem)
        if not bool(torch.isfinite(high - low).all()):
            raise BadInput("box: infinite: Carlini & Wagner's tanh needs a finite one: declare the box of the model")
        wide = torch.promote_types(x.dtype, torch.float32)
        middle, half = (low.to(wide) + high.to(wide)) / 2, (high.to(wide) - low.to(wide)) / 2
        w = torch.atanh(self.edge * ((x.to(wide) - middle) / half.where(half > 0, torch.ones_like(half))).clamp(-1, 1))
        zero, none = torch.zeros_like(w), torch.full_like(problem.radius, torch.inf)
        return _Walk(x.clone(), none, none, w, w, tanh_of(w), half / self.edge, low, high, zero, zero, Round.first(none), None)

    def step(self, problem: Problem, state: _Walk) -> tuple[Reading, _Walk]:
        """One look, one step of Adam."""
        tanh = tanh_of(state.w)
        image = self._image(problem, state, tanh)
        reading = self.gradient(problem, image)
        aim = self.schedule.start(problem, reading) if state.aim is None else state.aim
        success = problem.goal.reached(reading.output) & (reading.score >= self.kappa)
        change = image.to(state.w.dtype) - problem.x.to(state.w.dtype)
        value, pull = self.schedule.distance(aim, change)
        loss = value + aim.weight * (self.kappa - reading.score.double()).clamp(min=0.0)
        state = self._kept(problem, state, image, success)
        w, mean, square = self._adam(state, aim, pull, reading, ~success, tanh)
        rnd = state.round.after(loss, success)
        late = (rnd.looks >= self.steps) | (rnd.stale >= max(self.steps // 5, 1))
        aim, over = self.schedule.next(problem, aim, rnd, reading, success, late)
        moved, aim = self._restarted(replace(state, w=w, mean=mean, square=square, round=rnd, aim=aim), aim, over)
        return hushed(problem, reading, success, aim.done), moved

    def _image(self, problem: Problem, state: _Walk, tanh: Tensor) -> Tensor:
        """The input that w stands for, exactly x where nothing moved or nothing may."""
        image = torch.addcmul(problem.x.to(tanh), state.half, tanh - state.start).to(problem.x.dtype).clamp_(state.low, state.high)
        if state.aim is not None and state.aim.allowed is not None:
            image = torch.where(state.aim.allowed, image, problem.x)
        return image

    def _kept(self, problem: Problem, state: _Walk, image: Tensor, success: Tensor) -> _Walk:
        """The best successes so far, with this look."""
        if not bool(success.any()):
            return state
        size = problem.threat.size(problem.x, image)
        rows = (success & (size < state.best)).nonzero().squeeze(1)
        if not len(rows):
            return state
        z, home = state.z.index_copy(0, rows, image[rows]), state.home.index_copy(0, rows, state.w[rows])
        return replace(state, z=z, home=home, best=state.best.index_copy(0, rows, size[rows]))

    def _restarted(self, state: _Walk, aim: Aim, over: Tensor) -> tuple[_Walk, Aim]:
        """A round begins where the last is `over` (B,): Adam forgets, and w is where the schedule wants it."""
        rows = over.nonzero().squeeze(1)
        if not len(rows):
            return state, aim
        rnd = state.round.restarted(over)
        gained = torch.isinf(state.best) | (state.best < (1 - self.gain) * state.begun)
        aim = replace(aim, done=aim.done | (over & (rnd.number >= self.rounds) & ~gained))
        w = state.w
        if self.schedule.returns:
            back = rows[torch.isfinite(state.best[rows])]
            w = w.index_copy(0, back, state.home[back])
        mean, square = state.mean.index_fill(0, rows, 0.0), state.square.index_fill(0, rows, 0.0)
        begun = state.begun.index_copy(0, rows, state.best[rows])
        return replace(state, w=w, mean=mean, square=square, begun=begun, round=rnd, aim=aim), aim

    def _adam(self, state: _Walk, aim: Aim, pull: Tensor, reading: Reading, short: Tensor, tanh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of Adam down the loss: (w, mean, square); the weight only scales the gradient of samples `short` (B,) of the margin."""
        push = finite(reading.gradient.to(pull))
        slope = torch.addcmul(pull, push, per_sample(aim.weight * short, pull), value=-1)
        slope = slope.mul_(state.half).mul_(torch.square(tanh).neg_().add_(1))
        slope = finite(slope if aim.allowed is None else slope.mul_(aim.allowed))
        mean, square = torch.lerp(state.mean, slope, 0.1), (0.999 * state.square).addcmul_(slope, slope, value=0.001)
        number = (state.round.looks + 1).double()
        rate = self.rate * aim.rate * (1 - 0.999**number).sqrt() / (1 - 0.9**number)
        root = square.sqrt().add_(torch.finfo(square.dtype).tiny ** 0.5)
        end = math.atanh(self.edge)
        return torch.addcdiv(state.w, mean * per_sample(rate, mean), root, value=-1).clamp_(-end, end), mean, square


def tanh_of(w: Tensor) -> Tensor:
    """tanh w by the sigmoid, which takes a fifth of the time."""
    return torch.sigmoid(2 * w).mul_(2).sub_(1)


@dataclass(frozen=True)
class Bisected:
    """C&W L2: |change|^2, and a bisection of the weight; every round takes half the steps of the one before.

    Until a first success steps grow tenfold instead, up to `longest` times Adam's rate: where gradients are all but flat around
    x, more weight alone moves Adam no farther. From there it goes back by steps of Adam's rate at most.
    """

    first: float = 2.0
    growth: float = 3.0
    longest: float = 30.0
    returns: bool = True

    def start(self, problem: Problem, reading: Reading) -> Aim:
        """`first` times the weight that a linear model would need; small steps where its distance, per feature, is small."""
        weight = first_weight(reading)
        bracket = Bracket.start(self.first * weight)
        distance = (weight * reading.score.double().abs() / 2).sqrt() / problem.x[0].numel() ** 0.5
        rate = (40 * distance / width(problem)).clamp(max=1.0)
        return Aim(bracket.weight, rate, torch.zeros_like(rate, dtype=torch.bool), bracket)

    def distance(self, aim: Aim, change: Tensor) -> tuple[Tensor, Tensor]:
        """|change|^2."""
        return lengths(change, 2).double().square(), 2 * change

    def next(self, problem: Problem, aim: Aim, rnd: Round, reading: Reading, success: Tensor, late: Tensor) -> tuple[Aim, Tensor]:
        """Less weight where the last looks still saw a success, more elsewhere; and longer steps until there was one at all."""
        if not bool(late.any()):
            return aim, late
        bracket = aim.memory.next(late, rnd.since < rnd.stale.clamp(min=1), self.growth)
        rate = torch.where(torch.isfinite(bracket.upper), (aim.rate / 2).clamp(max=1.0), (10 * aim.rate).clamp(max=self.longest))
        return replace(aim, weight=bracket.weight, memory=bracket, rate=torch.where(late, rate, aim.rate)), late


@dataclass(frozen=True)
class Shrinking:
    """C&W Linf: sum max(0, |change| - tau); each success lowers tau to `factor` times its largest change.

    After `tries` rounds in vain, each with `growth` times the weight, the factor is replaced by its root; above 0.99 it is over.
    """

    factor: float = 0.5
    growth: float = 2.0
    tries: int = 2
    first: float = 0.03
    returns: bool = False

    def start(self, problem: Problem, reading: Reading) -> Aim:
        """No tau yet: the first round asks for any success. Weight `first` over the mean gradient: pull and push of like size."""
        push = torch.nan_to_num(reading.gradient.double(), nan=0.0, posinf=0.0, neginf=0.0).flatten(1).abs().mean(1)
        one = torch.ones_like(push)
        memory = (one * torch.inf, torch.zeros_like(push, dtype=torch.int64), one * self.factor, width(problem))
        return Aim(torch.where(push > 0, self.first / push.clamp(min=1e-300), one), one, ~one.bool(), memory)

    def distance(self, aim: Aim, change: Tensor) -> tuple[Tensor, Tensor]:
        """The part of every change that exceeds tau."""
        excess = (change.abs() - per_sample(aim.memory[0], change)).clamp(min=0.0)
        return excess.double().flatten(1).sum(1), change.sign() * (excess > 0)

    def next(self, problem: Problem, aim: Aim, rnd: Round, reading: Reading, success: Tensor, late: Tensor) -> tuple[Aim, Tensor]:
        """A success within tau ends its round at once. Steps shrink with tau, which they must be able to resolve."""
        tau, tries, factor, wide = aim.memory
        largest = (reading.z.double() - problem.x.double()).flatten(1).abs().amax(1)
        won = success & (largest <= tau)
        lost = late & ~won
        given_up = lost & (tries + 1 >= self.tries) & torch.isfinite(tau)
        finer = torch.where(given_up, factor.sqrt(), factor)
        tau = torch.where(won, largest * factor, torch.where(given_up, tau / factor * finer, tau))
        weight = torch.where(lost & ~given_up, aim.weight * self.growth, aim.weight)
        tries = torch.where(won | given_up, torch.zeros_like(tries), tries + lost)
        rate = (2 * tau / wide).clamp(max=1.0)
        return replace(aim, weight=weight, rate=rate, done=aim.done | (finer > 0.99), memory=(tau, tries, finer, wide)), won | lost


@dataclass(frozen=True)
class Dropping:
    """C&W L0: |change|^2 on a set of pixels that loses, after each success, the `share` whose change matters least.

    What matters is |change| * |gradient of the margin|, summed over the channels of a pixel; pixels that did not change leave
    the set too. After `tries` rounds in vain, each with `growth` times the weight, half as many pixels leave the last set that
    worked; where not even one can, the search is over.

    Attributes:
        joined: all channels of a (B, C, H, W) input count as one pixel. patience: rounds in vain before a first success.
    """

    joined: bool
    share: float = 0.2
    growth: float = 4.0
    tries: int = 3
    patience: int = 10
    first: float = 2.0
    returns: bool = False

    def start(self, problem: Problem, reading: Reading) -> Aim:
        """Every pixel may change."""
        weight = self.first * first_weight(reading)
        zero = torch.zeros_like(weight, dtype=torch.int64)
        worth = torch.zeros_like(self._pixels(problem.x.double()))
        return Aim(weight, torch.ones_like(weight), zero.bool(), (worth, zero, zero, zero), torch.ones_like(problem.x, dtype=torch.bool))

    def distance(self, aim: Aim, change: Tensor) -> tuple[Tensor, Tensor]:
        """|change|^2."""
        return lengths(change, 2).double().square(), 2 * change

    def next(self, problem: Problem, aim: Aim, rnd: Round, reading: Reading, success: Tensor, late: Tensor) -> tuple[Aim, Tensor]:
        """The first success ends its round."""
        worth, count, leaving, tries = aim.memory
        lost = late & ~success
        given_up = lost & (tries + 1 >= self.tries) & (count > 0)
        change = self._pixels((reading.z != problem.x).double())
        force = self._pixels((reading.z.double() - problem.x.double()).abs() * torch.nan_to_num(reading.gradient, nan=0.0).double().abs())
        worth = torch.where(success[:, None], torch.where(change > 0, force, -torch.inf), worth)
        count = torch.where(success, (change > 0).sum(1), count)
        leaving = torch.where(success, (self.share * count).long().clamp(min=1), torch.where(given_up, leaving // 2, leaving))
        hopeless = lost & (count == 0) & (tries + 1 >= self.patience)
        done = aim.done | hopeless | (given_up & (leaving == 0)) | (success & (count <= 1))
        rank = worth.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen = self._spread(rank < (count - leaving)[:, None], problem.x)
        before = torch.ones_like(chosen) if aim.allowed is None else aim.allowed
        allowed = torch.where(rowwise(success | given_up, problem.x), chosen, before)
        weight = torch.where(lost & ~given_up, aim.weight * self.growth, aim.weight)
        tries = torch.where(success | given_up, torch.zeros_like(tries), tries + lost)
        return replace(aim, weight=weight, done=done, memory=(worth, count, leaving, tries), allowed=allowed), success | lost

    def _pixels(self, values: Tensor) -> Tensor:
        """(B, ...) -> (B, pixels), summed over channels."""
        return values.sum(1).flatten(1) if self.joined and values.ndim >= 4 else values.flatten(1)

    def _spread(self, chosen: Tensor, like: Tensor) -> Tensor:
        """(B, pixels) -> (B, ...)."""
        if self.joined and like.ndim >= 4:
            return chosen.reshape(len(like), 1, *like.shape[2:]).expand_as(like)
        return chosen.reshape(like.shape)


def _attack(name: str, threat: Projects, schedule: Schedule, steps: int, rounds: int, step: float, kappa: float) -> Attack:
    if rounds < 1:
        raise BadInput(f"rounds: {rounds}: must be 1 or more")
    if kappa < 0 or step <= 0:
        raise BadInput(f"kappa: {kappa}, step: {step}: kappa must be 0 or more, step more than 0")
    return Attack(name, threat, margin, TanhAdam(schedule, steps, rounds, step, kappa), steps * rounds, smallest=True)


@register(
    paper="Carlini & Wagner 2017, arXiv 1608.04644, section VI.A",
    threats=("l2",),
    kind="smallest",
    cost="at most steps * rounds forwards and backwards",
)
def cw_l2(steps: int = 50, rounds: int = 9, kappa: float = 0.0, step: float = 0.1, threat: Projects | None = None) -> Attack:
    """Carlini & Wagner's L2 attack: min |change|^2 + c max(kappa - margin, 0) under a tanh, c by bisection.

    Differences from the released code, all for speed: c starts at twice what a linear model would need instead of 1e-3; a
    round starts at the best success so far, at half the learning rate; samples abort and change rounds one by one; the tanh
    reaches 2 % past the box, where its slope does not vanish; rounds that end early leave their looks to more rounds, while
    these still gain. A failure returns the clean input.

    Args:
        steps: looks of a round, at most. rounds: values of c, at least. kappa: least margin of a success, in logits. step: Adam's
            first learning rate, in w.
    """
    return _attack("cw_l2", threat or L2(), Bisected(), steps, rounds, step, kappa)


@register(
    paper="Carlini & Wagner 2017, arXiv 1608.04644, section VI.C",
    threats=("linf",),
    kind="smallest",
    cost="at most steps * rounds forwards and backwards",
)
def cw_linf(steps: int = 20, rounds: int = 40, kappa: float = 0.0, step: float = 0.1, threat: Projects | None = None) -> Attack:
    """Carlini & Wagner's Linf attack: min sum max(0, |change| - tau) + c max(kappa - margin, 0), tau falling with each success.

    Differences from the released code: c starts where push and pull are of like size instead of 1e-5; tau halves at a success instead
    of falling by a tenth, and where c was doubled in vain it is tried again closer to the last success before the search ends;
    steps shrink with tau.

    Args:
        steps: looks of a round, at most. rounds: pairs of tau and c, at least. kappa, step: as for `cw_l2`.
    """
    return _attack("cw_linf", threat or Linf(), Shrinking(), steps, rounds, step, kappa)


@register(
    paper="Carlini & Wagner 2017, arXiv 1608.04644, section VI.B",
    threats=("l0", "l0f"),
    kind="smallest",
    cost="at most steps * rounds forwards and backwards",
)
def cw_l0(steps: int = 20, rounds: int = 40, kappa: float = 0.0, step: float = 0.3, threat: Projects | None = None) -> Attack:
    """Carlini & Wagner's L0 attack: the L2 attack on ever fewer pixels, until no pixel can be spared.

    Differences from the released code: 20 % of the changed pixels leave after a success instead of 0.3 * sqrt(count), and
    fewer of them after a failure, where the released code stops.

    Args:
        steps: looks of a round, at most. rounds: pairs of set and c, at least. kappa, step: as for `cw_l2`.
    """
    threat = threat or L0()
    joined = isinstance(threat, L0) and not threat.features
    return _attack("cw_l0", threat, Dropping(joined), steps, rounds, step, kappa)
