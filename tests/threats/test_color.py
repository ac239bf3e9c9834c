"""Color functions: conversions from their formulas, trilinear interpolation from its definition, the laws, and ReColorAdv."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from lawkit import check_same, filled, posed, rng, rows_of, tensor
from torch import Tensor, nn

from epsball.attacks import recoloradv
from epsball.core import Key, Victim, autograd, content_ids
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats.color import LUV, RGB, Color, Uneven, interpolate, luv, rgb_of_luv, unevenness

KEY = Key((3,))
SMALL = (4, 5, 3)


def some_images(n: int = 4, seed: int = 0) -> Tensor:
    x = tensor(rng(seed, 5).random((n, 3, 5, 6)))
    x[0, :, 0, 0], x[0, :, 0, 1], x[1, :, 0, 0] = 0.0, 1.0, 0.002  # black, white, the straight part of the curves
    return x


def grids(n: int, scale: float, points: tuple[int, int, int] = SMALL, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensor(rng(seed, 6).standard_normal((n, 3, *points)) * scale, dtype)


def luv_by_hand(red: float, green: float, blue: float) -> tuple[float, float, float]:
    """IEC 61966-2-1 to XYZ, CIE 15:2004 to L*u*v*, D65 white as the sum of the primaries; scalar Python."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue))
    x, y, z = 0.4124 * r + 0.3576 * g + 0.1805 * b, 0.2126 * r + 0.7152 * g + 0.0722 * b, 0.0193 * r + 0.1192 * g + 0.9505 * b
    white = (0.9505, 1.0, 1.089)
    light = 116 * y ** (1 / 3) - 16 if y > (6 / 29) ** 3 else (29 / 3) ** 3 * y
    if x + y + z == 0:
        return 0.0, 0.0, 0.0
    u, v = (4 * x / (x + 15 * y + 3 * z), 9 * y / (x + 15 * y + 3 * z))
    un, vn = (k * w / (white[0] + 15 * white[1] + 3 * white[2]) for k, w in ((4, white[0]), (9, white[1])))
    return light, 13 * light * (u - un), 13 * light * (v - vn)


def test_luv_from_its_formulas() -> None:
    colors = [*itertools.product((0.0, 0.01, 0.3, 1.0), repeat=3)]
    found = luv(tensor(colors, torch.float64).T[None])[0].T.numpy()
    expected = np.array([luv_by_hand(*color) for color in colors])
    assert np.allclose(found * [100, 200, 200] - [0, 100, 100], expected, atol=1e-9)
    red = luv(torch.eye(3, dtype=torch.float64)[None])[0, :, 0].numpy() * [100, 200, 200] - [0, 100, 100]
    assert np.allclose(red, [53.24, 175.01, 37.76], atol=0.05)  # the usual table's pure red


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_round_trip(dtype: torch.dtype, error: float) -> None:
    steps = np.linspace(0, 1, 17)
    cube = tensor(np.stack(np.meshgrid(steps, steps, steps)).reshape(1, 3, -1), dtype)
    assert float((rgb_of_luv(luv(cube)) - cube).abs().max()) < error
    assert float(luv(cube)[:, 0].max()) <= 1 + 1e-6
    low, high = luv(cube).amin(2)[0], luv(cube).amax(2)[0]
    assert torch.allclose(low.double(), torch.tensor([0.0, 0.085, -0.171], dtype=torch.float64), atol=1e-3)
    assert torch.allclose(high.double(), torch.tensor([1.0, 1.375, 1.037], dtype=torch.float64), atol=1e-3)


def test_slopes_are_finite_everywhere() -> None:
    steps = np.linspace(0, 1, 9)
    cube = tensor(np.stack(np.meshgrid(steps, steps, steps)).reshape(1, 3, 9, 81), torch.float32)
    for scale in (0.0, 0.06, 1.0):
        z = grids(1, scale).requires_grad_()
        moved = Color(LUV, SMALL).within((0.0, 1.0)).apply(cube, z)
        (g,) = torch.autograd.grad(moved.sum(), z)
        assert bool(torch.isfinite(moved).all())
        assert bool(torch.isfinite(g).all())


def test_trilinear_from_the_definition() -> None:
    grid, colors = grids(2, 1.0, dtype=torch.float64), tensor(rng(1).random((2, 3, 20)), torch.float64)
    colors[:, :, 0], colors[:, :, 1] = 1.0, 0.0
    found = interpolate(grid, colors).numpy()
    for n in range(2):
        for k in range(20):
            at = colors[n, :, k].numpy() * (np.array(SMALL) - 1)
            hats = [np.maximum(0, 1 - np.abs(np.arange(size) - place)) for size, place in zip(SMALL, at, strict=True)]
            assert np.allclose(found[n, :, k], np.einsum("cijk,i,j,k->c", grid[n].numpy(), *hats), atol=1e-12)
    assert torch.equal(interpolate(grid[:, :, :1, :1, :1], colors), grid[:, :, 0, 0, 0][..., None].expand_as(colors))


@pytest.mark.parametrize("space", [RGB, LUV], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_identity_is_bit_identical(space: Any, dtype: torch.dtype) -> None:
    x = some_images().to(dtype)
    threat = Color(space, SMALL).within((0.0, 1.0))
    z = threat.start(x, torch.ones(4, dtype=torch.float64), None, content_ids(x))
    assert torch.equal(threat.apply(x, z), x)
    assert bool((threat.size(x, z) == 0).all())


def test_a_constant_displacement_in_rgb_adds_and_equal_colors_stay_equal() -> None:
    x = some_images()
    threat = Color(RGB, SMALL).within((0.0, 1.0))
    assert torch.allclose(threat.apply(x, torch.full((4, 3, *SMALL), 0.05)), (x + 0.05).clamp(max=1), atol=1e-6)
    x[:, :, 2, 2] = x[:, :, 4, 1]
    moved = Color(LUV, SMALL).within((0.0, 1.0)).apply(x, grids(4, 0.05))
    assert torch.equal(moved[:, :, 2, 2], moved[:, :, 4, 1])
    lighter = torch.zeros(4, 3, *SMALL)
    lighter[:, 0] = 0.03
    gray = torch.full((1, 3, 2, 2), 0.5)
    after = luv(Color(LUV, SMALL).apply(gray, lighter[:1]))
    assert torch.allclose(after - luv(gray), torch.tensor([0.03, 0, 0]).reshape(1, 3, 1, 1), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_color_laws(dtype: torch.dtype) -> None:
    x = some_images(5).to(dtype)
    threat, radius = Color(LUV, SMALL).within((0.0, 1.0)), torch.tensor([0.0, 1e-3, 0.06, 0.3, torch.inf], dtype=torch.float64)
    z = grids(5, 0.3, dtype=dtype)
    p = threat.project(x, z, radius)
    assert bool((threat.size(x, p) <= radius).all())
    assert torch.equal(threat.project(x, p, radius), p)
    assert bool((p[0] == 0).all())
    assert torch.equal(p[4], z[4])
    assert torch.equal(p == z, z.double().abs() <= radius.reshape(-1, 1, 1, 1, 1))
    moved = threat.apply(x, p)
    assert bool(((moved >= 0) & (moved <= 1)).all())
    assert torch.equal(moved[0], x[0])
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.allclose(threat.apply(x[order], p[order]), moved[order], atol=1e-6)
    start = threat.start(x, radius, KEY, content_ids(x))
    assert bool((threat.size(x, start) <= radius).all())
    d = threat.steepest(x, z, z)
    assert torch.equal(d, z.sign())


def test_gray_images_have_a_curve_of_gray_values() -> None:
    x = some_images()[:, :1].double()
    threat = Color(RGB, (5, 9, 9)).within((0.0, 1.0))
    z = threat.start(x, torch.full((4,), 0.2, dtype=torch.float64), KEY, content_ids(x))
    assert z.shape == (4, 1, 5)
    moved = threat.apply(x, z)
    for n in range(4):
        curve = np.interp(x[n].numpy(), np.linspace(0, 1, 5), z[n, 0].numpy())
        assert np.allclose(moved[n].numpy(), np.clip(x[n].numpy() + curve, 0, 1), atol=1e-12)
    assert unevenness(z).tolist() == pytest.approx([2 * float(row.diff().abs().sum()) for row in z[:, 0]], rel=1e-6)
    assert Color(LUV).name == "color-luv"
    with pytest.raises(BadInput, match="use color"):
        Color(LUV).start(x, torch.ones(4, dtype=torch.float64), None, content_ids(x))


def test_luv_rounds_alike_wherever_a_row_stands() -> None:
    """Powers round by their place in a batch; float64 inside leaves nothing of that in float32."""
    x = tensor(rng(2).random((33, 3, 5, 5)))
    threat = Color(LUV, SMALL).within((0.0, 1.0))
    z = threat.start(x, torch.full((33,), 0.1, dtype=torch.float64), KEY, content_ids(x))
    whole = threat.apply(x, z)
    alone = torch.cat([threat.apply(x[row : row + 1], z[row : row + 1]) for row in range(33)])
    assert torch.equal(whole, alone)


def model_of(classes: int = 4) -> nn.Module:
    return filled(nn.Sequential(nn.Flatten(), nn.Linear(90, 16), nn.Tanh(), nn.Linear(16, classes)), 3, 2.0).double()


@pytest.mark.parametrize("space", [RGB, LUV], ids=str)
def test_gradient_by_finite_differences(space: Any) -> None:
    x = (some_images() * 0.8 + 0.1).double()
    model = model_of()
    for objective in (margin, Uneven(margin, 0.01)):
        problem = posed(model, x, model(x).argmax(1), threat=Color(space, SMALL), objective=objective, radius=1.0)
        z = grids(4, 0.01, dtype=torch.float64)
        reading = autograd(problem, z)
        for seed in range(3):
            d = grids(4, 1.0, seed=20 + seed, dtype=torch.float64)
            up, down = (autograd(problem, z + sign * 1e-7 * d).score for sign in (1, -1))
            assert torch.allclose((up - down) / 2e-7, (reading.gradient * d).flatten(1).sum(1), rtol=1e-5, atol=1e-6)


def test_unevenness_from_the_definition() -> None:
    z = grids(2, 1.0, dtype=torch.float64)
    expected = np.zeros(2)
    for n, place, axis, way in itertools.product(range(2), np.ndindex(*SMALL), range(3), (-1, 1)):
        other = list(place)
        other[axis] += way
        if 0 <= other[axis] < SMALL[axis]:
            expected[n] += float((z[(n, slice(None), *place)] - z[(n, slice(None), *other)]).norm())
    assert np.allclose(unevenness(z).numpy(), expected, rtol=1e-6)


def test_recoloradv_is_legal_honest_and_free_of_its_batch() -> None:
    x, model = some_images(9, 4), model_of().float()
    labels = model(x).argmax(1)
    attack = recoloradv(15, threat=Color(LUV, (4, 8, 8)), noise=True)
    radius = tensor(np.linspace(0, 0.2, 9), torch.float64)
    outcome = attack(model, x, labels, radius)
    assert bool((outcome.size <= radius).all())
    assert bool((outcome.z.double().abs().flatten(1).amax(1) <= radius).all())
    assert torch.equal(model(outcome.x_adv).argmax(1) != labels, outcome.reached)
    assert bool(outcome.reached.any())
    assert torch.equal(outcome.x_adv[0], x[0])
    for size in (1, 2, 7):
        check_same(outcome, attack(Victim(model, batch_size=size), x, labels, radius))
    order = torch.tensor([5, 3, 3, 0])
    check_same(rows_of(outcome, order), attack(model, x[order], labels[order], radius[order]))


def test_what_has_no_three_colors_is_refused_in_one_line() -> None:
    x = some_images()
    model = filled(nn.Sequential(nn.Flatten(), nn.Linear(30, 4)), 1)
    for bad in (lambda: recoloradv(2)(model, x[:, :1], torch.zeros(4).long(), 0.1), lambda: Color().within((-1.0, 1.0))):
        with pytest.raises(BadInput) as caught:
            bad()
        assert "\n" not in str(caught.value)
