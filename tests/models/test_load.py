import json
import random
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from epsball.errors import BadInput, Untrusted
from epsball.models.adapt import Adapted
from epsball.models.load import ModelSpec, load_model

CODE = """
import torch
from torch import nn
import beside_it
from dataclasses import dataclass

@dataclass
class Config:
    width: int = 4

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(Config().width, 3), nn.Dropout(0.5))

def make():
    import lazily_beside_it
    return Net()

def function():
    return lambda x: x.flatten(1)

def nan():
    net = Net()
    with torch.no_grad():
        net[1].bias[1] = float("nan")
    return net

def seeds():
    import random
    import numpy
    torch.manual_seed(5)
    numpy.random.seed(5)
    random.seed(5)
    return Net()

def fails():
    raise ValueError("line one\\nline two")

def leaves():
    raise SystemExit(3)

def needs(width):
    return Net()

def number():
    return 3

text = "text"
ready = Net()
"""


@pytest.fixture
def net_file(tmp_path, monkeypatch):
    for name, text in (("net.py", CODE), ("beside_it.py", ""), ("lazily_beside_it.py", "")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("beside_it", "lazily_beside_it"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return f"{tmp_path / 'net.py'}"


def fails(words, *args, kind=BadInput, **settings):
    with pytest.raises(kind, match=words) as caught:
        load_model(*args, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factory", ["make", "Net", "function", "ready", "seeds"])
def test_file_factories(net_file, factory):
    before = list(sys.path)
    model, notes = load_model(f"{net_file}:{factory}")
    assert isinstance(model, Adapted)
    assert not any(m.training for m in model.modules())
    assert model.fixed_batch is None
    assert model(torch.rand(2, 1, 2, 2)).shape[0] == 2
    assert any(factory in note for note in notes)
    assert sys.path == before


def test_module_factories_are_found_in_the_working_folder(tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "zoo.py").write_text("from torch import nn\nclass Zoo:\n    @staticmethod\n    def small():\n        return nn.Flatten()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    model, _ = load_model("some_package.zoo:Zoo.small")
    assert model(torch.rand(2, 1, 2, 2)).shape == (2, 4)
    assert str(tmp_path) not in sys.path
    for name in ("some_package", "some_package.zoo"):
        monkeypatch.delitem(sys.modules, name)


def test_weights_and_settings(net_file, tmp_path):
    first, _ = load_model(f"{net_file}:make")
    state = {k: v + 1 for k, v in first.module.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    model, notes = load_model(f"{net_file}:make", str(tmp_path / "w.safetensors"), mean=[0.5], std=[0.25], class_order=[1, 2, 0])
    x = torch.rand(2, 1, 2, 2)
    expected = ((x - 0.5) / 0.25).flatten(1) @ state["1.weight"].T + state["1.bias"]
    torch.testing.assert_close(model(x), expected[:, [1, 2, 0]])
    assert any("mean 0.5 and std 0.25" in note for note in notes)
    assert any("class order" in note for note in notes)
    _, notes = load_model(f"{net_file}:make", outputs="probabilities")
    assert any("probabilities" in note for note in notes)


def test_generators_are_left_alone_and_weights_repeat(net_file):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    one, _ = load_model(f"{net_file}:make")
    torch.rand(3)
    torch.set_rng_state(before[0])
    load_model(f"{net_file}:seeds")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]
    torch.rand(3)
    two, _ = load_model(f"{net_file}:make")
    assert torch.equal(one.module[1].weight, two.module[1].weight)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nothing", "model: '.*net.py' has no 'nothing'; name a function"),
        ("fails", r"fails\(\) in '.*net.py' raised ValueError: line one line two; it is called without arguments"),
        ("leaves", r"leaves\(\) in .* raised SystemExit: 3"),
        ("needs", r"needs\(\) in .* raised TypeError"),
        ("number", r"number\(\) in .* returned int; return an nn.Module"),
        ("text", "'text' in .* is str, not a function"),
        ("nan", "tensor '1.bias' of .* has 1 NaN or infinite values"),
    ],
)
def test_bad_factories(net_file, function, words):
    fails(words, f"{net_file}:{function}")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere_at_all.zoo:make", "'nowhere_at_all.zoo' cannot be imported .ModuleNotFoundError"),
        ("missing.py:make", "model: cannot read 'missing.py'"),
        ("net.py", "model: 'net.py' names no function; give net.py:FUNCTION"),
        ("missing.onnx", "model: cannot read 'missing.onnx'"),
        (
            "https://example.org/m.pt2",
            "'https://example.org/m.pt2' is an address that names no model; write http://HOST:PORT/v2/models/NAME",
        ),
        ("s3://bucket/m", "is an address of another kind than http://HOST/v2/models/NAME"),
        ("w.safetensors", "looks like weights; name a factory as the model and pass this file with --weights"),
        ("w.pth", "looks like weights"),
        ("no-such-name", "model: 'no-such-name' is unknown; give package.module:function"),
        (":", "is unknown"),
        ("", "is no source"),
        ("missing.pt2", "model: cannot read 'missing.pt2'"),
    ],
)
def test_bad_sources(source, words):
    fails(words, source)


def test_bad_options(net_file, tmp_path):
    fails(r"box: \(1, 0\) is not an interval", f"{net_file}:make", box=(1, 0))
    fails(r"box: \(0, inf\) has no end; give finite", f"{net_file}:make", box=(0, float("inf")))
    fails("box: 3 is not a pair", f"{net_file}:make", box=3)
    fails("returns a plain function", f"{net_file}:function", "w.safetensors")
    (tmp_path / "broken.py").write_text("def make(:\n")
    fails("cannot be imported .SyntaxError", f"{tmp_path / 'broken.py'}:make")
    torch.save(torch.nn.Linear(4, 3), tmp_path / "w.pt")
    fails("--trust-code", f"{net_file}:make", str(tmp_path / "w.pt"), kind=Untrusted)


def test_builtin_names(monkeypatch):
    monkeypatch.setattr("epsball.models.load.builtin_models", lambda: {"tiny": torch.nn.Flatten})
    model, notes = load_model("tiny")
    assert model(torch.rand(2, 1, 1, 3)).shape == (2, 3)
    assert notes == ["tiny is a builtin model"]
    fails(r"\(tiny\)", "other")


@pytest.mark.parametrize("name", ["digits-standard", "digits-robust"])
def test_the_embedded_models_load(name):
    assert load_model(name)[0](torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_spec_goes_through_json(net_file):
    spec = ModelSpec(f"{net_file}:make", mean=(0.5,), std=(0.25,), box=(0.0, 1.0), class_order=(2, 1, 0), trust_code=True)
    stored = json.loads(json.dumps(spec.to_dict()))
    assert ModelSpec.from_dict(stored, trust_code=True) == spec
    again = ModelSpec.from_dict(stored)
    assert not again.trust_code  # a file cannot grant trust
    x = torch.rand(2, 1, 2, 2)
    assert torch.equal(load_model(**again.to_dict())[0](x), load_model(**spec.to_dict())[0](x))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "is no model; its fields are"),
        ({"source": "a", "color": 1}, "its fields are"),
        ({"source": 3}, "source is 3, not text"),
        ({"source": "a", "weights": 3}, "weights is 3, not text"),
        ({"source": "a", "mean": ["x"]}, "mean is .'x'., not a list of numbers"),
        ({"source": "a", "class_order": [0.5]}, "class_order is"),
        ({"source": "a", "box": [1]}, "box: "),
    ],
)
def test_bad_specs(values, words):
    with pytest.raises(BadInput, match=words):
        ModelSpec.from_dict(values)
