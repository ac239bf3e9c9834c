"""Trains a small CNN on MNIST, once normally and once adversarially, and audits both: python benchmarks/mnist.py

Needs EPSBALL_DATA (a folder with mnist/mnist.npz). Weights are kept in benchmarks/cache (not tracked); the tables go to
benchmarks/results/mnist.md. About 20 minutes on 2 cores, of which the adversarial training takes most.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import epsball as eb
from epsball.auditing.results import Report
from epsball.core import Victim
from epsball.data import Dataset, load_data

HERE = Path(__file__).parent
CACHE, RESULTS = HERE / "cache", HERE / "results"
THREATS = ("linf:0.1,0.2,0.3", "l2:2", "l1:10")


def network() -> nn.Module:
    """Two strided convolutions and two linear layers on (B, 1, 28, 28): 166,406 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def standard() -> nn.Module:
    """The normally trained network (for `epsball audit benchmarks/mnist.py:standard`)."""
    return _trained("standard", epochs=5, radius=0.0)


def robust() -> nn.Module:
    """The network trained on PGD-7 within Linf 0.3."""
    return _trained("robust", epochs=15, radius=0.3)


def _arrays() -> tuple[Tensor, Tensor]:
    with np.load(_mnist(), allow_pickle=False) as file:
        return torch.from_numpy(file["x_train"]).float()[:, None] / 255, torch.from_numpy(file["y_train"]).long()


def _mnist() -> Path:
    root = os.environ.get("EPSBALL_DATA")
    if not root:
        raise SystemExit("EPSBALL_DATA is not set: point it at a folder with mnist/mnist.npz")
    return Path(root) / "mnist" / "mnist.npz"


def _trained(name: str, epochs: int, radius: float, batch: int = 128) -> nn.Module:
    """Adam, one-cycle rate, radius warm-up over the first fifth; PGD-7 inside where the radius is not 0."""
    path, model = CACHE / f"mnist-{name}.safetensors", network()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    torch.manual_seed(0)
    model, (x_train, y_train) = network(), _arrays()
    steps = epochs * (len(x_train) // batch)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    attack, step = eb.attacks.pgd(steps=7), 0
    for epoch in range(epochs):
        started = time.perf_counter()
        for rows in torch.randperm(len(x_train))[: len(x_train) // batch * batch].split(batch):
            x, y = x_train[rows], y_train[rows]
            step += 1
            if radius:
                x = attack(Victim(model), x, y, radius * min(1.0, step / (steps / 5)), seed=step, drop=False).x_adv
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"{name}: epoch {epoch + 1} of {epochs}, loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    CACHE.mkdir(exist_ok=True)
    save_file(model.state_dict(), path)
    return model.eval()


def table(report: Report) -> str:
    """The figures of a report as Markdown; † marks what the audit itself does not trust, with its reasons below."""
    results = report.models[0].results
    rows = ["| model | clean | " + " | ".join(f"{r.threat} {r.radius_text}" for r in results) + " |", "|---" * (2 + len(results)) + "|"]
    notes = []
    for model in report.models:
        rates = [(model.clean_accuracy, ""), *((r.robust_accuracy, "" if r.trustworthy else " †") for r in model.results)]
        cells = [f"{100 * rate.value:.1f}{mark} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]" for rate, mark in rates]
        rows.append(f"| {model.name} | " + " | ".join(cells) + " |")
        notes += [
            f"- {'†' if f.severity == 'block' else 'note,'} {model.name}, {r.threat} {r.radius_text}: {f.message}"
            for r in model.results
            for f in [*model.flags, *r.flags]
        ]
    totals = [
        f"{model.name}: {sum(r.forwards for r in model.results):,} forward and {sum(r.backwards for r in model.results):,} backward rows, "
        f"{sum(r.seconds for r in model.results):.0f} s."
        for model in report.models
    ]
    return "\n".join([*rows, "", *notes, "", *totals])


def standing(model: nn.Module, data: Dataset, batch_size: int | None, folder: Path, effort: str, drop: bool = True) -> dict[int, tuple]:
    """Which samples stand at each radius, by their place in the source."""
    report = eb.audit(eb.wrap(model, batch_size=batch_size), data, THREATS, effort=effort, out=folder, batch_size=batch_size, drop=drop)
    from epsball.store import evidence

    arrays, _ = evidence.read(folder / evidence.NAME)
    verdicts: dict[int, list] = {int(i): [] for i in arrays["m0/index"]}
    for threat in ("linf", "l2", "l1"):
        found = dict(zip(arrays[f"m0/{threat}/rows"].tolist(), arrays[f"m0/{threat}/radius"].tolist(), strict=True))
        for row, index in enumerate(arrays["m0/index"].tolist()):
            verdicts[index].append(found.get(row))
    assert report.models[0].n == len(verdicts)
    return {index: tuple(v) for index, v in verdicts.items()}


def invariance(data: Dataset, effort: str) -> str:
    """Per-sample verdicts for several batch sizes, shuffled, and with dropping off, against batch size 128."""
    from dataclasses import replace

    model, folder = robust(), CACHE / "invariance"
    base = standing(model, data, 128, folder, effort)
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(1))
    mixed = replace(data, x=data.x[order], y=data.y[order], indices=data.indices[order])
    lines = ["| run | samples | verdicts that differ from batch size 128 |", "|---|---|---|"]
    for name, args in {
        "batch size 1": (data, 1, True),
        "batch size 7": (data, 7, True),
        "batch size 1000": (data, 1000, True),
        "shuffled": (mixed, 128, True),
        "dropping off": (data, 128, False),
    }.items():
        other = standing(model, args[0], args[1], folder, effort, args[2])
        lines.append(f"| {name} | {len(base)} | {sum(base[i] != other[i] for i in base)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--effort", default="default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--invariance", action="store_true", help="also compare batch sizes, order and dropping (slow)")
    parser.add_argument("--train-only", action="store_true")
    arguments = parser.parse_args()
    models = {"mnist-standard": standard(), "mnist-robust": robust()}
    if arguments.train_only:
        return
    data = load_data(str(_mnist()), n=arguments.n, seed=arguments.seed)
    report = eb.audit(models, data, THREATS, effort=arguments.effort, seed=arguments.seed, out=CACHE / "run")
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}"
    text = [
        "# MNIST: a small CNN, normal and adversarial (PGD-7, Linf 0.3), audited",
        "",
        f"`python benchmarks/mnist.py --n {arguments.n} --effort {arguments.effort} --seed {arguments.seed}`; {machine}.",
        "Robust accuracy in percent with 95 % Clopper-Pearson intervals; an upper bound on the true one.",
        "",
        table(report),
    ]
    if arguments.invariance:
        text += ["", "Verdicts of the robust model (effort fast):", "", invariance(data, "fast")]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "mnist.md").write_text("\n".join(text) + "\n", encoding="utf8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
