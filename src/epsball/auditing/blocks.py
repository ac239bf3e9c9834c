"""Samples in growing blocks: as few as the question needs, each attacked as it would be without the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.auditing.cascade import Listener, Tick, cascade, doubt
from epsball.auditing.cost import most_forwards
from epsball.auditing.referee import Referee
from epsball.auditing.results import AttackRow
from epsball.auditing.sheet import Hits, Round, Sheet
from epsball.auditing.stopping import Spent, Stopping, blocks


@dataclass(frozen=True)
class Turn:
    """How one model is attacked.

    Attributes:
        referee, effort, seed, drop, progress: as for `cascade`. stop: what may end it.
        keep: is handed the sheet of what counts so far whenever that becomes another one.
    """

    referee: Referee
    effort: str
    seed: int
    drop: bool
    progress: Callable[[Tick], None]
    stop: Stopping
    keep: Callable[[Sheet], None]

    def take(self, whole: Sheet, left: int) -> None:
        """Attacks the model, until the plan or `stop` ends it; `left` models still have their turn to come, this one included."""
        there, planned, stop, known = len(whole.clean), most_forwards(whole, self.effort), self.stop, whole
        stop.begin(whole, left)
        if stop.reason is None and stop.limits.width is None:
            self.attack(whole)
        elif stop.reason is None:
            known = self.in_blocks(whole)
            used_up = len(known.clean) == there
            known.interval = "clopper-pearson" if used_up and stop.limits.bar is None else "at-any-time"
        stop.close(known, there, planned)

    def attack(self, sheet: Sheet) -> None:
        """The whole plan on all samples of a sheet."""
        with self.stop.on(sheet):
            cascade(sheet, self.referee, self.effort, self.seed, self.drop, self.progress, self.stop)

    def in_blocks(self, whole: Sheet) -> Sheet:
        """Audits the samples in the order of their content hashes, block by block, until `stop` knows enough or none is left.

        A block that a budget cuts short is left out where there is a whole one before it: every sample that counts saw every attack.
        """
        order, n, stop = whole.subject.order, len(whole.clean), self.stop
        known = part(whole, order[:0])
        for rows in blocks(n):
            block = part(whole, order[rows])
            if not rows.start:
                self.keep(block)
            replace(self, progress=_Share(self.progress, rows, n).tick).attack(block)
            if stop.reason is not None and rows.start:
                leave_out(known, block)
                return known
            known = join(known, block)
            self.keep(known)
            if stop.reason is None and rows.stop < n:
                stop.grown(known)
            if stop.reason is not None:
                break
        if stop.reason not in ("seconds", "forwards"):
            self.doubt(known)
        return known

    def doubt(self, sheet: Sheet) -> None:
        """The checks of all rounds."""
        with self.stop.on(sheet):
            for current in sheet.rounds:
                try:
                    doubt(sheet, self.referee, current, self.effort, self.seed, self.drop, Listener(sheet, current, self.progress))
                except Spent:
                    self.stop.book(sheet, current, None)
                    return


@dataclass(frozen=True)
class _Share:
    """A block's progress as a part of the whole model's."""

    progress: Callable[[Tick], None]
    rows: slice
    n: int

    def tick(self, tick: Tick) -> None:
        self.progress(replace(tick, share=(self.rows.start + tick.share * (self.rows.stop - self.rows.start)) / self.n))


def part(whole: Sheet, rows: Tensor) -> Sheet:
    """Some of the samples, with nothing attacked yet."""
    subject = whole.subject
    subject = replace(subject, x=subject.x[rows], y=subject.y[rows], index=subject.index[rows])
    hits = {spec.name: Hits.none(subject.x) for spec in whole.threats}
    rounds = [Round(current.threat, current.radius, current.text) for current in whole.rounds]
    return replace(whole, subject=subject, clean=whole.clean[rows.to(whole.clean.device)], hits=hits, rounds=rounds, rounded={})


def join(first: Sheet, second: Sheet) -> Sheet:
    """Both blocks' samples, hits and books, in this order."""
    one, two = first.subject, second.subject
    x, y, index = (torch.cat(pair) for pair in ((one.x, two.x), (one.y, two.y), (one.index, two.index)))
    rounds = [
        replace(
            a,
            planned=b.planned,
            ran=b.ran,
            asked=b.asked,
            late=a.late + b.late,
            beyond=a.beyond + b.beyond,
            attacks=together(a.attacks, b.attacks),
            flags=[*a.flags, *b.flags],
            seconds=a.seconds + b.seconds,
        )
        for a, b in zip(first.rounds, second.rounds, strict=True)
    ]
    return replace(
        first,
        subject=replace(one, x=x, y=y, index=index),
        clean=torch.cat((first.clean, second.clean)),
        hits={threat: _both(first.hits[threat], second.hits[threat]) for threat in first.hits},
        rounds=rounds,
    )


def _both(one: Hits, two: Hits) -> Hits:
    names = ("radius", "x_adv", "size", "predicted", "invalid", "near", "rival")
    shift = len(one.radius)
    joined = {name: torch.cat((getattr(one, name), getattr(two, name))) for name in names}
    return Hits(**joined, closest={}, z=one.z | {row + shift: z for row, z in two.z.items()})


def together(first: Sequence[AttackRow], second: Sequence[AttackRow]) -> list[AttackRow]:
    """One line per attack, with the counts of both; what only one has keeps its place."""
    rows = {(row.name, row.recipe): row for row in first}
    for row in second:
        known = rows.get((row.name, row.recipe))
        if known is None:
            rows[row.name, row.recipe] = row
            continue
        sums = {name: getattr(known, name) + getattr(row, name) for name in ("tried", "broken", "forwards", "backwards", "seconds")}
        rows[row.name, row.recipe] = known.model_copy(update=sums)
    return list(rows.values())


def leave_out(known: Sheet, block: Sheet) -> None:
    """A block that was cut short counts for nothing but its cost."""
    for current, lost in zip(known.rounds, block.rounds, strict=True):
        if lost.attacks:
            row = AttackRow(
                name=f"left out: {len(block.clean)} samples",
                recipe="",
                tried=int(block.correct.sum()),
                broken=0,
                forwards=sum(row.forwards for row in lost.attacks),
                backwards=sum(row.backwards for row in lost.attacks),
                seconds=lost.seconds,
            )
            current.attacks.append(row)
            current.seconds += lost.seconds
