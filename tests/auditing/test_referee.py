"""The referee believes no one: not the attack's flag, not its radius, not the model it attacked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import blobs, linear
from torch import Tensor, nn

from epsball.auditing.cascade import attack_round
from epsball.auditing.plan import Stage
from epsball.auditing.referee import Referee, distance
from epsball.auditing.run import confirm
from epsball.auditing.sheet import Sheet, Subject
from epsball.auditing.verdict import model_report
from epsball.core import Access, LabelsChanged, Outcome, Tally, Untargeted, Victim
from epsball.models import wrap
from epsball.store import evidence
from epsball.threats import Linf, parse_threat


def brute(x: np.ndarray, y: np.ndarray, threat: str) -> float:
    """The size of one change, number by number, in Python's own floats."""
    changes = [float(b) - float(a) for a, b in zip(x.ravel(), y.ravel(), strict=True)]
    if threat == "linf":
        return max(abs(c) for c in changes)
    if threat == "l2":
        return sum(c * c for c in changes) ** 0.5
    if threat == "l1":
        return sum(abs(c) for c in changes)
    if threat == "l0" and x.ndim == 3:
        return sum(any(x[c, i, j] != y[c, i, j] for c in range(x.shape[0])) for i in range(x.shape[1]) for j in range(x.shape[2]))
    return sum(c != 0 for c in changes)


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 3, 3), (7,)], ids=["color", "gray", "flat"])
@pytest.mark.parametrize("threat", ["linf", "l2", "l1", "l0", "l0f"])
def test_distances_are_those_of_brute_force(threat: str, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(3)
    x = random.random((6, *shape), dtype=np.float32)
    change = random.normal(0, 0.2, x.shape) * (random.random(x.shape) < 0.3)
    x_adv = (x + change).astype(np.float32)
    x_adv[0] = x[0]
    found = distance(x, x_adv, threat)
    assert found.dtype == np.float64
    assert found.tolist() == pytest.approx([brute(a, b, threat) for a, b in zip(x, x_adv, strict=True)], rel=1e-12)
    assert found[0] == 0.0


def test_pixels_and_features_are_counted_differently() -> None:
    x = np.zeros((1, 3, 2, 2), dtype=np.float32)
    x_adv = x.copy()
    x_adv[0, :, 0, 1] = 1.0
    assert (distance(x, x_adv, "l0")[0], distance(x, x_adv, "l0f")[0]) == (1.0, 3.0)


@dataclass(frozen=True)
class Liar:
    """Says that it broke everything."""

    move: Any
    name: str = "liar"
    threat: Linf = field(default_factory=Linf)

    def __call__(self, model: Victim, x: Tensor, goal: Any, radius: float, seed: int = 0, **_: Any) -> Outcome:
        n, some = len(x), torch.ones(len(x), dtype=torch.bool)
        none = torch.zeros(n, dtype=torch.int64)
        x_adv = self.move(x, radius)
        size = torch.zeros(n, dtype=torch.float64)
        score, flags = torch.full((n,), 1e9), {"invalid": ~some}
        return Outcome(x_adv=x_adv, z=x_adv, reached=some, size=size, score=score, queries=none, backwards=none, steps=1, flags=flags)


def sheet_of(threat: str = "linf:0.3") -> tuple[Sheet, Referee]:
    x, y, weights = blobs(classes=3)
    victim = wrap(linear(weights))
    subject = Subject(victim, x, y, torch.arange(len(x)), "blobs", {})
    referee = Referee(victim)
    return Sheet.start(subject, referee.outputs(x, subject.goal), [], (parse_threat(threat),), queries=300, pace=0.0), referee


def against(x: Tensor, amount: float) -> Tensor:
    """A large move that breaks every sample of these blobs."""
    _, _, weights = blobs(classes=3)
    labels = linear(weights)(x).argmax(1)
    slope = weights[(labels + 1) % 3] - weights[labels]
    return x + amount * slope.sign()


LIES = {
    "returns x": lambda x, r: x.clone(),
    "leaves the radius by 1e-6": lambda x, r: edge(x, r + 1e-6),
    "leaves the box": lambda x, r: against(x, r) - 2.0,
    "NaN": lambda x, r: torch.full_like(x, torch.nan),
    "infinite": lambda x, r: torch.full_like(x, torch.inf),
}


def edge(x: Tensor, size: float) -> Tensor:
    """Inside the box where it can be, moved by exactly `size` somewhere."""
    moved = against(x, size)
    return torch.where((moved < 0) | (moved > 1), x, moved)


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_attack_gets_nothing_confirmed(lie: str) -> None:
    sheet, referee = sheet_of()
    current = sheet.rounds[0]
    before = sheet.standing("linf", 0.3).clone()
    attack_round(sheet, referee, current, Stage(Liar(LIES[lie]), 0), 0, True, lambda *_: None)
    assert int(before.sum()) > 20
    assert torch.equal(sheet.standing("linf", 0.3), before)
    assert current.attacks[0].broken == 0
    assert current.attacks[0].tried == int(before.sum())
    assert torch.isinf(sheet.hits["linf"].radius).all()
    assert torch.equal(sheet.hits["linf"].x_adv, sheet.subject.x)


def test_the_same_move_inside_the_radius_is_confirmed() -> None:
    """The control of the test above: without the lie, the referee does confirm."""
    sheet, referee = sheet_of()
    attack_round(sheet, referee, sheet.rounds[0], Stage(Liar(lambda x, r: edge(x, r - 1e-6)), 0), 0, True, lambda *_: None)
    assert sheet.rounds[0].attacks[0].broken > 20


def test_each_row_has_its_own_radius() -> None:
    sheet, referee = sheet_of()
    rows = sheet.correct.nonzero().squeeze(1)
    x = sheet.subject.x[rows]
    x_adv = edge(x, 0.25)
    size = torch.from_numpy(distance(x.numpy(), x_adv.numpy(), "linf"))
    everywhere = referee.judge(x, x_adv, sheet.subject.goal.take(rows), Linf(), 1.0)
    radius = torch.where(torch.arange(len(x)) % 2 == 0, size, size * (1 - 1e-9))
    ruling = referee.judge(x, x_adv, sheet.subject.goal.take(rows), Linf(), radius)
    assert torch.equal(ruling.legal, torch.arange(len(x)) % 2 == 0)
    assert torch.equal(ruling.broken, everywhere.broken & ruling.legal)
    assert torch.equal(ruling.size, size)


def test_a_box_of_one_bound_per_feature_is_kept() -> None:
    x, y, weights = blobs(classes=3)
    low, high = torch.zeros(12), torch.full((12,), 1.0)
    high[0] = 0.9
    victim = Victim(linear(weights), box=(low, high))
    x_adv = x.clone()
    x_adv[0, 0], x_adv[1, 0], x_adv[2, 1] = 0.95, 0.85, 0.95
    legal = Referee(victim).judge(x.clamp(max=0.9), x_adv, Untargeted(y), Linf(), 2.0).legal
    assert (bool(legal[0]), bool(legal[1]), bool(legal[2])) == (False, True, True)


class Close(nn.Module):
    """Two scores that float32 cannot tell apart and float64 can: 1e6 and 1e6 + x."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("base", torch.tensor([1e6, 1e6]))

    def forward(self, x: Tensor) -> Tensor:
        return self.base + torch.cat([torch.zeros_like(x), x], 1)


def test_thin_margins_are_judged_in_float64() -> None:
    x = torch.tensor([[1e-3], [-1e-3]])
    assert Close()(x).argmax(1).tolist() == [0, 0]  # float32 sees a tie
    ruling = Referee(Victim(Close(), box=(-1.0, 1.0))).judge(x, x, Untargeted(torch.tensor([0, 0])), Linf(), 1.0)
    assert ruling.broken.tolist() == [True, False]
    assert ruling.predicted.tolist() == [1, 0]


class Faint(nn.Module):
    """Label 0 always clear; label 1 hangs on a sum that float32 rounds to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("base", torch.tensor(1e6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.full_like(x, 1e6), (self.base + x) - self.base], 1)


def test_thin_decisions_of_multi_label_models_are_judged_in_float64_too() -> None:
    x = torch.tensor([[1e-3], [-1e-3]])
    goal = LabelsChanged(torch.tensor([[1, 0], [1, 0]]))
    assert goal.reached(Faint()(x)).tolist() == [False, False]
    assert Referee(Victim(Faint(), box=(-1.0, 1.0))).judge(x, x, goal, Linf(), 1.0).broken.tolist() == [True, False]


def test_the_judge_keeps_a_copy_that_later_changes_do_not_reach() -> None:
    x, y, weights = blobs(classes=3)
    model = linear(weights)
    referee = Referee(wrap(model))
    before = referee.outputs(x, Untargeted(y))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.train()
    assert torch.equal(referee.outputs(x, Untargeted(y)), before)
    assert not torch.equal(model(x).double(), before)


def test_a_model_in_training_mode_is_judged_in_eval_mode() -> None:
    x, y, weights = blobs(classes=3)
    model = nn.Sequential(nn.Dropout(0.9), linear(weights))
    model.train()
    expected = linear(weights)(x).double()
    assert torch.equal(Referee(wrap(model)).outputs(x, Untargeted(y)), expected)
    assert model.training


def test_rulings_do_not_depend_on_the_runs_batch_size() -> None:
    x, y, weights = blobs(classes=3)
    answers = [Referee(wrap(linear(weights), batch_size=size)).outputs(x, Untargeted(y)) for size in (1, 7, None)]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_nan_answers_break_nothing() -> None:
    x, y, _ = blobs(classes=3)
    model = wrap(lambda x: torch.full((len(x), 3), torch.nan))
    ruling = Referee(model).judge(x, x, Untargeted((y + 1) % 3), Linf(), 1.0)
    assert not ruling.broken.any()
    assert not ruling.answered.any()
    assert ruling.legal.all()


def test_a_label_only_victim_stays_label_only_for_the_referee() -> None:
    x, y, weights = blobs(classes=3)
    output = Referee(wrap(linear(weights), access=Access.LABELS)).outputs(x, Untargeted(y))
    assert set(output.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(output.argmax(1), Victim(linear(weights)).outputs(x, Tally.zeros(len(x))).argmax(1))


def test_what_is_not_confirmed_when_read_back_does_not_count(tmp_path: Path) -> None:
    """A sheet that claims more than its inputs show: the false claims are struck, on the sheet and on the disk."""
    sheet, referee = sheet_of()
    attack_round(sheet, referee, sheet.rounds[0], Stage(Liar(lambda x, r: edge(x, r - 1e-6)), 0), 0, True, lambda *_: None)
    hits = sheet.hits["linf"]
    true = torch.isfinite(hits.radius)
    false = sheet.correct & ~true
    false[true.nonzero()[0]] = True  # one real success, whose input is lost
    hits.x_adv[false] = sheet.subject.x[false]
    hits.radius[false] = 0.3
    confirm([(sheet, referee)], tmp_path / "evidence", {})
    assert torch.equal(torch.isfinite(hits.radius), true & ~false)
    assert [(f.id, f.status) for f in sheet.findings] == [("unconfirmed", "block")]
    arrays, _ = evidence.read(tmp_path / "evidence")
    assert arrays["m0/linf/rows"].tolist() == (true & ~false).nonzero().squeeze(1).tolist()
    assert not model_report(sheet).results[0].trustworthy
