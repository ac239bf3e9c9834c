"""Additive changes measured by an Lp norm: Linf, L2, L1 and L0, inside the box, with masks and per-feature budgets.

The variable z is the perturbed input itself, so that what is measured is what is stored and sent. A mask or a budget only
narrows the legal interval of a feature; every projection below is exact onto ball and intervals together, and rounds
toward the clean input, so that the norm of the stored change, taken in float64, never exceeds the radius.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from epsball.core.random import Key
from epsball.core.rows import per_sample, rowwise
from epsball.core.rule import normalized
from epsball.core.victim import Bound
from epsball.threats.rounding import Memo, inward

_GUARD = 1.0 - 1e-12  # summation error of a float64 norm over a million features stays below this
_ORDER = 1.0 - 5e-13
"""What float64 inputs keep to: their changes are not exact sums, and whoever adds them up in another order finds other last digits."""


@dataclass(frozen=True, eq=False)
class Room:
    """The legal interval of every feature.

    Attributes:
        box: (low, high), numbers or tensors that broadcast against a sample; None means the victim's own box.
        mask: broadcasts against a sample; where it is 0 nothing may change.
        budget: largest change of each feature, broadcasts against a sample.
    """

    box: tuple[Bound, Bound] | None = None
    mask: Tensor | None = None
    budget: Tensor | None = None
    memo: Memo = field(default_factory=Memo, repr=False)

    def within(self, box: tuple[Bound, Bound]) -> Room:
        """Takes over the victim's box unless a narrower one was given."""
        if self.box is not None:
            low, high = (torch.as_tensor(b, dtype=torch.float64) for b in self.box)
            box = (torch.maximum(low, torch.as_tensor(box[0]).double()), torch.minimum(high, torch.as_tensor(box[1]).double()))
        return replace(self, box=box, memo=Memo())

    def interval(self, x: Tensor, radius: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(low, high) of every feature of x (B, ...), in its dtype; with `radius` (B,) also cut to the Linf ball."""
        if radius is None:
            return self.memo.get("box", (x,), lambda: self._interval(x, None))
        return self.memo.get("ball", (x, radius), lambda: self._interval(x, radius))

    def _interval(self, x: Tensor, radius: Tensor | None) -> tuple[Tensor, Tensor]:
        exact = x.double()
        low, high = (torch.as_tensor(b, dtype=torch.float64, device=x.device) for b in self.box or (-torch.inf, torch.inf))
        change = torch.full_like(exact, torch.inf) if self.budget is None else self.budget.to(exact).expand_as(exact)
        if self.mask is not None:
            change = torch.where(self.mask.to(x.device).bool(), change, torch.zeros_like(change))
        if radius is not None:
            change = torch.minimum(change, per_sample(radius, exact))
        low, high = inward(torch.maximum(low, exact - change), torch.minimum(high, exact + change), x.dtype)
        # The sum above is rounded too: what counts is the change that will be measured. And x itself is always legal,
        # even where its own rounding puts it half a step past the box.
        low = torch.where(exact - low.double() > change, torch.nextafter(low, x), low)
        high = torch.where(high.double() - exact > change, torch.nextafter(high, x), high)
        return torch.minimum(low, x), torch.maximum(high, x)

    def free(self, x: Tensor, z: Tensor, gradient: Tensor) -> Tensor:
        """The gradient without the features that stand at their bound and are pushed outward."""
        low, high = self.interval(x)
        return gradient.clamp(min=0.0) * (z < high) + gradient.clamp(max=0.0) * (z > low)

    def farthest(self, x: Tensor) -> Tensor:
        """The corner of the intervals that is farthest from x."""
        low, high = self.interval(x)
        return torch.where(high - x > x - low, high, low)

    def change(self, x: Tensor, z: Tensor) -> Tensor:
        """The change as it will be measured: float64 (B, F), a tensor of its own."""
        if x.dtype is torch.float64:
            return (z.double() - x).flatten(1)
        return z.double().sub_(self.memo.get("exact", (x,), x.double)).flatten(1)

    def measured(self, name: str, x: Tensor, z: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """The norm of that name of the change, remembered: a search and `run` both ask for the size of the same look."""
        return self.memo.get(name, (x, z), lambda: norm(self.change(x, z)))


Fit = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(wanted change (R, F), its bounds low <= 0 <= high (R, F), radius (R, 1)) -> the nearest change in ball and bounds, in that precision."""


def _toward(x: Tensor, change: Tensor) -> Tensor:
    """x + change (float64) in the dtype of x, each feature rounded toward x so that no norm of the change grows."""
    exact = x.double()
    z = (exact + change).to(x.dtype)
    outside = (z.double() - exact).abs() > change.abs()
    return torch.where(outside, torch.nextafter(z, x), z)


def _fitted(threat: L1 | L2, x: Tensor, z: Tensor, radius: Tensor, fit: Fit) -> Tensor:
    """The nearest legal point: `fit` in the precision of x, and in float64, rounded inward, where that comes out too long."""
    interval = threat.room.interval(x)
    boxed = z.clamp(*interval)
    order = _ORDER if x.dtype is torch.float64 else 1.0
    if threat.room.memo.get(f"all {threat.name}", (x, radius), lambda: bool((threat.reach(x) <= order * radius).all())):
        return boxed
    rows = (threat.size(x, boxed) > order * radius).nonzero().squeeze(1)
    if not len(rows):
        return boxed
    few = len(rows) < len(x)
    x, z, low, high, most = (t[rows] if few else t for t in (x, z, *interval, radius))

    def near(working: torch.dtype, guard: float) -> Tensor:
        start = x.to(working)
        wanted, least, greatest = ((end.to(working) - start).flatten(1) for end in (z, low, high))
        return fit(wanted, least, greatest, (guard * most)[:, None].to(working)).reshape(x.shape)

    working = torch.promote_types(x.dtype, torch.float32)
    quick = (x + near(working, min(_GUARD, 1 - 8 * torch.finfo(working).eps))).to(x.dtype).clamp(low, high)
    long = (~(threat.size(x, quick) <= order * most)).nonzero().squeeze(1)
    if len(long):
        x, z, low, high, most = (t[long] for t in (x, z, low, high, most))
        quick = quick.index_copy(0, long, _toward(x, near(torch.float64, _GUARD)).clamp(low, high))
    return boxed.index_copy(0, rows, quick) if few else quick


def _fit_l2(wanted: Tensor, low: Tensor, high: Tensor, radius: Tensor) -> Tensor:
    """clip(t * wanted), t the largest that fits.

    With s = t^2 the squared length is concave and piecewise linear in s, so Newton's iteration from below ends after finitely
    many steps, usually two or three.
    """
    squares, most = wanted.square(), radius.square()
    s = most / squares.sum(1, keepdim=True)
    for _ in range(wanted.shape[1] + 1):
        scaled = s.sqrt() * wanted
        change = scaled.clamp(low, high)
        slope = (squares * (change == scaled)).sum(1, keepdim=True)
        further = s + (most - change.square().sum(1, keepdim=True)) / slope
        onward = further > s * (1 + 2 * torch.finfo(s.dtype).eps)
        if not bool(onward.any()):
            break
        s = torch.where(onward, further, s)
    return change


def _fit_l1(wanted: Tensor, low: Tensor, high: Tensor, radius: Tensor) -> Tensor:
    """clip(wanted cut toward 0 by t), t the smallest that fits: the length falls with t, and is piecewise linear."""
    long, space = wanted.abs(), torch.where(wanted > 0, high, -low)
    if long.shape[1] > _SORTED:
        shift = _cut_by_steps(long, space, radius)
    else:
        shift, out = _cut_freely(long, radius), (long > space).any(1).nonzero().squeeze(1)
        shift = shift.index_copy(0, out, _cut_by_sorting(long[out], space[out], radius[out])) if len(out) else shift
    change = torch.minimum((long - shift).clamp(min=0.0), space)
    # Far outside the ball long - shift keeps few digits: whatever rounding added is scaled away.
    return wanted.sign() * change * (radius / change.sum(1, keepdim=True).clamp(min=1e-300)).clamp(max=1.0)


_SORTED = 256
"""Features up to which sorting takes less time than a few sums."""
_NEWTON = 12
"""Newton's steps after which bounds are only halved."""


def _cut_freely(long: Tensor, radius: Tensor) -> Tensor:
    """(R, 1): the same as `_cut_by_sorting` where no length (R, F) is longer than its space (Held, Wolfe & Crowder 1974)."""
    excess = long.sort(1, descending=True).values.cumsum(1) - radius
    return (excess / torch.arange(1, long.shape[1] + 1).to(excess)).amax(1, keepdim=True)


def _cut_by_sorting(long: Tensor, space: Tensor, radius: Tensor) -> Tensor:
    """(R, 1): by what to cut lengths (R, F), each no longer than its space (R, F), so that their sum is the radius (R, 1).

    The sum has kinks where a feature starts (long) and stops (long - space) growing as the cut falls: sort, sum, read off.
    """
    kinks, order = torch.cat([long, (long - space).clamp(min=0.0)], 1).sort(1, descending=True)
    growing = torch.where(order < long.shape[1], 1.0, -1.0).to(long).cumsum(1)
    lengths = torch.nn.functional.pad((growing * -kinks.diff(dim=1, append=torch.zeros_like(kinks[:, :1]))).cumsum(1), (1, 0))
    last = (torch.searchsorted(lengths, radius, right=False) - 1).clamp(0, kinks.shape[1] - 1)
    missing = (radius - lengths.gather(1, last)).clamp(min=0.0)
    return kinks.gather(1, last) - missing / growing.gather(1, last).clamp(min=1.0)


def _cut_by_steps(long: Tensor, space: Tensor, radius: Tensor) -> Tensor:
    """The same by Newton's steps, which within one piece are exact, between bounds that every step narrows; else their middle."""
    least, most = torch.zeros_like(radius), long.amax(1, keepdim=True)
    shift, close, steps = least, 4 * torch.finfo(long.dtype).eps * radius, 0
    while True:
        rest = (long - shift).clamp_(min=0.0)
        excess = torch.minimum(rest, space).sum(1, keepdim=True) - radius
        newton = shift + excess / ((rest > 0) & (rest <= space)).sum(1, keepdim=True)
        over = excess > 0
        least, most = torch.where(over, shift, least), torch.where(over, most, shift)
        middle = (least + most) / 2
        further = torch.where((newton > least) & (newton < most), newton, middle) if steps < _NEWTON else middle
        going = (excess.abs() > close) & (newton != shift) & (further > least) & (further < most)
        if not bool(going.any()):
            return shift
        shift, steps = torch.where(going, further, shift), steps + 1


def _ranked(values: Tensor, count: Tensor) -> Tensor:
    """(B, 1): the count-th largest of each row of `values` (B, P), count (B,) at least 1, else the largest."""
    cheap = max(1, values.shape[1] // 64)  # `topk` sorts a heap up to here, and whole rows from here on
    most = int(count.amax())
    top = values.topk(min(max(most, 1), cheap), dim=1).values
    ranked = top.gather(1, (count[:, None] - 1).clamp(0, top.shape[1] - 1))
    rows = (count > cheap).nonzero().squeeze(1)
    if not len(rows):
        return ranked
    return ranked.index_copy(0, rows, values[rows].topk(most, dim=1).values.gather(1, count[rows, None] - 1))


@dataclass(frozen=True, eq=False)
class _Additive(ABC):
    """A threat whose variable is the perturbed input itself, inside `room`."""

    room: Room = field(default_factory=Room)

    def within(self, box: tuple[Bound, Bound]) -> Self:
        """Inside the victim's box."""
        return replace(self, room=self.room.within(box))

    def follow(self, before: tuple[Tensor, ...], rows: Tensor, after: tuple[Tensor, ...]) -> None:
        """What is remembered of the inputs and radii `before` holds for their `rows` in `after`."""
        self.room.memo.follow(before, rows, after)

    def apply(self, x: Tensor, z: Tensor) -> Tensor:
        """z is the input itself."""
        return z

    @abstractmethod
    def size(self, x: Tensor, z: Tensor) -> Tensor:
        """(B,) float64: how large the change is."""

    def reach(self, x: Tensor) -> Tensor:
        """The size of the way to the farthest corner of the intervals."""
        return self.room.memo.get(f"reach {type(self).__name__}", (x,), lambda: self.size(x, self.room.farthest(x)))


@dataclass(frozen=True, eq=False)
class Linf(_Additive):
    """max |x_adv - x| <= radius."""

    name: str = field(default="linf", init=False, repr=False)

    def start(self, x: Tensor, radius: Tensor, noise: Key | None, ids: Tensor) -> Tensor:
        """Uniform in the ball."""
        if noise is None:
            return x.clone()
        return self.project(x, x + per_sample(radius, x) * (2 * noise.uniform(ids, x) - 1), radius)

    def size(self, x: Tensor, z: Tensor) -> Tensor:
        """Largest absolute change."""
        return self.room.measured(self.name, x, z, lambda change: change.abs_().amax(1))

    def project(self, x: Tensor, z: Tensor, radius: Tensor) -> Tensor:
        """Clips each feature to its interval."""
        low, high = self.room.interval(x, radius)
        return z.clamp(low, high)

    def steepest(self, x: Tensor, z: Tensor, gradient: Tensor) -> Tensor:
        """sign(g)."""
        return torch.nan_to_num(gradient, nan=0.0).sign()


@dataclass(frozen=True, eq=False)
class L2(_Additive):
    """Root of the summed squared changes of one sample <= radius."""

    name: str = field(default="l2", init=False, repr=False)

    def start(self, x: Tensor, radius: Tensor, noise: Key | None, ids: Tensor) -> Tensor:
        """A random direction, uniform in the ball before the box cuts it."""
        if noise is None:
            return x.clone()
        share = noise.fold("length").uniform(ids, x.flatten(1)[:, :1]).squeeze(1).double() ** (1.0 / x[0].numel())
        return self.project(x, x + per_sample(radius * share, x) * normalized(noise.normal(ids, x), 2), radius)

    def size(self, x: Tensor, z: Tensor) -> Tensor:
        """Euclidean length of the change."""
        return self.room.measured(self.name, x, z, lambda change: torch.linalg.vector_norm(change, 2, dim=1))

    def project(self, x: Tensor, z: Tensor, radius: Tensor) -> Tensor:
        """Exact: `_fit_l2`."""
        return _fitted(self, x, z, radius, _fit_l2)

    def steepest(self, x: Tensor, z: Tensor, gradient: Tensor) -> Tensor:
        """g / ||g||_2 over the features that can still move."""
        return normalized(self.room.free(x, z, gradient), 2)


@dataclass(frozen=True, eq=False)
class L1(_Additive):
    """Sum of absolute changes of one sample <= radius.

    `share` of the features (at least one) carry the steepest direction; 0 is the exact dual vector, one feature. Sparse
    L1 descent (Tramer & Boneh 2019, arXiv 1904.13000) spreads it, because one feature is soon at its bound.
    """

    share: float = 0.0
    name: str = field(default="l1", init=False, repr=False)

    def start(self, x: Tensor, radius: Tensor, noise: Key | None, ids: Tensor) -> Tensor:
        """Gaussian noise projected onto the ball: sparse, like the changes that work (as in the released APGD)."""
        return x.clone() if noise is None else self.project(x, x + noise.normal(ids, x), radius)

    def size(self, x: Tensor, z: Tensor) -> Tensor:
        """Sum of absolute changes."""
        return self.room.measured(self.name, x, z, lambda change: change.abs_().sum(1))

    def project(self, x: Tensor, z: Tensor, radius: Tensor) -> Tensor:
        """Exact: `_fit_l1`."""
        return _fitted(self, x, z, radius, _fit_l1)

    def steepest(self, x: Tensor, z: Tensor, gradient: Tensor) -> Tensor:
        """Equal steps on the steepest features that can still move."""
        free = torch.nan_to_num(self.room.free(x, z, gradient), nan=0.0).flatten(1)
        count = max(1, int(self.share * free.shape[1]))
        values, places = free.abs().topk(count, dim=1)
        direction = torch.zeros_like(free).scatter(1, places, free.gather(1, places).sign())
        return (direction / (values > 0).sum(1, keepdim=True).clamp(min=1)).reshape(gradient.shape)


@dataclass(frozen=True, eq=False)
class L0(_Additive):
    """Number of changed pixels (all channels of a (C, H, W) sample count as one) or, with `features`, of changed entries."""

    features: bool = False

    @property
    def name(self) -> str:
        """`l0` counts pixels, `l0f` features."""
        return "l0f" if self.features else "l0"

    def _pixels(self, values: Tensor) -> Tensor:
        """(B, C, ...) -> (B, channels, pixels); every feature is a pixel unless there are channels to join."""
        if self.features or values.ndim < 4:
            return values.reshape(len(values), 1, -1)
        return values.flatten(2)

    def start(self, x: Tensor, radius: Tensor, noise: Key | None, ids: Tensor) -> Tensor:
        """floor(radius) random pixels, each uniform in its interval."""
        if noise is None:
            return x.clone()
        low, high = self.room.interval(x)
        values = (low + (high - low) * noise.uniform(ids, x)).clamp(low, high)
        chance = noise.fold("pixels").uniform(ids, self._pixels(x)[:, 0])
        return self._keep(x, values, chance, radius)

    def _keep(self, x: Tensor, values: Tensor, worth: Tensor, radius: Tensor) -> Tensor:
        """`values` on the floor(radius) pixels of most worth (B, pixels), x elsewhere; ties go to the first pixel."""
        count = radius.floor().long().clamp(max=worth.shape[1])[:, None]
        kept = (worth >= _ranked(worth, count.squeeze(1))) & (count > 0)
        tied = (kept.sum(1, keepdim=True) > count).squeeze(1).nonzero().squeeze(1)
        if len(tied):
            rank = worth[tied].argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            kept = kept.index_copy(0, tied, rank < count[tied])
        return torch.where(kept[:, None, :].expand_as(self._pixels(x)).reshape(x.shape), values, x)

    def size(self, x: Tensor, z: Tensor) -> Tensor:
        """How many pixels differ."""
        return self._pixels(z != x).any(1).sum(1).double()

    def project(self, x: Tensor, z: Tensor, radius: Tensor) -> Tensor:
        """Exact: keeps the pixels whose loss would cost the most squared distance."""
        boxed = z.clamp(*self.room.interval(x))
        legal = self.size(x, boxed) <= radius
        if bool(legal.all()):
            return boxed
        # (z - x)^2 - (z - boxed)^2, factored: the difference of squares cancels to nothing far outside the box.
        gain = (boxed.double() - x.double()) * ((z.double() - x.double()) + (z.double() - boxed.double()))
        kept = self._keep(x, boxed, self._pixels(gain).sum(1), radius)
        return torch.where(rowwise(legal, x), boxed, kept)

    def most(self, x: Tensor, z: Tensor, slope: Tensor, radius: Tensor) -> Tensor:
        """z on the floor(radius) pixels where it gains most along `slope` (B, ...), x elsewhere."""
        return self._keep(x, z, self._pixels(slope * (z - x)).sum(1), radius)

    def steepest(self, x: Tensor, z: Tensor, gradient: Tensor) -> Tensor:
        """g scaled to a mean absolute value of 1, as in PGD_0 (Croce & Hein 2019, arXiv 1909.05040): L0 has no dual vector."""
        return normalized(gradient, 1) * gradient[0].numel()
