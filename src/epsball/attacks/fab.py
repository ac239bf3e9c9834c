"""Fast Adaptive Boundary attack (FAB): projections onto the linearized boundary inside the box, biased toward the clean input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.minimal import limits
from epsball.attacks.registry import register
from epsball.attacks.walk import Trail, begin, best_others, crossings, look, nearest_plane
from epsball.core import Attack, Problem, Projects, Reading, Targeted
from epsball.core.rows import per_sample, rowwise
from epsball.core.rule import lengths, normalized
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L1, L2, Linf

_NORMS = ("linf", "l2", "l1")


@register(
    paper="Croce & Hein 2020, arXiv 1907.02044",
    threats=_NORMS,
    kind="smallest",
    cost="restarts * steps * (2 forwards and `candidates` backwards, 1 for a target); search + 1 forwards",
)
def fab(
    steps: int = 100,
    restarts: int = 1,
    candidates: int = 9,
    alpha: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    spread: float | None = None,
    search: int = 3,
    threat: Projects | None = None,
) -> Attack:
    """FAB, Algorithm 1: z <- (1 - a)(z + eta d(z)) + a (x + eta d(x)), then z <- x + beta (z - x) at each success.

    d(.) leads to the nearest linearized class boundary, exactly projected inside the box (eq. 6); a = min(||d(z)|| /
    (||d(z)|| + ||d(x)||), alpha). At the end the best success is drawn toward x by `search` interpolations.

    Args:
        steps: of each restart. restarts: the second and later start at random, half as far out as the best success or `spread`.
        candidates: how many other classes are tried, by clean logit; the paper tries all. A `Targeted` goal is one boundary:
            that between the target and the class ahead, and a is 0 before the first success (the paper has no such form).
        spread: farthest start in the threat's unit; None is the released code's 0.3 (Linf), 1 (L2), 5 (L1).
        threat: Linf, L2 or L1.

    Differs from the released code: it has no final search, the paper has; starts, as there, are at most the best size / 2 away.
    """
    return _attack("fab", Boundary(candidates, False, restarts, alpha, eta, beta, spread, search), steps, threat)


@register(
    paper="Croce & Hein 2020, arXiv 1907.02044; targeted form: arXiv 2003.01690, section 5",
    threats=_NORMS,
    kind="smallest",
    targeted=False,
    cost="targets * steps * (2 forwards, 1 backward); search + 1 forwards",
)
def fab_t(
    steps: int = 100,
    targets: int = 9,
    alpha: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    search: int = 3,
    threat: Projects | None = None,
) -> Attack:
    """FAB-T: one run of FAB toward the boundary with each of the `targets` best other classes by clean logit; any class counts.

    Cheaper by a factor of the class count than `fab` with as many steps for one target, and the form that AutoAttack uses.
    """
    return _attack("fab_t", Boundary(targets, True, targets, alpha, eta, beta, None, search), steps, threat)


def _attack(name: str, strategy: Boundary, steps: int, threat: Projects | None) -> Attack:
    for word, count in (("candidates" if name == "fab" else "targets", strategy.candidates), ("restarts", strategy.runs)):
        if count < 1:
            raise BadInput(f"{word}: {count}: must be 1 or more")
    if strategy.search < 0:
        raise BadInput(f"search: {strategy.search}: must be 0 or more")
    looks = steps * strategy.runs + strategy.search if steps > 0 else steps
    return Attack(name, threat or Linf(), margin, strategy, looks, smallest=True)


@dataclass(frozen=True)
class _Bounded:
    trail: Trail
    candidates: Tensor  # (B, K)
    best: Tensor  # the smallest success so far, x before the first
    size: Tensor  # (B,) its size, +inf before the first
    near: Tensor  # the searched segment: a point short of the boundary, and its margin (B,)
    near_score: Tensor
    far_score: Tensor  # margin (B,) of `best`, at the other end
    period: int
    last: int

    @property
    def z(self) -> Tensor:
        """Where to look next."""
        return self.trail.z


@dataclass(frozen=True)
class Boundary:
    """See `fab`. Each of the `runs` restarts from x or from noise; with `aimed`, run r heads for the r-th best class only."""

    candidates: int
    aimed: bool
    runs: int
    alpha: float
    eta: float
    beta: float
    spread: float | None
    search: int

    def init(self, problem: Problem, steps: int) -> _Bounded:
        """At the clean input."""
        trail, last = begin(problem), max(steps - self.search, 0)
        size = torch.full_like(problem.radius, torch.inf)
        others = best_others(problem.goal, problem.clean, self.candidates)
        return _Bounded(trail, others, trail.z, size, trail.z, trail.score, trail.score, max(last // self.runs, 1), last)

    def step(self, problem: Problem, state: _Bounded) -> tuple[Reading, _Bounded]:
        """Look, remember, then one biased projection or, at the end, one interpolation."""
        reading, trail, _ = look(problem, state.trail)
        hit = problem.goal.reached(trail.output)
        size = problem.threat.size(problem.x, trail.z)
        new, wide = hit & (size < state.size), rowwise(hit & (size < state.size), trail.z)
        s = replace(
            state,
            trail=trail,
            best=torch.where(wide, trail.z, state.best),
            size=torch.where(new, size, state.size),
            far_score=torch.where(new, trail.score, state.far_score),
        )
        if trail.looks > s.last:
            z, s = self._interpolated(problem, s, hit)
            return replace(reading, over=torch.isinf(s.size)), replace(s, trail=replace(trail, z=z, walking=torch.isfinite(s.size)))
        run, place = divmod(trail.looks - 1, s.period)
        if self.aimed and run >= s.candidates.shape[1]:  # fewer classes than runs
            return reading, replace(s, trail=replace(trail, walking=torch.zeros_like(trail.walking)))
        z = torch.where(rowwise(hit, trail.z), problem.x + self.beta * (trail.z - problem.x), trail.z)
        if place == 0 and run > 0:
            z = self._restarted(problem, s.size, run)
        z = self._projected(problem, s, problem.threat.project(problem.x, z, problem.radius), run)
        return reading, replace(s, trail=replace(trail, z=z))

    def _restarted(self, problem: Problem, size: Tensor, run: int) -> Tensor:
        """x for the first look at a class; else a random point, half of min(best size, spread) away."""
        x, (p, _, _, spread) = problem.x, _geometry(problem.threat)
        if self.aimed:
            return x
        key = problem.key.fold("restart", run)
        noise = 2 * key.uniform(problem.ids, x) - 1 if p == torch.inf else key.normal(problem.ids, x)
        return x + per_sample(size.clamp(max=self.spread or spread) / 2, x) * normalized(noise, p)

    def _projected(self, problem: Problem, s: _Bounded, z: Tensor, run: int) -> Tensor:
        """The biased step, eq. (9). Cost: 1 forward, and 1 backward for each candidate."""
        others = s.candidates
        if self.aimed:
            others = others[:, run : run + 1]
        p, q, onto, _ = _geometry(problem.threat)
        own, others = crossings(problem.goal, s.trail.output, others)
        plane = nearest_plane(problem, z, own, others, q)
        # Under L1 a few steep features decide, where a gradient of float32 leaves the rest too small to add up.
        working = torch.float64 if isinstance(problem.threat, L1) else torch.promote_types(z.dtype, torch.float32)
        x, at, w, low, high = (t.to(working).flatten(1) for t in (problem.x, z, plane.slope, *limits(problem)))
        value = plane.value.to(working)
        rise = torch.stack([-value, -(value + (w * (x - at)).sum(1))])
        from_z, from_x = both = onto(torch.stack([at, x]), w, rise, low, high)
        away, away_x = lengths(both.flatten(0, 1), p).clamp(min=1e-12).chunk(2)
        bias = (away / (away + away_x)).clamp(max=self.alpha)[:, None]
        if isinstance(problem.goal, Targeted):  # first meet every boundary of the target, without bias
            bias = bias.masked_fill(torch.isinf(s.size)[:, None], 0.0)
        moved = (1 - bias) * (at + self.eta * from_z) + bias * (x + self.eta * from_x)
        onward: Tensor = problem.threat.project(problem.x, moved.reshape(z.shape).to(z.dtype), problem.radius)
        return onward

    def _interpolated(self, problem: Problem, s: _Bounded, hit: Tensor) -> tuple[Tensor, _Bounded]:
        """The final search: where the margin, taken as linear between the two ends, is 0; a little beyond, to land outside."""
        begun = s.trail.looks > s.last + 1
        short = begun & torch.isfinite(s.size) & ~hit
        near = torch.where(rowwise(short, s.near), s.trail.z, s.near)
        score = torch.where(short, s.trail.score, s.near_score)
        share = (score / (score - s.far_score)).nan_to_num(nan=1.0).clamp(0, 1)
        z = near + per_sample(share + 0.02 * (1 - share), near) * (s.best - near)
        return problem.threat.project(problem.x, z, problem.radius), replace(s, near=near, near_score=score)


Onto = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _geometry(threat: Projects) -> tuple[float, float, Onto, float]:
    """(p, dual norm, projection, farthest start) of a threat."""
    for kind, known in _GEOMETRY.items():
        if isinstance(threat, kind):
            return known
    raise BadInput(f"threat '{threat.name}': FAB has no projection for it: use one of {', '.join(_NORMS)}")


def onto_plane(z: Tensor, w: Tensor, rise: Tensor, low: Tensor, high: Tensor, growth: Callable[[Tensor], Tensor]) -> Tensor:
    """The smallest change d (..., B, F) with <w, d> = rise (..., B) and low <= z + d <= high; as far as the box allows if it cannot be.

    In the useful direction feature i changes by min(t * growth_i, space_i), so <w, d> is concave and piecewise linear in t:
    Newton's iteration from below meets the plane after finitely many steps, usually a few. `growth` of |w| is |w| itself for
    L2, 1 for Linf. Several points z (..., B, F) may share the slopes w (B, F) of their planes.
    """
    weight, toward, space = _useful(z, w, rise, low, high)
    rate, goal, largest = growth(weight), rise.abs()[..., None], torch.finfo(w.dtype).max
    gain = weight * rate
    t = (goal / gain.sum(-1, keepdim=True)).nan_to_num(nan=0.0, posinf=largest)
    for _ in range(w.shape[-1]):
        full = t * rate
        change = torch.minimum(full, space)
        missing = goal - (weight * change).sum(-1, keepdim=True)
        left = (gain * (change == full)).sum(-1, keepdim=True)
        short = (missing > 4 * torch.finfo(t.dtype).eps * goal) & (left > 0)
        if not bool(short.any()):
            break
        t = torch.where(short, (t + missing / left).clamp(max=largest), t)
    return toward * change


def onto_plane_l1(z: Tensor, w: Tensor, rise: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`onto_plane` for L1: features by falling |w|, each up to its bound, until the plane is met.

    Where the box does not let it, those of |w| below the rounding of float32 stay: they lead far away, and no closer to the plane.
    """
    weight, toward, space = _useful(z, w, rise, low, high)
    sorted_weight, order = weight.sort(dim=-1, descending=True, stable=True)
    order = order.expand(z.shape)
    sorted_space, goal = space.gather(-1, order), rise.abs()[..., None]
    total = (sorted_weight * sorted_space).cumsum(-1)
    missing = (goal - torch.nn.functional.pad(total, (1, 0))[..., :-1]).clamp(min=0.0)
    sorted_change = torch.minimum(sorted_space, missing / sorted_weight.clamp(min=1e-300))
    if bool((beyond := total[..., -1:] < goal).any()):
        spared = beyond & (sorted_weight <= torch.finfo(torch.float32).eps * sorted_weight[..., :1])
        sorted_change = sorted_change.masked_fill(spared, 0.0)
    return toward * torch.zeros_like(space).scatter(-1, order, sorted_change)


def _useful(z: Tensor, w: Tensor, rise: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|w|, the sign of each feature's useful change, and how far it can go (0 where w is 0)."""
    toward = w.sign() * rise.sign()[..., None]
    space = torch.where(toward > 0, high - z, z - low).clamp(min=0.0)
    return w.abs(), toward, torch.where(toward != 0, space, 0.0)


def onto_plane_l2(z: Tensor, w: Tensor, rise: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`onto_plane` for L2."""
    return onto_plane(z, w, rise, low, high, lambda weight: weight)


def onto_plane_linf(z: Tensor, w: Tensor, rise: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`onto_plane` for Linf: every feature that w weighs moves alike."""
    return onto_plane(z, w, rise, low, high, lambda weight: (weight > 0).to(weight))


_GEOMETRY: dict[type, tuple[float, float, Onto, float]] = {
    Linf: (torch.inf, 1.0, onto_plane_linf, 0.3),
    L2: (2.0, 2.0, onto_plane_l2, 1.0),
    L1: (1.0, torch.inf, onto_plane_l1, 5.0),
}
