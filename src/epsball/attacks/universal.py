"""One change for all inputs. Its own outer loops over the same parts: a base attack per sample, or one shared gradient.

The change is additive: every input gets clip(x + delta), delta within an Lp ball around 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from epsball.core import AttackLike, Goal, Key, Model, Objective, Problem, Tally, Untargeted, Victim, autograd
from epsball.core.attack import check_inputs, recipe
from epsball.core.random import content_ids
from epsball.core.rows import moved
from epsball.core.threat import Z
from epsball.objectives import margin
from epsball.threats import L2, Linf
from epsball.threats.compose import Added


@dataclass(frozen=True)
class Universal:
    """What a fit leaves behind.

    Attributes:
        delta: the change, of the shape of one input. size: its norm, float64. fooled: (N,) bool, fit inputs whose label it
            changes. passes: over the fit set. queries, backwards: rows spent in all.
    """

    delta: Tensor
    size: float
    fooled: Tensor
    passes: int
    queries: int
    backwards: int

    @property
    def rate(self) -> float:
        """Fooling rate on the fit set."""
        return float(self.fooled.double().mean())


def applied(victim: Victim, x: Tensor, delta: Tensor) -> Tensor:
    """clip(x + delta) for every row."""
    return Added(Linf(), victim.box).apply(x, delta.to(x).expand_as(x))


def fooled(model: Model, x: Tensor, delta: Tensor, tally: Tally | None = None) -> Tensor:
    """(N,) bool: whose top class is another with `delta` than without, whatever the true label. Cost: 2 forwards per input."""
    victim = Victim.of(model)
    x, tally = moved(x, victim.device), tally or Tally.zeros(len(x))
    return Untargeted(victim.outputs(x, tally).argmax(1)).reached(victim.outputs(applied(victim, x, delta), tally))


def fooling_rate(model: Model, x: Tensor, delta: Tensor) -> float:
    """The share of `fooled` inputs; measure it on inputs that `delta` was not fitted on. Cost: 2 forwards per input."""
    return float(fooled(model, x, delta).double().mean())


def cross_model_table(models: Mapping[str, Model], deltas: Mapping[str, Tensor], x: Tensor) -> dict[str, dict[str, float]]:
    """table[fitted on][measured on] = fooling rate on x. Cost: 2 forwards per input, model and delta."""
    return {source: {name: fooling_rate(model, x, delta) for name, model in models.items()} for source, delta in deltas.items()}


@dataclass(frozen=True)
class Fit:
    """The fit set and the books: what both searches share. `labels` (N,) are the model's own answers."""

    victim: Victim
    x: Tensor
    labels: Tensor
    clean: Tensor
    ids: Tensor
    threat: Added
    radius: float
    key: Key
    tally: Tally

    @staticmethod
    def open(model: Model, x: Tensor, radius: float, norm: Linf | L2, key: Key) -> Fit:
        """Checks the inputs and asks for the clean answers."""
        victim = Victim.of(model)
        x, tally = moved(x, victim.device), Tally.zeros(len(x))
        check_inputs(victim, x, Untargeted(torch.zeros(len(x))), radius)
        clean = victim.outputs(x, tally)
        return Fit(victim, x, clean.argmax(1), clean, content_ids(x), Added(norm).within(victim.box), radius, key, tally)

    def zero(self) -> Tensor:
        """No change."""
        return torch.zeros_like(self.x[0])

    def project(self, delta: Tensor) -> Tensor:
        """The nearest delta within the radius."""
        radius = torch.tensor([self.radius], dtype=torch.float64, device=delta.device)
        return self.threat.project(self.x[:1], delta[None], radius)[0]

    def order(self, number: int) -> Tensor:
        """(N,) the rows in the order of one pass: keyed by content, so that the order of x does not matter."""
        return self.key.fold("order", number).uniform(self.ids, self.x.flatten(1)[:, :1].double()).squeeze(1).argsort(stable=True)

    def fooled(self, delta: Tensor) -> Tensor:
        """(N,) bool. Cost: 1 forward per input."""
        return Untargeted(self.labels).reached(self.victim.outputs(applied(self.victim, self.x, delta), self.tally))

    def problem(self, rows: Tensor, goal: Goal, objective: Objective) -> Problem:
        """Some rows under the shared threat."""
        radius = torch.full((len(rows),), self.radius, dtype=torch.float64, device=self.x.device)
        x, ids, clean, tally = self.x[rows], self.ids[rows], self.clean[rows], self.tally.take(rows)
        return Problem(self.victim, x, goal, self.threat, objective, radius, ids, clean, self.key, tally)

    def result(self, delta: Tensor, hit: Tensor, passes: int) -> Universal:
        """What is handed back."""
        size = float(self.threat.size(self.x[:1], delta[None])[0])
        return Universal(delta, size, hit, passes, int(self.tally.forwards.sum()), int(self.tally.backwards.sum()))


@dataclass(frozen=True, repr=False)
class Clipped:
    """An objective that stops counting above `top`: its gradient is zero there."""

    objective: Objective
    top: float

    def __call__(self, problem: Problem, z: Z, x_adv: Tensor, output: Tensor) -> Tensor:
        """(B,) score."""
        return self.objective(problem, z, x_adv, output).clamp(max=self.top)

    def __repr__(self) -> str:
        return recipe(self)


@dataclass(frozen=True, repr=False)
class UniversalSum:
    """Moosavi-Dezfooli et al. 2017, arXiv 1610.08401, Algorithm 1: a running sum of per-sample changes, projected each time.

    Each mini-batch, under the current delta, is attacked by `base` wherever delta does not fool it yet; the changes found are
    added to delta, and delta is projected. `batch_size` 1 is the paper's loop, one sample after another; larger batches ask
    `base` for many samples at once and project once for all of them.

    Attributes:
        base: any attack, under its own threat (the paper: DeepFool, L2). norm: of delta, Linf or L2.
        reach: radius that `base` may use, in its own unit, as a share of that of delta; infinity for DeepFool's.
        rate: stop once this share of the fit set is fooled (paper: 0.8). passes: at most (code: no limit); the best counts.
    """

    base: AttackLike
    norm: Linf | L2
    rate: float = 0.8
    passes: int = 10
    batch_size: int = 32
    reach: float = 1.0

    def __call__(self, model: Model, x: Tensor, radius: float, seed: int | Key = 0) -> Universal:
        """Fits delta on x (N, ...); labels are the model's own answers.

        Cost: 1 forward per input; per pass 2 forwards per input, and the base attack's cost for those not fooled yet.
        """
        fit = Fit.open(model, x, radius, self.norm, Key.of(seed).fold("universal_sum"))
        delta = best = fit.zero()
        most, number = torch.zeros(len(x), dtype=torch.bool, device=fit.x.device), 0
        with fit.victim:
            while number < self.passes and float(most.double().mean()) < self.rate:
                for rows in torch.split(fit.order(number), self.batch_size):
                    delta = self._batch(fit, delta, rows, number)
                hit, number = fit.fooled(delta), number + 1
                if int(hit.sum()) > int(most.sum()):
                    best, most = delta, hit
        return fit.result(best, most, number)

    def _batch(self, fit: Fit, delta: Tensor, rows: Tensor, number: int) -> Tensor:
        there = applied(fit.victim, fit.x[rows], delta)
        tally = fit.tally.take(rows)
        output = fit.victim.outputs(there, tally)
        left = (~Untargeted(fit.labels[rows]).reached(output)).nonzero().squeeze(1)
        if not len(left):
            return delta
        key = fit.key.fold("pass", number)
        reach = fit.radius * self.reach
        found = self.base(fit.victim, there[left], fit.labels[rows[left]], reach, key, clean=output[left])
        spent = tally.take(left).rows
        fit.tally.forwards.index_add_(0, spent, found.queries)
        fit.tally.backwards.index_add_(0, spent, found.backwards)
        change = (found.x_adv - there[left])[found.reached]
        return fit.project(delta + change.sum(0))

    def __repr__(self) -> str:
        return recipe(self)


@dataclass(frozen=True, repr=False)
class UniversalGradient:
    """One shared delta climbed by mini-batches: delta <- P(delta + step * radius * steepest(sum of per-sample gradients)).

    The stochastic gradient form (Shafahi et al. 2020, arXiv 1811.11304, Algorithm 2) with the paper's clipping of each
    sample's score at `clip`, so that inputs already fooled do not pull; objective and clip are in logits. The step falls
    linearly to a tenth over the passes.
    """

    norm: Linf | L2
    objective: Objective = margin
    passes: int = 10
    batch_size: int = 64
    step: float = 0.2
    clip: float = 5.0

    def __call__(self, model: Model, x: Tensor, radius: float, seed: int | Key = 0, goal: Goal | None = None) -> Universal:
        """Fits delta on x (N, ...), against the model's own answers unless a goal (N rows) is given.

        Cost: per input `passes` forwards and backwards, and 2 forwards.
        """
        fit = Fit.open(model, x, radius, self.norm, Key.of(seed).fold("universal_gradient"))
        aim = Untargeted(fit.labels) if goal is None else moved(goal, fit.victim.device)
        delta = fit.zero()
        with fit.victim:
            for number in range(self.passes):
                size = self.step * fit.radius * (1 - 0.9 * number / max(self.passes - 1, 1))
                for rows in torch.split(fit.order(number), self.batch_size):
                    problem = fit.problem(rows, aim.take(rows), Clipped(self.objective, self.clip))
                    slopes = autograd(problem, delta.expand_as(problem.x)).gradient
                    total = torch.nan_to_num(slopes, nan=0.0, posinf=0.0, neginf=0.0).sum(0, keepdim=True)
                    delta = fit.project(delta + size * fit.threat.steepest(problem.x[:1], delta[None], total)[0])
            hit = fit.fooled(delta)
        return fit.result(delta, hit, self.passes)

    def __repr__(self) -> str:
        return recipe(self)
