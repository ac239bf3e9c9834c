"""Adversarial patches: anything at all inside a window of the image, nothing outside it.

Brown et al. 2017, arXiv 1712.09665; one patch per image, at a fixed place. Under `Through(Channel(), Eot(...))` it is fitted to
hold in photographs; `compose` joins it with other threats.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from epsball.core.random import Key
from epsball.core.rows import per_sample
from epsball.core.victim import Bound
from epsball.errors import BadInput
from epsball.threats.flow import boxed, images
from epsball.threats.rounding import clipped


@dataclass(frozen=True, eq=False)
class Patch:
    """A window of `height` x `width` pixels at `place` (top, left) may be painted over; z (B, C, height, width) is its change.

    x_adv is clip(x + z) inside the window, x outside. The size is the largest change of a value, so radius 1 (in a box of
    width 1) is a free patch, as in the paper, and a smaller radius a translucent one.
    """

    height: int
    width: int
    place: tuple[int, int] = (0, 0)
    box: tuple[Bound, Bound] | None = None
    name: str = field(default="patch", init=False, repr=False)

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1 or min(self.place) < 0:
            raise BadInput(f"patch: {self.height} x {self.width} at {self.place}: sides must be 1 or more, the place 0 or more")

    def within(self, box: tuple[Bound, Bound]) -> Patch:
        """Paint is clipped to the box."""
        return replace(self, box=box)

    def _window(self, x: Tensor) -> tuple[slice, slice, slice, slice]:
        images(x, self.name)
        top, left = self.place
        if top + self.height > x.shape[2] or left + self.width > x.shape[3]:
            size = f"{self.height} x {self.width} at {self.place}"
            raise BadInput(f"threat 'patch': {size} leaves images of {x.shape[2]} x {x.shape[3]}: make it smaller or move it")
        return slice(None), slice(None), slice(top, top + self.height), slice(left, left + self.width)

    def start(self, x: Tensor, radius: Tensor, noise: Key | None, ids: Tensor) -> Tensor:
        """No change, or a uniform one."""
        still = torch.zeros_like(x[self._window(x)])
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
        window = self._window(x)
        low, high = (torch.as_tensor(b, dtype=torch.float64, device=x.device) for b in self.box or (-torch.inf, torch.inf))
        exact = x.double()
        return torch.maximum((high - exact)[window], (exact - low)[window]).flatten(1).amax(1)
