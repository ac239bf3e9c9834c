"""What no model can do, and what the numbers themselves say: radii that cover other classes, and changes that 8 bits undo."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from epsball.auditing.checks.scene import Scene
from epsball.auditing.referee import distance
from epsball.auditing.results import Flag
from epsball.auditing.sheet import Round, Sheet
from epsball.core import Untargeted
from epsball.threats import L0, L1, L2, Linf

SAMPLE = 64
ROUNDED = 0.1


def radius_means_something(scene: Scene) -> Iterator[Flag]:
    """Balls around samples of different classes do not meet, for most of a sample of the data.

    Two balls share a point where their centers are closer than twice the radius, and no model can be right for both there (Yang et
    al. 2020, arXiv 2003.02460). Under Linf with half the width of the box all balls share its middle.

    Cost: no rows; distances among at most 64 samples.
    """
    sample = scene.sheet.subject.order[:SAMPLE]
    if not isinstance(scene.threat, Linf | L2 | L1 | L0) or not isinstance(scene.sheet.subject.goal, Untargeted) or len(sample) < 2:
        return
    y = scene.sheet.subject.y[sample]
    apart = _distances(scene, sample, sample).masked_fill(y[:, None] == y[None], torch.inf).amin(1)
    met = int((apart <= 2 * scene.current.radius).sum())
    if met > len(sample) / 2:
        message = (
            f"For {met} of {len(sample)} samples one of another class lies within twice the radius: no model can be right for both, "
            "so robust accuracy must be low here for any model."
        )
        yield Flag(id="radius", severity="warn", message=message, fix="Ask about a smaller radius; read a high number here as an error.")


def floor_is_reached(scene: Scene) -> Iterator[Flag]:
    """No sample stands against inputs that need no search: the middle of the box, and samples of the data that get another answer.

    Only where they lie within the radius. One that the referee confirms blocks: the attacks missed what lies on the table.

    Cost: at most 2 forward rows for each of 64 samples, where such inputs lie within the radius; else none.
    """
    rows = scene.standing(SAMPLE)
    if not isinstance(scene.threat, Linf | L2 | L1 | L0) or not isinstance(scene.sheet.subject.goal, Untargeted) or not len(rows):
        return
    x, goal = scene.sheet.subject.x, scene.sheet.subject.goal
    broken = torch.zeros(len(rows), dtype=torch.bool)
    for candidates in (_middle(scene, rows), _others(scene, rows)):
        near = torch.from_numpy(distance(x[rows].numpy(), candidates.numpy(), scene.threat.name)) <= scene.current.radius
        places = (near & ~broken).nonzero().squeeze(1)
        if len(places):
            part = rows[places]
            ruling = scene.referee.judge(x[part], candidates[places], goal.take(part), scene.threat, scene.current.radius)
            broken[places] = ruling.broken.cpu()
    found = int(broken.sum())
    if found:
        message = (
            f"{found} of {len(rows)} samples stand although a plain input within the radius breaks them: the middle of the box, "
            "or another sample of the data. The attacks missed what needs no search."
        )
        fix = "Find out why gradients lead nowhere; the number at this radius is an artefact."
        yield Flag(id="floor", severity="block", message=message, fix=fix)


def _distances(scene: Scene, rows: Tensor, others: Tensor) -> Tensor:
    """(K, M) float64, a row at a time."""
    x, name = scene.sheet.subject.x, scene.threat.name
    there = x[others].numpy()
    return torch.stack([torch.from_numpy(distance(np.broadcast_to(x[row].numpy(), there.shape), there, name)) for row in rows.tolist()])


def _middle(scene: Scene, rows: Tensor) -> Tensor:
    x = scene.sheet.subject.x[rows]
    low, high = (torch.as_tensor(bound, dtype=x.dtype) for bound in scene.victim.box)
    return ((low + high) / 2).expand_as(x).contiguous()


def _others(scene: Scene, rows: Tensor) -> Tensor:
    """(K, ...) for each sample the nearest of 64 that the model answers otherwise; itself where there is none."""
    sheet = scene.sheet
    pool, answers = sheet.subject.order[:SAMPLE], sheet.clean.argmax(1).cpu()
    apart = _distances(scene, rows, pool).masked_fill(answers[rows][:, None] == answers[pool][None], torch.inf)
    nearest = torch.where(torch.isfinite(apart.amin(1)), pool[apart.argmin(1)], rows)
    return sheet.subject.x[nearest]


def rounding_matters(sheet: Sheet, current: Round) -> Iterator[Flag]:
    """Success survives 8 bits: robust accuracy moves by less than 10 points when stored inputs are rounded to k/255.

    Read after the evidence is confirmed, from what the referee has asked then.

    Cost: none of its own.
    """
    kept = sheet.rounded.get(current.threat)
    if kept is None:
        return
    broken = sheet.correct.cpu() & (sheet.hits[current.threat].radius <= current.radius)
    lost = int((broken & ~kept).sum())
    if lost >= ROUNDED * len(broken):
        message = (
            f"{lost} of {int(broken.sum())} adversarial inputs no longer work once they are rounded to 8 bits: "
            "an attacker who has to save an image is weaker than the one audited, or would search among rounded images."
        )
        yield Flag(id="rounding", severity="info", message=message, fix="Quote the robust accuracy; that after rounding is no defense.")
