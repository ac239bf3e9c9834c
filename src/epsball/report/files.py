"""Reports on disk: JSON that survives a round trip, JUnit for continuous integration, and the one atomic way to write."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import NoReturn
from xml.etree import ElementTree

from pydantic import ValidationError

from epsball.auditing.results import SCHEMA_VERSION, ModelReport, Report, Result
from epsball.errors import BadInput, EpsballError
from epsball.report.text import clean, interval, percent
from epsball.report.view import UNTRUSTED, doubts, fails, undecided, under


def write_atomic(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the whole new one, never a part.

    Raises:
        BadInput: the folder is missing or cannot be written.
    """
    path = Path(path)
    # A name of our own rather than mkstemp: mkstemp gives mode 0600 and the report should follow the user's umask.
    temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as stream:
            stream.write(text.encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"cannot write {clean(str(path))}: {error.strerror or error}; give a folder that exists and is writable") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(report: Report, path: Path) -> None:
    """Write `report.json`: sorted keys, two spaces, ASCII only, a newline at the end; the same report gives the same bytes.

    Raises:
        EpsballError: the report holds NaN or an infinite number.
        BadInput: the file cannot be written.
    """
    try:
        # Not pydantic's own serializer: it refuses names with lone surrogates, which file names may hold.
        text = json.dumps(report.model_dump(), sort_keys=True, indent=2, allow_nan=False)
    except ValueError as error:
        raise EpsballError(f"the report holds a number that JSON cannot: {error}") from error
    write_atomic(path, text + "\n")


def read_json(path: Path) -> Report:
    """Read a report back.

    Raises:
        BadInput: the file is missing, damaged, of another kind, or written by a newer epsball.
    """
    shown = clean(str(path))
    try:
        data = json.loads(Path(path).read_bytes(), parse_constant=_refuse)
    except OSError as error:
        raise BadInput(f"cannot read the report {shown}: {error.strerror or error}; give the report.json of a run") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the report {shown} is damaged: {clean(str(error), 200)}; run the audit again") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BadInput(f"the report {shown} has schema_version {version}, this epsball reads up to {SCHEMA_VERSION}; upgrade epsball")
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "top level"
        raise BadInput(f"the report {shown} does not fit the schema: {clean(place, 120)}: {clean(first['msg'], 160)}") from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}, which no report may")


def junit(report: Report, fail_under: float | None) -> str:
    """JUnit XML: one suite a model, one test case a threat and radius.

    Args:
        report: what the audit found.
        fail_under: fraction in [0, 1]; a robust accuracy below it is a failure. None: only untrusted numbers are reported.

    A number that is not trustworthy is an error, whatever its value: there is no verdict to pass or fail. So is one at or above the bar
    whose attacks a budget cut short; where another number of the run fails, it is skipped.
    """
    root = ElementTree.Element("testsuites", name="epsball")
    for model in report.models:
        suite = ElementTree.SubElement(root, "testsuite", name=clean(model.name), tests=str(len(model.results)))
        if report.started:
            suite.set("timestamp", clean(report.started))
        properties = ElementTree.SubElement(suite, "properties")
        facts = {"seed": str(report.seed), "effort": report.effort, "data": model.data, "partial": str(report.partial).lower()}
        for name, value in (facts | {f"version {k}": v for k, v in sorted(report.versions.items())}).items():
            ElementTree.SubElement(properties, "property", name=clean(name), value=clean(value))
        kinds = [_case(suite, model, result, fail_under, fails(report, fail_under)) for result in model.results]
        suite.set("failures", str(kinds.count("failure")))
        suite.set("errors", str(kinds.count("error")))
        suite.set("skipped", str(kinds.count("skipped")))
        suite.set("time", f"{sum(result.seconds for result in model.results):.3f}")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(suite: ElementTree.Element, model: ModelReport, result: Result, fail_under: float | None, failed: bool) -> str:
    name = f"{clean(result.threat)}:{clean(result.radius_text)}"
    case = ElementTree.SubElement(suite, "testcase", classname=clean(model.name), name=name, time=f"{result.seconds:.3f}")
    rate = result.robust_accuracy
    reasons = doubts(model, result)
    if reasons:
        text = f"{UNTRUSTED}: {clean(reasons[0])}"
        ElementTree.SubElement(case, "error", type="untrusted", message=text).text = "\n".join(clean(reason) for reason in reasons)
        return "error"
    said = f"robust accuracy at most {percent(rate.value)} (95 % interval {interval(rate)}, {rate.count} of {rate.n})"
    if fail_under is not None and under(result, fail_under):
        ElementTree.SubElement(case, "failure", type="below-fail-under", message=f"{said} is below {percent(fail_under)}")
        return "failure"
    if fail_under is not None and (why := undecided(model, result, fail_under)):
        kind = "skipped" if failed else "error"
        ElementTree.SubElement(case, kind, {"type": "undecided", "message": f"{said}. {why}"})
        return kind
    ElementTree.SubElement(case, "system-out").text = said
    return "pass"
