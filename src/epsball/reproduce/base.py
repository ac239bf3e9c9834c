"""What an experiment is, what it is given, what it hands back; and the registry of all of them."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from epsball.errors import BadInput

NOT_READ = "not read"
"""The paper's column where its text was not at hand: a figure from memory is no figure."""

DATA_FILES = {"mnist": "mnist/mnist.npz", "cifar": "cifar10_jpeg"}
"""Data set -> where it lies below EPSBALL_DATA."""


@dataclass(frozen=True)
class Line:
    """One row of the table: the quantity, the paper's figure, ours with n and interval, and why they differ."""

    what: str
    paper: str
    ours: str
    why: str = ""


@dataclass(frozen=True)
class Figure:
    """One picture: `name` becomes part of its file name, `svg` is a complete document."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Finding:
    """What an experiment hands back."""

    lines: tuple[Line, ...]
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()


def _silent(message: str) -> None:
    return None


@dataclass(frozen=True)
class Setting:
    """What an experiment is given.

    Attributes:
        data: folder of data sets (EPSBALL_DATA), None where there is none. seed: of everything random.
        n: test samples asked for, None for the experiment's own number. quick: tiny sizes, seconds, figures without meaning.
        say: progress. cache: folder of trained networks.
    """

    data: Path | None = None
    seed: int = 0
    n: int | None = None
    quick: bool = False
    say: Callable[[str], None] = _silent
    cache: Path = Path("runs/nets")

    def count(self, usual: int, quick: int) -> int:
        """How many test samples: what was asked for, else `usual`, else (quick runs) `quick`."""
        return self.n or (quick if self.quick else usual)

    def place(self, name: str) -> Path:
        """Where the data set `name` lies.

        Raises:
            BadInput: no data folder, or no such data in it.
        """
        if self.data is None:
            raise BadInput(f"EPSBALL_DATA: not set: point it at a folder that holds {DATA_FILES[name]}")
        path = self.data / DATA_FILES[name]
        if not path.exists():
            raise BadInput(f"EPSBALL_DATA: '{self.data}' has no {DATA_FILES[name]}: put it there or point elsewhere")
        return path


Body = Callable[[Setting], Finding]


@dataclass(frozen=True)
class Experiment:
    """One registered experiment.

    Attributes:
        name: on the command line. title: one line. paper: authors, year, arXiv number. needs: data sets.
        minutes: on one busy core without cached networks, about. body: the function.
    """

    name: str
    title: str
    paper: str
    needs: tuple[str, ...]
    minutes: float
    body: Body


EXPERIMENTS: dict[str, Experiment] = {}


def experiment(name: str, *, title: str, paper: str, needs: tuple[str, ...] = ("mnist",), minutes: float) -> Callable[[Body], Body]:
    """Registers a function as the experiment `name`; the function itself is left as it is."""

    def enter(body: Body) -> Body:
        if name in EXPERIMENTS:
            raise BadInput(f"experiment '{name}': registered twice: choose another name")
        EXPERIMENTS[name] = Experiment(name, title, paper, needs, minutes, body)
        return body

    return enter


def experiments() -> dict[str, Experiment]:
    """All experiments, those of the oldest paper first."""
    import epsball.reproduce

    for module in pkgutil.iter_modules(epsball.reproduce.__path__):
        importlib.import_module(f"epsball.reproduce.{module.name}")
    return dict(sorted(EXPERIMENTS.items(), key=lambda entry: (_arxiv(entry[1].paper), entry[0])))


def _arxiv(paper: str) -> str:
    found = re.search(r"\d{4}\.\d{4,5}", paper)
    return found.group() if found else "9"


def find(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        BadInput: there is none; names those that there are.
    """
    known = experiments()
    if name not in known:
        raise BadInput(f"experiment '{name}': unknown: use one of {', '.join(known)}")
    return known[name]


def run(name: str, setting: Setting) -> Finding:
    """Runs one experiment.

    Raises:
        BadInput: an unknown name, or data that is not there; before anything is computed.
    """
    chosen = find(name)
    for need in chosen.needs:
        setting.place(need)
    return chosen.body(setting)


def percent_of(count: int, n: int) -> str:
    """A rate with its exact 95 % interval: '99.2 % [98.4, 99.7], n = 1,000'.

    >>> percent_of(5, 10)
    '50.0 % [18.7, 81.3], n = 10'
    """
    from epsball.auditing.statistics import rate
    from epsball.report.text import interval, percent

    found = rate(count, n)
    return f"{percent(found.value)} {interval(found)}, n = {n:,}" if n else "no sample"


def mean_of(values: list[float], digits: int = 1, unit: str = "", scale: float = 1.0) -> str:
    """A mean with its normal 95 % interval: '79.3 % [78.9, 79.7], n = 990'; no interval for one value.

    `scale` multiplies first (100 for percent); `unit` stands behind the mean.

    >>> mean_of([0.5, 0.7], 1, " %", 100)
    '60.0 % [40.4, 79.6], n = 2'
    """
    n = len(values)
    if not n:
        return "no sample"
    middle = scale * sum(values) / n
    if n == 1:
        return f"{middle:.{digits}f}{unit}, n = 1"
    spread = (sum((scale * v - middle) ** 2 for v in values) / (n - 1) / n) ** 0.5
    return f"{middle:.{digits}f}{unit} [{middle - 1.96 * spread:.{digits}f}, {middle + 1.96 * spread:.{digits}f}], n = {n:,}"
