"""One pixel: differential evolution over the places and the colors of a few pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.random_search import worth
from epsball.attacks.registry import register
from epsball.attacks.square import as_image
from epsball.core import Attack, Objective, Problem, Projects, Reading
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.objectives import cross_entropy
from epsball.threats import L0


@register(paper="Su, Vargas & Sakurai 2019, arXiv 1710.08864", access=Access.SCORES, threats=("l0",), cost="steps forwards")
def one_pixel(
    steps: int = 10000,
    population: int | None = None,
    weight: float = 0.5,
    threat: Projects | None = None,
    objective: Objective = cross_entropy,
) -> Attack:
    """One-pixel attack: floor(radius) pixels, placed and colored by differential evolution, arXiv 1710.08864, eq. (3).

    A child is a + weight * (best - a + b - c) of three different random members and the best one, without crossover; it takes
    the place of its parent if it is better.

    Args:
        steps: queries per sample. population: members, all asked for in one batch, 1 or more (the paper's 400, for 100
            generations); fewer where steps allow no generation. None is a fortieth of steps, from 10 to 100.
        weight: the paper's F. threat: L0 over pixels.

    Returns:
        The attack; its name is `one_pixel`.

    Raises:
        BadInput: negative steps, no population, or another threat.

    Cost: at most steps forwards (1 where steps is 0), no backward: population per generation, and 1 to judge.

    Differs from the paper: its child is a + weight * (b - c), which needs more queries with few members; colors begin evenly in
    the box instead of normal around gray; log-probabilities rank as probabilities. A vector is an image of one row.
    """
    if steps < 0:
        raise BadInput(f"steps: {steps}: must be 0 or more")
    population = min(max(steps // 40, 10), 100) if population is None else population
    if population < 1:
        raise BadInput(f"population: {population}: must be 1 or more")
    threat = threat or L0()
    if not isinstance(threat, L0) or threat.features:
        raise BadInput(f"threat '{threat.name}': counts no pixels: use l0")
    members = max(min(population, steps - 1), 1)
    attack = Attack("one_pixel", threat, objective, Evolution(members, weight), max(steps - 1, 0) // members)
    return replace(attack, access=Access.SCORES)


@dataclass(frozen=True)
class Generation:
    """Members (B, P, K, 2 + C): row, column and color of each pixel in [0, 1]; their worth (B, P); and the children to be asked."""

    z: Tensor
    members: Tensor
    worth: Tensor
    children: Tensor
    number: int


@dataclass(frozen=True)
class Evolution:
    """See `one_pixel`. Cost: `members` forwards per look."""

    members: int
    weight: float

    def init(self, problem: Problem, steps: int) -> Generation:
        """An even draw."""
        image = as_image(problem.x)
        count = int(problem.radius.floor().amax().clamp(min=1))
        like = torch.empty(len(image), self.members, 2 + image.shape[1], device=image.device)
        genes = torch.stack([problem.key.fold("pixel", k).uniform(problem.ids, like) for k in range(count)], 2)
        z = problem.threat.start(problem.x, problem.radius, None, problem.ids)
        return Generation(z, genes, torch.full(genes.shape[:2], -torch.inf, dtype=torch.float64, device=z.device), genes, 0)

    def step(self, problem: Problem, state: Generation) -> tuple[Reading, Generation]:
        """Asks for all children, keeps the better of child and parent, and makes the next children."""
        n, rows = len(problem), torch.arange(len(problem), device=problem.x.device)
        part = problem.take(rows.repeat_interleave(self.members))
        asked = part.judge(self._painted(part, state.children.flatten(0, 1)))
        found = worth(part, asked).reshape(n, self.members)
        better = found > state.worth
        members, value = torch.where(better[:, :, None, None], state.children, state.members), torch.where(better, found, state.worth)
        best = found.argmax(1) + self.members * rows
        reading = Reading(asked.z[best], asked.x_adv[best], asked.output[best], asked.score[best])
        top = members[rows, value.argmax(1)]
        children = self._children(problem, members, top, state.number)
        return reading, Generation(self._painted(problem, top), members, value, children, state.number + 1)

    def _children(self, problem: Problem, members: Tensor, best: Tensor, number: int) -> Tensor:
        rows = torch.arange(len(members), device=members.device)[:, None]
        a, b, c = (members[rows, chosen] for chosen in self._parents(problem, number))
        return (a + self.weight * (best[:, None] - a + b - c)).clamp(0, 1)

    def _parents(self, problem: Problem, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Three members (B, P) for each child, all different where there are three."""
        like, m = torch.empty(len(problem), self.members, 3, device=problem.x.device), self.members
        drawn = problem.key.fold("parents", number).uniform(problem.ids, like).double()
        first, second, third = ((drawn[:, :, i] * (m - i)).long().clamp(0, max(m - 1 - i, 0)) for i in range(3))
        third = third + (third >= second)  # of the places behind the first, the second's is taken
        return first, (first + 1 + second) % m, (first + 1 + third) % m

    def _painted(self, problem: Problem, genes: Tensor) -> Tensor:
        """x with the first floor(radius) pixels of genes (B, K, 2 + C) painted on."""
        image = as_image(problem.x)
        h, w = image.shape[2:]
        low, high = (as_image(bound).flatten(2) for bound in problem.threat.room.interval(problem.x))  # type: ignore[attr-defined]
        made = image.flatten(2)
        for k in range(genes.shape[1]):
            row, column = ((genes[:, k, axis].double() * side).long().clamp(max=side - 1) for axis, side in enumerate((h, w)))
            place = (row * w + column)[:, None, None].expand(-1, image.shape[1], 1)
            floor, ceiling = low.gather(2, place), high.gather(2, place)
            color = (floor + (ceiling - floor) * genes[:, k, 2:, None].to(made.dtype)).clamp(floor, ceiling)
            counts = (k < problem.radius.floor())[:, None, None]
            made = made.scatter(2, place, torch.where(counts, color, made.gather(2, place)))
        return made.reshape(problem.x.shape)
