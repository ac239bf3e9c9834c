"""Interpolated training on CIFAR-10: the pieces that the table rests on."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from epsball.data import Dataset
from epsball.defenses.training import Against, Course, fit
from epsball.defenses.training.watch import Record, measure
from epsball.reproduce import Setting, iat
from epsball.threats import Linf

RADIUS = 8 / 255
LOSSES = iat.losses(7, 0.25)


def planted(clean, behind):
    """The first `clean` of 100 images are wrong, and the first `behind` behind PGD-10."""
    return iat.Wrong(torch.arange(100) < clean, torch.arange(100) < behind)


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
    found = iat.wrong(net, test, RADIUS, 3)
    clean, stands = measure(net, test.x, test.y, Linf(), RADIUS, (0.0, 1.0), 3)
    assert (1 - found.clean.double().mean()).item() == pytest.approx(clean)
    assert (1 - found.behind.double().mean()).item() == pytest.approx(stands)
    assert found.behind[found.clean].all()
    assert found.behind.sum() > found.clean.sum()


def test_a_difference_counts_pairs():
    first, second = torch.tensor([True, True, False, False]), torch.tensor([True, False, False, True])
    assert iat.difference(first, second).startswith("0.0 points")
    assert iat.difference(first, second).endswith("p = 1")
    sure = iat.difference(torch.ones(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool))
    assert sure.startswith("100.0 points")
    assert sure.endswith(f"p = {2 * 0.5**40:.2g}")


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
    plain, own = (planted(c, b) for c, b in zip(clean, behind, strict=True))
    assert iat.shows(plain, own) is expected


def test_the_verdict_counts_seeds_and_signs():
    """The clean error falls by 20 points with both seeds; with the second one robustness pays for it."""
    plain, sure, paid = planted(30, 50), planted(10, 50), planted(10, 70)
    seeds = {
        seed: {(name, epoch): own if name in (iat.IAT, iat.MIXUP) else plain for name in LOSSES for epoch in (iat.KEPT, iat.LAST)}
        for seed, own in ((0, sure), (2, paid))
    }
    told = iat._verdict(iat.FEW, seeds)
    assert "seeds 0 and 2" in told
    assert "mixup alone less standard, last, clean error: -20.0 points" in told
    assert told.count("-20.0 and +0.0, -20.0 and +20.0, shown in 1 of 2") == 4
    assert [line.why for line in iat._between(iat.FEW, seeds[0], 0)] == ["it shows"] * 4
    assert [line.why for line in iat._between(iat.FEW, seeds[2], 2)] == ["it does not show"] * 4


def test_only_the_interpolation_is_between_half_clean_and_iat(test):
    """With one input in every batch there is nothing to mix with: both trainings are one."""
    trained = [line(), line()]
    for net, name in zip(trained, (iat.HALF, iat.IAT), strict=True):
        course = Course(epochs=1, batch=1, average=0.0, warmup=0.0)
        fit(net, LOSSES[name], (test.x[:8], test.y[:8]), (test.x[8:], test.y[8:]), Against(Linf(), RADIUS), course, 0)
    torch.testing.assert_close(trained[0][1].weight, trained[1][1].weight)
    assert not torch.equal(trained[0][1].weight, line()[1].weight)


@pytest.mark.parametrize("build", [part.build for part in iat.PARTS], ids=["small", "wide", "residual"])
def test_kept_and_last_are_the_epochs_they_say(test, tmp_path, build):
    images = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    train, held = (Dataset(images[part], test.y[part], "planted", (), test.y[part], 60, ()) for part in (slice(40), slice(40, 60)))
    regime = replace(iat.MANY, build=build)
    run = iat.trained(iat.PGD, regime, train, held, Setting(quick=True, cache=tmp_path))
    assert run.records[iat.LAST] == run.history[-1]
    assert run.records[iat.KEPT] == [record for record in run.history if record.best][-1]
    for epoch, net in run.nets.items():
        clean, stands = measure(net, held.x, held.y, Linf(), RADIUS, (0.0, 1.0), 0)
        assert (clean, stands) == (run.records[epoch].clean, run.records[epoch].robust)


def test_the_picture_has_the_robust_trainings_only():
    record = Record(1, 1, 0.0, 1.0, {}, 0.5, 0.25, 0.1, 0.2)
    svg = iat._picture(iat.MANY, {name: iat.Trained({}, {}, (record, record)) for name in LOSSES}).svg
    assert f">{iat.HALF}<" in svg
    assert f">{iat.STANDARD}<" not in svg


@pytest.mark.parametrize("build", [iat.wide, iat.residual])
def test_a_network_is_the_seed_s(build):
    """Every loss begins at the same weights, whatever was drawn before."""
    with torch.random.fork_rng():
        one = build((3, 16, 16), 1)(torch.ones(2, 3, 16, 16))
        torch.rand(3)
        assert torch.equal(one, build((3, 16, 16), 1)(torch.ones(2, 3, 16, 16)))
    assert not torch.equal(one, build((3, 16, 16), 2)(torch.ones(2, 3, 16, 16)))


def test_a_block_without_weights_is_its_shortcut():
    block = iat.Block(2, 2, 1)
    torch.nn.init.zeros_(block.second[-1].weight)
    x = torch.rand(3, 2, 4, 4)
    assert torch.equal(block(x), x)
    assert iat.Block(2, 5, 2)(x).shape == (3, 5, 2, 2)


@pytest.mark.parametrize("name", iat.ROBUST)
@pytest.mark.parametrize("part", iat.PARTS, ids=lambda part: part.name)
def test_a_part_trains_by_its_own_search(test, monkeypatch, part, name):
    seen = {}

    class Asked(Exception):
        """What was asked for is known."""

    def asked(place, build, loss, *_):
        seen[place] = loss
        raise Asked

    monkeypatch.setattr(iat.robust, "trained", asked)
    data = Dataset(torch.rand(60, 3, 16, 16), test.y, "planted", (), test.y, 60, ())
    with pytest.raises(Asked):
        iat.trained(name, part, data, data, Setting(quick=True))
    (loss,) = seen.values()
    assert (loss.search.steps, loss.search.share) == (part.steps, part.share)


def test_every_part_has_a_picture_of_its_own():
    record = Record(1, 1, 0.0, 1.0, {}, 0.5, 0.25, 0.1, 0.2)
    names = [iat._picture(part, {iat.IAT: iat.Trained({}, {}, (record, record))}).name for part in iat.PARTS]
    assert names == ["ways", "ways-few", "ways-deep"]
