"""SurFree: no gradient is estimated; from the boundary, turn toward one random direction after the other and stay with what is nearer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.decision import Found, Path, bisect, interval, inward_path, label_only, look, start_near
from epsball.attacks.registry import register
from epsball.attacks.simba import cosines
from epsball.attacks.square import as_image
from epsball.core import Attack, Problem, Projects, Reading
from epsball.core.rows import per_sample
from epsball.core.rule import normalized
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.threats import L2

_STEEPEST = math.radians(80)


@register(
    paper="Maho, Furon & Le Merrer 2021, arXiv 2011.12807",
    access=Access.LABELS,
    threats=("l2",),
    kind="smallest",
    cost="at most steps forwards, 1 forward to judge",
)
def surfree(
    steps: int = 1000,
    angle: float = 30.0,
    rho: float = 0.95,
    signs: int = 1,
    even: int = 300,
    memory: int = 100,
    tries: int = 50,
    starts: Tensor | None = None,
    threat: Projects | None = None,
) -> Attack:
    """SurFree, Algorithm 1: z(a) = x + r cos(a) (cos(a) u + sin(a) v), u = unit(z - x), r = ||z - x||; on a plane the best a is nearest.

    v is a random sum of cosine waves, orthogonal to u and to the last directions. Angles +-angle, +-angle (1 - 1 / signs) ...
    are asked until one fools the model; then the largest such angle is bisected. `angle` times rho after a direction without
    success, over rho after one with. z(a) is nearer to x than z for every a but 0.

    Args:
        steps: queries per sample. angle: the first, in degrees, 0 .. 80. rho: how fast it follows, 0 .. 1. signs: angles to each side.
        even: directions after which low waves weigh little more than high ones. memory: directions that the next is orthogonal
        to, at most a quarter of the features.
        tries: random directions that are tried for a nearer start, one query each where there is none; at most a twentieth of
        steps, where a turn gains more.
        starts: (N, ...) inputs to start from, tried nearest first; a `Targeted` goal wants some of the target's class.
        threat: L2.

    Returns:
        A search for the smallest change; its name is `surfree`.

    Raises:
        BadInput: numbers out of their range, or another threat.

    Cost: at most steps forwards per sample, 1 forward to judge.

    Differs from the released code: random directions are tried for a nearer start; waves of the whole image, lower ones
    weighing more, at first, instead of the lower half in blocks of 8; one angle to each side instead of three; rho is 0.95
    instead of 0.98; the bisection stays on the side of its first success.
    """
    for name, value, most in (("angle", angle, 80), ("rho", rho, 1)):
        if not 0 < value <= most:
            raise BadInput(f"{name}: {value}: must lie above 0 and be at most {most}")
    for name, count, least in (("signs", signs, 1), ("even", even, 0), ("memory", memory, 0), ("tries", tries, 0)):
        if count < least:
            raise BadInput(f"{name}: {count}: must be {least} or more")
    search = Turns(steps, math.radians(angle), rho, signs, even, memory, tries, starts)
    return label_only("surfree", threat or L2(), (L2,), search, steps + 1, steps)


@dataclass(frozen=True)
class _Turning:
    found: Found
    angle: Tensor  # (B,) float64
    past: Tensor  # (B, K, F): the last directions, each of length 1 or 0
    number: int = 0

    @property
    def z(self) -> Tensor:
        """The smallest success, to be judged at the end."""
        return self.found.z


@dataclass(frozen=True)
class Turns:
    """See `surfree`."""

    budget: int
    first: float
    rho: float
    signs: int
    even: int
    memory: int
    tries: int
    starts: Tensor | None

    def init(self, problem: Problem, steps: int) -> _Turning:
        """Nothing asked yet."""
        none = problem.x.new_zeros(len(problem), 0, problem.x[0].numel())
        return _Turning(Found.nothing(problem, self.budget), torch.full_like(problem.radius, self.first), none)

    def step(self, problem: Problem, state: _Turning) -> tuple[Reading, _Turning]:
        """The best so far; then a start on the boundary, or one direction."""
        after = self._begin(problem, state) if state.number == 0 else self._turn(problem, state)
        return state.found.reading(problem), replace(after, number=state.number + 1)

    def _begin(self, problem: Problem, state: _Turning) -> _Turning:
        found = start_near(problem, state.found, self.starts, min(self.tries, self.budget // 20))
        ones = torch.ones_like(problem.radius)
        _, found = bisect(problem, found, inward_path(problem, found.z), 0 * ones, ones, 1e-3 * ones, found.some)
        return replace(state, found=found)

    def _turn(self, problem: Problem, s: _Turning) -> _Turning:
        """One direction for every sample: does some angle fool the model, and which is the largest?"""
        if not bool((s.found.left(problem) > 0).any()):
            return s
        u = normalized((s.found.z - problem.x).double(), 2)
        v, past = self._direction(problem, s, u)
        arc, found = _arc(problem, s.found, u, v), s.found
        best, fooled = torch.zeros_like(s.angle), torch.zeros_like(s.found.some)
        for number in range(2 * self.signs):
            angle = s.angle * (1 - number // 2 / self.signs) * (-1 if number % 2 else 1)
            _, hit, found = look(problem, found, arc(angle), found.some & ~fooled)
            best, fooled = torch.where(hit, angle, best), fooled | hit
        found = self._farther(problem, found, arc, best, s.angle)
        angle = (s.angle * torch.where(fooled, 1 / self.rho, self.rho)).clamp(max=_STEEPEST)
        return replace(s, found=found, angle=torch.where(found.some, angle, s.angle), past=past)

    def _farther(self, problem: Problem, found: Found, arc: Path, best: Tensor, asked: Tensor) -> Found:
        """From the angles `best` (B,), 0 where none fools the model, up to the largest that does; beyond `asked` nobody has asked yet."""
        fooled, side, reach, step = best != 0, best.sign(), best.abs(), asked / self.signs
        end = torch.full_like(reach, math.pi / 2)
        outer, growing = torch.minimum(reach + step, end), fooled & (reach == asked)
        while bool(growing.any()):
            _, growing, found = look(problem, found, arc(side * outer), growing & (outer < end))
            reach, outer = torch.where(growing, outer, reach), torch.where(growing, torch.minimum(outer + step, end), outer)
        return bisect(problem, found, lambda rest: arc(side * (end - rest)), end - outer, end - reach, 0.05 * reach, fooled)[1]

    def _direction(self, problem: Problem, s: _Turning, u: Tensor) -> tuple[Tensor, Tensor]:
        """v (B, ...) float64, of length 1, orthogonal to u and to the last directions; and these with v."""
        low, high = interval(problem)
        wave = waves(problem, s.number, self.even).masked_fill(high <= low, 0.0).flatten(1)
        for other in (s.past.double(), u.flatten(1)[:, None]):
            wave = wave - ((other * wave[:, None]).sum(2, keepdim=True) * other).sum(1)
        v = normalized(wave, 2)
        past = torch.cat([s.past, v[:, None].to(s.past.dtype)], 1)
        most = min(self.memory, past.shape[2] // 4)  # more would leave no direction in a small space
        return v.reshape(u.shape), past[:, past.shape[1] - min(most, past.shape[1]) :]


def _arc(problem: Problem, found: Found, u: Tensor, v: Tensor) -> Path:
    """x + r cos(a) (cos(a) u + sin(a) v), cut to the legal interval of every feature."""
    x, (low, high) = problem.x, interval(problem)
    length = torch.where(found.some, found.size, 0.0)

    def arc(angle: Tensor) -> Tensor:
        change = per_sample(length * angle.cos().square(), u) * u + per_sample(length * angle.cos() * angle.sin(), v) * v
        return (x + change.to(x.dtype)).clamp(low, high)

    return arc


def waves(problem: Problem, number: int, even: int) -> Tensor:
    """(B, ...) float64: all cosine waves of every channel, weighted -1, 0 or 1 times (1 + (6 f)^2)^(-even / (even + number)).

    f, 0 .. 1, is the higher frequency of the two axes: low waves rule at first, as in images, and none in the long run.
    """
    c, h, w = as_image(problem.x).shape[1:]
    device = problem.x.device
    drawn = problem.key.fold("waves", number).uniform(problem.ids, torch.empty(len(problem), c, h, w, device=device))
    weight = (3 * drawn).floor().clamp(max=2).double() - 1
    rows, columns = (torch.arange(side, dtype=torch.float64, device=device) / side for side in (h, w))
    frequency = torch.maximum(rows[:, None], columns[None])
    weight = weight * (1 + (6 * frequency).square()) ** (-even / max(even + number, 1))
    made: Tensor = cosines(h).to(device).T @ weight @ cosines(w).to(device)
    return made.reshape(problem.x.shape)
