"""Faults of a server, a budget and a cache: every row is answered once, counted right, or called unknown."""

import copy

import numpy as np
import pytest
import torch

import epsball as eb
from epsball.core import Tally
from epsball.errors import BadInput


def batch(n, seed=0):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def bad(rows, where):
    """Whether a row with a marked corner is among them."""
    return bool((rows.reshape(len(rows), -1)[:, 0] == where).any())


def marked(n, *places):
    x = batch(n)
    x[list(places), 0, 0, 0] = 0.75
    return x


# --- faults that pass


FIRST = {
    "429": (429, "2"),
    "429 without a word": 429,
    "503": (503, "0"),
    "502": 502,
    "504": 504,
    "500": 500,
    "truncated": "truncated",
    "cut": "cut",
    "shape": "shape",
    "rows": "rows",
    "other": "other",
    "drop": "drop",
    "413": 413,
}


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("fault", [name for name in FIRST if name != "413"])
def test_one_fault_loses_nothing(served, model, fault, n):
    served.plan = lambda number, rows: FIRST[fault] if number == 0 else None
    found, x = model(), batch(n)
    served.agrees(found(x), x)
    assert (found.counts.answered, found.counts.unknown) == (n, 0)
    assert found.counts.sent == 2 * n  # again as a whole or in halves, never more
    assert set(served.contents.values()) == {2}
    served.balanced(found)


def test_slow_answers_are_asked_again(served, model):
    served.plan = lambda number, rows: "slow" if number == 0 else None
    found, x = model(timeout=1.0), batch(4)
    served.agrees(found(x), x)
    assert found.counts.sent == 8
    served.balanced(found)


def test_truncated_raw_bytes(served, model):
    served.extensions = ["binary_tensor_data"]
    served.plan = lambda number, rows: "truncated" if number == 0 else None
    found, x = model(), batch(4)
    served.agrees(found(x), x)
    served.balanced(found)


def test_back_off_doubles_and_retry_after_is_obeyed(served, model):
    plan = [429, 429, 502, (503, "7")]
    served.plan = lambda number, rows: plan[number] if number < len(plan) else None
    found = model(backoff=1.0)
    found(batch(2))
    slept = found.client.pace.clock.slept
    assert len(slept) == 4
    for tries, seconds in enumerate(slept[:3]):
        assert 2**tries / 2 <= seconds < 2**tries
    assert 7 <= slept[3] < 8
    assert found.client.pace.waited == sum(slept)


def test_a_long_wait_is_told(served, model):
    served.plan = lambda number, rows: (429, "3600")
    with pytest.raises(BadInput, match="asks to wait 3600 s, longest_wait is 60: come back later or raise it"):
        model()(batch(2))


def test_the_rate_limit_spaces_requests(served, model):
    found = model(rate_limit=4, batch_size=1)
    found(batch(5))
    assert found.client.pace.clock.slept == pytest.approx([0.25] * 6)  # two requests for metadata, five of rows


# --- faults that stay


@pytest.mark.parametrize("fault", [400, 422, 500, "shape", "truncated", "drop"])
def test_a_bad_sample_does_not_lose_the_others(served, model, fault):
    x = marked(16, 5)
    served.plan = lambda number, rows: fault if bad(rows, 0.75) else None
    found = model(retries=2)
    out = found(x)
    assert out[5].isnan().all()
    rest = [i for i in range(16) if i != 5]
    served.agrees(out[rest], x[rest])
    assert (found.counts.answered, found.counts.unknown) == (15, 1)
    served.balanced(found)
    whole = 2 if fault == "drop" else 1  # lost connections are tried again before the batch is halved
    assert served.contents[x[5].numpy().tobytes()] == 4 * whole + (1 if fault in (400, 422) else 3)
    assert "1 of 16 answers stayed unknown" in found.tell()[1]


@pytest.mark.parametrize("seed", range(12))
def test_whatever_fails_no_row_is_lost_or_changed(served, model, seed):
    rng = np.random.default_rng(seed)
    ways = [429, 500, 503, 504, 400, (429, "1"), "truncated", "cut", "shape", "rows", "other", "drop"]
    served.plan = lambda number, rows: ways[rng.integers(len(ways))] if rng.random() < 0.4 else None
    served.extensions = ["binary_tensor_data"] if seed % 2 else []
    found, x = model(batch_size=int(rng.integers(1, 20)), retries=3, cache=int(rng.integers(2)) * 50), batch(40, seed)
    x[20:] = x[:20]
    unknown = 0
    for order in (torch.arange(40), torch.from_numpy(rng.permutation(40))):
        out = found(x[order])
        known = out.isfinite().all(1)
        served.agrees(out[known], x[order][known])
        served.balanced(found)
        unknown += int((~known).sum())
    assert (found.counts.asked, found.counts.unknown) == (80, unknown)


def test_many_bad_samples_do_not_stop_a_server_that_lives(served, model):
    x = marked(24, *range(3, 13))
    served.plan = lambda number, rows: 500 if bad(rows, 0.75) else None
    found = model(retries=1)
    out = found(x)
    assert out.isnan().all(1).nonzero().flatten().tolist() == list(range(3, 13))
    served.balanced(found)


def test_a_batch_too_large_is_halved(served, model):
    served.plan = lambda number, rows: 413 if len(rows) > 3 else None
    found, x = model(), batch(10)
    served.agrees(found(x), x)
    assert found.client.pace.clock.slept == []
    assert found.client.most == 2
    sent = found.counts.sent
    found(x)
    assert found.counts.sent == sent + 10  # it has learned
    served.balanced(found)


def test_a_busy_server_is_not_asked_in_halves(served, model):
    found, x = model(retries=2), batch(3)
    served.agrees(found(x), x)
    served.plan = lambda number, rows: 503 if number <= 3 else None
    assert found(x).isnan().all()
    assert (served.requests, found.counts.unknown) == (4, 3)
    served.agrees(found(x), x)
    served.balanced(found)


def test_a_server_that_answers_nothing_ends_the_run(served, model):
    served.plan = lambda number, rows: 500
    found = model(retries=1)
    with pytest.raises(BadInput, match=r"has answered none of the last 4 rows: HTTP 500 \(fault 500 None\); check that model, data"):
        found(batch(64))
    served.plan = lambda number, rows: None
    found(batch(2))
    served.plan = lambda number, rows: "drop"
    with pytest.raises(BadInput, match=r"none of the last 4 rows: the connection was lost .* nor one that it had answered before"):
        found(batch(64))


def test_a_null_is_an_unknown_answer(served, model):
    served.plan = lambda number, rows: "null"
    out = model()(batch(3))
    assert out.isfinite().all(1).tolist() == [False, True, True]


def test_rows_that_are_no_numbers_are_not_sent(served, model):
    x = batch(3)
    x[1, 0, 2, 2] = torch.nan
    found = model()
    assert found(x).isfinite().all(1).tolist() == [True, False, True]
    assert (served.rows, found.counts.unknown) == (2, 1)
    served.balanced(found)


def test_an_answer_without_end(model, monkeypatch):
    found = model(timeout=5.0)
    clock = found.client.pace.clock

    def later():
        clock.time += 6
        return clock.time

    monkeypatch.setattr(clock, "now", later)
    with pytest.raises(BadInput, match=r"no whole answer in 5 s"):
        found(batch(4))


# --- budget, cache


def test_the_budget_holds_across_retries(served, model):
    served.plan = lambda number, rows: 429 if number % 2 == 0 else None
    found = model(max_sent=10)
    found(batch(4))
    assert found.counts.sent == 8
    with pytest.raises(BadInput, match="max_sent 10: 8 rows were sent, 4 more do not fit"):
        found(batch(4, 1))
    assert (served.rows, found.counts.sent) == (8, 8)
    found(batch(1))
    with pytest.raises(BadInput, match="max_sent 10: 10 rows were sent"):
        found(batch(1))
    assert served.rows == 10


def test_the_cache_asks_each_content_once(served, model):
    found, x = model(cache=100), batch(10)
    x[7] = x[2]
    served.agrees(found(x), x)
    assert (found.counts.answered, found.counts.cached, served.rows) == (9, 1, 9)
    served.agrees(found(x.flip(0)), x.flip(0))
    assert (found.counts.asked, found.counts.cached, served.rows) == (20, 11, 9)
    tally = Tally.zeros(10)
    eb.wrap(found).outputs(x, tally)
    assert tally.forwards.tolist() == [1] * 10  # the ledger counts what was asked, the client what was sent
    served.balanced(found)
    assert "the same question is not sent twice" in found.notes()[1]


def test_unknown_answers_are_not_kept(served, model):
    x = torch.cat([batch(3), batch(3)[:1]])
    served.plan = lambda number, rows: 400 if bad(rows, float(x[0, 0, 0, 0])) else None
    found = model(cache=100)
    assert found(x).isnan().all(1).tolist() == [True, False, False, True]
    assert (found.counts.unknown, found.counts.answered) == (2, 2)
    served.plan = lambda number, rows: None
    served.agrees(found(x), x)
    served.balanced(found)


def test_the_cache_is_bounded_and_a_judge_starts_without(served, model):
    found = model(cache=4)
    found(batch(10))
    assert len(found.cache) == 4
    found(batch(10)[6:])
    assert served.rows == 10
    found(batch(10)[:1])
    assert (served.rows, len(found.cache)) == (11, 4)
    judge = copy.deepcopy(found)
    judge(batch(10)[:1])
    assert (served.rows, judge.counts.sent, len(found.cache)) == (12, 12, 4)
