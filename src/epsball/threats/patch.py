"""Adversarial patches: anything at all inside a window of the image, nothing outside it.

Brown et al. 2017, arXiv 1712.09665. `Patch` is a square of any place, its radius the side; `Window` stands where it is put, its
radius is how strong the paint is. Under `Through(Channel(), Eot(...))` either is fitted to hold in photographs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from epsball.core.random import Key
from epsball.core.rows import per_sample
from epsball.core.rule import normalized
from epsball.core.victim import Bound
from epsball.errors import BadInput
from epsball.threats.flow import boxed, images
from epsball.threats.lp import Room
from epsball.threats.rounding import clipped


@dataclass(frozen=True, eq=False)
class Patch:
    """All changes of one image lie in a square of floor(radius) x floor(radius) pixels, wherever the adversary puts it.

    The variable z is the perturbed image itself. Its size is the longer side of the smallest rectangle that holds every changed
    pixel. Rao et al. 2020, arXiv 2005.02313, also let the place move; here projection moves it: a search that gains beyond the edge
    of its square drags the square along, so attacks want restarts.
    """

    room: Room = field(default_factory=Room)
    name: str = field(default="patch", init=False, repr=False)

    def within(self, box: tuple[Bound, Bound]) -> Patch:
        """Paint stays inside the box."""
        return replace(self, room=self.room.within(box))

    def start(self, x: Tensor, radius: Tensor, noise: Key | None, ids: Tensor) -> Tensor:
        """No change, or a square at a uniform place: half of them of one color from the corners of the box, half of uniform values.

        On digits the solid squares alone break more than 10-step gradient searches from either kind of start.
        """
        images(x, self.name)
        if noise is None:
            return x.clone()
        low, high = self.room.interval(x)
        values = noise.uniform(ids, x)
        down, right, coin = noise.fold("place").uniform(ids, x.flatten(1)[:, :1].expand(-1, 3)).double().unbind(1)
        solid = torch.where(values[:, :, :1, :1] < 0.5, low, high)
        paint = torch.where(per_sample(coin, x) < 0.5, solid, (low + (high - low) * values).clamp(low, high))
        sides = self._sides(x, radius)
        room = [x.shape[2] - sides[0] + 1, x.shape[3] - sides[1] + 1]
        corner = torch.stack([(down * room[0]).long(), (right * room[1]).long()], 1)
        return torch.where(self._square(x, corner, sides), paint, x)

    def _sides(self, x: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) height and (B,) width of the square, as far as the image reaches."""
        whole = radius.floor()
        return whole.clamp(max=x.shape[2]).long(), whole.clamp(max=x.shape[3]).long()

    def _square(self, x: Tensor, corner: Tensor, sides: tuple[Tensor, Tensor]) -> Tensor:
        """(B, 1, H, W) bool: inside the square whose top left pixel is `corner` (B, 2)."""
        inside = []
        for axis in (0, 1):
            at = torch.arange(x.shape[2 + axis], device=x.device)[None]
            inside.append((at >= corner[:, axis, None]) & (at < (corner[:, axis] + sides[axis])[:, None]))
        return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]

    def apply(self, x: Tensor, z: Tensor) -> Tensor:
        """z is the input itself."""
        return z

    def size(self, x: Tensor, z: Tensor) -> Tensor:
        """Longer side, in pixels, of what holds every change."""
        images(x, self.name)
        changed = (z != x).any(1)
        return torch.maximum(_span(changed.any(2)), _span(changed.any(1))).double()

    def project(self, x: Tensor, z: Tensor, radius: Tensor) -> Tensor:
        """Exact: keeps the square whose loss would cost the most squared distance; the first of equals."""
        boxed = z.clamp(*self.room.interval(x))
        far = (self.size(x, boxed) > radius).nonzero().squeeze(1)
        if not len(far):
            return boxed
        clean, wanted, near = x[far].double(), z[far].double(), boxed[far].double()
        # (z - x)^2 - (z - boxed)^2, factored: the difference of squares cancels to nothing far outside the box.
        gain = ((near - clean) * ((wanted - clean) + (wanted - near))).sum(1)
        sides = self._sides(x[far], radius[far])
        kept = self._square(x[far], _best_corner(gain, sides), sides)
        return boxed.index_copy(0, far, torch.where(kept, boxed[far], x[far]))

    def steepest(self, x: Tensor, z: Tensor, gradient: Tensor) -> Tensor:
        """sign(g) inside the square that z uses, g / max |g| outside, which tells projection where else it is worth going.

        Scaled by the width of the box over the side of that square: a step of one radius then crosses the box, as for a free patch.
        """
        low, high = self.room.interval(x)
        g = normalized(self.room.free(x, z, gradient), torch.inf)
        changed = (z != x).any(1)
        held = (_between(changed.any(2))[:, :, None] & _between(changed.any(1))[:, None, :])[:, None]
        wide = torch.where(torch.isfinite(high - low), high - low, torch.ones_like(low))
        return torch.where(held, g.sign(), g) * wide / per_sample(self.size(x, z).clamp(min=1), x)

    def reach(self, x: Tensor) -> Tensor:
        """The longer side of the part of the image that can change at all."""
        return self.size(x, self.room.farthest(x))


def _between(line: Tensor) -> Tensor:
    """(B, n) bool -> (B, n) bool: from the first True to the last."""
    return (line.cumsum(1) > 0) & (line.flip(1).cumsum(1).flip(1) > 0)


def _span(line: Tensor) -> Tensor:
    """(B, n) bool -> (B,): how far it is from the first True to the last, both counted."""
    return _between(line).sum(1)


def _best_corner(gain: Tensor, sides: tuple[Tensor, Tensor]) -> Tensor:
    """(B, 2) top left pixel of the window of (height, width) with the largest sum of gain (B, H, W) float64."""
    corner = torch.zeros(len(gain), 2, dtype=torch.int64, device=gain.device)
    sums = torch.nn.functional.pad(gain.cumsum(1).cumsum(2), (1, 0, 1, 0))
    for height, width in sorted(set(zip(sides[0].tolist(), sides[1].tolist(), strict=True))):
        rows = ((sides[0] == height) & (sides[1] == width)).nonzero().squeeze(1)
        part = sums[rows]
        below, above = part[:, height:], part[:, : part.shape[1] - height]
        total = (below[:, :, width:] - above[:, :, width:]) - (below[:, :, : -width or None] - above[:, :, : -width or None])
        best = total.flatten(1).argmax(1)
        corner[rows] = torch.stack([best // total.shape[2], best % total.shape[2]], 1)
    return corner


@dataclass(frozen=True, eq=False)
class Window:
    """`height` x `width` pixels at `place` (top, left) may be painted over; z (B, C, height, width) is its change.

    x_adv is clip(x + z) inside the window, x outside. The size is the largest change of a value, so radius 1 (in a box of
    width 1) is a free patch, as in the paper, and a smaller radius a translucent one.
    """

    height: int
    width: int
    place: tuple[int, int] = (0, 0)
    box: tuple[Bound, Bound] | None = None
    name: str = field(default="window", init=False, repr=False)

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1 or min(self.place) < 0:
            raise BadInput(f"window: {self.height} x {self.width} at {self.place}: sides must be 1 or more, the place 0 or more")

    def within(self, box: tuple[Bound, Bound]) -> Window:
        """Paint is clipped to the box."""
        return replace(self, box=box)

    def _cut(self, x: Tensor) -> tuple[slice, slice, slice, slice]:
        images(x, self.name)
        top, left = self.place
        if top + self.height > x.shape[2] or left + self.width > x.shape[3]:
            size = f"{self.height} x {self.width} at {self.place}"
            raise BadInput(f"threat 'window': {size} leaves images of {x.shape[2]} x {x.shape[3]}: make it smaller or move it")
        return slice(None), slice(None), slice(top, top + self.height), slice(left, left + self.width)

    def start(self, x: Tensor, radius: Tensor, noise: Key | None, ids: Tensor) -> Tensor:
        """No change, or a uniform one."""
        still = torch.zeros_like(x[self._cut(x)])
        if noise is None:
            return still
        widest = self.reach(x) if self.box is not None else radius
        change = (2 * noise.uniform(ids, still) - 1) * per_sample(torch.minimum(radius, widest), still)
        return self.project(x, change, radius)

    def apply(self, x: Tensor, z: Tensor) -> Tensor:
        """The painted image; bit for bit x outside the window."""
        top, left = self.place
        below, beside = x.shape[2] - top - self.height, x.shape[3] - left - self.width
        return boxed(x, x + torch.nn.functional.pad(z, (left, beside, top, below)), self.box)

    def size(self, x: Tensor, z: Tensor) -> Tensor:
        """Largest change of a value."""
        return z.double().abs().flatten(1).amax(1)

    def project(self, x: Tensor, z: Tensor, radius: Tensor) -> Tensor:
        """Clips every change to the radius, rounded inward."""
        return clipped(z, radius)

    def steepest(self, x: Tensor, z: Tensor, gradient: Tensor) -> Tensor:
        """sign(g)."""
        return torch.nan_to_num(gradient, nan=0.0).sign()

    def reach(self, x: Tensor) -> Tensor:
        """Until every value in the window can be any value of the box."""
        window = self._cut(x)
        low, high = (torch.as_tensor(b, dtype=torch.float64, device=x.device) for b in self.box or (-torch.inf, torch.inf))
        exact = x.double()
        return torch.maximum((high - exact)[window], (exact - low)[window]).flatten(1).amax(1)
