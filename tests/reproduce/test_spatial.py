"""stAdv's table: success by a fresh look at the moved images, displacements from the flow itself."""

import pytest
import torch
from torch import nn

from epsball.attacks import noise
from epsball.attacks.spatial import rotation_translation, stadv
from epsball.data import load_data
from epsball.models.digits import load
from epsball.reproduce import Setting, aimed, nets
from epsball.reproduce.base import run
from epsball.reproduce.spatial import CASES, displacements, flows, still_right, told
from epsball.threats.flow import Flow, Rigid


@pytest.fixture(scope="module")
def digits():
    net, data = load("digits-standard"), load_data("digits", n=60)
    return net, aimed.right(net, data, 20)


def test_success_is_that_of_the_moved_images(digits):
    net, data = digits
    aim = aimed.at_random(data, Setting())
    hits = aimed.attacked(stadv(5), net, aim, 0.5, Setting())
    assert torch.equal(hits.x_adv, Flow(box=(0.0, 1.0)).apply(aim.x, hits.z))
    assert torch.equal(hits.reached, net(hits.x_adv).argmax(1) == aim.targets)
    assert 0 < int(hits.reached.sum()) < 20
    assert told(hits).startswith(f"{5 * int(hits.reached.sum())}.0 %")
    far = displacements(hits.z)
    assert far.shape == (20, 8, 8)
    assert torch.allclose(far.flatten(1).amax(1), hits.size, rtol=1e-6)
    assert float(hits.size.max()) <= 0.5


def test_the_least_displacement_is_inside_the_widest_bound(digits):
    net, data = digits
    lines, least = flows("toy", net, aimed.at_random(data, Setting()), Setting(quick=True))
    assert len(lines) == 4
    assert float(least.size.max()) <= 5.0
    mean = float(displacements(least.z[least.reached]).mean())
    assert lines[2].ours.startswith(f"{mean:.2f}")
    assert mean <= sum(least.sizes) / len(least.sizes)


def test_accuracy_under_motion_falls_with_effort(digits):
    net, data = digits
    grid = rotation_translation(3, 3, Rigid(20, 1))
    kept = [float(still_right(a, net, data, Setting()).split()[0]) for a in (noise(1, Rigid(20, 1)), noise(10, Rigid(20, 1)), grid)]
    assert 100 >= kept[0] >= kept[1] >= kept[2]
    assert kept[0] > kept[2]
    outcome = grid(net, data.x, data.y, 1.0)
    assert kept[2] == pytest.approx(100 * float((~outcome.reached).double().mean()), abs=0.05)


def test_the_networks_have_the_layers_of_the_released_code():
    shapes = {case.name: [tuple(p.shape) for p in case.build().parameters() if p.ndim > 1] for case in CASES}
    assert shapes["A"] == [(64, 1, 5, 5), (64, 64, 5, 5), (128, 25_600), (10, 128)]
    assert shapes["B"] == [(64, 1, 8, 8), (128, 64, 6, 6), (128, 128, 5, 5), (10, 128)]
    assert shapes["C"] == [(128, 1, 3, 3), (64, 128, 3, 3), (128, 36_864), (10, 128)]
    for case in CASES:
        assert nets.answers(case.build().eval(), torch.zeros(1, 1, 28, 28)).shape == (1, 10)
        assert any(isinstance(layer, nn.Dropout) for layer in case.build())


@pytest.mark.slow
def test_quick(quick):
    finding = run("stadv", quick("stadv"))
    assert len(finding.lines) == 3 + 4 + 4  # network B alone, then LeNet
    assert [figure.name for figure in finding.figures] == ["images", "displacement"]
    assert finding.figures[0].svg.count("<image") == 9
