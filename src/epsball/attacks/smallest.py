"""The best search for the smallest change, per norm."""

from __future__ import annotations

from epsball.attacks.apgd import apgd
from epsball.attacks.combine import SmallestRadius
from epsball.attacks.pgd import pgd
from epsball.core import AttackLike
from epsball.objectives import margin
from epsball.threats import named


def smallest(norm: str, steps: int = 40, rounds: int = 14) -> SmallestRadius:
    """Bisects each sample's radius with the strongest fixed-radius attack here: APGD on the margin, PGD_0 under L0.

    Args:
        norm: linf, l2, l1, l0 or l0f. steps: of each attack. rounds: bisections.

    Cost: at most (rounds + 1) * steps forwards and backwards per sample.

    >>> smallest("l2").name
    'smallest_apgd'
    """
    recipe = pgd if norm.startswith("l0") else apgd
    attack: AttackLike = recipe(steps, threat=named(norm), objective=margin)
    return SmallestRadius(attack, rounds)
