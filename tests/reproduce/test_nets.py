import numpy as np
import pytest
import torch

from epsball.data import from_arrays
from epsball.errors import BadInput
from epsball.reproduce import Setting, nets


@pytest.fixture(scope="module")
def data():
    """Two classes that the mean of the left half tells apart."""
    generator = np.random.default_rng(0)
    y = np.arange(200) % 2
    x = generator.random((200, 28, 28), dtype=np.float32) * 0.5
    x[y == 1, :, :14] += 0.3
    return from_arrays(x, y)


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def fit(data, setting, name="net", build=nets.softmax, epochs=3, **options):
    return nets.fitted(name, build, data, setting, epochs, batch=20, rate=1e-2, **options)


def test_it_learns_and_is_kept(data, tmp_path):
    said = []
    setting = Setting(cache=tmp_path / "nets", say=said.append)
    first = fit(data, setting)
    assert nets.accuracy(first, data)[0] > 190
    assert not first.training
    assert said[-1].startswith("training net: epoch 3 of 3, loss 0.")
    (file,) = (tmp_path / "nets").iterdir()
    said.clear()
    assert torch.equal(weights(fit(data, setting)), weights(first))
    assert said == []
    file.write_bytes(b"not weights")
    with pytest.raises(BadInput, match=r"is damaged .*: delete it"):
        fit(data, setting)


def test_everything_random_hangs_on_seed_and_name(data, tmp_path):
    def made(cache, seed=0, name="net", build=nets.maxout):
        return weights(fit(data, Setting(cache=tmp_path / cache, seed=seed), name, build, epochs=1))

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = made("a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(made("b"), first)  # weights, order and dropout
    assert not torch.equal(made("a", seed=1), first)
    assert not torch.equal(made("a", name="other"), first)


def test_another_recipe_is_another_file(data, tmp_path):
    setting = Setting(cache=tmp_path)
    for options in ({}, {"decay": 0.1}, {"radius": 0.1, "steps": 1}, {"epochs": 2}):
        fit(data, setting, **options)
    fit(nets.rows(data, torch.arange(100)), setting)
    assert len(list(tmp_path.iterdir())) == 5


def test_decay_shrinks_weights_and_adversarial_training_spreads_them(data, tmp_path):
    setting = Setting(cache=tmp_path)
    plain, small, robust = (fit(data, setting, **o) for o in ({}, {"decay": 1.0}, {"radius": 0.2, "steps": 2}))
    norms = [float(net[1].weight.detach().norm()) for net in (plain, small, robust)]
    assert norms[1] < 0.5 * norms[0]
    # Under Linf the useless right half costs margin, so its weights shrink.
    share = [float(net[1].weight.detach()[:2].reshape(2, 28, 28)[:, :, 14:].abs().mean()) for net in (plain, robust)]
    assert share[1] < share[0]


def test_quick_means_one_epoch(data, tmp_path):
    said = []
    fit(data, Setting(cache=tmp_path, quick=True, say=said.append), epochs=50)
    assert len(said) == 1


def test_halves_are_disjoint_and_hang_on_the_seed(data):
    first, second = nets.halves(data, Setting(seed=0))
    assert len(first.x) == len(second.x) == 100
    assert not set(first.indices.tolist()) & set(second.indices.tolist())
    assert nets.halves(data, Setting(seed=0))[0].indices.equal(first.indices)
    assert not nets.halves(data, Setting(seed=1))[0].indices.equal(first.indices)
    assert torch.equal(data.y[first.indices], first.y)


def test_maxout_is_the_largest_piece():
    layer = nets.Maxout(2, 1, 3)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        layer.linear.bias.zero_()
    x = torch.tensor([[3.0, 1.0], [1.0, 4.0], [-2.0, -5.0]])
    assert layer(x).squeeze(1).tolist() == [3.0, 4.0, 7.0]


@pytest.mark.parametrize("build", [nets.softmax, nets.maxout, nets.cnn, lambda: nets.mlp(100, 100), lambda: nets.mlp()])
def test_networks_take_digits(build):
    assert build()(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert nets.mlp(123, 456)[-1].in_features == 456


def test_the_one_for_color_takes_color():
    assert nets.cifar_cnn()(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_answers_do_not_hang_on_the_slices(data):
    net = nets.mlp(7)
    x = 5 * data.x - 2  # outside the box too: no box is asked for
    assert torch.allclose(nets.answers(net, x, batch=33), net(x).detach(), atol=1e-6)
