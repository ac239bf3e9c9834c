"""Past a decision inside a model: inputs for which it decides otherwise, then on from there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from epsball.attacks.combine import Case, Stage, merged, nothing, opened, union
from epsball.attacks.vertices import Vertices
from epsball.core import (
    Attack,
    AttackLike,
    Descent,
    Drop,
    Goal,
    Halving,
    Key,
    Model,
    Outcome,
    Problem,
    Projects,
    Strategy,
    Tally,
    Targeted,
    Victim,
    Watch,
    valid,
)
from epsball.core.attack import recipe
from epsball.core.forks import Both, Fork
from epsball.core.problem import ends
from epsball.core.rows import Rows
from epsball.core.threat import Z
from epsball.objectives import margin
from epsball.threats import L1

HOLD, EDGE = 3.0, 0.1
"""How much a lost way weighs against the model's own margin, both as shares of what they are at the clean input; and where it begins to."""


@dataclass(frozen=True)
class Held:
    """A goal for the first `classes` scores, on the way `target` (B,) among the others."""

    goal: Goal
    target: Tensor
    classes: int

    def reached(self, output: Tensor) -> Tensor:
        """As the goal has it."""
        return self.goal.reached(output[:, : self.classes]) & valid(output)

    def take(self, rows: Rows) -> Held:
        """The same for some of the rows."""
        return Held(self.goal.take(rows), self.target[rows], self.classes)


def on_the_way(problem: Problem, z: Z, x_adv: Tensor, output: Tensor) -> Tensor:
    """(B,) the margin of the model's own scores, and what is lost where the decision turns back."""
    held = problem.goal
    assert isinstance(held, Held)

    def share(goal: Goal, columns: slice) -> Tensor:
        """The margin toward a goal, in sizes of that at the clean input: two that have no common unit."""
        now, clean = (margin(replace(problem, goal=goal), z, x_adv, scores[:, columns]) for scores in (output, problem.clean))
        return now / clean.abs().clamp(min=1e-6)

    own, way = share(held.goal, slice(held.classes)), share(Targeted(held.target), slice(held.classes, None))
    return own + HOLD * (way - EDGE).clamp(max=0)


@dataclass(frozen=True, repr=False)
class Across:
    """Turns a decision inside the model to one other way after another, nearest first, and climbs the model's own scores from there.

    Attributes:
        fork: answers with the scores between which the model decides (`core.forks`). turn: attacks that, at one way. ways: most of them
            that are tried. steps: of each climb. Linf, L2 or L1.
    """

    fork: Victim = field(repr=False)
    turn: AttackLike
    ways: int
    steps: int
    name: str = "across"

    @property
    def threat(self) -> Projects:
        """That of the attack on the decision."""
        return self.turn.threat

    def __call__(
        self,
        model: Model,
        x: Tensor,
        goal: Goal | Tensor,
        radius: float | Tensor,
        seed: int | Key = 0,
        *,
        clean: Tensor | None = None,
        drop: Drop = True,
        watch: Watch | None = None,
    ) -> Outcome:
        """As `Attack.__call__`. Cost: 1 forward for the decision; for each way that of the attack on it, steps forwards and backwards."""
        with Victim.of(model) as victim:
            case, threat = opened(victim, x, goal, radius, clean, seed), self.threat.within(victim.box)
            whole = nothing(case, threat, self.steps)
            rows = (~whole.reached & ~whole.flags["invalid"]).nonzero().squeeze(1)
            if not len(rows):
                return whole
            part, tally = replace(case.take(rows), queries=0), Tally.zeros(len(rows))
            scores = self.fork.outputs(part.x, tally)
            order = scores.argsort(1, descending=True)
            ways = range(1, min(self.ways + 1, order.shape[1]))
            found = union(part, threat, [self._way(scores, order, rank, watch) for rank in ways], self.steps, ends(drop))
        return merged(whole, rows, replace(found, queries=found.queries + tally.forwards))

    def _way(self, scores: Tensor, order: Tensor, rank: int, watch: Watch | None) -> Stage:
        """At the way of that rank."""

        def ran(c: Case, rows: Tensor) -> Outcome:
            c, target = replace(c, key=c.key.fold(self.name, rank)), Targeted(order[rows, rank])
            turned = self.turn(self.fork, c.x, target, c.radius, c.key, clean=scores[rows], watch=watch)
            fork = self.fork.model
            assert isinstance(fork, Fork)
            climb = Attack("onward", self.threat, on_the_way, self._from(turned.x_adv), self.steps)
            both, held = torch.cat([c.clean, scores[rows]], 1), Held(c.goal, target.labels, c.clean.shape[1])
            # Dropping, whatever was asked: a way that is found is not left again.
            found = climb(self.fork.twin(Both(fork)), c.x, held, c.radius, c.key, clean=both, watch=watch)
            return replace(found, queries=found.queries + turned.queries, backwards=found.backwards + turned.backwards)

        return ran

    def _from(self, start: Tensor) -> Strategy:
        if isinstance(self.threat, L1):
            return Vertices((1.0, 1.0), (0.3, 0.3), 0.02, start=start)
        return Descent(Halving(), inertia=0.75, start=start)

    def __repr__(self) -> str:
        return recipe(self)
