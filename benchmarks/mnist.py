"""Trains a small CNN on MNIST, once normally and once adversarially, and audits both: python benchmarks/mnist.py

Needs EPSBALL_DATA (a folder with mnist/mnist.npz). Weights are kept in benchmarks/cache (not tracked); the tables go to
benchmarks/results/mnist.md. About 20 minutes on 2 cores, of which the adversarial training takes most.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
from torch import nn

import epsball as eb
from epsball.auditing.results import Report
from epsball.data import Dataset, load_data
from nets import CACHE, mnist_file, trained

RESULTS = Path(__file__).parent / "results"
THREATS = ("linf:0.1,0.2,0.3", "l2:2", "l1:10")


def standard() -> nn.Module:
    """The normally trained network (for `epsball audit benchmarks/mnist.py:standard`)."""
    return trained("mnist-standard")


def robust() -> nn.Module:
    """The network trained on PGD-7 within Linf 0.3."""
    return trained("mnist-robust")


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
    data = load_data(str(mnist_file()), n=arguments.n, seed=arguments.seed)
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
