"""One batch under attack, and what one look at the model gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from epsball.core.goal import Goal
from epsball.core.random import Key
from epsball.core.rows import Rows, take
from epsball.core.threat import Projects, Z
from epsball.core.victim import Tally, Victim

Objective = Callable[["Problem", Z, Tensor, Tensor], Tensor]
"""(problem, z, x_adv, output) -> (B,) score; higher always suits the adversary."""


@dataclass(frozen=True)
class Reading:
    """One look at the model from z: what was asked, the answer, its score, and the gradient of the score by z if taken.

    `over` (B,) bool marks samples whose search ends with this look: `run` lets them go, and nothing is asked for them again.
    """

    z: Z
    x_adv: Tensor
    output: Tensor
    score: Tensor
    gradient: Z = None
    over: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """A batch of B samples under attack.

    Attributes:
        victim: the model. x: clean inputs (B, ...). goal, threat, objective: the adversary; an objective may have rows (`PerRow`).
        radius: budget (B,) float64. ids: content hashes (B,). clean: clean outputs (B, C), computed once.
        key: the randomness of this attack, for all rows or for each. tally: the ledger that every query is written to.
    """

    victim: Victim
    x: Tensor
    goal: Goal
    threat: Projects
    objective: Objective
    radius: Tensor
    ids: Tensor
    clean: Tensor
    key: Key
    tally: Tally

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Rows) -> Problem:
        """The same problem for some of the samples."""
        return Problem(
            victim=self.victim,
            x=self.x[rows],
            goal=self.goal.take(rows),
            threat=self.threat,
            objective=take(self.objective, rows),
            radius=self.radius[rows],
            ids=self.ids[rows],
            clean=self.clean[rows],
            key=self.key.take(rows),
            tally=self.tally.take(rows),
        )

    def narrowed(self, rows: Tensor) -> Problem:
        """`take`, for a batch that goes on in the place of this one: what the threat remembers of these inputs goes along."""
        part = self.take(rows)
        follow = getattr(self.threat, "follow", None)
        if follow is not None:
            follow((self.x, self.radius), rows, (part.x, part.radius))
        return part

    @cached_property
    def clean_score(self) -> Tensor:
        """(B,) of the clean inputs."""
        with torch.no_grad():
            return self.objective(self, self.x, self.x, self.clean)

    def judge(self, z: Z) -> Reading:
        """One forward row per sample, no gradient."""
        x_adv = self.victim.split(self.threat.apply, self.x, z)  # some threats need far more memory than their input
        output = self.victim.outputs(x_adv, self.tally)
        with torch.no_grad():
            return Reading(z, x_adv, output, self.objective(self, z, x_adv, output))


@dataclass(frozen=True)
class PerRow:
    """An objective of its own for every row: that of number `which` (B,)."""

    objectives: tuple[Objective, ...]
    which: Tensor

    def __call__(self, problem: Problem, z: Z, x_adv: Tensor, output: Tensor) -> Tensor:
        """(B,) scores."""
        first, *others = (objective(problem, z, x_adv, output) for objective in self.objectives)
        for number, score in enumerate(others, 1):
            first = torch.where(self.which == number, score, first)
        return first


Drop = bool | Tensor
"""Whether a search ends once its goal is reached; (B,) whole numbers: rows of one number are runs at one sample, which end together."""


def ends(drop: Drop) -> bool:
    """Whether searches end at their goals, whoever else ends with them."""
    return isinstance(drop, Tensor) or bool(drop)


Watch = Callable[[int, int, int], Any]
"""(step, steps, samples still under attack): called by `run` once a step, for progress."""


def same_rows(tree: Any, keep: Tensor) -> Any:
    """`take` that is free when every row is kept, the common case inside a loop."""
    return tree if bool(keep.all()) else take(tree, keep.nonzero().squeeze(1))
