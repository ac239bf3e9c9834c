"""Slopes along every feature: the gradient where there is one, and what answers tell where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import epsball as eb
from epsball.attacks.differences import Coordinates
from epsball.core import Victim, autograd
from epsball.core.attack import pose
from epsball.core.goal import as_goal
from epsball.core.random import Key
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.objectives import margin


def network(features: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, 4)).double().requires_grad_(False)


def drawn(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(9,), (2, 3, 25)])
def test_on_smooth_models_the_slope_is_the_gradient_at_the_edge_of_the_box_too(shape: tuple[int, ...]) -> None:
    x = drawn(5, *shape)
    x[0], x[1] = 0.0, 1.0
    model = network(x[0].numel())
    attack = eb.get("differences", threat="linf", share=1e-4)
    problem = pose(attack, Victim(model), x, as_goal(model(x).argmax(1)), 0.1, Key.of(0), None)
    before = problem.tally.forwards.clone()
    ours, known = Coordinates(1e-4)(problem, x), autograd(problem, x)
    edge = (x == 0) | (x == 1)
    assert torch.allclose(ours.gradient[~edge], known.gradient[~edge], atol=1e-8)
    assert torch.allclose(ours.gradient, known.gradient, atol=1e-5)
    assert torch.allclose(ours.output, model(x))
    assert (problem.tally.forwards - before).tolist() == [2 * x[0].numel() + 2] * 5  # one of them is autograd's


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_it_breaks_what_gradients_break_and_asks_for_none(norm: str) -> None:
    model, x = network(12), drawn(40, 12)
    labels = model(x).argmax(1)
    radius = {"linf": 0.35, "l2": 1.2, "l1": 2.5}[norm]
    ours = eb.get("differences", threat=norm, steps=30, share=1e-3)(Victim(model, access=Access.SCORES), x, labels, radius)
    search = eb.get("vertices" if norm == "l1" else "apgd", threat=norm, steps=30, objective=margin)
    known = replace(search, name="differences")(Victim(model), x, labels, radius)  # from the same starts
    assert 5 < int(known.reached.sum()) < 35
    assert int((ours.reached != known.reached).sum()) <= 1
    assert int(ours.backwards.sum()) == 0
    assert int(ours.queries.max()) <= 30 * 25 + 2
    assert torch.equal(model(ours.x_adv).argmax(1) != labels, ours.reached)


def test_answers_that_are_no_numbers_have_no_slope() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.stack([x.sum(1), 0 * x.sum(1)], 1).masked_fill((x[:, :1] > 0.5), torch.nan)

    x = torch.full((2, 3), 0.5)
    attack = eb.get("differences", threat="linf")
    problem = pose(attack, Victim(model, access=Access.SCORES), x, as_goal(torch.zeros(2).long()), 0.1, Key.of(0), None)
    assert torch.allclose(Coordinates(0.5)(problem, x).gradient, torch.tensor([0.0, -1.0, -1.0]).expand(2, 3), atol=1e-5)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(BadInput, match="share"):
        eb.get("differences", share=share)
