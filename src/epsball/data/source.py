"""What every reader hands over: labels now, images on demand, so that only the chosen samples are decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from epsball.data.sample import Rows
from epsball.errors import BadInput

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Span:
    """What the whole source holds: type, extreme values, whether all are whole numbers. Decides the scale for any subset alike."""

    dtype: str
    low: float
    high: float
    whole: bool


BYTES = Span("uint8", 0.0, 255.0, True)  # decoded image files


@dataclass(frozen=True)
class Source:
    """One readable split: ``labels`` (N,) or (N, C), and ``take(rows)`` -> images (len(rows), ...) with their values' ``span``."""

    name: str
    count: int
    labels: Any
    span: Callable[[], Span]
    take: Callable[[Rows], tuple[Array, tuple[str, ...]]]
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def span_of(x: Array) -> Span:
    """The `Span` of an array of numbers; `BadInput` for non-finite values or a type that holds no pixels."""
    if x.dtype.kind not in "buif":
        raise BadInput(f"images: type {x.dtype} holds no pixel values; give uint8 or float arrays")
    if x.dtype.kind == "f" and (bad := int(x.size - np.isfinite(x).sum())):
        raise BadInput(f"images: {bad} of {x.size} values are NaN or infinite; remove those samples")
    low, high = float(x.min()), float(x.max())
    # only large values raise the question of a 0..255 scale, so the full comparison is rarely made
    whole = x.dtype.kind != "f" or (high > 1.5 and bool((x == np.floor(x)).all()))
    return Span(str(x.dtype), low, high, whole)


def array_source(name: str, x: Array, labels: Any, class_names: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> Source:
    """A `Source` over images that are already in memory: (N, ...)."""
    if x.ndim < 2:
        raise BadInput(f"images: shape {tuple(x.shape)} is not a batch; give (N, features), (N, H, W), (N, C, H, W) or (N, H, W, C)")
    if x.size == 0:
        raise BadInput(f"images: the data is empty, shape {tuple(x.shape)}; give at least two samples")
    return Source(name, len(x), labels, lambda: span_of(x), lambda rows: (x[rows], ()), class_names, notes)
