"""Planted models, each with one known fault: the preflight names exactly that, and nothing on honest models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import (
    Around,
    Caching,
    Remembering,
    Stubborn,
    batch_normed,
    blobs,
    digits,
    linear,
    nan_where_dark,
    normalizing,
    unusual,
    without_gradient,
)
from torch import Tensor, nn
from torch.nn import functional as F

import epsball as eb
from epsball.auditing.preflight import DENSITIES, PROBABILITIES, examine, look, preflight, unlogged
from epsball.auditing.results import ModelReport, Report
from epsball.auditing.run import canaries
from epsball.core import Tally, Victim
from epsball.data import from_arrays
from epsball.errors import BadInput, Refused
from epsball.models import normalization


def found(victim: Victim, x: Tensor | None = None, y: Tensor | None = None) -> dict[str, str]:
    """Findings that did not simply pass."""
    data = digits()
    x, y = (data.x, data.y) if x is None or y is None else (x, y)
    findings = preflight(victim, x, y, normalization=normalization(victim, x.ndim))
    return {f.id: f.status for f in findings if f.status != "pass"}


def audited(model: Any, tmp_path: Path, threats: str = "linf:0.1", data: Any = None, **options: Any) -> Report:
    return eb.audit(model, data or digits(64), threats, effort="fast", out=tmp_path / "run", **options)


def blocked(model: ModelReport) -> set[str]:
    """Everything that takes the headline away."""
    return {f.id for r in model.results for f in (*r.flags, *model.flags) if f.severity == "block"}


CANARIES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "random": (lambda: Around(lambda net, x: net(F.dropout(x, 0.2, training=True))), "random"),
    "batch mean": (lambda: Around(lambda net, x: net(x - 0.5 * x.mean(0, keepdim=True))), "batch"),
    "batch statistics": (lambda: Around(batch_normed), "batch"),
    "seeded": (lambda: Around(lambda net, x: net(x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))), "batch"),
    "memory": (Remembering, "state"),
    "cache": (Caching, "state"),
    "saturated": (lambda: Around(lambda net, x: 1000 * net(x)), "gradient"),
    "quantized": (lambda: Around(lambda net, x: net((x * 8).round() / 8)), "no-gradient"),
    "detached": (lambda: Around(lambda net, x: net(x.detach())), "no-gradient"),
    "without gradient": (lambda: Around(without_gradient), "no-gradient"),
    "backward raises": (lambda: Around(lambda net, x: net(Stubborn.apply(x))), "no-gradient"),
    "constant": (lambda: Around(lambda net, x: net(x * 0)), "constant"),
    "normalization missing": (lambda: Around(normalizing), "scaling"),
    "expects 0..255": (lambda: Around(lambda net, x: net(x / 255)), "scaling"),
}


@pytest.mark.parametrize("name", CANARIES)
def test_each_fault_gets_its_finding_and_no_other(name: str) -> None:
    make, expected = CANARIES[name]
    faults = found(eb.wrap(make()))
    assert faults.pop(expected) == ("warn" if name == "saturated" else "block")  # the margin, which searches climb, does not saturate
    # Whoever answers one class only has no gradient of interest; what else is said must be a consequence of that.
    assert set(faults) <= ({"constant", "no-gradient", "gradient", "scaling"} if expected in ("constant", "scaling") else set())


@pytest.mark.parametrize(("dead", "status"), [(1, None), (4, "warn"), (10, "block")])
def test_how_many_samples_have_no_gradient_decides_what_it_means(dead: int, status: str | None) -> None:
    data = digits(128)
    right = eb.load_model("digits-standard").outputs(data.x, Tally.zeros(128)).argmax(1) == data.y
    chosen = data.x[right][:dead].flatten(1)

    def dark(net: nn.Module, x: Tensor) -> Tensor:
        hidden = torch.cdist(x.flatten(1), chosen, p=torch.inf).amin(1) < 0.05
        return net(torch.where(hidden[:, None, None, None], x.detach(), x))

    assert found(eb.wrap(Around(dark)), data.x, data.y).get("gradient") == status


@pytest.mark.parametrize("name", ["digits-standard", "digits-robust"])
def test_honest_digit_models_have_no_finding(name: str) -> None:
    assert found(eb.load_model(name)) == {}


def test_the_contract_check_costs_what_it_says() -> None:
    forwards, backwards = 0, 0

    def counted(net: nn.Module, x: Tensor) -> Tensor:
        def back(gradient: Tensor) -> None:
            nonlocal backwards
            backwards += len(gradient)

        nonlocal forwards
        forwards += len(x)
        if x.requires_grad:
            x.register_hook(back)
        return net(x)

    model, data = Around(counted), digits(64)
    right = int((model(data.x).argmax(1) == data.y).sum())
    bench = look(eb.wrap(model), data.x, data.y)
    forwards = 0
    examine(bench)
    assert 0.9 * 64 < right <= 64  # so that no other scaling is tried
    assert (forwards, backwards) == (4 * 64 + 32 + 4 * 16 + 8 * right, 4 * right)


def test_an_honest_linear_model_has_no_finding() -> None:
    x, y, weights = blobs(n=120, classes=4)
    assert found(eb.wrap(linear(weights)), x, y) == {}


def test_normalization_that_is_declared_and_needed_is_honest() -> None:
    assert found(eb.wrap(Around(normalizing), mean=0.5, std=0.5)) == {}


def test_a_normalization_that_the_model_does_itself_is_found() -> None:
    model = Around(lambda net, x: net(x), "digits-robust")  # 98 % on x, 33 % on (x + 1) / 2
    assert found(eb.wrap(model, mean=-1.0, std=2.0)) == {"scaling": "block"}


def test_stored_batch_statistics_are_honest() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), Around(lambda net, x: net(x * 0.4 + 0.3)))
    model.train()
    with torch.no_grad():
        for _ in range(50):
            model[0](digits().x)
    assert found(eb.wrap(model)) == {}


def test_wide_scores_do_not_hide_a_random_model() -> None:
    """One infinite score must not drown all other differences."""

    def change(net: nn.Module, x: Tensor) -> Tensor:
        scores = net(x) + 0.01 * torch.randn(len(x), 10)
        return scores.index_fill(0, torch.tensor([0]), torch.inf)

    assert found(eb.wrap(Around(change))).get("random") == "block"


@pytest.mark.parametrize("name", ["constant", "normalization missing", "expects 0..255"])
def test_what_can_only_mislead_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(Refused) as refusal:
        audited(eb.wrap(CANARIES[name][0](), name="canary"), tmp_path, data=digits())
    text = str(refusal.value)
    assert "\n" not in text
    assert text.startswith("model 'canary': ")
    assert ("Check that weights" if name == "constant" else "--mean and --std") in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["batch mean", "memory"])
def test_a_blocked_model_is_audited_but_not_trusted(name: str, tmp_path: Path) -> None:
    make, expected = CANARIES[name]
    model = audited(eb.wrap(make()), tmp_path).models[0]
    faults = unusual(model)
    faults.pop("unconfirmed", None)  # what such a model answered once, it need not answer again
    assert faults == {expected: "block"}
    assert expected in blocked(model)
    assert not any(r.trustworthy for r in model.results)


@pytest.mark.doubt
def test_where_answers_depend_on_the_batch_searches_are_not_compared(tmp_path: Path) -> None:
    models = {"crowded": eb.wrap(CANARIES["batch mean"][0]()), "honest": eb.load_model("digits-standard")}
    crowded, honest = eb.audit(models, digits(32), "linf:0.1", effort="fast", out=tmp_path / "run").models
    asked, checked = ([a.name for a in model.results[0].attacks if a.name.startswith("check: ")] for model in (crowded, honest))
    assert asked == []
    assert {"check: cross_entropy", "check: margin", "check: transfer"} <= {*checked}
    assert blocked(crowded) - {"unconfirmed"} == {"batch"}
    assert "checks that compare them were left out" in next(f.message for f in crowded.flags if f.id == "batch")
    assert blocked(honest) == set()


def test_a_model_without_gradients_is_attacked_without_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries(("linf",))  # asked once in a process, and not with half of the tool taken away
    monkeypatch.setattr(Victim, "relaxed", lambda self: self)  # no step is known to stand in for
    result = audited(eb.wrap(Around(without_gradient)), tmp_path).models[0].results[0]
    assert [a.name for a in result.attacks] == ["noise", "square"]
    assert result.backwards == 0
    assert not result.trustworthy
    nothing = audited(eb.wrap(Around(without_gradient)), tmp_path / "far", "linf:0.6").models[0].results[0]
    assert (nothing.value, nothing.trustworthy) == (0.0, True)  # what attacks may have missed cannot lower it


def test_saturated_scores_are_divided_and_said(tmp_path: Path) -> None:
    saturated = audited(eb.wrap(Around(lambda net, x: 1000 * net(x))), tmp_path / "a", "linf:0.15").models[0]
    plain = audited(eb.load_model("digits-standard"), tmp_path / "b", "linf:0.15").models[0]
    assert saturated.results[0].trustworthy
    assert [flag.id for flag in saturated.flags] == ["gradient"]
    assert "divided by" in saturated.flags[0].message
    assert abs(saturated.results[0].value - plain.results[0].value) <= 2 / 64
    assert plain.results[0].trustworthy


def test_probabilities_are_mended_and_change_no_verdict(tmp_path: Path) -> None:
    logits = audited(eb.load_model("digits-standard"), tmp_path / "a").models[0]
    mended = audited(eb.wrap(Around(lambda net, x: net(x).softmax(1))), tmp_path / "b").models[0]
    assert unusual(mended) == {"probabilities": "mended"}
    assert mended.results[0].robust_accuracy == logits.results[0].robust_accuracy
    assert mended.results[0].trustworthy


def test_what_needs_a_logarithm_is_told_from_logits() -> None:
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    assert unlogged(logits.softmax(1)) == PROBABILITIES
    assert unlogged(torch.cat([logits.softmax(1), torch.full((1, 5), torch.nan)])) == PROBABILITIES
    assert unlogged((20 * logits).exp()) == unlogged((20 * logits - 60).exp()) == DENSITIES
    labels = torch.eye(5).repeat(4, 1)
    for scores in (logits, logits.log_softmax(1), logits.sigmoid(), logits.relu(), logits.exp(), logits.softmax(1)[:7], labels):
        assert not unlogged(scores)


def test_densities_are_followed_by_their_logarithm_and_change_no_verdict(tmp_path: Path) -> None:
    logits = audited(eb.load_model("digits-standard"), tmp_path / "a").models[0]
    mended = audited(eb.wrap(Around(lambda net, x: (net(x).log_softmax(1) - 20).exp())), tmp_path / "b").models[0]
    assert unusual(mended) == {"probabilities": "mended"}
    assert mended.results[0].robust_accuracy == logits.results[0].robust_accuracy
    assert mended.results[0].trustworthy


def test_scores_of_several_labels_keep_their_sign(tmp_path: Path) -> None:
    """Above 0 every label is given: the logarithm of what spans decades would take most of them back."""
    model = eb.wrap(Around(lambda net, x: 0.5 * net(x).softmax(1) + 1e-20), outputs="multilabel")
    report = eb.audit(model, (digits(64).x, torch.ones(64, 10)), "linf:0.1", effort="fast", out=tmp_path / "run").models[0]
    assert "probabilities" not in {f.id for f in report.findings}
    assert report.clean_accuracy.count == report.results[0].robust_accuracy.count == 64


def test_training_mode_is_mended_and_put_back(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Dropout(0.5), Around(lambda net, x: net(x)))
    net.train()
    net[1].eval()
    modes = [m.training for m in net.modules()]
    model = audited(net, tmp_path).models[0]
    assert unusual(model) == {"eval-mode": "mended"}
    assert [m.training for m in net.modules()] == modes
    honest = audited(eb.load_model("digits-standard"), tmp_path / "honest").models[0]
    assert model.results[0].robust_accuracy == honest.results[0].robust_accuracy


@pytest.mark.parametrize("kind", ["module", "function"])
def test_eval_mode_on_arrival_is_not_called_training_mode(kind: str, tmp_path: Path) -> None:
    net = Around(lambda net, x: net(x))
    model = audited(net if kind == "module" else net.__call__, tmp_path).models[0]
    assert unusual(model) == {}


@pytest.mark.parametrize(("share", "trusted"), [(0.04, True), (0.3, False)])
def test_nan_answers_are_no_class_and_widen_the_interval(share: float, trusted: bool, tmp_path: Path) -> None:
    data = digits()
    model = audited(eb.wrap(Around(nan_where_dark(share))), tmp_path, data=data).models[0]
    expected = int((data.x.flatten(1).mean(1) < torch.quantile(data.x.flatten(1).mean(1), share)).sum())
    assert model.invalid == expected > 0
    clean, result = model.clean_accuracy, model.results[0]
    answers = Around(nan_where_dark(share))(data.x)
    assert clean.count == int(((answers.argmax(1) == data.y) & answers.isfinite().all(1)).sum())
    assert clean.high >= (clean.count + expected) / clean.n
    assert result.robust_accuracy.count <= clean.count
    assert result.robust_accuracy.high >= (result.robust_accuracy.count + expected) / clean.n
    assert result.trustworthy == trusted
    assert "invalid" in {f.id for f in model.flags}
    assert unusual(model) == {"finite": "warn", "hidden-steps": "note"}  # whether an image is that dark is a decision inside


def test_a_model_that_answers_nothing_but_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="NaN or infinite"):
        audited(eb.wrap(Around(lambda net, x: net(x) * torch.nan)), tmp_path)


def signals(channels: int, length: int, n: int = 30) -> tuple[Tensor, Tensor]:
    """Noise over time, (n, channels, length), of three classes."""
    return torch.rand(n, channels, length, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 3


def test_signals_reach_the_model_as_they_are(tmp_path: Path) -> None:
    """Two channels of 16 values are no image."""
    x, y = signals(2, 16)
    shapes: set[torch.Size] = set()

    class Heard(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            shapes.add(x.shape[1:])
            return (x - 0.5).flatten(1) @ torch.eye(3).repeat(11, 1)[:32]

    report = audited(Heard(), tmp_path, data=(x, y))
    assert shapes == {torch.Size((2, 16))}
    assert not report.partial


def test_where_signals_look_like_images_the_error_says_how_they_stay_as_they_are(tmp_path: Path) -> None:
    x, y = signals(12, 100)
    model = nn.Sequential(nn.Conv1d(12, 4, 3), nn.Flatten(), nn.Linear(4 * 98, 3))
    with pytest.raises(BadInput, match=r"shape \(30, 1, 12, 100\).*--layout raw.*from_arrays\(x, y, layout='raw'\)"):
        audited(model, tmp_path, data=(x, y))
    assert not audited(model, tmp_path, data=from_arrays(x, y, layout="raw")).partial


def test_nan_met_on_the_way_counts_from_that_radius_on(tmp_path: Path) -> None:
    """Digits become NaN once a pixel of the dark corner is lit by more than 0.15: only radii beyond that are in doubt."""

    def change(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).masked_fill((x[:, 0, :, 0].amax(1) > 0.15)[:, None], torch.nan)

    data = digits(64)
    x = data.x.clone()
    x[:, :, :, 0] = 0.0
    model = audited(eb.wrap(Around(change)), tmp_path, "linf:0.02,0.2", (x, data.y)).models[0]
    small, large = model.results
    assert "invalid-nearby" not in {f.id for f in small.flags}
    assert "invalid-nearby" in {f.id for f in large.flags} or large.value == 0
    assert all(line.holds for line in eb.verify(tmp_path / "run", [eb.wrap(Around(change))]))


def test_more_labels_than_classes_is_bad_input() -> None:
    data = digits(64)
    with pytest.raises(BadInput, match="class 9 in the data, the model scores 3 classes"):
        found(eb.wrap(Around(lambda net, x: net(x)[:, :3])), data.x, data.y)


def test_a_model_that_raises_is_one_line() -> None:
    data = digits(64)
    with pytest.raises(BadInput, match="raised RuntimeError") as error:
        found(eb.load_model("digits-standard"), data.x[:, :, :5, :5], data.y)
    assert "\n" not in str(error.value)
    assert "(64, 1, 5, 5)" in str(error.value)
