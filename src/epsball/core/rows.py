"""Indexing whole structures by batch row: every tensor in a state has B rows, everything else is shared."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

Rows = Tensor | slice
T = TypeVar("T")


def take(tree: Any, rows: Rows) -> Any:
    """Selects rows of every tensor in a tensor, tuple, dict or dataclass; numbers, strings and None are shared.

    Objects that have a `take` of their own (goals, problems, tallies) are asked to do it themselves.
    """
    if isinstance(tree, Tensor):
        return tree[rows]
    if hasattr(type(tree), "take"):
        return tree.take(rows)
    if isinstance(tree, tuple):
        return tuple(take(part, rows) for part in tree)
    if isinstance(tree, dict):
        return {name: take(part, rows) for name, part in tree.items()}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return dataclasses.replace(tree, **{f.name: take(getattr(tree, f.name), rows) for f in dataclasses.fields(tree)})
    return tree


def concatenate(parts: list[Any]) -> Any:
    """Inverse of `take` over consecutive slices: rows of all parts in order."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, tuple):
        return tuple(concatenate(list(column)) for column in zip(*parts, strict=True))
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        columns = {f.name: concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(first)}
        return dataclasses.replace(first, **columns)
    return first


def moved(tree: T, device: torch.device) -> T:
    """Every tensor in a tensor or dataclass on `device`, detached; a copy where autograd could not use it (inference mode)."""
    if isinstance(tree, Tensor):
        there = tree.detach().to(device)
        return there.clone() if there.is_inference() else there  # type: ignore[return-value]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return dataclasses.replace(tree, **{f.name: moved(getattr(tree, f.name), device) for f in dataclasses.fields(tree)})
    return tree


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes (B,) so that it broadcasts against `like` (B, ...), in the dtype of `like`."""
    return rowwise(values.to(like.dtype), like)


def rowwise(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes (B,) so that it broadcasts against `like` (B, ...), in its own dtype."""
    return values.reshape(-1, *([1] * (like.ndim - 1)))
