"""The exact worst case of a model that is affine in its input, for every norm with box, mask and budgets: a yardstick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from epsball.attacks.registry import register
from epsball.attacks.walk import UntilReached
from epsball.core import Aimed, Attack, LabelsChanged, Problem, Projects, Targeted, Untargeted
from epsball.core.gradient import logit_gradients
from epsball.core.victim import Tally
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L0, L1, L2, Linf

_PAPER = "Hein & Andriushchenko 2017, arXiv 1705.08475; Linf: Goodfellow et al. 2015, arXiv 1412.6572, section 5"
_ROUNDINGS = 1000  # rounding errors that an affine model may be off by


@register(
    paper=_PAPER, any_model=False, cost="2 forwards; the first sample 1 more and 1 backward per class, whose slopes all samples share"
)
def linear_worst_case(threat: Projects | None = None) -> Attack:
    """The largest margin within the radius, exact, for a model that is affine in its input: logits = W x + b.

    For each other class k, the largest <w_k - w_label, change> over ball and box: Linf a clipped sign step; L2 min(t |w|, room), t
    from the kinks where features meet their bounds; L1 the features of largest |w| one after another; L0 the features or
    pixels that gain most at the better end of their interval. The best class is taken. Nothing is iterated; the answer is
    that of the formula, rounded to the precision of x, and judged like that of any attack.

    W is read off by the Jacobian, whatever the module is made of, and checked: the answers to all inputs and to a random point of
    each sample's box must be W x + b.

    Goals: labels (or `Aimed`, as any class counts), zeros and ones of a multi-label model, or a target of a two-class model. With
    more classes a target must beat several others at once, which has no closed form.

    Args:
        threat: Linf, L2, L1 or L0. Under L0 a feature without a bound moves by twice what would reach the goal alone.

    Raises:
        BadInput: a model that is not affine, a target among more than two classes, another threat or goal.
    """
    return Attack("linear_worst_case", threat or Linf(), margin, UntilReached(WorstCase()), steps=1)


@register(
    paper=_PAPER,
    any_model=False,
    kind="smallest",
    cost="2 forwards and 1 per look, mostly one look; the first sample 1 more and 1 backward per class, whose slopes all samples share",
)
def linear_smallest(steps: int = 8, threat: Projects | None = None) -> Attack:
    """The smallest change that reaches the goal, exact, for a model that is affine in its input: logits = W x + b.

    The gains of `linear_worst_case` as functions of the radius, inverted, and the class with the smallest radius taken. The
    goal is overshot by about a rounding error of the model, and where its answer still falls short by four times as much at the
    next look. Where the radius is too small the answer is that of `linear_worst_case`.

    Args:
        steps: looks at most. threat: Linf, L2, L1 or L0. Goals and errors are those of `linear_worst_case`.
    """
    return Attack("linear_smallest", threat or L2(), margin, UntilReached(Nearest()), steps, smallest=True)


@dataclass(frozen=True)
class WorstCase:
    """Goes straight to the largest margin."""

    def start(self, problem: Problem) -> tuple[Tensor, ...]:
        """The inputs themselves, (B, ...)."""
        norm = norm_of(problem)
        return (moved(problem, norm, best_way(problem, norm, by_score), limit(problem)),)

    def go(self, problem: Problem, z: Tensor, output: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """There."""
        return memory[0], memory


@dataclass(frozen=True)
class Nearest:
    """Goes just over the nearest boundary; each time it is still short, by `growth` times as many rounding errors."""

    first: float = 0.25
    growth: float = 4.0

    def start(self, problem: Problem) -> tuple[Tensor, ...]:
        """The way of each sample, and how many rounding errors it overshoots the goal by, (B,)."""
        way = best_way(problem, norm_of(problem), by_price)
        return (*way, torch.full_like(way.gap, self.first))

    def go(self, problem: Problem, z: Tensor, output: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """To the radius that the gap costs, or as far as is allowed."""
        way, count, norm = Way(*memory[:-1]), memory[-1], norm_of(problem)
        price = norm.price(*useful(problem, way)[:2], way.gap + count * way.noise)
        return moved(problem, norm, way, torch.minimum(price, limit(problem))), (*way, self.growth * count)


# The model: W, and what must be gained.


class Way(NamedTuple):
    """One way to the goal for each sample, all float64: it is reached where <slope, change> exceeds the gap.

    Attributes:
        slope: (B, F). gap: (B,), +inf where this is no way. noise: (B,) about one rounding error of <slope, x> in the model.
    """

    slope: Tensor
    gap: Tensor
    noise: Tensor


def read_off(problem: Problem) -> tuple[Tensor, Tensor]:
    """(W (C, F), noise (B, C)), float64: slopes of the logits, the same for all samples, and about one rounding error of each logit.

    Cost: the first sample 1 forward and C backward rows; each sample 1 forward row at a random point of its intervals, a
    quarter of whose features stand at either end.

    Raises:
        BadInput: answers that are not W x + b up to a thousand rounding errors.
    """

    def jacobian(x: Tensor, tally: Tally) -> Tensor:
        _, _, slopes = logit_gradients(problem.victim, x, tally, lambda output: output)
        return torch.stack([slope.flatten() for slope in slopes])

    x, tally = problem.x.double(), problem.tally
    slopes: Tensor = problem.victim.split(jacobian, x[:1], tally.take(slice(0, 1)))
    bias = problem.clean[0].double() - slopes @ x[0].flatten()
    low, high = (t.double() for t in problem.threat.room.interval(problem.x))  # type: ignore[attr-defined]
    low, high = (torch.where(t.isinf(), x + side * (1 + x.abs()), t) for t, side in ((low, -1), (high, 1)))
    share = (2 * problem.key.fold("probe").uniform(problem.ids, problem.x).double() - 0.5).clamp(0, 1)
    probe = (low + share * (high - low)).to(problem.x.dtype)
    precise = torch.finfo(problem.victim.dtype).eps
    for point, output in ((probe, problem.victim.outputs(probe, tally)), (problem.x, problem.clean)):
        flat = point.double().flatten(1)
        size = flat.abs() @ slopes.abs().T + bias.abs()
        error = (output.double() - (flat @ slopes.T + bias)).abs()
        if not bool((error <= _ROUNDINGS * precise * size).all()):
            words = f"its scores differ from W x + b by {float(error.max()):.2g}"
            raise BadInput(f"model '{problem.victim.name}': not affine in its input: {words}: use pgd")
    return slopes, size * max(precise, torch.finfo(problem.x.dtype).eps)


def ways(problem: Problem) -> Iterator[Way]:
    """Each half-space in which the goal is reached, one at a time."""
    (slopes, noise), goal, clean = read_off(problem), problem.goal, problem.clean.double()
    if isinstance(goal, LabelsChanged):
        signs, gaps = 1 - 2 * goal.labels.double(), goal.signed(clean)
        for k in range(len(slopes)):
            yield Way(signs[:, k, None] * slopes[k], gaps[:, k], noise[:, k])
        return
    own = _to_be_left(problem)
    before, before_noise = (t.gather(1, own[:, None]).squeeze(1) for t in (clean, noise))
    for k in range(len(slopes)):
        yield Way(slopes[k] - slopes[own], (before - clean[:, k]).masked_fill(own == k, torch.inf), noise[:, k] + before_noise)


def _to_be_left(problem: Problem) -> Tensor:
    """The class (B,) to be left for any other."""
    goal, classes = problem.goal, problem.clean.shape[1]
    if isinstance(goal, Untargeted | Aimed):
        return goal.labels
    if not isinstance(goal, Targeted):
        raise BadInput(f"goal: {type(goal).__name__}: has no closed form: give labels, or a target of a two-class model")
    if classes > 2:
        raise BadInput(f"goal: a target among {classes} classes: has no closed form (two classes have): use apgd with objective margin")
    return 1 - goal.labels


Rank = Callable[[Problem, "Norm", Way], Tensor]


def best_way(problem: Problem, norm: Norm, rank: Rank) -> Way:
    """The way of highest rank for each sample; ties go to the first."""
    best, top = None, torch.full_like(problem.radius, -torch.inf)
    for way in ways(problem):
        value = rank(problem, norm, way)
        win = value > top
        if best is not None:
            gap, noise = torch.where(win, way.gap, best.gap), torch.where(win, way.noise, best.noise)
            way = Way(torch.where(win[:, None], way.slope, best.slope), gap, noise)
        best, top = way, torch.where(win, value, top)
    assert best is not None
    return best


def by_score(problem: Problem, norm: Norm, way: Way) -> Tensor:
    """(B,): how far the goal is exceeded at best within the radius."""
    weight, space, _ = useful(problem, way)
    gained = (weight * norm.spend(weight, space, problem.radius)).sum(1)
    return torch.where(way.gap.isinf(), -torch.inf, gained - way.gap)


def by_price(problem: Problem, norm: Norm, way: Way) -> Tensor:
    """(B,): above 0 where the goal is in reach, the nearer the higher; elsewhere the score, which is not."""
    weight, space, _ = useful(problem, way)
    price = norm.price(weight, space, way.gap + Nearest.first * way.noise)
    return torch.where(price <= problem.radius, 1 / price, by_score(problem, norm, way).clamp(max=0.0))


def useful(problem: Problem, way: Way) -> tuple[Tensor, Tensor, Tensor]:
    """|slope|, how far each feature can move to the side that pays, and that side; (B, F) each. No room where the slope is 0."""
    x, (low, high) = problem.x.double(), problem.threat.room.interval(problem.x)  # type: ignore[attr-defined]
    weight, side = way.slope.abs(), way.slope.sign()
    space = torch.where(side > 0, (high.double() - x).flatten(1), (x - low.double()).flatten(1))
    if isinstance(problem.threat, L0):
        space = torch.where(space.isinf(), (2 * way.gap + _ROUNDINGS * way.noise)[:, None] / weight, space)
    return weight, torch.where(weight > 0, space, 0.0), side


def limit(problem: Problem) -> Tensor:
    """The radius (B,), short of it by more than the rounding error of a sum where sizes are sums."""
    return problem.radius * (1.0 - 1e-12) if isinstance(problem.threat, L1 | L2) else problem.radius


def moved(problem: Problem, norm: Norm, way: Way, radius: Tensor) -> Tensor:
    """The best legal input within `radius` (B,) along a way, rounded inward."""
    weight, space, side = useful(problem, way)
    change = side * norm.spend(weight, space, radius)
    z = (problem.x.double() + change.reshape(problem.x.shape)).to(problem.x.dtype)
    legal: Tensor = problem.threat.project(problem.x, z, problem.radius)
    return legal


# The norms: what can be gained within a radius, and what a gain costs. All (B, F) float64 but `radius`, `gain` and the price, (B,).


class Norm(Protocol):
    """Amounts lie in 0 .. space; what they gain is sum weight * amount."""

    def spend(self, weight: Tensor, space: Tensor, radius: Tensor) -> Tensor:
        """The amounts that gain most within `radius`."""

    def price(self, weight: Tensor, space: Tensor, gain: Tensor) -> Tensor:
        """The smallest radius that gains `gain`; +inf where none does."""


def norm_of(problem: Problem) -> Norm:
    """That of the threat."""
    threat, x = problem.threat, problem.x
    if isinstance(threat, L0):
        joined = not threat.features and x.ndim >= 4
        return Count((x[0, 0] if joined else x[0]).numel())
    for kind, norm in ((Linf, Largest()), (L2, Length()), (L1, Sum())):
        if isinstance(threat, kind):
            return norm
    raise BadInput(f"threat '{threat.name}': has no closed form here: use linf, l2, l1 or l0")


def level(rate: Tensor, stop: Tensor, target: Tensor) -> Tensor:
    """t (B,) at which sum rate * min(t, stop) meets the target (B,); +inf where it never does. Sorts the kinks, sums, reads off."""
    stop, order = torch.where(rate > 0, stop, 0.0).sort(1)
    rate = rate.gather(1, order)
    left = rate.flip(1).cumsum(1).flip(1)  # of those that still grow
    full = _before(rate * stop)  # of those that have stopped
    reached = full + stop * left
    place = torch.searchsorted(reached, target[:, None]).clamp(max=rate.shape[1] - 1)
    t = ((target[:, None] - full.gather(1, place)) / left.gather(1, place)).squeeze(1)
    return torch.where(target > reached[:, -1], torch.inf, t.nan_to_num(nan=0.0, posinf=torch.inf).clamp(min=0.0))


def _before(values: Tensor) -> Tensor:
    """(B, F): the sum of the columns before each."""
    return pad(values.cumsum(1), (1, 0))[:, :-1]


@dataclass(frozen=True)
class Largest:
    """Linf: every feature as far as the radius or its room."""

    def spend(self, weight: Tensor, space: Tensor, radius: Tensor) -> Tensor:
        """min(space, radius)."""
        return torch.minimum(space, radius[:, None])

    def price(self, weight: Tensor, space: Tensor, gain: Tensor) -> Tensor:
        """Piecewise linear in the radius."""
        return level(weight, space, gain)


@dataclass(frozen=True)
class Length:
    """L2: min(space, t * weight). The squared length is piecewise linear in t^2, the gain in t."""

    def spend(self, weight: Tensor, space: Tensor, radius: Tensor) -> Tensor:
        """t from the length."""
        weight = self._scaled(weight)
        squares = weight.square()
        return self._along(weight, space, level(squares, space.square() / squares, radius.square()).sqrt())

    def price(self, weight: Tensor, space: Tensor, gain: Tensor) -> Tensor:
        """t from the gain."""
        scale, weight = weight.amax(1), self._scaled(weight)
        t = level(weight.square(), space / weight, torch.where(scale > 0, gain / scale, torch.inf))
        length: Tensor = torch.linalg.vector_norm(self._along(weight, space, t), 2, dim=1)
        return torch.where(t.isinf(), torch.inf, length)

    def _scaled(self, weight: Tensor) -> Tensor:
        """Of largest entry 1, so that no square underflows that counts; those that would are 0."""
        largest = weight.amax(1, keepdim=True)
        scaled = weight / torch.where(largest > 0, largest, 1.0)
        return torch.where(scaled > 1e-150, scaled, 0.0)

    def _along(self, weight: Tensor, space: Tensor, t: Tensor) -> Tensor:
        return torch.where(weight > 0, torch.minimum(space, t[:, None] * weight), 0.0)


@dataclass(frozen=True)
class Sum:
    """L1: the features of largest weight first, each up to its room."""

    def spend(self, weight: Tensor, space: Tensor, radius: Tensor) -> Tensor:
        """What the features before have left of the radius."""
        order = weight.argsort(dim=1, descending=True, stable=True)
        room = space.gather(1, order)
        return torch.zeros_like(space).scatter(1, order, torch.minimum(room, (radius[:, None] - _before(room)).clamp(min=0.0)))

    def price(self, weight: Tensor, space: Tensor, gain: Tensor) -> Tensor:
        """What the features before have left of the gain, over the weight."""
        weight, order = weight.sort(dim=1, descending=True, stable=True)
        room = space.gather(1, order)
        missing = (gain[:, None] - _before(weight * room)).clamp(min=0.0)
        price = torch.where(weight > 0, torch.minimum(room, missing / weight), 0.0).sum(1)
        return torch.where(gain > (weight * room).sum(1), torch.inf, price)


@dataclass(frozen=True)
class Count:
    """L0: the features (or pixels, all channels of which come together) that gain most, each to the end of its room."""

    pixels: int

    def spend(self, weight: Tensor, space: Tensor, radius: Tensor) -> Tensor:
        """The best floor(radius) pixels."""
        rank = self._worth(weight, space).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        kept = (rank < radius.floor()[:, None])[:, None, :].expand(-1, weight.shape[1] // self.pixels, -1)
        return torch.where(kept.flatten(1), space, 0.0)

    def price(self, weight: Tensor, space: Tensor, gain: Tensor) -> Tensor:
        """How many of the best it takes."""
        gained = self._worth(weight, space).sort(dim=1, descending=True).values.cumsum(1)
        price = (gained < gain[:, None]).sum(1).double() + 1
        return torch.where(gain > gained[:, -1], torch.inf, price)

    def _worth(self, weight: Tensor, space: Tensor) -> Tensor:
        return (weight * space).reshape(len(weight), -1, self.pixels).sum(1)
