"""Budgets, early stopping and unions: exact books, honest numbers, intervals that may be looked at whenever one likes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import blobs, digits, linear, verdicts
from scipy import stats
from torch import Tensor, nn

import epsball as eb
from epsball.auditing.cascade import cascade
from epsball.auditing.results import ModelReport, Report
from epsball.auditing.run import Plan, audit_subjects, prepare
from epsball.auditing.sheet import Subject
from epsball.auditing.statistics import at_any_time, clopper_pearson, finite_population, rate
from epsball.auditing.stopping import Limits, Stopping, blocks, settled
from epsball.auditing.union import text, unions
from epsball.errors import BadInput
from epsball.models import wrap
from epsball.models.digits import load
from epsball.store import evidence
from epsball.threats import parse_threat

THREATS = ("linf:0.05,0.1", "l2:0.5")


def audited(folder: Path, **options: Any) -> Report:
    settings: dict[str, Any] = {"model": "digits-standard", "data": digits(40), "threats": THREATS, "effort": "fast"} | options
    return eb.audit(out=folder, **settings)


def told(report: Report) -> list[tuple[str, int]]:
    return [(result.radius_text, result.robust_accuracy.count) for result in report.models[0].results]


@pytest.fixture(scope="module")
def united(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("united")
    return folder, audited(folder, union=True)


def holds(run: Path, models: list[Any] | None = None) -> bool:
    lines = eb.verify(run, models)
    return all(line.holds for line in lines)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("full")
    return folder, audited(folder)


class Counting(nn.Module):
    """Counts the rows that go forward, and those whose gradient comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.forwards, self.backwards = load("digits-standard").eval(), 0, 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        output: Tensor = self.net(x)
        if output.requires_grad:
            output.register_hook(self._back)
        return output

    def _back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def sheet_of(model: Any, threats: tuple[str, ...] = ("linf:0.05,0.1",), batch_size: int | None = None) -> Any:
    data = digits(40)
    subject = Subject(wrap(model, batch_size=batch_size), data.x, data.y, data.indices, "digits", {})
    return prepare(subject, Plan(tuple(parse_threat(one) for one in threats), "fast"))


def run_with(sheet: Any, referee: Any, stop: Stopping) -> None:
    stop.begin(sheet, 1)
    with stop.on(sheet):
        cascade(sheet, referee, "fast", 0, True, lambda _: None, stop)
    stop.close(sheet, len(sheet.clean), 0)


# Budgets.


@pytest.mark.parametrize("budget", [1, 37, 500, 1234, 4000])
@pytest.mark.parametrize("batch_size", [7, None])
def test_a_budget_of_rows_is_never_exceeded_and_every_row_is_booked(budget: int, batch_size: int | None) -> None:
    model = Counting()
    sheet, referee = sheet_of(model, batch_size=batch_size)
    model.forwards = model.backwards = 0
    run_with(sheet, referee, Stopping(Limits(forwards=budget)))
    rows = [row for current in sheet.rounds for row in current.attacks]
    assert model.forwards == sum(row.forwards for row in rows) <= budget
    assert model.backwards == sum(row.backwards for row in rows)
    widest = 7 if batch_size else 3 * 40  # rows of a call: three targets of every digit go side by side
    assert model.forwards > budget - widest  # what is left is too little for one more call
    assert {flag.id for current in sheet.rounds for flag in current.flags} == {"budget"}


def test_cheap_attacks_run_at_every_radius_before_dear_ones() -> None:
    sheet, referee = sheet_of(Counting(), ("linf:0.05,0.1,0.2", "l2:0.5"))
    run_with(sheet, referee, Stopping(Limits(forwards=2000)))
    ran = [current.ran for current in sheet.rounds]
    assert max(ran) - min(ran) <= 1
    assert min(ran) >= 1


def test_limits_that_are_never_met_change_nothing_but_the_order(full: tuple[Path, Report], tmp_path: Path) -> None:
    folder, plain = full
    report = audited(tmp_path / "run", max_forwards=10**9, max_seconds=1e9, fail_under=1)
    assert told(report) == told(plain)
    assert report.models[0].stopped is None
    assert [r.flags for r in report.models[0].results] == [r.flags for r in plain.models[0].results]
    for threat in ("linf", "l2"):
        assert verdicts(tmp_path / "run", threat) == verdicts(folder, threat)
    ours, theirs = (evidence.read(run / evidence.NAME)[0] for run in (tmp_path / "run", folder))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_a_budget_ends_is_an_upper_bound_that_verifies(full: tuple[Path, Report], tmp_path: Path) -> None:
    report = audited(tmp_path / "run", max_forwards=1500)
    assert all(cut >= whole for (_, cut), (_, whole) in zip(told(report), told(full[1]), strict=True))
    assert not report.partial
    flags = [flag for result in report.models[0].results for flag in result.flags]
    assert {(flag.id, flag.severity) for flag in flags} == {("budget", "warn")}
    assert "of 4 attacks had run here" in flags[0].message
    stopped = report.models[0].stopped
    assert stopped is not None
    assert stopped.reason == "forwards"
    assert stopped.forwards == sum(result.forwards for result in report.models[0].results) <= 1500 < stopped.planned
    assert "1,500 rows forward" in stopped.message
    assert holds(tmp_path / "run")


def test_without_any_attack_there_is_no_number(tmp_path: Path) -> None:
    results = audited(tmp_path / "run", max_forwards=1).models[0].results
    assert not any(result.trustworthy for result in results)
    assert {(flag.id, flag.severity) for result in results for flag in result.flags} == {("budget", "block")}


def ticking(step: float) -> Callable[[], float]:
    """A clock that goes on by `step` whenever somebody looks."""
    now = [0.0]

    def look() -> float:
        now[0] += step
        return now[0]

    return look


def test_seconds_end_a_run_inside_an_attack(tmp_path: Path) -> None:
    sheet, referee = sheet_of(Counting())
    run_with(sheet, referee, Stopping(Limits(seconds=30), ticking(1)))
    names = [row.name for current in sheet.rounds for row in current.attacks]
    assert sum(name.endswith("cut short") for name in names) == 1
    assert {flag.id for current in sheet.rounds for flag in current.flags} == {"budget"}
    assert "30 seconds" in sheet.stopped.message


def test_models_share_a_budget_equally(tmp_path: Path) -> None:
    report = audited(tmp_path / "run", model={"a": "digits-robust", "b": "digits-robust"}, max_forwards=3000)
    one, two = (sum(result.forwards for result in model.results) for model in report.models)
    assert 1400 < one <= 1500
    assert 1400 < two <= 3000 - one
    data = digits(40)
    subjects = [Subject(wrap(Counting()), data.x, data.y, data.indices, "digits", {}) for _ in range(2)]
    plan = Plan((parse_threat("linf:0.1"),), "fast", limits=Limits(seconds=40))
    done = audit_subjects(subjects, plan, tmp_path / "evidence.safetensors", {}, clock=ticking(0.5))
    assert all(model.stopped is not None and model.stopped.reason == "seconds" for model in done.models)
    assert all(result.forwards > 0 for model in done.models for result in model.results)


@pytest.mark.parametrize(
    ("name", "value"), [("max_seconds", 0), ("max_forwards", 0), ("max_forwards", 1.5), ("until_width", 2), ("fail_under", 101)]
)
def test_limits_that_make_no_sense_are_one_line(name: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=name):
        audited(tmp_path / "run", **{name: value})
    assert not (tmp_path / "run").exists()


# As many samples as it takes.


def test_samples_are_added_only_until_the_intervals_are_narrow(tmp_path: Path) -> None:
    x, y, weights = blobs(n=400, classes=3)
    model = linear(weights)
    whole = eb.audit(model, (x, y), "linf:0.001", effort="fast", out=tmp_path / "whole").models[0]
    part = eb.audit(model, (x, y), "linf:0.001", effort="fast", until_width=0.2, out=tmp_path / "part").models[0]
    rate = part.results[0].robust_accuracy
    assert part.stopped is not None
    assert (part.stopped.reason, part.stopped.samples, part.stopped.of) == ("width", part.n, 400)
    assert part.n in (64, 128, 256)
    assert (rate.interval, rate.low, rate.high) == ("at-any-time", *at_any_time(rate.count, part.n))
    assert rate.high - rate.low <= 0.2
    assert {part.clean_accuracy.interval, *(c.rate.interval for c in part.clean_per_class)} == {"at-any-time"}
    spent, least = (sum(row.forwards for row in m.results[0].attacks if not row.name.startswith("check:")) for m in (whole, part))
    assert least < spent / 4
    assert f"{least:,} rows went forward in attacks" in part.stopped.message
    assert part.results[0].trustworthy
    assert part.results[0].flags == []
    before, chosen = verdicts(tmp_path / "whole", "linf"), verdicts(tmp_path / "part", "linf")
    assert chosen == {sample: before[sample] for sample in chosen}  # a sample's verdict does not depend on its block
    assert holds(tmp_path / "part", [model])


def test_when_all_samples_are_used_the_interval_is_that_of_a_number_chosen_beforehand(tmp_path: Path) -> None:
    report = audited(tmp_path / "run", data=digits(), threats="linf:0.1", until_width=0.01)
    model = report.models[0]
    rate = model.results[0].robust_accuracy
    assert model.stopped is None
    assert (rate.interval, rate.n, rate.low, rate.high) == ("clopper-pearson", 128, *clopper_pearson(rate.count, 128))
    assert next(f.message for f in model.findings if f.id == "width").startswith("All 128 samples were used")
    plain = audited(tmp_path / "plain", data=digits(), threats="linf:0.1")
    assert told(report) == told(plain)
    assert verdicts(tmp_path / "run", "linf") == verdicts(tmp_path / "plain", "linf")
    assert holds(tmp_path / "run")


def test_a_block_that_a_budget_cuts_counts_for_nothing_but_its_cost(tmp_path: Path) -> None:
    plain = audited(tmp_path / "plain", data=digits(), threats="linf:0.1", until_width=0.01)
    first = audited(tmp_path / "first", data=digits(), threats="linf:0.1", until_width=0.01, max_forwards=3000).models[0]
    assert first.n == 64
    assert first.stopped is not None
    assert first.stopped.reason == "forwards"
    assert any(row.name == "left out: 64 samples" and row.forwards > 0 for row in first.results[0].attacks)
    assert first.results[0].forwards <= 3000 < plain.models[0].results[0].forwards
    before, chosen = verdicts(tmp_path / "plain", "linf"), verdicts(tmp_path / "first", "linf")
    assert chosen == {sample: before[sample] for sample in chosen}
    assert first.results[0].robust_accuracy.interval == "at-any-time"
    assert holds(tmp_path / "first")


def test_blocks_begin_with_64_and_double() -> None:
    assert [block.stop for block in blocks(1000)] == [64, 128, 256, 512, 1000]
    assert [block.stop for block in blocks(64)] == [64]
    assert [block.stop for block in blocks(3)] == [3]


at_once = cache(at_any_time)


def simulated(p: float, n: int, limits: Limits, runs: int) -> tuple[float, float]:
    """How often the interval that would be reported misses p, and how many samples it took on average. No model."""
    draws = np.random.default_rng([n, int(1000 * p)]).random((runs, n)) < p
    missed = used = 0.0
    for path in np.cumsum(draws, axis=1):
        for block in blocks(n):
            count, done = int(path[block.stop - 1]), block.stop
            if done == n or settled([(count, 0)], done, limits):
                break
        low, high = clopper_pearson(count, n) if done == n and limits.bar is None else at_once(count, done)
        missed, used = missed + (not low <= p <= high), used + done
    return missed / runs, used / runs


@pytest.mark.parametrize("p", [0.02, 0.3, 0.41, 0.6, 0.95])
@pytest.mark.parametrize("limits", [Limits(width=0.2), Limits(width=0.1), Limits(width=0.05, bar=0.4)])
def test_the_reported_interval_covers_although_the_data_decided_when_to_stop(p: float, limits: Limits) -> None:
    missed, _ = simulated(p, 1000, limits, runs=200)
    assert missed <= stats.binom.ppf(0.999, 200, 0.05) / 200


def test_far_from_the_bar_few_samples_are_enough() -> None:
    limits = Limits(width=0.001, bar=0.4)
    assert simulated(0.8, 1000, limits, 50)[1] == 64
    assert simulated(0.1, 1000, limits, 50)[1] == 64
    assert simulated(0.41, 1000, limits, 50)[1] > 900


def test_one_claim_fails_the_bar_and_all_have_to_reach_it() -> None:
    limits = Limits(width=0.01, bar=0.4)
    assert settled([(60, 0), (5, 0)], 64, limits) == "gate"
    assert settled([(60, 0), (58, 0)], 64, limits) == "gate"
    assert settled([(60, 0), (27, 0)], 64, limits) is None
    assert settled([(5, 0)], 64, limits) == "gate"
    assert settled([(5, 30)], 64, limits) is None  # 30 of unknown outcome may all stand
    assert settled([(900, 0)], 1000, Limits(width=0.1)) == "width"
    assert settled([(900, 0), (500, 0)], 1000, Limits(width=0.1)) is None


# A bar.


def test_a_bar_that_is_surely_failed_ends_the_run(full: tuple[Path, Report], tmp_path: Path) -> None:
    model = Counting()
    report = audited(tmp_path / "run", model=model, fail_under=60)
    assert not report.partial
    worst = min(report.models[0].results, key=lambda result: result.value)
    assert worst.value < 0.6
    stopped = report.models[0].stopped
    assert stopped is not None
    assert stopped.reason == "gate"
    assert "surely fails the bar of 60 %" in stopped.message
    rows = sum(result.forwards for result in report.models[0].results)
    assert rows < sum(result.forwards for result in full[1].models[0].results) / 2
    assert all(cut >= whole for (_, cut), (_, whole) in zip(told(report), told(full[1]), strict=True))
    assert holds(tmp_path / "run", [model])


def test_a_bar_above_clean_accuracy_needs_no_attack(tmp_path: Path) -> None:
    report = audited(tmp_path / "run", model={"a": "digits-standard", "b": "digits-robust"}, fail_under=100)
    assert [result.forwards for model in report.models for result in model.results] == [0] * 6
    assert all(model.stopped is not None and model.stopped.reason == "gate" for model in report.models)


def test_with_blocks_a_bar_ends_the_run_on_either_side(tmp_path: Path) -> None:
    low = audited(tmp_path / "low", data=digits(), threats="linf:0.2", until_width=0.001, fail_under=50).models[0]
    high = audited(tmp_path / "high", data=digits(), threats="linf:0.01", until_width=0.001, fail_under=50).models[0]
    for model, side in ((low, "below"), (high, "at or above")):
        assert model.stopped is not None
        assert (model.stopped.reason, model.n) == ("gate", 64)
        assert f"{side} the bar of 50 %" in model.stopped.message
        assert not any(result.early for result in model.results)  # every attack ran on the samples that count
        assert model.results[0].trustworthy
    assert low.results[0].high < 0.5 <= high.results[0].low
    both = audited(tmp_path / "both", model=None, data=digits(), threats="linf:0.01", until_width=0.001, fail_under=50)
    assert [model.n for model in both.models] == [64, 64]  # the first model's pass does not end the second's turn


# Unions.


def test_a_union_needs_no_attack_and_stands_where_all_do(full: tuple[Path, Report], united: tuple[Path, Report]) -> None:
    run, report = united
    model = report.models[0]
    assert told(report)[:3] == told(full[1])
    assert [(r.threat, r.radius, r.radius_text, r.forwards) for r in model.results[3:]] == [
        ("union", 1.0, "linf:0.05|l2:0.5", 0),
        ("union", 2.0, "linf:0.1|l2:0.5", 0),
    ]
    linf, l2 = verdicts(run, "linf"), verdicts(run, "l2")
    for radius, union in ((0.05, model.results[3]), (0.1, model.results[4])):
        wrong = model.n - model.clean_accuracy.count
        standing = sum(linf[sample] > radius and l2[sample] > 0.5 for sample in linf) - wrong
        assert union.robust_accuracy.count == standing
        assert union.value <= min(r.value for r in model.results[:3] if (r.threat, r.radius) in (("linf", radius), ("l2", 0.5)))
    assert report.robust_accuracy["union", 2].union[1].threat == "l2"
    assert holds(run)


def test_verify_sees_a_union_that_was_changed_or_left_out(united: tuple[Path, Report], tmp_path: Path) -> None:
    shutil.copytree(united[0], tmp_path / "run")
    path = tmp_path / "run" / "report.json"
    honest = Report.model_validate_json(path.read_bytes())

    def lines(change: Callable[[ModelReport], None]) -> list[bool]:
        changed = honest.model_copy(deep=True)
        change(changed.models[0])
        path.write_text(changed.model_dump_json())
        return [line.holds for line in eb.verify(tmp_path / "run")]

    assert all(lines(lambda model: None))
    assert lines(lambda model: model.results.pop()) == [True] * 5 + [False]
    assert lines(lambda model: setattr(model.results[3], "union", model.results[4].union)) == [True] * 4 + [False, True]
    better = rate(40, 40)
    assert lines(lambda model: setattr(model.results[4], "robust_accuracy", better)) == [True] * 5 + [False]


def test_radii_of_a_union_run_side_by_side_and_the_last_one_stays() -> None:
    named = unions([parse_threat(one) for one in ("linf:0.1,0.2,0.3", "l2:1", "color+linf:0.06+8/255,0.12+16/255")])
    assert [text(places) for places in named] == [
        "linf:0.1|l2:1|color+linf:0.06+8/255",
        "linf:0.2|l2:1|color+linf:0.12+16/255",
        "linf:0.3|l2:1|color+linf:0.12+16/255",
    ]
    with pytest.raises(BadInput, match="needs two threats"):
        unions([parse_threat("linf:0.1,0.2")])


def test_what_casts_doubt_on_a_part_does_on_the_union(tmp_path: Path) -> None:
    results = audited(tmp_path / "run", union=True, max_forwards=1).models[0].results
    assert not any(result.trustworthy for result in results)
    assert {flag.id for flag in results[-1].flags} == {"budget"}


# The whole data set.


def test_of_a_known_data_set_the_interval_for_all_of_it_is_told(tmp_path: Path) -> None:
    model = eb.audit("digits-standard", "digits", "linf:0.1", n=100, effort="fast", out=tmp_path / "run").models[0]
    rate, whole = model.results[0].robust_accuracy, model.results[0].whole_data
    assert model.population == 500
    assert whole is not None
    assert (whole.interval, whole.population, whole.count, whole.n) == ("finite-population", 500, rate.count, 100)
    assert (whole.low, whole.high) == finite_population(rate.count, 100, 500)
    assert rate.low < whole.low < whole.high < rate.high
    assert holds(tmp_path / "run")
    everything = eb.audit("digits-standard", digits(40), "linf:0.1", effort="fast", out=tmp_path / "all").models[0]
    assert everything.results[0].whole_data is not None  # 40 of 500, chosen before
    arrays = eb.audit("digits-standard", (digits(40).x, digits(40).y), "linf:0.1", effort="fast", out=tmp_path / "arrays").models[0]
    assert (arrays.population, arrays.results[0].whole_data) == (40, None)


def test_verify_sees_an_interval_of_another_kind(tmp_path: Path) -> None:
    audited(tmp_path / "run", data=digits(), threats="linf:0.01", until_width=0.001, fail_under=50)
    path = tmp_path / "run" / "report.json"
    report = Report.model_validate_json(path.read_bytes())
    result = report.models[0].results[0]
    result.robust_accuracy = rate(result.robust_accuracy.count, 64)  # narrower than the stop allows
    path.write_text(report.model_dump_json())
    assert [line.holds for line in eb.verify(tmp_path / "run")] == [True, False]


def test_a_victim_without_gradients_keeps_its_budget(tmp_path: Path) -> None:
    from epsball.core import Access

    asked: list[int] = []
    net = load("digits-standard")

    def served(x: Tensor) -> Tensor:
        asked.append(len(x))
        with torch.no_grad():
            output: Tensor = net(x)
        return output

    victim = wrap(served, access=Access.SCORES)
    report = audited(tmp_path / "run", model=victim, data=digits(20), threats="linf:0.1", max_queries=100, max_forwards=400)
    result = report.models[0].results[0]
    assert 300 < result.forwards <= 400
    assert report.models[0].stopped is not None
    assert sum(asked) >= result.forwards
