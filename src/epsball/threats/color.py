"""Functional changes of color: one smooth function of color per image, applied to all of its pixels (ReColorAdv).

Laidlaw & Feizi 2019, arXiv 1906.00001: a grid of displacements over the color cube, read by multilinear interpolation, in RGB
or in CIELUV. Images are (B, 3, H, W) sRGB in [0, 1]. Of a gray image RGB leaves one axis: a tone curve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.core.attack import recipe
from epsball.core.problem import Objective, Problem
from epsball.core.random import Key
from epsball.core.rows import per_sample
from epsball.core.threat import Z
from epsball.core.victim import Bound
from epsball.errors import BadInput
from epsball.threats.flow import boxed
from epsball.threats.rounding import clipped

Convert = Callable[[Tensor], Tensor]

# sRGB primaries and the D65 white that they add up to, so that white is u* = v* = 0 exactly.
_TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
_WHITE = tuple(sum(row) for row in _TO_XYZ)
_WHITE_U = 4 * _WHITE[0] / (_WHITE[0] + 15 * _WHITE[1] + 3 * _WHITE[2])
_WHITE_V = 9 * _WHITE[1] / (_WHITE[0] + 15 * _WHITE[1] + 3 * _WHITE[2])
_TINY = 1e-10


def _mixed(values: Tensor, rows: Tensor) -> Tensor:
    """(B, 3, ...) times a (3, 3) matrix."""
    return torch.einsum("ij,bj...->bi...", rows.to(values), values)


def luv(rgb: Tensor) -> Tensor:
    """sRGB (B, 3, ...) in [0, 1] -> CIE 1976 L*u*v* scaled to about [0, 1]: L / 100, (u + 100) / 200, (v + 100) / 200."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)
    x, y, z = _mixed(linear, torch.tensor(_TO_XYZ, dtype=torch.float64)).unbind(1)
    whole = (x + 15 * y + 3 * z).clamp(min=_TINY)
    light = torch.where(y <= (6 / 29) ** 3, (29 / 3) ** 3 * y, 116 * y.clamp(min=(6 / 29) ** 3) ** (1 / 3) - 16)
    u, v = 13 * light * (4 * x / whole - _WHITE_U), 13 * light * (9 * y / whole - _WHITE_V)
    return torch.stack([light / 100, (u + 100) / 200, (v + 100) / 200], 1)


def rgb_of_luv(values: Tensor) -> Tensor:
    """Inverse of `luv`, outside the gamut too; the straight part of the gamma curve goes on below 0, so slopes stay finite."""
    light, u, v = values[:, 0] * 100, values[:, 1] * 200 - 100, values[:, 2] * 200 - 100
    safe = torch.where(light.abs() < 1e-6, torch.full_like(light, 1e-6), light)
    up, vp = u / (13 * safe) + _WHITE_U, (v / (13 * safe) + _WHITE_V)
    vp = torch.where(vp.abs() < 1e-3, torch.full_like(vp, 1e-3), vp)
    y = torch.where(light <= 8, light * (3 / 29) ** 3, ((light.clamp(min=8) + 16) / 116) ** 3)
    xyz = torch.stack([y * 9 * up / (4 * vp), y, y * (12 - 3 * up - 20 * vp) / (4 * vp)], 1)
    linear = _mixed(xyz, torch.linalg.inv(torch.tensor(_TO_XYZ, dtype=torch.float64)))
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055)


def _same(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class Space:
    """A color space whose colors lie in [0, 1]^3, nearly: in LUV the most vivid ones do not (u to 1.38, v from -0.17 to 1.04)."""

    name: str
    of_rgb: Convert
    to_rgb: Convert
    exact: bool = False  # float64 inside, so that powers, which round by their place in the batch, leave no trace in float32

    def __repr__(self) -> str:
        return self.name


RGB = Space("RGB", _same, _same)
LUV = Space("LUV", luv, rgb_of_luv, exact=True)


def interpolate(grid: Tensor, colors: Tensor) -> Tensor:
    """Multilinear values of grids (B, C, R1, ..., RC) at colors (B, C, N) in [0, 1] -> (B, C, N); beyond the cube its faces are read."""
    sizes, axes = torch.tensor(grid.shape[2:], device=grid.device), colors.shape[1]
    at = colors.clamp(0, 1) * (sizes - 1).to(colors)[:, None]
    low = torch.minimum(at.detach().floor(), (sizes - 2).clamp(min=0).to(colors)[:, None])
    share, flat = at - low, grid.flatten(2)
    total = torch.zeros_like(colors)
    for corner in range(2**axes):
        bits = torch.tensor([corner >> axis & 1 for axis in reversed(range(axes))], device=grid.device)[:, None]
        place = torch.minimum(low.long() + bits, (sizes - 1)[:, None])
        weights = torch.where(bits > 0, share, 1 - share)
        weight, index = weights[:, 0], place[:, 0]
        for axis in range(1, axes):
            weight, index = weight * weights[:, axis], index * sizes[axis] + place[:, axis]
        total = total + weight[:, None] * flat.gather(2, index[:, None].expand(-1, axes, -1))
    return total


@dataclass(frozen=True, eq=False)
class Color:
    """x_adv = f(x), the same function of color for every pixel: f(c) = c + the grid z at c, multilinear, in `space`.

    z is the grid of displacements (B, 3, R1, R2, R3). Its size is the largest displacement of any channel at any grid
    point, in units of the space scaled to [0, 1] (CIELUV: 0.01 is 1 in L*, 2 in u* and v*); the paper's CIELUV budget is
    0.06 with 16 x 32 x 32 points, 196 kB an image where they are kept. Colors leaving the gamut are clipped to the box.
    Gray images (B, 1, H, W) are taken in RGB only: z (B, 1, R1) is then a curve of gray values.

    What is added to x is rgb(c + d) - rgb(c) rather than the round trip itself: z = 0 is x, bit for bit, in any space.
    """

    space: Space = LUV
    points: tuple[int, int, int] = (16, 32, 32)
    box: tuple[Bound, Bound] | None = None

    @property
    def name(self) -> str:
        """`color` works in RGB, `color-luv` in CIELUV."""
        return "color" if self.space is RGB else f"color-{self.space.name.lower()}"

    def within(self, box: tuple[Bound, Bound]) -> Color:
        """Clipped to the box, which must lie in [0, 1]: colors are sRGB."""
        low, high = (torch.as_tensor(bound) for bound in box)
        if bool((low < 0).any()) or bool((high > 1).any()):
            ends = f"{float(low.min()):g} .. {float(high.max()):g}"
            raise BadInput(f"threat '{self.name}': box {ends}: colors are sRGB in 0 .. 1: wrap the model with its mean and std")
        return replace(self, box=box)

    def start(self, x: Tensor, radius: Tensor, noise: Key | None, ids: Tensor) -> Tensor:
        """The identity, or uniform displacements."""
        still = x.new_zeros(len(x), *self._grid(x))
        if noise is None:
            return still
        return self.project(x, (2 * noise.uniform(ids, still) - 1) * per_sample(radius.clamp(max=1.0), still), radius)

    def _grid(self, x: Tensor) -> tuple[int, ...]:
        """(C, R1, ..., RC)"""
        channels = x.shape[1] if x.ndim == 4 else 0
        if channels == 3:
            return (3, *self.points)
        if channels != 1:
            raise BadInput(f"threat '{self.name}': x of shape {tuple(x.shape)} has no colors: give images (B, 3, H, W), or gray ones")
        if self.space is not RGB:
            raise BadInput(f"threat '{self.name}': gray images of shape {tuple(x.shape)} have no colors: use color, a curve of gray values")
        return (1, self.points[0])

    def apply(self, x: Tensor, z: Tensor) -> Tensor:
        """The recolored image."""
        work = torch.float64 if x.dtype is torch.float64 or self.space.exact else torch.float32
        rgb = x.to(work)
        colors = self.space.of_rgb(rgb)
        moved = colors + interpolate(z.to(work), colors.flatten(2)).reshape(colors.shape)
        return boxed(x, rgb + (self.space.to_rgb(moved) - self.space.to_rgb(colors)), self.box)

    def size(self, x: Tensor, z: Tensor) -> Tensor:
        """Largest displacement."""
        return z.double().abs().flatten(1).amax(1)

    def project(self, x: Tensor, z: Tensor, radius: Tensor) -> Tensor:
        """Clips every displacement, rounded inward."""
        return clipped(z, radius)

    def steepest(self, x: Tensor, z: Tensor, gradient: Tensor) -> Tensor:
        """sign(g): grid points that no pixel reads stay."""
        return torch.nan_to_num(gradient, nan=0.0).sign()

    def reach(self, x: Tensor) -> Tensor:
        """From one end of the cube to the other."""
        return torch.ones(len(x), dtype=torch.float64, device=x.device)


def unevenness(z: Tensor) -> Tensor:
    """(B, C, R1, ..., RC) -> (B,): sum over neighboring grid points of the length of the difference in displacement (eq. 4).

    Each pair counts twice, as in the released code, whose softening 1e-10 under the root is also taken over.
    """
    pairs = [z.diff(dim=axis) for axis in range(2, z.ndim)]
    return torch.stack([2 * (pair.square().sum(1) + 1e-10).sqrt().flatten(1).sum(1) for pair in pairs]).sum(0)


@dataclass(frozen=True, repr=False)
class Uneven:
    """An objective less `weight` times the unevenness of the color function: ReColorAdv's smoothness loss, 0.05 there."""

    objective: Objective
    weight: float = 0.05

    def __call__(self, problem: Problem, z: Z, x_adv: Tensor, output: Tensor) -> Tensor:
        """(B,) score."""
        return self.objective(problem, z, x_adv, output) - self.weight * unevenness(z).to(output.dtype)

    def __repr__(self) -> str:
        return recipe(self)
