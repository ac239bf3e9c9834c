"""APGD under L1 from larger balls: the schedule, where it ends, what it costs, what it finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import epsball as eb
from epsball.attacks import apgd, from_larger
from epsball.core import Victim
from epsball.errors import BadInput
from epsball.models.digits import load
from epsball.objectives import margin
from epsball.threats import named


class Seen(nn.Module):
    """Two classes: class 1 wins where the sum of the features exceeds `far`. Notes the L1 sizes of what it is asked."""

    def __init__(self, far: float) -> None:
        super().__init__()
        self.far = far
        self.sizes: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes += (x - 0.5).abs().flatten(1).sum(1).tolist()
        score = (x - 0.5).flatten(1).sum(1) - self.far
        return torch.stack([torch.zeros_like(score), score], 1)


def center(n: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs of 16 features in the middle of the box: at most 0.5 each way."""
    return torch.full((n, 16), 0.5, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)


def searched(far: float, steps: int, scales: tuple[float, ...] = (3.0, 2.0, 1.0)) -> tuple[Seen, eb.core.Outcome]:
    """A search with radius 1."""
    model, (x, y) = Seen(far), center()
    outcome = from_larger(steps, objective=margin, scales=scales)(model, x, y, 1.0)
    return model, outcome


def test_balls_take_30_30_and_40_percent_of_the_looks() -> None:
    model, outcome = searched(1 + 1e-6, 100)  # whatever exceeds 1 fools it, and nothing inside does
    looks = torch.tensor(model.sizes[1:], dtype=torch.float64)  # after the clean one
    assert len(looks) == 101
    assert not bool(outcome.reached.any())
    assert 2 < float(looks[:30].max()) <= 3 + 1e-6
    assert 1 < float(looks[30:60].max()) <= 2 + 1e-6
    assert float(looks[60:].max()) <= 1 + 1e-6


def test_four_balls() -> None:
    model, _ = searched(1 + 1e-6, 40, (8.0, 4.0, 2.0, 1.0))
    looks = torch.tensor(model.sizes[1:], dtype=torch.float64)
    for scale, part in ((8, looks[:8]), (4, looks[8:16]), (2, looks[16:24]), (1, looks[24:])):
        assert scale / 2 < float(part.max()) <= scale + 1e-6


@pytest.mark.parametrize(("far", "rows"), [(3.5, 30), (2.5, 60), (1.5, 101)])
def test_it_is_over_where_a_larger_ball_holds_nothing(far: float, rows: int) -> None:
    _, outcome = searched(far, 100)
    assert not bool(outcome.reached)
    assert int(outcome.queries) == rows + 1
    assert int(outcome.backwards) == min(rows, 100)
    assert float(outcome.size) <= 1


def test_a_success_inside_the_budget_ends_the_search_in_any_ball() -> None:
    _, outcome = searched(-1.0 + 1e-9, 100)  # wrong from the start: not searched
    assert int(outcome.backwards) == 0
    _, outcome = searched(0.9, 100)
    assert bool(outcome.reached)
    assert 0.9 <= float(outcome.size) <= 1
    assert 60 < int(outcome.backwards) < 100


@pytest.mark.parametrize("steps", range(8))
def test_it_ends_inside_the_budget_after_any_number_of_steps(steps: int) -> None:
    model, outcome = searched(0.2, steps)
    assert float(outcome.size) <= 1
    assert model.sizes[-1] <= 1 + 1e-6 or steps == 0 or bool(outcome.reached)
    assert int(outcome.backwards) <= steps


def test_it_finds_sparse_changes_that_searches_inside_the_budget_miss() -> None:
    model, data = load("digits-robust"), eb.load_data("digits", split="test")
    x, y = data.x[:100], data.y[:100]
    larger = from_larger(40, objective=margin, scales=(8.0, 4.0, 2.0, 1.0))(model, x, y, 1.0)
    plain = apgd(40, threat=named("l1"), objective=margin)(model, x, y, 1.0)
    assert int(larger.reached.sum()) >= int(plain.reached.sum()) + 4
    assert int(larger.backwards.sum()) <= int(plain.backwards.sum())


def test_batches_change_nothing() -> None:
    model, data = load("digits-robust"), eb.load_data("digits", split="test")
    attack = from_larger(12, restarts=2, objective=margin)
    whole = attack(model, data.x[:9], data.y[:9], 1.0)
    parts = [attack(Victim(model), data.x[row : row + 1], data.y[row : row + 1], 1.0) for row in range(9)]
    assert torch.equal(whole.reached, torch.cat([part.reached for part in parts]))
    assert torch.equal(whole.queries, torch.cat([part.queries for part in parts]))


def test_bad_input_is_one_line() -> None:
    with pytest.raises(BadInput, match="threat 'l2': "):
        from_larger(threat=named("l2"))
    for scales in ((), (2.0,), (1.0, 2.0), (2.0, 2.0, 1.0), (3.0, 0.5)):
        with pytest.raises(BadInput, match="scales: "):
            from_larger(scales=scales)
