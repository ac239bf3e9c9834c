"""What decides inside a model without a gradient is searched by itself: audits of gates with a closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lawkit import rng, tensor
from planted import digits
from torch import Tensor, nn

import epsball as eb
from epsball.attacks.across import Across
from epsball.auditing.cascade import stages_of
from epsball.auditing.react import Sight
from epsball.auditing.run import Plan, prepare
from epsball.auditing.sheet import Sheet, Subject
from epsball.core import Victim
from epsball.threats import parse_threat

N, RADIUS = 80, 0.05


class Gate(nn.Module):
    """Which of three rows of scores answers is decided by the largest of three linear ones; inside them x moves next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", tensor(rng(1).normal(size=(12, 3))))

    def scores(self, x: Tensor) -> Tensor:
        return (x - 0.5) @ self.w

    def forward(self, x: Tensor) -> Tensor:
        out, group = 1e-3 * x[:, :3], self.scores(x).argmax(1)
        for number in range(3):
            rows = (group == number).nonzero().squeeze(1)
            out[rows, number] += 1.0
        return out


def exact(gate: Gate, x: Tensor) -> int:
    """How many no change of at most RADIUS a feature takes to another row."""
    scores, own = gate.scores(x), gate.scores(x).argmax(1)
    lead = scores.gather(1, own[:, None]) - scores
    reach = RADIUS * (gate.w[:, own].T[:, :, None] - gate.w).abs().sum(1)
    return int(((lead > reach) | torch.nn.functional.one_hot(own, 3).bool()).all(1).sum())


def prepared(model: nn.Module | str, threat: str = "linf:0.05") -> Sheet:
    if isinstance(model, str):
        data = digits(64)
        subject = Subject(eb.load_model(model), data.x, data.y, data.indices, "digits", {})
    else:
        x = tensor(rng(2).uniform(0.1, 0.9, size=(N, 12)))
        subject = Subject(eb.wrap(model), x, model(x).argmax(1), torch.arange(N), "made", {})
    return prepare(subject, Plan((parse_threat(threat),), "fast"))[0]


def test_an_audit_finds_out_that_a_gate_can_be_turned(tmp_path: Path) -> None:
    gate = Gate()
    x = tensor(rng(2).uniform(0.1, 0.9, size=(N, 12)))
    model = eb.audit(gate, (x, gate.scores(x).argmax(1)), f"linf:{RADIUS}", out=tmp_path).models[0]
    (result,) = model.results
    assert result.robust_accuracy.count == exact(gate, x)
    assert 0.2 * N < result.robust_accuracy.count < 0.8 * N
    assert "masked" in {flag.id for flag in result.flags}
    assert "across" in {row.name for row in result.attacks}
    assert ["decision inside" in f.message for f in model.findings if f.id == "hidden-steps"] == [True]


@pytest.mark.parametrize("threat", ["linf:0.05", "l2:0.2", "l1:0.5", "l0:2"])
def test_each_decision_has_a_search_where_distances_are_norms(threat: str) -> None:
    sheet = prepared(Gate(), threat)
    stages = [stage for stage in stages_of(sheet, sheet.rounds[0], "default") if isinstance(stage.attack, Across)]
    assert len(sheet.sight.forks) == 1
    assert len(stages) == (not threat.startswith("l0"))
    assert all(stage.beyond for stage in stages)


def test_an_honest_model_decides_nothing_inside() -> None:
    sheet = prepared("digits-standard")
    assert sheet.sight.forks == ()
    assert not any(isinstance(stage.attack, Across) for stage in stages_of(sheet, sheet.rounds[0], "default"))


def test_a_budget_ends_a_search_of_a_decision(tmp_path: Path) -> None:
    """It ends in the middle of it: no row more than allowed, and fewer broken than without."""
    gate = Gate()
    x = tensor(rng(2).uniform(0.1, 0.9, size=(N, 12)))
    y = gate.scores(x).argmax(1)
    attacks = eb.audit(gate, (x, y), f"linf:{RADIUS}", effort="fast", out=tmp_path / "a").models[0].results[0].attacks
    place = [row.name for row in attacks].index("across")
    most = sum(row.forwards for row in attacks[:place]) + attacks[place].forwards // 2
    model = eb.audit(gate, (x, y), f"linf:{RADIUS}", effort="fast", max_forwards=most, out=tmp_path / "b").models[0]
    (result,) = model.results
    assert result.attacks[-1].name == "across, cut short"
    assert result.forwards <= most
    assert result.robust_accuracy.count > exact(gate, x)


def test_a_budget_watches_every_way_of_looking() -> None:
    victims = [Victim(Gate()) for _ in range(6)]
    sight = Sight(victims[0], bare=victims[1], straight=victims[2], shaken=(victims[3], victims[4]), forks=(victims[5],))
    changed = sight.each(lambda one: one.averaged(2))
    assert [v.draws for v in (changed.victim, changed.bare, changed.straight, *changed.shaken, *changed.forks) if v] == [2] * 6
