import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import epsball as eb
from epsball.core.steady import steady


def network(channels: int = 1) -> nn.Module:
    torch.manual_seed(0)
    first = nn.Conv2d(channels, 8, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10))
    return model.eval().requires_grad_(False)


def look(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    (gradient,) = torch.autograd.grad(output.square().sum(), leaf)
    return output.detach(), gradient


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 9, 23, 33, 45])
def test_batches_of_any_size_give_the_same_bits(rows: int, channels: int) -> None:
    model, x = network(channels), eb.load_data("digits", n=64).x.expand(-1, channels, -1, -1)
    restore = steady(model)
    whole = look(model, x)
    parts = [look(model, x[i : i + rows]) for i in range(0, 64, rows)]
    restore()
    for number in (0, 1):
        assert torch.equal(torch.cat([part[number] for part in parts]), whole[number])


def test_nothing_is_left_behind_and_the_model_sees_its_true_batch() -> None:
    model, seen = network(), []
    for layer in (model[0], model[1], model[3]):
        layer.register_forward_hook(lambda module, inputs, output: seen.append((len(inputs[0]), len(output))))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    restore = steady(model)
    assert model(torch.rand(1, 1, 8, 8)).shape == (1, 10)
    restore()
    assert seen == 3 * [(1, 1)]
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all("forward" not in vars(m) and "_conv_forward" not in vars(m) for m in model.modules())


def inside(model: nn.Module, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the convolution itself is given."""
    seen, own = [], nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, *rest: (seen.append(x), own(self, x, *rest))[1])
    restore = steady(model)
    for batch in batches:
        assert len(model(batch)) == len(batch)
    restore()
    return seen


def test_convolutions_see_few_sizes_and_little_more_than_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = inside(network(), [torch.rand(n, 1, 8, 8) for n in range(1, 129)], monkeypatch)
    assert {len(x) for x in seen} == {*range(4, 65, 4), *range(72, 129, 8)}
    assert all(len(x) - n < max(4, n / 8) for n, x in enumerate(seen, 1))


@pytest.mark.parametrize("rows", [5, 9, 65])
def test_the_layout_stays(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    (x,) = inside(model, [torch.rand(rows, 3, 8, 8).to(memory_format=torch.channels_last)], monkeypatch)
    assert len(x) > rows
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_a_call_that_raised_leaves_no_trace_in_the_next() -> None:
    model = network()
    restore = steady(model)
    with pytest.raises(RuntimeError):
        model(torch.rand(2, 3, 8, 8))
    assert model(torch.rand(40, 1, 8, 8)).shape == (40, 10)
    restore()


def test_what_somebody_gave_a_layer_as_its_forward_is_asked_and_given_back() -> None:
    linear, seen = nn.Linear(4, 3), []
    linear.forward = own = lambda x: (seen.append(len(x)), nn.functional.linear(x, linear.weight))[1]
    restore, again = steady(linear), steady(linear)
    assert linear(torch.ones(2, 4)).shape == (2, 3)
    again()
    assert linear(torch.ones(2, 4)).shape == (2, 3)
    restore()
    assert seen == [16, 16]
    assert linear.forward is own


def test_inputs_without_a_batch_axis_and_sequences_pass_untouched() -> None:
    linear = nn.Linear(4, 3)
    expected = [linear(torch.ones(shape)) for shape in ((4,), (2, 5, 4))]
    restore = steady(linear)
    got = [linear(torch.ones(shape)) for shape in ((4,), (2, 5, 4))]
    restore()
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def own(model: nn.Module, x: Tensor) -> bool:
    """Whether the first layer's gradient is ours."""
    return type(model[0](x).grad_fn).__name__ == "_ConvBackward"


def test_layers_of_few_channels_answer_the_same_bits_with_a_gradient_of_ours() -> None:
    for channels in (1, 4, 5):
        model, x = network(channels), torch.rand(16, channels, 8, 8)
        output, gradient = look(model, x)
        restore = steady(model)
        ours = look(model, x)
        assert own(model, x.requires_grad_()) is (channels < 5)
        restore()
        assert torch.equal(ours[0], output)
        assert torch.allclose(ours[1], gradient, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_nobody_who_follows_calls_meets_a_gradient_of_ours() -> None:
    model, x = network(), torch.rand(16, 1, 8, 8)
    leaf = x.clone().requires_grad_()
    (known,) = torch.autograd.grad(model(leaf).sum(), leaf)
    along = torch.autograd.functional.jvp(lambda x: model(x).sum(), x, torch.ones_like(x))[1]
    restore = steady(model)
    assert own(model, leaf)
    with torch.device("cpu"):  # a mode, as others are
        assert not own(model, leaf)
    assert torch.allclose(torch.func.grad(lambda x: model(x).sum())(x), known, atol=1e-6)
    with forward_ad.dual_level():
        output = model(forward_ad.make_dual(x, torch.ones_like(x))).sum()
        assert torch.allclose(forward_ad.unpack_dual(output).tangent, along, rtol=1e-4)
    assert "_ConvBackward" not in str(torch.jit.trace(model[0], leaf).graph)
    model[0].weight.requires_grad_()
    assert not own(model, leaf)
    assert torch.autograd.grad(model(leaf).sum(), model[0].weight)[0].any()
    restore()
