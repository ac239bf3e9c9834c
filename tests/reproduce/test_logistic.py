"""The experiment on logistic regression: threes and sevens, and a network that answers as the formula does."""

from __future__ import annotations

import torch

from epsball.core import Key
from epsball.data import Dataset
from epsball.defenses.training import adversarial_logistic
from epsball.reproduce import nets
from epsball.reproduce.fgsm import EVERYWHERE, step
from epsball.reproduce.logistic import binary, classifier


def dataset(n: int = 40) -> Dataset:
    draws = nets.generator(Key.of(0))
    y = torch.arange(n) % 10
    return Dataset(torch.rand(n, 1, 4, 4, generator=draws), y, "planted", (), torch.arange(n), n, ())


def test_threes_and_sevens_become_zeros_and_ones() -> None:
    data = dataset()
    chosen = binary(data)
    assert chosen.y.tolist() == [0, 1] * 4
    assert torch.equal(chosen.x, data.x[(data.y == 3) | (data.y == 7)])


def test_one_step_of_fgsm_errs_exactly_where_the_closed_form_says() -> None:
    data = binary(dataset(200))
    weight, bias = torch.randn(16, generator=nets.generator(Key.of(1))), torch.tensor(-0.3)
    margin = (2 * data.y - 1) * (data.x.flatten(1) @ weight + bias)
    for radius in (0.02, 0.25):
        found = step(classifier(weight, bias), data, radius, EVERYWHERE)
        loss = adversarial_logistic(margin, weight, radius)
        assert torch.equal(found.wrong, loss > torch.tensor(2.0).log())  # softplus(0) is the boundary
