"""Compositions: each part within its own budget, the flat variable, and attacks that need know nothing of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lawkit import check_same, filled, linear, posed, rng, rows_of, tensor
from torch import Tensor, nn

from epsball.attacks import apgd, mi_fgsm, noise, pgd, recoloradv, stadv
from epsball.core import Key, Victim, autograd, content_ids
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L0, L1, L2, Linf, Room
from epsball.threats.color import LUV, Color, unevenness
from epsball.threats.compose import Added, Composed, OfPart, compose
from epsball.threats.flow import Flow, Rigid, roughness

COLOR = Color(LUV, (4, 6, 6))
FULL = compose((COLOR, 0.06), (Flow(), 0.5), (Linf(), 8 / 255))
SETS = {
    "functional + additive": compose((COLOR, 0.06), (Linf(), 8 / 255)),
    "functional + flow + additive": FULL,
    "flow + l2": compose((Flow(), 0.5), (L2(), 0.3)),
    "rigid + l0": compose((Rigid(10, 1), 1.0), (L0(), 5.0)),
    "l1 alone": compose((L1(share=0.1), 1.5)),
}


def case(n: int = 9) -> tuple[nn.Module, Tensor, Tensor]:
    x = tensor(rng(3, 5).random((n, 3, 5, 6)))
    model = filled(nn.Sequential(nn.Flatten(), nn.Linear(90, 16), nn.ReLU(), nn.Linear(16, 4)), 2, 2.0).double()
    return model, x, model(x.double()).argmax(1)


@pytest.mark.parametrize("threat", SETS.values(), ids=SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_laws(threat: Composed, dtype: torch.dtype) -> None:
    x = case(5)[1].to(dtype)
    threat, radius = threat.within((0.0, 1.0)), torch.tensor([0.0, 1e-3, 0.4, 1.0, 3.0], dtype=torch.float64)
    none = threat.start(x, radius, None, content_ids(x))
    assert none.ndim == 2
    assert torch.equal(threat.apply(x, none), x)
    assert bool((threat.size(x, none) == 0).all())
    z = tensor(rng(4).standard_normal(none.shape), dtype)
    p = threat.project(x, z, radius)
    assert p.shape == z.shape
    assert bool((threat.size(x, p) <= radius).all())
    assert torch.equal(threat.project(x, p, radius), p)
    assert torch.equal(threat.apply(x, p)[0], x[0])
    moved = threat.apply(x, p)
    assert bool(((moved >= 0) & (moved <= 1)).all())
    for part, budget, piece in zip(threat.parts, threat.budgets, threat.split(x, p), strict=True):
        assert bool((part.size(x, piece) <= radius * budget * (1 + 1e-12)).all())
        assert float(part.size(x, piece)[3]) >= 0.99 * budget  # random points far outside: every budget is used
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(threat.project(x[order], z[order], radius[order]), p[order])
    start = threat.start(x, radius, Key((1,)), content_ids(x))
    assert bool((threat.size(x, start) <= radius).all())
    assert float(threat.size(x, start)[4]) > 0
    assert bool((threat.reach(x) > 0).all())


def test_steepest_has_size_one_and_climbs_every_part() -> None:
    x = case()[1].double()
    g = tensor(rng(4).standard_normal(FULL.start(x, torch.ones(9), None, content_ids(x)).shape), torch.float64)
    d = FULL.steepest(x, g * 0, g)
    assert torch.allclose(FULL.size(x, d), torch.ones(9, dtype=torch.float64))
    for part, slope, piece in zip(FULL.budgets, FULL.split(x, g), FULL.split(x, d), strict=True):
        assert bool(((slope * piece).flatten(1).sum(1) > part).all())


def test_parts_act_in_order() -> None:
    x = case(2)[1]
    bound = FULL.within((0.0, 1.0))
    z = bound.start(x, torch.ones(2, dtype=torch.float64), Key((5,)), content_ids(x))
    color, flow, added = bound.split(x, z)
    by_hand = (Flow().apply(COLOR.within((0.0, 1.0)).apply(x, color), flow) + added).clamp(0, 1)
    assert torch.equal(bound.apply(x, z), by_hand)
    assert torch.equal(torch.cat([t.flatten(1) for t in (color, flow, added)], 1), z)


def test_one_additive_part_is_that_threat() -> None:
    """On a linear model the optimum of Linf at 0.1, through a budget of 0.2 at radius 0.5."""
    x = tensor(0.3 + 0.4 * rng(3).random((8, 1, 3, 3)))
    model = linear(9, 2)
    labels = model(x).argmax(1)
    plain = pgd(20, noise=False, objective=margin)(model, x, labels, 0.1, drop=False)
    inside = pgd(20, noise=False, objective=margin, threat=compose((Linf(), 0.2)))(model, x, labels, 0.5, drop=False)
    assert torch.allclose(plain.x_adv, inside.x_adv, atol=1e-6)
    assert torch.allclose(inside.size, torch.full((8,), 0.5, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("recipe", [pgd, apgd, mi_fgsm, noise])
def test_attacks_work_unchanged(recipe: Any) -> None:
    attack = recipe(8, threat=FULL)
    model, x, labels = case()
    radius = tensor(np.linspace(0, 2, 9), torch.float64)
    outcome = attack(model, x, labels, radius)
    assert bool((outcome.size <= radius).all())
    assert torch.equal(model(outcome.x_adv.double()).argmax(1) != labels, outcome.reached)
    # Powers round by their place in the batch, so a composition with colors repeats to the last bit but one.
    assert torch.allclose(FULL.within((0.0, 1.0)).apply(x, outcome.z), outcome.x_adv, atol=1e-6)
    assert torch.equal(outcome.x_adv[0], x[0])
    for size in (1, 2, 7):
        check_same(outcome, attack(Victim(model, batch_size=size), x, labels, radius))
    order = torch.tensor([5, 3, 3, 0])
    check_same(rows_of(outcome, order), attack(model, x[order], labels[order], radius[order]))


def test_more_threats_break_more() -> None:
    """40 images, 20 steps of APGD on the margin: each part alone, then together. Counts rise with every part."""
    model, x, labels = case(40)
    counts = []
    for parts in (((Linf(), 0.02),), ((COLOR, 0.02), (Linf(), 0.02)), ((COLOR, 0.02), (Flow(), 0.2), (Linf(), 0.02))):
        counts.append(int(apgd(20, threat=compose(*parts), objective=margin)(model, x, labels, 1.0).reached.sum()))
    assert counts[0] < counts[1] < counts[2], counts


def test_penalties_reach_their_part() -> None:
    model, x, labels = case(3)
    score = OfPart(OfPart(margin, 0, unevenness, 0.01), 1, roughness, 0.02)
    problem = posed(model, x, labels, threat=FULL, objective=score, radius=1.0)
    z = FULL.start(x, problem.radius, Key((1,)), problem.ids)
    color, flow, _ = FULL.split(x, z)
    plain = autograd(posed(model, x, labels, threat=FULL, objective=margin, radius=1.0), z)
    expected = plain.score - 0.01 * unevenness(color) - 0.02 * roughness(flow)
    assert torch.allclose(autograd(problem, z).score.double(), expected.double(), atol=1e-5)
    assert "roughness" in repr(score)


def test_single_threats_and_masks_inside() -> None:
    model, x, labels = case()

    mask = torch.zeros(3, 5, 6)
    mask[:, :2] = 1
    outcome = pgd(5, threat=compose((Linf(Room(mask=mask)), 0.1)))(model, x, labels, 1.0, drop=False)
    assert torch.equal(outcome.x_adv[:, :, 2:], x[:, :, 2:])
    assert float((outcome.x_adv - x).abs().max()) > 0.05
    for attack in (stadv(3), recoloradv(3, threat=COLOR)):
        assert attack(model, x, labels, 0.1).x_adv.shape == x.shape


def test_bad_compositions_are_refused_in_one_line() -> None:
    model, x, labels = case(2)
    for bad in (
        lambda: compose(),
        lambda: compose((Linf(), 0.0)),
        lambda: compose((Linf(), float("inf"))),
        lambda: pgd(2, objective=OfPart(margin, 0, roughness))(model, x, labels, 0.1),
    ):
        with pytest.raises(BadInput) as caught:
            bad()
        assert "\n" not in str(caught.value)
    assert Added(L0()).name == "l0"
