"""Training by bounds: closed forms on a linear model, the very margins of `certify`, soundness, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.certify import certify
from epsball.core import Key
from epsball.defenses.training import Against, Batch, Certifiable, Course, by_certified, crown_ibp, fit, ibp, make, pgd, small
from epsball.defenses.training.batch import generator
from epsball.defenses.training.certified import worst_margins
from epsball.defenses.training.watch import proven
from epsball.errors import BadInput
from epsball.threats import L2, Linf

X = torch.tensor([[0.5, 0.4, 0.6], [0.3, 0.5, 0.5], [0.6, 0.6, 0.4], [0.5, 0.5, 0.5]])
Y = torch.tensor([0, 1, 1, 0])
W, B = torch.tensor([1.0, -2.0, 0.5]), 0.25
SIGNS = 2.0 * Y - 1


def batch(radius: float = 0.1, n: int = 4, share: float = 1.0, threat: Linf | L2 | None = None) -> Batch:
    radii = torch.full((n,), radius, dtype=torch.float64)
    return Batch((threat or Linf()).within((0.0, 1.0)), radii, generator(Key.of(0)), share=share)


def logistic() -> nn.Sequential:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.stack([torch.zeros(3), W]))
        model.bias.copy_(torch.tensor([0.0, B]))
    return nn.Sequential(model)


def number(value: Tensor) -> float:
    return float(value.detach())


def images(n: int = 6) -> tuple[Tensor, Tensor]:
    draws = generator(Key.of(4))
    return torch.rand(n, 1, 8, 8, generator=draws), torch.randint(0, 10, (n,), generator=draws)


@pytest.mark.parametrize("crown", [0.0, 1.0])
def test_the_worst_loss_of_a_linear_model_and_its_gradient_are_exact(crown: float) -> None:
    model = logistic()
    loss, logs = Certifiable(kappa=0.0, reach=1.0, crown=crown)(model, X, Y, replace(batch(), share=1.0))
    by_hand = logistic()
    margin = SIGNS * (by_hand(X)[:, 1] - by_hand(X)[:, 0])
    norm = (by_hand[0].weight[1] - by_hand[0].weight[0]).abs().sum()
    expected = F.softplus(0.1 * norm - margin)
    assert number(loss) == pytest.approx(number(expected.mean()), rel=1e-6)
    assert number(logs["certified"]) == number((margin > 0.1 * norm).float().mean())
    loss.backward()
    expected.mean().backward()
    assert torch.allclose(model[0].weight.grad, by_hand[0].weight.grad, atol=1e-6)


def test_the_clean_loss_falls_from_all_to_kappa_as_the_radius_grows() -> None:
    clean, worst = F.cross_entropy(logistic()(X), Y), F.softplus(0.1 * 1.1 * 3.5 - SIGNS * (X @ W + B)).mean()
    for share, k in ((0.0, 1.0), (0.5, 0.75), (1.0, 0.5)):
        loss, _ = ibp()(logistic(), X, Y, batch(share=share))
        assert number(loss) == pytest.approx(number(k * clean + (1 - k) * worst), rel=1e-6)


@pytest.mark.parametrize("threat", [Linf(), L2()])
def test_the_margins_are_those_of_certify(threat: Linf | L2) -> None:
    model, (x, y) = small((1, 8, 8), 10), images()
    least = worst_margins(model, x, y, batch(0.02, 6, threat=threat), 1.0, 0.0)
    found = certify(model, x, y, threat, 0.02, "interval")
    if isinstance(threat, Linf):  # under other norms certify tightens the first layer beyond its interval
        assert torch.allclose(least.amin(1), found.margin, atol=1e-9)
    assert (least.amin(1) <= found.margin + 1e-9).all()


@pytest.mark.parametrize("crown", [0.0, 0.5, 1.0])
def test_no_corner_of_the_ball_is_below_the_bounds(crown: float) -> None:
    model, (x, y) = small((1, 8, 8), 10), images()
    least = worst_margins(model, x, y, batch(0.05, 6), 1.0, crown)
    for draw in range(20):
        corner = x + 0.05 * (2 * torch.rand(x.shape, generator=generator(Key.of(draw))) - 1).sign()
        output = model(corner.clamp(0, 1))
        margins = output.gather(1, y[:, None]) - output
        others = least < torch.inf
        assert (margins.double() >= least)[others].all()
    assert (least == torch.inf).sum() == 6
    if crown:  # a linear bound over the same intervals, mixed in, is another number
        assert not torch.allclose(least.amin(1), worst_margins(model, x, y, batch(0.05, 6), 1.0, 0.0).amin(1))


def test_linear_bounds_fade_with_the_warm_up() -> None:
    model, (x, y) = small((1, 8, 8), 10), images()
    linear, interval = ([number(loss(model, x, y, batch(0.05, 6, share=s))[0]) for s in (0.5, 1.0)] for loss in (crown_ibp(), ibp()))
    assert linear[1] == interval[1]
    assert linear[0] != interval[0]


def test_modes_statistics_and_inputs_are_left_and_every_weight_learns() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)
    )
    model.train()
    x, y = images()
    before, state = x.clone(), torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        loss, logs = ibp()(model, x, y, batch(0.02, 6))
    loss.backward()
    assert all(module.training for module in model.modules())
    assert int(model[1].num_batches_tracked) == 1
    assert torch.equal(x, before)
    assert torch.equal(state, torch.get_rng_state())
    assert not logs["certified"].requires_grad
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_what_cannot_be_bounded_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="layer '1' has no certified bounds"):
        ibp()(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), X, Y, batch())
    for options, words in (({"kappa": 1.5}, "kappa: 1.5"), ({"reach": 0.0}, "reach: 0.0")):
        with pytest.raises(BadInput, match=words):
            make("ibp", options)


def test_a_short_training_proves_what_training_on_attacks_does_not() -> None:
    draws = generator(Key.of(2))
    x = torch.rand(500, 16, generator=draws)
    y = (x[:, :8].sum(1) > x[:, 8:].sum(1)).long()
    x[:, :8] += 0.3 * y[:, None]
    x[:, 8:] += 0.3 * (1 - y[:, None])
    parts = ((x[:400], y[:400]), (x[400:], y[400:]))
    against, course = Against(Linf(), 0.15, box=(0.0, 1.3)), Course(epochs=15, batch=50, rate=0.01, average=0.0, warmup=0.5, certify=True)
    shares = {}
    for name, loss in (("ibp", ibp()), ("pgd", pgd(steps=3, share=0.5))):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        done = fit(model, loss, *parts, against, replace(course, merit=by_certified))
        shares[name] = done.best.certified
        assert proven(model, *parts[1], Linf(), 0.15, (0.0, 1.3)) == done.best.certified
    assert shares["ibp"] > 0.9
    assert shares["pgd"] < 0.7
