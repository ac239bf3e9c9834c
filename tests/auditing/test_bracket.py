"""Lower bounds beside the attacks: what is proven, what is asked, and what is said where nothing can be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import epsball as eb
from epsball.errors import BadInput


def test_the_truth_lies_between(tmp_path: Path) -> None:
    data = eb.load_data("digits", n=30)
    report = eb.audit("digits-robust", data, ["linf:0.02,0.1,0.5", "flow:0.5"], effort="fast", certify="crown", out=tmp_path)
    results = {(r.threat, r.radius): r for r in report.models[0].results}
    floors = [results["linf", radius].certified_accuracy for radius in (0.02, 0.1, 0.5)]
    assert floors == sorted(floors, reverse=True)  # type: ignore[type-var]
    assert floors[0] is not None
    assert floors[0] > 0.8
    assert floors[2] == 0.0
    for radius, floor in zip((0.02, 0.1, 0.5), floors, strict=True):
        assert floor is not None
        assert floor <= results["linf", radius].robust_accuracy.value
    assert results["flow", 0.5].certified_accuracy is None
    assert report.settings["certify"] == "crown"
    assert all(line.holds for line in eb.verify(tmp_path, ["digits-robust"]))


def centered(net: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """The net's own answers, after its last bias was moved so that all classes occur."""
    with torch.no_grad():
        net[-1].bias -= net(x).mean(0)
        return net(x).argmax(1)


def test_a_linear_model_is_decided_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 3)).eval(), torch.rand(40, 16)
    y = centered(model, x)
    report = eb.audit(model, (x, y), ["linf:0.02", "l2:0.1", "l1:0.2"], effort="fast", certify="best", out=tmp_path)
    for result in report.models[0].results:
        assert 0 < result.robust_accuracy.value < 1
        assert result.certified_accuracy == pytest.approx(result.robust_accuracy.value)


def test_a_model_without_bounds_says_so_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3)).eval(), torch.rand(40, 16)
    report = eb.audit(net, (x, centered(net, x)), "linf:0.01,0.02", effort="fast", certify="interval", out=tmp_path)
    said = [f for f in report.models[0].findings if f.id == "certify"]
    assert len(said) == 1
    assert said[0].message.startswith("No certified bounds: ")
    assert all(r.certified_accuracy is None for r in report.models[0].results)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(BadInput, match=r"certify: 'magic': unknown: use one of best, crown, interval"):
        eb.audit("digits-robust", "digits", "linf:0.1", n=5, certify="magic")
