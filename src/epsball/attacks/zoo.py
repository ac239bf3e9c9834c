"""ZOO: coordinate descent on the Carlini-Wagner loss, with slopes from finite differences."""

from __future__ import annotations

from dataclasses import dataclass

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
    rate: float = 0.1,
    importance: bool = True,
    threat: Projects | None = None,
) -> Attack:
    """Zeroth-order optimization: ADAM, feature by feature, on |z - x|^2 + c max(-margin, 0), arXiv 1708.03999, Algorithm 2.

    The slope of the margin along a feature is a symmetric difference of two answers, eq. (6); the margin of logits is that of
    the log-probabilities of eq. (4). `coordinates` features of all samples are asked for in one batch.

    Args:
        steps: queries per sample. coordinates: features per move. h: half the distance between two answers, in units of the
        input. rate: first step of ADAM, in the same units. importance: draw features by the largest change around them, section 3.4,
        instead of evenly. threat: L2.

    Returns:
        A search for the smallest change; its name is `zoo`.

    Raises:
        BadInput: counts below 0 or 1, lengths that are not positive.

    Cost: at most steps forwards (1 where steps is 0), no backward: 2 * coordinates + 1 per move.

    Differs from the paper: c grows while the goal is missed and shrinks while it is reached, at every move, instead of a
    binary search over whole runs; the step falls linearly to 0, without which the end is no nearer than a first success;
    the slope of the distance is exact; only the ADAM solver, no Newton's method; images keep their resolution. Where steps
    allow no move at full size, it is made along fewer features.
    """
    if steps < 0:
        raise BadInput(f"steps: {steps}: must be 0 or more")
    if coordinates < 1 or min(h, rate) <= 0:
        raise BadInput(f"zoo: {coordinates} coordinates, h {h:g}, rate {rate:g}: must be 1 or more, and above 0")
    count = max(min(coordinates, (steps - 2) // 2), 1)
    looks = max(steps - 1, 0) // (2 * count + 1)
    search = Coordinates(count, h, rate, importance)
    return Attack("zoo", threat or L2(), margin, search, looks, smallest=True, access=Access.SCORES)


@dataclass(frozen=True)
class Descending:
    """Where the descent stands: averages and numbers of updates (B, F) of each feature, the constant c (B,), moves made and allowed."""

    z: Tensor
    first: Tensor
    second: Tensor
    updates: Tensor
    constant: Tensor
    number: int
    moves: int


@dataclass(frozen=True)
class Coordinates:
    """See `zoo`."""

    count: int
    h: float
    rate: float
    importance: bool

    def init(self, problem: Problem, steps: int) -> Descending:
        """At the clean input."""
        z = problem.threat.start(problem.x, problem.radius, None, problem.ids)
        none = torch.zeros(z.flatten(1).shape, dtype=torch.float64, device=z.device)
        return Descending(z, none, none, none, torch.ones_like(problem.radius), 0, max(steps, 1))

    def step(self, problem: Problem, state: Descending) -> tuple[Reading, Descending]:
        """One honest look, two per chosen feature, one move along those."""
        reading, z = problem.judge(state.z), state.z
        chosen = self._chosen(problem, state)
        pull = 2 * (z.double() - problem.x.double()).flatten(1).gather(1, chosen)
        slope = pull + state.constant[:, None] * self._slopes(problem, z, chosen)
        first = 0.9 * state.first.gather(1, chosen) + 0.1 * slope
        second = 0.99 * state.second.gather(1, chosen) + 0.01 * slope.square()
        updates = state.updates.gather(1, chosen) + 1
        root = (second / (1 - 0.99**updates)).sqrt()
        rate = self.rate * (1 - state.number / state.moves)
        move = -rate * first / (1 - 0.9**updates) / (root + 1e-8)
        moved = z.double().flatten(1).scatter_add(1, chosen, move).reshape(z.shape).to(z.dtype)
        grow = 1.5 ** (0.3 * chosen.shape[1] / z[0].numel())  # by half whenever each feature had about three turns
        after = Descending(
            z=problem.threat.project(problem.x, moved, problem.radius),
            first=state.first.scatter(1, chosen, first),
            second=state.second.scatter(1, chosen, second),
            updates=state.updates.scatter(1, chosen, updates),
            constant=state.constant * torch.where(problem.goal.reached(reading.output), 1 / grow, grow),
            number=state.number + 1,
            moves=state.moves,
        )
        return reading, after

    def _chosen(self, problem: Problem, state: Descending) -> Tensor:
        """(B, K) features, drawn without replacement; by exponential races, the chance of each first place is its weight."""
        image = as_image(state.z)
        race = problem.key.fold("features", state.number).exponential(problem.ids, image.float()).flatten(1).double()
        weight = torch.ones_like(race)
        if self.importance:
            change = (image.double() - as_image(problem.x).double()).abs()
            around = F.max_pool2d(change, 3, stride=1, padding=1).flatten(1)
            weight = around + around.mean(1, keepdim=True) + 1e-12
        low, high = problem.threat.room.interval(problem.x)  # type: ignore[attr-defined]
        stuck = (low == high).flatten(1)
        count = min(self.count, race.shape[1])
        return (race / weight).masked_fill(stuck, torch.inf).topk(count, dim=1, largest=False).indices

    def _slopes(self, problem: Problem, z: Tensor, chosen: Tensor) -> Tensor:
        """(B, K) float64: of max(-margin, 0) along each chosen feature, over the distance that the box let the points have."""
        n, count = chosen.shape
        part = problem.take(torch.arange(n, device=z.device).repeat_interleave(2 * count))
        places = chosen.repeat_interleave(2, dim=1).flatten()[:, None]
        ways = torch.tensor([self.h, -self.h], dtype=torch.float64, device=z.device).repeat(n * count)[:, None]
        start = z.double().flatten(1).repeat_interleave(2 * count, 0)
        asked = start.scatter_add(1, places, ways).reshape(part.x.shape).to(z.dtype)
        asked = part.threat.project(part.x, asked, part.threat.reach(part.x))
        reading = part.judge(asked)
        loss = (-reading.score.double()).clamp(min=0).masked_fill(~valid(reading.output), torch.nan).reshape(n, count, 2)
        ends = asked.double().flatten(1).gather(1, places).reshape(n, count, 2)
        distance = ends[:, :, 0] - ends[:, :, 1]
        slope = (loss[:, :, 0] - loss[:, :, 1]) / distance.clamp(min=1e-300)
        return torch.nan_to_num(slope.masked_fill(distance <= 0, 0.0), nan=0.0, posinf=0.0, neginf=0.0)
