"""Two runs side by side: hand-made evidence with known counts, then the command on real runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import epsball as eb
from epsball.auditing.compare import Side, compare, side
from epsball.auditing.results import Finding, ModelReport, Rate, Report, Result
from epsball.auditing.statistics import mcnemar, paired_difference
from epsball.cli import main
from epsball.errors import BadInput
from epsball.store import evidence

X = np.random.default_rng(0).random((12, 1, 2, 2)).astype(np.float32)
Y = np.arange(12) % 3


def made(
    wrong: tuple[int, ...] = (),
    broken: dict[int, float] | None = None,
    invalid: dict[int, float] | None = None,
    order: np.ndarray[Any, Any] | None = None,
    radii: tuple[float, ...] = (0.1, 0.2),
    name: str = "net",
    **changes: Any,
) -> Side:
    """One side: samples wrong from the start, broken from a radius on, unanswered from a radius on; stored in any order."""
    order = np.arange(12) if order is None else order
    correct, broken_at, invalid_at = np.full(12, True), np.full(12, np.inf), np.full(12, np.inf)
    correct[list(wrong)] = False
    for row, radius in (broken or {}).items():
        broken_at[row] = radius
    for row, radius in (invalid or {}).items():
        invalid_at[row] = radius
    correct, broken_at, invalid_at = correct[order], broken_at[order], invalid_at[order]
    rows = np.isfinite(broken_at).nonzero()[0]
    arrays = {
        "x": X[order],
        "y": Y[order],
        "correct": correct,
        "linf/rows": rows,
        "linf/radius": broken_at[rows],
        "linf/invalid": invalid_at,
    }
    results = [told(radius, int((correct & (broken_at > radius) & (invalid_at > radius)).sum()), len(order)) for radius in radii]
    model = ModelReport(name=name, data="d", n=len(order), source="s", clean_accuracy=rate(int(correct.sum()), len(order)), results=results)
    found = Side(f"runs/{name}", "default", model, {f"m0/{key}": value for key, value in arrays.items()}, "m0")
    return Side(**{**vars(found), **changes})


def rate(count: int, n: int) -> Rate:
    return Rate(value=count / n, low=0, high=1, count=count, n=n)


def told(radius: float, count: int, n: int) -> Result:
    return Result(
        threat="linf",
        radius=radius,
        radius_text=f"{radius}",
        robust_accuracy=rate(count, n),
        trustworthy=True,
        forwards=1,
        backwards=1,
        seconds=0.1,
    )


def test_counts_pairs_and_tests_are_those_of_the_samples() -> None:
    a = made(wrong=(0,), broken={1: 0.1, 2: 0.2})
    b = made(wrong=(0, 3), broken={2: 0.1, 4: 0.1, 5: 0.1, 6: 0.2}, invalid={7: 0.2})
    found = compare(a, b)
    first, second = found.rows
    assert (found.paired, found.clean.a, found.clean.b, found.clean.only_a, found.clean.only_b) == (12, 11 / 12, 10 / 12, 1, 0)
    # radius 0.1: A lacks 0, 1; B lacks 0, 2, 3, 4, 5. Radius 0.2: A lacks 0, 1, 2; B lacks 0, 2, 3, 4, 5, 6, 7.
    assert (first.a, first.b, first.only_a, first.only_b) == (10 / 12, 7 / 12, 4, 1)
    assert (second.a, second.b, second.only_a, second.only_b) == (9 / 12, 5 / 12, 5, 1)
    for row in found.rows:
        assert row.difference == pytest.approx(row.b - row.a, abs=1e-12)
        assert (row.low, row.high) == paired_difference(row.only_b, row.only_a, 12)
        assert row.p == mcnemar(row.only_a, row.only_b)
    assert [first.p_adjusted, second.p_adjusted] == pytest.approx([2 * 0.21875, 2 * 0.21875])
    assert not found.worse
    assert found.notes == ()


def test_the_order_of_samples_does_not_matter() -> None:
    a, broken = made(broken={1: 0.1, 2: 0.2}), {0: 0.1, 4: 0.1, 5: 0.2}
    shuffled = np.random.default_rng(1).permutation(12)
    assert compare(a, made(broken=broken)) == compare(a, made(broken=broken, order=shuffled))


def test_copies_of_a_sample_are_paired_one_to_one() -> None:
    twice = np.array([0, 1, 1, 2])
    a = made(order=twice)
    found = compare(a, made(broken={1: 0.1}, order=twice))
    assert (found.paired, found.rows[0].only_a) == (4, 2)
    assert len({*a.ids()}) == 4


def test_only_common_samples_count_and_that_is_said() -> None:
    a, b = made(order=np.arange(8)), made(broken={1: 0.1, 6: 0.1, 9: 0.1}, order=np.arange(4, 12), radii=(0.1,))
    found = compare(a, b)
    assert (found.paired, found.rows[0].only_a) == (4, 1)
    assert found.notes == (
        "Only the 4 samples that both were audited on are compared (A 8, B 8).",
        "Audited for one model only and left out: linf:0.2.",
    )


def test_bytes_and_floats_of_the_same_input_are_the_same_sample() -> None:
    x = np.random.default_rng(0).integers(0, 256, (12, 1, 2, 2), dtype=np.uint8)
    a, b = made(), made()
    a.arrays["m0/x"], b.arrays["m0/x"] = x, evidence.expand(x)
    assert compare(a, b).paired == 12


def test_worse_means_significant_over_all_radii_together() -> None:
    a = made()
    six, seven = dict.fromkeys(range(6), 0.1), dict.fromkeys(range(7), 0.1)
    alone = compare(a, made(broken=six, radii=(0.1,)))
    assert alone.rows[0].p == pytest.approx(0.03125)
    assert alone.worse
    both = compare(a, made(broken=six))
    assert [row.p_adjusted for row in both.rows] == [0.0625, 0.0625]
    assert not both.worse
    assert compare(a, made(broken=seven)).worse
    assert not compare(made(broken=seven), a).worse  # better is not worse


def test_a_number_that_is_not_trusted_is_no_evidence_of_being_fine() -> None:
    b = made(radii=(0.1,))
    b.told.results[0].trustworthy = False
    found = compare(made(), b)
    assert found.worse
    assert any("linf:0.1" in note and "trustworthy" in note for note in found.notes)


def test_a_black_box_audit_beside_a_white_box_one_is_said() -> None:
    b = made()
    b.told.findings.append(Finding(id="black-box", status="note", message="scores only"))
    assert any(note.startswith("B was attacked without gradients") for note in compare(made(), b).notes)


def test_what_cannot_be_compared_is_one_line() -> None:
    a = made()
    with pytest.raises(BadInput, match="default in runs/net, max in runs/net"):
        compare(a, made(effort="max"))
    with pytest.raises(BadInput, match="share no sample"):
        compare(made(order=np.arange(6)), made(order=np.arange(6, 12)))
    with pytest.raises(BadInput, match=r"linf:0\.1 linf:0\.2 in runs/net, linf:0\.3"):
        compare(a, made(radii=(0.3,)))
    with pytest.raises(BadInput, match=r"m0/correct.*run the audit again"):
        compare(a, made(arrays={k: v for k, v in a.arrays.items() if k != "m0/correct"}))
    tampered = made(broken={1: 0.1})
    tampered.told.results[0].robust_accuracy.count = 12
    with pytest.raises(BadInput, match=r"counts 12 samples for linf:0\.1, the evidence 11"):
        compare(a, tampered)
    with pytest.raises(BadInput, match=r"damaged \(ValueError"):
        compare(a, made(arrays={**a.arrays, "m0/y": Y[:5]}))


def test_a_model_of_several_has_to_be_named() -> None:
    models = [made(name=name).told for name in ("one", "two")]
    report = Report(models=models, seed=0, run="r")
    assert side("r", report, {}, "two", "--model-a").prefix == "m1"
    for name, said in ((None, "needed, run r has 2 models"), ("three", "not in run r: give one of one, two")):
        with pytest.raises(BadInput, match=said):
            side("r", report, {}, name, "--model-a")


# the command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "run"
    eb.audit(None, "digits", ["linf:0.05,0.1"], effort="fast", n=60, out=folder)
    return folder


def test_the_command_tells_a_person_and_a_program(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(run), str(run), "--model-a", "digits-robust", "--model-b", "digits-standard"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    report = Report.model_validate_json((run / "report.json").read_bytes())
    by_name = {model.name: model for model in report.models}
    assert told["a"] == {"run": str(run), "model": "digits-robust"}
    assert [(row["threat"], row["radius_text"]) for row in told["rows"]] == [("linf", "0.05"), ("linf", "0.1")]
    for row, one, two in zip(told["rows"], by_name["digits-robust"].results, by_name["digits-standard"].results, strict=True):
        assert (row["a"], row["b"]) == (one.value, two.value)
        assert row["only_a"] - row["only_b"] == one.robust_accuracy.count - two.robust_accuracy.count
        assert row["low"] <= row["difference"] <= row["high"]
    assert told["rows"][1]["worse"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "A: digits-robust   B: digits-standard   60 samples of both" in out
    assert "linf 0.1" in out
    assert "B worse" in out
    assert max(map(len, out.splitlines())) <= 120


def test_fail_if_worse_decides_the_exit_code(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["digits-robust", "digits-standard"]
    for (a, b), code in ((names, 1), (names[::-1], 0)):
        assert main(["compare", str(run), str(run), "--model-a", a, "--model-b", b, "--fail-if-worse"]) == code
    copy = shutil.copytree(run, tmp_path / "copy")
    assert main(["compare", str(run), str(copy), "--model-a", names[0], "--model-b", names[0], "--fail-if-worse"]) == 0
    capsys.readouterr()
    assert main(["compare", str(run), f"{tmp_path}/nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
