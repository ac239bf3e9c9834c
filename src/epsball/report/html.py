"""One self-contained HTML page: no script, no remote asset, every string escaped; the same inputs give the same bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from epsball.auditing.results import ClassRate, ModelReport, Report, Result
from epsball.report import gallery, svg
from epsball.report.files import write_atomic
from epsball.report.text import UNION, clean, duration, interval, percent, radius_of, symbol, unit
from epsball.report.view import Row, doubts, headline, lowest, methods, notices, rows, trusted, verdict, whole

_TOO_FEW, _MOST_CLASSES = 30, 20
_WORDS = {0: "no", 2: "two", 3: "three", 4: "four", 5: "five"}


def render(report: Report, evidence: Path | None = None) -> str:
    """The whole page as text.

    Args:
        report: what the audit found.
        evidence: the evidence file for the gallery; None, missing or damaged loses the gallery and nothing else.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("epsball.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, interval=interval, duration=duration, symbol=symbol, short=clean, tight=_tight, within=_within, whole=whole
    )
    return environment.get_template("report.html.j2").render(**_context(report, gallery.load(report, evidence))) + "\n"


def write(report: Report, evidence: Path | None, path: Path) -> None:
    """Render and write atomically.

    Raises:
        BadInput: the file cannot be written.
    """
    write_atomic(path, render(report, evidence))


def _finalize(value: Any) -> Any:
    """Every plain string that reaches the page loses its hidden characters; autoescape then does the rest."""
    return clean(value) if type(value) is str else value


def _tight(text: str) -> Any:
    """Keep every number on one line with its percent sign."""
    from markupsafe import escape

    return _safe(re.sub(r"([\d.]+ %)", r'<span class="nw">\1</span>', str(escape(clean(text)))))


def _safe(markup: str) -> Any:
    """Mark what this package built and escaped itself as not to be escaped again."""
    from markupsafe import Markup

    return Markup(markup)


def _context(report: Report, pictures: gallery.Gallery) -> dict[str, Any]:
    table = rows(report)
    spoken = headline(report)
    images = pictures.image or (False,) * len(report.models)
    return {
        "report": report,
        "title": _title(report),
        "table": [_table_row(report, row) for row in table],
        "spoken": spoken,
        "models": [_model(report, index, spoken, images[index]) for index in range(len(report.models))],
        "charts": _charts(report, table),
        "gallery": pictures,
        "certified": any(r.certified_accuracy is not None and trusted(m, r) for m in report.models for r in m.results),
        "methods": methods(report),
        "stopped": [(model.name, model.stopped.message) for model in report.models if model.stopped],
        "samples": {f"{model.n:,} samples of {clean(model.data, 60)}": None for model in report.models},
    }


def _within(result: Row | Result) -> str:
    """A row's or result's radius with its unit; of a union, all that it is of."""
    if result.threat == UNION:
        return clean(result.radius_text, 200).replace("|", ", ")
    return radius_of(result.threat, result.radius_text)


def _title(report: Report) -> str:
    if len(report.models) == 1:
        return f"How robust is {clean(report.models[0].name, 80)}, really?"
    count = len(report.models)
    return f"How robust are these {_WORDS.get(count, count)} models, really?"


def _table_row(report: Report, row: Row) -> dict[str, Any]:
    cells = [
        {"result": result, "trusted": result is not None and trusted(model, result)}
        for model, result in zip(report.models, row.cells, strict=True)
    ]
    return {"threat": row.threat, "within": _within(row), "cells": cells}


def _model(report: Report, index: int, spoken: Row | None, image: bool) -> dict[str, Any]:
    model = report.models[index]
    result = spoken.cells[index] if spoken else None
    believed = result is not None and trusted(model, result)
    return {
        "data": model,
        "color": svg.color(index),
        "icon": _safe(svg.icon(index)),
        "result": result,
        "believed": believed,
        "doubts": doubts(model, result) if result else [],
        "verdict": verdict(model, result, image),
        "meter": _safe(_meter(model, index, result if believed else None, 214 if len(report.models) < 3 else 106)),
        "lowest": lowest(model),
        "untrusted": sum(not trusted(model, r) for r in model.results),
        "notices": notices(model),
        "odd": [finding for finding in model.findings if finding.status != "pass"],
        "passed": [finding for finding in model.findings if finding.status == "pass"],
        "classes": _classes(model, index, result),
        "cascade": [r for r in model.results if r.attacks],
    }


def _meter(model: ModelReport, index: int, result: Result | None, span: float) -> str:
    rate = model.clean_accuracy
    shown = [svg.Bar("clean", rate.value, rate.low, rate.high, interval(rate), muted=True)]
    if result:
        rate = result.robust_accuracy
        shown.append(svg.Bar("attacked", rate.value, rate.low, rate.high, interval(rate)))
    said = "; ".join(f"{bar.name} {percent(bar.value)} {bar.note}" for bar in shown)
    return svg.bars(f"meter{index}", f"{clean(model.name, 80)}: accuracy", said, shown, index, (66, span, 150))


def _charts(report: Report, table: list[Row]) -> list[dict[str, Any]]:
    charts = []
    for number, threat in enumerate(dict.fromkeys(row.threat for row in table if row.threat != UNION)):  # which has no radius to draw
        own = [row for row in table if row.threat == threat]
        series = [_series(model, index, [row.cells[index] for row in own]) for index, model in enumerate(report.models)]
        series = [curve for curve in series if curve.points[1:] or curve.floor]
        ticks = [(0.0, "0"), *((row.radius, row.radius_text) for row in own if row.radius > 0)]
        said = "Robust accuracy falls from the clean accuracy at radius 0; the numbers are in the table of results."
        axis = f"radius ({unit(threat)})" if unit(threat) else "radius"
        drawn = svg.line_chart(f"chart{number}", f"Robust accuracy against {symbol(threat)} radius", said, series, ticks, axis)
        charts.append({"threat": threat, "svg": _safe(drawn)})
    return charts


def _series(model: ModelReport, index: int, cells: list[Result | None]) -> svg.Series:
    start = model.clean_accuracy
    points = [svg.Point(0.0, start.value, start.low, start.high)]
    floor = []
    for result in cells:
        if result is None:
            continue
        rate = result.robust_accuracy
        if result.radius > 0:
            points.append(svg.Point(result.radius, rate.value, rate.low, rate.high, trusted(model, result)))
        if result.certified_accuracy is not None and trusted(model, result):
            floor.append((result.radius, result.certified_accuracy))
    return svg.Series(model.name, index, tuple(points), tuple(floor))


def _classes(model: ModelReport, index: int, preferred: Result | None) -> dict[str, Any] | None:
    """Per-class bars where the headline stands, else at the first trustworthy result that has classes."""
    chosen = next((r for r in (preferred, *model.results) if r and r.per_class and trusted(model, r)), None)
    if chosen is None:
        return None
    ranked = list(chosen.per_class)
    left_out = max(0, len(ranked) - _MOST_CLASSES)
    if left_out:
        ranked = sorted(ranked, key=lambda row: (row.rate.value, row.label))[:_MOST_CLASSES]
    before = {row.label: row.rate.value for row in model.clean_per_class}
    shown = [_class_bar(row, before.get(row.label)) for row in ranked]
    said = "; ".join(f"{clean(bar.name, 40)} {percent(bar.value)}" for bar in shown)
    drawn = svg.bars(f"classes{index}", f"{clean(model.name, 80)}: robust accuracy per class", said, shown, index)
    return {"result": chosen, "svg": _safe(drawn), "left_out": left_out, "few": any(row.rate.n < _TOO_FEW for row in ranked)}


def _class_bar(row: ClassRate, before: float | None) -> svg.Bar:
    rate = row.rate
    note = f"too few: {rate.n}" if rate.n < _TOO_FEW else f"of {rate.n:,}"
    return svg.Bar(row.name or str(row.label), rate.value, rate.low, rate.high, note, tick=before, muted=rate.n < _TOO_FEW)
