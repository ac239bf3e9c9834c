"""epsball: how robust is your model, really?

`wrap` or `load_model` a model, attack it with `attacks` or `get`, and `audit` it. Everything is loaded on first use, so that
importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epsball import attacks, threats
    from epsball.attacks.blackbox import blackbox
    from epsball.attacks.registry import get
    from epsball.attacks.smallest import smallest
    from epsball.core import Targeted, Untargeted
    from epsball.data import load_data
    from epsball.door import audit, verify
    from epsball.models import load_model, wrap

__version__ = "0.1.0"

_HOMES = {
    "attacks": "epsball.attacks",
    "audit": "epsball.door:audit",
    "blackbox": "epsball.attacks.blackbox:blackbox",
    "get": "epsball.attacks.registry:get",
    "load_data": "epsball.data:load_data",
    "load_model": "epsball.models:load_model",
    "smallest": "epsball.attacks.smallest:smallest",
    "Targeted": "epsball.core:Targeted",
    "threats": "epsball.threats",
    "Untargeted": "epsball.core:Untargeted",
    "verify": "epsball.door:verify",
    "wrap": "epsball.models:wrap",
}

__all__ = [
    "Targeted",
    "Untargeted",
    "__version__",
    "attacks",
    "audit",
    "blackbox",
    "get",
    "load_data",
    "load_model",
    "smallest",
    "threats",
    "verify",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'epsball' has no attribute '{name}'")
    module, _, attribute = _HOMES[name].partition(":")
    value = importlib.import_module(module)
    value = getattr(value, attribute) if attribute else value
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
