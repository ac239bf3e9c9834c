"""FAB: its projections against linear programs, exact distances on linear models, targets, restarts, costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lawkit import bench, check_replay, linear, rng, tensor
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

import epsball as eb
from epsball.attacks import fab, fab_t, get
from epsball.attacks.fab import onto_plane_l1, onto_plane_l2, onto_plane_linf
from epsball.attacks.smallest import bisection
from epsball.core import Targeted
from epsball.errors import BadInput
from epsball.models.digits import load
from epsball.threats import named

DUAL = {"linf": 1, "l2": 2, "l1": np.inf}


def case(classes: int, n: int = 24, features: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    model = linear(features, classes, gain=4).double()
    x = tensor(0.4 + 0.2 * rng(classes).random((n, features)), torch.float64)
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)
    return model, x, model(x).argmax(1)


def distances(model: nn.Module, x: Tensor, own: Tensor, threat: str) -> Any:
    """(N, C) from the region of `own` (N,) to each boundary with another class."""
    weights, logits, rows = model[1].weight.detach().numpy(), model(x).detach().numpy(), own.numpy()
    sizes = np.linalg.norm(weights[None] - weights[rows][:, None], DUAL[threat], axis=2)
    gaps = np.take_along_axis(logits, rows[:, None], 1) - logits
    return np.where(sizes > 0, gaps / np.where(sizes > 0, sizes, 1), np.inf)


def smallest_change(norm: str, w: Any, rise: float, low: Any, high: Any) -> float:
    """By linear or quadratic programming."""
    n = len(w)
    if norm == "l2":
        line = {"type": "eq", "fun": lambda d: w @ d - rise, "jac": lambda _: w}
        found = minimize(
            lambda d: d @ d,
            np.zeros(n),
            jac=lambda d: 2 * d,
            bounds=list(zip(low, high, strict=True)),
            constraints=line,
            options={"ftol": 1e-14},
        )
        return float(np.sqrt(found.fun))
    if norm == "l1":
        bounds = [(0, h) for h in high] + [(0, -b) for b in low]
        return float(linprog(np.ones(2 * n), A_eq=np.r_[w, -w][None], b_eq=[rise], bounds=bounds).fun)
    sides = np.block([[np.eye(n), -np.ones((n, 1))], [-np.eye(n), -np.ones((n, 1))]])
    bounds = [*zip(low, high, strict=True), (0, None)]
    return float(linprog(np.r_[np.zeros(n), 1], A_ub=sides, b_ub=np.zeros(2 * n), A_eq=np.r_[w, 0][None], b_eq=[rise], bounds=bounds).fun)


@pytest.mark.parametrize(("norm", "onto", "p"), [("l1", onto_plane_l1, 1), ("l2", onto_plane_l2, 2), ("linf", onto_plane_linf, torch.inf)])
def test_projections_are_exact(norm: str, onto: Any, p: float) -> None:
    random = rng(1)
    z, w, rise = (tensor(t, torch.float64) for t in (random.random((24, 9)), random.normal(size=(24, 9)), random.normal(size=24)))
    z[:, :2], w[:, 2], w[0] = z[:, :2].round(), 0.0, 0.0  # features at their bound, without weight, no weight at all
    w[1] = w[1].sign()  # ties
    d = onto(z, w, rise, torch.zeros_like(z), torch.ones_like(z))
    assert bool((z + d >= -1e-12).all() & (z + d <= 1 + 1e-12).all())
    most = (w.abs() * torch.where(w * rise[:, None] > 0, 1 - z, z)).sum(1)
    within = rise.abs() <= most
    assert 10 < int(within.sum()) < 24
    assert torch.allclose((w * d).sum(1)[within], rise[within], atol=1e-10)
    assert torch.allclose((w * d).sum(1).abs()[~within], most[~within], atol=1e-10)  # as far as the box allows
    for row in within.nonzero().squeeze(1).tolist():
        best = smallest_change(norm, w[row].numpy(), float(rise[row]), (-z[row]).numpy(), (1 - z[row]).numpy())
        assert float(torch.linalg.vector_norm(d[row], p)) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("onto", [onto_plane_l1, onto_plane_l2, onto_plane_linf])
def test_points_may_share_a_slope(onto: Any) -> None:
    random = rng(2)
    z, w, rise = (tensor(t, torch.float64) for t in (random.random((2, 24, 9)), random.normal(size=(24, 9)), random.normal(size=(2, 24))))
    low, high = torch.zeros_like(w), torch.ones_like(w)
    apart = torch.stack([onto(at, w, much, low, high) for at, much in zip(z, rise, strict=True)])
    assert torch.equal(onto(z, w, rise, low, high), apart)


@pytest.mark.parametrize("threat", ["linf", "l2", "l1"])
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("name", ["fab", "fab_t"])
def test_linear_distances_are_met(threat: str, classes: int, name: str) -> None:
    model, x, labels = case(classes)
    outcome = get(name, threat=threat, steps=6)(model, x, labels, torch.inf)
    ratio = outcome.size.numpy() / distances(model, x, labels, threat).min(1)
    assert bool(outcome.reached.all())
    assert ratio.min() >= 1 - 1e-9
    assert ratio.max() <= 1.001


@pytest.mark.parametrize("threat", ["linf", "l2", "l1"])
def test_a_target_is_met_at_its_distance(threat: str) -> None:
    model, x, labels = case(2)
    outcome = get("fab", threat=threat, steps=6)(model, x, Targeted(1 - labels), torch.inf)
    assert np.allclose(outcome.size.numpy(), distances(model, x, labels, threat).min(1), rtol=1e-3)
    model, x, labels = case(5)
    targets = (labels + 2) % 5
    outcome = get("fab", threat=threat, steps=30)(model, x, Targeted(targets), torch.inf)
    assert bool((model(outcome.x_adv).argmax(1) == targets).all())
    direct = np.take_along_axis(distances(model, x, labels, threat), targets.numpy()[:, None], 1)[:, 0]
    assert bool((outcome.size.numpy() >= direct * (1 - 1e-9)).all())
    assert np.median(outcome.size.numpy() / direct) < 1.6


def test_costs() -> None:
    model, x, labels = case(4)
    clean = model(x)
    plain = fab(steps=5, search=3, threat=named("l2"))(model, x, labels, torch.inf, clean=clean)
    assert plain.backwards.tolist() == [5 * 3] * len(x)
    assert plain.queries.tolist() == [5 + 5 + 3] * len(x)  # Jacobians, looks (the first is known), search and last look
    aimed = fab_t(steps=5, targets=9, threat=named("l2"))(model, x, labels, torch.inf, clean=clean)
    assert aimed.backwards.tolist() == [5 * 3] * len(x)  # three other classes, one boundary each
    for bad in ({"restarts": 0}, {"candidates": 0}, {"search": -1}, {"steps": -1}):
        with pytest.raises(BadInput):
            fab(**bad)
    with pytest.raises(BadInput, match="targets"):
        fab_t(targets=0)
    with pytest.raises(BadInput, match="l0f"):
        fab(threat=named("l0f"))(model, x, labels, torch.inf)


def test_restarts_never_lose_and_find_more() -> None:
    b = bench(4, n=24, wrong=0)
    sizes = [fab(steps=4, restarts=count, threat=named("l2"))(b.model, b.x, b.labels, torch.inf).size for count in (1, 4)]
    assert bool((sizes[1] <= sizes[0] * 1.01).all())  # the final search starts elsewhere
    assert float(sizes[1].sum()) < float(sizes[0].sum())


@pytest.mark.parametrize("threat", ["linf", "l2", "l1"])
def test_a_sample_does_not_hang_on_its_batch(threat: str) -> None:
    b = bench(4, n=6, wrong=0)
    attack = get("fab", threat=threat, steps=6, restarts=2)
    whole = attack(b.model, b.x, b.labels, torch.inf)
    check_replay(threat, b.model, b.x, b.labels, whole)
    for row in range(6):
        one = attack(b.model, b.x[row : row + 1], b.labels[row : row + 1], torch.inf)
        assert torch.allclose(one.x_adv[0], whole.x_adv[row], atol=1e-5)


def test_tiny_slopes_add_up_under_l1_in_float32() -> None:
    """Eight steep features at their bounds leave a hundred-millionth of the way to 100 of 2,000 flat ones; sums of float32 lose it."""
    slopes = torch.cat([torch.ones(8), torch.linspace(2e-8, 1e-8, 2000)]).double()
    gains = slopes / 2  # from 0.5 to the bound
    missing = gains[:108].sum() + gains[108] / 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(len(slopes), 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([torch.zeros_like(slopes), slopes]))
        model[1].bias.copy_(torch.stack([missing + gains.sum(), torch.zeros_like(missing)]))
    x = torch.full((1, len(slopes)), 0.5)
    outcome = get("fab", threat="l1", steps=3)(model, x, torch.tensor([0]), torch.inf)
    assert bool(outcome.reached.all())
    assert float(outcome.size) == pytest.approx(108.5 / 2, rel=1e-3)


def test_l1_leaves_flat_features_alone_where_the_plane_is_out_of_reach() -> None:
    z, low, high = torch.full((2, 6), 0.5).double(), torch.zeros(2, 6).double(), torch.ones(2, 6).double()
    w = tensor([[1.0, 0.5, 1e-8, -1e-8, 2e-8, 0.0]], torch.float64).expand(2, 6)
    change = onto_plane_l1(z, w, tensor([2.0, 0.75 + 1e-8], torch.float64), low, high)
    assert change[0].tolist() == [0.5, 0.5, 0.0, 0.0, 0.0, 0.0]  # 0.75 is all there is
    assert torch.allclose(change[1], tensor([0.5, 0.5, 0.0, 0.0, 0.5, 0.0], torch.float64))  # the plane is met: the flat ones count


def test_failure_returns_clean() -> None:
    x = torch.full((2, 5), 0.5)
    model = lambda x: torch.tensor([1.0, 0.0]).expand(len(x), 2)  # noqa: E731
    outcome = fab(steps=3)(model, x, torch.zeros(2, dtype=torch.int64), torch.inf)
    assert not bool(outcome.reached.any())
    assert torch.equal(outcome.x_adv, x)


@pytest.mark.parametrize("model", ["digits-standard", "digits-robust"])
@pytest.mark.parametrize(("threat", "worst"), [("linf", 1.15), ("l2", 1.1), ("l1", 1.5)])
def test_digits_against_the_best_search(model: str, threat: str, worst: float) -> None:
    net, data = load(model), eb.data.load_data("digits", n=30)
    right = net(data.x).argmax(1) == data.y
    x, y = data.x[right], data.y[right]
    best = bisection(threat, steps=20, rounds=6)(net, x, y, None).size.median()
    outcome = get("fab", threat=threat, steps=20)(net, x, y, torch.inf)
    assert float(outcome.reached.double().mean()) > 0.9
    assert float(outcome.size.median() / best) < worst
