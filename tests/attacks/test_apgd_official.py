"""Our APGD against runs of the official code (see tests/reference/README.md), from the same starts, step for step.

Differences on purpose: the first checkpoint counts rises as the paper does (quirk 1), projections onto ball and box
together are exact (quirks 6 and 14), and L2 steps leave out features that stand at the box.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from epsball.attacks import Cascade, apgd, apgd_t, from_larger
from epsball.core import Aimed, Attack, Goal, Key, Untargeted, Victim
from epsball.core.attack import pose
from epsball.objectives import cross_entropy, dlr, dlr_targeted
from epsball.threats import named

_spec = importlib.util.spec_from_file_location("apgd_reference", Path(__file__).parents[1] / "reference" / "models.py")
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["apgd_reference"] = _module
_spec.loader.exec_module(_module)
REFERENCE = _module.load_reference()
OBJECTIVE = {"ce": cross_entropy, "dlr": dlr, "dlr-targeted": dlr_targeted}


def goal_of(case: Any) -> Goal:
    return Aimed(case.y, case.y_target) if case.loss == "dlr-targeted" else Untargeted(case.y)


def replay(case: Any, attack: Attack | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(losses (T + 1, N), reached (N,), step sizes (T, N)) of our search, looking once more after the last move as `run` does."""
    threat = named(case.norm.lower())
    attack = attack or apgd(case.n_iter, threat=threat, objective=OBJECTIVE[case.loss], noise=False)
    problem = pose(attack, Victim(case.model), case.x, goal_of(case), case.eps, Key((0,)), None)
    state = attack.strategy.init(problem, case.n_iter)
    if case.start is not None:
        start = problem.threat.project(problem.x, case.start, problem.radius)  # official starts may be 1e-7 outside
        changed = {"previous": start} if case.norm != "L1" else {"best_z": start}
        state = replace(state, z=start, **changed)
    if case.norm == "L1":
        state = replace(state, share=case.start_topk.clone(), changed=case.start_support.float())
    losses, steps, reached = [], [], torch.zeros(len(case.x), dtype=torch.bool)
    for _ in range(case.n_iter + 1):
        reading, state = attack.strategy.step(problem, state)
        losses.append(reading.score)
        steps.append(state.step if case.norm == "L1" else state.control.step)
        reached |= problem.goal.reached(reading.output)
    return torch.stack(losses), reached, torch.stack(steps)


def compare(case: Any) -> tuple[Tensor, Tensor]:
    """(loss_best - official's, tolerance), per sample."""
    losses, _, _ = replay(case)
    return losses.amax(0) - case.loss_best, 1e-4 * (1 + case.loss_best.abs()) + 10 * case.spread


@pytest.mark.parametrize("case", REFERENCE.cases, ids=lambda case: case.name)
def test_as_strong_as_the_official_run(case: Any) -> None:
    _, reached, _ = replay(case)
    lost = reached.logical_not() & ~case.robust & ~case.fragile
    assert not bool(lost.any()), f"the official run breaks {lost.nonzero().flatten().tolist()}, ours does not"
    won = reached & case.robust
    assert int(won.sum()) <= 2, "ours breaks much more: not the same attack"
    more, tolerance = compare(case)
    weaker, stronger = int((more < -tolerance).sum()), int((more > tolerance).sum())
    allowed = {"Linf": 1, "L2": max(2, stronger // 2), "L1": 2}[case.norm]  # L2: exact projection wins far more often than it loses
    assert weaker <= allowed, f"weaker on {(more < -tolerance).nonzero().flatten().tolist()}: {more.tolist()}"


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_no_weaker_over_all_cases(norm: str) -> None:
    gaps = [compare(case) for case in REFERENCE.cases if case.norm == norm]
    more, tolerance = torch.cat([gap[0] for gap in gaps]), torch.cat([gap[1] for gap in gaps])
    weaker, stronger = int((more < -tolerance).sum()), int((more > tolerance).sum())
    assert weaker <= max(0.01 * len(more), 0.1 * stronger)
    assert norm != "L2" or stronger > 0.5 * len(more)


@pytest.mark.parametrize("case", [c for c in REFERENCE.cases if c.trajectory is not None], ids=lambda case: case.name)
def test_the_same_path_at_first(case: Any) -> None:
    """Before the first checkpoint nothing that differs on purpose can act under Linf; elsewhere the start and its step agree."""
    losses, _, steps = replay(case)
    first = max(int(0.22 * case.n_iter), 1) if case.norm == "Linf" else 0
    assert torch.allclose(losses[: first + 1], case.trajectory.loss[: first + 1], atol=2e-5, rtol=1e-4)
    assert torch.allclose(steps[: first or 1].float(), case.trajectory.step[: first or 1])


def slow_unless(quick: bool, run: Any) -> Any:
    return pytest.param(run, id=run.name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("run", [slow_unless(run.name.startswith("mlp"), run) for run in REFERENCE.standard])
def test_apgd_and_apgd_t_match_the_suite(run: Any) -> None:
    """CE with restarts, then targets, at or below what the whole official suite leaves."""
    threat = named(run.norm.lower())
    suite = Cascade((apgd(100, restarts=1 if run.norm != "L1" else 5, threat=threat), apgd_t(100, threat=threat)))
    outcome = suite(run.model, run.x, run.y, run.eps)
    assert int((~outcome.reached).sum()) <= run.alive[-1]


@pytest.mark.parametrize("run", [slow_unless(run.name.startswith("mlp"), run) for run in REFERENCE.standard if run.norm == "L1"])
def test_from_larger_matches_the_suites_first_stage(run: Any) -> None:
    """AutoAttack's APGD-CE under L1 is this, five times. Which of the last samples break is luck: 2 or 3 of 100 stand at seeds 0 to 5."""
    outcome = from_larger(100, restarts=5)(run.model, run.x, run.y, run.eps)
    assert int((~outcome.reached).sum()) <= run.alive[1] + 1
