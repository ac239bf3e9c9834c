"""Does the search itself work here? Its reach, its end, its success without bounds and with ever larger ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from epsball.attacks import apgd, bim, pgd
from epsball.auditing.checks.scene import FEWEST, Scene
from epsball.auditing.results import Flag
from epsball.auditing.statistics import mcnemar
from epsball.core import Attack, Problem, Reading, Strategy
from epsball.objectives import margin
from epsball.threats import L0, L1, L2, Linf

SAMPLE, FREE = 64, 50
EDGE, REACHED = 0.95, 0.5
LONG, RISE, RISING = 100, 0.05, 0.1
SURE = 0.95
DROP = 0.1


def edge_is_reached(scene: Scene) -> Iterator[Flag]:
    """The strongest inputs that ten steps find for samples that stand lie at the edge of the ball: the score grows outward.

    Counted are sizes of 0.95 of the radius or more (of what the box leaves of it), from the clean input, under Linf and L2.

    Cost: 10 gradient rows and 1 forward row for each of 64 samples.
    """
    rows = scene.standing(SAMPLE)
    if len(rows) < FEWEST or scene.explained or not isinstance(scene.threat, Linf | L2):
        return
    outcome = scene.search(bim(10, threat=scene.threat, objective=margin), rows, "reach")
    failed = ~outcome.reached.cpu()
    widest = scene.threat.within(scene.victim.box).reach(scene.sheet.subject.x[rows]).cpu().clamp(max=scene.current.radius)
    far = int((outcome.size.cpu() >= EDGE * widest)[failed].sum())
    n = int(failed.sum())
    if n and far < REACHED * n:
        message = (
            f"For {n - far} of {n} samples that stand, ten gradient steps found nothing better near the edge of the ball than inside it: "
            "the score does not grow along its gradient."
        )
        fix = "Look for quantization, noise or saturation before the scores; attack a smooth version of the model (BPDA)."
        yield Flag(id="reach", severity="warn", message=message, fix=fix)


@dataclass(frozen=True)
class Traced:
    """A strategy whose scores (B,), one per look, are kept in `trace`."""

    inner: Strategy
    trace: list[Tensor] = field(default_factory=list, repr=False)

    def init(self, problem: Problem, steps: int) -> Any:
        """The inner strategy's."""
        return self.inner.init(problem, steps)

    def step(self, problem: Problem, state: Any) -> tuple[Reading, Any]:
        """The inner strategy's, written down."""
        reading, state = self.inner.step(problem, state)
        self.trace.append(reading.score.detach().cpu().double())
        return reading, state


def search_has_ended(scene: Scene) -> Iterator[Flag]:
    """A long APGD run has come to rest: the best margin hardly rises over the last quarter of its 100 steps.

    The rise is taken as a share of the whole rise of a sample; above 0.05 the sample is still climbing (Pintor et al. 2022, arXiv
    2106.09947, who watch the last 10 steps).

    Cost: 100 gradient rows and 1 forward row for each of 32 samples.
    """
    rows = scene.few()
    if len(rows) < FEWEST or scene.explained or not isinstance(scene.threat, Linf | L2 | L1):
        return
    attack = apgd(LONG, threat=scene.threat, objective=margin)
    assert isinstance(attack, Attack)  # one run without restarts
    traced = Traced(attack.strategy)
    scene.search(replace(attack, strategy=traced), rows, "long search", drop=False)
    climbing, n = int(still_climbing(torch.stack(traced.trace)).sum()), len(rows)
    if climbing > RISING * n:
        message = (
            f"After {LONG} steps of APGD the best margin still rises for {climbing} of {n} samples that stand: the search has not ended."
        )
        yield Flag(id="incomplete", severity="warn", message=message, fix="Run --effort max, and look for noise or steps in the scores.")


def still_climbing(scores: Tensor) -> Tensor:
    """(B,) bool from scores (T, B) in the order of the looks: the last quarter gave more than 0.05 of the whole rise of the best."""
    best = scores.nan_to_num(nan=-torch.inf).cummax(0).values
    whole, late = best[-1] - best[0], best[-1] - best[-1 - len(best) // 4]
    return (whole > 1e-9 * best[0].abs()) & (late > RISE * whole)


def freedom_suffices(scene: Scene) -> Iterator[Flag]:
    """With the whole box for a radius nearly every sample breaks, for inputs of other classes lie in it.

    Below 95 % something blocks the search. What stands is tried again with half of the box, which is part of the whole: far from the
    data honest models may have wide regions of one class, where steps of the size of the box get lost. Not asked of a model that
    gives one answer to all the data, which the preflight names.

    Cost: at most 80 gradient rows and 2 forward rows for each of 50 samples, once per threat.
    """
    threat, rows = scene.threat, scene.correct(FREE)
    if not len(rows) or not isinstance(threat, Linf | L2 | L1 | L0) or not _several_answers(scene):
        return
    attack, reached = pgd(40, threat=threat, objective=margin), torch.zeros(len(rows), dtype=torch.bool)
    for share in (1.0, 0.5):
        left = (~reached).nonzero().squeeze(1)
        if not len(left):
            return
        radius = share * threat.within(scene.victim.box).reach(scene.sheet.subject.x[rows[left]]).cpu()
        reached[left] = scene.search(attack, rows[left], f"no bound {share:g}", radius=radius).reached.cpu()
    if (found := int(reached.sum())) >= SURE * len(rows):
        return
    message = f"Even without any bound gradient steps broke only {found} of {len(rows)} samples: something stops the search."
    fix = (
        "No number at a smaller radius means anything before this works: find the layer that stops gradients and replace its backward pass."
    )
    yield Flag(id="unbounded", severity="block", message=message, fix=fix)


def _several_answers(scene: Scene) -> bool:
    """Another class is answered somewhere in the data, so that every sample can be broken within the box."""
    return not scene.single or len(set(scene.sheet.clean.argmax(1).tolist())) > 1


def curve_falls(scene: Scene) -> Iterator[Flag]:
    """The same ten steps break no fewer samples at a larger radius.

    Looked at are the audited radii of the threat, and a quarter and half of the largest. The audit's own curve cannot rise, as what
    breaks at one radius counts at all larger ones; a search that has to find it again can. A loss of 10 points that exact McNemar
    calls significant (p < 0.01) blocks.

    Cost: at most 10 gradient rows and 1 forward row for each of 64 samples and radius, of at most 6 radii, once per threat.
    """
    rows = scene.correct(SAMPLE)
    if not len(rows) or not isinstance(scene.threat, Linf | L2 | L1):
        return
    audited = sorted({r.radius for r in scene.sheet.rounds if r.threat == scene.current.threat})
    largest = audited[-1]
    radii = sorted({largest / 4, largest / 2, *audited[-4:]})
    attack = pgd(10, threat=scene.threat, objective=margin)
    before = torch.zeros(len(rows), dtype=torch.bool)
    for radius in radii:
        now = scene.search(attack, rows, f"curve {radius:g}", radius=radius).reached.cpu()
        lost, won = int((before & ~now).sum()), int((now & ~before).sum())
        if lost - won > DROP * len(rows) and mcnemar(lost, won) < 0.01:
            message = (
                f"Ten gradient steps break {int(now.sum())} of {len(rows)} samples at radius {radius:g} but {int(before.sum())} at a "
                "smaller one: larger steps lead the search astray."
            )
            yield Flag(id="curve", severity="block", message=message, fix="Look for layers whose gradient is right only near the data.")
            return
        before = now
