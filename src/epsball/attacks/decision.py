"""What label-only searches share: exact budgets, starting points, bisection to the boundary, distances along directions.

The model answers yes or no: `problem.goal.reached`. Nothing here looks at a score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.core import Attack, Problem, Projects, Reading
from epsball.core.descent import Strategy
from epsball.core.rows import per_sample
from epsball.core.rule import normalized
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.objectives import margin

Path = Callable[[Tensor], Tensor]
"""(B,) float64 -> (B, ...) legal inputs, one per sample."""

CHUNK = 32
"""Draws of one sample per call of the model; part of what the noise hangs on, so no batch may change it."""


@dataclass(frozen=True)
class Found:
    """The smallest success so far, and the books.

    Attributes:
        z: where (B, ...), the clean input before the first. output: the model's answer there. size: (B,), +inf before the first.
        limit: (B,) int64, the ledger's entry at which a sample has spent its budget.
        enough: (B,) float64, a success of at most this size ends the search of a sample.
    """

    z: Tensor
    output: Tensor
    size: Tensor
    limit: Tensor
    enough: Tensor

    @staticmethod
    def nothing(problem: Problem, budget: int) -> Found:
        """No success, and `budget` queries to spend for every sample."""
        size = torch.full_like(problem.radius, torch.inf)
        return Found(problem.x, problem.clean, size, _spent(problem) + budget, -size)

    @property
    def some(self) -> Tensor:
        """(B,) bool: there is a success."""
        return torch.isfinite(self.size)

    def left(self, problem: Problem) -> Tensor:
        """(B,) int64: queries that each sample may still ask."""
        return (self.limit - _spent(problem)).masked_fill(self.size <= self.enough, 0)

    def reading(self, problem: Problem) -> Reading:
        """The smallest success as `run` wants it; costs nothing, for the answer is known."""
        return Reading(self.z, self.z, self.output, problem.objective(problem, self.z, self.z, self.output))

    def better(self, problem: Problem, rows: Tensor, z: Tensor, output: Tensor) -> Found:
        """With the successes z (R, ...) of the samples `rows` (R,), wherever they are smaller."""
        size = problem.threat.size(problem.x[rows], z)
        less = size < self.size[rows]
        if not bool(less.any()):
            return self
        where = rows[less]
        return replace(
            self,
            z=self.z.index_copy(0, where, z[less]),
            output=self.output.index_copy(0, where, output[less].to(self.output.dtype)),
            size=self.size.index_copy(0, where, size[less]),
        )


def _spent(problem: Problem) -> Tensor:
    return problem.tally.forwards[problem.tally.rows].to(problem.x.device)


def label_only(name: str, threat: Projects, allowed: tuple[type, ...], strategy: Strategy, looks: int, steps: int) -> Attack:
    """The attack around a label-only strategy, with the checks that all of them share.

    Args:
        looks: most moves that `steps` queries can pay for.

    Raises:
        BadInput: another threat, or steps below 0.
    """
    if steps < 0:
        raise BadInput(f"steps: {steps}: must be 0 or more queries per sample")
    if not isinstance(threat, allowed):
        raise BadInput(f"attack '{name}': threat '{threat.name}': it works under {', '.join(kind.__name__.lower() for kind in allowed)}")
    return Attack(name, threat, margin, strategy, looks if steps else 0, smallest=True, access=Access.LABELS)


def interval(problem: Problem) -> tuple[Tensor, Tensor]:
    """(low, high) of every feature; where the box has no end, the radius is one."""
    low, high = problem.threat.room.interval(problem.x)  # type: ignore[attr-defined]
    reach = per_sample(problem.radius, problem.x)
    return torch.where(torch.isinf(low), problem.x - reach, low), torch.where(torch.isinf(high), problem.x + reach, high)


def look(problem: Problem, found: Found, z: Tensor, want: Tensor) -> tuple[Tensor, Tensor, Found]:
    """Asks the model at z (B, ...) for the samples `want` (B,) that have budget left: who was asked, who succeeded, what is found.

    Cost: 1 forward row per sample asked.
    """
    asked = want & (found.left(problem) > 0)
    hit, rows = torch.zeros_like(asked), asked.nonzero().squeeze(1)
    if not len(rows):
        return asked, hit, found
    part, there = problem.take(rows), z[rows]
    output = problem.victim.outputs(there, part.tally)
    reached = part.goal.reached(output)
    hit[rows] = reached
    return asked, hit, found.better(problem, rows[reached], there[reached], output[reached])


def look_many(problem: Problem, found: Found, z: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Found]:
    """`look` at the first counts (B,) of K points z (B, K, ...) per sample in one batch: asked (B, K), hit (B, K), found.

    Cost: counts forward rows per sample, or what is left of its budget.
    """
    n, k = z.shape[:2]
    asked = torch.arange(k, device=z.device) < torch.minimum(counts, found.left(problem))[:, None]
    hit, places = torch.zeros_like(asked), asked.flatten().nonzero().squeeze(1)
    if not len(places):
        return asked, hit, found
    rows = places // k
    part = problem.take(rows)
    output = problem.victim.outputs(z.flatten(0, 1)[places], part.tally)
    reached = part.goal.reached(output)
    hit.view(-1)[places] = reached
    if not bool(reached.any()):
        return asked, hit, found
    places, rows = places[reached], rows[reached]
    size = problem.threat.size(problem.x[rows], z.flatten(0, 1)[places])
    least = torch.full((n * k,), torch.inf, dtype=size.dtype, device=z.device).index_copy(0, places, size).reshape(n, k).argmin(1)
    chosen = hit.gather(1, least[:, None]).squeeze(1).nonzero().squeeze(1)
    shown = torch.zeros(n * k, output.shape[1], dtype=output.dtype, device=z.device).index_copy(0, places, output[reached])
    flat = chosen * k + least[chosen]
    return asked, hit, found.better(problem, chosen, z.flatten(0, 1)[flat], shown[flat])


def bisect(problem: Problem, found: Found, path: Path, low: Tensor, high: Tensor, tolerance: Tensor, want: Tensor) -> tuple[Tensor, Found]:
    """Where each path crosses the boundary, to within `tolerance` (B,) float64 from above: `high` fools the model, `low` does not.

    Cost: ceil(log2((high - low) / tolerance)) forwards per sample of `want`; a sample whose budget ends keeps its bracket.
    """
    while True:
        middle = (low + high) / 2
        asked, hit, found = look(problem, found, path(middle), want & (high - low > tolerance))
        if not bool(asked.any()):
            return high, found
        high, low = torch.where(hit, middle, high), torch.where(asked & ~hit, middle, low)


def inward_path(problem: Problem, far: Tensor) -> Path:
    """From x at 0 to `far` at 1: a segment under L2; under Linf the change cut to a share of its largest entry (HSJA, eq. 8)."""
    x, change = problem.x, far - problem.x
    longest = problem.threat.size(x, far)
    low, high = interval(problem)

    def path(share: Tensor) -> Tensor:
        if problem.threat.name == "linf":
            limit = per_sample(share * longest, x)
            near = x + torch.minimum(torch.maximum(change, -limit), limit)
        else:
            near = x + per_sample(share, x) * change
        return torch.where(per_sample(share, x) >= 1, far, near.clamp(low, high))

    return path


def ray(problem: Problem, direction: Tensor) -> Path:
    """x + r * direction, cut to the legal interval of every feature."""
    low, high = interval(problem)
    return lambda r: (problem.x + per_sample(r, problem.x) * direction).clamp(low, high)


def given(problem: Problem, starts: Tensor | None) -> list[Tensor]:
    """The starting points (N, ...) inside the legal intervals: N tensors (B, ...), each sample's nearest first (L2).

    Raises:
        BadInput: points of another shape than the inputs.
    """
    if starts is None:
        return []
    x = problem.x
    if starts.shape[1:] != x.shape[1:]:
        raise BadInput(f"starts: shape {tuple(starts.shape)} for inputs {tuple(x.shape[1:])}: give (N, ...) points of the same shape")
    points = starts.detach().to(x.device, x.dtype)
    distance = torch.stack([(points - row).double().square().flatten(1).sum(1) for row in x])
    low, high = interval(problem)
    return [points[nth].clamp(low, high) for nth in distance.argsort(dim=1, stable=True).T]


def start(problem: Problem, found: Found, starts: Tensor | None) -> Found:
    """Points that fool the model: those given, nearest first, then noise, until each sample has one or its budget is spent.

    Noise is uniform in the box and, every second time, in corners of it: a random share of the features high, the others low.
    Uniform noise alone is one class to many networks, and then never fools the model for inputs of that class.
    """
    for point in given(problem, starts):
        _, _, found = look(problem, found, point, ~found.some)
    low, high = interval(problem)
    attempt = 0
    while bool((~found.some & (found.left(problem) > 0)).any()):
        key = problem.key.fold("start", attempt)
        noise = key.uniform(problem.ids, problem.x)
        if attempt % 2:
            share = key.fold("share").uniform(problem.ids, problem.x.flatten(1)[:, :1]).squeeze(1)
            noise = (noise < per_sample(share, noise)).to(noise.dtype)
        _, _, found = look(problem, found, (low + (high - low) * noise).clamp(low, high), ~found.some)
        attempt += 1
    return found


def nearer(problem: Problem, found: Found, path: Path, radius: Tensor, tolerance: Tensor, want: Tensor) -> tuple[Tensor, Tensor, Found]:
    """Whether each path fools the model at the present radius (B,), and the least radius at which it does, else the present one.

    Gains are mostly small, so the first question is 0.9 of the radius; only below that the whole bracket is bisected.

    Cost: 1 forward where it does not; else 1 and a bisection of a tenth of the radius, mostly.
    """
    _, hit, found = look(problem, found, path(radius), want)
    near = 0.9 * radius
    _, closer, found = look(problem, found, path(near), hit)
    low, high = torch.where(closer, torch.zeros_like(near), near), torch.where(closer, near, radius)
    least, found = bisect(problem, found, path, low, high, tolerance, hit)
    return hit, torch.where(hit, least, radius), found


def start_near(problem: Problem, found: Found, starts: Tensor | None, tries: int) -> Found:
    """`start`, drawn in to within 1 % of the boundary; then `tries` random directions, each taken where its boundary is nearer.

    Cost: that of `start`, 7 forwards, and 1 forward for every try that is no gain.
    """
    found = start(problem, found, starts)
    one = torch.ones_like(problem.radius)
    _, found = bisect(problem, found, inward_path(problem, found.z), 0 * one, one, 0.01 * one, found.some)
    for attempt in range(tries):
        theta = problem.key.fold("direction", attempt).normal(problem.ids, problem.x)
        theta = theta.sign() if problem.threat.name == "linf" else normalized(theta, 2)
        present = torch.where(found.some, found.size, 0.0)
        _, _, found = nearer(problem, found, ray(problem, theta), present, 0.01 * present, found.some)
    return found
