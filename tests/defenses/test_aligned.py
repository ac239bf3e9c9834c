"""Perceptually aligned gradients: directions and angles by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.core import Key
from epsball.defenses.training import Batch, PerceptuallyAligned, class_mean, nearest, one_image
from epsball.defenses.training.aligned import ToNearest
from epsball.defenses.training.batch import generator
from epsball.errors import BadInput
from epsball.threats import Linf

X = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
Y = torch.tensor([0, 0, 1, 1])
W = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
BATCH = Batch(Linf().within((0.0, 1.0)), torch.full((4,), 0.1, dtype=torch.float64), generator(Key.of(0)))


def linear() -> nn.Linear:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(W)
        model.bias.zero_()
    return model


def test_the_angles_of_a_linear_model_by_hand() -> None:
    toward = torch.tensor([[3.0, 1.0], [-1.0, 1.0]])
    loss, logs = PerceptuallyAligned(lambda x, c: toward[c], weight=2.0)(linear(), X, Y, BATCH)
    # the gradient of log p(c | x) is (1 - p_c) (w_c - w_other): its direction does not hang on x
    away = torch.stack([W[0] - W[1], W[1] - W[0]])
    angles = 1 - F.cosine_similarity(away, toward)
    assert float(logs["misaligned"]) == pytest.approx(float(angles.mean()), rel=1e-5)
    expected = F.cross_entropy(linear()(X), Y) + 2 * angles.sum()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_a_score_model_of_ones_own_is_asked_for_every_class_and_never_trained() -> None:
    seen: list[int] = []
    scores = nn.Linear(2, 2)

    def direction(x: Tensor, classes: Tensor) -> Tensor:
        seen.append(int(classes[0]))
        return scores(x)

    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3))
    loss, _ = PerceptuallyAligned(direction)(model, X, Y, BATCH)
    loss.backward()
    assert seen == [0, 1, 2]
    assert scores.weight.grad is None
    assert all(p.grad is not None for p in model.parameters() if p is not model[2].bias)


def test_directions_from_data() -> None:
    first = torch.tensor([0, 0, 0, 0])
    assert torch.equal(one_image((X, Y)).direction(X, first), X[0] - X)
    assert torch.equal(class_mean((X, Y)).direction(X, 1 - first), torch.tensor([0.5, 1.0]) - X)
    near = nearest((X, Y)).direction
    assert torch.equal(near(X, Y), torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]))  # not itself
    assert torch.equal(near(X, 1 - Y), torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, -1.0], [0.0, -1.0]]))


def test_the_nearest_is_found_by_brute_force_too() -> None:
    draws = generator(Key.of(1))
    x, y, z = torch.rand(40, 1, 3, 3, generator=draws), torch.arange(40) % 3, torch.rand(7, 1, 3, 3, generator=draws)
    classes = torch.arange(7) % 3
    found = ToNearest(x, y)(z, classes)
    for row in range(7):
        among = x[y == classes[row]]
        apart = (among - z[row]).flatten(1).norm(dim=1)
        assert torch.allclose(found[row], among[apart.argmin()] - z[row])


def test_a_class_without_samples_is_refused() -> None:
    for make in (one_image, class_mean, nearest):
        with pytest.raises(BadInput, match="no sample of class 1"):
            make((X, torch.tensor([0, 0, 2, 2])))
