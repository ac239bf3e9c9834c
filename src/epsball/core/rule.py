"""From a gradient to a direction: small links that chain, in the manner of optax, each per sample and with its own memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from epsball.core.problem import Problem
from epsball.core.rows import per_sample
from epsball.core.threat import Z

Memory = Any


class Rule(Protocol):
    """One link: `start` gives its memory (rows of B), `turn` maps a gradient to a direction."""

    def start(self, problem: Problem, z: Z) -> Memory:
        """Memory before the first step."""

    def turn(self, problem: Problem, z: Z, gradient: Z, memory: Memory) -> tuple[Z, Memory]:
        """The direction, and the memory for the next step."""


def lengths(values: Tensor, p: float) -> Tensor:
    """(B,) p-norms of rows, p 1, 2 or inf, in their own precision: quick, and in float64 only where squares would under- or overflow."""
    return _lengths(values, p)[0]


def _lengths(values: Tensor, p: float) -> tuple[Tensor, bool]:
    """`lengths`, and whether all are known to be above 0 and finite."""
    flat = values.flatten(1)
    if p != 2:
        return flat.abs().amax(1) if p == torch.inf else flat.abs().sum(1), False
    length: Tensor = torch.linalg.vector_norm(flat, 2, dim=1)
    tiny = torch.finfo(length.dtype).tiny ** 0.4
    if strictly_between(length, tiny, 1 / tiny):
        return length, True
    odd = (~((length > tiny) & (length < 1 / tiny))).nonzero().squeeze(1)
    return length.index_copy(0, odd, torch.linalg.vector_norm(flat[odd].double(), 2, dim=1).to(length.dtype)), False


def strictly_between(length: Tensor, low: float, high: float) -> bool:
    """Every entry strictly between the two; NaN is not."""
    if not len(length):
        return True
    least, most = torch.aminmax(length)
    return low < float(least) and float(most) < high


def unit(values: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Rows of p-norm 1, and the norms (B,) they had; rows of zeros stay zeros, non-finite entries count as zero."""
    length, tame = _lengths(values, p)
    rows = values / per_sample(length, values)
    if tame or strictly_between(length, 0.0, torch.inf):
        return rows, length
    odd = (~((length > 0) & (length < torch.inf))).nonzero().squeeze(1)
    part, whole = torch.nan_to_num(values[odd], nan=0.0, posinf=0.0, neginf=0.0), torch.ones_like(length[odd])
    for order in (torch.inf, p):
        scale = lengths(part, order)
        part, whole = part / per_sample(torch.where(scale > 0, scale, 1.0), part), whole * scale
    return rows.index_copy(0, odd, part), length.index_copy(0, odd, whole)


def normalized(values: Tensor, p: float) -> Tensor:
    """Rows of p-norm 1; rows of zeros stay zeros, non-finite entries count as zero."""
    return unit(values, p)[0]


@dataclass(frozen=True)
class Steepest:
    """The threat's own steepest direction."""

    def start(self, problem: Problem, z: Z) -> Memory:
        """No memory."""
        return ()

    def turn(self, problem: Problem, z: Z, gradient: Z, memory: Memory) -> tuple[Z, Memory]:
        """Asks the threat."""
        return problem.threat.steepest(problem.x, z, gradient), memory


@dataclass(frozen=True)
class Unit:
    """Scales every gradient to p-norm 1."""

    p: float

    def start(self, problem: Problem, z: Z) -> Memory:
        """No memory."""
        return ()

    def turn(self, problem: Problem, z: Z, gradient: Z, memory: Memory) -> tuple[Z, Memory]:
        """g / ||g||_p."""
        return normalized(gradient, self.p), memory


@dataclass(frozen=True)
class Momentum:
    """Accumulates: m <- decay * m + g (Dong et al. 2018, eq. 6)."""

    decay: float

    def start(self, problem: Problem, z: Z) -> Memory:
        """No speed yet."""
        return torch.zeros_like(z)

    def turn(self, problem: Problem, z: Z, gradient: Z, memory: Memory) -> tuple[Z, Memory]:
        """The accumulated gradient is both the direction and the memory."""
        speed = self.decay * memory + gradient
        return speed, speed


@dataclass(frozen=True)
class Chain:
    """Links in order."""

    links: tuple[Rule, ...]

    def start(self, problem: Problem, z: Z) -> Memory:
        """Memory of each link."""
        return tuple(link.start(problem, z) for link in self.links)

    def turn(self, problem: Problem, z: Z, gradient: Z, memory: Memory) -> tuple[Z, Memory]:
        """Each link turns what the one before it gave."""
        after = []
        for link, part in zip(self.links, memory, strict=True):
            gradient, part = link.turn(problem, z, gradient, part)
            after.append(part)
        return gradient, tuple(after)


def chain(*links: Rule) -> Chain:
    """`chain(Unit(1), Momentum(1.0), Steepest())` reads like the paper's update."""
    return Chain(links)
