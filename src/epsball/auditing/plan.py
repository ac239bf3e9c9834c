"""Which attacks, in which order: cheap before strong, each on the samples that all before it left standing."""

from __future__ import annotations

from dataclasses import dataclass

from epsball.attacks import apgd, apgd_dlr, apgd_t, noise, pgd
from epsball.core import AttackLike
from epsball.errors import BadInput
from epsball.objectives import cross_entropy, margin
from epsball.threats import named

EFFORTS = ("fast", "default", "max")


@dataclass(frozen=True)
class Stage:
    """An attack of the cascade and the most gradient rows that it spends on one sample, for the estimate of time."""

    attack: AttackLike
    rows: int


def plan(threat: str, effort: str, *, classes: int, single_label: bool, gradients: bool) -> tuple[Stage, ...]:
    """The cascade for one threat.

    Args:
        threat: registry name. effort: fast, default or max. classes: scores per sample.
        single_label: one class per sample; aimed attacks and DLR need that, and 3 classes.
        gradients: whether any gradient reaches the input; without, only noise is left.
    """
    if effort not in EFFORTS:
        raise BadInput(f"effort '{effort}': unknown: use one of {', '.join(EFFORTS)}")
    level = EFFORTS.index(effort)
    draws = (5, 10, 100)[level]
    stages = [Stage(noise(draws, threat=named(threat)), draws // 2)]
    if not gradients:
        return (Stage(noise(100 * draws, threat=named(threat)), 50 * draws),)
    if threat in ("l0", "l0f"):
        steps, restarts = (20, 100, 200)[level], (1, 1, 5)[level]
        for objective in (margin, cross_entropy):
            stages.append(Stage(pgd(steps, restarts=restarts, threat=named(threat), objective=objective), steps * restarts))
        return tuple(stages)
    aimed = single_label and classes >= 3
    steps, targets, restarts = (15, 30, 100)[level], min((2, 4, 9)[level], classes - 1), (1, 1, 3)[level]
    stages.append(Stage(pgd(10, threat=named(threat), objective=margin), 10))
    if aimed:
        stages.append(Stage(apgd_t(steps, targets=targets, threat=named(threat)), steps * targets + targets + 4))
    if level:
        stages.append(Stage(apgd(steps, restarts, threat=named(threat)), steps * restarts))
    if aimed and level == 2:
        stages.append(Stage(apgd_dlr(steps, restarts, threat=named(threat)), steps * restarts))
    if not aimed:
        stages.append(Stage(apgd(3 * steps, restarts, threat=named(threat), objective=margin), 3 * steps * restarts))
    return tuple(stages)


def default_threats(shape: tuple[int, ...], width: float) -> list[str]:
    """Threats to ask about when nobody says: the field's usual ones for inputs of that shape (without B).

    Small gray images (digits): Linf 0.05 to 0.2; color images: 2/255 to 8/255; other inputs: shares of the box width.
    """
    if len(shape) == 3 and shape[0] == 1 and shape[1] <= 64:
        big = shape[1] >= 20
        linf, l2 = (("0.1", "0.2", "0.3"), ("1", "2")) if big else (("0.05", "0.1", "0.2"), ("0.5", "1"))
        return [scale_text("linf", linf, width), scale_text("l2", l2, width)]
    if len(shape) == 3:
        l2 = ("0.25", "0.5") if shape[1] <= 64 else ("1", "3")
        return [scale_text("linf", ("2/255", "4/255", "8/255"), width), scale_text("l2", l2, width)]
    return [scale_text("linf", ("0.01", "0.05", "0.1"), width)]


def scale_text(name: str, radii: tuple[str, ...], width: float) -> str:
    """Radii for a box of another width than 1.

    >>> scale_text("linf", ("0.1", "0.2"), 2.0)
    'linf:0.2,0.4'
    """
    if width == 1.0:
        return f"{name}:{','.join(radii)}"
    from fractions import Fraction

    return f"{name}:{','.join(format(float(Fraction(r)) * width, 'g') for r in radii)}"
