"""The one loop, with strategies written for the test: what it judges, keeps, drops and counts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from lawkit import answers, bench, posed
from torch import Tensor

from epsball.attacks import entries, pgd
from epsball.core import Attack, Descent, Key, OfRadius, Problem, Reading, Untargeted, as_goal, run, valid
from epsball.core.rows import concatenate, take
from epsball.objectives import margin
from epsball.threats import L1, L2, Linf
from epsball.threats.lp import Room

X = torch.full((3, 2), 0.5)
LABELS = torch.zeros(3, dtype=torch.int64)


def ramp(x: Tensor) -> Tensor:
    """Class 1 wins where the first feature is above 0.55; the second feature adds to the score of both."""
    return torch.stack([torch.full_like(x[:, 0], 0.55), x[:, 0]], 1) + x[:, 1:] * 0


@dataclass(frozen=True)
class Walk:
    z: Tensor
    path: Tensor  # (B, T, 2)
    at: int


@dataclass(frozen=True)
class Scripted:
    """Looks at given points in turn."""

    path: Tensor

    def init(self, problem: Problem, steps: int) -> Walk:
        path = self.path.expand(len(problem.x), -1, -1)
        return Walk(path[:, 0], path, 0)

    def step(self, problem: Problem, state: Walk) -> tuple[Reading, Walk]:
        nxt = min(state.at + 1, state.path.shape[1] - 1)
        return problem.judge(state.z), Walk(state.path[:, nxt], state.path, nxt)


def scripted(points: list[float], radius: float = 0.2, steps: int | None = None, smallest: bool = False, drop: bool = True) -> Any:
    path = torch.tensor([[[p, 0.5] for p in points]])
    attack = Attack("scripted", Linf(), margin, Scripted(path), len(points) - 1 if steps is None else steps, smallest)
    return attack(ramp, X, LABELS, radius, drop=drop)


def test_the_last_iterate_is_judged() -> None:
    assert bool(scripted([0.5, 0.52, 0.6]).reached.all())
    assert bool(scripted([0.6], steps=0).reached.all())
    assert not bool(scripted([0.5, 0.52, 0.6], steps=1).reached.any())


def test_the_best_is_kept_not_the_last() -> None:
    found = scripted([0.5, 0.54, 0.51])
    assert torch.allclose(found.x_adv[:, 0], torch.tensor(0.54))
    kept = scripted([0.5, 0.6, 0.65, 0.52, 0.51], drop=False)
    assert bool(kept.reached.all())
    assert torch.allclose(kept.x_adv[:, 0], torch.tensor(0.65))
    assert torch.allclose(kept.size, torch.tensor(0.15, dtype=torch.float64), atol=1e-7)


def test_dropping_stops_at_the_first_success() -> None:
    found = scripted([0.5, 0.6, 0.65, 0.52])
    assert torch.allclose(found.x_adv[:, 0], torch.tensor(0.6))
    assert found.queries.tolist() == [3, 3, 3]  # clean, 0.5, 0.6
    assert scripted([0.5, 0.6, 0.65, 0.52], drop=False).queries.tolist() == [5, 5, 5]


def test_the_smallest_goes_on_and_keeps_the_smallest() -> None:
    found = scripted([0.5, 0.65, 0.58, 0.62, 0.51], smallest=True)
    assert torch.allclose(found.size, torch.tensor(0.08, dtype=torch.float64), atol=1e-7)
    assert torch.allclose(found.x_adv[:, 0], torch.tensor(0.58))
    assert found.queries.tolist() == [6, 6, 6]


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("drop", [False, True])
def test_a_cheat_gains_nothing(smallest: bool, drop: bool) -> None:
    """A strategy that leaves the ball: no success is credited there, and nothing outside is handed back."""
    found = scripted([0.5, 0.9, 0.52, 0.95], radius=0.1, smallest=smallest, drop=drop)
    assert not bool(found.reached.any())
    assert bool((found.size <= 0.1).all())
    assert bool(((found.x_adv - X).abs() <= 0.1).all())
    after = scripted([0.5, 0.58, 0.9], radius=0.1, smallest=smallest, drop=False)
    assert bool(after.reached.all())
    assert torch.allclose(after.x_adv[:, 0], torch.tensor(0.58))
    low = scripted([0.3, 0.2], radius=0.1, smallest=smallest, drop=drop)  # outside, and no success either
    assert bool((low.size <= 0.1).all())
    assert bool(((low.x_adv - X).abs() <= 0.1).all())


def test_rows_finish_on_their_own() -> None:
    path = torch.tensor([[[0.5, 0.5], [0.6, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5], [0.61, 0.5]], [[0.5, 0.5]] * 3])
    attack = Attack("scripted", Linf(), margin, Scripted(path), 2)
    found = attack(ramp, X, LABELS, 0.2)
    assert found.reached.tolist() == [True, True, False]
    assert found.queries.tolist() == [3, 4, 4]
    assert torch.allclose(found.x_adv[:, 0], torch.tensor([0.6, 0.61, 0.5]))


@dataclass(frozen=True)
class Visit:
    z: Tensor
    path: Tensor  # (B, T, 2)
    looks: Tensor  # (B,) wanted
    at: int


@dataclass(frozen=True)
class Leaving:
    """Looks at given points in turn; each sample leaves after its own number of looks."""

    path: Tensor
    looks: Tensor

    def init(self, problem: Problem, steps: int) -> Visit:
        return Visit(self.path[:, 0], self.path, self.looks, 0)

    def step(self, problem: Problem, state: Visit) -> tuple[Reading, Visit]:
        reading = replace(problem.judge(state.z), over=state.looks <= state.at + 1)
        return reading, replace(state, z=state.path[:, state.at + 1], at=state.at + 1)


@pytest.mark.parametrize("drop", [False, True])
def test_a_sample_whose_search_is_over_leaves_unasked(drop: bool) -> None:
    heard: list[tuple[int, int, int]] = []
    path = torch.tensor([[[p, 0.5] for p in (0.5, 0.6, 0.58, 0.57)]]).expand(3, -1, -1)
    attack = Attack("leaving", Linf(), margin, Leaving(path, torch.tensor([1, 2, 9])), 3, smallest=True)
    found = attack(ramp, X, LABELS, 0.2, drop=drop, watch=lambda *told: heard.append(told))
    assert found.reached.tolist() == [False, True, True]
    assert torch.allclose(found.size, torch.tensor([0.0, 0.1, 0.07], dtype=torch.float64), atol=1e-7)
    assert found.queries.tolist() == [2, 3, 5]  # the clean look, one per step; only the last is still there to be judged at the end
    assert heard == [(0, 3, 3), (1, 3, 2), (2, 3, 1)]


def test_a_search_that_is_over_for_all_ends() -> None:
    heard: list[tuple[int, int, int]] = []
    attack = Attack("leaving", Linf(), margin, Leaving(torch.full((3, 9, 2), 0.5), torch.full((3,), 2)), 8)
    found = attack(ramp, X, LABELS, 0.2, watch=lambda *told: heard.append(told))
    assert found.queries.tolist() == [3, 3, 3]
    assert len(heard) == 2


def test_watch_hears_every_step_and_who_is_left() -> None:
    heard: list[tuple[int, int, int]] = []
    path = torch.tensor([[[0.5, 0.5], [0.6, 0.5], [0.5, 0.5]], [[0.5, 0.5]] * 3, [[0.5, 0.5]] * 3])
    Attack("scripted", Linf(), margin, Scripted(path), 3)(ramp, X, LABELS, 0.2, watch=lambda *told: heard.append(told))
    assert heard == [(0, 3, 3), (1, 3, 3), (2, 3, 2)]


def test_nothing_to_do_costs_nothing() -> None:
    attack = Attack("scripted", Linf(), margin, Scripted(torch.full((1, 1, 2), 0.5)), 5)
    found = attack(ramp, X, torch.ones(3, dtype=torch.int64), 0.2)
    assert bool(found.reached.all())
    assert found.queries.tolist() == [1, 1, 1]
    known = attack(ramp, X, torch.ones(3, dtype=torch.int64), 0.2, clean=ramp(X))
    assert known.queries.tolist() == [0, 0, 0]


def test_a_score_that_is_nan_is_never_best() -> None:
    def nanny(problem: Problem, z: Tensor, x_adv: Tensor, output: Tensor) -> Tensor:
        score = margin(problem, z, x_adv, output)
        return torch.where(x_adv[:, 0] > 0.53, torch.full_like(score, torch.nan), score)

    path = torch.tensor([[[0.52, 0.5], [0.54, 0.5], [0.51, 0.5]]])
    found = Attack("scripted", Linf(), nanny, Scripted(path), 2)(ramp, X, LABELS, 0.2)
    assert torch.allclose(found.x_adv[:, 0], torch.tensor(0.52))
    hit = Attack("scripted", Linf(), nanny, Scripted(path + 0.05), 2)(ramp, X, LABELS, 0.2)
    assert bool(hit.reached.all()), "success is judged on the answer, not on the score"


def test_an_answer_is_valid_unless_a_score_is_nan_or_infinite() -> None:
    huge = torch.full((1, 3), 3e38)  # finite, though its sum is not
    wild = torch.tensor([[0.0, torch.nan, 1.0], [torch.inf, -torch.inf, 0.0], [0.0, 1.0, 2.0]])
    assert valid(torch.cat([huge, wild])).tolist() == [True, False, False, True]
    assert valid(huge).tolist() == [True]
    assert valid(wild[2:]).tolist() == [True]


@pytest.mark.parametrize(("threat", "sizes"), [(Linf(), (0.5, 0.75)), (L2(), (0.5, 0.75)), (L1(), (0.5, 0.75))])
def test_a_size_is_measured_again_after_a_change_in_place(threat: Any, sizes: tuple[float, float]) -> None:
    x = torch.zeros(1, 4)
    z = x.clone()
    for size in sizes:
        z[0, 1] = size
        assert threat.size(x, z).tolist() == [size]
        assert threat.size(x, z).tolist() == [size]
    assert threat.size(z.clone(), z).tolist() == [0.0]


def test_run_reports_only_its_own_rows() -> None:
    b = bench(4, n=6, wrong=0)
    problem = posed(b.model, b.x, b.labels)
    part = problem.take(torch.tensor([4, 2]))
    outcome = run(part, Descent(OfRadius(0.25)), 3, drop=False)
    assert outcome.queries.tolist() == [5, 5]  # the clean look, three steps, the last
    assert problem.tally.forwards.tolist() == [1, 1, 5, 1, 5, 1]
    assert problem.tally.backwards.tolist() == [0, 0, 3, 0, 3, 0]
    assert torch.equal(outcome.reached, as_goal(b.labels[[4, 2]]).reached(answers(b.model, outcome.x_adv)))


def test_trees_are_cut_and_joined_by_row() -> None:
    tree = (torch.arange(6).reshape(3, 2), 7, None, Untargeted(torch.tensor([1, 2, 3])), Walk(torch.zeros(3), torch.ones(3, 2), 4))
    parts = [take(tree, slice(0, 2)), take(tree, slice(2, 3))]
    whole = concatenate(parts)
    assert torch.equal(whole[0], tree[0])
    assert whole[1:3] == (7, None)
    assert torch.equal(whole[3].labels, tree[3].labels)
    assert whole[4].at == 4
    assert torch.equal(take(tree, torch.tensor([2, 0]))[3].labels, torch.tensor([3, 1]))


def test_an_attack_is_a_value() -> None:
    assert repr(pgd(steps=3)) == repr(pgd(steps=3))
    assert repr(pgd(steps=3)) != repr(pgd(steps=4))
    for entry in entries().values():
        shown = repr(entry.recipe())
        assert " at 0x" not in shown
        assert entry.name.split("_")[0] in shown
    assert Key.of(Key.of(3)) == Key.of(3)


@pytest.mark.parametrize("threat", [Linf(), L2(), L1()], ids=lambda threat: threat.name)
def test_bounds_are_not_worked_out_again_for_fewer_samples(threat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    b = bench()
    problem = posed(b.model, b.x, b.labels, threat=threat, radius=0.3)
    bounded, rows = problem.threat, torch.arange(1, len(b.x), 2)
    bounded.project(problem.x, problem.x + 1, problem.radius)
    with monkeypatch.context() as patched:
        patched.setattr(Room, "_interval", None)
        part = problem.narrowed(rows)
        seen = bounded.project(part.x, part.x + 1, part.radius)
    assert torch.equal(seen, threat.within((0.0, 1.0)).project(b.x[rows], b.x[rows] + 1, part.radius))
