"""JAX functions and Keras models give the same scores and gradients as the same model in torch."""

import copy
import importlib.util
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

import epsball as eb
from epsball.core import Access, Tally
from epsball.errors import BadInput
from epsball.models import JaxModel, from_keras


def test_it_is_missing(monkeypatch):
    for name in ("jax", "keras"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadInput, match=r"model: jax models need jax: pip install 'epsball\[jax\]'"):
        JaxModel(lambda x: x)
    with pytest.raises(BadInput, match=r"pip install 'epsball\[keras\]'"):
        from_keras(None)


@pytest.fixture
def jnp():
    return pytest.importorskip("jax.numpy", reason="jax is not installed")


@pytest.fixture
def twins(jnp):
    """The same small network in JAX and in torch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5))
    weights = {name: jnp.asarray(p.detach().numpy()) for name, p in net.named_parameters()}

    def apply(w, x):
        hidden = jnp.tanh(x.reshape(len(x), -1) @ w["1.weight"].T + w["1.bias"])
        return hidden @ w["3.weight"].T + w["3.bias"]

    return JaxModel(apply, weights), net


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8])
def test_scores_and_gradients_are_those_of_torch(twins, n):
    ours, theirs = twins
    x = torch.rand(9, 3, 2, 2, generator=torch.Generator().manual_seed(n))[9 - n :]  # not at the start of its memory
    up = torch.rand(n, 5)
    found = []
    for model in (ours, theirs):
        z = x.clone().requires_grad_()
        out = model(z)
        found.append((out.detach(), torch.autograd.grad((out * up).sum(), z)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(x), theirs(x).detach(), rtol=1e-5, atol=1e-6)


def test_a_graph_may_be_followed_more_than_once(twins):
    rows = []
    for model in twins:
        x = torch.rand(3, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = model(x)
        rows.append(torch.stack([torch.autograd.grad(out[:, c].sum(), x, retain_graph=True)[0] for c in range(5)]))
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-5, atol=1e-6)


def test_it_compiles_once_for_each_power_of_two(jnp):
    traced = []

    def function(x):
        traced.append(len(x))
        return x * 2

    model = JaxModel(function)
    for n in (1, 3, 4, 5, 6, 7, 8):
        assert torch.equal(model(torch.full((n, 2), 1.5)), torch.full((n, 2), 3.0))
    assert traced == [1, 4, 8]


def test_attacks_meet_the_closed_form(jnp):
    w = np.array([[1.0, -2.0, 0.5], [0.0, 1.0, 1.0]], dtype=np.float32)
    victim = eb.wrap(JaxModel(lambda x: x @ jnp.asarray(w).T), box=(-10, 10))
    assert victim.access is Access.GRADIENT
    x, y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
    tally = Tally.zeros(6)
    victim.outputs(x, tally)
    assert tally.forwards.tolist() == [1] * 6
    radius = 0.5
    outcome = eb.attacks.pgd(steps=40)(victim, x, y, radius=radius)
    lead = (x @ torch.from_numpy(w).T).gather(1, y[:, None]).squeeze(1) - (x @ torch.from_numpy(w).T).gather(1, 1 - y[:, None]).squeeze(1)
    assert torch.equal(outcome.reached, lead < radius * np.abs(w[0] - w[1]).sum())


def test_axes_types_and_copies(jnp):
    model = JaxModel(lambda x: x[:, 0, 0, :] * jnp.ones(3), channels_last=True)
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    out = model(x)
    torch.testing.assert_close(out.double(), x[:, :, 0, 0])
    out[:, 1].sum().backward()
    assert x.grad.dtype == torch.float64
    assert x.grad.nonzero().tolist() == [[0, 1, 0, 0], [1, 1, 0, 0]]
    assert copy.deepcopy(model) is model
    with pytest.raises(BadInput, match="the JAX function returned tuple; return one array of scores"):
        JaxModel(lambda x: (x, x))(torch.rand(2, 3))


KERAS = """
    import numpy as np, torch, keras
    import epsball as eb
    from epsball.core import Tally
    from epsball.models import from_keras
    net = keras.Sequential([
        keras.layers.Input((6, 6, 2)), keras.layers.Conv2D(3, 3, activation="tanh"), keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5), keras.layers.Flatten(), keras.layers.Dense(4),
    ])
    x = torch.rand(5, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    want = keras.ops.convert_to_numpy(net(keras.ops.convert_to_tensor(x.numpy().transpose(0, 2, 3, 1)), training=False))
    victim = eb.wrap(from_keras(net))
    np.testing.assert_allclose(victim.outputs(x, Tally.zeros(5)).numpy(), want, rtol=1e-4, atol=1e-5)
    y = torch.from_numpy(want.argmax(1))
    outcome = eb.attacks.pgd(steps=20)(victim, x, y, radius=0.5)
    assert int(outcome.reached.sum()) >= 3, outcome.reached
    adv = victim.outputs(outcome.x_adv, Tally.zeros(5)).argmax(1)
    assert torch.equal(adv != y, outcome.reached)
    print("done", keras.config.backend())
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_keras(backend, monkeypatch):
    if importlib.util.find_spec("keras") is None:  # importing it would choose a backend for this process
        pytest.skip("keras is not installed")
    if backend == "jax":
        pytest.importorskip("jax", reason="jax is not installed")
    monkeypatch.setenv("KERAS_BACKEND", backend)  # read once, when Keras is imported
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KERAS)], check=False, capture_output=True, text=True)
    assert f"done {backend}" in done.stdout, done.stderr
