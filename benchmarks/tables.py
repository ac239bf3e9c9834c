"""Trees on tables, attacked by scores alone: with a sweep of every feature and without. Writes results/tables.md.

`OMP_NUM_THREADS=1 python benchmarks/tables.py --seed 0` in epsball's environment. Scikit-learn's forests and boosted trees on its own
tables, features scaled to 0..1; of N rows that the models did not see those count that are right. `blackbox` is the recipe for such
inputs; `before` the searches that it has for others, with the same queries.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from torch import Tensor

import epsball as eb
from epsball.attacks.blackbox import searches
from epsball.attacks.combine import Cascade
from epsball.auditing.statistics import clopper_pearson
from epsball.core import Access
from epsball.threats import named

PAGE = Path(__file__).parent / "results" / "tables.md"
N = 60
TABLES = {"cancer": datasets.load_breast_cancer, "wine": datasets.load_wine, "digits": datasets.load_digits}
BALLS = (("linf", 0.05), ("l2", 0.2), ("l1", 0.4))
BUDGETS = (300, 2000)


def models(seed: int) -> Iterator[tuple[str, Any]]:
    """Names and untrained models."""
    yield "forest", RandomForestClassifier(30, random_state=seed)
    yield "boosted", HistGradientBoostingClassifier(max_iter=30, random_state=seed)


def table(name: str, seed: int) -> tuple[np.ndarray, np.ndarray, Tensor, Tensor]:
    """Rows and labels to learn from, and others."""
    bunch = TABLES[name]()
    low, high = bunch.data.min(0), bunch.data.max(0)
    x = (bunch.data - low) / np.maximum(high - low, 1e-9)
    order = np.random.default_rng(seed).permutation(len(x))
    known, held = order[: -min(N, len(x) // 3)], order[-min(N, len(x) // 3) :]
    return x[known], bunch.target[known], torch.from_numpy(x[held]).float(), torch.from_numpy(bunch.target[held]).long()


def row(name: str, victim: Any, x: Tensor, y: Tensor, norm: str, radius: float, queries: int, seed: int) -> str:
    """One line of the table: standing of n with 95 % intervals in percent, and the queries of the mean sample."""
    threat, image = named(norm), torch.zeros(1, 1, 28, 28)
    before = Cascade(tuple(share.attack for share in searches(threat, Access.SCORES, queries - 1, image)), "before")
    cells = []
    for attack in (before, eb.blackbox(queries, threat=threat)):
        outcome = attack(victim, x, y, radius, seed)
        stands = int((victim.model(outcome.x_adv).argmax(1) == y).sum())
        low, high = clopper_pearson(stands, len(x))
        cells.append(f"{stands} of {len(x)} [{100 * low:.0f}, {100 * high:.0f}]; {float(outcome.queries.double().mean()):.0f}")
    return f"| {name} | {norm}:{radius:g} | {queries} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    torch.set_num_threads(1)
    lines = [
        "# Trees on tables",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/tables.py --seed {seed}`; scikit-learn's forest of 30 trees and 30 rounds of boosting, on",
        "its tables, features from 0 to 1. Standing of held-out rows that the model has right, by a fresh answer, with 95 %",
        "Clopper-Pearson intervals in percent; queries of the mean sample. Before: what images of",
        "as many features get, mostly Square, under L1 Sparse-RS.",
        "",
        "| table, model | ball | queries | before | blackbox |",
        "|---|---|---|---|---|",
    ]
    for name in TABLES:
        known, labels, x, y = table(name, seed)
        for kind, model in models(seed):
            victim = eb.wrap(model.fit(known, labels), box=(0, 1))
            right = victim.model(x).argmax(1) == y
            for norm, radius in BALLS:
                for queries in BUDGETS:
                    lines.append(row(f"{name}, {kind}", victim, x[right], y[right], norm, radius, queries, seed))
                    print(lines[-1], flush=True)
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
