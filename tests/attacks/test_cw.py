"""Carlini & Wagner: the distance to planes, kappa, failures that return the clean image, and constants that move per sample."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from lawkit import answers, bench, check_legal, check_replay, linear, rng, tensor
from torch import Tensor, nn

from epsball import load_data, load_model
from epsball.attacks import get
from epsball.attacks.smallest import bisection
from epsball.core import Targeted, Untargeted, Victim
from epsball.errors import BadInput

PAIRS = [("cw_l2", "l2"), ("cw_linf", "linf"), ("cw_l0", "l0")]


def plane(classes: int, features: int = 64, n: int = 16) -> tuple[nn.Module, Tensor]:
    model = linear(features, classes, 0, gain=4).double()
    x = tensor(0.35 + 0.3 * rng(0, classes, 5).random((n, features)), torch.float64)
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)
    return model, x


@pytest.mark.parametrize(("name", "threat", "order", "limit"), [("cw_l2", "l2", 2, 1.01), ("cw_linf", "linf", 1, 1.08)])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_distance_to_a_plane_is_met(name: str, threat: str, order: int, limit: float, classes: int, targeted: bool) -> None:
    model, x = plane(classes)
    weights, logits = model[1].weight.detach().numpy(), model(x).detach().numpy()
    top, rows = logits.argmax(1), np.arange(len(x))
    goal = Targeted(tensor(np.argsort(logits, 1)[:, -2], torch.int64)) if targeted else Untargeted(tensor(top, torch.int64))
    dual = np.linalg.norm(weights[None] - weights[top][:, None], order, axis=2)
    far = (logits[rows, top][:, None] - logits) / np.where(dual > 0, dual, 1)
    far[rows, top] = np.inf
    # Toward a target no change can be smaller than the distance to its plane; it may have to be larger.
    least = far[rows, goal.labels.numpy()] if targeted else far.min(1)
    outcome = get(name, threat=threat)(model, x, goal, torch.inf)
    assert bool(outcome.reached.all())
    check_replay(threat, model, x, goal, outcome)
    ratio = outcome.size.numpy() / least
    assert ratio.min() >= 1 - 1e-9
    assert np.median(ratio) <= (limit if classes == 2 else limit + 0.01 if not targeted else 1.25), f"median {np.median(ratio):.4f}"


def test_l0_needs_hardly_more_pixels_than_the_best_set() -> None:
    model, x = plane(2, features=32)
    x = x.reshape(-1, 2, 4, 4)
    weights = (model[1].weight[1] - model[1].weight[0]).detach().numpy()
    for threat in ("l0", "l0f"):
        outcome = get("cw_l0", threat=threat)(model, x, model(x).argmax(1), torch.inf)
        assert bool(outcome.reached.all())
        excess = []
        for row in range(len(x)):
            logits = model(x[row : row + 1])[0].detach()
            slope, values = weights if logits[0] > logits[1] else -weights, x[row].flatten().numpy()
            gain = np.maximum(slope * (1 - values), -slope * values)
            gain = gain.reshape(2, -1).sum(0) if threat == "l0" else gain
            least = 1 + int(np.searchsorted(np.cumsum(-np.sort(-gain)), float((logits[0] - logits[1]).abs())))
            excess.append(int(outcome.size[row]) - least)
        assert min(excess) >= 0
        assert np.mean(excess) <= 1.0, excess


@pytest.mark.parametrize(("name", "threat"), PAIRS)
@pytest.mark.parametrize("targeted", [False, True])
def test_rows_do_not_hang_on_each_other_and_are_counted(name: str, threat: str, targeted: bool) -> None:
    b = bench(4, n=6, wrong=1)
    b = replace(b, x=b.x.double())
    goal = b.goal(targeted)
    attack = get(name, threat=threat)
    whole = attack(b.model, b.x, goal, torch.inf)
    check_replay(threat, b.model, b.x, goal, whole)
    check_legal(threat, b.x, whole.x_adv, torch.inf)
    assert float(whole.reached.double().mean()) >= 0.8
    begun = goal.reached(answers(b.model, b.x))
    assert whole.queries[begun].tolist() == [1] * int(begun.sum())
    assert torch.equal(whole.queries[~begun], whole.backwards[~begun] + 1)
    assert len(set(whole.queries[~begun].tolist())) > 1, "samples stop one by one"
    for row in (2, 5):
        one = attack(Victim(b.model), b.x[row : row + 1], goal.take(torch.tensor([row])), torch.inf)
        assert torch.allclose(one.x_adv[0], whole.x_adv[row], atol=1e-6)
        assert int(one.queries) == int(whole.queries[row])


@pytest.mark.parametrize(("name", "threat"), PAIRS)
def test_a_failure_returns_the_clean_image(name: str, threat: str) -> None:
    b = bench(4, n=6, wrong=0)
    deaf = lambda x: b.model(x.double()) * 1e-3 + torch.tensor([9.0, 0, 0, 0])  # noqa: E731
    labels = torch.zeros(6, dtype=torch.int64)
    outcome = get(name, threat=threat, steps=8)(deaf, b.x, labels, torch.inf)
    assert not bool(outcome.reached.any())
    assert torch.equal(outcome.x_adv, b.x)
    assert outcome.size.tolist() == [0.0] * 6
    beyond = get(name, threat=threat)(b.model, b.x, b.labels, 0.5 if threat == "l0" else 1e-4)
    assert torch.equal(beyond.x_adv, b.x)


@pytest.mark.parametrize(("name", "threat"), PAIRS)
def test_kappa_is_the_least_margin(name: str, threat: str) -> None:
    b = bench(4, n=8, wrong=0)
    sizes = []
    for kappa in (0.0, 0.5):
        outcome = get(name, threat=threat, kappa=kappa)(b.model, b.x, b.labels, torch.inf)
        output = answers(b.model, outcome.x_adv)[outcome.reached]
        label = b.labels[outcome.reached][:, None]
        margin = output.scatter(1, label, -torch.inf).amax(1) - output.gather(1, label)[:, 0]
        assert int(outcome.reached.sum()) >= 6
        assert float(margin.min()) >= kappa
        sizes.append(outcome.size[outcome.reached].mean())
    assert sizes[1] > sizes[0]


def test_neither_scale_nor_shift_of_the_logits_matters() -> None:
    b = bench(4, n=4, wrong=0)
    for name, threat in PAIRS:
        plain = get(name, threat=threat)(b.model, b.x, b.labels, torch.inf)
        for scale, shift in ((1e-3, 0.0), (1e4, -500.0)):
            moved = get(name, threat=threat)(lambda x, s=scale, t=shift: b.model(x.double()) * s + t, b.x, b.labels, torch.inf)
            assert torch.equal(moved.reached, plain.reached), (name, scale, shift)
            assert float((moved.size / plain.size).median()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("network", ["digits-standard", "digits-robust"])
def test_digits_against_bisection(network: str) -> None:
    model, data = load_model(network), load_data("digits", n=10, seed=0)
    for (name, threat), limit in zip(PAIRS, (1.03, 1.15, 1.2), strict=True):
        best = bisection(threat, steps=15, rounds=6)(model, data.x, data.y)
        outcome = get(name, threat=threat)(model, data.x, data.y, torch.inf)
        assert bool(outcome.reached.all())
        ratio = float((outcome.size / best.size).median())
        assert ratio <= limit, f"{name}: {ratio:.3f}"


@pytest.mark.parametrize(("name", "threat"), [*PAIRS, ("ead", "l1")])
def test_looks_that_short_rounds_leave_over_go_to_more_rounds(name: str, threat: str) -> None:
    b = bench(4, n=16, wrong=0)
    attack = get(name, threat=threat, steps=30, rounds=2)
    short = replace(attack, strategy=replace(attack.strategy, gain=1.0))  # no round gains that much
    more, few = (a(b.model, b.x, b.labels, torch.inf) for a in (attack, short))
    assert bool((more.size[few.reached] <= few.size[few.reached]).all())
    assert float(more.size[few.reached].sum()) < float(few.size[few.reached].sum())
    assert int(few.backwards.max()) <= int(more.backwards.max()) <= 60


def test_bad_options_are_refused() -> None:
    for options in ({"rounds": 0}, {"kappa": -1.0}, {"step": 0.0}, {"steps": -1}, {"threat": "linf"}):
        with pytest.raises(BadInput) as caught:
            get("cw_l2", **options)
        assert "\n" not in str(caught.value)
    b = bench(4, n=4)
    with pytest.raises(BadInput, match="box"):
        get("cw_l2")(Victim(b.model, box=(-torch.inf, torch.inf)), b.x, b.labels, 1.0)
