"""L-BFGS: the recursion against the dense inverse, the distance to planes, and rows that search lines by themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from lawkit import answers, bench, check_finite_differences, check_legal, check_replay, linear, posed, rng, tensor

from epsball import load_data, load_model
from epsball.attacks import get
from epsball.attacks.lbfgs import _Memory, likelihood
from epsball.attacks.smallest import bisection
from epsball.core import Targeted, Untargeted, Victim, autograd
from epsball.errors import BadInput


def test_the_recursion_is_the_bfgs_inverse() -> None:
    """Against H built densely, pair by pair: H <- V' H V + rho s s'."""
    random, pairs, size = rng(1), 3, 6
    root = random.standard_normal((size, size))
    hessian = root @ root.T  # of the likelihood part; the distance adds 2
    moves = random.standard_normal((pairs, size))
    memory = _Memory(torch.zeros(2, 5, size).double(), torch.zeros(2, 5, size).double())
    weight = torch.tensor([0.7, 0.7], dtype=torch.float64)
    for move in moves:  # row 1 gets no pair at all
        memory = memory.pushed(torch.tensor([True, False]), tensor([move] * 2, torch.float64), tensor([hessian @ move] * 2, torch.float64))
    bends = moves @ (2 * np.eye(size) + 0.7 * hessian)
    inverse = np.eye(size) * (moves[-1] @ bends[-1]) / (bends[-1] @ bends[-1])
    for s, y in zip(moves, bends, strict=True):
        v = np.eye(size) - np.outer(y, s) / (s @ y)
        inverse = v.T @ inverse @ v + np.outer(s, s) / (s @ y)
    gradient = random.standard_normal(size)
    found = memory.direction(weight, tensor([gradient] * 2, torch.float64))
    assert np.allclose(found[0].numpy(), -inverse @ gradient, rtol=1e-9)
    assert np.allclose(found[1].numpy(), -gradient / 2), "without a pair: the inverse Hessian of |d|^2"


def test_the_objective_is_a_log_probability() -> None:
    b = bench(4, n=5, wrong=0)
    for goal in (Untargeted(b.labels), Targeted((b.labels + 1) % 4)):
        problem = posed(b.model, b.x.double(), goal, objective=likelihood, threat="l2")
        p = answers(b.model, b.x).softmax(1).gather(1, goal.labels[:, None])[:, 0]
        p = 1 - p if isinstance(goal, Untargeted) else p
        assert torch.allclose(likelihood(problem, problem.x, problem.x, problem.clean).exp(), p)
        check_finite_differences(problem, problem.x, autograd)


@pytest.mark.parametrize("targeted", [False, True])
def test_the_distance_to_a_plane_is_met(targeted: bool) -> None:
    """Two classes; with more, the log of 1 - p pulls toward all of them, and 1.2 times the distance is what it finds here."""
    model = linear(64, 2, 0, gain=4).double()
    x = tensor(0.35 + 0.3 * rng(0, 2, 5).random((16, 64)), torch.float64)
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)
    logits = model(x).detach()
    labels = logits.argmax(1)
    far = (logits[:, 0] - logits[:, 1]).abs() / (model[1].weight[0] - model[1].weight[1]).norm()
    goal = Targeted(1 - labels) if targeted else Untargeted(labels)
    outcome = get("lbfgs", rounds=12)(model, x, goal, torch.inf)
    assert bool(outcome.reached.all())
    ratio = outcome.size / far.detach()
    assert float(ratio.min()) >= 1 - 1e-9
    assert float(ratio.median()) <= 1.01


@pytest.mark.parametrize("targeted", [False, True])
def test_rows_do_not_hang_on_each_other_and_are_counted(targeted: bool) -> None:
    b = bench(4, n=10, wrong=1)
    b = replace(b, x=b.x.double())
    goal = b.goal(targeted)
    attack = get("lbfgs")
    whole = attack(b.model, b.x, goal, torch.inf)
    check_replay("l2", b.model, b.x, goal, whole)
    check_legal("l2", b.x, whole.x_adv, torch.inf)
    begun = goal.reached(answers(b.model, b.x))
    assert float(whole.reached.double().mean()) >= 0.9
    assert torch.equal(whole.queries[~begun], whole.backwards[~begun] + 1)
    assert len(set(whole.queries[~begun].tolist())) > 1, "samples stop one by one"
    for row in (2, 9):
        one = attack(Victim(b.model), b.x[row : row + 1], goal.take(torch.tensor([row])), torch.inf)
        assert torch.allclose(one.x_adv[0], whole.x_adv[row], atol=1e-6)
        assert int(one.queries) == int(whole.queries[row])


def test_a_failure_returns_the_clean_image() -> None:
    b = bench(4, n=6, wrong=0)
    deaf = lambda x: b.model(x.double()) * 1e-3 + torch.tensor([9.0, 0, 0, 0])  # noqa: E731
    outcome = get("lbfgs", steps=8)(deaf, b.x, torch.zeros(6, dtype=torch.int64), torch.inf)
    assert not bool(outcome.reached.any())
    assert torch.equal(outcome.x_adv, b.x)
    near = get("lbfgs")(b.model, b.x, b.labels, 1e-5)
    assert torch.equal(near.x_adv, b.x)


@pytest.mark.parametrize("network", ["digits-standard", "digits-robust"])
def test_digits_against_bisection(network: str) -> None:
    model, data = load_model(network), load_data("digits", n=16, seed=0)
    best = bisection("l2", steps=20, rounds=7)(model, data.x, data.y)
    outcome = get("lbfgs")(model, data.x, data.y, torch.inf)
    assert bool(outcome.reached.all())
    assert float((outcome.size / best.size).median()) <= 1.02


def test_bad_options_are_refused() -> None:
    for options in ({"rounds": 0}, {"steps": -1}, {"threat": "linf"}):
        with pytest.raises(BadInput):
            get("lbfgs", **options)
