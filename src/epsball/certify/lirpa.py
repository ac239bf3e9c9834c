"""Bounds by auto_LiRPA, where it can be imported: for parts that our own trace does not know."""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from epsball.certify.ball import Ball
from epsball.core import Victim
from epsball.errors import BadInput
from epsball.models.adapt import Adapted
from epsball.threats import L0, L1, L2

GUARD = 1e3
"""Roundings of the largest score that a margin has to exceed, where no error analysis of the network is at hand."""

ROWS = 16
"""Rows of the batch that is traced: with fewer, a victim's layers would be traced with what fills small batches."""


class Scores(nn.Module):
    """A float64 copy of a model from inputs in the box to logits, without the checks that a trace cannot follow."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        adapted = model if isinstance(model, Adapted) else None
        self.inner = copy.deepcopy(model if adapted is None else adapted.module).double().eval().requires_grad_(False)
        self.order = None if adapted is None else adapted.order
        self.scale = (adapted.mean.double(), adapted.std.double()) if adapted is not None and adapted.normalizes else None

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) for x (B, ...) in the box, float64."""
        if self.scale is not None:
            mean, std = (one.view(1, -1, *[1] * (x.ndim - 2)) for one in self.scale)
            x = (x - mean) / std
        scores: Tensor = self.inner(x)
        return scores if self.order is None else scores[:, self.order]


def lirpa_margins(victim: Victim, ball: Ball, y: Tensor, method: str = "alpha-CROWN") -> tuple[Tensor, Tensor]:
    """(B,) float64: lower bound of the least of score y minus another score on each ball; and (B, C), the clean scores of its network.

    Xu et al. 2020, arXiv 2002.12920 and 2021, arXiv 2011.13824, as auto_LiRPA computes them, in float64. Linf is cut by the box, by masks
    and budgets; L2 and L1 are the whole balls, and so looser than need be.

    Args:
        victim: a module that returns logits. ball: its inputs. y: (B,) classes. method: IBP, CROWN or alpha-CROWN.

    Raises:
        BadInput: auto_LiRPA is not to be had; L0; a model that is no module or that auto_LiRPA does not read.
    """
    lirpa, model = library(), victim.model
    if not isinstance(model, nn.Module) or victim.lens is not None or (isinstance(model, Adapted) and model.outputs != "logits"):
        raise BadInput(f"model '{victim.name}': auto_LiRPA needs a torch module that returns logits: use --method smoothing")
    if isinstance(ball.threat, L0):
        raise BadInput("threat 'l0': auto_LiRPA has no bounds for it: use --method best")
    found = torch.full((len(y),), -math.inf, dtype=torch.float64, device=y.device)
    with quiet(), torch.enable_grad():
        try:
            many = ball.x[:1].repeat(ROWS, *[1] * (ball.x.ndim - 1))
            net = lirpa.BoundedModule(Scores(model), many, device=str(ball.x.device), verbose=False)
            scores = net(ball.x).detach()
            for radius in sorted(set(ball.radius.tolist())):
                rows = (ball.radius == radius).nonzero().squeeze(1)
                bounded = lirpa.BoundedTensor(ball.x[rows], perturbation(lirpa, ball, rows, radius))
                differences = others(y[rows], scores.shape[1])
                lowest = net.compute_bounds(x=(bounded,), C=differences, method=method, bound_upper=False)[0]
                found[rows] = lowest.detach().double().amin(1)
        except (NotImplementedError, AttributeError, KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise BadInput(f"model '{victim.name}': auto_LiRPA cannot bound it ({said}): use --method smoothing") from error
    return found.nan_to_num(nan=-math.inf), scores


def guard(scores: Tensor, unit: float) -> Tensor:
    """(B,): what a margin has to exceed: `GUARD` roundings of the largest score; no error analysis."""
    return GUARD * unit * scores.double().abs().amax(1)


def library() -> Any:
    """auto_LiRPA.

    Raises:
        BadInput: it cannot be imported.
    """
    try:
        with quiet():
            found: Any = importlib.import_module("auto_LiRPA")
            found.perturbations = importlib.import_module("auto_LiRPA.perturbations")
    except ImportError as error:
        raise BadInput(f"--method auto-lirpa: auto_LiRPA cannot be imported ({error}): install it, or use --method best") from error
    return found


def perturbation(lirpa: Any, ball: Ball, rows: Tensor, radius: float) -> Any:
    """The ball of some samples in the words of auto_LiRPA."""
    if isinstance(ball.threat, L1 | L2):
        return lirpa.perturbations.PerturbationLpNorm(norm=2.0 if isinstance(ball.threat, L2) else 1.0, eps=radius)
    return lirpa.perturbations.PerturbationLpNorm(norm=math.inf, x_L=ball.low[rows], x_U=ball.high[rows])


def others(y: Tensor, classes: int) -> Tensor:
    """(B, C - 1, C): score y minus each other score."""
    eye = torch.eye(classes, dtype=torch.float64, device=y.device)
    each = eye[y][:, None] - eye
    other = torch.arange(classes, device=y.device) != y[:, None]
    return each[other].view(len(y), classes - 1, classes)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """In float64 by default, which its optimizer needs, and without the warnings that its traces give."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)
