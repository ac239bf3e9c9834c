"""Past a decision inside a model: on a router with a closed form."""

from __future__ import annotations

import pytest
import torch
from lawkit import rng, tensor
from torch import Tensor, nn

from epsball.attacks import across, apgd, vertices
from epsball.attacks.across import Across
from epsball.core import AttackLike, Tally, Victim
from epsball.core.forks import forks
from epsball.objectives import margin
from epsball.threats import L1, L2, Linf

BOX = (-9.0, 9.0)


class Gate(nn.Module):
    """Which of two rows of scores answers is decided by the sign of <w, x>; inside them x moves next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", tensor(rng(1).normal(size=10)))

    def forward(self, x: Tensor) -> Tensor:
        side = (x @ self.w > 0).long()
        return torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])[side] + 1e-3 * x[:, :3]


@pytest.mark.parametrize("threat", [Linf(), L2(), L1()], ids=["linf", "l2", "l1"])
def test_a_gate_is_crossed_wherever_the_budget_reaches(threat: Linf | L2 | L1) -> None:
    """|<w, x>| <= radius ||w||_q: no more and no less; what climbs the scores alone crosses it only by chance."""
    model, x = Gate(), tensor(rng(2).normal(size=(60, 10)))
    order = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}[threat.name]
    radius = {"linf": 0.3, "l2": 1.0, "l1": 1.5}[threat.name]
    share = (x @ model.w).abs() / (radius * torch.linalg.vector_norm(model.w, order))
    y = (x @ model.w > 0).long()
    with Victim(model, box=BOX) as victim:
        (fork,) = forks(model, x[:8])
        turn: AttackLike = vertices(20, threat) if isinstance(threat, L1) else apgd(20, threat=threat, objective=margin)
        across = Across(victim.twin(fork), turn, 1, 10)
        found = across(victim, x, y, radius, 0)
        plain = apgd(40, threat=threat)(victim, x, y, radius, 0)
        assert not bool(found.reached[share > 1].any())
        assert bool(found.reached[share < 0.98].all())
        assert int(plain.reached.sum()) < int(found.reached.sum()) / 2
        answers = victim.outputs(found.x_adv, Tally.zeros(60)).argmax(1)
    assert torch.equal(answers != y, found.reached)
    assert bool((threat.size(x, found.x_adv) <= radius).all())


class Door(nn.Module):
    """Where the second feature is the larger one, the margin falls with the first: who raises that alone turns the decision back."""

    def forward(self, x: Tensor) -> Tensor:
        ways = torch.stack([1 + 1e-3 * x[:, 2], 0.45 - x[:, 0]], 1)
        lead = ways[torch.arange(len(x)), (x[:, 1] > x[:, 0]).long()]
        return torch.stack([lead, torch.zeros_like(lead)], 1)


@pytest.mark.parametrize("hold", [True, False])
def test_a_way_is_held_while_the_models_scores_are_climbed(hold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.45 < x0 < x1 <= 0.5 breaks: both have to rise, and the model's own scores say so of the first alone."""
    if not hold:
        monkeypatch.setattr(across, "HOLD", 0.0)
    model, x = Door(), torch.tensor([[0.30, 0.20, 0.5]]).repeat(4, 1) + torch.tensor([0.0, 0.0, 0.1]) * torch.arange(4)[:, None]
    with Victim(model) as victim:
        (fork,) = forks(model, x)
        found = Across(victim.twin(fork), apgd(20, threat=Linf(), objective=margin), 1, 40)(victim, x, torch.zeros(4).long(), 0.3, 0)
    assert bool(found.reached.all()) is hold


def test_what_it_costs_is_booked() -> None:
    model, x = Gate(), tensor(rng(2).normal(size=(20, 10)))
    asked = 0

    def count(_module: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> None:
        nonlocal asked
        asked += len(inputs[0])

    y = (x @ model.w > 0).long()
    with Victim(model, box=BOX) as victim:
        (fork,) = forks(model, x[:8])
        model.register_forward_hook(count)
        found = Across(victim.twin(fork), apgd(5, threat=Linf(), objective=margin), 1, 4)(victim, x, y, 0.3, 0)
    assert int(found.queries.sum()) == asked


def test_who_is_wrong_already_costs_nothing() -> None:
    model, x = Gate(), tensor(rng(2).normal(size=(20, 10)))
    with Victim(model, box=BOX) as victim:
        (fork,) = forks(model, x[:8])
        found = Across(victim.twin(fork), apgd(5, threat=Linf(), objective=margin), 1, 4)(victim, x, (x @ model.w <= 0).long(), 0.3, 0)
    assert bool(found.reached.all())
    assert found.queries.tolist() == [1] * 20
