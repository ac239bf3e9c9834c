"""One audit, from subjects to plain results: preflight, cascade, referee, evidence, verdict. Interrupting it loses nothing."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from epsball.attacks import fgsm, noise
from epsball.auditing import remembered
from epsball.auditing.blocks import Turn
from epsball.auditing.bracket import prove
from epsball.auditing.canaries import NORMS, misjudged
from epsball.auditing.cascade import Tick, attack_round, eight_bit, planned_rows, stages_of
from epsball.auditing.checks import CONTRACT_CHECKS, Scene, rounding_matters, transfer_finds_nothing
from epsball.auditing.cost import Estimate, most_forwards
from epsball.auditing.plan import QUERIES
from epsball.auditing.preflight import DENSITIES, examine, look, unlogged
from epsball.auditing.react import After, react
from epsball.auditing.referee import Referee
from epsball.auditing.results import Canaries, Finding, ModelReport
from epsball.auditing.sheet import Sheet, Subject
from epsball.auditing.stopping import Limits, Stopping
from epsball.auditing.union import text, unions
from epsball.auditing.verdict import FIXES, model_report
from epsball.certify.bracket import Method
from epsball.core import Access, Projects, Untargeted
from epsball.errors import BadInput, EpsballError, Refused
from epsball.objectives import margin
from epsball.store import evidence
from epsball.threats import Linf, ThreatSpec, is_input

T = TypeVar("T")

FORMAT = 1
"""Version of the evidence file."""
_RIGHT: dict[tuple[tuple[str, ...], str], Canaries] = {}
"""By norms and digest: when this process has last known the canaries to be judged right."""


class Progress(Protocol):
    """Who listens to a run."""

    def estimate(self, most: Estimate) -> None:
        """Before the first attack: the most that the plan can cost."""

    def tick(self, tick: Tick) -> None:
        """During attacks."""


class Silent:
    """Nobody listens."""

    def estimate(self, most: Estimate) -> None:
        """Says nothing."""

    def tick(self, tick: Tick) -> None:
        """Says nothing."""


@dataclass(frozen=True)
class Plan:
    """What is asked of every subject.

    `drop` takes samples out of an attack once they are broken; off, it only costs more: no verdict depends on it.
    `max_queries` replaces the most rows per sample and radius that `effort` allows searches without gradients.
    `certify` names a method of `epsball.certify` for lower bounds; None asks for none. `limits` may end the run early.
    `union` asks for the robust accuracy under all threats at once, too.
    """

    threats: tuple[ThreatSpec, ...]
    effort: str = "default"
    seed: int = 0
    drop: bool = True
    max_queries: int | None = None
    certify: Method | None = None
    limits: Limits = field(default_factory=Limits)
    union: bool = False


@dataclass(frozen=True)
class Audited:
    """What a run gives: plain results, whether it was interrupted, and when the canaries were judged, if it came to that."""

    models: list[ModelReport]
    partial: bool
    canaries: Canaries | None


def logarithm(p: Tensor) -> Tensor:
    """log p, finite at p = 0 and with a finite gradient."""
    return p.clamp(min=torch.finfo(p.dtype).tiny).log()


def of_shares(scores: Tensor) -> Tensor:
    """Logarithms of the shares of each row's largest, so that none is lost however small all of them are."""
    return logarithm(scores / scores.amax(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny))


def prepare(subject: Subject, plan: Plan) -> tuple[Sheet, Referee]:
    """Preflight: checks the contract, mends what is safe, asks all clean outputs once.

    Raises:
        BadInput: the model cannot be asked or scored at all, a threat does not fit its inputs, or a cap on queries does not fit
            the model, in one line.
    """
    victim, findings = subject.victim, []
    if plan.max_queries is not None and victim.access is Access.GRADIENT:
        raise BadInput(f"max_queries: {plan.max_queries}: model '{victim.name}' gives gradients, so --effort sets its cost: leave it out")
    if in_training(victim.model):
        message = "The model arrived in training mode; it is audited in eval mode and put back afterwards."
        findings.append(Finding(id="eval-mode", status="mended", message=message))
    # The order of content hashes: a random sample for the checks, whatever the order of the data.
    chosen = subject.order
    bench = look(victim, subject.x[chosen], subject.y[chosen])
    for spec in plan.threats:  # what cannot be changed in this way at all is told before any work
        nothing = torch.zeros(1, dtype=torch.float64)
        spec.threat.within(victim.box).start(subject.x[:1], nothing, None, nothing.long())
    # Of several labels a score above 0 is an answer of its own, which a logarithm would change.
    if victim.access > Access.LABELS and isinstance(bench.goal, Untargeted) and (what := unlogged(bench.output)):
        mend = of_shares if what == DENSITIES else logarithm
        victim = victim.twin(After(victim.model, mend))
        message = f"The model answers with {what}; their logarithm is used as scores."
        findings.append(Finding(id="probabilities", status="mended", message=message))
        bench = replace(bench, victim=victim, output=mend(bench.output))
    subject = replace(subject, victim=victim)
    findings += examine(bench, seed=plan.seed, normalization=subject.normalization)
    findings += [finding for check in CONTRACT_CHECKS for finding in check(bench)]
    refuse(findings, victim.name)
    sight, findings = react(bench, findings, plan.effort, plan.seed)
    referee = Referee(victim, draws=sight.judges)
    started = time.perf_counter()
    clean = referee.outputs(subject.x, subject.goal)
    pace = (time.perf_counter() - started) / len(clean)
    return Sheet.start(subject, clean, findings, plan.threats, plan.max_queries or QUERIES[plan.effort], pace, sight), referee


def canaries(threats: tuple[str, ...]) -> tuple[Finding, Canaries]:
    """Does this very tool judge models right whose truth is known? And when was it asked?

    Asked of fast searches, for the norms among the threats of a run: once as long as the same code judges them right.
    """
    norms = tuple(norm for norm in NORMS if norm in threats or norm == "linf")
    code = remembered.digest("fast", *norms)
    judged = _RIGHT.get((norms, code)) or remembered.recall(code)
    if judged is None:
        wrong = _misjudged(norms)
        judged = Canaries(judged=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), code=code)
        if wrong:
            message = f"The tool failed: it misjudged planted models ({'; '.join(wrong)})."
            return Finding(id="canaries", status="block", message=message), judged
        remembered.keep(judged)
    _RIGHT[norms, code] = judged
    return Finding(id="canaries", status="pass", message="Planted models whose truth is known were judged right."), judged


def _misjudged(norms: tuple[str, ...]) -> list[str]:
    """A sentence for every planted model that fast searches judge wrongly."""

    def look(subject: Subject, specs: tuple[ThreatSpec, ...]) -> Sheet:
        sheet, referee = prepare(subject, Plan(specs, "fast"))
        for current in sheet.rounds:
            for stage in stages_of(sheet, current, "fast"):
                attack_round(sheet, referee, current, stage, 0, True, lambda *_: None)
        return sheet

    return [*misjudged(look, norms)]


def in_training(model: object) -> bool:
    """Any submodule of the user's is in training mode.

    epsball's own wrappers, bare containers and the graphs of exported programs are born in it and mean nothing by it.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    modeless = ("epsball.", "torch.fx.", "torch.export.")
    return any(m.training for m in modules if type(m) is not nn.Module and not type(m).__module__.startswith(modeless))


def refuse(findings: Sequence[Finding], name: str) -> None:
    """Stops before any attack where a number could only mislead: the model does not get what it was trained on.

    Raises:
        Refused: the finding and its fix, in one line.
    """
    blocks = {finding.id: finding for finding in findings if finding.status == "block"}
    for cause in ("scaling", "finite", "constant"):  # wrong scaling explains a constant answer, not the other way around
        if cause in blocks:
            raise Refused(f"model '{name}': {blocks[cause].message} {FIXES[cause]}")


def most_seconds(sheet: Sheet, effort: str) -> float:
    """The most time that the plan can take, from the measured cost of a row; threats that compute a lot are measured themselves.

    A victim without gradients is not asked again for that: the clean outputs have shown its pace.
    """
    if not sheet.shown:
        return sheet.pace * sum(planned_rows(sheet, effort, spec.name) for spec in sheet.threats)
    plain = seconds_per_row(sheet, Linf())
    costs = ((spec, plain if is_input(spec.threat) else seconds_per_row(sheet, spec.threat)) for spec in sheet.threats)
    return sum(planned_rows(sheet, effort, spec.name) * cost for spec, cost in costs)


def estimate(sheets: Sequence[Sheet], plan: Plan) -> Estimate:
    """What the plan can cost for all models, and how much of that its limits leave room for."""
    seconds, forwards = (
        sum(most_seconds(sheet, plan.effort) for sheet in sheets),
        sum(most_forwards(sheet, plan.effort) for sheet in sheets),
    )
    return Estimate.of(seconds, forwards, plan.limits)


def seconds_per_row(sheet: Sheet, threat: Projects) -> float:
    """Measured cost of one gradient row on at most 64 samples."""
    subject, rows = sheet.subject, min(64, len(sheet.subject.x))
    gradients = not sheet.sight.dead
    attack = fgsm(threat, objective=margin) if gradients else noise(draws=2, threat=threat)
    spent = []
    for _ in range(4):  # the first call also pays for what libraries set up on first use, and any may wait for other work
        started = time.perf_counter()
        attack(sheet.sight.victim, subject.x[:rows], subject.goal.take(slice(0, rows)), 1e-6, clean=sheet.clean[:rows], drop=False)
        spent.append(time.perf_counter() - started)
    return min(spent) / (1.5 * rows)  # fgsm also judges its result: half a gradient row more


def confirm(sheets: Sequence[tuple[Sheet, Referee]], path: Path, header: dict[str, Any]) -> None:
    """Writes the evidence, reads it back, and lets the referee rule on what was read: only that counts."""
    _store(sheets, path, header)
    arrays, _ = evidence.read(path)
    revoked = 0
    for number, (sheet, referee) in enumerate(sheets):
        for threat, hits in sheet.hits.items():
            prefix = f"m{number}/{threat}"
            rows = torch.from_numpy(arrays[f"{prefix}/rows"].copy())
            if not len(rows):
                continue
            x = torch.from_numpy(evidence.expand(arrays[f"m{number}/x"]))[rows]
            x_adv, radius = (torch.from_numpy(arrays[f"{prefix}/{name}"].copy()) for name in ("x_adv", "radius"))
            allowed = sheet.threat(threat)
            z = None if is_input(allowed) else torch.from_numpy(arrays[f"{prefix}/z"].copy())
            if sheet.shown:
                kept = referee.judge(x, x_adv, sheet.subject.goal.take(rows), allowed, radius, z).broken.cpu()
            else:  # the referee has ruled on these very bytes, and its every row may be paid for
                kept = (x_adv == hits.x_adv[rows].cpu()).flatten(1).all(1)
            lost = rows[~kept]
            hits.revoke(lost)
            revoked += len(lost)
            if len(lost) and not sheet.sight.random:  # by chance, a random model's majority may turn
                message = f"{len(lost)} adversarial inputs under {threat} were not confirmed when read back from disk; they do not count."
                sheet.findings.append(Finding(id="unconfirmed", status="block", message=message))
        low, high = (torch.as_tensor(bound) for bound in sheet.subject.victim.box)
        silent = not sheet.shown and sheet.found("raised")
        if not silent and sheet.subject.x.ndim >= 3 and bool((low == 0).all()) and bool((high == 1).all()):
            eight_bit(sheet, referee)
    if revoked and any(sheet.sight.random for sheet, _ in sheets):
        confirm(sheets, path, header)  # other rows side by side draw other numbers: until all that is stored holds as stored
    elif revoked:
        _store(sheets, path, header)


def _store(sheets: Sequence[tuple[Sheet, Referee]], path: Path, header: dict[str, Any]) -> None:
    arrays: evidence.Arrays = {}
    models = []
    for number, (sheet, referee) in enumerate(sheets):
        arrays |= sheet.arrays(f"m{number}")
        low, high = (torch.as_tensor(bound) for bound in sheet.subject.victim.box)
        box = [float(low.min()), float(high.max())]
        rounds = [{"threat": r.threat, "radius": r.radius, "text": r.text} for r in sheet.rounds]
        model: dict[str, Any] = {"name": sheet.subject.victim.name, "spec": dict(sheet.subject.source), "box": box, "rounds": rounds}
        model |= {"unions": [text(places) for places in sheet.unions], "interval": sheet.interval, "population": sheet.subject.population}
        models.append(model if referee.draws == 1 else {**model, "draws": referee.draws})
    evidence.write(path, arrays, {**header, "format": FORMAT, "models": models})


def audit_subjects(
    subjects: Sequence[Subject],
    plan: Plan,
    path: Path,
    header: dict[str, Any],
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Audited:
    """Audits every subject under the same plan and stores the evidence.

    Args:
        subjects: models with their data. plan: threats, effort, seed. path: where the evidence goes.
        header: settings to store with it, JSON-safe. progress: who listens. clock: what a budget of seconds is read on.

    Returns:
        Results for every subject that was prepared before an interruption, or before a model raised, if that happened.

    Raises:
        KeyboardInterrupt: interrupted before anything was known.
    """
    progress, partial, asked = progress or Silent(), False, None
    sheets: list[tuple[Sheet, Referee]] = []
    stop = Stopping(plan.limits, clock)
    try:
        sheets.extend(prepare(subject, plan) for subject in subjects)
        finding, asked = canaries(tuple(spec.name for spec in plan.threats))
        for sheet, _ in sheets:
            sheet.findings.append(finding)
        heard(progress.estimate, estimate([sheet for sheet, _ in sheets], plan))
        for number, (sheet, referee) in enumerate(sheets):
            sheet.unions = unions(plan.threats) if plan.union else ()
            tick, keep = _Part(progress, number, len(sheets)).tick, _Keep(sheets, number)
            Turn(referee, plan.effort, plan.seed, plan.drop, tick, stop, keep).take(sheet, len(sheets) - number)
            if plan.certify is not None:
                prove(sheets[number][0], plan.certify)
        if stop.reason is None:
            compared(sheets, plan.seed)
    except KeyboardInterrupt:
        partial = True
        if not sheets:
            raise
    except Unheard as failed:
        raise failed.error from None
    except Exception as error:
        partial = True
        if not sheets or (isinstance(error, EpsballError) and not paid_for(sheets)):
            raise
        crashed(sheets, error)
    confirm(sheets, path, header)
    for sheet, _ in sheets:
        for current in sheet.rounds:
            current.flags += rounding_matters(sheet, current)
    return Audited([model_report(sheet) for sheet, _ in sheets], partial, asked)


def compared(sheets: Sequence[tuple[Sheet, Referee]], seed: int) -> None:
    """What fools one model of a run is shown to the others; not to those whose every row may be paid for, or whose answers hang on the
    batch."""
    for sheet, referee in sheets:
        for current in (r for r in sheet.rounds if r.finished and sheet.shown and not sheet.found("batch")):
            scene = Scene(sheet, referee, current, seed, sheet.sight.victim)
            current.flags += [flag for other, _ in sheets if other is not sheet for flag in transfer_finds_nothing(scene, other)]


class Unheard(Exception):
    """Carries a listener's own error past the handler of errors that models raise."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def heard(listener: Callable[[T], None], what: T) -> None:
    """Tells a listener; what it raises is its own fault, not the model's."""
    try:
        listener(what)
    except Exception as error:
        raise Unheard(error) from error


def paid_for(sheets: Sequence[tuple[Sheet, Referee]]) -> bool:
    """An attack on a model without gradients has ended: its rows may have cost money, so even our own errors do not throw it away."""
    return any(current.attacks for sheet, _ in sheets if not sheet.shown for current in sheet.rounds)


def crashed(sheets: Sequence[tuple[Sheet, Referee]], error: Exception) -> None:
    """A model raised under attack: what is known so far is kept, and the first unfinished model says why it ends there."""
    said = " ".join(str(error).split())[:160] or "no message"
    for sheet, _ in sheets:
        if not all(current.finished for current in sheet.rounds):
            message = f"The model raised {type(error).__name__} under attack ({said}); attacks after that did not run."
            sheet.findings.append(Finding(id="raised", status="block", message=message))
            return


@dataclass(frozen=True)
class _Keep:
    """Puts the sheet of what counts so far in its model's place."""

    sheets: list[tuple[Sheet, Referee]]
    number: int

    def __call__(self, sheet: Sheet) -> None:
        self.sheets[self.number] = (sheet, self.sheets[self.number][1])


@dataclass(frozen=True)
class _Part:
    """One model's progress as a part of the whole run's."""

    progress: Progress
    number: int
    count: int

    def tick(self, tick: Tick) -> None:
        heard(self.progress.tick, replace(tick, share=(self.number + tick.share) / self.count))
