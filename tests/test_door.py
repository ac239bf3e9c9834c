"""The door: what comes in is checked, what goes out can be checked again, and a failing run leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import epsball as eb
import epsball.data
import epsball.door
from epsball.auditing.cost import Estimate
from epsball.auditing.results import Report
from epsball.errors import BadInput, EpsballError
from epsball.models.digits import load
from epsball.store import evidence


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both packaged models: some samples broken, some not."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    eb.audit(None, "digits", ["linf:0.05,0.1", "l2:0.5"], effort="fast", n=40, out=folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# What goes out.


def test_the_evidence_verifies(run: Path) -> None:
    report = Report.model_validate_json((run / "report.json").read_bytes())
    lines = eb.verify(run)
    assert [(line.model, line.threat, line.radius) for line in lines] == [
        (m.name, threat, text) for m in report.models for threat, text in [("clean", ""), *((r.threat, r.radius_text) for r in m.results)]
    ]
    assert all(line.holds for line in lines)
    counts = [c for m in report.models for c in [m.clean_accuracy.count, *(r.robust_accuracy.count for r in m.results)]]
    assert [line.claimed for line in lines] == [line.seen for line in lines] == counts
    assert len(set(counts)) > 3


def test_the_report_has_the_documented_keys(run: Path) -> None:
    told = json.loads((run / "report.json").read_bytes())
    assert {"models", "seed", "versions", "run"} <= set(told)
    model = told["models"][0]
    assert {"name", "data", "n", "clean_accuracy", "results"} <= set(model)
    assert {"value", "low", "high"} <= set(model["clean_accuracy"])
    keys = {"threat", "radius", "robust_accuracy", "certified_accuracy", "forwards", "backwards", "seconds", "flags"}
    assert all(keys <= set(r) and {"value", "low", "high"} <= set(r["robust_accuracy"]) for m in told["models"] for r in m["results"])
    assert set(told) == set(Report.model_json_schema()["properties"])
    assert {path.name for path in run.iterdir()} == {"report.json", "report.html", "evidence.safetensors"}


def test_results_are_found_by_threat_and_radius(run: Path) -> None:
    report = Report.model_validate_json((run / "report.json").read_bytes())
    result = report.robust_accuracy["linf", 0.1]
    assert (result.value, result.low, result.high) == tuple(getattr(result.robust_accuracy, name) for name in ("value", "low", "high"))
    assert (result.certified, result.flags, result.forwards > 0, result.backwards > 0) == (None, [], True, True)
    with pytest.raises(KeyError, match=r"linf:0\.05"):
        report.robust_accuracy["linf", 0.3]


def test_stored_inputs_are_legal_in_float64_after_the_disk(run: Path) -> None:
    arrays, header = evidence.read(run / evidence.NAME)
    for number in range(len(header["models"])):
        x = evidence.expand(arrays[f"m{number}/x"]).astype(np.float64)
        for threat, order in (("linf", np.inf), ("l2", 2)):
            part = {name: arrays[f"m{number}/{threat}/{name}"] for name in ("rows", "x_adv", "radius", "size")}
            assert len(part["rows"])
            change = (part["x_adv"].astype(np.float64) - x[part["rows"]]).reshape(len(part["rows"]), -1)
            sizes = np.linalg.norm(change, order, axis=1)
            assert (sizes <= part["radius"]).all()
            assert sizes == pytest.approx(part["size"], rel=1e-12)
            assert ((part["x_adv"] >= 0) & (part["x_adv"] <= 1)).all()


Edit = Callable[[dict[str, np.ndarray], dict[str, Any], dict[str, Any]], None]


def clean_inputs_back(arrays: dict[str, np.ndarray], header: dict[str, Any], told: dict[str, Any]) -> None:
    arrays["m0/linf/x_adv"][0] = evidence.expand(arrays["m0/x"])[arrays["m0/linf/rows"][0]]


def pushed_outside(arrays: dict[str, np.ndarray], header: dict[str, Any], told: dict[str, Any]) -> None:
    row = evidence.expand(arrays["m0/x"])[arrays["m0/l2/rows"][0]]
    arrays["m0/l2/x_adv"][0] = row + 1.01 * (arrays["m0/l2/x_adv"][0] - row)


def other_label(arrays: dict[str, np.ndarray], header: dict[str, Any], told: dict[str, Any]) -> None:
    right = load("digits-standard")(torch.from_numpy(evidence.expand(arrays["m0/x"]))).argmax(1).numpy() == arrays["m0/y"]
    row = int(np.flatnonzero(right)[0])
    arrays["m0/y"][row] = (arrays["m0/y"][row] + 1) % 10


def radius_down(arrays: dict[str, np.ndarray], header: dict[str, Any], told: dict[str, Any]) -> None:
    arrays["m0/linf/radius"][arrays["m0/linf/radius"] == 0.1] = 0.05


def radius_up(arrays: dict[str, np.ndarray], header: dict[str, Any], told: dict[str, Any]) -> None:
    arrays["m0/linf/radius"][:] = 0.1


def hit_removed(arrays: dict[str, np.ndarray], header: dict[str, Any], told: dict[str, Any]) -> None:
    for name in ("rows", "x_adv", "radius", "size", "predicted"):
        arrays[f"m0/linf/{name}"] = arrays[f"m0/linf/{name}"][1:]


def number(name: str, value: Any, part: str = "robust_accuracy") -> Edit:
    def edit(arrays: dict[str, np.ndarray], header: dict[str, Any], told: dict[str, Any]) -> None:
        told["models"][0]["results"][1][part][name] = value

    return edit


def fact(name: str, value: Any) -> Edit:
    def edit(arrays: dict[str, np.ndarray], header: dict[str, Any], told: dict[str, Any]) -> None:
        told["models"][0]["results"][1][name] = value

    return edit


def clean_count(arrays: dict[str, np.ndarray], header: dict[str, Any], told: dict[str, Any]) -> None:
    told["models"][0]["clean_accuracy"]["count"] -= 1


def result_dropped(arrays: dict[str, np.ndarray], header: dict[str, Any], told: dict[str, Any]) -> None:
    del told["models"][0]["results"][1]


def result_invented(arrays: dict[str, np.ndarray], header: dict[str, Any], told: dict[str, Any]) -> None:
    invented = json.loads(json.dumps(told["models"][0]["results"][0])) | {"threat": "linf", "radius": 0.3, "radius_text": "0.3"}
    told["models"][0]["results"].append(invented)


def round_renamed(arrays: dict[str, np.ndarray], header: dict[str, Any], told: dict[str, Any]) -> None:
    header["models"][0]["rounds"][1]["radius"] = 0.2


def models_swapped(arrays: dict[str, np.ndarray], header: dict[str, Any], told: dict[str, Any]) -> None:
    told["models"].reverse()


TAMPERINGS: dict[str, Edit] = {
    "an adversarial input replaced by the clean one": clean_inputs_back,
    "an adversarial input outside its radius": pushed_outside,
    "a label": other_label,
    "stored radii lowered": radius_down,
    "stored radii raised": radius_up,
    "a success removed": hit_removed,
    "the report's count": number("count", 40),
    "the report's rate": number("value", 0.99),
    "the report's interval": number("low", 0.9),
    "the report's n": number("n", 4000),
    "the report's radius": fact("radius", 0.3),
    "the report's radius in words": fact("radius_text", "0.3"),
    "the report's threat": fact("threat", "l0"),
    "the report's clean accuracy": clean_count,
    "a result left out": result_dropped,
    "a result invented": result_invented,
    "the evidence's radius": round_renamed,
    "the models' names": models_swapped,
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_noticed(name: str, run: Path) -> None:
    arrays, header = evidence.read(run / evidence.NAME)
    arrays = {key: value.copy() for key, value in arrays.items()}
    told = json.loads((run / "report.json").read_bytes())
    TAMPERINGS[name](arrays, header, told)
    evidence.write(run / evidence.NAME, arrays, header)
    (run / "report.json").write_text(json.dumps(told))
    assert not all(line.holds for line in eb.verify(run))


def test_another_model_does_not_verify(run: Path) -> None:
    assert not all(line.holds for line in eb.verify(run, ["digits-robust", "digits-standard"]))


def damaged_rows(arrays: dict[str, np.ndarray]) -> None:
    arrays["m0/linf/rows"][0] = 4000


def wrong_shape(arrays: dict[str, np.ndarray]) -> None:
    arrays["m0/linf/x_adv"] = arrays["m0/linf/x_adv"][:, :, :5]


def no_labels(arrays: dict[str, np.ndarray]) -> None:
    del arrays["m0/y"]


def short_radii(arrays: dict[str, np.ndarray]) -> None:
    arrays["m0/linf/radius"] = arrays["m0/linf/radius"][:1]


@pytest.mark.parametrize("damage", [damaged_rows, wrong_shape, no_labels, short_radii], ids=lambda d: d.__name__)
def test_damaged_evidence_is_one_line(damage: Callable[[dict[str, np.ndarray]], None], run: Path) -> None:
    arrays, header = evidence.read(run / evidence.NAME)
    arrays = {key: value.copy() for key, value in arrays.items()}
    damage(arrays)
    evidence.write(run / evidence.NAME, arrays, header)
    with pytest.raises(BadInput, match="evidence") as error:
        eb.verify(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b'{"a": 1}', None])
def test_evidence_that_is_no_evidence_is_one_line(content: bytes | None, run: Path) -> None:
    if content is None:
        (run / evidence.NAME).unlink()
    else:
        (run / evidence.NAME).write_bytes(content)
    with pytest.raises(BadInput, match="evidence"):
        eb.verify(run)


def test_evidence_of_another_number_of_models_is_one_line(run: Path) -> None:
    told = json.loads((run / "report.json").read_bytes())
    del told["models"][1]
    (run / "report.json").write_text(json.dumps(told))
    with pytest.raises(BadInput, match=r"1 models in report\.json, 2 in the evidence"):
        eb.verify(run)


@pytest.mark.parametrize("models", [[], ["digits-standard"], ["digits-standard"] * 3])
def test_models_for_verify_must_be_as_many_as_in_the_run(models: list[str], run: Path) -> None:
    with pytest.raises(BadInput, match=f"{len(models)} given, the run has 2"):
        eb.verify(run, models)


def test_a_python_object_must_be_given_again(tmp_path: Path) -> None:
    net = load("digits-standard")
    eb.audit(eb.wrap(net, name="mine"), "digits", "linf:0.1", effort="fast", n=20, out=tmp_path / "run")
    with pytest.raises(BadInput, match="'mine': was a Python object"):
        eb.verify(tmp_path / "run")
    assert all(line.holds for line in eb.verify(tmp_path / "run", [net]))


def test_a_model_given_by_name_is_read_with_the_runs_own_options(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from epsball.models.digits import load\n\ndef make():\n    return load('digits-standard')\n")
    (tmp_path / "moved.py").write_text((tmp_path / "net.py").read_text())
    data = eb.load_data("digits", n=40)
    loaded = eb.door.open_model(f"{tmp_path / 'net.py'}:make", mean=0.0, std=0.5, box=(0.0, 0.5))
    options = {"effort": "fast", "seed": 0, "batch_size": None, "progress": None, "command": ""}
    halved = eb.data.from_arrays(data.x / 2, data.y, box=(0.0, 0.5))
    report = eb.door.audit_loaded([loaded], halved, "linf:0.05", out=tmp_path / "run", **options)
    assert report.models[0].clean_accuracy.value > 0.9
    (tmp_path / "net.py").unlink()
    with pytest.raises(BadInput):
        eb.verify(tmp_path / "run")
    assert all(line.holds for line in eb.verify(tmp_path / "run", [f"{tmp_path / 'moved.py'}:make"]))


# The evidence file itself.


def test_inputs_are_stored_in_bytes_only_where_that_loses_nothing() -> None:
    exact = (np.arange(256) / 255).astype(np.float32).reshape(16, 16)
    assert evidence.compact(exact).dtype == np.uint8
    assert np.array_equal(evidence.expand(evidence.compact(exact)), exact)
    for other in (exact + np.float32(1e-7), exact * 2 - 1, exact * 255):
        assert evidence.compact(other).dtype == np.float32
        assert np.array_equal(evidence.expand(evidence.compact(other)), other)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    evidence.atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BadInput, match="No space left"):
        evidence.atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# What comes in.


def pictures(n: int = 24) -> tuple[Tensor, Tensor]:
    data = eb.load_data("digits", n=n)
    return data.x, data.y


def poisoned() -> nn.Module:
    net = load("digits-standard")
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] = torch.nan
    return net


X, Y = pictures()
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "too few labels": ({"data": (X, Y[:-1])}, "labels"),
    "label beyond the classes": ({"data": (X, torch.where(Y == 9, 12, Y))}, "class 12"),
    "negative label": ({"data": (X, Y - 1)}, "labels"),
    "labels that are no numbers": ({"data": (X, Y + 0.5)}, "labels"),
    "one class": ({"data": (X, torch.zeros_like(Y))}, "labels"),
    "outside the box": ({"data": (X * 3 - 1, Y)}, "box"),
    "NaN in the data": ({"data": (X * torch.nan, Y)}, "NaN"),
    "empty": ({"data": (X[:0], Y[:0])}, "empty"),
    "not a pair": ({"data": (X,)}, "data"),
    "no such data": ({"data": "nowhere.npz"}, "nowhere.npz"),
    "shape that the model cannot take": ({"data": (X[..., :6], Y)}, "shape"),
    "NaN weights": ({"model": poisoned()}, "0.weight"),
    "decisions instead of scores": ({"model": lambda x: x.flatten(1)[:, :10].argmax(1)}, "outputs"),
    "segmentation": ({"model": lambda x: x[:, :, None].expand(-1, -1, 3, -1, -1)[:, 0]}, "outputs"),
    "one row for all": ({"model": lambda x: x.flatten(1)[:1, :10]}, "outputs"),
    "no tensor": ({"model": lambda x: None}, "outputs"),
    "no model": ({"model": 5}, "model"),
    "no models": ({"model": {}}, "model"),
    "no such model": ({"model": "nothing"}, "nothing"),
    "model that raises": ({"model": lambda x: 1 / 0}, "ZeroDivisionError"),
    "unknown effort": ({"effort": "enormous"}, "enormous"),
    "unknown threat": ({"threats": "linfinity:0.1"}, "linfinity"),
    "threat without radius": ({"threats": "linf"}, "linf"),
    "radius in words": ({"threats": "linf:small"}, "small"),
    "radius zero": ({"threats": "l2:0"}, "above 0"),
    "radius below zero": ({"threats": "l2:-1"}, "above 0"),
    "radius over zero": ({"threats": "l2:1/0"}, "1/0"),
    "radius not a number": ({"threats": "l2:nan"}, "nan"),
    "same threat twice": ({"threats": ["linf:0.1", "linf:0.2"]}, "twice"),
    "threat that is no string": ({"threats": [0.1]}, "threats"),
    "batch size zero": ({"batch_size": 0}, "batch_size"),
    "batch size below zero": ({"batch_size": -3}, "batch_size"),
    "n below one": ({"n": 0}, "n"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options, word = BAD[name]
    settings = {"model": "digits-standard", "data": (X, Y), "threats": "linf:0.1", "effort": "fast"} | options
    with pytest.raises(EpsballError) as error:
        eb.audit(**settings)  # without `out`: nor may runs/ appear
    text = str(error.value)
    assert "\n" not in text
    assert word in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["a file in the way", "a file above", "a null byte"])
def test_an_unwritable_folder_is_one_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    out = {"a file in the way": tmp_path / "file", "a file above": tmp_path / "file" / "run", "a null byte": f"{tmp_path}/a\0b"}[kind]
    with pytest.raises(BadInput, match="out") as error:
        eb.audit("digits-standard", (X, Y), "linf:0.1", effort="fast", out=out)
    assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_refused_model_leaves_no_folder_and_an_old_run_untouched(tmp_path: Path) -> None:
    blind = eb.wrap(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with torch.no_grad():
        blind.model.module[1].weight.zero_()  # type: ignore[union-attr, operator]
    with pytest.raises(BadInput, match="answers class"):
        eb.audit(blind, (X, Y), "linf:0.1", effort="fast", out=tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    old = tmp_path / "old"
    old.mkdir()
    (old / "report.json").write_text("{}")
    with pytest.raises(BadInput, match="answers class"):
        eb.audit(blind, (X, Y), "linf:0.1", effort="fast", out=old)
    assert [(path.name, path.read_text()) for path in old.iterdir()] == [("report.json", "{}")]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BadInput, match="answers class"):
        eb.audit(blind, (X, Y), "linf:0.1", effort="fast", out=empty)
    assert empty.is_dir()  # it was not ours to remove


def test_an_error_of_the_listener_leaves_no_folder(tmp_path: Path) -> None:
    class Broken:
        def estimate(self, most: Estimate) -> None:
            raise ZeroDivisionError

        def tick(self, tick: object) -> None:
            raise AssertionError

    with pytest.raises(ZeroDivisionError):
        eb.audit("digits-standard", (X, Y), "linf:0.1", effort="fast", out=tmp_path / "run", progress=Broken())
    assert list(tmp_path.iterdir()) == []


def test_two_runs_without_out_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = {eb.audit("digits-standard", (X, Y), "linf:0.1", effort="fast").run for _ in range(2)}
    assert len(runs) == 2
    assert all((tmp_path / run / "report.json").is_file() for run in runs)
