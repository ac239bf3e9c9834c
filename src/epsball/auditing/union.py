"""Several threats at once: a sample stands under their union where it stands under each. Nothing is attacked for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

from torch import Tensor

from epsball.auditing.results import Place
from epsball.auditing.sheet import Sheet
from epsball.core import valid
from epsball.errors import BadInput
from epsball.threats import ThreatSpec

UNION = "union"
Places = tuple[Place, ...]


def unions(threats: Sequence[ThreatSpec]) -> tuple[Places, ...]:
    """The first radius of every threat together, then the second, and so on; a threat that has fewer keeps its last.

    Raises:
        BadInput: there is one threat only.
    """
    if len(threats) < 2:
        raise BadInput(f"union: needs two threats or more: there is {' '.join(spec.name for spec in threats) or 'none'}")
    last = max(len(spec.radii) for spec in threats)
    return tuple(tuple(_place(spec, min(at, len(spec.radii) - 1)) for spec in threats) for at in range(last))


def _place(spec: ThreatSpec, at: int) -> Place:
    return Place(threat=spec.name, radius=spec.radii[at], radius_text=spec.texts[at])


def text(places: Sequence[Place]) -> str:
    """`linf:0.1|l2:1`."""
    return "|".join(f"{place.threat}:{place.radius_text}" for place in places)


def claims(sheet: Sheet) -> Iterator[Places]:
    """Everything that the report will give a robust accuracy for: every round, then every union."""
    for current in sheet.rounds:
        yield (Place(threat=current.threat, radius=current.radius, radius_text=current.text),)
    yield from sheet.unions


def standing(sheet: Sheet, places: Places) -> Tensor:
    """(N,) bool: correct, and not known to be broken at any of the places."""
    return reduce(Tensor.__and__, (sheet.standing(place.threat, place.radius) for place in places))


def unsure(sheet: Sheet, places: Places) -> Tensor:
    """(N,) bool: standing, but the model gave no finite answer somewhere within one of them."""
    met = reduce(Tensor.__or__, (sheet.unsure(place.threat, place.radius) for place in places))
    return standing(sheet, places) & met


def counted(sheet: Sheet, places: Places) -> tuple[int, int]:
    """How many samples stand for sure, and of how many nobody knows."""
    open_ = unsure(sheet, places)
    return int((standing(sheet, places) & ~open_).sum()), int(open_.sum()) + int((~valid(sheet.clean)).sum())
