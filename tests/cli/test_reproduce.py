"""`epsball reproduce`: the list, the files, the table in the terminal, its errors and Ctrl-C. The experiment here is planted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from epsball.cli import main
from epsball.reproduce import Experiment, Figure, Finding, Line, Setting


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Setting]:
    """Two experiments that need no data; the second is interrupted when its n is 13."""
    asked: list[Setting] = []

    def first(setting: Setting) -> Finding:
        asked.append(setting)
        setting.say("training something")
        lines = (Line("error at 0.25", "99.9 %", "98.0 % [93.0, 99.8], n = 100", "[bold]another training"), Line("rest", "not read", "1"))
        return Finding(lines, (Figure("curve", "<svg/>", "A curve"),), ("A note.",))

    def second(setting: Setting) -> Finding:
        if setting.n == 13:
            raise KeyboardInterrupt
        return Finding((Line("only", "1", "2"),))

    known = {
        "first": Experiment("first", "The first one", "Nobody 2000, arXiv 0001.0001", (), 1.5, first),
        "second": Experiment("second", "The second one", "Nobody 2001, arXiv 0101.0001", ("mnist",), 2, second),
    }
    (tmp_path / "data" / "mnist").mkdir(parents=True)
    (tmp_path / "data" / "mnist" / "mnist.npz").touch()
    monkeypatch.setenv("EPSBALL_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("epsball.reproduce.experiments", lambda: known)
    monkeypatch.setattr("epsball.reproduce.base.experiments", lambda: known)
    monkeypatch.chdir(tmp_path)
    return asked


def test_without_a_name_it_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("fgsm-softmax "))
    assert "arXiv 1412.6572" in lines[at + 1]
    assert "needs mnist" in lines[at + 1]
    assert "min on one core" in lines[at + 1]
    assert err == ""
    assert main(["reproduce", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["experiments"]
    assert {"name", "title", "paper", "needs", "minutes"} == set(told[0])
    assert "loss-surface" in [one["name"] for one in told]


def test_one_experiment_prints_its_table_and_writes_its_files(
    planted: list[Setting], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["reproduce", "first", "-o", "papers", "--seed", "5", "-n", "100", "--nets", "kept"]) == 0
    out, err = capsys.readouterr()
    assert "The first one" in out
    assert "99.9 %" in out
    assert "(1) [bold]another training" in out
    assert "A note." in out
    assert max(map(len, out.splitlines())) <= 80
    assert "training something" in err
    assert {path.name for path in Path("papers").iterdir()} == {"first.md", "first.json", "first-curve.svg"}
    (setting,) = planted
    assert (setting.seed, setting.n, setting.quick, setting.cache) == (5, 100, False, Path("kept"))
    assert setting.data == tmp_path / "data"
    assert "`EPSBALL_DATA=DIR epsball reproduce first --seed 5 --n 100`" in Path("papers/first.md").read_text()


def test_json_is_one_object_and_nothing_else(planted: list[Setting], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "all", "--quick", "--json", "-o", "papers"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    told = json.loads(out)
    assert [one["name"] for one in told["experiments"]] == ["first", "second"]
    assert told["experiments"][0] == json.loads(Path("papers/first.json").read_text())
    assert told["experiments"][0]["quick"]
    assert "first: The first one" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reproduce", "thrid"], "experiment 'thrid': unknown: use one of first, second"),
        (["reproduce", "first", "-o", "file"], "--out 'file': cannot be made"),
        (["reproduce", "first", "-n", "0"], "got '0'"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    planted: list[Setting], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert (out, err.count("\n")) == ("", 1)
    assert planted == []


def test_data_of_every_experiment_is_looked_for_first(
    planted: list[Setting], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EPSBALL_DATA")
    assert main(["reproduce", "all", "-o", "papers"]) == 2
    assert "EPSBALL_DATA: not set: point it at a folder that holds mnist/mnist.npz" in capsys.readouterr().err
    assert planted == []
    assert not Path("papers").exists()


def test_ctrl_c_keeps_what_is_done(planted: list[Setting], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "all", "-n", "13", "-o", "papers"]) == 130
    out, err = capsys.readouterr()
    assert "interrupted; 1 of 2 tables are whole in papers; trained networks are kept in runs/nets" in err
    assert "The first one" in out
    assert {path.name for path in Path("papers").iterdir()} == {"first.md", "first.json", "first-curve.svg"}
    assert main(["reproduce", "all", "-n", "13", "-o", "papers", "--json"]) == 130
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["experiments"]] == ["first"]


def test_help_needs_no_torch() -> None:
    code = "import sys; from epsball.cli import main; code = main(['reproduce', '--help']); sys.exit(code or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Examples: epsball reproduce" in done.stdout
