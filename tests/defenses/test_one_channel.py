"""The input gradient of a convolution with one input channel is autograd's, twice over; everything else is left to autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.core import Key
from epsball.defenses.training.batch import generator
from epsball.defenses.training.one_channel import OneChannel


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(Key.of(seed)), dtype=torch.float64)


def slopes(model: nn.Module, x: Tensor, direct: bool) -> tuple[Tensor, Tensor]:
    """Gradient of a curved score by x, and that of the gradient's squared length."""
    z = x.clone().requires_grad_()
    if direct:
        output = model(z)
    else:
        with OneChannel():
            output = model(z)
    (first,) = torch.autograd.grad(output.sin().sum(), z, create_graph=True)
    return first.detach(), torch.autograd.grad(first.square().sum(), z)[0]


LAYERS: list[dict[str, Any]] = [
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 5, "padding": 2},
    {"kernel_size": (3, 2), "stride": (2, 3), "padding": (0, 1)},  # rows at the end that no kernel sees
    {"kernel_size": 3, "dilation": 2, "bias": False},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 1},
]


@pytest.mark.parametrize("options", LAYERS, ids=range(len(LAYERS)))
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_both_derivatives_are_those_of_autograd(options: dict[str, Any], channels: int, layout: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(channels, 3, **options), nn.Tanh(), nn.Conv2d(3, 2, 2)).double().to(memory_format=layout)  # type: ignore[call-overload]
    for place, p in enumerate(model.parameters()):
        p.data.copy_(drawn(*p.shape, seed=place))
    x = drawn(5, channels, 9, 11, seed=7)
    for ours, known in zip(slopes(model, x, direct=False), slopes(model, x, direct=True), strict=True):
        assert torch.allclose(ours, known, rtol=1e-10, atol=1e-12)


def test_outputs_are_the_same_bits_and_the_first_weights_get_no_gradient() -> None:
    x, weight, bias = drawn(2, 1, 8, 8).float(), drawn(4, 1, 3, 3).float().requires_grad_(), drawn(4).float().requires_grad_()
    layer = nn.Conv2d(1, 4, 3)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    with OneChannel():
        output, direct = layer(x.requires_grad_()), F.conv2d(x, weight, bias)
    assert torch.equal(output, direct)
    assert torch.autograd.grad(output.sum(), [x, layer.weight, layer.bias], allow_unused=True)[1:] == (None, None)
    assert torch.autograd.grad(direct.sum(), weight)[0].shape == weight.shape  # a call of another form is not answered


def test_bfloat16_gradients_come_back_in_the_precision_of_the_input() -> None:
    layer, x = nn.Conv2d(1, 4, 3), drawn(2, 1, 8, 8).float().requires_grad_()
    with OneChannel(), torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype is torch.bfloat16
    (ours,) = torch.autograd.grad(output.float().sum(), x)
    (exact,) = torch.autograd.grad(layer(x).sum(), x)
    assert ours.dtype is torch.float32
    assert torch.allclose(ours, exact, atol=0.02 * float(exact.abs().max()))
