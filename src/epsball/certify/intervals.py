"""Interval bounds of every part, and how far the model's own arithmetic may be from exact arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from epsball.certify.graph import Graph
from epsball.certify.ops import Pair
from epsball.core import Victim

SINGLE = 2.0**-23
"""Spacing of float32 numbers at 1, twice its roundoff."""
TENSOR_FLOAT = 2.0**-10
"""That of TF32, which GPUs may use for float32."""


def interval_bounds(graph: Graph, given: Pair) -> list[Pair]:
    """[(low, high)] of each part for inputs in the interval `given`, (B, ...) float64 each.

    Gowal et al. 2018, arXiv 1810.12715, equations 3 to 5. Cost: 2 forwards of the network, in float64.
    """
    bounds = [given]
    for node in graph.nodes[1:]:
        bounds.append(node.op.interval(*(bounds[place] for place in node.inputs)))
    return bounds


def unit_of(victim: Victim) -> float:
    """The coarsest spacing of numbers at 1 that is covered: float32, or what the model computes in where that is coarser."""
    found = max(SINGLE, torch.finfo(victim.dtype).eps)
    loose = victim.device.type == "cuda" and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    return max(found, TENSOR_FLOAT) if loose else found


def rounding(graph: Graph, bounds: list[Pair], unit: float) -> Tensor:
    """(B, C): most that rounding can move each score of the model, at any input within `bounds`.

    The standard error analysis, run along the network: a sum of n products, added in any order, is off by at most
    gamma(n + 2) times the sum of their absolute values (Higham 2002, section 3.1), and errors go on through absolute weights. The
    input itself may be rounded once. Convolutions are granted twice the roundoff and the largest sum of their channel, for fast
    algorithms; two more roundings for every sum cover the arithmetic of these bounds, which is float64.
    """
    errors = [unit * torch.maximum(bounds[0][0].abs(), bounds[0][1].abs())]
    for node in graph.nodes[1:]:
        errors.append(node.op.error(unit, *((*bounds[place], errors[place]) for place in node.inputs)))
    return errors[-1] + 1e-30  # what underflow may lose
