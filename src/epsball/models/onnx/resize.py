"""ONNX Resize and Upsample: one axis after the other, as interpolation is separable."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epsball.models.onnx.node import Node, Unsupported, at_most, whole

Places = NDArray[np.float32]


def resize(node: Node, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
    """Resampled along every axis whose scale is not 1.

    Before version 11 the second input holds the scales and coordinates are asymmetric.
    """
    node.refuse("antialias", "exclude_outside")
    if node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported(f"{node.kind} with keep_aspect_ratio_policy={node.get('keep_aspect_ratio_policy')}")
    scales = roi if node.opset < 11 else scales
    axes = [a % x.ndim for a in node.get("axes") or range(x.ndim)]
    if scales is not None and scales.numel():
        factors = [float(v) for v in scales.tolist()]
        lengths = [int(x.shape[a] * f) for a, f in zip(axes, factors, strict=True)]
    elif sizes is not None:
        lengths = whole(sizes)
        factors = [n / x.shape[a] for a, n in zip(axes, lengths, strict=True)]
    elif node.get("scales"):  # Upsample before version 9
        factors = list(node.get("scales"))
        lengths = [int(n * f) for n, f in zip(x.shape, factors, strict=True)]
    else:
        raise Unsupported(f"{node.kind} without scales or sizes")
    for axis, length, factor in zip(axes, lengths, factors, strict=True):
        if length != x.shape[axis] or factor != 1:
            at_most(x.numel() // max(x.shape[axis], 1) * length)
            x = _along(node, x, axis, length, factor)
    return x


def upsample(node: Node, x: Tensor, scales: Tensor | None = None) -> Tensor:
    """The older Resize: asymmetric coordinates, rounded down."""
    return resize(node, x, scales)


def _along(node: Node, x: Tensor, axis: int, length: int, factor: float) -> Tensor:
    n = x.shape[axis]
    places = _coordinates(node, n, length, np.float32(factor))
    mode = node.get("mode", "nearest")
    if mode == "nearest":
        return x.index_select(axis, _index(_rounded(node, places), n, x))
    if mode == "linear":
        places = np.clip(places, 0, n - 1)
        t = places - np.floor(places)
        taps = [(0, 1 - t), (1, t)]
    elif mode == "cubic":
        a, t = node.get("cubic_coeff_a", -0.75), places - np.floor(places)
        taps = [(-1, _far(1 + t, a)), (0, _near(t, a)), (1, _near(1 - t, a)), (2, _far(2 - t, a))]
    else:
        raise Unsupported(f"{node.kind} with mode {mode}")
    floor = np.floor(places)
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    parts = []
    for offset, weights in taps:
        w = torch.from_numpy(weights).to(x).view(shape)
        parts.append(w * x.index_select(axis, _index(floor + offset, n, x)))
    return torch.stack(parts).sum(0)


def _near(t: Places, a: float) -> Places:
    """The cubic kernel of Keys (1981) for |t| <= 1."""
    return np.asarray((a + 2) * t**3 - (a + 3) * t**2 + 1, dtype=np.float32)


def _far(t: Places, a: float) -> Places:
    """The cubic kernel of Keys (1981) for 1 <= |t| <= 2."""
    return np.asarray(a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a, dtype=np.float32)


def _index(places: Places, n: int, x: Tensor) -> Tensor:
    return torch.from_numpy(np.clip(places, 0, n - 1).astype(np.int64)).to(x.device)


def _coordinates(node: Node, n: int, length: int, scale: np.float32) -> Places:
    """Where each cell of the result lies in the input, in float32 as the runtime computes it."""
    out, half = np.arange(length, dtype=np.float32), np.float32(0.5)
    rule = node.get("coordinate_transformation_mode", "half_pixel") if node.opset >= 11 else "asymmetric"
    if rule == "asymmetric":
        return out / scale
    if rule == "half_pixel":
        return (out + half) / scale - half
    if rule == "pytorch_half_pixel":
        return (out + half) / scale - half if length > 1 else out * 0
    if rule == "align_corners":
        return out * np.float32(n - 1) / np.float32(length - 1) if length > 1 else out * 0
    if rule == "half_pixel_symmetric":
        offset = np.float32(n / 2) * (1 - np.float32(length) / (scale * np.float32(n)))
        return np.asarray(offset + (out + half) / scale - half, dtype=np.float32)
    raise Unsupported(f"{node.kind} with coordinate_transformation_mode {rule}")


def _rounded(node: Node, places: Places) -> Places:
    rule = node.get("nearest_mode", "round_prefer_floor") if node.opset >= 11 else "floor"
    if rule == "round_prefer_floor":
        return np.asarray(np.ceil(places - np.float32(0.5)))
    if rule == "round_prefer_ceil":
        return np.asarray(np.floor(places + np.float32(0.5)))
    if rule in ("floor", "ceil"):
        return np.floor(places) if rule == "floor" else np.ceil(places)
    raise Unsupported(f"{node.kind} with nearest_mode {rule}")
