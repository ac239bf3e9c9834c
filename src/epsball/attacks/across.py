"""Past a decision inside a model: inputs for which it decides otherwise, then on from there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from epsball.attacks.combine import merged, nothing, opened
from epsball.attacks.vertices import Vertices
from epsball.core import Attack, AttackLike, Descent, Drop, Goal, Halving, Key, Model, Outcome, Projects, Strategy, Tally, Victim, Watch
from epsball.core.attack import recipe
from epsball.core.problem import ends
from epsball.objectives import cross_entropy
from epsball.threats import L1


@dataclass(frozen=True, repr=False)
class Across:
    """Turns a decision inside the model, within the budget, and climbs the model's own scores from there.

    Attributes:
        fork: answers with the scores between which the model decides (`core.forks`). turn: attacks that, at the way it takes for the
            clean input. steps: of the climb. Linf, L2 or L1.
    """

    fork: Victim = field(repr=False)
    turn: AttackLike
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
        """As `Attack.__call__`. Cost: 1 forward for the decision, that of the attack on it, and steps forwards and backwards."""
        with Victim.of(model) as victim:
            case = opened(victim, x, goal, radius, clean, seed)
            whole = nothing(case, self.threat.within(victim.box), self.steps)
            rows = (~whole.reached & ~whole.flags["invalid"]).nonzero().squeeze(1)
            if not len(rows):
                return whole
            part = case.take(rows)
            c, tally = replace(part, key=part.key.fold(self.name)), Tally.zeros(len(rows))
            scores = self.fork.outputs(c.x, tally)
            turned = self.turn(self.fork, c.x, scores.argmax(1), c.radius, c.key, clean=scores, watch=watch)
            climb = Attack("onward", self.threat, cross_entropy, self._from(turned.x_adv), self.steps)
            found = c.run(climb, drop[rows] if isinstance(drop, Tensor) else ends(drop), watch)
            queries = found.queries + turned.queries + tally.forwards
            spent = replace(found, queries=queries, backwards=found.backwards + turned.backwards)
        return merged(whole, rows, spent)

    def _from(self, start: Tensor) -> Strategy:
        if isinstance(self.threat, L1):
            return Vertices((1.0, 1.0), (0.3, 0.3), 0.02, start=start)
        return Descent(Halving(), inertia=0.75, start=start)

    def __repr__(self) -> str:
        return recipe(self)
