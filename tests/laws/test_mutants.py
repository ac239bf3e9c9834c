"""Broken on purpose: each mutant of the core must be caught by a law, and every law must pass on the core as it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lawkit import (
    answers,
    bench,
    check_gradient_rows,
    check_legal,
    check_nested,
    check_replay,
    check_same,
    linear,
    posed,
    rng,
    rows_of,
    tensor,
)
from torch import Tensor, nn

from epsball.attacks import combine, get
from epsball.core import Descent, Key, Momentum, Outcome, Problem, Reading, Tally, Targeted, Untargeted, Victim, autograd
from epsball.core import attack as attack_module
from epsball.core import goal as goal_module
from epsball.core import outcome as outcome_module
from epsball.core import victim as victim_module
from epsball.core.outcome import Best
from epsball.threats import L1, L2, Linf

Patch = pytest.MonkeyPatch


# Laws in their smallest form: each raises AssertionError when it is broken.


def law_legal() -> None:
    b = bench(4)
    for threat, radius in (("linf", 0.12), ("l2", 0.35), ("l1", 0.9)):
        for drop in (True, False):
            outcome = get("pgd", threat=threat, steps=5)(b.model, b.x, b.labels, radius, drop=drop)
            check_legal(threat, b.x, outcome.x_adv, radius)


def law_projection() -> None:
    x, z = tensor(rng(2).random((50, 3, 4, 4))), tensor(rng(3).random((50, 3, 4, 4)) * 3 - 1)
    for threat, radius in ((Linf(), 8 / 255), (L2(), 0.5), (L1(), 2.0)):
        inside = threat.within((0.0, 1.0))
        check_legal(threat.name, x, inside.project(x, z, torch.full((50,), radius, dtype=torch.float64)), radius)


def law_replay() -> None:
    for seed in range(4):
        b = bench(4, n=24, seed=seed)
        for goal in (b.goal(False), b.goal(True)):
            for steps in (1, 4):
                outcome = get("pgd", steps=steps, step=0.2, objective="ce")(b.model, b.x, goal, 0.12, drop=False)
                check_replay("linf", b.model, b.x, goal, outcome)


def law_optimum() -> None:
    model = linear(6, 2).double()
    x = tensor(0.3 + 0.4 * rng(1).random((20, 6)), torch.float64)
    labels = answers(model, x).argmax(1)
    slope = (model[1].weight[1] - model[1].weight[0]).detach()
    for goal, sign in ((Untargeted(labels), 1 - 2 * labels), (Targeted(1 - labels), 1 - 2 * labels)):
        outcome = get("fgsm", objective="margin")(model, x, goal, 0.05, drop=False)
        found = ((outcome.x_adv - x) * slope).sum(1) * sign
        assert torch.allclose(found, 0.05 * slope.abs().sum().expand(20), rtol=1e-6), "not the closed-form optimum"


def law_batches() -> None:
    b = bench(4, n=9)
    run = lambda size: get("pgd", steps=4)(Victim(b.model, batch_size=size), b.x, b.labels, 0.12)  # noqa: E731
    check_same(run(None), run(2))
    order = torch.tensor([4, 1, 8, 0, 1])
    check_same(rows_of(run(None), order), get("pgd", steps=4)(b.model, b.x[order], b.labels[order], 0.12))


def law_every_row_is_tried() -> None:
    b = bench(4, n=9, wrong=0)
    outcome = get("pgd", steps=4)(b.model, b.x, b.labels, 0.12, drop=False)
    assert outcome.backwards.tolist() == [4] * 9
    assert outcome.queries.tolist() == [6] * 9


def law_wrong_rows_untouched() -> None:
    b = bench(4)
    outcome = get("pgd", steps=4)(b.model, b.x, b.labels, 0.12)
    assert torch.equal(outcome.x_adv[b.wrong], b.x[b.wrong])
    assert bool((outcome.queries[b.wrong] == 1).all())


def law_more_steps() -> None:
    b = bench(4, n=24)
    runs = [get("bim", steps=n, step=0.09)(b.model, b.x, b.labels, 0.12, drop=False) for n in range(8)]
    for fewer, more in itertools.pairwise(runs):
        check_nested(fewer, more)
        same = fewer.reached == more.reached
        assert bool((more.score >= fewer.score)[same].all()), "the best so far got worse"


def law_more_restarts() -> None:
    b = bench(4, n=24)
    runs = [get("pgd", steps=2, restarts=n)(b.model, b.x, b.labels, 0.12) for n in (1, 2, 4)]
    for fewer, more in itertools.pairwise(runs):
        check_nested(fewer, more)
    check_replay("linf", b.model, b.x, b.labels, runs[-1])


def law_rows(gradient: Any = autograd) -> None:
    b = bench(4, n=6, wrong=0)
    check_gradient_rows(gradient, posed(b.model, b.x, b.labels), b.x)


def law_ledger() -> None:
    b = bench(4, n=5)
    seen = []
    outcome = get("pgd", steps=3)(lambda x: (seen.append(len(x)), b.model(x.double()))[1], b.x, b.labels, 0.1)
    assert int(outcome.queries.sum()) == sum(seen)


def law_restored() -> None:
    b, model = bench(4), nn.Sequential(nn.Flatten(), nn.Linear(18, 4), nn.Dropout()).train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    get("pgd", steps=2)(model, b.x, b.labels, 0.1)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(before, torch.get_rng_state())


def law_no_number_is_no_class() -> None:
    b = bench(4, wrong=0)
    outcome = get("pgd", steps=3)(lambda x: b.model(x.double()) * torch.nan, b.x, b.labels, 0.1)
    assert not bool(outcome.reached.any())
    assert bool(outcome.flags["invalid"].all())


def law_target() -> None:
    b = bench(4, n=24, wrong=0)
    goal = b.goal(True)
    outcome = get("pgd", steps=4)(b.model, b.x, goal, 0.3)
    assert bool((answers(b.model, outcome.x_adv).argmax(1) == goal.labels)[outcome.reached].all())  # type: ignore[attr-defined]


LAWS = [value for name, value in sorted(globals().items()) if name.startswith("law_")]


@pytest.mark.parametrize("law", LAWS)
def test_the_core_as_it_is_obeys(law: Callable[[], None]) -> None:
    law()


# Mutants.


def no_clip(patch: Patch) -> None:
    patch.setattr(Linf, "project", lambda self, x, z, radius: z)


def clip_without_rounding(patch: Patch) -> None:
    patch.setattr(Linf, "project", lambda self, x, z, radius: (x + (z - x).clamp(-float(radius[0]), float(radius[0]))).clamp(0, 1))


def ball_but_no_box(patch: Patch) -> None:
    patch.setattr(Linf, "project", lambda self, x, z, r: torch.minimum(torch.maximum(z, x - 0.999 * float(r[0])), x + 0.999 * float(r[0])))


def wrong_norm(patch: Patch) -> None:
    patch.setattr(L2, "project", lambda self, x, z, radius: Linf(self.room).project(x, z, radius))


def radius_off_by_a_little(patch: Patch) -> None:
    original = L1.project
    patch.setattr(L1, "project", lambda self, x, z, radius: original(self, x, z, radius * 1.0001))
    patch.setattr(L1, "size", lambda self, x, z: (z - x).abs().flatten(1).sum(1).double() / 1.001)


def descend_instead(patch: Patch) -> None:
    patch.setattr(Linf, "steepest", lambda self, x, z, gradient: -gradient.sign())


def half_a_step(patch: Patch) -> None:
    original = Linf.project
    patch.setattr(Linf, "project", lambda self, x, z, radius: original(self, x, z, radius * 0.9))


def keep_the_last(patch: Patch) -> None:
    original = Best._store
    patch.setattr(Best, "_store", lambda self, rows, reading, better: original(self, rows, reading, torch.arange(len(rows))))


def forget_the_best(patch: Patch) -> None:
    original = Best.update

    def update(self: Best, rows: Tensor, problem: Problem, reading: Reading) -> Tensor:
        self._settle()
        self._rows = None
        self.reached, self.score = self.reached.index_fill(0, rows, False), self.score.index_fill(0, rows, -torch.inf)
        return original(self, rows, problem, reading)

    patch.setattr(Best, "update", update)


def last_not_judged(patch: Patch) -> None:
    original = Problem.judge
    patch.setattr(Problem, "judge", lambda self, z: original(self, self.x))


def trust_the_score(patch: Patch) -> None:
    patch.setattr(Untargeted, "reached", lambda self, output: output[:, 0] < output.amax(1))


def first_rows_only(patch: Patch) -> None:
    original = Best.__init__

    def init(self: Best, problem: Problem, smallest: bool) -> None:
        original(self, problem, smallest)
        self.open[4:] = False

    patch.setattr(Best, "__init__", init)


def wrong_rows_too(patch: Patch) -> None:
    original = Best.__init__

    def init(self: Best, problem: Problem, smallest: bool) -> None:
        original(self, problem, smallest)
        self.reached[:], self.open[:] = False, True

    patch.setattr(Best, "__init__", init)


def noise_by_position(patch: Patch) -> None:
    original = Key._digests
    patch.setattr(Key, "_digests", lambda self, ids: original(self, torch.arange(len(ids))))


def best_restart_of_the_batch(patch: Patch) -> None:
    def whole_batch(whole: Outcome, rows: Tensor, part: Outcome, smallest: bool = False) -> Outcome:
        return replace(whole, reached=whole.reached.index_put((rows,), part.reached), x_adv=whole.x_adv.index_put((rows,), part.x_adv))

    original = combine.union
    patch.setattr(combine, "merged", whole_batch)
    patch.setattr(combine, "union", lambda *arguments: original(*arguments[:-1], False))


def count_nothing(patch: Patch) -> None:
    patch.setattr(Tally, "count_forward", lambda self, rows=1: None)


def leave_eval(patch: Patch) -> None:
    patch.setattr(victim_module, "_still", lambda model: (model.eval(), lambda: None)[1])


def seed_the_world(patch: Patch) -> None:
    patch.setattr(victim_module, "_fork_generators", lambda: (torch.manual_seed(0), lambda: None)[1])


def nan_is_a_class(patch: Patch) -> None:
    everything = lambda output: torch.ones(len(output), dtype=torch.bool)  # noqa: E731
    for module in (goal_module, outcome_module):
        patch.setattr(module, "valid", everything)


def any_class_will_do(patch: Patch) -> None:
    patch.setattr(Targeted, "reached", lambda self, output: output.argmax(1) != (self.labels + 3) % 4)


def judge_the_input_before(patch: Patch) -> None:
    original = Descent.step

    def step(self: Descent, problem: Problem, state: Any) -> tuple[Reading, Any]:
        reading, after = original(self, problem, state)
        return replace(reading, x_adv=after.z, z=after.z), after

    patch.setattr(Descent, "step", step)


def stop_one_early(patch: Patch) -> None:
    original = attack_module.run
    patch.setattr(
        attack_module, "run", lambda problem, strategy, steps, **options: original(problem, strategy, max(steps - 1, 0), **options)
    )


def ledger_not_cut(patch: Patch) -> None:
    patch.setattr(Tally, "take", lambda self, rows: replace(self, rows=self.rows[: len(self.rows[rows])]))


MUTANTS: list[tuple[Callable[[Patch], None], Callable[[], None]]] = [
    (no_clip, law_legal),
    (clip_without_rounding, law_projection),
    (ball_but_no_box, law_legal),
    (wrong_norm, law_projection),
    (radius_off_by_a_little, law_projection),
    (descend_instead, law_optimum),
    (half_a_step, law_optimum),
    (keep_the_last, law_replay),
    (forget_the_best, law_more_steps),
    (last_not_judged, law_optimum),
    (trust_the_score, law_replay),
    (first_rows_only, law_every_row_is_tried),
    (wrong_rows_too, law_wrong_rows_untouched),
    (noise_by_position, law_batches),
    (best_restart_of_the_batch, law_more_restarts),
    (count_nothing, law_ledger),
    (leave_eval, law_restored),
    (seed_the_world, law_restored),
    (nan_is_a_class, law_no_number_is_no_class),
    (any_class_will_do, law_target),
    (judge_the_input_before, law_replay),
    (stop_one_early, law_every_row_is_tried),
    (ledger_not_cut, law_batches),
]


@pytest.mark.parametrize(("mutant", "law"), MUTANTS)
def test_a_law_catches(mutant: Callable[[Patch], None], law: Callable[[], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        law()


def test_a_mean_over_the_batch_is_caught() -> None:
    def averaged(problem: Problem, z: Tensor) -> Reading:
        reading = autograd(problem, z)
        return replace(reading, gradient=reading.gradient / len(z))

    with pytest.raises(AssertionError, match="neighbors"):
        law_rows(averaged)


def test_a_batch_wide_norm_is_caught() -> None:
    def normed(problem: Problem, z: Tensor) -> Reading:
        reading = autograd(problem, z)
        return replace(reading, gradient=reading.gradient / reading.gradient.norm())

    with pytest.raises(AssertionError, match="neighbors"):
        law_rows(normed)


def test_a_flipped_loss_is_caught(monkeypatch: Patch) -> None:
    b = bench(4, n=24)
    right = get("pgd", steps=4, objective="margin")
    flipped = replace(right, objective=lambda *parts: -right.objective(*parts))  # type: ignore[type-var, attr-defined]
    strong, weak = (attack(b.model, b.x, b.labels, 0.12) for attack in (right, flipped))
    assert int(weak.reached.sum()) < int(strong.reached.sum())
    with pytest.raises(AssertionError):
        check_nested(strong, weak)


def test_momentum_that_forgets_is_another_attack(monkeypatch: Patch) -> None:
    """Pitfall row 52: momentum not kept. Two steps on a bent model tell the difference."""
    b = bench(4, n=24)
    kept = get("mi_fgsm", steps=5)(b.model, b.x, b.labels, 0.12, drop=False)
    monkeypatch.setattr(Momentum, "turn", lambda self, problem, z, gradient, memory: (gradient, gradient))
    lost = get("mi_fgsm", steps=5)(b.model, b.x, b.labels, 0.12, drop=False)
    assert not torch.equal(kept.x_adv, lost.x_adv)
