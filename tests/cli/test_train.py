"""`epsball train`: what it writes, that the line it ends with works, and that a stopped run goes on."""

from __future__ import annotations

import inspect
import json
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from epsball.cli import main
from epsball.defenses.training import METHODS, Fitted, Record, small

QUICK = ["train", "--method", "fast", "--epochs", "2", "-n", "200"]


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_the_line_at_the_end_audits_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a run"  # a space, so that quoting counts
    assert main([*QUICK, "--out", str(folder), "--json"]) == 0
    found = told(capsys)
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files == {"checkpoint.safetensors", "log.jsonl", "model.py", "model.safetensors"}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines == found["history"]
    assert [line["epoch"] for line in lines] == [1, 2]
    words = shlex.split(str(found["audit"]))
    assert words[:2] == ["epsball", "audit"]
    assert main([*words[1:], "-n", "10", "--effort", "fast", "--out", str(tmp_path / "audit"), "--json"]) == 0
    model = told(capsys)["models"][0]  # type: ignore[index]
    assert model["results"][0]["threat"] == "linf"


def test_without_json_the_line_is_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith("Next:    epsball audit ")
    assert "no verdict" in printed.out
    assert printed.err.count("held out") == 2
    assert "no test part" not in printed.err


def test_a_factory_of_ones_own_with_a_normalization(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((80, 6), dtype=np.float32), np.arange(80) % 2
    x[:, 0] = 0.2 + 0.6 * y
    np.savez(tmp_path / "d.npz", x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    (tmp_path / "net.py").write_text("from torch import nn\n\n\ndef make():\n    return nn.Linear(6, 2)\n")
    factory, data = f"{tmp_path / 'net.py'}:make", str(tmp_path / "d.npz")
    options = ["--data", data, "-t", "l2:0.05", "--mean", "0.5", "--std", "0.25", "--batch-size", "8", "--epochs", "20", "--lr", "0.05"]
    assert main(["train", factory, *options, "--out", str(tmp_path / "run"), "--json"]) == 0
    found = told(capsys)
    assert not (tmp_path / "run" / "model.py").exists()
    assert set(load_file(tmp_path / "run" / "model.safetensors")) == {"weight", "bias"}
    words = shlex.split(str(found["audit"]))
    assert words[words.index("--mean") + 1] == "0.5"
    assert main([*words[1:], "--effort", "fast", "--out", str(tmp_path / "audit"), "--json"]) == 0
    result = told(capsys)["models"][0]["results"][0]  # type: ignore[index]
    assert result["robust_accuracy"]["value"] == 1.0


def test_interrupted_it_keeps_the_step_and_goes_on_to_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from epsball.cli import train

    call, folder = train.Live.__call__, tmp_path / "stopped"

    def interrupted(live: train.Live, step: int, steps: int, record: object) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        call(live, step, steps, record)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(train.Live, "__call__", interrupted)
        patched.setattr("sys.argv", ["epsball", *QUICK, "--seed", "3"])
        assert main([*QUICK, "--seed", "3", "--out", str(folder)]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert "interrupted after step 2 of 4; to go on from there: epsball train --method fast" in said
    assert said.endswith(f"--out {folder}")
    assert main([*QUICK, "--seed", "3", "--out", str(folder)]) == 0
    assert main([*QUICK, "--seed", "3", "--out", str(tmp_path / "whole")]) == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("stopped", "whole"))
    assert first == second


def test_data_without_a_test_part_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.random((40, 6), dtype=np.float32), y=np.arange(40) % 2)
    assert main(["train", "--data", str(tmp_path / "d.npz"), "--epochs", "1", "--batch-size", "8", "--out", str(tmp_path / "run")]) == 0
    assert "has no test part of its own" in capsys.readouterr().err


FAULTS = [
    (["--method", "trads"], "method 'trads': unknown: use one of trades"),
    (["--threat", "linf:0.1,0.2"], "2 radii: train at one"),
    (["--threat", "flow:1"], "threat 'flow': training knows linf, l2 and l1"),
    (["--set", "beta=1"], "method 'pgd': has no option 'beta': use one of steps, share"),
    (["--optimizer", "lion"], "--optimizer 'lion': use one of adam, sgd"),
    (["--weights", "w.safetensors"], "describe a MODEL: name it first"),
    (["--held-out", "5000"], "--held-out 5000: of 1297 samples: leave some to train on"),
    (["net.onnx"], "cannot be trained: give package.module:factory"),
]


@pytest.mark.parametrize(("words", "said"), FAULTS, ids=[" ".join(words) for words, _ in FAULTS])
def test_faults_are_one_line(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words, "--out", str(tmp_path / "new")]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


FEW = {"steps": 1, "points": 1}
"""What makes the costly methods quick."""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_digits_and_its_line_audits(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = inspect.signature(METHODS[name].make).parameters
    words = [word for option, value in FEW.items() if option in known for word in ("--set", f"{option}={value}")]
    course = ["--epochs", "1", "--batch-size", "16", "-n", "80", "--seed", "1", "--ema", "0"]
    assert main(["train", "--method", name, *words, *course, "--out", str(tmp_path), "--json"]) == 0
    found = told(capsys)
    (record,) = found["history"]  # type: ignore[misc]
    assert record["step"] == 4 * METHODS[name].course.get("replays", 1)
    assert 0 < record["loss"] < 100
    assert (record["certified"] is not None) == (name in ("ibp", "crown_ibp"))
    trained, fresh = load_file(tmp_path / "model.safetensors"), small((1, 8, 8), 10, seed=1).state_dict()
    assert all(bool(tensor.isfinite().all()) for tensor in trained.values())
    assert all(not torch.equal(trained[entry], fresh[entry]) for entry in fresh)
    audit = shlex.split(str(found["audit"]))
    assert audit[audit.index("-w") + 1] == str(tmp_path / "model.safetensors")


def test_distillation_is_one_command_teacher_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--method", "distilled", "--set", "temperature=20", "--epochs", "2", "-n", "200", "--out", str(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "teacher first"
    assert sum("held out" in line for line in said) == 4
    assert {path.name for path in (tmp_path / "teacher").iterdir()} == {"checkpoint.safetensors", "log.jsonl"}
    teacher, student = ((folder / "checkpoint.safetensors").read_bytes() for folder in (tmp_path / "teacher", tmp_path))
    assert b"Tempered(temperature=20)" in teacher
    assert b"Distilled(temperature=20, mark=" in student
    assert main([*words, "--json"]) == 0  # both are done: only read
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == student


def test_a_stop_while_the_teacher_learns_goes_on_to_the_same_student(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from epsball.cli import train

    words, call = ["train", "--method", "distilled", "--epochs", "2", "-n", "200"], train.Live.__call__

    def interrupted(live: train.Live, step: int, steps: int, record: object) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        call(live, step, steps, record)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(train.Live, "__call__", interrupted)
        patched.setattr("sys.argv", ["epsball", *words])
        assert main([*words, "--out", str(tmp_path / "stopped")]) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"--out {tmp_path / 'stopped'}")
    for name in ("stopped", "whole"):
        assert main([*words, "--out", str(tmp_path / name)]) == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("stopped", "whole"))
    assert first == second


def test_training_by_bounds_prints_what_it_proves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--method", "ibp", "--epochs", "1", "-n", "100", "--batch-size", "16"]
    assert main([*words, "--out", str(tmp_path / "ibp")]) == 0
    printed = capsys.readouterr()
    assert ", certified " in printed.err
    assert "certified by intervals" in printed.out
    assert main([*words, "--no-certify", "--out", str(tmp_path / "not")]) == 0
    assert "certified" not in capsys.readouterr().err
    assert main(["train", *QUICK[1:], "--certify", "--out", str(tmp_path / "fast"), "--json"]) == 0
    assert told(capsys)["best"]["certified"] is not None  # type: ignore[index]


@pytest.mark.slow
def test_two_workers_train_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--method", "fast", "--epochs", "1", "-n", "200", "--json", "--out"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "epsball"]
    done = subprocess.run([*launch, *words, str(tmp_path / "two")], capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout)  # one worker speaks
    assert main([*words, str(tmp_path / "one")]) == 0
    (two,), (one,) = found["history"], told(capsys)["history"]  # type: ignore[misc]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {"checkpoint.safetensors", "log.jsonl", "model.py", "model.safetensors"}


def test_catastrophic_overfitting_is_said_with_its_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from epsball.cli import train

    fine = Record(3, 1380, 9.0, 0.5, {"adversarial": 0.8}, clean=0.98, robust=0.19, rate=0.1, radius=0.3, best=True)
    now = replace(fine, epoch=4, step=1840, robust=0.08, best=False, collapsed=True)
    live = train.Live(quiet=False)
    live(1380, 3680, fine)
    live(1840, 3680, now)
    first, second = capsys.readouterr().err.splitlines()
    assert "CATASTROPHIC" not in first
    assert second.startswith("epoch 4:")
    assert "CATASTROPHIC OVERFITTING by step 1840" in second
    train._tell(Fitted(small((1, 8, 8), 10), fine, (fine, now), False), tmp_path, "epsball audit", 100, False, {})
    assert "Catastrophic overfitting was seen at step 1840" in capsys.readouterr().out


def test_several_workers_need_a_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--epochs", "1", "-n", "80"]) == 2
    assert "--out: is needed with several workers: give a folder that all of them see" in capsys.readouterr().err


def test_the_methods_are_listed_with_their_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list", "--json"]) == 0
    methods = told(capsys)["methods"]
    assert {"standard", "pgd", "trades", "mart", "free"} <= {method["name"] for method in methods}  # type: ignore[attr-defined]
    assert all(method["paper"] and method["summary"] for method in methods)  # type: ignore[attr-defined]
