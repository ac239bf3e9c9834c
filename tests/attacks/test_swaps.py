"""Local search under L1: what a try changes, what it costs, where it begins and ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epsball.attacks import get, swaps
from epsball.attacks.swaps import Swaps
from epsball.core import Attack, Outcome
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L1, L2, Room

N, FEATURES = 20, 12


class Linear(nn.Module):
    """Two classes: class 1 wins where <weights, x> exceeds `far`. Notes what it is asked."""

    def __init__(self, weights: Tensor, far: float) -> None:
        super().__init__()
        self.weights, self.far = weights, far
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach())
        score = x @ self.weights - self.far
        return torch.stack([torch.zeros_like(score), score], 1)


def inputs() -> tuple[Tensor, Tensor]:
    """Inputs (N, FEATURES) anywhere in the box, and weights (FEATURES,) of both signs."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(N, FEATURES, generator=generator), torch.randn(FEATURES, generator=generator)


def searched(model: Linear, x: Tensor, radius: float, threat: L1 | None = None, steps: int = 1, **options: Any) -> Outcome:
    """By `Swaps`."""
    strategy = Swaps(**{"tries": 3, "shares": (0.3, 1.0), **options})
    return Attack("swaps", threat or L1(), margin, strategy, steps)(model, x, torch.zeros(len(x), dtype=torch.int64), radius)


def best(x: Tensor, weights: Tensor, radius: float) -> Tensor:
    """(N,): the largest <weights, change> within box and ball, feature after feature by steepness."""
    room, order = torch.where(weights > 0, 1 - x, x), weights.abs().argsort(descending=True)
    left, gain = torch.full((len(x),), radius), torch.zeros(len(x))
    for place in order.tolist():
        spent = torch.minimum(room[:, place], left)
        left, gain = left - spent, gain + spent * weights[place].abs()
    return gain


def test_of_a_linear_model_the_first_look_gains_all_there_is() -> None:
    x, weights = inputs()
    found = searched(Linear(weights, 100.0), x, 1.5, spread=0.0)
    gain = (found.x_adv - x) @ weights
    assert torch.allclose(gain, best(x, weights, 1.5), rtol=1e-4)


def test_what_is_badly_spent_is_spent_anew() -> None:
    """From the whole budget on the worst features: a share at a time goes to the best."""
    x, weights = inputs()
    worst = x - (searched(Linear(-weights, 100.0), x, 1.5, spread=0.0).x_adv - x).abs() * weights.sign()
    start = L1(Room(box=(0.0, 1.0))).project(x, worst, torch.full((N,), 1.5, dtype=torch.float64))
    few, many = (
        ((searched(Linear(weights, 100.0), x, 1.5, steps=steps, shares=(0.3,), start=start).x_adv - x) @ weights) for steps in (1, 30)
    )
    assert bool((few < 0.9 * best(x, weights, 1.5)).all())
    assert bool((many > 0.97 * best(x, weights, 1.5)).all())


@pytest.mark.parametrize("box", [(0.0, 1.0), (-torch.inf, torch.inf)])
def test_every_try_is_legal_and_masked_features_stay(box: tuple[float, float]) -> None:
    x, weights = inputs()
    x = x[:1]  # so that it is known whose a row is
    mask = torch.ones(FEATURES)
    mask[::3] = 0
    model = Linear(weights, 100.0)
    searched(model, x, 0.7, L1(Room(box=box, mask=mask)), steps=6)
    changes = torch.cat(model.asked) - x[0]
    assert float(changes.double().abs().sum(1).max()) <= 0.7
    assert float(changes.double().abs().sum(1).max()) > 0.69
    assert not bool(changes[..., ::3].any())
    assert not bool(torch.isnan(changes).any())


def test_tries_differ_from_each_other_and_from_sample_to_sample() -> None:
    x, weights = inputs()
    model = Linear(weights, 100.0)
    searched(model, x, 0.7, steps=1, tries=5, spread=1.0)
    tries = next(asked for asked in model.asked if len(asked) == 5 * N).reshape(N, 5, FEATURES) - x[:, None]
    assert len({tuple(change) for change in tries.flatten(0, 1).round(decimals=4).tolist()}) > 3 * N


def test_it_costs_a_gradient_and_its_tries_per_look_and_ends_where_nothing_is_better() -> None:
    """On a linear model the optimum is met at once: three more looks find nothing better."""
    x, weights = inputs()
    found = searched(Linear(weights, 100.0), x, 1.5, spread=0.0, steps=50, tries=3)
    assert found.backwards.tolist() == [4] * N
    assert found.queries.tolist() == [1 + 4 * (1 + 3)] * N


def test_a_try_that_reaches_the_goal_ends_the_search() -> None:
    x, weights = inputs()
    model = Linear(weights, 100.0)
    far = float((x @ weights).max()) + 0.05
    model.far = far
    near = x[(far - x @ weights) < 0.9 * best(x, weights, 1.5)]
    found = searched(model, near, 1.5, steps=50, spread=0.0)
    assert bool(found.reached.all())
    assert found.backwards.tolist() == [1] * len(near)
    assert bool(((found.x_adv - near).abs().double().sum(1) <= 1.5).all())


def test_answers_that_are_no_numbers_are_never_taken_for_better() -> None:
    class Holes(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(x[:, :1] > 0.9, torch.nan)

    x, weights = inputs()
    x[:, 0], weights[0] = 0.5, 0.5
    model = Holes(weights, 100.0)
    found = searched(model, x, 1.5, steps=30, tries=6, spread=2.0)
    met = torch.cat(model.asked[1:])[:, 0] > 0.9
    assert int(met.sum()) > N
    assert bool(torch.isfinite(found.score).all())
    assert bool((found.x_adv[:, 0] <= 0.9).all())
    assert bool(((found.x_adv - x) @ weights > 0.5 * best(x, weights, 1.5)).all())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threat": L2()}, "threat 'l2'"),
        ({"tries": 0}, "tries: 0"),
        ({"shares": ()}, "shares: "),
        ({"shares": (0.5, 0.0)}, "shares: .0.5, 0.0"),
    ],
)
def test_what_does_not_fit_is_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        swaps(5, **options)


def test_a_start_of_another_shape_is_one_line() -> None:
    x, weights = inputs()
    with pytest.raises(BadInput, match="give one point per input"):
        searched(Linear(weights, 100.0), x, 1.0, start=x[:3])


def test_it_is_known_by_name() -> None:
    assert get("swaps", threat="l1", steps=3, tries=2).name == "swaps"
