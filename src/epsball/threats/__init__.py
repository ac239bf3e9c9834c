"""What may change."""

from epsball.threats.lp import L0, L1, L2, Linf, Room
from epsball.threats.parse import THREATS, ThreatSpec, named, parse_threat

__all__ = ["L0", "L1", "L2", "THREATS", "Linf", "Room", "ThreatSpec", "named", "parse_threat"]
