"""Bounds of the legal set in the input's own precision, rounded inward so that a float64 measurement agrees."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from epsball.core.rows import per_sample, take

T = TypeVar("T")


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
    """Remembers, under each tag, the last result for the same tensors: bounds do not change between the steps of one search.

    Keyed by identity and version of the tensors, held weakly, so that nothing outlives its batch.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[tuple[tuple[int, int], ...], tuple[weakref.ref[Tensor], ...], Any]] = {}

    def get(self, tag: str, tensors: tuple[Tensor, ...], make: Callable[[], T]) -> T:
        """The result stored under `tag` for these very tensors, unchanged since; else what `make` gives, stored."""
        entry, stamp = self._entries.get(tag), tuple([(id(t), t._version) for t in tensors])
        if entry is not None and entry[0] == stamp and all(ref() is t for ref, t in zip(entry[1], tensors, strict=True)):
            return entry[2]  # type: ignore[no-any-return]
        return self._keep(tag, tensors, make())

    def follow(self, before: tuple[Tensor, ...], rows: Tensor, after: tuple[Tensor, ...]) -> None:
        """What is remembered for tensors of `before` alone, for their rows in `after`: nothing is worked out again for fewer rows."""
        stands = {id(t): (t._version, new) for t, new in zip(before, after, strict=True)}
        for tag, (stamp, _, result) in list(self._entries.items()):
            if all(key in stands and stands[key][0] == version for key, version in stamp):
                self._keep(tag, tuple([stands[key][1] for key, _ in stamp]), take(result, rows))

    def _keep(self, tag: str, tensors: tuple[Tensor, ...], result: T) -> T:
        # A result must not hold what it is keyed by: it would keep itself alive.
        stamp = tuple([(id(t), t._version) for t in tensors])
        self._entries[tag] = (stamp, tuple([weakref.ref(t, lambda _: self._entries.pop(tag, None)) for t in tensors]), result)
        return result
