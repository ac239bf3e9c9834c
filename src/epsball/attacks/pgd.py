"""Single-step and iterative gradient ascent: FGSM, BIM, PGD, MI-FGSM. Targeted by giving a `Targeted` goal."""

from __future__ import annotations

from epsball.attacks.combine import restarted
from epsball.attacks.registry import EVERY, register
from epsball.core import Attack, AttackLike, Descent, Fixed, Momentum, Objective, OfRadius, Projects, Steepest, StepSize, Unit, chain
from epsball.objectives import cross_entropy
from epsball.threats import Linf


@register(paper="Goodfellow et al. 2015, arXiv 1412.6572", threats=EVERY, cost="1 forward and 1 backward, 1 forward to judge")
def fgsm(threat: Projects | None = None, objective: Objective = cross_entropy) -> Attack:
    """Fast gradient sign method: one step of the whole radius.

    x_adv = P(x + radius * steepest(grad)); under Linf the steepest direction is the sign, and on a linear model the
    result is optimal. Other threats use their own dual vector.
    """
    return Attack("fgsm", threat or Linf(), objective, Descent(OfRadius(1.0)), steps=1)


@register(paper="Kurakin et al. 2017, arXiv 1607.02533", threats=EVERY, cost="steps forwards and backwards, 1 forward to judge")
def bim(steps: int = 10, step: float | None = None, threat: Projects | None = None, objective: Objective = cross_entropy) -> Attack:
    """Basic iterative method: FGSM in small steps from the clean input.

    `step` is in the threat's unit; None is a quarter of the radius, so that the edge of the ball is always in reach.
    """
    return Attack("bim", threat or Linf(), objective, Descent(_step(step)), steps)


@register(paper="Madry et al. 2018, arXiv 1706.06083", threats=EVERY, cost="restarts * (steps forwards and backwards, 1 forward to judge)")
def pgd(
    steps: int = 40,
    step: float | None = None,
    restarts: int = 1,
    threat: Projects | None = None,
    objective: Objective = cross_entropy,
    noise: bool = True,
) -> AttackLike:
    """Projected gradient descent from a random start, with restarts for the samples that still stand.

    z <- P(z + step * steepest(grad)); `step` is in the threat's unit, None is a quarter of the radius. Under L1 the
    direction is spread over 5 % of the features, as in sparse L1 descent (Tramer & Boneh 2019, arXiv 1904.13000); under
    L0 it is PGD_0 (Croce & Hein 2019, arXiv 1909.05040).
    """
    return restarted(Attack("pgd", threat or Linf(), objective, Descent(_step(step), noise=noise), steps), restarts)


@register(paper="Dong et al. 2018, arXiv 1710.06081", threats=EVERY, cost="steps forwards and backwards, 1 forward to judge")
def mi_fgsm(
    steps: int = 10,
    step: float | None = None,
    decay: float = 1.0,
    threat: Projects | None = None,
    objective: Objective = cross_entropy,
) -> Attack:
    """Momentum iterative FGSM, Algorithm 1: m <- decay * m + g / ||g||_1; z <- P(z + step * steepest(m)).

    `step` None is radius / steps, as in the paper.
    """
    size = OfRadius(1.0 / max(steps, 1)) if step is None else Fixed(step)
    rule = chain(Unit(1), Momentum(decay), Steepest())
    return Attack("mi_fgsm", threat or Linf(), objective, Descent(size, rule), steps)


def _step(step: float | None) -> StepSize:
    return OfRadius(0.25) if step is None else Fixed(step)
