"""The black-box recipe: exact budgets, what each kind of victim is asked, samples left alone once broken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import epsball as eb
from epsball.attacks import di_fgsm, ensemble, hop_skip_jump, mi_fgsm, rays, transferred
from epsball.attacks.blackbox import ENOUGH, NARROW, first_success, searches
from epsball.core import Access, Projects, Tally, Victim
from epsball.errors import BadInput
from epsball.models.digits import load
from epsball.threats import L0, L1, L2, Linf, Room, named

EVERY = ("linf", "l2", "l1", "l0", "l0f", "rigid", "patch", "flow")
RADII = {"linf": 0.08, "l2": 0.4, "l1": 1.0, "l0": 3.0, "l0f": 3.0, "rigid": 0.3, "patch": 2.0, "flow": 0.4}
BOTH = pytest.mark.parametrize("access", [Access.LABELS, Access.SCORES])


class Rows(nn.Module):
    """Counts, per sample, the rows that are asked; the sample is known by a pixel that no threat may change.

    Answers without a gradient, so that whoever wants one fails.
    """

    def __init__(self, net: nn.Module, n: int) -> None:
        super().__init__()
        self.net, self.asked = net, torch.zeros(n, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        marks = (x[:, 0, 0, 0] * 1000).round().long()
        self.asked.index_add_(0, marks, torch.ones_like(marks))
        with torch.no_grad():
            return self.net(x)


def marked(n: int) -> tuple[Tensor, Tensor]:
    data = eb.load_data("digits", n=n)
    x = data.x.clone()
    x[:, 0, 0, 0] = torch.arange(n) / 1000
    return x, load("digits-standard")(x).argmax(1)


def shielded(threat: str) -> Projects:
    """The threat, with the pixel that marks samples out of its reach."""
    mask = torch.ones(1, 8, 8)
    mask[0, 0, 0] = 0
    room = Room(mask=mask)
    return {"linf": Linf(room), "l2": L2(room), "l1": L1(room), "l0": L0(room), "l0f": L0(room, features=True)}[threat]


@BOTH
@pytest.mark.parametrize("threat", ["linf", "l2", "l1", "l0", "l0f"])
@pytest.mark.parametrize("budget", [2, 3, 7, 60, 201])
def test_no_sample_is_asked_more_often_than_the_budget(threat: str, budget: int, access: Access) -> None:
    """Counted by the model itself: the clean answer is one of them, and what stands has spent nearly all."""
    x, labels = marked(8)
    model = Rows(load("digits-standard"), 8)
    outcome = eb.blackbox(budget, threat=shielded(threat))(Victim(model, access=access), x, labels, RADII[threat] / 20)
    assert torch.equal(model.asked, outcome.queries)
    assert int(model.asked.max()) <= budget
    standing = ~outcome.reached
    assert bool(standing.any())
    assert bool((outcome.queries[standing] >= 0.75 * budget).all())


@BOTH
@pytest.mark.parametrize("threat", EVERY)
def test_a_budget_holds_under_every_threat(threat: str, access: Access) -> None:
    x, labels = marked(6)
    for budget in (2, 5, 40):
        outcome = eb.blackbox(budget, threat=named(threat))(Victim(load("digits-standard"), access=access), x, labels, RADII[threat])
        assert int(outcome.queries.max()) <= budget
        assert int(outcome.backwards.sum()) == 0


@BOTH
@pytest.mark.parametrize("threat", ["linf", "l2"])
def test_a_sample_is_left_alone_once_it_is_broken(threat: str, access: Access) -> None:
    """A huge radius: every search breaks most samples early, and must not go on to the end of its budget."""
    x, labels = marked(8)
    model = Rows(load("digits-standard"), 8)
    radius = {"linf": 0.9, "l2": 6.0}[threat]
    outcome = eb.blackbox(400, threat=shielded(threat))(Victim(model, access=access), x, labels, radius)
    assert bool(outcome.reached.all())
    assert torch.equal(model.asked, outcome.queries)
    assert int(outcome.queries.max()) <= 40


@pytest.mark.parametrize("recipe", [rays, lambda n, threat: hop_skip_jump(n, draws=20, tries=20, threat=threat)])
def test_a_label_only_search_ends_with_the_query_that_breaks(recipe: Any) -> None:
    """The last row that it asks of a broken sample is the success itself."""
    x, labels = marked(1)
    seen: list[Tensor] = []

    def model(z: Tensor) -> Tensor:
        seen.extend(z.clone())
        return load("digits-standard")(z)

    outcome = first_success(recipe(600, threat=named("linf")))(Victim(model, access=Access.LABELS), x, labels, 0.3)
    assert bool(outcome.reached[0])
    assert len(seen) == int(outcome.queries[0]) < 600
    hits = load("digits-standard")(torch.stack(seen)).argmax(1) != labels[0]
    inside = (torch.stack(seen) - x).abs().flatten(1).amax(1) <= 0.3
    first = int((hits & inside).nonzero()[0])
    assert len(seen) - first <= 32  # a batch of draws is asked at once
    assert torch.equal(outcome.x_adv[0], torch.stack(seen)[hits & inside][0]) or len(seen) - first > 1


def test_a_victim_with_gradients_is_asked_what_one_with_scores_is() -> None:
    x, labels = marked(6)
    both = [eb.blackbox(60)(Victim(load("digits-standard"), access=a), x, labels, 0.08) for a in (Access.GRADIENT, Access.SCORES)]
    assert torch.equal(both[0].x_adv, both[1].x_adv)
    assert torch.equal(both[0].queries, both[1].queries)


@BOTH
@pytest.mark.parametrize("threat", EVERY)
@pytest.mark.parametrize("queries", [1, 2, 3, 99, 300, ENOUGH - 1, ENOUGH, 10000])
@pytest.mark.parametrize("shape", [(1, 8, 8), (30,)])
def test_shares_add_up_to_the_budget(threat: str, queries: int, access: Access, shape: tuple[int, ...]) -> None:
    shares = searches(named(threat), access, queries, torch.zeros(2, *shape))
    assert 0.9 * queries <= sum(share.queries for share in shares) <= queries
    assert len({share.attack.name for share in shares}) == len(shares)
    assert all(share.attack.threat == named(threat) or share.attack.threat.name == threat for share in shares)


def test_the_order_is_the_documented_one() -> None:
    def names(threat: str, access: Access, queries: int, *shape: int) -> list[str]:
        return [share.attack.name for share in searches(named(threat), access, queries, torch.zeros(2, *(shape or (1, 8, 8))))]

    assert names("linf", Access.SCORES, 300) == ["square"]
    assert names("linf", Access.SCORES, 2000) == ["square", "simba"]
    assert names("l2", Access.SCORES, 300) == ["square"]
    assert names("l2", Access.SCORES, 2000) == ["square", "sparse_rs", "hop_skip_jump"]
    assert names("l1", Access.SCORES, 300) == names("l1", Access.SCORES, 2000) == ["sparse_rs", "simba"]
    assert names("l0f", Access.SCORES, 300) == ["sparse_rs"]
    assert names("linf", Access.LABELS, 300) == ["rays"]
    assert names("linf", Access.LABELS, 2000) == ["rays", "hop_skip_jump"]
    assert names("l2", Access.LABELS, 300) == ["hop_skip_jump"]
    assert names("l0", Access.LABELS, 300) == ["sparse_rs"]
    assert names("rigid", Access.LABELS, 300) == ["rotation_translation"]
    assert names("flow", Access.SCORES, 300) == ["noise"]
    assert names("linf", Access.SCORES, 300, 30) == ["square"]
    assert names("linf", Access.SCORES, 2000, 30) == ["sweep", "square", "simba"]
    assert names("l2", Access.SCORES, 2048, NARROW) == ["sweep", "square", "sparse_rs", "hop_skip_jump"]
    assert names("l2", Access.SCORES, 2047, NARROW) == names("l2", Access.SCORES, 4000, NARROW + 1) == names("l2", Access.SCORES, 2000)
    assert names("l1", Access.SCORES, 480, 30) == ["sweep", "simba"]
    assert names("l1", Access.SCORES, 478, 30) == ["simba"]
    assert names("l1", Access.SCORES, 2000, 10, 10) == ["sparse_rs", "simba"]
    assert names("l1", Access.SCORES, 2000, 10, 7)[0] == "sweep"
    assert names("linf", Access.SCORES, 4000, 8) == ["sweep", "differences_0.1", "differences_0.5", "square", "simba"]
    assert names("linf", Access.LABELS, 300, 30) == ["rays"]


def test_it_breaks_more_than_noise_on_a_forest_of_rules() -> None:
    """Answers in steps, as trees give them: one vote of each feature, under norms that have a search of their own."""
    random = np.random.default_rng(0)
    cut, vote = (torch.from_numpy(random.uniform(low, 1.0, 20)).float() for low in (0.0, -1.0))

    def forest(x: Tensor) -> Tensor:
        score = ((x > cut) * vote).sum(1) - 0.5 * vote.sum()
        return torch.stack([-score, score], 1)

    x = torch.from_numpy(random.random((60, 20))).float()
    labels = forest(x).argmax(1)
    for threat, radius in (("linf", 0.05), ("l0f", 2.0)):
        victim = Victim(forest, access=Access.SCORES)
        ours = eb.blackbox(300, threat=named(threat))(victim, x, labels, radius)
        blind = eb.get("noise", threat=threat, draws=299)(victim, x, labels, radius)
        assert int(ours.reached.sum()) > int(blind.reached.sum()), threat
        fresh = forest(ours.x_adv).argmax(1) != labels
        assert torch.equal(fresh, ours.reached)


def test_a_budget_without_a_search_is_refused() -> None:
    for budget in (-1, 0, 1):
        with pytest.raises(BadInput, match="budget"):
            eb.blackbox(budget)


def test_its_repr_is_its_recipe() -> None:
    assert repr(eb.get("blackbox", threat="l2", budget=50)) == repr(eb.blackbox(50, threat=named("l2")))
    assert "budget=50" in repr(eb.blackbox(50))


def test_clean_answers_that_are_known_are_not_asked_again() -> None:
    x, labels = marked(6)
    model = Rows(load("digits-standard"), 6)
    clean = Victim(load("digits-standard")).outputs(x, Tally.zeros(6))
    outcome = eb.blackbox(30, threat=shielded("linf"))(Victim(model, access=Access.SCORES), x, labels, 0.001, clean=clean)
    assert model.asked.tolist() == outcome.queries.tolist() == [29] * 6


@BOTH
@pytest.mark.parametrize("threat", ["linf", "l2", "l1", "l0"])
def test_what_carries_over_from_surrogates_costs_one_query_and_the_rest_is_searched(threat: str, access: Access) -> None:
    """The victim sees one row of each sample that the surrogates break for it, and the whole search of the others."""
    x, labels = marked(8)
    model, both = Rows(load("digits-standard"), 8), ensemble([load("digits-robust"), load("digits-standard")])
    radius = RADII[threat]
    carried = transferred(both, (di_fgsm if threat in ("linf", "l2") else mi_fgsm)(threat=shielded(threat)))
    broken = carried(load("digits-standard"), x, labels, radius).reached
    assert 0 < int(broken.sum()) < 8
    for budget in (2, 3, 30):
        model.asked.zero_()
        outcome = eb.blackbox(budget, shielded(threat), both)(Victim(model, access=access), x, labels, radius)
        assert torch.equal(model.asked, outcome.queries)
        assert outcome.queries[broken].tolist() == [2] * int(broken.sum())
        assert bool(outcome.reached[broken].all())
        assert int(outcome.queries.max()) <= budget
        alone = (
            eb.blackbox(budget - 1, shielded(threat))(Victim(load("digits-standard"), access=access), x, labels, radius)
            if budget > 2
            else None
        )
        assert torch.equal(outcome.reached, broken if alone is None else broken | alone.reached)
