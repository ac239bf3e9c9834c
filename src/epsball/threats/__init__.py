"""What may change."""

from epsball.threats.color import LUV, RGB, Color, Space, Uneven
from epsball.threats.compose import Added, Composed, OfPart, compose
from epsball.threats.flow import Flow, Rigid, Rough
from epsball.threats.lp import L0, L1, L2, Linf, Room
from epsball.threats.parse import THREATS, ThreatSpec, is_input, kind_of, named, parse_threat
from epsball.threats.patch import Patch, Window

__all__ = [
    "L0",
    "L1",
    "L2",
    "LUV",
    "RGB",
    "THREATS",
    "Added",
    "Color",
    "Composed",
    "Flow",
    "Linf",
    "OfPart",
    "Patch",
    "Rigid",
    "Room",
    "Rough",
    "Space",
    "ThreatSpec",
    "Uneven",
    "Window",
    "compose",
    "is_input",
    "kind_of",
    "named",
    "parse_threat",
]
