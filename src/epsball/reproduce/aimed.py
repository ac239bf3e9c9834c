"""Targeted attacks measured: which sample is aimed at which class, and what a fresh look at the result says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epsball.core import AttackLike, Key, Targeted, Victim
from epsball.data import Dataset
from epsball.errors import BadInput
from epsball.reproduce import nets
from epsball.reproduce.base import Setting

RECALLED = " (recalled, not read)"
"""Behind a paper's figure that no source at hand confirmed."""


@dataclass(frozen=True)
class Aim:
    """Samples x (N, ...), their labels (N,) and the class that each is sent to (N,)."""

    x: Tensor
    labels: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Hits:
    """What an attack did: inputs (N, ...), `reached` (N,) by a fresh look, `claimed` (N,) by the attack, sizes (N,) float64.

    `z` is the adversary's variable; `queries` and `backwards` (N,) are its costs.
    """

    x_adv: Tensor
    z: Tensor
    reached: Tensor
    claimed: Tensor
    size: Tensor
    queries: Tensor
    backwards: Tensor

    @property
    def sizes(self) -> list[float]:
        """Those of the successes."""
        return [float(size) for size in self.size[self.reached]]


def pool(setting: Setting, count: int) -> int:
    """How many test samples to load, so that accuracy is known and `count` right ones are found."""
    return max(100 if setting.quick else 1000, 2 * count)


def right(net: nn.Module, data: Dataset, most: int) -> Dataset:
    """At most `most` samples that the network classifies rightly, class after class in turn.

    Raises:
        BadInput: there are none.
    """
    chosen = (nets.answers(net, data.x).argmax(1) == data.y).nonzero().squeeze(1)
    if not len(chosen):
        raise BadInput(f"n: {len(data.y)}: the network is wrong on all of these test samples: ask for more")
    y = data.y[chosen]
    earlier = torch.nn.functional.one_hot(y).cumsum(0).gather(1, y[:, None]).squeeze(1)  # of the same class, itself included
    return nets.rows(data, chosen[earlier.argsort(stable=True)[:most]])


def at_random(data: Dataset, setting: Setting) -> Aim:
    """Each sample at one other class, drawn by the seed."""
    draw = nets.generator(Key.of(setting.seed).fold("targets"))
    return Aim(data.x, data.y, (data.y + torch.randint(1, 10, data.y.shape, generator=draw)) % 10)


def at_all(data: Dataset, count: int) -> Aim:
    """Each of the first `count` samples at all nine other classes: nine rows a sample, one after another."""
    x, y = data.x[:count].repeat_interleave(9, 0), data.y[:count].repeat_interleave(9)
    return Aim(x, y, (y + torch.arange(1, 10).repeat(len(y) // 9)) % 10)


def attacked(attack: AttackLike, net: nn.Module, aim: Aim, radius: float, setting: Setting, batch: int = 256) -> Hits:
    """Runs the attack and asks the network once more about what came out."""
    found = attack(Victim(net, batch_size=batch), aim.x, Targeted(aim.targets), radius, setting.seed)
    fresh = nets.answers(net, found.x_adv, batch).argmax(1) == aim.targets
    return Hits(found.x_adv, found.z, fresh, found.reached, found.size, found.queries, found.backwards)
