"""The smallest change, found by moving the radius itself, per sample: DDN (L2) and FMN (L0, L1, L2, Linf)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.registry import register
from epsball.core import Attack, Gradient, Objective, Problem, Projects, Reading, Targeted, Untargeted, autograd, valid
from epsball.core.goal import tame
from epsball.core.rows import per_sample, rowwise
from epsball.core.rule import lengths, normalized, strictly_between, unit
from epsball.core.threat import Z
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L0, L1, L2, Linf
from epsball.threats.rounding import Memo


def limits(problem: Problem) -> tuple[Tensor, Tensor]:
    """(low, high) of every feature, (B, ...): box, mask and budget as the threat knows them."""
    low, high = problem.threat.room.interval(problem.x)  # type: ignore[attr-defined]
    return low, high


def width(problem: Problem) -> Tensor:
    """(B,) float64: the widest legal interval of any feature, so that a step of 1 means the same in every box; 1 where unbounded."""
    low, high = limits(problem)
    wide = (high.double() - low.double()).flatten(1).amax(1)
    return torch.where(torch.isfinite(wide), wide, torch.ones_like(wide))


def _annealed(first: float, last: float, share: float) -> float:
    """Half a cosine from `first` down to `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def soft_margin(sharpness: float, memo: Memo) -> Objective:
    """The margin over a mean of the rival scores, each weighed by exp(sharpness * score / clean margin): all rivals count, then the best.

    Its gradient is that of the margin over their soft maximum, log sum exp; weights are constants. In units of the clean margin
    the scale of the logits does not matter, and nothing saturates, as cross-entropy does. `memo` keeps those from step to step.
    """

    def objective(problem: Problem, z: Z, x_adv: Tensor, output: Tensor) -> Tensor:
        goal = problem.goal
        if not isinstance(goal, (Untargeted, Targeted)):
            return margin(problem, z, x_adv, output)
        with torch.no_grad():
            scale = memo.get("margin", (problem.clean, goal.labels), lambda: _clean_margin(problem))
            rivals = (output * (sharpness / scale)[:, None]).scatter(1, goal.labels[:, None], -torch.inf)
            weight = rivals.softmax(1).scatter(1, goal.labels[:, None], -1.0)
        ahead: Tensor = (weight * output).sum(1)
        return ahead if isinstance(goal, Untargeted) else -ahead

    return objective


def _clean_margin(problem: Problem) -> Tensor:
    """(B,) how far the clean answer is from the goal; above 0."""
    return margin(problem, problem.x, problem.x, problem.clean).abs().clamp(min=1e-20)


@dataclass(frozen=True)
class _Shell:
    """Where a search stands: at z, of `size` (B,) at most, inside `radius` (B,); `best` (B,) is the smallest success, +inf where none."""

    z: Tensor
    size: Tensor
    radius: Tensor
    limit: Tensor
    width: Tensor
    best: Tensor
    memo: Memo
    moves: int
    steps: int

    @property
    def share(self) -> float:
        """How much of the search is over."""
        return self.moves / self.steps

    def moved(self, z: Tensor, size: Tensor, radius: Tensor, best: Tensor) -> _Shell:
        """One move later."""
        return _Shell(z, size, radius, self.limit, self.width, best, self.memo, self.moves + 1, self.steps)


def _begin(problem: Problem, steps: int, radius: Tensor | float) -> _Shell:
    """At the clean input; a number as first radius is in box widths."""
    limit, wide = torch.minimum(problem.radius, problem.threat.reach(problem.x)), width(problem)
    first, zero = radius if isinstance(radius, Tensor) else radius * wide, torch.zeros_like(limit)
    return _Shell(problem.x.clone(), zero, torch.minimum(first, limit), limit, wide, zero + torch.inf, Memo(), 0, max(steps, 1))


def _look(problem: Problem, state: _Shell, gradient: Gradient, soft: bool) -> Reading:
    """Climbs the soft margin, ever sharper, or the objective that the attack was given."""
    return gradient(replace(problem, objective=soft_margin(5 * 200**state.share, state.memo)) if soft else problem, state.z)


def _uphill(problem: Problem, gradient: Tensor, p: float, move: int) -> tuple[Tensor, Tensor]:
    """(where it climbs, the p-norm (B,) of that): the gradient; keyed noise where it vanished."""
    tiny = torch.finfo(gradient.dtype).tiny ** 0.4  # so that a step over it stays finite, and a norm is exact
    steep = torch.linalg.vector_norm(gradient.flatten(1), p, dim=1)
    if strictly_between(steep, tiny, 1 / tiny):
        return gradient, steep
    steep, tiny = lengths(gradient, p), tiny**1.25
    if strictly_between(steep, tiny, 1 / tiny):
        return gradient, steep
    odd = (~((steep > tiny) & (steep < 1 / tiny))).nonzero().squeeze(1)
    rows, length = unit(gradient[odd], p)
    lost = odd[length == 0]
    noise = normalized(problem.key.take(lost).fold("lost", move).normal(problem.ids[lost], problem.x[lost]), p)
    return gradient.index_copy(0, odd, rows).index_copy(0, lost, noise), steep.index_fill(0, odd, 1.0)


@dataclass(frozen=True)
class DecoupledNorm:
    """DDN, Algorithm 1: a step along the unit gradient, then back onto a sphere that shrinks where the goal is reached and grows elsewhere.

    Attributes:
        soft: climbs `soft_margin`, else the attack's objective. gamma: share by which the sphere shrinks or grows. step_size: first
            step, in radii but never more than in box widths; the last is a hundredth of it. start: first radius, in box widths.
        growth: of the radius until a first success: where gradients near x mislead, from far outside is the better way.
    """

    soft: bool
    gamma: float = 0.05
    step_size: float = 1.0
    start: float = 1.0
    growth: float = 1.5
    gradient: Gradient = autograd

    def init(self, problem: Problem, steps: int) -> _Shell:
        """At the clean input."""
        return _begin(problem, steps, self.start)

    def step(self, problem: Problem, state: _Shell) -> tuple[Reading, _Shell]:
        """One look, one move."""
        x, reading = problem.x, _look(problem, state, self.gradient, self.soft)
        hit = problem.goal.reached(reading.output)
        best = torch.where(hit, torch.minimum(state.best, state.size), state.best)
        wider = torch.where(torch.isinf(best), self.growth, 1 + self.gamma)
        radius = torch.minimum(state.radius * torch.where(hit, 1 - self.gamma, wider), state.limit)
        length = _annealed(self.step_size, self.step_size / 100, state.share) * torch.minimum(state.width, state.radius)
        direction, steep = _uphill(problem, reading.gradient, 2, state.moves)
        change = (state.z - x).addcmul_(direction, per_sample(length / steep, x))
        scale = radius / lengths(change, 2).clamp(min=torch.finfo(change.dtype).tiny)
        z = problem.threat.project(x, change.mul_(per_sample(scale, x)).add_(x), problem.radius)
        return reading, state.moved(z, radius, radius, best)


def shortened(threat: Projects, change: Tensor, radius: Tensor) -> Tensor:
    """The nearest change in the ball of `radius` (B,): quick, only as good as its precision, without box or inward rounding.

    Raises:
        BadInput: other threats than Linf, L2 and L1.
    """
    most = per_sample(radius, change)
    if isinstance(threat, Linf):
        return torch.minimum(torch.maximum(change, -most), most)  # by row, several times as quick as `clamp`
    if isinstance(threat, L2):
        return change * (most / per_sample(lengths(change, 2), change)).clamp(max=1.0).nan_to_num_(nan=1.0)
    if isinstance(threat, L1):
        return less(change, level(change.abs(), most))
    raise BadInput(f"threat '{threat.name}': has no ball of changes: use linf, l2 or l1")


def less(change: Tensor, amount: Tensor) -> Tensor:
    """Every entry closer to 0 by `amount` >= 0 (broadcasts), 0 where it is smaller."""
    return (change - amount).clamp_(min=0.0).add_((change + amount).clamp_(max=0.0))


def level(long: Tensor, amount: Tensor) -> Tensor:
    """The level t >= 0 above which `amount` of each row's lengths `long` (B, ...) >= 0 lies: sum max(long - t, 0) = amount.

    From below: a feature short of the level drops out, and the rest must do with a higher one, until none does (Michelot 1986).
    `amount` and the result broadcast against `long`.
    """
    axes = tuple(range(1, long.ndim))
    t = torch.maximum((long.sum(axes, keepdim=True) - amount) / long[0].numel(), long.amax(axes, keepdim=True) - amount).clamp(min=0.0)
    for _ in range(long[0].numel()):
        rest = (long - t).clamp_(min=0.0)
        onward = t + (rest.sum(axes, keepdim=True) - amount) / rest.sign_().sum(axes, keepdim=True).clamp(min=1.0)
        further = onward > t * (1 + 4 * torch.finfo(t.dtype).eps)
        if not bool(further.any()):
            break
        t = torch.where(further, onward, t)
    return t


@dataclass(frozen=True)
class AdaptiveNorm:
    """FMN, Algorithm 1: a step uphill, then back into a ball whose radius adapts. Linf, L2, L1.

    Until a first success the change is stretched to the distance to the boundary by linear approximation, |margin| over the dual
    norm of the gradient; from then on the radius shrinks by gamma at a success and grows by gamma elsewhere, up to just below
    the smallest success. Steps follow the sign of the gradient under Linf, the unit gradient elsewhere.

    Attributes:
        soft: climbs `soft_margin`, else the attack's objective. gamma, last_gamma: first and last share by which the radius moves.
        step_size: first step, in radii but never more than in box widths; the last is a hundredth of it. Both follow half a cosine.
    """

    soft: bool
    gamma: float = 0.05
    last_gamma: float = 0.001
    step_size: float = 1.0
    gradient: Gradient = autograd

    def init(self, problem: Problem, steps: int) -> _Shell:
        """At the clean input; the first radius is chosen by the first look."""
        return _begin(problem, steps, torch.inf)

    def step(self, problem: Problem, state: _Shell) -> tuple[Reading, _Shell]:
        """One look, one move."""
        x, threat, reading = problem.x, problem.threat, _look(problem, state, self.gradient, self.soft)
        gamma, hit = _annealed(self.gamma, self.last_gamma, state.share), problem.goal.reached(reading.output)
        best = torch.where(hit, torch.minimum(state.best, state.size), state.best)
        radius = torch.minimum(state.radius * torch.where(hit, 1 - gamma, 1 + gamma), (1 - gamma) * best)
        new = torch.isinf(best)
        searching = bool(new.any())
        if searching:  # a little past the boundary: a ball that only touches it, rounded inward, would never hold a success
            radius = torch.where(new, (1 + gamma) * (state.size + _ahead(problem, reading)), radius)
        radius = torch.minimum(radius, state.limit)
        direction, steep = _uphill(problem, reading.gradient, 2, state.moves)
        direction, steep = (direction.sign(), torch.ones_like(steep)) if isinstance(threat, Linf) else (direction, steep)
        length = _annealed(self.step_size, self.step_size / 100, state.share) * torch.minimum(state.width, radius)
        low, high = limits(problem)
        wanted = torch.addcmul(state.z, direction, per_sample(length / steep, x)).clamp_(low, high).sub_(x)
        change = shortened(threat, wanted, radius)
        if searching:
            size = threat.size(x, x + change)
            change = change * per_sample(torch.where(new & (size > 0), radius / size, 1.0), x)
        z = threat.project(x, change.add_(x), problem.radius)
        return reading, state.moved(z, torch.where(new, threat.size(x, z), radius) if searching else radius, radius, best)


def _ahead(problem: Problem, reading: Reading) -> Tensor:
    """(B,) how far the boundary is by linear approximation, along the features that can move; +inf where that says nothing."""
    gradient = torch.nan_to_num(reading.gradient, nan=0.0).double()
    slope: Tensor = (gradient * problem.threat.steepest(problem.x, reading.z, reading.gradient)).flatten(1).sum(1)
    return torch.nan_to_num(reading.score.double(), nan=torch.inf).abs() / slope.clamp(min=1e-300)


@dataclass(frozen=True)
class AdaptiveCount:
    """FMN under L0: a step uphill, then only as many pixels as allowed keep their change, those of the largest.

    That number starts at 1. It grows by half until a first success; from then on it falls at a success and grows elsewhere, by
    gamma or by 1, whichever is more. Where half of all pixels do not succeed, steps follow the sign of the gradient: small
    gradients are then all that is left.

    Attributes:
        soft, gamma, last_gamma: as in `AdaptiveNorm`. step_size: first step of the feature of largest gradient, in box widths;
            the last is a tenth of it.
    """

    soft: bool
    gamma: float = 0.3
    last_gamma: float = 0.001
    step_size: float = 2.0
    growth: float = 1.5
    gradient: Gradient = autograd

    def init(self, problem: Problem, steps: int) -> _Shell:
        """At the clean input, with one pixel."""
        return _begin(problem, steps, torch.ones_like(problem.radius))

    def step(self, problem: Problem, state: _Shell) -> tuple[Reading, _Shell]:
        """One look, one move."""
        x, threat, reading = problem.x, problem.threat, _look(problem, state, self.gradient, self.soft)
        if not isinstance(threat, L0):
            raise BadInput(f"threat '{threat.name}': does not count pixels: use l0 or l0f")
        gamma, hit = _annealed(self.gamma, self.last_gamma, state.share), problem.goal.reached(reading.output)
        best = torch.where(hit, torch.minimum(state.best, state.size), state.best)
        new, count = torch.isinf(best), state.radius
        fewer = torch.minimum(torch.minimum(count - 1, (count * (1 - gamma)).floor()), best).clamp(min=1.0)
        more = torch.maximum(count + 1, (count * torch.where(new, self.growth, 1 + gamma)).floor())
        count = torch.minimum(torch.where(hit, fewer, more), state.limit)
        direction, steep = _uphill(problem, reading.gradient, torch.inf, state.moves)
        lost = (new & (count >= state.limit / 2)).nonzero().squeeze(1)
        if len(lost):
            direction, steep = direction.index_copy(0, lost, direction[lost].sign()), steep.index_fill(0, lost, 1.0)
        length = _annealed(self.step_size, self.step_size / 10, state.share) * state.width
        moved = torch.addcmul(state.z, direction, per_sample(length / steep, x))
        z = threat.most(x, moved.clamp(*threat.room.interval(x)), moved - x, count)
        return reading, state.moved(z, count, count, best)


@register(
    paper="Rony et al. 2019, arXiv 1811.09600", threats=("l2",), kind="smallest", cost="steps forwards and backwards, 1 forward to judge"
)
def ddn(steps: int = 100, gamma: float = 0.05, threat: Projects | None = None, objective: Objective | None = None) -> Attack:
    """Decoupled direction and norm: the direction follows the gradient, the norm follows success. Smallest L2 change.

    z <- P(x + r * u / ||u||), u = z - x + a * g / ||g||; r <- (1 - gamma) r at a success, (1 + gamma) r elsewhere; a falls from 1
    to 0.01 along a cosine. A zero gradient is replaced by keyed noise, as in the released code. That code rounds every
    iterate to 8 bits; we do not. Until a first success r grows by half at every look: in networks trained against Linf, whose
    gradients near x mislead, changes come out a quarter smaller than with the paper's 5 %, elsewhere the same. Lengths scale
    with the width of the box, and steps with radii below it: the paper's absolute 0.01 is coarse where the boundary is near.

    Args:
        steps: looks. gamma: share by which the radius moves. objective: what is climbed; None is `soft_margin`, ever sharper. The
            paper's cross-entropy pulls toward all near classes at once to the end, and saturates.
    """
    if not 0 < gamma < 1:
        raise BadInput(f"gamma: {gamma}: must be between 0 and 1")
    return Attack("ddn", threat or L2(), objective or margin, DecoupledNorm(objective is None, gamma), steps, smallest=True)


@register(
    paper="Pintor et al. 2021, arXiv 2102.12827",
    threats=("linf", "l2", "l1", "l0", "l0f"),
    kind="smallest",
    cost="steps forwards and backwards, 1 forward to judge",
)
def fmn(
    steps: int = 100,
    gamma: float | None = None,
    step: float | None = None,
    threat: Projects | None = None,
    objective: Objective | None = None,
) -> Attack:
    """Fast minimum norm: the boundary distance by linear approximation, then a radius that adapts to success. L0, L1, L2, Linf.

    Differs from the paper, for smaller changes at equal cost: all rival classes are climbed before the best one alone
    (`soft_margin`); Linf steps follow the sign of the gradient, as small gradients matter as much there; before a first success
    the change is stretched to the radius, which gets out of flat regions, and L0 counts grow by half; a radius never exceeds
    the smallest success. The first radius goes a share gamma past the approximate boundary (the paper's own only touches it: on
    a linear model it never succeeds), and steps scale with the radius where that is below the width of the box.

    Args:
        steps: looks. gamma: first share by which the radius moves, 0.001 at the end; None is 0.05, under L0 0.3. step: first step,
            in box widths; None is 1, under L0 2. objective: what is climbed; None is `soft_margin`, ever sharper.
    """
    threat = threat or L2()
    counts = isinstance(threat, L0)
    gamma, step = (0.3 if counts else 0.05) if gamma is None else gamma, (2.0 if counts else 1.0) if step is None else step
    if not 0 < gamma < 1:
        raise BadInput(f"gamma: {gamma}: must be between 0 and 1")
    search = (AdaptiveCount if counts else AdaptiveNorm)(objective is None, gamma, step_size=step)
    return Attack("fmn", threat, objective or margin, search, steps, smallest=True)


# What the searches over a constant share (C&W, EAD, L-BFGS): rounds and a bisection, all per sample.


def offered(problem: Problem, reading: Reading, success: Tensor) -> Reading:
    """What `run` may keep: successes (B,), and answers that are no numbers; the clean input elsewhere, so that a failure returns it."""
    shown = _shown(reading, success)
    z = torch.where(rowwise(shown, reading.z), reading.z, problem.x)
    return replace(_hushed(problem, reading, shown), z=z, x_adv=z)


def hushed(problem: Problem, reading: Reading, success: Tensor, over: Tensor | None = None) -> Reading:
    """`offered` where the first look is at the clean input: z may stay, as `run` keeps a failure only where its score rises.

    `over` (B,) bool: whose search ends with this look.
    """
    return replace(_hushed(problem, reading, _shown(reading, success)), over=over)


def _shown(reading: Reading, success: Tensor) -> Tensor:
    return success if tame(reading.output) else success | ~valid(reading.output)


def _hushed(problem: Problem, reading: Reading, shown: Tensor) -> Reading:
    output, score = torch.where(shown[:, None], reading.output, problem.clean), torch.where(shown, reading.score, problem.clean_score)
    return Reading(reading.z, reading.x_adv, output, score)


def finite(values: Tensor) -> Tensor:
    """`values`, with 0 where they are no numbers; seldom more than a sum, as nothing infinite sums to a finite number."""
    return values if math.isfinite(float(values.sum())) else torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def first_weight(reading: Reading) -> Tensor:
    """(B,) float64: 2 |score| / ||g||^2, at which |d|^2 + weight * |score| has its minimum on the boundary of a linear model."""
    steep = torch.nan_to_num(reading.gradient.double(), nan=0.0, posinf=0.0, neginf=0.0).flatten(1).square().sum(1)
    weight = 2 * torch.nan_to_num(reading.score.double(), nan=0.0).abs() / steep.clamp(min=1e-300)
    return torch.where((weight > 0) & torch.isfinite(weight), weight, torch.ones_like(weight))


@dataclass(frozen=True)
class Bracket:
    """A constant per sample between one that failed and one that succeeded; float64 (B,)."""

    weight: Tensor
    lower: Tensor
    upper: Tensor

    @staticmethod
    def start(weight: Tensor) -> Bracket:
        """Nothing known yet."""
        return Bracket(weight, torch.zeros_like(weight), torch.full_like(weight, torch.inf))

    def next(self, over: Tensor, hit: Tensor, growth: float = 10.0) -> Bracket:
        """Where a round is `over` (B,): halves the interval, or multiplies by `growth` while nothing succeeded."""
        if not bool(over.any()):
            return self
        upper = torch.where(over & hit, torch.minimum(self.upper, self.weight), self.upper)
        lower = torch.where(over & ~hit, torch.maximum(self.lower, self.weight), self.lower)
        weight = torch.where(torch.isfinite(upper), (lower + upper) / 2, self.weight * growth)
        return Bracket(torch.where(over, weight, self.weight), lower, upper)


NEVER = 1 << 30


@dataclass(frozen=True)
class Round:
    """One sample's round, (B,) each: looks so far, looks since the lowest loss and since a success, number of rounds before it."""

    looks: Tensor
    stale: Tensor
    since: Tensor
    number: Tensor
    lowest: Tensor

    def after(self, loss: Tensor, success: Tensor) -> Round:
        """One look later. Progress is a loss lower by a thousandth."""
        gain = loss < 0.999 * self.lowest
        lowest = torch.where(gain, loss, self.lowest)
        stale = torch.where(gain, torch.zeros_like(self.stale), self.stale + 1)
        since = torch.where(success, torch.zeros_like(self.since), self.since + 1)
        return Round(self.looks + 1, stale, since, self.number, lowest)

    def restarted(self, over: Tensor) -> Round:
        """A new round where the last is `over` (B,)."""
        if not bool(over.any()):
            return self
        zero, never = torch.zeros_like(self.looks), torch.full_like(self.since, NEVER)
        lowest = self.lowest.masked_fill(over, torch.inf)
        looks, stale, since = (torch.where(over, *pair) for pair in ((zero, self.looks), (zero, self.stale), (never, self.since)))
        return Round(looks, stale, since, self.number + over, lowest)

    @staticmethod
    def first(like: Tensor) -> Round:
        """Nothing looked at yet."""
        zero = torch.zeros_like(like, dtype=torch.int64)
        return Round(zero, zero, zero + NEVER, zero, torch.full_like(like, torch.inf))
