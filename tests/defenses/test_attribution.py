"""Attributions that add up, and the two losses that keep them where they are, by hand on linear models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.core import Key
from epsball.defenses.training import Batch, IgNorm, art, integrated_gradients
from epsball.defenses.training.attribution import Attributional, Explanation, Moved, triplet
from epsball.defenses.training.batch import generator
from epsball.defenses.training.inner import Search, uniform
from epsball.errors import BadInput
from epsball.threats import Linf

X = torch.tensor([[0.5, 0.4, 0.6], [0.3, 0.5, 0.5], [0.6, 0.6, 0.4], [0.5, 0.5, 0.5]])
Y = torch.tensor([0, 1, 1, 0])
W, B = torch.tensor([1.0, -2.0, 0.5]), 0.25
SIGNS = 2.0 * Y - 1


def batch() -> Batch:
    return Batch(Linf().within((0.0, 1.0)), torch.full((4,), 0.1, dtype=torch.float64), generator(Key.of(0)))


def logistic(first: Tensor | None = None) -> nn.Linear:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.stack([torch.zeros(3) if first is None else first, W]))
        model.bias.copy_(torch.tensor([0.0, B]))
    return model


def bent() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()


def test_attributions_sum_to_the_difference_of_the_scores() -> None:
    model, x, baseline = bent(), 3 * X.double(), -2 * X.double()

    def score(z: Tensor) -> Tensor:
        return model(z)[:, 1]

    found = integrated_gradients(score, x, baseline, 400)
    assert torch.allclose(found.sum(1), (score(x) - score(baseline)).detach(), atol=1e-5)
    assert not found.requires_grad
    coarse = integrated_gradients(score, x, baseline, 4)
    assert (coarse - found).abs().max() > 1e-3


def test_one_midpoint_is_exact_for_a_quadratic() -> None:
    found = integrated_gradients(lambda z: z.square().sum(1), X, torch.zeros_like(X), 1)
    assert torch.allclose(found, X.square())


def test_attributions_are_differentiable_by_weights_and_inputs() -> None:
    weight = torch.randn(3, dtype=torch.float64, generator=generator(Key.of(3))).requires_grad_()
    x = X.double().requires_grad_()

    def attributed(w: Tensor, z: Tensor) -> Tensor:
        return integrated_gradients(lambda p: (p @ w).tanh(), z, torch.zeros_like(z), 3, create_graph=True)

    assert torch.autograd.gradcheck(attributed, (weight, x))


OUTWARD = Search(7, 0.25, start=lambda x, _: x - 0.01 * SIGNS[:, None] * W.sign(), climb=Moved(2))
"""Every corner is a peak of the size of the attributions: which one is found hangs on the start."""


def test_ig_norm_of_logistic_regression_is_adversarial_training_in_closed_form() -> None:
    """At the worst corner all attributions of the loss have one sign, so that their sizes add up to the rise of the loss."""
    clean, worst = F.softplus(-SIGNS * (X @ W + B)), F.softplus(0.1 * 3.5 - SIGNS * (X @ W + B))
    for weight in (1.0, 2.0):
        loss, logs = IgNorm(OUTWARD, weight, points=40)(logistic(), X, Y, batch())
        assert float(logs["attributions"]) == pytest.approx(float((worst - clean).mean()), rel=1e-4)
        assert float(loss.detach()) == pytest.approx(float((clean + weight * (worst - clean)).mean()), rel=1e-4)


def test_the_search_of_ig_norm_climbs_what_it_says() -> None:
    model = logistic()
    x_adv = OUTWARD(model, X, Y, batch())
    assert torch.allclose(x_adv, X - 0.1 * SIGNS[:, None] * W.sign(), atol=1e-6)
    with pytest.raises(BadInput, match="points: 0"):
        IgNorm(Search(1, 1.0), points=0)


def test_the_triplet_by_hand() -> None:
    first, x_adv = torch.tensor([1.0, 1.0, 0.0]), X + 0.1
    loss, logs = Attributional(weight=3.0)(logistic(first), X, x_adv, Y, batch())
    total, rows = 0.0, torch.stack([first, W])
    for z in (X, x_adv):
        for row, y in zip(z, Y.tolist(), strict=True):
            near, far = (1 - F.cosine_similarity(row, g, dim=0) for g in (rows[y], rows[1 - y]))
            total += float(F.softplus(near - far)) / 8
    assert float(logs["strayed"]) == pytest.approx(total, rel=1e-5)
    assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(logistic(first)(x_adv), Y).detach()) + 3 * total, rel=1e-5)


def test_the_harder_explanation_of_the_two_is_taken() -> None:
    near, far = torch.tensor([0.2, 0.7]), torch.tensor([0.5, 0.1])
    assert float(triplet(near.amax(0), far.amin(0))) == pytest.approx(float(F.softplus(torch.tensor(0.6))))


def test_the_search_of_art_makes_explanations_stray() -> None:
    model = bent().float()
    objective = Explanation(top=1.0)(model, X, Y)

    def strayed(z: Tensor) -> Tensor:
        leaf = z.clone().requires_grad_()
        return objective(leaf, model(leaf)).detach()

    x_adv = art(steps=20, share=0.1, top=1.0).search(model, X, Y, batch())
    others = torch.stack([strayed(uniform(X, replace(batch(), generator=generator(Key.of(draw))))) for draw in range(50)])
    assert (strayed(x_adv) > others.amax(0)).all()
    assert (x_adv - X).abs().max() <= 0.1 + 1e-6


def test_only_the_strongest_features_are_looked_at() -> None:
    seen = Explanation(top=1 / 3)(logistic(), X, Y)
    leaf = X.clone().requires_grad_()
    model = logistic(torch.tensor([0.0, 1.0, 0.0]))
    score = seen(leaf, model(leaf)).sum()
    (gradient,) = torch.autograd.grad(score, leaf)
    assert ((gradient != 0).sum(1) <= 1).all()
