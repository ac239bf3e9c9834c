"""Runs the plan for one model: threat by threat, radius by radius, attack by attack, always on the samples still standing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from epsball.attacks import pgd
from epsball.auditing.plan import Stage, black_box, deeper, plan
from epsball.auditing.referee import Referee
from epsball.auditing.results import AttackRow, Flag
from epsball.auditing.sheet import Round, Sheet
from epsball.auditing.statistics import mcnemar
from epsball.core import AttackLike, LabelsChanged, Outcome
from epsball.objectives import cross_entropy, margin
from epsball.threats import is_input

LOSS_SAMPLE, LOSS_GAP = 128, 0.15
EFFORT_SAMPLE, EFFORT_GAP = 64, 0.05


@dataclass(frozen=True)
class Tick:
    """One beat of progress: what runs now, on how many samples, and the share (0..1) of the planned work behind us."""

    model: str
    threat: str
    radius: str
    attack: str
    standing: int
    share: float


Progress = Callable[[Tick], None]


def stages_of(sheet: Sheet, threat: str, effort: str) -> tuple[Stage, ...]:
    """The plan for this model under one threat.

    A victim that shows no gradients gets searches that need none; one whose gradients are dead, all of them or some, gets these as well.
    """
    blind = black_box(sheet.threat(threat), sheet.subject.victim.access, sheet.queries)
    if not sheet.shown:
        return blind
    single, dead = not isinstance(sheet.subject.goal, LabelsChanged), sheet.found("no-gradient")
    known = plan(sheet.threat(threat), effort, classes=sheet.clean.shape[1], single_label=single, gradients=not dead)
    if dead:  # noise and grids are part of both
        names = {stage.attack.name for stage in known}
        return (*known, *(stage for stage in blind if stage.attack.name not in names))
    return (*known, *blind) if sheet.found("gradient") else known


def planned_rows(sheet: Sheet, effort: str, threat: str) -> int:
    """Most rows that the plan can cost this model under one threat: every correct sample in every stage."""
    per_sample = sum(stage.rows for r in sheet.rounds if r.threat == threat for stage in stages_of(sheet, threat, effort))
    return int(sheet.correct.sum()) * max(per_sample, 1)


def cascade(sheet: Sheet, referee: Referee, effort: str, seed: int, drop: bool, progress: Progress) -> None:
    """Fills the sheet. Interrupting it anywhere leaves a valid sheet: samples not yet attacked stand."""
    total, behind = max(sum(planned_rows(sheet, effort, name) for name in sheet.hits), 1), 0.0
    correct = int(sheet.correct.sum())
    for current in sheet.rounds:
        started, asked, late = time.perf_counter(), 0, 0
        try:
            for stage in stages_of(sheet, current.threat, effort):

                def watch(_step: int, _steps: int, left: int, stage: Stage = stage, share: float = behind / total) -> None:
                    tick = Tick(sheet.subject.victim.name, current.threat, current.text, stage.attack.name, left, share)  # noqa: B023
                    progress(tick)

                spent = attack_round(sheet, referee, current, stage.attack, seed, drop, watch)
                late += int((asked + spent > sheet.queries / 2).sum())
                asked += stage.rows
                behind += stage.rows * correct
            if not sheet.shown:
                queries_suffice(sheet, current, late)
            elif not sheet.found("no-gradient"):
                losses_agree(sheet, current, seed)
                effort_suffices(sheet, current, effort, seed)
            current.finished = True
        finally:
            current.seconds += time.perf_counter() - started


def attack_round(
    sheet: Sheet, referee: Referee, current: Round, attack: AttackLike, seed: int, drop: bool, watch: Callable[[int, int, int], None]
) -> Tensor:
    """One attack on the samples still standing; only what the referee confirms is entered, and its queries (K,) are returned."""
    rows = sheet.standing(current.threat, current.radius).nonzero().squeeze(1)
    if not len(rows):
        return rows
    started, subject, hits, threat = time.perf_counter(), sheet.subject, sheet.hits[current.threat], sheet.threat(current.threat)
    x, goal = subject.x[rows], subject.goal.take(rows)
    outcome = attack(subject.victim, x, goal, current.radius, seed, clean=sheet.clean[rows], drop=drop, watch=watch)
    met = rows[outcome.flags["invalid"].cpu()]
    hits.invalid[met] = hits.invalid[met].clamp(max=current.radius)
    claimed = outcome.reached.cpu().nonzero().squeeze(1)
    broken, spent = rows[:0], rows[:0]
    if len(claimed):
        x_adv, z = outcome.x_adv.cpu()[claimed], None if is_input(threat) else outcome.z.cpu()[claimed]
        ruling = referee.judge(x[claimed], x_adv, goal.take(claimed), threat, current.radius, z)
        broken = rows[claimed][ruling.broken]
        if z is not None:
            hits.z |= {int(row): one.clone() for row, one in zip(broken, z[ruling.broken], strict=True)}
        hits.x_adv[broken] = x_adv[ruling.broken]
        hits.size[broken] = ruling.size[ruling.broken]
        hits.predicted[broken] = ruling.predicted[ruling.broken]
        spent = outcome.queries[claimed][ruling.broken]
        hits.radius[broken] = current.radius  # last: an interrupt before this line leaves these samples standing
    current.attacks.append(_row(attack.name, repr(attack), len(rows), len(broken), outcome, time.perf_counter() - started))
    return spent


def _row(name: str, recipe: str, tried: int, broken: int, outcome: Outcome, seconds: float) -> AttackRow:
    return AttackRow(
        name=name,
        recipe=recipe,
        tried=tried,
        broken=broken,
        forwards=int(outcome.queries.sum()),
        backwards=int(outcome.backwards.sum()),
        seconds=seconds,
    )


def losses_agree(sheet: Sheet, current: Round, seed: int) -> None:
    """Cross-entropy and margin, same budget, on a capped sample: a wide gap means that scores hide gradients.

    Cost: at most 20 gradient rows for each of 128 samples.
    """
    order = sheet.subject.order
    rows = order[sheet.correct[order]][:LOSS_SAMPLE]
    if not len(rows):
        return
    subject, reached = sheet.subject, {}
    for objective in (cross_entropy, margin):
        started = time.perf_counter()
        attack = pgd(10, threat=sheet.threat(current.threat), objective=objective)
        outcome = attack(subject.victim, subject.x[rows], subject.goal.take(rows), current.radius, seed, clean=sheet.clean[rows])
        reached[objective] = outcome.reached.cpu()
        row = _row(f"check: {objective.__name__}", repr(attack), len(rows), 0, outcome, time.perf_counter() - started)
        current.attacks.append(row)
    only_margin = int((reached[margin] & ~reached[cross_entropy]).sum())
    only_ce = int((reached[cross_entropy] & ~reached[margin]).sum())
    gap = (only_margin - only_ce) / len(rows)
    if abs(gap) > LOSS_GAP and mcnemar(only_margin, only_ce) < 0.01:
        weak, strong = ("cross-entropy", "the margin") if gap > 0 else ("the margin", "cross-entropy")
        flag = Flag(
            id="losses-disagree",
            severity="block",
            message=f"With the same 10 steps {strong} breaks {abs(gap):.0%} more of "
            f"{len(rows)} samples than {weak} does: scores hide gradients.",
            fix="Attack the model without its output scaling (temperature, softmax, quantized scores), or run --effort max.",
        )
        current.flags.append(flag)


def queries_suffice(sheet: Sheet, current: Round, late: int) -> None:
    """Would more queries still break samples? Told without asking one: by how many broke in the second half of them."""
    if late > EFFORT_GAP * len(sheet.clean):
        message = f"{late} of {len(sheet.clean)} samples broke only after half of the {sheet.queries:,} queries: more would break more."
        current.flags.append(Flag(id="effort", severity="warn", message=message, fix="Run --effort max, or raise --max-queries."))


def effort_suffices(sheet: Sheet, current: Round, effort: str, seed: int) -> None:
    """Would trying harder still break samples? Asked of a capped sample of those that stand, with one attack at twice the effort.

    What it finds is not entered: a sample's verdict must not depend on which others were chosen for a check.

    Cost: at most that of the deeper attack for each of 64 samples.
    """
    order = sheet.subject.order
    rows = order[sheet.standing(current.threat, current.radius)[order]][:EFFORT_SAMPLE]
    if not len(rows):
        return
    subject, started = sheet.subject, time.perf_counter()
    single = not isinstance(subject.goal, LabelsChanged)
    attack = deeper(sheet.threat(current.threat), effort, classes=sheet.clean.shape[1], single_label=single)
    outcome = attack(subject.victim, subject.x[rows], subject.goal.take(rows), current.radius, seed + 1, clean=sheet.clean[rows])
    broken = int(outcome.reached.sum())
    current.attacks.append(_row("check: more effort", repr(attack), len(rows), 0, outcome, time.perf_counter() - started))
    if not broken:
        return
    fix = "Run --effort max." if effort != "max" else "Quote the number as an upper bound that is known to be loose."
    standing = float(sheet.standing(current.threat, current.radius).double().mean())
    lower = broken / len(rows) * standing
    message = (
        f"Twice the effort still broke {broken} of {len(rows)} samples that stood: "
        f"the true robust accuracy is lower, by about {100 * lower:.1f} points or more."
    )
    severity: Literal["block", "warn"] = "block" if lower > EFFORT_GAP else "warn"
    current.flags.append(Flag(id="effort", severity=severity, message=message, fix=fix))


def eight_bit(sheet: Sheet, referee: Referee) -> None:
    """Which stored inputs still break the model after rounding to k/255: what survives saving an image. (N,) per threat."""
    for threat, hits in sheet.hits.items():
        kept = torch.zeros(len(hits.radius), dtype=torch.bool)
        rows = torch.isfinite(hits.radius).nonzero().squeeze(1)
        if len(rows):
            rounded = (hits.x_adv[rows] * 255).round() / 255
            goal = sheet.subject.goal.take(rows)
            kept[rows] = goal.reached(referee.outputs(rounded, goal))
        sheet.rounded[threat] = kept
