"""What every comparison shares: finding the peers, calling their attacks in one form, counting rows, judging answers.

A run is `run(model, x, y) -> x_adv`. `ADAPTERS[library](attack, **options)` makes one of a library's attack, by the library's
own names; peers.md says how the libraries are installed. A library that cannot be imported is named by `available`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import operator
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

import epsball as eb
from epsball.core import Targeted, Untargeted

Run = Callable[[nn.Module, Tensor, Tensor], Tensor]
P = {"linf": float("inf"), "l2": 2.0, "l1": 1.0, "l0f": 0.0}
MODULES = {"adv-lib": "adv_lib.attacks", "foolbox": "foolbox", "torchattacks": "torchattacks", "ART": "art.attacks.evasion"}
PACKAGES = {"adv-lib": "adv-lib", "foolbox": "foolbox", "torchattacks": "torchattacks", "ART": "adversarial-robustness-toolbox"}


class Ledger(Protocol):
    """Who was asked: told of every call, and of every gradient taken through it."""

    def asked(self, inputs: Tensor, output: Tensor) -> Tensor:
        """The samples that the rows of `inputs` belong to."""

    def pulled(self, rows: Tensor) -> None:
        """A gradient was taken for these samples."""


class Counting(nn.Module):
    """A model that counts rows forward, and rows backward through its output; a ledger may keep them per sample."""

    def __init__(self, net: nn.Module, ledger: Ledger | None = None) -> None:
        super().__init__()
        self.net, self.ledger = net, ledger
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net(x)
        self.forwards += len(x)
        rows = None if self.ledger is None else self.ledger.asked(x.detach(), output.detach())
        if output.requires_grad:
            output.register_hook(lambda gradient: self._back(gradient, rows))
        return output

    def _back(self, gradient: Tensor, rows: Tensor | None) -> None:
        self.backwards += len(gradient)
        if self.ledger is not None and rows is not None:
            self.ledger.pulled(rows)


def distances(norm: str, x: Tensor, x_adv: Tensor) -> Tensor:
    """(B,) in float64; `l0f` counts features."""
    change = (x_adv.double() - x.double()).flatten(1)
    return (change != 0).sum(1).double() if norm == "l0f" else torch.linalg.vector_norm(change, P[norm], dim=1)


def reached(net: nn.Module, x_adv: Tensor, y: Tensor, targeted: bool = False) -> Tensor:
    """(B,) whether the answers do what was asked, by a fresh look."""
    with torch.no_grad():
        output = net(x_adv)
    return (Targeted(y) if targeted else Untargeted(y)).reached(output)


@contextlib.contextmanager
def _standing_in(*names: str) -> Iterator[None]:
    """Stand-ins for packages that are not here, for what imports them on its way and does not use them."""
    absent = [name for name in names if name not in sys.modules and importlib.util.find_spec(name.split(".")[0]) is None]
    sys.modules.update({name: MagicMock() for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def module(library: str) -> Any:
    """The library's module of attacks. adv-lib imports torchvision and visdom for things that are not used here."""
    with _standing_in("torchvision", "torchvision.models", "torchvision.transforms", "visdom"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(MODULES[library])


def available() -> tuple[dict[str, str], list[str]]:
    """(version of each library that can be imported, a line for each that cannot)."""
    found, missing = {"epsball": importlib.metadata.version("epsball") if _installed() else "of this checkout"}, []
    for library, package in PACKAGES.items():
        try:
            module(library)
            found[library] = importlib.metadata.version(package)
        except Exception as error:
            missing.append(f"{library}: not importable ({type(error).__name__}: {error}), left out.")
    if importlib.util.find_spec("autoattack") is None:
        missing.append("official AutoAttack: not on PYTHONPATH, left out.")
    else:
        found["AutoAttack"] = "at the commit of peers.md"
    return found, missing


def _installed() -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version("epsball"))
    return False


def ours(attack: str, threat: str, targeted: bool = False, **options: Any) -> Run:
    """A registered attack, or `smallest` for `eb.smallest`."""
    recipe = eb.smallest(threat, **options) if attack == "smallest" else eb.get(attack, threat=threat, **options)
    return lambda model, x, y: recipe(model, x, Targeted(y) if targeted else y, torch.inf).x_adv


def foolbox(attack: str, from_data: bool = False, **options: Any) -> Run:
    """A class of `foolbox.attacks`; `from_data` starts it at an image of another class from the same batch."""
    library = module("foolbox")

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        wrapped = library.PyTorchModel(model, bounds=(0, 1))
        if not from_data:
            return getattr(library.attacks, attack)(**options).run(wrapped, x, y)
        start = library.attacks.DatasetAttack()
        start.feed(wrapped, x)
        return getattr(library.attacks, attack)(init_attack=start, **options).run(wrapped, x, y)

    return run


def adv_lib(attack: str, **options: Any) -> Run:
    """A function of `adv_lib.attacks`, by its path in there."""
    function = operator.attrgetter(attack)(module("adv-lib"))
    return lambda model, x, y: function(model, x, y, **options)


def torchattacks(attack: str, targeted: bool = False, **options: Any) -> Run:
    """A class of `torchattacks`."""
    recipe = getattr(module("torchattacks"), attack)

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        made = recipe(model, **options)
        if targeted:
            made.set_mode_targeted_by_label(quiet=True)
        return made(x, y)

    return run


def art(attack: str, **options: Any) -> Run:
    """A class of `art.attacks.evasion`, on the whole batch at once (its own default of one image a time only costs time)."""
    recipe = getattr(module("ART"), attack)

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        estimators = importlib.import_module("art.estimators.classification")
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        wrapped = estimators.PyTorchClassifier(
            model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0.0, 1.0), device_type="cpu"
        )
        made = recipe(wrapped, batch_size=len(x), verbose=False, **options)
        return torch.from_numpy(made.generate(x.numpy(), y.numpy()))

    return run


def official(attack: str, norm: str, eps: float = float("inf"), **options: Any) -> Run:
    """FAB of the official AutoAttack. Its noise, which eps scales, is not used in one run.

    A sample that reached eps is left out of the targets that follow and its answer is kept: inf keeps the answer of the first,
    0 asks about all targets and returns nothing.
    """
    recipe = getattr(importlib.import_module("autoattack.fab_pt"), attack)
    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    return lambda model, x, y: recipe(model, norm=name, eps=eps, device="cpu", seed=0, **options).perturb(x, y)


ADAPTERS: dict[str, Callable[..., Run]] = {
    "epsball": ours,
    "adv-lib": adv_lib,
    "foolbox": foolbox,
    "torchattacks": torchattacks,
    "ART": art,
    "AutoAttack": official,
}
