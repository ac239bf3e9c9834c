"""Label-only attacks: exact optima on linear models, exact ledgers, the points that are asked, starts, masks, peers' distances."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lawkit import bench, check_legal, check_replay, check_same, posed, rng, rows_of, tensor
from torch import Tensor, nn

import epsball as eb
from epsball.attacks import get
from epsball.attacks.decision import Found, bisect, inward_path, look, nearer, ray, start
from epsball.attacks.hop_skip_jump import normal
from epsball.attacks.opt_attack import crossing
from epsball.attacks.rays import shorter
from epsball.attacks.simba import cosines
from epsball.attacks.surfree import Turns, waves
from epsball.core import Access, Targeted, Victim
from epsball.core.rule import normalized
from epsball.errors import BadInput
from epsball.models.digits import load
from epsball.models.sklearn import Estimator
from epsball.threats import L2, Linf, named
from epsball.threats.lp import Room

ATTACKS = [("hop_skip_jump", "l2"), ("hop_skip_jump", "linf"), ("rays", "linf"), ("opt_attack", "l2"), ("sign_opt", "l2")]
ATTACKS += [("boundary", "l2"), ("surfree", "l2")]
every_attack = pytest.mark.parametrize(("name", "norm"), ATTACKS)


class Plane(nn.Module):
    """Two classes on both sides of a plane through the middle of the box; class 1 where w.x + b > 0."""

    def __init__(self, features: int = 20) -> None:
        super().__init__()
        self.w = nn.Parameter(tensor(rng(5).standard_normal(features), torch.float64))
        self.b = nn.Parameter(-0.5 * self.w.detach().sum())
        self.requires_grad_(False)

    def value(self, x: Tensor) -> Tensor:
        return x.double().flatten(1) @ self.w + self.b

    def forward(self, x: Tensor) -> Tensor:
        value = self.value(x)
        return torch.stack([-value, value], 1)


def near_the_plane(n: int = 6, features: int = 20) -> tuple[Plane, Tensor, Tensor]:
    model = Plane(features)
    x = tensor(0.4 + 0.2 * rng(6).random((n, features)), torch.float64)
    return model, x, model(x).argmax(1)


class Asked(nn.Module):
    """Keeps every input that it answers."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return self.net(x)

    @property
    def rows(self) -> Tensor:
        return torch.cat(self.seen)


class NoWayBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError("backward was called")


# Exact optima.


@pytest.mark.parametrize(
    ("name", "norm", "steps", "within"),
    [
        ("hop_skip_jump", "l2", 2000, 1.03),
        ("hop_skip_jump", "linf", 2000, 1.1),
        ("rays", "linf", 500, 1.01),
        ("opt_attack", "l2", 800, 1.1),
        ("sign_opt", "l2", 1000, 1.01),
        ("boundary", "l2", 800, 1.05),
        ("surfree", "l2", 800, 1.05),
    ],
)
def test_distance_to_a_plane(name: str, norm: str, steps: int, within: float) -> None:
    """|f| / ||w||_2 under L2, |f| / ||w||_1 under Linf."""
    model, x, labels = near_the_plane()
    exact = model.value(x).abs() / torch.linalg.vector_norm(model.w, 2 if norm == "l2" else 1)
    outcome = get(name, threat=norm, steps=steps)(Victim(model, access=Access.LABELS), x, labels, torch.inf)
    assert bool(outcome.reached.all())
    ratio = outcome.size / exact
    assert bool((ratio >= 1 - 1e-9).all())
    assert float(ratio.max()) < within


# Books.


@every_attack
@pytest.mark.parametrize("steps", [1, 7, 80])
def test_the_budget_is_kept_to_the_query_and_no_batch_matters(name: str, norm: str, steps: int) -> None:
    b = bench(4, n=5, wrong=1)
    counting = Asked(b.model)
    attack = get(name, threat=norm, steps=steps)
    whole = attack(Victim(counting, access=Access.LABELS), b.x, b.labels, torch.inf)
    assert int(whole.queries.sum()) == len(counting.rows)
    assert int(whole.backwards.sum()) == 0
    assert int(whole.queries.max()) <= steps + 2  # the clean answer and the last judgment
    if name != "hop_skip_jump":  # which stops where too little is left for one more step
        assert whole.queries[1:].tolist() == [steps + 2] * 4
    for row in range(5):
        one = slice(row, row + 1)
        check_same(rows_of(whole, torch.tensor([row])), attack(b.model, b.x[one], b.labels[one], torch.inf))
    order = torch.tensor([3, 0, 4, 3, 1])
    check_same(rows_of(whole, order), attack(Victim(b.model, batch_size=3), b.x[order], b.labels[order], torch.inf))


@every_attack
def test_scores_do_not_matter_and_nothing_goes_back(name: str, norm: str) -> None:
    """The same to the bit on one-hot answers of a model whose backward raises."""
    b = bench(4, n=4, wrong=0)
    hard = lambda x: nn.functional.one_hot(b.model(NoWayBack.apply(x).double()).argmax(1), 4).double()  # noqa: E731
    attack = get(name, threat=norm, steps=120)
    soft, labels_only = attack(b.model, b.x, b.labels, torch.inf), attack(Victim(hard, access=Access.LABELS), b.x, b.labels, torch.inf)
    assert torch.equal(soft.x_adv, labels_only.x_adv)
    assert torch.equal(soft.queries, labels_only.queries)
    assert bool(soft.reached.all())


class Predicts:
    """A classifier as scikit-learn has them, of which only the predicted class can be had."""

    def __init__(self, net: nn.Module, classes: int) -> None:
        self.net, self.classes_, self.rows = net, list(range(classes)), 0

    def predict(self, rows: Any) -> Any:
        self.rows += len(rows)
        return self.net(tensor(rows).double()).argmax(1).numpy()

    def predict_proba(self, rows: Any) -> Any:
        raise AssertionError("scores were asked for")

    decision_function = predict_proba


@pytest.mark.parametrize(
    ("name", "threat"),
    [(name, threat) for name, e in eb.attacks.entries().items() if e.access is Access.LABELS for threat in e.threats[:2]],
)
@pytest.mark.parametrize("targeted", [False, True])
def test_every_label_only_attack_works_where_scores_raise(name: str, threat: str, targeted: bool) -> None:
    """All that are registered so, against an estimator whose scores raise and which has nothing to go back through."""
    b = bench(4, n=5, wrong=1, threat=threat)
    shy = Predicts(b.model, 4)
    estimator = Estimator(shy)
    estimator.method = "predict"
    attack = get(name, threat=threat, **({"budget": 60} if name == "blackbox" else {"steps": 60} if name != "noise" else {}))
    outcome = attack(Victim(estimator, access=Access.LABELS), b.x, b.goal(targeted), 1.0)
    assert int(outcome.queries.sum()) == shy.rows
    assert int(outcome.backwards.sum()) == 0
    again = attack(Victim(b.model, access=Access.LABELS), b.x, b.goal(targeted), 1.0)
    assert torch.equal(outcome.reached, again.reached)
    assert torch.equal(outcome.x_adv, again.x_adv)


@every_attack
def test_more_queries_never_hurt_and_successes_beyond_the_radius_do_not_count(name: str, norm: str) -> None:
    b = bench(4, n=6, wrong=0)
    sizes = [
        get(name, threat=norm, steps=steps, draws=30) if name == "hop_skip_jump" else get(name, threat=norm, steps=steps)
        for steps in (40, 160)
    ]
    few, many = (attack(b.model, b.x, b.labels, torch.inf) for attack in sizes)
    assert float(many.size.median()) < float(few.size.median())
    limit = float(many.size.median())
    cut = sizes[1](b.model, b.x, b.labels, limit)
    assert torch.equal(cut.reached, many.size <= limit)
    assert torch.equal(cut.x_adv[~cut.reached], b.x[~cut.reached])
    check_replay(norm, b.model, b.x, b.labels, cut)


# Starts.


@every_attack
def test_no_start_within_the_budget_is_a_failure(name: str, norm: str) -> None:
    b = bench(4, n=3, wrong=0)
    constant = lambda x: nn.functional.one_hot(torch.zeros(len(x), dtype=torch.int64), 4).double()  # noqa: E731
    outcome = get(name, threat=norm, steps=25)(constant, b.x, torch.zeros(3, dtype=torch.int64), torch.inf)
    assert torch.equal(outcome.x_adv, b.x)
    assert not bool(outcome.reached.any())
    assert outcome.queries.tolist() == [27] * 3


def island(x: Tensor) -> Tensor:
    """Class 1 only within 0.3 of the point (0.9, ..., 0.9): noise never gets there."""
    inside = (x - 0.9).flatten(1).double().norm(dim=1) < 0.3
    return torch.stack([~inside, inside], 1).double()


@pytest.mark.parametrize(("name", "norm"), [pair for pair in ATTACKS if pair[0] != "rays"])
def test_a_given_start_of_the_target_class(name: str, norm: str) -> None:
    x, target = 0.2 + tensor(rng(1).random((3, 24))) / 10, Targeted(torch.ones(3, dtype=torch.int64))
    starts = torch.stack([torch.zeros(24), torch.full((24,), 0.88)])
    blind = get(name, threat=norm, steps=60)(island, x, target, torch.inf)
    assert not bool(blind.reached.any())
    led = get(name, threat=norm, steps=60, starts=starts)(island, x, target, torch.inf)
    assert bool(led.reached.all())
    check_replay(norm, island, x, target, led)
    assert bool((led.size < named(norm).size(x, starts[1:].expand(3, -1))).all())


def test_rays_takes_the_signs_of_a_given_start() -> None:
    """The target's class holds one corner of the box and what is near it; flips of whole blocks do not get there in 20 questions."""
    x, target, corner = torch.full((2, 24), 0.4), Targeted(torch.ones(2, dtype=torch.int64)), (rng(2).random(24) > 0.5).astype(np.float32)
    model = lambda z: (z - tensor(corner)).abs().amax(1)[:, None].double() * tensor([1.0, 0.0]) + tensor([0.0, 0.3])  # noqa: E731
    assert not bool(get("rays", steps=20)(model, x, target, torch.inf).reached.any())
    led = get("rays", steps=20, starts=tensor(0.2 + 0.6 * corner)[None])(model, x, target, torch.inf)
    assert bool(led.reached.all())
    assert torch.allclose(led.size, torch.full((2,), 0.3, dtype=torch.float64), atol=1e-3)  # the features that go up from 0.4 to 0.7


def test_starts_are_tried_nearest_first_and_only_as_long_as_needed() -> None:
    x = tensor([[0.0, 0.0], [1.0, 1.0]])
    points = tensor([[0.9, 0.8], [0.2, 0.1], [0.5, 0.6]])
    seen = Asked(lambda z: torch.stack([z.sum(1) * 0, (z[:, 0] > 0.4).float() - 0.5], 1))
    problem = posed(
        Victim(seen), x, Targeted(torch.ones(2, dtype=torch.int64)), threat="l2", radius=2.0, clean=tensor([[0.0, -1], [0, -1]])
    )
    found = start(problem, Found.nothing(problem, 5), points)
    assert torch.equal(seen.seen[0], points[[1, 0]])
    assert torch.equal(seen.seen[1], points[[2]])  # the second sample has its start already
    assert problem.tally.forwards.tolist() == [2, 1]
    assert torch.equal(found.z, points[[2, 0]])
    with pytest.raises(BadInput, match="starts"):
        start(problem, Found.nothing(problem, 5), torch.zeros(3, 4))


# Where they may go.


@every_attack
def test_masks_budgets_and_other_boxes(name: str, norm: str) -> None:
    model, x, labels = near_the_plane()
    far = ((x - 0.5) * 8 + 1.0).float()  # the same problem in the box [-3, 5]
    seen = Asked(lambda z: model((z - 1.0) / 8 + 0.5))
    mask, budget = torch.arange(20) % 2 == 0, torch.full((20,), 3.0)
    threat = (L2 if norm == "l2" else Linf)(Room(mask=mask, budget=budget))
    outcome = get(name, threat=threat, steps=200)(Victim(seen, box=(-3.0, 5.0), access=Access.LABELS), far, labels, torch.inf)
    assert bool(outcome.reached.any())
    assert torch.equal(outcome.x_adv[:, ~mask], far[:, ~mask])
    check_legal(norm, far, outcome.x_adv, torch.inf, (-3.0, 5.0))
    asked = seen.rows
    assert bool((asked >= -3).all())
    assert bool((asked <= 5).all())
    change = (asked[:, None] - far[None]).abs()
    own = change[:, :, ~mask].amax(2).argmin(1)  # whose question it was
    change = change[torch.arange(len(asked)), own]
    assert bool((change[:, ~mask] == 0).all()), "a masked feature was touched in a question"
    assert bool((change <= 3 + 1e-6).all())


@every_attack
def test_a_box_without_an_end_is_searched_within_the_radius(name: str, norm: str) -> None:
    model, x, labels = near_the_plane(n=3)
    outcome = get(name, threat=norm, steps=150)(Victim(model, box=(-math.inf, math.inf)), x, labels, 3.0)
    assert bool(outcome.reached.all())


# Parts.


def test_bisection_costs_what_it_says_and_ends_above_the_boundary() -> None:
    model, x, labels = near_the_plane(n=4)
    problem = posed(model, x, labels, threat="l2", radius=9.0, clean=model(x))
    toward = -(labels * 2 - 1)[:, None] * normalized(model.w[None], 2)
    exact = model.value(x).abs() / model.w.norm()
    tolerance, want = torch.tensor([1e-1, 1e-2, 1e-4, 1e-4], dtype=torch.float64), torch.tensor([True, True, True, False])
    zero = torch.zeros(4, dtype=torch.float64)
    reach, found = bisect(problem, Found.nothing(problem, 12), ray(problem, toward), zero, zero + 0.3, tolerance, want)
    assert problem.tally.forwards.tolist() == [2, 5, 12, 0]
    assert bool((reach >= exact)[:3].all())
    assert bool((reach - exact < tolerance)[:3].all())
    assert torch.allclose(found.size[:3], reach[:3], atol=1e-12)
    assert float(found.size[3]) == math.inf


def test_bisection_ends_with_the_budget() -> None:
    model, x, labels = near_the_plane(n=2)
    problem = posed(model, x, labels, threat="l2", radius=9.0, clean=model(x))
    zero = torch.zeros(2, dtype=torch.float64)
    bisect(problem, Found.nothing(problem, 3), ray(problem, torch.zeros_like(x)), zero, zero + 1, zero, zero == 0)
    assert problem.tally.forwards.tolist() == [3, 3]


def test_nearer_asks_once_where_there_is_nothing_to_gain() -> None:
    model, x, labels = near_the_plane(n=2)
    problem = posed(model, x, labels, threat="l2", radius=9.0, clean=model(x))
    toward = -(labels * 2 - 1)[:, None] * normalized(model.w[None], 2)
    exact = model.value(x).abs() / model.w.norm()
    present = exact * torch.tensor([0.99, 1.05])
    yes = torch.ones(2, dtype=torch.bool)
    hit, radius, _ = nearer(problem, Found.nothing(problem, 50), ray(problem, toward), present, 1e-3 * present, yes)
    assert hit.tolist() == [False, True]
    assert problem.tally.forwards.tolist() == [1, 1 + 1 + 7]
    assert float(radius[0]) == float(present[0])
    assert 0 <= float(radius[1] - exact[1]) < 1e-3 * float(present[1])


def test_crossing_is_found_on_both_sides_and_given_up_far_away() -> None:
    model, x, labels = near_the_plane(n=4)
    problem = posed(model, x, labels, threat="l2", radius=9.0, clean=model(x))
    toward = -(labels * 2 - 1)[:, None] * normalized(model.w[None], 2)
    exact = model.value(x).abs() / model.w.norm()
    around = exact * torch.tensor([0.7, 1.004, 3.0, 0.1])
    tolerance, yes = torch.full((4,), 1e-6, dtype=torch.float64), torch.ones(4, dtype=torch.bool)
    known, distance, _ = crossing(problem, Found.nothing(problem, 100), ray(problem, toward), around, tolerance, yes)
    assert known.tolist() == [True, True, True, False]
    assert torch.allclose(distance[:3], exact[:3], atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_normal_of_a_plane(norm: str) -> None:
    """With n draws in d dimensions the cosine is near sqrt(2 n / (pi d + 2 n)); questions are counted one by one."""
    model, x, labels = near_the_plane(n=3)
    problem = posed(model, x, labels, threat=norm, radius=9.0, clean=model(x))
    side = model.value(x) / model.w.norm().square()
    there = x - side[:, None] * model.w
    delta, counts = torch.full((3,), 0.05, dtype=torch.float64), torch.tensor([400, 400, 0])
    gradient, _ = normal(problem, Found.nothing(problem, 395), there, delta, counts, problem.key)
    assert problem.tally.forwards.tolist() == [395, 395, 0]
    expected = math.sqrt(2 * 395 / (math.pi * 20 + 2 * 395))
    cosine = gradient @ normalized(model.w[None], 2)[0] * -(labels * 2 - 1)
    assert float((cosine[:2] - expected).abs().max()) < 0.03
    assert float(gradient[2].abs().max()) == 0


def test_rays_flips_halves_of_halves() -> None:
    """On a model that is never fooled every question is a corner of the box: all up, all down, then one block flipped."""
    seen = Asked(lambda x: torch.stack([x[:, 0] * 0 + 1, x[:, 0] * 0], 1))
    get("rays", steps=9)(seen, torch.full((1, 6), 0.3), torch.tensor([0]), torch.inf)
    flips = [[], range(6), range(3), range(3, 6), range(2), range(2, 4), range(4, 6), [0], [1]]
    assert torch.equal(seen.rows[1:10], torch.stack([torch.tensor([0.0 if i in flip else 1.0 for i in range(6)]) for flip in flips]))


def test_a_kept_flip_of_rays_asks_near_the_radius_first_and_ends_just_above_the_boundary() -> None:
    model, x, labels = near_the_plane(n=3)
    problem = posed(model, x, labels, threat="linf", radius=9.0, clean=model(x))
    toward = -(labels * 2 - 1)[:, None] * model.w.sign()[None]
    exact = model.value(x).abs() / model.w.abs().sum()
    present = exact * torch.tensor([0.99, 1.0005, 1.05])
    hit, low, radius, _ = shorter(problem, Found.nothing(problem, 50), ray(problem, toward), present)
    assert hit.tolist() == [False, True, True]
    assert problem.tally.forwards.tolist() == [1, 1 + 3 + 6, 1 + 2 + 5]  # 0.9 and 0.99 fail and 0.999 too; or 0.99 does not
    assert float(radius[0]) == float(present[0])
    assert bool((low < exact)[1:].all())
    assert bool((exact <= radius)[1:].all())
    assert bool((radius - low <= 0.03 * (0.101 * present))[1:].all())


def test_the_last_queries_of_rays_make_its_radius_exact() -> None:
    model, x, labels = near_the_plane(features=2)
    exact = model.value(x).abs() / model.w.abs().sum()
    size = get("rays", steps=60)(Victim(model, access=Access.LABELS), x, labels, torch.inf).size
    assert bool((size >= exact - 1e-12).all())
    assert bool((size <= 1.001 * exact).all())


def test_directions_of_surfree_are_orthogonal_and_low_at_first() -> None:
    b = bench(4, n=2, wrong=0)
    x = tensor(rng(3).random((2, 1, 8, 8)))
    problem = posed(
        lambda z: b.model(z.flatten(1)[:, :18].reshape(-1, 2, 3, 3).double()), x, torch.zeros(2, dtype=torch.int64), threat="l2"
    )
    search = Turns(99, 0.5, 0.95, 1, 300, 5, 0, None)
    state, u = search.init(problem, 99), normalized(tensor(rng(4).standard_normal(x.shape), torch.float64), 2)
    for number in range(8):
        v, past = search._direction(problem, replace(state, number=number), u)
        state = replace(state, past=past)
        assert past.shape[1] == min(number + 1, 5)
        assert float((v * u).flatten(1).sum(1).abs().max()) < 1e-6
        gram = past.double() @ past.double().transpose(1, 2)
        assert torch.allclose(gram, torch.eye(len(gram[0]), dtype=torch.float64).expand_as(gram), atol=1e-5)
    low = cosines(8)[:4] @ waves(problem, 0, 300)[:, 0] @ cosines(8)[:4].T
    early = low.square().sum((1, 2)) / waves(problem, 0, 300).square().sum((1, 2, 3))
    late = (cosines(8)[:4] @ waves(problem, 10**6, 300)[:, 0] @ cosines(8)[:4].T).square().sum((1, 2))
    late = late / waves(problem, 10**6, 300).square().sum((1, 2, 3))
    assert bool((early > 0.8).all())
    assert bool((late < 0.5).all())


def test_paths_end_where_they_should() -> None:
    b = bench(4, n=3, wrong=0)
    for norm in ("l2", "linf"):
        problem = posed(b.model, b.x, b.labels, threat=norm, radius=9.0)
        far = 1 - b.x
        path, one = inward_path(problem, far), torch.ones(3, dtype=torch.float64)
        assert torch.equal(path(one), far)
        assert torch.equal(path(0 * one), b.x)
        half = named(norm).size(b.x, path(one / 2))
        assert torch.allclose(half, named(norm).size(b.x, far) / 2, rtol=1e-6)


def test_an_answer_that_is_no_number_is_no_success() -> None:
    b = bench(4, n=3, wrong=0)
    problem = posed(lambda x: b.model(x.double()) * torch.nan, b.x, b.labels, threat="l2", radius=9.0, clean=b.model(b.x.double()).detach())
    asked, hit, found = look(problem, Found.nothing(problem, 2), 1 - b.x, torch.ones(3, dtype=torch.bool))
    assert bool(asked.all())
    assert not bool(hit.any())
    assert not bool(found.some.any())


# Against others.

PEERS = {
    # mean distance of the first 20 correctly classified of 24 digits (seed 1) after as many queries, clean answer included
    ("rays", "linf", 150): 0.1020,  # uclaml/RayS
    ("hop_skip_jump", "l2", 500): 0.6262,  # foolbox 3.3.4, seed 0, every successful question counts
    ("hop_skip_jump", "linf", 500): 0.1450,
    ("boundary", "l2", 500): 1.9707,
    ("surfree", "l2", 500): 0.6262,  # foolbox's HopSkipJump again
}


@pytest.mark.parametrize(("name", "norm", "steps"), list(PEERS))
def test_digits_are_no_farther_than_peers_find_them(name: str, norm: str, steps: int) -> None:
    net, data = load("digits-standard"), eb.load_data("digits", n=24, seed=1)
    x, labels = torch.as_tensor(np.asarray(data.x)), torch.as_tensor(np.asarray(data.y)).long()
    right = net(x).argmax(1) == labels
    outcome = get(name, threat=norm, steps=steps - 2)(Victim(net, access=Access.LABELS), x[right][:20], labels[right][:20], torch.inf)
    assert bool(outcome.reached.all())
    assert int(outcome.queries.max()) <= steps
    assert float(outcome.size.mean()) < PEERS[name, norm, steps]


# The door.


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("hop_skip_jump", {"draws": 0}, "draws"),
        ("hop_skip_jump", {"gamma": 0.0}, "gamma"),
        ("hop_skip_jump", {"tries": -1}, "tries"),
        ("hop_skip_jump", {"threat": named("l1")}, "l1"),
        ("rays", {"tolerance": 0.0}, "tolerance"),
        ("rays", {"steps": -1}, "steps"),
        ("rays", {"threat": "l2"}, "l2"),
        ("opt_attack", {"beta": 0.0}, "beta"),
        ("opt_attack", {"draws": 0}, "draws"),
        ("sign_opt", {"directions": -1}, "directions"),
        ("sign_opt", {"step": -0.1}, "step"),
        ("boundary", {"toward": 1.0}, "toward"),
        ("boundary", {"sideways": 0.0}, "sideways"),
        ("boundary", {"tries": -1}, "tries"),
        ("surfree", {"tries": -1}, "tries"),
        ("surfree", {"angle": 90.0}, "angle"),
        ("surfree", {"rho": 0.0}, "rho"),
        ("surfree", {"signs": 0}, "signs"),
        ("surfree", {"even": -1}, "even"),
        ("surfree", {"memory": -1}, "memory"),
        ("surfree", {"threat": "linf"}, "linf"),
    ],
)
def test_bad_options_are_refused_in_one_line(name: str, options: dict[str, Any], word: str) -> None:
    with pytest.raises(BadInput, match=word) as caught:
        get(name, **options)
    assert "\n" not in str(caught.value)
