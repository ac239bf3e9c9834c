"""Intervals and tests against scipy's own and against exact enumeration."""

from __future__ import annotations

import pytest
from scipy import stats

from epsball.auditing.statistics import clopper_pearson, mcnemar, rate

LEVELS = (0.5, 0.9, 0.95, 0.999)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [1, 2, 7, 50, 1000])
def test_clopper_pearson_is_that_of_scipy(n: int, level: float) -> None:
    for count in sorted({0, 1, n // 3, n // 2, n - 1, n}):
        reference = stats.binomtest(count, n).proportion_ci(level, method="exact")
        assert clopper_pearson(count, n, level) == pytest.approx((reference.low, reference.high), abs=1e-9)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [1, 3, 10, 25])
def test_its_coverage_never_falls_below_the_level(n: int, level: float) -> None:
    intervals = [clopper_pearson(count, n, level) for count in range(n + 1)]
    for step in range(101):
        p = step / 100
        covered = sum(stats.binom.pmf(count, n, p) for count, (low, high) in enumerate(intervals) if low <= p <= high)
        assert covered >= level - 1e-9, p


def test_the_ends_are_exact() -> None:
    assert clopper_pearson(0, 9)[0] == 0.0
    assert clopper_pearson(9, 9)[1] == 1.0
    assert clopper_pearson(0, 1) == (0.0, pytest.approx(0.975))


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (0, 6), (3, 3), (10, 1), (40, 17)])
def test_mcnemar_is_the_binomial_test_on_discordant_pairs(only_first: int, only_second: int) -> None:
    n = only_first + only_second
    expected = 1.0 if n == 0 else stats.binomtest(only_first, n, 0.5).pvalue
    assert mcnemar(only_first, only_second) == pytest.approx(expected, abs=1e-12)
    assert mcnemar(only_second, only_first) == mcnemar(only_first, only_second)


def test_unknown_samples_widen_the_interval_to_both_sides() -> None:
    known, doubtful = rate(6, 10), rate(6, 10, unknown=3)
    assert (doubtful.value, doubtful.count, doubtful.n) == (0.6, 6, 10)
    assert doubtful.low == known.low == clopper_pearson(6, 10)[0]  # all unknown ones broken
    assert doubtful.high == clopper_pearson(9, 10)[1] > known.high  # all unknown ones robust


def test_a_rate_of_nothing_knows_nothing() -> None:
    empty = rate(0, 0)
    assert (empty.low, empty.high, empty.n) == (0.0, 1.0, 0)
