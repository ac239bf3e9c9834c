"""Robustness as a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import epsball as eb
from epsball.auditing.results import Report
from epsball.auditing.statistics import clopper_pearson
from epsball.errors import BadInput
from epsball.models.digits import load
from epsball.testing import assert_robust


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    found = eb.load_data("digits", n=40)
    return found.x, found.y


def test_a_robust_model_passes_and_hands_back_its_report(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    report = assert_robust(load("digits-robust"), data, "linf:0.05", at_least=0.8)
    assert report.robust_accuracy["linf", 0.05].value > 0.8
    assert not Path(report.run).exists()


def test_a_model_that_is_surely_weaker_fails_with_one_line(data: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_robust({"plain": load("digits-standard")}, data, ["linf:0.01,0.2"], at_least=0.4, out=tmp_path / "run")
    result = Report.model_validate_json((tmp_path / "run" / "report.json").read_bytes()).robust_accuracy["linf", 0.2]
    rate = result.robust_accuracy
    assert str(caught.value) == (
        f"plain linf:0.2: robust accuracy is at most {100 * rate.value:.1f} % ({rate.count} of 40), with 95 % confidence below "
        f"{100 * rate.high:.1f} %, and should be at least 40.0 % ({tmp_path}/run/report.html)"
    )


def test_the_upper_end_decides_and_confidence_moves_it(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = load("digits-standard")
    rate = assert_robust(model, data, "linf:0.1", at_least=0.0).robust_accuracy["linf", 0.1].robust_accuracy
    assert 0 < rate.value < 1
    low, high = (clopper_pearson(rate.count, rate.n, level)[1] for level in (0.5, 0.99))
    bar = (low + high) / 2
    assert rate.value < low < bar < high
    assert_robust(model, data, "linf:0.1", at_least=bar, confidence=0.99)
    with pytest.raises(AssertionError, match="with 50 % confidence"):
        assert_robust(model, data, "linf:0.1", at_least=bar, confidence=0.5)


def test_samples_of_unknown_outcome_count_for_the_model(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    class Half(nn.Module):
        """NaN on one image of the data."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.bad = load("digits-standard"), nn.Parameter(data[0][:1].clone(), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            same = (x - self.bad).flatten(1).abs().amax(1, keepdim=True) == 0
            return torch.where(same, torch.nan, self.net(x))

    rate = assert_robust(Half(), data, "linf:0.1", at_least=0.0).robust_accuracy["linf", 0.1].robust_accuracy
    assert rate.unknown == 1
    assert rate.high == clopper_pearson(rate.count + 1, 40)[1]


def test_a_number_that_is_not_trusted_fails(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    class Crowded(nn.Module):
        """An answer depends on who else asks."""

        def __init__(self) -> None:
            super().__init__()
            self.net = load("digits-robust")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x - 0.5 * x.mean(0, keepdim=True))

    with pytest.raises(AssertionError, match=r"Crowded linf:0\.05: not trustworthy: "):
        assert_robust(Crowded(), data, "linf:0.05", at_least=0.0, n=10)


@pytest.mark.parametrize(("words", "said"), [({"at_least": 40}, "at_least: 40"), ({"confidence": 95}, "confidence: 95")])
def test_percent_where_fractions_are_meant_is_told(words: dict[str, float], said: str, data: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(BadInput, match=said):
        assert_robust(load("digits-robust"), data, "linf:0.05", **words)  # type: ignore[arg-type]


def test_an_interrupted_audit_is_no_verdict(data: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("epsball.auditing.blocks.cascade", stop)
    with pytest.raises(KeyboardInterrupt):
        assert_robust(load("digits-robust"), data, "linf:0.05", at_least=0.0)


def test_sarif_and_junit_of_the_command_agree(tmp_path: Path) -> None:
    from epsball.cli import main

    words = ["audit", "digits-standard", "--effort", "fast", "-n", "20", "-t", "linf:0.2", "-o", f"{tmp_path}/run", "--fail-under", "90"]
    assert main([*words, "--sarif", f"{tmp_path}/a.sarif", "--junit", f"{tmp_path}/j.xml"]) == 1
    (result,) = json.loads((tmp_path / "a.sarif").read_text())["runs"][0]["results"]
    assert (result["ruleId"], result["level"]) == ("below-fail-under", "error")
    assert (tmp_path / "j.xml").read_text().count("<failure") == 1
    again = ["report", f"{tmp_path}/run", "--fail-under", "90", "--sarif", f"{tmp_path}/b.sarif"]
    assert main(again) == 1
    assert (tmp_path / "b.sarif").read_bytes() == (tmp_path / "a.sarif").read_bytes()
