"""Several attacks as one, so that runs of all go through the model in one batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from epsball.core import Attack, AttackLike, Strategy
from epsball.core.problem import PerRow
from epsball.errors import BadInput


def joined(attacks: tuple[AttackLike, ...], which: Tensor) -> AttackLike:
    """One attack in which row b runs that of number `which[b]`.

    They may differ in their objectives, and in what their strategies read row by row (`by_row`); a threat they share.

    Raises:
        BadInput: attacks that differ in more.
    """
    first = attacks[0]
    if len(attacks) == 1:
        return first
    like = [one for one in attacks if isinstance(one, Attack) and isinstance(first, Attack) and _alike(first, one)]
    if not isinstance(first, Attack) or len(like) < len(attacks):
        names = ", ".join(one.name for one in attacks)
        raise BadInput(f"attacks '{names}': differ in more than losses and numbers read row by row: use a Cascade")
    objectives = tuple(dict.fromkeys(one.objective for one in like))
    places = torch.tensor([objectives.index(one.objective) for one in like], device=which.device)
    objective = objectives[0] if len(objectives) == 1 else PerRow(objectives, places[which])
    columns = {name: torch.tensor([getattr(one.strategy, name) for one in like], dtype=torch.float64) for name in _own(first.strategy)}
    return replace(
        first,
        objective=objective,
        strategy=_with(first.strategy, {name: column.to(which.device)[which].unbind(1) for name, column in columns.items()}),
    )


def _alike(first: Attack, other: Attack) -> bool:
    """They are one attack but for what may differ."""
    if type(first.strategy) is not type(other.strategy):
        return False
    return replace(other, objective=first.objective, strategy=_with(other.strategy, _own(first.strategy))) == first


def _own(strategy: Strategy) -> dict[str, Any]:
    """What a strategy reads row by row, by name."""
    return {name: getattr(strategy, name) for name in getattr(strategy, "by_row", ())}


def _with(strategy: Any, own: dict[str, Any]) -> Strategy:
    changed: Strategy = replace(strategy, **own) if own else strategy
    return changed
