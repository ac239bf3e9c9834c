"""Surrogates: exact bills, Jacobian augmentation by hand, and transferred examples that one question to the victim judges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lawkit import bench, check_legal, check_replay, check_same, linear, mlp, rng, rows_of, tensor
from torch import Tensor, nn

from epsball.attacks import Surrogate, ensemble, fit_surrogate, get, transferred
from epsball.core import Access, Targeted, Victim
from epsball.errors import BadInput
from epsball.threats import named


class Seen(nn.Module):
    """Keeps what it is asked; an answer cannot be followed back."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.asked = net, []

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.asked.append(x.clone())
        return self.net(x.double())


def points(n: int, features: int = 6) -> Tensor:
    return tensor(rng(31).random((n, features)))


def test_the_bill_is_what_the_victim_saw() -> None:
    for most, expected in ((1000, 5 * 2**3), (6, 5 + 5 + 6 + 6)):
        seen = Seen(mlp(6, 3))
        fitted = fit_surrogate(Victim(seen, access=Access.LABELS), points(5), rounds=3, most=most, epochs=1)
        assert fitted.fit_queries == expected == sum(len(x) for x in seen.asked)


def test_augmentation_is_papernot_s() -> None:
    """On a linear surrogate that no step of Adam moves: x + step sgn(w_y), turned in the fourth round, in the box; y is the victim's."""
    net, x = linear(6, 3, seed=4), points(4)
    seen = Seen(mlp(6, 3))
    fit_surrogate(Victim(seen, access=Access.LABELS), x, 4, net, step=0.25, epochs=1, rate=1e-12)
    pool, weight = x, net[1].weight.detach()
    for number in range(4):
        new = seen.asked[number + 1]
        labels = seen.net(pool.double()).argmax(1)
        way = 0.25 * weight[labels].sign() * (-1 if number == 3 else 1)
        expected = (pool + way).clamp(0, 1)
        apart = (new[:, None].float() - expected[None]).abs().amax(2)
        assert float(apart.amin(1).max()) < 1e-6
        assert float(apart.amin(0).max()) < 1e-6
        pool = torch.cat([pool, new.float()])


@pytest.mark.parametrize("access", [Access.LABELS, Access.SCORES])
def test_it_learns_the_victim(access: Access) -> None:
    """A linear victim is nearly matched; with its scores, so are they, up to a constant per row."""
    victim, x = Victim(linear(6, 3, gain=4), access=access), points(60)
    fitted = fit_surrogate(victim, x, 3, linear(6, 3, seed=9), epochs=60, rate=1e-2)
    assert fitted.agreement > 0.97
    with torch.no_grad():
        mine, own = fitted.victim.model(x).log_softmax(1), victim.model(x).log_softmax(1)
    assert float((mine.argmax(1) == own.argmax(1)).double().mean()) > 0.95
    if access is Access.SCORES:
        assert float((mine - own).abs().max()) < 0.1
    assert not fitted.victim.model.training


def test_fits_repeat_and_touch_no_global_generator() -> None:
    x = tensor(rng(32).random((6, 2, 9, 9)))
    model = mlp(162, 3)
    before = torch.get_rng_state()
    with torch.inference_mode():
        one, again = (fit_surrogate(model, x.clone(), 2, epochs=2) for _ in range(2))
    other = fit_surrogate(model, x, 2, epochs=2, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        answers = [fitted.victim.model(x) for fitted in (one, again, other)]
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


def test_answers_that_are_no_numbers_are_left_out() -> None:
    net = mlp(6, 3)
    half = lambda z: torch.where(z[:, :1] > 0.5, torch.nan, net(z.double()))  # noqa: E731
    fitted = fit_surrogate(half, points(20), 1, epochs=2)
    assert all(bool(torch.isfinite(p).all()) for p in fitted.victim.model.parameters())
    with pytest.raises(BadInput, match="finite"):
        fit_surrogate(lambda z: net(z.double()) * torch.nan, points(4))


def perfect(net: nn.Module) -> Surrogate:
    return Surrogate(Victim(net), 0, 1.0)


@pytest.mark.parametrize("recipe", ["mi_fgsm", "di_fgsm", "ti_fgsm", "pgd"])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("seeds", [(3,), (3, 5, 8)])
def test_one_question_per_sample_whatever_the_batch(recipe: str, targeted: bool, seeds: tuple[int, ...]) -> None:
    """On one surrogate, and on several as one."""
    b = bench(4, n=8, wrong=2)
    nets = [mlp(18, 4, seed=seed) for seed in seeds]
    goal, attack = b.goal(targeted), transferred(perfect(nets[0]) if len(nets) == 1 else ensemble(nets), get(recipe, steps=4))
    seen = Seen(b.model)
    whole = attack(Victim(seen, access=Access.LABELS), b.x, goal, 0.3)
    begun = goal.reached(b.model(b.x.double()))
    assert torch.equal(whole.queries, torch.where(begun, 1, 2))
    assert sum(len(x) for x in seen.asked) == int(whole.queries.sum())
    assert int(whole.backwards.sum()) == 0
    check_legal("linf", b.x, whole.x_adv, 0.3)
    check_replay("linf", b.model, b.x, goal, whole)
    assert torch.equal(whole.x_adv[begun], b.x[begun])
    order = torch.tensor([5, 3, 7, 0, 3, 1])
    check_same(rows_of(whole, order), attack(b.model, b.x[order], goal.take(order), 0.3))
    for row in range(8):
        one = slice(row, row + 1)
        check_same(rows_of(whole, torch.tensor([row])), attack(b.model, b.x[one], goal.take(one), 0.3))


def test_on_the_victim_itself_it_finds_what_a_white_box_attack_finds() -> None:
    b = bench(4, n=24, wrong=0)
    white = get("mi_fgsm", steps=10)(b.model, b.x, b.labels, 0.12, drop=False)
    black = transferred(perfect(b.model), get("mi_fgsm", steps=10))(Victim(b.model, access=Access.LABELS), b.x, b.labels, 0.12)
    assert torch.equal(black.reached, white.reached)
    assert torch.equal(black.x_adv[black.reached], white.x_adv[white.reached])
    assert bool(black.reached.any())


def test_samples_that_the_surrogate_gets_wrong_are_attacked_all_the_same() -> None:
    """A surrogate that names the wrong class for every sample, from the start."""
    b = bench(2, n=12, wrong=0)
    net = nn.Sequential(b.model, Swap())
    outcome = transferred(perfect(net), get("mi_fgsm", steps=5))(b.model, b.x, b.labels, 0.2)
    assert outcome.queries.tolist() == [2] * 12
    assert bool((outcome.size > 0)[outcome.reached].all())
    away = transferred(perfect(net), get("mi_fgsm", steps=5))(
        lambda z: b.model(z.double()) * 0 + torch.tensor([1.0, 0.0]), b.x, b.labels * 0, 0.2
    )
    assert bool((away.size > 0).any())


class Swap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_other_threats_and_targets(norm: str) -> None:
    b = bench(4, n=6, wrong=0)
    goal = Targeted((b.labels + 1) % 4)
    outcome = transferred(perfect(b.model), get("pgd", threat=norm, steps=8))(b.model, b.x, goal, 1.5)
    check_legal(norm, b.x, outcome.x_adv, 1.5)
    check_replay(norm, b.model, b.x, goal, outcome)
    assert bool(outcome.reached.any())
    assert transferred(perfect(b.model), get("pgd", threat=norm)).threat.name == named(norm).name


@pytest.mark.parametrize(
    ("options", "word"),
    [({"rounds": -1}, "rounds"), ({"most": 0}, "most"), ({"epochs": 0}, "epochs"), ({"step": 0.0}, "step"), ({"rate": 0.0}, "rate")],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], word: str) -> None:
    with pytest.raises(BadInput, match=word) as caught:
        fit_surrogate(mlp(6, 3), points(3), **options)
    assert "\n" not in str(caught.value)
