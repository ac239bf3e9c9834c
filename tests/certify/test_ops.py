"""Each part alone: its lines hold everywhere in the interval, and its rounding error is the textbook's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from epsball.certify.graph import _SIGMOID, _TANH, _max
from epsball.certify.ops import Map, MaxPool, Op, Relu, dot, gamma

POOL = _max(3, 2, 1, 1, False, (2, 6, 6), (2, 3, 3))
assert isinstance(POOL, MaxPool)
PARTS: dict[str, Op] = {"relu": Relu(), "leaky": Relu(0.3), "tanh": _TANH, "sigmoid": _SIGMOID, "pool": POOL}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("width", [0.1, 1.0, 4.0])
def test_lines_hold_everywhere_in_the_interval(name: str, width: float) -> None:
    generator, part = torch.Generator().manual_seed(4), PARTS[name]
    center = torch.randn(40, 2, 6, 6, generator=generator).double()
    half = width * torch.rand(center.shape, generator=generator).double()
    low, high = center - half, center + half
    shape = part.interval((low, high))[0].shape
    a = torch.randn(shape, generator=generator).double() * (torch.rand(shape, generator=generator) < 0.1)
    (slopes,), constant = part.back(a, (low, high))
    for _ in range(40):
        point = low + (high - low) * (2 * torch.rand(center.shape, generator=generator).double() - 0.5).clamp(0, 1)
        value = part.interval((point, point))[0]
        assert bool((dot(a, value) >= dot(slopes, point) + constant - 1e-12).all())


def test_max_pooling_is_torchs() -> None:
    x = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(4)).double()
    assert torch.equal(POOL.interval((x, x))[0], nn.functional.max_pool2d(x, 3, 2, 1))  # type: ignore[union-attr]


def test_the_error_of_a_sum_is_gamma_times_its_absolute_terms() -> None:
    layer = Map(lambda x: x @ torch.tensor([[2.0], [-3.0]]), lambda x: x @ torch.tensor([[2.0], [3.0]]), (2,), 2, torch.tensor([5.0]))
    low, high, none = torch.tensor([[-1.0, 0.0]]), torch.tensor([[0.5, 4.0]]), torch.zeros(1, 2)
    assert float(layer.error(2.0**-23, (low, high, none))) == pytest.approx(gamma(4, 2.0**-24) * (2 + 12 + 5))
    assert float(layer.error(2.0**-23, (low, high, none + 0.25))) == pytest.approx(1.25, rel=1e-5)
    assert gamma(4, 0.25) == float("inf")
