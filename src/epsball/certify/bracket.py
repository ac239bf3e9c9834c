"""`certify`: samples that no change within the radius can break, whatever the attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from epsball.certify.ball import Ball
from epsball.certify.graph import Graph, trace
from epsball.certify.intervals import interval_bounds, rounding, unit_of
from epsball.certify.linear import climbed, margins, tightened
from epsball.certify.lirpa import GUARD, guard, lirpa_margins
from epsball.core import Model, Projects, Tally, Victim
from epsball.errors import BadInput

Method = Literal["best", "crown", "interval", "auto-lirpa"]
METHODS = get_args(Method)


@dataclass(frozen=True)
class Certified:
    """What holds for each sample within one radius.

    Attributes:
        certified: (B,) bool: margin > slack: the model, run in float32 or better, answers y on the whole ball.
        margin: (B,) float64: lower bound of the least of score y minus another score, in exact arithmetic.
        slack: (B,) float64: most that rounding can take from it.
        method: how. notes: sentences for the reader.
    """

    certified: Tensor
    margin: Tensor
    slack: Tensor
    method: str
    notes: tuple[str, ...] = ()


def certify(model: Model, x: Tensor, y: Tensor, threat: Projects, radius: float | Tensor, method: Method = "best") -> Certified:
    """Which samples no change within the radius can break, by bounds on the network itself.

    `interval`: interval bounds (Gowal et al. 2018, arXiv 1810.12715), the last linear layers exact, the first ones too.
    `crown`: linear bounds backward (Zhang et al. 2018, arXiv 1811.00866), also for every neuron before a bend, cut by the intervals.
    `best`: the larger of the two for each pair of classes; where that is not enough, lines below ReLUs are optimized in 20 steps (Xu et
    al. 2021, arXiv 2011.13824). All are exact for a model that is affine in its input.
    `auto-lirpa`: alpha-CROWN of the library auto_LiRPA, which knows more parts than `trace` does; it has to be installed.

    Rounding: bounds are of exact arithmetic, computed in float64. `slack` bounds what the model's rounding can do anywhere in
    the ball (see `rounding`), in float32, in the coarser type of a model of half precision, or in TF32 on a GPU that may use it;
    float64 is covered too. A sample is certified only where margin > slack. An input of 8-bit numbers that leaves the ball by
    its rounding is outside the claim, and so is autocast. With `auto-lirpa` nobody analyzes the rounding: `slack` is a thousand roundings
    of the largest score, and the notes say so.

    Args:
        model: a module or what `epsball.wrap` returns, made of parts that `epsball.certify.graph.trace` knows. x: (B, ...) in the box.
        y: (B,) classes. threat: Linf, L2, L1 or L0, with masks and budgets. radius: one number, or (B,).
        method: best, crown, interval or auto-lirpa.

    Raises:
        BadInput: a layer without bounds, by its name; another threat; labels that the model has no score for; a traced network that
            does not answer as the model does.

    Cost per sample, in float64: interval 3 forwards and a backward per class; crown a forward and backward of the layers before
    it for each neuron whose sign is open.

    Differences from the papers: the ball is cut by the box, exactly, for L2, L1 and L0 too; only the final bounds are optimized, not
    those of the neurons before.
    """
    return certify_each(model, x, y, threat, [radius], method)[0]


def certify_each(
    model: Model, x: Tensor, y: Tensor, threat: Projects, radii: Sequence[float | Tensor], method: Method = "best"
) -> tuple[Certified, ...]:
    """`certify` at several radii, given smallest first: what holds within a larger radius holds within a smaller one.

    Raises:
        BadInput: as `certify`; radii that fall.
    """
    if method not in METHODS:
        raise BadInput(f"method '{method}': unknown: use one of {', '.join(METHODS)}")
    victim, x, y = _fitting(model, x, y)
    all_radii = [torch.as_tensor(r, dtype=torch.float64, device=x.device).expand(len(x)) for r in radii]
    if any(bool((before > after).any()) for before, after in pairwise(all_radii)):
        raise BadInput("radii: fall from one to the next: give the smallest first")
    with victim, torch.no_grad():
        balls = [Ball.of(threat.within(victim.box), x, radius) for radius in all_radii]
        if method == "auto-lirpa":
            found = [_by_lirpa(victim, ball, x, y) for ball in balls]
        else:
            graph = trace(victim, x)
            _agrees(victim, graph, x, y)
            found = [_certified(graph, ball, y, unit_of(victim), method) for ball in balls]
    for place in reversed(range(len(found) - 1)):
        margin = torch.maximum(found[place].margin, found[place + 1].margin)
        found[place] = replace(found[place], margin=margin, certified=found[place].certified | found[place + 1].certified)
    return tuple(found)


def _fitting(model: Model, x: Tensor, y: Tensor) -> tuple[Victim, Tensor, Tensor]:
    victim = Victim.of(model)
    if y.ndim != 1 or len(y) != len(x) or not len(x):
        raise BadInput(f"labels: shape {tuple(y.shape)} for {len(x)} inputs: certified bounds need one class for each of at least one")
    return victim, x.to(victim.device), y.to(victim.device).long()


def _agrees(victim: Victim, graph: Graph, x: Tensor, y: Tensor) -> None:
    """Refuses a network that does not answer as the model does at the clean inputs, beyond rounding."""
    exact = x.double()
    bounds = interval_bounds(graph, (exact, exact))
    answer = victim.outputs(x, Tally.zeros(len(x))).double()
    _labels(victim, y, min(answer.shape[1], bounds[-1][0].shape[1]))
    apart = (answer - bounds[-1][0]).abs()
    if not bool((apart <= rounding(graph, bounds, unit_of(victim))).all()):
        words = f"the network as traced differs from the model by {float(apart.max()):.2g}"
        raise BadInput(f"model '{victim.name}': {words}: it has no certified bounds: use --method smoothing")


def _labels(victim: Victim, y: Tensor, scores: int) -> None:
    """Refuses labels without a score."""
    if int(y.max()) >= scores or int(y.min()) < 0:
        raise BadInput(f"labels: {int(y.min())} to {int(y.max())} for {scores} scores of model '{victim.name}': map the labels")


def _by_lirpa(victim: Victim, ball: Ball, x: Tensor, y: Tensor) -> Certified:
    answer = victim.outputs(x, Tally.zeros(len(x)))
    _labels(victim, y, answer.shape[1])
    (margin, scores), slack = lirpa_margins(victim, ball, y), guard(answer, unit_of(victim))
    apart = (answer.double() - scores).abs().amax(1)
    if not bool((apart <= slack).all()):
        words = f"auto_LiRPA's network differs from the model by {float(apart.max()):.2g}"
        raise BadInput(f"model '{victim.name}': {words}: it has no certified bounds: use --method smoothing")
    note = f"Bounds by auto_LiRPA in float64; rounding of the model is not analyzed: a margin of {GUARD:g} roundings is asked for instead."
    return Certified(margin > slack, margin, slack, "auto-lirpa", (note,))


def _certified(graph: Graph, ball: Ball, y: Tensor, unit: float, method: Method) -> Certified:
    rough = tightened(graph, ball, through=False)
    found, bounds = [], rough
    if method != "crown":
        found.append(margins(graph, ball, rough, y, through=False))
    if method != "interval":
        bounds = tightened(graph, ball, through=True)
        found.append(margins(graph, ball, bounds, y, through=True))
    pairs = torch.stack(found).amax(0)
    off = rounding(graph, bounds, unit)
    slack = off.scatter(1, y[:, None], 0.0).amax(1) + off.gather(1, y[:, None]).squeeze(1)
    if method == "best":
        pairs = climbed(graph, ball, bounds, y, pairs, slack)
    margin = pairs.amin(1)
    note = f"A bound counts where it exceeds what rounding can take from it, here at most {float(slack.max()):.1e} (unit {unit:.1e})."
    return Certified(margin > slack, margin, slack, method, (note,))
