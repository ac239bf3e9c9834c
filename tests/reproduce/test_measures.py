"""What the experiments measure, on networks whose answer is known."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from epsball.attacks import pgd
from epsball.core import Key
from epsball.data import from_arrays
from epsball.reproduce import Setting
from epsball.reproduce.fgsm import EVERYWHERE, Broken, Walk, directions, step, walk
from epsball.reproduce.generalize import Made, amplified, fooled, gaussian, one_step, same_length, smallest
from epsball.reproduce.rubbish import gaussian as rubbish
from epsball.reproduce.rubbish import towards
from epsball.reproduce.surface import RADIUS, STEP, angles, climb, plane

EPS = 0.25


@pytest.fixture(scope="module")
def linear():
    """Three classes of (B, 1, 4, 4), a linear model, fixed weights."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(3, 16, generator=generator))
        net[1].bias.copy_(torch.randn(3, generator=generator))
    return net.eval()


@pytest.fixture(scope="module")
def data(linear):
    x = np.random.default_rng(1).random((60, 1, 4, 4), dtype=np.float32)
    y = linear(torch.from_numpy(x)).argmax(1).numpy()
    return from_arrays(x, y, layout="chw")


def two(weight):
    """A model of two classes with logits (w x, 0)."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([weight, torch.zeros(16)]))
        net[1].bias.zero_()
    return net.eval()


def test_one_unclipped_step_moves_a_logit_difference_by_eps_times_the_l1_norm():
    weight = torch.randn(16, generator=torch.Generator().manual_seed(3))
    net, x = two(weight), torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    y = net(x).argmax(1)
    data = from_arrays(x, y.numpy(), layout="chw")
    way = directions(net, data)
    sign = torch.where(y == 0, -1.0, 1.0)
    assert torch.equal(way, sign[:, None, None, None] * weight.sign().reshape(1, 1, 4, 4))
    moved = (net(x + EPS * way) - net(x)).detach()
    assert torch.allclose(moved[:, 0] - moved[:, 1], sign * EPS * weight.abs().sum(), atol=1e-4)


def test_error_and_confidence_are_those_of_the_shifted_logits(linear, data):
    found = step(linear, data, EPS, EVERYWHERE)
    shifted = linear(data.x + EPS * directions(linear, data)).detach().softmax(1)
    assert found.right.all()
    assert torch.equal(found.wrong, shifted.argmax(1) != data.y)
    # Where the step failed, the attack hands back whatever scored higher; the mean is over errors only.
    assert torch.allclose(found.confidence[found.wrong], shifted.amax(1)[found.wrong], atol=1e-5)
    assert step(linear, data, EPS, (0.0, 1.0)).wrong.sum() <= found.wrong.sum()


def test_confidence_is_averaged_over_the_errors_that_the_step_made():
    told = Broken(torch.tensor([True, True, False, True]), torch.tensor([True, False, True, True]), torch.tensor([0.9, 0.2, 0.1, 0.7]))
    assert told.error().startswith("75.0 %")
    assert told.sure().startswith("80.0 %")
    assert told.sure().endswith("n = 2")


def test_logits_of_a_linear_model_are_straight_lines(linear, data):
    path = walk(linear, data.x, data.y, directions(linear, data), reach=2.0, steps=10)
    assert path.logits.shape == (60, 21, 3)
    assert torch.allclose(path.logits[:, 10], linear(data.x).detach(), atol=1e-5)
    assert not path.wrong()[:, 10].any()
    for side in (path.eps >= 0, path.eps <= 0, path.eps > -9):
        assert torch.allclose(path.straight(side), torch.ones(60, dtype=torch.float64), atol=1e-8)


def test_a_bent_curve_is_explained_in_part():
    eps = torch.linspace(-1, 1, 201)
    bent = Walk(eps, eps.abs()[None, :, None], torch.zeros(1, dtype=torch.int64))
    assert float(bent.straight(eps >= 0)) == pytest.approx(1)
    assert float(bent.straight(eps > -9)) == pytest.approx(0, abs=1e-6)  # no line explains a symmetric roof
    square = Walk(eps, eps.square()[None, :, None], torch.zeros(1, dtype=torch.int64))
    assert float(square.straight(eps >= 0)) == pytest.approx(15 / 16, abs=0.01)  # corr(x, x^2)^2 on [0, 1]


def test_rubbish_is_standard_normal_and_keyed_by_row():
    x = rubbish(0, 50)
    assert torch.equal(rubbish(0, 20), x[:20])
    assert not torch.equal(rubbish(1, 20), x[:20])
    assert abs(float(x.mean())) < 0.02
    assert float(x.std()) == pytest.approx(1, abs=0.02)


def test_a_step_towards_a_class_raises_its_probability_alone(linear, data):
    for box in (EVERYWHERE, (0.0, 1.0)):
        x_adv = towards(linear, data.x, 1, box)
        before, after = (linear(x).detach().softmax(1)[:, 1] for x in (data.x, x_adv))
        assert (after >= before - 1e-6).all()
        assert (after > before)[data.y != 1].all()
        assert float((x_adv - data.x).abs().max()) <= EPS + 1e-6
    assert float(x_adv.min()) >= 0


def test_who_is_fooled_is_counted_among_the_right_with_an_example(linear, data):
    x_adv = data.x.clone()
    wrong = linear(x_adv.flip(0)).argmax(1) != data.y
    x_adv = torch.where(wrong[:, None, None, None], x_adv.flip(0), x_adv)
    reached = torch.arange(60) < 40
    count, n = fooled(linear, data, Made(x_adv, reached, torch.ones(60)))
    assert (count, n) == (int(wrong[:40].sum()), 40)
    assert 0 < count < 40


def test_controls_have_the_length_they_claim(linear, data):
    setting = Setting(seed=0)
    made = smallest(linear, data, setting)
    assert made.reached.all()
    noise = same_length(data.x, made, setting)
    lengths = [(m.x_adv - data.x).flatten(1).double().norm(dim=1) for m in (made, noise)]
    assert torch.allclose(lengths[0], made.size, atol=1e-5)
    assert torch.allclose(lengths[1], made.size, atol=1e-5)
    loud = amplified(data.x, made, 0.1)
    change = (loud.x_adv - data.x).flatten(1)
    assert torch.allclose(change.square().mean(1).sqrt(), torch.full((60,), 0.1), atol=1e-5)
    cosine = nn.functional.cosine_similarity(change, (made.x_adv - data.x).flatten(1))
    assert torch.allclose(cosine, torch.ones(60), atol=1e-3)
    assert float((gaussian(data.x, 0.3, setting).x_adv - data.x).std()) == pytest.approx(0.3, abs=0.02)


def test_no_smaller_change_than_the_linear_optimum(linear, data):
    """Towards one class of three the distance to its half-space against the label is a lower bound."""
    made = smallest(linear, data, Setting(seed=0))
    weight = linear[1].weight.detach()
    target, logits = linear(made.x_adv).argmax(1), linear(data.x).detach()
    assert (target != data.y).all()
    gap = logits.gather(1, data.y[:, None]).squeeze(1) - logits.gather(1, target[:, None]).squeeze(1)
    bound = gap / (weight[data.y] - weight[target]).norm(dim=1)
    assert (made.size >= bound.double() - 1e-5).all()


def test_samples_wrong_before_are_no_examples(linear, data):
    mixed = from_arrays(data.x, (data.y.numpy() + (np.arange(60) < 10)) % 3, layout="chw")
    assert not one_step(linear, mixed).reached[:10].any()


# Trajectories.


def test_a_climb_is_pgd_seen_step_by_step(linear, data):
    run = climb(linear, data, restarts=2, steps=5, seed=7)
    assert run.losses.shape == (6, 2, 60)
    outcome = pgd(steps=5, step=STEP)(linear, data.x, data.y, RADIUS, Key.of(7).fold("start", 1), drop=False)
    missed = ~outcome.reached  # of the others the attack keeps the best success, which may be an earlier point
    assert missed.sum() > 20
    assert torch.allclose(outcome.score[missed], run.losses[:, 1].amax(0)[missed], atol=1e-6)
    final = nn.functional.cross_entropy(linear(run.ends[1]).detach(), data.y, reduction="none")
    assert torch.allclose(run.losses[-1, 1], final, atol=1e-5)
    assert float((run.ends - data.x).abs().max()) <= RADIUS + 1e-6
    assert (run.losses[-1] > run.losses[0] - 1e-6).all()  # the loss of a linear model only climbs
    assert not torch.equal(run.starts[0], run.starts[1])
    first = nn.functional.cross_entropy(linear(run.starts[1]).detach(), data.y, reduction="none")
    assert torch.allclose(run.losses[0, 1], first, atol=1e-5)


def test_every_start_ends_in_the_best_corner_of_a_linear_model():
    """On a model of two classes PGD reaches the corner against the label from every start."""
    net = two(torch.ones(16))
    x = torch.full((3, 1, 4, 4), 0.5)
    data = from_arrays(x, np.array([0, 1, 0]), layout="chw")
    run = climb(net, data, restarts=3, steps=70, seed=0)
    corner = x + torch.tensor([-1.0, 1.0, -1.0])[:, None, None, None] * RADIUS
    assert torch.allclose(run.ends, corner.expand_as(run.ends), atol=1e-5)
    assert float(run.final().std(0).max()) < 1e-4


def test_the_plane_holds_the_clean_loss_in_its_middle(linear, data):
    heights = plane(linear, data.x[0], data.y[0], seed=0, count=5)
    clean = nn.functional.cross_entropy(linear(data.x[:1]).detach(), data.y[:1])
    assert float(heights[2, 2]) == pytest.approx(float(clean), abs=1e-5)
    assert heights.shape == (5, 5)
    assert float(heights[2, 4]) > float(heights[2, 2]) > float(heights[2, 0])  # along the gradient's sign


def test_angles_between_changes():
    right = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert angles(right).tolist() == pytest.approx([90.0])
    three = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[-1.0, 0.0]]])
    assert angles(three).tolist() == pytest.approx([120.0])
    assert math.isfinite(float(angles(torch.zeros(2, 1, 3))))
