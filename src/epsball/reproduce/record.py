"""A finding on disk: a Markdown table, the same as JSON, and its figures beside them."""

from __future__ import annotations

import json
import platform
import shlex
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from epsball.errors import BadInput
from epsball.report.files import write_atomic
from epsball.report.text import clean, duration
from epsball.reproduce.base import Experiment, Finding, Setting

HEADS = ("quantity", "paper", "ours", "why they differ")
INTERVALS = "In brackets: 95 % intervals, Clopper-Pearson for rates and normal for means; they cover the choice of test samples only."


def plain(experiment: Experiment, finding: Finding, setting: Setting, seconds: float) -> dict[str, Any]:
    """Everything that was found but the pictures, as plain data."""
    return {
        "name": experiment.name,
        "title": experiment.title,
        "paper": experiment.paper,
        "command": command(experiment, setting),
        "seed": setting.seed,
        "n": setting.n,
        "quick": setting.quick,
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), **{name: _release(name) for name in ("epsball", "torch", "numpy")}},
        "lines": [asdict(line) for line in finding.lines],
        "figures": [{"file": _file(experiment, figure.name), "caption": figure.caption} for figure in finding.figures],
        "notes": list(finding.notes),
    }


def command(experiment: Experiment, setting: Setting) -> str:
    """What reproduces it."""
    words = ["epsball", "reproduce", experiment.name, "--seed", str(setting.seed)]
    words += ["--n", str(setting.n)] if setting.n else []
    return "EPSBALL_DATA=DIR " + shlex.join(words + (["--quick"] if setting.quick else []))


def markdown(experiment: Experiment, finding: Finding, setting: Setting, seconds: float) -> str:
    """The table with what a reader needs to run it again."""
    versions = f"Python {platform.python_version()}, torch {_release('torch')}, epsball {_release('epsball')}"
    text = [
        f"# {experiment.title}",
        "",
        f"{experiment.paper}. `{command(experiment, setting)}`; {versions}; {duration(seconds)}, "
        "not counting networks that had been trained before.",
        "",
        *(["**Quick run on tiny data: its figures mean nothing.**", ""] if setting.quick else []),
        _row(HEADS),
        "|---" * len(HEADS) + "|",
        *(_row((line.what, line.paper, line.ours, line.why)) for line in finding.lines),
        "",
        INTERVALS,
    ]
    for figure in finding.figures:
        text += ["", f"![{clean(figure.caption)}]({_file(experiment, figure.name)})", "", f"*{clean(figure.caption)}*"]
    if finding.notes:
        text += ["", *(f"- {clean(note)}" for note in finding.notes)]
    return "\n".join(text) + "\n"


def write(folder: Path, experiment: Experiment, finding: Finding, setting: Setting, seconds: float) -> Path:
    """Writes `NAME.md`, `NAME.json` and the figures into `folder`; returns the table's path.

    Raises:
        BadInput: the folder cannot be made or written.
    """
    prepare(folder)
    for figure in finding.figures:
        write_atomic(folder / _file(experiment, figure.name), figure.svg)
    told = plain(experiment, finding, setting, seconds)
    write_atomic(folder / f"{experiment.name}.json", json.dumps(told, indent=2, allow_nan=False) + "\n")
    write_atomic(folder / f"{experiment.name}.md", markdown(experiment, finding, setting, seconds))
    return folder / f"{experiment.name}.md"


def prepare(folder: Path) -> None:
    """Makes the folder; says so before anything is computed, not after.

    Raises:
        BadInput: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out '{clean(str(folder))}': cannot be made ({error.strerror}): choose another place") from error


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(clean(cell).replace("|", "\\|") for cell in cells) + " |"


def _file(experiment: Experiment, name: str) -> str:
    return f"{experiment.name}-{name}.svg"


def _release(name: str) -> str:
    return version(name).split("+")[0]
