"""SARIF: what stands in it, where, and what the standard and code hosts ask of it."""

from __future__ import annotations

import json

import pytest

from epsball.auditing.results import Finding, Flag, Rate
from epsball.cli.gate import below
from epsball.report import junit, sarif
from epsball.report.sarif import source_uri


def told(text: str):
    log = json.loads(text)
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-schema-2.1.0.json")
    (run,) = log["runs"]
    return run


def test_a_report_without_trouble_has_no_results_and_all_its_rates(build):
    report = build.report()
    run = told(sarif(report, None))
    assert run["results"] == run["tool"]["driver"]["rules"] == []
    assert run["tool"]["driver"]["version"] == "0.1.0"
    assert run["invocations"] == [{"executionSuccessful": True}]
    rates = [(m.name, r.threat, r.radius_text, r.value) for m in report.models for r in m.results]
    assert [(rate["model"], rate["threat"], rate["radius"], rate["value"]) for rate in run["properties"]["rates"]] == rates
    assert sarif(report, None) == sarif(report, None)


@pytest.mark.parametrize("bar", [0.3, 0.5, 0.99])
def test_the_same_radii_fail_as_in_junit(bar, build):
    report = build.report()
    results = told(sarif(report, bar))["results"]
    assert len(results) == junit(report, bar).count("<failure") > 0
    assert {(r["ruleId"], r["level"]) for r in results} == {("below-fail-under", "error")}
    below = [f"{m.name} {r.threat}:{r.radius_text}" for m in report.models for r in m.results if r.value < bar]
    assert [r["message"]["text"].partition(": ")[0] for r in results] == below


@pytest.mark.parametrize(("count", "n", "bar"), [(29, 100, 29.0), (290, 1000, 29.0), (573, 1000, 57.3), (7, 100, 7.0), (58, 100, 58.0)])
def test_exactly_at_the_bar_is_not_below_it_for_anybody(count, n, bar, build):
    at = build.result("linf", 0.1, "0.1", 0.5, robust_accuracy=Rate(value=count / n, low=0, high=1, count=count, n=n))
    one_less = build.result("linf", 0.1, "0.1", 0.5, robust_accuracy=Rate(value=(count - 1) / n, low=0, high=1, count=count - 1, n=n))
    for result, code in ((at, 0), (one_less, 1)):
        report = build.report(build.model("a", 1.0, results=[result]))
        assert below(report, bar) == code
        assert junit(report, bar / 100).count("<failure") == code
        assert len(told(sarif(report, bar / 100))["results"]) == code
    assert below(report, None) == 0


def test_an_untrusted_number_is_an_error_whatever_its_value(build):
    flag = Flag(id="random", severity="block", message="It draws.", fix="Freeze it.")
    report = build.report(build.model("a", 1.0, results=[build.result("linf", 0.1, "0.1", 0.99, trustworthy=False, flags=[flag])]))
    for bar in (None, 0.1, 1.0):
        (result,) = told(sarif(report, bar))["results"]
        assert (result["ruleId"], result["level"]) == ("not-trustworthy", "error")
        assert result["message"]["text"] == "a linf:0.1: It draws. Freeze it."
    assert told(sarif(report.model_copy(update={"partial": True}), None))["invocations"] == [{"executionSuccessful": False}]


def test_warnings_of_flags_and_of_the_preflight_are_warnings(build):
    results = [build.result("linf", 0.1, "0.1", 0.5, flags=[Flag(id="effort", severity="warn", message="More would.", fix="Do more.")])]
    quiet = [Finding(id="range", status="pass", message="fine"), Finding(id="eval-mode", status="mended", message="mended")]
    findings = [*quiet, Finding(id="batch", status="warn", message="It looks at its neighbors.")]
    model = build.model("a", 1.0, results=results, findings=findings, flags=[Flag(id="note", severity="info", message="By the way.")])
    run = told(sarif(build.report(model), 0.1))
    assert [(r["ruleId"], r["level"], r["message"]["text"]) for r in run["results"]] == [
        ("effort", "warning", "a linf 0.1: More would. Do more."),
        ("batch", "warning", "a: It looks at its neighbors."),
    ]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["batch", "effort"]


def test_fingerprints_stay_when_figures_move_and_differ_between_places(build):
    prints = [
        [r["partialFingerprints"]["epsball/v1"] for r in told(sarif(build.report(build.model("a", strength)), 1.0))["results"]]
        for strength in (1.0, 1.1)
    ]
    assert prints[0] == prints[1]
    assert len(set(prints[0])) == len(prints[0]) == 6


@pytest.mark.parametrize(
    ("source", "uri"),
    [
        ("nets/net.py:make", "nets/net.py"),
        ("./net.py:make", "net.py"),
        ("/home/me/net.py:make", "net.py"),
        ("../net.onnx", "net.onnx"),
        ("my nets/net.onnx", "my%20nets/net.onnx"),
        ("package.module:factory", "package.module"),
        ("digits-robust", "digits-robust"),
        ("python object net", "a"),
        ("https://host:80/v2/models/m?x=1", "a"),
    ],
)
def test_the_place_is_a_relative_uri(source, uri, build):
    assert source_uri(build.model("a", 1.0, source=source)) == uri


def test_hostile_strings_stay_harmless(build):
    text = sarif(build.hostile(), 0.9)
    run = told(text)
    assert len(run["results"]) >= 3
    assert all(r["message"]["text"].isprintable() and r["ruleId"].isprintable() for r in run["results"])
    assert all(r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].isascii() for r in run["results"])
    assert {r["ruleId"] for r in run["results"]} == {rule["id"] for rule in run["tool"]["driver"]["rules"]}
