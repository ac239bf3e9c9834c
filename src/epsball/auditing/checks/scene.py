"""What a check sees of an audit, and how it writes down what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from epsball.auditing.referee import Referee
from epsball.auditing.results import AttackRow, Flag
from epsball.auditing.sheet import Round, Sheet
from epsball.core import AttackLike, Key, LabelsChanged, Objective, Outcome, Problem, Projects, Tally, Victim, content_ids
from epsball.core.rows import moved
from epsball.threats import is_input

ROUGH = ("random", "rough", "hidden-steps", "no-gradient", "gradient")
"""Findings of the preflight that explain a rough surface."""
FEWEST = 8
"""Samples below which a median, or a share, says nothing."""
FEW, SHARE, LEAST = 32, 1 / 3, 16
"""Costly checks see at most so many samples, and at most this share of the data, but not fewer than `LEAST`."""


@dataclass(frozen=True)
class Scene:
    """One model under one threat at one radius, after its attacks have run.

    Attributes:
        sheet: everything known. referee: the judge. current: the threat and the radius in doubt. seed: of the run.
        victim: whose gradients searches follow: the model itself, or a twin with better gradients and the same answers.
    """

    sheet: Sheet
    referee: Referee
    current: Round
    seed: int
    victim: Victim

    @property
    def threat(self) -> Projects:
        """What the adversary may change, made anew."""
        return self.sheet.threat(self.current.threat)

    @property
    def single(self) -> bool:
        """One class per sample."""
        return not isinstance(self.sheet.subject.goal, LabelsChanged)

    @property
    def explained(self) -> bool:
        """The preflight has found what makes a surface rough, told it, and chosen other searches: it is not told again."""
        return any(f.id in ROUGH and f.status != "pass" for f in self.sheet.findings)

    def standing(self, most: int) -> Tensor:
        """(K,) rows that stand, at most so many, in the order of content hashes: a random sample, however the data is sorted."""
        order = self.sheet.subject.order
        return order[self.sheet.standing(self.current.threat, self.current.radius)[order]][:most]

    def few(self) -> Tensor:
        """(K,) rows that stand, for costly checks: one that breaks 5 % of those that stand is seen by 32 of them with 81 %."""
        return self.standing(min(FEW, max(LEAST, round(SHARE * len(self.sheet.clean)))))

    def correct(self, most: int) -> Tensor:
        """(K,) rows that are right on the clean input, broken since or not, in the same order."""
        order = self.sheet.subject.order
        return order[self.sheet.correct[order]][:most]

    def search(
        self,
        attack: AttackLike,
        rows: Tensor,
        check: str,
        *,
        radius: float | Tensor | None = None,
        seed: int | None = None,
        drop: bool = True,
    ) -> Outcome:
        """Runs an attack on some rows and books it as "check: ..."; what it finds is entered nowhere.

        A sample's verdict must not depend on which others were chosen for a check.
        """
        subject, started = self.sheet.subject, time.perf_counter()
        radius, seed = self.current.radius if radius is None else radius, self.seed if seed is None else seed
        outcome = attack(self.victim, subject.x[rows], subject.goal.take(rows), radius, seed, clean=self.sheet.clean[rows], drop=drop)
        self.current.attacks.append(attack_row(f"check: {check}", repr(attack), len(rows), 0, outcome, time.perf_counter() - started))
        return outcome

    def confirmed(self, rows: Tensor, outcome: Outcome) -> Tensor:
        """(K,) bool: what the referee confirms of a search on these rows. At most 1 forward row each."""
        claimed = outcome.reached.cpu()
        places = claimed.nonzero().squeeze(1)
        if len(places):
            x, goal, x_adv = self.sheet.subject.x[rows[places]], self.sheet.subject.goal.take(rows[places]), outcome.x_adv.cpu()[places]
            z = None if is_input(self.threat) else outcome.z.cpu()[places]
            claimed[places] = self.referee.judge(x, x_adv, goal, self.threat, self.current.radius, z).broken.cpu()
        return claimed

    def problem(self, rows: Tensor, objective: Objective, check: str) -> Problem:
        """These rows as a problem whose ledger starts at zero, for checks that look without searching."""
        subject, device = self.sheet.subject, self.victim.device
        x = moved(subject.x[rows], device)
        return Problem(
            victim=self.victim,
            x=x,
            goal=moved(subject.goal.take(rows), device),
            threat=self.threat.within(self.victim.box),
            objective=objective,
            radius=torch.full((len(rows),), self.current.radius, dtype=torch.float64, device=device),
            ids=content_ids(x),
            clean=moved(self.sheet.clean[rows], device),
            key=Key.of(self.seed).fold("check", check),
            tally=Tally.zeros(len(rows)),
        )

    def spent(self, tally: Tally, check: str, recipe: str, started: float) -> None:
        """Books what a check asked without an attack."""
        row = AttackRow(
            name=f"check: {check}",
            recipe=recipe,
            tried=len(tally.rows),
            broken=0,
            forwards=int(tally.forwards.sum()),
            backwards=int(tally.backwards.sum()),
            seconds=time.perf_counter() - started,
        )
        self.current.attacks.append(row)


CONSEQUENCES = {
    "false-gradient": ("landscape", "reach", "incomplete"),
    "unstable": ("landscape", "reach", "incomplete"),
}
"""What follows from a graver flag of the same round, and need not be told beside it."""


def told_once(flags: Iterable[Flag]) -> list[Flag]:
    """Without the consequences of what is told anyway: each cause is named once."""
    every = [*flags]
    explained = {name for flag in every for name in CONSEQUENCES.get(flag.id, ())}
    return [flag for flag in every if flag.id not in explained]


Check = Callable[[Scene], Iterator[Flag]]
"""Doubts one round of an audit; gives a flag for each thing that a reader has to know."""


def attack_row(name: str, recipe: str, tried: int, broken: int, outcome: Outcome, seconds: float) -> AttackRow:
    """The line of a report about one attack on `tried` samples."""
    return AttackRow(
        name=name,
        recipe=recipe,
        tried=tried,
        broken=broken,
        forwards=int(outcome.queries.sum()),
        backwards=int(outcome.backwards.sum()),
        seconds=seconds,
    )
