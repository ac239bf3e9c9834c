"""P7: on a linear model the best attack is known exactly, for every norm: an oracle against brute force, the attacks against it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from lawkit import check_legal, linear, measured, mlp, rng, tensor
from scipy.optimize import linprog, minimize, minimize_scalar
from torch import Tensor, nn

from epsball.attacks import SmallestRadius, by_logit, entries, get, linear_smallest, linear_worst_case, malt
from epsball.core import Access, Aimed, Goal, Key, LabelsChanged, Outcome, Projects, Targeted, Untargeted, Victim
from epsball.core.attack import pose
from epsball.errors import AccessDenied, BadInput
from epsball.objectives import margin
from epsball.threats import L0, L1, L2, Linf, named
from epsball.threats.lp import Room

RADIUS = {"linf": 0.03, "l2": 0.25, "l1": 2.0, "l0": 2.0, "l0f": 2.0}
SMALL = {"linf": 0.02, "l2": 0.12, "l1": 1.0}  # far less than the box allows
SHAPE = {"linf": (4, 4, 4), "l2": (4, 4, 4), "l1": (4, 4, 4), "l0": (2, 2, 2), "l0f": (2, 2, 2)}  # L0: small enough to enumerate
THREATS = list(RADIUS)
every_threat = pytest.mark.parametrize("threat", THREATS)


@dataclass(frozen=True)
class Linear:
    model: nn.Module
    x: Tensor
    weights: Any  # (C, F)
    logits: Any  # (N, C) at x

    @property
    def labels(self) -> Tensor:
        return tensor(self.logits.argmax(1), torch.int64)


def case(classes: int, threat: str, n: int = 40, seed: int = 0, shape: tuple[int, ...] | None = None) -> Linear:
    """Inputs so far inside the box that Linf and L2 do not feel it; the classes are about equally frequent."""
    shape = shape or SHAPE[threat]
    features = int(np.prod(shape))
    model = linear(features, classes, seed, gain=4).double()
    x = tensor(0.3 + 0.4 * rng(seed, classes).random((n, *shape)), torch.float64)
    with torch.no_grad():
        model[1].bias -= model(x).mean(0)
    return Linear(model, x, model[1].weight.detach().numpy(), model(x).detach().numpy())


def reached_margin(c: Linear, goal: Goal, x_adv: Tensor) -> Any:
    problem = pose(get("bim"), Victim(c.model), c.x, goal, 0.0, Key((0,)), None)
    return margin(problem, x_adv, x_adv, c.model(x_adv)).detach().numpy()


# The oracle against brute force.


def most(threat: str, slope: Any, low: Any, high: Any, radius: float, groups: Any) -> float:
    """max <slope, d> over low <= d <= high of size <= radius: linear programs, a dual in one variable for L2, all supports for L0."""
    n = len(slope)
    if threat == "linf":
        bounds = list(zip(np.maximum(low, -radius), np.minimum(high, radius), strict=True))
        return -float(linprog(-slope, bounds=bounds).fun)
    if threat == "l1":
        bounds = [(0, h) for h in high] + [(0, -b) for b in low]
        return -float(linprog(np.r_[-slope, slope], A_ub=np.ones((1, 2 * n)), b_ub=[radius], bounds=bounds).fun)
    if threat == "l2":

        def dual(log_price: float) -> float:
            price = np.exp(log_price)
            d = np.clip(slope / (2 * price), low, high)
            return float(slope @ d - price * (d @ d - radius**2))

        return float(minimize_scalar(dual, bounds=(-30, 10), method="bounded", options={"xatol": 1e-12}).fun)
    each = np.bincount(groups, np.maximum(slope * high, slope * low))
    return max(each[list(kept)].sum() for kept in combinations(range(len(each)), min(int(radius), len(each))))


def least(threat: str, slope: Any, low: Any, high: Any, gain: float, groups: Any) -> float:
    """The smallest size of low <= d <= high with <slope, d> >= gain; inf where there is none."""
    n = len(slope)
    if np.maximum(slope * high, slope * low).sum() < gain:
        return np.inf
    if threat == "linf":
        eye, ones = np.eye(n), np.ones((n, 1))
        rows = np.vstack([np.hstack([eye, -ones]), np.hstack([-eye, -ones]), np.r_[-slope, 0]])
        bounds = [*zip(low, high, strict=True), (0, None)]
        return float(linprog(np.r_[np.zeros(n), 1], A_ub=rows, b_ub=np.r_[np.zeros(2 * n), -gain], bounds=bounds).fun)
    if threat == "l1":
        bounds = [(0, h) for h in high] + [(0, -b) for b in low]
        return float(linprog(np.ones(2 * n), A_ub=np.r_[-slope, slope][None], b_ub=[-gain], bounds=bounds).fun)
    if threat == "l2":

        def dual(log_price: float) -> float:
            price = np.exp(log_price)
            d = np.clip(price * slope / 2, low, high)
            return -float(d @ d + price * (gain - slope @ d))

        return float(np.sqrt(-minimize_scalar(dual, bounds=(-30, 10), method="bounded", options={"xatol": 1e-12}).fun))
    return min(k for k in range(1, n + 1) if most(threat, slope, low, high, k, groups) >= gain)


@dataclass(frozen=True)
class Setting:
    """A linear model, inputs, and the room that they have, as the threat is told and as intervals of the change (N, F)."""

    linear: Linear
    victim: Victim
    room: Room
    low: Any
    high: Any

    def threat(self, name: str) -> Projects:
        threat = named(name)
        assert isinstance(threat, Linf | L2 | L1 | L0)
        return replace(threat, room=self.room)

    def groups(self, name: str) -> Any:
        x = self.linear.x
        pixels = x[0, 0].numel() if name == "l0" and x.ndim >= 4 else x[0].numel()
        return np.arange(x[0].numel()) % pixels


SETTINGS = {
    "image": 4,
    "vector": 2,
    "matrix": 3,
    "edges": 4,
    "mask": 4,
    "budget": 4,
    "own box": 4,
    "wide box": 4,
    "zeros and ties": 4,
    "one feature": 3,
}  # and how many classes


def setting(words: str, classes: int, n: int = 5) -> Setting:
    shape = {"vector": (7,), "matrix": (2, 4), "one feature": (1,)}.get(words, (2, 2, 2))
    c, random = case(classes, "l2", n, seed=len(words), shape=shape), rng(classes, len(words))
    x, mask, budget, box = c.x, None, None, (0.0, 1.0)
    if words == "edges":
        x = tensor(random.choice([0.0, 0.02, 0.5, 0.97, 1.0], x.shape), torch.float64)
    if words == "wide box":
        box = (-40.0, 50.0)
    if words == "mask":
        mask = tensor(random.random(shape) > 0.4)
    if words == "budget":
        budget = tensor(random.choice([0.0, 0.01, 0.3], shape), torch.float64)
    inner = (tensor(random.random(shape) * 0.3, torch.float64), torch.tensor(0.72, dtype=torch.float64)) if words == "own box" else None
    if words == "zeros and ties":
        with torch.no_grad():
            c.model[1].weight.copy_(tensor(random.choice([-1.0, 0.0, 1.0], c.weights.shape), torch.float64))
    c = replace(c, x=x, weights=c.model[1].weight.detach().numpy(), logits=c.model(x).detach().numpy())
    flat = x.flatten(1).numpy()
    bottom, top = (np.broadcast_to(np.asarray(b, float), shape).reshape(-1) for b in inner or box)
    change = np.full(flat.shape[1], np.inf) if budget is None else budget.reshape(-1).numpy()
    change = change if mask is None else np.where(mask.reshape(-1).numpy() > 0, change, 0.0)
    low, high = np.minimum(np.maximum(bottom - flat, -change), 0), np.maximum(np.minimum(top - flat, change), 0)
    return Setting(c, Victim(c.model, box=box), Room(box=inner, mask=mask, budget=budget), low, high)


def pairs_of(s: Setting, row: int) -> list[tuple[Any, float]]:
    """(slope, gap) of every other class."""
    c, label = s.linear, int(s.linear.labels[row])
    others = [k for k in range(c.logits.shape[1]) if k != label]
    return [(c.weights[k] - c.weights[label], c.logits[row, label] - c.logits[row, k]) for k in others]


@every_threat
@pytest.mark.parametrize(("words", "classes"), SETTINGS.items())
def test_the_worst_case_is_that_of_brute_force(threat: str, words: str, classes: int) -> None:
    s = setting(words, classes)
    for radius in (RADIUS[threat] / 2, RADIUS[threat] * 3):
        radii = radius * np.linspace(0.3, 1.0, len(s.linear.x)) if threat[:2] != "l0" else np.full(len(s.linear.x), radius)
        outcome = linear_worst_case(s.threat(threat))(s.victim, s.linear.x, s.linear.labels, torch.from_numpy(radii), drop=False)
        found = reached_margin(replace(s.linear, model=s.linear.model), Untargeted(s.linear.labels), outcome.x_adv)
        for row in range(len(found)):
            room = (s.low[row], s.high[row], radii[row], s.groups(threat))
            best = max(most(threat, slope, *room) - gap for slope, gap in pairs_of(s, row))
            assert found[row] == pytest.approx(best, abs=1e-7 if threat == "l2" else 1e-9), f"row {row}"
        assert bool((outcome.size <= torch.from_numpy(radii)).all())


@every_threat
@pytest.mark.parametrize(("words", "classes"), SETTINGS.items())
def test_the_smallest_change_is_that_of_brute_force(threat: str, words: str, classes: int) -> None:
    s = setting(words, classes)
    outcome = linear_smallest(threat=s.threat(threat))(s.victim, s.linear.x, s.linear.labels, torch.inf)
    for row in range(len(s.linear.x)):
        room = (s.low[row], s.high[row])
        best = min(least(threat, slope, *room, gap + 1e-13, s.groups(threat)) for slope, gap in pairs_of(s, row))
        assert bool(outcome.reached[row]) == bool(np.isfinite(best)), f"row {row}"
        if outcome.reached[row]:
            assert float(outcome.size[row]) == pytest.approx(best, rel=1e-6 if threat == "l2" else 1e-8, abs=1e-9)
    limit = float(outcome.size.median()) * (1 + 1e-9)
    within = linear_smallest(threat=s.threat(threat))(s.victim, s.linear.x, s.linear.labels, limit)
    assert torch.equal(within.reached, outcome.reached & (outcome.size <= limit))
    worst = linear_worst_case(s.threat(threat))(s.victim, s.linear.x, s.linear.labels, limit, drop=False)
    assert torch.allclose(within.score[~within.reached], worst.score[~within.reached], atol=1e-12)


@pytest.mark.parametrize("threat", ["linf", "l2", "l1"])
def test_without_a_box_it_is_the_dual_norm(threat: str) -> None:
    c, free = case(4, threat, 8), (-torch.inf, torch.inf)
    order = {"linf": 1, "l2": 2, "l1": np.inf}[threat]
    worst = linear_worst_case(named(threat))(Victim(c.model, box=free), c.x, c.labels, 3.0, drop=False)
    for row, label in enumerate(c.labels.tolist()):
        gaps = [c.logits[row, k] - c.logits[row, label] + 3 * np.linalg.norm(c.weights[k] - c.weights[label], order) for k in range(4)]
        assert float(worst.score[row]) == pytest.approx(max(gaps[:label] + gaps[label + 1 :]), rel=1e-9)
    near = linear_smallest(threat=named(threat))(Victim(c.model, box=free), c.x, c.labels, 1e3)
    assert np.allclose(near.size.numpy(), true_distances(c, c.labels, threat).min(1), rtol=1e-9)


@pytest.mark.parametrize("threat", ["l0", "l0f"])
def test_without_a_box_one_feature_is_enough(threat: str) -> None:
    c = case(4, threat, 8)
    for attack in (linear_worst_case(named(threat)), linear_smallest(threat=named(threat))):
        outcome = attack(Victim(c.model, box=(-torch.inf, torch.inf)), c.x, c.labels, 1.0)
        assert bool(outcome.reached.all())
        assert outcome.size.tolist() == [1.0] * 8
        assert bool(torch.isfinite(outcome.x_adv).all())


@every_threat
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_it_is_legal_and_reaches_what_can_be_reached_in_every_precision(threat: str, dtype: torch.dtype) -> None:
    c = case(4, threat, 40)
    x, radius = c.x.to(dtype), tensor(np.linspace(0, 2, 40), torch.float64) * RADIUS[threat]
    worst = linear_worst_case(named(threat))(c.model.to(torch.promote_types(dtype, torch.float32)), x, c.labels, radius, drop=False)
    check_legal(threat, x, worst.x_adv, radius)
    near = linear_smallest(threat=named(threat))(c.model, x, c.labels, radius)
    check_legal(threat, x, near.x_adv, radius)
    clear = worst.score.abs() > 0.05  # float16 moves in steps of 0.0005
    assert int(clear.sum()) >= 20
    assert torch.equal(near.reached[clear], worst.reached[clear])
    free = linear_smallest(threat=named(threat))(c.model, x, c.labels, torch.inf)
    exact = linear_smallest(threat=named(threat))(c.model.double(), c.x, c.labels, torch.inf)
    assert bool(free.reached.all())
    assert float((free.size / exact.size).median()) == pytest.approx(1, abs={torch.float16: 0.05, torch.float32: 1e-4}.get(dtype, 1e-12))


def affine_models() -> dict[str, Callable[[Tensor], Tensor]]:
    """The same shape in many ways, (N, 2, 4, 4) to 4 scores."""
    torch_net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, 4))
    weight = tensor(rng(5).standard_normal((4, 32)) * 2)
    for parameter in torch_net.parameters():
        parameter.data = tensor(rng(parameter.numel()).standard_normal(parameter.shape))
    torch_net[4].bias.data -= torch_net(torch.full((1, 2, 4, 4), 0.5)).detach()[0]
    norm = nn.Sequential(nn.BatchNorm2d(2, affine=False), nn.Flatten(), nn.Linear(32, 4)).eval()
    norm[0].running_mean.fill_(0.45)
    norm[0].running_var.fill_(0.05)
    norm[2].weight.data = weight.clone()
    return {
        "layers": torch_net,
        "normalized": norm,
        "function": lambda x: (x - 0.5).flatten(1) @ weight.T + 3.0,
        "double inside": lambda x: x.double().flatten(1) @ weight.double().T - 200.0,
        "constant": lambda x: torch.ones(len(x), 4).cumsum(1) + 0 * x.sum(),
    }


@every_threat
@pytest.mark.parametrize("name", affine_models())
def test_any_affine_module_is_read_off(name: str, threat: str) -> None:
    model = affine_models()[name]
    x = tensor(rng(6).random((12, 2, 4, 4)))
    with torch.no_grad():
        labels = model(x).argmax(1)
    worst = linear_worst_case(named(threat))(model, x, labels, RADIUS[threat], drop=False)
    best = get("pgd", threat=threat, steps=30, objective="margin")(model, x, labels, RADIUS[threat], drop=False)
    slack = 1e-4 * worst.score.abs().amax()
    assert bool((worst.score >= best.score - slack).all())
    near = linear_smallest(threat=named(threat))(model, x, labels, torch.inf)
    assert bool(near.reached.all()) == (name != "constant")
    assert torch.equal(near.reached & (near.size <= RADIUS[threat]), worst.reached)


@pytest.mark.parametrize("words", ["deep", "clipped", "slightly curved", "shattered", "random", "nan"])
def test_what_is_not_affine_is_refused_in_one_line(words: str) -> None:
    c = case(3, "linf", 8)
    c = replace(c, x=c.x[:1])  # one sample: the random point alone must tell
    models: dict[str, Callable[[Tensor], Tensor]] = {
        "deep": mlp(64, 3),
        "clipped": lambda x: c.model(x.clamp(0.25, 0.75)),
        "slightly curved": lambda x: c.model(x) + 1e-6 * x.flatten(1)[:, :3] ** 2,
        "shattered": lambda x: c.model(x + 1e-3 * (50 * x).round().detach()),
        "random": lambda x: c.model(x + 1e-3 * torch.rand_like(x)),
        "nan": lambda x: torch.where((x - c.x).abs().amax() > 0, torch.nan, c.model(x)),
    }

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = c.model

        def forward(self, x: Tensor) -> Tensor:
            return models[words](x)

    labels = Wrapped()(c.x).argmax(1)
    for attack in (linear_worst_case(), linear_smallest(threat=Linf())):
        with pytest.raises(BadInput, match="not affine") as caught:
            attack(Wrapped(), c.x, labels, 0.1)
        assert "\n" not in str(caught.value)
        assert "pgd" in str(caught.value)


def test_goals() -> None:
    c, two = case(4, "l2", 12), case(2, "l2", 12)
    plain = linear_smallest()(c.model, c.x, c.labels, torch.inf)
    aimed = linear_smallest()(c.model, c.x, Aimed(c.labels, (c.labels + 1) % 4), torch.inf)
    assert torch.equal(plain.x_adv, aimed.x_adv)
    hit = linear_smallest()(two.model, two.x, Targeted(1 - two.labels), torch.inf)
    assert torch.equal(hit.x_adv, linear_smallest()(two.model, two.x, two.labels, torch.inf).x_adv)
    for attack in (linear_worst_case(), linear_smallest()):
        with pytest.raises(BadInput, match="two") as caught:
            attack(c.model, c.x, Targeted((c.labels + 1) % 4), 0.1)
        assert "\n" not in str(caught.value)
        with pytest.raises(AccessDenied):
            attack(Victim(c.model, access=Access.SCORES), c.x, c.labels, 0.1)


@every_threat
def test_many_labels(threat: str) -> None:
    """The nearest watched decision, each a half-space of its own."""
    c = case(4, threat, 12)
    labels, watched = torch.from_numpy(c.logits > 0).long(), torch.tensor([True, False, True, True])
    worst = linear_worst_case(named(threat))(c.model, c.x, LabelsChanged(labels, watched), RADIUS[threat], drop=False)
    near = linear_smallest(threat=named(threat))(c.model, c.x, LabelsChanged(labels, watched), torch.inf)
    flat, groups = c.x.flatten(1).numpy(), setting("image", 4).groups(threat) if threat == "l0" else np.arange(c.weights.shape[1])
    for row in range(12):
        signs, room = np.where(labels[row] == 1, -1.0, 1.0), (-flat[row], 1 - flat[row])
        ways = [(signs[k] * c.weights[k], abs(c.logits[row, k])) for k in (0, 2, 3)]
        best = max(most(threat, slope, *room, RADIUS[threat], groups) - gap for slope, gap in ways)
        assert float(worst.score[row]) == pytest.approx(best, abs=1e-7)
        assert float(near.size[row]) == pytest.approx(min(least(threat, s, *room, gap, groups) for s, gap in ways), rel=1e-6)


def test_other_threats_are_refused() -> None:
    c, other = case(3, "linf", 4), next(t for t in (named("flow"),) if t.name == "flow")
    with pytest.raises(BadInput, match="flow"):
        linear_worst_case(other)(c.model, c.x, c.labels, 0.1)


@every_threat
def test_costs_wrong_samples_and_batches(threat: str) -> None:
    c = case(4, threat, 9)
    labels = torch.where(torch.arange(9) == 1, (c.labels + 1) % 4, c.labels)
    worst = linear_worst_case(named(threat))(c.model, c.x, labels, RADIUS[threat])
    assert worst.queries.tolist() == [4, 1, 3, 3, 3, 3, 3, 3, 3]
    assert worst.backwards.tolist() == [4, 0, 0, 0, 0, 0, 0, 0, 0]
    near = linear_smallest(threat=named(threat))(c.model, c.x, labels, torch.inf)
    assert sorted(near.queries.tolist())[:5] == [1, 3, 3, 3, 3]
    assert int(near.queries.max()) <= 7
    for outcome in (worst, near):
        assert torch.equal(outcome.x_adv[1], c.x[1])
        assert bool(outcome.reached[1])
    for attack, whole, radius in ((linear_worst_case, worst, RADIUS[threat]), (linear_smallest, near, torch.inf)):
        small = attack(threat=named(threat))(Victim(c.model, batch_size=2), c.x, labels, radius)
        assert torch.equal(small.reached, whole.reached)
        assert torch.allclose(small.x_adv, whole.x_adv, atol=1e-9)
        order = torch.tensor([8, 3, 3, 0])
        some = attack(threat=named(threat))(c.model, c.x[order], labels[order], radius)
        assert torch.allclose(some.x_adv, whole.x_adv[order], atol=1e-9)
    still = linear_worst_case(named(threat))(c.model, c.x, labels, 0.0)
    assert torch.equal(still.x_adv, c.x)


def test_it_is_known_by_name_but_not_run_on_any_model() -> None:
    assert get("linear_worst_case", threat="l1").name == "linear_worst_case"
    assert get("linear-smallest", threat="l0f", steps=3).name == "linear_smallest"
    assert not {"linear_worst_case", "linear_smallest"} & set(entries())


# Every attack against the oracle.

FLOOR = {  # share of the best gain, (two classes, ten classes); the default is 0.99, and 0.85 under L1 and L0 with ten classes
    "vertices l1": (0.99, 0.8),  # a run from a large ball may settle on another class than the nearest (see the test below)
    "fgsm l1": (0.8, 0.7),  # one step cannot leave a feature that has met its bound
    "mi_fgsm l1": (0.95, 0.85),
    "mi_fgsm l0": (0.93, 0.8),
    "mi_fgsm l0f": (0.95, 0.8),
    "pgd l0": (0.93, 0.8),  # PGD_0 keeps the pixels that it met first
    "apgd_dlr linf": (None, 0.4),  # climbs another loss
    "apgd_dlr l2": (None, 0.6),
    "apgd_dlr l1": (None, 0.4),
    "di_fgsm linf": (0.99, 0.95),
    "di_fgsm l2": (0.99, 0.95),
    "si_fgsm linf": (0.99, 0.8),  # follows the gradients of smaller copies, whose nearest class is another
    "si_fgsm l2": (0.99, 0.8),
    "vmi_fgsm l2": (0.99, 0.98),
    "ti_fgsm linf": (0.4, 0.3),  # smooths the gradient
    "ti_fgsm l2": (0.3, 0.3),
    "outside_in linf": (0.96, 0.95),  # comes from outside and ends as soon as it is in
    "outside_in l2": (0.96, 0.96),
    "outside_in l1": (0.81, 0.74),
    "physical linf": (0.8, 0.6),  # looks through a channel of print and photo
    "physical l2": (0.85, 0.7),
}
CEILING = {  # of the size in smallest sizes, (two classes, ten classes); the default is 1.01
    "cw_l2 l2": (1.01, 1.02),
    "cw_linf linf": (1.07, 1.08),
    "deepfool linf": (1.021, 1.021),  # its overshoot
    "deepfool l2": (1.021, 1.021),
    "ead l1": (1.02, 1.04),
    "lbfgs l2": (1.01, 1.35),  # follows the cross-entropy, to which every class adds
    "pdpgd linf": (1.02, 1.05),
    "pdpgd l2": (1.05, 1.08),
    "pdpgd l1": (1.05, 1.08),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "jsma": {"pairs": False},
    "apgd_t": {"steps": 40},
    "fab_t": {"steps": 20},
    "physical": {"draws": 3},
}


def gradient_attacks() -> list[tuple[str, str]]:
    known = [entry for entry in entries().values() if entry.access is Access.GRADIENT]
    return [(entry.name, threat) for entry in known for threat in entry.threats if threat in RADIUS]


def near_the_optimum(name: str, threat: str, classes: int, goal: Callable[[Tensor], Goal]) -> tuple[Outcome, Outcome, Any]:
    """(the attack's outcome, the oracle's, ratio of gains or of sizes)."""
    c = case(classes, threat, n=16, shape=(4, 4, 4))
    aim, options = goal(c.labels), dict(OPTIONS.get(name, {}))
    if "objective" in inspect.signature(entries()[name].recipe).parameters:
        options["objective"] = "margin"
    if entries()[name].kind == "smallest":
        found = get(name, threat=threat, **options)(c.model, c.x, aim, torch.inf)
        best = linear_smallest(threat=named(threat))(c.model, c.x, aim, torch.inf)
        return found, best, (found.size / best.size).numpy()
    found = get(name, threat=threat, **options)(c.model, c.x, aim, RADIUS[threat], drop=False)
    best = linear_worst_case(named(threat))(c.model, c.x, aim, RADIUS[threat], drop=False)
    before, reached, top = (reached_margin(c, aim, x) for x in (c.x, found.x_adv, best.x_adv))
    return found, best, (reached - before) / (top - before)


@pytest.mark.parametrize(("name", "threat"), gradient_attacks())
@pytest.mark.parametrize("classes", [2, 10])
def test_every_gradient_attack_comes_near_the_optimum(name: str, threat: str, classes: int) -> None:
    """With two classes the target is the other class, where the attack can aim at all."""
    entry, place = entries()[name], (2, 10).index(classes)
    floor = FLOOR.get(f"{name} {threat}", (0.99, 0.99 if threat in ("linf", "l2") else 0.85))[place]
    if floor is None or (name == "apgd_t" and classes == 2 and "objective" not in inspect.signature(entry.recipe).parameters):
        with pytest.raises(BadInput, match="3 classes"):
            near_the_optimum(name, threat, classes, Untargeted)
        return
    goal = (lambda labels: Targeted(1 - labels)) if classes == 2 and entry.targeted else Untargeted
    found, best, ratio = near_the_optimum(name, threat, classes, goal)
    if entry.kind == "smallest":
        assert bool(found.reached.all())
        assert ratio.min() >= 1 - 1e-9, "nearer than the boundary: the oracle is wrong"
        assert np.median(ratio) <= CEILING.get(f"{name} {threat}", (1.01, 1.01))[place], f"median {np.median(ratio):.4f}"
    else:
        assert ratio.max() <= 1 + 1e-9, "better than the optimum: the oracle or the ball is wrong"
        assert np.median(ratio) >= floor, f"median {np.median(ratio):.4f}"
        assert not bool((found.reached & ~best.reached).any())


def test_vertices_gains_all_there_is_at_the_class_that_it_settles_on() -> None:
    c = case(10, "l1", n=16, shape=(4, 4, 4))
    found = get("vertices", threat="l1")(c.model, c.x, Untargeted(c.labels), RADIUS["l1"], drop=False)
    rivals = c.model(found.x_adv).scatter(1, c.labels[:, None], -torch.inf).argmax(1)
    for x, x_adv, label, rival in zip(c.x.flatten(1).numpy(), found.x_adv.flatten(1).numpy(), c.labels, rivals, strict=True):
        slope = c.weights[rival] - c.weights[label]
        assert slope @ (x_adv - x) >= 0.99 * most("l1", slope, -x, 1 - x, RADIUS["l1"], None)


def best(c: Linear, goal: Goal, threat: str) -> Any:
    """(N,) the largest margin within the radius: the oracle's, or for a target among several classes that of `best_targeted`."""
    if isinstance(goal, Targeted) and c.logits.shape[1] > 2:
        return np.array([best_targeted(c, row, int(label), threat) for row, label in enumerate(goal.labels)])
    outcome = linear_worst_case(named(threat))(c.model, c.x, goal, RADIUS[threat], drop=False)
    return reached_margin(c, goal, outcome.x_adv)


def best_targeted(c: Linear, row: int, target: int, threat: str) -> float:
    """max over changes of min over the other classes: a linear program, a convex dual for L2, one program per support for L0."""
    x, w, f, r = c.x[row].flatten().numpy(), c.weights, c.logits[row], RADIUS[threat]
    rivals = [k for k in range(len(f)) if k != target]
    slopes, gaps = np.array([w[target] - w[k] for k in rivals]), np.array([f[target] - f[k] for k in rivals])
    if threat == "l2":
        dual = lambda m: m @ gaps + r * np.linalg.norm(m @ slopes)  # noqa: E731
        start = np.full(len(rivals), 1 / len(rivals))
        sums = {"type": "eq", "fun": lambda m: m.sum() - 1}
        return float(minimize(dual, start, bounds=[(0, 1)] * len(rivals), constraints=sums, options={"ftol": 1e-12}).fun)
    n = x.size

    def program(free: Any, budget: float | None) -> float:
        # Variables: positive part, negative part, t. Maximize t with t <= gap + slope * change.
        rows = np.hstack([-slopes, slopes, np.ones((len(rivals), 1))])
        bound = gaps
        if budget is not None:
            rows, bound = np.vstack([rows, np.r_[np.ones(2 * n), 0]]), np.r_[bound, budget]
        up = np.where(free, np.minimum(1 - x, r if threat == "linf" else 1), 0)
        down = np.where(free, np.minimum(x, r if threat == "linf" else 1), 0)
        limits = [(0, u) for u in up] + [(0, d) for d in down] + [(None, None)]
        return -float(linprog(np.r_[np.zeros(2 * n), -1], A_ub=rows, b_ub=bound, bounds=limits).fun)

    if threat in ("linf", "l1"):
        return program(np.ones(n, bool), r if threat == "l1" else None)
    groups = np.arange(n) % (n // SHAPE["l0"][0]) if threat == "l0" else np.arange(n)
    return max(program(np.isin(groups, kept), None) for kept in combinations(range(groups.max() + 1), int(r)))


def floor(threat: str, classes: int, targeted: bool) -> float:
    """0.99, but: PGD_0 keeps the pixels it met first; many classes have kinks where sparse and sign steps zigzag or settle on a rival."""
    if threat in ("l0", "l0f"):
        return 0.95 if classes == 2 else 0.75
    if classes == 2 or threat == "l2" or (threat == "linf" and not targeted):
        return 0.99
    return 0.9 if threat == "linf" else 0.85


ATTACKS = [(name, threat) for name in ("pgd", "apgd") for threat in entries()[name].threats if threat in RADIUS]


@pytest.mark.parametrize(("name", "threat"), ATTACKS)
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_optimum_is_met(name: str, threat: str, classes: int, targeted: bool) -> None:
    c = case(classes, threat, n=16 if threat in ("l0", "l0f") else 40)
    order = np.argsort(-c.logits, axis=1)
    labels = tensor(order[:, 1] if targeted else order[:, 0], torch.int64)
    goal = Targeted(labels) if targeted else Untargeted(labels)
    outcome = get(name, threat=threat, steps=50, objective="margin")(c.model, c.x, goal, RADIUS[threat], drop=False)
    found, before, top = reached_margin(c, goal, outcome.x_adv), reached_margin(c, goal, c.x), best(c, goal, threat)
    ratio = (found - before) / (top - before)
    assert ratio.max() <= 1 + 1e-6, "better than the optimum: the oracle or the ball is wrong"
    assert np.median(ratio) >= floor(threat, classes, targeted), f"median {np.median(ratio):.4f}, worst {ratio.min():.4f}"
    # What can be reached at all is reached, save next to the border.
    clear = torch.from_numpy(top > (0.3 if threat in ("l0", "l0f") else 0.02) * (top - before))
    hopeless = torch.from_numpy(top < 0)
    assert int(clear.sum()) >= 4
    assert float(outcome.reached[clear].double().mean()) >= (0.8 if threat in ("l0", "l0f") else 0.95)
    assert not bool(outcome.reached[hopeless].any())


@pytest.mark.parametrize("name", ["fgsm", "bim", "mi_fgsm", "pgd", "apgd"])
@pytest.mark.parametrize("objective", ["ce", "margin"])
def test_two_classes_under_linf_are_exact(name: str, objective: str) -> None:
    c = case(2, "linf")
    labels = tensor(c.logits.argmax(1), torch.int64)
    for goal in (Untargeted(labels), Targeted(1 - labels)):
        outcome = get(name, threat="linf", objective=objective)(c.model, c.x, goal, RADIUS["linf"], drop=False)
        worst = linear_worst_case()(c.model, c.x, goal, RADIUS["linf"], drop=False)
        assert torch.allclose(outcome.x_adv, worst.x_adv, rtol=0, atol=1e-12)
        assert torch.allclose(outcome.score, worst.score, atol=1e-9) or objective == "ce"


@pytest.mark.parametrize("classes", [3, 10])
def test_apgd_t_meets_the_optimum(classes: int) -> None:
    for threat in entries()["apgd_t"].threats:
        c = case(classes, threat)
        labels = tensor(c.logits.argmax(1), torch.int64)
        outcome = get("apgd_t", threat=threat, steps=40)(c.model, c.x, labels, RADIUS[threat])
        top = best(c, Untargeted(labels), threat)
        away = np.abs(top) > 0.01
        assert np.array_equal(outcome.reached.numpy()[away], (top > 0)[away]), threat


def true_distances(c: Linear, labels: Tensor, threat: str) -> Any:
    """(N, C) distance to the boundary with every class, +inf for the label itself; no box."""
    order = {"linf": 1, "l2": 2, "l1": np.inf}[threat]
    rows = np.arange(len(c.x))
    slopes = c.weights[None] - c.weights[labels.numpy()][:, None]
    dual = np.linalg.norm(slopes, order, axis=2)
    far = (c.logits[rows, labels.numpy()][:, None] - c.logits) / np.where(dual > 0, dual, 1)
    far[rows, labels.numpy()] = np.inf
    return far


def exact(threat: str) -> Projects:
    """With the dual vector itself: the registered L1 spreads it, so its MALT distances are means over 5 % of the features."""
    inside = named(threat).within((0.0, 1.0))
    return replace(inside, share=0.0) if isinstance(inside, L1) else inside


@pytest.mark.parametrize("threat", ["linf", "l2", "l1"])
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_malt_orders_by_true_distance(threat: str, classes: int) -> None:
    c = case(classes, threat, n=16 if threat in ("l0", "l0f") else 40)
    labels = tensor(c.logits.argmax(1), torch.int64)
    problem = pose(get("bim", threat=threat), Victim(c.model), c.x, Untargeted(labels), 0.1, Key((0,)), None)
    count = min(3, classes - 1)
    arguments = (problem.victim, c.x, labels, problem.clean, exact(threat), count, problem.tally)
    order = malt(*arguments).numpy()
    logits = by_logit(*arguments).numpy()
    assert order.shape == logits.shape == (len(c.x), count)
    far, candidates = true_distances(c, labels, threat), min(count + 3, classes - 1)
    for row in range(len(c.x)):
        assert int(labels[row]) not in order[row]
        known = np.argsort(-np.where(np.arange(classes) == int(labels[row]), -np.inf, c.logits[row]), kind="stable")[:candidates]
        assert logits[row].tolist() == known[:count].tolist()
        assert order[row].tolist() == sorted(known, key=lambda k: far[row, k])[:count]


def test_malt_costs_what_it_says() -> None:
    c = case(10, "linf")
    labels = tensor(c.logits.argmax(1), torch.int64)
    problem = pose(get("bim"), Victim(c.model, batch_size=7), c.x, Untargeted(labels), 0.1, Key((0,)), c.model(c.x))
    malt(problem.victim, c.x, labels, problem.clean, problem.threat, 4, problem.tally)
    assert problem.tally.forwards.tolist() == [1] * len(c.x)
    assert problem.tally.backwards.tolist() == [4 + 3 + 1] * len(c.x)


@pytest.mark.parametrize("threat", ["linf", "l2", "l1"])
@pytest.mark.parametrize("attack", ["pgd", "apgd"])
def test_smallest_radius_is_the_distance(threat: str, attack: str) -> None:
    c = case(2, threat, n=30)
    labels = tensor(c.logits.argmax(1), torch.int64)
    far = true_distances(c, labels, threat)[np.arange(30), 1 - labels.numpy()]
    inner = get(attack, threat=threat, steps=40, objective="margin")
    for radius in (None, RADIUS[threat] * 4):
        outcome = SmallestRadius(inner, rounds=14)(c.model, c.x, labels, radius)
        near = (far < SMALL[threat]) & (far > SMALL[threat] / 20)
        assert near.sum() >= 5
        assert bool(outcome.reached[torch.from_numpy(near)].all())
        ratio = outcome.size.numpy()[near] / far[near]
        assert ratio.min() >= 1 - 1e-9, "nearer than the boundary"
        assert np.median(ratio) <= (1.01 if threat != "l1" else 1.4), f"median {np.median(ratio):.4f}"
        assert np.allclose(outcome.size.numpy(), measured(threat, c.x, outcome.x_adv).numpy(), rtol=1e-12)


def test_smallest_radius_never_beats_its_limit() -> None:
    c = case(3, "l2")
    labels = tensor(c.logits.argmax(1), torch.int64)
    far = true_distances(c, labels, "l2").min(1)
    limit = float(np.median(far))
    outcome = SmallestRadius(get("pgd", threat="l2", steps=20, objective="margin"), rounds=6)(c.model, c.x, labels, limit)
    assert bool((outcome.size <= limit).all())
    away = np.abs(far / limit - 1) > 0.02
    assert np.array_equal(outcome.reached.numpy()[away], (far < limit)[away])
    wrong = SmallestRadius(get("pgd", threat="l2", steps=2))(c.model, c.x, (labels + 1) % 3, limit)
    assert bool(wrong.reached.all())
    assert torch.equal(wrong.x_adv, c.x)
    assert wrong.queries.tolist() == [1] * len(c.x)
