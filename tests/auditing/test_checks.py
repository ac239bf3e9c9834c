"""The audit's doubt: each check finds its planted fault, and none of them speaks of honest models."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import Around, Reversed, blobs, digits, linear
from torch import Tensor, nn

import epsball as eb
from epsball.auditing.cascade import Listener, tried_harder
from epsball.auditing.checks import (
    CONTRACT_CHECKS,
    FINAL_CHECKS,
    ROUND_CHECKS,
    Check,
    Scene,
    effort,
    masking,
    rounding_matters,
    told_once,
    transfer_finds_nothing,
)
from epsball.auditing.checks.binarize import planted_inputs_are_found
from epsball.auditing.checks.contract import answers_in_one_pass, classes_suffice
from epsball.auditing.checks.limits import floor_is_reached, radius_means_something
from epsball.auditing.checks.masking import black_box_finds_nothing, noise_finds_nothing, one_step_finds_nothing, severity
from epsball.auditing.checks.scene import ROUGH
from epsball.auditing.checks.search import curve_falls, edge_is_reached, freedom_suffices, search_has_ended, still_climbing
from epsball.auditing.checks.surface import gradients_tell, promises_are_kept, scores_are_steady
from epsball.auditing.plan import plan
from epsball.auditing.preflight import look
from epsball.auditing.referee import Referee
from epsball.auditing.results import Finding, Flag
from epsball.auditing.sheet import Sheet, Subject
from epsball.core import Victim
from epsball.models import wrap
from epsball.report.sarif import RULES
from epsball.threats import parse_threat

ROOT = Path(__file__).parents[2]


def scenes(model: Any, threat: str, x: Tensor, y: Tensor, attacked: bool = True) -> list[Scene]:
    """One for each radius; `attacked` by the fast plan, else every sample that is right stands."""
    victim = model if isinstance(model, Victim) else wrap(model)
    referee = Referee(victim)
    subject = Subject(victim, x, y, torch.arange(len(x)), "data", {})
    sheet = Sheet.start(subject, referee.outputs(x, subject.goal), [], (parse_threat(threat),), queries=300, pace=1e-6)
    for current in sheet.rounds if attacked else ():
        hits, threat_ = sheet.hits[current.threat], sheet.threat(current.threat)
        for stage in plan(threat_, "fast", classes=sheet.clean.shape[1], single_label=True, gradients=True):
            rows = sheet.standing(current.threat, current.radius).nonzero().squeeze(1)
            if not len(rows):
                break
            outcome = stage.attack(victim, x[rows], y[rows], current.radius, 0, clean=sheet.clean[rows])
            ruling = referee.judge(x[rows], outcome.x_adv, subject.goal.take(rows), threat_, current.radius)
            hits.x_adv[rows[ruling.broken]] = outcome.x_adv[ruling.broken]
            hits.radius[rows[ruling.broken]] = current.radius
    return [Scene(sheet, referee, current, 0, victim) for current in sheet.rounds]


def on_digits(change: Callable[[nn.Module, Tensor], Tensor], threat: str, n: int = 40) -> Scene:
    """Nothing attacked: the checks alone have to see what is wrong."""
    data = digits(n)
    return scenes(Around(change), threat, data.x, data.y, attacked=False)[-1]


def raised(check: Check, scene: Scene) -> dict[str, str]:
    return {flag.id: flag.severity for flag in check(scene)}


class Local(torch.autograd.Function):
    """The identity, whose gradient is right up to `width` from a grid of 1/`cells` and points the wrong way beyond."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cells: int, width: float) -> Tensor:
        ctx.save_for_backward(((x - (x * cells).round() / cells).abs() > width).flatten(1).any(1))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (off,) = ctx.saved_tensors
        return torch.where(off.reshape(-1, *[1] * (gradient.ndim - 1)), -gradient, gradient), None, None


def lying(net: nn.Module, x: Tensor) -> Tensor:
    return net(Reversed.apply(x))


def good_at_data(net: nn.Module, x: Tensor) -> Tensor:
    """Digits are multiples of 1/16."""
    return net(Local.apply(x, 16, 1e-4))


def rippled(net: nn.Module, x: Tensor) -> Tensor:
    return net(x + 0.05 * torch.sin(200 * x))


PLANTED: dict[str, tuple[Check, Callable[[nn.Module, Tensor], Tensor], str, dict[str, str]]] = {
    "lying: gradient": (gradients_tell, lying, "linf:0.1", {"false-gradient": "block"}),
    "lying: gradient, l2": (gradients_tell, lying, "l2:0.5", {"false-gradient": "block"}),
    "rippled: gradient": (gradients_tell, rippled, "linf:0.05", {"false-gradient": "warn"}),
    "lying: first step": (promises_are_kept, lying, "linf:0.1", {"landscape": "warn"}),
    "rippled: scores": (scores_are_steady, rippled, "linf:0.1", {"unstable": "warn"}),
    "lying: reach": (edge_is_reached, lying, "linf:0.1", {"reach": "warn"}),
    "lying: search": (search_has_ended, lying, "linf:0.1", {"incomplete": "warn"}),
    "lying: noise": (noise_finds_nothing, lying, "linf:0.25", {"noise-wins": "block"}),
    "lying: black box": (black_box_finds_nothing, lying, "linf:0.1", {"black-box-wins": "block"}),
    "lying: sparse black box": (black_box_finds_nothing, lying, "l0:6", {"black-box-wins": "block"}),
    "good at data: one step": (one_step_finds_nothing, good_at_data, "linf:0.1", {"one-step-wins": "block"}),
    "lying: no bound": (freedom_suffices, lying, "linf:0.1", {"unbounded": "block"}),
    "lying: planted inputs": (planted_inputs_are_found, lying, "linf:0.1", {"binarization": "block"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_fault_is_seen(name: str) -> None:
    check, change, threat, expected = PLANTED[name]
    assert raised(check, on_digits(change, threat)) == expected


def honest() -> Iterator[tuple[str, Any, str, Tensor, Tensor]]:
    data, (x, y, weights) = digits(24), blobs(n=24, classes=4, features=30)
    for name in ("digits-standard", "digits-robust"):
        for threat in ("linf:0.05,0.1,0.2", "l2:0.5,1", "l1:2"):
            yield f"{name} {threat}", eb.load_model(name), threat, data.x, data.y
    yield "linear", linear(weights), "linf:0.05,0.1", x, y
    yield "mlp", mlp(data.x, data.y), "linf:0.05,0.1", data.x, data.y


def mlp(x: Tensor, y: Tensor) -> nn.Module:
    """Without biases: a network that is positively homogeneous, fitted by a few Newton-like steps of Adam from a fixed start."""
    draws = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48, bias=False), nn.ReLU(), nn.Linear(48, 10, bias=False))
    with torch.no_grad():
        for layer in (net[1], net[3]):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=draws) / layer.weight.shape[1] ** 0.5)
    adam = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        adam.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        adam.step()
    return net.eval()


HONEST = {name: case for name, *case in honest()}


@pytest.mark.parametrize("name", HONEST)
def test_honest_models_are_not_doubted(name: str) -> None:
    model, threat, x, y = HONEST[name]
    every = scenes(model, threat, x, y)
    for scene in every:
        attacks = len(scene.current.attacks)
        for check in (*ROUND_CHECKS, *(FINAL_CHECKS if scene is every[-1] else ())):
            assert raised(check, scene) == {}, f"{check.__name__} at {scene.current.text}"
        spent = scene.current.attacks[attacks:]
        assert all(row.name.startswith("check: ") and row.broken == 0 for row in spent)
        assert torch.equal(scene.sheet.hits[scene.current.threat].radius.isinf(), scenes_standing(scene))
    bench = look(every[0].victim, x, y)
    assert [f for check in CONTRACT_CHECKS for f in check(bench)] == []


def scenes_standing(scene: Scene) -> Tensor:
    """Everything not broken at the largest radius: what checks find is entered nowhere."""
    return ~(scene.sheet.hits[scene.current.threat].radius <= max(r.radius for r in scene.sheet.rounds))


COSTS = {
    "cross_entropy": (11, 10),
    "margin": (11, 10),
    "gradients": (27, 3),
    "steady scores": (31, 0),
    "first step": (2, 1),
    "reach": (11, 10),
    "noise": (100, 0),
    "black box": (128, 0),
    "long search": (101, 100),
    "no bound 1": (41, 40),
    "planted inputs: fit": (50, 0),
    "planted inputs: chance": (51, 0),
    "planted inputs: search": (82, 80),
}


def test_doubt_costs_what_the_pages_say() -> None:
    data = digits(40)
    scene = scenes(eb.load_model("digits-robust"), "linf:0.05", data.x, data.y, attacked=False)[0]
    for check in (*ROUND_CHECKS, *FINAL_CHECKS):
        assert raised(check, scene).keys() <= {"one-step-wins", "black-box-wins", "noise-wins"}  # nothing was attacked here
    rows = {row.name.removeprefix("check: "): row for row in scene.current.attacks}
    for name, (forwards, backwards) in COSTS.items():
        row = rows.pop(name)
        assert 0 < row.forwards <= forwards * row.tried, name
        assert row.backwards <= backwards * row.tried, name
    for name in ("gradients", "steady scores", "first step", "planted inputs: fit"):
        row = next(row for row in scene.current.attacks if row.name == f"check: {name}")
        assert (row.forwards, row.backwards) == tuple(count * row.tried for count in COSTS[name])
    assert {name.split()[0] for name in rows} == {"one", "curve"}
    assert all(row.forwards <= 11 * row.tried for row in rows.values())


def test_a_search_led_astray_by_larger_steps_is_seen() -> None:
    """The gradient is right up to 0.06 from the data, which lie on a grid of 1/4, and points the wrong way beyond."""
    x, y, weights = blobs(n=64, classes=4, features=30)
    x = (x * 4).round() / 4

    class Brittle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = linear(weights)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(Local.apply(x, 4, 0.0605))

    assert raised(curve_falls, scenes(Brittle(), "linf:0.06,0.12", x, y, attacked=False)[-1]) == {"curve": "block"}
    assert raised(curve_falls, scenes(linear(weights), "linf:0.06,0.12", x, y, attacked=False)[-1]) == {}


def test_balls_that_meet_and_what_lies_in_them() -> None:
    scene = on_digits(lambda net, x: net(x), "linf:0.5")
    assert raised(radius_means_something, scene) == {"radius": "warn"}
    assert raised(floor_is_reached, scene) == {"floor": "block"}
    assert raised(floor_is_reached, on_digits(lambda net, x: net(x), "linf:0.3")) == {}
    far = on_digits(lambda net, x: net(x), "l2:6")
    assert raised(radius_means_something, far) == {"radius": "warn"}
    assert raised(floor_is_reached, far) == {"floor": "block"}


def test_a_radius_is_judged_by_the_distance_between_classes() -> None:
    """Two points, 0.4 apart: their balls meet from 0.2 on."""
    x, y = torch.tensor([[0.3, 0.5], [0.7, 0.5]]), torch.tensor([0, 1])
    model = linear(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    for threat, met in (("linf:0.19", False), ("linf:0.21", True), ("l2:0.19", False), ("l1:0.21", True)):
        assert bool(raised(radius_means_something, scenes(model, threat, x, y, attacked=False)[0])) == met


def test_what_fools_another_model_is_tried() -> None:
    data = digits(40)
    source = scenes(eb.load_model("digits-standard"), "linf:0.15", data.x, data.y)[0]
    target = on_digits(lying, "linf:0.15")
    assert {f.id: f.severity for f in transfer_finds_nothing(target, source.sheet)} == {"transfer-wins": "block"}
    assert target.current.attacks[-1].name == "check: transfer"
    assert target.current.attacks[-1].forwards >= target.current.attacks[-1].tried > 0
    robust = scenes(eb.load_model("digits-robust"), "linf:0.15", data.x, data.y)[0]
    assert [*transfer_finds_nothing(robust, source.sheet), *transfer_finds_nothing(source, robust.sheet)] == []
    other = digits(39)
    elsewhere = scenes(Around(lying), "linf:0.15", other.x, other.y, attacked=False)[0]
    assert [*transfer_finds_nothing(elsewhere, source.sheet)] == []
    assert elsewhere.current.attacks == []


@pytest.mark.parametrize(("lost", "told"), [(3, {}), (4, {"rounding": "info"})])
def test_what_rounding_undoes_is_told(lost: int, told: dict[str, str]) -> None:
    scene = on_digits(lambda net, x: net(x), "linf:0.1")
    right = scene.sheet.correct.nonzero().squeeze(1)[:10]
    scene.sheet.hits["linf"].radius[right] = 0.1
    assert [*rounding_matters(scene.sheet, scene.current)] == []  # nobody has rounded anything
    kept = torch.zeros(40, dtype=torch.bool)
    kept[right[lost:]] = True
    scene.sheet.rounded["linf"] = kept
    assert {f.id: f.severity for f in rounding_matters(scene.sheet, scene.current)} == told


def purified(net: nn.Module, x: Tensor) -> Tensor:
    """Moves the input a little toward confidence before it answers."""
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(net(z).logsumexp(1).sum(), z)
    return net(x + 0.01 * slope.sign())


def purified_by_function(net: nn.Module, x: Tensor) -> Tensor:
    return net(x + 0.01 * torch.func.grad(lambda z: net(z).logsumexp(1).sum())(x).sign())


def with_gradients_on(net: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return net(x.detach().requires_grad_() * 1.0).detach()


@pytest.mark.parametrize(("change", "seen"), [(purified, True), (purified_by_function, True), (with_gradients_on, False), (rippled, False)])
def test_a_model_that_optimizes_while_it_answers_is_found(change: Callable[[nn.Module, Tensor], Tensor], seen: bool) -> None:
    bench = look(wrap(Around(change)), digits(40).x, digits(40).y)
    assert {f.id: f.status for f in answers_in_one_pass(bench)} == ({"optimizes": "warn"} if seen else {})


def test_a_model_that_raises_is_not_called_an_optimizer() -> None:
    bench = look(wrap(Around(lambda net, x: net(x) if len(x) > 4 else net(x[:, :, :3]))), digits(40).x, digits(40).y)
    with pytest.raises(RuntimeError):
        [*answers_in_one_pass(bench)]


@pytest.mark.parametrize("classes", [2, 3])
def test_two_classes_leave_nothing_to_aim_at(classes: int) -> None:
    x, y, weights = blobs(n=20, classes=classes)
    bench = look(wrap(linear(weights)), x, y)
    assert {f.id: f.status for f in classes_suffice(bench)} == ({"classes": "note"} if classes == 2 else {})


def test_a_model_without_features_skips_the_test_of_planted_inputs() -> None:
    data = digits(40)
    convolutional = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()).eval()
    (flag,) = planted_inputs_are_found(scenes(convolutional, "linf:0.1", data.x, convolutional(data.x).argmax(1), attacked=False)[0])
    assert (flag.id, flag.severity) == ("binarization", "info")
    assert "no linear layer" in flag.message


def test_a_twin_with_other_scores_is_not_called_rough() -> None:
    """Searches may look through a twin whose scores are divided; the sheet knows those of the model."""
    data = digits(24)
    scene = scenes(Around(lambda net, x: 1000 * net(x)), "linf:0.1", data.x, data.y, attacked=False)[0]
    twin = replace(scene, victim=eb.load_model("digits-standard"))
    assert [flag for check in ROUND_CHECKS[3:7] for flag in check(twin)] == []


def test_the_end_of_a_search_is_read_from_its_best_scores() -> None:
    steps = torch.arange(9, dtype=torch.float64)
    straight, ended = steps, steps.clamp(max=6)
    back = torch.where(steps > 6, -steps, steps)  # the best stays
    still = torch.zeros(9, dtype=torch.float64)
    almost = torch.where(steps > 6, 6.3, steps.clamp(max=6))  # 0.3 of 6.3 is less than 5 %
    told = still_climbing(torch.stack([straight, ended, back, still, almost], 1))
    assert told.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("tried", ["fast", "default"])
def test_where_twice_the_effort_breaks_samples_all_that_stand_are_attacked_so(tried: str) -> None:
    """On a linear model, that nothing attacked before: at effort default those stand that no change of 0.05 breaks, at fast all do."""
    x, y, weights = blobs(60, features=30)
    x, model, radius = x.clamp(0.05, 0.95), linear(weights), 0.05
    scores = model(x)
    lead = scores.gather(1, y[:, None]) - scores
    rows = 4 * weights.double()
    needed = radius * (rows[y][:, None] - rows).abs().sum(2)
    stands = ((lead > needed) | (torch.arange(len(weights)) == y[:, None])).all(1)
    (scene,) = scenes(model, f"linf:{radius}", x, y, attacked=False)
    before = scene.sheet.standing("linf", radius).sum()
    flags = tried_harder(scene, tried, True, Listener(scene.sheet, scene.current, lambda _: None))
    after = scene.sheet.standing("linf", radius)
    assert 5 < stands.sum() < before - 5
    assert torch.equal(after, stands) if tried == "default" else after.sum() == before
    assert [(flag.id, flag.severity) for flag in flags] == [("effort", "info" if tried == "default" else "block")]
    if tried == "default":
        assert flags[0].message.startswith(f"Twice the effort broke {before - stands.sum()} of all {before} samples")


def test_what_more_effort_breaks_weighs_what_it_costs() -> None:
    assert [effort.severity(lower) for lower in (0.005, 0.01, 0.05, 0.051)] == ["info", "warn", "warn", "block"]


@pytest.mark.parametrize(("threat", "told"), [("l0:1", {}), ("linf:0.2", {"black-box-wins": "warn"})])
def test_under_l0_luck_is_not_called_a_better_search(threat: str, told: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse-RS is part of the plan there: few successes are more luck."""
    data = digits(40)
    scene = scenes(eb.load_model("digits-standard"), threat, data.x, data.y, attacked=False)[0]
    assert raised(black_box_finds_nothing, scene) == {"black-box-wins": "block"}  # nothing was attacked here
    monkeypatch.setattr(masking, "severity", lambda found, n: "warn")
    assert raised(black_box_finds_nothing, scene) == told


def test_costly_checks_see_a_third_of_few_samples() -> None:
    data = digits(64)
    for n, most in ((10, 10), (24, 16), (64, 21)):
        scene = scenes(eb.load_model("digits-robust"), "linf:0.05", data.x[:n], data.y[:n], attacked=False)[0]
        assert len(scene.few()) == min(most, int(scene.sheet.correct.sum()))


def test_one_success_warns_and_many_block() -> None:
    assert [severity(found, 64) for found in (1, 6, 7, 64)] == ["warn", "warn", "block", "block"]


@pytest.mark.parametrize("known", ROUGH)
def test_what_the_preflight_explains_is_not_told_again(known: str) -> None:
    scene = on_digits(rippled, "linf:0.05", n=16)
    rough = (scores_are_steady, gradients_tell, promises_are_kept, edge_is_reached, search_has_ended)
    assert all(raised(check, scene) for check in rough)
    scene.sheet.findings.append(Finding(id=known, status="pass", message="All is well."))
    assert raised(scores_are_steady, scene)
    scene.sheet.findings.append(Finding(id=known, status="warn", message="It is not."))
    assert all(raised(check, scene) == {} for check in rough)


def test_each_cause_is_told_once() -> None:
    def flags(*names: str) -> list[Flag]:
        return [Flag(id=name, severity="warn", message=name) for name in names]

    assert [f.id for f in told_once(flags("reach", "false-gradient", "black-box-wins"))] == ["false-gradient", "black-box-wins"]
    assert [f.id for f in told_once(flags("reach", "incomplete"))] == ["reach", "incomplete"]


def ids_in_source() -> set[str]:
    """Every id given to a Flag or a Finding, and the rules of SARIF that are neither."""
    found = set(RULES)
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Flag", "Finding"):
                given = (part for word in node.keywords if word.arg == "id" for part in ast.walk(word.value))
                found |= {part.value for part in given if isinstance(part, ast.Constant)}
    return found


def test_every_flag_has_a_page_and_every_page_a_flag() -> None:
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "flags").glob("*.md")}
    index = pages.pop("README")
    assert set(pages) == ids_in_source()
    for name, text in pages.items():
        assert text.startswith(f"# {name}\n")
        assert f"[{name}]({name}.md)" in index
        for heading in ("**Seen.**", "**Computed.**", "**Threshold.**", "**Cost.**", "**Usually means.**", "**What to do.**"):
            assert heading in text, f"{name}: {heading}"
