"""What a person sees of an audit: an estimate first, then one live line on stderr, and the result on stdout."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epsball.auditing.cascade import Tick
    from epsball.auditing.cost import Estimate
    from epsball.auditing.results import Report


class Live:
    """Progress on stderr: a live line on a terminal, one plain line per radius anywhere else. A context manager."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self.console = Console(stderr=True, quiet=quiet)
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            console=self.console,
            transient=True,
            disable=quiet or not sys.stderr.isatty(),
        )
        self.task = self.bar.add_task("checking the model", total=1.0)
        self.started, self.last = time.perf_counter(), ""

    def __enter__(self) -> Live:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def estimate(self, most: Estimate) -> None:
        """Before the first attack."""
        from epsball.report.text import duration

        self.started = time.perf_counter()
        cost = f"{duration(most.seconds)} and {most.forwards:,} rows forward"
        said = f"The attacks take at most about {cost}, checks, and what they call for, come on top; what breaks early makes it shorter."
        self.console.print(said, markup=False, highlight=False)
        if most.holds is not None:
            said = "is enough" if most.holds >= 1 else f"holds {most.holds:.0%} of that for sure: attacks that do not fit are cut"
            self.console.print(f"The budget {said}.", markup=False, highlight=False)

    def tick(self, tick: Tick) -> None:
        """During attacks."""
        from epsball.report.text import clean, duration

        where = f"{clean(tick.model)} {tick.threat} {tick.radius}"
        spent = time.perf_counter() - self.started
        left = f", about {duration(spent / tick.share - spent)} left" if tick.share > 0.05 else ""
        self.bar.update(self.task, completed=tick.share, description=f"{where}: {tick.attack} on {tick.standing} standing{left}")
        if self.bar.disable and where != self.last:
            self.last = where
            self.console.print(f"{where} ({tick.share:.0%} of the plan behind us)", markup=False, highlight=False)


def tell(done: Report, as_json: bool, model: str | None) -> None:
    """The report on stdout, and what to do next."""
    if as_json:
        sys.stdout.write(json.dumps(done.model_dump()) + "\n")  # pydantic's own writer refuses file names that are not UTF-8
        return
    from rich.console import Console

    from epsball import report

    console = Console()
    console.print(report.summary(done))
    console.print(f"\nReport: {done.run}/report.html", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Next:   {_next(done, model)}", markup=False, highlight=False, soft_wrap=True)


def _next(done: Report, model: str | None) -> str:
    """One line on what to do now."""
    if done.partial:
        return "this run was interrupted; run it again to the end before quoting a number."
    if any(r.early for m in done.models for r in m.results):
        return "this run ended early, as asked; run it without limits before quoting a number."
    if not all(r.trustworthy for m in done.models for r in m.results):
        return "mend what the flags name, then run the same command again."
    if model is None:
        return "audit your own: epsball audit file.py:factory --weights W --data D"
    if done.effort != "max":
        return f"epsball verify {done.run}, and before you publish the number: --effort max"
    return f"epsball verify {done.run}"
