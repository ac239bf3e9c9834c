"""Mean answers of random models and mean gradients of neighborhoods: exact ledgers, closed forms, the plain reading without chance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from epsball.attacks import pgd
from epsball.core import Fading, Near, Tally, Untargeted, Victim, autograd
from epsball.core.attack import pose
from epsball.core.problem import Problem
from epsball.core.random import Key
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L2, Linf


class Shaking(nn.Module):
    """w x with a fresh factor 1 + N(0, 1) / 2 for the whole batch at every call; counts its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, -1.0], [0.5, 2.0], [0.0, 0.25]]))
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return (1 + 0.5 * torch.randn(())) * x @ self.weight.T


def problem(victim: Victim, x: Tensor, radius: float = 0.1, threat: object = None) -> Problem:
    attack = replace(pgd(1, threat=threat or Linf(), objective=margin))  # type: ignore[arg-type, type-var]
    return pose(attack, victim, x, Untargeted(torch.zeros(len(x), dtype=torch.long)), radius, Key.of(0), None)


def test_a_mean_of_many_draws_comes_near_the_expectation() -> None:
    model, x = Shaking(), torch.rand(5, 2)
    victim = Victim(model).averaged(4000)
    assert torch.allclose(victim.outputs(x, Tally.zeros(5)), x @ model.weight.detach().T, rtol=0.05)


def test_every_draw_is_counted_forward_and_backward() -> None:
    model = Shaking()
    outcome = pgd(3, threat=Linf(), objective=margin)(
        Victim(model).averaged(7), torch.rand(4, 2), torch.tensor([0, 1, 2, 0]), 0.01, drop=False
    )
    assert int(outcome.queries.sum()) == model.rows
    assert model.rows % 7 == 0
    assert outcome.backwards.remainder(7).eq(0).all()


def test_averaging_twice_multiplies_the_draws() -> None:
    twin = Victim(Shaking(), batch_size=64).averaged(2).averaged(3)
    assert (twin.draws, twin.batch_size) == (6, 64 // 2 // 3)
    with pytest.raises(BadInput, match="draws: 0"):
        twin.averaged(0)


def test_a_model_that_is_not_random_reads_the_same() -> None:
    net, x = nn.Linear(2, 3), torch.rand(4, 2)
    once, often = Victim(net), Victim(net).averaged(5)
    assert torch.equal(once.outputs(x, Tally.zeros(4)), often.outputs(x, Tally.zeros(4)))


def test_on_a_linear_model_neighbors_have_the_same_gradient() -> None:
    weight = torch.tensor([[1.0, -1.0], [0.5, 2.0], [0.0, 0.25]])  # class 1 is ahead of class 2 wherever x is
    with Victim(lambda x: x @ weight.T) as victim:
        case = problem(victim, torch.rand(4, 2))
        near, plain = Near(8, 0.5)(case, case.x), autograd(case, case.x)
    assert torch.allclose(near.gradient, plain.gradient, atol=1e-6)
    assert torch.equal(near.output, plain.output)


def test_neighbors_smooth_a_wave_away_and_cost_what_is_said() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

    def waving(x: Tensor) -> Tensor:
        return (x + 0.005 * torch.sin(400 * x)) @ weight.T

    x = torch.linspace(0.3, 0.7, 32).reshape(16, 2)
    with Victim(waving) as victim:
        case = problem(victim, x, 0.1, L2())
        before = case.tally.forwards.clone(), case.tally.backwards.clone()
        reading = Near(256, 1.0)(case, x)
        assert (case.tally.forwards - before[0]).eq(257).all()
        assert (case.tally.backwards - before[1]).eq(256).all()
        straight = torch.tensor([-1.0, 1.0]).expand_as(x)
        likeness = torch.cosine_similarity(reading.gradient, straight, dim=1)
        own = torch.cosine_similarity(autograd(case, x).gradient, straight, dim=1)
    assert likeness.min() > 0.9
    assert own.min() < 0.5


def test_neighbors_differ_from_look_to_look_but_not_from_batch_to_batch() -> None:
    def wavy(x: Tensor) -> Tensor:
        return torch.sin(9 * x)

    x = torch.rand(6, 2)
    with Victim(wavy) as victim:
        case = problem(victim, x)
        first = Near(4)(case, x).gradient
        second = Near(4)(case, x).gradient
        part = problem(victim, x).take(torch.tensor([4, 1]))
        alone = Near(4)(part, part.x).gradient
    assert not torch.allclose(first, second)
    assert torch.allclose(alone, first[[4, 1]], atol=1e-6)


def test_a_fading_step_falls_along_half_a_cosine() -> None:
    posed = problem(Victim(Shaking()), torch.rand(2, 2), radius=0.2)
    size, reading = Fading(0.5), autograd(posed, posed.x)
    control, steps = size.start(posed, posed.x, 4), []
    for _ in range(4):
        step, z, gradient, control = size.next(posed, reading, control)
        assert z is reading.z
        assert gradient is reading.gradient
        steps.append(float(step[0]))
    assert steps == pytest.approx([0.1, 0.05 * (1 + 0.5**0.5), 0.05, 0.05 * (1 - 0.5**0.5)])
