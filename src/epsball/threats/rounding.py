"""Bounds of the legal set in the input's own precision, rounded inward so that a float64 measurement agrees."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from epsball.core.rows import per_sample


def inward(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float64 bounds -> `dtype` bounds that are never wider."""
    down, up = low.to(dtype), high.to(dtype)
    down = torch.where(down.double() < low, torch.nextafter(down, torch.full_like(down, torch.inf)), down)
    up = torch.where(up.double() > high, torch.nextafter(up, torch.full_like(up, -torch.inf)), up)
    return down, up


def clipped(z: Tensor, radius: Tensor) -> Tensor:
    """Every entry of z (B, ...) cut to [-radius, radius] of its sample, radius (B,) float64, rounded inward; NaN becomes 0."""
    limit = per_sample(radius, z.double())
    near = torch.nan_to_num(z, nan=0.0).double().clamp(-limit, limit).to(z.dtype)
    return torch.where(near.double().abs() > limit, torch.nextafter(near, torch.zeros_like(near)), near)


class Memo:
    """Remembers the last result for the same tensors: bounds do not change between the steps of one search.

    Keyed by identity and version of the tensors, held weakly, so that nothing outlives its batch.
    """

    def __init__(self) -> None:
        self._entry: tuple[tuple[object, ...], tuple[weakref.ref[Tensor], ...], tuple[Tensor, ...]] | None = None

    def get(self, tag: object, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """The result stored for these very tensors, unchanged since."""
        entry = self._entry
        if entry is None or entry[0] != self._stamp(tag, tensors):
            return None
        same = all(reference() is tensor for reference, tensor in zip(entry[1], tensors, strict=True))
        return entry[2] if same else None

    def put(self, tag: object, tensors: tuple[Tensor, ...], result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Stores and returns."""
        self._entry = (self._stamp(tag, tensors), tuple(weakref.ref(t, self._forget) for t in tensors), result)
        return result

    def _forget(self, _: object) -> None:
        self._entry = None

    @staticmethod
    def _stamp(tag: object, tensors: tuple[Tensor, ...]) -> tuple[object, ...]:
        return (tag, *((id(t), t._version) for t in tensors))
