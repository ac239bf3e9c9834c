"""Black-box attacks in one form, for queries.py: ours, and the adapters of the peers that peers.py has no use for.

A run is `run(model, x, y) -> x_adv`; `model` counts (peers.Counting). `BLACK_BOX[library](attack, **options)` makes one.
Official code lies in the folder that EPSBALL_OFFICIAL names (default ../peers/official beside the checkout): RayS, sparse-rs,
SurFree and HSJA, each a clone under its own name at the commit in `COMMITS`, and attackbox (Opt-Attack,
Sign-OPT). RayS asks for CUDA and for a progress bar: both are stood in for.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from torch import Tensor, nn

import epsball as eb
import peers
from epsball.core import Tally, Victim
from peers import Counting, Run

OFFICIAL = Path(os.environ.get("EPSBALL_OFFICIAL", Path(__file__).parents[2] / "peers" / "official"))
ATTACKBOX = OFFICIAL / "attackbox" / "attack"
COMMITS = {"RayS": "29bc174", "sparse-rs": "21d8759", "SurFree": "c9920f2", "HSJA": "6a91456"}
CLASSES = 10  # of all networks here; ART and SurFree want to know
FILES = {"RayS": "RayS", "sparse-rs": "rs_attacks", "SurFree": "surfree", "HSJA": "hsja"}


def ours(attack: str, threat: str, radius: float = torch.inf, **options: Any) -> Run:
    """A registered attack, seeing no more than it asks for; it says whose rows it asks about before each call."""
    recipe = eb.get(attack, threat=threat, **options)

    def run(model: Counting, x: Tensor, y: Tensor) -> Tensor:
        def noted(rows: Tensor, tally: Tally) -> Tensor:
            model.ledger.told(tally.rows)
            return rows

        return recipe(Victim(model, access=recipe.access).through(noted), x, y, radius).x_adv

    return run


def foolbox(attack: str, first: int = 50, radius: float | None = None, **options: Any) -> Run:
    """A class of `foolbox.attacks` that starts at noise drawn in on a grid of `first` steps (its own default is 50)."""
    library = peers.module("foolbox")

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        start = library.attacks.LinearSearchBlendedUniformNoiseAttack(steps=first)
        return getattr(library.attacks, attack)(init_attack=start, **options).run(library.PyTorchModel(model, bounds=(0, 1)), x, y)

    return run


class Single(nn.Module):
    """A model that takes double precision too: some of ART's attacks send it. `cut`: inputs are cut to the box first."""

    def __init__(self, model: nn.Module, cut: bool) -> None:
        super().__init__()
        self.model, self.cut = model, cut

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.float().clamp(0, 1) if self.cut else x.float())


def art(attack: str, **options: Any) -> Run:
    """A class of `art.attacks.evasion` with its own batches. Its ZOO leaves the box, so what it asks is cut, in its favor."""
    recipe = getattr(peers.module("ART"), attack)

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        estimators = importlib.import_module("art.estimators.classification")
        shape, loss = tuple(x.shape[1:]), nn.CrossEntropyLoss()
        wrapped = estimators.PyTorchClassifier(
            Single(model, attack == "ZooAttack"), loss, shape, CLASSES, clip_values=(0.0, 1.0), device_type="cpu"
        )
        return torch.from_numpy(recipe(wrapped, verbose=False, **options).generate(x.numpy(), y.numpy()))

    return run


def cleverhans(attack: str, **options: Any) -> Run:
    """A function of `cleverhans.torch.attacks`, by its path in there. It takes samples one by one itself."""
    place, name = attack.split(".")
    function = getattr(importlib.import_module(f"cleverhans.torch.attacks.{place}"), name)
    if name.startswith("hop"):  # with a number its bisection under Linf raises
        options = {"gamma": torch.tensor(1.0), **options}

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return function(model, x, clip_min=0.0, clip_max=1.0, **({} if "gamma" in options else {"y": y}), **options)

    return run


def square(norm: str, **options: Any) -> Run:
    """Square of the official AutoAttack."""
    recipe = importlib.import_module("autoattack.square").SquareAttack
    return lambda model, x, y: recipe(model, norm=norm, device="cpu", **options).perturb(x, y)


@contextlib.contextmanager
def _folder(name: str) -> Iterator[None]:
    """The clone's folder first on the path; both SurFree and sparse-rs call a module `utils`."""
    before = list(sys.path)
    sys.path.insert(0, str(OFFICIAL / name))
    stale = [module for module in sys.modules if module.split(".")[0] == "utils"]
    for module in stale:
        del sys.modules[module]
    try:
        yield
    finally:
        sys.path[:] = before


def clone(name: str) -> ModuleType:
    """The module of an official repository that has the attack."""
    with _folder(name), patch.dict(sys.modules, {"pgbar": MagicMock()}):
        return importlib.import_module(FILES[name])


def rays(**options: Any) -> Run:
    """RayS, official: `.cuda()` gives the tensor itself."""
    recipe = clone("RayS").RayS

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        asked = MagicMock(predict_label=lambda rows: model(rows).argmax(1))
        with torch.no_grad(), patch.object(Tensor, "cuda", lambda self: self), contextlib.redirect_stdout(io.StringIO()):
            return recipe(asked, epsilon=0.0)(x, y, **options)[0]

    return run


def sparse_rs(**options: Any) -> Run:
    """Sparse-RS, official."""
    recipe = clone("sparse-rs").RSAttack
    return lambda model, x, y: recipe(model, norm="L0", device="cpu", verbose=False, **options).perturb(x, y)[1]


def surfree(**options: Any) -> Run:
    """SurFree, official, without its rounding to 256 levels. Rows of zeros stand for samples it does not ask about."""
    recipe = clone("SurFree").SurFree

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        def asked(rows: Tensor) -> Tensor:
            real, answers = (rows != 0).flatten(1).any(1), torch.zeros(len(rows), CLASSES)
            if bool(real.any()):
                answers[real] = model(rows[real])
            return answers

        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            return recipe(quantification=False, **options)(asked, x, y)

    return run


def hsja(**options: Any) -> Run:
    """HopSkipJump, official; one sample."""
    function = clone("HSJA").hsja

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        def predict(images: np.ndarray) -> np.ndarray:
            rows = torch.from_numpy(np.asarray(images)).float().reshape(-1, *x.shape[1:])
            with torch.no_grad():
                return model(rows).numpy()

        return torch.from_numpy(function(MagicMock(predict=predict), x[0].numpy(), verbose=False, **options)).float()[None]

    return run


def attackbox(attack: str, **options: Any) -> Run:
    """A class of cmhcbb/attackbox (Opt-Attack, Sign-OPT), of its authors; one sample. Inputs are cut to the box, as its models do."""
    name = {"OPT_attack": "OPT_attack", "Sign_OPT": "OPT_attack_sign_SGD"}[attack]
    spec = importlib.util.spec_from_file_location(f"attackbox_{attack}", ATTACKBOX / f"{attack}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        def predict(image: Any) -> int:
            with torch.no_grad():
                return int(model(torch.as_tensor(image).float().clamp(0, 1).reshape(-1, *x.shape[1:])).argmax(1))

        recipe = getattr(module, name)(SimpleNamespace(predict_label=predict))
        with patch.object(Tensor, "cuda", lambda self: self), contextlib.redirect_stdout(io.StringIO()):
            made = recipe.attack_untargeted(x, y, **options)
        return torch.as_tensor(made[0] if isinstance(made, tuple) else made).float().reshape(x.shape)

    return run


BY_NAME: dict[str, Callable[..., Run]] = {"Square": square, "RayS": rays, "Sparse-RS": sparse_rs, "SurFree": surfree, "HSJA": hsja}
BLACK_BOX: dict[str, Callable[..., Run]] = {
    "epsball": ours,
    "foolbox": foolbox,
    "torchattacks": peers.torchattacks,
    "ART": art,
    "cleverhans": cleverhans,
    "attackbox": attackbox,
    "official": lambda attack, **options: BY_NAME[attack](**options),
}


def available() -> tuple[dict[str, str], list[str]]:
    """(version of each library that can be used here, a line for each that cannot)."""
    found, missing = peers.available()
    found = {name: version for name, version in found.items() if name in BLACK_BOX}
    missing = [line for line in missing if line.split(":")[0] in BLACK_BOX]
    if importlib.util.find_spec("cleverhans") is None:
        missing.append("cleverhans: not importable, left out.")
    else:
        found["cleverhans"] = importlib.metadata.version("cleverhans")
    files = [ATTACKBOX / f"{name}.py" for name in ("OPT_attack", "Sign_OPT")]
    if all(file.exists() for file in files):
        found["attackbox"] = "files " + hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:7]
    else:
        missing.append("attackbox: no clone in EPSBALL_OFFICIAL, left out.")
    absent = [name for name in COMMITS if not (OFFICIAL / name / f"{FILES[name]}.py").exists()]
    missing += [f"official {name}: no clone in EPSBALL_OFFICIAL, left out." for name in absent]
    found["official"] = ", ".join(f"{name} {commit}" for name, commit in COMMITS.items() if name not in absent) or "Square only"
    return found, missing
