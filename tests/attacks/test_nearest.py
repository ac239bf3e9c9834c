"""`nearest`: its parts do what they say, and together they find less than any of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import epsball as eb
from epsball.attacks import bisection, get, nearest, outside_in
from epsball.attacks.inward import Inward, inward
from epsball.core import Targeted, Victim
from epsball.errors import BadInput
from epsball.models.digits import load
from epsball.threats import L2, Room, named
from epsball.threats.flow import Flow


def plane(width: int = 12) -> tuple[nn.Module, Tensor]:
    """A linear model with two classes, and its weight difference."""
    model = nn.Linear(width, 2)
    torch.manual_seed(3)
    with torch.no_grad():
        model.weight.normal_()
        model.bias.zero_()
    return model, (model.weight[1] - model.weight[0]).detach()


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2.0), ("linf", 1.0), ("l1", torch.inf)])
def test_a_walk_from_far_ends_at_the_closed_form(norm: str, dual: float) -> None:
    model, slope = plane()
    x = torch.rand(5, 12, generator=torch.Generator().manual_seed(4))
    y = model(x).argmax(1)
    aim = torch.where(y == 0, 1.0, -1.0)[:, None]
    start = x + aim * slope
    threat = named(norm).within((-torch.inf, torch.inf))
    victim = Victim(model, box=(-torch.inf, torch.inf))
    outcome = inward(threat, start, 400, 0.3, 0.05)(victim, x, y, 1e6)
    optimum = (x @ slope + (model.bias[1] - model.bias[0]).detach()).abs() / torch.linalg.vector_norm(slope, dual)
    assert bool(outcome.reached.all())
    assert float((outcome.size / optimum).max()) < (1.1 if norm == "l1" else 1.01)
    assert float((outcome.size / optimum).min()) > 1 - 1e-4


def test_the_walk_wants_one_start_per_sample() -> None:
    model, _ = plane()
    with pytest.raises(BadInput, match="start: "):
        inward(named("l2"), torch.zeros(3, 12), 5, 0.3, 0.05)(model, torch.full((2, 12), 0.5), torch.tensor([0, 1]), 1.0)
    assert "Tensor" in Inward.__annotations__["start"]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize("network", ["digits-standard", "digits-robust"])
def test_less_than_bisection_and_its_own_parts(norm: str, network: str) -> None:
    model, data = load(network), eb.load_data("digits", n=20, seed=1)
    right = model(data.x).argmax(1) == data.y
    x, y = data.x[right], data.y[right]
    found = eb.smallest(norm, steps=200)(model, x, y)
    parts = [
        bisection(norm, steps=10, rounds=6)(model, x, y),
        get("sigma_zero" if norm == "l0" else "fmn", threat=norm)(model, x, y, torch.inf),
    ]
    assert bool(found.reached.all())
    assert bool((model(found.x_adv).argmax(1) != y).all())
    for part in parts:
        size = torch.where(part.reached, part.size, torch.inf)
        assert float(found.size.mean()) <= 1.01 * float(size.mean())


def test_books() -> None:
    model, data = load("digits-standard"), eb.load_data("digits", n=8, seed=1)
    counted = {"forward": 0}

    def asked(x: Tensor) -> Tensor:
        counted["forward"] += len(x)
        return model(x)

    outcome = eb.smallest("l2", steps=100)(asked, data.x, data.y)
    assert int(outcome.queries.sum()) == counted["forward"]
    assert int(outcome.backwards.max()) <= 150


def test_targets_masks_and_two_classes() -> None:
    model, data = load("digits-standard"), eb.load_data("digits", n=12, seed=2)
    target = (data.y + 1) % 10
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:7] = 1
    outcome = nearest(100, L2(room=Room(mask=mask)))(model, data.x, Targeted(target), None)
    assert bool(outcome.reached.any())
    assert bool((model(outcome.x_adv).argmax(1) == target)[outcome.reached].all())
    assert float((outcome.x_adv - data.x).mul(1 - mask).abs().max()) == 0.0
    linear, _ = plane()
    x = torch.rand(6, 12)
    assert bool(nearest(60)(linear, x, linear(x).argmax(1), None).reached.any())


def test_one_line_errors() -> None:
    with pytest.raises(BadInput, match="steps: -"):
        nearest(-50)
    with pytest.raises(BadInput, match="has no smallest search"):
        nearest(100, Flow())  # type: ignore[arg-type]


@pytest.mark.parametrize(("norm", "radius"), [("l2", 0.6), ("l1", 1.0)])
def test_where_a_walk_from_outside_begins_does_not_hang_on_dropping(norm: str, radius: float) -> None:
    data, attack = eb.load_data("digits", n=60), outside_in(20, named(norm), far=3, rounds=2)
    kept, dropped = (attack(load("digits-robust"), data.x, data.y, radius, drop=drop) for drop in (False, True))
    assert 0 < int(dropped.reached.sum()) < 60
    assert torch.equal(kept.reached, dropped.reached)
