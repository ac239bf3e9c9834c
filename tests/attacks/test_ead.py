"""EAD: the L1 distance to planes, both decision rules, honest returns, failures that return the clean image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from lawkit import answers, bench, check_legal, check_replay, linear, rng, tensor

from epsball import load_data, load_model
from epsball.attacks import get
from epsball.attacks.smallest import bisection
from epsball.core import Victim
from epsball.errors import BadInput


@pytest.mark.parametrize(("classes", "limit"), [(2, 1.02), (5, 1.06)])
def test_the_l1_distance_to_a_plane_is_met(classes: int, limit: float) -> None:
    model = linear(64, classes, 0, gain=4).double()
    x = tensor(0.35 + 0.3 * rng(0, classes, 5).random((16, 64)), torch.float64)
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)
    weights, logits = model[1].weight.detach().numpy(), model(x).detach().numpy()
    top, rows = logits.argmax(1), np.arange(len(x))
    dual = np.abs(weights[None] - weights[top][:, None]).max(2)
    far = (logits[rows, top][:, None] - logits) / np.where(dual > 0, dual, 1)
    far[rows, top] = np.inf
    outcome = get("ead", steps=100)(model, x, tensor(top, torch.int64), torch.inf)
    assert bool(outcome.reached.all())
    ratio = outcome.size.numpy() / far.min(1)
    assert ratio.min() >= 1 - 1e-9
    assert np.median(ratio) <= limit, f"median {np.median(ratio):.4f}"
    assert int((outcome.x_adv != x).sum(1).median()) <= 4, "sparse"


@pytest.mark.parametrize("rule", ["l1", "en"])
@pytest.mark.parametrize("targeted", [False, True])
def test_what_is_judged_is_what_is_returned(rule: str, targeted: bool) -> None:
    b = bench(4, n=10, wrong=1)
    b = replace(b, x=b.x.double())
    goal = b.goal(targeted)
    attack = get("ead", rule=rule, kappa=0.05)
    whole = attack(b.model, b.x, goal, torch.inf)
    check_replay("l1", b.model, b.x, goal, whole)
    check_legal("l1", b.x, whole.x_adv, torch.inf)
    begun = goal.reached(answers(b.model, b.x))
    assert float(whole.reached.double().mean()) >= 0.9
    assert torch.equal(whole.queries[~begun], whole.backwards[~begun] + 1), "one look is one forward and one backward"
    for row in (2, 9):
        one = attack(Victim(b.model), b.x[row : row + 1], goal.take(torch.tensor([row])), torch.inf)
        assert torch.allclose(one.x_adv[0], whole.x_adv[row], atol=1e-6)


def test_rules_rank_by_what_they_say() -> None:
    b = bench(4, n=16, wrong=0)
    sparse, elastic = (get("ead", rule=rule, beta=0.01)(b.model, b.x, b.labels, torch.inf) for rule in ("l1", "en"))
    both = sparse.reached & elastic.reached
    net = [((o.x_adv - b.x).flatten(1).square().sum(1) + 0.01 * o.size)[both] for o in (sparse, elastic)]
    assert bool((sparse.size[both] <= elastic.size[both] + 1e-9).all())
    assert bool((net[1] <= net[0] + 1e-6).all())
    slow = get("ead", fast=False)(b.model, b.x, b.labels, torch.inf)
    assert int(slow.reached.sum()) >= 14


def test_a_failure_returns_the_clean_image() -> None:
    b = bench(4, n=6, wrong=0)
    deaf = lambda x: b.model(x.double()) * 1e-3 + torch.tensor([9.0, 0, 0, 0])  # noqa: E731
    for rule in ("l1", "en"):
        outcome = get("ead", rule=rule, steps=8)(deaf, b.x, torch.zeros(6, dtype=torch.int64), torch.inf)
        assert not bool(outcome.reached.any())
        assert torch.equal(outcome.x_adv, b.x)


@pytest.mark.parametrize("network", ["digits-standard", "digits-robust"])
def test_digits_against_bisection(network: str) -> None:
    model, data = load_model(network), load_data("digits", n=16, seed=0)
    best = bisection("l1", steps=20, rounds=7)(model, data.x, data.y)
    outcome = get("ead")(model, data.x, data.y, torch.inf)
    assert bool(outcome.reached.all())
    assert float((outcome.size / best.size).median()) <= 1.15


def test_bad_options_are_refused() -> None:
    for options in ({"rounds": 0}, {"rule": "l2"}, {"beta": -1.0}, {"kappa": -0.1}, {"steps": -1}, {"threat": "l2"}):
        with pytest.raises(BadInput):
            get("ead", **options)
