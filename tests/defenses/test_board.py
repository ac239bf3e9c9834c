"""TensorBoard as an extra: what is written, by a writer that only takes notes, and the line where the package is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from epsball.cli import main
from epsball.defenses.training import Board, Record
from epsball.errors import BadInput

NOTES: list[tuple[str, float, int]] = []


class Writer:
    """The three methods of SummaryWriter that are called, by its signature."""

    def __init__(self, log_dir: str) -> None:
        NOTES.append(("opened " + log_dir, 0.0, 0))

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        NOTES.append((tag, scalar_value, global_step))

    def flush(self) -> None:
        NOTES.append(("flush", 0.0, 0))

    def close(self) -> None:
        NOTES.append(("close", 0.0, 0))


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, int]]:
    stub = ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    NOTES.clear()
    return NOTES


def test_records_become_scalars_and_steps_between_them_nothing(noted: list[tuple[str, float, int]]) -> None:
    record = Record(1, 18, 2.0, 0.5, {"adversarial": 0.7}, 0.9, 0.6, 1e-3, 0.1, certified=0.4)
    board = Board(Path("events"))
    board(17, 36, None)
    board(18, 36, record)
    board.close()
    assert noted == [
        ("opened events", 0.0, 0),
        ("train/loss", 0.5, 18),
        ("train/adversarial", 0.7, 18),
        ("held/clean", 0.9, 18),
        ("held/robust", 0.6, 18),
        ("held/certified", 0.4, 18),
        ("course/rate", 1e-3, 18),
        ("course/radius", 0.1, 18),
        ("flush", 0.0, 0),
        ("close", 0.0, 0),
    ]


def test_the_command_writes_them_and_closes(noted: list[tuple[str, float, int]], tmp_path: Path) -> None:
    words = ["train", "--method", "standard", "--epochs", "2", "-n", "80", "--out", str(tmp_path / "run"), "--json"]
    assert main([*words, "--tensorboard", str(tmp_path / "events")]) == 0
    assert [name for name, _, _ in noted].count("held/robust") == 2
    assert not any(name == "held/certified" for name, _, _ in noted)
    assert noted[-1][0] == "close"


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BadInput, match=r"tensorboard: is not installed: pip install 'epsball\[tensorboard\]'"):
        Board(Path("events"))
