"""Catastrophic overfitting: what counts as a collapse, and what the watch sees."""

import pytest
import torch
from torch import nn

from epsball.defenses.training import Record
from epsball.reproduce.overfitting import Point, Watch, collapse


def points(*pairs):
    """FGSM and PGD counts of 100, every 10 steps."""
    return [Point(10 * (i + 1), 100, own, robust) for i, (own, robust) in enumerate(pairs)]


def test_a_collapse_is_half_of_the_best_pgd_accuracy_while_fgsm_accuracy_holds():
    assert collapse(points((40, 30), (60, 50), (70, 26), (80, 24), (90, 2)), 100) == 40
    assert collapse(points((40, 30), (60, 50), (59, 24)), 100) is None  # the whole training fails
    assert collapse(points((60, 5), (70, 0)), 100) is None  # never robust
    assert collapse(points((60, 6), (70, 0)), 100) == 20


@pytest.fixture
def line():
    """Says 1 where the mean of four pixels is above 0.5: FGSM finds the worst input, and a margin of 0.3 is what stands."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[0.0] * 4, [1.0] * 4]))
        net[1].bias.copy_(torch.tensor([0.0, -2.0]))
    return net


def record(step, collapsed):
    return Record(1, step, 0.0, 1.0, {}, 1.0, 0.0, 0.1, 0.3, collapsed=collapsed)


def test_the_watch_counts_what_stands_and_notes_alarms(line):
    x = torch.tensor([0.05, 0.15, 0.35, 0.65, 0.85, 0.95])[:, None].expand(6, 4).reshape(6, 1, 2, 2).contiguous()
    watch = Watch(line, (x, torch.tensor([0, 0, 0, 1, 1, 0])), every=2)
    for step in range(1, 6):
        watch(step, 5, record(step, step == 4) if step in (2, 4) else None)
    assert watch.points == [Point(step, 5, 3, 3) for step in (2, 4, 5)]  # one is wrong before, two are within 0.3 of the line
    assert watch.alarms == [4]
