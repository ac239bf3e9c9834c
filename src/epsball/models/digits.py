"""The embedded default: two tiny classifiers of scikit-learn's digits, one trained normally, one adversarially.

`scripts/make_digits_models.py` regenerates both weight files, which lie beside this module.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources

from torch import nn

NAMES = ("digits-standard", "digits-robust")


def network() -> nn.Module:
    """Two 3x3 convolutions and two linear layers on (B, 1, 8, 8) in [0, 1] -> (B, 10); 21,546 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def load(name: str) -> nn.Module:
    """The network with its packaged weights, in eval mode."""
    from safetensors.torch import load as parse

    model = network()
    model.load_state_dict(parse(resources.files("epsball.models").joinpath(f"{name}.safetensors").read_bytes()))
    return model.eval()


def _builtin(name: str) -> Callable[[], nn.Module]:
    return lambda: load(name)


BUILTIN: dict[str, Callable[[], nn.Module]] = {name: _builtin(name) for name in NAMES}
