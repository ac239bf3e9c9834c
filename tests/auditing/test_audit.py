"""The audit from end to end: verdicts that depend on nothing they should not, closed forms, interrupts, honest books."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from planted import BinaryLinear, blobs, digits, linear, unusual, verdicts
from torch import Tensor, nn

import epsball as eb
from epsball.attacks import EveryTarget, Restarts
from epsball.attacks.hopeless import WhileHopeful, while_hopeful
from epsball.attacks.inward import OutsideIn
from epsball.attacks.vertices import Vertices
from epsball.auditing import verdict
from epsball.auditing.cascade import Tick, attack_round, cascade, for_twin, lead_and_rival, tried_rows
from epsball.auditing.checks import Scene, losses_agree
from epsball.auditing.cost import Estimate
from epsball.auditing.plan import CLOSE, EFFORTS, PAYS, Stage, default_threats, plan, row_budget
from epsball.auditing.results import AttackRow, Flag, Report
from epsball.auditing.run import Plan, prepare
from epsball.auditing.sheet import Subject
from epsball.core import Aimed, Attack, AttackLike, Strategy
from epsball.errors import BadInput
from epsball.models import wrap
from epsball.models.digits import load
from epsball.objectives import cross_entropy, dlr, dlr_targeted, margin
from epsball.store import evidence
from epsball.threats import named, parse_threat

THREATS = ("linf:0.05,0.1,0.2", "l2:0.5", "l0:4")


def audited(tmp_path: Path, name: str = "run", **options: Any) -> Report:
    settings: dict[str, Any] = {"model": "digits-standard", "data": digits(40), "threats": THREATS, "effort": "fast"} | options
    return eb.audit(out=tmp_path / name, **settings)


# Verdicts per sample.


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    folder = tmp_path_factory.mktemp("reference")
    audited(folder)
    return {threat: verdicts(folder / "run", threat) for threat in ("linf", "l2", "l0")}


@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_verdicts_do_not_depend_on_the_batch_size(batch_size: int, reference: dict[str, Any], tmp_path: Path) -> None:
    audited(tmp_path, batch_size=batch_size)
    assert {threat: verdicts(tmp_path / "run", threat) for threat in reference} == reference


def test_verdicts_do_not_depend_on_the_order_of_the_data(reference: dict[str, Any], tmp_path: Path) -> None:
    data = digits(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    audited(tmp_path, data=(data.x[order], data.y[order]))
    assert {threat: verdicts(tmp_path / "run", threat) for threat in reference} == reference


def test_verdicts_do_not_depend_on_duplicates(reference: dict[str, Any], tmp_path: Path) -> None:
    data = digits(40)
    audited(tmp_path, data=(torch.cat([data.x, data.x[:25]]), torch.cat([data.y, data.y[:25]])))
    assert {threat: verdicts(tmp_path / "run", threat) for threat in reference} == reference
    arrays, _ = evidence.read(tmp_path / "run" / evidence.NAME)
    for threat in reference:
        rows = set(arrays[f"m0/{threat}/rows"].tolist())
        assert {row + 40 for row in rows if row < 25} == {row for row in rows if row >= 40}


def test_verdicts_do_not_depend_on_dropping(reference: dict[str, Any], tmp_path: Path) -> None:
    audited(tmp_path, drop=False)
    assert {threat: verdicts(tmp_path / "run", threat) for threat in reference} == reference


def test_verdicts_do_not_depend_on_the_other_models_or_threats(reference: dict[str, Any], tmp_path: Path) -> None:
    audited(tmp_path, model={"robust": "digits-robust", "standard": "digits-standard"}, threats="l2:0.5")
    assert verdicts(tmp_path / "run", "l2", number=1) == reference["l2"]


def test_successes_are_nested_in_the_radius(reference: dict[str, Any], tmp_path: Path) -> None:
    report = audited(tmp_path)
    counts = [report.robust_accuracy["linf", r].robust_accuracy.count for r in (0.05, 0.1, 0.2)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]  # else there was nothing to nest
    alone = audited(tmp_path, "alone", threats="linf:0.2")
    assert alone.robust_accuracy["linf", 0.2].robust_accuracy.count >= counts[-1]


def test_robust_accuracy_is_at_most_clean_accuracy_class_by_class(tmp_path: Path) -> None:
    model = audited(tmp_path).models[0]
    for result in model.results:
        assert result.value <= model.clean_accuracy.value
        for clean, robust in zip(model.clean_per_class, result.per_class, strict=True):
            assert (clean.label, clean.rate.n) == (robust.label, robust.rate.n)
            assert robust.rate.count <= clean.rate.count
        assert sum(c.rate.count for c in result.per_class) == result.robust_accuracy.count
        assert result.robust_accuracy.n == model.n == 40


def test_samples_that_are_wrong_from_the_start_are_never_attacked(tmp_path: Path) -> None:
    data = digits(40)
    labels = data.y.clone()
    labels[:15] = (labels[:15] + 1) % 10
    wrong = load("digits-standard")(data.x).argmax(1) != labels
    model = audited(tmp_path, data=(data.x, labels)).models[0]
    assert model.clean_accuracy.count == int((~wrong).sum())
    assert all(row.tried <= int((~wrong).sum()) for result in model.results for row in result.attacks)
    arrays, _ = evidence.read(tmp_path / "run" / evidence.NAME)
    for threat in ("linf", "l2", "l0"):
        rows = torch.from_numpy(arrays[f"m0/{threat}/rows"])
        assert len(rows)
        assert not wrong[rows].any()


def test_a_model_that_is_never_right_has_nothing_to_lose(tmp_path: Path) -> None:
    data = digits(40)
    labels = (load("digits-standard")(data.x).argmax(1) + 1) % 10
    model = audited(tmp_path, data=(data.x, labels), threats="linf:0.1").models[0]
    assert (model.clean_accuracy.count, model.results[0].robust_accuracy.count) == (0, 0)
    assert model.results[0].forwards == 0


def test_a_single_sample_can_be_audited(tmp_path: Path) -> None:
    assert audited(tmp_path, data="digits", n=1, threats="linf:0.1").models[0].n == 1


def test_n_is_obeyed_for_data_that_is_open_already(tmp_path: Path) -> None:
    report = audited(tmp_path, data=digits(40), n=20, threats="linf:0.1")
    assert report.models[0].n == 20
    assert sorted(c.rate.n for c in report.models[0].clean_per_class) == [2] * 10


# Closed forms.


def worst_case(weight: Tensor, x: Tensor, sign: Tensor, radius: float, norm: str) -> Tensor:
    """(N,) how far sign * (w x) can fall within the ball and [0, 1]: exact, feature by feature, in float64."""
    slope = -sign[:, None] * weight.double()[None]
    room = torch.where(slope > 0, 1 - x.double(), x.double())
    gain = slope.abs()
    if norm == "linf":
        return (gain * room.clamp(max=radius)).sum(1)
    if norm == "l1":
        gains, order = gain.sort(1, descending=True)
        spaces = room.gather(1, order)
        left = (radius - (spaces.cumsum(1) - spaces)).clamp(min=0)
        return (gains * torch.minimum(spaces, left)).sum(1)
    low, high = torch.zeros(len(x), 1).double(), torch.full((len(x), 1), 1e6).double()
    for _ in range(200):  # change = min(multiplier * gain, room); its length grows with the multiplier
        middle = (low + high) / 2
        short = torch.minimum(middle * gain, room).norm(dim=1, keepdim=True) <= radius
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return (gain * torch.minimum(low * gain, room)).sum(1)


@pytest.mark.parametrize(("norm", "radii"), [("linf", (0.05, 0.1, 0.2)), ("l2", (0.18, 0.3, 0.45)), ("l1", (0.45, 0.8, 1.2))])
def test_a_linear_model_is_audited_exactly(norm: str, radii: tuple[float, ...], tmp_path: Path) -> None:
    x, y, weights = blobs(n=60, features=12)
    weight = 3 * (weights[1] - weights[0])
    model = BinaryLinear(weight, -float(weight.sum()) / 2)
    sign = 2.0 * y.double() - 1
    margin = sign * (x.double() @ model.layer.weight[0].detach().double() + model.layer.bias.detach().double())
    report = audited(tmp_path, model=model, data=(x, y), threats=f"{norm}:{','.join(map(str, radii))}", effort="default")
    counts = []
    for radius in radii:
        loss = worst_case(weight, x, sign, radius, norm)
        assert ((margin - loss).abs() > 2e-3).all()  # no sample is too close to call
        counts.append(int((margin > loss).sum()))
        assert report.robust_accuracy[norm, radius].robust_accuracy.count == counts[-1]
    assert len(set(counts)) == 3


# Kinds of models and data.


def test_three_classes_on_flat_inputs(tmp_path: Path) -> None:
    x, y, weights = blobs(classes=3)
    model = audited(tmp_path, model=linear(weights), data=(x, y), threats=("linf:0.05,0.2", "l0f:2")).models[0]
    assert model.results[0].value > model.results[1].value
    assert all(r.after_rounding is None for r in model.results)  # not an image
    assert all(line.holds for line in eb.verify(tmp_path / "run", [linear(weights)]))


def test_a_multi_label_model(tmp_path: Path) -> None:
    x, y, weights = blobs(classes=4)
    labels = torch.stack([y % 2, y // 2, torch.ones_like(y)], 1)
    labels[0] = 1
    heads = torch.stack(
        [weights[1] + weights[3] - weights[0] - weights[2], weights[2] + weights[3] - weights[0] - weights[1], 0 * weights[0]]
    )
    net = linear(heads)
    with torch.no_grad():
        net[1].bias[2] = 5.0
    report = audited(tmp_path, model=wrap(net, outputs="multilabel"), data=(x, labels), threats="linf:0.02,0.3")
    clean = report.models[0].clean_accuracy
    assert clean.count == int(((net(x) > 0) == (labels > 0)).all(1).sum()) > 10
    near, far = report.models[0].results
    assert near.robust_accuracy.count > far.robust_accuracy.count
    assert near.per_class == []
    assert near.trustworthy
    assert all(line.holds for line in eb.verify(tmp_path / "run", [wrap(net, outputs="multilabel")]))


def test_a_box_of_minus_one_to_one_scales_the_default_threats(tmp_path: Path) -> None:
    data = digits(40)

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = load("digits-standard")

        def forward(self, z: Tensor) -> Tensor:
            return self.net((z + 1) / 2)

    shifted = audited(tmp_path, "shifted", model=wrap(Shifted().eval(), box=(-1.0, 1.0)), data=(data.x * 2 - 1, data.y), threats=None)
    plain = audited(tmp_path, "plain", data=(data.x, data.y), threats=None)
    assert shifted.models[0].box == (-1.0, 1.0)
    assert [(r.threat, r.radius) for r in shifted.models[0].results] == [(r.threat, 2 * r.radius) for r in plain.models[0].results]
    for wide, narrow in zip(shifted.models[0].results, plain.models[0].results, strict=True):
        assert abs(wide.robust_accuracy.count - narrow.robust_accuracy.count) <= 2
    assert all(line.holds for line in eb.verify(tmp_path / "shifted", [Shifted().eval()]))


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 224, 224), (20,)])
def test_default_threats_are_proportional_to_the_box(shape: tuple[int, ...]) -> None:
    one, two = ([parse_threat(text) for text in default_threats(shape, width)] for width in (1.0, 2.0))
    assert [spec.name for spec in one] == [spec.name for spec in two]
    assert [r for spec in two for r in spec.radii] == pytest.approx([2 * r for spec in one for r in spec.radii], rel=1e-5)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("threat", ["linf", "l2", "l1", "l0", "l0f"])
def test_every_plan_begins_cheap_and_has_an_attack(effort: str, threat: str) -> None:
    for classes, single in ((2, True), (3, True), (10, True), (1, False), (5, False)):
        stages = plan(named(threat), effort, classes=classes, single_label=single, gradients=True)
        assert [s.attack.name for s in stages[:2]] == ["swaps" if threat == "l1" else "pgd", "noise"]
        assert len(stages) >= 3
        assert all(stage.rows > 0 and stage.attack.threat.name == threat for stage in stages)
    assert [s.attack.name for s in plan(named(threat), effort, classes=10, single_label=True, gradients=False)] == ["noise"]


def test_an_unknown_effort_is_one_line() -> None:
    with pytest.raises(BadInput, match="effort 'huge'"):
        eb.audit("digits-standard", effort="huge")


# The books.


class Counting(nn.Module):
    """Counts the rows that go forward, and those whose gradient comes back. A copy has counts of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forwards, self.backwards = net, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        if x.requires_grad:  # not at the output: a check climbs inner features
            x.register_hook(self._back)
        output: Tensor = self.net(x)
        return output

    def _back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@pytest.mark.doubt
@pytest.mark.parametrize("threat", ["linf:0.05,0.15", "l1:1", "l0:3"])
@pytest.mark.parametrize("batch_size", [7, None])
def test_the_rows_in_the_books_are_the_rows_that_the_attacks_asked(threat: str, batch_size: int | None) -> None:
    """Exactly: every attack and check. Not in the books: preflight, clean outputs, the estimate of time, the referee."""
    data, model = digits(40), Counting(load("digits-standard").eval()).eval()
    specs = (parse_threat(threat),)
    subject = Subject(wrap(model, batch_size=batch_size), data.x, data.y, data.indices, "digits", {})
    sheet, referee = prepare(subject, Plan(specs, "fast"))
    assert model.forwards > 0
    model.forwards = model.backwards = 0
    cascade(sheet, referee, "fast", 0, True, lambda _: None)
    rows = [row for current in sheet.rounds for row in current.attacks]
    assert model.forwards == sum(row.forwards for row in rows) > 0
    assert model.backwards == sum(row.backwards for row in rows) > 0


def test_all_rows_of_a_run_are_at_least_those_in_the_report(tmp_path: Path) -> None:
    model = Counting(load("digits-standard").eval()).eval()
    report = audited(tmp_path, model=model)
    told = sum(r.forwards for r in report.models[0].results), sum(r.backwards for r in report.models[0].results)
    assert told[0] <= model.forwards
    assert told[1] <= model.backwards
    for result in report.models[0].results:
        assert (result.forwards, result.backwards) == (sum(a.forwards for a in result.attacks), sum(a.backwards for a in result.attacks))


# Interrupts, and what is put back.


class Impatient:
    """Presses Ctrl-C at its `at`-th tick; 0 is the estimate."""

    def __init__(self, at: int) -> None:
        self.at, self.ticks = at, 0

    def estimate(self, most: Estimate) -> None:
        assert most.seconds > 0
        if self.at == 0:
            raise KeyboardInterrupt

    def tick(self, tick: Tick) -> None:
        assert 0 <= tick.share <= 1
        assert tick.standing > 0
        self.ticks += 1
        if self.ticks == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [0, 1, 9, 40, 120])
def test_an_interrupt_leaves_a_partial_report_that_verifies(at: int, tmp_path: Path) -> None:
    report = audited(tmp_path, model=None, threats=THREATS[:2], progress=Impatient(at))
    run = tmp_path / "run"
    assert report.partial
    assert Report.model_validate_json((run / "report.json").read_bytes()) == report
    assert (run / "report.html").read_text(encoding="utf8").startswith("<!")
    unfinished = [r for m in report.models for r in m.results if "interrupted" in {f.id for f in r.flags}]
    assert unfinished
    assert not any(r.trustworthy for r in unfinished)
    assert len(report.models) == 2
    assert all(line.holds for line in eb.verify(run))


def test_an_interrupted_run_never_says_more_than_a_whole_one(tmp_path: Path) -> None:
    whole, part = audited(tmp_path, "whole"), audited(tmp_path, "part", progress=Impatient(60))
    pairs = list(zip(whole.models[0].results, part.models[0].results, strict=True))
    assert all(p.value >= w.value for w, p in pairs)
    assert any(p.value > w.value for w, p in pairs)


class Interrupting(nn.Module):
    """Ctrl-C while the model computes, once, at its `at`-th call."""

    calls = 0

    def __init__(self, at: int) -> None:
        super().__init__()
        self.net, self.at = load("digits-standard"), at
        type(self).calls = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        if type(self).calls == self.at:
            raise KeyboardInterrupt
        output: Tensor = self.net(x)
        return output


@pytest.mark.parametrize("left", [0, 1])
def test_doubts_about_attacks_are_moot_where_nothing_stands(left: int) -> None:
    data = eb.load_data("digits", n=20)
    subject = Subject(eb.load_model("digits-standard"), data.x, data.y, data.indices, "digits", {})
    sheet, _ = prepare(subject, Plan((parse_threat("linf:0.1"),), "fast"))
    current = sheet.rounds[0]
    current.flags.append(Flag(id="curve", severity="block", message="Something was missed."))
    sheet.hits["linf"].radius[left:] = current.radius
    found = verdict.result(sheet, current, torch.zeros(20, dtype=torch.bool), frozenset({"no-gradient"} if not left else ()))
    assert found.robust_accuracy.count == left
    assert found.trustworthy is not bool(left)
    assert {flag.id: flag.severity for flag in found.flags}["curve"] == ("block" if left else "warn")
    for doubt in ("random", "no-gradient") if left else ("random",):
        assert not verdict.result(sheet, current, torch.zeros(20, dtype=torch.bool), frozenset({doubt})).trustworthy


@pytest.mark.parametrize("at", [1, 4, 20])
def test_an_interrupt_before_anything_is_known_leaves_nothing(at: int, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        audited(tmp_path / "deep", model=Interrupting(at))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [90, 100, 140])
def test_an_interrupt_inside_the_model_leaves_a_partial_report(at: int, tmp_path: Path) -> None:
    model = Interrupting(at)
    report = audited(tmp_path, model=model)
    assert report.partial
    assert all(line.holds for line in eb.verify(tmp_path / "run", [model]))


@pytest.mark.parametrize("at", [None, 5, 90])
def test_everything_is_put_back(at: int | None, tmp_path: Path) -> None:
    net = Interrupting(at or 10**9)
    net.train()
    net.net[3].eval()
    net.net[0].weight.requires_grad_(False)
    before = [p.detach().clone() for p in net.parameters()]
    modes, wanted = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    try:
        audited(tmp_path, model=net)
    except KeyboardInterrupt:
        assert at == 5
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == wanted
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_the_users_victim_keeps_its_name_and_batch_size(tmp_path: Path) -> None:
    victim = wrap(load("digits-standard"), name="mine")
    report = audited(tmp_path, model={"other": victim}, batch_size=7, threats="linf:0.1")
    assert report.models[0].name == "other"
    assert (victim.name, victim.batch_size) == ("mine", None)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_who_came_near_is_searched_from_more_starts(norm: str) -> None:
    stages = plan(named(norm), "default", classes=10, single_label=True, gradients=True)
    first = next(place for place, stage in enumerate(stages) if stage.near < 1)
    assert all(stage.near == 1 for stage in stages[:first])
    assert all(stage.near < 1 for stage in stages[first:])
    (walks,) = (stage for stage in stages if stage.near < 1 and stage.attack.name == "outside_in")
    assert isinstance(walks.attack, Restarts)
    assert walks.nearer is not None
    share, runs = walks.nearer
    assert (share < walks.near, runs < walks.attack.count) == (True, True)
    suited = walks.suited(torch.tensor([0.0, share, walks.near], dtype=torch.float64), 10**6)
    assert isinstance(suited, Restarts)
    assert isinstance(suited.abreast, torch.Tensor)
    assert suited.abreast.tolist() == [walks.attack.count, walks.attack.count, runs]
    assert (suited.attack, suited.count) == (walks.attack.attack, walks.attack.count)
    assert (walks.fill > 0) is (norm == "linf")  # there they take the most rows of all, so that the round's budget bounds them
    assert walks.once is (norm == "linf")


def test_without_rows_left_those_that_came_very_near_get_one_walk() -> None:
    stages = plan(named("linf"), "default", classes=10, single_label=True, gradients=True)
    (walks,) = (stage for stage in stages if stage.fill)
    assert walks.nearer is not None
    near = torch.tensor([walks.nearer[0], walks.near], dtype=torch.float64)
    for left, runs in ((0, [1, 0]), (-500, [1, 0]), (2 * walks.fill, [1, 1]), (4 * walks.fill, [2, 1])):
        suited = walks.suited(near, left)
        assert isinstance(suited, Restarts)
        assert isinstance(suited.abreast, torch.Tensor)
        assert suited.abreast.tolist() == runs
    assert walks.suited(near[1:], 0) is None
    assert replace(walks, once=False).suited(near, 0) is None


def test_under_linf_restarts_climb_two_losses_and_every_class_is_tried_by_dlr() -> None:
    stages = plan(named("linf"), "default", classes=10, single_label=True, gradients=True)
    climbs = [stage.attack for stage in stages if isinstance(stage.attack, Restarts) and stage.attack.name == "apgd"]
    assert [inner.objective for one in climbs for inner in one.attacks if isinstance(inner, Attack)] == [margin, cross_entropy]
    aims = [stage.attack for stage in stages if isinstance(stage.attack, EveryTarget)]
    told = [(aim.count, aim.attack.objective) for aim in aims if isinstance(aim.attack, Attack)]
    assert told == [(3, margin), (1, margin), (9, dlr_targeted)]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("single", [True, False])
def test_no_climb_from_a_start_of_another(norm: str, single: bool) -> None:
    """Where no class can be aimed at, those that stand in for aiming take the first starts."""
    stages = plan(named(norm), "default", classes=10, single_label=single, gradients=True)
    begun = []
    for attack in (stage.attack for stage in stages if isinstance(stage.attack, Restarts) and stage.attack.name == "apgd"):
        (inner,) = attack.attacks
        assert isinstance(inner, Attack)
        begun += [(inner.steps, inner.objective, number) for number in range(attack.first or 0, (attack.first or 0) + attack.count)]
    assert len(begun) == len(set(begun))
    assert len({number for steps, _, number in begun if steps == 20}) == len([steps for steps, *_ in begun if steps == 20])


def searching(attack: AttackLike) -> list[Strategy]:
    """The strategies of all that repeats in it; of a walk inward none."""
    if isinstance(attack, Attack):
        return [attack.strategy]
    if isinstance(attack, Restarts | EveryTarget):
        return [way for one in (attack.attacks if isinstance(attack, Restarts) else (attack.attack,)) for way in searching(one)]
    return []


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_searches_that_lead_nowhere_end_where_gradients_are_trusted(norm: str) -> None:
    threat = named(norm)
    cheap, *known = plan(threat, "default", classes=10, single_label=True, gradients=True)
    assert not any(isinstance(way, WhileHopeful) for way in searching(cheap.attack))
    ways = [way for stage in known if stage.attack.name != "noise" for way in searching(stage.attack)]
    assert len(ways) >= 2
    assert all(isinstance(way, WhileHopeful) for way in ways)
    doubted = plan(threat, "default", classes=10, single_label=True, gradients=True, trusted=False)
    assert repr([replace(stage, attack=while_hopeful(stage.attack)) for stage in doubted[2:]]) == repr(known[1:])
    assert not any(isinstance(way, WhileHopeful) for stage in doubted for way in searching(stage.attack))


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("single", [True, False])
def test_under_l1_no_start_comes_twice(effort: str, single: bool) -> None:
    """Of one search at one goal: runs of one number begin at the same point, whatever they climb and however long."""
    starts: dict[str, list[int]] = {}
    for stage in plan(named("l1"), effort, classes=10, single_label=single, gradients=True):
        if isinstance(stage.attack, EveryTarget) or stage.from_closest:
            continue
        begin, count = (stage.attack.first or 0, stage.attack.count) if isinstance(stage.attack, Restarts) else (0, 1)
        starts.setdefault(stage.attack.name, []).extend(range(begin, begin + count))
    assert all(sorted(set(numbers)) == sorted(numbers) for name, numbers in starts.items() if name in ("vertices", "from_larger"))
    assert {"vertices", "outside_in"} <= set(starts)


@pytest.mark.parametrize("single", [True, False])
def test_under_l1_there_are_runs_from_small_and_large_balls_on_several_losses(single: bool) -> None:
    """DLR ranks the classes of one label; elsewhere the margin stands in."""
    kinds = set()
    for stage in plan(named("l1"), "default", classes=10, single_label=single, gradients=True):
        for inner in stage.attack.attacks if isinstance(stage.attack, Restarts) else ():
            if isinstance(inner, Attack) and isinstance(inner.strategy, Vertices) and inner.steps == 20:
                kinds.add((inner.strategy.first, inner.objective))
    turn = {((3.0, 3.0), dlr if single else margin), ((3.0, 3.0), cross_entropy), ((60.0, 60.0), margin), ((30.0, 30.0), cross_entropy)}
    assert turn <= kinds


@pytest.mark.parametrize(("norm", "times"), [("l2", 1), ("l1", 4)])
def test_one_walk_shows_whether_more_pay_and_those_whether_still_more(norm: str, times: int) -> None:
    """And none begins where another did."""
    stages = plan(named(norm), "default", classes=10, single_label=True, gradients=True)
    more = [place for place, stage in enumerate(stages) if stage.pays and stage.attack.name == "outside_in"]
    assert more == list(range(more[0], more[0] + times))
    assert [stage.attack.name for stage in stages[more[0] - 1 : more[-1] + 1]] == ["outside_in"] * (times + 1)
    numbers = []
    for stage in stages:
        if stage.attack.name == "outside_in":
            begin, count = (stage.attack.first or 0, stage.attack.count) if isinstance(stage.attack, Restarts) else (0, 1)
            numbers += range(begin, begin + count)
    assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize("single", [True, False])
def test_under_l1_rows_that_are_left_go_to_all_that_stand(single: bool) -> None:
    stages = plan(named("l1"), "default", classes=10, single_label=single, gradients=True)
    assert [stage.attack.name for stage in stages if isinstance(stage.attack, EveryTarget)] == ["vertices_t"] * single
    first = next(place for place, stage in enumerate(stages) if stage.fill)
    near, *rest = stages[first:]
    assert near.at_rival is single
    assert near.nearer is not None
    assert isinstance(near.attack, Restarts)
    assert (near.near < 1, near.nearer[0] < near.near, near.nearer[1] < near.attack.count) == (True, True, True)
    rest = [stage for stage in rest if not stage.from_closest]
    assert all((stage.fill > 0) != (stage.attack.name == "outside_in") and stage.near == 1 for stage in rest)
    assert [stage.pays > 0 for stage in rest if not stage.fill] == [False, True, True, True, True]


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_under_l1_the_largest_balls_have_to_pay(effort: str) -> None:
    """A run of each kind; that from 60 budgets where that from 30 broke a twentieth."""
    stages = plan(named("l1"), effort, classes=10, single_label=True, gradients=True)
    kinds = []
    for stage in stages:
        if isinstance(stage.attack, Restarts) and stage.attack.name == "vertices" and not stage.fill:
            balls = []
            for inner in stage.attack.attacks:
                assert isinstance(inner, Attack)
                assert isinstance(inner.strategy, Vertices)
                balls.append(inner.strategy.first[1])
            kinds.append((balls, stage.pays))
    assert kinds == [([3.0], 0.0), ([3.0, 30.0], 0.0), ([60.0], PAYS)]


def test_walks_of_twins_are_for_all_that_stand() -> None:
    """Those of the model itself are tried on some first."""
    known = plan(named("l1"), "default", classes=10, single_label=True, gradients=True)
    walks = [stage for stage in known if stage.attack.name == "outside_in"]
    assert [stage.nearest < 1 for stage in walks] == [True, *[False] * (len(walks) - 1)]
    assert [for_twin(stage).nearest for stage in walks] == [1.0] * len(walks)
    assert [for_twin(stage) for stage in known if stage not in walks] == [stage for stage in known if stage not in walks]


@pytest.mark.parametrize("effort", EFFORTS)
def test_under_l1_searches_are_followed_by_one_from_where_they_came_closest(effort: str) -> None:
    stages = plan(named("l1"), effort, classes=10, single_label=True, gradients=True)
    going_on = [place for place, stage in enumerate(stages) if stage.from_closest]
    assert going_on
    assert all(stages[place - 1].attack.name in ("vertices", "vertices_t") for place in going_on)
    assert all(stages[place].attack.name == "swaps" for place in going_on if stages[place].last)
    climbs = [place for place in going_on if not stages[place].last]
    assert [stages[place + 1].last for place in climbs] == {"fast": [], "default": [True, False], "max": [True, True]}[effort]
    assert stages[-1].last or effort != "default"


def test_who_came_close_is_searched_on_from_there_once() -> None:
    """One of three samples; its point is used up."""
    data, specs = digits(3), (parse_threat("l1:1"),)
    sheet, referee = prepare(Subject(wrap(load("digits-robust")), data.x, data.y, data.indices, "digits", {}), Plan(specs, "fast"))
    (current,), hits = sheet.rounds, sheet.hits["l1"]
    stages = plan(named("l1"), "fast", classes=10, single_label=True, gradients=True)
    going_on = next(stage for stage in stages if stage.from_closest)
    assert bool(sheet.correct.all())
    hits.closest = {0: (0.05, data.x[0].clone())}
    attack_round(sheet, referee, current, going_on, 0, True, lambda *_: None)
    assert [(row.name, row.tried) for row in current.attacks] == [("swaps", 1)]
    assert hits.closest == {}
    attack_round(sheet, referee, current, going_on, 0, True, lambda *_: None)
    assert len(current.attacks) == 1


def test_a_climb_from_the_closest_point_ends_closer_and_another_search_goes_on_from_there() -> None:
    data, specs = digits(100), (parse_threat("l1:1"),)
    sheet, referee = prepare(Subject(wrap(load("digits-robust")), data.x, data.y, data.indices, "digits", {}), Plan(specs, "default"))
    (current,), hits = sheet.rounds, sheet.hits["l1"]
    stages = plan(named("l1"), "default", classes=10, single_label=True, gradients=True)
    place = next(place for place, stage in enumerate(stages) if stage.from_closest)
    for stage in stages[:place]:
        attack_round(sheet, referee, current, stage, 0, True, lambda *_: None)

    def close() -> dict[int, float]:
        standing = sheet.standing("l1", 1.0)
        return {row: share for row, (share, _) in hits.closest.items() if bool(standing[row])}

    before = close()
    assert len(before) > 2
    attack_round(sheet, referee, current, stages[place], 0, True, lambda *_: None)
    assert (current.attacks[-1].name, current.attacks[-1].tried) == ("vertices", len(before))
    after = close()
    assert after
    assert set(after) <= set(before)
    assert sum(after.values()) < sum(before[row] for row in after)
    attack_round(sheet, referee, current, stages[place + 1], 0, True, lambda *_: None)
    assert (current.attacks[-1].name, current.attacks[-1].tried) == ("swaps", len(after))
    assert close() == {}


def test_where_searches_came_closest_is_kept_under_l1() -> None:
    data, specs = digits(200), (parse_threat("l1:1"), parse_threat("l2:0.5"))
    sheet, referee = prepare(Subject(wrap(load("digits-standard")), data.x, data.y, data.indices, "digits", {}), Plan(specs, "fast"))
    for current in sheet.rounds:
        search = eb.attacks.apgd(20, threat=named(current.threat), objective=margin)
        attack_round(sheet, referee, current, Stage(search, 20), 0, True, lambda *_: None)
    assert sheet.hits["l2"].closest == {}
    hits = sheet.hits["l1"]
    assert hits.closest
    standing = sheet.standing("l1", 1.0)
    assert set(hits.closest) == set((standing & (hits.near <= CLOSE)).nonzero().squeeze(1).tolist())
    rows = torch.tensor(sorted(hits.closest))
    points, goal = torch.stack([hits.closest[row][1] for row in rows.tolist()]), sheet.subject.goal.take(rows)
    answers = sheet.subject.victim.outputs(points, eb.core.Tally.zeros(len(rows)))
    (now, rivals), (clean, _) = (lead_and_rival(output.double(), goal) for output in (answers, sheet.clean[rows]))
    assert hits.rival[rows].tolist() == rivals.tolist()
    assert [hits.closest[row][0] for row in rows.tolist()] == pytest.approx((now / clean).tolist())


@pytest.mark.parametrize(
    ("spent", "runs"),
    [(0, [3, 3, 3, 3]), (100, [3, 3, 3, 3]), (101, [3, 2, 3, 3]), (140, [1, 1, 1, 1]), (149, [0, 0, 1, 1]), (156, None), (999, None)],
)
def test_a_stage_that_fills_runs_as_often_as_fits(spent: int, runs: list[int] | None) -> None:
    """160 rows are left at first; a run of one of the 4 that are searched takes 5 rows. The last runs are for those that came nearest."""
    stage = Stage(Restarts(eb.attacks.pgd(steps=5), 3, abreast=True), 15, fill=5)
    attack = stage.suited(torch.tensor([0.3, 0.4, 0.1, 0.2], dtype=torch.float64), 160 - spent)
    assert (attack is None) is (runs is None)
    if isinstance(attack, Restarts):
        assert isinstance(attack.abreast, torch.Tensor)
        assert attack.abreast.tolist() == runs


def test_a_stage_at_rivals_aims_at_the_class_that_came_nearest() -> None:
    """Five samples, each at a class of its own; who came no nearer than the clean input is left out."""
    data, specs = digits(60), (parse_threat("linf:0.02"),)
    sheet, referee = prepare(Subject(wrap(load("digits-robust")), data.x, data.y, data.indices, "digits", {}), Plan(specs, "fast"))
    (current,), hits = sheet.rounds, sheet.hits["linf"]
    goals: list[Any] = []

    @dataclass(frozen=True)
    class Heard:
        attack: AttackLike
        name: str = "heard"
        threat: Any = None

        def __call__(self, model: Any, x: torch.Tensor, goal: Any, *rest: Any, **options: Any) -> Any:
            goals.append(goal)
            return self.attack(model, x, goal, *rest, **options)

    search = Heard(eb.attacks.pgd(2, threat=named("linf")))
    attack_round(sheet, referee, current, Stage(search, 2, at_rival=True), 0, True, lambda *_: None)
    assert goals == []
    rows = sheet.standing("linf", 0.02).nonzero().squeeze(1)[:5]
    hits.near[rows], hits.rival[rows] = 0.5, (data.y[rows] + torch.arange(1, 6)) % 10
    asked = hits.rival[rows].tolist()
    attack_round(sheet, referee, current, Stage(search, 2, at_rival=True), 0, True, lambda *_: None)
    (goal,) = goals
    assert isinstance(goal, Aimed)
    assert (goal.labels.tolist(), goal.targets.tolist()) == (data.y[rows].tolist(), asked)


def test_a_stage_may_try_the_share_that_came_nearest() -> None:
    """Of five that stand three, in their own order; one that came as near, but fell, is not among them."""
    data, specs = digits(6), (parse_threat("l1:1"),)
    sheet, _ = prepare(Subject(wrap(load("digits-robust")), data.x, data.y, data.indices, "digits", {}), Plan(specs, "fast"))
    hits = sheet.hits["l1"]
    hits.near[:] = torch.tensor([0.9, 0.2, 0.1, 0.4, 0.4, 0.7], dtype=hits.near.dtype)
    stands, search = torch.tensor([True, True, False, True, True, True]), eb.attacks.pgd(2, threat=named("l1"))
    tried = {share: tried_rows(hits, stands, Stage(search, 2, nearest=share)).tolist() for share in (0.5, 0.2, 1.0)}
    assert tried == {0.5: [1, 3, 4], 0.2: [1], 1.0: [0, 1, 3, 4, 5]}
    (walk,) = (stage for stage in plan(named("l1"), "default", classes=10, single_label=True, gradients=True) if stage.nearest < 1)
    assert (walk.attack.name, walk.pays, walk.fill) == ("outside_in", 0.0, 0)


def test_under_l2_rows_that_are_left_go_to_another_loss() -> None:
    *_, last = plan(named("l2"), "default", classes=10, single_label=True, gradients=True)
    assert isinstance(last.attack, EveryTarget)
    assert isinstance(last.attack.attack, Attack)
    assert last.attack.attack.objective is dlr_targeted
    near = torch.full((4,), 0.2, dtype=torch.float64)
    for runs, left in (([2] * 4, 8 * last.fill), ([2, 2, 2, 1], 7 * last.fill), ([1, 1, 1, 0], 3 * last.fill)):
        attack = last.suited(near, left)
        assert isinstance(attack, EveryTarget)
        assert isinstance(attack.abreast, torch.Tensor)
        assert attack.abreast.tolist() == runs
    assert last.suited(near, last.fill - 1) is None
    *_, other = plan(named("l2"), "default", classes=10, single_label=False, gradients=True)
    assert not isinstance(other.attack, EveryTarget)


def test_fewer_targets_for_some_are_the_most_promising_ones() -> None:
    """Whole numbers say how many of its targets each sample is attacked at."""
    data, model = digits(8), load("digits-standard")
    asked = eb.attacks.apgd_t(3, targets=3, threat=named("l2"))
    counts = torch.tensor([3, 1, 0, 2, 3, 1, 0, 2])
    whole, some = (replace(asked, abreast=abreast)(model, data.x, data.y, 1e-6) for abreast in (True, counts))
    steps = [(one - one.min()).tolist() for one in (whole.backwards, some.backwards)]
    assert len(set(steps[0])) == 1
    assert steps[1] == (3 * counts).tolist()


def test_a_round_may_spend_on_who_stands_more_than_on_who_broke() -> None:
    assert row_budget(3, 5) == 3 * row_budget(1, 0) + 5 * row_budget(0, 1)
    assert row_budget(1, 0) > 5 * row_budget(0, 1) > 0


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_no_search_looks_more_often_than_its_stage_says(norm: str, effort: str) -> None:
    """For the estimate of time counts samples that never break."""
    for stage in plan(named(norm), effort, classes=10, single_label=True, gradients=True):
        attack, runs = stage.attack, 1
        while isinstance(attack, Restarts | EveryTarget):
            inner = attack.attacks[0] if isinstance(attack, Restarts) else attack.attack  # of several all have the same steps
            attack, runs = inner, runs * attack.count
        assert isinstance(attack, Attack | OutsideIn)
        looks = attack.steps + (attack.far.attack.steps * (attack.far.rounds + 1) if isinstance(attack, OutsideIn) else 0)
        assert attack.name == "noise" or runs * looks <= stage.rows, attack


@pytest.mark.parametrize(("broken", "unfunded", "asked"), [(0, False, False), (1, False, False), (2, False, True), (2, True, False)])
def test_a_stage_that_has_to_pay_runs_where_the_one_before_broke_enough(broken: int, unfunded: bool, asked: bool) -> None:
    data, specs = digits(40), (parse_threat("linf:0.05"),)
    sheet, referee = prepare(Subject(wrap(load("digits-robust")), data.x, data.y, data.indices, "digits", {}), Plan(specs, "fast"))
    current = sheet.rounds[0]
    current.attacks.append(AttackRow(name="before", recipe="", tried=20, broken=broken, forwards=0, backwards=0, seconds=0.0))
    if unfunded:
        many = Stage(Restarts(eb.attacks.pgd(steps=1), 2, abreast=True), 2, fill=10**6)
        attack_round(sheet, referee, current, many, 0, True, lambda *_: None)
    attack_round(sheet, referee, current, Stage(eb.attacks.pgd(steps=1), 1, pays=0.1), 0, True, lambda *_: None)
    assert (len(current.attacks) == 2) is asked


# Honest models, on enough samples for the checks to have their say.


@pytest.mark.slow
@pytest.mark.doubt
@pytest.mark.parametrize("name", ["digits-standard", "digits-robust"])
def test_honest_models_are_trusted_under_every_threat(name: str, tmp_path: Path) -> None:
    threats = ("linf:0.02,0.1,0.3", "l2:0.25,1", "l1:1,4", "l0:2,8", "l0f:4")
    report = audited(tmp_path, model=name, data=digits(200), threats=threats, effort="default")
    told = [(r.threat, r.radius_text, f.id) for r in report.models[0].results for f in r.flags if f.severity != "info"]
    assert [one for one in told if one[2] != "effort"] == []  # which says that a search was loose: no fault of the model
    assert all(r.trustworthy for r in report.models[0].results)


@pytest.mark.doubt
def test_honest_models_are_trusted(tmp_path: Path) -> None:
    report = audited(tmp_path, model=None, data=digits(), threats=("linf:0.1", "l2:0.5"))
    assert all(r.trustworthy for m in report.models for r in m.results)
    standard, robust = (m.robust_accuracy["linf", 0.1].value for m in report.models)
    assert robust > standard + 0.2


# Callers and models with habits.


def shifting(x: Tensor) -> Tensor:
    x.sub_(0.1)
    output: Tensor = load("digits-standard")(x)
    return output


def test_a_model_that_overwrites_its_input_is_audited_like_one_that_does_not(tmp_path: Path) -> None:
    data = digits(40)
    before = data.x.clone()
    in_place = audited(tmp_path, "in place", model=shifting, threats="linf:0.1")
    apart = audited(tmp_path, "apart", model=lambda x: shifting(x.clone()), threats="linf:0.1")
    assert torch.equal(data.x, before)
    counts = [report.models[0].results[0].robust_accuracy.count for report in (in_place, apart)]
    assert counts[0] == counts[1] < 40


def test_a_model_that_raises_under_attack_keeps_what_is_known(tmp_path: Path) -> None:
    net, calls = load("digits-standard"), []

    def tired(x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) == 100:
            raise ValueError("no more")
        output: Tensor = net(x)
        return output

    report = audited(tmp_path, model=tired, threats="linf:0.05,0.1")
    assert report.partial
    assert [f.id for f in report.models[0].flags] == ["raised"]
    assert not any(result.trustworthy for result in report.models[0].results)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_the_callers_mode_does_not_matter(mode: Any, reference: dict[str, Any], tmp_path: Path) -> None:
    net = load("digits-standard")
    with mode():
        report = audited(tmp_path, model=net, threats=THREATS[:2])
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert not torch.is_grad_enabled()
        assert all(line.holds for line in eb.verify(tmp_path / "run", [net]))
    assert all(r.trustworthy for r in report.models[0].results)
    assert verdicts(tmp_path / "run", "linf") == reference["linf"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    report = audited(tmp_path, model=load("digits-standard").to(dtype), threats="linf:0.1")
    assert report.models[0].results[0].trustworthy
    plain = audited(tmp_path, "plain", threats="linf:0.1")
    assert abs(report.models[0].results[0].robust_accuracy.count - plain.models[0].results[0].robust_accuracy.count) <= 1


@pytest.mark.parametrize(("stronger", "severity"), [("margin", "warn"), ("cross_entropy", "block")])
def test_losses_that_disagree_block_where_searches_climb_the_weaker_one(stronger: str, severity: str) -> None:
    def search(attack: AttackLike, rows: Tensor, what: str) -> SimpleNamespace:
        return SimpleNamespace(reached=torch.full((64,), what == stronger))

    scene: Any = SimpleNamespace(correct=torch.arange, threat=named("linf"), search=search)
    assert [(f.id, f.severity) for f in losses_agree(scene)] == [("losses-disagree", severity)]


def test_losses_that_disagree_are_flagged_without_the_preflights_help(tmp_path: Path) -> None:
    """Scores x 1000 kill the gradient of cross-entropy and leave that of the margin, which searches climb: a warning."""
    x, y, weights = blobs(n=128, classes=4, features=30)
    sheet, referee = prepare(
        Subject(wrap(nn.Sequential(linear(weights), Scale(1000.0)).eval()), x, y, torch.arange(128), "blobs", {}),
        Plan((parse_threat("linf:0.2"),), "fast"),
    )
    found = [*losses_agree(Scene(sheet, referee, sheet.rounds[0], 0, sheet.subject.victim))]
    assert [(f.id, f.severity) for f in found] == [("losses-disagree", "warn")]
    honest, judge = prepare(Subject(wrap(linear(weights)), x, y, torch.arange(128), "blobs", {}), Plan((parse_threat("linf:0.2"),), "fast"))
    assert not [*losses_agree(Scene(honest, judge, honest.rounds[0], 0, honest.subject.victim))]
    assert referee.rows > 0


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, scores: Tensor) -> Tensor:
        return self.factor * scores


@pytest.mark.slow
def test_an_exported_program_is_audited_like_the_module(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = torch.export.export(load("digits-standard"), (torch.zeros(8, 1, 8, 8),))
    torch.export.save(program, tmp_path / "net.pt2")
    capfd.readouterr()
    exported = audited(tmp_path, "exported", model=f"{tmp_path}/net.pt2", threats=THREATS[:2])
    plain = audited(tmp_path, "plain", threats=THREATS[:2])
    assert unusual(exported.models[0]) == {}
    assert [r.robust_accuracy for r in exported.models[0].results] == [r.robust_accuracy for r in plain.models[0].results]
    assert all(line.holds for line in eb.verify(tmp_path / "exported"))
    assert capfd.readouterr().err == ""
