"""Universal changes: the radius holds, and fooling rates are those of fresh answers."""

import pytest
import torch
from torch import nn

from epsball.reproduce import Setting, nets
from epsball.reproduce.base import run
from epsball.reproduce.universal import crossed, lines, measured, noise_like, searches, visible
from epsball.threats import L2, Linf

QUICK = Setting(quick=True)


@pytest.fixture(scope="module")
def net():
    made = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    with torch.no_grad():
        made[1].weight.copy_(torch.randn(10, 48, generator=torch.Generator().manual_seed(0)))
        made[1].bias.zero_()
    return made.eval()


@pytest.mark.parametrize(("norm", "p", "radius"), [(Linf(), torch.inf, 0.1), (L2(), 2, 0.6)])
def test_rates_are_those_of_fresh_answers(net, norm, p, radius):
    fit, test = torch.rand(2, 50, 3, 4, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    found = measured(net, "toy", norm, radius, fit, test, QUICK)
    assert [one.search for one in found] == ["sum", "gradient"]
    for one in found:
        assert float(torch.linalg.vector_norm(one.found.delta.double().flatten(), p)) <= radius
        for x, hit in ((test, one.hit), (fit, one.found.fooled)):
            assert torch.equal(hit, net((x + one.found.delta).clamp(0, 1)).argmax(1) != net(x).argmax(1))
        assert bool(one.hit.any())
    table = lines("toy", "paper", found)
    assert [line.ours for line in table][::2] == [f"{line}" for line in (told(one.hit) for one in found)]
    assert "forwards" in table[1].why


def told(hit):
    from epsball.reproduce.base import percent_of

    return percent_of(int(hit.sum()), len(hit))


def test_across_networks(net):
    fit, test = torch.rand(2, 30, 3, 4, 4, generator=torch.Generator().manual_seed(2)).unbind(0)
    other = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).eval()
    figure = crossed({"one": net, "two": other}, measured(net, "one", Linf(), 0.1, fit, test, QUICK), test)
    assert figure.svg.count('class="cell"') == 4
    assert "30 test images" in figure.caption


def test_random_signs_and_pictures():
    signs = noise_like(torch.zeros(3, 4, 4), 0.1, Setting())
    assert torch.allclose(signs.abs(), torch.tensor(0.1))
    assert len(signs.unique()) == 2
    assert torch.equal(signs, noise_like(torch.zeros(3, 4, 4), 0.1, Setting()))
    seen = visible(torch.tensor([-2.0, 0.0, 1.0]))
    assert seen.tolist() == [0.0, 0.5, 0.75]
    assert visible(torch.zeros(2)).tolist() == [0.5, 0.5]


def test_the_papers_stop():
    found = searches(Linf(), quick=False)
    assert found["sum"].base.name == "deepfool"
    assert found["sum"].reach == float("inf")
    assert nets.cifar_normed()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.slow
def test_quick(quick):
    finding = run("universal", quick("universal"))
    assert [figure.name for figure in finding.figures] == ["changes", "images", "cross"]
    assert sum("fooled test images" in line.what for line in finding.lines) == 6
    assert all(line.ours.endswith("n = 60") for line in finding.lines if "fooled test images" in line.what)
