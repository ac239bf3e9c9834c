"""The summary that a person reads in the terminal in a minute; right at 80 columns and without color."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from epsball.auditing.results import ModelReport, Report, Result
from epsball.report.text import UNION, clean, interval, percent, radius_of
from epsball.report.view import UNTRUSTED, Row, methods, notices, rows, trusted, whole

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text

# Widest cells: "100.0 %  [100.0, 100.0]" on one line, "[100.0, 100.0]" or "not trustworthy" on two; two columns of space each.
_ONE_LINE, _TWO_LINES, _ROW_NAME, _LONG_NAME = 25, 17, 18, 26
_STYLES = {"block": "bold red", "warn": "yellow", "mended": "cyan"}


def summary(report: Report) -> RenderableType:
    """What the report says: clean accuracies, all models side by side, then what to know before believing it.

    Returns something for `rich.console.Console.print`. Strings from outside are plain text in it: no markup, no escapes.
    """
    return _Summary(report)


class _Summary:
    """Lays itself out when the width is known."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        report, encoding = self._report, options.encoding
        yield from (_clean_line(model, encoding) for model in report.models)
        yield _text("", encoding)
        table = rows(report)
        names = [_name(row) for row in table]
        longest = min(_LONG_NAME, max([_ROW_NAME, *map(len, names)]))
        width = options.max_width - longest
        count = len(report.models)
        wide = count * _ONE_LINE <= width
        step = count if wide else max(1, width // _TWO_LINES)
        for start in range(0, count if table else 0, step):
            yield _table(report.models, table, range(start, min(start + step, count)), wide, longest, encoding)
        if table:
            line = "Upper bounds: right answers left after every attack that ran. [95 % interval]: sampling error only."
        else:
            line = "No threat was audited."
        yield _text(line, encoding, "dim")
        yield from (_text(sentence, encoding, "dim") for sentence in methods(report))
        yield from (_text(f"{clean(m.name, 60)}: {clean(m.stopped.message)}", encoding, "yellow") for m in report.models if m.stopped)
        if report.partial:
            yield _text("Interrupted: some results are missing or early; every number is still a valid upper bound.", encoding, "yellow")
        for model in report.models:
            yield from _remarks(model, encoding)


def _text(text: str, encoding: str, style: str = "") -> Text:
    """Plain text, never markup; what the terminal cannot encode is shown as an escape instead of ending the run."""
    from rich.text import Text

    return Text(text.encode(encoding, "backslashreplace").decode(encoding), style=style)


def _clean_line(model: ModelReport, encoding: str) -> Text:
    rate = model.clean_accuracy
    line = (
        f"{clean(model.name, 60)}: clean accuracy {percent(rate.value)} {interval(rate)} on {model.n:,} samples of {clean(model.data, 60)}"
    )
    if model.invalid:
        line += f"; {model.invalid:,} of them gave NaN or infinite outputs"
    return _text(line, encoding, "bold")


def _name(row: Row) -> str:
    if row.threat == UNION:
        return f"all of {clean(row.radius_text, 80).replace('|', ', ')}"
    return f"{clean(row.threat, 20)} {radius_of(row.threat, row.radius_text, 20)}"


def _table(models: list[ModelReport], table: list[Row], chosen: range, wide: bool, longest: int, encoding: str) -> Table:
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=None)
    grid.add_column(_text("robust accuracy", encoding), overflow="fold", min_width=10, max_width=longest)
    for index in chosen:
        grid.add_column(_text(clean(models[index].name, 40), encoding), justify="right", overflow="fold")
    last = ""
    for row in table:
        if last and row.threat != last:
            grid.add_section()
        last = row.threat
        grid.add_row(_text(_name(row), encoding), *(_cell(models[index], row.cells[index], wide, encoding) for index in chosen))
    return grid


def _cell(model: ModelReport, result: Result | None, wide: bool, encoding: str) -> Text:
    if result is None:
        return _text("not audited", encoding, "dim")
    if not trusted(model, result):
        return _text(UNTRUSTED, encoding, "bold red")
    rate = result.robust_accuracy
    bounds = f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
    cell = f"{percent(rate.value)}  {bounds:>13}" if wide else f"{percent(rate.value)}\n{bounds}"
    if whole(result):
        cell += f"\n{whole(result)}"
    if result.certified_accuracy is not None:
        cell += f"\ncertified {percent(result.certified_accuracy)}"
    return _text(cell, encoding)


def _remarks(model: ModelReport, encoding: str) -> Iterator[RenderableType]:
    """Block and warn flags, then preflight findings that did not simply pass: one entry each, hanging indent."""
    lines: list[tuple[str, str]] = []
    for notice in notices(model):
        flag = notice.flag
        if flag.severity != "info":
            place = f" at {notice.where}" if notice.where else ""
            lines.append((flag.severity, f"{clean(flag.id, 60)}{place}: {clean(flag.message)} {_fix(flag.fix)}".rstrip()))
    for finding in model.findings:
        if finding.status != "pass":
            lines.append((finding.status, f"preflight {clean(finding.id, 60)}: {clean(finding.message)}"))
    if not lines:
        return
    from rich.padding import Padding
    from rich.table import Table

    yield _text(f"\n{clean(model.name, 60)}", encoding, "bold")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for status, line in lines:
        grid.add_row(_text(status.upper(), encoding, _STYLES.get(status, "")), _text(line, encoding))
    yield Padding(grid, (0, 0, 0, 2))


def _fix(fix: str) -> str:
    return f"Fix: {clean(fix)}" if fix else ""
