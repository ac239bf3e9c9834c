"""C&W's distances: what is counted is what a fresh look and fresh norms say."""

import numpy as np
import pytest
import torch
from torch import nn

from epsball.data import from_arrays
from epsball.errors import BadInput
from epsball.reproduce import Setting, aimed
from epsball.reproduce.base import run
from epsball.reproduce.cw import CASES, lines, measured, network

QUICK = Setting(quick=True)


@pytest.fixture(scope="module")
def net():
    made = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    with torch.no_grad():
        made[1].weight.copy_(2 * torch.randn(10, 16, generator=torch.Generator().manual_seed(0)))
        made[1].bias.zero_()
    return made.eval()


@pytest.fixture(scope="module")
def data(net):
    x = np.random.default_rng(1).random((60, 1, 4, 4), dtype=np.float32)
    y = net(torch.from_numpy(x)).argmax(1)
    y[::4] = (y[::4] + 1) % 10
    return from_arrays(x, y.numpy(), layout="chw")


def test_only_right_samples_class_after_class(net, data):
    chosen = aimed.right(net, data, 12)
    assert len(chosen.y) == 12
    assert torch.equal(net(chosen.x).argmax(1), chosen.y)
    everyone = aimed.right(net, data, 60)
    assert len(everyone.y) == 45
    first = len(everyone.y.unique())
    assert len(everyone.y[:first].unique()) == first  # every class once before any comes again
    with pytest.raises(BadInput, match="n: 60: the network is wrong"):
        aimed.right(nn.Sequential(net, Turned()), data, 5)


class Turned(nn.Module):
    def forward(self, x):
        return x.roll(3, 1) - 100 * torch.eye(10)[x.argmax(1)] - 100 * torch.eye(10)[(x.argmax(1) + 1) % 10]


def test_targets_are_other_classes(data):
    random = aimed.at_random(data, QUICK)
    assert bool((random.targets != random.labels).all())
    assert torch.equal(random.targets, aimed.at_random(data, QUICK).targets)
    assert not torch.equal(random.targets, aimed.at_random(data, Setting(seed=1)).targets)
    every = aimed.at_all(data, 5)
    assert len(every) == 45
    assert torch.equal(every.x[::9], data.x[:5])
    together = torch.stack([every.labels, every.targets], 1).reshape(5, 9, 2)
    for rows in together:
        assert sorted([int(rows[0, 0]), *rows[:, 1].tolist()]) == list(range(10))


def test_counts_and_distances_are_those_of_the_images(net, data):
    sample = aimed.right(net, data, 8)
    random, every = aimed.at_random(sample, QUICK), aimed.at_all(sample, 2)
    found = measured("toy", net, random, every, QUICK)
    assert [one.case.norm for one in found] == ["l2", "l0", "linf"]
    for one, p in zip(found, (2, 0, torch.inf), strict=True):
        for hits, aim in ((one.random, random), (one.every, every)):
            assert torch.equal(hits.reached, net(hits.x_adv).argmax(1) == aim.targets)
            assert torch.equal(hits.reached, hits.claimed)
            change = (hits.x_adv.double() - aim.x.double()).flatten(1)
            length = torch.linalg.vector_norm(change, p, dim=1)
            assert torch.allclose(hits.size[hits.reached], length[hits.reached], rtol=1e-6)
        assert int(one.random.reached.sum()) >= 6
        near, far = one.extreme(worst=False), one.extreme(worst=True)
        whole = one.every.reached.reshape(-1, 9).all(1)
        assert len(near) == len(far) == int(whole.sum())
        assert all(a < b for a, b in zip(near, far, strict=True))
    said = lines("toy", found[0], ("a", "b", "c"))
    reached = found[0].random.reached
    assert said[0].ours.startswith(f"{100 * float(reached.double().mean()):.1f} %")
    assert said[0].ours.endswith(f"n = {len(reached)}")
    assert [line.paper for line in said[1::2]] == ["a (recalled, not read)", "100 % (recalled, not read)", "c (recalled, not read)"]


def test_the_network_of_the_released_code():
    assert sum(p.numel() for p in network().parameters()) == 312_202
    assert network()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert {case.norm: case.attack(False).name for case in CASES} == {"l2": "cw_l2", "l0": "cw_l0", "linf": "cw_linf"}


@pytest.mark.slow
def test_quick(quick):
    finding = run("cw", quick("cw"))
    assert len(finding.lines) == 2 * (1 + 3 * 6)
    assert [figure.name for figure in finding.figures] == ["mnist", "cifar"]
    assert all(figure.svg.count("<image") == 4 * 3 for figure in finding.figures)
