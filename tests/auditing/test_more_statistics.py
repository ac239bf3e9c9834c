"""Finite populations, looking at any time, pairs and many intervals at once, against enumeration and scipy's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats
from scipy.special import gammaln

from epsball.auditing.statistics import (
    at_any_time,
    clopper_pearson,
    each_of,
    finite_population,
    holm,
    mcnemar,
    paired_difference,
    rate,
)
from epsball.errors import BadInput


def exact(x: float) -> float:
    return pytest.approx(x, abs=1e-9)  # type: ignore[no-any-return]


# a finite population


@pytest.mark.parametrize(("n", "population"), [(1, 3), (5, 12), (10, 10), (12, 40)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_a_finite_population_is_covered_whatever_its_total(n: int, population: int, level: float) -> None:
    intervals = [finite_population(count, n, population, level) for count in range(n + 1)]
    for total in range(population + 1):
        possible = range(max(0, n - population + total), min(n, total) + 1)
        chances = stats.hypergeom.pmf(list(possible), population, total, n)
        covered = sum(
            p for p, count in zip(chances, possible, strict=True) if intervals[count][0] <= total / population <= intervals[count][1]
        )
        assert covered >= level - 1e-9, total


@pytest.mark.parametrize("count", [0, 1, 17, 49, 50])
def test_its_ends_are_the_last_totals_that_neither_tail_rejects(count: int) -> None:
    low, high = finite_population(count, 50, 400)
    totals = np.arange(count, 400 - 50 + count + 1)
    kept = totals[(stats.hypergeom.sf(count - 1, 400, totals, 50) > 0.025) & (stats.hypergeom.cdf(count, 400, totals, 50) > 0.025)]
    assert (low, high) == (kept.min() / 400, kept.max() / 400)


def test_a_large_population_is_the_binomial_case_and_a_whole_one_is_known() -> None:
    assert finite_population(400, 1000, 10**7) == pytest.approx(clopper_pearson(400, 1000), abs=1e-4)
    assert finite_population(7, 9, 9) == (7 / 9, 7 / 9)
    with pytest.raises(BadInput, match="11 of 10 drawn from 20"):
        finite_population(11, 10, 20)


# at any time


@pytest.mark.parametrize("p", [0.003, 0.05, 0.4, 0.5, 0.9])
def test_it_covers_at_every_sample_size_at_once(p: float) -> None:
    """The chance that p has left the interval at any n up to 400: exact, by following every path that has not left it yet."""
    alive, lost = np.ones(1), 0.0
    rejects = math.log(1 / 0.05)
    for n in range(1, 401):
        alive = np.append(alive * (1 - p), 0.0) + np.append(0.0, alive * p)
        count = np.arange(n + 1)
        log_beta = gammaln(count + 0.5) + gammaln(n - count + 0.5) - gammaln(n + 1) - math.log(math.pi)
        out = log_beta - count * math.log(p) - (n - count) * math.log1p(-p) >= rejects
        if n in (1, 7, 60, 400):  # the interval is that rule
            for k in {0, n // 3, n // 2, n}:
                low, high = at_any_time(k, n)
                assert (not low <= p <= high) == out[k], (k, n)
        lost += alive[out].sum()
        alive[out] = 0.0
    assert lost <= 0.05
    assert lost + alive.sum() == exact(1.0)


def test_a_fixed_n_interval_looked_at_again_and_again_does_not_cover() -> None:
    """What the one above is for: 400 looks at 95 % Clopper-Pearson miss p = 0.4 far more often than 5 %."""
    draws = np.cumsum(np.random.default_rng(0).random((200, 400)) < 0.4, axis=1)
    looks = {(int(k), n): (clopper_pearson(int(k), n), at_any_time(int(k), n)) for n in range(20, 401, 20) for k in set(draws[:, n - 1])}
    missed = [
        [
            any(not looks[int(path[n - 1]), n][kind][0] <= 0.4 <= looks[int(path[n - 1]), n][kind][1] for n in range(20, 401, 20))
            for path in draws
        ]
        for kind in (0, 1)
    ]
    assert np.mean(missed[0]) > 0.1
    assert np.mean(missed[1]) <= 0.05


@pytest.mark.parametrize(("count", "n"), [(0, 1), (0, 100), (100, 100), (40, 100), (999, 1000)])
def test_looking_at_any_time_costs_width(count: int, n: int) -> None:
    low, high = at_any_time(count, n)
    fixed = clopper_pearson(count, n)
    assert 0 <= low <= fixed[0] <= fixed[1] <= high <= 1
    mirrored = at_any_time(n - count, n)
    assert (1 - high, 1 - low) == (exact(mirrored[0]), exact(mirrored[1]))


# pairs


def likely(only_first: int, only_second: int, n: int, d: float) -> float:
    """Probability of "only the second" that makes the counts most likely when the difference is d, by search."""

    def loss(q: float) -> float:
        chances = (q + d, q, 1 - 2 * q - d)
        seen = (only_first, only_second, n - only_first - only_second)
        return -sum(k * math.log(max(p, 1e-300)) for k, p in zip(seen, chances, strict=True) if k)

    return float(optimize.minimize_scalar(loss, bounds=(max(0.0, -d), (1 - d) / 2), method="bounded", options={"xatol": 1e-12}).x)


@pytest.mark.parametrize(("only_first", "only_second", "n"), [(10, 1, 100), (3, 3, 10), (1, 7, 30), (0, 4, 50), (20, 20, 40), (6, 0, 9)])
def test_at_both_ends_of_the_difference_the_score_is_the_quantile(only_first: int, only_second: int, n: int) -> None:
    for d, sign in zip(paired_difference(only_first, only_second, n), (1, -1), strict=True):
        q = likely(only_first, only_second, n, d)
        score = (only_first - only_second - n * d) / math.sqrt(n * (2 * q + d * (1 - d)))
        assert score == pytest.approx(sign * 1.959963985, abs=1e-4)


def test_known_corners_of_the_difference() -> None:
    z2 = stats.norm.ppf(0.975) ** 2
    assert paired_difference(0, 0, 50) == pytest.approx((-z2 / (50 + z2), z2 / (50 + z2)), abs=1e-9)
    assert paired_difference(5, 0, 5)[1] == 1.0
    assert paired_difference(0, 5, 5)[0] == -1.0
    low, high = paired_difference(9, 4, 60)
    assert paired_difference(4, 9, 60) == (exact(-high), exact(-low))
    with pytest.raises(BadInput, match="6 and 5 of 10"):
        paired_difference(6, 5, 10)


@pytest.mark.parametrize(("n", "least", "mean"), [(10, 0.924, 0.96), (20, 0.927, 0.955)])
def test_the_paired_interval_covers_by_enumeration(n: int, least: float, mean: float) -> None:
    pairs = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    low, high = np.array([paired_difference(b, c, n) for b, c in pairs]).T
    b, c = np.array(pairs).T
    ways = gammaln(n + 1) - gammaln(b + 1) - gammaln(c + 1) - gammaln(n - b - c + 1)
    covered = []
    for p, q in [(i / 50, j / 50) for i in range(51) for j in range(51 - i)]:
        logs = [math.log(max(chance, 1e-300)) for chance in (p, q, 1 - p - q)]
        chance = np.exp(ways + b * logs[0] + c * logs[1] + (n - b - c) * logs[2])
        covered.append(chance[(low <= p - q + 1e-12) & (p - q <= high + 1e-12)].sum())
    assert min(covered) >= least
    assert np.mean(covered) >= mean


def test_without_continuity_the_interval_leaves_zero_where_mcnemars_statistic_does() -> None:
    for b, c in [(10, 1), (9, 3), (8, 2), (5, 5), (6, 1)]:
        low, _ = paired_difference(b, c, 80)
        assert (low > 0) == ((b - c) / math.sqrt(b + c) > 1.959963985)
    assert mcnemar(8, 2) == exact(stats.binomtest(8, 10, 0.5).pvalue)


# many at once


def test_intervals_of_all_classes_hold_at_once() -> None:
    n, p, classes = 12, (0.2, 0.5, 0.9), 3
    level = each_of(classes)
    assert level**classes == exact(0.95)
    covers = []
    for chance in p:
        ends = [clopper_pearson(count, n, level) for count in range(n + 1)]
        covers.append(sum(stats.binom.pmf(count, n, chance) for count, (low, high) in enumerate(ends) if low <= chance <= high))
    assert math.prod(covers) >= 0.95
    assert (rate(3, n, level=level).low, rate(3, n, level=level).high) == clopper_pearson(3, n, level)


def test_holm_is_the_stepwise_rule() -> None:
    assert holm([]) == []
    assert holm([0.04]) == [0.04]
    assert holm([0.03, 0.01, 0.02]) == [exact(0.04), exact(0.03), exact(0.04)]
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = rng.random(5).tolist()
        order = np.argsort(p)
        rejected = set()
        for rank, place in enumerate(order):
            if p[place] > 0.3 / (5 - rank):
                break
            rejected.add(int(place))
        assert {i for i, adjusted in enumerate(holm(p)) if adjusted <= 0.3} == rejected
