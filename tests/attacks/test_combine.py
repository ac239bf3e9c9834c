"""Restarts, cascades, targets in turn: unions per sample, costs added, nothing lost."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from lawkit import answers, bench, check_legal, check_nested, check_replay, radius_of
from torch import Tensor

from epsball.attacks import Cascade, EveryTarget, Restarts, SmallestRadius, by_logit, get, malt, outside_in, vertices
from epsball.attacks.vertices import Vertices
from epsball.core import Attack, Key, Outcome, Tally, Targeted, Victim, as_goal, content_ids, valid
from epsball.errors import BadInput
from epsball.objectives import cross_entropy, dlr_targeted, margin
from epsball.threats import L1, Linf, named


@dataclass(frozen=True)
class Fake:
    """Breaks the samples whose first feature is in `hits`, in the order of its calls; notes what it was asked."""

    hits: tuple[tuple[float, ...], ...]
    log: list[Any]
    score: float = 1.0
    name: str = "fake"
    threat: Any = Linf()  # noqa: RUF009

    def __call__(
        self, model: Any, x: Tensor, goal: Any, radius: Any, seed: Any = 0, *, clean: Any = None, drop: bool = True, watch: Any = None
    ) -> Outcome:
        n, number = len(x), len(self.log)
        self.log.append((x[:, 0].tolist(), as_goal(goal), seed, radius))
        reached = (x[:, :1] == torch.tensor(self.hits[min(number, len(self.hits) - 1)], dtype=x.dtype)).any(1)
        one = torch.ones(n, dtype=torch.int64)
        score = torch.where(reached, 1.0, -1.0) * self.score
        there = x + 0.01 * (number + 1)
        known = {
            "x_adv": there,
            "z": there,
            "reached": reached,
            "size": torch.full((n,), 0.01 * (number + 1)).double(),
            "score": score,
            "queries": 2 * one,
            "backwards": one,
            "steps": 1,
            "flags": {"invalid": ~valid(clean)},
        }
        return Outcome(**known)


X = torch.tensor([[0.1, 0.5], [0.2, 0.5], [0.3, 0.5], [0.4, 0.5]])
LABELS = torch.zeros(4, dtype=torch.int64)


def model(x: Tensor) -> Tensor:
    return torch.stack([torch.ones(len(x)), torch.zeros(len(x)), torch.full((len(x),), -1.0)], 1) * x.sum(1, keepdim=True)


SPARSE = L1()


def heard(log: list[Any]) -> list[list[float]]:
    return [[round(v, 1) for v in rows] for rows, *_ in log]


def test_restarts_see_survivors_only_and_add_up() -> None:
    log: list[Any] = []
    whole = Restarts(Fake(((0.2,), (0.4,), ()), log), 3)(model, X, LABELS, 0.1)
    assert heard(log) == [[0.1, 0.2, 0.3, 0.4], [0.1, 0.3, 0.4], [0.1, 0.3]]
    assert whole.reached.tolist() == [False, True, False, True]
    assert whole.queries.tolist() == [7, 3, 7, 5]
    assert whole.backwards.tolist() == [3, 1, 3, 2]
    assert torch.allclose(whole.x_adv[1], X[1] + 0.01)
    assert torch.allclose(whole.x_adv[3], X[3] + 0.02)
    assert torch.allclose(whole.x_adv[0], X[0] + 0.01), "the first failure of equal score stays"


def test_without_dropping_all_are_asked_and_nothing_is_lost() -> None:
    log: list[Any] = []
    whole = Restarts(Fake(((0.2,), (0.4,), ()), log), 3)(model, X, LABELS, 0.1, drop=False)
    assert heard(log) == [[0.1, 0.2, 0.3, 0.4]] * 3
    assert whole.reached.tolist() == [False, True, False, True]
    assert torch.allclose(whole.x_adv[1], X[1] + 0.01)
    assert whole.queries.tolist() == [7] * 4


def test_a_success_of_low_score_beats_a_failure_of_high_score() -> None:
    log: list[Any] = []
    first, second = Fake(((),), log, score=-50.0), Fake(((0.3,),), [], score=0.5)
    whole = Cascade((first, second))(model, X, LABELS, 0.1)
    assert whole.reached.tolist() == [False, False, True, False]
    assert torch.allclose(whole.x_adv[2], X[2] + 0.01)


def test_cascade_stops_when_nobody_stands() -> None:
    logs: list[list[Any]] = [[], []]
    whole = Cascade((Fake(((0.1, 0.2, 0.3, 0.4),), logs[0]), Fake(((),), logs[1])))(model, X, LABELS, 0.1)
    assert bool(whole.reached.all())
    assert logs[1] == []


def test_cascade_passes_the_seed_and_the_radius() -> None:
    log: list[Any] = []
    radius = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    Cascade((Fake(((0.2,),), log), Fake(((),), log)))(model, X, LABELS, radius, 7)
    assert [entry[2] for entry in log] == [Key.of(7)] * 2
    assert torch.equal(log[1][3], radius[[0, 2, 3]])


def test_restarts_have_keys_of_their_own_and_the_first_is_the_plain_run() -> None:
    log: list[Any] = []
    Restarts(Fake(((),), log), 3)(model, X, LABELS, 0.1, 5)
    keys = [Key.of(entry[2]) for entry in log]
    assert keys[0] == Key.of(5)
    assert len(set(keys)) == 3


def test_restarts_go_on_where_others_ended() -> None:
    """Runs 1 and 2 of three are the same whether run 0 is among them or was made before."""
    whole: list[Any] = []
    rest: list[Any] = []
    Restarts(Fake(((),), whole), 3)(model, X, LABELS, 0.1, 5)
    Restarts(Fake(((),), rest), 2, first=1)(model, X, LABELS, 0.1, 5)
    assert [seed for _, _, seed, _ in rest] == [seed for _, _, seed, _ in whole[1:]]


@pytest.mark.parametrize("wide", [1, 20, 1024])
@pytest.mark.parametrize("threat", ["linf", "l2", "l1"])
def test_runs_side_by_side_find_what_runs_in_turn_find(threat: str, wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples break whatever a batch may hold, and who stands costs the same; without dropping all is the same, bit for bit."""
    monkeypatch.setattr("epsball.attacks.combine.WIDE", wide)
    b, radius = bench(4, n=12), 0.5 * radius_of(threat)
    inner = Attack("apgd", named(threat), margin, get("apgd", threat=threat).strategy, 5)  # type: ignore[attr-defined]
    walk = outside_in(8, named(threat), far=3, rounds=2)
    for make in (
        lambda abreast: Restarts(inner, 3, abreast=abreast),
        lambda abreast: Restarts(walk, 3, first=2, abreast=abreast),
        lambda abreast: Restarts((inner, replace(inner, objective=cross_entropy)), 3, first=1, abreast=abreast),
        lambda abreast: EveryTarget(inner, 3, malt, abreast=abreast),
        lambda abreast: Restarts(EveryTarget(inner, 2, by_logit, abreast=abreast), 3, abreast=abreast),
    ):
        for drop in (True, False):
            turn, side = (make(abreast)(b.model, b.x, b.labels, radius, 3, drop=drop) for abreast in (None, True))
            assert 0 < int(turn.reached[2:].sum()) < 10
            assert torch.equal(side.reached, turn.reached)
            stood = ~turn.reached if drop else torch.ones_like(turn.reached)
            assert torch.equal(side.x_adv[stood], turn.x_adv[stood])
            assert torch.equal(Victim.of(b.model).outputs(side.x_adv, Tally.zeros(12)).argmax(1) != b.labels, turn.reached)
            assert torch.equal(side.queries[stood], turn.queries[stood])
            assert torch.equal(side.backwards[stood], turn.backwards[stood])


def test_several_attacks_take_turns() -> None:
    """Run after run is the next one's, whether they differ in their losses or in numbers; side by side as alone."""
    b, radius = bench(4, n=12), 0.3 * radius_of("l1")
    near, far = (vertices(6, SPARSE, loss, (budgets, budgets)) for loss, budgets in ((margin, 2.0), (cross_entropy, 9.0)))
    alone = [Restarts(one, 1, first=run)(b.model, b.x, b.labels, radius, 3, drop=False) for run, one in ((4, near), (5, far), (6, near))]
    for abreast in (None, True, torch.full((12,), 3)):
        both = Restarts((near, far), 3, first=4, abreast=abreast)(b.model, b.x, b.labels, radius, 3, drop=False)
        assert torch.equal(both.reached, torch.stack([one.reached for one in alone]).any(0))
        assert torch.equal(both.backwards, sum((one.backwards for one in alone), torch.zeros(12, dtype=torch.int64)))
        for row in both.reached[2:].nonzero().squeeze(1) + 2:
            first = next(one for one in alone if one.reached[row])
            assert torch.equal(both.x_adv[row], first.x_adv[row])
    assert 0 < int(both.reached[2:].sum()) < 10
    assert len({tuple(one.reached.tolist()) for one in alone}) > 1


MEMORY = replace(vertices(6, SPARSE), strategy=Vertices((3.0, 30.0), memory=0.9))


@pytest.mark.parametrize("other", [vertices(7, SPARSE), outside_in(6, SPARSE), get("apgd", steps=6), vertices(6), MEMORY])
def test_attacks_that_differ_in_more_do_not_go_side_by_side(other: Any) -> None:
    b = bench(4, n=4)
    with pytest.raises(BadInput, match="use a Cascade"):
        Restarts((vertices(6, SPARSE), other), 2, abreast=True)(b.model, b.x, b.labels, 0.1, 3)


def test_the_first_success_of_runs_side_by_side_ends_the_others() -> None:
    """Nobody takes more looks than the quickest of its runs needs, in as many runs, and what is found is what that run finds."""
    b, radius, runs = bench(4, n=12), 0.5 * radius_of("linf"), 4
    inner = Restarts(get("apgd", steps=8), 1)
    each = [replace(inner, first=number)(b.model, b.x, b.labels, radius, 3) for number in range(runs)]
    side = Restarts(inner.attack, runs, abreast=True)(b.model, b.x, b.labels, radius, 3)
    looks = torch.stack([outcome.backwards for outcome in each])
    won = torch.stack([outcome.reached for outcome in each])
    broken = won.any(0) & (looks.sum(0) > 0)
    assert bool((looks.amax(0) > looks.amin(0))[broken].any())
    quickest = torch.where(won, looks, 99).min(0)
    assert torch.equal(side.backwards[broken], runs * quickest.values[broken])
    for row in broken.nonzero().squeeze(1).tolist():
        assert torch.equal(side.x_adv[row], each[int(quickest.indices[row])].x_adv[row])


def test_noise_where_gradients_vanish_is_each_runs_own() -> None:
    """DDN draws a direction for the rows whose gradient is zero, here half of them, and only for those."""

    def half(x: Tensor) -> Tensor:
        return (x[:, :1] - 0.25).clamp(min=0.0) * torch.tensor([[-1.0, 1.0]]) + torch.tensor([[1.0, 0.0]])

    turn, side = (Restarts(get("ddn", steps=3), 2, abreast=abreast)(half, X, LABELS, torch.inf, drop=False) for abreast in (None, True))
    assert torch.equal(side.x_adv, turn.x_adv)
    assert torch.equal(side.queries, turn.queries)


def test_runs_side_by_side_are_one_call_with_a_key_for_every_row() -> None:
    log: list[Any] = []
    whole = Restarts(Fake(((0.2,),), log), 3, abreast=True)(model, X, LABELS, 0.1, 5)
    assert heard(log) == [[0.1, 0.2, 0.3, 0.4] * 3]
    assert whole.queries.tolist() == [7] * 4
    drawn = log[0][2].uniform(content_ids(X.repeat(3, 1)), X.repeat(3, 1)).view(3, 4, 2)
    keys = [Key.of(5), *(Key.of(5).fold("restart", number) for number in (1, 2))]
    assert torch.equal(drawn, torch.stack([key.uniform(content_ids(X), X) for key in keys]))


def test_numbers_give_each_sample_its_own_many_runs() -> None:
    """As a call of its own with that many runs; 0 runs ask nothing."""
    b, counts = bench(4, n=12), torch.tensor([0, 1, 2, 3] * 3)
    inner, radius = get("apgd", steps=5), 0.5 * radius_of("linf")
    mixed = Restarts(inner, 3, abreast=counts)(b.model, b.x, b.labels, radius, 3, drop=False)
    assert not bool((mixed.x_adv != b.x)[counts == 0].any())
    assert int(mixed.queries[2:][counts[2:] == 0].sum()) == 2, "the clean answers alone"
    for count in (1, 2, 3):
        rows = counts == count
        alone = Restarts(inner, count)(b.model, b.x[rows], b.labels[rows], radius, 3, drop=False)
        assert torch.equal(mixed.x_adv[rows], alone.x_adv)
        assert torch.equal(mixed.queries[rows], alone.queries)


def test_every_target_goes_through_the_classes_in_order() -> None:
    log: list[Any] = []
    EveryTarget(Fake(((0.2,), ()), log), 9, by_logit)(model, X, LABELS, 0.1)
    assert len(log) == 2, "two other classes, however many were asked for"
    assert log[0][1].targets.tolist() == [1] * 4
    assert log[1][1].targets.tolist() == [2] * 3
    assert log[1][1].labels.tolist() == [0] * 3
    assert heard(log)[1] == [0.1, 0.3, 0.4]
    with pytest.raises(BadInput, match="target"):
        EveryTarget(Fake(((),), []), 9, by_logit)(model, X, Targeted(LABELS + 1), 0.1)


@pytest.mark.parametrize("count", [0, -1])
def test_counts_below_one_are_refused(count: int) -> None:
    for make in (
        lambda: EveryTarget(Fake(((),), []), count, by_logit),
        lambda: get("pgd", restarts=count),
        lambda: get("apgd_t", targets=count),
    ):
        with pytest.raises(BadInput):
            make()


@pytest.mark.parametrize("combined", ["restarts", "cascade", "targets", "smallest"])
def test_combinations_obey_the_laws(combined: str) -> None:
    b = bench(4, n=16)
    inner = get("pgd", steps=5)
    attack = {
        "restarts": Restarts(inner, 3),
        "cascade": Cascade((get("fgsm"), inner, get("apgd", steps=5, objective="margin"))),
        "targets": EveryTarget(get("apgd", steps=5, objective=dlr_targeted), 3, malt),
        "smallest": SmallestRadius(get("pgd", steps=5, objective=margin), rounds=5),
    }[combined]
    whole = attack(b.model, b.x, b.labels, 0.1)
    check_legal("linf", b.x, whole.x_adv, 0.1)
    check_replay("linf", b.model, b.x, b.labels, whole)
    assert torch.equal(whole.x_adv[b.wrong], b.x[b.wrong])
    assert whole.queries[b.wrong].tolist() == [1] * int(b.wrong.sum())
    known = attack(b.model, b.x, b.labels, 0.1, clean=answers(b.model, b.x))
    assert torch.equal(known.queries, whole.queries - 1)
    assert torch.equal(known.reached, whole.reached)
    order = torch.tensor([3, 9, 3, 15, 1, 0, 7])
    part = attack(b.model, b.x[order], b.labels[order], 0.1)
    assert torch.equal(part.reached, whole.reached[order])
    assert torch.allclose(part.x_adv, whole.x_adv[order], atol=1e-6)
    if combined in ("restarts", "cascade"):
        check_nested((inner if combined == "restarts" else get("fgsm"))(b.model, b.x, b.labels, 0.1), whole)


def test_combinations_nest() -> None:
    b = bench(4, n=16)
    deep = Restarts(Cascade((get("fgsm"), Restarts(get("pgd", steps=3), 2))), 2)
    whole = deep(b.model, b.x, b.labels, 0.1)
    check_replay("linf", b.model, b.x, b.labels, whole)
    check_nested(get("pgd", steps=3, restarts=2)(b.model, b.x, b.labels, 0.1), whole)
    assert " at 0x" not in repr(deep)


@pytest.mark.parametrize("threat", ["linf", "l2", "l1", "l0", "l0f"])
def test_success_sets_are_nested_in_the_radius_when_united(threat: str) -> None:
    """P5: what a smaller radius breaks, a larger one has broken too: the union over radii is what an audit reports."""
    b = bench(4, n=16)
    attack = get("pgd", threat=threat, steps=5)
    broken = torch.zeros(16, dtype=torch.bool)
    for share in (0.25, 0.5, 1.0, 2.0):
        outcome = attack(b.model, b.x, b.labels, radius_of(threat) * share)
        assert bool((outcome.size <= radius_of(threat) * share).all())
        broken |= outcome.reached
    last = attack(b.model, b.x, b.labels, radius_of(threat) * 2.0)
    assert int(last.reached.sum()) >= 0.8 * int(broken.sum())


def test_smallest_radius_sizes_shrink_with_rounds() -> None:
    b = bench(4, n=16)
    runs = [SmallestRadius(get("pgd", steps=8), rounds=r)(b.model, b.x, b.labels, 0.5) for r in (0, 2, 5, 8)]
    for fewer, more in itertools.pairwise(runs):
        assert torch.equal(fewer.reached, more.reached)
        assert bool((more.size <= fewer.size).all())
    assert float(runs[-1].size.sum()) < float(runs[0].size.sum())
    none = SmallestRadius(get("pgd", steps=8), rounds=5)(b.model, b.x, b.labels)
    assert bool(none.reached.all())
