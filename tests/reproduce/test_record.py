import json

import pytest

from epsball.errors import BadInput
from epsball.reproduce import Experiment, Figure, Finding, Line, Setting
from epsball.reproduce.record import command, markdown, plain, prepare, write

ONE = Experiment("tiny", "A tiny one", "Nobody 2000, arXiv 0001.0001", ("mnist",), 1, lambda setting: FINDING)
FINDING = Finding(
    (Line("error | before", "1 %", "50.0 % [1.3, 98.7], n = 2", "a\nreason"), Line("rest", "not read", "3")),
    (Figure("curve", "<svg/>", "What it shows"),),
    ("One note.",),
)


def test_the_table_holds_every_line_its_command_and_its_figures():
    text = markdown(ONE, FINDING, Setting(seed=4, n=20), 61.0)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows == [
        "| quantity | paper | ours | why they differ |",
        "|---|---|---|---|",
        "| error \\| before | 1 % | 50.0 % [1.3, 98.7], n = 2 | a reason |",
        "| rest | not read | 3 |  |",
    ]
    assert "`EPSBALL_DATA=DIR epsball reproduce tiny --seed 4 --n 20`" in text
    assert "1 min 1 s" in text
    assert "![What it shows](tiny-curve.svg)" in text
    assert "- One note." in text
    assert "mean nothing" not in text


def test_a_quick_run_says_so():
    assert "its figures mean nothing" in markdown(ONE, FINDING, Setting(quick=True), 1.0)
    assert command(ONE, Setting(quick=True)).endswith("--seed 0 --quick")


def test_files_agree_with_what_was_found(tmp_path):
    path = write(tmp_path / "new" / "folder", ONE, FINDING, Setting(), 2.0)
    assert path.name == "tiny.md"
    assert {p.name for p in path.parent.iterdir()} == {"tiny.md", "tiny.json", "tiny-curve.svg"}
    told = json.loads((path.parent / "tiny.json").read_text())
    assert told == plain(ONE, FINDING, Setting(), 2.0)
    assert told["lines"][0] == {"what": "error | before", "paper": "1 %", "ours": "50.0 % [1.3, 98.7], n = 2", "why": "a\nreason"}
    assert told["figures"] == [{"file": "tiny-curve.svg", "caption": "What it shows"}]
    assert "+" not in told["versions"]["torch"]
    assert (path.parent / "tiny-curve.svg").read_text() == "<svg/>"


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"--out .*cannot be made"):
        prepare(tmp_path / "file" / "below")
