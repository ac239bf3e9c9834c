"""Intervals and tests, exact ones only; scipy is loaded on first use."""

from __future__ import annotations

from epsball.auditing.results import Rate


def clopper_pearson(count: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval for a proportion: its coverage is never below `level` (Clopper & Pearson 1934).

    >>> low, high = clopper_pearson(0, 100)
    >>> low, round(high, 4)
    (0.0, 0.0362)
    """
    from scipy.special import betaincinv

    tail = (1 - level) / 2
    low = 0.0 if count == 0 else float(betaincinv(count, n - count + 1, tail))
    high = 1.0 if count == n else float(betaincinv(count + 1, n - count, 1 - tail))
    return low, high


def rate(count: int, n: int, unknown: int = 0) -> Rate:
    """A rate whose interval counts `unknown` samples as failures at its low end and as successes at its high end."""
    if n == 0:
        return Rate(value=0.0, low=0.0, high=1.0, count=0, n=0)
    return Rate(value=count / n, low=clopper_pearson(count, n)[0], high=clopper_pearson(count + unknown, n)[1], count=count, n=n)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two paired rates are equal, from the counts of discordant pairs.

    >>> round(mcnemar(10, 1), 4)
    0.0117
    """
    from scipy.special import bdtr

    n = only_first + only_second
    return 1.0 if n == 0 else min(1.0, 2 * float(bdtr(min(only_first, only_second), n, 0.5)))
