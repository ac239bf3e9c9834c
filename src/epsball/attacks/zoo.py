"""ZOO: coordinate descent on the Carlini-Wagner loss, with slopes and curvatures from finite differences."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from epsball.attacks.registry import register
from epsball.attacks.square import as_image
from epsball.core import Attack, Problem, Projects, Reading, valid
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L2


@register(paper="Chen et al. 2017, arXiv 1708.03999", access=Access.SCORES, threats=("l2",), kind="smallest", cost="steps forwards")
def zoo(
    steps: int = 10000,
    coordinates: int = 16,
    h: float = 1e-3,
    newton: bool = True,
    rate: float | None = None,
    importance: bool = True,
    sides: tuple[int, ...] = (32, 64, 128),
    searches: int = 0,
    threat: Projects | None = None,
) -> Attack:
    """Zeroth-order optimization: coordinate descent on |z - x|^2 + c max(-margin, 0), arXiv 1708.03999, Algorithms 1 to 3.

    The slope of the margin along a coordinate is a symmetric difference of two answers, eq. (6), its curvature their second
    difference, eq. (7). `coordinates` of them are asked for in one batch. The margin of logits is that of the log-probabilities
    of eq. (4).

    Args:
        steps: queries per sample. coordinates: coordinates per move. h: half the distance between two answers, in units of
        the input. newton: Newton's steps (Algorithm 3), else ADAM's (Algorithm 2). rate: share of Newton's step, or first step of ADAM in
        units of the input; None is 1 or 0.1. importance: draw coordinates by the largest change around them, section 3.4,
        instead of evenly. sides: a coordinate is a pixel of a grid of so many rows and columns, enlarged bilinearly (sections
        3.2 and 3.3); those smaller than the image take turns, from coarse to fine; where none is, a feature. searches: whole runs
        that c is bisected over, as in the paper; 0 moves c within one run. threat: L2.

    Returns:
        A search for the smallest change; its name is `zoo`.

    Raises:
        BadInput: counts below 0 or 1, lengths that are not positive.

    Cost: at most steps forwards (1 where steps is 0), no backward: 2 * coordinates + 1 per move.

    Differs from the paper: the first c is the one at which full Newton steps along all coordinates would just reach the goal of
    a linear model. Within one run c is a multiplier of the margin itself, on both sides of the boundary: it grows while the
    goal is missed and shrinks while it is reached. The slope and the curvature of the distance are exact; steps fall to 0 over a
    run. Where steps allow no move at full size, it is made along fewer coordinates.
    """
    rate = (1.0 if newton else 0.1) if rate is None else rate
    if steps < 0:
        raise BadInput(f"steps: {steps}: must be 0 or more")
    if coordinates < 1 or min(h, rate) <= 0:
        raise BadInput(f"zoo: {coordinates} coordinates, h {h:g}, rate {rate:g}: must be 1 or more, and above 0")
    if searches < 0:
        raise BadInput(f"searches: {searches}: must be 0 or more")
    if min(sides, default=1) < 1:
        raise BadInput(f"sides: {sides}: must be 1 or more")
    count = max(min(coordinates, (steps - 2) // 2), 1)
    looks = max(steps - 1, 0) // (2 * count + 1)
    search = Coordinates(count, h, newton, rate, importance, tuple(sorted(sides)), searches)
    return Attack("zoo", threat or L2(), margin, search, looks, smallest=True, access=Access.SCORES)


@dataclass(frozen=True)
class Averages:
    """ADAM's averages and numbers of updates (B, S) of each coordinate."""

    first: Tensor
    second: Tensor
    updates: Tensor

    @staticmethod
    def none(rows: Tensor, coordinates: int) -> Averages:
        """Nothing seen yet, for each of `rows` (B,)."""
        zero = rows.new_zeros(len(rows), coordinates)
        return Averages(zero, zero, zero)

    def step(self, chosen: Tensor, slope: Tensor) -> tuple[Tensor, Averages]:
        """(B, K) steps of length about 1 down the slopes of the coordinates `chosen`."""
        first = 0.9 * self.first.gather(1, chosen) + 0.1 * slope
        second = 0.99 * self.second.gather(1, chosen) + 0.01 * slope.square()
        updates = self.updates.gather(1, chosen) + 1
        step = -first / (1 - 0.9**updates) / ((second / (1 - 0.99**updates)).sqrt() + 1e-8)
        after = self.first.scatter(1, chosen, first), self.second.scatter(1, chosen, second), self.updates.scatter(1, chosen, updates)
        return step, Averages(*after)


@dataclass(frozen=True)
class Descending:
    """Where the descent stands: the constant c (B,), 0 before the first; the bracket it is bisected in; moves made and allowed."""

    z: Tensor
    seen: Averages
    constant: Tensor
    low: Tensor
    high: Tensor
    reached: Tensor
    number: int
    moves: int


@dataclass(frozen=True)
class Coordinates:
    """See `zoo`."""

    count: int
    h: float
    newton: bool
    rate: float
    importance: bool
    sides: tuple[int, ...]
    searches: int

    def init(self, problem: Problem, steps: int) -> Descending:
        """At the clean input."""
        z = problem.threat.start(problem.x, problem.radius, None, problem.ids)
        zero = torch.zeros_like(problem.radius)
        return Descending(z, Averages.none(zero, 0), zero, zero, zero + torch.inf, zero > 0, 0, max(steps, 1))

    def step(self, problem: Problem, state: Descending) -> tuple[Reading, Descending]:
        """One honest look, two per chosen coordinate, one move along those."""
        reading, z = problem.judge(state.z), state.z
        run = max(state.moves // max(self.searches, 1), 1)
        share = state.number % run / run
        grid = self._grid(z, share)
        chosen = self._chosen(problem, state, grid)
        ways = _ways(z, chosen, grid)
        square = ways.square().sum(2)
        slope, bend = self._slopes(problem, reading, ways, square)
        everywhere = (slope.square() / square).mean(1) * grid[0] * grid[1] * grid[2]
        gap = (-reading.score.double()).clamp(min=0)
        first = torch.where(everywhere > 0, 2 * gap / everywhere.clamp(min=1e-300), 0.0)
        c = torch.where(state.constant > 0, state.constant, first)
        pull = 2 * (ways * (z.double() - problem.x.double()).flatten(1)[:, None]).sum(2)
        full = pull + c[:, None] * slope
        seen = state.seen
        if self.newton:
            step = -((1 - share) ** 0.25) * self.rate * full / (2 * square + c[:, None] * bend.clamp(min=0))
        else:
            seen = seen if seen.first.shape[1] == grid[0] * grid[1] * grid[2] else Averages.none(c, grid[0] * grid[1] * grid[2])
            step, seen = seen.step(chosen, full)
            step = (1 - share) * self.rate * step
        moved = z.double() + (step[:, :, None] * ways).sum(1).reshape(z.shape)
        z = problem.threat.project(problem.x, moved.to(z.dtype), problem.radius)
        reached = problem.goal.reached(reading.output)
        after = replace(state, z=z, seen=seen, constant=c, reached=state.reached | reached, number=state.number + 1)
        if self.searches:
            return reading, self._bisected(problem, after) if after.number % run == 0 else after
        turns = chosen.shape[1] / (grid[0] * grid[1] * grid[2])
        grow = 25 ** max(0.3 * turns, 1.5 / run)  # 25-fold whenever each coordinate had about three turns, or in two thirds of a run
        return reading, replace(after, constant=c * torch.where(reached, 1 / grow, grow))

    def _bisected(self, problem: Problem, s: Descending) -> Descending:
        """The next run: from x, with a smaller c where the goal was reached and a larger one where it was not."""
        low = torch.where(s.reached, s.low, torch.maximum(s.low, s.constant))
        high = torch.where(s.reached, torch.minimum(s.high, s.constant), s.high)
        constant = torch.where(torch.isinf(high), 10 * low, (low + high) / 2)
        z = problem.threat.start(problem.x, problem.radius, None, problem.ids)
        return replace(s, z=z, seen=Averages.none(low, 0), constant=constant, low=low, high=high, reached=torch.zeros_like(s.reached))

    def _grid(self, like: Tensor, share: float) -> tuple[int, int, int]:
        """Channels, rows and columns of the coordinates, after a share of the run."""
        c, h, w = as_image(like).shape[1:]
        coarse = [side for side in self.sides if side < min(h, w)]
        if not coarse:
            return c, h, w
        side = coarse[int(share * len(coarse))]
        return c, side, side

    def _chosen(self, problem: Problem, state: Descending, grid: tuple[int, int, int]) -> Tensor:
        """(B, K) coordinates, drawn without replacement; by exponential races, the chance of each first place is its weight."""
        x = as_image(problem.x)
        like = torch.empty(len(x), *grid, device=x.device)
        race = problem.key.fold("features", state.number).exponential(problem.ids, like).flatten(1).double()
        weight = torch.ones_like(race)
        if self.importance:
            change = F.adaptive_max_pool2d((as_image(state.z).double() - x.double()).abs(), grid[1:])
            around = F.max_pool2d(change, 3, stride=1, padding=1).flatten(1)
            weight = around + 0.1 * around.mean(1, keepdim=True) + 1e-12
        low, high = problem.threat.room.interval(problem.x)  # type: ignore[attr-defined]
        free = F.adaptive_max_pool2d(as_image(low < high).double(), grid[1:]).flatten(1) > 0
        return (race / weight).masked_fill(~free, torch.inf).topk(min(self.count, race.shape[1]), dim=1, largest=False).indices

    def _slopes(self, problem: Problem, reading: Reading, ways: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K) float64, slopes and curvatures of the loss along each way, over the distance that the box let the points have."""
        n, count = ways.shape[:2]
        part = problem.take(torch.arange(n, device=ways.device).repeat_interleave(2 * count))
        here = reading.z.double().flatten(1)[:, None, None]
        asked = (here + self.h * torch.stack([ways, -ways], 2)).flatten(0, 2).reshape(part.x.shape).to(part.x.dtype)
        asked = part.threat.project(part.x, asked, part.threat.reach(part.x))
        loss = self._loss(part.judge(asked)).reshape(n, count, 2)
        apart = asked.double().reshape(n, count, 2, -1)
        distance = ((apart[:, :, 0] - apart[:, :, 1]) * ways).sum(2) / square
        slope = (loss[:, :, 0] - loss[:, :, 1]) / distance.clamp(min=1e-300)
        bend = (loss.sum(2) - 2 * self._loss(reading)[:, None]) / (distance / 2).square().clamp(min=1e-300)
        still = distance <= 0
        slope, bend = (torch.nan_to_num(v.masked_fill(still, 0.0), nan=0.0, posinf=0.0, neginf=0.0) for v in (slope, bend))
        return slope, bend

    def _loss(self, reading: Reading) -> Tensor:
        """(B,) float64: minus the margin, cut at 0 where c stands still; NaN where the answer is no number."""
        loss = -reading.score.double()
        loss = loss.clamp(min=0) if self.searches else loss
        return loss.masked_fill(~valid(reading.output), torch.nan)


def _ways(like: Tensor, chosen: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(B, K, F) float64: what one unit of each chosen coordinate adds to the input."""
    n, count = chosen.shape
    one = torch.zeros(n, count, grid[0] * grid[1] * grid[2], dtype=torch.float64, device=like.device).scatter(2, chosen[:, :, None], 1.0)
    shape = as_image(like).shape[2:]
    if grid[1:] == tuple(shape):
        return one
    return F.interpolate(one.reshape(n * count, *grid), tuple(shape), mode="bilinear", align_corners=False).reshape(n, count, -1)
