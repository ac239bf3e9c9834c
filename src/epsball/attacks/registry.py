"""One registry: every recipe with its paper, access, threats and cost. Strings become attacks only here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from epsball.core import AttackLike
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.objectives import OBJECTIVES
from epsball.threats import named

Recipe = Callable[..., AttackLike]
R = TypeVar("R", bound=Recipe)


@dataclass(frozen=True)
class Entry:
    """What is known about a recipe.

    Attributes:
        name, recipe, paper: how it is called, the function, the source.
        access: what it needs of the model. threats: names it works under. targeted: has a targeted form.
        kind: "fixed" (best within a radius) or "smallest" (smallest change). cost: forwards and backwards per sample.
    """

    name: str
    recipe: Recipe
    paper: str
    access: Access
    threats: tuple[str, ...]
    targeted: bool
    kind: str
    cost: str

    @property
    def summary(self) -> str:
        """First line of the recipe's docstring."""
        return (inspect.getdoc(self.recipe) or "").split("\n")[0]


_ENTRIES: dict[str, Entry] = {}
_ALL = ("linf", "l2", "l1", "l0", "l0f")


def register(
    *,
    paper: str,
    cost: str,
    access: Access = Access.GRADIENT,
    threats: tuple[str, ...] = _ALL,
    targeted: bool = True,
    kind: str = "fixed",
) -> Callable[[R], R]:
    """Enters a recipe under its function name; everything entered is run through the laws by the tests."""

    def enter(recipe: R) -> R:
        name = recipe.__name__
        _ENTRIES[name] = Entry(name, recipe, paper, access, threats, targeted, kind, cost)
        return recipe

    return enter


def entries() -> dict[str, Entry]:
    """All entries, by name."""
    return dict(sorted(_ENTRIES.items()))


def get(name: str, *, threat: str | None = None, **options: Any) -> AttackLike:
    """The attack of that name, with options of its recipe; `threat` by name (linf, l2, l1, l0, l0f).

    Raises:
        BadInput: unknown name, option or threat, with what there is instead.

    >>> get("pgd", threat="l2", steps=10).name
    'pgd'
    """
    entry = _ENTRIES.get(name.replace("-", "_"))
    if entry is None:
        raise BadInput(f"attack '{name}': unknown: use one of {', '.join(sorted(_ENTRIES))}")
    known = inspect.signature(entry.recipe).parameters
    for option in options:
        if option not in known or option == "threat":
            allowed = ", ".join(sorted(set(known) - {"threat"})) or "none"
            raise BadInput(f"attack '{name}': unknown option '{option}': it takes {allowed}")
    if isinstance(options.get("objective"), str):
        if options["objective"] not in OBJECTIVES:
            raise BadInput(f"objective '{options['objective']}': unknown: use one of {', '.join(OBJECTIVES)}")
        options["objective"] = OBJECTIVES[options["objective"]]
    if threat is not None:
        if threat not in entry.threats:
            raise BadInput(f"attack '{name}': has no threat '{threat}': it works under {', '.join(entry.threats)}")
        options["threat"] = named(threat)
    return entry.recipe(**options)
