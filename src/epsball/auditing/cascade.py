"""Runs the plan for one model: threat by threat, radius by radius, attack by attack, always on the samples still standing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.auditing.checks import (
    FINAL_CHECKS,
    ROUND_CHECKS,
    Scene,
    attack_row,
    effort_suffices,
    harder,
    queries_suffice,
    severity,
    told_once,
)
from epsball.auditing.doubted import across, by_chance, by_directions, smooth, through_twins
from epsball.auditing.plan import CLOSE, Stage, beside, black_box, plan, row_budget, swept
from epsball.auditing.referee import Referee
from epsball.auditing.results import Flag
from epsball.auditing.sheet import Hits, Round, Sheet
from epsball.auditing.stopping import Spent, Stopping
from epsball.core import Aimed, Goal, LabelsChanged, Outcome, Tally, Untargeted
from epsball.threats import L1, is_input


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
MISLED = frozenset({"noise-wins", "black-box-wins"})
"""Flags of searches without gradients that found what gradients passed over."""


def stages_of(sheet: Sheet, current: Round, effort: str) -> tuple[Stage, ...]:
    """The plan for this model under one threat at one radius, as the sheet's sight of the model wants it.

    A victim that shows no gradients gets searches that need none; one whose gradients are dead, hidden or rough gets these as well,
    after those through its twin. Of tables every feature is tried by itself.
    """
    threat, sight, model, x = sheet.threat(current.threat), sheet.sight, sheet.subject.victim, sheet.subject.x
    if not sheet.shown:
        return black_box(threat, model.access, sheet.queries, x)
    single, dead = isinstance(sheet.subject.goal, Untargeted), sight.dead
    trusted = not (sight.doubted or sight.random or sight.forks)
    known = plan(threat, effort, classes=sheet.clean.shape[1], single_label=single, gradients=not dead, trusted=trusted)
    beyond = (*by_directions(threat, effort, sight.shaken), *across(threat, effort, sight.forks))
    further = [replace(stage, beyond=not dead) for stage in beyond]
    if dead:  # noise and grids are part of both
        names, blind = {stage.attack.name for stage in known}, beside(threat, model.access, effort, sheet.queries, x)
        return (*known, *further, *(replace(stage, beyond=False) for stage in blind if stage.attack.name not in names))
    if sight.bare is not None:
        own = by_chance(threat, effort, model, sight.victim.draws, known) if sight.own else ()
        other = by_chance(threat, effort, sight.bare, sight.victim.draws, known) if sight.bare is not model else ()
        return (*own, *(replace(s, beyond=True) for s in other[: 2 if own else None]))
    stages = list(known) if sight.own else []
    if sight.victim is not model:
        aimed = sheet.clean.shape[1] if single and sheet.clean.shape[1] >= 3 else 0
        more = through_twins(threat, effort, aimed) if sight.hidden else ()
        stages += [replace(for_twin(s), victim=sight.victim, beyond=bool(stages)) for s in (*known, *more)]
    if sight.rough:
        stages += [replace(s, victim=sight.victim, beyond=True) for s in smooth(threat, effort)]
    if sight.straight is not None:
        stages += [replace(for_twin(s), victim=sight.straight, beyond=True) for s in known]
    stages += further
    return (*stages, *(beside(threat, model.access, effort, sheet.queries, x) if sight.doubted else swept(threat, effort, x)))


def for_twin(stage: Stage) -> Stage:
    """The stage for a twin: walks are for all that stand, not tried on some first, for the model's gradients are known to mislead."""
    return replace(stage, nearest=1.0) if stage.attack.name == "outside_in" else stage


def planned_rows(sheet: Sheet, effort: str, threat: str) -> int:
    """Most rows that the plan can cost this model under one threat: every correct sample in every stage."""
    per_sample = sum(stage.rows for r in sheet.rounds if r.threat == threat for stage in stages_of(sheet, r, effort))
    return int(sheet.correct.sum()) * max(per_sample, 1)


def cascade(sheet: Sheet, referee: Referee, effort: str, seed: int, drop: bool, progress: Progress, stop: Stopping | None = None) -> None:
    """Fills the sheet. Interrupting it anywhere leaves a valid sheet: samples not yet attacked stand.

    `stop` says in which order the attacks run, and after each of them whether that was enough; None: round by round, to the end.
    """
    stop = stop or Stopping()
    total, behind = max(sum(planned_rows(sheet, effort, name) for name in sheet.hits), 1), 0.0
    correct = int(sheet.correct.sum())
    for current, stage in stop.order([(current, stages_of(sheet, current, effort)) for current in sheet.rounds]):
        started = time.perf_counter()
        try:
            listener = Listener(sheet, current, progress, behind / total)
            if stage is None:
                doubt(sheet, referee, current, effort, seed, drop, listener)
                continue
            spent = attack_round(sheet, referee, current, stage, seed, drop, listener.watch(stage))
            current.late += int((current.asked + spent > sheet.queries / 2).sum())
            current.asked += stage.rows
            current.ran += 1
            behind += stage.rows * correct
        except Spent:
            stop.book(sheet, current, stage)
            return
        finally:
            current.seconds += time.perf_counter() - started
        if stop.now(sheet, current):
            return


@dataclass(frozen=True)
class Listener:
    """Who is told of a round's progress, with that share (0..1) of the planned work behind."""

    sheet: Sheet
    current: Round
    progress: Progress
    share: float = 1.0

    def watch(self, stage: Stage) -> Callable[[int, int, int], None]:
        """What a stage calls once a step."""
        name, now, attack = self.sheet.subject.victim.name, self.current, stage.attack.name
        return lambda _step, _steps, left: self.progress(Tick(name, now.threat, now.text, attack, left, self.share))


def doubt(sheet: Sheet, referee: Referee, current: Round, effort: str, seed: int, drop: bool, listener: Listener) -> None:
    """The checks of a round whose attacks have all run; with them it is finished.

    Where one breaks without gradients what attacks with them left standing, the longer searches without gradients run on all that stand,
    and the checks are asked again; so with what twice the effort breaks (`tried_harder`).

    Left out where answers depend on the batch: searches drop samples, so each asks other batches.
    """
    scene, before = Scene(sheet, referee, current, seed, sheet.sight.victim), list(current.flags)
    flags, misled = list[Flag](), False
    current.flags += masked(sheet, current)  # stays where the checks are cut short
    if not sheet.shown:
        flags += queries_suffice(scene, current.late)
    elif not sheet.sight.dead and not sheet.found("batch"):
        last = current is [r for r in sheet.rounds if r.threat == current.threat][-1]
        checks = ROUND_CHECKS + (FINAL_CHECKS if last else ())
        flags += told_once(flag for check in checks for flag in check(scene))
        misled = not sheet.sight.doubted and not sheet.sight.random and any(flag.id in MISLED for flag in flags)
        if misled:
            for stage in beside(scene.threat, sheet.subject.victim.access, effort, sheet.queries, sheet.subject.x):
                attack_round(sheet, referee, current, stage, seed, drop, listener.watch(stage))
            flags = list(told_once(flag for check in checks for flag in check(scene)))
        flags += tried_harder(scene, effort, drop, listener)
    current.flags = [*before, *masked(sheet, current, misled), *flags]
    current.finished = True


def tried_harder(scene: Scene, effort: str, drop: bool, listener: Listener) -> list[Flag]:
    """Would twice the effort break more? Where that matters, but at effort fast, all that stand are attacked so, and some asked again.

    The attack draws as the check did, so that it breaks what this broke; what withstood the check it leaves out.
    """
    withstood, flags = effort_suffices(scene, effort)
    if effort == "fast" or all(flag.severity == "info" for flag in flags):
        return flags
    sheet, current, sight = scene.sheet, scene.current, scene.sheet.sight
    standing = sheet.standing(current.threat, current.radius)
    stood = int(standing.sum())
    standing[withstood] = False
    twin = sight.own and scene.victim is not sheet.subject.victim
    stage = Stage(harder(scene, effort), 0, victim=scene.victim, keep=sight.random, beyond=twin)
    attack_round(sheet, scene.referee, current, stage, scene.seed + 1, drop, listener.watch(stage), standing)
    broken = stood - int(sheet.standing(current.threat, current.radius).sum())
    message = f"Twice the effort broke {broken} of all {stood} samples that stood, and then, with other draws, none more."
    told = Flag(id="effort", severity="info", message=message, fix="Nothing: the number counts them.")
    _, left = effort_suffices(scene, effort, turn=2)
    return left or [told]


def masked(sheet: Sheet, current: Round, misled: bool = False) -> list[Flag]:
    """Searches that follow the model's own gradients missed what others found: any where something speaks against these, else many."""
    correct = int(sheet.correct.sum())
    expected = misled or sheet.sight.doubted or sheet.sight.forks != ()
    if not current.beyond or not (expected or severity(current.beyond, correct) == "block"):
        return []
    message = (
        f"{current.beyond} of {correct} samples broke only by searches that do not follow the model's own gradients: "
        "any evaluation that follows them alone is too good."
    )
    return [Flag(id="masked", severity="warn", message=message, fix="Quote this audit's number, and name the step that hides gradients.")]


def attack_round(
    sheet: Sheet,
    referee: Referee,
    current: Round,
    stage: Stage,
    seed: int,
    drop: bool,
    watch: Callable[[int, int, int], None],
    among: Tensor | None = None,
) -> Tensor:
    """One attack on the samples still standing, those `among` (N,) bool if given; only what the referee confirms is entered, and its
    queries (K,) are returned."""
    subject, hits, threat = sheet.subject, sheet.hits[current.threat], sheet.threat(current.threat)
    standing = sheet.standing(current.threat, current.radius)
    rows = tried_rows(hits, standing if among is None else standing & among, stage)
    if not len(rows) or (stage.pays and not worth(current, stage)):
        return rows[:0]
    stands = int(standing.sum())
    left = row_budget(stands, int(sheet.correct.sum()) - stands) - sum(row.backwards for row in current.attacks)
    start = torch.stack([hits.closest.pop(row)[1] for row in rows.tolist()]) if stage.from_closest else None
    attack = stage.suited(hits.near[rows], left, start)
    if attack is None:
        current.unfunded = True
        return rows[:0]
    current.unfunded = False
    started = time.perf_counter()
    x, goal, drop = subject.x[rows], aimed(subject.goal.take(rows), hits.rival[rows], stage), drop and not stage.keep
    outcome = attack(stage.victim or subject.victim, x, goal, current.radius, seed, clean=sheet.clean[rows], drop=drop, watch=watch)
    met = rows[outcome.flags["invalid"].cpu()]
    hits.invalid[met] = hits.invalid[met].clamp(max=current.radius)
    claimed = outcome.reached.cpu().nonzero().squeeze(1)
    broken, spent = rows[:0], rows[:0]
    if len(claimed):
        x_adv, z = outcome.x_adv.cpu()[claimed], None if is_input(threat) else outcome.z.cpu()[claimed]
        ruling = referee.judge(x[claimed], x_adv, goal.take(claimed), threat, current.radius, z)
        kept = ruling.broken
        if sheet.sight.random:  # by other draws as well: who is broken by luck is better attacked again
            turned = referee.judge(
                x[claimed].flip(0), x_adv.flip(0), goal.take(claimed.flip(0)), threat, current.radius, None if z is None else z.flip(0)
            )
            kept = kept & turned.broken.flip(0)
        broken = rows[claimed][kept]
        if z is not None:
            hits.z |= {int(row): one.clone() for row, one in zip(broken, z[kept], strict=True)}
        hits.x_adv[broken] = x_adv[kept]
        hits.size[broken] = ruling.size[kept]
        hits.predicted[broken] = ruling.predicted[kept]
        spent = outcome.queries[claimed][kept]
        current.beyond += len(broken) if stage.beyond else 0
        hits.radius[broken] = current.radius  # last: an interrupt before this line leaves these samples standing
    outcome = note_near(sheet, current, rows, outcome, stage.last)
    current.attacks.append(attack_row(attack.name, repr(stage.attack), len(rows), len(broken), outcome, time.perf_counter() - started))
    return spent


def tried_rows(hits: Hits, standing: Tensor, stage: Stage) -> Tensor:
    """(K,) samples of those `standing` (N,) bool that a stage tries."""
    rows = (standing & (hits.near <= stage.near)).nonzero().squeeze(1)
    if stage.at_rival:
        rows = rows[hits.rival[rows] >= 0]
    if stage.nearest < 1:
        rows = rows[hits.near[rows].argsort(stable=True)[: math.ceil(stage.nearest * len(rows))]].sort().values
    return rows[[row in hits.closest for row in rows.tolist()]] if stage.from_closest else rows


def aimed(goal: Goal, rivals: Tensor, stage: Stage) -> Goal:
    """The goal (K rows) of a stage: in the direction of those classes (K,) where it is `at_rival`."""
    return Aimed(goal.labels, rivals.to(goal.labels)) if stage.at_rival and isinstance(goal, Untargeted) else goal


def worth(current: Round, stage: Stage) -> bool:
    """The attack before broke enough of those it tried."""
    before = current.attacks[-1]
    return not current.unfunded and before.broken >= stage.pays * before.tried


def note_near(sheet: Sheet, current: Round, rows: Tensor, outcome: Outcome, last: bool) -> Outcome:
    """Writes down how near a search came to breaking those that still stand, and books the one row each that it takes to see.

    Under L1 also where a search came closest, for another to go on from there, but the `last`.
    """
    subject, hits = sheet.subject, sheet.hits[current.threat]
    left = (hits.radius[rows] > current.radius).nonzero().squeeze(1)
    goal, place = subject.goal.take(rows[left]), rows[left]
    if not sheet.shown or sheet.sight.random or not isinstance(goal, Untargeted | LabelsChanged) or not len(left):
        return outcome
    tally = Tally.zeros(len(left))
    output = subject.victim.outputs(outcome.x_adv[left], tally).cpu()
    (now, rival), (before, _) = (lead_and_rival(answers.double(), goal) for answers in (output, sheet.clean[place].cpu()))
    share = (now / before).nan_to_num(nan=1.0).clamp(min=0.0)
    hits.rival[place] = torch.where(share < hits.near[place], rival, hits.rival[place])
    hits.near[place] = torch.minimum(hits.near[place], share)
    if not last and isinstance(sheet.threat(current.threat), L1):
        for row, at, near in zip(place.tolist(), left.tolist(), share.tolist(), strict=True):
            if near <= hits.closest.get(row, (CLOSE,))[0]:
                hits.closest[row] = near, outcome.x_adv[at].cpu().clone()
    queries = outcome.queries.clone()
    queries[left] += tally.forwards.to(queries.device)
    return replace(outcome, queries=queries)


def lead_and_rival(output: Tensor, goal: Untargeted | LabelsChanged) -> tuple[Tensor, Tensor]:
    """(B,) by how much the label's score leads the next, and which that is; among several labels, the least firm decision.

    >>> scores = torch.tensor([[2.0, -1.0]])
    >>> lead_and_rival(scores, Untargeted(torch.tensor([0]))), lead_and_rival(scores, LabelsChanged(torch.eye(2)[:1]))
    ((tensor([3.]), tensor([1])), (tensor([1.]), tensor([1])))
    """
    if isinstance(goal, LabelsChanged):
        firm, place = replace(goal, labels=goal.labels.cpu()).signed(output).min(1)
        return firm, place
    labels = goal.labels.cpu()[:, None]
    best, place = output.scatter(1, labels, -torch.inf).max(1)
    return output.gather(1, labels).squeeze(1) - best, place


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
