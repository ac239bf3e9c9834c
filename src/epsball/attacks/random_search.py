"""Random search: ask for one changed point per look, keep it if it is better. The proposals make the attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from epsball.core import Objective, Problem, Reading, Targeted, valid
from epsball.core.rows import rowwise
from epsball.core.threat import Z
from epsball.objectives import cross_entropy, margin

_HALVED = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def schedule(proposals: int, budget: int) -> float:
    """Share of its first value that a step length has after so many proposals of `budget`: halved nine times.

    As in the released code of Square (arXiv 1912.00049): after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 of 10,000.
    """
    place = int(proposals / max(budget, 1) * 10000)
    return float(0.5 ** sum(place > end for end in _HALVED))


def margin_or_entropy(problem: Problem, z: Z, x_adv: Tensor, output: Tensor) -> Tensor:
    """The margin; the cross-entropy where a target is to be hit, as in the released codes of Square and Sparse-RS."""
    objective: Objective = cross_entropy if isinstance(problem.goal, Targeted) else margin
    return objective(problem, z, x_adv, output)


def worth(problem: Problem, reading: Reading) -> Tensor:
    """(B,) score, infinite where the goal is reached and minus infinity where the answer is no number."""
    score = torch.nan_to_num(reading.score.double(), nan=-torch.inf)
    score = torch.where(problem.goal.reached(reading.output), torch.full_like(score, torch.inf), score)
    return score.masked_fill(~valid(reading.output), -torch.inf)


class Proposal(Protocol):
    """Where to look next; every draw by the problem's key and the sample's id."""

    def first(self, problem: Problem) -> Tensor:
        """The first point."""

    def next(self, problem: Problem, best: Tensor, number: int, budget: int) -> Tensor:
        """A legal change of the best point; `number` of `budget` proposals were made before."""


@dataclass(frozen=True)
class Searched:
    """Where a random search stands."""

    z: Tensor
    best: Tensor
    worth: Tensor
    looks: int
    budget: int


@dataclass(frozen=True)
class RandomSearch:
    """Keeps the proposal if its score is higher than the best. Cost: 1 forward per look."""

    proposal: Proposal

    def init(self, problem: Problem, steps: int) -> Searched:
        """At the first proposal."""
        z = self.proposal.first(problem)
        return Searched(z, z, torch.full_like(problem.radius, -torch.inf), 0, steps)

    def step(self, problem: Problem, state: Searched) -> tuple[Reading, Searched]:
        """One look, one proposal."""
        reading = problem.judge(state.z)
        found = worth(problem, reading)
        better = (found > state.worth) | torch.isposinf(found)
        best = torch.where(rowwise(better, state.z), state.z, state.best)
        z = self.proposal.next(problem, best, state.looks, state.budget)
        return reading, Searched(z, best, torch.where(better, found, state.worth), state.looks + 1, state.budget)
