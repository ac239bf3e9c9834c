"""`epsball compare`: two finished runs, sample by sample."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from epsball.auditing.compare import Comparison, Row, Side

EXAMPLES = (
    "Examples: epsball compare runs/main runs/branch --fail-if-worse | epsball compare runs/first runs/first --model-a net --model-b net2"
)


def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="Folder of a run: the one to compare with.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Folder of a run; the same one compares two of its models.")],
    model_a: Annotated[str | None, typer.Option(metavar="NAME", help="Model of RUN_A, where it has several.")] = None,
    model_b: Annotated[str | None, typer.Option(metavar="NAME", help="Model of RUN_B, where it has several.")] = None,
    fail_if_worse: Annotated[
        bool,
        typer.Option("--fail-if-worse", help="Exit 1 if B is significantly worse at any radius (5 % in all), or a number is not trusted."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")] = False,
) -> None:
    """Say whether model B is more or less robust than A, on the samples of both: paired differences and exact McNemar tests."""
    from epsball.auditing.compare import compare as paired
    from epsball.cli import EXIT_BELOW

    found = paired(_side(run_a, model_a, "--model-a"), _side(run_b, model_b, "--model-b"))
    if as_json:
        sys.stdout.write(json.dumps(_plain(found, run_a, run_b)) + "\n")
    else:
        for line in _lines(found):
            typer.echo(line)
    raise typer.Exit(EXIT_BELOW if fail_if_worse and found.worse else 0)


def _side(run: Path, name: str | None, option: str) -> Side:
    from epsball import report
    from epsball.auditing.compare import side
    from epsball.store import evidence

    arrays, _ = evidence.read(run / evidence.NAME)
    return side(str(run), report.read_json(run / "report.json"), arrays, name, option)


def _plain(found: Comparison, run_a: Path, run_b: Path) -> dict[str, object]:
    rows = [{**asdict(row), "worse": row.worse} for row in found.rows]
    sides = {"a": {"run": str(run_a), "model": found.a}, "b": {"run": str(run_b), "model": found.b}}
    return {**sides, "paired": found.paired, "clean": asdict(found.clean), "rows": rows, "worse": found.worse, "notes": list(found.notes)}


def _lines(found: Comparison) -> list[str]:
    from epsball.report.text import clean

    head = f"{'accuracy':22}{'A':>8}{'B':>8}   {'B - A in points, 95 %':26}{'only A':>7}{'only B':>8}  {'p':>8}"
    lines = [f"A: {clean(found.a, 60)}   B: {clean(found.b, 60)}   {found.paired:,} samples of both", "", head]
    lines += [_line(found.clean, found.clean.p), *(_line(row, row.p_adjusted) for row in found.rows)]
    lines += ["", "p: exact McNemar; of robust accuracies adjusted for all radii together (Holm). Upper bounds, as in the reports."]
    return [*lines, *(clean(note) for note in found.notes)]


def _line(row: Row, p: float) -> str:
    from epsball.report.text import clean, radius_of

    name = "clean" if row.threat == "clean" else f"{clean(row.threat, 12)} {radius_of(row.threat, row.radius_text, 12)}"
    difference = f"{100 * row.difference:+6.1f}  [{100 * row.low:+.1f}, {100 * row.high:+.1f}]"
    verdict = "" if p > 0.05 else "  B worse" if row.only_a > row.only_b else "  B better"
    shown = f"{p:8.4f}" if p >= 0.0001 else " <0.0001"
    return f"{name:22}{100 * row.a:8.1f}{100 * row.b:8.1f}   {difference:26}{row.only_a:7}{row.only_b:8}  {shown}{verdict}"
