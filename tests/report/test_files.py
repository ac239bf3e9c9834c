import json
import os
import stat
from xml.etree import ElementTree

import pytest

from epsball.auditing.results import Report
from epsball.errors import BadInput, EpsballError
from epsball.report import junit, read_json, write_json


def test_json_survives_a_round_trip_to_the_last_bit(build, tmp_path):
    report = build.report(build.model("a", 1.0, results=[build.result("linf", 8 / 255, "8/255", 1 / 3)]))
    path = tmp_path / "report.json"
    write_json(report, path)
    assert read_json(path) == report
    first = path.read_bytes()
    write_json(read_json(path), path)
    assert path.read_bytes() == first
    assert first.endswith(b"}\n")
    assert list(json.loads(first)) == sorted(json.loads(first))
    assert os.listdir(tmp_path) == ["report.json"]


def test_hostile_strings_survive_as_they_are(build, tmp_path):
    path = tmp_path / "report.json"
    write_json(build.hostile(), path)
    assert path.read_bytes().isascii()
    assert read_json(path).models[0].name == build.evil


def test_the_file_follows_the_umask(build, tmp_path):
    old = os.umask(0o027)
    try:
        write_json(build.report(), tmp_path / "report.json")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "report.json").stat().st_mode) == 0o640


def test_nan_is_refused_and_leaves_the_old_file(build, tmp_path):
    path = tmp_path / "report.json"
    write_json(build.report(), path)
    before = path.read_bytes()
    with pytest.raises(EpsballError, match="JSON cannot"):
        write_json(build.report(seconds=float("nan")), path)
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_written_is_one_line(build, tmp_path):
    with pytest.raises(BadInput, match="cannot write") as caught:
        write_json(build.report(), tmp_path / "none" / "report.json")
    assert "\n" not in str(caught.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadInput, match="cannot write"):
        write_json(build.report(), tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read"),
        (b"", "damaged"),
        (b"{", "damaged"),
        (b"\xff\xfe\xfa", "damaged"),
        (b"[" * 200_000, "damaged"),
        (b"[]", "does not fit"),
        (b"{}", "does not fit"),
        (b'{"models": [], "seed": 0, "run": "r", "seconds": NaN}', "NaN"),
        (b'{"schema_version": 99}', "upgrade"),
        (b'{"models": [], "seed": 0, "run": "r", "\\u001b[2J\\u202e": 1}', "does not fit"),
    ],
)
def test_unreadable_reports_are_one_line(tmp_path, content, said):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=said) as caught:
        read_json(path)
    assert str(caught.value).isprintable()


def test_a_folder_is_not_a_report(tmp_path):
    with pytest.raises(BadInput, match=r"report\.json of a run"):
        read_json(tmp_path)


def test_junit_has_a_case_for_each_model_threat_and_radius(build):
    report = build.report()
    root = ElementTree.fromstring(junit(report, 0.5))
    for suite, model in zip(root.iter("testsuite"), report.models, strict=True):
        cases = list(suite.iter("testcase"))
        assert [case.get("name") for case in cases] == [f"{r.threat}:{r.radius_text}" for r in model.results]
        failed = [case.find("failure") is not None for case in cases]
        assert failed == [r.robust_accuracy.value < 0.5 for r in model.results]
        assert suite.get("failures") == str(sum(failed))
    assert junit(report, 0.5) == junit(report, 0.5)
    assert "<failure" not in junit(report, None)


def test_junit_reports_an_untrusted_number_as_an_error_whatever_its_value(build):
    result = build.result("linf", 0.1, "0.1", 0.99, trustworthy=False)
    report = build.report(build.model("a", 1.0, results=[result]))
    for limit in (None, 0.1):
        root = ElementTree.fromstring(junit(report, limit))
        assert root.find("testsuite").get("errors") == "1"
        assert "not trustworthy yet" in root.find(".//error").get("message")


def test_junit_of_hostile_strings_is_well_formed(build):
    text = junit(build.hostile(), 0.5)
    ElementTree.fromstring(text.encode("utf-8"))
    assert "\x1b" not in text


def test_the_documented_schema_is_the_schema():
    from pathlib import Path

    documented = Path(__file__).parents[2] / "docs" / "report.schema.json"
    assert json.loads(documented.read_text()) == Report.model_json_schema()
