"""Was enough tried? Another loss, twice the effort, the queries that came late."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from epsball.attacks import pgd
from epsball.auditing.checks.scene import Scene
from epsball.auditing.doubted import NORMS, deeper_by_chance
from epsball.auditing.plan import deeper
from epsball.auditing.results import Flag
from epsball.auditing.statistics import mcnemar
from epsball.core import AttackLike
from epsball.objectives import cross_entropy, margin

LOSS_SAMPLE, LOSS_GAP = 64, 0.15
EFFORT_GAP, SLIGHT = 0.05, 0.01


def losses_agree(scene: Scene) -> Iterator[Flag]:
    """Cross-entropy and margin, same budget, on a capped sample: a wide gap means that scores hide gradients.

    The audit's searches climb the margin and scale-free losses before cross-entropy, so it blocks only where the margin is the weaker one.

    Cost: at most 20 gradient rows for each of 64 samples.
    """
    rows, reached = scene.correct(LOSS_SAMPLE), {}
    if not len(rows):
        return
    for objective in (cross_entropy, margin):
        attack = pgd(10, threat=scene.threat, objective=objective)
        reached[objective] = scene.search(attack, rows, objective.__name__).reached.cpu()
    only_margin = int((reached[margin] & ~reached[cross_entropy]).sum())
    only_ce = int((reached[cross_entropy] & ~reached[margin]).sum())
    gap = (only_margin - only_ce) / len(rows)
    if abs(gap) > LOSS_GAP and mcnemar(only_margin, only_ce) < 0.01:
        weak, strong = ("cross-entropy", "the margin") if gap > 0 else ("the margin", "cross-entropy")
        yield Flag(
            id="losses-disagree",
            severity="warn" if gap > 0 else "block",
            message=f"With the same 10 steps {strong} breaks {abs(gap):.0%} more of "
            f"{len(rows)} samples than {weak} does: scores hide gradients.",
            fix="Attack the model without its output scaling (temperature, softmax, quantized scores), or run --effort max.",
        )


def queries_suffice(scene: Scene, late: int) -> Iterator[Flag]:
    """Would more queries still break samples? Told without asking one: by how many (`late`) broke in the second half of them."""
    n, queries = len(scene.sheet.clean), scene.sheet.queries
    if late > EFFORT_GAP * n:
        message = f"{late} of {n} samples broke only after half of the {queries:,} queries: more would break more."
        yield Flag(id="effort", severity="warn", message=message, fix="Run --effort max, or raise --max-queries.")


def effort_suffices(scene: Scene, effort: str, turn: int = 1) -> tuple[Tensor, list[Flag]]:
    """Would trying harder still break samples? Asked of a capped sample of those that stand, with one attack at twice the effort.

    Every `turn` draws anew. Returns the samples that withstood (K,), for nothing is gained by asking them so again, and what to tell.

    Cost: at most that of the deeper attack for each of 32 samples.
    """
    sheet, current, rows = scene.sheet, scene.current, scene.few()
    if not len(rows):
        return rows, []
    outcome = scene.search(harder(scene, effort), rows, "more effort", seed=scene.seed + turn, drop=not sheet.sight.random)
    confirmed = scene.confirmed(rows, outcome)
    broken = int(confirmed.sum())
    if not broken:
        return rows, []
    fix = "Run --effort max." if effort != "max" else "Quote the number as an upper bound that is known to be loose."
    standing = float(sheet.standing(current.threat, current.radius).double().mean())
    lower = broken / len(rows) * standing
    message = (
        f"Twice the effort still broke {broken} of {len(rows)} samples that stood: "
        f"the true robust accuracy is lower, by about {100 * lower:.1f} points or more."
    )
    return rows[~confirmed], [Flag(id="effort", severity=severity(lower), message=message, fix=fix)]


def harder(scene: Scene, effort: str) -> AttackLike:
    """The plan's strongest attack at twice the effort."""
    if scene.sheet.sight.random and isinstance(scene.threat, NORMS):
        return deeper_by_chance(scene.threat, effort)
    return deeper(scene.threat, effort, classes=scene.sheet.clean.shape[1], single_label=scene.single)


def severity(lower: float) -> Literal["block", "warn", "info"]:
    """How much it matters that robust accuracy is lower by that share: below a point every search may be loose."""
    return "block" if lower > EFFORT_GAP else "warn" if lower >= SLIGHT else "info"
