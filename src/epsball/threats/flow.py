"""Changes of place instead of value: flow fields (stAdv) and rigid motions of images (B, C, H, W).

Here z is not the input itself, and x_adv is a bilinear sample of x: nothing additive is bounded. Lengths are in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from epsball.core.attack import recipe
from epsball.core.problem import Objective, Problem
from epsball.core.random import Key
from epsball.core.rows import per_sample
from epsball.core.threat import Z
from epsball.core.victim import Bound
from epsball.errors import BadInput


def sample(x: Tensor, down: Tensor, right: Tensor, *, outside: float | None = None) -> Tensor:
    """Bilinear values of images x (B, C, H, W) at the places (down, right), each (B, h, w) in pixels -> (B, C, h, w).

    Places beyond the border read the border, or the value `outside` where one is given (then pixels just beyond fade into
    it). Exact at whole pixels, which `grid_sample` is not: its normalized coordinates round.
    """
    height, width = x.shape[2:]
    top, left = down.detach().floor(), right.detach().floor()
    if outside is None:  # the last cell also serves its far edge, so that there is a slope to follow back inside
        down, right = down.clamp(0, height - 1), right.clamp(0, width - 1)
        top, left = top.clamp(0, max(height - 2, 0)), left.clamp(0, max(width - 2, 0))
    below, beside = (down - top)[:, None], (right - left)[:, None]

    def corner(row: Tensor, column: Tensor) -> Tensor:
        inside = (row >= 0) & (row <= height - 1) & (column >= 0) & (column <= width - 1)
        place = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long().flatten(1)
        values = x.flatten(2).gather(2, place[:, None].expand(-1, x.shape[1], -1)).reshape(*x.shape[:2], *row.shape[1:])
        return values if outside is None else torch.where(inside[:, None], values, torch.full_like(values, outside))

    upper = corner(top, left) * (1 - beside) + corner(top, left + 1) * beside
    lower = corner(top + 1, left) * (1 - beside) + corner(top + 1, left + 1) * beside
    return upper * (1 - below) + lower * below


def places(x: Tensor) -> tuple[Tensor, Tensor]:
    """(1, H, W) row and column of every pixel, in the precision in which it is computed."""
    work = _work(x.dtype)
    rows, columns = (torch.arange(n, device=x.device, dtype=work) for n in x.shape[2:])
    down, right = torch.meshgrid(rows, columns, indexing="ij")
    return down[None], right[None]


def _work(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def images(x: Tensor, name: str) -> None:
    """Refuses what has no height and width."""
    if x.ndim != 4:
        raise BadInput(f"threat '{name}': x of shape {tuple(x.shape)} has no height and width: give images (B, C, H, W)")


def boxed(x: Tensor, values: Tensor, box: tuple[Bound, Bound] | None) -> Tensor:
    """`values` (B, ...) clipped to the box, in the dtype of x."""
    values = values.to(x.dtype)
    if box is None:
        return values
    low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in box)
    return torch.minimum(torch.maximum(values, low), high)


@dataclass(frozen=True, eq=False)
class Flow:
    """Every pixel of x_adv is read at a displaced place of x: x_adv(p) = x(p + z(p)), bilinear (Xiao et al. 2018, eq. 1).

    z is the flow (B, 2, H, W): rows down, columns right, in pixels; beyond the border the border is read. The size is the
    longest displacement, max over pixels of its Euclidean length. The paper bounds nothing and only penalizes roughness
    (`Rough`); radius infinity is that.
    """

    box: tuple[Bound, Bound] | None = None
    name: str = field(default="flow", init=False, repr=False)

    def within(self, box: tuple[Bound, Bound]) -> Flow:
        """Values stay between those of x, so the box only catches rounding."""
        return replace(self, box=box)

    def start(self, x: Tensor, radius: Tensor, noise: Key | None, ids: Tensor) -> Tensor:
        """No flow, or each pixel's displacement uniform in the disk of that radius."""
        images(x, self.name)
        still = x.new_zeros(len(x), 2, *x.shape[2:])
        if noise is None:
            return still
        turn, share = noise.uniform(ids, still).double().unbind(1)
        reach = per_sample(radius.clamp(max=max(x.shape[2:])), turn) * share.sqrt()
        angle = 2 * torch.pi * turn
        return self.project(x, torch.stack([reach * angle.sin(), reach * angle.cos()], 1).to(x.dtype), radius)

    def apply(self, x: Tensor, z: Tensor) -> Tensor:
        """The displaced image; bit for bit x where the flow is zero."""
        down, right = places(x)
        work = z.to(down.dtype)
        return boxed(x, sample(x.to(down.dtype), down + work[:, 0], right + work[:, 1]), self.box)

    def size(self, x: Tensor, z: Tensor) -> Tensor:
        """Longest displacement in pixels."""
        return _lengths(z).flatten(1).amax(1)

    def project(self, x: Tensor, z: Tensor, radius: Tensor) -> Tensor:
        """Shortens each displacement that is too long, in its own direction."""
        z = torch.nan_to_num(z, nan=0.0)
        lengths, limit = _lengths(z), per_sample(radius, z.double())[:, 0]
        exact = z.double() * (limit / lengths.clamp(min=1e-300)).clamp(max=1.0)[:, None] * (1 - 1e-12)
        shorter = exact.to(z.dtype)
        # Rounded toward no displacement, so that float64 finds it inside too.
        shorter = torch.where(shorter.double().abs() > exact.abs(), torch.nextafter(shorter, torch.zeros_like(shorter)), shorter)
        return torch.where((lengths > limit)[:, None], shorter, z)

    def steepest(self, x: Tensor, z: Tensor, gradient: Tensor) -> Tensor:
        """Each pixel's own unit direction; zero where the gradient is zero or no number."""
        flat = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0).double()
        flat = flat / flat.abs().amax(1, keepdim=True).clamp(min=1e-300)
        return (flat / _lengths(flat).clamp(min=1e-300)[:, None]).to(gradient.dtype)

    def reach(self, x: Tensor) -> Tensor:
        """From corner to corner."""
        images(x, self.name)
        return torch.full((len(x),), float(((x.shape[2] - 1) ** 2 + (x.shape[3] - 1) ** 2) ** 0.5), dtype=torch.float64, device=x.device)


def _lengths(flow: Tensor) -> Tensor:
    """(B, 2, H, W) -> (B, H, W) float64."""
    return torch.hypot(flow[:, 0].double(), flow[:, 1].double())


def roughness(flow: Tensor) -> Tensor:
    """(B, 2, H, W) -> (B,): sum over pixels and their 4 neighbors of the length of the difference in flow (eq. 4).

    Neighbors are those beside, above and below (each pair counts twice); the public reimplementation takes the diagonal
    ones. The root is softened by 1e-8 under it, so that its gradient is finite where the flow is smooth.
    """
    pairs = (flow[..., 1:, :] - flow[..., :-1, :], flow[..., 1:] - flow[..., :-1])
    return torch.stack([2 * (pair.square().sum(1) + 1e-8).sqrt().flatten(1).sum(1) for pair in pairs]).sum(0)


@dataclass(frozen=True, repr=False)
class Rough:
    """An objective less `weight` times the roughness of the flow: stAdv's total objective (eq. 2), tau = 0.05 in the paper."""

    objective: Objective
    weight: float = 0.05

    def __call__(self, problem: Problem, z: Z, x_adv: Tensor, output: Tensor) -> Tensor:
        """(B,) score."""
        return self.objective(problem, z, x_adv, output) - self.weight * roughness(z).to(output.dtype)

    def __repr__(self) -> str:
        return recipe(self)


@dataclass(frozen=True, eq=False)
class Rigid:
    """Rotation about the middle and translation; z is (B, 3): degrees counter-clockwise, pixels down, pixels right.

    The size is a share of the limits, max(|angle| / degrees, |shift| / pixels): radius 1 is the set of Engstrom et al.
    2019 (30 degrees, 3 pixels for 32 x 32 images). What comes into view is `outside`, black there.
    """

    degrees: float = 30.0
    pixels: float = 3.0
    outside: float = 0.0
    box: tuple[Bound, Bound] | None = None
    name: str = field(default="rigid", init=False, repr=False)

    def within(self, box: tuple[Bound, Bound]) -> Rigid:
        """What comes into view is clipped to the box."""
        return replace(self, box=box)

    def limits(self, like: Tensor) -> Tensor:
        """(3,) float64: the largest angle and shifts at radius 1."""
        return torch.tensor([self.degrees, self.pixels, self.pixels], dtype=torch.float64, device=like.device)

    def start(self, x: Tensor, radius: Tensor, noise: Key | None, ids: Tensor) -> Tensor:
        """No motion, or uniform within the limits."""
        images(x, self.name)
        still = x.new_zeros(len(x), 3)
        if noise is None:
            return still
        share = 2 * noise.uniform(ids, still).double() - 1
        return self.project(x, (share * self.limits(x) * radius[:, None]).to(x.dtype), radius)

    def apply(self, x: Tensor, z: Tensor) -> Tensor:
        """The moved image; bit for bit x where z is zero."""
        # Places in float64: sines round by their row in the batch, which float32 places then hide.
        moves, (down, right) = z.double(), (place.double() for place in places(x))
        angle = torch.deg2rad(moves[:, 0])[:, None, None]
        middle = ((x.shape[2] - 1) / 2, (x.shape[3] - 1) / 2)
        # Where to read: the inverse motion. cos - 1 keeps the zero motion exact.
        below, beside = down - middle[0] - moves[:, 1, None, None], right - middle[1] - moves[:, 2, None, None]
        less = -2 * (angle / 2).sin().square()
        row = down - moves[:, 1, None, None] + less * below + angle.sin() * beside
        column = right - moves[:, 2, None, None] + less * beside - angle.sin() * below
        work = _work(x.dtype)
        return boxed(x, sample(x.to(work), row.to(work), column.to(work), outside=self.outside), self.box)

    def size(self, x: Tensor, z: Tensor) -> Tensor:
        """Largest share of a limit."""
        return (z.double() / self.limits(z)).abs().amax(1)

    def project(self, x: Tensor, z: Tensor, radius: Tensor) -> Tensor:
        """Clips angle and shifts."""
        limit = self.limits(z) * radius[:, None]
        clipped = torch.nan_to_num(z, nan=0.0).double().clamp(-limit, limit)
        near = clipped.to(z.dtype)
        inward = torch.nextafter(near, torch.zeros_like(near))
        return torch.where((near.double() / self.limits(z)).abs() > radius[:, None], inward, near)

    def steepest(self, x: Tensor, z: Tensor, gradient: Tensor) -> Tensor:
        """The sign of the gradient, times each limit."""
        return (torch.nan_to_num(gradient, nan=0.0).sign().double() * self.limits(z)).to(gradient.dtype)

    def reach(self, x: Tensor) -> Tensor:
        """Half a turn, or all of the image moved out."""
        images(x, self.name)
        most = max(180 / self.degrees if self.degrees else 0.0, max(x.shape[2:]) / self.pixels if self.pixels else 0.0)
        return torch.full((len(x),), most, dtype=torch.float64, device=x.device)
