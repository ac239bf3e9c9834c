"""Our searches for the smallest change against recorded runs of official code and of the best libraries, at equal steps.

What was recorded, by whom and in which settings: tests/reference/README.md.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from epsball.attacks import get
from epsball.core import Outcome, Targeted, Untargeted

_spec = importlib.util.spec_from_file_location("smallest_reference", Path(__file__).parents[1] / "reference" / "models.py")
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["smallest_reference"] = _module
_spec.loader.exec_module(_module)
MODELS, RECORD = _module.load_reference().models, _module.load_smallest()


@functools.cache
def ours(model: str, attack: str, threat: str, options: str, targeted: bool) -> Outcome:
    goal = Targeted(RECORD.targets[model]) if targeted else Untargeted(RECORD.y)
    return get(attack, threat=threat, **json.loads(options))(MODELS[model], RECORD.x, goal, float("inf"))


def groups() -> list[Any]:
    """The searches of one peer with one setting, on the three models; the longest is slow."""
    found: dict[str, list[Any]] = {}
    for search in RECORD.searches:
        found.setdefault(f"{search.peer}/{search.attack}/{search.threat}/{search.settings}", []).append(search)
    slow = pytest.mark.slow
    return [pytest.param(searches, id=name, marks=slow if "max_iterations=200" in name else ()) for name, searches in found.items()]


@pytest.mark.parametrize("searches", groups())
def test_no_larger_than_the_peer(searches: list[Any]) -> None:
    """Median and mean of ours / the peer's at most 1.01, on all samples; under L0 one net's mean may hang on one feature of one sample."""
    ratios = []
    for search in searches:
        outcome = ours(search.model, search.attack, search.threat, json.dumps(search.options), search.targeted)
        peer = torch.isfinite(search.size)
        lost = (peer & ~outcome.reached).nonzero().flatten().tolist()
        assert not lost, f"{search.model}: only the peer reaches {lost}"
        ratios.append((outcome.size / search.size)[peer])
        median, mean = float(ratios[-1].quantile(0.5)), float(ratios[-1].mean())
        assert median <= 1.01, f"{search.model}: median {median:.4f}"
        assert mean <= (1.04 if search.threat == "l0f" else 1.01), f"{search.model}: mean {mean:.4f}, worst {float(ratios[-1].max()):.3f}"
    assert float(torch.cat(ratios).mean()) <= 1.01
