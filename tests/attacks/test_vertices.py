"""Conditional gradients under L1: the vertex, the balls, where a search ends, what it finds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import epsball as eb
from epsball.attacks import apgd
from epsball.attacks.combine import Restarts
from epsball.attacks.vertices import Vertices, vertex, vertices
from epsball.core import Attack, Key, Problem, Tally, Untargeted, Victim
from epsball.errors import BadInput
from epsball.models.digits import load
from epsball.objectives import margin
from epsball.threats import L1, L2, Room


class Seen(nn.Module):
    """Two classes: class 1 wins where <weights, x - 0.5> exceeds `far`. Notes the L1 sizes of what it is asked."""

    def __init__(self, far: float, weights: Tensor | None = None) -> None:
        super().__init__()
        self.far, self.weights = far, torch.ones(16, dtype=torch.float64) if weights is None else weights
        self.sizes: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes += (x - 0.5).abs().flatten(1).sum(1).tolist()
        score = (x - 0.5) @ self.weights.to(x) - self.far
        return torch.stack([torch.zeros_like(score), score], 1)


def center(n: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs of 16 features in the middle of the box: at most 0.5 each way."""
    return torch.full((n, 16), 0.5, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)


def problem(threat: L1, radius: float) -> Problem:
    """One sample in the middle."""
    x, y = center()
    victim, size = Victim(Seen(1.0)), torch.tensor([radius], dtype=torch.float64)
    clean = victim.outputs(x, Tally.zeros(1))
    return Problem(victim, x, Untargeted(y), threat, margin, size, torch.zeros(1, dtype=torch.int64), clean, Key.of(0), Tally.zeros(1))


def slopes() -> Tensor:
    """Feature 5 is steepest, downward; then 2 and 9."""
    slope = torch.full((1, 16), 0.01, dtype=torch.float64)
    slope[0, 5], slope[0, 2], slope[0, 9] = -3.0, 2.0, 1.0
    return slope


@pytest.mark.parametrize(
    ("box", "radius", "moves"),
    [
        ((0.0, 1.0), 0.3, {5: -0.3}),
        ((0.0, 1.0), 1.2, {5: -0.5, 2: 0.5, 9: 0.2}),
        ((0.25, 1.0), 1.0, {5: -0.25, 2: 0.5, 9: 0.25}),
        ((-torch.inf, torch.inf), 1.2, {5: -1.2}),
    ],
)
def test_the_vertex_spends_the_radius_on_the_steepest_features(box: tuple[float, float], radius: float, moves: dict[int, float]) -> None:
    asked = problem(L1(Room(box=box)), radius)
    change = vertex(asked, slopes(), asked.radius) - asked.x
    expected = torch.zeros_like(change)
    for place, value in moves.items():
        expected[0, place] = value
    assert torch.allclose(change, expected, atol=1e-12)


def test_it_begins_where_it_is_told_to_within_the_first_ball() -> None:
    x, y = center(3)
    model, start = Seen(100.0), x.clone()
    start[0, 3], start[1, 2], start[2, :4] = 0.75, 0.5, 0.0  # changes of 0.25, none, and 2
    search = Attack("vertices", L1(), margin, Vertices((1.0, 1.0), (0.3, 0.3), 0.02, start=start), 1)
    search(model, x, y, 1.0)
    assert model.sizes[3:6] == pytest.approx([0.25, 0.0, 1.0], abs=1e-6)
    with pytest.raises(BadInput, match="give one point per input"):
        search(model, x[:2], y[:2], 1.0)


def test_of_equal_slopes_the_batch_does_not_decide() -> None:
    """Beside a sample that needs most features, and alone."""
    x, slope = torch.full((2, 1000), 0.5, dtype=torch.float64), torch.ones(2, 1000, dtype=torch.float64)
    slope[:, ::7] = 2.0
    size, victim = torch.tensor([20.0, 400.0], dtype=torch.float64), Victim(Seen(1.0, torch.ones(1000)))
    labels = torch.zeros(2, dtype=torch.int64)
    clean = victim.outputs(x, Tally.zeros(2))
    both = Problem(victim, x, Untargeted(labels), L1(Room(box=(0.0, 1.0))), margin, size, torch.arange(2), clean, Key.of(0), Tally.zeros(2))
    one = both.take(torch.tensor([0]))
    assert torch.equal(vertex(both, slope, size)[:1], vertex(one, slope[:1], size[:1]))


@pytest.mark.parametrize(("radius", "narrow"), [(0.5, 0), (20.0, 0), (20.0, 900), (400.0, 0), (5000.0, 0)])
def test_of_many_features_the_vertex_is_the_same(radius: float, narrow: int) -> None:
    """Spent one by one, by falling slope; the `narrow` steepest have next to no room, so that more are needed than seemed likely."""
    generator = torch.Generator().manual_seed(0)
    x, slope = torch.rand(2, 1000, generator=generator).double(), torch.randn(2, 1000, generator=generator).double()
    order = slope.abs().argsort(1, descending=True)
    budget = torch.ones_like(x).scatter(1, order[:, :narrow], 1e-3)
    victim, size = Victim(Seen(1.0, torch.ones(1000))), torch.tensor([radius, radius / 7], dtype=torch.float64)
    asked = Problem(
        victim,
        x,
        Untargeted(torch.zeros(2, dtype=torch.int64)),
        L1(Room(box=(0.0, 1.0), budget=budget)),
        margin,
        size,
        torch.arange(2),
        victim.outputs(x, Tally.zeros(2)),
        Key.of(0),
        Tally.zeros(2),
    )
    change = vertex(asked, slope, size) - x
    for row in range(2):
        left = float(size[row])
        for place in order[row].tolist():
            up = float(slope[row, place]) > 0
            room = min(1 - float(x[row, place]) if up else float(x[row, place]), float(budget[row, place]))
            moved = min(room, left)
            assert float(change[row, place]) == pytest.approx(moved if up else -moved, abs=1e-9)
            left -= moved


@pytest.mark.parametrize(
    ("options", "words"),
    [({"threat": L2()}, "threat 'l2'"), ({"first": (0.9, 3.0)}, "first: .0.9"), ({"first": (4.0, 3.0)}, "4.0, 3.0")],
)
def test_what_does_not_fit_is_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        vertices(5, **options)


def test_no_slope_is_no_move() -> None:
    asked = problem(L1(Room(box=(0.0, 1.0))), 1.0)
    assert torch.equal(vertex(asked, torch.zeros_like(asked.x), asked.radius), asked.x)


def searched(far: float, steps: int, first: float = 4.0) -> tuple[Seen, eb.core.Outcome]:
    """A search with radius 1."""
    model, (x, y) = Seen(far), center()
    return model, vertices(steps, L1(), first=(first, first))(model, x, y, 1.0)


def test_balls_shrink_geometrically_over_half_of_the_looks() -> None:
    model, outcome = searched(1 + 1e-6, 100)  # whatever exceeds 1 fools it, and nothing inside does
    looks = torch.tensor(model.sizes[1:], dtype=torch.float64)  # after the clean one
    assert not bool(outcome.reached)
    assert len(looks) == 66  # in the ball itself its margins no longer change, which 16 looks show
    most = torch.tensor([4 ** (1 - look / 50) for look in range(50)], dtype=torch.float64)
    assert bool((looks[:50] <= most + 1e-6).all())
    assert bool((looks[5:50] > 0.7 * most[5:]).all())
    assert float(looks[50:].max()) <= 1 + 1e-6


@pytest.mark.parametrize(("far", "rows"), [(4.5, 15), (3.0, 30), (2.2, 42), (1.4, 50)])
def test_it_is_over_at_the_check_after_which_larger_balls_held_nothing(far: float, rows: int) -> None:
    """The balls of looks 0, 15, 30 and 42, with which the four stretches begin, are 4, 2.64, 1.74 and 1.25 budgets."""
    _, outcome = searched(far, 100)
    assert not bool(outcome.reached)
    assert int(outcome.queries) == rows + 1
    assert int(outcome.backwards) == rows
    assert float(outcome.size) <= 1


class Swinging(nn.Module):
    """Class 1 is behind by `behind`, and by `swing` less at every other look; its slope leads nowhere new."""

    def __init__(self, behind: float, swing: float) -> None:
        super().__init__()
        self.behind, self.swing, self.looks = behind, swing, 0

    def forward(self, x: Tensor) -> Tensor:
        self.looks += 1
        score = 1e-9 * x.sum(1) - self.behind + self.swing * (self.looks % 2)
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.mark.parametrize(("behind", "rows"), [(3.1, 4), (2.9, 20)])
def test_inside_the_budget_it_is_over_where_margins_swing_too_little_to_reach_the_goal(behind: float, rows: int) -> None:
    """The best margin is 1 - behind; four looks swing by 1, so that it goes on where twice that would do."""
    x, y = center()
    outcome = Attack("vertices", L1(), margin, Vertices((1.0, 1.0), noise=False), 20)(Swinging(behind, 1.0), x, y, 1.0)
    assert int(outcome.backwards) == rows
    assert not bool(outcome.reached)


def test_every_run_draws_its_own_first_ball_and_larger_ones_take_shorter_steps() -> None:
    asked, n = problem(L1(), 1.0), 2000
    many = replace(asked, x=asked.x.expand(n, -1), radius=asked.radius.expand(n), ids=torch.arange(n))
    tour = Vertices((2.0, 32.0), share=(0.5, 0.9)).init(many, 20)
    place = tour.first.log2().sub(1) / 4  # uniform in [0, 1): quantiles within 4 deviations
    assert bool(((place >= 0) & (place < 1)).all())
    for quantile in (0.1, 0.5, 0.9):
        assert abs(float((place < quantile).double().mean()) - quantile) < 4 * (quantile * (1 - quantile) / n) ** 0.5
    assert torch.allclose(tour.share, 0.9 - 0.4 * place)
    sure = Vertices((2.0, 32.0), share=(0.5, 0.9), noise=False).init(asked, 20)
    assert (float(sure.first), float(sure.share)) == (32.0, 0.5)


def test_it_solves_a_linear_problem() -> None:
    weights = torch.linspace(0.1, 1.0, 16, dtype=torch.float64)
    best = 0.5 * float(weights[-1] + weights[-2])  # radius 1: two features to their ends
    x, y = center()
    near = Attack("vertices", L1(), margin, Vertices((1.0, 1.0), noise=False), 20)(Seen(0.99 * best, weights), x, y, 1.0)
    beyond = Attack("vertices", L1(), margin, Vertices((1.0, 1.0), noise=False), 20)(Seen(1.001 * best, weights), x, y, 1.0)
    assert bool(near.reached)
    assert not bool(beyond.reached)
    assert float(near.size) <= 1


@pytest.mark.parametrize("steps", range(8))
def test_it_ends_inside_the_budget_after_any_number_of_steps(steps: int) -> None:
    _, outcome = searched(0.2, steps)
    assert float(outcome.size) <= 1
    assert int(outcome.backwards) <= steps


def test_it_finds_more_than_searches_inside_the_budget_for_fewer_rows() -> None:
    model, data = load("digits-robust"), eb.load_data("digits", split="test")
    x, y = data.x[:100], data.y[:100]
    larger = vertices(20, L1())(model, x, y, 1.0)
    plain = apgd(20, threat=L1(), objective=margin)(model, x, y, 1.0)
    assert int(larger.reached.sum()) >= int(plain.reached.sum()) + 4
    assert int(larger.backwards.sum()) <= int(plain.backwards.sum())


def test_batches_change_nothing() -> None:
    model, data = load("digits-robust"), eb.load_data("digits", split="test")
    attack = Restarts(vertices(12, L1()), 2, abreast=True)
    whole = attack(model, data.x[:9], data.y[:9], 1.0)
    parts = [attack(Victim(model), data.x[row : row + 1], data.y[row : row + 1], 1.0) for row in range(9)]
    assert torch.equal(whole.reached, torch.cat([part.reached for part in parts]))
    assert torch.equal(whole.queries, torch.cat([part.queries for part in parts]))
