"""Weak searches that find what strong ones missed: gradients that mislead. Athalye et al. 2018, arXiv 1802.00420; Carlini et al. 2019,
arXiv 1902.06705."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from epsball.attacks import fgsm, noise, sparse_rs, square
from epsball.auditing.checks.scene import Scene
from epsball.auditing.results import AttackRow, Flag
from epsball.auditing.sheet import Sheet
from epsball.auditing.statistics import clopper_pearson
from epsball.objectives import margin
from epsball.threats import L0, L2, Linf

SAMPLE, MANY = 128, 0.05
DRAWS, QUERIES = 100, 128
FRACTIONS = (0.25, 0.5, 0.75, 1.0)
FED = 128


def severity(found: int, n: int) -> Literal["block", "warn"]:
    """Block where more than 5 % of those that stood fall, with 95 % confidence; each single one is worth a warning."""
    return "block" if clopper_pearson(found, n, 0.9)[0] > MANY else "warn"


def noise_finds_nothing(scene: Scene) -> Iterator[Flag]:
    """Random points of the ball break no sample that every attack left standing.

    Cost: at most 100 forward rows for each of 32 samples.
    """
    rows = scene.few()
    if not len(rows):
        return
    found = int(scene.confirmed(rows, scene.search(noise(DRAWS, threat=scene.threat), rows, "noise", seed=scene.seed + 2)).sum())
    if found:
        message = f"{DRAWS} random points broke {found} of {len(rows)} samples that every attack had left standing: gradients mislead."
        fix = "Find the layer that hides the gradient and replace its backward pass (BPDA); until then believe black-box searches only."
        yield Flag(id="noise-wins", severity=severity(found, len(rows)), message=message, fix=fix)


def one_step_finds_nothing(scene: Scene) -> Iterator[Flag]:
    """One step of a quarter, half, three quarters and all of the radius breaks no sample that many steps left standing.

    Cost: at most 4 gradient rows and 4 forward rows for each of 128 samples.
    """
    rows = scene.standing(SAMPLE)
    if not len(rows):
        return
    found = torch.zeros(len(rows), dtype=torch.bool)
    for share in FRACTIONS:
        left = (~found).nonzero().squeeze(1)
        if not len(left):
            break
        outcome = scene.search(fgsm(scene.threat, margin), rows[left], f"one step of {share:g}", radius=share * scene.current.radius)
        found[left] = scene.confirmed(rows[left], outcome)
    count = int(found.sum())
    if count:
        message = (
            f"A single gradient step broke {count} of {len(rows)} samples that many steps had left standing: "
            "the gradient is good at the clean input and misleads beside it."
        )
        fix = "Trained on single steps alone (catastrophic overfitting), or gradients hidden beside the data: --effort max, and BPDA."
        yield Flag(id="one-step-wins", severity=severity(count, len(rows)), message=message, fix=fix)


def black_box_finds_nothing(scene: Scene) -> Iterator[Flag]:
    """Random search by scores alone breaks no sample that gradients left standing: Square under Linf and L2, Sparse-RS under L0.

    Under L0, where the plan itself searches at random, few successes are more luck and tell nothing about gradients.

    Cost: at most 128 forward rows for each of 32 samples.
    """
    rows, threat = scene.few(), scene.threat
    if not len(rows) or not scene.single or not isinstance(threat, Linf | L2 | L0):
        return
    attack = sparse_rs(QUERIES, threat=threat) if isinstance(threat, L0) else square(QUERIES, threat=threat)
    found = int(scene.confirmed(rows, scene.search(attack, rows, "black box", seed=scene.seed + 3)).sum())
    if found and not (isinstance(threat, L0) and severity(found, len(rows)) == "warn"):
        message = (
            f"{attack.name} without gradients broke {found} of {len(rows)} samples that attacks with gradients had left standing: "
            f"{QUERIES} queries were better than gradients."
        )
        fix = "Replace the backward pass of the layer that hides gradients (BPDA), or audit by scores: wrap(model, access=Access.SCORES)."
        yield Flag(id="black-box-wins", severity=severity(found, len(rows)), message=message, fix=fix)


def transfer_finds_nothing(scene: Scene, other: Sheet) -> Iterator[Flag]:
    """Inputs that fool another model of the same run do not break samples that this model's own attacks left standing.

    Args:
        scene: the model in doubt. other: another model's sheet under the same data and threat; its confirmed inputs are fed.

    Cost: 1 forward row for each of at most 128 samples, booked as "check: transfer".
    """
    sheet, current = scene.sheet, scene.current
    if (
        current.threat not in other.hits
        or other.subject.x.shape != sheet.subject.x.shape
        or not torch.equal(other.subject.x, sheet.subject.x)
    ):
        return
    hits, order = other.hits[current.threat], sheet.subject.order
    rows = order[(sheet.standing(current.threat, current.radius) & (hits.radius <= current.radius))[order]][:FED]
    if not len(rows):
        return
    z = torch.stack([hits.z[row] for row in rows.tolist()]) if hits.z else None
    before = scene.referee.rows
    ruling = scene.referee.judge(sheet.subject.x[rows], hits.x_adv[rows], sheet.subject.goal.take(rows), scene.threat, current.radius, z)
    found = int(ruling.broken.sum())
    name = other.subject.victim.name
    current.attacks.append(_fed(rows, name, scene.referee.rows - before))
    if found:
        message = (
            f"{found} of {len(rows)} inputs found for model '{name}' also break this one, where its own attacks had failed: "
            "its gradients mislead."
        )
        yield Flag(
            id="transfer-wins",
            severity=severity(found, len(rows)),
            message=message,
            fix=f"Attack this model with the gradients of '{name}' (BPDA, or a surrogate).",
        )


def _fed(rows: Tensor, name: str, forwards: int) -> AttackRow:
    recipe = f"adversarial inputs of '{name}'"
    return AttackRow(name="check: transfer", recipe=recipe, tried=len(rows), broken=0, forwards=forwards, backwards=0, seconds=0.0)
