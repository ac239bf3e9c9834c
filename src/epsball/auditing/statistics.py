"""Intervals and tests for counts of samples; scipy is loaded on first use. All are exact but one, which says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from epsball.auditing.results import Interval, Rate
from epsball.errors import BadInput


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


def rate(
    count: int, n: int, unknown: int = 0, level: float = 0.95, *, interval: Interval = "clopper-pearson", population: int | None = None
) -> Rate:
    """A rate whose interval counts `unknown` samples as failures at its low end and as successes at its high end.

    Args:
        count, n, unknown: samples. level: of the interval. interval: its kind. population: size of the data set, for a finite one.
    """
    if n == 0:
        return Rate(value=0.0, low=0.0, high=1.0, count=0, n=0, interval=interval)
    if interval == "finite-population":
        low, high = finite_population(count, n, population or n, level)[0], finite_population(count + unknown, n, population or n, level)[1]
    else:
        ends = clopper_pearson if interval == "clopper-pearson" else at_any_time
        low, high = ends(count, n, level)[0], ends(count + unknown, n, level)[1]
    return Rate(value=count / n, low=low, high=high, count=count, n=n, unknown=unknown, interval=interval, population=population)


def each_of(groups: int, level: float = 0.95) -> float:
    """Level of each interval, so that the intervals of all `groups` hold at once with probability `level`: level^(1/groups).

    Exact for groups of independent samples, as classes are (Sidak 1967, doi 10.1080/01621459.1967.10482935).

    >>> round(each_of(10), 5)
    0.99488
    """
    return math.pow(level, 1 / max(groups, 1))


def finite_population(count: int, n: int, population: int, level: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval for the rate of a whole data set of which `n` samples were drawn without replacement.

    All totals K for which neither tail of the hypergeometric distribution falls to (1 - level) / 2 (Konijn 1973; Buonaccorsi 1987,
    doi 10.1080/00031305.1987.10475484). A point where
    the whole data set was drawn.

    >>> finite_population(40, 50, 50)
    (0.8, 0.8)
    >>> low, high = finite_population(40, 50, 100)
    >>> round(low, 3), round(high, 3)
    (0.71, 0.87)

    Raises:
        BadInput: not 0 <= count <= n <= population, or nothing was drawn.
    """
    if not 0 <= count <= n <= population or n == 0:
        raise BadInput(f"finite_population: {count} of {n} drawn from {population}: needs 0 <= count <= n <= population and n above 0")
    tail = (1 - level) / 2
    least, most = count, population - (n - count)  # totals that could have given this draw
    # The upper tail P(X >= count) grows with the total, the lower tail P(X <= count) falls.
    low = _first(least, most, lambda total: _hypergeometric(count, n, n, total, population) > tail)
    high = most - _first(0, most - least, lambda fewer: _hypergeometric(0, count, n, most - fewer, population) > tail)
    return low / population, high / population


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Smallest whole number of low..high for which `holds`, which is false, then true, and true at `high`."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _hypergeometric(low: int, high: int, n: int, good: int, population: int) -> float:
    """P(low <= X <= high) for the good ones among `n` drawn from a population that holds `good`."""
    import numpy as np
    from scipy.special import gammaln

    def choose(m: int, k: Any) -> Any:
        return gammaln(m + 1) - gammaln(k + 1) - gammaln(m - k + 1)

    x = np.arange(max(low, n - (population - good)), min(high, good) + 1)
    return float(np.exp(choose(good, x) + choose(population - good, n - x) - choose(population, n)).sum())


def at_any_time(count: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval that holds at every n at once with probability `level`: one may look after each sample and stop when one likes.

    All p that the mixture of bets has not made 1 / (1 - level) times its stake against:
    K(p) = B(count + 1/2, n - count + 1/2) / B(1/2, 1/2) / (p^count (1 - p)^(n - count)). K is a nonnegative martingale at the true p,
    so Ville's inequality bounds the chance that it ever gets there (Robbins 1970, doi 10.1214/aoms/1177696786; as betting: Waudby-Smith
    & Ramdas, arXiv 2010.09686). Samples are drawn in random order and independently. It is wider than Clopper-Pearson
    at the same n. Nothing is known before the first sample.

    >>> at_any_time(0, 0)
    (0.0, 1.0)
    >>> low, high = at_any_time(400, 1000)
    >>> round(low, 3), round(high, 3)
    (0.344, 0.457)
    """
    from scipy.special import betaln, xlog1py, xlogy

    rich = -math.log(1 - level)
    start = float(betaln(count + 0.5, n - count + 0.5) - betaln(0.5, 0.5))

    def wealth(p: float) -> float:
        return start - float(xlogy(count, p) + xlog1py(n - count, -p))

    share = count / n if n else 0.5
    low = 0.0 if wealth(0.0) < rich else _crossing(lambda p: wealth(p) - rich, 0.0, share)
    high = 1.0 if wealth(1.0) < rich else 1 - _crossing(lambda q: wealth(1 - q) - rich, 0.0, 1 - share)
    return low, high


def _crossing(falls: Callable[[float], float], left: float, right: float) -> float:
    """Where a falling function that is above 0 at `left` and not at `right` crosses 0, from the left: never past it."""
    for _ in range(60):
        middle = (left + right) / 2
        left, right = (middle, right) if falls(middle) > 0 else (left, middle)
    return left


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two paired rates are equal, from the counts of discordant pairs.

    >>> round(mcnemar(10, 1), 4)
    0.0117
    """
    from scipy.special import bdtr

    n = only_first + only_second
    return 1.0 if n == 0 else min(1.0, 2 * float(bdtr(min(only_first, only_second), n, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values for testing all of them at once: rejecting those <= a errs anywhere with probability at most a (Holm 1979).

    Needs no independence, so nested radii may stand side by side.

    >>> holm([0.01, 0.5, 0.02])
    [0.03, 0.5, 0.04]
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def paired_difference(only_first: int, only_second: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval for the first rate minus the second of the same `n` samples: the score interval of Tango 1998.

    All d with |only_first - only_second - n d| <= z sqrt(n (2 q + d (1 - d))), where q is the most likely probability of "only the
    second" under d (doi 10.1002/(SICI)1097-0258(19980430)17:8<891::AID-SIM780>3.0.CO;2-B). The one interval here
    that is not exact: enumerated for n of 10, 20 and 40, its 95 % cover at least 92.4 % anywhere and 95.1 % on average. The exact test
    is `mcnemar`; where the two disagree, believe the test.

    >>> low, high = paired_difference(10, 1, 100)
    >>> round(low, 3), round(high, 3)
    (0.031, 0.166)

    Raises:
        BadInput: the counts are negative or more than n, or n is 0.
    """
    from scipy.special import ndtri

    if min(only_first, only_second) < 0 or only_first + only_second > n or n == 0:
        raise BadInput(f"paired_difference: {only_first} and {only_second} of {n} pairs: needs counts that fit into n above 0")
    z, seen = float(ndtri((1 + level) / 2)), (only_first - only_second) / n

    def beyond(d: float) -> float:
        """Above 0 while d is too low to be believed."""
        return only_first - only_second - n * d - z * math.sqrt(_spread(only_first, only_second, n, d))

    def beyond_mirrored(d: float) -> float:
        return only_second - only_first - n * d - z * math.sqrt(_spread(only_second, only_first, n, d))

    low = -1.0 if only_second == n else _crossing(beyond, -1.0, seen)
    high = 1.0 if only_first == n else -_crossing(beyond_mirrored, -1.0, -seen)
    return low, high


def _spread(only_first: int, only_second: int, n: int, d: float) -> float:
    """Variance of only_first - only_second when the true difference is d: n (2 q + d (1 - d)), Tango's equation for q."""
    b = (2 * n - only_first + only_second) * d - only_first - only_second
    c = -only_second * d * (1 - d)
    q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    return max(n * (2 * q + d * (1 - d)), 0.0)
