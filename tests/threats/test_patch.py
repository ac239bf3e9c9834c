"""Patches: the window and nothing else, legal, and stronger the larger."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lawkit import check_same, filled, rng, tensor
from torch import Tensor, nn

from epsball.attacks import apgd, pgd
from epsball.attacks.channel import Channel
from epsball.core import Attack, Descent, Key, OfRadius, Victim, autograd, content_ids
from epsball.core.sources import Eot, Through
from epsball.data.digits import digits
from epsball.errors import BadInput
from epsball.models.digits import load
from epsball.objectives import margin
from epsball.threats import Linf
from epsball.threats.compose import compose
from epsball.threats.patch import Patch, Window


def case(n: int = 9) -> tuple[nn.Module, Tensor, Tensor]:
    x = tensor(rng(3, 5).random((n, 2, 6, 7)))
    model = filled(nn.Sequential(nn.Flatten(), nn.Linear(84, 16), nn.ReLU(), nn.Linear(16, 4)), 2, 2.0).double()
    return model, x, model(x.double()).argmax(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_laws(dtype: torch.dtype) -> None:
    x = case(5)[1].to(dtype)
    threat, radius = Window(3, 2, (1, 4)).within((0.0, 1.0)), torch.tensor([0.0, 1e-3, 0.4, 1.0, torch.inf], dtype=torch.float64)
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
    attack = pgd(8, threat=Window(3, 3, (2, 2)))
    whole = attack(model, x, labels, 1.0)
    assert bool(whole.reached.any())
    assert torch.equal(model(whole.x_adv.double()).argmax(1) != labels, whole.reached)
    for size in (1, 2, 7):
        check_same(whole, attack(Victim(model, batch_size=size), x, labels, 1.0))
    through = Attack("seen", Window(3, 3), margin, Descent(OfRadius(0.2), gradient=Through(Channel(), Eot(autograd, 2))), 4)
    assert through(model, x[:, :1].expand(-1, 2, -1, -1), labels, 1.0).x_adv.shape == x.shape
    both = pgd(8, threat=compose((Window(3, 3), 1.0), (Linf(), 0.02)))(model, x, labels, 1.0)
    assert int(both.reached.sum()) >= 1


def test_larger_patches_break_more_digits() -> None:
    """100 digits, robust model, 20 steps: 2 x 2, 3 x 3 and 4 x 4 of 8 x 8 pixels in the middle."""
    source = digits("test")
    x, y = torch.from_numpy(source.take(np.arange(100))[0]), torch.from_numpy(np.asarray(source.labels[:100])).long()
    model = load("digits-robust")
    counts = [int(pgd(20, threat=Window(k, k, (2, 2)))(model, x, y, 1.0).reached.sum()) for k in (2, 3, 4)]
    assert counts[0] < counts[1] < counts[2], counts
    assert counts[2] >= 60, counts


def test_a_patch_is_a_square_of_any_place() -> None:
    x = case(40)[1]
    threat, radius = Patch().within((0.0, 1.0)), torch.full((40,), 3.7, dtype=torch.float64)
    z = threat.start(x, radius, Key((1,)), content_ids(x))
    assert threat.size(x, z).tolist() == [3.0] * 40
    changed = (z != x).any(1)
    assert len({tuple(row.nonzero()[0].tolist()) for row in changed}) >= 15  # of 4 x 5 places
    solid = [len(set(values[:, place].flatten().tolist())) <= 2 for values, place in zip(z, changed, strict=True)]
    assert 12 <= sum(solid) <= 28
    wide = threat.start(x, torch.full((40,), 9.0, dtype=torch.float64), Key((1,)), content_ids(x))
    assert threat.size(x, wide).tolist() == [7.0] * 40  # as far as the image reaches


def test_projection_drags_the_square_to_where_more_is_gained() -> None:
    x = torch.full((1, 1, 4, 6), 0.5)
    threat, radius = Patch().within((0.0, 1.0)), torch.full((1,), 2.0, dtype=torch.float64)
    z = x.clone()
    z[:, :, 1:3, 1:3] = 0.6
    z[:, :, 1:3, 3] = 0.9
    moved = threat.project(x, z, radius)
    assert (moved != x)[0, 0].nonzero().tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]
    assert torch.equal(moved[:, :, 1:3, 2:4], z[:, :, 1:3, 2:4])
    way = threat.steepest(x, moved, torch.linspace(-1, 1, 24).reshape(1, 1, 4, 6))
    assert set(way[0, 0, 1:3, 2:4].abs().flatten().tolist()) == {0.5}  # the sign, for a side of 2
    assert float(way.abs().amax()) == 0.5


def test_anywhere_breaks_more_than_the_middle() -> None:
    """60 digits, robust model, 2 x 2 pixels, 3 restarts of 20 steps."""
    source = digits("test")
    x, y = torch.from_numpy(source.take(np.arange(60))[0]), torch.from_numpy(np.asarray(source.labels[:60])).long()
    model = load("digits-robust")
    middle = apgd(20, 3, threat=Window(2, 2, (3, 3)), objective=margin)(model, x, y, 1.0)
    anywhere = apgd(20, 3, threat=Patch(), objective=margin)(model, x, y, 2.0)
    assert int(anywhere.reached.sum()) > int(middle.reached.sum()) + 10
    assert bool((anywhere.size <= 2).all())


def test_bad_patches_are_refused_in_one_line() -> None:
    model, x, labels = case()
    for bad in (
        lambda: Window(0, 2),
        lambda: Window(2, 2, (-1, 0)),
        lambda: pgd(2, threat=Window(7, 2))(model, x, labels, 1.0),
        lambda: pgd(2, threat=Window(2, 2))(model, x.flatten(1), labels, 1.0),
    ):
        with pytest.raises(BadInput) as caught:
            bad()
        assert "\n" not in str(caught.value)
