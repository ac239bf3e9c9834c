"""Audits of models that show no gradients: what runs, what is said, what it costs, and that nothing else changes a verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import Around, Stubborn, blobs, digits, linear, unusual, verdicts
from torch import Tensor, nn

import epsball as eb
from epsball.auditing.plan import EFFORTS, QUERIES, black_box
from epsball.auditing.results import ModelReport, Report
from epsball.auditing.run import canaries
from epsball.cli import main
from epsball.core import Access, Victim
from epsball.errors import BadInput
from epsball.models import wrap
from epsball.models.digits import load
from epsball.threats import named

LABELS, SCORES = Access.LABELS, Access.SCORES


def audited(tmp_path: Path, name: str = "run", **options: Any) -> Report:
    settings: dict[str, Any] = {"data": digits(40), "threats": ("linf:0.05,0.1", "l2:0.5"), "effort": "fast"} | options
    return eb.audit(out=tmp_path / name, **settings)


def named_attacks(model: ModelReport) -> list[list[str]]:
    return [[attack.name for attack in result.attacks] for result in model.results]


class Shared(nn.Module):
    """Counts its rows, and those of all its copies, in one list."""

    rows: list[int] = []  # noqa: RUF012

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        type(self).rows = []

    def forward(self, x: Tensor) -> Tensor:
        type(self).rows.append(len(x))
        output: Tensor = self.net(x)
        return output


class Votes:
    """Labels only, as some estimators give them; scores raise."""

    classes_ = np.arange(3)

    def __init__(self, weights: Tensor) -> None:
        self.net = linear(weights)

    def predict(self, x: Any) -> Any:
        return self.net(torch.from_numpy(x).float()).argmax(1).numpy()

    @property
    def predict_proba(self) -> Any:
        raise AttributeError("labels are all there is")


# What runs and what is said.


def forest() -> tuple[Any, Tensor, Tensor]:
    """Random rules of two features each, as an estimator: steps, no slopes."""
    ensemble = pytest.importorskip("sklearn.ensemble")
    x, y, _ = blobs(n=120, features=10, classes=3)
    return ensemble.RandomForestClassifier(15, max_depth=5, random_state=0).fit(x[:80].numpy(), y[:80].numpy()), x[80:], y[80:]


def test_a_random_forest_on_a_table_is_audited_and_trusted(tmp_path: Path) -> None:
    model, x, y = forest()
    report = audited(tmp_path, model=wrap(model), data=(x, y), threats=("linf:0.05,0.15", "l0f:2", "l1:0.3"))
    told = report.models[0]
    assert unusual(told) == {"black-box": "note"}
    assert told.flags == []
    assert named_attacks(told) == [["square"], ["square"], ["sparse_rs"], ["sweep", "simba"]]
    near, far, few, sum_ = (result.robust_accuracy.count for result in told.results)
    assert told.clean_accuracy.count > near > far
    assert told.clean_accuracy.count > max(few, sum_)
    assert all(result.trustworthy and result.backwards == 0 for result in told.results)
    assert all(line.holds for line in eb.verify(tmp_path / "run", [wrap(model)]))


@pytest.mark.parametrize("kind", ["estimator", "module"])
def test_a_model_of_labels_whose_scores_and_backward_raise(kind: str, tmp_path: Path) -> None:
    x, y, weights = blobs(n=40, features=12, classes=3)
    net = linear(weights)
    stubborn = nn.Sequential().eval()
    stubborn.forward = lambda z: net(Stubborn.apply(z))  # type: ignore[method-assign]
    model = wrap(Votes(weights)) if kind == "estimator" else wrap(stubborn, access=LABELS)
    report = audited(tmp_path, model=model, data=(x, y), threats=("linf:0.1", "l2:0.3", "l1:0.5", "l0f:2"))
    told = report.models[0]
    assert named_attacks(told) == [["rays"], ["hop_skip_jump"], ["noise"], ["sparse_rs"]]
    assert unusual(told) == {"black-box": "note"}
    assert "labels only" in told.findings[-1].message
    assert all(result.trustworthy for result in told.results)
    assert told.results[0].robust_accuracy.count < told.clean_accuracy.count
    assert all(line.holds for line in eb.verify(tmp_path / "run", [model]))


def test_an_onnx_file_with_an_operator_that_nobody_knows_is_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command line: the terminal says why there were no gradients, the evidence verifies, the cap holds."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    x, y, weights = blobs(n=40, features=12, classes=3)
    arrays = {"w": (4 * weights.T).numpy(), "b": (-2 * weights.sum(1)).numpy()}
    nodes = [onnx.helper.make_node("Gemm", ["x", "w", "b"], ["h"]), onnx.helper.make_node("Sinh", ["h"], ["y"])]
    info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", c]) for n, c in (("x", 12), ("y", 3))]
    stored = [onnx.numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "g", info[:1], info[1:], stored)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    run = str(tmp_path / "run")
    words = ["-d", f"{tmp_path}/data.npz", "-t", "linf:0.1", "-o", run, "--max-queries", "50"]
    assert main(["audit", f"{tmp_path}/net.onnx", *words]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "NOTE" in shown
    assert "BLOCK" not in shown
    assert "at most 50 queries per sample and radius" in shown
    assert "operator Sinh is not known to the interpreter: scores by onnxruntime only, no gradients" in shown
    told = json.loads((tmp_path / "run" / "report.json").read_bytes())["models"][0]
    result = told["results"][0]
    assert result["trustworthy"]
    assert 0 < result["forwards"] <= 50 * told["clean_accuracy"]["count"]
    assert result["robust_accuracy"]["count"] < told["clean_accuracy"]["count"]
    assert main(["verify", run]) == 0


def test_dead_gradients_that_nothing_stands_in_for_stay_blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries(("linf",))  # asked once in a process, and not with half of the tool taken away
    monkeypatch.setattr(Victim, "relaxed", lambda self: self)
    quantized = Around(lambda net, x: net((x * 16).round() / 16))
    told = audited(tmp_path, model=wrap(quantized), threats="linf:0.1").models[0]
    assert named_attacks(told) == [["noise", "square"]]
    assert unusual(told) == {"no-gradient": "block"}
    assert not told.results[0].trustworthy
    first, second = told.results[0].attacks
    assert second.broken > first.broken


def test_gradients_that_are_dead_in_part_bring_them_too(tmp_path: Path) -> None:
    """Half of the digits are rounded before the network sees them."""

    def change(net: nn.Module, x: Tensor) -> Tensor:
        dark = x.flatten(1).mean(1) < 0.3
        return net(torch.where(dark[:, None, None, None], (x * 16).round() / 16, x))

    told = audited(tmp_path, model=wrap(Around(change)), data=digits(), threats="linf:0.1").models[0]
    assert unusual(told) == {"gradient": "warn", "hidden-steps": "note"}  # which are rounded is a decision inside
    searches = [name for name in named_attacks(told)[0] if not name.startswith("check")]
    assert searches[:2] == ["pgd", "noise"]
    assert "apgd_t" in searches
    assert searches[-1] == "square"


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("access", [LABELS, SCORES])
@pytest.mark.parametrize("threat", ["linf", "l2", "l1", "l0", "l0f", "patch", "rigid", "flow", "color"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (30,)])
def test_every_effort_is_a_budget(effort: str, access: Access, threat: str, shape: tuple[int, ...]) -> None:
    stages = black_box(named(threat), access, QUERIES[effort], torch.zeros(2, *shape))
    assert 0.9 * QUERIES[effort] <= sum(stage.rows for stage in stages) <= QUERIES[effort]


# What it costs.


@pytest.mark.parametrize("access", [LABELS, SCORES])
@pytest.mark.parametrize("threats", [("linf:0.02,0.15",), ("l2:1.5", "l0:3")])
def test_every_row_is_accounted_for(access: Access, threats: tuple[str, ...], tmp_path: Path) -> None:
    """Search: at most the cap for each correct sample and radius. Besides: 72 rows of preflight, one clean answer a sample, and for
    each broken one the referee's and that for the rounded input."""
    model = Shared(load("digits-standard"))
    told = audited(tmp_path, model=wrap(model, access=access), threats=threats, max_queries=60).models[0]
    searched = sum(result.forwards for result in told.results)
    for result in told.results:
        assert 0 < result.forwards <= 60 * told.clean_accuracy.count
        assert result.forwards == sum(attack.forwards for attack in result.attacks)
    claimed = sum(attack.broken for result in told.results for attack in result.attacks)
    assert sum(Shared.rows) == searched + 32 + 32 + 8 + 40 + 2 * claimed
    assert claimed > 0


def test_a_model_that_is_often_wrong_is_also_asked_in_other_scales(tmp_path: Path) -> None:
    data = digits(40)
    labels = data.y.clone()
    labels[:10] = (labels[:10] + 1) % 10
    model = Shared(load("digits-standard"))
    told = audited(tmp_path, model=wrap(model, access=SCORES), data=(data.x, labels), threats="linf:1e-6", max_queries=1).models[0]
    assert sum(Shared.rows) == told.results[0].forwards + 32 + 32 + 8 + 40 + 3 * 32


def test_a_cap_is_for_models_without_gradients(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"max_queries: 10: model 'digits-standard' gives gradients") as caught:
        audited(tmp_path, model="digits-standard", max_queries=10)
    assert "\n" not in str(caught.value)
    for bad in (0, -1, 2.5):
        with pytest.raises(BadInput, match="max_queries"):
            audited(tmp_path, model=wrap(load("digits-standard"), access=SCORES), max_queries=bad)
    assert not (tmp_path / "run").exists()


def test_late_successes_say_that_more_queries_would_break_more(tmp_path: Path) -> None:
    """Told from the books: more than one sample in twenty broke in the second half of its queries."""
    model = wrap(load("digits-standard"), access=SCORES)
    few = audited(tmp_path, "few", model=model, threats="linf:0.15", max_queries=60).models[0].results[0]
    assert [(flag.id, flag.severity) for flag in few.flags] == [("effort", "warn")]
    assert few.trustworthy
    assert "broke only after half of the 60 queries" in few.flags[0].message
    many = audited(tmp_path, "many", model=model, threats="linf:0.3").models[0].results[0]
    assert many.flags == []


class Spent(nn.Module):
    """A service whose budget ends after so many rows: then it raises an error of ours, for good."""

    left = 0

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.net = load("digits-standard")
        type(self).left = rows

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > type(self).left:
            raise BadInput("model: budget of rows is spent: raise it")
        type(self).left -= len(x)
        output: Tensor = self.net(x)
        return output


def test_a_budget_that_ends_loses_nothing_that_was_paid_for(tmp_path: Path) -> None:
    report = audited(tmp_path, model=wrap(Spent(4000), access=SCORES), threats="linf:0.05,0.06", max_queries=70)
    assert report.partial
    first, second = report.models[0].results
    assert (unusual(report.models[0])["raised"], len(first.attacks), second.attacks) == ("block", 1, [])
    assert first.robust_accuracy.count < report.models[0].clean_accuracy.count
    assert all(line.holds for line in eb.verify(tmp_path / "run", ["digits-standard"]))
    with pytest.raises(BadInput, match="spent"):
        audited(tmp_path, "none", model=wrap(Spent(300), access=SCORES), threats="linf:0.15", max_queries=70)
    assert not (tmp_path / "none").exists()


# What changes nothing.


@pytest.mark.parametrize("access", [LABELS, SCORES])
def test_verdicts_hang_on_the_samples_only(access: Access, tmp_path: Path) -> None:
    """Not on the batch size, the order, duplicates or dropping; and they are nested in the radius."""
    data, model = digits(40), wrap(load("digits-standard"), access=access)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "batches": {"batch_size": 7},
        "order": {"data": (data.x[order], data.y[order])},
        "duplicates": {"data": (torch.cat([data.x, data.x[:9]]), torch.cat([data.y, data.y[:9]]))},
        "no dropping": {"drop": False},
    }
    reports = {
        name: audited(tmp_path, name, model=model, threats=("linf:0.02,0.1", "l2:1.5"), max_queries=60, **options)
        for name, options in ways.items()
    }
    for threat in ("linf", "l2"):
        first, *others = (verdicts(tmp_path / name, threat) for name in ways)
        assert all(other == first for other in others)
        assert any(np.isfinite(list(first.values())))
    small, large = (reports["plain"].robust_accuracy["linf", r].robust_accuracy.count for r in (0.02, 0.1))
    assert small > large


def test_probabilities_of_a_black_box_become_scores(tmp_path: Path) -> None:
    net = load("digits-standard")
    model = Around(lambda inner, x: inner(x).softmax(1))
    raw = audited(tmp_path, "raw", model=wrap(net, access=SCORES), threats="linf:0.1").models[0]
    soft = audited(tmp_path, "soft", model=wrap(model, access=SCORES), threats="linf:0.1").models[0]
    assert unusual(soft) == {"probabilities": "mended", "black-box": "note"}
    assert abs(raw.results[0].robust_accuracy.count - soft.results[0].robust_accuracy.count) <= 1


def test_what_is_random_is_still_found_with_one_repeat(tmp_path: Path) -> None:
    noisy = Around(lambda net, x: net(x) + 0.3 * torch.randn(len(x), 10))
    told = audited(tmp_path, model=wrap(noisy, access=SCORES), threats="linf:0.1", max_queries=10).models[0]
    assert unusual(told)["random"] == "block"
    assert not told.results[0].trustworthy
