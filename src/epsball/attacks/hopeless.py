"""Searches that end where their margins of late swing too little to lead to the goal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from epsball.attacks.combine import EveryTarget, Restarts
from epsball.core import Attack, AttackLike, Problem, Reading, Strategy
from epsball.objectives import margin
from epsball.objectives.classification import WITH_MARGIN


@dataclass(frozen=True)
class Margins:
    """`recent` (B, R): the last margins of a search, NaN before it has looked R times; `best` (B,): the largest of all."""

    recent: Tensor
    best: Tensor

    @classmethod
    def none(cls, problem: Problem, looks: int) -> Margins:
        """Before the first look, with room for so many."""
        best = torch.full_like(problem.radius, -torch.inf)
        return cls(best.new_full((len(best), looks), torch.nan), best)

    def seen(self, problem: Problem, reading: Reading) -> Margins:
        """With one more; unchanged, so that nothing is ever hopeless, where the goal has no margin (`WITH_MARGIN`)."""
        if not isinstance(problem.goal, WITH_MARGIN):
            return self
        ahead = margin(problem, reading.z, reading.x_adv, reading.output).to(self.best)
        return Margins(torch.cat([self.recent[:, 1:], ahead[:, None]], 1), torch.maximum(self.best, ahead))

    def hopeless(self, swings: float) -> Tensor:
        """(B,) bool: even so many times the swing of the recent margins (largest less least) would not lead the best to the goal."""
        return self.best + swings * (self.recent.amax(1) - self.recent.amin(1)) < 0  # NaN, as before R looks, is no reason to end


@dataclass(frozen=True)
class _Watched:
    """The search's own `state`; `left`: looks until its margins are asked for the first time."""

    state: Any
    margins: Margins
    left: int

    @property
    def z(self) -> Any:
        """Where the search looks next."""
        return self.state.z


@dataclass(frozen=True)
class WhileHopeful:
    """`search`, over where its best margin is more than `swings` times the swing of its last `looks` margins below the goal.

    Asked from half of the looks on, for before that searches may still leave a saddle. Most that break a sample come near the goal
    early, and most others show that they will not. Goals without a margin are searched to the end.

    Not for models whose margins may jump after they have stood still: where gradients are doubted.
    """

    search: Strategy
    looks: int = 5
    swings: float = 4.0

    def init(self, problem: Problem, steps: int) -> _Watched:
        """That of the search."""
        return _Watched(self.search.init(problem, steps), Margins.none(problem, self.looks), steps // 2)

    def step(self, problem: Problem, state: _Watched) -> tuple[Reading, _Watched]:
        """That of the search."""
        reading, inner = self.search.step(problem, state.state)
        now = _Watched(inner, state.margins.seen(problem, reading), state.left - 1)
        if now.left > 0:
            return reading, now
        over = now.margins.hopeless(self.swings)
        return replace(reading, over=over if reading.over is None else over | reading.over), now


def while_hopeful(attack: AttackLike) -> AttackLike:
    """The attack, or every search that is repeated in it, going on only `WhileHopeful`; others, as walks inward, end by themselves."""
    if isinstance(attack, Attack):
        return replace(attack, strategy=WhileHopeful(attack.strategy))
    if isinstance(attack, EveryTarget):
        return replace(attack, attack=while_hopeful(attack.attack))
    if isinstance(attack, Restarts):
        several = tuple(while_hopeful(one) for one in attack.attacks)
        return replace(attack, attack=several if isinstance(attack.attack, tuple) else several[0])
    return attack
