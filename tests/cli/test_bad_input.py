"""Bad input on the command line: one line on stderr that names field and value, exit code 2, nothing written."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import epsball as eb
from epsball.cli import main
from epsball.models.digits import load

MODEL = "digits-standard"
GOOD = ["-d", "data.npz", "--effort", "fast", "-t", "linf:0.1", "-o", "run"]


class Payload:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return open, ("executed", "w")


def networks() -> str:
    return (
        "import torch\nfrom epsball.models.digits import load, network\n\n"
        "def make():\n    return network()\n\n"
        "def wide():\n    return lambda x: x.expand(-1, 10, -1, -1)\n\n"
        "def whole():\n    return lambda x: x.flatten(1)[:, :10].argmax(1)\n\n"
        "def three():\n    net = load('digits-standard')\n    return lambda x: net(x)[:, :3]\n\n"
        "def broken():\n    raise ValueError('two\\nlines')\n\n"
        "def text():\n    return 'model'\n"
    )


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with everything that the cases below name."""
    monkeypatch.chdir(tmp_path)
    data = eb.load_data("digits", n=24)
    x, y = data.x.numpy(), data.y.numpy()
    nan = x.copy()
    nan[3, 0, 0, 0] = np.nan
    arrays = {
        "data": (x, y),
        "short": (x, y[:-1]),
        "beyond": (x, np.where(y == 9, 12, y)),
        "negative": (x, y - 1),
        "loud": (x * 3 - 1, y),
        "nan": (nan, y),
        "empty": (x[:0], y[:0]),
        "one": (x, np.zeros_like(y)),
        "small": (x[..., :6, :6], y),
    }
    for name, (images, labels) in arrays.items():
        np.savez(f"{name}.npz", x=images, y=labels)
    Path("net.py").write_text(networks())
    state = load(MODEL).state_dict()
    save_file(state, "net.safetensors")
    save_file({name: tensor for name, tensor in state.items() if not name.startswith("7.")}, "part.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in state.items()}, "nan.safetensors")
    save_file({name: tensor[..., :1].contiguous() for name, tensor in state.items()}, "thin.safetensors")
    Path("evil.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    torch.save({"state_dict": Payload()}, "evil2.pt")
    np.savez("evil.npz", x=np.array([Payload()] * 4, dtype=object), y=np.arange(4))
    Path("file").write_text("mine")
    Path("noise.npz").write_bytes(b"PK\x03\x04 not a zip file")
    return tmp_path


AUDIT: dict[str, tuple[list[str], str]] = {
    "labels of the wrong length": ([MODEL, "-d", "short.npz"], "labels"),
    "labels out of range": ([MODEL, "-d", "beyond.npz"], "class 12"),
    "negative labels": ([MODEL, "-d", "negative.npz"], "labels"),
    "images outside the box": ([MODEL, "-d", "loud.npz"], "box"),
    "NaN in the images": ([MODEL, "-d", "nan.npz"], "NaN"),
    "empty data": ([MODEL, "-d", "empty.npz"], "empty"),
    "one class": ([MODEL, "-d", "one.npz"], "class 0"),
    "images of another size": ([MODEL, "-d", "small.npz"], "shape"),
    "no such data": ([MODEL, "-d", "nothing.npz"], "nothing.npz"),
    "damaged data": ([MODEL, "-d", "noise.npz"], "noise.npz"),
    "data of an unknown kind": ([MODEL, "-d", "net.py"], "net.py"),
    "a pickle in the data": ([MODEL, "-d", "evil.npz"], "evil.npz"),
    "unknown split": ([MODEL, "-d", "digits", "--split", "dev"], "dev"),
    "unknown layout": ([MODEL, "--layout", "wch"], "wch"),
    "unknown classes": ([MODEL, "-d", "digits", "--classes", "a,b"], "class"),
    "no such model": (["nothing"], "nothing"),
    "no such file": (["nothing.py:make"], "nothing.py"),
    "no such function": (["net.py:nothing"], "nothing"),
    "a file without a function": (["net.py"], "net.py"),
    "a factory that raises": (["net.py:broken"], "two lines"),
    "a factory of something else": (["net.py:text"], "str"),
    "an address": (["https://example.com/model"], "https://example.com/model"),
    "outputs of a segmentation": (["net.py:wide"], "outputs"),
    "outputs that are decisions": (["net.py:whole"], "outputs"),
    "too few outputs": (["net.py:three"], "3 classes"),
    "weights that are missing": (["net.py:make", "-w", "nothing.safetensors"], "nothing.safetensors"),
    "weights that lack a layer": (["net.py:make", "-w", "part.safetensors"], "7.weight"),
    "weights of another shape": (["net.py:make", "-w", "thin.safetensors"], "do not fit"),
    "weights that are NaN": (["net.py:make", "-w", "nan.safetensors"], "NaN"),
    "weights that run code": (["net.py:make", "-w", "evil.pt"], "evil.pt"),
    "weights with code inside": (["net.py:make", "-w", "evil2.pt"], "evil2.pt"),
    "weights that are no weights": (["net.py:make", "-w", "data.npz"], "data.npz"),
    "weights without a model": (["-w", "net.safetensors"], "--weights"),
    "mean without a model": (["--mean", "0.5"], "--mean"),
    "a file in the way": ([MODEL, "-o", "file"], "file"),
    "a file above": ([MODEL, "-o", "file/run"], "file/run"),
    "junit nowhere": ([MODEL, "--junit", "no/j.xml"], "no/j.xml"),
    "junit on a folder": ([MODEL, "--junit", "."], "junit"),
    "unknown option": ([MODEL, "--epsilon", "0.1"], "--epsilon"),
    "one word too many": ([MODEL, "digits-robust"], "digits-robust"),
    "unknown effort": ([MODEL, "--effort", "huge"], "huge"),
    "unknown threat": ([MODEL, "-t", "l3:1"], "l3"),
    "threat without a radius": ([MODEL, "-t", "l2"], "l2"),
    "radius in words": ([MODEL, "-t", "l2:some"], "some"),
    "radius zero": ([MODEL, "-t", "l2:0"], "above 0"),
    "radius below zero": ([MODEL, "-t", "l2:-1"], "above 0"),
    "radius of zeros": ([MODEL, "-t", "l2:1/0"], "1/0"),
    "radius not a number": ([MODEL, "-t", "l2:nan"], "nan"),
    "radius without end": ([MODEL, "-t", "l2:inf"], "inf"),
    "empty radius": ([MODEL, "-t", "l2:0.1,,0.2"], "''"),
    "the same threat twice": ([MODEL, "-t", "linf:0.2"], "twice"),
    "box of one": ([MODEL, "--box", "1"], "--box"),
    "box of words": ([MODEL, "--box", "low,high"], "low,high"),
    "box upside down": ([MODEL, "--box", "1,0"], "box"),
    "box without end": ([MODEL, "--box", "0,inf"], "box"),
    "mean of words": ([MODEL, "--mean", "half"], "half"),
    "mean not a number": ([MODEL, "--mean", "nan"], "mean"),
    "means of three channels": ([MODEL, "--mean", "0,0,0"], "mean"),
    "std zero": ([MODEL, "--std", "0"], "std"),
    "std below zero": ([MODEL, "--std", "-1"], "std"),
    "unknown outputs": ([MODEL, "--outputs", "words"], "words"),
    "unknown device": ([MODEL, "--device", "abacus"], "abacus"),
    "device that is not there": ([MODEL, "--device", "cuda:99"], "cuda:99"),
    "device without numbers": ([MODEL, "--device", "meta"], "meta"),
    "batch size zero": ([MODEL, "--batch-size", "0"], "--batch-size"),
    "batch size below zero": ([MODEL, "--batch-size", "-4"], "-4"),
    "batch size in words": ([MODEL, "--batch-size", "many"], "many"),
    "n zero": ([MODEL, "-n", "0"], "0"),
    "n in words": ([MODEL, "-n", "all"], "all"),
    "seed in words": ([MODEL, "--seed", "lucky"], "lucky"),
    "fail-under above 100": ([MODEL, "--fail-under", "140"], "140"),
}

ATTACK: dict[str, tuple[list[str], str]] = {
    "unknown attack": (["nothing", MODEL], "nothing"),
    "no model": (["pgd"], "'model'"),
    "unknown option": (["pgd", MODEL, "-s", "stepz=4"], "stepz"),
    "option without value": (["pgd", MODEL, "-s", "steps"], "steps"),
    "steps in words": (["pgd", MODEL, "-s", "steps=many"], "many"),
    "half a step": (["pgd", MODEL, "-s", "steps=1.5"], "1.5"),
    "steps below zero": (["pgd", MODEL, "-s", "steps=-1"], "steps"),
    "steps of truth": (["pgd", MODEL, "-s", "steps=true"], "steps"),
    "no restarts": (["pgd", MODEL, "-s", "restarts=0"], "restarts"),
    "step size in words": (["pgd", MODEL, "-s", "step=small"], "small"),
    "step size not a number": (["pgd", MODEL, "-s", "step=NaN"], "step"),
    "noise in numbers": (["pgd", MODEL, "-s", "noise=3"], "noise"),
    "unknown objective": (["pgd", MODEL, "-s", "objective=hope"], "hope"),
    "objective as a number": (["pgd", MODEL, "-s", "objective=3"], "objective"),
    "option for Python only": (["apgd_t", MODEL, "-s", "order=malt"], "order"),
    "threat as an option": (["pgd", MODEL, "-s", "threat=l2"], "threat"),
    "no draws": (["noise", MODEL, "-s", "draws=0"], "draws"),
    "threat that it lacks": (["apgd", MODEL, "-t", "l0:3"], "l0"),
    "two radii": (["pgd", MODEL, "-t", "linf:0.1,0.2"], "linf:0.1,0.2"),
    "target beyond the classes": (["pgd", MODEL, "--target", "10"], "10"),
    "target below zero": (["pgd", MODEL, "--target", "-2"], "-2"),
    "target for an attack with its own": (["apgd_t", MODEL, "--target", "1"], "apgd_t"),
    "save nowhere": (["pgd", MODEL, "--save", "no/adv.npz"], "no/adv.npz"),
    "save on a folder": (["pgd", MODEL, "--save", "."], "save"),
    "images of another size": (["pgd", MODEL, "-d", "small.npz"], "shape"),
    "labels out of range": (["pgd", MODEL, "-d", "beyond.npz"], "12"),
}

OTHER: dict[str, tuple[list[str], str]] = {
    "unknown command": (["audti"], "audti"),
    "verify without a run": (["verify"], "RUN"),
    "verify nothing": (["verify", "nothing"], "nothing"),
    "verify a file": (["verify", "file"], "file"),
    "report on nothing": (["report", "nothing"], "nothing"),
    "list with an argument": (["list", "attacks"], "attacks"),
}


def check(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if "__pycache__" not in str(path)}
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("epsball: ")
    assert err.count("\n") == 1
    assert word in err
    assert "Traceback" not in err
    assert len(err) < 420
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*") if "__pycache__" not in str(path)} == before
    assert not Path("executed").exists()
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize("name", AUDIT)
def test_audit(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, word = AUDIT[name]
    given = {flag for flag in arguments if flag in ("-d", "-o", "--effort")}
    rest = [w for flag, value in zip(GOOD[::2], GOOD[1::2], strict=True) if flag not in given for w in (flag, value)]
    if "-t" in arguments and name != "the same threat twice":
        rest = [w for w in rest if w not in ("-t", "linf:0.1")]
    check(["audit", *arguments, *rest], word, capsys)


@pytest.mark.parametrize("name", ATTACK)
def test_attack(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, word = ATTACK[name]
    check(["attack", *arguments, *([] if "-d" in arguments else ["-d", "data.npz"])], word, capsys)


@pytest.mark.parametrize("name", OTHER)
def test_other_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, word = OTHER[name]
    check(arguments, word, capsys)


def test_the_cases_fail_for_their_own_reason(capsys: pytest.CaptureFixture[str]) -> None:
    """The control: with nothing wrong, the same words run."""
    assert main(["audit", MODEL, *GOOD]) == 0
    assert main(["audit", "net.py:make", "-w", "net.safetensors", *GOOD[:-1], "run2"]) == 0
    assert main(["attack", "pgd", MODEL, "-d", "data.npz", "-s", "steps=3", "-s", "step=null"]) == 0
    capsys.readouterr()


def test_the_payload_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    """The control: unpickled, it does write its file."""
    pickle.loads(Path("evil.pt").read_bytes()).close()
    assert Path("executed").exists()


def test_a_damaged_report_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", MODEL, *GOOD]) == 0
    whole = Path("run/report.json").read_text()
    capsys.readouterr()
    for content in (whole[:200], "{}", "[]", whole.replace('"seed"', '"sead"')):
        Path("run/report.json").write_text(content)
        for command in ("report", "verify"):
            check([command, "run"], "report.json", capsys)
