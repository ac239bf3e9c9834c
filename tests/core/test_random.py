"""Keyed noise: a function of the key and the sample, of nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lawkit import rng, tensor

from epsball.core import Key, content_ids


def test_known_numbers() -> None:
    """Pinned: a change here changes every recorded run."""
    ids = content_ids(torch.tensor([[0.0, 0.5], [1.0, 0.25]]))
    drawn = Key.of(0).fold("pgd").uniform(ids, torch.zeros(2, 2))
    assert ids.tolist() == [-2991406558603590315, 4210753865295216276]
    assert drawn.tolist() == [[0.8380575180053711, 0.507124662399292], [0.47300392389297485, 0.09371894598007202]]
    assert torch.equal(drawn, Key((0, "pgd")).uniform(ids, torch.zeros(2, 2)))


@given(st.integers(0, 2**40), st.sampled_from(("uniform", "normal", "exponential")))
def test_rows_hang_on_their_id_only(seed: int, kind: str) -> None:
    x = tensor(rng(seed % 1000).random((6, 2, 3)))
    ids, key = content_ids(x), Key.of(seed)
    whole = getattr(key, kind)(ids, x)
    order = torch.tensor([5, 2, 2, 0])
    assert torch.equal(getattr(key, kind)(ids[order], x[order]), whole[order])
    assert torch.equal(getattr(key, kind)(ids, x.double()).float(), whole)
    assert not torch.equal(getattr(key.fold("a"), kind)(ids, x), whole)
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 6


def test_paths_do_not_collide() -> None:
    x = torch.zeros(1, 8)
    ids = content_ids(x)
    keys = [Key((0,)), Key((1,)), Key((0, "1")), Key((0, 1)), Key((0, "a", "b")), Key((0, "ab")), Key((0, "a", 0, "b")), Key((0, "a,b"))]
    assert len({tuple(k.uniform(ids, x)[0].tolist()) for k in keys}) == len(keys)


def test_rows_of_one_batch_may_have_keys_of_their_own() -> None:
    """`branch` and `fold` in any order, and `take`: every row draws what its own path draws."""
    x = tensor(rng(2).random((6, 3)))
    ids, numbers, more = content_ids(x), torch.tensor([2, 0, 1, 1, 2, 0]), torch.tensor([1, 1, 0, 0, 1, 0])
    key = Key.of(4).branch(numbers, lambda key, number: key.fold("run", number) if number else key).fold("deep")
    key = key.branch(more, lambda key, number: key.fold("target", number)).fold("end")
    drawn = key.normal(ids, x)
    for row, (number, target) in enumerate(zip(numbers.tolist(), more.tolist(), strict=True)):
        path = Key.of(4).fold("run", number) if number else Key.of(4)
        own = path.fold("deep", "target", target, "end")
        assert torch.equal(own.normal(ids[row : row + 1], x[row : row + 1])[0], drawn[row])
    rows = torch.tensor([4, 4, 1])
    assert torch.equal(key.take(rows).normal(ids[rows], x[rows]), drawn[rows])
    assert Key.of(4).branch(torch.tensor([3, 3]), lambda key, number: key.fold(number)) == Key((4, 3))
    with pytest.raises(ValueError, match="longer"):
        key.normal(ids[:2], x[:2])


def test_moments() -> None:
    x = torch.zeros(50, 400) + torch.arange(50)[:, None]
    ids, key = content_ids(x), Key((3,))
    u, n, e = (getattr(key, kind)(ids, x).double() for kind in ("uniform", "normal", "exponential"))
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 0.01
    assert abs(float(n.mean())) < 0.03
    assert abs(float(n.std()) - 1) < 0.03
    assert abs(float(e.mean()) - 1) < 0.03
    assert abs(np.corrcoef(u[0], u[1])[0, 1]) < 0.2


def test_ids_name_content_and_shape() -> None:
    x = tensor(rng(1).random((5, 4)))
    ids = content_ids(x)
    assert len(set(ids.tolist())) == 5
    assert torch.equal(content_ids(x.double()), ids)
    assert torch.equal(content_ids(x[[3, 3]]), ids[[3, 3]])
    assert torch.equal(content_ids(x.t().contiguous().t()), ids)
    assert not torch.equal(content_ids(x.reshape(5, 2, 2)), ids)
    y = x.clone()
    y[2, 1] = torch.nextafter(y[2, 1], torch.tensor(2.0))
    assert (content_ids(y) != ids).tolist() == [False, False, True, False, False]
