"""Ways into a model: whose scores they are, whose decisions, and where gradients go."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from epsball.core import Tally, Victim
from epsball.core.inside import Inside, Probed, Straight, changed_input, score_layers


class Turned(nn.Module):
    """Scores of a layer, those of the last two classes exchanged and all turned around a maximum at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(self.body(x))
        return -(scores[:, [0, 1, 3, 2]] - 1).square()


def test_decisions_are_the_models_and_gradients_the_layers() -> None:
    torch.manual_seed(0)
    model, x = Turned().eval(), torch.rand(50, 3)
    inner = model.head(model.body(x))
    leaf = x.clone().requires_grad_()
    seen = Inside(model, "head")(leaf)
    assert torch.equal(seen.argmax(1), model(x).argmax(1))
    assert not torch.equal(inner.argmax(1), model(x).argmax(1))
    assert torch.equal(seen.sort(1).values, inner.sort(1).values)
    (slope,) = torch.autograd.grad(seen.sum(), leaf)
    again = x.clone().requires_grad_()
    assert torch.allclose(slope, torch.autograd.grad(model.head(model.body(again)).sum(), again)[0], atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_with_scores_of_their_own_are_found() -> None:
    model, x = Turned().eval(), torch.rand(5, 3)
    assert [*score_layers(model, x)] == ["body.0", "body", "head"]  # the last part of `body` answers what it does
    assert [*score_layers(nn.Sequential(model.head, nn.Identity()), torch.rand(5, 4))] == []
    assert not any(module._forward_hooks for module in model.modules())


class Filtered(nn.Module):
    """A 3 x 3 filter in NumPy before two linear layers of single precision."""

    kernel = np.array([[0.0, 0.2, 0.1], [0.1, 0.9, -0.2], [0.0, 0.4, 0.1]], dtype=np.float32)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 4))

    def cleaned(self, x: Tensor) -> Tensor:
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(x.detach().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3)
        )
        return torch.from_numpy((windows * self.kernel).sum((-1, -2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.cleaned(x))

    def through(self, x: Tensor) -> Tensor:
        """The same in autograd's sight."""
        kernel = torch.from_numpy(self.kernel).expand(2, 1, 3, 3)
        return self.net(nn.functional.conv2d(x, kernel, padding=1, groups=2))


def slope(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    scores = model(leaf)
    return scores.detach(), torch.autograd.grad(scores.square().sum(), leaf)[0]


def filtered(n: int) -> tuple[Filtered, Tensor]:
    torch.manual_seed(0)
    return Filtered().eval(), 0.2 + 0.6 * torch.rand(n, 2, 6, 6)


def test_a_layer_that_sees_the_input_changed_is_found() -> None:
    model, x = filtered(8)
    assert changed_input(model, x) == "net"
    assert changed_input(model.net, x) is None
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("rows", [1, 5])
def test_straight_goes_past_what_changes_the_input(rows: int) -> None:
    model, x = filtered(rows)
    with Victim(model):
        scores, seen = slope(Straight(model, "net"), x)
        assert torch.equal(scores, model(x))
        assert torch.equal(seen, slope(model.net, model.cleaned(x))[1])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("rows", [1, 5])
def test_differences_give_the_derivative_of_a_filter(rows: int) -> None:
    model, x = filtered(rows)
    with Victim(model):
        scores, seen = slope(Probed(model, "net"), x)
        assert torch.equal(scores, model(x))
        summed = slope(model.through, x)[1].sum(1, keepdim=True)
    assert torch.allclose(seen.sum(1, keepdim=True) / 2, summed, rtol=1e-3, atol=1e-3 * float(summed.abs().max()))


def test_probes_are_booked() -> None:
    model, x = filtered(3)
    twin, tally = Victim(model).twin(Probed(model, "net")), Tally.zeros(3)
    twin.probes = Probed.probes
    with twin:
        twin.differentiable(x.clone().requires_grad_(), tally)
        twin.outputs(x, tally)
    assert tally.forwards.tolist() == [20, 20, 20]
