"""Threat laws for what only images have: flow, colors, rigid motions, patches, and compositions of these with norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lawkit import ALL_THREATS, NORMS, channels_of, check_legal, measure, measured, rng, tensor, threat_of
from torch import Tensor

from epsball.core import Key, Projects, content_ids
from epsball.threats import THREATS, Added, Composed, is_input, parse_threat

NAMES = tuple(name for name in ALL_THREATS if name not in NORMS)
DTYPES = (torch.float32, torch.float64)
SHAPES = ((3, 3), (5, 4), (1, 6))
BOXES = ((0.0, 1.0), (0.1, 0.7))


def images(name: str, seed: int, shape: tuple[int, int], dtype: torch.dtype, box: tuple[float, float], n: int = 5) -> Tensor:
    """Inside the box, about a third of the values on its edges, one image of a single color."""
    random = rng(seed, 3)
    u = random.random((n, channels_of(name), *shape))
    u = np.where(random.random(u.shape) < 1 / 3, np.round(u), u)
    u[1] = 0.25
    x = tensor(box[0] + (box[1] - box[0]) * u, dtype)
    low, high = (torch.nextafter(torch.tensor(b, dtype=dtype), torch.tensor(0.4, dtype=dtype)) for b in box)
    return x.clamp(low, high)


def case(name: str, seed: int, shape: tuple[int, int], dtype: torch.dtype, box: tuple[float, float], scale: float) -> Any:
    """(threat, x, z, radius): z anything, from far outside to legal."""
    threat, random = threat_of(name).within(box), rng(seed, 4)
    x = images(name, seed, shape, dtype, box)
    still = threat.start(x, torch.ones(5, dtype=torch.float64), None, content_ids(x))
    change = random.standard_normal(still.shape) * scale * np.array([1, 0.1, 1e-3, 10, 0]).reshape(-1, *[1] * (still.ndim - 1))
    shares = tensor(random.permutation(np.array([0.0, 1e-6, 0.03, 0.3, 1.0])) * random.random(5), torch.float64)
    return threat, x, (still.double() + tensor(change, torch.float64)).to(dtype), shares * threat.reach(x)


cases = st.builds(
    case,
    st.sampled_from(NAMES),
    st.integers(0, 10**6),
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    st.sampled_from(BOXES),
    st.sampled_from((1e-30, 1e-3, 1.0, 30.0, 1e6, 1e20)),
)


def check_projection(threat: Projects, x: Tensor, z: Tensor, radius: Tensor) -> None:
    """Legal, idempotent, legal points bitwise untouched, radius 0 is no change, nothing changed in place."""
    before = x.clone(), z.clone(), radius.clone()
    p = threat.project(x, z, radius)
    assert all(torch.equal(one, other) for one, other in zip(before, (x, z, radius), strict=True))
    assert p.shape == z.shape
    assert p.dtype == z.dtype
    assert bool((threat.size(x, p) <= radius).all())
    assert bool((measure(threat, x, p) <= radius).all())
    assert torch.equal(threat.project(x, p, radius), p)
    assert torch.equal(threat.apply(x, p)[radius == 0], x[radius == 0])
    mixed = torch.where((torch.arange(len(x)) % 2 == 0).reshape(-1, *[1] * (z.ndim - 1)), p, z)
    assert torch.equal(threat.project(x, mixed, radius)[::2], p[::2])


@given(cases)
def test_projection(one: Any) -> None:
    threat, x, z, radius = one
    check_projection(threat, x, z, radius)
    check_legal(threat, x, threat.apply(x, threat.project(x, z, radius)), radius, threat_box(threat), threat.project(x, z, radius))


def threat_box(threat: Any) -> Any:
    """The box that a threat was bound to."""
    inner = threat.parts[0] if isinstance(threat, Composed) else threat
    return inner.room.box if is_input(inner) else inner.box


@given(cases)
def test_rows_are_independent(one: Any) -> None:
    threat, x, z, radius = one
    p = threat.project(x, z, radius)
    made, way = threat.apply(x, p), threat.steepest(x, p, z)
    order = torch.tensor([3, 1, 4, 0, 2])
    loose = {"rtol": 0.0, "atol": 1e-6}
    assert torch.equal(threat.project(x[order], z[order], radius[order]), p[order])
    assert torch.allclose(threat.apply(x[order], p[order]), made[order], **loose)
    for row in range(5):
        cut = slice(row, row + 1)
        assert torch.equal(threat.project(x[cut].clone(), z[cut].clone(), radius[cut].clone()), p[cut])
        assert torch.equal(threat.steepest(x[cut].clone(), p[cut].clone(), z[cut].clone()), way[cut])
        assert torch.allclose(threat.apply(x[cut].clone(), p[cut].clone()), made[cut], **loose)


@given(cases, st.booleans())
def test_starts_are_legal_and_keyed(one: Any, noisy: bool) -> None:
    threat, x, _, radius = one
    key, ids = Key((3, "law")) if noisy else None, content_ids(x)
    z = threat.start(x, radius, key, ids)
    assert bool((measure(threat, x, z) <= radius).all())
    assert torch.equal(threat.project(x, z, radius), z)
    still = radius == 0 if noisy else radius >= 0
    assert torch.equal(threat.apply(x, z)[still], x[still])
    assert z.data_ptr() != x.data_ptr()
    order = torch.tensor([2, 0])
    assert torch.equal(threat.start(x[order], radius[order], key, ids[order]), z[order])


@pytest.mark.parametrize("name", NAMES)
def test_noise_differs_by_seed_and_fills_the_ball(name: str) -> None:
    threat = threat_of(name).within((0.0, 1.0))
    x = images(name, 1, (6, 7), torch.float32, (0.0, 1.0))
    radius = threat.reach(x) * 0.4
    one, two = (threat.start(x, radius, Key((seed,)), content_ids(x)) for seed in (0, 1))
    assert not torch.equal(one, two)
    assert all(not torch.equal(one[0], one[row]) for row in range(1, 5))
    assert bool((threat.size(x, one) > 0.15 * radius).all())


def nearest(threat: Any, x: Tensor, z: Tensor, radius: float) -> Any:
    """The nearest legal variable of one row, float64: by ray, by clipping, by trying every square, part by part."""
    if isinstance(threat, Composed):
        pieces = zip(threat.parts, threat.budgets, threat.split(x, z), strict=True)
        return np.concatenate([np.ravel(nearest(part, x, piece, radius * budget)) for part, budget, piece in pieces])
    values = z[0].numpy()
    if isinstance(threat, Added):
        return np.clip(values, -radius, radius)
    if threat.name == "flow":
        length = np.hypot(*values)
        return values * np.minimum(1, radius / np.maximum(length, 1e-300))
    if threat.name == "patch":
        return nearest_square(x[0].numpy(), values, threat.room.box, int(radius))
    limit = radius * (np.array([30.0, 3.0, 3.0]) if threat.name == "rigid" else 1.0)
    return np.clip(values, -limit, limit)


def nearest_square(x: Any, z: Any, box: tuple[float, float], side: int) -> Any:
    """Every place of the square, one by one."""
    height, width = x.shape[1:]
    best, found = np.inf, x
    for top in range(max(height - side, 0) + 1):
        for left in range(max(width - side, 0) + 1):
            point = x.copy()
            at = (slice(None), slice(top, top + side), slice(left, left + side))
            point[at] = np.clip(z[at], *box)
            if ((point - z) ** 2).sum() < best:
                best, found = ((point - z) ** 2).sum(), point
    return found


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SHAPES), scale=st.sampled_from((0.01, 0.5, 3.0, 50.0)))
def test_projection_is_the_nearest_point(name: str, seed: int, shape: tuple[int, int], scale: float) -> None:
    threat, x, z, radius = case(name, seed, shape, torch.float64, (0.0, 1.0), scale)
    p = threat.project(x, z, radius)
    for row in range(5):
        cut = slice(row, row + 1)
        best = nearest(threat, x[cut], z[cut], float(radius[row])).ravel()
        far, least = (np.linalg.norm(point - z[row].numpy().ravel()) for point in (p[row].numpy().ravel(), best))
        assert far <= least * (1 + 1e-9) + 1e-9, f"row {row}: {far} > {least}"


@given(cases)
def test_no_legal_point_on_the_way_is_nearer(one: Any) -> None:
    threat, x, z, radius = one
    z = z.clamp(-1e3, 1e3)
    p = threat.project(x, z, radius)
    far = (z - p).double().flatten(1).norm(dim=1)
    for share in (0.5, 0.1, 0.01):
        rival = threat.project(x, p + share * (z - p), radius)
        assert bool((far <= (z - rival).double().flatten(1).norm(dim=1) * (1 + 1e-6) + 1e-6).all())


@pytest.mark.parametrize("name", NAMES)
def test_steepest_of_odd_gradients_is_finite(name: str) -> None:
    threat = threat_of(name).within((0.0, 1.0))
    x = images(name, 2, (3, 3), torch.float32, (0.0, 1.0), n=2)[:1]
    still = threat.start(x, torch.ones(1, dtype=torch.float64), None, content_ids(x))
    base = tensor(rng(5).standard_normal(still.shape))
    hole = base.clone().flatten()
    hole[1] = torch.nan
    odd = {
        "zero": base * 0,
        "tiny": base * 1e-30,
        "denormal": base * 1e-42,
        "huge": base * 1e37,
        "one nan": hole.reshape(base.shape),
        "all nan": base * torch.nan,
        "-inf": torch.full_like(base, -torch.inf),
    }
    for words, g in odd.items():
        way = threat.steepest(x, still, g)
        assert bool(torch.isfinite(way).all()), words
        assert way.dtype == g.dtype
        if words == "zero":
            assert bool((way == 0).all())
        if words in ("tiny", "huge"):
            assert torch.allclose(way, threat.steepest(x, still, base), rtol=1e-4), words


@pytest.mark.parametrize("name", [name for name in NAMES if name != "patch"])
def test_steepest_has_size_one_and_climbs(name: str) -> None:
    """A patch's unit is a side: there a direction has no size of its own."""
    threat, x, z, radius = case(name, 3, (5, 4), torch.float64, (0.0, 1.0), 1.0)
    g = z + 0.1 * tensor(rng(8).standard_normal(z.shape), torch.float64)
    way = threat.steepest(x, threat.project(x, z, radius), g)
    assert torch.allclose(threat.size(x, way), torch.ones(5, dtype=torch.float64))
    assert bool(((way * g).flatten(1).sum(1) > 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_reach_is_enough(name: str) -> None:
    threat = threat_of(name).within((0.0, 1.0))
    x = images(name, 4, (4, 5), torch.float32, (0.0, 1.0))
    widest = threat.start(x, threat.reach(x), Key((0,)), content_ids(x))
    assert bool(torch.isfinite(threat.reach(x)).all())
    assert torch.equal(threat.project(x, widest, threat.reach(x) * 2), widest)


@pytest.mark.parametrize("name", NAMES)
def test_memory_layout_changes_nothing(name: str) -> None:
    threat, x, z, radius = case(name, 6, (5, 4), torch.float32, (0.0, 1.0), 1.0)
    p = threat.project(x, z, radius)
    last = x.to(memory_format=torch.channels_last)
    other = threat.project(last, z.to(memory_format=torch.channels_last) if z.ndim == 4 else z, radius)
    assert torch.equal(other, p)
    assert torch.allclose(threat.apply(last, p), threat.apply(x, p), rtol=0, atol=1e-6)


def test_every_threat_builds_and_shows_itself() -> None:
    for name in set(NAMES) - {"compose"}:
        threat = parse_threat(f"{name}:1").threat
        assert threat.name == name
        assert name.split("-")[0] in repr(threat).lower()
        assert is_input(threat) == (name == "patch")
    assert set(THREATS) == {*NAMES, *NORMS} - {"compose"}
    assert not is_input(threat_of("compose"))
    assert all(is_input(threat_of(name)) for name in NORMS)


def test_what_is_no_image_is_refused_in_one_line() -> None:
    from epsball.errors import BadInput

    flat = torch.full((2, 6), 0.5)
    for name in NAMES:
        with pytest.raises(BadInput) as caught:
            threat_of(name).within((0.0, 1.0)).start(flat, torch.ones(2, dtype=torch.float64), None, content_ids(flat))
        assert "\n" not in str(caught.value)
        assert "image" in str(caught.value)


def test_sizes_are_measured_in_two_ways() -> None:
    for name in NAMES:
        threat, x, z, _ = case(name, 9, (5, 4), torch.float64, (0.0, 1.0), 0.3)
        assert torch.allclose(threat.size(x, z), measured(name, x, z), rtol=1e-12, atol=0)
