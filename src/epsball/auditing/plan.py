"""Which attacks, in which order: cheap before strong, each on the samples that all before it left standing."""

from __future__ import annotations

from dataclasses import dataclass

from epsball.attacks import apgd, apgd_dlr, apgd_t, noise, pgd
from epsball.core import AttackLike
from epsball.errors import BadInput
from epsball.objectives import cross_entropy, margin
from epsball.threats import named

EFFORTS = ("fast", "default", "max")
_STEPS = {"fast": 10, "default": 40, "max": 100}


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
    draws, steps, restarts = (5, 10, 100)[level], _steps(threat, effort), (1, 1, 3)[level]
    if not gradients:
        return (Stage(noise(100 * draws, threat=named(threat)), 50 * draws),)
    stages = [Stage(noise(draws, threat=named(threat)), draws // 2), Stage(pgd(10, threat=named(threat), objective=margin), 10)]
    if threat in ("l0", "l0f"):
        restarts = (1, 5, 10)[level]  # which pixels PGD_0 settles on hangs on where it starts
        for objective in (margin, cross_entropy):
            attack = pgd(3 * steps, restarts=restarts, threat=named(threat), objective=objective)
            stages.append(Stage(attack, 3 * steps * restarts))
        return tuple(stages)
    if single_label and classes >= 3:
        targets = min((5, 9, 9)[level], classes - 1)
        # Aimed at the margin, not at targeted DLR: on robust models it breaks more in the same steps.
        attack = apgd_t(steps, targets=targets, threat=named(threat), objective=margin)
        stages.append(Stage(attack, steps * targets + targets + 4))
    else:
        attack = apgd(3 * steps, restarts, threat=named(threat), objective=margin)
        stages.append(Stage(attack, 3 * steps * restarts))
    stages.append(Stage(apgd(steps, restarts, threat=named(threat)), steps * restarts))
    if level == 2 and single_label and classes >= 3:
        stages.append(Stage(apgd_dlr(steps, restarts, threat=named(threat)), steps * restarts))
    return tuple(stages)


def _steps(threat: str, effort: str) -> int:
    """L1 gets twice the steps: its search has to find the right sparsity as well, and still gains where the others have ended."""
    return _STEPS[effort] * (2 if threat == "l1" else 1)


def deeper(threat: str, effort: str, *, classes: int, single_label: bool) -> AttackLike:
    """The plan's strongest attack again with twice the steps and all the targets: what would more effort still find?"""
    steps = 2 * _steps(threat, effort)
    if threat in ("l0", "l0f"):
        return pgd(3 * steps, restarts=5, threat=named(threat), objective=margin)
    if single_label and classes >= 3:
        return apgd_t(steps, targets=min(9, classes - 1), threat=named(threat), objective=margin)
    return apgd(3 * steps, threat=named(threat), objective=margin)


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
