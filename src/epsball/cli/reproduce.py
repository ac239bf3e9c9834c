"""`epsball reproduce`: lists the experiments, or runs some and writes their tables."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from epsball.reproduce import Experiment, Finding, Setting

EXAMPLES = (
    "Examples: epsball reproduce | EPSBALL_DATA=DIR epsball reproduce fgsm-softmax | "
    "epsball reproduce loss-surface --quick --json | epsball reproduce all --out runs/papers"
)


def reproduce(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="An experiment, or all; without it, the list.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where tables and figures go.")] = Path("runs/reproduce"),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    n: Annotated[int | None, typer.Option("--n", "-n", min=1, help="Test samples; the experiment's own number by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, seconds: to see that it runs, not for figures.")] = False,
    nets: Annotated[Path, typer.Option("--nets", metavar="DIR", help="Where trained networks are kept.")] = Path("runs/nets"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")] = False,
) -> None:
    """Measure published figures again: paper, ours, why they differ. Without NAME: what there is. Data: folder EPSBALL_DATA."""
    from epsball.reproduce import Setting, experiments
    from epsball.reproduce.base import find
    from epsball.reproduce.record import prepare

    known = experiments()
    if name is None:
        _list(list(known.values()), as_json)
        return
    chosen = list(known.values()) if name == "all" else [find(name)]
    folder = os.environ.get("EPSBALL_DATA")
    setting = Setting(Path(folder) if folder else None, seed, n, quick, _say, nets)
    for need in dict.fromkeys(need for one in chosen for need in one.needs):
        setting.place(need)
    prepare(out)
    done: list[dict[str, object]] = []
    try:
        for one in chosen:
            done.append(_run(one, setting, out, as_json))
    except KeyboardInterrupt:
        from epsball.cli import EXIT_INTERRUPTED

        kept = f"{len(done)} of {len(chosen)} tables are whole in {out}; trained networks are kept in {nets}"
        typer.echo(f"epsball: interrupted; {kept}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        if as_json:
            sys.stdout.write(json.dumps({"experiments": done, "out": str(out)}) + "\n")


def _say(message: str) -> None:
    typer.echo(message, err=True)


def _list(known: list[Experiment], as_json: bool) -> None:
    if as_json:
        fields = ("name", "title", "paper", "needs", "minutes")
        sys.stdout.write(json.dumps({"experiments": [{field: getattr(one, field) for field in fields} for one in known]}) + "\n")
        return
    for one in known:
        typer.echo(f"{one.name:16} {one.title}")
        typer.echo(f"{'':16} {one.paper}; needs {', '.join(one.needs)}; about {one.minutes:g} min on one core")


def _run(experiment: Experiment, setting: Setting, out: Path, as_json: bool) -> dict[str, object]:
    from epsball.reproduce import run
    from epsball.reproduce.record import plain, write

    _say(f"{experiment.name}: {experiment.title}")
    started = time.perf_counter()
    finding = run(experiment.name, setting)
    seconds = time.perf_counter() - started
    path = write(out, experiment, finding, setting, seconds)
    if not as_json:
        _print(experiment, finding, setting, path)
    return plain(experiment, finding, setting, seconds)


def _print(experiment: Experiment, finding: Finding, setting: Setting, path: Path) -> None:
    from rich.console import Console

    from epsball.reproduce.record import INTERVALS

    console = Console()
    line = {"markup": False, "highlight": False}
    console.print(f"\n{experiment.title}", style="bold", **line)  # type: ignore[arg-type]
    console.print(f"{experiment.paper}; seed {setting.seed}", style="dim", **line)  # type: ignore[arg-type]
    if setting.quick:
        console.print("Quick run on tiny data: its figures mean nothing.", style="yellow", **line)  # type: ignore[arg-type]
    console.print(table(finding, console.encoding))
    for number, why in enumerate(reasons(finding), 1):
        console.print(_text(f"({number}) {why}", console.encoding))
    console.print(INTERVALS, style="dim", **line)  # type: ignore[arg-type]
    for note in finding.notes:
        console.print(_text(note, console.encoding))
    console.print(f"\nTable: {path}; figures beside it: {len(finding.figures)}", soft_wrap=True, **line)  # type: ignore[arg-type]


def reasons(finding: Finding) -> list[str]:
    """Why figures differ, each reason once."""
    return list(dict.fromkeys(line.why for line in finding.lines if line.why))


def table(finding: Finding, encoding: str = "utf-8") -> RenderableType:
    """The lines of a finding for `rich.console.Console.print`, with the numbers of their `reasons`; right at 80 columns."""
    from rich import box
    from rich.table import Table

    grid, numbers = Table(box=box.SIMPLE_HEAD, pad_edge=False), reasons(finding)
    for head, share in (("quantity", 6), ("paper", 4), ("ours", 6)):
        grid.add_column(head, overflow="fold", ratio=share)
    grid.add_column("why", justify="right", no_wrap=True)
    for line in finding.lines:
        why = f"({numbers.index(line.why) + 1})" if line.why else ""
        grid.add_row(*(_text(cell, encoding) for cell in (line.what, line.paper, line.ours, why)))
    return grid


def _text(text: str, encoding: str, style: str = "") -> RenderableType:
    """Plain text, never markup; what the terminal cannot encode is shown as an escape."""
    from rich.text import Text

    from epsball.report.text import clean

    return Text(clean(text).encode(encoding, "backslashreplace").decode(encoding), style=style)
