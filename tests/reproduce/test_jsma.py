"""JSMA's table: success by a fresh look, shares of features, class by class."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from epsball.attacks import jsma
from epsball.data import from_arrays
from epsball.reproduce import Setting, aimed
from epsball.reproduce.base import run
from epsball.reproduce.jsma import GAMMA, INCREASE, MOVES, Measured, heat, picture


def small():
    """A linear network on 20 features, and 30 samples that it classifies rightly."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(20, 10))
    with torch.no_grad():
        net[1].weight.copy_(2 * torch.randn(10, 20, generator=torch.Generator().manual_seed(0)))
        net[1].bias.zero_()
    x = np.random.default_rng(2).random((30, 1, 4, 5), dtype=np.float32)
    return net.eval(), from_arrays(x, net(torch.from_numpy(x)).argmax(1).numpy(), layout="chw")


def test_success_and_distortion_are_those_of_the_images():
    net, data = small()
    aim = aimed.at_all(data, 6)
    hits = aimed.attacked(jsma(steps=3, gamma=0.3), net, aim, math.inf, Setting())
    one = Measured("toy", aim, hits, INCREASE, "")
    assert 0 < int(hits.reached.sum()) < 54
    assert torch.equal(hits.reached, net(hits.x_adv).argmax(1) == aim.targets)
    moved = (hits.x_adv != aim.x).flatten(1).sum(1)
    assert torch.equal(hits.size[hits.reached], moved[hits.reached].double())
    assert int(hits.size.max()) <= 6  # floor(0.3 * 20 / 2) pairs
    assert bool((hits.x_adv >= aim.x).all())
    success, distortion = one.lines()
    assert success.ours.startswith(f"{100 * float(hits.reached.double().mean()):.1f} %")
    assert distortion.ours.startswith(f"{100 * float(moved[hits.reached].double().mean()) / 20:.2f} %")


def test_by_pair_of_classes():
    net, data = small()
    aim = aimed.at_all(data, 6)
    hits = aimed.attacked(jsma(steps=3), net, aim, math.inf, Setting())
    one = Measured("toy", aim, hits, INCREASE, "")
    table = one.by_pair(hits.reached, torch.ones_like(hits.reached))
    for source in range(10):
        for target in range(10):
            chosen = (aim.labels == source) & (aim.targets == target)
            if bool(chosen.any()):
                assert table[source][target] == float(hits.reached[chosen].double().mean())
            else:
                assert math.isnan(table[source][target])
    assert [figure.name for figure in heat(one)] == ["success", "distortion"]
    assert picture(one).svg.count("<image") == 100


def test_the_papers_budget():
    assert int(GAMMA * 784 / 2) == MOVES


@pytest.mark.slow
def test_quick(quick):
    finding = run("jsma", quick("jsma"))
    assert [line.what.split(":")[1].strip() for line in finding.lines] == [
        "accuracy",
        *["success", "distortion"] * 4,
        "accuracy",
        *["success", "distortion"] * 2,
    ]
    assert [figure.name for figure in finding.figures] == ["success", "distortion", "images"]
    assert all(line.ours.endswith("n = 36") for line in finding.lines if line.what.endswith("success"))
