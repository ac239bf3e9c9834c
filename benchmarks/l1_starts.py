"""Which searches under L1 the rows are best spent on: success per run, on samples that short ones leave. Writes results/l1_starts.md.

`OMP_NUM_THREADS=1 python benchmarks/l1_starts.py`, with EPSBALL_DATA; one to three minutes per network. Networks, images and radii are
those of auto_attack.py. From the share p of runs that break a sample and the
rows c of a run, (1 - p) ** (rows / c) is the chance that it still stands after so many rows of independent runs: the table sums that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from auto_attack import RADII, Case, cases
from epsball.attacks import from_larger, outside_in, pgd, vertices
from epsball.attacks.combine import EveryTarget
from epsball.attacks.targets import malt
from epsball.attacks.vertices import Vertices
from epsball.core import AttackLike, Objective, Victim
from epsball.objectives import cross_entropy, margin
from epsball.threats import L1, parse_threat

PAGE = Path(__file__).parent / "results" / "l1_starts.md"
RUNS, ROWS = 20, (60, 180)
SHORT = (6.0, 2.0, 1.3, 1.0)


def tours(steps: int, least: float, most: float, share: tuple[float, float] = (0.5, 0.8)) -> Callable[[L1], AttackLike]:
    """`vertices` with other first balls or steps."""
    return lambda threat: replace(vertices(steps, threat), strategy=Vertices((least, most), share))


def balls(steps: int, loss: Objective = margin) -> Callable[[L1], AttackLike]:
    """`from_larger` with the plan's balls."""
    return lambda threat: from_larger(steps, threat=threat, objective=loss, scales=SHORT)


def aimed(search: Callable[[L1], AttackLike], count: int) -> Callable[[L1], AttackLike]:
    """At the nearest classes in MALT order, side by side."""
    return lambda threat: EveryTarget(search(threat), count, malt, abreast=True)


SEARCHES: dict[str, Callable[[L1], AttackLike]] = {
    "vertices, 20 looks (the plan's)": tours(20, 3, 30),
    "vertices, 20 looks, always from 3 budgets": tours(20, 3, 3),
    "vertices, 20 looks, always from 30 budgets": tours(20, 30, 30),
    "vertices, 20 looks, steps of 0.8 from all balls": tours(20, 3, 30, (0.8, 0.8)),
    "vertices, 30 looks": tours(30, 3, 30),
    "vertices, 60 looks": tours(60, 3, 30),
    "vertices, 20 looks, at each of 3 classes": aimed(tours(20, 3, 30), 3),
    "from_larger, 20 looks (the plan's)": balls(20),
    "from_larger, 20 looks, cross-entropy": balls(20, cross_entropy),
    "from_larger, 40 looks": balls(40),
    "from_larger, 20 looks, at each of 3 classes": aimed(balls(20), 3),
    "outside_in, 30 looks": lambda threat: outside_in(30, threat, 3, 1),
}


def left(at: Case, victim: Victim, threat: L1) -> tuple[Tensor, Tensor]:
    """Samples that ten steps of PGD and one run of `vertices` leave."""
    first = (pgd(10, threat=threat, objective=margin), vertices(20, threat))
    broken = torch.stack([search(victim, at.x, at.y, at.radius, 1).reached for search in first]).any(0)
    return at.x[~broken], at.y[~broken]


def runs(at: Case) -> tuple[int, int, dict[str, tuple[Tensor, float]]]:
    """(samples left, how many of them some run broke, per search: share of runs that broke each of these (H,), rows of a run)."""
    threat = parse_threat(f"{at.norm}:{at.text}").threat
    assert isinstance(threat, L1)
    with Victim.of(at.net.eval()) as victim:
        x, y = left(at, victim, threat)
        shares, costs = {}, {}
        for name, make in SEARCHES.items():
            found = [make(threat)(victim, x, y, at.radius, 100 + seed) for seed in range(RUNS)]
            shares[name] = torch.stack([outcome.reached for outcome in found]).double().mean(0)
            costs[name] = torch.stack([outcome.backwards for outcome in found]).double().mean().item()
    hard = torch.stack(list(shares.values())).sum(0) > 0
    return len(x), int(hard.sum()), {name: (shares[name][hard], costs[name]) for name in SEARCHES}


def standing(share: Tensor, cost: float, rows: int) -> float:
    """Of the samples that can be broken, how many stand after so many rows each."""
    return float((1 - share).pow(rows / cost).sum())


def page(n: int, only: list[str], found: dict[str, tuple[int, int, dict[str, tuple[Tensor, float]]]]) -> str:
    """What was found, per network."""
    lines = [
        "# What a row is worth under L1",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/l1_starts.py --n {n} --only {' '.join(only)}`; one thread, {RUNS} seeds a search.",
        "Of n right test images those that 10 steps of PGD and one run of `vertices` leave; in the head of a column, how many of them any",
        "run of any search here broke. In the cells: rows with a gradient that a run takes per sample, then how many of those samples",
        f"would still stand after {ROWS[0]} and after {ROWS[1]} rows each, spent on independent runs of that search alone. The plan was",
        "chosen on these networks: that a search is best elsewhere is not known.",
        "",
        "| search | " + " | ".join(f"{name}: {hard} of {count}" for name, (count, hard, _) in found.items()) + " |",
        "|---" * (len(found) + 1) + "|",
    ]
    for name in SEARCHES:
        cells = []
        for _, _, table in found.values():
            share, cost = table[name]
            cells.append(f"{cost:.1f}: " + ", ".join(f"{standing(share, cost, rows):.1f}" for rows in ROWS))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=["digits", "mnist"], help="networks whose name holds one of these")
    parser.add_argument("--n", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = [f"{name} l1" for name in RADII if any(word in name for word in arguments.only)]
    found = {}
    for at in cases(arguments.n, 0, names):
        found[at.name] = runs(at)
        print(f"{at.name}: {found[at.name][1]} of {found[at.name][0]}", flush=True)
    PAGE.write_text(page(arguments.n, arguments.only, found), encoding="utf8")


if __name__ == "__main__":
    main()
