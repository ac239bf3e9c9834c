"""Ways into a model: whose scores they are, whose decisions, and where gradients go."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from epsball.core import Tally, Victim
from epsball.core.inside import Inside, Nudged, Part, Probed, Shaken, Straight, behind_break, changed_input, parts, score_layers


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


@pytest.mark.parametrize(("kind", "probes"), [(Probed, 18), (lambda model, layer: Shaken(model, layer, (0.0, 1.0), 72, 10), 20)])
def test_probes_are_booked(kind: Callable[[nn.Module, str], Straight], probes: int) -> None:
    model, x = filtered(3)
    within = kind(model, "net")
    twin, tally = Victim(model).twin(within), Tally.zeros(3)
    twin.probes = within.probes
    with twin:
        twin.differentiable(x.clone().requires_grad_(), tally)
        twin.outputs(x, tally)
    assert tally.forwards.tolist() == [probes + 2] * 3


class Mixed(nn.Module):
    """Seven features into five others in NumPy, then a linear layer."""

    mix = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.from_numpy(x.detach().numpy() @ self.mix))


@pytest.mark.parametrize("rows", [1, 5])
def test_few_features_are_changed_one_by_one(rows: int) -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), 6 * torch.rand(rows, 7) - 3
    with Victim(model):
        assert behind_break(model, x) == "net"
        scores, seen = slope(Shaken(model, "net", (-3.0, 3.0), 7), x)
        assert torch.equal(scores, model(x))
        true = slope(lambda z: model.net(z @ torch.from_numpy(model.mix)), x)[1]
    assert torch.allclose(seen, true, rtol=1e-3, atol=1e-3 * float(true.abs().max()))


def shifted(x: Tensor) -> Tensor:
    return torch.from_numpy(np.roll(x.detach().numpy(), (2, 2), axis=(2, 3)))


def test_random_directions_give_the_derivative_in_the_mean_and_the_identity_at_once() -> None:
    """Of 72 features 24 directions give a cosine of about sqrt(24 / 96) = 0.5 each time, whatever moves them about."""
    model, x = filtered(1)
    x, found, true = x.expand(60, -1, -1, -1) + 0.001 * torch.rand(60, 2, 6, 6), {}, slope(model.net, x.roll((2, 2), (2, 3)))[1]
    for name, change in (("shift", shifted), ("identity", lambda z: z.detach().clone())):
        model.cleaned = change  # type: ignore[method-assign]
        with Victim(model):
            assert behind_break(model, x) == "net"
            found[name] = slope(Shaken(model, "net", (0.0, 1.0), 72, 24), x)[1].flatten(1)
    wanted = true.roll((-2, -2), (2, 3)).flatten(1).expand(60, -1)
    single, mean = (torch.cosine_similarity(one, wanted[: len(one)]) for one in (found["shift"], found["shift"].mean(0, keepdim=True)))
    assert 0.35 < float(single.mean()) < 0.65
    assert float(mean) > 0.95
    assert torch.allclose(found["identity"], slope(model.net, x)[1].flatten(1), rtol=1e-2, atol=1e-3)


def test_directions_are_held_for_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = filtered(5)
    with Victim(model):
        whole = slope(Shaken(model, "net", (0.0, 1.0), 72, 4), x)[1]
        monkeypatch.setattr("epsball.core.inside._HELD", 2 * 8 * 72)
        assert torch.allclose(slope(Shaken(model, "net", (0.0, 1.0), 72, 4), x)[1], whole, rtol=1e-5, atol=1e-6)


def test_only_what_autograd_cannot_follow_and_differs_by_sample_is_behind_a_break() -> None:
    model, x = filtered(4)
    with Victim(model):
        assert behind_break(model.net, x) is None
        model.cleaned = lambda z: torch.zeros_like(z)  # type: ignore[method-assign]
        assert behind_break(model, x) is None
    assert not any(module._forward_pre_hooks for module in model.modules())


class Surer(nn.Module):
    """A network shown something else than the input: what makes it surer of its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            best = self.net(x).argmax(1)
        return self.net(x.detach() + 0.1 * best[:, None])


class Kinked(nn.Module):
    """log(1 + 99 |x|) of every feature: at 0, where many inputs lie, autograd says that the slope is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.sign() * torch.log1p(99 * x.abs()))


def test_a_kink_exactly_at_the_input_has_the_slope_a_little_further_in() -> None:
    torch.manual_seed(0)
    model, x = Kinked().eval(), torch.rand(20, 6) * (torch.rand(20, 6) > 0.6)
    x[0] = 1
    with Victim(model):
        answer, own = slope(model, x)
        again, seen = slope(Nudged(model, (0.0, 1.0)), x)
        assert torch.equal(answer, again)
        assert torch.equal(Nudged(model, (0.0, 1.0))(x), answer)
        assert not bool(own[x == 0].any())
        assert torch.allclose(seen, slope(lambda t: model.net(torch.log1p(99 * t)), x)[1], rtol=1e-2)
        assert bool((x[0] + 1e-6 > 1).all())  # there it is taken from below
        assert seen[0].tolist() == pytest.approx(own[0].tolist(), rel=1e-4)


class Explained(nn.Module):
    """A second network reads the slopes of the first one's best score; `alone` asks sample by sample."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.first, self.second, self.alone = nn.Linear(6, 3), nn.Linear(6, 3), alone

    def forward(self, x: Tensor) -> Tensor:
        if self.alone:
            return torch.cat([self.second(self.first(one[None]).amax() * one[None].detach()) for one in x])
        with torch.no_grad():
            slopes = torch.vmap(torch.func.grad(lambda one: self.first(one[None]).amax()))(x)
        return self.second(slopes * x.detach())


@pytest.mark.parametrize("alone", [False, True])
def test_parts_may_be_asked_sample_by_sample(alone: bool) -> None:
    torch.manual_seed(0)
    model, x = Explained(alone).eval(), torch.randn(7, 6)
    with Victim(model):
        found = parts(model, x)
        assert list(found) == ["first", "second"]
        assert torch.equal(found["first"], model.first(x))


def test_a_part_is_asked_for_the_input_itself_and_the_model_decides() -> None:
    torch.manual_seed(0)
    model, x = Surer().eval(), torch.randn(50, 6)
    with Victim(model):
        assert list(parts(model, x)) == ["net"]
        scores, seen = slope(Part(model, "net"), x)
        assert torch.equal(scores.argmax(1), model(x).argmax(1))
        assert torch.equal(scores.sort(1).values, model.net(x).sort(1).values)
        assert torch.equal(seen, slope(model.net, x)[1])
