"""SARIF 2.1.0, the format in which code hosts show findings of analysis tools beside the code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import quote

from epsball.auditing.results import ModelReport, Report
from epsball.report.text import clean, interval, percent
from epsball.report.view import doubts, fails, notices, undecided, under

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
Level = Literal["error", "warning"]
BELOW, UNTRUSTED, UNDECIDED = "below-fail-under", "not-trustworthy", "ended-early"
RULES = {
    BELOW: "Robust accuracy is below the bar that was set.",
    UNDECIDED: "Attacks that did not run could have lowered the number below the bar that was set.",
    UNTRUSTED: "The audit distrusts its own number, so there is no verdict to pass or fail.",
}


def sarif(report: Report, fail_under: float | None) -> str:
    """SARIF 2.1.0 (OASIS 2020, errata 01): one result for each thing that somebody has to act on; none when all is well.

    Args:
        report: what the audit found.
        fail_under: fraction in [0, 1]; a robust accuracy below it is an error. None: there is no bar.

    Errors are robust accuracies below the bar and numbers that are not trustworthy, as in JUnit; warnings are the warnings of the report.
    Every rate stands in the properties of the run. Results are placed at the file of the model, where it has one, so that
    they do not move when the audit is repeated; their fingerprints depend on model, threat, radius and rule alone.
    """
    results = [_result(model, *found) for model in report.models for found in _found(model, fail_under, fails(report, fail_under))]
    rules = {result["ruleId"]: result["level"] for result in results}
    driver = {
        "name": "epsball",
        "rules": [_rule(name, level) for name, level in sorted(rules.items())],
        **({"version": report.versions["epsball"]} if "epsball" in report.versions else {}),
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": not report.partial}],
        "results": results,
        "properties": {"seed": report.seed, "effort": report.effort, "rates": [rate for m in report.models for rate in _rates(m)]},
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, sort_keys=True) + "\n"


def _found(model: ModelReport, fail_under: float | None, failed: bool) -> Iterator[tuple[str, Level, str, str]]:
    """(rule, level, where, sentence) of everything to act on; `failed`: the run has its verdict."""
    for result in model.results:
        where, rate = f"{result.threat}:{result.radius_text}", result.robust_accuracy
        if reasons := doubts(model, result):
            yield UNTRUSTED, "error", where, " ".join(reasons)
        elif fail_under is not None and under(result, fail_under):
            said = f"Robust accuracy is at most {percent(rate.value)} (95 % interval {interval(rate)}, {rate.count} of {rate.n})"
            yield BELOW, "error", where, f"{said}, below {percent(fail_under)}."
        elif fail_under is not None and (why := undecided(model, result, fail_under)) and not failed:
            yield UNDECIDED, "error", where, why
    for notice in notices(model):
        if notice.flag.severity == "warn":
            yield notice.flag.id, "warning", notice.where, f"{notice.flag.message} {notice.flag.fix}".strip()
    flagged = {flag.id for flag in model.flags}
    for finding in model.findings:
        if finding.status == "warn" and finding.id not in flagged:
            yield finding.id, "warning", "", finding.message


def _rule(name: str, level: str) -> dict[str, Any]:
    text = RULES.get(name, f"The audit's check '{clean(name)}' warns.")
    page = {"text": f"docs/flags/{clean(name)}.md says what was computed, what it usually means and what to do."}
    return {"id": clean(name), "shortDescription": {"text": text}, "help": page, "defaultConfiguration": {"level": level}}


def _result(model: ModelReport, rule: str, level: Level, where: str, sentence: str) -> dict[str, Any]:
    place = f"{model.name} {where}".rstrip()
    print_ = hashlib.sha256("\n".join((model.name, where, rule)).encode("utf-8", "backslashreplace")).hexdigest()
    return {
        "ruleId": clean(rule),
        "level": level,
        "message": {"text": clean(f"{place}: {sentence}")},
        "locations": [{"physicalLocation": {"artifactLocation": {"uri": source_uri(model)}, "region": {"startLine": 1}}}],
        "partialFingerprints": {"epsball/v1": print_},
    }


def source_uri(model: ModelReport) -> str:
    """The model's file as a relative URI, for an absolute path its last part; a name for models that are no file."""
    path = PurePosixPath(model.source.replace("\\", "/"))
    if model.source.startswith(("http://", "https://", "python object")):
        return quote(clean(model.name, 60).replace("/", "-"))
    file = path.name.partition(":")[0]
    parent = "" if path.is_absolute() or ".." in path.parts or ":" in str(path.parent) else f"{path.parent}/".removeprefix("./")
    return quote(clean(parent + file))


def _rates(model: ModelReport) -> Iterator[dict[str, Any]]:
    for result in model.results:
        rate = result.robust_accuracy
        yield {
            "model": clean(model.name),
            "threat": clean(result.threat),
            "radius": clean(result.radius_text),
            "value": rate.value,
            "low": rate.low,
            "high": rate.high,
            "interval": rate.interval,
            "trustworthy": not doubts(model, result),
        }
