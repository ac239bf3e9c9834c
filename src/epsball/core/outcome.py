"""What an attack leaves behind, one row per sample, and the only rule by which one result is better than another."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from epsball.core.goal import valid
from epsball.core.problem import Problem, Reading


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
        self.z = problem.threat.start(problem.x, problem.radius, None, problem.ids)
        # Where the variable is the input itself, one memory serves both.
        one = self.z[:1]
        self.x_adv = self.z if problem.threat.apply(problem.x[:1], one) is one else problem.x.clone()
        self.reached = problem.goal.reached(problem.clean)
        self.invalid = ~valid(problem.clean)
        self.size = torch.zeros_like(problem.radius)
        self.score = torch.full_like(problem.clean[:, 0], -torch.inf)
        self.open = ~self.reached & ~self.invalid
        self._rows: Tensor | None = None
        self._known = (self.reached, self.score, self.size)

    def _of(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reached, score, size) of the samples `rows` (B',); the same rows are asked for again and again, so their answers stay apart."""
        if rows is not self._rows:
            self._settle()
            whole = (self.reached, self.score, self.size)
            self._rows, self._known = rows, whole if len(rows) == len(self.reached) else (whole[0][rows], whole[1][rows], whole[2][rows])
        return self._known

    def _settle(self) -> None:
        if self._rows is None:
            return
        whole = (self.reached, self.score, self.size)
        if len(self._rows) == len(self.reached):  # nobody has left yet
            self.reached, self.score, self.size = self._known
        else:
            self.reached, self.score, self.size = (
                known.index_copy(0, self._rows, new) for known, new in zip(whole, self._known, strict=True)
            )

    def update(self, rows: Tensor, problem: Problem, reading: Reading) -> Tensor:
        """Judges one reading of the samples `rows` (B',); returns (B',) bool: reached, now or earlier."""
        had, old, least = self._of(rows)
        claimed, score = problem.goal.reached(reading.output), reading.score
        odd = not math.isfinite(float(reading.output.sum() + score.sum()))
        if odd:
            wild = ~valid(reading.output)
            claimed, score = claimed & ~wild, torch.nan_to_num(score, nan=-torch.inf).masked_fill(wild, -torch.inf)
        closer, unmeasured = score > old, torch.full_like(least, torch.nan)
        if odd or bool(claimed.any()):
            # Only these need their size now, others are measured at the end: a point outside the budget is no success, and no
            # number there is no fault, whoever proposed it.
            size = problem.threat.size(problem.x, reading.z)
            legal = size <= problem.radius
            hit = claimed & legal
            if odd:
                self.invalid[rows] |= wild & legal
            better = (hit & (~had | (size < least if self.smallest else closer))) | (~(had | claimed) & closer)
            reached, size = had | hit, torch.where(hit, size, unmeasured)
        else:
            better, reached, size = closer & ~had, had, unmeasured
        self._store(rows, reading, better.nonzero().squeeze(1))
        self._known = (reached, torch.where(better, score.to(old), old), torch.where(better, size, least))
        return reached

    def _store(self, rows: Tensor, reading: Reading, better: Tensor) -> None:
        if len(better):
            self.z.index_copy_(0, rows[better], reading.z[better])
            if self.x_adv is not self.z:
                self.x_adv.index_copy_(0, rows[better], reading.x_adv[better])

    def outcome(self, problem: Problem, steps: int) -> Outcome:
        """The result; sizes that were put off are measured now, on the stored inputs themselves."""
        self._settle()
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
