"""What a person sees while an audit runs: an estimate first, then one live line on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epsball.auditing.cascade import Tick


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

    def estimate(self, seconds: float) -> None:
        """Before the first attack."""
        from epsball.report.text import duration

        self.started = time.perf_counter()
        self.console.print(f"The plan takes at most about {duration(seconds)}; samples that break early make it shorter.", markup=False)

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
