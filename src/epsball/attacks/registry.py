"""One registry: every recipe with its paper, access, threats and cost. Strings become attacks only here."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from epsball.core import AttackLike, Projects
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.objectives import OBJECTIVES
from epsball.threats import kind_of, named

Recipe = Callable[..., AttackLike]
R = TypeVar("R", bound=Recipe)


@dataclass(frozen=True)
class Entry:
    """What is known about a recipe.

    Attributes:
        name, recipe, paper: how it is called, the function, the source.
        access: what it needs of the model. targeted: has a targeted form.
        threats: names it works under; `compose` stands for every composition.
        kind: "fixed" (best within a radius) or "smallest" (smallest change). cost: forwards and backwards per sample.
        any_model: works on every classifier; else `entries` leaves it out, and `get` still knows it.
    """

    name: str
    recipe: Recipe
    paper: str
    access: Access
    threats: tuple[str, ...]
    targeted: bool
    kind: str
    cost: str
    any_model: bool = True

    @property
    def summary(self) -> str:
        """First line of the recipe's docstring."""
        return (inspect.getdoc(self.recipe) or "").split("\n")[0]


_ENTRIES: dict[str, Entry] = {}
_ALL = ("linf", "l2", "l1", "l0", "l0f")
EVERY = (*_ALL, "flow", "color", "color-luv", "rigid", "patch", "compose")
"""All threats, for recipes that ask a threat for nothing but what `Projects` promises."""


def register(
    *,
    paper: str,
    cost: str,
    access: Access = Access.GRADIENT,
    threats: tuple[str, ...] = _ALL,
    targeted: bool = True,
    kind: str = "fixed",
    any_model: bool = True,
) -> Callable[[R], R]:
    """Enters a recipe under its function name; everything entered for any model is run through the laws by the tests."""

    def enter(recipe: R) -> R:
        name = recipe.__name__
        _ENTRIES[name] = Entry(name, recipe, paper, access, threats, targeted, kind, cost, any_model)
        return recipe

    return enter


def entries() -> dict[str, Entry]:
    """All entries that work on any model, by name."""
    return {name: entry for name, entry in sorted(_ENTRIES.items()) if entry.any_model}


def get(name: str, *, threat: str | Projects | None = None, **options: Any) -> AttackLike:
    """The attack of that name, with options of its recipe; `threat` by name (linf, flow, ...) or as an object.

    Raises:
        BadInput: unknown name, option or threat, with what there is instead.

    >>> get("pgd", threat="l2", steps=10).name
    'pgd'
    """
    entry = _ENTRIES.get(name.replace("-", "_"))
    if entry is None:
        close = difflib.get_close_matches(name.replace("-", "_"), _ENTRIES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise BadInput(f"attack '{name}': unknown: {hint}`epsball list` shows them all")
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
        kind = threat if isinstance(threat, str) else kind_of(threat)
        if kind not in entry.threats:
            raise BadInput(f"attack '{name}': has no threat '{kind}': it works under {', '.join(entry.threats)}")
        options["threat"] = named(threat) if isinstance(threat, str) else threat
    return entry.recipe(**options)
