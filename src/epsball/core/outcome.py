"""What an attack leaves behind, one row per sample, and the only rule by which one result is better than another."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from epsball.core.goal import valid
from epsball.core.problem import Problem, Reading
from epsball.core.rows import per_sample


@dataclass(frozen=True)
class Outcome:
    """Results for B samples.

    Attributes:
        x_adv: (B, ...) best input found; the clean input itself where nothing was found at all. z: (B, ...) the adversary's
            variable that made it; the same as `x_adv` for additive threats.
        reached: (B,) bool, as judged on the model's answer. size: (B,) float64, 0 where nothing changed.
        score: (B,) objective of `x_adv`. queries, backwards: (B,) int64 rows spent. steps: moves allowed.
        flags: named (B,) bool; `invalid` marks samples for which the model answered NaN or infinity at least once.
    """

    x_adv: Tensor
    z: Tensor
    reached: Tensor
    size: Tensor
    score: Tensor
    queries: Tensor
    backwards: Tensor
    steps: int
    flags: dict[str, Tensor] = field(default_factory=dict)


class Best:
    """The best answer so far for every sample of a problem: the memory of `run`.

    Two orders: at a fixed budget (reached, score), in a search for the smallest change (reached, size).
    """

    def __init__(self, problem: Problem, smallest: bool) -> None:
        self.smallest = smallest
        self.x_adv = problem.x.clone()
        self.z = problem.threat.start(problem.x, problem.radius, None, problem.ids)
        self.reached = problem.goal.reached(problem.clean)
        self.invalid = ~valid(problem.clean)
        self.size = torch.zeros_like(problem.radius)
        self.score = torch.full_like(problem.clean[:, 0], -torch.inf)
        self.open = ~self.reached & ~self.invalid

    def update(self, rows: Tensor, problem: Problem, reading: Reading) -> Tensor:
        """Judges one reading of the samples `rows` (B',); returns (B',) bool: reached, now or earlier."""
        fine = valid(reading.output)
        hit = problem.goal.reached(reading.output) & fine
        score = torch.where(fine, torch.nan_to_num(reading.score, nan=-torch.inf), torch.full_like(reading.score, -torch.inf))
        had, old = self.reached[rows], self.score[rows]
        better = (hit & ~had) | ((hit == had) & (score > old))
        size, wild = None, ~fine
        if bool((hit | wild).any()):
            # Only these need their size now: a point outside the budget is no success, and no number there is no fault, whoever
            # proposed it.
            size = problem.threat.size(problem.x, reading.z)
            legal = size <= problem.radius
            hit, better, wild = hit & legal, better & (legal | ~hit), wild & legal
            if self.smallest:
                better = (hit & (~had | (size < self.size[rows]))) | (~hit & ~had & better)
        self._store(rows, problem, reading, better, hit, score, size)
        self.invalid[rows] |= wild
        return self.reached[rows]

    def _store(
        self, rows: Tensor, problem: Problem, reading: Reading, better: Tensor, hit: Tensor, score: Tensor, size: Tensor | None
    ) -> None:
        if len(rows) == len(self.x_adv):  # nobody dropped yet: no gather needed
            torch.where(per_sample(better, self.x_adv) > 0, reading.x_adv, self.x_adv, out=self.x_adv)
            torch.where(per_sample(better, self.z) > 0, reading.z, self.z, out=self.z)
        elif bool(better.any()):
            self.x_adv[rows[better]], self.z[rows[better]] = reading.x_adv[better], reading.z[better]
        self.score[rows] = torch.where(better, score, self.score[rows])
        if size is None:
            self.size[rows[better]] = torch.nan  # measured at the end, once
        else:
            self.size[rows] = torch.where(better, torch.where(hit, size, torch.nan), self.size[rows])
        self.reached[rows] |= hit

    def outcome(self, problem: Problem, steps: int) -> Outcome:
        """The result; sizes that were put off are measured now, on the stored inputs themselves."""
        missing = torch.isnan(self.size).nonzero().squeeze(1)
        if len(missing):
            # A failure reports the size of the input that came closest.
            part = problem.take(missing)
            size = problem.threat.size(part.x, self.z[missing])
            # A strategy may look beyond the radius, but nothing from there is handed back.
            legal = size <= part.radius
            back = missing[~legal]
            self.x_adv[back], self.score[back] = problem.x[back], -torch.inf
            self.z[back] = problem.threat.start(problem.x[back], problem.radius[back], None, problem.ids[back])
            self.size[missing] = torch.where(legal, size, torch.zeros_like(size))
        rows = problem.tally.rows
        return Outcome(
            x_adv=self.x_adv,
            z=self.z,
            reached=self.reached,
            size=self.size,
            score=self.score,
            queries=problem.tally.forwards[rows].clone(),
            backwards=problem.tally.backwards[rows].clone(),
            steps=steps,
            flags={"invalid": self.invalid},
        )
