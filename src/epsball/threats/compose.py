"""Several threats at once: x_adv = additive(flow(color(x))), each within its own budget, searched as one variable.

Any attack on any threat works on these unchanged: `pgd(threat=compose((Color(), 0.06), (Linf(), 8 / 255)))`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.core.attack import recipe
from epsball.core.problem import Objective, Problem
from epsball.core.random import Key
from epsball.core.rows import rowwise
from epsball.core.threat import Projects, Z
from epsball.core.victim import Bound
from epsball.errors import BadInput
from epsball.threats.flow import boxed
from epsball.threats.lp import L0, L1, L2, Linf, Room
from epsball.threats.patch import Patch

Penalty = Callable[[Tensor], Tensor]
"""A part's variable (B, ...) -> (B,), such as `roughness` or `unevenness`."""


@dataclass(frozen=True, eq=False)
class Added:
    """An Lp threat whose variable is the change itself, so that it can act on an input that moves: x_adv = clip(x + z).

    The norm is that of z, before the box clips it. Masks and budgets of the threat's `Room` hold; its own box does not.
    """

    norm: Linf | L2 | L1 | L0
    box: tuple[Bound, Bound] | None = None

    @property
    def name(self) -> str:
        """That of the norm."""
        return self.norm.name

    @property
    def free(self) -> Linf | L2 | L1 | L0:
        """The norm around 0, without a box."""
        return replace(self.norm, room=replace(self.norm.room, box=(-torch.inf, torch.inf)))

    def within(self, box: tuple[Bound, Bound]) -> Added:
        """The sum is clipped to the box."""
        return replace(self, norm=replace(self.norm, room=Room(None, self.norm.room.mask, self.norm.room.budget)), box=box)

    def start(self, x: Tensor, radius: Tensor, noise: Key | None, ids: Tensor) -> Tensor:
        """No change, or the norm's own random start around 0."""
        if isinstance(self.norm, L0) and noise is not None:  # L0 draws values from the box: it needs one
            return replace(self.norm, room=replace(self.norm.room, box=(-1.0, 1.0))).start(torch.zeros_like(x), radius, noise, ids)
        return self.free.start(torch.zeros_like(x), radius, noise, ids)

    def apply(self, x: Tensor, z: Tensor) -> Tensor:
        """The sum, inside the box."""
        return boxed(x, x + z, self.box)

    def size(self, x: Tensor, z: Tensor) -> Tensor:
        """Norm of the change."""
        return self.free.size(torch.zeros_like(z), z)

    def project(self, x: Tensor, z: Tensor, radius: Tensor) -> Tensor:
        """The norm's projection around 0."""
        return self.free.project(torch.zeros_like(z), torch.nan_to_num(z, nan=0.0), radius)

    def steepest(self, x: Tensor, z: Tensor, gradient: Tensor) -> Tensor:
        """The norm's steepest direction."""
        return self.free.steepest(torch.zeros_like(z), z, gradient)

    def reach(self, x: Tensor) -> Tensor:
        """That of the norm around x."""
        return self.norm.within(self.box or (-torch.inf, torch.inf)).reach(x)


@dataclass(frozen=True, eq=False)
class Composed:
    """Threats in a row, each applied to what the one before it made; see `compose`.

    z is flat (B, D): the variables of all parts side by side. The size is the largest share of a budget, max over parts of
    size / budget, so radius 1 is every budget in full. A step of size s moves each part by s of its own budget, each in its
    own steepest direction.
    """

    parts: tuple[Projects, ...]
    budgets: tuple[float, ...]

    @property
    def name(self) -> str:
        """Those of the parts, as in threat strings: `color+linf`."""
        return "+".join(part.name for part in self.parts)

    def within(self, box: tuple[Bound, Bound]) -> Composed:
        """Every part inside the box."""
        return replace(self, parts=tuple(part.within(box) for part in self.parts))

    def split(self, x: Tensor, z: Tensor) -> list[Tensor]:
        """z (B, D) -> each part's own variable (B, ...)."""
        none = torch.zeros(1, dtype=torch.float64, device=x.device)
        ids = torch.zeros(1, dtype=torch.int64, device=x.device)
        shapes = [part.start(x[:1], none, None, ids).shape[1:] for part in self.parts]
        pieces = torch.split(z, [shape.numel() for shape in shapes], dim=1)
        return [piece.reshape(len(z), *shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def _each(self, values: list[Tensor]) -> Tensor:
        return torch.cat([value.flatten(1) for value in values], 1)

    def start(self, x: Tensor, radius: Tensor, noise: Key | None, ids: Tensor) -> Tensor:
        """Each part's own start, with a key of its own."""
        keys = [None if noise is None else noise.fold("part", number) for number in range(len(self.parts))]
        budgets = zip(self.parts, self.budgets, keys, strict=True)
        return self._each([part.start(x, radius * budget, key, ids) for part, budget, key in budgets])

    def apply(self, x: Tensor, z: Tensor) -> Tensor:
        """First part first."""
        pieces = self.split(x, z)
        for part, piece in zip(self.parts, pieces, strict=True):
            x = part.apply(x, piece)
        return x

    def size(self, x: Tensor, z: Tensor) -> Tensor:
        """Largest share of a budget."""
        pieces = zip(self.parts, self.budgets, self.split(x, z), strict=True)
        return torch.stack([part.size(x, piece) / budget for part, budget, piece in pieces]).amax(0)

    def project(self, x: Tensor, z: Tensor, radius: Tensor) -> Tensor:
        """Each part into its own budget, a hair inside since size / budget rounds; what that division finds legal stays."""
        pieces = zip(self.parts, self.budgets, self.split(x, z), strict=True)
        done = []
        for part, budget, piece in pieces:
            limit = radius * budget
            near = part.project(x, piece, limit)
            near = torch.where(self._legal(part, x, near, budget, radius), near, part.project(x, near, limit * (1 - 1e-12)))
            done.append(torch.where(self._legal(part, x, piece, budget, radius), piece, near))
        return self._each(done)

    def _legal(self, part: Projects, x: Tensor, piece: Tensor, budget: float, radius: Tensor) -> Tensor:
        return rowwise(part.size(x, piece) / budget <= radius, piece)

    def steepest(self, x: Tensor, z: Tensor, gradient: Tensor) -> Tensor:
        """Each part's own direction, as long as its budget: of size 1 together."""
        pieces = zip(self.parts, self.budgets, self.split(x, z), self.split(x, gradient), strict=True)
        return self._each([budget * part.steepest(x, piece, slope) for part, budget, piece, slope in pieces])

    def reach(self, x: Tensor) -> Tensor:
        """Until every part is at its own reach."""
        return torch.stack([part.reach(x) / budget for part, budget in zip(self.parts, self.budgets, strict=True)]).amax(0)


def compose(*parts: tuple[Projects, float]) -> Composed:
    """(threat, budget) pairs in the order in which they act; budgets in each threat's own unit, reached at radius 1.

    Laidlaw & Feizi 2019, arXiv 1906.00001, section 4: functional, then flow, then additive. Lp threats act by addition.

    Raises:
        BadInput: no part, a budget that is not above 0, or a part that only knows the clean input.

    >>> compose((Linf(), 8 / 255)).parts[0].name
    'linf'
    """
    if not parts:
        raise BadInput("compose: no threat: give (threat, budget) pairs")
    for threat, budget in parts:
        if not 0 < budget < float("inf"):
            raise BadInput(f"compose: budget {budget:g} of '{threat.name}': must be above 0 and finite")
        if isinstance(threat, Patch):  # its variable is the input itself: it would undo what acted before it
            raise BadInput("compose: 'patch' cannot be a part: audit it alone, or in Python compose a Window, which has a place")
    threats = tuple(Added(part) if isinstance(part, Linf | L2 | L1 | L0) else part for part, _ in parts)
    return Composed(threats, tuple(float(budget) for _, budget in parts))


@dataclass(frozen=True, repr=False)
class OfPart:
    """A penalty on one part of a composition: objective - weight * penalty(that part's variable), e.g. `roughness`."""

    objective: Objective
    part: int
    penalty: Penalty
    weight: float = 0.05

    def __call__(self, problem: Problem, z: Z, x_adv: Tensor, output: Tensor) -> Tensor:
        """(B,) score."""
        threat = problem.threat
        if not isinstance(threat, Composed):
            raise BadInput(f"objective 'OfPart': threat '{threat.name}' has no parts: use the penalty's own wrapper")
        piece = threat.split(problem.x, z)[self.part]
        return self.objective(problem, z, x_adv, output) - self.weight * self.penalty(piece).to(output.dtype)

    def __repr__(self) -> str:
        return recipe(self)
