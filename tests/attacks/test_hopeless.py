"""When a search ends because its margins no longer swing far enough: closed forms on models that answer by the look."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import epsball as eb
from epsball.attacks import apgd, apgd_t, outside_in, pgd
from epsball.attacks.combine import EveryTarget, Restarts
from epsball.attacks.hopeless import WhileHopeful, while_hopeful
from epsball.attacks.vertices import Vertices
from epsball.core import Attack, Outcome, Problem, Reading, Victim
from epsball.models.digits import load
from epsball.objectives import margin
from epsball.threats import L1, Linf


class Told(nn.Module):
    """Class 1 is ahead by `margins[k]` (a number, or one for each of the rows' first features) at look k; the last stays. Counts rows."""

    def __init__(self, *margins: float | tuple[float, ...]) -> None:
        super().__init__()
        self.margins, self.look, self.rows = margins, -1, 0

    def forward(self, x: Tensor) -> Tensor:
        now = self.margins[min(max(self.look, 0), len(self.margins) - 1)]
        self.look, self.rows = self.look + 1, self.rows + len(x)
        each = torch.tensor(now if isinstance(now, tuple) else (now,) * 3, dtype=x.dtype)
        score = each[x[:, 0].long()] + 0.0 * x.sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)


def searched(model: Told, steps: int = 20, which: tuple[float, ...] = (0.5,), **changed: Any) -> Outcome:
    """`steps` of PGD while hopeful. The first look is at the clean inputs; their first features say which row of the model's they are."""
    x = torch.tensor(which, dtype=torch.float64)[:, None].expand(-1, 4)
    plain = pgd(steps, threat=Linf(), objective=margin)
    assert isinstance(plain, Attack)
    attack = replace(plain, strategy=WhileHopeful(plain.strategy, **changed))
    return attack(Victim(model, box=(0.0, 3.0)), x, torch.zeros(len(x), dtype=torch.int64), 0.1)


def swinging(behind: float) -> tuple[float, ...]:
    """Behind, and by 1 less at every other look."""
    return tuple(-behind + look % 2 for look in range(20))


SHORTER = {"swings": 3.5}


@pytest.mark.parametrize(("behind", "changed", "rows"), [(5.1, {}, 10), (4.9, {}, 20), (4.9, SHORTER, 10), (4.4, SHORTER, 20)])
def test_it_is_over_at_half_of_the_looks_where_so_many_swings_would_not_do(behind: float, changed: dict[str, Any], rows: int) -> None:
    """The best margin is 1 - behind, and the last looks swing by 1."""
    outcome = searched(Told(*swinging(behind)), **changed)
    assert int(outcome.backwards) == rows
    assert not bool(outcome.reached)


def test_only_the_last_looks_say_how_far_margins_swing_and_all_how_near_they_came() -> None:
    """The swing of 8 of the fifth look is forgotten at the tenth; the best margin is not: 0.3 swing far enough from -1, not from -1.5."""
    calm = [-9.0 - 0.3 * (look % 2) for look in range(20)]
    assert int(searched(Told(*calm[:4], -1.0, *calm[5:])).backwards) == 20
    assert int(searched(Told(*calm[:4], -1.5, *calm[5:])).backwards) == 10
    assert int(searched(Told(*calm[:8], -1.5, *calm[9:])).backwards) == 14  # of the ninth look: forgotten at the fourteenth


def test_what_leaves_a_saddle_before_half_of_the_looks_goes_on() -> None:
    rising = (*[-7.0] * 8, -6.0, -5.0, -3.0, -1.0, 1.0)
    outcome = searched(Told(*rising))
    assert bool(outcome.reached)
    assert int(outcome.backwards) == 13


def test_each_sample_ends_by_itself() -> None:
    """Of three, one stands still, one swings, one breaks at look 12; a batch decides nothing."""
    looks = [(-1.0, -2.0 + look % 2, -1.0 + 0.5 * (look % 2) if look < 11 else 1.0) for look in range(20)]
    model = Told(*looks)
    together = searched(model, which=(0.5, 1.5, 2.5))
    assert together.backwards.tolist() == [10, 20, 12]
    assert together.reached.tolist() == [False, False, True]
    assert model.rows == 3 + 42 + 1  # the clean ones, all looks, the last iterate of the one left
    alone = [searched(Told(*looks), which=(0.5 + row,)) for row in range(3)]
    assert [int(one.backwards) for one in alone] == together.backwards.tolist()


def test_margins_that_are_no_numbers_end_nothing() -> None:
    outcome = searched(Told(*[float("nan") if look == 3 else -1.0 for look in range(20)]))
    assert int(outcome.backwards) == 20


@pytest.mark.parametrize("attack", [while_hopeful(pgd(20)), Attack("vertices", L1(), margin, Vertices((1.0, 1.0), noise=False), 20)])
def test_goals_without_a_margin_are_searched_to_the_end(attack: Attack) -> None:
    class Above:
        """The second score is above 10."""

        def reached(self, output: Tensor) -> Tensor:
            return output[:, 1] > 10

        def take(self, rows: Any) -> Above:
            return self

    def second(asked: Problem, z: Tensor, x_adv: Tensor, output: Tensor) -> Tensor:
        return output[:, 1]

    x = torch.full((1, 4), 0.5, dtype=torch.float64)
    assert int(replace(attack, objective=second)(Told(-1.0), x, Above(), 0.1).backwards) == 20


@dataclass(frozen=True)
class Ending:
    """A search that says at look `last` that it is over."""

    last: int

    def init(self, problem: Problem, steps: int) -> tuple[int, Tensor]:
        """At the clean input."""
        return 0, problem.x

    def step(self, problem: Problem, state: tuple[int, Tensor]) -> tuple[Reading, Any]:
        """Stays there."""
        reading, over = problem.judge(problem.x), torch.full((len(problem),), state[0] + 1 == self.last)
        return replace(reading, over=over), (state[0] + 1, problem.x)


@pytest.mark.parametrize(("last", "rows"), [(3, 3), (17, 10)])
def test_a_search_that_ends_by_itself_still_does(last: int, rows: int) -> None:
    x, y = torch.full((1, 4), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    outcome = Attack("ending", Linf(), margin, WhileHopeful(Ending(last)), 20)(Told(-1.0), x, y, 0.1)
    assert int(outcome.queries) == rows + 1


def test_every_repeated_search_is_changed_and_walks_are_not() -> None:
    inner = apgd(20)
    assert isinstance(inner, Attack)
    hopeful = replace(inner, strategy=WhileHopeful(inner.strategy))
    assert while_hopeful(inner) == hopeful
    assert while_hopeful(Restarts(inner, 3, first=2)) == Restarts(hopeful, 3, first=2)
    assert while_hopeful(Restarts((inner, inner), 3)) == Restarts((hopeful, hopeful), 3)
    aimed = while_hopeful(apgd_t(20))
    assert isinstance(aimed, EveryTarget)
    assert isinstance(aimed.attack, Attack)
    assert isinstance(aimed.attack.strategy, WhileHopeful)
    walk = outside_in(30)
    assert while_hopeful(walk) is walk


@pytest.mark.parametrize(("name", "radius"), [("digits-standard", 0.1), ("digits-robust", 0.2)])
def test_on_a_network_the_same_samples_fall_and_the_others_take_three_fifths_of_the_rows(name: str, radius: float) -> None:
    """APGD at the three nearest classes on the margin, seed 0, 60 digits."""
    data, model = eb.load_data("digits", split="test"), load(name)
    many = replace(apgd_t(20, targets=3, objective=margin), abreast=True)
    full, short = (attack(model, data.x[:60], data.y[:60], radius, 0) for attack in (many, while_hopeful(many)))
    assert torch.equal(full.reached, short.reached)
    rest = ~full.reached
    assert int(short.backwards[rest].sum()) < 0.6 * int(full.backwards[rest].sum())
