"""DeepFool and SuperDeepFool: exact on linear models, inside the box, counted, as small as the best search here allows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lawkit import bench, check_legal, linear, rng, tensor
from torch import Tensor, nn

import epsball as eb
from epsball.attacks import deepfool, get, superdeepfool
from epsball.attacks.smallest import bisection
from epsball.core import Aimed, LabelsChanged, Targeted, Victim
from epsball.errors import BadInput
from epsball.models.digits import load
from epsball.threats import named


def case(classes: int, n: int = 24, features: int = 40) -> tuple[nn.Module, Tensor, Tensor, Any]:
    """A linear model, inputs that do not feel the box, their labels, and (N, C, F) slopes of the other logits minus the label's."""
    model = linear(features, classes, gain=4).double()
    x = tensor(0.4 + 0.2 * rng(classes).random((n, features)), torch.float64)
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)
        labels = model(x).argmax(1)
    weights = model[1].weight.detach().numpy()
    return model, x, labels, weights[None] - weights[labels.numpy()][:, None]


def distances(model: nn.Module, x: Tensor, labels: Tensor, slopes: Any, dual: float) -> Any:
    """(N,) to the nearest class boundary; `dual` is the norm of the slopes."""
    logits = model(x).detach().numpy()
    gaps = np.take_along_axis(logits, labels.numpy()[:, None], 1) - logits
    sizes = np.linalg.norm(slopes, dual, axis=2)
    return np.where(sizes > 0, gaps / np.where(sizes > 0, sizes, 1), np.inf).min(1)


@pytest.mark.parametrize(("threat", "dual"), [("l2", 2), ("linf", 1)])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_one_step_reaches_a_linear_boundary(threat: str, dual: int, classes: int) -> None:
    model, x, labels, slopes = case(classes)
    far = distances(model, x, labels, slopes, dual)
    outcome = get("deepfool", threat=threat)(model, x, labels, torch.inf)
    assert bool(outcome.reached.all())
    assert np.allclose(outcome.size.numpy() / far, 1.02, atol=1e-6)  # the overshoot
    assert outcome.backwards.tolist() == [classes - 1] * len(x)
    # Clean outputs, the Jacobian, and the first look beyond.
    assert outcome.queries.tolist() == [3] * len(x)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_superdeepfool_is_exact_on_a_linear_boundary(classes: int) -> None:
    model, x, labels, slopes = case(classes)
    far = distances(model, x, labels, slopes, 2)
    ratio = superdeepfool(rounds=1, search=12)(model, x, labels, torch.inf).size.numpy() / far
    assert ratio.min() >= 1 - 1e-9
    assert ratio.max() <= 1.02 + 1e-6  # DeepFool's own answer, where a third class is ahead at its end
    assert np.median(ratio) <= 1.001


def test_the_binary_case_is_algorithm_1() -> None:
    model, x, labels, slopes = case(2)
    outcome = deepfool(overshoot=0.0, steps=1, threat=named("l2"))(model, x, labels, torch.inf)
    logits = model(x).detach().numpy()
    w = np.take_along_axis(slopes, (1 - labels.numpy())[:, None, None], 1)[:, 0]
    f = np.take_along_axis(logits, (1 - labels.numpy())[:, None], 1) - np.take_along_axis(logits, labels.numpy()[:, None], 1)
    r = -f / np.square(w).sum(1, keepdims=True) * w
    assert np.allclose(outcome.x_adv.numpy() - x.numpy(), r, atol=1e-12)


def test_only_the_candidates_are_tried() -> None:
    model, x, labels, _ = case(10)
    outcome = deepfool(candidates=2)(model, x, labels, torch.inf)
    assert outcome.backwards.tolist() == [2] * len(x)
    top = model(outcome.x_adv).argmax(1)
    best = model(x).scatter(1, labels[:, None], -torch.inf).topk(2, dim=1).indices
    assert bool((best == top[:, None]).any(1).all())


def test_other_goals() -> None:
    model, x, labels, _ = case(4)
    targets = (labels + 1) % 4
    aimed = deepfool()(model, x, Aimed(labels, targets), torch.inf)
    hit = deepfool()(model, x, Targeted(targets), torch.inf)
    assert bool(aimed.reached.all() & hit.reached.all())
    assert bool((model(hit.x_adv).argmax(1) == targets).all())
    with pytest.raises(BadInput, match="LabelsChanged"):
        deepfool()(model, x, LabelsChanged(torch.zeros(len(x), 4)), torch.inf)
    for bad in ({"candidates": 0}, {"steps": -1}):
        with pytest.raises(BadInput):
            deepfool(**bad)
    for bad in ({"rounds": 0}, {"search": 0}):
        with pytest.raises(BadInput):
            superdeepfool(**bad)


class _Wall(nn.Module):
    """No gradient, one class: nothing can be done."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0]).expand(len(x), 2)


@pytest.mark.parametrize("name", ["deepfool", "superdeepfool"])
def test_failure_returns_clean(name: str) -> None:
    x = torch.full((3, 5), 0.5)
    outcome = get(name)(_Wall(), x, torch.zeros(3, dtype=torch.int64), torch.inf)
    assert not bool(outcome.reached.any())
    assert torch.equal(outcome.x_adv, x)
    assert outcome.queries.tolist() == [2] * 3  # clean, one look for a gradient: no step is wasted on a wall


@pytest.mark.parametrize("name", ["deepfool", "superdeepfool"])
def test_a_sample_does_not_hang_on_its_batch(name: str) -> None:
    b = bench(4, n=12, wrong=0)
    whole = get(name)(b.model, b.x, b.labels, torch.inf)
    for row in range(12):
        one = get(name)(Victim(b.model), b.x[row : row + 1], b.labels[row : row + 1], torch.inf)
        assert torch.allclose(one.x_adv[0], whole.x_adv[row], atol=1e-6)
        assert int(one.queries[0]) == int(whole.queries[row])
        assert int(one.backwards[0]) == int(whole.backwards[row])
    check_legal("l2", b.x, whole.x_adv, torch.inf)


@pytest.mark.parametrize("model", ["digits-standard", "digits-robust"])
def test_digits_against_the_best_search(model: str) -> None:
    net, data = load(model), eb.data.load_data("digits", n=40)
    right = net(data.x).argmax(1) == data.y
    x, y = data.x[right], data.y[right]
    best = bisection("l2", steps=20, rounds=6)(net, x, y, None).size.median()
    plain, turned = (get(name, candidates=5)(net, x, y, torch.inf) for name in ("deepfool", "superdeepfool"))
    assert bool(plain.reached.all() & turned.reached.all())
    assert float(plain.size.median() / best) < 1.7
    assert float(turned.size.median() / best) < 1.3
    assert bool((turned.size <= plain.size + 1e-9).all())  # it begins with DeepFool's answer
