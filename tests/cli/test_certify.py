"""`epsball certify`."""

from __future__ import annotations

import json

import pytest

from epsball.cli import main


def test_bounds_as_json_and_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["certify", "digits-robust", "-n", "10", "-t", "linf:0.02,0.3", "--method", "crown"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    near, far = (row["certified_accuracy"] for row in told["results"])
    assert told["clean_accuracy"]["count"] >= near["count"] > far["count"]
    assert near["n"] == told["n"] == 10
    assert near["low"] < near["value"] <= near["high"]
    assert told["method"] == "crown"
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "linf 0.02" in shown
    assert "rounding" in shown


def test_smoothing(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["certify", "digits-standard", "-n", "10", "-t", "l2:0.1,9", "--method", "smoothing", "--sigma", "0.2", "--draws", "100"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    near, far = (row["certified_accuracy"]["count"] for row in told["results"])
    assert near > far == 0
    assert (told["sigma"], told["draws"], told["alpha"]) == (0.2, 100, 0.001)
    assert "not for the model alone" in told["notes"][0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sigma", "0.1"], "--sigma: needs --method smoothing"),
        (["--method", "smoothing"], "smoothing certifies l2 only"),
        (["--method", "lirpa"], "lirpa"),
        (["-t", "flow:1"], "threat 'flow': has no certified bounds"),
        (["--method", "smoothing", "-t", "l2:1", "--sigma", "0"], "sigma above 0"),
    ],
)
def test_bad_words_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", "digits-robust", "-n", "5", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
