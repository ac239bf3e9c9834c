"""The set of inputs to certify: an Lp ball cut by the box, masks and budgets; linear functions have exact minima on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epsball.certify.ops import Pair
from epsball.core import Projects
from epsball.errors import BadInput
from epsball.threats import L0, L1, L2, Linf


@dataclass(frozen=True, eq=False)
class Ball:
    """What each sample may become.

    Attributes:
        threat: Linf, L2, L1 or L0, bound to the box. x: (B, ...) float64. radius: (B,) float64.
        low, high: (B, ...) the interval of each feature; no legal input leaves it, at any precision.
    """

    threat: Linf | L2 | L1 | L0
    x: Tensor
    radius: Tensor
    low: Tensor
    high: Tensor

    @staticmethod
    def of(threat: Projects, x: Tensor, radius: Tensor) -> Ball:
        """The set around x (B, ...).

        Raises:
            BadInput: a threat that is no ball.
        """
        if not isinstance(threat, Linf | L2 | L1 | L0):
            raise BadInput(f"threat '{threat.name}': has no certified bounds: use linf, l2, l1 or l0")
        exact = x.double()
        cut = None if isinstance(threat, L0) else radius
        low, high = threat.room.interval(exact, cut)
        return Ball(threat, exact, radius, low, high)

    @property
    def interval(self) -> Pair:
        """(low, high)."""
        return self.low, self.high

    def lowest(self, a: Tensor, rows: Tensor) -> Tensor:
        """(R,): the minimum of <a, input> for coefficients a (R, ...) of the samples `rows` (R,); exact."""
        x, low, high = (t[rows].flatten(1) for t in (self.x, self.low, self.high))
        a = a.flatten(1)
        weight, room = a.abs(), torch.where(a > 0, x - low, high - x)
        start = (a * x).sum(1)
        if isinstance(self.threat, Linf):
            return start - (weight * room).sum(1)
        radius = self.radius[rows]
        if isinstance(self.threat, L2):
            return start - _gain_l2(weight, room, radius)
        if isinstance(self.threat, L1):
            return start - _gain_l1(weight, room, radius)
        joined = 1 if self.threat.features or self.x.ndim < 4 else self.x.shape[1]
        return start - _gain_l0(torch.where(weight > 0, weight * room, 0.0), radius, joined)


def _gain_l2(weight: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """max <weight, d>, 0 <= d <= room, |d| <= radius.

    d = min(room, t weight) with t from Newton's iteration on the squared length, which is concave in t^2. What is returned is
    the dual value at that t, which is never too small, however far the iteration came.
    """
    largest = weight.detach().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1.0)
    weight, most = weight / scale, radius.square()[:, None]
    squares = weight.square()
    t = _newton(squares.detach(), room, most, weight.detach())
    change = torch.minimum(room, t * weight.detach())
    price = 1 / (2 * t.clamp(min=1e-150))
    dual = price * most + (change * (weight - price * change)).sum(1, keepdim=True)
    return (scale * torch.minimum(dual, (weight * room).sum(1, keepdim=True))).squeeze(1)


def _newton(squares: Tensor, room: Tensor, most: Tensor, weight: Tensor) -> Tensor:
    """t (R, 1) at which |min(room, t weight)|^2 comes to `most`."""
    s = most / squares.sum(1, keepdim=True).clamp(min=1e-300)
    for _ in range(50):
        wanted = s.sqrt() * weight
        free = (wanted < room) & (weight > 0)
        length = torch.where(free, wanted, room.where(weight > 0, 0.0)).square().sum(1, keepdim=True)
        further = s + (most - length).clamp(min=0.0) / (squares * free).sum(1, keepdim=True).clamp(min=1e-300)
        if not bool((further > s * (1 + 1e-14)).any()):
            break
        s = further.clamp(max=1e300)
    return s.sqrt()


def _gain_l1(weight: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """max <weight, d>, 0 <= d <= room, sum d <= radius: the largest weights first. The dual value at the weight that ends it."""
    ordered, order = weight.sort(1, descending=True)
    spent = room.gather(1, order).cumsum(1)
    last = (spent < radius[:, None]).sum(1, keepdim=True)
    price = torch.nn.functional.pad(ordered, (0, 1)).gather(1, last)
    return (price.squeeze(1) * radius) + (room * (weight - price).clamp(min=0.0)).sum(1)


def _gain_l0(gain: Tensor, radius: Tensor, joined: int) -> Tensor:
    """The floor(radius) largest gains, those of one pixel's channels joined."""
    ordered = gain.reshape(len(gain), joined, -1).sum(1).sort(1, descending=True).values
    total = torch.nn.functional.pad(ordered.cumsum(1), (1, 0))
    return total.gather(1, radius.floor().long().clamp(max=ordered.shape[1])[:, None]).squeeze(1)
