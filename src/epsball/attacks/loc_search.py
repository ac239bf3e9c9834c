"""LocSearchAdv: greedy local search; single pixels are probed near the last ones that helped, and the best are changed together."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from epsball.attacks.random_search import margin_or_entropy, worth
from epsball.attacks.registry import register
from epsball.attacks.sparse_rs import pixels
from epsball.attacks.square import as_image
from epsball.core import Attack, Objective, Problem, Projects, Reading, valid
from epsball.core.rows import Rows, rowwise
from epsball.core.threat import Z
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.threats import L0


@dataclass(frozen=True)
class OutOfTop:
    """k-misclassification: `labels` (B,) are not among the k highest scores; k = 1 is `Untargeted`. Its objective is `lead`."""

    labels: Tensor
    k: int = 1

    def reached(self, output: Tensor) -> Tensor:
        """True where k other scores or more are above the label's."""
        own = output.gather(1, self.labels[:, None])
        return ((output > own).sum(1) >= self.k) & valid(output)

    def take(self, rows: Rows) -> OutOfTop:
        """Rows of the labels."""
        return OutOfTop(self.labels[rows], self.k)


def lead(problem: Problem, z: Z, x_adv: Tensor, output: Tensor) -> Tensor:
    """How far the k-th highest of the other scores is ahead of the label's, for `OutOfTop`; else `margin_or_entropy`."""
    goal = problem.goal
    if not isinstance(goal, OutOfTop):
        return margin_or_entropy(problem, z, x_adv, output)
    own = goal.labels[:, None]
    others = output.scatter(1, own, -torch.inf).topk(min(goal.k, output.shape[1]), dim=1).values[:, -1]
    return others - output.gather(1, own).squeeze(1)


@register(paper="Narodytska & Kasiviswanathan 2017, arXiv 1612.06299", access=Access.SCORES, threats=("l0", "l0f"), cost="steps forwards")
def loc_search(
    steps: int = 5000,
    p: float = -0.5,
    r: float | None = None,
    d: int = 5,
    t: int = 5,
    probes: int = 32,
    threat: Projects | None = None,
    objective: Objective = lead,
) -> Attack:
    """LocSearchAdv: greedy local search over pixels, Narodytska & Kasiviswanathan 2017, arXiv 1612.06299, section 5.

    A round probes single pixels in squares around those that it changed last, each set to Pert(v) = p sign(v), v in widths of
    the box from its middle, and cut to it; the t of most worth are changed together. Worth is the objective.

    Args:
        steps: queries per sample. p: a probe's value; -1/2 is the far end of the box, 1/2 or more the near one.
        r: pixels that are changed get Cyclic(r, v): r v, less or plus a width where that leaves the box, 0 .. 2; None keeps
        the probed value. d: half the side of a square. t: pixels changed per round. probes: pixels probed per round,
        1 or more; fewer where steps allow no round. threat: L0, pixels or features.

    Returns:
        The attack; its name is `loc_search`. The goal may be `OutOfTop(labels, k)`, the paper's k-misclassification.

    Raises:
        BadInput: numbers out of their range, or another threat.

    Cost: at most steps forwards (1 where steps is 0), no backward: probes + 1 per round.

    Differs from the paper: values stay in the box; at most floor(radius) pixels change: once as many have, each probe puts a
    random one of them back. Of the t only those are changed whose probes gained, all t where none did. What is no gain is taken
    back, and the next round probes random pixels, as the first does; squares that are too small are filled up with them. The
    margin takes the place of the label's probability (the cross-entropy toward a target). The paper's p lies outside the box
    and its r is 3/2; the far end of the box, kept, breaks more.
    """
    if steps < 0:
        raise BadInput(f"steps: {steps}: must be 0 or more")
    if not math.isfinite(p) or p == 0:
        raise BadInput(f"p: {p}: must be a finite number other than 0")
    if r is not None and not 0 <= r <= 2:
        raise BadInput(f"r: {r}: must lie in 0 .. 2, or be None")
    for name, value, least in (("d", d, 0), ("t", t, 1), ("probes", probes, 1)):
        if value < least:
            raise BadInput(f"{name}: {value}: must be {least} or more")
    threat = threat or L0()
    if not isinstance(threat, L0):
        raise BadInput(f"threat '{threat.name}': counts no pixels: use l0 or l0f")
    probes = max(min(probes, steps - 2), 1)
    rounds = max(steps - 1, 0) // (probes + 1)
    return replace(Attack("loc_search", threat, objective, LocalSearch(p, r, d, t, probes), rounds), access=Access.SCORES)


@dataclass(frozen=True)
class Round:
    """`z` is asked next; `best` (B, ...) and its worth (B,) so far; `centers` (B, S) bool: sites whose squares are probed next."""

    z: Tensor
    best: Tensor
    worth: Tensor
    centers: Tensor
    number: int


@dataclass(frozen=True)
class LocalSearch:
    """See `loc_search`. A site is a pixel, or a feature under l0f; their number is S."""

    p: float
    r: float | None
    d: int
    t: int
    probes: int

    def init(self, problem: Problem, steps: int) -> Round:
        """At the clean input, whose answer is known."""
        if not bool(torch.isfinite(_interval(problem)[2]).all()):
            raise BadInput("box: infinite: local search needs its ends: declare the box of the model")
        x = problem.threat.start(problem.x, problem.radius, None, problem.ids)
        known = worth(problem, Reading(x, problem.x, problem.clean, problem.objective(problem, x, problem.x, problem.clean)))
        nowhere = torch.zeros_like(pixels(problem.threat, x)[:, 0], dtype=torch.bool)
        return Round(x, x, known, nowhere, 0)

    def step(self, problem: Problem, state: Round) -> tuple[Reading, Round]:
        """The set of the last round, then single pixels beside the better of it and the best."""
        n, key = len(problem), problem.key.fold("round", state.number)
        reading = problem.judge(state.z)
        found = worth(problem, reading)
        better = found > state.worth
        best, value = torch.where(rowwise(better, state.z), state.z, state.best), torch.where(better, found, state.worth)
        chosen = self._sites(problem, best, state.centers, key.fold("sites").uniform(problem.ids, state.centers.float()))
        count = chosen.shape[1]
        dropped = self._dropped(problem, best, key.fold("drop").uniform(problem.ids, chosen.float()))
        rows = torch.arange(n, device=best.device)
        part = problem.take(rows.repeat_interleave(count))
        there = best.repeat_interleave(count, 0)
        probed = self._changed(part, there, self._probe(part, there), chosen.flatten()[:, None], dropped.flatten()[:, None])
        answer = part.judge(probed)
        gains = worth(part, answer).reshape(n, count)
        top = gains.topk(min(self.t, count), dim=1).indices
        first, gain = rows * count + top[:, 0], gains.gather(1, top[:, :1]).squeeze(1)
        helped = gain > value
        top = torch.where((gains.gather(1, top) > value[:, None]) | ~helped[:, None], top, top[:, :1])
        new = self._changed(problem, best, self._kept(problem, best), chosen.gather(1, top), dropped.gather(1, top))
        centers = torch.zeros_like(state.centers).scatter(1, chosen.gather(1, top), helped[:, None].expand_as(top))
        wide = rowwise(helped, best)
        after = Round(new, torch.where(wide, answer.z[first], best), torch.where(helped, gain, value), centers, state.number + 1)
        one = Reading(answer.z[first], answer.x_adv[first], answer.output[first], answer.score[first])
        return _either(gain > found, one, reading), after

    def _sites(self, problem: Problem, best: Tensor, centers: Tensor, drawn: Tensor) -> Tensor:
        """(B, P) sites to probe: at random, those in squares around the centers first, changed ones last of all."""
        shape = as_image(problem.x).shape
        grid = centers.float().reshape(len(best), 1, -1, shape[3])
        near = F.max_pool2d(grid, 2 * self.d + 1, stride=1, padding=self.d).flatten(1)
        low, high = problem.threat.room.interval(problem.x)  # type: ignore[attr-defined]
        free = pixels(problem.threat, low < high).any(1) & ~_differs(problem, best)
        chance = drawn + near + 4.0 * free
        return chance.topk(min(self.probes, chance.shape[1]), dim=1).indices

    def _dropped(self, problem: Problem, best: Tensor, drawn: Tensor) -> Tensor:
        """(B, P) changed sites, drawn evenly, that probes put back; -1 while another may change."""
        changed = _differs(problem, best)
        many = changed.sum(1, keepdim=True)
        order = changed.long().argsort(dim=1, descending=True, stable=True)
        place = (drawn.double() * many).long().clamp(max=changed.shape[1] - 1)
        full = (many >= problem.radius.floor()[:, None]) & (many > 0)
        return torch.where(full, order.gather(1, place), -1)

    def _changed(self, problem: Problem, best: Tensor, values: Tensor, chosen: Tensor, dropped: Tensor) -> Tensor:
        """`best` with the sites `chosen` (B, K) set to `values`, those `dropped` put back, and others where they are too many."""
        sites = torch.zeros_like(_differs(problem, best), dtype=torch.int64)
        put = sites.scatter(1, chosen, 1) > 0
        back = (sites.scatter_add(1, dropped.clamp(min=0), (dropped >= 0).long()) > 0) & ~put
        changed = (_differs(problem, best) & ~back) | put
        rank = (changed.long() + put).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        changed &= rank < problem.radius.floor()[:, None]
        z = torch.where(_wide(problem, put), values, best)
        made: Tensor = torch.where(_wide(problem, changed), z, problem.x)
        return made

    def _probe(self, problem: Problem, z: Tensor) -> Tensor:
        """Pert: p sign(v) at every feature, cut to the box."""
        low, high, middle = _interval(problem)
        side = torch.where(z >= middle, 1.0, -1.0).to(z.dtype)
        return (middle + self.p * (high - low) * side).clamp(low, high)

    def _kept(self, problem: Problem, z: Tensor) -> Tensor:
        """What a changed feature becomes: Cyclic(r, v), or the probed value."""
        if self.r is None:
            return self._probe(problem, z)
        low, high, middle = _interval(problem)
        value = self.r * (z - middle)
        value = torch.where(value.abs() > (high - low) / 2, value - value.sign() * (high - low), value)
        return (middle + value).clamp(low, high)


def _interval(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper end of every feature, and the middle."""
    low, high = problem.threat.room.interval(problem.x)  # type: ignore[attr-defined]
    return low, high, low + (high - low) / 2


def _differs(problem: Problem, z: Tensor) -> Tensor:
    """(B, S) bool: sites that are not those of x."""
    return pixels(problem.threat, z != problem.x).any(1)


def _wide(problem: Problem, sites: Tensor) -> Tensor:
    """(B, S) over the features."""
    return sites[:, None, :].expand_as(pixels(problem.threat, problem.x)).reshape(problem.x.shape)


def _either(first: Tensor, one: Reading, other: Reading) -> Reading:
    """Rows of `one` where `first` (B,), of `other` elsewhere."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(first.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return Reading(pick(one.z, other.z), pick(one.x_adv, other.x_adv), pick(one.output, other.output), pick(one.score, other.score))
