"""From a sheet to plain results: counts, intervals, flags. Nothing is asked of any model here."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from epsball.auditing.bracket import share
from epsball.auditing.results import EARLY, ClassRate, Finding, Flag, Interval, ModelReport, Place, Rate, Result
from epsball.auditing.sheet import Round, Sheet
from epsball.auditing.statistics import each_of, rate
from epsball.auditing.union import UNION, standing, text, unsure
from epsball.core import valid

FIXES = {
    "random": "Average over several draws or freeze the randomness; attacks that expect it (EOT) are needed.",
    "canaries": "Report this: no number of this installation can be believed until it is understood.",
    "finite": "Check weights and input scaling, and find the layer that overflows.",
    "raised": "Make the model answer every input of the box, then run the audit again.",
    "batch": "Use stored statistics instead of batch statistics at test time; let noise be drawn anew for every answer.",
    "state": "Make the model's forward pass free of side effects in eval mode.",
    "scaling": "Declare the normalization the model was trained with: --mean and --std, or wrap(model, mean=..., std=...).",
    "constant": "Check that weights, class order and input scaling belong together.",
    "gradient": "Attack the scores before softmax and quantization, or replace the dead layer's backward pass.",
    "no-gradient": "Give a differentiable version of the model, or say that attackers see scores only: wrap(model, access=Access.SCORES).",
}
MISSED = frozenset({"no-gradient", "gradient"})
"""What says no more than that attacks may have missed something."""


def told(findings: list[Finding]) -> Iterator[Flag]:
    """What of the preflight a reader of the number has to know; outputs that are no numbers have a flag of their own, with their count."""
    for finding in findings:
        if finding.status == "block" or (finding.status == "warn" and finding.id != "finite"):
            yield Flag(id=finding.id, severity=finding.status, message=finding.message, fix=FIXES.get(finding.id, ""))


def model_report(sheet: Sheet) -> ModelReport:
    """The verdict on one model."""
    subject, box = sheet.subject, sheet.subject.victim.box
    flags = [*told(sheet.findings)]
    invalid = ~valid(sheet.clean).cpu()
    unknown = int(invalid.sum())
    if unknown > 0.05 * len(invalid):
        message = f"{unknown} of {len(invalid)} clean outputs are NaN or infinite."
        flags.append(
            Flag(
                id="invalid", severity="block", message=message, fix="Find the layer that overflows before asking how robust the model is."
            )
        )
    elif unknown:
        flags.append(
            Flag(id="invalid", severity="warn", message=f"{unknown} clean outputs are NaN or infinite: they widen every interval.")
        )
    doubts = frozenset(f.id for f in flags if f.severity == "block")
    results = [result(sheet, current, invalid, doubts) for current in sheet.rounds]
    return ModelReport(
        name=subject.victim.name,
        data=subject.data,
        n=len(subject.x),
        source=str(subject.source.get("source", "python object")),
        clean_accuracy=rate(int(sheet.correct.sum()), len(subject.x), unknown, interval=sheet.interval),
        clean_per_class=per_class(sheet, sheet.correct, invalid),
        invalid=unknown,
        box=(float(torch.as_tensor(box[0]).min()), float(torch.as_tensor(box[1]).max())),
        findings=sheet.findings if sheet.shown else [*sheet.findings, black_box_note(sheet)],
        flags=flags,
        results=[*results, *(union(sheet, places, results, invalid) for places in sheet.unions)],
        population=subject.population,
        stopped=sheet.stopped,
    )


def black_box_note(sheet: Sheet) -> Finding:
    """What the verdict on a model without gradients rests on, what it cost, and why there were no gradients."""
    subject = sheet.subject
    asked = sum(row.forwards for current in sheet.rounds for row in current.attacks)
    each = asked / max(int(sheet.correct.sum()) * sum(bool(current.attacks) for current in sheet.rounds), 1)
    message = (
        f"The model gives {subject.victim.access.name.lower()} only, so only black-box searches ran, with at most {sheet.queries:,} "
        f"queries per sample and radius, {each:,.0f} on average: robust accuracy is an upper bound that no attack with gradients "
        "has tested. Checks of gradients were skipped."
    )
    said = [note.removeprefix(f"{subject.victim.name}: ") for note in subject.notes]
    return Finding(id="black-box", status="note", message=message + (f" The model as read: {'; '.join(said)}." if said else ""))


def result(sheet: Sheet, current: Round, invalid: Tensor, doubts: frozenset[str]) -> Result:
    """One threat at one radius; `doubts` are ids of what blocks the whole model."""
    standing, unsure = sheet.standing(current.threat, current.radius), sheet.unsure(current.threat, current.radius)
    flags = list(current.flags)
    if not current.finished and not any(flag.id in EARLY for flag in flags):
        message = "Interrupted before every attack had run: still an upper bound, but a weak one."
        flags.append(Flag(id="interrupted", severity="block", message=message, fix="Run the audit again to the end."))
    if int(unsure.sum()):
        message = (
            f"The model answered NaN or infinity near {int(unsure.sum())} samples "
            "that still stand: they count as robust only at the high end."
        )
        flags.append(Flag(id="invalid-nearby", severity="warn", message=message))
    sure, unknown = standing & ~unsure, int(unsure.sum()) + int(invalid.sum())
    if not unknown and not int(sure.sum()):  # what attacks may have missed cannot lower a number that is 0
        flags = [flag.model_copy(update={"severity": "warn"}) if flag.severity == "block" else flag for flag in flags]
        doubts -= MISSED
    return Result(
        threat=current.threat,
        radius=current.radius,
        radius_text=current.text,
        robust_accuracy=rate(int(sure.sum()), len(sure), unknown, interval=sheet.interval),
        certified_accuracy=share(current.certified),
        trustworthy=not doubts and not any(f.severity == "block" for f in flags),
        after_rounding=rounded_rate(sheet, current, sure, unsure, invalid),
        forwards=sum(a.forwards for a in current.attacks),
        backwards=sum(a.backwards for a in current.attacks),
        seconds=current.seconds,
        flags=flags,
        attacks=current.attacks,
        per_class=per_class(sheet, sure, invalid | unsure),
        whole_data=of_all(int(sure.sum()), len(sure), unknown, sheet.interval, sheet.subject.population),
    )


def of_all(count: int, n: int, unknown: int, interval: Interval, population: int | None) -> Rate | None:
    """The rate of the whole data set that the samples were drawn from; None where that is not known, or was not drawn from beforehand."""
    if population is None or population <= n or interval != "clopper-pearson":
        return None
    return rate(count, n, unknown, interval="finite-population", population=population)


def union(sheet: Sheet, places: tuple[Place, ...], results: list[Result], invalid: Tensor) -> Result:
    """Several threats at once: a sample stands where it stands under each of them. What casts doubt on one of them does on all."""
    parts = [r for r in results if any((r.threat, r.radius) == (place.threat, place.radius) for place in places)]
    open_ = unsure(sheet, places)
    sure, unknown = standing(sheet, places) & ~open_, int(open_.sum()) + int(invalid.sum())
    flags = {flag.model_dump_json(): flag for part in parts for flag in part.flags if flag.severity == "block" or flag.id in EARLY}
    proven = [c.certified for c in sheet.rounds if any((c.threat, c.radius) == (place.threat, place.radius) for place in places)]
    certified = None if any(one is None for one in proven) else reduce(Tensor.__and__, [one for one in proven if one is not None])
    return Result(
        threat=UNION,
        radius=float(1 + sheet.unions.index(places)),
        radius_text=text(places),
        robust_accuracy=rate(int(sure.sum()), len(sure), unknown, interval=sheet.interval),
        certified_accuracy=share(certified),
        trustworthy=all(part.trustworthy for part in parts),
        forwards=0,
        backwards=0,
        seconds=0.0,
        flags=list(flags.values()),
        per_class=per_class(sheet, sure, invalid | open_),
        union=list(places),
        whole_data=of_all(int(sure.sum()), len(sure), unknown, sheet.interval, sheet.subject.population),
    )


def rounded_rate(sheet: Sheet, current: Round, sure: Tensor, unsure: Tensor, invalid: Tensor) -> Rate | None:
    """Robust accuracy if adversarial inputs had to be saved with 8 bits first."""
    kept = sheet.rounded.get(current.threat)
    if kept is None:
        return None
    lost = sheet.correct.cpu() & (sheet.hits[current.threat].radius <= current.radius) & ~kept
    return rate(int((sure | lost).sum()), len(sure), int(unsure.sum()) + int(invalid.sum()), interval=sheet.interval)


def per_class(sheet: Sheet, good: Tensor, unknown: Tensor) -> list[ClassRate]:
    """One rate for each class of the data, with intervals that hold for all classes at once; none for multi-label data."""
    y, names = sheet.subject.y.cpu(), sheet.subject.class_names
    if y.ndim != 1:
        return []
    rates, labels = [], sorted(set(y.tolist()))
    for label in labels:
        rows = y == label
        name = names[label] if label < len(names) else str(label)
        count, n, unsure = (int((part & rows).sum()) for part in (good, torch.ones_like(good), unknown))
        rates.append(ClassRate(label=label, name=name, rate=rate(count, n, unsure, each_of(len(labels)), interval=sheet.interval)))
    return rates
