"""Cosines of input gradients, aimed pictures, and their judge: closed forms on linear networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from epsball.core import Key
from epsball.data import Dataset
from epsball.defenses.training.aligned import Toward
from epsball.reproduce import nets
from epsball.reproduce.alignment import FAR, aimed, alignment_of, nearest_class


@pytest.fixture
def linear():
    """Three classes, ten features: log p(c) has the gradient w_c - sum of p_k w_k."""
    net = nn.Linear(10, 3)
    draws = nets.generator(Key.of(5))
    with torch.no_grad():
        net.weight.copy_(torch.randn(3, 10, generator=draws))
        net.bias.zero_()
    return net.eval()


def test_the_cosine_is_that_of_the_gradient_in_closed_form(linear):
    x = torch.rand(4, 10, generator=nets.generator(Key.of(6)))
    images = torch.rand(3, 10, generator=nets.generator(Key.of(7)))
    p = linear(x).softmax(1).detach()
    gradients = linear.weight.detach()[None] - (p @ linear.weight.detach())[:, None]
    wanted = torch.cosine_similarity(gradients, images[None] - x[:, None], dim=2).mean(1)
    assert torch.allclose(alignment_of(linear, x, Toward(images)), wanted, atol=1e-5)


def test_classes_of_opposite_gradients_cancel():
    class Squares(nn.Module):
        """Two classes whose scores fall with the distance to one image, one faster."""

        def forward(self, x):
            return -((x - 0.2) ** 2).sum(1, keepdim=True).repeat(1, 2) * torch.tensor([1.0, 3.0])

    x = torch.full((2, 10), 0.7)
    cosines = alignment_of(Squares(), x, Toward(torch.full((2, 10), 0.2)))
    assert cosines.tolist() == pytest.approx([0.0, 0.0], abs=1e-5)  # one class goes there, the other away


def test_aimed_pictures_take_all_steps_and_stay_inside(linear):
    x, targets = torch.full((3, 10), 0.5), torch.tensor([0, 1, 2])
    assert linear(x).argmax(1).tolist() == [2, 2, 2]
    found = aimed(linear, x, targets, 0)
    assert linear(found).argmax(1).tolist() == [0, 1, 2]
    assert torch.equal(found[2], x[2])  # is what it is aimed at
    assert float((found - x).norm(dim=1).max()) <= FAR
    start, end = (linear(at).log_softmax(1).gather(1, targets[:, None])[:2] for at in (x, found))
    assert bool((end > -0.1).all())  # far beyond the boundary, at -0.7
    assert bool((start < -1).all())


def test_the_judge_is_the_nearest_training_image():
    data = Dataset(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([4, 7]), "planted", (), torch.arange(2), 2, ())
    assert nearest_class(torch.tensor([[0.4, 0.5], [0.9, 0.3], [0.1, 0.0]]), data).tolist() == [4, 7, 4]
