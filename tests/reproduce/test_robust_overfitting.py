"""Robust overfitting: where patience ends a training, and what the watch keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from epsball.data import Dataset
from epsball.defenses.training import Against, Course, Record, Standard, fit
from epsball.reproduce.robust_overfitting import Watch, stopped
from epsball.threats import Linf


def history(*bests):
    return tuple(Record(i, i, 0.0, 1.0, {}, 1.0, 0.0, 0.1, 0.2, best=best) for i, best in enumerate(bests, 1))


@pytest.fixture
def data():
    y = torch.arange(32) % 2
    x = (y[:, None] * 0.6 + torch.linspace(0, 0.4, 32)[:, None]).expand(32, 4).reshape(32, 1, 2, 2).contiguous()
    return Dataset(x, y, "planted", (), torch.arange(32), 32, ())


def line():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))


def test_patience_counts_epochs_since_the_best():
    assert stopped(history(True, False, True, False, False, False), 2) == 5
    assert stopped(history(True, False, True, False, False, False), 3) == 6
    assert stopped(history(True, False, False), 9) == 3


def test_it_ends_where_fit_ends(data):
    pair = (data.x, data.y)
    course = Course(epochs=12, batch=8, average=0.0)
    whole = fit(line(), Standard(), pair, pair, Against(Linf(), 0.1), course, 0)
    for patience in (1, 2, 4):
        early = fit(line(), Standard(), pair, pair, Against(Linf(), 0.1), Course(epochs=12, batch=8, average=0.0, patience=patience), 0)
        assert early.history[-1].epoch == stopped(whole.history, patience)


def test_the_watch_measures_every_epoch_and_keeps_the_last_weights(data):
    net, pair = line(), (data.x, data.y)
    watch = Watch(net, data, Against(Linf(), 0.05), 0)
    fitted = fit(net, Standard(), pair, pair, watch.against, Course(epochs=5, batch=8, average=0.0, rate=0.1), 0, progress=watch)
    assert watch.seen == [record.robust for record in fitted.history]  # the same images, the same noise
    net.load_state_dict(watch.last)
    again = fit(
        line(), Standard(), pair, pair, watch.against, Course(epochs=5, batch=8, average=0.0, rate=0.1, merit=lambda r: (r.epoch, 0)), 0
    )
    assert torch.equal(net[1].weight, again.model[1].weight)
