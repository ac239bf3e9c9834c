"""JSMA: saliency and pair search against their definitions, directions, theta, gamma, costs."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from lawkit import bench, linear, rng, tensor
from torch import Tensor, nn

import epsball as eb
from epsball.attacks import get, jsma
from epsball.attacks import jsma as module
from epsball.attacks.jsma import Outputs, logits, probabilities
from epsball.attacks.smallest import bisection
from epsball.core import Targeted
from epsball.errors import BadInput
from epsball.models.digits import load
from epsball.threats import Room, named

del module


def tables(seed: int, n: int = 14) -> tuple[Tensor, Tensor, Tensor]:
    """(gain, loss, free) (B, n) with every kind of trouble: ties, few free features, all signs, gains that cost losses."""
    random = rng(seed)
    gain, loss = (tensor(random.normal(size=(20, n)), torch.float64) for _ in range(2))
    gain[:5], loss[:5] = gain[:5].round(), loss[:5].round()
    loss[5:10] = 0.2 - gain[5:10]
    free = tensor(random.random((20, n)) < 0.8, torch.bool)
    free[10], free[11], free[11, 3] = False, False, True
    gain[12] = -gain[12].abs()
    loss[13] = -loss[13].abs()
    return gain, loss, free


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("entries", [2**22, 60])
def test_the_best_pair_is_that_of_brute_force(seed: int, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    code = sys.modules["epsball.attacks.jsma"]
    monkeypatch.setattr(code, "_ENTRIES", entries)
    gain, loss, free = tables(seed)
    pair, found = code.best_pair(gain, loss, free)
    for row in range(len(gain)):
        best = 0.0
        for p, q in combinations(free[row].nonzero().squeeze(1).tolist(), 2):
            a, b = float(gain[row, p] + gain[row, q]), float(loss[row, p] + loss[row, q])
            best = max(best, a * b if a > 0 and b > 0 else 0.0)
        assert bool(found[row]) == (best > 0)
        if best > 0:
            p, q = pair[row].tolist()
            assert p != q
            assert bool(free[row, p] & free[row, q])
            assert float((gain[row, p] + gain[row, q]) * (loss[row, p] + loss[row, q])) == pytest.approx(best, rel=1e-12)


def saliency(model: nn.Module, x: Tensor, target: int, theta: float, outputs: Outputs) -> Tensor:
    """Eq. (8) and (9) as they are written, for one input, from the whole Jacobian; times how far each feature can move."""

    def answer(v: Tensor) -> Tensor:
        output: Tensor = model(v[None])[0]
        return output.softmax(0) if outputs is probabilities else output

    jacobian = torch.autograd.functional.jacobian(answer, x).reshape(-1, x.numel())
    own = jacobian[target]
    others = jacobian.sum(0) - own
    if theta > 0:
        map_ = torch.where((own < 0) | (others > 0), torch.zeros_like(own), own * others.abs())
    else:
        map_ = torch.where((own > 0) | (others < 0), torch.zeros_like(own), own.abs() * others)
    room = ((1 - x) if theta > 0 else x).clamp(max=abs(theta)).flatten()
    return map_ * room.square()


@pytest.mark.parametrize("outputs", [probabilities, logits])
@pytest.mark.parametrize("theta", [1.0, 0.2, -1.0, -0.3])
def test_the_most_salient_feature_moves_by_theta(theta: float, outputs: Outputs) -> None:
    b = bench(4, n=10, wrong=0)
    targets = (b.labels + 1) % 4
    x = b.x.double()
    outcome = jsma(steps=1, theta=theta, pairs=False, outputs=outputs)(b.model, x, Targeted(targets), torch.inf)
    moved = 0
    for row in range(len(x)):
        map_ = saliency(b.model, x[row], int(targets[row]), theta, outputs)
        step = (outcome.x_adv[row] - x[row]).flatten()
        if float(map_.max()) == 0 or not bool(step.any()):  # no salient feature, or the move made it worse and the clean input won
            continue
        moved += 1
        assert step.nonzero().squeeze(1).tolist() == [int(map_.argmax())]
        value = (x[row].flatten()[map_.argmax()] + theta).clamp(0, 1)
        assert float(outcome.x_adv[row].flatten()[map_.argmax()]) == pytest.approx(float(value), abs=1e-12)
    assert moved >= 4


def test_targets_theta_and_gamma() -> None:
    model = linear(20, 5, gain=6).double()
    x = tensor(rng(3).random((12, 20)), torch.float64)
    targets = (model(x).argmax(1) + 1) % 5
    up = jsma(theta=0.5)(model, x, Targeted(targets), torch.inf)
    assert bool((up.x_adv >= x).all())
    assert int(up.reached.sum()) >= 3
    assert bool((model(up.x_adv).argmax(1) == targets)[up.reached].all())
    down = jsma(theta=-0.5)(model, x, Targeted(targets), torch.inf)
    assert bool((down.x_adv <= x).all())
    few = jsma(gamma=0.1)(model, x, Targeted(targets), torch.inf)
    assert int(few.size.max()) <= 2  # floor(0.1 * 20 / 2) = 1 pair
    assert int(few.backwards.max()) <= 2  # one move, one look that finds gamma spent
    assert bool((few.reached <= jsma()(model, x, Targeted(targets), torch.inf).reached).all())
    for bad in ({"gamma": 1.5}, {"gamma": -0.1}, {"steps": -1}):
        with pytest.raises(BadInput):
            jsma(**bad)


@pytest.mark.parametrize(("outputs", "each"), [(probabilities, 1), (logits, 2)])
@pytest.mark.parametrize("classes", [2, 3, 30])
def test_the_cost_does_not_hang_on_the_number_of_classes(classes: int, outputs: Outputs, each: int) -> None:
    model = linear(12, classes, gain=6).double()
    x = tensor(rng(4).random((10, 12)), torch.float64)
    outcome = jsma(steps=4, outputs=outputs)(model, x, model(x).argmax(1), torch.inf)
    assert bool((outcome.backwards % each == 0).all())
    assert each <= int(outcome.backwards.max()) <= each * 4


def test_probabilities_far_below_the_smallest_number_still_have_a_direction() -> None:
    weights = torch.zeros(2, 6)
    weights[1] = torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 4.0])
    x = torch.zeros(1, 6)

    def model(x: Tensor) -> Tensor:
        return 1e4 * (x @ weights.T.to(x) + torch.tensor([13.5, 0.0]).to(x))  # p_1 = exp(-135,000) at x

    outcome = jsma(steps=1)(model, x, Targeted(torch.tensor([1])), torch.inf)
    assert bool(outcome.reached[0])
    assert outcome.x_adv[0].nonzero().squeeze(1).tolist() == [1, 3]


def test_failure_returns_clean_and_costs_little() -> None:
    x = torch.full((2, 5), 0.5)
    outcome = jsma()(lambda x: torch.tensor([1.0, 0.0]).expand(len(x), 2), x, torch.zeros(2, dtype=torch.int64), torch.inf)
    assert not bool(outcome.reached.any())
    assert torch.equal(outcome.x_adv, x)
    assert outcome.queries.tolist() == [2, 2]


def test_frozen_features_and_pixels() -> None:
    b = bench(4, n=8, wrong=0)
    mask = torch.ones(2, 3, 3)
    mask[0] = 0
    outcome = jsma(threat=type(named("l0"))(Room(mask=mask)))(b.model, b.x, b.labels, torch.inf)
    assert torch.equal(outcome.x_adv[:, 0], b.x[:, 0])
    assert bool(outcome.reached.any())
    for row in range(8):
        one = jsma()(b.model, b.x[row : row + 1], b.labels[row : row + 1], torch.inf)
        assert torch.equal(one.x_adv[0], jsma()(b.model, b.x, b.labels, torch.inf).x_adv[row])


def test_digits() -> None:
    net, data = load("digits-standard"), eb.data.load_data("digits", n=40)
    right = net(data.x).argmax(1) == data.y
    outcome = get("jsma")(net, data.x[right], data.y[right], torch.inf)
    assert float(outcome.reached.double().mean()) > 0.85
    best = bisection("l0f", steps=20, rounds=6)(net, data.x[right], data.y[right], None).size.median()
    assert float(outcome.size[outcome.reached].median()) <= 4 * float(best)
