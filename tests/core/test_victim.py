"""The road to the model: splitting, padding, running out of memory, counting, restoring."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from lawkit import answers, bench, check_same, entries, posed, radius_of, small
from torch import Tensor, nn

from epsball.attacks import get
from epsball.core import Access, Tally, Victim, autograd
from epsball.errors import AccessDenied, BadInput


class Limited(nn.Module):
    """Runs out of memory above `most` rows, forward or backward."""

    def __init__(self, net: nn.Module, most: int, error: type[Exception] = torch.OutOfMemoryError, backward: bool = False) -> None:
        super().__init__()
        self.net, self.most, self.error, self.backward, self.seen = net, most, error, backward, []

    def fail(self) -> None:
        raise self.error("CUDA out of memory. Tried to allocate 20.00 GiB")

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        if len(x) > self.most and not self.backward:
            self.fail()
        output = self.net(x)
        if output.requires_grad and self.backward:
            output.register_hook(lambda g: self.fail() if len(g) > self.most else None)
        return output


@pytest.mark.parametrize("most", [1, 3, 7])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", list(entries()))
def test_running_out_of_memory_changes_no_result(name: str, most: int, error: type[Exception], backward: bool) -> None:
    threat = entries()[name].threats[0]
    b = bench(4, n=9, threat=threat)
    plain = small(entries()[name], threat)(b.model, b.x, b.labels, radius_of(threat))
    model = Limited(b.model, most, error, backward)
    tight = small(entries()[name], threat)(model, b.x, b.labels, radius_of(threat))
    assert torch.equal(plain.reached, tight.reached)
    assert torch.allclose(plain.x_adv, tight.x_adv, atol=1e-6)
    if not backward:  # a pass that died on the way back was made and counts
        check_same(plain, tight)
    assert max(model.seen) >= 9


def test_one_row_too_many_is_an_error() -> None:
    b = bench(4)
    with pytest.raises(torch.OutOfMemoryError):
        get("pgd", steps=2)(Limited(b.model, 0), b.x, b.labels, 0.1)


def test_other_errors_are_not_swallowed() -> None:
    b = bench(4)

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        get("pgd", steps=2)(broken, b.x, b.labels, 0.1)


class Exported(nn.Module):
    """Insists on its batch size."""

    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        self.net, self.size = net, size

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != self.size:
            raise ValueError(f"expected {self.size} rows, got {len(x)}")
        return self.net(x)


@pytest.mark.parametrize("size", [1, 4, 9, 16])
@pytest.mark.parametrize("name", list(entries()))
def test_a_fixed_batch_is_padded(name: str, size: int) -> None:
    threat = "l2" if "l2" in entries()[name].threats else entries()[name].threats[0]
    b, attack = bench(4, n=9, threat=threat), small(entries()[name], threat)
    plain = attack(b.model, b.x, b.labels, 0.35)
    check_same(plain, attack(Victim(Exported(b.model, size), fixed_batch=size), b.x, b.labels, 0.35))


def test_padding_leaves_the_last_gradient_alone() -> None:
    """The padding repeats the last row: its gradient must not come back to it."""
    b = bench(4, n=5)
    one, other = (autograd(posed(v, b.x, b.labels), b.x) for v in (Victim(b.model), Victim(Exported(b.model, 8), fixed_batch=8)))
    assert torch.allclose(one.gradient, other.gradient, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("answer", [torch.zeros(3), torch.zeros(3, 2, 2), torch.zeros(2, 4), None, (torch.zeros(3, 2),)])
def test_answers_of_a_wrong_shape_are_refused_in_one_line(answer: Any) -> None:
    with pytest.raises(BadInput, match="scores") as caught:
        Victim(lambda x: answer).outputs(torch.zeros(3, 2), Tally.zeros(3))
    assert "\n" not in str(caught.value)


def test_tallies_are_shared_between_views() -> None:
    tally = Tally.zeros(5)
    part = tally.take(torch.tensor([3, 1])).take(slice(0, 1))
    part.count_forward()
    part.count_backward()
    tally.count_forward()
    assert tally.forwards.tolist() == [1, 1, 1, 2, 1]
    assert tally.backwards.tolist() == [0, 0, 0, 1, 0]


def test_nested_contexts_restore_once_and_at_the_end() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout())
    model.train()
    victim = Victim(model)
    with victim:
        with victim:
            assert not any(m.training for m in model.modules())
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_random_models_repeat_within_one_context_seed() -> None:
    """Two runs of one attack see the same sequence of draws: a run can be repeated, and the caller's stream is not touched."""
    noisy = nn.Sequential(nn.Flatten(), nn.Linear(18, 4))
    b = bench(4)
    x = b.x

    def model(z: Tensor) -> Tensor:
        return noisy(z) + torch.randn(len(z), 4)

    torch.manual_seed(5)
    one = get("pgd", steps=3)(model, x, b.labels, 0.1)
    after = torch.rand(1)
    torch.manual_seed(5)
    two = get("pgd", steps=3)(model, x, b.labels, 0.1)
    assert torch.equal(one.x_adv, two.x_adv)
    assert torch.equal(after, torch.rand(1))


def test_integer_and_half_answers_become_floats() -> None:
    b = bench(3)
    for dtype, wanted in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
        (torch.float64, torch.float64),
    ):
        shown = Victim(lambda x, dtype=dtype: b.model(x.double()).to(dtype)).outputs(b.x, Tally.zeros(len(b.x)))
        assert shown.dtype is wanted


def test_label_only_answers_keep_what_is_no_number() -> None:
    rows = torch.tensor([[1.0, 3.0], [torch.nan, 1.0], [torch.inf, 0.0]])
    shown = Victim(lambda x: rows, access=Access.LABELS).outputs(torch.zeros(3, 2), Tally.zeros(3))
    assert shown[0].tolist() == [0.0, 1.0]
    assert not bool(torch.isfinite(shown[1:]).all(1).any())


def test_gradients_are_refused_before_the_model_is_asked() -> None:
    asked: list[int] = []
    victim = Victim(lambda x: asked.append(len(x)) or torch.zeros(len(x), 2), access=Access.SCORES)  # type: ignore[func-returns-value]
    with pytest.raises(AccessDenied) as caught:
        victim.differentiable(torch.zeros(2, 3), Tally.zeros(2))
    assert asked == []
    assert "\n" not in str(caught.value)


def test_the_ledger_counts_the_model_not_the_padding() -> None:
    b = bench(4, n=5)
    outcome = get("pgd", steps=3)(Victim(Exported(b.model, 4), fixed_batch=4), b.x, answers(b.model, b.x).argmax(1), 0.0, drop=False)
    assert outcome.queries.tolist() == [5] * 5
    assert outcome.backwards.tolist() == [3] * 5


def test_a_copy_of_a_traced_network_can_be_asked() -> None:
    """Its parameters are no leaves, so that nobody can freeze them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch would rather have programs exported
        traced = torch.jit.trace(nn.Linear(5, 3), torch.rand(2, 5))
    assert Victim(copy.deepcopy(traced)).outputs(torch.rand(4, 5), Tally.zeros(4)).shape == (4, 3)
