"""What a plan can cost, before it runs."""

from __future__ import annotations

from dataclasses import dataclass

from epsball.attacks import entries
from epsball.auditing.cascade import stages_of
from epsball.auditing.plan import Stage
from epsball.auditing.sheet import Sheet
from epsball.auditing.stopping import Limits
from epsball.core import Access


@dataclass(frozen=True)
class Estimate:
    """The most that the attacks of a plan can cost, for samples that never break; checks, and the search at twice the effort that one
    may call for, come on top.

    Attributes:
        seconds, forwards: time and rows forward, both roughly. holds: share of the plan that the budget is sure to hold, at most 1;
            None where there is no budget.
    """

    seconds: float
    forwards: int
    holds: float | None = None

    @staticmethod
    def of(seconds: float, forwards: int, limits: Limits) -> Estimate:
        """With the share that the limits leave room for."""
        shares = [limit / max(most, 1e-9) for limit, most in ((limits.seconds, seconds), (limits.forwards, forwards)) if limit is not None]
        return Estimate(seconds, forwards, min(1.0, *shares) if shares else None)


def most_forwards(sheet: Sheet, effort: str) -> int:
    """About the most rows forward that the attacks of the plan can cost: every correct sample in every stage."""
    per_sample = sum(_forwards(stage, sheet.shown) for current in sheet.rounds for stage in stages_of(sheet, current, effort))
    return int(sheet.correct.sum()) * per_sample


def _forwards(stage: Stage, shown: bool) -> int:
    """A plan counts rows as time: where gradients are to be had, a row without one is a half. Probes come with every gradient."""
    known = entries().get(stage.attack.name)
    free = shown and known is not None and known.access is not Access.GRADIENT
    return stage.rows * (2 if free else 1 + (stage.victim.probes if stage.victim else 0))
