"""The surface that searches climb: is it steady, and does the gradient tell the truth about it?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from epsball.auditing.checks.scene import FEWEST, Scene
from epsball.auditing.preflight import cosine, foretold
from epsball.auditing.results import Flag
from epsball.core import Key, Problem, autograd
from epsball.core.rows import per_sample
from epsball.objectives import margin
from epsball.threats import L1, L2, Linf

SAMPLE = 32
NEAR, DRAWS, ROUGH = 0.1, 15, 0.4
POINTS, DIRECTIONS, LENGTH, TRUE = 3, 8, 0.5, 0.3
FIRST = 0.25


def scores_are_steady(scene: Scene) -> Iterator[Flag]:
    """Near by, scores change less than far away: a tenth of the radius moves the margin by less than 0.4 of what the radius does.

    Both are means over 15 random points. Their ratio is 0.1 on a straight surface and near 1 on one of steps or noise; unlike a
    relative change of the loss (Pintor et al. 2022, arXiv 2106.09947) it does not hang on how confident the model is.

    Cost: 31 forward rows for each of 32 samples.
    """
    rows = scene.standing(SAMPLE)
    if len(rows) < FEWEST or scene.explained or not isinstance(scene.threat, Linf | L2 | L1):
        return
    started, problem = time.perf_counter(), scene.problem(rows, margin, "steady scores")
    clean = problem.judge(problem.x).score.double()  # not those of the sheet: a twin answers alike, in scores of its own
    moves = [torch.stack([(_beside(problem, share, draw) - clean).abs() for draw in range(DRAWS)]).mean(0) for share in (NEAR, 1.0)]
    scene.spent(problem.tally, "steady scores", f"{DRAWS} random points at {NEAR:g} and 1 of the radius", started)
    awake = moves[1] > 1e-4 * clean.abs()  # below, what is seen is rounding
    ratio = (moves[0] / moves[1])[awake & torch.isfinite(moves[0] / moves[1])]
    if len(ratio) and float(ratio.median()) > ROUGH:
        message = (
            f"At a tenth of the radius scores already move by {float(ratio.median()):.0%} of what they move at the radius "
            f"(median of {len(ratio)} samples that stand; 10 % on a straight surface): it is rough, and gradients say little about it."
        )
        fix = "Average gradients over random points (EOT), or replace the layer that cuts or sorts (BPDA)."
        yield Flag(id="unstable", severity="warn", message=message, fix=fix)


def _beside(problem: Problem, share: float, draw: int) -> Tensor:
    z = problem.threat.start(problem.x, share * problem.radius, problem.key.fold(draw), problem.ids)
    return problem.judge(z).score.double()


def gradients_tell(scene: Scene) -> Iterator[Flag]:
    """The gradient foretells how the margin changes in random directions, at three random points of the ball.

    Over 8 directions of half the radius, the cosine between the changes measured and the changes foretold; the median over points and
    samples is 1 on a straight surface. Below 0.3 the gradient is of little use, which warns; below -0.3 it lies, which blocks. Shorter
    directions would also blame steps (a quantized input) behind a substitute gradient that is right about their mean. Not under L1,
    whose long changes of few features bend honest surfaces as well.

    Cost: 27 forward rows and 3 backward rows for each of 32 samples.
    """
    rows = scene.standing(SAMPLE)
    if len(rows) < FEWEST or scene.explained or not isinstance(scene.threat, Linf | L2):
        return
    started, problem = time.perf_counter(), scene.problem(rows, margin, "gradients")
    cosines = torch.cat([_cosine(problem, problem.key.fold("point", point)) for point in range(POINTS)])
    scene.spent(problem.tally, "gradients", f"{DIRECTIONS} directions at {POINTS} points against the gradient", started)
    known = cosines[torch.isfinite(cosines)]
    if len(known) and float(known.median()) < TRUE:
        message = (
            f"The gradient does not tell how the margin changes: cosine {float(known.median()):.2f} with measured changes "
            f"(median of {len(rows)} samples that stand)."
        )
        fix = "Replace the layer whose backward pass is wrong, cut off or sorted (BPDA), or audit by scores alone."
        grave: Literal["block", "warn"] = "block" if float(known.median()) < -TRUE else "warn"
        yield Flag(id="false-gradient", severity=grave, message=message, fix=fix)


def _cosine(problem: Problem, key: Key) -> Tensor:
    """(B,) at one random point; NaN where nothing moves."""
    z = problem.threat.start(problem.x, problem.radius, key, problem.ids)
    ways = (key.fold("direction", number) for number in range(DIRECTIONS))
    return cosine(*foretold(problem, z, (problem.threat.start(z, LENGTH * problem.radius, way, problem.ids) for way in ways)))


def promises_are_kept(scene: Scene) -> Iterator[Flag]:
    """The first step that attacks take gains what the gradient promises: at least 0.3 of it, in the median.

    A quarter of the radius in the threat's steepest direction from the clean input, and the rise of the margin over that of the
    tangent plane there (local linearity, Qin et al. 2019, arXiv 1907.02610).

    Cost: 2 forward rows and 1 backward row for each of 32 samples.
    """
    rows = scene.standing(SAMPLE)
    if len(rows) < FEWEST or scene.explained or not isinstance(scene.threat, Linf | L2 | L1):
        return
    started, problem = time.perf_counter(), scene.problem(rows, margin, "first step")
    reading = autograd(problem, problem.x)
    step = per_sample(FIRST * problem.radius, problem.x) * problem.threat.steepest(problem.x, problem.x, reading.gradient)
    there = problem.threat.project(problem.x, problem.x + step, problem.radius)
    gained = problem.judge(there).score.double() - reading.score.double()
    promised = ((there - problem.x) * reading.gradient).flatten(1).double().sum(1)
    scene.spent(problem.tally, "first step", f"one step of {FIRST:g} of the radius against the tangent plane", started)
    kept = (gained / promised)[(promised > 0) & torch.isfinite(gained)]
    if len(kept) and float(kept.median()) < TRUE:
        message = (
            f"A first step of a quarter of the radius gains {float(kept.median()):.0%} of what the gradient promises "
            f"(median of {len(kept)} samples that stand): the surface bends within a step."
        )
        fix = "Use smaller steps and more of them (--effort max), and several starts."
        yield Flag(id="landscape", severity="warn", message=message, fix=fix)
