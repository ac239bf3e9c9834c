"""Smallest-change attacks against the peers' on a normally trained MNIST CNN: python benchmarks/smallest.py

Needs EPSBALL_DATA (a folder with mnist/mnist.npz). Run it with the Python of the peers' environment (benchmarks/peers.md) and
this checkout's src on PYTHONPATH; a peer that cannot be imported is left out and named. Rows are counted by the model itself,
sizes are measured again in float64, CPU seconds are of one thread. Writes benchmarks/results/smallest.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

import epsball as eb
from epsball.attacks import get
from epsball.attacks.smallest import smallest
from epsball.core import Outcome, Targeted, Untargeted

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import mnist  # noqa: E402

P = {"l2": 2.0, "l1": 1.0, "linf": float("inf"), "l0": 0.0}
Run = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Counting(nn.Module):
    """Counts rows both ways."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.forwards, self.backwards = inner, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        output = self.inner(x)
        self.forwards += len(x)
        if output.requires_grad:
            output.register_hook(self._back)
        return output

    def _back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def peers() -> tuple[dict[str, object], list[str]]:
    """The peers that can be imported, and a line for each that cannot."""
    found, missing = {}, []
    # adv-lib imports these for things that are not used here; torchvision's wheel does not load beside CPU torch.
    absent = {name for name in ("torchvision", "visdom") if importlib.util.find_spec(name) is None}
    for unused in ("torchvision", "torchvision.models", "visdom"):
        if unused.split(".")[0] in absent:
            sys.modules[unused] = MagicMock()
    for name in ("foolbox", "torchattacks", "adv_lib.attacks"):
        try:
            found[name.split(".")[0]] = importlib.import_module(name)
        except Exception as error:
            missing.append(f"{name}: not importable ({type(error).__name__}: {error}), left out")
    return found, missing


def ours(name: str, threat: str, **options: float) -> Run:
    return lambda model, x, y: get(name, threat=threat, **options)(model, x, y, torch.inf).x_adv


def bisected(threat: str) -> Run:
    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        outcome: Outcome = smallest(threat)(model, x, y)
        return outcome.x_adv

    return run


def foolbox_run(foolbox: object, attack: str, **options: object) -> Run:
    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        recipe = getattr(foolbox.attacks, attack)(**options)
        return recipe.run(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y)

    return run


def _foolbox(f: object) -> Iterator[tuple[str, str, Run]]:
    yield "l2", "foolbox C&W 6 x 60, 0.1", foolbox_run(f, "L2CarliniWagnerAttack", binary_search_steps=6, steps=60, stepsize=0.1)
    yield "l2", "foolbox C&W 9 x 200, 0.05", foolbox_run(f, "L2CarliniWagnerAttack", binary_search_steps=9, steps=200, stepsize=0.05)
    yield "l2", "foolbox DDN 100", foolbox_run(f, "DDNAttack", steps=100, init_epsilon=1.0)
    for norm in ("L2", "L1", "LInf", "L0"):
        yield norm.lower(), "foolbox FMN 100", foolbox_run(f, f"{norm}FMNAttack", steps=100)
    for steps, rounds in ((60, 6), (200, 9)):
        options = {"binary_search_steps": rounds, "steps": steps, "initial_stepsize": 0.01, "regularization": 0.01, "decision_rule": "L1"}
        yield "l1", f"foolbox EAD {rounds} x {steps}", foolbox_run(f, "EADAttack", **options)


def _adv_lib(a: object) -> Iterator[tuple[str, str, Run]]:
    for steps, rounds, rate in ((60, 6, 0.1), (200, 9, 0.05), (1000, 9, 0.01)):
        cw = {"binary_search_steps": rounds, "max_iterations": steps, "learning_rate": rate}
        yield "l2", f"adv-lib C&W {rounds} x {steps}, {rate}", lambda m, x, y, cw=cw: a.carlini_wagner_l2(m, x, y, **cw)
    yield "l2", "adv-lib DDN 100", lambda m, x, y: a.ddn(m, x, y, steps=100, levels=None)
    for threat, p in P.items():
        yield threat, "adv-lib FMN 100", lambda m, x, y, p=p: a.fmn(m, x, y, norm=p, steps=100)
    yield "linf", "adv-lib C&W 100", lambda m, x, y: a.carlini_wagner_linf(m, x, y, max_iterations=100)


def _torchattacks(t: object) -> Iterator[tuple[str, str, Run]]:
    yield "l2", "torchattacks C&W 360, c 1, 0.1", lambda m, x, y: t.CW(m, c=1, steps=360, lr=0.1)(x, y)
    yield "l1", "torchattacks EAD 6 x 60", lambda m, x, y: t.EADL1(m, max_iterations=60, binary_search_steps=6)(x, y)


def _ours() -> Iterator[tuple[str, str, Run]]:
    yield "l2", "ours C&W 3 x 20", ours("cw_l2", "l2", steps=20, rounds=3)
    yield "l2", "ours C&W 9 x 50 (default)", ours("cw_l2", "l2")
    yield "l2", "ours DDN 100", ours("ddn", "l2")
    yield "l2", "ours L-BFGS 10 x 20 (default)", ours("lbfgs", "l2")
    for threat in P:
        yield threat, "ours FMN 100", ours("fmn", threat)
        yield threat, "ours eb.smallest (bisection)", bisected(threat)
    yield "l1", "ours EAD 9 x 50 (default)", ours("ead", "l1")
    yield "linf", "ours C&W 40 x 20 (default)", ours("cw_linf", "linf")
    yield "l0", "ours C&W 40 x 20 (default)", ours("cw_l0", "l0")


def measured(threat: str, x: Tensor, x_adv: Tensor) -> Tensor:
    change = (x_adv.double() - x.double()).flatten(1)
    return (change != 0).sum(1).double() if threat == "l0" else torch.linalg.vector_norm(change, P[threat], dim=1)


def row(model: nn.Module, x: Tensor, y: Tensor, threat: str, name: str, run: Run) -> str:
    counter = Counting(model).eval()
    started = time.process_time()
    x_adv = run(counter, x, y).detach()
    seconds = time.process_time() - started
    with torch.no_grad():
        reached = Untargeted(y).reached(model(x_adv))
    size = measured(threat, x, x_adv)[reached]
    rows = (counter.forwards / len(x), counter.backwards / len(x))
    figures = (
        f"{100 * reached.double().mean():.0f} | {size.median():.4g} | {size.mean():.4g} | {rows[0]:.0f} | {rows[1]:.0f} | {seconds:.2f}"
    )
    print(f"{threat:5} {name:32} {figures}", flush=True)
    return f"| {name} | {figures} |"


def targeted(model: nn.Module, x: Tensor, y: Tensor, found: dict[str, object]) -> list[str]:
    """C&W L2 toward the next class."""
    goal, lines = (y + 1) % 10, ["| attack | reached, % | median | mean | CPU s |", "|---|---|---|---|---|"]
    runs: dict[str, Run] = {
        "ours C&W 9 x 50": lambda m, x, t: get("cw_l2", threat="l2")(m, x, Targeted(t), torch.inf).x_adv,
        "ours L-BFGS 10 x 20": lambda m, x, t: get("lbfgs", threat="l2")(m, x, Targeted(t), torch.inf).x_adv,
    }
    if "adv_lib" in found:
        cw = {"binary_search_steps": 9, "max_iterations": 200, "learning_rate": 0.05, "targeted": True}
        runs["adv-lib C&W 9 x 200, 0.05"] = lambda m, x, t: found["adv_lib"].carlini_wagner_l2(m, x, t, **cw)
    for name, run in runs.items():
        started = time.process_time()
        x_adv = run(model, x, goal).detach()
        seconds = time.process_time() - started
        hit = model(x_adv).argmax(1) == goal
        size = measured("l2", x, x_adv)[hit]
        lines.append(f"| {name} | {100 * hit.double().mean():.0f} | {size.median():.4g} | {size.mean():.4g} | {seconds:.2f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only attacks whose line contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = mnist.standard().requires_grad_(False)
    data = eb.load_data(str(mnist.mnist_file()), n=arguments.n, seed=arguments.seed)
    right = model(data.x).argmax(1) == data.y
    x, y = data.x[right], data.y[right]
    found, missing = peers()
    runs = list(_ours())
    for name, lister in (("adv_lib", _adv_lib), ("foolbox", _foolbox), ("torchattacks", _torchattacks)):
        runs += list(lister(found[name])) if name in found else []
    row(model, x[:8], y[:8], "l2", "warm-up", ours("ddn", "l2", steps=10))
    versions = ", ".join(f"{name} {getattr(module, '__version__', '')}".strip() for name, module in found.items())
    lines = [
        "# The smallest change: ours and the peers'",
        "",
        f"`python benchmarks/smallest.py --n {arguments.n} --seed {arguments.seed}`; the normally trained CNN of",
        f"`benchmarks/mnist.py`, {len(x)} of {arguments.n} test images that it classifies correctly, untargeted unless said,",
        f"one thread, torch {torch.__version__.split('+')[0]}, {platform.processor() or platform.machine()}; peers:",
        f"{versions or 'none'}. Sizes over the images reached, float64; rows per image.",
        *missing,
    ]
    for threat in P:
        head = ["| attack | reached, % | median size | mean size | forwards | backwards | CPU s |", "|---|---|---|---|---|---|---|"]
        table = [row(model, x, y, t, name, run) for t, name, run in runs if t == threat and arguments.only in f"{t} {name}"]
        lines += ["", f"## {threat}", "", *head, *table]
    if not arguments.only:
        lines += ["", "## l2, targeted (the next class)", "", *targeted(model, x, y, found)]
        (HERE / "results" / "smallest.md").write_text("\n".join(lines) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
