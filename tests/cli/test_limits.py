"""Budgets, early stopping and unions on the command line: exit codes, sentences, files for pipelines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from epsball.auditing.results import Report
from epsball.cli import main
from epsball.cli.limits import points

AUDIT = ["audit", "digits-standard", "--effort", "fast", "-n", "20"]


def read(run: Path) -> Report:
    return Report.model_validate_json((run / "report.json").read_bytes())


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_a_budget_is_told_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*AUDIT, "-t", "linf:0.05", "--max-forwards", "300", "-o", f"{tmp_path}/run"]) == 0
    out, err = (flat(text) for text in capsys.readouterr())
    assert re.search(r"The attacks take at most about .* and [\d,]+ rows forward", err)
    assert re.search(r"The budget holds \d+% of that for sure", err)
    assert "Stopped early: the budget of 300 rows forward was spent." in out
    assert "WARN budget" in out
    assert "this run ended early, as asked" in out
    assert read(tmp_path / "run").settings["max_forwards"] == "300"
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf8")
    assert "the budget of 300 rows forward was spent" in page
    assert main(["verify", f"{tmp_path}/run"]) == 0


def test_a_budget_that_is_enough_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*AUDIT, "-t", "linf:0.05", "--max-forwards", "99999999", "--max-seconds", "99999", "-o", f"{tmp_path}/run"]) == 0
    out, err = (flat(text) for text in capsys.readouterr())
    assert "The budget is enough." in err
    assert "Stopped early" not in out


def test_what_a_budget_cut_short_never_passes_the_bar(tmp_path: Path) -> None:
    files = ["--junit", f"{tmp_path}/j.xml", "--sarif", f"{tmp_path}/s.sarif"]
    arguments = [*AUDIT, "-t", "linf:0.01", "--fail-under", "10", "-o", f"{tmp_path}/run"]
    assert main(arguments) == 0
    assert main([*arguments, "--max-forwards", "300", *files]) == 1
    assert read(tmp_path / "run").models[0].results[0].value > 0.1
    suite = ElementTree.parse(tmp_path / "j.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("failures"), suite.get("errors"), suite.get("skipped")) == ("0", "1", "0")
    found = json.loads((tmp_path / "s.sarif").read_text())["runs"][0]["results"]
    assert [one["ruleId"] for one in found if one["level"] == "error"] == ["ended-early"]
    assert main(["report", f"{tmp_path}/run", "--fail-under", "10"]) == 1
    assert main(["report", f"{tmp_path}/run"]) == 0


def test_a_failed_bar_ends_the_run_and_says_what_that_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--junit", f"{tmp_path}/j.xml", "--sarif", f"{tmp_path}/s.sarif"]
    assert main([*AUDIT, "-t", "linf:0.01,0.1", "--fail-under", "60", *files, "-o", f"{tmp_path}/run"]) == 1
    out = flat(capsys.readouterr().out)
    assert "Stopped early: linf:0.1 surely fails the bar of 60 %" in out
    assert "the whole plan could have cost up to about" in out
    suite = ElementTree.parse(tmp_path / "j.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("failures"), suite.get("errors"), suite.get("skipped")) == ("1", "0", "1")
    found = json.loads((tmp_path / "s.sarif").read_text())["runs"][0]["results"]
    assert [one["ruleId"] for one in found if one["level"] == "error"] == ["below-fail-under"]
    # Of another bar, which what ran does not fail, it says nothing.
    assert main(["report", f"{tmp_path}/run", "--fail-under", "1", "--junit", f"{tmp_path}/k.xml"]) == 1
    suite = ElementTree.parse(tmp_path / "k.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("failures"), suite.get("errors"), suite.get("skipped")) == ("0", "2", "0")


def test_a_width_decides_how_many_samples_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["audit", "digits-robust", "--effort", "fast", "-n", "200", "-t", "linf:0.01", "--until-width", "40pp"]
    assert main([*arguments, "-o", f"{tmp_path}/run"]) == 0
    out = flat(capsys.readouterr().out)
    assert "every interval is at most 40 points wide. 64 of 200 samples were needed." in out
    assert "hold at any time" in out
    model = read(tmp_path / "run").models[0]
    assert (model.n, model.results[0].robust_accuracy.interval) == (64, "at-any-time")
    assert "hold at any time" in (tmp_path / "run" / "report.html").read_text(encoding="utf8")
    assert main(["verify", f"{tmp_path}/run"]) == 0


def test_a_union_is_one_more_row_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main([*AUDIT, "-t", "linf:0.05,0.1", "-t", "l2:0.5", "--union", "--sarif", f"{tmp_path}/s.sarif", "-o", str(run)]) == 0
    out = flat(capsys.readouterr().out)
    assert "all of linf:0.05, l2:0.5" in out
    assert "all of linf:0.1, l2:0.5" in out
    page = (run / "report.html").read_text(encoding="utf8")
    assert "linf:0.1, l2:0.5" in page
    assert "against union radius" not in page
    rates = json.loads((tmp_path / "s.sarif").read_text())["runs"][0]["properties"]["rates"]
    assert [rate["radius"] for rate in rates if rate["threat"] == "union"] == ["linf:0.05|l2:0.5", "linf:0.1|l2:0.5"]
    assert main(["verify", str(run)]) == 0
    capsys.readouterr()
    assert main(["compare", str(run), str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["radius_text"] for row in told["rows"] if row["threat"] == "union"] == ["linf:0.05|l2:0.5", "linf:0.1|l2:0.5"]


def test_a_run_that_was_cut_short_is_not_compared_fairly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, more in (("a", []), ("b", ["--max-forwards", "200"])):
        assert main([*AUDIT, "-t", "linf:0.05", *more, "-o", f"{tmp_path}/{name}"]) == 0
    capsys.readouterr()
    assert main(["compare", f"{tmp_path}/a", f"{tmp_path}/b", "--fail-if-worse"]) == 1
    assert "cut short" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--until-width", "wide"], "--until-width 'wide'"),
        (["--until-width", "200pp"], "until_width: 2"),
        (["--max-seconds", "-1"], "max_seconds: -1"),
        (["--max-forwards", "0"], "--max-forwards"),
        (["--union"], "union: needs two threats"),
    ],
)
def test_limits_that_make_no_sense(options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*AUDIT, "-t", "linf:0.1", *options, "-o", f"{tmp_path}/run"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_points() -> None:
    assert [points(text) for text in ("2pp", "2 pp", "2%", "2", "0.5pp")] == [0.02, 0.02, 0.02, 0.02, 0.005]
