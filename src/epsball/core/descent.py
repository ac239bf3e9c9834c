"""The search that most recipes share: follow a direction, take a step, project back. Final: never subclassed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from epsball.core.gradient import Gradient, autograd
from epsball.core.problem import Problem, Reading
from epsball.core.rows import per_sample
from epsball.core.rule import Memory, Rule, Steepest
from epsball.core.stepsize import Control, StepSize
from epsball.core.threat import Z


class State(Protocol):
    """Row-shaped: every tensor has B rows, scalars are shared."""

    @property
    def z(self) -> Z:
        """Where the strategy looks next."""


class Strategy(Protocol):
    """How to search. `run` owns the loop, the judging and the books.

    A strategy that is a dataclass may name fields in `by_row`: tuples of numbers that may be (B,) each, one for every row.
    """

    def init(self, problem: Problem, steps: int) -> Any:
        """The state before the first look."""

    def step(self, problem: Problem, state: Any) -> tuple[Reading, Any]:
        """Look at `state.z`, then move."""


@dataclass(frozen=True)
class DescentState:
    """Where a descent stands."""

    z: Tensor
    previous: Tensor
    memory: Memory
    control: Control
    moves: int = 0


@dataclass(frozen=True)
class Descent:
    """z <- P(z + inertia * (P(z + step * direction) - z) + (1 - inertia) * (z - previous z)).

    `inertia` 1 is plain projected ascent; 0.75 is APGD (Croce & Hein 2020, eq. 2). `noise` starts from a random legal
    point instead of the clean input; `start` (B, ...) gives each sample its own. Cost: that of the gradient source, once a step.
    """

    step_size: StepSize
    rule: Rule = field(default_factory=Steepest)
    gradient: Gradient = autograd
    inertia: float = 1.0
    noise: bool = False
    start: Tensor | None = None

    def init(self, problem: Problem, steps: int) -> DescentState:
        """At the clean input, or at a random point of the ball."""
        if self.start is None:
            z = problem.threat.start(problem.x, problem.radius, problem.key if self.noise else None, problem.ids)
        else:
            z = problem.threat.project(problem.x, self.start.to(problem.x), problem.radius)
        return DescentState(z, z, self.rule.start(problem, z), self.step_size.start(problem, z, steps))

    def step(self, problem: Problem, state: DescentState) -> tuple[Reading, DescentState]:
        """One look, one move."""
        threat, x = problem.threat, problem.x
        reading = self.gradient(problem, state.z)
        step, z, gradient, control = self.step_size.next(problem, reading, state.control)
        direction, memory = self.rule.turn(problem, z, gradient, state.memory)
        moved = threat.project(x, z + per_sample(step, z) * direction, problem.radius)
        if self.inertia != 1.0 and state.moves > 0:
            drift = self.inertia * (moved - z) + (1 - self.inertia) * (z - state.previous)
            moved = threat.project(x, z + drift, problem.radius)
        return reading, DescentState(moved, z, memory, control, state.moves + 1)
