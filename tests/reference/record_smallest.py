"""Record how small the changes are that official code and the best libraries find, into `smallest.npz` beside this file.

Needs the peers' environment of benchmarks/peers.md (torch, numpy, foolbox, adv-lib, torchattacks) and on PYTHONPATH the official
`autoattack` (github.com/fra31/auto-attack at COMMIT) and `sigma_zero_attack` (github.com/Cinofix/sigma-zero-adversarial-attack at
SIGMA_ZERO). The tests need none of this: they read the file through `models.py`. README.md says what every array means.

    python tests/reference/record_smallest.py             # run everything on the models of apgd.npz, write smallest.npz (a minute)
    python tests/reference/record_smallest.py --compare   # rerun everything, print how far sizes moved, write nothing
"""

# ruff: noqa: T201  (a script: it reports on stdout)

import argparse
import contextlib
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import MagicMock

import foolbox
import numpy as np
import torch
from autoattack.fab_pt import FABAttack_PT
from torch import Tensor, nn

from models import SMALLEST, load_reference, load_smallest


@contextlib.contextmanager
def standing_in(*names: str) -> Iterator[None]:
    """Stand-ins for what adv-lib and torchattacks import on their way and these attacks never use."""
    sys.modules.update({name: MagicMock() for name in names})
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


with standing_in("torchvision", "torchvision.models", "torchvision.transforms", "visdom"):
    import adv_lib.attacks as adv_lib
    import torchattacks
    from sigma_zero_attack import sigma_zero as official_sigma_zero

COMMIT = "a39220048b3c9f2cca9a4d3a54604793c68eca7e"
SIGMA_ZERO = "afad3326e9bf9048521a774e840172045421c0e0"
SEED, N = 0, 32
INF = float("inf")
P = {"linf": INF, "l2": 2.0, "l1": 1.0, "l0f": 0.0}
Run = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, x, labels or targets) -> x_adv."""


@dataclass(frozen=True)
class Peer:
    peer: str
    attack: str  # ours that does the same
    threat: str
    settings: dict[str, Any]  # the peer's
    options: dict[str, Any]  # ours, in as many steps
    run: Run
    targeted: bool = False


def from_adv_lib(function: Callable[..., Tensor], attack: str, threat: str, ours: dict[str, Any], **settings: Any) -> Peer:
    return Peer("adv-lib", attack, threat, settings, ours, lambda net, x, y: function(net, x, y, **settings))


def from_foolbox(kind: Any, attack: str, threat: str, ours: dict[str, Any], **settings: Any) -> Peer:
    def run(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        return kind(**settings)(seen, x, y, epsilons=None)[0]

    return Peer("foolbox", attack, threat, settings, ours, run)


def official_fab(threat: str, steps: int) -> Peer:
    def run(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return FABAttack_PT(net, norm=threat.capitalize(), n_iter=steps).attack_single_run(x, y)

    return Peer("AutoAttack", "fab", threat, {"n_iter": steps}, {"steps": steps}, run)


def official_fab_t(threat: str, steps: int) -> Peer:
    """The smallest over nine targets; `perturb` would leave a sample alone after its first success."""

    def run(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        attack, best, least = FABAttack_PT(net, norm=threat.capitalize(), n_iter=steps), x.clone(), torch.full_like(x[:, 0, 0, 0], INF)
        for attack.target_class in range(2, 11):
            x_adv = attack.attack_single_run(x, y, is_targeted=True)
            far = size(x_adv, x, threat).float()
            better = (net(x_adv).argmax(1) != y) & (far < least)
            best[better], least[better] = x_adv[better], far[better]
        return best

    return Peer("AutoAttack", "fab_t", threat, {"n_iter": steps, "n_target_classes": 9}, {"steps": steps}, run)


def torchattacks_jsma() -> Peer:
    def run(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        attack = torchattacks.JSMA(net, theta=1.0, gamma=1.0)
        attack.set_mode_targeted_by_label(quiet=True)
        return attack(x, target)

    return Peer("torchattacks", "jsma", "l0f", {"theta": 1.0, "gamma": 1.0}, {"steps": 32}, run, targeted=True)


def sigma_zero_of_the_authors(steps: int) -> Peer:
    settings = {"steps": steps}
    return Peer(
        "sigma-zero", "sigma_zero", "l0f", settings, settings, lambda net, x, y: official_sigma_zero(net, x, y, **settings).detach()
    )


def peers() -> Iterator[Peer]:
    """Settings are the peers' defaults but for the number of steps and what README.md says."""
    for threat in ("linf", "l2", "l1"):
        yield official_fab(threat, 30)
        yield official_fab_t(threat, 15)
        yield from_adv_lib(adv_lib.pdpgd, "pdpgd", threat, {"steps": 200}, norm=P[threat], num_steps=200)
    cw, cw_long = {"steps": 50, "rounds": 9}, {"steps": 200, "rounds": 9}
    few, long = {"binary_search_steps": 9, "max_iterations": 50}, {"binary_search_steps": 9, "max_iterations": 200}
    yield from_adv_lib(adv_lib.carlini_wagner_l2, "cw_l2", "l2", cw, learning_rate=0.1, **few)
    yield from_foolbox(foolbox.attacks.L2CarliniWagnerAttack, "cw_l2", "l2", cw, stepsize=0.1, binary_search_steps=9, steps=50)
    yield from_adv_lib(adv_lib.carlini_wagner_l2, "cw_l2", "l2", cw_long, learning_rate=0.05, initial_const=1.0, **long)
    ead = {"binary_search_steps": 9, "steps": 50, "decision_rule": "L1"}
    yield from_foolbox(foolbox.attacks.EADAttack, "ead", "l1", cw, **ead)
    yield from_foolbox(foolbox.attacks.EADAttack, "ead", "l1", cw | {"beta": 0.1}, regularization=0.1, initial_const=1.0, **ead)
    for threat, kind in (("linf", foolbox.attacks.LinfDeepFoolAttack), ("l2", foolbox.attacks.L2DeepFoolAttack)):
        yield from_foolbox(kind, "deepfool", threat, {"steps": 50}, steps=50)
        yield from_adv_lib(adv_lib.df, "deepfool", threat, {"steps": 50}, norm=P[threat], steps=50)
    yield from_adv_lib(adv_lib.sdf, "superdeepfool", "l2", {"steps": 100}, steps=100)
    yield from_adv_lib(adv_lib.ddn, "ddn", "l2", {"steps": 100}, steps=100, levels=None)
    yield from_foolbox(foolbox.attacks.DDNAttack, "ddn", "l2", {"steps": 100}, steps=100)
    kinds = {"linf": ("LInf", (1.0,)), "l2": ("L2", (1.0, 0.03)), "l1": ("L1", (1.0, 0.3)), "l0f": ("L0", (1.0,))}
    for threat, (name, rates) in kinds.items():
        for rate in rates:
            yield from_foolbox(getattr(foolbox.attacks, f"{name}FMNAttack"), "fmn", threat, {"steps": 100}, steps=100, max_stepsize=rate)
        if threat != "l2":
            yield from_adv_lib(adv_lib.fmn, "fmn", threat, {"steps": 100}, norm=P[threat], steps=100)
    for steps in (100, 300):
        yield from_adv_lib(adv_lib.sigma_zero, "sigma_zero", "l0f", {"steps": steps}, num_steps=steps)
        yield sigma_zero_of_the_authors(steps)
    yield torchattacks_jsma()


def size(x_adv: Tensor, x: Tensor, threat: str) -> Tensor:
    change = (x_adv.double() - x.double()).flatten(1)
    return (change != 0).sum(1).double() if threat == "l0f" else torch.linalg.vector_norm(change, P[threat], dim=1)


def searched(peer: Peer, net: nn.Module, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(N,) float64 sizes of what the peer returns, judged anew: +inf where it misses its goal or leaves the box."""
    torch.manual_seed(SEED)
    aim = target if peer.targeted else y
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x_adv = peer.run(net, x.clone(), aim.clone()).detach()
    label = net(x_adv).argmax(1)
    reached = (label == aim) if peer.targeted else (label != aim)
    inside = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
    return size(x_adv, x, peer.threat).masked_fill(~(reached & inside), INF)


def samples() -> tuple[Tensor, Tensor, np.ndarray[Any, Any]]:
    """The first N of the suite's samples that all three models classify rightly."""
    reference = load_reference()
    x, y = reference.standard[0].x, reference.standard[0].y
    right = torch.stack([net(x).argmax(1) == y for net in reference.models.values()]).all(0).nonzero().squeeze(1)[:N]
    assert len(right) == N
    return x[right], y[right], (x[right] * 16).round().numpy().astype(np.uint8).reshape(N, -1)


def record() -> dict[str, np.ndarray[Any, Any]]:
    models, (x, y, pixels) = load_reference().models, samples()
    targets = {name: net(x).scatter(1, y[:, None], -INF).argmax(1) for name, net in models.items()}
    table: dict[str, list[Any]] = {key: [] for key in ("peer", "model", "attack", "threat", "options", "settings", "targeted", "size")}
    for peer in peers():
        for name, net in models.items():
            far = searched(peer, net, x, y, targets[name])
            words = " ".join(f"{key}={value}" for key, value in peer.settings.items())
            row = (peer.peer, name, peer.attack, peer.threat, json.dumps(peer.options), words, peer.targeted, far.numpy())
            for column, value in zip(table.values(), row, strict=True):
                column.append(value)
            found = far[far < INF]
            print(f"{peer.peer:12s} {peer.attack:13s} {peer.threat:4s} {name:6s} {len(found):2d}/{N} mean {found.mean():.5f}  {words}")
    versions = [
        f"{name} {importlib.metadata.version(name).split('+')[0]}" for name in ("torch", "numpy", "foolbox", "adv-lib", "torchattacks")
    ]
    out = {f"search/{key}": np.array(column) for key, column in table.items()}
    out |= {f"target/{name}": target.numpy().astype(np.uint8) for name, target in targets.items()}
    out |= {"x": pixels, "y": y.numpy().astype(np.uint8)}
    return out | {"version": np.array([*versions, f"auto-attack {COMMIT}", f"sigma-zero {SIGMA_ZERO}"])}


def compare() -> None:
    """Rerun every search; print where sizes moved by more than a rounding, and by how much at most."""
    models, known = load_reference().models, load_smallest()
    before = {search.name: search for search in known.searches}
    for peer in peers():
        for name, net in models.items():
            words = " ".join(f"{key}={value}" for key, value in peer.settings.items())
            old = before[f"{peer.peer}/{peer.attack}/{peer.threat}/{name}/{words}"].size
            new = searched(peer, net, known.x, known.y, known.targets[name])
            moved = torch.where(old == new, 0.0, (new / old - 1).abs())
            print(f"{peer.peer:12s} {peer.attack:13s} {peer.threat:4s} {name:6s} moved {int((moved > 1e-5).sum())}, most {moved.max():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="rerun the recorded searches and print the differences")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.compare:
        return compare()
    np.savez_compressed(SMALLEST, **record())
    print(f"{SMALLEST.name}: {SMALLEST.stat().st_size / 1000:.0f} kB")
    return None


if __name__ == "__main__":
    main()
