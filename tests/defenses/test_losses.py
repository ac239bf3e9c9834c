"""Every loss against a number worked out by hand, what a step of it costs, and what it leaves behind."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import epsball as eb
from epsball.core import Key
from epsball.defenses.training import (
    METHODS,
    Adversarial,
    Awp,
    Batch,
    CleanPairing,
    Cure,
    Distilled,
    Free,
    GaussianNoise,
    IgNorm,
    Loss,
    Search,
    Squeezing,
    Standard,
    Tempered,
    alp,
    atta,
    avmixup,
    fast,
    fgsm_mix,
    grad_align,
    iat,
    llr,
    make,
    mart,
    n_fgsm,
    perturb,
    pgd,
    small,
    trades,
)
from epsball.defenses.training.batch import Past, generator
from epsball.defenses.training.cure import bend
from epsball.defenses.training.fgsm import Mix
from epsball.defenses.training.grad_align import Aligned
from epsball.defenses.training.inner import clean, cross_entropy, uniform
from epsball.defenses.training.interpolated import Vertex, interpolated, smoothed
from epsball.defenses.training.llr import Llr
from epsball.defenses.training.mart import Mart
from epsball.defenses.training.pairing import Paired
from epsball.defenses.training.pgd import at_adversarial
from epsball.defenses.training.trades import Trades
from epsball.errors import BadInput
from epsball.threats import L2, Linf

X = torch.tensor([[0.5, 0.4, 0.6], [0.3, 0.5, 0.5], [0.6, 0.6, 0.4], [0.5, 0.5, 0.5]])
Y = torch.tensor([0, 1, 1, 0])
W, B = torch.tensor([1.0, -2.0, 0.5]), 0.25
EPS = 0.1


def logistic() -> nn.Linear:
    """Two classes with logits (0, w.x + b): cross-entropy is softplus(-+(w.x + b))."""
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.stack([torch.zeros(3), W]))
        model.bias.copy_(torch.tensor([0.0, B]))
    return model


def batch(threat: Any = None, radius: float = EPS, n: int = 4, seed: int = 0, smoothing: float = 0.0) -> Batch:
    radii = torch.full((n,), radius, dtype=torch.float64)
    return Batch((threat or Linf()).within((0.0, 1.0)), radii, generator(Key.of(seed)), smoothing)


def number(value: Tensor) -> float:
    return float(value.detach())


def signs() -> Tensor:
    return 2.0 * Y - 1


def worst(dual: float) -> Tensor:
    """softplus(-y (w.x + b) + eps ||w||_*), the closed form of adversarial logistic regression."""
    return F.softplus(-signs() * (X @ W + B) + EPS * dual)


@pytest.mark.parametrize("loss", [pgd(steps=8), fast(share=2.0), fgsm_mix(alpha=0.0)], ids=["pgd", "fast", "fgsm"])
def test_adversarial_logistic_regression_in_closed_form_under_linf(loss: Adversarial) -> None:
    value, logs = loss(logistic(), X, Y, batch())
    assert number(value) == pytest.approx(number(worst(number(W.abs().sum())).mean()), abs=1e-6)
    wrong = signs() * (X @ W + B) <= EPS * W.abs().sum()
    assert number(logs["adversarial"]) == pytest.approx(1 - number(wrong.float().mean()))


def test_adversarial_logistic_regression_in_closed_form_under_l2() -> None:
    value, _ = pgd(steps=20)(logistic(), X, Y, batch(L2()))
    assert number(value) == pytest.approx(number(worst(number(W.norm())).mean()), abs=1e-4)


def test_fgsm_mix_weighs_both_losses() -> None:
    value, _ = fgsm_mix(alpha=0.25)(logistic(), X, Y, batch())
    plain = F.softplus(-signs() * (X @ W + B)).mean()
    assert number(value) == pytest.approx(number(0.25 * plain + 0.75 * worst(3.5).mean()), abs=1e-6)


def test_one_step_of_the_inner_loop_is_the_attack_of_the_same_name() -> None:
    model, x, y = small((1, 8, 8), 10), torch.rand(8, 1, 8, 8, generator=generator(Key.of(1))), torch.arange(8)
    radius = torch.full((8,), 0.1, dtype=torch.float64)
    threat = Linf().within((0.0, 1.0))
    ours = perturb(model, x, cross_entropy(model, x, y), threat, radius, 1, radius, x)
    labels = model(x).argmax(1)
    theirs = eb.attacks.fgsm()(model, x, labels, 0.1, drop=False)
    again = perturb(model, x, cross_entropy(model, x, labels), threat, radius, 1, radius, x)
    assert torch.equal(again[theirs.reached], theirs.x_adv[theirs.reached])
    assert (ours - x).abs().max() <= 0.1


def test_n_fgsm_leaves_the_ball_but_not_its_own() -> None:
    x = torch.full((64, 3), 0.5)
    x_adv = n_fgsm(noise=2.0).search(logistic(), x, torch.zeros(64, dtype=torch.long), batch(n=64))
    change = (x_adv - x).abs()
    assert change.max() <= 3 * EPS + 1e-6
    assert change.amax() > 2 * EPS
    # noise first, then a whole radius along the sign of the gradient, which is constant here
    eta = uniform(x, batch(radius=2 * EPS, n=64))
    assert torch.allclose(x_adv, eta + EPS * W.sign(), atol=1e-6)


def test_a_warm_search_goes_on_where_it_ended_for_each_sample() -> None:
    past, model, up = Past(9), logistic(), -signs()[:, None] * W.sign()
    first, again = (replace(batch(seed=seed), places=torch.tensor([5, 2, 8, 0]), past=past) for seed in (1, 2))
    steps = atta(steps=1, share=0.4)
    start = uniform(X, batch(seed=1))
    steps(model, X, Y, first)
    kept = past.kept["warm.change"][first.places].float()
    assert torch.allclose(kept, (start - X + 0.4 * EPS * up).clamp(-EPS, EPS), atol=1e-4)
    assert past.kept["warm.change"].isnan().all(1).tolist() == [False, True, False, True, True, False, True, True, False]
    x_adv = steps.search(model, X, Y, again)
    assert torch.allclose(x_adv - X, (kept + 0.4 * EPS * up).clamp(-EPS, EPS), atol=1e-6)  # whatever noise there is now
    shifted = replace(again, places=torch.tensor([5, 2, 8, 1]), generator=generator(Key.of(2)))
    fresh = steps.search(model, X, Y, shifted)
    assert torch.equal(fresh[:3], x_adv[:3])
    assert torch.allclose(fresh[3], (uniform(X, batch(seed=2)) + 0.4 * EPS * up)[3].clamp(X[3] - EPS, X[3] + EPS), atol=1e-6)


def test_a_warm_search_stays_in_a_ball_that_has_shrunk() -> None:
    past = Past(4)
    wide = replace(batch(), places=torch.arange(4), past=past)
    atta()(logistic(), X, Y, wide)
    narrow = replace(batch(radius=0.02), places=wide.places, past=past)
    assert (atta(share=0.0).search(logistic(), X, Y, narrow) - X).abs().max() <= 0.02


def test_trades_is_clean_cross_entropy_and_the_divergence() -> None:
    model, x_adv = logistic(), X + EPS * W.sign() * -signs()[:, None]
    value, logs = Trades(beta=3.0)(model, X, x_adv, Y, batch())
    p, q = model(X).softmax(1), model(x_adv).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    assert number(logs["kl"]) == pytest.approx(number(divergence), rel=1e-5)
    assert number(value) == pytest.approx(number(F.cross_entropy(model(X), Y) + 3 * divergence), rel=1e-6)


def test_the_search_of_trades_climbs_the_divergence_to_a_corner() -> None:
    x_adv = trades(steps=10).search(logistic(), X, Y, batch())
    assert torch.allclose((x_adv - X).abs(), torch.full_like(X, EPS), atol=1e-6)
    model = logistic()
    moved = [(model(X + s * EPS * W.sign()).log_softmax(1)) for s in (-1, 1)]
    clean_log = model(X).log_softmax(1)
    best = torch.stack([(clean_log.exp() * (clean_log - q)).sum(1) for q in moved]).amax(0)
    found = (clean_log.exp() * (clean_log - model(x_adv).log_softmax(1))).sum(1)
    assert (found >= 0.75 * best).all()  # either corner may hold the start; none is far from the better one


def test_mart_by_hand() -> None:
    model, x_adv = logistic(), X - EPS * W.sign() * signs()[:, None]
    value, _ = Mart(weight=2.0)(model, X, x_adv, Y, batch())
    p, q = model(X).softmax(1), model(x_adv).softmax(1)
    total = 0.0
    for i, y in enumerate(Y.tolist()):
        boosted = -math.log(number(q[i, y])) - math.log(1.0001 - number(q[i, 1 - y]))
        divergence = sum(number(p[i, k]) * math.log(number(p[i, k] / q[i, k])) for k in (0, 1))
        total += boosted + 2.0 * divergence * (1 - number(p[i, y]))
    assert number(value) == pytest.approx(total / 4, rel=1e-5)


def test_logit_pairing_by_hand() -> None:
    model, x_adv = logistic(), X + EPS
    value, logs = Paired(weight=0.5)(model, X, x_adv, Y, batch())
    assert number(logs["apart"]) == pytest.approx(number((EPS * W.sum()) ** 2), rel=1e-4)
    mixed = (F.cross_entropy(model(X), Y) + F.cross_entropy(model(x_adv), Y)) / 2
    assert number(value) == pytest.approx(number(mixed) + 0.5 * number(logs["apart"]), rel=1e-6)
    quiet, logs = CleanPairing(weight=2.0, sigma=0.0)(model, X, Y, batch())
    pairs = ((X[:2] - X[2:]) @ W).square().mean()
    assert number(quiet) == pytest.approx(number(F.cross_entropy(model(X), Y) + 2 * pairs), rel=1e-5)
    squeezed, _ = Squeezing(weight=2.0, sigma=0.0)(model, X, Y, batch())
    assert number(squeezed) == pytest.approx(number(F.cross_entropy(model(X), Y) + 2 * (X @ W + B).square().mean()), rel=1e-5)


def test_interpolation_mixes_inputs_and_labels_alike() -> None:
    model, x_adv = logistic(), X + EPS
    value, _ = interpolated(model, X, x_adv, Y, batch(seed=5))
    draws, total = generator(Key.of(5)), torch.zeros(())
    for z in (X, x_adv):
        share, order = torch.rand((), generator=draws), torch.randperm(4, generator=draws)
        target = share * F.one_hot(Y, 2) + (1 - share) * F.one_hot(Y[order], 2)
        total = total + F.cross_entropy(model(share * z + (1 - share) * z[order]), target) / 2
    assert number(value) == pytest.approx(number(total), rel=1e-5)


def test_vertex_mixup_by_hand() -> None:
    hand = smoothed(torch.tensor([2]), torch.tensor([0.7]), 4)
    assert torch.allclose(hand, torch.tensor([[0.1, 0.1, 0.7, 0.1]]))
    model, x_adv = logistic(), X + EPS
    value, _ = Vertex(gamma=2.0, smooth=0.9, smooth_vertex=0.2)(model, X, x_adv, Y, batch(seed=3))
    share = torch.rand(4, generator=generator(Key.of(3)))
    right = share * 0.9 + (1 - share) * 0.2
    target = torch.where(F.one_hot(Y, 2).bool(), right[:, None], 1 - right[:, None])
    z = X + (1 - share)[:, None] * 2 * EPS
    assert number(value) == pytest.approx(number(F.cross_entropy(model(z), target)), rel=1e-5)


def test_the_vertex_stays_in_the_box() -> None:
    seen: list[Tensor] = []
    model = logistic()
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    Vertex(gamma=20.0)(model, X, X + EPS, Y, batch())
    share = torch.rand(4, generator=generator(Key.of(0)))[:, None]
    assert torch.allclose(seen[0], 1 - share * (1 - X), atol=1e-6)  # the vertex is the corner of ones


def test_curvature_of_a_quadratic_is_its_hessian() -> None:
    half = torch.randn(3, 3, generator=generator(Key.of(2)), dtype=torch.float64)
    hessian = half @ half.T
    x = X.double()
    found = bend(lambda z: 0.5 * torch.einsum("bi,ij,bj->b", z, hessian, z), x, h=0.7)
    z = (x @ hessian).sign() / math.sqrt(3)
    assert torch.allclose(found, (0.7 * z @ hessian).square().sum(1), rtol=1e-10)


def test_cure_of_a_linear_model_by_hand() -> None:
    value, logs = Cure(weight=2.0, h=0.5)(logistic(), X, Y, batch())
    # the gradient is -y sigmoid(-y (w.x + b)) w; along its sign w.x moves by -y h ||w||_1 / sqrt(3)
    there = X @ W + B - signs() * 0.5 * 3.5 / math.sqrt(3)
    slopes = (torch.sigmoid(-signs() * there) - torch.sigmoid(-signs() * (X @ W + B))).square() * W.square().sum()
    assert number(logs["curvature"]) == pytest.approx(number(slopes.mean()), rel=1e-4)
    assert number(value) == pytest.approx(number(F.cross_entropy(logistic()(X), Y) + 2 * slopes.mean()), rel=1e-4)


def test_local_linearity_by_hand() -> None:
    x_adv = X + EPS
    _, logs = Llr()(logistic(), X, x_adv, Y, batch())
    here, there = -signs() * (X @ W + B), -signs() * (x_adv @ W + B)
    slope = -signs() * torch.sigmoid(here) * (EPS * W.sum())
    assert number(logs["slope"]) == pytest.approx(number(slope.abs().mean()), rel=1e-4)
    assert number(logs["gap"]) == pytest.approx(number((F.softplus(there) - F.softplus(here) - slope).abs().mean()), rel=1e-2, abs=1e-7)


def test_gradients_of_a_linear_model_are_aligned() -> None:
    _, logs = Aligned()(logistic(), X, X, Y, batch())
    assert number(logs["misaligned"]) == pytest.approx(0.0, abs=1e-5)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    with torch.no_grad():
        for place, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator(Key.of(place))) * 3)
    assert number(Aligned()(model, X, X, Y, batch(radius=0.4))[1]["misaligned"]) > 0.01


def test_distillation_divides_both_logits() -> None:
    model, teacher = logistic(), logistic()
    with torch.no_grad():
        teacher.weight.mul_(-1)
    value, _ = Distilled(teacher, temperature=5.0)(model, X, Y, batch())
    soft = (teacher(X) / 5).softmax(1)
    assert number(value) == pytest.approx(number(-(soft * (model(X) / 5).log_softmax(1)).sum(1).mean()), rel=1e-6)
    assert all(p.grad is None for p in teacher.parameters())
    value, _ = Tempered(temperature=5.0)(model, X, Y, batch())
    assert number(value) == pytest.approx(number(F.cross_entropy(model(X) / 5, Y)), rel=1e-6)
    with pytest.raises(BadInput, match="temperature: 0"):
        Tempered(temperature=0)


def test_noise_and_smoothing() -> None:
    value, _ = GaussianNoise(sigma=0.3)(logistic(), X, Y, batch(seed=9))
    z = X + 0.3 * torch.randn(X.shape, generator=generator(Key.of(9)))
    assert number(value) == pytest.approx(number(F.cross_entropy(logistic()(z), Y)), rel=1e-6)
    value, _ = Standard()(logistic(), X, Y, batch(smoothing=0.2))
    target = 0.8 * F.one_hot(Y, 2) + 0.1
    assert number(value) == pytest.approx(number(F.cross_entropy(logistic()(X), target)), rel=1e-6)


def test_weights_are_perturbed_by_a_share_of_their_length() -> None:
    model = logistic()
    value, _ = Awp(Adversarial(Search(0, 0.0, start=clean), at_adversarial), gamma=0.1)(model, X, Y, batch())
    F.cross_entropy(model(X), Y).backward()
    gradient, weight = model.weight.grad, model.weight.detach()
    assert gradient is not None
    moved = weight + 0.1 * weight.norm() * gradient / gradient.norm()
    assert number(value) == pytest.approx(number(F.cross_entropy(X @ moved.T + model.bias, Y)), rel=1e-6)
    model.zero_grad()
    value.backward()
    expected = torch.autograd.grad(F.cross_entropy(X @ moved.requires_grad_().T + model.bias.detach(), Y), moved)[0]
    assert torch.allclose(model.weight.grad, expected, atol=1e-7)
    assert torch.equal(model.weight.detach(), weight)


def test_free_moves_the_change_with_the_weights_own_backward() -> None:
    model, step = logistic(), batch()
    loss, _ = Free()(model, X, Y, step)
    assert number(loss) == pytest.approx(number(F.softplus(-signs() * (X @ W + B)).mean()), rel=1e-6)
    loss.backward()
    assert torch.allclose(step.memory["free.change"], -signs()[:, None] * EPS * W.sign(), atol=1e-6)
    again, _ = Free()(model, X, Y, step)
    assert number(again) == pytest.approx(number(worst(3.5).mean()), rel=1e-5)
    with pytest.raises(BadInput, match="free: a batch of"):
        Free()(model, X[:2], Y[:2], Batch(step.threat, step.radius[:2], step.generator, memory=step.memory))


class Counted(nn.Module):
    """Counts rows forward, and calls of backward through its output by way of a linear layer's input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        output: Tensor = self.last(self.norm(self.first(x)).tanh())
        if output.requires_grad:
            output.register_hook(self.count)
        return output

    def count(self, gradient: Tensor) -> None:
        self.backwards += 1


COSTS = {
    "standard": (1, 1),
    "fgsm_mix": (3, 3),
    "pgd": (8, 8),
    "fast": (2, 2),
    "n_fgsm": (2, 2),
    "atta": (2, 2),
    "free": (1, 1),
    "trades": (10, 9),
    "mart": (9, 9),
    "alp": (9, 9),
    "clp": (1, 1),
    "lsq": (1, 1),
    "pgd_awp": (9, 9),
    "trades_awp": (12, 11),
    "iat": (9, 9),
    "avmixup": (8, 8),
    "tempered": (1, 1),
    "noise": (1, 1),
    "grad_align": (4, 6),
    "cure": (3, 5),
    "llr": (10, 11),
    "distilled": (1, 1),
    "pag_one_image": (1, 3),
    "pag_class_mean": (1, 3),
    "pag_nearest": (1, 3),
    "art": (10, 20),
    "ig_norm": (20, 25),
}
"""Forwards, and backwards through the output, of one step with 7 inner steps; double backward passes an output twice."""


TRACED = ("ibp", "crown_ibp")
"""Methods that read the network itself: see test_certified.py."""
COUNTED = [name for name in METHODS if name not in TRACED]


def built(name: str, options: dict[str, Any]) -> Loss:
    """A method's loss with what it needs."""
    return make(name, options, data=(X, Y), teacher=logistic())


@pytest.mark.parametrize("name", COUNTED)
def test_what_a_step_costs_and_leaves_behind(name: str) -> None:
    model = Counted().train()
    model.norm.eval()
    options = (
        {"steps": 7} if name in ("pgd", "trades", "mart", "alp", "pgd_awp", "trades_awp", "iat", "avmixup", "llr", "art", "ig_norm") else {}
    )
    modes, method = [module.training for module in model.modules()], built(name, options)
    statistics = [buffer.clone() for buffer in model.buffers()]
    state, weights = torch.get_rng_state(), [p.detach().clone() for p in model.parameters()]
    x = X.clone()
    loss, logs = method(model, x, Y, batch())
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    assert (model.forwards, model.backwards) == COSTS[name]
    assert loss.ndim == 0
    assert not any(mean.requires_grad for mean in logs.values())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.equal(x, X)
    assert not x.requires_grad
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", COUNTED)
def test_the_search_leaves_batch_norm_alone(name: str) -> None:
    model = Counted().train()
    loss = built(name, {})
    searches = loss.inner if isinstance(loss, Awp) else loss
    if isinstance(searches, Adversarial | IgNorm):
        before = [buffer.clone() for buffer in model.buffers()]
        searches.search(model, X, Y, batch())
        assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    loss(model, X, Y, batch())
    outer = {"fgsm_mix": 2, "trades": 2, "mart": 2, "alp": 2, "iat": 2, "trades_awp": 2, "llr": 2, "grad_align": 3, "art": 2}.get(name, 1)
    assert int(model.norm.num_batches_tracked) == outer


def test_a_search_that_fails_puts_the_modes_back() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    model = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        pgd()(model, X, Y, batch())
    assert model.training


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("trads", {}, "method 'trads': unknown: use one of trades"),
        ("pgd", {"stepz": 3}, "has no option 'stepz': use one of steps, share"),
        ("pgd", {"steps": 2.5}, "steps=2.5: give a whole number"),
        ("trades", {"beta": "six"}, "beta='six': give a number"),
    ],
)
def test_faults_of_a_method_are_one_line(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput) as caught:
        make(name, options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_recipes_are_values() -> None:
    assert alp(steps=3) == alp(steps=3)
    assert mart() != trades()
    assert avmixup().formula == Vertex()
    assert iat().formula is interpolated
    assert isinstance(fgsm_mix().formula, Mix)
    assert llr().search.start is uniform
    assert grad_align(0.5).formula == Aligned(0.5)
