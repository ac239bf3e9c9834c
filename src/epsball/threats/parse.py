"""Threat strings, parsed once at the door: `NAME:RADIUS[,RADIUS...]`, fractions allowed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from epsball.core.threat import Projects
from epsball.errors import BadInput
from epsball.threats.lp import L0, L1, L2, Linf

THREATS: dict[str, Callable[[], Projects]] = {
    "linf": Linf,
    "l2": L2,
    "l1": lambda: L1(share=0.05),
    "l0": L0,
    "l0f": lambda: L0(features=True),
}


@dataclass(frozen=True)
class ThreatSpec:
    """A threat and the radii to ask about, smallest first, each with the words it was asked in."""

    name: str
    radii: tuple[float, ...]
    texts: tuple[str, ...]

    @property
    def threat(self) -> Projects:
        """The threat itself."""
        return named(self.name)


def named(name: str) -> Projects:
    """The registered threat of that name."""
    if name.lower() not in THREATS:
        raise BadInput(f"threat {name!r}: unknown: use one of {', '.join(THREATS)}")
    return THREATS[name.lower()]()


def parse_threat(text: str) -> ThreatSpec:
    """Reads one threat string.

    >>> parse_threat("linf:8/255,2/255")
    ThreatSpec(name='linf', radii=(0.00784313725490196, 0.03137254901960784), texts=('2/255', '8/255'))
    """
    name, _, rest = text.strip().partition(":")
    named(name)
    found: dict[float, str] = {}
    for word in rest.split(","):
        above, slash, below = word.partition("/")
        try:  # not Fraction: it would compute all the digits of 1e999999999
            radius = float(above) / float(below if slash else 1)
        except (ValueError, ZeroDivisionError):
            raise BadInput(f"threat {text!r}: radius {word.strip()!r} is no number: write it as linf:8/255,0.1") from None
        if not (radius > 0 and math.isfinite(radius)):
            raise BadInput(f"threat {text!r}: radius {word.strip()!r} must be above 0 and finite")
        found[radius] = word.strip()
    radii = tuple(sorted(found))
    return ThreatSpec(name.lower(), radii, tuple(found[r] for r in radii))
