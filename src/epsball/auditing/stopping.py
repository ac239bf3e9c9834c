"""When an audit ends early, and in which order its attacks then run. Whatever ends it, every number stays an upper bound."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Literal, NamedTuple

from torch import Tensor

from epsball.auditing.plan import Stage
from epsball.auditing.results import AttackRow, Finding, Flag, Place, Stopped
from epsball.auditing.sheet import Round, Sheet
from epsball.auditing.statistics import at_any_time, rate
from epsball.auditing.union import claims, counted, text
from epsball.core import Tally
from epsball.core.victim import Lens
from epsball.errors import BadInput

FIRST = 64
"""Samples of the first block; after it, every block doubles their number."""

Reason = Literal["seconds", "forwards", "width", "gate"]
Course = tuple[Round, tuple[Stage, ...]]
"""A round and the attacks that are planned for it."""


class Spent(Exception):
    """Ends an attack whose budget is spent."""


@dataclass(frozen=True)
class Limits:
    """What may end a run before its plan does; None does not.

    Attributes:
        seconds: from its start. forwards: rows forward of all attacks and checks. width: of every interval, a fraction: enough samples.
        bar: a fraction that every robust accuracy has to reach; a run that surely fails it ends.
    """

    seconds: float | None = None
    forwards: int | None = None
    width: float | None = None
    bar: float | None = None

    @property
    def asked(self) -> dict[str, float | None]:
        """By the names of `epsball.audit`."""
        percent = None if self.bar is None else 100 * self.bar
        return {"max_seconds": self.seconds, "max_forwards": self.forwards, "until_width": self.width, "fail_under": percent}

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds > 0:
            raise BadInput(f"max_seconds: {self.seconds!r}: must be None or above 0")
        if self.forwards is not None and (not isinstance(self.forwards, int) or self.forwards < 1):
            raise BadInput(f"max_forwards: {self.forwards!r}: must be None or a whole number above 0")
        if self.width is not None and not 0 < self.width < 1:
            raise BadInput(f"until_width: {self.width!r}: is a fraction: give a number between 0 and 1, as 0.02 for 2 points")
        if self.bar is not None and not 0 <= self.bar <= 1:
            raise BadInput(f"fail_under: {100 * self.bar:g}: is a percentage: give a number from 0 to 100")


class Cost(NamedTuple):
    """Rows forward and backward."""

    forwards: int
    backwards: int


class Meter:
    """What the attack under way has cost so far, read from its ledgers as they fill."""

    def __init__(self) -> None:
        self.cost = Cost(0, 0)
        self._seen: dict[int, tuple[Tally, Cost]] = {}
        self._last: Tally | None = None

    def read(self, tally: Tally | None) -> None:
        """Brings the cost up to date: a ledger is written after the call that shows it here."""
        for one in (self._last, tally):
            if one is not None:
                _, known = self._seen.get(id(one.forwards), (one, Cost(0, 0)))
                now = Cost(int(one.forwards.sum()), int(one.backwards.sum()))
                self.cost = Cost(self.cost[0] + now[0] - known[0], self.cost[1] + now[1] - known[1])
                self._seen[id(one.forwards)] = (one, now)
        self._last = tally


class Stopping:
    """Says after every attack, and with a budget before every call of the model, whether to go on.

    A run that may end early gives every radius its first attack before any gets its second, and so on: cheap ones come first. Samples
    are attacked apart from each other, so the order changes no verdict of a run that reaches its end. Of what a budget has left when a
    model's turn comes, the model gets an equal share.

    `reason` and `said` tell why the turn of the present model ended, None and "" while it goes on. Once a model has surely `failed` the
    bar, the turns of the others end before they begin.
    """

    def __init__(self, limits: Limits | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.limits, self.clock, self.started = limits or Limits(), clock, clock()
        self.reason: Reason | None = None
        self.said, self.failed = "", False
        self._until, self._most = float("inf"), float("inf")
        self._before = 0  # rows forward of everything before the sheet that is watched
        self._start, self._known, self._meter = Cost(0, 0), Cost(0, 0), Meter()

    @property
    def budgeted(self) -> bool:
        """Seconds or rows may run out."""
        return self.limits.seconds is not None or self.limits.forwards is not None

    def begin(self, sheet: Sheet, left: int) -> None:
        """The turn of the next model, with `left` of them still to come, itself included."""
        if self.failed:
            return
        self.reason, self.said, now = None, "", self.clock()
        if self.limits.seconds is not None:
            self._until = now + max(0.0, self.started + self.limits.seconds - now) / left
        if self.limits.forwards is not None:
            self._most = self._before + max(0, self.limits.forwards - self._before) // left
        self._judge(sheet)

    def order(self, courses: Sequence[Course]) -> Iterator[tuple[Round, Stage | None]]:
        """Which attack runs next; None: the round's checks. Where samples come in blocks, checks come when the last block has ended."""
        for current, stages in courses:
            current.planned = len(stages)
        ways = [[(current, stage) for stage in stages] for current, stages in courses]
        checks: list[tuple[Round, Stage | None]] = [(current, None) for current, _ in courses]
        if self.limits == Limits():
            for way, check in zip(ways, checks, strict=True):
                yield from (*way, check)
            return
        yield from (one for one in chain(*zip_longest(*ways)) if one is not None)
        if self.limits.width is None:
            yield from checks

    @contextmanager
    def on(self, sheet: Sheet) -> Iterator[None]:
        """Watches what attacks on this model ask, where that has a limit."""
        subject, sight = sheet.subject, sheet.sight
        self._start = booked(sheet)
        self._settle(sheet)
        if self.budgeted:
            victim = subject.victim.through(self._lens(subject.victim.draws))
            sheet.subject = replace(subject, victim=victim)
            sheet.sight = sight.each(lambda one: victim if one is subject.victim else one.through(self._lens(one.draws)))
        try:
            yield
        finally:
            sheet.subject, sheet.sight = subject, sight
            self._before += booked(sheet).forwards - self._start.forwards
            self._start, self._meter = booked(sheet), Meter()

    def now(self, sheet: Sheet, current: Round) -> bool:
        """Whether this model's turn ends after an attack under `current`."""
        self._settle(sheet)
        if self.spent >= self._most:
            self._out("forwards")
        elif self.clock() >= self._until:
            self._out("seconds")
        else:
            self._judge(sheet)
        return self.reason is not None

    def book(self, sheet: Sheet, current: Round, stage: Stage | None) -> None:
        """Writes down what an attack, or the checks, had cost when they were cut short; what they had found is lost."""
        self._meter.read(None)
        known = booked(sheet)
        rest = [max(0, spent - (now - then)) for spent, now, then in zip(self._meter.cost, known, self._known, strict=True)]
        tried = int(sheet.standing(current.threat, current.radius).sum())
        name, recipe = ("check: cut short", "") if stage is None else (f"{stage.attack.name}, cut short", repr(stage.attack))
        row = AttackRow(name=name, recipe=recipe, tried=tried, broken=0, forwards=rest[0], backwards=rest[1], seconds=0.0)
        current.attacks.append(row)
        self._settle(sheet)

    @property
    def spent(self) -> int:
        """Rows forward of attacks and checks so far."""
        return self._before + self._known.forwards - self._start.forwards + self._meter.cost.forwards

    def grown(self, sheet: Sheet) -> None:
        """After a whole block: are the samples so far enough?"""
        counts = [counted(sheet, places) for places in claims(sheet)]
        self.reason = settled(counts, len(sheet.clean), self.limits)
        if self.reason == "width":
            self.said = f"every interval is at most {100 * (self.limits.width or 0):g} points wide"
        elif self.reason == "gate":
            self.failed = any(surely_below(*one, len(sheet.clean), self.limits) for one in counts)
            side = "below" if self.failed else "at or above"
            self.said = f"whole intervals are {side} the bar of {100 * (self.limits.bar or 0):g} %"

    def close(self, sheet: Sheet, there: int, planned: int) -> None:
        """Says in the sheet why it ends early, if it does: of `there` samples, and of about `planned` rows forward."""
        if self.reason is None:
            self._used_up(sheet)
            return
        for current in sheet.rounds:
            if not int(sheet.standing(current.threat, current.radius).sum()):
                current.finished = True  # nothing is left that an attack could break
            if not current.finished and self.reason != "width":
                current.flags.append(self._flag(sheet, current))
        n, cost = len(sheet.clean), booked(sheet).forwards
        samples = f" {n:,} of {there:,} samples were needed." if n < there else ""
        rows = sum(row.forwards for current in sheet.rounds for row in current.attacks if not row.name.startswith("check:"))
        saved = f"{rows:,} rows went forward in attacks; the whole plan could have cost up to about {planned:,}."
        message = f"Stopped early: {self.said}.{samples} {saved}"
        sheet.stopped = Stopped(reason=self.reason, message=message, samples=n, of=there, forwards=cost, planned=planned)

    def _used_up(self, sheet: Sheet) -> None:
        """There were too few samples for the width that was asked for."""
        if self.limits.width is None:
            return
        n, counts = len(sheet.clean), [counted(sheet, places) for places in claims(sheet)]
        rates = [rate(count, n, unknown, interval=sheet.interval) for count, unknown in counts]
        widest = max(one.high - one.low for one in rates)
        message = (
            f"All {n:,} samples were used; the widest interval is {100 * widest:.1f} points, {100 * self.limits.width:g} were asked for."
        )
        sheet.findings.append(Finding(id="width", status="note", message=message))

    def _flag(self, sheet: Sheet, current: Round) -> Flag:
        """What a reader of this round's number has to know; without any attack there is no number, unless it fails the bar all the same."""
        place = (Place(threat=current.threat, radius=current.radius, radius_text=current.text),)
        failed = self.reason == "gate" and below(counted(sheet, place)[0], len(sheet.clean), self.limits)
        ran = f"{current.ran} of {current.planned} attacks had run" if current.ran else "no attack had run"
        checks = ", the checks had not" if current.planned and current.ran == current.planned else ""
        return Flag(
            id="gate" if self.reason == "gate" else "budget",
            severity="warn" if current.ran or failed else "block",
            message=f"Stopped early: {self.said}; {ran} here{checks}; more would lower the number.",
            fix={
                "gate": "For the full number leave out --fail-under.",
                "seconds": "Raise --max-seconds.",
                "forwards": "Raise --max-forwards.",
            }[self.reason or "gate"],
        )

    def _lens(self, draws: int) -> Lens:
        def look(x: Tensor, tally: Tally) -> Tensor:
            self._meter.read(tally)
            if self.spent + draws * len(x) > self._most:
                self._out("forwards")
            elif self.clock() >= self._until:
                self._out("seconds")
            if self.reason is not None:
                raise Spent
            return x

        return look

    def _out(self, reason: Reason) -> None:
        limit = f"{self.limits.seconds:g} seconds" if reason == "seconds" else f"{self.limits.forwards:,} rows forward"
        self.reason, self.said = reason, f"the budget of {limit} was spent"

    def _settle(self, sheet: Sheet) -> None:
        """From here on, what is booked is what was spent."""
        self._known, self._meter = booked(sheet), Meter()

    def _judge(self, sheet: Sheet) -> None:
        """Attacks only lower a rate: what is below the bar stays there. Where samples come in blocks, `grown` judges."""
        n = len(sheet.clean)
        for places in claims(sheet) if self.limits.width is None else ():
            count = counted(sheet, places)[0]
            if below(count, n, self.limits):
                self.reason, self.failed = "gate", True
                self.said = (
                    f"{text(places)} surely fails the bar of {100 * (self.limits.bar or 0):g} %, at most {count} of {n} samples stand"
                )
                return


def booked(sheet: Sheet) -> Cost:
    """Rows of all attacks and checks that the sheet tells of."""
    rows = [row for current in sheet.rounds for row in current.attacks]
    return Cost(sum(row.forwards for row in rows), sum(row.backwards for row in rows))


def below(count: int, n: int, limits: Limits) -> bool:
    """The share is below the bar, as `epsball.report.view.under` reads it."""
    return limits.bar is not None and count / n < limits.bar - 1e-12


def surely_below(count: int, unknown: int, n: int, limits: Limits) -> bool:
    """The whole interval is below the bar, whenever one looks."""
    return limits.bar is not None and at_any_time(count + unknown, n)[1] < limits.bar


def settled(counts: Sequence[tuple[int, int]], n: int, limits: Limits) -> Reason | None:
    """Whether `n` samples in random order are enough, by intervals that may be looked at whenever one likes.

    Args:
        counts: of each claim the samples that stand, and those of unknown outcome. n: samples. limits: width and bar.

    Returns:
        "gate": the bar is surely failed by one claim, or surely reached by all; "width": all intervals are narrow enough; else None.
    """
    ends = [(at_any_time(count, n)[0], at_any_time(count + unknown, n)[1]) for count, unknown in counts]
    if limits.bar is not None and (any(high < limits.bar for _, high in ends) or all(low >= limits.bar for low, _ in ends)):
        return "gate"
    if limits.width is not None and all(high - low <= limits.width for low, high in ends):
        return "width"
    return None


def blocks(n: int) -> Iterator[slice]:
    """64 samples, then as many again as there are so far, up to `n`.

    >>> [(block.start, block.stop) for block in blocks(200)]
    [(0, 64), (64, 128), (128, 200)]
    """
    start, stop = 0, min(FIRST, n)
    while start < n:
        yield slice(start, stop)
        start, stop = stop, min(2 * stop, n)
