"""Smallest-change attacks against the peers' on a normally trained MNIST CNN: python benchmarks/smallest.py

Needs EPSBALL_DATA (a folder with mnist/mnist.npz). Run it with the Python of the peers' environment (benchmarks/peers.md) and
this checkout's src on PYTHONPATH; a peer that cannot be imported is left out and named. Rows are counted by the model itself,
sizes are measured again in float64, CPU seconds are of one thread. Writes benchmarks/results/smallest.md.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import epsball as eb
from nets import mnist_file, trained
from peers import Counting, P, Run, adv_lib, available, distances, foolbox, ours, reached, torchattacks

HERE = Path(__file__).parent


def _foolbox() -> Iterator[tuple[str, str, Run]]:
    yield "l2", "foolbox C&W 6 x 60, 0.1", foolbox("L2CarliniWagnerAttack", binary_search_steps=6, steps=60, stepsize=0.1)
    yield "l2", "foolbox C&W 9 x 200, 0.05", foolbox("L2CarliniWagnerAttack", binary_search_steps=9, steps=200, stepsize=0.05)
    yield "l2", "foolbox DDN 100", foolbox("DDNAttack", steps=100, init_epsilon=1.0)
    for norm, name in (("l2", "L2"), ("l1", "L1"), ("linf", "LInf"), ("l0f", "L0")):
        yield norm, "foolbox FMN 100", foolbox(f"{name}FMNAttack", steps=100)
    for steps, rounds in ((60, 6), (200, 9)):
        options = {"binary_search_steps": rounds, "steps": steps, "initial_stepsize": 0.01, "regularization": 0.01, "decision_rule": "L1"}
        yield "l1", f"foolbox EAD {rounds} x {steps}", foolbox("EADAttack", **options)


def _adv_lib() -> Iterator[tuple[str, str, Run]]:
    for steps, rounds, rate in ((60, 6, 0.1), (200, 9, 0.05), (1000, 9, 0.01)):
        cw = {"binary_search_steps": rounds, "max_iterations": steps, "learning_rate": rate}
        yield "l2", f"adv-lib C&W {rounds} x {steps}, {rate}", adv_lib("carlini_wagner_l2", **cw)
    yield "l2", "adv-lib DDN 100", adv_lib("ddn", steps=100, levels=None)
    for norm, p in P.items():
        yield norm, "adv-lib FMN 100", adv_lib("fmn", norm=p, steps=100)
    yield "linf", "adv-lib C&W 100", adv_lib("carlini_wagner_linf", max_iterations=100)


def _torchattacks() -> Iterator[tuple[str, str, Run]]:
    yield "l2", "torchattacks C&W 360, c 1, 0.1", torchattacks("CW", c=1, steps=360, lr=0.1)
    yield "l1", "torchattacks EAD 6 x 60", torchattacks("EADL1", max_iterations=60, binary_search_steps=6)


def _ours() -> Iterator[tuple[str, str, Run]]:
    yield "l2", "ours C&W 3 x 20", ours("cw_l2", "l2", steps=20, rounds=3)
    yield "l2", "ours C&W 9 x 50 (default)", ours("cw_l2", "l2")
    yield "l2", "ours DDN 100", ours("ddn", "l2")
    yield "l2", "ours L-BFGS 10 x 20 (default)", ours("lbfgs", "l2")
    for norm in P:
        yield norm, "ours FMN 100", ours("fmn", norm)
        yield norm, "ours eb.smallest", ours("smallest", norm)
    yield "l1", "ours EAD 9 x 50 (default)", ours("ead", "l1")
    yield "linf", "ours C&W 40 x 20 (default)", ours("cw_linf", "linf")
    yield "l0f", "ours C&W 40 x 20 (default)", ours("cw_l0", "l0f")


def row(model: nn.Module, x: Tensor, y: Tensor, norm: str, name: str, run: Run) -> str:
    counter = Counting(model).eval()
    started = time.process_time()
    x_adv = run(counter, x, y).detach()
    seconds = time.process_time() - started
    done = reached(model, x_adv, y)
    size = distances(norm, x, x_adv)[done]
    rows = (counter.forwards / len(x), counter.backwards / len(x))
    figures = f"{100 * done.double().mean():.0f} | {size.median():.4g} | {size.mean():.4g} | {rows[0]:.0f} | {rows[1]:.0f} | {seconds:.2f}"
    print(f"{norm:5} {name:32} {figures}", flush=True)
    return f"| {name} | {figures} |"


def targeted(model: nn.Module, x: Tensor, y: Tensor, found: dict[str, str]) -> list[str]:
    """C&W L2 toward the next class."""
    goal, lines = (y + 1) % 10, ["| attack | reached, % | median | mean | CPU s |", "|---|---|---|---|---|"]
    runs = {"ours C&W 9 x 50": ours("cw_l2", "l2", targeted=True), "ours L-BFGS 10 x 20": ours("lbfgs", "l2", targeted=True)}
    if "adv-lib" in found:
        cw = {"binary_search_steps": 9, "max_iterations": 200, "learning_rate": 0.05, "targeted": True}
        runs["adv-lib C&W 9 x 200, 0.05"] = adv_lib("carlini_wagner_l2", **cw)
    for name, run in runs.items():
        started = time.process_time()
        x_adv = run(model, x, goal).detach()
        seconds = time.process_time() - started
        hit = reached(model, x_adv, goal, targeted=True)
        size = distances("l2", x, x_adv)[hit]
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
    model = trained("mnist-standard").requires_grad_(False)
    data = eb.load_data(str(mnist_file()), n=arguments.n, seed=arguments.seed)
    right = model(data.x).argmax(1) == data.y
    x, y = data.x[right], data.y[right]
    found, missing = available()
    runs = list(_ours())
    for name, lister in (("adv-lib", _adv_lib), ("foolbox", _foolbox), ("torchattacks", _torchattacks)):
        runs += list(lister()) if name in found else []
    row(model, x[:8], y[:8], "l2", "warm-up", ours("ddn", "l2", steps=10))
    versions = ", ".join(f"{name} {found[name]}" for name in ("adv-lib", "foolbox", "torchattacks") if name in found)
    lines = [
        "# The smallest change: ours and the peers'",
        "",
        f"`python benchmarks/smallest.py --n {arguments.n} --seed {arguments.seed}`; the normally trained CNN of",
        f"`benchmarks/nets.py`, {len(x)} of {arguments.n} test images that it classifies correctly, untargeted unless said,",
        f"one thread, torch {torch.__version__.split('+')[0]}, {platform.processor() or platform.machine()}; peers:",
        f"{versions or 'none'}. Sizes over the images reached, float64; rows per image.",
        *missing,
    ]
    for norm in P:
        head = ["| attack | reached, % | median size | mean size | forwards | backwards | CPU s |", "|---|---|---|---|---|---|---|"]
        table = [row(model, x, y, t, name, run) for t, name, run in runs if t == norm and arguments.only in f"{t} {name}"]
        lines += ["", f"## {norm}", "", *head, *table]
    if not arguments.only:
        lines += ["", "## l2, targeted (the next class)", "", *targeted(model, x, y, found)]
        (HERE / "results" / "smallest.md").write_text("\n".join(lines) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
