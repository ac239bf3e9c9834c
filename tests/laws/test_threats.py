"""Threat laws, over the norms of `THREATS`; those that only images have are in test_image_threats.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lawkit import NORMS, check_legal, measured, rng, tensor
from torch import Tensor

from epsball.core import Key, Projects, content_ids
from epsball.threats import Room, lp, named

DTYPES = (torch.float32, torch.float64)
SHAPES = ((1,), (6,), (2, 3, 3), (5, 2), (3, 2, 2), (2, 40))
BOXES: tuple[tuple[float, float], ...] = ((0.0, 1.0), (-3.0, 5.0), (-2.1179039301310043, 2.2489082969432315), (0.1, 0.7))
KINDS = ("plain", "mask", "budget", "both", "feature box")


@dataclass(frozen=True)
class Case:
    threat: Projects
    box: tuple[Any, Any]
    x: Tensor
    z: Tensor  # anything, some rows far outside, some inside
    radius: Tensor
    mask: Tensor | None
    budget: Tensor | None


def random_point(random: np.random.Generator, shape: tuple[int, ...], low: Any, high: Any) -> Any:
    """Inside the box, about a third of the features on its edges."""
    u = random.random(shape)
    u = np.where(random.random(shape) < 1 / 3, np.round(u), u)
    return low + (high - low) * u


def build(name: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype, box: tuple[float, float], kind: str, scale: float) -> Case:
    random, n = rng(seed), 5
    low, high = (np.asarray(b) for b in box)
    if kind == "feature box":
        low, high = low + random.random(shape) * 0.2, high - random.random(shape) * 0.2
    bounds = (tensor(low, torch.float64), tensor(high, torch.float64)) if kind == "feature box" else box
    room = Room(
        mask=tensor(random.random(shape) < 0.6) if kind in ("mask", "both") else None,
        budget=tensor(random.random(shape) * 0.3, torch.float64) if kind in ("budget", "both") else None,
    )
    threat = replace(named(name), room=room).within(bounds)  # type: ignore[type-var]
    x = tensor(random_point(random, (n, *shape), low, high), dtype)
    # Values on the box's edge may round past it: an honest user's data are inside in their own precision.
    x = torch.minimum(torch.maximum(x, inner(low, x, +np.inf)), inner(high, x, -np.inf))
    change = random.standard_normal((n, *shape)) * scale * np.array([1, 0.1, 0.001, 10, 0]).reshape(-1, *[1] * len(shape))
    z = (x.double() + tensor(change, torch.float64)).to(dtype)
    reach = np.maximum(threat.reach(x).numpy(), 1e-3)
    radius = tensor(random.permutation(np.array([0.0, 1e-6, 0.03, 0.3, 1.0])) * reach * random.random(n), torch.float64)
    return Case(threat, bounds, x, z, radius, room.mask, room.budget)


def inner(bound: Any, like: Tensor, toward: float) -> Tensor:
    exact = torch.as_tensor(bound, dtype=torch.float64).expand_as(like)
    near = exact.to(like.dtype)
    bad = near.double() < exact if toward > 0 else near.double() > exact
    return torch.where(bad, torch.nextafter(near, torch.full_like(near, toward)), near)


cases = st.builds(
    build,
    st.sampled_from(NORMS),
    st.integers(0, 10**6),
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    st.sampled_from(BOXES),
    st.sampled_from(KINDS),
    st.sampled_from((1e-30, 1e-3, 1.0, 30.0, 1e6, 1e20)),
)


def check_projection(case: Case) -> None:
    """Inside ball, box, mask and budget; idempotent; legal points bitwise untouched; nothing changed in place."""
    x, z, radius = case.x.clone(), case.z.clone(), case.radius.clone()
    p = case.threat.project(x, z, radius)
    assert torch.equal(x, case.x)
    assert torch.equal(z, case.z)
    assert torch.equal(radius, case.radius)
    assert bool((case.threat.size(x, p) <= radius).all())
    check_legal(case.threat.name, x, p, radius, case.box)
    change = (p.double() - x.double()).abs()
    if case.mask is not None:
        assert bool((change.masked_select((case.mask == 0).expand_as(change)) == 0).all())
    if case.budget is not None:
        assert bool((change <= case.budget).all())
    assert torch.equal(case.threat.project(x, p, radius), p)
    assert torch.equal(p[radius == 0], x[radius == 0])
    # A legal row beside illegal ones stays as it is.
    mixed = torch.where((torch.arange(len(x)) % 2 == 0).reshape(-1, *[1] * (x.ndim - 1)), p, z)
    assert torch.equal(case.threat.project(x, mixed, radius)[::2], p[::2])


@given(cases)
def test_projection(case: Case) -> None:
    check_projection(case)


@given(cases)
def test_projection_of_many_features(case: Case) -> None:
    with patch.object(lp, "_SORTED", 0):  # under L1 these are not sorted
        check_projection(case)


@given(cases)
def test_rows_are_independent(case: Case) -> None:
    whole = case.threat.project(case.x, case.z, case.radius)
    direction = case.threat.steepest(case.x, whole, case.z - case.x)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(case.threat.project(case.x[order], case.z[order], case.radius[order]), whole[order])
    for row in range(len(case.x)):
        one = slice(row, row + 1)
        x, z = case.x[one].clone(), case.z[one].clone()
        assert torch.equal(case.threat.project(x, z, case.radius[one].clone()), whole[one])
        assert torch.equal(case.threat.steepest(x, whole[one].clone(), (case.z - case.x)[one].clone()), direction[one])


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("features", [3072, 50_000])
def test_rows_are_independent_in_large_samples(name: str, features: int) -> None:
    random, threat = rng(features), named(name).within((0.0, 1.0))
    x, z = tensor(random.random((7, features))), tensor(random.random((7, features)) * 3 - 1)
    radius = tensor(random.random(7), torch.float64) * threat.reach(x) * 0.2
    whole = threat.project(x, z, radius)
    for row in (0, 6):
        one = slice(row, row + 1)
        assert torch.equal(threat.project(x[one].clone(), z[one].clone(), radius[one].clone()), whole[one])
    check_legal(name, x, whole, radius)
    assert torch.equal(threat.project(x, whole, radius), whole)


@given(cases, st.booleans())
def test_starts_are_legal_and_keyed(case: Case, noisy: bool) -> None:
    key, ids = Key((3, "law")) if noisy else None, content_ids(case.x)
    z = case.threat.start(case.x, case.radius, key, ids)
    check_legal(case.threat.name, case.x, z, case.radius, case.box)
    assert torch.equal(z[case.radius == 0], case.x[case.radius == 0])
    assert torch.equal(case.threat.project(case.x, z, case.radius), z)
    assert z.data_ptr() != case.x.data_ptr()
    if not noisy:
        assert torch.equal(z, case.x)
    order = torch.tensor([2, 0])
    assert torch.equal(case.threat.start(case.x[order], case.radius[order], key, ids[order]), z[order])


@pytest.mark.parametrize("name", NORMS)
def test_noise_differs_by_seed_and_fills_the_ball(name: str) -> None:
    threat, x = named(name).within((0.0, 1.0)), torch.full((6, 2, 4, 4), 0.5)
    x = x + torch.arange(6).reshape(6, 1, 1, 1) * 0.01
    radius = threat.reach(x) * 0.3
    one, two = (threat.start(x, radius, Key((seed,)), content_ids(x)) for seed in (0, 1))
    assert not torch.equal(one, two)
    assert all(not torch.equal(one[0] - x[0], one[row] - x[row]) for row in range(1, 6))
    assert bool((threat.size(x, one) > 0.3 * radius).all())


def reference(name: str, x: Any, z: Any, low: Any, high: Any, radius: float, pixels: int) -> Any:
    """The nearest legal point of one row by bisection or enumeration; L1 and L2 by their KKT conditions."""
    boxed = np.clip(z, low, high)
    if name == "linf":
        return np.clip(z, np.maximum(low, x - radius), np.minimum(high, x + radius))
    if name in ("l1", "l2"):
        size = (lambda d: np.abs(d).sum()) if name == "l1" else (lambda d: np.sqrt((d**2).sum()))
        if size(boxed - x) <= radius:
            return boxed
        wanted = z - x
        lam = np.array([0.0, 1.0])
        move = (lambda t: np.sign(wanted) * np.maximum(np.abs(wanted) - t, 0)) if name == "l1" else (lambda t: wanted / (1 + t))
        at = lambda t: np.clip(move(t), low - x, high - x)  # noqa: E731
        while size(at(lam[1])) > radius:
            lam[1] *= 2
            if lam[1] > 1e300:
                return x
        for _ in range(200):
            middle = lam.mean()
            lam[0 if size(at(middle)) > radius else 1] = middle
        return x + at(lam[1])
    groups = np.arange(x.size) % pixels
    best, found = np.inf, x
    for code in range(2**pixels):
        kept = (code >> groups) & 1 == 1
        if bin(code).count("1") <= radius:
            point = np.where(kept, boxed, x)
            far = ((point - z) ** 2).sum()
            if far < best:
                best, found = far, point
    return found


@given(
    st.sampled_from(NORMS),
    st.integers(0, 10**6),
    st.sampled_from(((1,), (6,), (2, 2, 2), (3, 2))),
    st.sampled_from(BOXES),
    st.sampled_from((0.01, 0.5, 3.0, 50.0)),
    st.sampled_from((0, 256)),
)
def test_projection_is_the_nearest_point(
    name: str, seed: int, shape: tuple[int, ...], box: tuple[float, float], scale: float, sorts: int
) -> None:
    case = build(name, seed, shape, torch.float64, box, "plain", scale)
    with patch.object(lp, "_SORTED", sorts):
        found = case.threat.project(case.x, case.z, case.radius)
    pixels = int(np.prod(shape[1:])) if name == "l0" and len(shape) == 3 else int(np.prod(shape))
    for row in range(len(case.x)):
        x, z, p = (t[row].flatten().numpy() for t in (case.x, case.z, found))
        best = reference(name, x, z, *box, float(case.radius[row]), pixels)
        near, nearest = np.linalg.norm(p - z), np.linalg.norm(best - z)
        assert near <= nearest * (1 + 1e-9) + 1e-9, f"row {row}: {near} > {nearest}"


def test_norms_of_one_room_remember_each_their_own() -> None:
    x, room = torch.full((1, 4), 0.5), lp.Room((0.0, 1.0))
    z, far = x + 0.25, torch.full((1,), 10.0, dtype=torch.float64)
    for _ in range(2):  # what is remembered, too
        for threat, size in ((lp.Linf(room), 0.25), (lp.L2(room), 0.5), (lp.L1(room), 1.0)):
            assert float(threat.size(x, z)) == size
            assert float(threat.reach(x)) == 2 * size
            assert torch.equal(threat.project(x, z, far), z)
            assert float(threat.size(x, threat.project(x, z, far / 100))) <= 0.1


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_projected_points_are_inside_in_whatever_order_they_are_added_up(name: str) -> None:
    random = rng(0)
    z = tensor(random.standard_normal((200, 40)), torch.float64)
    x, threat = torch.zeros_like(z), named(name).within((-9.0, 9.0))
    radius = threat.size(x, z)
    projected = threat.project(x, z, radius)
    orders = [tensor(random.permutation(40), torch.int64) for _ in range(20)]
    long = max(float((measured(name, x, projected[:, order]) / radius).amax()) for order in orders)
    assert 1 - 1e-11 < long <= 1.0
    assert torch.equal(threat.project(x, projected, radius), projected)


def test_points_inside_the_box_and_outside_it_project_beside_each_other_as_alone() -> None:
    threat, x = named("l1").within((0.0, 1.0)), tensor(rng(0).random((8, 40)))
    z, radius = x + tensor(rng(1).standard_normal((8, 40))), torch.full((8,), 0.7, dtype=torch.float64)
    z[::2] = z[::2].clamp(0.0, 1.0)
    alone = [threat.project(x[i : i + 1], z[i : i + 1], radius[i : i + 1]) for i in range(8)]
    assert torch.equal(threat.project(x, z, radius), torch.cat(alone))


@given(cases)
def test_no_legal_point_on_the_way_is_nearer(case: Case) -> None:
    """Needs no oracle, so it holds new threats too: a move from the projection toward z, made legal, gains nothing."""
    case = replace(case, z=case.z.clamp(-1e3, 1e3))
    p = case.threat.project(case.x, case.z, case.radius)
    far = (case.z - p).double().flatten(1).norm(dim=1)
    for share in (0.5, 0.1, 0.01):
        rival = case.threat.project(case.x, p + share * (case.z - p), case.radius)
        assert bool((far <= (case.z - rival).double().flatten(1).norm(dim=1) * (1 + 1e-6) + 1e-6).all())


DUALS = {"linf": 1, "l2": 2, "l1": np.inf}


@pytest.mark.parametrize("name", DUALS)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from((1e-30, 1e-8, 1.0, 1e30)))
def test_steepest_meets_the_dual_norm(name: str, seed: int, scale: float) -> None:
    random = rng(seed)
    threat = named(name).within((0.0, 1.0))
    if name == "l1":
        threat = replace(threat, share=0.0)  # type: ignore[type-var]
    x = tensor(0.2 + 0.6 * random.random((4, 2, 3, 3)), torch.float64)
    g = tensor(random.standard_normal((4, 2, 3, 3)) * scale, torch.float64)
    gain = (g * threat.steepest(x, x, g)).flatten(1).sum(1).numpy()
    assert np.allclose(gain, [np.linalg.norm(row, DUALS[name]) for row in g.flatten(1).numpy()], rtol=1e-9, atol=0)
    for row in g[:2]:  # float32 too
        short = row[None].float()
        assert float((short * threat.steepest(x[:1].float(), x[:1].float(), short)).sum()) > 0


@pytest.mark.parametrize("name", NORMS)
def test_steepest_of_odd_gradients_is_finite(name: str) -> None:
    threat = named(name).within((0.0, 1.0))
    x = torch.full((1, 2, 3, 3), 0.5)
    base = tensor(rng(5).standard_normal((1, 2, 3, 3)))
    odd = {
        "zero": base * 0,
        "tiny": base * 1e-30,
        "denormal": base * 1e-42,
        "huge": base * 1e37,
        "one nan": base.clone().index_fill(3, torch.tensor(1), torch.nan),
        "all nan": base * torch.nan,
        "inf": base.clone().index_fill(2, torch.tensor(0), torch.inf),
        "-inf": torch.full_like(base, -torch.inf),
    }
    for words, g in odd.items():
        direction = threat.steepest(x, x, g)
        assert bool(torch.isfinite(direction).all()), words
        assert direction.dtype == g.dtype
        if words == "zero":
            assert bool((direction == 0).all())
        if words in ("tiny", "huge"):
            assert torch.allclose(direction, threat.steepest(x, x, base), rtol=1e-4), words
    together = threat.steepest(x.expand(len(odd), -1, -1, -1), x.expand(len(odd), -1, -1, -1), torch.cat(list(odd.values())))
    assert torch.equal(together, torch.cat([threat.steepest(x, x, g) for g in odd.values()]))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_radii_next_to_representable_numbers(name: str, dtype: torch.dtype) -> None:
    """Radii one float64 step beside a representable change: the sum rounds to the wrong side unless bounds are checked."""
    random = rng(11)
    x = tensor(0.3 + 0.4 * random.random((400, 1)), dtype)
    change = tensor(0.02 + 0.1 * random.random((400, 1)), dtype)
    exact = (change.double() + x.double()).to(dtype).double() - x.double()
    radius = torch.nextafter(exact.flatten(), torch.zeros(400, dtype=torch.float64))
    threat = named(name).within((0.0, 1.0))
    p = threat.project(x, x + 1, radius)
    assert bool((measured(name, x, p) <= radius).all())
    assert bool((threat.size(x, p) <= radius).all())
    assert torch.equal(threat.project(x, p, radius), p)


@pytest.mark.parametrize("name", NORMS)
def test_data_that_round_past_the_box_are_left_alone(name: str) -> None:
    """A normalised image's brightest pixel in float32 can exceed the float64 bound by half a step; that is no change."""
    high = (1 - 0.485) / 0.229
    x = torch.full((2, 1, 2, 2), high)
    x[1] = 0.5
    threat = named(name).within((0.0, high))
    for radius in (0.0, 0.25):
        p = threat.project(x, x.clone(), torch.full((2,), radius, dtype=torch.float64))
        assert torch.equal(p, x)


@pytest.mark.parametrize("name", NORMS)
def test_reach_is_enough_and_needed(name: str) -> None:
    threat = named(name).within((-3.0, 5.0))
    x = tensor(rng(1).random((4, 2, 3, 3)) * 8 - 3)
    reach = threat.reach(x)
    corner = torch.where(x > 1, torch.full_like(x, -3.0), torch.full_like(x, 5.0))
    assert torch.equal(threat.project(x, corner, reach), corner)
    assert not torch.equal(threat.project(x, corner, reach * 0.9), corner)


@pytest.mark.parametrize("name", NORMS)
def test_memory_layout_changes_nothing(name: str) -> None:
    threat = named(name).within((0.0, 1.0))
    x, z = tensor(rng(1).random((4, 3, 4, 4))), tensor(rng(2).random((4, 3, 4, 4)) * 3 - 1)
    radius = threat.reach(x) * 0.2
    plain = threat.project(x, z, radius)
    other = threat.project(x.to(memory_format=torch.channels_last), z.to(memory_format=torch.channels_last), radius)
    assert torch.equal(plain, other)


def test_changing_x_in_place_is_noticed() -> None:
    """The interval is remembered between steps; a tensor that changed since is another tensor."""
    threat = named("linf").within((0.0, 1.0))
    x, radius = torch.full((2, 3), 0.5), torch.full((2,), 0.1, dtype=torch.float64)
    threat.project(x, x, radius)
    x += 0.2
    assert torch.equal(threat.project(x, x, radius), x)
    radius += 0.1
    assert float(threat.project(x, x + 1, radius).max()) > 0.85


def test_every_threat_builds_named_and_shows_itself() -> None:
    for name in NORMS:
        threat = named(name)
        assert threat.name == name
        assert name.rstrip("f") in repr(threat).lower()
