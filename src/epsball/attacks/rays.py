"""RayS: which corner of the Linf ball points to the nearest boundary, by flipping signs in blocks that halve."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.decision import Found, Path, bisect, given, interval, label_only, look, ray
from epsball.attacks.registry import register
from epsball.core import Attack, Problem, Projects, Reading
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.threats import Linf

_SHORTER = (0.1, 0.01, 0.001)  # by how much of the radius a kept flip may bring it down: asked in this order
_ROUGH = 0.03  # a bisection ends at this share of the gain that is still possible
_LAST = 8  # queries of a flip that is kept, mostly


@register(
    paper="Chen & Gu 2020, arXiv 2006.12792",
    access=Access.LABELS,
    threats=("linf",),
    kind="smallest",
    cost="at most steps forwards, 1 forward to judge",
)
def rays(steps: int = 1000, tolerance: float = 1e-3, starts: Tensor | None = None, threat: Projects | None = None) -> Attack:
    """RayS, Algorithm 3: flips the signs of one block after another; keeps a flip that fools the model at the present radius.

    A kept flip is followed by a bisection of the radius along x + r * sign (Algorithm 2); level s cuts the features into 2^s
    blocks. There is no random choice.

    Args:
        steps: queries per sample. tolerance: of the last bisection, as a share of the radius.
        starts: (N, ...) inputs; the signs of their differences from x are tried first, nearest first. A `Targeted` goal may
            want some of the target's class: the corners of the box that flips of whole blocks reach need not be of it.
        threat: Linf.

    Cost: at most steps forwards per sample, 1 forward to judge.

    Differs from the released code: most gains are small, so a kept flip asks at 0.9, 0.99 and 0.999 of the radius until one
    fools the model, and bisects only to 3 % of the gain in question; the last queries bisect what is left to `tolerance`
    (there every bisection goes from 0 to 1e-3 / sqrt(d)). The signs that the search starts with are tried, too.
    """
    if not 0 < tolerance < 1:
        raise BadInput(f"tolerance: {tolerance}: must be between 0 and 1")
    return label_only("rays", threat or Linf(), (Linf,), RayS(steps, tolerance, starts), steps + 1, steps)


@dataclass(frozen=True)
class _Rays:
    found: Found
    sign: Tensor  # (B, ...), +1 or -1
    radius: Tensor  # (B,) float64: of the smallest success along sign; the widest interval before the first
    low: Tensor  # (B,) float64: the largest radius below it that did not fool the model
    level: int = -1  # -1 before the start
    block: int = 0

    @property
    def z(self) -> Tensor:
        """The smallest success, to be judged at the end."""
        return self.found.z


@dataclass(frozen=True)
class RayS:
    """See `rays`."""

    budget: int
    tolerance: float
    starts: Tensor | None

    def init(self, problem: Problem, steps: int) -> _Rays:
        """Nothing asked yet; all signs up."""
        low, high = interval(problem)
        widest = torch.maximum(high - problem.x, problem.x - low).double().flatten(1).amax(1)
        return _Rays(Found.nothing(problem, self.budget), torch.ones_like(problem.x), widest, 0 * widest)

    def step(self, problem: Problem, state: _Rays) -> tuple[Reading, _Rays]:
        """The best so far; then the signs that the search starts with, or one flip of one block."""
        if state.level < 0:
            after = self._try(problem, state, state.sign)
            for point in given(problem, self.starts):
                after = self._try(problem, after, torch.where(point < problem.x, -1.0, 1.0).to(point.dtype))
            return state.found.reading(problem), replace(after, level=0)
        state = self._polished(problem, state)
        size = -(-problem.x[0].numel() // 2**state.level)
        first = state.block * size
        flipped = state.sign.flatten(1).clone()
        flipped[:, first : first + size] *= -1
        after = self._try(problem, state, flipped.reshape(state.sign.shape))
        last = first + size >= flipped.shape[1]
        level, block = (state.level + 1, 0) if last else (state.level, state.block + 1)
        return state.found.reading(problem), replace(after, level=min(level, flipped.shape[1].bit_length()), block=block)

    def _try(self, problem: Problem, state: _Rays, sign: Tensor) -> _Rays:
        """Takes over the signs of samples that they fool at the present radius, and the least radius at which they do."""
        hit, low, radius, found = shorter(problem, state.found, ray(problem, sign), state.radius)
        better = hit & ((radius < state.radius) | ~state.found.some)
        wide = better.reshape(-1, *[1] * (sign.ndim - 1))
        low, radius = torch.where(better, low, state.low), torch.where(better, radius, state.radius)
        return replace(state, found=found, sign=torch.where(wide, sign, state.sign), radius=radius, low=low)

    def _polished(self, problem: Problem, state: _Rays) -> _Rays:
        """The radius along the present signs to `tolerance`, for samples whose queries suffice for little more."""
        fine = self.tolerance * state.radius
        need = ((state.radius - state.low) / fine).log2().ceil()
        last = state.found.some & (need > 0) & (state.found.left(problem) <= need + _LAST)
        radius, found = bisect(problem, state.found, ray(problem, state.sign), state.low, state.radius, fine, last)
        return replace(state, found=found, radius=radius, low=torch.where(last, torch.maximum(state.low, radius - fine), state.low))


def shorter(problem: Problem, found: Found, path: Path, radius: Tensor) -> tuple[Tensor, Tensor, Tensor, Found]:
    """Whether each path fools the model at the present radius (B,); if so, a radius below that does not, and one that does.

    Cost: 1 forward where it does not; else, mostly, 2 to 4 and a bisection to `_ROUGH`, 5 or 6.
    """
    _, hit, found = look(problem, found, path(radius), torch.ones_like(found.some))
    low, high, still = torch.zeros_like(radius), radius, hit
    for share in _SHORTER:
        near = (1 - share) * radius
        asked, fooled, found = look(problem, found, path(near), still)
        high, low = torch.where(fooled, near, high), torch.where(asked & ~fooled, near, low)
        still = asked & ~fooled
    rough = _ROUGH * (radius - low)
    least, found = bisect(problem, found, path, low, high, rough, hit)
    return hit, torch.maximum(low, least - rough), least, found
