"""Images of any common kind, brought to one form: float32, (N, C, H, W) or (N, F), inside the box; other inputs as they are."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from epsball.data.source import Array, Span
from epsball.errors import BadInput

Layout = Literal["auto", "hw", "hwc", "chw", "flat", "raw"]
Box = tuple[float, float]
LAYOUTS = ("auto", "hw", "hwc", "chw", "flat", "raw")
_CHANNELS = (1, 3, 4)
_AXES = {"hw": 3, "hwc": 4, "chw": 4}
_THIN = 8
"""Of inputs (N, H, W) with a side below this, and the other at least twice as long, none is an image: they are channels over time."""


def check_box(box: Box) -> Box:
    """``box`` as two finite floats, low < high; `BadInput` otherwise."""
    try:
        low, high = (float(v) for v in box)
    except (TypeError, ValueError) as exc:
        raise BadInput(f"box: {box!r} is not a pair of numbers; give (0, 1), say") from exc
    if not (np.isfinite(low) and np.isfinite(high)):
        raise BadInput(f"box: {box!r} has no end; give finite numbers: for features without bounds, what no input will ever exceed")
    if not low < high:
        raise BadInput(f"box: {box!r} is not an interval; give (low, high) with low < high")
    return low, high


def find_layout(shape: tuple[int, ...], layout: Layout) -> str:
    """Which axes a batch of this shape has: "flat", "hw", "hwc", "chw", or "raw", which stay as they are.

    >>> find_layout((10, 28, 28), "auto"), find_layout((10, 32, 32, 3), "auto"), find_layout((10, 2, 128), "auto")
    ('hw', 'hwc', 'raw')
    """
    if layout not in LAYOUTS:
        raise BadInput(f"layout: {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    rank, text = len(shape), "x".join(map(str, shape))
    if layout in _AXES and rank != _AXES[layout]:
        raise BadInput(
            f"layout: {layout!r} needs {_AXES[layout]} axes with the batch first, the images have shape {text}; choose another layout"
        )
    if layout != "auto":
        return layout
    if rank == 2:
        return "flat"
    if rank == 3:
        short, long = sorted(shape[1:])
        return "raw" if short < _THIN and long >= 2 * short else "hw"
    first, last = shape[1] in _CHANNELS, shape[-1] in _CHANNELS
    if rank != 4 or first == last:
        raise BadInput(f"layout: it is unclear which axis of {text} holds the channels; say --layout chw, hwc, flat or raw")
    return "chw" if first else "hwc"


def _arrange(x: Array, found: str) -> Array:
    if found == "hw":
        return x[:, None]
    if found == "hwc":
        return np.moveaxis(x, -1, 1)
    return x.reshape(len(x), -1) if found == "flat" else x


def _is_bytes(span: Span, box: Box) -> bool:
    """Whether values 0..255 must be mapped onto the box; `BadInput` where the values fit neither scale."""
    if span.dtype == "uint8":
        return True
    low, high = box
    if max(low - span.low, span.high - high) <= 1e-4:
        return False
    # whole numbers up to 16, say, are some other scale: dividing those by 255 would make every image black
    if span.whole and span.low >= 0 and 128 <= span.high <= 255:
        return True
    fix = "undo the normalization and declare mean and std at the model" if span.low < 0 else "divide by the largest possible value"
    raise BadInput(f"images: values in [{span.low:g}, {span.high:g}] leave the box [{low:g}, {high:g}]; {fix}, or declare the true box")


def _inward(box: Box) -> tuple[np.float32, np.float32]:
    """The box in float32, never wider than the float64 one."""
    low, high = np.float32(box[0]), np.float32(box[1])
    if float(low) < box[0]:
        low = np.nextafter(low, np.float32(np.inf))
    if float(high) > box[1]:
        high = np.nextafter(high, np.float32(-np.inf))
    return low, high


def normal_form(x: Array, span: Span, layout: Layout, box: Box) -> tuple[Tensor, list[str]]:
    """``x`` as float32 in the box, channels first, with a sentence for every change.

    Args:
        x: (n, ...) the chosen images.
        span: what the whole source holds; it decides the scale, so that every subset is scaled alike.
        layout: the axes of ``x`` after the first; "auto" looks for an axis of 1, 3 or 4; "raw" leaves them as they are.
        box: (low, high); values 0..255 are mapped onto it.

    Raises:
        BadInput: an unclear layout, or values that fit neither the box (within 1e-4) nor 0..255.
    """
    found = find_layout(x.shape, layout)
    scaled = _is_bytes(span, box)
    low, high = _inward(box)
    arrived = f"{x.dtype} {'x'.join(map(str, x.shape[1:]))}" + ("" if found in ("flat", "raw") else f" ({found.upper()})")
    arranged = _arrange(x, found)
    if scaled:
        table = (box[0] + np.arange(256) / 255 * (box[1] - box[0])).astype(np.float32)
        values = table[arranged.astype(np.uint8)]
    else:
        values = arranged.astype(np.float32)
    values = np.ascontiguousarray(np.clip(values, low, high))
    notes = []
    shape = "x".join(map(str, values.shape[1:]))
    if scaled or x.dtype != np.float32 or arranged.shape != x.shape:
        how = ", 0..255 mapped onto it" if scaled else ""
        notes.append(f"images arrived as {arrived}; brought to float32 {shape} in [{box[0]:g}, {box[1]:g}]{how}")
    if scaled and span.high < 128:
        notes.append(f"the largest pixel value is {span.high:g} of 255; if that is full white, divide the images by it yourself")
    over = max(box[0] - span.low, span.high - box[1])
    if not scaled and over > 1e-6:
        notes.append(f"values beyond the box by up to {over:.1e} were clamped")
    return torch.from_numpy(values), notes
