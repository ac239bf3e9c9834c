"""Patches: the window and nothing else, legal, and stronger the larger."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lawkit import check_same, filled, rng, tensor
from torch import Tensor, nn

from epsball.attacks import pgd
from epsball.attacks.channel import Channel
from epsball.core import Attack, Descent, Key, OfRadius, Victim, autograd, content_ids
from epsball.core.sources import Eot, Through
from epsball.data.digits import digits
from epsball.errors import BadInput
from epsball.models.digits import load
from epsball.objectives import margin
from epsball.threats import Linf
from epsball.threats.compose import compose
from epsball.threats.patch import Patch


def case(n: int = 9) -> tuple[nn.Module, Tensor, Tensor]:
    x = tensor(rng(3, 5).random((n, 2, 6, 7)))
    model = filled(nn.Sequential(nn.Flatten(), nn.Linear(84, 16), nn.ReLU(), nn.Linear(16, 4)), 2, 2.0).double()
    return model, x, model(x.double()).argmax(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_laws(dtype: torch.dtype) -> None:
    x = case(5)[1].to(dtype)
    threat, radius = Patch(3, 2, (1, 4)).within((0.0, 1.0)), torch.tensor([0.0, 1e-3, 0.4, 1.0, torch.inf], dtype=torch.float64)
    none = threat.start(x, radius, None, content_ids(x))
    assert none.shape == (5, 2, 3, 2)
    assert torch.equal(threat.apply(x, none), x)
    z = tensor(rng(4).standard_normal(none.shape) * 2, dtype)
    p = threat.project(x, z, radius)
    assert bool((threat.size(x, p) <= radius).all())
    assert torch.equal(threat.project(x, p, radius), p)
    assert torch.equal(p[4], z[4])
    moved = threat.apply(x, p)
    outside = torch.ones(6, 7, dtype=torch.bool)
    outside[1:4, 4:6] = False
    assert torch.equal(moved[..., outside], x[..., outside])
    assert bool(((moved >= 0) & (moved <= 1)).all())
    assert torch.equal(moved[0], x[0])
    assert bool((threat.size(x, threat.start(x, radius, Key((1,)), content_ids(x))) <= radius).all())
    assert bool((threat.reach(x) <= 1).all())


def test_attacks_work_unchanged_and_batches_do_not_matter() -> None:
    model, x, labels = case()
    attack = pgd(8, threat=Patch(3, 3, (2, 2)))
    whole = attack(model, x, labels, 1.0)
    assert bool(whole.reached.any())
    assert torch.equal(model(whole.x_adv.double()).argmax(1) != labels, whole.reached)
    for size in (1, 2, 7):
        check_same(whole, attack(Victim(model, batch_size=size), x, labels, 1.0))
    through = Attack("seen", Patch(3, 3), margin, Descent(OfRadius(0.2), gradient=Through(Channel(), Eot(autograd, 2))), 4)
    assert through(model, x[:, :1].expand(-1, 2, -1, -1), labels, 1.0).x_adv.shape == x.shape
    both = pgd(8, threat=compose((Patch(3, 3), 1.0), (Linf(), 0.02)))(model, x, labels, 1.0)
    assert int(both.reached.sum()) >= 1


def test_larger_patches_break_more_digits() -> None:
    """100 digits, robust model, 20 steps: 2 x 2, 3 x 3 and 4 x 4 of 8 x 8 pixels in the middle."""
    source = digits("test")
    x, y = torch.from_numpy(source.take(np.arange(100))[0]), torch.from_numpy(np.asarray(source.labels[:100])).long()
    model = load("digits-robust")
    counts = [int(pgd(20, threat=Patch(k, k, (2, 2)))(model, x, y, 1.0).reached.sum()) for k in (2, 3, 4)]
    assert counts[0] < counts[1] < counts[2], counts
    assert counts[2] >= 60, counts


def test_bad_patches_are_refused_in_one_line() -> None:
    model, x, labels = case()
    for bad in (
        lambda: Patch(0, 2),
        lambda: Patch(2, 2, (-1, 0)),
        lambda: pgd(2, threat=Patch(7, 2))(model, x, labels, 1.0),
        lambda: pgd(2, threat=Patch(2, 2))(model, x.flatten(1), labels, 1.0),
    ):
        with pytest.raises(BadInput) as caught:
            bad()
        assert "\n" not in str(caught.value)
