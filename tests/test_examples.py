"""The examples run: each in a small setting, where what it needs is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import epsball as eb
from epsball.models.digits import load

FOLDER = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    """The module in the examples' folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_forest_loads_by_its_path_and_has_not_seen_the_test_images() -> None:
    pytest.importorskip("sklearn")
    victim, data = eb.load_model(f"{FOLDER / 'forest.py'}:make"), eb.load_data("digits")
    with victim:
        right = victim.model(data.x).argmax(1) == data.y
    assert 0.9 < float(right.double().mean()) < 1  # 1 on images that it was fitted on
    rows = right.nonzero().squeeze(1)[:4]
    outcome = eb.get("square", steps=20)(victim, data.x[rows], data.y[rows], 0.4)
    assert bool(outcome.reached.any())
    assert int(outcome.backwards.sum()) == 0


def test_the_exported_file_answers_as_the_network(tmp_path: Path) -> None:
    for needed in ("onnx", "onnxruntime"):
        pytest.importorskip(needed)
    path = tmp_path / "net.onnx"
    done = subprocess.run([sys.executable, FOLDER / "export_onnx.py", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    x = eb.load_data("digits", n=7).x
    with eb.load_model(str(path)) as victim, torch.no_grad():
        assert torch.allclose(victim.model(x), load("digits-standard")(x), atol=1e-5)


def test_the_server_answers_as_the_network() -> None:
    for needed in ("fastapi", "uvicorn"):
        pytest.importorskip(needed)
    server = example("serve")
    shown = server.metadata()
    x = eb.load_data("digits", n=5).x
    question = {"id": "7", "inputs": [{"name": shown["inputs"][0]["name"], "shape": list(x.shape), "data": x.flatten().tolist()}]}
    answer = server.infer(question)
    assert answer["id"] == "7"
    assert [route.path for route in server.app.routes if route.path.startswith("/v2")] == [
        "/v2/models/digits",
        "/v2/models/digits/infer",
    ]
    (scores,) = answer["outputs"]
    assert scores["shape"] == [5, shown["outputs"][0]["shape"][1]]
    with torch.no_grad():
        expected = load("digits-standard")(x).numpy()
    assert np.allclose(np.reshape(scores["data"], scores["shape"]), expected, atol=1e-6)
