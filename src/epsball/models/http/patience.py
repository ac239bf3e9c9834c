"""Time: a clock that tests can replace, how long to wait before asking again, how fast to ask at all."""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Protocol


class Clock(Protocol):
    """Seconds and sleep."""

    def now(self) -> float:
        """Seconds since any fixed moment, never backwards."""

    def sleep(self, seconds: float) -> None:
        """Waits so long."""


class RealClock:
    """The machine's own."""

    def now(self) -> float:
        """Seconds since any fixed moment, never backwards."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Waits so long."""
        time.sleep(seconds)


class Pace:
    """When the next request may go out.

    Args:
        clock: tells the time. backoff, longest: seconds before the first retry and before any. rate_limit: most requests a second; None
            for no limit.
    """

    def __init__(self, clock: Clock, backoff: float, longest: float, rate_limit: float | None) -> None:
        self.clock, self.backoff, self.longest = clock, backoff, longest
        self.gap = 0.0 if rate_limit is None else 1 / rate_limit
        self.waited = 0.0
        self._free = clock.now()
        self._draw = random.Random().random  # spreads clients that failed together; no result depends on it

    def turn(self) -> None:
        """Waits until the rate limit lets one more request out."""
        self._sleep(self._free - self.clock.now())
        self._free = self.clock.now() + self.gap

    def pause(self, tries: int, asked: float | None) -> None:
        """Waits before the next try: min(backoff 2^tries, longest) (1 + u) / 2, u in [0, 1), or as long as the server asked if longer."""
        own = min(self.backoff * 2.0 ** min(tries, 64), self.longest) * (1 + self._draw()) / 2
        self._sleep(own if asked is None else max(own, asked))

    def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.clock.sleep(seconds)
            self.waited += seconds


def retry_after(text: str | None) -> float | None:
    """Seconds of a Retry-After header, a number or a date; None without one or if it makes no sense.

    >>> retry_after("2"), retry_after("soon"), retry_after("Thu, 01 Jan 1970 00:00:00 GMT")
    (2.0, None, 0.0)
    """
    if text is None:
        return None
    if text.strip().isdigit():
        return float(text.strip())
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
