"""Gradient sources made of sources: EOT, transforms of the input, and layers replaced on the backward pass."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from lawkit import bench, filled, linear, mlp, posed, rng, tensor
from torch import Tensor, nn

from epsball.attacks import apgd, fgsm, pgd
from epsball.core import Attack, Descent, Eot, Gradient, Key, OfRadius, Problem, Reading, Tally, Through, Victim, autograd
from epsball.core.rows import per_sample
from epsball.core.sources import fresh
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import Linf


class Quantize(nn.Module):
    """Three gray levels: no gradient anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 2).round() / 2


class Shaky(nn.Module):
    """A linear model whose weights are drawn anew at every call; the mean of the draws is `weight`."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensor(rng(4).standard_normal((2, 6))))
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight + self.noise * torch.randn_like(self.weight)).T


@dataclass(frozen=True)
class Shift:
    """Adds keyed noise: every row its own."""

    size: float = 0.3

    def __call__(self, x: Tensor, key: Key, ids: Tensor) -> Tensor:
        return x + self.size * key.fold("shift").normal(ids, x.detach())


@dataclass(frozen=True)
class Probes:
    """A gradient-free source: central differences along one keyed direction, three times."""

    width: float = 0.05

    def __call__(self, problem: Problem, z: Tensor) -> Reading:
        readings, gradient = [], torch.zeros_like(z)
        for number in range(3):
            way = problem.key.fold("probe", number).normal(problem.ids, z)
            readings += [problem.judge(z + sign * self.width * way) for sign in (1, -1)]
            gradient = gradient + per_sample(readings[-2].score - readings[-1].score, z) * way
        return replace(readings[0], z=z, gradient=gradient)


class Shown(nn.Module):
    """Keeps what it was asked."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.net(x)


def state_of_model(model: nn.Module) -> list[object]:
    """Flags, hooks and weights, in comparable form."""
    hooks = [len(d) for m in model.modules() for n, d in vars(m).items() if n.endswith("_hooks") and isinstance(d, dict)]
    flags = [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]
    return [hooks, flags, [p.tolist() for p in model.parameters()]]


def test_eot_is_exact_without_randomness() -> None:
    b = bench(4)
    problem = posed(b.model, b.x, b.labels)
    plain, mean = autograd(problem, b.x), Eot(autograd, 7)(problem, b.x)
    for name in ("output", "score", "gradient", "z", "x_adv"):
        assert torch.equal(getattr(plain, name), getattr(mean, name)), name
    assert problem.tally.forwards.tolist() == [1 + 1 + 7] * 10
    assert problem.tally.backwards.tolist() == [1 + 7] * 10


def test_eot_converges_to_the_mean_gradient() -> None:
    model = Shaky(1.0)
    x, labels = tensor(rng(5).random((4, 6))), torch.tensor([0, 1, 0, 1])
    truth = torch.stack([model.weight[1 - y] - model.weight[y] for y in labels]).detach()
    problem = posed(model, x, labels, objective=margin)
    errors = [float((Eot(autograd, draws)(problem, x).gradient - truth).abs().mean()) for draws in (1, 16, 1024)]
    # One draw errs by sqrt(2) * E|N(0, 1)| = 1.13 on average, k draws by 1.13 / sqrt(k).
    assert errors[0] > 0.7
    assert errors[1] < 0.45
    assert errors[2] < 0.07


def test_eot_averages_scores_and_judges_the_average() -> None:
    torch.manual_seed(0)
    x = torch.full((1, 6), 0.5)
    problem = posed(Shaky(5.0), x, torch.tensor([0]), objective=margin)
    reading = Eot(autograd, 400)(problem, x)
    assert torch.allclose(reading.score, reading.output[:, 1] - reading.output[:, 0], atol=1e-4)


def test_eot_helps_on_a_random_model() -> None:
    """A sign step on one noisy gradient is nearly a coin flip per feature; on the mean of 64 it is not."""
    model, x = Shaky(4.0), tensor(0.4 + 0.2 * rng(6).random((64, 6)))
    mean = linear_of(model.weight.detach())
    labels = mean(x).argmax(1)
    counts = []
    for draws in (1, 64):
        attack = replace(fgsm(objective=margin), strategy=Descent(OfRadius(1.0), gradient=Eot(autograd, draws)))
        outcome = attack(model, x, labels, 0.3, drop=False)
        counts.append(float(margin_of(mean, outcome.z, labels).mean()))
    assert counts[1] > counts[0]


def linear_of(weight: Tensor) -> nn.Linear:
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        model.weight.copy_(weight)
    return model.requires_grad_(False)


def margin_of(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    output = model(x)
    return output.gather(1, (1 - labels)[:, None]).squeeze(1) - output.gather(1, labels[:, None]).squeeze(1)


def test_through_answers_for_the_input_itself() -> None:
    b = bench(4)
    problem = posed(b.model, b.x, b.labels)
    plain, seen = autograd(problem, b.x), Through(Shift())(problem, b.x)
    assert torch.equal(plain.output, seen.output)
    assert torch.equal(plain.score, seen.score)
    assert not torch.allclose(plain.gradient, seen.gradient)
    assert problem.tally.forwards.tolist() == [1 + 1 + 2] * 10
    assert problem.tally.backwards.tolist() == [1 + 1] * 10


def test_through_gives_the_gradient_at_the_transformed_point() -> None:
    b = bench(4)
    problem = posed(b.model, b.x, b.labels)
    there = b.x + Shift()(b.x, problem.key, problem.ids) - b.x
    other = posed(b.model, b.x, b.labels)
    assert torch.allclose(Through(Shift())(problem, b.x).gradient, autograd(other, there).gradient, atol=1e-6)


SOURCES = [Eot(autograd, 3), Through(Shift()), Through(Shift(), Eot(autograd, 3)), Through(Shift(0.05), Eot(Probes(), 2))]


@pytest.mark.parametrize("source", SOURCES, ids=repr)
def test_rows_do_not_hang_on_their_neighbors_nor_on_splits(source: Gradient) -> None:
    b = bench(4)
    whole, parts = posed(b.model, b.x, b.labels), posed(Victim(b.model, batch_size=3), b.x, b.labels)
    singles = [posed(b.model, b.x[row : row + 1], b.labels[row : row + 1]) for row in range(len(b.x))]
    for _ in range(2):
        all_at_once = source(whole, b.x).gradient
        assert torch.allclose(all_at_once, source(parts, b.x).gradient, atol=1e-7)
        assert torch.allclose(all_at_once, torch.cat([source(one, one.x).gradient for one in singles]), atol=1e-7)
    assert torch.equal(whole.tally.forwards, parts.tally.forwards)


def test_every_look_has_a_fresh_draw() -> None:
    b = bench(4)
    problem = posed(b.model, b.x, b.labels)
    one, two = (Through(Shift())(problem, b.x).gradient for _ in range(2))
    assert not torch.allclose(one, two)
    for column in ("backwards", "blind"):
        tally = replace(Tally.zeros(3), **{column: torch.arange(3)})
        assert len(set(fresh(torch.full((3,), 2**63 - 1), tally).tolist())) == 3


def test_gradient_free_looks_have_fresh_draws_too() -> None:
    """Six probes and the honest look, twice: the six of each round and both rounds differ in their noise; the honest ones have none."""
    b = bench(4)
    model = Shown(b.model)
    problem = posed(model, b.x, b.labels)
    still = Through(Shift(), Probes(0.0))
    for _ in range(2):
        still(problem, b.x)
    noise = [seen - b.x for seen in model.seen[1:]]
    assert [bool((change == 0).all()) for change in noise] == ([False] * 6 + [True]) * 2
    drawn = [change for change in noise if bool((change != 0).any())]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(drawn, 2))
    assert problem.tally.backwards.tolist() == [0] * 10


def test_known_clean_outputs_shift_no_draw_of_a_gradient_free_source() -> None:
    b = bench(4, n=9)
    attack = Attack("probed", Linf(), margin, Descent(OfRadius(0.25), gradient=Through(Shift(0.05), Probes())), 5)
    whole = attack(b.model, b.x, b.labels, 0.12, drop=False)
    for other in (
        attack(b.model, b.x, b.labels, 0.12, drop=False, clean=b.model(b.x.double()).detach()),
        attack(Victim(b.model, batch_size=2), b.x, b.labels, 0.12, drop=False),
    ):
        assert torch.equal(other.x_adv, whole.x_adv)
    order = torch.tensor([5, 3, 3, 0])
    assert torch.equal(attack(b.model, b.x[order], b.labels[order], 0.12, drop=False).x_adv, whole.x_adv[order])
    dropped = attack(b.model, b.x, b.labels, 0.12)
    assert torch.equal(dropped.reached, whole.reached)


def test_sources_work_under_any_descent() -> None:
    b = bench(4, n=24)
    for strategy in (
        Descent(OfRadius(0.25), gradient=Through(Shift(0.05), Eot(autograd, 2))),
        Descent(OfRadius(0.25), gradient=Eot(autograd, 2)),
    ):
        outcome = Attack("combined", Linf(), margin, strategy, 6)(b.model, b.x, b.labels, 0.12)
        assert int(outcome.reached.sum()) > int(b.wrong.sum())
        assert "Eot" in repr(Attack("combined", Linf(), margin, strategy, 6))


# BPDA.


def quantized() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(Quantize(), mlp(18, 4).float())
    x = tensor(rng(8).random((32, 2, 3, 3)))
    return model.eval(), x, model(x).argmax(1)


def test_bpda_succeeds_where_plain_gradients_are_zero() -> None:
    model, x, labels = quantized()
    attack = pgd(steps=40, noise=False)
    plain = attack(model, x, labels, 0.3)
    through = attack(Victim(model).replace("0"), x, labels, 0.3)
    assert int(plain.reached.sum()) == 0
    assert int(through.reached.sum()) >= 24
    assert torch.equal(through.reached, model(through.x_adv).argmax(1) != labels)


def test_bpda_forward_is_the_models_own_and_nothing_is_left_behind() -> None:
    model, x, labels = quantized()
    before = state_of_model(model)
    victim = Victim(model, box=(-1.0, 2.0), batch_size=5, name="q").replace(model[0], lambda t: 3 * t)
    assert (victim.box, victim.batch_size, victim.name) == ((-1.0, 2.0), 5, "q")
    problem = posed(Victim(model).replace(model[0], lambda t: 3 * t), x, labels)
    assert torch.equal(autograd(problem, x).output, model(x).detach())
    assert torch.equal(problem.judge(x).output, model(x).detach())
    rounded = posed(Victim(model[1]), x, labels)
    assert torch.allclose(autograd(problem, x).gradient, 3 * autograd(rounded, Quantize()(x)).gradient, atol=1e-6)
    assert state_of_model(model) == before


def test_a_replacement_made_inside_a_context_lives_on_outside() -> None:
    model, x, labels = quantized()
    before = state_of_model(model)
    with Victim(model) as victim:
        inside = victim.replace("0")
        one = pgd(steps=5, noise=False)(inside, x, labels, 0.3)
    other = pgd(steps=5, noise=False)(inside, x, labels, 0.3)
    assert torch.equal(one.x_adv, other.x_adv)
    assert state_of_model(model) == before


def test_replacements_add_up_and_go_under_other_sources() -> None:
    model = nn.Sequential(Quantize(), filled(nn.Conv2d(2, 2, 1), 3), Quantize(), nn.Flatten(), linear(18, 4)[1])
    x = tensor(rng(9).random((8, 2, 3, 3)))
    labels = model(x).argmax(1)
    one, two = Victim(model).replace("0"), Victim(model).replace("0").replace("2", nn.Hardtanh())
    assert float(autograd(posed(one, x, labels), x).gradient.abs().max()) == 0
    assert float(autograd(posed(two, x, labels), x).gradient.abs().max()) > 0
    assert float(Through(Shift(0.01), Eot(autograd, 2))(posed(two, x, labels), x).gradient.abs().max()) > 0
    outcome = apgd(steps=10)(two, x, labels, 0.3)
    assert torch.equal(outcome.reached, model(outcome.x_adv).argmax(1) != labels)


def test_bpda_refuses_in_one_line() -> None:
    model, x, labels = quantized()
    for bad in (
        lambda: Victim(model).replace("nowhere"),
        lambda: Victim(model).replace(nn.ReLU()),
        lambda: Victim(lambda t: model(t)).replace("0"),
        lambda: autograd(posed(Victim(model).replace("0", lambda t: t[:, :1]), x, labels), x),
        lambda: Eot(autograd, 0),
    ):
        with pytest.raises(BadInput) as caught:
            bad()
        assert "\n" not in str(caught.value)


def test_a_failing_substitute_leaves_no_hook() -> None:
    model, x, labels = quantized()
    before = state_of_model(model)
    with pytest.raises(BadInput):
        pgd(steps=2)(Victim(model).replace("0", lambda t: t[:1]), x, labels, 0.1)
    assert state_of_model(model) == before
