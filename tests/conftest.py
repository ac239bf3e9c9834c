"""One torch thread per process, repeatable property tests, and `lawkit` (shared helpers) importable from every test."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
os.environ["EPSBALL_CACHE"] = ""  # no test reads or writes what the user's own audits remember
sys.path.insert(0, str(Path(__file__).parent / "laws"))

_CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("quick", max_examples=25, derandomize=True, database=None, **_CALM)  # every run the same cases, as in CI
settings.register_profile("search", max_examples=400, derandomize=False, database=None, print_blob=True, **_CALM)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def own_random_numbers() -> None:
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def few_checks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Audits in tests leave out most of their checks, which have tests of their own and cost more than small audits; `doubt` keeps all."""
    if request.node.get_closest_marker("doubt") is None and "epsball.auditing.cascade" in sys.modules:
        cascade = sys.modules["epsball.auditing.cascade"]
        monkeypatch.setattr(cascade, "ROUND_CHECKS", cascade.ROUND_CHECKS[:1])
        monkeypatch.setattr(cascade, "FINAL_CHECKS", ())
