"""Gradients by the input are autograd's, twice over, whatever the layer; weights get none within a search."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.core import Key
from epsball.core.by_input import ByInput
from epsball.defenses.training.batch import generator


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(Key.of(seed)), dtype=torch.float64)


def slopes(model: nn.Module, x: Tensor, direct: bool) -> tuple[Tensor, Tensor]:
    """Gradient of a curved score by x, and that of the gradient's squared length."""
    z = x.clone().requires_grad_()
    if direct:
        output = model(z)
    else:
        with ByInput():
            output = model(z)
    (first,) = torch.autograd.grad(output.sin().sum(), z, create_graph=True)
    return first.detach(), torch.autograd.grad(first.square().sum(), z)[0]


LAYERS: list[dict[str, Any]] = [
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 5, "padding": 2},
    {"kernel_size": (3, 2), "stride": (2, 3), "padding": (0, 1)},  # rows at the end that no kernel sees
    {"kernel_size": (4, 3), "stride": (2, 3), "padding": (2, 0), "bias": False},
    {"kernel_size": 2, "stride": 4},
    {"kernel_size": (2, 3), "stride": (1, 3), "padding": (1, 0)},
    {"kernel_size": 3, "dilation": 2, "bias": False},
    {"kernel_size": 4, "stride": 2, "dilation": 2, "padding": 1},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 1},
]


def convolutional(channels: int, options: dict[str, Any], layout: torch.memory_format) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(channels, 3, **options), nn.Tanh(), nn.Conv2d(3, 2, 2)).double().to(memory_format=layout)  # type: ignore[call-overload]
    for place, p in enumerate(model.parameters()):
        p.data.copy_(drawn(*p.shape, seed=place))
    return model


@pytest.mark.parametrize("options", LAYERS, ids=range(len(LAYERS)))
@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_both_derivatives_are_those_of_autograd(options: dict[str, Any], channels: int, layout: torch.memory_format) -> None:
    model, x = convolutional(channels, options, layout), drawn(5, channels, 9, 11, seed=7)
    for ours, known in zip(slopes(model, x, direct=False), slopes(model, x, direct=True), strict=True):
        assert torch.allclose(ours, known, rtol=1e-10, atol=1e-12)


def answered(layer: nn.Module, x: Tensor) -> bool:
    """Whether the layer's call is answered here."""
    with ByInput():
        return type(layer(x.requires_grad_()).grad_fn).__name__ in ("_ConvBackward", "_LinearBackward")


def test_only_layers_that_gain_are_answered() -> None:
    for channels, options, ours in [
        (1, {"kernel_size": 3}, True),
        (4, {"kernel_size": 3}, True),
        (5, {"kernel_size": 3}, False),
        (4, {"kernel_size": 3, "stride": 2}, True),
        (6, {"kernel_size": 3, "stride": 2}, False),
        (6, {"kernel_size": 4, "stride": 2}, True),
        (6, {"kernel_size": 4, "stride": 2, "groups": 2}, False),
        (33, {"kernel_size": 4, "stride": 2}, False),
    ]:
        assert answered(nn.Conv2d(channels, 4, **options), torch.ones(1, channels, 8, 8)) is ours, (channels, options)
    large = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    assert answered(nn.Linear(256, 128), torch.ones(128, 256)) is large
    assert not answered(nn.Linear(256, 128), torch.ones(127, 256))
    assert not answered(nn.Linear(256, 128).double(), torch.ones(128, 256).double())


def test_large_linear_layers_are_those_of_autograd() -> None:
    model = nn.Sequential(nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 256, bias=False))
    for place, p in enumerate(model.parameters()):
        p.data.copy_(drawn(*p.shape, seed=place) / 16)
    x = drawn(128, 256, seed=7)
    with ByInput():
        outputs = model(x.float()).detach()
    ours, known = (outputs, *slopes(model, x.float(), direct=False)), (model.double()(x).detach(), *slopes(model, x, direct=True))
    for one, exact in zip(ours, known, strict=True):
        assert torch.allclose(one.double(), exact, atol=2e-5 * float(exact.abs().max()))


def test_outputs_are_the_same_bits_and_the_first_weights_get_no_gradient() -> None:
    x, weight, bias = drawn(2, 1, 8, 8).float(), drawn(4, 1, 3, 3).float().requires_grad_(), drawn(4).float().requires_grad_()
    layer = nn.Conv2d(1, 4, 3)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    with ByInput():
        output, direct = layer(x.requires_grad_()), F.conv2d(x, weight, bias)
    assert torch.equal(output, direct)
    assert torch.autograd.grad(output.sum(), [x, layer.weight, layer.bias], allow_unused=True)[1:] == (None, None)
    assert torch.autograd.grad(direct.sum(), weight)[0].shape == weight.shape  # a call of another form is not answered


def test_what_is_made_of_weights_is_made_once_and_again_when_they_change() -> None:
    model, x, by_input = convolutional(6, LAYERS[0], torch.contiguous_format), drawn(3, 6, 8, 8).requires_grad_(), ByInput()
    for _ in range(2):
        for _ in range(2):
            with by_input:
                output = model(x)
            ours, known = (torch.autograd.grad(score.sum(), x)[0] for score in (output, model(x)))
            assert torch.allclose(ours, known, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            model[0].weight.mul_(-2.0)  # type: ignore[index]
    assert len(by_input._made) == 2


@pytest.mark.parametrize(("channels", "options"), [(1, {"kernel_size": 3}), (6, {"kernel_size": 4, "stride": 2})])
def test_bfloat16_gradients_come_back_in_the_precision_of_the_input(channels: int, options: dict[str, Any]) -> None:
    layer, x = nn.Conv2d(channels, 4, **options), drawn(2, channels, 8, 8).float().requires_grad_()
    with ByInput(), torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype is torch.bfloat16
    (ours,) = torch.autograd.grad(output.float().sum(), x)
    (exact,) = torch.autograd.grad(layer(x).sum(), x)
    assert ours.dtype is torch.float32
    assert torch.allclose(ours, exact, atol=0.02 * float(exact.abs().max()))
