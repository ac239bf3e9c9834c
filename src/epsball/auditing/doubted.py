"""Stages for models whose gradients are doubted: random ones, those of which only twins have gradients, those whose gradients jump."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from epsball.attacks import Cascade, apgd, pgd, vertices
from epsball.attacks.across import Across
from epsball.auditing.plan import EFFORTS, PAYS, STEPS, Stage, at_nearest, from_starts, side_by_side, steps_of
from epsball.core import Attack, AttackLike, Descent, Fading, Halving, Momentum, Near, Objective, Projects, Steepest, Victim, chain
from epsball.core.forks import Fork
from epsball.objectives import cross_entropy, margin
from epsball.threats import L0, L1, L2, Linf

NORMS = Linf | L2 | L1 | L0
"""Threats under which random models have a plan of their own; under others the usual one follows their climbs."""


def by_chance(threat: Projects, effort: str, model: Victim, draws: int, known: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """For random models: both losses on the mean of `draws` answers, then cross-entropy on that of three times as many.

    None stops at a first success. Steps shrink whatever the scores say, and directions are remembered: where scores are noisy, APGD
    halves its step, and goes back to its best point, by luck. Of 97 samples (MNIST, 40 steps on the mean of 10) cross-entropy left 13
    on a network that drops activations at random and 19 behind random resizing, the margin 17 and 23; APGD left 19 and 20, and 21 and
    25. Three times the answers, in twice the steps, broke 1 and 0 of what was left. Short searches at single classes drown in noise.

    Under L1 `vertices`, on both losses, then from other balls on one answer a look: where climbs had left 53 % of a network that sometimes
    answers at random, and as many behind random resizing, these leave 30 and 40 (`benchmarks/verdicts_norms.py`, n 30, radius 8).

    Under patches, motions, colors and flows the stages `known` for other models follow, on means: a patch that hurts has to be found.
    """
    steps = STEPS[effort]
    if isinstance(threat, L1):
        mean = (Stage(vertices(steps, threat, loss), steps * draws, model.averaged(draws), keep=True) for loss in (margin, cross_entropy))
        runs = ((first, loss) for first in range(1, 6) for loss in (margin, cross_entropy))
        single = (side_by_side(vertices(2 * steps, threat, loss), 2 * steps, first, 1) for first, loss in runs)
        return (*mean, *(replace(stage, victim=model, keep=True) for stage in single))
    ways = ((draws, cross_entropy), (draws, margin), (3 * draws, cross_entropy))
    climbs = (Stage(_fading(threat, steps, loss), steps * k, model.averaged(k), keep=True) for k, loss in ways)
    own = () if isinstance(threat, NORMS) else known
    return (*climbs, *(replace(s, rows=s.rows * draws, victim=model.averaged(draws), keep=True) for s in own))


def _fading(threat: Projects, steps: int, objective: Objective, name: str = "eot") -> AttackLike:
    """A climb whose steps shrink whatever the scores say, for scores with noise in them; PGD_0 under L0."""
    if isinstance(threat, L0):
        return pgd(steps, threat=threat, objective=objective)
    way = Descent(Fading(0.25), chain(Momentum(0.75), Steepest()), noise=True)
    return Attack(name, threat, objective, way, steps)


def deeper_by_chance(threat: Projects, effort: str) -> AttackLike:
    """`deeper` for random models: twice the steps of `by_chance`, on both losses."""
    steps, losses = 2 * STEPS[effort], (cross_entropy, margin)
    if isinstance(threat, L1):
        return Cascade(tuple(vertices(steps, threat, loss) for loss in losses), "vertices")
    return Cascade(tuple(_fading(threat, steps, loss) for loss in losses), "eot")


def by_directions(threat: Projects, effort: str, twins: tuple[Victim, ...]) -> Iterator[Stage]:
    """Through twins with gradients by random directions: climbs whose memory averages them.

    The second follows where the first pays; there are no stages where there are no twins.
    """
    for twin, loss, pays in zip(twins, (cross_entropy, cross_entropy, margin), (0.0, PAYS, 0.0), strict=False):
        yield Stage(_fading(threat, 2 * STEPS[effort], loss, "random_directions"), 2 * STEPS[effort], twin, pays=pays)


def across(threat: Projects, effort: str, forks: tuple[Victim, ...]) -> Iterator[Stage]:
    """At what decides inside the model: inputs for which it decides otherwise, and from there a climb of the model's own scores."""
    for fork in forks if isinstance(threat, Linf | L2 | L1) else ():
        steps, ways = STEPS[effort] // 2, min(9, fork.model.ways - 1 if isinstance(fork.model, Fork) else 1)
        turn = vertices(steps, threat) if isinstance(threat, L1) else apgd(steps, threat=threat, objective=margin)
        yield Stage(Across(fork, turn, ways, steps), 2 * steps * ways)


def through_twins(threat: Projects, effort: str, classes: int) -> tuple[Stage, ...]:
    """For models of which a twin gives gradients: every class and both losses, whoever came near.

    Their scores fall in steps, so that how near a search came tells little, and APGD, which goes back to its best score, stays where
    it is: two climbs go on whatever the scores say. `classes` is 0 where nothing can be aimed at.
    """
    if effort == "fast" or not isinstance(threat, Linf | L2 | L1):
        return ()
    onward = side_by_side(_fading(threat, 100, cross_entropy, "onward"), 100, 1, 2)
    return at_nearest(threat, 20, 3, 9, classes), from_starts(threat, effort, 3), onward


def smooth(threat: Projects, effort: str) -> tuple[Stage, ...]:
    """For gradients that jump: the mean of those at random points nearby, in two sizes of neighborhood; none where a threat draws none."""
    if not isinstance(threat, Linf | L2 | L1):
        return ()
    steps, draws = steps_of(threat, effort), (4, 8, 16)[EFFORTS.index(effort)]
    searches = (
        Attack(f"near_{share:g}", threat, margin, Descent(Halving(), gradient=Near(draws, share), inertia=0.75, noise=True), steps)
        for share in (0.25, 1.0)
    )
    return tuple(Stage(search, steps * (draws + 1)) for search in searches)
