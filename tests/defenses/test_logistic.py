"""Adversarial logistic regression: the closed form against every corner, and what each penalty does to the weights."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn import functional as F

from epsball.core import Key
from epsball.defenses.training import adversarial_logistic, fit_logistic
from epsball.defenses.training.batch import generator
from epsball.defenses.training.logistic import noise
from epsball.errors import BadInput

DRAWS = generator(Key.of(0))
X = torch.rand(60, 4, generator=DRAWS, dtype=torch.float64)
Y = torch.where(X[:, 0] + 0.2 * X[:, 1] > 0.6, 1.0, -1.0).double()


def test_the_closed_form_is_the_worst_corner() -> None:
    w, b, radius = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64), 0.25, 0.1
    corners = torch.tensor(list(product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    losses = F.softplus(-Y[:, None] * ((X[:, None] + radius * corners) @ w + b))
    assert torch.allclose(adversarial_logistic(Y * (X @ w + b), w, radius), losses.amax(1))


def test_the_penalty_fades_where_l1_decay_does_not() -> None:
    w, sure = torch.tensor([2.0, -1.0]), torch.tensor([50.0])
    assert float(adversarial_logistic(sure, w, 0.5)) < 1e-9  # a sample that is right beyond doubt costs nothing
    assert float(F.softplus(-sure) + 0.5 * w.abs().sum()) == pytest.approx(1.5)


def fitted(penalty: str, strength: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    return fit_logistic(X, Y, penalty, strength, generator(Key.of(1)), steps=800, rate=0.1)  # type: ignore[arg-type]


def worst(w: torch.Tensor, b: torch.Tensor, radius: float = 0.1) -> float:
    return float(adversarial_logistic(Y * (X @ w + b), w, radius).mean())


def test_each_fit_is_the_best_at_its_own_goal() -> None:
    found = {penalty: fitted(penalty) for penalty in ("none", "adversarial", "l1")}
    assert min(found, key=lambda name: worst(*found[name])) == "adversarial"
    assert min(found, key=lambda name: worst(*found[name], radius=0.0)) == "none"
    decayed = {name: worst(w, b, 0.0) + 0.1 * float(w.abs().sum()) for name, (w, b) in found.items()}
    assert min(decayed, key=decayed.__getitem__) == "l1"


def test_the_gradient_vanishes_at_the_adversarial_optimum() -> None:
    w, b = (value.requires_grad_() for value in fit_logistic(X, Y, "adversarial", 0.02, generator(Key.of(1)), steps=3000, rate=0.1))
    loss = adversarial_logistic(Y * (X @ w + b), w, 0.02).mean()
    slopes = torch.autograd.grad(loss, (w, b))
    assert float(slopes[1].abs()) < 1e-3
    assert bool((slopes[0].abs() < 2e-2).all())  # at a weight of 0 any slope within the radius is one


def test_noise_is_what_it_says_and_fits_hang_on_the_generator_alone() -> None:
    signs, uniform = (noise(X, penalty, generator(Key.of(2))) for penalty in ("signs", "uniform"))  # type: ignore[arg-type]
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert 0.9 < float(uniform.abs().amax()) <= 1
    assert all(torch.equal(a, b) for a, b in zip(fitted("signs"), fitted("signs"), strict=True))
    assert not torch.equal(fitted("signs")[0], fitted("none")[0])


def test_labels_of_zero_and_one_are_refused() -> None:
    with pytest.raises(BadInput, match="needs -1 and 1"):
        fit_logistic(X, (Y + 1) / 2, "none", 0.0, generator(Key.of(0)))
