"""Attacks made by hand, apart from the library's: plain gradient ascent through any view of a model, and what counts as broken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import epsball as eb
from epsball.core import Access, Victim

Seen = Callable[[Tensor], Tensor]
Judge = Callable[[Tensor, Tensor], Tensor]
"""(inputs (B, ...), labels (B,)) -> (B,) bool: broken."""
Loss = Literal["cross-entropy", "margin", "aimed", "past-reject"]
DRAWS = 20


def majority(model: nn.Module, draws: int = 1) -> Judge:
    """Broken where more than half of the draws are wrong; one draw decides for a model without chance."""

    @torch.no_grad()
    def judge(z: Tensor, y: Tensor) -> Tensor:
        wrong = model(z).argmax(1) != y
        if draws == 1:
            return wrong
        rows = wrong.nonzero().squeeze(1)  # what one draw does not break is not worth twenty
        if len(rows):
            votes = torch.stack([model(z[rows]).argmax(1) != y[rows] for _ in range(draws)])
            wrong[rows] = 2 * votes.sum(0) > draws
        return wrong

    return judge


def by_votes(model: nn.Module) -> Judge:
    """`majority` of 20 draws, then of 100 fresh ones, then of 1,000: over many looks, fewer alone would call lucky points broken."""
    first = majority(model, DRAWS)

    @torch.no_grad()
    def judge(z: Tensor, y: Tensor) -> Tensor:
        wrong = first(z, y)
        for draws in (5 * DRAWS, 50 * DRAWS):
            rows = wrong.nonzero().squeeze(1)
            if len(rows):
                votes = sum((model(z[rows]).argmax(1) != y[rows]).int() for _ in range(draws))
                wrong[rows] = 2 * votes > draws
        return wrong

    return judge


def score(loss: Loss, output: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(B,) what is climbed: -log p(y); best other minus y; target minus y; best of the rest minus the better of y and the last class."""
    if loss == "cross-entropy":
        return F.cross_entropy(output, y, reduction="none")
    own = output.gather(1, y[:, None]).squeeze(1)
    if loss == "aimed":
        return output.gather(1, target[:, None]).squeeze(1) - own
    others = output.scatter(1, y[:, None], -torch.inf)
    if loss == "margin":
        return others.amax(1) - own
    return others[:, :-1].amax(1) - torch.maximum(own, output[:, -1])


def slope(seen: Seen, loss: Loss, z: Tensor, y: Tensor, target: Tensor, draws: int) -> Tensor:
    """(B, ...) gradient summed over draws; zeros where none comes through."""
    total = torch.zeros_like(z)
    for _ in range(draws):
        leaf = z.detach().requires_grad_()
        with torch.enable_grad():
            value = score(loss, seen(leaf), y, target).sum()
            if value.requires_grad:
                (one,) = torch.autograd.grad(value, leaf, allow_unused=True)
                total += torch.zeros_like(z) if one is None else one.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return total


@dataclass(frozen=True)
class Climb:
    """Signed gradient ascent under Linf.

    Attributes:
        through: model -> what is differentiated. loss: what is climbed; `aimed` runs once for each other class, likeliest first.
        steps, share: how many, how long in radii at first. schedule: cosine falls to 0. start: where.
        restarts, draws: runs; gradients that are summed. look: the judge is asked every so many steps, 0: at the end alone.
    """

    through: Callable[[nn.Module], Seen]
    loss: Loss = "margin"
    steps: int = 100
    share: float = 0.5
    schedule: Literal["cosine", "constant"] = "cosine"
    start: Literal["uniform", "clean"] = "uniform"
    restarts: int = 1
    draws: int = 1
    look: int = 1

    def runs(self, classes: int) -> int:
        """How often it starts."""
        return classes - 1 if self.loss == "aimed" else self.restarts

    def walk(self, model: nn.Module, x: Tensor, y: Tensor, radius: float, run: int) -> Iterator[Tensor]:
        """The points to judge, (B, ...)."""
        seen, target = self.through(model), y
        if self.loss == "aimed":
            with torch.no_grad():
                target = seen(x).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, run]
        low, high = (x - radius).clamp(min=0), (x + radius).clamp(max=1)
        z = x if self.start == "clean" else torch.minimum(torch.maximum(x + radius * (2 * torch.rand_like(x) - 1), low), high)
        for step in range(self.steps):
            share = self.share * (0.5 + 0.5 * math.cos(math.pi * step / self.steps) if self.schedule == "cosine" else 1.0)
            gradient = slope(seen, self.loss, z, y, target, self.draws)
            z = torch.minimum(torch.maximum(z + share * radius * gradient.sign(), low), high)
            if step == self.steps - 1 or (self.look and step % self.look == 0):
                yield z


@dataclass(frozen=True)
class Squares:
    """Square Attack on the scores of the model as it is."""

    queries: int = 5000
    look: int = 0

    def runs(self, classes: int) -> int:
        """Once."""
        return 1

    def walk(self, model: nn.Module, x: Tensor, y: Tensor, radius: float, run: int) -> Iterator[Tensor]:
        """Where it ends."""
        victim = Victim(model, access=Access.SCORES)
        yield eb.attacks.square(self.queries)(victim, x, y, radius, seed=run).x_adv


def broken(
    attacks: tuple[Climb | Squares, ...], model: nn.Module, judge: Judge, x: Tensor, y: Tensor, radius: float, classes: int
) -> Tensor:
    """(N,) bool: judged wrong on the clean input, or at any point that any attack looked at; later attacks see what still stands."""
    gone = judge(x, y)
    for attack in attacks:
        for run in range(attack.runs(classes)):
            rows = (~gone).nonzero().squeeze(1)
            if not len(rows):
                return gone
            for z in attack.walk(model, x[rows], y[rows], radius, run):
                assert bool(((z - x[rows]).abs() <= radius + 1e-6).all() & (z >= 0).all() & (z <= 1).all())
                left = ~gone[rows]
                gone[rows[left]] |= judge(z[left], y[rows[left]])
                if bool(gone[rows].all()):
                    break
    return gone
