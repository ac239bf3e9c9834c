import re

import pytest

from epsball.auditing.results import Finding, Flag
from epsball.report import summary


def test_a_newcomer_reads_every_number(build, paint):
    report = build.report()
    text = paint(summary(report))
    for model in report.models:
        assert f"{model.name}: clean accuracy 97.1 %" in text
        for result in model.results:
            rate = result.robust_accuracy
            line = next(line for line in text.splitlines() if line.split()[:2] == [result.threat, result.radius_text])
            assert f"{100 * rate.value:.1f} %" in line
            assert f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]" in line


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_width_holds(build, paint, width, count):
    models = [build.model(f"a-rather-long-model-name-{i}", 2.0) for i in range(count)]
    text = paint(summary(build.report(*models)), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert text.count("linf 0.05") >= 1
    assert text.count("%") > 7 * count


def test_no_color_means_no_escape_at_all(build, paint):
    assert "\x1b" not in paint(summary(build.report()))


def test_an_untrusted_number_is_not_shown(build, paint):
    flag = Flag(id="zero-gradient", severity="block", message="gradients are zero.", fix="Use a scale-free loss.")
    result = build.result("linf", 0.1, "0.1", 0.873, trustworthy=False, flags=[flag])
    text = paint(summary(build.report(build.model("a", 1.0, results=[result]))))
    assert "not trustworthy yet" in text
    assert "87.3" not in text
    flat = re.sub(r"\s+", " ", text)
    assert "BLOCK zero-gradient at linf 0.1: gradients are zero. Fix: Use a scale-free loss." in flat


def test_findings_that_did_not_pass_are_told_and_passed_ones_are_not(build, paint):
    findings = [Finding(id="range", status="pass", message="fine."), Finding(id="eval-mode", status="mended", message="was training.")]
    text = paint(summary(build.report(build.model("a", 1.0, findings=findings, invalid=3), partial=True)))
    assert "MENDED" in text
    assert "was training." in text
    assert "fine." not in text
    assert "3 of them gave NaN" in re.sub(r"\s+", " ", text)
    assert "Interrupted" in text


def test_hostile_strings_are_inert(build, paint):
    text = paint(summary(build.hostile()))
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "[bold red]b[/bold red]" in re.sub(r"\s+", " ", text)
    assert ":skull:" in text
    colored = paint(summary(build.hostile()), color=True)
    assert not re.sub(r"\x1b\[[0-9;]*m", "", colored).count("\x1b")


def test_a_terminal_that_knows_only_ascii_is_served(build, paint):
    text = paint(summary(build.report(build.model("数字", 1.0))), encoding="ascii")
    assert "\\u6570" in text


def test_nothing_audited(build, paint):
    assert "No threat was audited" in paint(summary(build.report(build.model("a", 1.0, results=[]))))
