"""Several attacks as one, so that runs of all go through the model in one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from epsball.core import Attack, AttackLike
from epsball.core.problem import PerRow
from epsball.errors import BadInput


def joined(attacks: tuple[AttackLike, ...], which: Tensor) -> AttackLike:
    """One attack in which row b runs that of number `which[b]`.

    They may differ in objectives, and in numbers that their strategies read row by row; a threat they share.

    Raises:
        BadInput: attacks that differ in more.
    """
    first = attacks[0]
    if len(attacks) == 1:
        return first
    like = [one for one in attacks if isinstance(one, Attack)]
    if not isinstance(first, Attack) or len(like) < len(attacks) or any(_shared(one) != _shared(first) for one in like):
        names = ", ".join(one.name for one in attacks)
        raise BadInput(f"attacks '{names}': differ in more than losses and numbers: give them one threat and the same steps, or a Cascade")
    objectives = tuple(dict.fromkeys(a.objective for a in like))
    places = torch.tensor([objectives.index(a.objective) for a in like], device=which.device)
    objective = objectives[0] if len(objectives) == 1 else PerRow(objectives, places[which])
    return replace(first, objective=objective, strategy=_by_row([a.strategy for a in like], which))


def _shared(attack: Attack) -> tuple[Any, ...]:
    return attack.name, attack.threat, attack.steps, attack.smallest, attack.access


def _by_row(values: Sequence[Any], which: Tensor) -> Any:
    """What is the same in all as it is, numbers as (B,) float64."""
    first = values[0]
    if all(value == first for value in values):
        return first
    if dataclasses.is_dataclass(first) and not isinstance(first, type) and len({type(value) for value in values}) == 1:
        return replace(first, **{f.name: _by_row([getattr(value, f.name) for value in values], which) for f in dataclasses.fields(first)})
    if isinstance(first, tuple) and len({len(value) for value in values}) == 1:
        return tuple(_by_row(column, which) for column in zip(*values, strict=True))
    if all(isinstance(value, int | float) for value in values):
        return torch.tensor(values, dtype=torch.float64, device=which.device)[which]
    raise BadInput(f"attacks: {first!r} and others: cannot differ side by side: use a Cascade")
