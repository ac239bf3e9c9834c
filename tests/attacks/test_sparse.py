"""sigma-zero and PDPGD: proximal maps, linear models, targets, costs, digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lawkit import bench, linear, rng, tensor
from scipy.optimize import minimize
from torch import Tensor, nn

import epsball as eb
from epsball.attacks import get, pdpgd, sigma_zero
from epsball.attacks.pdpgd import shrunk
from epsball.attacks.smallest import bisection
from epsball.core import Targeted
from epsball.errors import BadInput
from epsball.models.digits import load
from epsball.threats import named

ORDER = {"l1": 1, "l2": 2, "linf": np.inf}


@pytest.mark.parametrize("norm", list(ORDER))
def test_proximal_maps(norm: str) -> None:
    v = tensor(rng(5).normal(size=(30, 6)), torch.float64)
    v[0], v[1] = 0.0, 1.0
    amount = tensor(rng(6).random(30) * 4, torch.float64)
    y = shrunk(named(norm), v, amount)
    for row in range(len(v)):
        at, weight = v[row].numpy(), float(amount[row])
        cost = lambda u, at=at, weight=weight: weight * np.linalg.norm(u, ORDER[norm]) + ((u - at) ** 2).sum() / 2  # noqa: E731
        found = cost(y[row].numpy())
        for start in (at, np.zeros(6), y[row].numpy()):
            best = minimize(cost, start, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-10, "maxiter": 800}).fun
            assert found <= best + 1e-7


def case(features: int = 30, classes: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    model = linear(features, classes, gain=4).double()
    x = tensor(0.4 + 0.2 * rng(7).random((16, features)), torch.float64)
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize(("norm", "dual", "most"), [("l2", 2, 1.06), ("linf", 1, 1.06), ("l1", np.inf, 1.6)])
def test_pdpgd_comes_near_the_linear_distance(norm: str, dual: float, most: float) -> None:
    model, x, labels = case()
    weights, logits = model[1].weight.detach().numpy(), model(x).detach().numpy()
    sizes = np.linalg.norm(weights[None] - weights[labels.numpy()][:, None], dual, axis=2)
    gaps = np.take_along_axis(logits, labels.numpy()[:, None], 1) - logits
    far = np.where(sizes > 0, gaps / np.where(sizes > 0, sizes, 1), np.inf).min(1)
    outcome = get("pdpgd", threat=norm, steps=400)(model, x, labels, torch.inf)
    ratio = outcome.size.numpy() / far
    assert bool(outcome.reached.all())
    assert ratio.min() >= 1 - 1e-9
    assert np.median(ratio) < most, f"median {np.median(ratio):.3f}"


def fewest(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """How many features of a two-class linear model must change: the best ones first, each as far as the box allows."""
    w = model[1].weight.detach()
    slope = w[1 - labels] - w[labels]
    logits = model(x).detach()
    gap = (logits.gather(1, labels[:, None]) - logits.gather(1, 1 - labels[:, None])).squeeze(1)
    gain = torch.maximum(slope * (1 - x), -slope * x).sort(1, descending=True).values.cumsum(1)
    return (gain <= gap[:, None]).sum(1) + 1


def test_sigma_zero_finds_the_fewest_features() -> None:
    model, x, labels = case(classes=2)
    outcome = sigma_zero(steps=200)(model, x, labels, torch.inf)
    best = fewest(model, x, labels)
    assert bool(outcome.reached.all())
    assert bool((outcome.size >= best).all())
    assert float((outcome.size - best).mean()) <= 0.5


@pytest.mark.parametrize(
    ("name", "threat"), [("sigma_zero", "l0f"), ("sigma_zero", "l0"), ("pdpgd", "l2"), ("pdpgd", "linf"), ("pdpgd", "l1")]
)
def test_targets_costs_and_batches(name: str, threat: str) -> None:
    b = bench(4, n=8, wrong=0)
    targets = (b.labels + 1) % 4
    attack = get(name, threat=threat, steps=40)
    outcome = attack(b.model, b.x, Targeted(targets), torch.inf)
    assert int(outcome.reached.sum()) >= 6
    assert bool((b.model(outcome.x_adv.double()).argmax(1) == targets)[outcome.reached].all())
    if name == "sigma_zero":  # the last tenth takes features out, without gradients, until none is left to try
        assert outcome.backwards.tolist() == [36] * 8
        assert bool(((outcome.queries >= 38) & (outcome.queries <= 42)).all())
    else:
        assert outcome.backwards.tolist() == [40] * 8
        assert outcome.queries.tolist() == [42] * 8
    one = attack(b.model, b.x[3:4], Targeted(targets[3:4]), torch.inf)
    assert torch.allclose(one.x_adv[0], outcome.x_adv[3], atol=1e-4)
    free = attack(b.model, b.x, b.labels, torch.inf)
    assert bool(free.reached.all())


def test_sigma_zero_drops_what_the_descent_left_over() -> None:
    # One feature decides; the descent's first steps also move features that do nothing, and a tenth of the looks takes them out.
    model = linear(40, 2, gain=4).double()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[1, :3] = tensor([30.0, 0.5, 0.4], torch.float64)
        model[1].bias.copy_(tensor([20.0, 0.0], torch.float64))
    x = torch.full((3, 40), 0.5, dtype=torch.float64)
    labels = torch.zeros(3, dtype=torch.int64)
    outcome = sigma_zero(steps=30)(model, x, labels, torch.inf)
    assert bool(outcome.reached.all())
    assert outcome.size.tolist() == [1.0] * 3
    assert bool((outcome.x_adv[:, 0] > 0.5).all())
    capped = sigma_zero(steps=30)(model, x, labels, 1)
    assert bool(capped.reached.all())
    assert capped.size.tolist() == [1.0] * 3


def test_pixels_are_cut_together() -> None:
    b = bench(4, n=12, wrong=0)
    pixels, features = (get("sigma_zero", threat=threat, steps=80)(b.model, b.x, b.labels, torch.inf) for threat in ("l0", "l0f"))
    assert bool(pixels.reached.all())
    size = lambda outcome: float(named("l0").size(b.x, outcome.x_adv).mean())  # noqa: E731
    assert size(pixels) <= size(features)


def test_failure_returns_clean_and_bad_options_are_refused() -> None:
    x = torch.full((2, 5), 0.5)
    wall = lambda x: torch.tensor([1.0, 0.0]).expand(len(x), 2)  # noqa: E731
    for attack in (sigma_zero(steps=5), pdpgd(steps=5)):
        outcome = attack(wall, x, torch.zeros(2, dtype=torch.int64), torch.inf)
        assert not bool(outcome.reached.any())
        assert torch.equal(outcome.x_adv, x)
    with pytest.raises(BadInput, match="sigma"):
        sigma_zero(sigma=0.0)
    with pytest.raises(BadInput, match="inner"):
        pdpgd(inner=0)


@pytest.mark.parametrize("model", ["digits-standard", "digits-robust"])
def test_sigma_zero_on_digits_is_no_worse_than_bisected_pgd(model: str) -> None:
    net, data = load(model), eb.data.load_data("digits", n=30)
    right = net(data.x).argmax(1) == data.y
    x, y = data.x[right], data.y[right]
    outcome = get("sigma_zero", steps=100)(net, x, y, torch.inf)
    assert bool(outcome.reached.all())
    assert float(outcome.size.median()) <= float(bisection("l0f", steps=20, rounds=6)(net, x, y, None).size.median())
