"""What a pipeline reads of a report: JUnit, SARIF and the bar that robust accuracy has to reach."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from epsball.auditing.results import Report

FailUnder = Annotated[
    float | None,
    typer.Option(metavar="PERCENT", min=0, max=100, help="Exit 1 if any robust accuracy is below; stop as soon as one surely is."),
]
Junit = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write JUnit XML, for CI.")]
Sarif = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write SARIF 2.1.0, for code scanning.")]


def write_findings(done: Report, fail_under: float | None, junit: Path | None, sarif: Path | None) -> None:
    """Writes the files that were asked for.

    Args:
        done: the report. fail_under: percent. junit, sarif: where to.

    Raises:
        BadInput: one cannot be written.
    """
    from epsball import report
    from epsball.report.files import write_atomic

    bar = None if fail_under is None else fail_under / 100
    for path, render in ((junit, report.junit), (sarif, report.sarif)):
        if path is not None:
            write_atomic(path, render(done, bar))


def exit_code(done: Report, fail_under: float | None) -> int:
    """What a fresh run leaves with: an interrupted one has no verdict."""
    from epsball.cli import EXIT_INTERRUPTED

    return EXIT_INTERRUPTED if done.partial else below(done, fail_under)


def below(done: Report, fail_under: float | None) -> int:
    """1 if any robust accuracy is below `fail_under` percent, not trustworthy, or of a run that ended early; 0 without a bar.

    Attacks that did not run could have lowered a number, so one above the bar is a pass only where all of them did.
    """
    from epsball.cli import EXIT_BELOW
    from epsball.report.view import under

    if fail_under is None:
        return 0
    results = [result for model in done.models for result in model.results]
    return EXIT_BELOW if any(not result.trustworthy or result.early or under(result, fail_under / 100) for result in results) else 0
