"""What the trainings of maxout networks are made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from epsball.core import Key
from epsball.data import Dataset
from epsball.defenses.training import sgd
from epsball.reproduce import maxout_training, nets
from epsball.reproduce.base import percent_of
from epsball.reproduce.maxout_training import Bounded


def test_a_row_of_weights_is_cut_to_the_bound_and_shorter_ones_and_biases_are_left() -> None:
    weights = nn.Parameter(torch.tensor([[6.0, 8.0], [0.3, 0.4]]))
    bias = nn.Parameter(torch.tensor([9.0, 9.0]))
    made = Bounded(sgd, 2.0)([weights, bias], 1.0, 0.0)
    weights.grad, bias.grad = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2)
    made.step()
    assert weights.tolist()[0] == pytest.approx([1.2, 1.6], rel=1e-4)  # (3, 4) is cut to length 2
    assert weights.tolist()[1] == pytest.approx([0.3, 0.4])
    assert bias.tolist() == [9.0, 9.0]


def test_a_kernel_is_cut_as_a_whole() -> None:
    kernels = nn.Parameter(torch.ones(2, 3, 4, 4))
    made = Bounded(sgd, 1.0)([kernels], 1.0, 0.0)
    kernels.grad = torch.zeros_like(kernels)
    made.step()
    assert kernels.flatten(1).norm(dim=1).tolist() == pytest.approx([1.0, 1.0], rel=1e-4)


def test_weights_start_small_where_that_is_asked_for() -> None:
    net = nets.maxout(6, 2, start=0.005)
    for parameter in net.parameters():
        assert float(parameter.detach().abs().max()) <= 0.005
        assert (float(parameter.detach().abs().max()) > 0) == (parameter.ndim > 1)
    assert float(nets.maxout(6, 2)[2].linear.weight.detach().abs().max()) > 0.03


def test_a_maxout_map_is_the_largest_of_its_pieces_and_of_a_window() -> None:
    layer = nets.MaxoutConv(2, 3, 2)
    x = torch.randn(4, 2, 10, 12, generator=nets.generator(Key.of(0)))
    maps = layer.conv(x)  # (4, 6, 6, 8): piece p of unit u is map 3 p + u
    assert layer(x).shape == (4, 3, 3, 4)
    first, second = maps[:, 1], maps[:, 4]
    wanted = torch.maximum(first, second).unflatten(1, (3, 2)).unflatten(3, (4, 2)).amax((2, 4))
    assert torch.equal(layer(x)[:, 1], wanted)


def test_the_convolutional_one_takes_digits() -> None:
    net = nets.maxout_conv()
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert sum(p.numel() for p in net.parameters()) == 206_506


def test_inputs_made_for_one_network_are_judged_by_another() -> None:
    y = torch.tensor([0, 1, 0, 1])
    x = torch.full((4, 1, 2, 2), 0.5) + 0.1 * (2 * y - 1)[:, None, None, None]
    data = Dataset(x, y, "planted", (), torch.arange(4), 4, ())

    def linear(bias: float) -> nn.Module:
        net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        with torch.no_grad():
            net[1].weight.copy_(torch.tensor([[-1.0] * 4, [1.0] * 4]))
            net[1].bias.copy_(torch.tensor([bias, -bias]))
        return net

    fooled, firm = linear(2.0), linear(0.5)  # 1 where the pixels sum up to more than 2, than 0.5
    assert maxout_training.crossed(fooled, fooled, data) == percent_of(4, 4)  # 1.6 + 1 and 2.4 - 1
    assert maxout_training.crossed(fooled, firm, data) == percent_of(2, 4)  # zeros at 2.6 only: ones at 1.4 stand
