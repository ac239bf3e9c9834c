"""Every feature by itself: exact where scores are sums over features, steps and answers that are no numbers included."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

import epsball as eb
from epsball.core import Key, Victim
from epsball.core.victim import Access
from epsball.errors import BadInput

N, FEATURES = 24, 9
NORMS = ("linf", "l2", "l1")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def two(score: Tensor) -> Tensor:
    return torch.stack([-score, score], 1)


def size(change: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(change.double(), {"linf": torch.inf, "l2": 2, "l1": 1}[norm], dim=1)


def linear(x: Tensor) -> Tensor:
    return two((2 * x - 1) @ (2 * drawn(FEATURES, seed=1) - 1))


@pytest.mark.parametrize("norm", NORMS)
def test_on_linear_models_it_ends_at_the_closed_form(norm: str) -> None:
    x, radius = drawn(N, FEATURES, seed=2) * 20 - 10, 0.5
    victim = Victim(linear, box=(-20.0, 20.0), access=Access.SCORES)
    labels = linear(x).argmax(1)
    dual = {"linf": 1, "l2": 2, "l1": torch.inf}[norm]
    reach = 2 * radius * torch.linalg.vector_norm(2 * drawn(FEATURES, seed=1) - 1, dual).item()  # the score moves by so much
    lead = linear(x).amax(1)
    near = {"linf": 0.999, "l2": 0.95, "l1": 0.999}[norm]  # under L2 the grid of values tells
    for share, broken in ((near, True), (1.001, False)):
        radii = (lead / (share * reach) * radius).double()
        outcome = eb.get("sweep", threat=norm, queries=3000, values=16)(victim, x, labels, radii)
        inside = radii < 5  # the box is far enough away
        assert inside.sum() > N / 3
        assert torch.equal(outcome.reached[inside], torch.full_like(outcome.reached[inside], broken)), share


CUTS, VOTES = 0.2 + 0.6 * drawn(FEATURES, seed=3), 2 * drawn(FEATURES, seed=4) - 1


def rules(x: Tensor) -> Tensor:
    """One vote of each feature, up to its cut or beyond it."""
    return two(((x > CUTS) * VOTES).sum(1) - 0.5 * VOTES.sum())


def breakable(x: Tensor, labels: Tensor, norm: str, radius: float) -> Tensor:
    """By trying all sets of features that change sides, each just so far as it takes."""
    there = torch.where(x > CUTS, CUTS - 1e-4, CUTS + 1e-4)
    found = torch.zeros(len(x), dtype=torch.bool)
    for count in range(1, FEATURES + 1):
        for some in combinations(range(FEATURES), count):
            z = x.clone()
            z[:, some] = there[:, some]
            found |= (size(z - x, norm) <= radius) & (rules(z).argmax(1) != labels)
    return found


@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.15), ("l2", 0.2), ("l1", 0.3)])
def test_on_votes_of_features_it_breaks_what_can_be_broken(norm: str, radius: float) -> None:
    x = drawn(60, FEATURES, seed=5)
    labels = rules(x).argmax(1)
    outcome = eb.get("sweep", threat=norm, queries=4000)(Victim(rules, access=Access.SCORES), x, labels, radius)
    surely, perhaps = breakable(x, labels, norm, 0.97 * radius), breakable(x, labels, norm, 1.0001 * radius)
    assert 10 < int(surely.sum()) < 50
    assert bool((outcome.reached >= surely).all())
    assert bool((outcome.reached <= perhaps).all())
    fresh = rules(outcome.x_adv).argmax(1) != labels
    assert torch.equal(fresh & (size(outcome.x_adv - x, norm) <= radius), outcome.reached)


def test_the_class_to_aim_at_is_found_by_what_changes_do_to_each() -> None:
    """Words of 16 bits, 8 of which tell any two apart: every first flip helps half of the others as much as it hinders the rest."""
    words = torch.tensor([[1.0 if bin(a & b).count("1") % 2 else -1.0 for b in range(16)] for a in range(16)])
    x = words.repeat(2, 1) * (0.05 + drawn(32, 16, seed=9))
    labels = torch.arange(16).repeat(2)
    differs = x.abs()[:, None].masked_fill(words[labels][:, None] == words, torch.inf).sort(2).values
    first = torch.arange(16) < labels[:, None]  # wins a tie, to which four bits of eight lead
    price = torch.where(first, differs[..., :4].sum(2), differs[..., :5].sum(2))
    price[torch.arange(32), labels] = torch.inf
    least = price.amin(1).double()

    def decoded(x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0) @ words.T

    victim, attack = Victim(decoded, box=(-2.0, 2.0), access=Access.SCORES), eb.get("sweep", threat="l1", queries=6000)
    assert float(attack(victim, x, labels, 1.02 * least).reached.double().mean()) > 0.9
    assert not bool(attack(victim, x, labels, 0.999 * least).reached.any())


def test_answers_that_are_no_numbers_are_passed_over() -> None:
    """Only the upper fifth of each interval helps, and beyond it there is none."""

    def model(x: Tensor) -> Tensor:
        return two((x > 0.8).float().sum(1) - 2.5).masked_fill((x > 0.97).any(1)[:, None], torch.nan)

    x = 0.75 * drawn(20, 5, seed=6)
    outcome = eb.get("sweep", threat="linf", queries=400)(Victim(model, access=Access.SCORES), x, torch.zeros(20).long(), 1.0)
    assert bool(outcome.reached.all())
    assert bool((model(outcome.x_adv).argmax(1) == 1).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("queries", [16, 17, 100, 333])
def test_it_asks_no_more_than_it_may_and_of_many_features_some(norm: str, queries: int) -> None:
    asked = []

    def model(x: Tensor) -> Tensor:
        asked.append(len(x))
        return two(x.flatten(1).sum(1) * 0 - 1)

    x = drawn(3, 2, 10, 5, seed=7)
    outcome = eb.get("sweep", threat=norm, queries=queries)(Victim(model, access=Access.SCORES), x, torch.zeros(3).long(), 0.3)
    assert not bool(outcome.reached.any())
    assert sum(asked) == int(outcome.queries.sum())
    assert int(outcome.queries.max()) <= queries + 1  # the clean answer


def test_a_sample_is_searched_alike_in_any_company() -> None:
    x, victim = drawn(12, FEATURES, seed=8), Victim(rules, access=Access.SCORES)
    labels, attack = rules(x).argmax(1), eb.get("sweep", threat="l1", queries=900)
    together, alone = attack(victim, x, labels, 0.2, Key.of(3)), attack(victim, x[4:6], labels[4:6], 0.2, Key.of(3))
    assert torch.equal(together.x_adv[4:6], alone.x_adv)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"values": 3}, "even"), ({"values": 0}, "even"), ({"queries": 15}, "16 or more"), ({"threat": "l0"}, "linf, l2, l1")],
)
def test_what_makes_no_sense_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        eb.get("sweep", **options)  # type: ignore[arg-type]
