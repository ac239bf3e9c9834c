"""What PGD-40 costs over the bare loop that nobody can beat: python benchmarks/pgd_floor.py

Counts rows with a counting model, times loop and model in one run, measures peak memory in processes of their own, and
counts what dropping saves on an undefended MNIST CNN (needs EPSBALL_DATA; that part is left out without it).
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import epsball as eb
from epsball.core import Victim

HERE = Path(__file__).parent
N, STEPS, RADIUS, STEP = 512, 40, 0.3, 0.01


class Counting(nn.Module):
    """Counts rows forward and backward, and the seconds that pass inside the model, both ways."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.forwards, self.backwards, self.seconds = inner, 0, 0, 0.0
        self._backward_started = 0.0

    def forward(self, x: Tensor) -> Tensor:
        started = time.perf_counter()
        if x.requires_grad:
            x = _Mark.apply(x, self, False)
        out = self.inner(x)
        self.forwards += len(x)
        if out.requires_grad:
            out = _Mark.apply(out, self, True)
        self.seconds += time.perf_counter() - started
        return out


class _Mark(torch.autograd.Function):
    """Identity; notes when the backward pass enters the model (at its output) and leaves it (at its input)."""

    @staticmethod
    def forward(ctx: object, x: Tensor, counter: Counting, enters: bool) -> Tensor:
        ctx.counter, ctx.enters = counter, enters
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.enters:
            ctx.counter._backward_started = time.perf_counter()
        else:
            ctx.counter.seconds += time.perf_counter() - ctx.counter._backward_started
            ctx.counter.backwards += len(gradient)
        return gradient, None, None


def small_cnn() -> nn.Module:
    """The MNIST CNN of Wong et al. 2018 (two strided convolutions), untrained; its speed does not depend on training."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 49, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    ).eval()


def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.rand(N, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return x, model(x).argmax(1)


def bare(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loop that everybody writes: no judging, no bookkeeping, no dropping."""
    x_adv = (x + torch.empty_like(x).uniform_(-RADIUS, RADIUS)).clamp(0, 1)
    for _ in range(STEPS):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(functional.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        x_adv = x_adv.detach() + STEP * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - RADIUS), x + RADIUS).clamp(0, 1)
    return x_adv


def ours(model: nn.Module, x: Tensor, y: Tensor, clean: Tensor) -> object:
    return eb.attacks.pgd(steps=STEPS, step=STEP)(Victim(model), x, y, RADIUS, clean=clean, drop=False)


def overhead(runs: int = 7) -> dict[str, float]:
    """Rows, shares of time outside the model, and the ratio of whole loops, interleaved."""
    model = small_cnn().requires_grad_(False)
    x, y = batch(model)
    clean, shares, bare_shares, ratios = model(x), [], [], []
    for _ in range(runs):
        timed: list[float] = []
        for loop, kept in ((lambda m: bare(m, x, y), bare_shares), (lambda m: ours(m, x, y, clean), shares)):
            counter = Counting(model)
            started = time.process_time(), time.perf_counter()
            loop(counter)
            wall = time.perf_counter() - started[1]
            kept.append(1 - counter.seconds / wall)
            timed.append(time.process_time() - started[0])
        ratios.append(timed[1] / timed[0])
    return {
        "gradient rows a sample": counter.backwards / N,
        "forward rows a sample": counter.forwards / N,
        "outside the model, %": 100 * statistics.median(shares),
        "outside the model in the bare loop, %": 100 * statistics.median(bare_shares),
        "CPU seconds over the bare loop's": statistics.median(ratios),
    }


def memory(which: str) -> float:
    """Peak resident MiB of a fresh process that runs one loop."""
    out = subprocess.run([sys.executable, __file__, "--memory", which], check=True, capture_output=True, text=True)
    return float(out.stdout)


def _memory(which: str) -> None:
    torch.set_num_threads(1)
    model = small_cnn().requires_grad_(False)
    x, y = batch(model)
    clean = model(x)
    bare(model, x, y) if which == "bare" else ours(model, x, y, clean)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def dropping() -> dict[str, float]:
    """Gradient rows with dropping, as a share of those without, on the normally trained MNIST CNN at Linf 0.2."""
    if not os.environ.get("EPSBALL_DATA"):
        return {}
    sys.path.insert(0, str(HERE))
    import mnist

    data = eb.load_data(str(mnist.mnist_file()), n=N, seed=0)
    model, found = mnist.standard(), {}
    for drop in (True, False):
        outcome = eb.attacks.pgd(steps=STEPS)(Victim(model), data.x, data.y, 0.2, drop=drop)
        found[drop] = int(outcome.backwards.sum())
    return {"gradient rows with dropping over without": found[True] / found[False]}


def main() -> None:
    if "--memory" in sys.argv:
        return _memory(sys.argv[-1])
    torch.set_num_threads(1)
    figures = overhead() | {"peak memory over the bare loop's": memory("ours") / memory("bare")} | dropping()
    lines = [
        "# PGD-40 against the bare loop",
        "",
        f"`python benchmarks/pgd_floor.py`; small CNN on 1x28x28, {N} samples, {STEPS} steps, dropping off unless said, one thread,",
        f"torch {torch.__version__.split('+')[0]}, {platform.processor() or platform.machine()}; medians of 7 interleaved runs.",
        "Clean outputs are handed in, as the audit does: a bare call without them costs one forward row more.",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {name} | {value:.4g} |" for name, value in figures.items()),
    ]
    (HERE / "results" / "pgd_floor.md").write_text("\n".join(lines) + "\n", encoding="utf8")
    print("\n".join(lines))
    print(json.dumps(figures))
    return None


if __name__ == "__main__":
    main()
