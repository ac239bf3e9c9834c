"""Bounds by auto_LiRPA: where it is installed they are sound and agree with ours; where it is not, one line says so."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import epsball as eb
from epsball.certify import certify
from epsball.certify.lirpa import GUARD, Scores, guard, library, others
from epsball.core import Projects
from epsball.errors import BadInput
from epsball.models import wrap
from epsball.threats import L0, L1, L2, Linf
from nets import networks, samples


def needs_library() -> None:
    try:
        library()
    except BadInput:
        pytest.skip("auto_LiRPA is not installed")


class Swish(nn.Module):
    """A product of two parts, of which our own trace has no bounds."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def test_without_the_library_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "auto_LiRPA", None)
    net = networks()["mlp"]
    with pytest.raises(BadInput, match=r"auto_LiRPA cannot be imported .*: install it, or use --method best"):
        certify(net, *samples(net), Linf(), 0.01, "auto-lirpa")


def test_its_default_type_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "auto_LiRPA", None)
    with pytest.raises(BadInput):
        library()
    assert torch.get_default_dtype() is torch.float32


def test_differences_are_to_every_other_class() -> None:
    scores = torch.tensor([[1.0, 5.0, 2.0], [4.0, 0.0, 7.0]]).double()
    found = (others(torch.tensor([1, 0]), 3) @ scores[:, :, None]).squeeze(2)
    assert found.tolist() == [[4.0, 3.0], [4.0, -3.0]]


def test_the_guard_is_a_thousand_roundings_of_the_largest_score() -> None:
    assert guard(torch.tensor([[1.0, -8.0], [0.5, 0.25]]), 2.0**-23).tolist() == [GUARD * 8 * 2.0**-23, GUARD * 0.5 * 2.0**-23]


def test_the_copy_answers_as_the_wrapped_model_does() -> None:
    net = networks()["mlp"]
    x, _ = samples(net)
    model = wrap(net, mean=(0.4, 0.5), std=(0.2, 0.3), class_order=(2, 0, 1))
    copied = Scores(model.model)(x.double())
    assert torch.allclose(copied, model.model(x).double(), atol=1e-5)
    assert next(net.parameters()).dtype is torch.float32


@pytest.mark.parametrize(("threat", "radius"), [(Linf(), 0.02), (L2(), 0.1), (L1(), 0.2)], ids=["linf", "l2", "l1"])
def test_bounds_of_the_library_are_sound(threat: Projects, radius: float) -> None:
    needs_library()
    net = nn.Sequential(networks()["mlp"], Swish())
    x, _ = samples(net)
    y = net(x).argmax(1)
    found = certify(net, x, y, threat, radius, "auto-lirpa")
    assert bool((~eb.attacks.apgd(steps=20, threat=threat)(net, x, y, radius).reached | ~found.certified).all())
    lead = net(x).gather(1, y[:, None]).squeeze(1) - net(x).scatter(1, y[:, None], -torch.inf).amax(1)
    assert bool((found.margin <= lead.double() + found.slack).all())
    with pytest.raises(BadInput, match="use --method"):
        certify(net, x, y, threat, radius)


def test_it_is_at_least_as_tight_as_crown() -> None:
    needs_library()
    net = networks()["mlp"]
    x, y = samples(net)
    assert bool((certify(net, x, y, Linf(), 0.02, "auto-lirpa").margin >= certify(net, x, y, Linf(), 0.02, "crown").margin - 1e-4).all())


def test_it_has_no_bounds_under_l0() -> None:
    needs_library()
    net = networks()["mlp"]
    with pytest.raises(BadInput, match="auto_LiRPA has no bounds for it"):
        certify(net, *samples(net), L0(), 1.0, "auto-lirpa")
