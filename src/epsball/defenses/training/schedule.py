"""Rates, radii and averages as functions of the step: none of them has a state to save."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]
"""Share of the training that is over, in [0, 1) -> share of the largest rate."""


def one_cycle(progress: float) -> float:
    """Linear up to 1 over the first 30 %, then a half cosine down to 0 (Smith & Topin 2018, arXiv 1708.07120); starts at 1/25."""
    if progress < 0.3:
        return 0.04 + 0.96 * progress / 0.3
    return cosine((progress - 0.3) / 0.7)


def cosine(progress: float) -> float:
    """A half cosine from 1 down to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    """1."""
    return 1.0


def warmed(progress: float, warmup: float) -> float:
    """Share of the radius: grows linearly over the first `warmup` of the training, then 1."""
    return min(1.0, progress / warmup) if warmup > 0 else 1.0


def keep(decay: float, step: int) -> float:
    """How much of the averaged weights stays at this step (from 1): at most `decay`, less while there is little to average."""
    return min(decay, step / (step + 9.0))
