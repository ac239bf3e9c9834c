"""Decisions inside a model: found, asked for, and only those on which something hangs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lawkit import rng, tensor
from torch import Tensor, nn

from epsball.core import Victim
from epsball.core.forks import Both, Fork, forks

Forward = Callable[["Routed", Tensor], Tensor]


class Routed(nn.Module):
    """Three linear experts behind a router, used as `forward` says."""

    def __init__(self, route: Forward) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))
        self.route = route
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.route(self, x)


def by_rows(m: Routed, x: Tensor) -> Tensor:
    out, group = x.new_zeros(len(x), 4), m.router(x).argmax(1)
    for number, expert in enumerate(m.experts):
        rows = (group == number).nonzero().squeeze(1)
        out[rows] = expert(x[rows])
    return out


def by_table(m: Routed, x: Tensor) -> Tensor:
    table = torch.stack([expert(x) for expert in m.experts], 1)
    return table[torch.arange(len(x)), m.router(x).max(1).indices]


def one_by_one(m: Routed, x: Tensor) -> Tensor:
    return torch.stack([m.experts[k](one) for one, k in zip(x, m.router(x).argmax(1).tolist(), strict=True)])


def two_of_three(m: Routed, x: Tensor) -> Tensor:
    scores, chosen = m.router(x).topk(2, 1)
    table = torch.stack([expert(x) for expert in m.experts], 1)
    return (table.gather(1, chosen[:, :, None].expand(-1, -1, 4)) * scores.softmax(1)[:, :, None]).sum(1)


def first_of_an_order(m: Routed, x: Tensor) -> Tensor:
    chosen = m.router(x).argsort(1, descending=True)[:, :2]
    return torch.stack([expert(x) for expert in m.experts], 1).gather(1, chosen[:, :, None].expand(-1, -1, 4)).sum(1)


@pytest.mark.parametrize("route", [two_of_three, first_of_an_order])
def test_of_several_that_are_chosen_the_last_decides(route: Forward) -> None:
    model, x = Routed(route), tensor(rng(3).normal(size=(9, 6)))
    (fork,) = forks(model, x)
    seen, scores = fork(x), model.router(x)
    best = scores.argmax(1, keepdim=True)
    assert torch.equal(seen.argmax(1), scores.scatter(1, best, -torch.inf).argmax(1))
    others = torch.ones_like(scores, dtype=torch.bool).scatter(1, best, False)
    assert torch.equal(seen[others], scores[others])
    assert torch.equal(seen.gather(1, best), scores.amin(1, keepdim=True))


def early(m: Routed, x: Tensor) -> Tensor:
    out = m.experts[0](x)
    unsure = m.router(x)[:, 0] < 0.1
    out[unsure] = m.experts[1](x[unsure])
    return out


def by_masks(m: Routed, x: Tensor) -> Tensor:
    scores = m.router(x)
    best = scores == scores.amax(1, keepdim=True)
    return sum((torch.where(best[:, k : k + 1], m.experts[k](x), 0.0) for k in range(3)), x.new_zeros(len(x), 4))


def by_flags(m: Routed, x: Tensor) -> Tensor:
    scores = m.router(x)
    best = scores >= scores.max(1, keepdim=True).values
    return (torch.stack([expert(x) for expert in m.experts], 1) * best[:, :, None]).sum(1)


def gathered(m: Routed, x: Tensor) -> Tensor:
    group = m.router(x).argmax(1, keepdim=True)
    return torch.stack([expert(x) for expert in m.experts], 2).gather(2, group[:, None].expand(-1, 4, -1)).squeeze(2)


@pytest.mark.parametrize("route", [by_rows, by_table, one_by_one, by_masks, by_flags, gathered])
def test_the_scores_of_a_router_are_those_between_which_it_decides(route: Forward) -> None:
    model, x = Routed(route), tensor(rng(3).normal(size=(9, 6)))
    (fork,) = forks(model, x)
    assert fork.ways == 3
    leaf = x.clone().requires_grad_()
    scores = fork(leaf)
    assert torch.equal(scores.detach(), model.router(x))
    (slope,) = torch.autograd.grad(scores[:, 1].sum(), leaf)
    assert torch.allclose(slope, model.router.weight[1].expand_as(x))
    with torch.no_grad():
        assert torch.equal(fork(x), model.router(x))


def test_the_scores_of_a_comparison_are_zero_and_by_how_much_it_holds() -> None:
    model, x = Routed(early), tensor(rng(4).normal(size=(9, 6)))
    (fork,) = forks(model, x)
    assert torch.allclose(fork(x), torch.stack([torch.zeros(9), 0.1 - model.router(x)[:, 0]], 1))
    assert torch.equal(fork(x).argmax(1) == 1, model.router(x)[:, 0] < 0.1)


@pytest.mark.parametrize(
    "route",
    [
        lambda m, x: m.experts[0](x.relu()),
        lambda m, x: m.experts[0](torch.where(x > 0, x, 0.1 * x)),  # of every feature
        lambda m, x: m.experts[0](x / x.abs().max(1, keepdim=True).values),  # no index is used
        lambda m, x: m.experts[0](x) * (x.abs().max() < 99),  # one for all samples
        lambda m, x: m.experts[0](x) * (len(x) < 99),
        lambda m, x: m.experts[0](x.gather(1, x.argsort(1))),  # all are chosen
        lambda m, x: torch.where(torch.arange(len(x))[:, None] > 3, m.experts[0](x), m.experts[1](x)),  # not of the input
    ],
)
def test_where_nothing_hangs_on_a_decision_there_is_none(route: Forward) -> None:
    assert forks(Routed(route), tensor(rng(5).normal(size=(9, 6)))) == ()


def test_a_look_that_does_not_come_there_answers_zeros() -> None:
    model, x = Routed(by_rows), tensor(rng(6).normal(size=(5, 6)))
    for fork in (Fork(model, 1, 3), Fork(model, 0, 4)):
        leaf = x.clone().requires_grad_()
        scores = fork(leaf)
        assert torch.equal(scores, torch.zeros(5, fork.ways))
        assert torch.equal(torch.autograd.grad(scores.sum(), leaf)[0], torch.zeros_like(x))


def test_both_are_the_models_scores_and_the_forks() -> None:
    model, x = Routed(by_rows), tensor(rng(7).normal(size=(9, 6)))
    both = Both(Fork(model, 0, 3))
    leaf = x.clone().requires_grad_()
    assert torch.equal(both(leaf), torch.cat([model(x), model.router(x)], 1))
    (slope,) = torch.autograd.grad(both(leaf)[:, :4].sum(), leaf)
    chosen = model.router(x).argmax(1)
    assert torch.allclose(slope, torch.stack([model.experts[k].weight.sum(0) for k in chosen.tolist()]))
    with torch.no_grad():
        assert torch.equal(both(x), both(leaf))


def test_small_batches_answer_as_large_ones_inside_a_victim() -> None:
    model, x = Routed(by_rows), tensor(rng(7).normal(size=(40, 6)))
    with Victim(Fork(model, 0, 3)) as victim:
        whole = victim.model(x)
        assert torch.equal(torch.cat([victim.model(x[row : row + 1]) for row in range(40)]), whole)
