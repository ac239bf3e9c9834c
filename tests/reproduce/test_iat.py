"""Interpolated training on CIFAR-10: the pieces that the table rests on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from epsball.data import Dataset
from epsball.defenses.training import Against, Course, fit
from epsball.defenses.training.watch import Record, measure
from epsball.reproduce import Setting, iat
from epsball.threats import Linf


def line():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()


@pytest.fixture
def test():
    x = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(x=x, y=torch.arange(60) % 3)


def test_errors_are_those_that_trainings_measure(test):
    net = line()
    wrong, behind = iat.errors(net, test, SimpleNamespace(seed=3))
    clean, stands = measure(net, test.x, test.y, Linf(), iat.RADIUS, (0.0, 1.0), 3)
    assert (1 - wrong.double().mean()).item() == pytest.approx(clean)
    assert (1 - behind.double().mean()).item() == pytest.approx(stands)
    assert behind[wrong].all()
    assert behind.sum() > wrong.sum()


def test_a_difference_counts_pairs():
    first, second = torch.tensor([True, True, False, False]), torch.tensor([True, False, False, True])
    assert iat.difference(first, second).startswith("0.0 points")
    assert "McNemar p = 1," in iat.difference(first, second)
    sure = iat.difference(torch.ones(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool))
    assert sure.startswith("100.0 points")
    assert f"p = {2 * 0.5**40:.2g}, n = 40" in sure


@pytest.mark.parametrize(
    ("clean", "behind", "expected"),
    [
        ((30, 10), (50, 50), True),
        ((30, 10), (50, 60), False),
        ((30, 29), (50, 50), False),
        ((10, 30), (50, 50), False),
        ((30, 10), (60, 50), True),
    ],
)
def test_the_effect_is_less_clean_error_at_no_larger_robust_error(clean, behind, expected):
    plain, own = (iat.Measured(torch.arange(100) < c, torch.arange(100) < b, SimpleNamespace()) for c, b in zip(clean, behind, strict=True))
    assert iat.shows(plain, own) is expected


def test_only_the_interpolation_is_between_half_clean_and_iat(test):
    """With one input in every batch there is nothing to mix with: both trainings are one."""
    trained = [line(), line()]
    for net, name in zip(trained, (iat.HALF, iat.IAT), strict=True):
        course = Course(epochs=1, batch=1, average=0.0, warmup=0.0)
        fit(net, iat.LOSSES[name], (test.x[:8], test.y[:8]), (test.x[8:], test.y[8:]), Against(Linf(), iat.RADIUS), course, 0)
    torch.testing.assert_close(trained[0][1].weight, trained[1][1].weight)
    assert not torch.equal(trained[0][1].weight, line()[1].weight)


def test_kept_and_last_are_the_epochs_they_say(test, tmp_path):
    images = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    train, held = (Dataset(images[part], test.y[part], "planted", (), test.y[part], 60, ()) for part in (slice(40), slice(40, 60)))
    run = iat.trained(iat.PGD, train, held, Setting(quick=True, cache=tmp_path))
    assert run.records[iat.LAST] == run.history[-1]
    assert run.records[iat.KEPT] == [record for record in run.history if record.best][-1]
    for epoch, net in run.nets.items():
        clean, stands = measure(net, held.x, held.y, Linf(), iat.RADIUS, (0.0, 1.0), 0)
        assert (clean, stands) == (run.records[epoch].clean, run.records[epoch].robust)


def test_the_picture_has_the_robust_trainings_only():
    record = Record(1, 1, 0.0, 1.0, {}, 0.5, 0.25, 0.1, 0.2)
    svg = iat._picture({name: iat.Trained({}, {}, (record, record)) for name in iat.LOSSES}).svg
    assert f">{iat.HALF}<" in svg
    assert f">{iat.STANDARD}<" not in svg
