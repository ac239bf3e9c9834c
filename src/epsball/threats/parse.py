"""Threat strings, parsed once at the door: `NAME:RADIUS[,RADIUS...]`, fractions allowed.

| name | what a radius is |
|---|---|
| `linf`, `l2`, `l1` | norm of the change |
| `l0`, `l0f` | changed pixels, changed features |
| `flow` | longest displacement, in pixels |
| `color`, `color-luv` | largest shift of a channel of any color, RGB (gray images: a tone curve) or CIELUV, scaled to 0 .. 1 |
| `rigid` | share of 30 degrees and 3 pixels |
| `patch` | side of a square at any place, in pixels |

Several at once are `NAME+NAME:RADIUS+RADIUS`, in the order in which they act: `color+linf:0.06+8/255`, and with more radii
`color+linf:0.03+4/255,0.06+8/255`, which must grow together. As a number such a radius is that of its first part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from epsball.core.threat import Projects
from epsball.errors import BadInput
from epsball.threats.color import RGB, Color
from epsball.threats.compose import Composed, compose
from epsball.threats.flow import Flow, Rigid
from epsball.threats.lp import L0, L1, L2, Linf
from epsball.threats.patch import Patch, Window

THREATS: dict[str, Callable[[], Projects]] = {
    "linf": Linf,
    "l2": L2,
    "l1": lambda: L1(share=0.05),
    "l0": L0,
    "l0f": lambda: L0(features=True),
    "flow": Flow,
    "color": lambda: Color(RGB, (16, 16, 16)),
    "color-luv": Color,
    "rigid": Rigid,
    "patch": Patch,
}
COMPOSED = "compose"
"""What registered attacks call any composition."""


@dataclass(frozen=True)
class ThreatSpec:
    """A threat and the radii to ask about, smallest first, each with the words it was asked in."""

    name: str
    radii: tuple[float, ...]
    texts: tuple[str, ...]

    @property
    def threat(self) -> Projects:
        """The threat itself, made anew."""
        if "+" not in self.name:
            return named(self.name)
        asked = [_numbers(text, text) for text in self.texts]
        return compose(*((named(part), _budget(asked, place)) for place, part in enumerate(self.name.split("+"))))

    def __str__(self) -> str:
        """The threat string."""
        return f"{self.name}:{','.join(self.texts)}"


def named(name: str) -> Projects:
    """The registered threat of that name."""
    if name.lower() not in THREATS:
        raise BadInput(f"threat {name!r}: unknown: use one of {', '.join(THREATS)}, or several as color+linf:0.06+8/255")
    return THREATS[name.lower()]()


def kind_of(threat: Projects) -> str:
    """The name under which attacks are registered for it."""
    return COMPOSED if isinstance(threat, Composed) else threat.name


def is_input(threat: Projects) -> bool:
    """Whether the adversary's variable z is the perturbed input itself; else who keeps x_adv must keep z as well."""
    return not isinstance(threat, Flow | Rigid | Color | Window | Composed)


def parse_threat(text: str) -> ThreatSpec:
    """Reads one threat string.

    >>> parse_threat("linf:8/255,2/255")
    ThreatSpec(name='linf', radii=(0.00784313725490196, 0.03137254901960784), texts=('2/255', '8/255'))
    >>> parse_threat("color+linf:0.06+8/255").radii
    (0.06,)
    """
    name, _, rest = text.strip().partition(":")
    parts = name.lower().split("+")
    for part in parts:
        named(part)
    found: dict[float, str] = {}
    for word in rest.split(","):
        radii = _numbers(word, text)
        if len(radii) != len(parts):
            raise BadInput(f"threat {text!r}: radius {word.strip()!r} for {len(parts)} threats: write one for each, as {_example(parts)}")
        if parts == ["patch"] and radii[0] < 1:
            raise BadInput(f"threat {text!r}: radius {word.strip()!r} is the side of a square in pixels: write 1 or more, as patch:5")
        found[radii[0]] = word.strip()
    order = tuple(sorted(found))
    spec = ThreatSpec("+".join(parts), order, tuple(found[r] for r in order))
    if len(parts) > 1:
        _grow_together(spec, text)
        spec.threat  # noqa: B018  # parts that cannot be composed are told here
    return spec


def _numbers(word: str, text: str) -> tuple[float, ...]:
    """The radii of one word, `0.06` or `0.06+8/255`."""
    radii = []
    for part in word.split("+"):
        above, slash, below = part.partition("/")
        try:  # not Fraction: it would compute all the digits of 1e999999999
            radius = float(above) / float(below if slash else 1)
        except (ValueError, ZeroDivisionError):
            raise BadInput(f"threat {text!r}: radius {part.strip()!r} is no number: write it as linf:8/255,0.1") from None
        if not (radius > 0 and math.isfinite(radius)):
            raise BadInput(f"threat {text!r}: radius {part.strip()!r} must be above 0 and finite")
        radii.append(radius)
    return tuple(radii)


def _example(parts: list[str]) -> str:
    return f"{'+'.join(parts)}:{'+'.join(['0.1'] * len(parts))}"


def _budget(asked: list[tuple[float, ...]], place: int) -> float:
    """What the part at `place` may do for each unit of the first part's radius; rounded so that no radius asked for is exceeded."""
    budget = min(radii[place] / radii[0] for radii in asked)
    while any(radii[0] * budget > radii[place] for radii in asked):
        budget = math.nextafter(budget, 0.0)
    return budget


def _grow_together(spec: ThreatSpec, text: str) -> None:
    """Refuses radii that are not multiples of one another: a composition has one radius, the first part's."""
    asked = [_numbers(word, text) for word in spec.texts]
    for place in range(len(asked[0])):
        shares = [radii[place] / radii[0] for radii in asked]
        if max(shares) > min(shares) * (1 + 1e-6):
            fix = "double all parts or none, as color+linf:0.03+4/255,0.06+8/255"
            raise BadInput(f"threat {text!r}: radii that do not grow together: {fix}")
