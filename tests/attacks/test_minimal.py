"""DDN and FMN: the closed form on linear models, the boundary of a small network, and what does not hang on the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lawkit import answers, bench, check_legal, check_replay, linear, rng, tensor
from torch import Tensor, nn

from epsball import load_data, load_model
from epsball.attacks import get
from epsball.attacks.minimal import Bracket, Round, first_weight
from epsball.attacks.smallest import bisection
from epsball.core import Reading, Victim
from epsball.errors import BadInput
from epsball.objectives import margin

DUAL = {"linf": 1, "l2": 2, "l1": np.inf}


def plane(classes: int, features: int = 64, n: int = 16, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A linear model whose boundaries run near points deep inside the box."""
    model = linear(features, classes, seed, gain=4).double()
    x = tensor(0.35 + 0.3 * rng(seed, classes, 5).random((n, features)), torch.float64)
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)
    return model, x


def distance(model: nn.Module, x: Tensor, threat: str) -> Any:
    """(N,) distance to the nearest other class; the box does not matter at these lengths."""
    weights, logits = model[1].weight.detach().numpy(), model(x).detach().numpy()
    top, rows = logits.argmax(1), np.arange(len(x))
    dual = np.linalg.norm(weights[None] - weights[top][:, None], DUAL[threat], axis=2)
    far = (logits[rows, top][:, None] - logits) / np.where(dual > 0, dual, 1)
    far[rows, top] = np.inf
    return far.min(1)


CASES = [("ddn", "l2", 1.01), ("fmn", "l2", 1.01), ("fmn", "linf", 1.03), ("fmn", "l1", 1.1)]


@pytest.mark.parametrize(("name", "threat", "limit"), CASES)
@pytest.mark.parametrize("classes", [2, 5])
def test_the_distance_to_a_plane_is_met(name: str, threat: str, limit: float, classes: int) -> None:
    model, x = plane(classes)
    # With several classes near, DDN's cross-entropy pulls toward all of them: 1.19 of the distance here.
    outcome = get(name, threat=threat, steps=200, objective="margin")(model, x, model(x).argmax(1), torch.inf)
    assert bool(outcome.reached.all())
    ratio = outcome.size.numpy() / distance(model, x, threat)
    assert ratio.min() >= 1 - 1e-9, "nearer than the boundary"
    assert np.median(ratio) <= limit, f"median {np.median(ratio):.4f}"


@pytest.mark.parametrize("threat", ["l0", "l0f"])
def test_fmn_counts_pixels(threat: str) -> None:
    model, x = plane(2, features=32)
    x = x.reshape(-1, 2, 4, 4)
    outcome = get("fmn", threat=threat)(model, x, model(x).argmax(1), torch.inf)
    weights = (model[1].weight[1] - model[1].weight[0]).detach().numpy()
    for row in range(len(x)):
        slope = weights if model(x[row : row + 1]).argmax() == 0 else -weights
        values = x[row].flatten().numpy()
        gain = np.maximum(slope * (1 - values), -slope * values)
        gain = gain.reshape(2, -1).sum(0) if threat == "l0" else gain
        logits = model(x[row : row + 1])[0].detach()
        least = 1 + int(np.searchsorted(np.cumsum(-np.sort(-gain)), float((logits[0] - logits[1]).abs())))
        assert least <= int(outcome.size[row]) <= least + 1


@pytest.mark.parametrize(("name", "threat"), [("ddn", "l2"), *(("fmn", t) for t in ("l2", "linf", "l1", "l0"))])
@pytest.mark.parametrize("targeted", [False, True])
def test_network_batches_and_targets(name: str, threat: str, targeted: bool) -> None:
    b = bench(4, n=10, wrong=1)
    b = replace(b, x=b.x.double())
    goal = b.goal(targeted)
    attack = get(name, threat=threat, steps=30)
    whole = attack(b.model, b.x, goal, torch.inf)
    check_replay(threat, b.model, b.x, goal, whole)
    check_legal(threat, b.x, whole.x_adv, torch.inf)
    assert float(whole.reached.double().mean()) >= 0.8
    begun = goal.reached(answers(b.model, b.x))
    assert whole.backwards.tolist() == [0 if done else 30 for done in begun.tolist()]
    assert whole.queries.tolist() == [1 if done else 32 for done in begun.tolist()]
    for row in (0, 4, 9):
        one = attack(Victim(b.model), b.x[row : row + 1], goal.take(torch.tensor([row])), torch.inf)
        assert torch.allclose(one.x_adv[0], whole.x_adv[row], atol=1e-6)


def test_sizes_do_not_hang_on_the_unit_of_the_box() -> None:
    model, x = plane(3)
    stretched = lambda z: model(z.double() / 255)  # noqa: E731
    labels = model(x).argmax(1)
    for name, threat in (("ddn", "l2"), ("fmn", "l2"), ("fmn", "l1")):
        small = get(name, threat=threat)(model, x, labels, torch.inf)
        large = get(name, threat=threat)(Victim(stretched, box=(0, 255)), x * 255, labels, torch.inf)
        assert torch.allclose(large.size / 255, small.size, rtol=0.02)


def test_a_vanished_gradient_moves_by_keyed_noise() -> None:
    """Cross-entropy of logits in the ten thousands has no gradient in float32; DDN goes somewhere all the same."""
    b = bench(4, n=8, wrong=0)
    loud = lambda x: (b.model(x.double()) * 1e5).float()  # noqa: E731
    outcome = get("ddn", steps=40)(loud, b.x, b.labels, torch.inf)
    again = get("ddn", steps=40)(loud, b.x, b.labels, torch.inf)
    assert float(outcome.reached.double().mean()) >= 0.75
    assert torch.equal(outcome.x_adv, again.x_adv)


@pytest.mark.parametrize("network", ["digits-standard", "digits-robust"])
def test_digits_against_bisection(network: str) -> None:
    """Within a few percent of `eb.smallest` (7 rounds of 15 steps), or better."""
    model, data = load_model(network), load_data("digits", n=10, seed=0)
    limits = {("ddn", "l2"): 1.03, ("fmn", "l2"): 1.06, ("fmn", "linf"): 1.12, ("fmn", "l1"): 1.1, ("fmn", "l0"): 1.4}
    for (name, threat), limit in limits.items():
        best = bisection(threat, steps=15, rounds=6)(model, data.x, data.y)
        outcome = get(name, threat=threat)(model, data.x, data.y, torch.inf)
        assert bool(outcome.reached.all())
        ratio = float((outcome.size / best.size).median())
        assert ratio <= limit, f"{name} {threat}: {ratio:.3f}"


def test_ddn_is_soon_far_out_where_the_boundary_is_far() -> None:
    """Nine looks cross a plane at distance 9: the radius grows by half until a first success; by 5 % it would be at 1.5."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(400, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([torch.zeros(400), torch.ones(400)]))
        model[1].bias.copy_(torch.tensor([180.0, 0.0]))
    x, labels = torch.zeros(1, 400, dtype=torch.float64), torch.tensor([0])
    outcome = get("ddn", steps=9)(model, x, labels, torch.inf)
    assert bool(outcome.reached.all())
    assert 9 <= float(outcome.size) <= 9 * 1.5


def test_what_rounds_and_brackets_do() -> None:
    bracket = Bracket.start(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
    over, hit = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    bracket = bracket.next(over, hit)
    assert bracket.weight.tolist() == [0.5, 10.0, 1.0]
    bracket = bracket.next(torch.ones(3, dtype=torch.bool), ~hit)
    assert bracket.weight.tolist() == [0.75, 5.5, 10.0]
    rnd = Round.first(bracket.weight)
    for loss, success in ((3.0, False), (2.0, True), (2.0, False)):
        rnd = rnd.after(torch.full((3,), loss, dtype=torch.float64), torch.full((3,), success))
    assert (rnd.looks[0], rnd.stale[0], rnd.since[0]) == (3, 1, 1)
    rnd = rnd.restarted(torch.tensor([True, False, False]))
    assert rnd.looks.tolist() == [0, 3, 3]
    assert rnd.number.tolist() == [1, 0, 0]
    reading = Reading(None, torch.zeros(2, 1), torch.zeros(2, 2), torch.tensor([-3.0, -3.0]), torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    assert first_weight(reading)[0] == 1.5  # d = 3 / 2, and 2 d = weight * 2
    assert torch.isfinite(first_weight(replace(reading, score=torch.tensor([torch.nan, 1.0])))).all()


def test_bad_options_are_refused() -> None:
    for name, options in (("ddn", {"gamma": 1.0}), ("fmn", {"gamma": 0.0}), ("ddn", {"threat": "l1"}), ("ddn", {"steps": -1})):
        with pytest.raises(BadInput):
            get(name, **options)
    assert " at 0x" not in repr(get("fmn", threat="l0"))
    assert get("fmn", objective="margin").objective is margin
