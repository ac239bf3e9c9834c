"""What every rendering needs to know about a report: rows side by side, what to believe, what to say first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from epsball.auditing.results import Flag, ModelReport, Report, Result
from epsball.report.text import allowed, clean, interval, percent, radius_of

_ORDER = {"block": 0, "warn": 1, "info": 2}
UNTRUSTED = "not trustworthy yet"
LEAST = 0.05
"""Share of a data set from which on its finiteness is shown."""


@dataclass(frozen=True)
class Row:
    """One threat at one radius; one cell a model, None where that model was not audited there."""

    threat: str
    radius: float
    radius_text: str
    cells: tuple[Result | None, ...]


@dataclass(frozen=True)
class Notice:
    """One flag of a model, with every place it was raised at; `where` is empty when it concerns the whole model."""

    flag: Flag
    where: str


def rows(report: Report) -> list[Row]:
    """All threats in the order they were asked for, radii ascending, models side by side."""
    found: dict[str, dict[float, list[Result | None]]] = {}
    texts: dict[tuple[str, float], str] = {}
    for index, model in enumerate(report.models):
        for result in model.results:
            cells = found.setdefault(result.threat, {}).setdefault(result.radius, [None] * len(report.models))
            cells[index] = result
            texts.setdefault((result.threat, result.radius), result.radius_text)
    return [
        Row(threat, radius, texts[threat, radius], tuple(cells))
        for threat, radii in found.items()
        for radius, cells in sorted(radii.items())
    ]


def doubts(model: ModelReport, result: Result) -> list[str]:
    """Why a number may not be quoted, one sentence each; empty when it may.

    Distrust wins: a block anywhere (result, model, preflight) or `trustworthy=False` is enough.
    """
    blocks = [f"{flag.message} {flag.fix}".strip() for flag in (*result.flags, *model.flags) if flag.severity == "block"]
    blocks += [finding.message for finding in model.findings if finding.status == "block"]
    if not result.trustworthy and not blocks:
        blocks.append("the audit distrusts this number and recorded no reason.")
    return list(dict.fromkeys(blocks))


def trusted(model: ModelReport, result: Result) -> bool:
    """Whether the robust accuracy of this result may be quoted."""
    return not doubts(model, result)


def under(result: Result, bar: float) -> bool:
    """Whether robust accuracy is below the bar, a fraction; 573 of 1,000 is not below 57.3 %, however that rounds."""
    return result.robust_accuracy.value < bar - 1e-12


def fails(report: Report, bar: float | None) -> bool:
    """Some robust accuracy is below the bar, so that the run has its verdict whatever the others would have come to."""
    return bar is not None and any(under(result, bar) for model in report.models for result in model.results)


def undecided(model: ModelReport, result: Result, bar: float) -> str:
    """Why a number at or above the bar is no pass: attacks that did not run could have lowered it; empty where all ran."""
    if not result.early or under(result, bar):
        return ""
    return clean(model.stopped.message) if model.stopped else "The attacks ended early."


def methods(report: Report) -> list[str]:
    """How the intervals are to be read, a sentence for each kind that the report holds."""
    rates = [result.robust_accuracy for model in report.models for result in model.results]
    found = {rate.interval for rate in rates}
    sentences = []
    if "at-any-time" in found:
        sentences.append(
            "Samples were added in random order until enough was known, so the intervals of these rates hold at any time, with 95 % "
            "however often one looks; they are wider than intervals for a number of samples chosen beforehand."
        )
    if any(whole(result) for model in report.models for result in model.results):
        sentences.append(
            "The other interval is for the whole data set that the samples were drawn from, which is finite (hypergeometric, 95 %)."
        )
    return sentences


def whole(result: Result) -> str:
    """The interval for the whole data set in words, where so much of it was drawn (5 %) that it differs from that of a large one."""
    rate = result.whole_data
    return "" if rate is None or rate.n < LEAST * (rate.population or rate.n) else f"{interval(rate)} of all {rate.population:,}"


def headline(report: Report) -> Row | None:
    """The row that speaks for the report: the first threat, its middle radius (the upper one of two). A fixed rule, no picking."""
    table = rows(report)
    first = [row for row in table if row.threat == table[0].threat]
    return first[len(first) // 2] if first else None


def verdict(model: ModelReport, result: Result | None, image: bool) -> str:
    """The result in one plain sentence, or why there is none."""
    if result is None:
        return "Not audited under this threat."
    reasons = doubts(model, result)
    if reasons:
        return f"Not trustworthy yet: {clean(reasons[0])}"
    rate = result.robust_accuracy
    what = allowed(result.threat, result.radius_text, image)
    sentence = (
        f"At most {percent(rate.value)} of inputs (95 % interval {100 * rate.low:.1f} to {100 * rate.high:.1f}"
        f" from {rate.n:,} samples) keep the right answer when {what}."
    )
    if result.certified_accuracy is not None:
        sentence += f" At least {percent(result.certified_accuracy)} provably do."
    return sentence


def lowest(model: ModelReport) -> Result | None:
    """The trustworthy result with the lowest robust accuracy."""
    return min((r for r in model.results if trusted(model, r)), key=lambda r: r.robust_accuracy.value, default=None)


def notices(model: ModelReport) -> list[Notice]:
    """All flags of a model, gravest first; one that was raised alike at several radii is told once."""
    places: dict[tuple[str, str, str, str], list[str]] = {}
    for flag, where in _flags(model):
        listed = places.setdefault((flag.severity, flag.id, flag.message, flag.fix), [])
        if where and where not in listed:
            listed.append(where)
    found = [
        Notice(Flag.model_validate({"severity": key[0], "id": key[1], "message": key[2], "fix": key[3]}), ", ".join(listed))
        for key, listed in places.items()
    ]
    return sorted(found, key=lambda notice: _ORDER[notice.flag.severity])


def _flags(model: ModelReport) -> Iterator[tuple[Flag, str]]:
    yield from ((flag, "") for flag in model.flags)
    for result in model.results:
        yield from ((flag, f"{clean(result.threat, 40)} {radius_of(result.threat, result.radius_text)}") for flag in result.flags)


def class_names(model: ModelReport) -> dict[int, str]:
    """Label -> name, from every per-class table of the model."""
    tables = [model.clean_per_class, *(result.per_class for result in model.results)]
    return {row.label: row.name for table in reversed(tables) for row in table}
