"""The laws of certified bounds, over every small network: nothing certified is broken, bounds hold, larger radii certify less."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import epsball as eb
from epsball.certify import certify, certify_each
from epsball.certify.ball import Ball
from epsball.certify.graph import trace
from epsball.certify.intervals import rounding
from epsball.certify.linear import climbed, lowest, margins, tightened
from epsball.certify.ops import Relu
from epsball.core import Projects, Tally, Victim
from epsball.threats import L0, L1, L2, Linf
from nets import networks, samples

NETS = networks()
THREATS: list[tuple[Projects, float]] = [(Linf(), 0.03), (L2(), 0.15), (L1(), 0.5), (L0(), 1.0)]
EACH_NET = pytest.mark.parametrize("name", NETS)
EACH_THREAT = pytest.mark.parametrize(("threat", "radius"), THREATS, ids=[t.name for t, _ in THREATS])


def corners(threat: Projects, x: Tensor, radius: float, seed: int) -> Tensor:
    """Points of the ball: far outside it in a random direction, some of them sparse, and projected."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, generator=generator) * (torch.rand(x.shape, generator=generator) < (0.05, 0.3, 1.0)[seed % 3])
    legal: Tensor = threat.within((0.0, 1.0)).project(x, x + 100 * noise, torch.full((len(x),), radius).double())
    return legal


@EACH_NET
@EACH_THREAT
def test_nothing_certified_is_broken(name: str, threat: Projects, radius: float) -> None:
    x, y = samples(NETS[name])
    held = certify(NETS[name], x, y, threat, radius).certified
    for net, point in ((NETS[name], x), (copy.deepcopy(NETS[name]).double(), x.double()), (NETS[name], x.double())):
        attacks = [eb.attacks.noise(threat=threat)]
        if not isinstance(threat, L0):
            attacks += [eb.attacks.pgd(steps=10, threat=threat), eb.attacks.apgd(steps=10, threat=threat)]
        for attack in attacks:
            assert not bool((attack(net, point, y, radius).reached & held).any())
        for seed in range(6):
            with torch.no_grad():
                answer = net(corners(threat, point, radius, seed).to(next(net.parameters()).dtype)).argmax(1)
            assert not bool(((answer != y) & held).any())


def test_something_is_certified_and_something_is_not() -> None:
    for threat, radius in THREATS:
        shares = [float(certify(net, *samples(net), threat, radius).certified.double().mean()) for net in NETS.values()]
        assert max(shares) > 0.5
        assert 0 < sum(shares) < len(shares)


@EACH_NET
@EACH_THREAT
def test_bounds_of_every_part_hold_the_scores(name: str, threat: Projects, radius: float) -> None:
    net, (x, y) = copy.deepcopy(NETS[name]).double(), samples(NETS[name])
    with Victim(net) as victim, torch.no_grad():
        graph = trace(victim, x)
        ball = Ball.of(threat.within((0.0, 1.0)), x, torch.full((len(x),), radius).double())
        rough, fine = (tightened(graph, ball, through)[-1] for through in (False, True))
        margin = certify(net, x, y, threat, radius).margin
        for seed in range(9):
            scores = net(corners(threat, x.double(), radius, seed))
            for low, high in (rough, fine):
                assert bool((scores >= low - 1e-9).all())
                assert bool((scores <= high + 1e-9).all())
            other = scores.scatter(1, y[:, None], -torch.inf).amax(1)
            assert bool((scores.gather(1, y[:, None]).squeeze(1) - other >= margin - 1e-9).all())
    assert bool((fine[0] >= rough[0] - 1e-9).all())
    assert bool((fine[1] <= rough[1] + 1e-9).all())


@EACH_NET
@EACH_THREAT
def test_the_best_is_the_better_one_and_linear_bounds_win_on_average(name: str, threat: Projects, radius: float) -> None:
    net, (x, y) = NETS[name], samples(NETS[name])
    interval, crown, best = (certify(net, x, y, threat, radius, method).margin for method in ("interval", "crown", "best"))
    assert bool((best >= torch.maximum(interval, crown)).all())
    assert float(crown.mean()) >= float(interval.mean()) - 1e-9


@EACH_NET
def test_any_lines_below_are_sound_and_climbing_never_loses(name: str) -> None:
    net, (x, y) = copy.deepcopy(NETS[name]).double(), samples(NETS[name], 8)
    with Victim(net) as victim, torch.no_grad():
        graph = trace(victim, x)
        ball = Ball.of(L2().within((0.0, 1.0)), x, torch.full((len(x),), 0.3).double())
        bounds, rows = tightened(graph, ball, True), torch.arange(len(x))
        a = torch.nn.functional.one_hot(y, 3).double() - 1 / 3
        generator = torch.Generator().manual_seed(2)
        bends = [place for place, node in enumerate(graph.nodes) if isinstance(node.op, Relu)]
        lean = {place: torch.rand(len(x), *graph.nodes[place].shape, generator=generator).double() for place in bends}
        least = lowest(graph, ball, bounds, graph.top, rows, a, True, lean)
        for seed in range(6):
            assert bool(((net(corners(L2(), x.double(), 0.3, seed)) * a).sum(1) >= least - 1e-9).all())
        plain = margins(graph, ball, bounds, y, True)
        far = climbed(graph, ball, bounds, y, plain, torch.full((len(x),), 1e9).double(), steps=5)
        assert bool((far >= plain).all())
        assert bool((far > plain + 1e-6).any()) or name not in ("mlp", "residual")
        assert torch.equal(climbed(graph, ball, bounds, y, plain, torch.full((len(x),), -1e9).double()), plain)


@EACH_NET
def test_a_larger_radius_certifies_no_more(name: str) -> None:
    net, (x, y) = NETS[name], samples(NETS[name], 8)
    for threat, radius in THREATS:
        found = certify_each(net, x, y, threat, [radius * share for share in (0.5, 1, 3)])
        for near, far in pairwise(found):
            assert bool((near.margin >= far.margin).all())
            assert bool((near.certified | ~far.certified).all())


@EACH_NET
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    net, (x, y) = NETS[name], samples(NETS[name], 7)
    for threat, radius in THREATS:
        whole = certify(net, x, y, threat, torch.linspace(0.5, 1.5, 7) * radius).margin
        order = [4, 2, 0]
        some = certify(net, x[order], y[order], threat, (torch.linspace(0.5, 1.5, 7) * radius)[order]).margin
        assert torch.allclose(whole[order], some, rtol=0, atol=1e-10)


@EACH_NET
def test_without_room_the_margin_is_that_of_the_scores(name: str) -> None:
    net, (x, y) = NETS[name], samples(NETS[name])
    scores = copy.deepcopy(net).double()(x.double()).detach()
    exact = (scores.gather(1, y[:, None]) - scores).scatter(1, y[:, None], torch.inf).amin(1)
    for method in ("interval", "crown"):
        found = certify(net, x, y, Linf(), 0.0, method)  # type: ignore[arg-type]
        assert torch.allclose(found.margin, exact, rtol=0, atol=1e-9)
        assert torch.equal(found.certified, found.margin > found.slack)


@EACH_NET
def test_rounding_stays_within_its_bound(name: str) -> None:
    net, (x, _) = NETS[name], samples(NETS[name])
    with Victim(net) as victim, torch.no_grad():
        graph = trace(victim, x)
        ball = Ball.of(Linf().within((0.0, 1.0)), x, torch.full((len(x),), 0.03).double())
        bound = rounding(graph, tightened(graph, ball, False), 2.0**-23)
        for seed in range(3):
            point = corners(Linf(), x.double(), 0.03, seed)
            exact = copy.deepcopy(net).double()(point)
            apart = (victim.outputs(point, Tally.zeros(len(point))).double() - exact).abs()
            assert bool((apart <= bound).all())
        assert 0 < float(bound.max()) < 1e-3
        coarse = copy.deepcopy(net).bfloat16()(x.bfloat16()).double()
        off = rounding(graph, tightened(graph, ball, False), torch.finfo(torch.bfloat16).eps)
        assert bool(((coarse - copy.deepcopy(net).double()(x.double())).abs() <= off).all())


@pytest.mark.parametrize("shape", [(12,), (2, 3, 2)], ids=["features", "pixels"])
@pytest.mark.parametrize("name", ["linf", "l2", "l1", "l0", "l0f"])
def test_linear_models_are_exact_for_every_norm_and_the_box(name: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(12, 4).double()
    layer.weight.data = torch.randn(4, 12, generator=generator).double()
    layer.weight.data[:, 3] = 0.0
    net = nn.Sequential(nn.Flatten(), layer)
    x = (torch.rand(20, *shape, generator=generator).double() * 1.4 - 0.2).clamp(0, 1)
    y = net(x).argmax(1)
    threat = eb.threats.named(name)
    for radius in {"linf": (0.01, 0.3), "l2": (0.05, 0.5, 2.5), "l1": (0.05, 1.0, 5.0)}.get(name, (1.0, 3.0, 20.0)):
        outcome = eb.attacks.linear.linear_worst_case(threat=threat)(net, x, y, radius)
        scores = net(outcome.x_adv).detach()
        worst = (scores.gather(1, y[:, None]) - scores).scatter(1, y[:, None], torch.inf).amin(1)
        for method in ("interval", "crown"):
            found = certify(net, x, y, threat, radius, method)  # type: ignore[arg-type]
            assert torch.allclose(found.margin, worst, rtol=0, atol=1e-7), method
            assert bool((found.margin <= worst + 1e-12).all())


def test_masks_and_budgets_are_kept() -> None:
    net, (x, y) = NETS["mlp"], samples(NETS["mlp"])
    mask = torch.zeros(2, 6, 6)
    mask[:, 0, 0] = 1
    room = eb.threats.Room(mask=mask, budget=torch.full((2, 6, 6), 0.01))
    tight, free = certify(net, x, y, L2(room), 0.2), certify(net, x, y, L2(), 0.2)
    assert bool((tight.margin > free.margin).all())
    still = certify(net, x, y, L2(eb.threats.Room(mask=mask * 0)), 0.2)
    assert torch.allclose(still.margin, certify(net, x, y, L2(), 0.0).margin, rtol=0, atol=1e-12)
