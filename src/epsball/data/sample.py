"""Which samples: a seeded, class-stratified subset that depends on nothing but the labels, the seed and ``n``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


def ranks(seed: int, count: int) -> npt.NDArray[np.uint64]:
    """One 64-bit hash for each index in 0..count-1: splitmix64 of (seed, index). No generator is read or touched.

    >>> bool((ranks(0, 3) == ranks(0, 5)[:3]).all())
    True
    """
    state = np.arange(count, dtype=np.uint64)
    for word in (seed % 2**64, 0x9E3779B97F4A7C15):
        state = state + np.full(count, word, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def subset(labels: npt.NDArray[np.int64], n: int, seed: int) -> Rows:
    """``n`` of the rows, each class in proportion (largest remainder), chosen and ordered by hash of (seed, index).

    Args:
        labels: (N,) classes; (N, C) multi-label rows are not stratified.
        n: 1..N.
        seed: any integer.

    >>> labels = np.array([0] * 6 + [1] * 3)
    >>> rows = subset(labels, 3, seed=0)
    >>> sorted(labels[rows].tolist())
    [0, 0, 1]
    """
    order = np.argsort(ranks(seed, len(labels)), kind="stable")
    if labels.ndim != 1:
        return order[:n].astype(np.int64)
    _, group, counts = np.unique(labels, return_inverse=True, return_counts=True)
    shares = n * counts  # integers: share_c = n * N_c / N without rounding error
    quota = shares // len(labels)
    rest = n - int(quota.sum())
    quota[np.argsort(-(shares % len(labels)), kind="stable")[:rest]] += 1
    sorted_groups = group[order]
    by_group = np.argsort(sorted_groups, kind="stable")
    starts = np.cumsum(counts) - counts
    place = np.empty(len(labels), dtype=np.int64)  # place of each row within its own class, in hash order
    place[by_group] = np.arange(len(labels)) - np.repeat(starts, counts)
    return order[place < quota[sorted_groups]].astype(np.int64)
