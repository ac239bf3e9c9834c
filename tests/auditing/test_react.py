"""The plan reacts to what hides gradients: planted defenses end near the number of the model that they hide, and say what was met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import Around, Reversed, Stubborn, digits, without_gradient
from torch import Tensor, nn
from torch.nn import functional as F

import epsball as eb
from epsball.auditing import react, run
from epsball.auditing.canaries import Planted, cases, misjudged
from epsball.auditing.cascade import attack_round, stages_of
from epsball.auditing.checks import Scene
from epsball.auditing.checks.binarize import planted_inputs_are_found
from epsball.auditing.plan import PAYS
from epsball.auditing.preflight import look
from epsball.auditing.react import ALIKE, CUSTOM, After, alike
from epsball.auditing.referee import Referee
from epsball.auditing.results import Finding, ModelReport
from epsball.auditing.run import Plan, canaries, prepare
from epsball.auditing.sheet import Sheet, Subject
from epsball.auditing.ways import BLANK, FAR, REACH, TRUE, blank, nudged, truth
from epsball.core import Untargeted, Victim
from epsball.core.inside import Part, Probed
from epsball.core.relaxed import Relaxed
from epsball.threats import ThreatSpec, parse_threat

HIDDEN: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "rounded": (lambda net, x: net((x * 16).round() / 16), "no-gradient"),
    "detached": (lambda net, x: net(x.detach()), "no-gradient"),
    "without gradient": (without_gradient, "no-gradient"),
    "saturated": (lambda net, x: 1000 * net(x), "gradient"),
    "probabilities": (lambda net, x: (30 * net(x)).softmax(1), "probabilities"),
    "certainties": (lambda net, x: (300 * net(x)).softmax(1), "no-gradient"),
    "lying": (lambda net, x: net(Reversed.apply(x)), "false-gradient"),
    "random": (lambda net, x: net(x + 0.05 * torch.randn_like(x)), "random"),
}


def poisoned(net: nn.Module, x: Tensor) -> Tensor:
    """The surer the answer, the less sure it looks: the order of scores stays, their slope turns round."""
    scores = net(x)
    return scores / (1 + 0.02 * scores.square().sum(1, keepdim=True))


def audited(model: nn.Module | str, out: Path, threat: str = "linf:0.16") -> ModelReport:
    victim = eb.load_model(model) if isinstance(model, str) else eb.wrap(model)
    return eb.audit(victim, digits(64), threat, effort="fast", out=out).models[0]


@pytest.mark.parametrize("name", HIDDEN)
def test_what_hides_gradients_is_met_and_named(name: str, tmp_path: Path) -> None:
    change, finding = HIDDEN[name]
    hidden, bare = audited(Around(change), tmp_path / "a"), audited("digits-standard", tmp_path / "b")
    assert {f.id: f.status for f in hidden.findings}[finding] in ("warn", "mended")
    assert hidden.results[0].value <= bare.results[0].value + 3 / 64
    assert not [flag for flag in hidden.flags if flag.severity == "block"]


def test_a_backward_pass_that_raises_is_replaced_or_gone_around(tmp_path: Path) -> None:
    model = audited(Around(lambda net, x: net(Stubborn.apply(x))), tmp_path)
    assert "no-gradient" in {f.id for f in model.findings if f.status in ("warn", "block")}
    assert "square" in {a.name for a in model.results[0].attacks}


def test_an_honest_model_is_looked_at_as_it_is() -> None:
    data = digits(64)
    subject = Subject(eb.load_model("digits-standard"), data.x, data.y, data.indices, "digits", {})
    sheet, referee = prepare(subject, Plan((parse_threat("linf:0.1"),), "fast"))
    assert sheet.sight.victim is sheet.subject.victim
    assert (sheet.sight.own, sheet.sight.judges, sheet.sight.hidden, sheet.sight.rough, referee.draws) == (True, 1, (), False, 1)


@pytest.mark.parametrize("name", ["digits-standard", "digits-robust"])
def test_gradients_of_honest_models_agree_with_their_neighbors(name: str) -> None:
    assert alike(look(eb.load_model(name), digits().x, digits().y), 0) > 0.99


@pytest.mark.parametrize("name", ["digits-standard", "digits-robust"])
def test_gradients_of_honest_models_tell_how_scores_change(name: str) -> None:
    bench = look(eb.load_model(name), digits().x, digits().y)
    assert min(truth(bench, 0), truth(bench, 0, REACH)) > 0.9


def behind_a_hook(net: nn.Module, x: Tensor) -> Tensor:
    inner = x + 0
    if inner.requires_grad:
        inner.register_hook(torch.neg)
    return net(inner)


@pytest.mark.parametrize("change", [HIDDEN["lying"][0], behind_a_hook], ids=["custom backward pass", "hook"])
def test_a_gradient_that_lies_is_gone_around(change: Callable[[nn.Module, Tensor], Tensor]) -> None:
    sheet, _ = prepared(change)
    assert truth(look(sheet.subject.victim, digits(64).x, digits(64).y), 0) < -0.8
    assert (sheet.sight.own, sheet.sight.rough) == (False, False)
    assert {f.id: f.status for f in sheet.findings}["false-gradient"] == "warn"
    assert "square" in {stage.attack.name for stage in stages_of(sheet, sheet.rounds[0], "fast")}
    assert truth(look(sheet.sight.victim, digits(64).x, digits(64).y), 0) > 0.8


def test_a_gradient_of_which_a_hook_leaves_little_is_gone_around_beside_the_own(tmp_path: Path) -> None:
    sheet, _ = prepared(hooked)
    assert TRUE < truth(look(sheet.subject.victim, digits(64).x, digits(64).y), 0) < FAR
    assert (sheet.sight.own, sheet.sight.hidden[0]) == (True, CUSTOM)
    assert truth(look(sheet.sight.victim, digits(64).x, digits(64).y), 0) > 0.9
    hidden, bare = audited(Around(hooked), tmp_path / "a"), audited("digits-standard", tmp_path / "b")
    assert {f.id: f.status for f in hidden.findings}["false-gradient"] == "warn"
    assert hidden.results[0].value <= bare.results[0].value + 3 / 64


def moved(net: nn.Module, x: Tensor) -> Tensor:
    """Far away in NumPy, from where a layer brings it back."""
    return net(torch.from_numpy(np.roll(x.detach().numpy(), (3, 3), axis=(2, 3))))


def measured(net: nn.Module, x: Tensor) -> Tensor:
    """A spectrum in NumPy, of another shape than the image, that a layer undoes."""
    found = np.fft.rfft(x.detach().numpy().reshape(len(x), 64))
    return net(torch.from_numpy(np.concatenate([found.real, found.imag], 1).astype(np.float32)))


class Back(nn.Module):
    """The standard digit classifier behind what brings its images back."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = (eb.load_model("digits-standard").model,), change  # no submodule that could be asked by itself

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](self.change(x))


BACK: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "moved": (moved, lambda z: z.roll((-3, -3), (2, 3))),
    "measured": (measured, lambda z: torch.fft.irfft(torch.complex(z[:, :33], z[:, 33:]), n=64).reshape(-1, 1, 8, 8)),
}


@pytest.mark.parametrize("name", BACK)
def test_what_moves_or_measures_outside_of_autograd_is_followed_by_differences(name: str, tmp_path: Path) -> None:
    change, back = BACK[name]
    model = Around(change)
    model.net = Back(back).eval()
    victim, data = eb.wrap(model), digits(32)
    threats = (parse_threat("l2:0.6"),)
    sheet, _ = prepare(Subject(victim, data.x, data.y, data.indices, "digits", {}), Plan(threats, "fast"))
    few, many, wide = sheet.sight.shaken
    assert [twin.probes for twin in (few, many, wide)] == [64, 128, 64]  # of 64 features, each by itself at last
    stages = [s for s in stages_of(sheet, sheet.rounds[0], "fast") if s.attack.name == "random_directions"]
    assert [(s.victim, s.pays) for s in stages] == [(few, 0.0), (many, PAYS), (wide, 0.0)]
    report = eb.audit(victim, data, "l2:0.6", effort="fast", out=tmp_path / "a").models[0]
    bare = eb.audit(eb.load_model("digits-standard"), data, "l2:0.6", effort="fast", out=tmp_path / "b").models[0]
    assert {f.id: f.status for f in report.findings}["no-gradient"] == "warn"
    assert report.results[0].value <= bare.results[0].value + 3 / 32


def test_where_other_twins_tell_how_scores_change_none_is_shaken() -> None:
    assert all(prepared(HIDDEN[name][0])[0].sight.shaken == () for name in ("rounded", "detached", "without gradient"))


def surer(net: nn.Module, x: Tensor) -> Tensor:
    """Shown what makes it surer of its first answer (an anti-adversary)."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        for _ in range(2):
            scores = net(leaf)
            (slope,) = torch.autograd.grad(F.cross_entropy(scores, scores.argmax(1), reduction="sum"), leaf)
            leaf = (leaf - 0.15 * slope.sign()).detach().requires_grad_()
    return net(x + (leaf - x).detach())


def test_a_network_around_which_something_is_worked_out_is_followed_by_itself(tmp_path: Path) -> None:
    sheet, _ = prepared(surer)
    assert isinstance(sheet.sight.straight, Victim)
    assert (type(sheet.sight.straight.model), sheet.sight.straight.probes) == (Part, 1)
    hidden, bare = audited(Around(surer), tmp_path / "a"), audited("digits-standard", tmp_path / "b")
    assert hidden.results[0].value <= bare.results[0].value + 3 / 64


def kinked(net: nn.Module, x: Tensor) -> Tensor:
    """As counts often are, by sign and size: at 0 autograd has no slope of either."""
    return net(x.sign() * torch.log1p(200 * x.abs()) / 5.3)


def test_where_most_features_lie_on_a_kink_the_gradient_is_taken_further_in() -> None:
    data = digits(64)
    x = data.x * (data.x > 0.8)
    bench = look(eb.wrap(Around(kinked)), x, data.y)
    assert blank(bench) > BLANK
    found = nudged(bench)
    assert found is not None
    assert blank(replace(bench, victim=found)) < 0.3
    plain = look(eb.wrap(Around(lambda net, z: net((200 * z).log1p() / 5.3))), x, data.y)
    assert blank(plain) < 0.3
    assert nudged(plain) is None


def test_scores_whose_slope_turns_round_are_seen_before_that(tmp_path: Path) -> None:
    sheet, _ = prepared(poisoned)
    assert (sheet.sight.own, sheet.sight.hidden) == (True, ("after module.net",))
    x = digits(64).x
    assert torch.equal(sheet.sight.victim.model(x).argmax(1), sheet.subject.victim.model(x).argmax(1))
    hidden, bare = audited(Around(poisoned), tmp_path / "a"), audited("digits-standard", tmp_path / "b")
    assert {f.id: f.status for f in hidden.findings}["hidden-steps"] == "note"
    assert hidden.results[0].value <= bare.results[0].value + 3 / 64
    assert [a.broken for a in hidden.results[0].attacks if a.name == "pgd"][1] > 0


def windows(x: Tensor) -> Tensor:
    return F.unfold(F.pad(x, (1, 1, 1, 1)), 3).reshape(len(x), 9, *x.shape[2:])


def test_what_filters_outside_of_autograd_is_probed(tmp_path: Path) -> None:
    """A median in NumPy falls under L2 as the same median in autograd's sight does."""

    def middle(net: nn.Module, x: Tensor) -> Tensor:
        return net(torch.from_numpy(np.median(windows(x.detach()).numpy(), axis=1, keepdims=True)))

    sheet, _ = prepared(middle)
    assert isinstance(sheet.sight.victim.model, Probed)
    assert {f.id: f.status for f in sheet.findings}["no-gradient"] == "warn"
    outside = audited(Around(middle), tmp_path / "a", "l2:0.6").results[0].value
    within = audited(Around(lambda net, x: net(windows(x).median(1, keepdim=True).values)), tmp_path / "b", "l2:0.6").results[0].value
    assert outside <= within + 3 / 64


@pytest.mark.parametrize(("around", "own"), [(0.8, False), (0.15, True), (0.05, True)])
def test_a_better_gradient_that_is_not_true_is_followed_beside_the_own(around: float, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(react, "truth", lambda bench, seed, aside=0.02: around if isinstance(bench.victim.model, Relaxed) else 0.1)
    sheet, _ = prepared(HIDDEN["lying"][0])
    assert (sheet.sight.own, sheet.sight.rough) == (own, own)
    assert (sheet.sight.victim is sheet.subject.victim) == (around < 0.1)


def test_gradients_that_jump_do_not_and_are_smoothed() -> None:
    data = digits(64)
    model = eb.wrap(Around(lambda net, x: net(x + 0.002 * torch.sin(5000 * x))))
    assert alike(look(model, data.x, data.y), 0) < ALIKE
    sheet, _ = prepare(Subject(model, data.x, data.y, data.indices, "digits", {}), Plan((parse_threat("linf:0.1"),), "fast"))
    stages = stages_of(sheet, sheet.rounds[0], "fast")
    straight = [s.attack.name for s in stages if s.beyond and s.victim is sheet.sight.straight]
    assert [s.attack.name for s in stages if s.beyond] == ["near_0.25", "near_1", *straight, "square"]
    assert "pgd" in straight


def waves(net: nn.Module, x: Tensor) -> Tensor:
    """Every gradient is right, and so is its neighbor, but for no step as long as the radius."""
    return net(x + 0.03 * torch.sin(100 * x))


def cut(net: nn.Module, x: Tensor) -> Tensor:
    """Most pixels are black or white, whatever small changes they meet."""
    return net((4 * (x - 0.5) + 0.5).clamp(0, 1))


def hooked(net: nn.Module, x: Tensor) -> Tensor:
    """A hook lets the gradient of every ninth pixel pass."""
    y = x + 0
    if y.requires_grad:
        y.register_hook(lambda slope: torch.where(torch.arange(64).reshape(8, 8) % 9 == 4, slope, 0.0))
    return net(y)


def test_how_far_gradients_hold_and_what_they_leave_out_is_measured() -> None:
    data, seen = digits(), {}
    for change in (waves, cut):
        bench = look(eb.wrap(Around(change)), data.x, data.y)
        assert alike(bench, 0) > 0.8
        seen[change] = truth(bench, 0), truth(bench, 0, REACH), blank(bench)
    assert seen[waves][0] > 0.9 > FAR > seen[waves][1]
    assert seen[waves][2] < 0.1 < BLANK < seen[cut][2]


def test_where_gradients_do_not_suffice_others_search_beside_them() -> None:
    sheet, _ = prepared(waves, "default")
    assert sheet.sight.rough
    assert {f.id: f.status for f in sheet.findings}["rough"] == "note"
    beyond = [
        s for s in stages_of(sheet, sheet.rounds[0], "default") if s.beyond and (s.victim is None or s.victim is not sheet.sight.straight)
    ]
    blind = [(name, pays) for name in ("square", "simba") for pays in (0, PAYS)]
    assert [(s.attack.name, s.pays) for s in beyond] == [("near_0.25", 0), ("near_1", 0), *blind]
    assert [longer.rows / search.rows for search, longer in zip(beyond[2::2], beyond[3::2], strict=True)] == [4, 4]


def test_what_bounds_cut_off_is_gone_around() -> None:
    sheet, _ = prepared(cut, "default")
    assert (sheet.sight.hidden, sheet.sight.rough) == (("steep clamp",), False)
    assert blank(look(sheet.sight.victim, digits().x, digits().y)) < 0.1
    assert {"pgd", "square", "simba"} <= {s.attack.name for s in stages_of(sheet, sheet.rounds[0], "default") if s.beyond}


def test_features_of_parts_that_take_turns_are_not_read() -> None:
    """A model that draws which of its parts answers has features of one width, then of another."""
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    sheet, referee = prepared(lambda net, x: net(x) if torch.rand(()) < 0.5 else 2 * net(x) + 0 * wide(x))
    sheet.subject.victim.model.get_submodule("module").add_module("wide", wide)  # after the preflight, which it would not change
    scene = Scene(sheet, referee, sheet.rounds[0], 0, sheet.sight.victim)
    assert ["skipped" in flag.message for flag in planted_inputs_are_found(scene)] == [True]


def test_what_breaks_only_beyond_its_own_gradients_is_said(tmp_path: Path) -> None:
    result = audited(Around(lambda net, x: net(x + 0.002 * torch.sin(5000 * x))), tmp_path).results[0]
    names = [a.name for a in result.attacks]
    beyond = sum(a.broken for a in result.attacks[names.index("near_0.25") :])
    assert beyond > 0
    assert {f.id: f.message for f in result.flags}["masked"].startswith(f"{beyond} of ")


def prepared(change: Callable[[nn.Module, Tensor], Tensor], effort: str = "fast") -> tuple[Sheet, Referee]:
    data = digits(64)
    subject = Subject(eb.wrap(Around(change)), data.x, data.y, data.indices, "digits", {})
    return prepare(subject, Plan((parse_threat("linf:0.1"),), effort))


@pytest.mark.parametrize("name", ["rounded", "without gradient", "lying", "random"])
def test_features_are_looked_at_as_scores_are(name: str) -> None:
    """Planted inputs behind a step without a gradient are found through it: no block is raised, and gradients were taken."""
    sheet, referee = prepared(HIDDEN[name][0])
    scene = Scene(sheet, referee, sheet.rounds[0], 0, sheet.sight.victim)
    assert [*planted_inputs_are_found(scene)] == []
    searches = [row for row in sheet.rounds[0].attacks if row.name == "check: planted inputs: search"]
    assert all(row.backwards > 0 for row in searches)
    assert searches or name == "random"


def test_a_twins_search_goes_on_whoever_came_near() -> None:
    sheet, _ = prepared(HIDDEN["rounded"][0], "default")
    own, more = (
        stages_of(replace(sheet, sight=sight), sheet.rounds[0], "default") for sight in (replace(sheet.sight, hidden=()), sheet.sight)
    )
    known = {(repr(s.attack), s.near, s.pays) for s in own}
    added = [s for s in more if (repr(s.attack), s.near, s.pays) not in known]
    assert [s.attack.name for s in added] == ["apgd_t", "apgd", "onward"]
    assert all((s.near, s.pays) == (1.0, 0.0) and s.victim is sheet.sight.victim for s in added)


def test_random_models_are_climbed_on_means_and_never_dropped() -> None:
    sheet, _ = prepared(HIDDEN["random"][0])
    stages = stages_of(sheet, sheet.rounds[0], "fast")
    assert [(s.attack.name, s.rows, s.victim.draws if s.victim else 1, s.keep) for s in stages] == [
        ("eot", 50, 5, True),
        ("eot", 50, 5, True),
        ("eot", 150, 15, True),
    ]


def test_random_models_are_searched_from_vertex_to_vertex_under_l1() -> None:
    data = digits(64)
    subject = Subject(eb.wrap(Around(HIDDEN["random"][0])), data.x, data.y, data.indices, "digits", {})
    sheet, _ = prepare(subject, Plan((parse_threat("l1:1"),), "fast"))
    stages = stages_of(sheet, sheet.rounds[0], "fast")
    assert {s.attack.name.partition(" ")[0] for s in stages} == {"vertices"}
    assert [(s.rows, s.victim.draws if s.victim else 0, s.keep) for s in stages] == [(50, 5, True)] * 2 + [(20, 1, True)] * 10


@pytest.mark.parametrize("threat", ["patch:2", "rigid:0.3", "color:0.1", "flow:0.5"])
def test_random_models_are_searched_by_what_a_threat_has_of_its_own(threat: str) -> None:
    data, shown = digits(64), {}
    for name, model in (("random", eb.wrap(Around(HIDDEN["random"][0]))), ("plain", eb.load_model("digits-standard"))):
        subject = Subject(model, data.x, data.y, data.indices, "digits", {})
        sheet, _ = prepare(subject, Plan((parse_threat(threat),), "fast"))
        shown[name] = stages_of(sheet, sheet.rounds[0], "fast")
    climbs, own = shown["random"][:3], shown["random"][3:]
    assert {s.attack.name for s in climbs} == {"eot"}
    assert [(repr(s.attack), s.rows, s.keep, s.victim and s.victim.draws) for s in own] == [
        (repr(s.attack), 5 * s.rows, True, 5) for s in shown["plain"]
    ]


def test_a_patch_breaks_a_random_model_as_it_breaks_the_model_inside(tmp_path: Path) -> None:
    hidden, bare = audited(Around(HIDDEN["random"][0]), tmp_path / "a", "patch:3"), audited("digits-standard", tmp_path / "b", "patch:3")
    assert hidden.results[0].value <= bare.results[0].value + 6 / 64


class Coin(nn.Module):
    """Class 0 with probability `share`, else class 1."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot((torch.rand(len(x)) >= self.share).long(), 3).float() + 0 * x.sum()


@pytest.mark.parametrize(("share", "answer"), [(0.9, 0), (0.1, 1)])
def test_the_majority_of_the_draws_rules(share: float, answer: int) -> None:
    referee, x = Referee(Victim(Coin(share)), draws=40), torch.zeros(200, 2)
    votes = referee.outputs(x, Untargeted(torch.zeros(200, dtype=torch.long)))
    assert votes.argmax(1).eq(answer).all()
    assert referee.rows == 40 * 200
    assert abs(float(votes[:, 0].mean()) - share) < 0.02
    assert torch.equal(votes, referee.outputs(x, Untargeted(torch.zeros(200, dtype=torch.long))))


def test_a_random_models_run_can_be_verified(tmp_path: Path) -> None:
    model = Around(HIDDEN["random"][0])
    audited(model, tmp_path / "run")
    assert all(line.holds for line in eb.verify(tmp_path / "run", [eb.wrap(model)]))


def search(subject: Subject, threats: tuple[ThreatSpec, ...]) -> Sheet:
    sheet, referee = prepare(subject, Plan(threats, "fast"))
    for current in sheet.rounds:
        for stage in stages_of(sheet, current, "fast"):
            attack_round(sheet, referee, current, stage, 0, True, lambda *_: None)
    return sheet


def test_the_canaries_are_judged_right() -> None:
    finding, _ = canaries(("l1", "l2", "linf"))
    assert (finding.id, finding.status) == ("canaries", "pass"), finding.message


def test_half_of_the_canaries_samples_can_be_broken() -> None:
    own = Planted.make()
    assert 8 <= int((own.least(1.0) < own.radius(1.0)).sum()) <= 16
    assert len(own.y.unique()) == 3


def test_a_search_that_finds_nothing_fails_the_canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "stages_of", lambda *_: ())
    monkeypatch.setattr(run, "_RIGHT", {})
    finding, _ = canaries(("linf",))
    assert finding.status == "block"
    assert "can be broken and were not" in finding.message


def test_a_referee_that_believes_everything_fails_the_canaries() -> None:
    def gullible(subject: Subject, threats: tuple[ThreatSpec, ...]) -> Sheet:
        sheet = search(subject, threats)
        sheet.hits[threats[0].name].radius[:] = 0.0
        return sheet

    assert any("cannot be broken and were" in said for said in misjudged(gullible, ("linf",)))


def test_a_preflight_that_sees_nothing_fails_the_canaries() -> None:
    def blind(subject: Subject, threats: tuple[ThreatSpec, ...]) -> Sheet:
        sheet = search(subject, threats)
        sheet.findings = [Finding(id=f.id, status="pass", message=f.message) for f in sheet.findings]
        return sheet

    said = [*misjudged(blind, ("linf",))]
    assert all(any(truth.finding in one for one in said) for _, _, truth in cases(Planted.make()) if truth.finding)


def test_the_closed_form_of_the_canaries_is_exact() -> None:
    own = Planted.make()
    least = own.least(1.0)
    for share, stands in ((0.999, True), (1.001, False)):
        others = [torch.where(own.y == c, -1, c) for c in range(3)]
        broken = torch.zeros(len(own.x), dtype=torch.bool)
        for c, other in enumerate(others):
            slope = own.weight[c] - own.weight[own.y]
            moved = own.x + (share * least)[:, None].float() * slope.sign() * (other >= 0)[:, None]
            broken |= (moved @ own.weight.T + own.bias).argmax(1) != own.y
        assert bool((~broken).all()) is stands
        assert bool(broken.all()) is not stands


def test_scores_may_pass_through_a_function() -> None:
    x = torch.rand(3, 2)
    assert torch.equal(After(nn.Identity(), torch.neg)(x), -x)
