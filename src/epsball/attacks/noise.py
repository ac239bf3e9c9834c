"""Uniform noise: the floor that every attack must beat, and a check on gradients that lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from epsball.attacks.registry import EVERY, register
from epsball.core import Attack, Objective, Problem, Projects, Reading
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import Linf


@dataclass(frozen=True)
class _Draw:
    z: Tensor
    number: int


@dataclass(frozen=True)
class FreshDraws:
    """Every step looks at a new random start of the threat."""

    def init(self, problem: Problem, steps: int) -> _Draw:
        """The first draw."""
        return self._draw(problem, 0)

    def step(self, problem: Problem, state: _Draw) -> tuple[Reading, Any]:
        """One look, one new draw."""
        return problem.judge(state.z), self._draw(problem, state.number + 1)

    def _draw(self, problem: Problem, number: int) -> _Draw:
        key = problem.key.fold("draw", number)
        return _Draw(problem.threat.start(problem.x, problem.radius, key, problem.ids), number)


@register(
    paper="the random-noise control of Carlini et al. 2019, arXiv 1902.06705",
    access=Access.SCORES,
    threats=EVERY,
    cost="draws forwards",
)
def noise(draws: int = 10, threat: Projects | None = None, objective: Objective = margin) -> Attack:
    """Independent random points of the ball; keeps the best. Needs no gradient."""
    if draws < 1:
        raise BadInput(f"draws: {draws}: must be 1 or more")
    attack = Attack("noise", threat or Linf(), objective, FreshDraws(), steps=draws - 1)
    return replace(attack, access=Access.SCORES)
