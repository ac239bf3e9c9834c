"""Linear bounds passed backward through the network: CROWN, for rows of (sample, neuron), whatever the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from epsball.certify.ball import Ball
from epsball.certify.graph import Graph
from epsball.certify.intervals import interval_bounds
from epsball.certify.ops import Op, Pair, Relu, dot
from epsball.threats import Linf

_NUMBERS = 1 << 18
"""Numbers that one pass backward may hold in its widest part: 2 MiB, so that they stay in the cache."""


_LEAN: Mapping[int, Tensor] = {}


def lowest(
    graph: Graph, ball: Ball, bounds: list[Pair], top: int, rows: Tensor, a: Tensor, through: bool, lean: Mapping[int, Tensor] = _LEAN
) -> Tensor:
    """(R,): lower bounds of <a, part `top`> over the ball, for coefficients a (R, ...) of the samples `rows` (R,).

    Zhang et al. 2018, arXiv 1811.00866, theorem 3.2 and Xu et al. 2020, arXiv 2002.12920, for sums of parts. At a part that is not
    linear the bounds go on through its relaxation, or, without `through`, end at its interval. `lean` holds the lines of
    ReLUs by their place, where others are wanted than CROWN's.
    """
    waiting, total = {top: a}, a.new_zeros(len(a))
    for place in range(top, 0, -1):
        if place not in waiting:
            continue
        a, node = waiting.pop(place), graph.nodes[place]
        if not (node.op.linear or through):
            total = total + dot(a.clamp(min=0.0), bounds[place][0][rows]) + dot(a.clamp(max=0.0), bounds[place][1][rows])
            continue
        known = () if node.op.linear else tuple((bounds[i][0][rows], bounds[i][1][rows]) for i in node.inputs)
        op: Op = replace(node.op, lean=lean[place]) if isinstance(node.op, Relu) and place in lean else node.op
        parts, constant = op.back(a, *known)
        total = total + constant
        for i, part in zip(node.inputs, parts, strict=True):
            waiting[i] = waiting[i] + part if i in waiting else part
    return total + ball.lowest(waiting[0], rows) if 0 in waiting else total


def tightened(graph: Graph, ball: Ball, through: bool) -> list[Pair]:
    """Intervals of each part, those that feed a bend tightened by linear bounds where that can help.

    Without `through` only in front of the first bend, where they are exact; for Linf and one layer intervals are already.
    """
    bounds, bends = interval_bounds(graph, ball.interval), set(graph.bends())
    if not through and isinstance(ball.threat, Linf):
        return bounds
    for place in range(1, len(graph.nodes)):
        node = graph.nodes[place]
        low, high = node.op.interval(*(bounds[i] for i in node.inputs))
        low, high = torch.maximum(low, bounds[place][0]), torch.minimum(high, bounds[place][1])
        steps = graph.straight(place)
        exact = steps == 0 or (steps == 1 and isinstance(ball.threat, Linf))
        if place in bends and not exact and (through or steps == 1):
            low, high = _tighten(graph, ball, [*bounds[:place], (low, high)], place, through)
        bounds[place] = low, high
    return bounds


def _tighten(graph: Graph, ball: Ball, bounds: list[Pair], place: int, through: bool) -> Pair:
    """The interval of one part, cut by linear bounds of every neuron that it leaves open."""
    low, high = (t.flatten(1).clone() for t in bounds[place])
    only_relu = all(isinstance(node.op, Relu) for node in graph.nodes if place in node.inputs)
    wanted = (low < 0) & (high > 0) if only_relu else low < high
    rows, neurons = wanted.nonzero(as_tuple=True)
    for part in _parts(graph, rows):
        a = torch.zeros(len(part), low.shape[1], dtype=low.dtype, device=low.device)
        a[torch.arange(len(part), device=rows.device), neurons[part]] = 1.0
        a = a.reshape(len(part), *graph.nodes[place].shape)
        least = lowest(graph, ball, bounds, place, rows[part], a, through)
        most = -lowest(graph, ball, bounds, place, rows[part], -a, through)
        where = (rows[part], neurons[part])
        low[where] = torch.maximum(low[where], least)
        high[where] = torch.minimum(high[where], most)
    return low.reshape(bounds[place][0].shape), high.reshape(bounds[place][0].shape)


def _parts(graph: Graph, rows: Tensor) -> Iterator[Tensor]:
    """The places of all rows, a few at a time."""
    step = max(1, _NUMBERS // max(math.prod(node.shape) for node in graph.nodes))
    for first in range(0, len(rows), step):
        yield torch.arange(first, min(len(rows), first + step), device=rows.device)


def margins(graph: Graph, ball: Ball, bounds: list[Pair], y: Tensor, through: bool) -> Tensor:
    """(B, C): lower bounds of score y minus each score; +inf at y itself."""
    classes = graph.nodes[-1].shape[0]
    found = torch.full((len(y), classes), torch.inf, dtype=torch.float64, device=y.device)
    rows, others = (torch.arange(classes, device=y.device) != y[:, None]).nonzero(as_tuple=True)
    for part in _parts(graph, rows):
        a = _difference(y[rows[part]], others[part], classes)
        found[rows[part], others[part]] = lowest(graph, ball, bounds, graph.top, rows[part], a, through)
    return found


def climbed(graph: Graph, ball: Ball, bounds: list[Pair], y: Tensor, found: Tensor, enough: Tensor, steps: int = 20) -> Tensor:
    """`margins` (B, C) once more, the lines below ReLUs optimized, for the pairs that are not above `enough` (B,).

    Xu et al. 2021, alpha-CROWN, arXiv 2011.13824, with the neurons' own bounds as they are: Adam (0.9, 0.999, step 0.1 with a cosine
    to 0) on the lean of every row's ReLUs, kept in [0, 1], where any value is sound; each row keeps its best. Cost: `steps` passes
    backward and their gradients for each open pair.
    """
    places = [place for place, node in enumerate(graph.nodes) if isinstance(node.op, Relu)]
    rows, others = (found <= enough[:, None]).nonzero(as_tuple=True)
    found = found.clone()
    for part in _parts(graph, rows) if places else ():
        where, a = (rows[part], others[part]), _difference(y[rows[part]], others[part], found.shape[1])
        lean = {}
        for place in places:
            low, high = bounds[graph.nodes[place].inputs[0]]
            lean[place] = (high > -low)[where[0]].double()
        first, second = ({place: torch.zeros_like(value) for place, value in lean.items()} for _ in range(2))
        for step in range(steps):
            value, slopes = _slopes(graph, ball, bounds, where[0], a, lean)
            found[where] = torch.maximum(found[where], value)
            size = 0.05 * (1 + math.cos(math.pi * step / steps))
            for place, slope in slopes.items():
                first[place] = 0.9 * first[place] + 0.1 * slope
                second[place] = 0.999 * second[place] + 0.001 * slope.square()
                scale = (second[place] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-12
                lean[place] = (lean[place] + size * first[place] / (1 - 0.9 ** (step + 1)) / scale).clamp(0.0, 1.0)
        last = lowest(graph, ball, bounds, graph.top, where[0], a, True, lean)
        found[where] = torch.maximum(found[where], last)
    return found


def _slopes(
    graph: Graph, ball: Ball, bounds: list[Pair], rows: Tensor, a: Tensor, lean: Mapping[int, Tensor]
) -> tuple[Tensor, dict[int, Tensor]]:
    """The bounds (R,) and their gradients by the lean; every row's own."""
    with torch.enable_grad():
        leaves = {place: value.clone().requires_grad_() for place, value in lean.items()}
        value = lowest(graph, ball, bounds, graph.top, rows, a, True, leaves)
        slopes = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return value.detach(), dict(zip(leaves, slopes, strict=True))


def _difference(y: Tensor, others: Tensor, classes: int) -> Tensor:
    """(R, C): 1 at y, -1 at the other class."""
    hot = torch.nn.functional.one_hot
    return (hot(y, classes) - hot(others, classes)).double()
