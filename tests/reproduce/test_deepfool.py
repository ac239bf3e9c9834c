"""rho: relative distances, checked against closed forms on a linear network."""

import math

import pytest
import torch
from torch import nn

from epsball.attacks import deepfool
from epsball.reproduce import Setting
from epsball.reproduce.base import run
from epsball.reproduce.deepfool import NOWHERE, Walk, at_ninety, changed, earliest, shares, signed, walked
from epsball.threats import L2, Linf


@pytest.fixture(scope="module")
def net():
    """Two classes; |logit difference| over the dual norm of the weight's difference is the distance."""
    made = nn.Sequential(nn.Flatten(), nn.Linear(9, 2))
    with torch.no_grad():
        made[1].weight.copy_(torch.randn(2, 9, generator=torch.Generator().manual_seed(3)))
        made[1].bias.fill_(0.1)
    return made.eval()


@pytest.fixture(scope="module")
def x():
    return torch.rand(30, 1, 3, 3, generator=torch.Generator().manual_seed(4))


def nearest(net, x, dual):
    slope = (net[1].weight[0] - net[1].weight[1]).detach()
    output = net(x).detach()
    return (output[:, 0] - output[:, 1]).abs().double() / torch.linalg.vector_norm(slope.double(), dual)


@pytest.mark.parametrize(("threat", "p", "dual"), [(L2(), 2.0, 2), (Linf(), math.inf, 1)])
def test_deepfool_on_a_linear_network_is_the_distance(net, x, threat, p, dual):
    found = walked(deepfool(threat=threat), net, x, p, NOWHERE, Setting())
    assert bool(found.fooled.all())
    expected = nearest(net, x, dual) / torch.linalg.vector_norm(x.double().flatten(1), p, dim=1)
    assert torch.allclose(found.rho, 1.02 * expected, rtol=2e-3)


def test_fgsm_on_a_linear_network_needs_the_linf_distance(net, x):
    fooled, two, most = signed(net, x, NOWHERE, Setting())
    assert fooled.shape == two.shape == most.shape == (80, 30)
    found = earliest(fooled, most)
    expected = nearest(net, x, 1) / torch.linalg.vector_norm(x.double().flatten(1), math.inf, dim=1)
    inside = found.fooled & (expected > 0.002)
    assert int(inside.sum()) >= 20
    step = 2000 ** (1 / 79)  # of the grid
    assert bool((found.rho[inside] >= expected[inside] * (1 - 1e-5)).all())
    assert bool((found.rho[inside] <= step * expected[inside] * (1 + 1e-5)).all())
    assert bool((fooled[1:] | ~fooled[:-1]).all())  # on a linear network more strength never loses a success


def test_first_success_and_ninety_percent():
    fooled = torch.tensor([[0, 0, 1], [1, 0, 0], [1, 0, 1]], dtype=torch.bool)
    rho = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.float64)
    found = earliest(fooled, rho)
    assert found.fooled.tolist() == [True, False, True]
    assert found.rho[found.fooled].tolist() == [4, 3]
    assert found.told() == "3.500 [2.520, 4.480], n = 2; fooled 66.7 % [9.4, 99.2], n = 3"
    assert at_ninety(fooled, rho) == "no strength of the grid fools 90 %"
    assert at_ninety(fooled | (rho > 6), rho) == "8.000 [6.868, 9.132], n = 3"
    assert Walk(rho[0], torch.ones(3, dtype=torch.bool)).told() == "2.000 [0.868, 3.132], n = 3"


def test_shares_and_changes(net, x):
    assert torch.allclose(shares(x, 1.5 * x, 2), torch.full((30,), 0.5, dtype=torch.float64))
    assert torch.allclose(shares(x, x + 0.1, math.inf), 0.1 / x.flatten(1).amax(1).double(), rtol=1e-5)
    assert not bool(changed(net, x, x).any())
    assert torch.equal(changed(net, x, 1 - x), net(x).argmax(1) != net(1 - x).argmax(1))


@pytest.mark.slow
def test_quick(quick):
    finding = run("deepfool", quick("deepfool"))
    assert len(finding.lines) == 3 * 11
    assert [figure.name for figure in finding.figures] == ["rho-lenet", "images", "rho-fc500-150-10", "rho-batch-norm"]
    assert finding.figures[1].svg.count("<image") == 24
