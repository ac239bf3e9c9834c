"""Robustness as a test: `assert_robust` in pytest, unittest or a plain script."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from epsball.auditing.results import ModelReport, Report, Result
from epsball.auditing.statistics import clopper_pearson
from epsball.door import Data, Model, audit
from epsball.errors import BadInput
from epsball.report import clean
from epsball.report.text import percent
from epsball.report.view import doubts


def assert_robust(
    model: Model | Mapping[str, Model],
    data: Data,
    threat: str | Sequence[str] = "linf:8/255",
    at_least: float = 0.4,
    *,
    n: int | None = None,
    effort: str = "fast",
    confidence: float = 0.95,
    seed: int = 0,
    out: str | Path | None = None,
) -> Report:
    """Audits a model and fails where it is surely less robust than it should be.

    A radius fails where the upper end of the two-sided Clopper-Pearson interval of its robust accuracy is below `at_least`: then the
    true robust accuracy is too low, sampling error included, and a stronger attack could only lower it. Few samples make a wide interval,
    so little fails; the stricter gate is the attacked share itself: `assert report.robust_accuracy["linf", 8 / 255].value >= 0.4`.
    A number that the audit itself does not trust fails whatever its value.

    Args:
        model, data, threat, n, effort, seed: as for `epsball.audit`; every radius has to pass. at_least: fraction in [0, 1].
        confidence: of the interval, in (0, 1). out: folder that keeps report and evidence; None throws them away.

    Returns:
        The report, for further assertions.

    Raises:
        AssertionError: one line for each model, threat and radius that fails, with its figures. KeyboardInterrupt: interrupted.
        BadInput: in one line, whatever cannot be used.
    """
    __tracebackhide__ = True
    if not 0 <= at_least <= 1:
        raise BadInput(f"at_least: {at_least!r}: is a fraction: give a number from 0 to 1, as 0.4 for 40 %")
    if not 0 < confidence < 1:
        raise BadInput(f"confidence: {confidence!r}: give a number between 0 and 1, as 0.95")
    with tempfile.TemporaryDirectory(prefix="epsball-") as folder:
        report = audit(model, data, threat, effort=effort, seed=seed, n=n, out=folder if out is None else out)
    if report.partial and not any(finding.id == "raised" for told in report.models for finding in told.findings):
        raise KeyboardInterrupt  # the audit kept what it had; a test has no use for that
    failed = [line for told in report.models for result in told.results if (line := _failure(told, result, at_least, confidence))]
    if failed:
        again = "" if out is None else f" ({clean(str(out))}/report.html)"
        raise AssertionError("\n".join(failed) + again)
    return report


def _failure(model: ModelReport, result: Result, at_least: float, confidence: float) -> str:
    """Why this radius fails; empty where it does not."""
    place, rate = f"{clean(model.name)} {result.threat}:{result.radius_text}", result.robust_accuracy
    if reasons := doubts(model, result):
        return f"{place}: not trustworthy: {' '.join(clean(reason) for reason in reasons)}"
    high = clopper_pearson(rate.count + rate.unknown, rate.n, confidence)[1]
    if high >= at_least:
        return ""
    return (
        f"{place}: robust accuracy is at most {percent(rate.value)} ({rate.count} of {rate.n}), "
        f"with {100 * confidence:g} % confidence below {percent(high)}, and should be at least {percent(at_least)}"
    )
