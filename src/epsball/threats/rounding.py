"""Bounds of the legal set in the input's own precision, rounded inward so that a float64 measurement agrees."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


def inward(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float64 bounds -> `dtype` bounds that are never wider."""
    down, up = low.to(dtype), high.to(dtype)
    down = torch.where(down.double() < low, torch.nextafter(down, torch.full_like(down, torch.inf)), down)
    up = torch.where(up.double() > high, torch.nextafter(up, torch.full_like(up, -torch.inf)), up)
    return down, up


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
