"""Attacks on the place and the color of pixels: stAdv, the grid of rotations and translations, and ReColorAdv."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.registry import register
from epsball.attacks.transfer import Smooth
from epsball.core import Attack, Descent, Gradient, Halving, Objective, Problem, Projects, Reading, Steepest, autograd, chain, valid
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats.color import Color, Uneven
from epsball.threats.flow import Flow, Rigid, Rough


@register(paper="Xiao et al. 2018, arXiv 1801.02612", threats=("flow",), cost="steps forwards and backwards, 1 forward to judge")
def stadv(
    steps: int = 100,
    weight: float = 0.01,
    threat: Projects | None = None,
    objective: Objective = margin,
    gradient: Gradient = autograd,
    noise: bool = False,
) -> Attack:
    """Spatially transformed adversarial examples: ascent on a flow field whose longest displacement is at most the radius.

    score = margin - weight * roughness(flow), Xiao et al. 2018, arXiv 1801.02612, eq. 2 to 4; targeted by a `Targeted` goal,
    as there. The paper runs L-BFGS with weight 0.05 and no bound. Under a bound, APGD's step sizes beat Adam at equal
    gradients on both digits models (tests/threats/test_flow.py). Two things lead pixels along that have no gradient of their
    own, on flat ground: the roughness, at the small weight that broke most, and a 3-pixel `Smooth`.

    Cost: steps forwards and backwards, 1 forward to judge.
    """
    score = Rough(objective, weight) if weight else objective
    rule = chain(Smooth(3), Steepest())
    return Attack("stadv", threat or Flow(), score, Descent(Halving(), rule, gradient, inertia=0.75, noise=noise), steps)


@register(
    paper="Laidlaw & Feizi 2019, arXiv 1906.00001, Algorithm 1",
    threats=("color-luv", "color"),
    cost="steps forwards and backwards, 1 forward to judge",
)
def recoloradv(
    steps: int = 100,
    weight: float = 0.0,
    threat: Projects | None = None,
    objective: Objective = margin,
    gradient: Gradient = autograd,
    noise: bool = False,
) -> Attack:
    """ReColorAdv: ascent on one bounded function of color per image, Laidlaw & Feizi 2019, arXiv 1906.00001, Algorithm 1.

    score = margin - weight * unevenness(grid). Released code: CIELUV, 16 x 32 x 32 grid points, radius 0.06, weight 0.05, Adam
    at 0.001 for 100 steps; here APGD's step sizes, and no penalty unless asked for: of 100 tinted digits, 90 right at first,
    radius 0.06 and 30 steps break 74 without it and 71 with it (Adam with the same steps: 73 and 69). Combinations with flow
    and noise are threats: `epsball.threats.compose`.

    Cost: steps forwards and backwards, 1 forward to judge.
    """
    score = Uneven(objective, weight) if weight else objective
    strategy = Descent(Halving(), gradient=gradient, inertia=0.75, noise=noise)
    return Attack("recoloradv", threat or Color(), score, strategy, steps)


@register(
    paper="Engstrom et al. 2019, arXiv 1712.02779, section 3",
    threats=("rigid",),
    access=Access.SCORES,
    cost="rotations * shifts^2 + 2 forwards",
)
def rotation_translation(
    rotations: int = 31,
    shifts: int = 5,
    threat: Rigid | None = None,
    objective: Objective = margin,
    chunk: int = 5,
) -> Attack:
    """The worst of a grid of rotations and translations, per image: Engstrom et al. 2019, arXiv 1712.02779, section 3.

    rotations * shifts^2 points, evenly over the limits of the threat times the radius; radius 1 with the default `Rigid` is
    the paper's 775 points of +-30 degrees and +-3 pixels. The identity is looked at first, so the result is never worse than
    the clean image. Their "worst of 10" is `noise(draws=10, threat=Rigid())`.

    Cost: at most rotations * shifts^2 + 1 forwards, `chunk` of them per look; none once a point succeeds.
    """
    if rotations < 1 or shifts < 1 or chunk < 1:
        raise BadInput(f"grid: {rotations} rotations, {shifts} shifts, chunk {chunk}: must be 1 or more each")
    search = Grid(rotations, shifts, chunk)
    return replace(Attack("rotation_translation", threat or Rigid(), objective, search, search.looks), access=Access.SCORES)


@dataclass(frozen=True)
class _Chunk:
    z: Tensor
    number: int


@dataclass(frozen=True)
class Grid:
    """Looks at the points of an even grid over (angle, down, right), `chunk` points of all samples in one batch."""

    rotations: int = 31
    shifts: int = 5
    chunk: int = 5

    @property
    def looks(self) -> int:
        """Batches until all is seen, but for the identity, which `init` leaves to be judged first."""
        return -(-self.rotations * self.shifts**2 // self.chunk) + 1

    def points(self, threat: Rigid, like: Tensor) -> Tensor:
        """(points, 3) float64 at radius 1."""
        axes = [torch.linspace(-1, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1, dtype=torch.float64) for n in self.counts]
        return torch.cartesian_prod(*axes).to(like.device) * threat.limits(like)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Points along each axis."""
        return self.rotations, self.shifts, self.shifts

    def init(self, problem: Problem, steps: int) -> _Chunk:
        """The identity comes first."""
        return _Chunk(problem.threat.start(problem.x, problem.radius, None, problem.ids), 0)

    def step(self, problem: Problem, state: _Chunk) -> tuple[Reading, _Chunk]:
        """The best of one chunk of points, per sample."""
        if state.number == 0:
            return problem.judge(state.z), _Chunk(state.z, 1)
        threat = problem.threat
        if not isinstance(threat, Rigid):
            raise BadInput(f"rotation_translation: threat '{threat.name}' has no rotations: give a Rigid")
        points = self.points(threat, problem.x)[(state.number - 1) * self.chunk : state.number * self.chunk]
        n, count = len(problem), len(points)
        rows = torch.arange(n, device=problem.x.device).repeat_interleave(count)
        part = problem.take(rows)
        z = threat.project(part.x, (points.repeat(n, 1) * part.radius[:, None]).to(problem.x.dtype), part.radius)
        reading = part.judge(z)
        best = self._best(part, reading).reshape(n, count).argmax(1) + count * torch.arange(n, device=rows.device)
        chosen = Reading(reading.z[best], reading.x_adv[best], reading.output[best], reading.score[best])
        return chosen, _Chunk(chosen.z, state.number + 1)

    def _best(self, part: Problem, reading: Reading) -> Tensor:
        """A rank by (reached, score); answers that are no number come last."""
        score = torch.nan_to_num(reading.score.double(), nan=-torch.inf).masked_fill(~valid(reading.output), -torch.inf)
        # atan keeps the order and stays within pi / 2, so that any success ranks above any failure.
        return score.atan() + 4 * part.goal.reached(reading.output)
