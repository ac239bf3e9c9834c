"""The one loop. It alone judges every iterate and the last one, keeps the best so far, drops what is done, keeps the books."""

from __future__ import annotations

import torch
from torch import Tensor

from epsball.core.descent import Strategy
from epsball.core.outcome import Best, Outcome
from epsball.core.problem import Drop, Problem, Watch, ends
from epsball.core.rows import take


def run(
    problem: Problem, strategy: Strategy, steps: int, *, smallest: bool = False, drop: Drop = True, watch: Watch | None = None
) -> Outcome:
    """Runs a strategy for at most `steps` moves.

    Samples whose clean answer already reaches the goal, or is not finite, are never touched and cost nothing here.

    Args:
        problem: the batch (B). strategy: how to search. steps: moves allowed.
        smallest: rank successes by size instead of score, and go on after the first.
        drop: take a sample out of the batch once its goal is reached (never in a search for the smallest change); whole numbers (B,) take
            out every row of its number.
        watch: called with (step, steps, samples left) once a step.

    A sample also leaves the batch when its strategy says that its search is over.

    Cost: that of the strategy's step for every sample still searched, and one forward row to judge the last iterate of those left.
    """
    best = Best(problem, smallest)
    with problem.victim, torch.no_grad():
        alive = best.open.nonzero().squeeze(1)
        part = problem if len(alive) == len(problem) else problem.take(alive)
        state = strategy.init(part, steps) if len(alive) else None
        for step in range(steps):
            if not len(alive):
                break
            if watch is not None:
                watch(step, steps, len(alive))
            reading, state = strategy.step(part, state)
            done = best.update(alive, part, reading)
            gone = done if ends(drop) and not smallest else torch.zeros_like(done)
            if isinstance(drop, Tensor) and bool(gone.any()):
                gone = torch.isin(drop[alive], drop[alive[gone]])
            gone = gone if reading.over is None else gone | reading.over
            if bool(gone.any()):
                left = (~gone).nonzero().squeeze(1)
                part, state, alive = part.narrowed(left), take(state, left), alive[left]
        if len(alive) and state is not None:
            best.update(alive, part, part.judge(state.z))
    return best.outcome(problem, steps)
