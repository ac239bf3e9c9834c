"""Feature by feature: what every feature could do alone, over all the values that it may take, then the best of that within the budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.minimal import limits, offered
from epsball.attacks.random_search import margin_or_entropy, worth
from epsball.attacks.registry import register
from epsball.core import Attack, Objective, Problem, Projects, Reading, Untargeted, valid
from epsball.core.rows import rowwise
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.threats import L1, L2, Linf

VALUES = 8
"""Values of a feature that a round asks for, unless told."""
_GUARD = 1 - 1e-5
"""Share of the radius that is given out: what single precision may be off by when it sums up a change."""
_TOGETHER = 256
"""Most values that one look asks for one sample."""
_RIVALS, _AIMS = 31, 9
"""Most other classes whose leads are kept, the best on the clean input; most of them that a round's changes are put together for."""
_LEAST = 1e-5
"""What counts as gain, beside 1 and the score: less may be rounding."""
_KEPT = 6
"""Rounds of values that are known of a feature at most."""
_HALVINGS = 40
"""Of the interval of prices."""
_FILLS = 3
"""Features that get what the budget has left, one after another."""
_NEVER = 1e30
"""Nobody takes a value that gains less than nothing by so much: it was not asked, or gave no number."""


@dataclass(frozen=True)
class _Swept:
    """Where a search stands: at z (B, ...), of that worth (B,), after so many rounds (`turn`) and queries (`asked`), `idle` (B,) rounds
    behind its last gain. `leads` (B, W) are the score and the leads of the rivals there. Features come in `order` (B, D); of this
    round's first `done`, `gains` (B, K, V, W) are what their `values` (B, K, V) add to the leads.
    """

    z: Tensor
    worth: Tensor
    leads: Tensor
    rivals: Tensor
    idle: Tensor
    order: Tensor
    values: Tensor
    gains: Tensor
    done: int = 0
    turn: int = 0
    asked: int = 0


@dataclass(frozen=True)
class Sweep:
    """Rounds of two kinds of looks: at single features changed to one value after another, and at many changed together.

    The values of a feature are spread over all that it may take, on both sides of the clean one, densest near it where changes share a
    budget; from the second round on at places drawn anew, the ends and the clean one among them; where a round gained nothing, between
    those neighbors between which most happens, beside the known ones.

    The answers tell what each change does to the lead of every other class. For each of those the changes are put together that have the
    largest sum of gains within the budget: by a price per unit of it (Everett 1963), halved into place, and what is left goes to whoever
    gains most by it. The classes that come nearest so are asked; of the first, and of the score itself, also the best half of the features,
    the best quarter and so on. The best point is kept. Where scores are sums over features that is the optimum, up to the grid and one
    feature's share; steps, jumps and answers that are no numbers are no obstacle. Of many features a round takes as many as half of the
    queries allow, others in the next.

    Attributes:
        queries: most forwards per sample. values: per feature and round, an even number. patience: rounds in a row without gain that
            end a search.
    """

    queries: int
    values: int
    patience: int = 6

    def init(self, problem: Problem, steps: int) -> _Swept:
        """At the clean input."""
        x = problem.x.flatten(1)
        order = problem.key.fold("order").uniform(problem.ids, x.float()).argsort(1)
        blank = x.new_zeros(len(x), min(x.shape[1], self.queries // (2 * self.values)), self.values)
        here = Reading(problem.x, problem.x, problem.clean, problem.clean_score)
        rivals = _rivals(problem)
        leads = _leads(problem, here, rivals)
        gains = leads.new_zeros(*blank.shape, leads.shape[1])
        idle = torch.zeros_like(problem.ids)
        return self._opened(problem, _Swept(problem.x, here.score.double(), leads, rivals, idle, order, blank, gains))

    def step(self, problem: Problem, state: _Swept) -> tuple[Reading, _Swept]:
        """Some single features, or what the round makes of them."""
        reading, state = self._singly(problem, state) if state.done < state.values.shape[1] else self._together(problem, state)
        left = state.values.shape[1] - state.done
        most = self.values * min(self._chunk, left) if left else min(_AIMS, state.leads.shape[1]) + 2 * _halves(state)
        return replace(reading, over=(state.idle >= self.patience) | (state.asked + most > self.queries)), state

    @property
    def _chunk(self) -> int:
        """Features that one look asks about."""
        return max(1, _TOGETHER // self.values)

    def _opened(self, problem: Problem, state: _Swept, moved: Tensor | None = None) -> _Swept:
        """A new round's values; beside what is known of the same features where z has not moved (B,)."""
        places, half, x = _places(state)[..., None], self.values // 2, problem.x.flatten(1)[..., None]
        x, low, high = (end.gather(1, places) for end in (x, *(end.flatten(1)[..., None] for end in limits(problem))))
        share = torch.arange(half, device=x.device).repeat(2).to(x).expand(*x.shape[:2], self.values)
        drawn = torch.ones_like(share) if moved is None else problem.key.fold("values", state.turn).uniform(problem.ids, share)
        drawn[..., [half - 1, self.values - 1]] = 1.0  # the ends are always among them
        share = share + drawn
        share = share / half if isinstance(problem.threat, Linf) else (share / half).square() * _GUARD**2
        radius, (down, up) = problem.radius.to(x)[:, None, None], share.tensor_split(2, -1)
        values = torch.cat([x - down * torch.minimum(radius, x - low), x + up * torch.minimum(radius, high - x)], 2)
        gains = state.gains.new_full((*values.shape, state.leads.shape[1]), -torch.inf)
        if moved is not None and half > 1:
            values[..., :1] = x
        if moved is not None and values.shape[1] == state.order.shape[1]:
            some = slice((1 - _KEPT) * self.values, None)
            known = state.gains.masked_fill(moved[:, None, None, None], -torch.inf)
            between = _between(state.z.flatten(1).gather(1, places[..., 0]), state.values, known, values)
            values, gains = torch.cat([state.values[:, :, some], between], 2), torch.cat([known[:, :, some], gains], 2)
        return replace(state, values=values, gains=gains, done=0)

    def _singly(self, problem: Problem, state: _Swept) -> tuple[Reading, _Swept]:
        some = slice(state.done, state.done + self._chunk)
        values = state.values[:, some, -self.values :]
        places = _places(state)[:, some, None].expand_as(values)
        n, tries = len(values), values[0].numel()
        points = state.z.flatten(1)[:, None].repeat(1, tries, 1).scatter_(2, places.reshape(n, tries, 1), values.reshape(n, tries, 1))
        reading, _, leads = _judged(problem, points, state.rivals)
        gains = state.gains.clone()
        gains[:, some, -self.values :] = (leads - state.leads[:, None]).reshape(*values.shape, -1)
        return reading, replace(state, gains=gains, done=state.done + values.shape[1], asked=state.asked + tries)

    def _together(self, problem: Problem, state: _Swept) -> tuple[Reading, _Swept]:
        places, x, z = _places(state), problem.x.flatten(1), state.z.flatten(1)
        values = torch.cat([z.gather(1, places)[..., None], state.values], 2)
        known = torch.nan_to_num(state.gains, -_NEVER, _NEVER, -_NEVER)
        gains = torch.cat([torch.zeros_like(known[:, :, :1]), known], 2).movedim(3, 1)
        cost = _cost(problem, values - x.gather(1, places)[..., None])
        elsewhere = _cost(problem, z - x).sum(1) - cost[..., 0].sum(1)
        budget = _GUARD * (_GUARD * problem.radius.square() if isinstance(problem.threat, L2) else problem.radius) - elsewhere
        picks = _picked(state.leads, gains, cost, budget, _halves(state))
        chosen = values[:, None].expand(-1, picks.shape[1], -1, -1).gather(3, picks[..., None])[..., 0]
        points = z[:, None].repeat(1, picks.shape[1], 1).scatter_(2, places[:, None].expand_as(chosen), chosen)
        part = problem.take(torch.arange(len(z), device=z.device).repeat_interleave(picks.shape[1]))
        points = part.threat.project(part.x, points.reshape(part.x.shape), part.radius).reshape(points.shape)
        reading, worths, _ = _judged(problem, points, state.rivals)
        best = worths.amax(1)
        better = best > state.worth + _LEAST * (1 + state.worth.abs())
        leads = torch.where(better[:, None], _leads(problem, reading, state.rivals), state.leads)
        z, score = torch.where(rowwise(better, state.z), reading.z, state.z), torch.where(better, best, state.worth)
        idle = torch.where(better, torch.zeros_like(state.idle), state.idle + 1)
        asked = state.asked + points.shape[1]
        after = replace(state, z=z, worth=score, leads=leads, idle=idle, turn=state.turn + 1, asked=asked)
        return reading, self._opened(problem, after, better)


def _places(state: _Swept) -> Tensor:
    """(B, K): this round's features."""
    count = state.values.shape[1]
    return state.order.roll(-state.turn * count, 1)[:, :count]


def _halves(state: _Swept) -> int:
    """How often this round's features can be halved."""
    return state.values.shape[1].bit_length() - 1


def _between(now: Tensor, values: Tensor, gains: Tensor, fresh: Tensor) -> Tensor:
    """(B, K, V): values between two neighbors of (B, K, M), half of them for each of the pairs where most happens, else `fresh` (B, K, V).

    Args:
        now: (B, K) what the features are. gains: (B, K, M, W), minus infinity where nothing is known.
    """
    known = torch.isfinite(gains).all(3)
    at, order = torch.cat([now[..., None], values.masked_fill(~known, torch.inf)], 2).sort(2)
    told = torch.cat([torch.zeros_like(gains[:, :, :1]), gains.masked_fill(~known[..., None], 0.0)], 2)
    told = told.gather(2, order[..., None].expand_as(told))
    happens = told.diff(dim=2).abs().amax(3).clamp(max=_NEVER) * torch.nan_to_num(at.diff(dim=2), nan=0.0, posinf=0.0)
    most, gap = happens.topk(2, 2)
    share = torch.linspace(0, 1, fresh.shape[2] // 2 + 2).to(fresh)[1:-1].repeat(2)
    low, high, some = (read.repeat_interleave(fresh.shape[2] // 2, 2) for read in (at.gather(2, gap), at.gather(2, gap + 1), most > 0))
    return torch.where(some, low + share * (high - low), fresh)


def _rivals(problem: Problem) -> Tensor:
    """(B, W): the other classes of an untargeted search, best first; (B, 0) of other searches."""
    if not isinstance(problem.goal, Untargeted):
        return problem.ids[:, None][:, :0]
    others = problem.clean.scatter(1, problem.goal.labels[:, None], -torch.inf)
    return others.topk(min(_RIVALS, others.shape[1] - 1), 1).indices


def _leads(problem: Problem, reading: Reading, rivals: Tensor) -> Tensor:
    """(B, W): the score, then by how much each rival leads the label; minus infinity where an answer is no number."""
    leads = reading.score[:, None].double()
    if rivals.shape[1] and isinstance(problem.goal, Untargeted):
        others = reading.output.gather(1, rivals) - reading.output.gather(1, problem.goal.labels[:, None])
        leads = torch.cat([leads, others.double()], 1)
    return leads.masked_fill(~valid(reading.output)[:, None], -torch.inf)


def _judged(problem: Problem, points: Tensor, rivals: Tensor) -> tuple[Reading, Tensor, Tensor]:
    """Of points (B, T, D): what was read at each sample's best, what all are worth (B, T), and the leads at all (B, T, W).

    Points outside the ball tell as much of single features as those inside, but are never the best.
    """
    n, tries = points.shape[:2]
    rows = torch.arange(n, device=points.device)
    part = problem.take(rows.repeat_interleave(tries))
    there = part.judge(points.reshape(part.x.shape))
    inside = part.threat.size(part.x, there.z) <= part.radius
    worths = worth(part, there).masked_fill(~inside, -torch.inf).reshape(n, tries)
    best = worths.argmax(1) + tries * rows
    leads = _leads(part, there, rivals.repeat_interleave(tries, 0)).reshape(n, tries, -1)
    found = Reading(*(read[best] for read in (there.z, there.x_adv, there.output, there.score)))
    return offered(problem, found, inside[best]), worths, leads


def _picked(leads: Tensor, gains: Tensor, cost: Tensor, budget: Tensor, halves: int) -> Tensor:
    """(B, T, K) values of each feature: the best sums for the leads that they make largest; of fewer features for the first and the score.

    Args:
        leads: (B, W) now. gains: (B, W, K, V) of values, number 0 what a feature has. cost: (B, K, V) and budget: (B,) in its unit.
        halves: how often the features are halved.
    """
    n, ways, count, _ = gains.shape
    every = _allotted(gains.flatten(0, 1), cost.repeat_interleave(ways, 0), budget.repeat_interleave(ways)).view(n, ways, count)
    promised = leads + gains.gather(3, every[..., None]).flatten(2).sum(2)
    aims = promised.topk(min(_AIMS, ways), 1).indices
    picks = [every.gather(1, aims[..., None].expand(-1, -1, count))]
    first = gains.gather(1, aims[:, :1, None, None].expand(-1, -1, *gains.shape[2:])).squeeze(1)
    moved = torch.arange(gains.shape[3], device=gains.device) > 0
    for some in (first, gains[:, 0]):
        rank = some.amax(2).argsort(1, descending=True).argsort(1)
        for number in range(1, halves + 1):
            stays = (rank >= count >> number)[..., None] & moved
            picks.append(_allotted(some.masked_fill(stays, -_NEVER), cost, budget)[:, None])
    return torch.cat(picks, 1)


def of_rounds(rounds: int, features: int) -> int:
    """Queries that suffice for so many rounds of a sweep of so many features."""
    return rounds * (VALUES * features + _AIMS + 2 * features.bit_length())


def _cost(problem: Problem, change: Tensor) -> Tensor:
    """What changes of single features take of the budget, float64; under Linf nothing."""
    if isinstance(problem.threat, Linf):
        return torch.zeros_like(change, dtype=torch.float64)
    return change.double().abs() if isinstance(problem.threat, L1) else change.double().square()


def _allotted(gains: Tensor, cost: Tensor, budget: Tensor) -> Tensor:
    """(B, K): which of its V values each feature takes, for a large sum of gains (B, K, V) whose costs (B, K, V) fit the budget (B,).

    Number 0 is what a feature has, and all of these together must fit.
    """
    picks = _priced(gains, cost, budget)
    for _ in range(_FILLS):
        have, paid = gains.gather(2, picks[..., None]), cost.gather(2, picks[..., None])
        left = (budget - paid.flatten(1).sum(1))[:, None, None]
        most, place = (gains - have).masked_fill(cost - paid > left, -torch.inf).flatten(1).max(1)
        rows = (most > 0).nonzero().squeeze(1)
        picks[rows, place[rows] // gains.shape[2]] = place[rows] % gains.shape[2]
    return picks


def _priced(gains: Tensor, cost: Tensor, budget: Tensor) -> Tensor:
    """Each feature's best value at the lowest price of a unit of budget at which all of them fit; else what it has."""

    def at(price: Tensor) -> tuple[Tensor, Tensor]:
        picks = (gains - price[:, None, None] * cost).argmax(2)
        return picks, cost.gather(2, picks[..., None]).flatten(1).sum(1)

    picks, spent = at(torch.zeros_like(budget))
    fits = spent <= budget
    picks = torch.where(fits[:, None], picks, torch.zeros_like(picks))
    low, high = torch.full_like(budget, -40.0), torch.full_like(budget, 40.0)  # logarithms of prices
    for _ in range(0 if bool(fits.all()) else _HALVINGS):
        middle = (low + high) / 2
        found, spent = at(middle.exp())
        fit = spent <= budget
        picks = torch.where((fit & ~fits)[:, None], found, picks)
        low, high = torch.where(fit, low, middle), torch.where(fit, middle, high)
    return picks


@register(
    paper="epsball; prices: Everett 1963, doi 10.1287/opre.11.3.399",
    access=Access.SCORES,
    threats=("linf", "l2", "l1"),
    cost="at most queries forwards",
)
def sweep(queries: int = 5000, threat: Projects | None = None, objective: Objective = margin_or_entropy, values: int = VALUES) -> Attack:
    """Every feature alone over all its values, then the best of these together within the budget, round after round (`Sweep`).

    For tables, and for models that go in steps: trees, rules, bins, values that are filled in.

    Args:
        queries: most forwards per sample. threat: Linf, L2 or L1; Linf unless given. objective: what is climbed; cross-entropy toward
            a target, else the margin. values: per feature and round, an even number.

    Raises:
        BadInput: another threat, an odd number of values or none, or fewer queries than twice as many.

    Cost: at most `queries` forwards, no backward; a round of D features takes `values` * D, up to 9, and twice the binary digits of D.

    >>> sweep(100).name
    'sweep'
    """
    if values < 2 or values % 2:
        raise BadInput(f"values: {values}: must be an even number, 2 or more: half of them lie below the clean one")
    if queries < 2 * values:
        raise BadInput(f"queries: {queries}: must be {2 * values} or more for {values} values of a feature")
    threat = threat or Linf()
    if not isinstance(threat, Linf | L2 | L1):
        raise BadInput(f"threat '{threat.name}': has no budget that features share: use linf, l2 or l1")
    return replace(Attack("sweep", threat, objective, Sweep(queries, values), queries), access=Access.SCORES)
