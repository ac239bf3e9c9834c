"""How far to go, separate from where: a step size sees every reading and may also send a sample back to its best point."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from epsball.core.problem import Problem, Reading
from epsball.core.rows import rowwise
from epsball.core.threat import Z

Control = Any


class StepSize(Protocol):
    """`start` once, then `next` after every reading."""

    def start(self, problem: Problem, z: Z, steps: int) -> Control:
        """State before the first reading."""

    def next(self, problem: Problem, reading: Reading, control: Control) -> tuple[Tensor, Z, Z, Control]:
        """(step (B,), point to leave from, gradient to follow from there, state)."""


@dataclass(frozen=True)
class Fixed:
    """The same step, in the threat's unit, whatever the radius."""

    step: float

    def start(self, problem: Problem, z: Z, steps: int) -> Control:
        """No state."""
        return ()

    def next(self, problem: Problem, reading: Reading, control: Control) -> tuple[Tensor, Z, Z, Control]:
        """Constant."""
        return torch.full_like(problem.radius, self.step), reading.z, reading.gradient, control


@dataclass(frozen=True)
class OfRadius:
    """A fixed share of each sample's radius: no default can then fail to reach the edge of the ball."""

    share: float

    def start(self, problem: Problem, z: Z, steps: int) -> Control:
        """No state."""
        return ()

    def next(self, problem: Problem, reading: Reading, control: Control) -> tuple[Tensor, Z, Z, Control]:
        """share * radius."""
        return self.share * problem.radius, reading.z, reading.gradient, control


@dataclass(frozen=True)
class Fading:
    """A share of the radius that falls to 0 along half a cosine, whatever the scores say: for scores with noise in them."""

    share: float

    def start(self, problem: Problem, z: Z, steps: int) -> tuple[int, int]:
        """Moves made, moves in all."""
        return 0, max(steps, 1)

    def next(self, problem: Problem, reading: Reading, control: tuple[int, int]) -> tuple[Tensor, Z, Z, tuple[int, int]]:
        """share * radius * (1 + cos(pi * made / all)) / 2."""
        made, steps = control
        share = self.share * (1 + math.cos(math.pi * made / steps)) / 2
        return share * problem.radius, reading.z, reading.gradient, (made + 1, steps)


@dataclass(frozen=True)
class _Halved:
    step: Tensor
    best_score: Tensor
    best_z: Tensor
    best_gradient: Tensor
    last_score: Tensor
    rises: Tensor
    best_at_check: Tensor
    halved_at_check: Tensor
    looks: int
    since_check: int
    period: int
    shorten: int
    shortest: int


@dataclass(frozen=True)
class Halving:
    """APGD's step size (Croce & Hein 2020, arXiv 2003.01690, section 3): from 2 * radius, halve and rewind to the best point.

    A sample is halved at a checkpoint when its score rose in fewer than `rho` of the steps since the last checkpoint
    (condition 1), or when it was not halved at the last checkpoint and its best score has not moved since (condition 2).
    The released code counts the first window's first rise against 0 instead of the starting score; we follow the paper.
    """

    start_share: float = 2.0
    rho: float = 0.75

    def start(self, problem: Problem, z: Z, steps: int) -> _Halved:
        """Checkpoints after 22 % of the steps, then ever sooner, down to every 6 %."""
        score = torch.full(problem.radius.shape, -torch.inf, device=z.device)
        return _Halved(
            step=self.start_share * problem.radius,
            best_score=score,
            best_z=z,
            best_gradient=torch.zeros_like(z),
            last_score=score,
            rises=torch.zeros_like(score),
            best_at_check=score,
            halved_at_check=torch.ones_like(score, dtype=torch.bool),
            looks=0,
            since_check=0,
            period=max(int(0.22 * steps), 1),
            shorten=max(int(0.03 * steps), 1),
            shortest=max(int(0.06 * steps), 1),
        )

    def next(self, problem: Problem, reading: Reading, control: _Halved) -> tuple[Tensor, Z, Z, _Halved]:
        """Remembers the best point; at checkpoints halves and rewinds."""
        z, gradient, score = reading.z, reading.gradient, torch.nan_to_num(reading.score, nan=-torch.inf)
        better = score > control.best_score
        wide = rowwise(better, z)
        c = replace(
            control,
            best_score=torch.where(better, score, control.best_score),
            best_z=torch.where(wide, z, control.best_z),
            best_gradient=torch.where(wide, gradient, control.best_gradient),
            rises=control.rises + (score > control.last_score) if control.looks else control.rises,
            last_score=score,
            looks=control.looks + 1,
            since_check=control.since_check + (control.looks > 0),
        )
        if c.looks == 1:
            return c.step, z, gradient, replace(c, best_at_check=c.best_score)
        if c.since_check < c.period:
            return c.step, z, gradient, c
        halve = (c.rises <= self.rho * c.period) | (~c.halved_at_check & (c.best_at_check >= c.best_score))
        step = torch.where(halve, c.step / 2, c.step)
        back = rowwise(halve, z)
        z, gradient = torch.where(back, c.best_z, z), torch.where(back, c.best_gradient, gradient)
        c = replace(
            c,
            step=step,
            halved_at_check=halve,
            best_at_check=c.best_score,
            rises=torch.zeros_like(c.rises),
            since_check=0,
            period=max(c.period - c.shorten, c.shortest),
        )
        return step, z, gradient, c
