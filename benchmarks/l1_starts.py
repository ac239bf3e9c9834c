"""Which searches under L1 the rows are best spent on: success per run, on samples that a first one leaves. Writes results/l1_starts.md.

`OMP_NUM_THREADS=1 python benchmarks/l1_starts.py`, with EPSBALL_DATA; half a minute to two minutes per network. Networks, images and
radii are those of auto_attack.py and other_networks.py. From the share p of runs that break a sample and the rows c of a run,
(1 - p) ** (rows / c) is the chance that it still stands after so many rows of independent runs: the table sums that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import other_networks
from auto_attack import RADII, Case, cases
from epsball.attacks import EveryTarget, by_logit, from_larger, outside_in, swaps, vertices
from epsball.core import AttackLike, Objective, Outcome, Victim
from epsball.objectives import cross_entropy, dlr, margin
from epsball.threats import L1, parse_threat

PAGE = Path(__file__).parent / "results" / "l1_starts.md"
RUNS, ROWS = 12, (60, 165)
SHORT = (6.0, 2.0, 1.3, 1.0)
"""Balls of `from_larger`, in budgets: who finds nothing in that of 1.3 is given up before the last."""


Search = Callable[[Victim, Tensor, Tensor, float, int], Outcome]


def tours(steps: int, least: float, most: float, loss: Objective = margin) -> Callable[[L1], AttackLike]:
    """`vertices` with other first balls or another loss."""
    return lambda threat: vertices(steps, threat, loss, (least, most))


def balls(steps: int, loss: Objective = margin) -> Callable[[L1], AttackLike]:
    """`from_larger` that ends early."""
    return lambda threat: from_larger(steps, threat=threat, objective=loss, scales=SHORT)


def aimed(search: Callable[[L1], AttackLike], classes: int) -> Callable[[L1], AttackLike]:
    """At the classes of highest score, side by side."""
    return lambda threat: EveryTarget(search(threat), classes, by_logit, abreast=True)


@dataclass(frozen=True)
class ThenSwaps:
    """A search, and `swaps` from where it ended."""

    search: AttackLike
    swaps: Callable[[Tensor], AttackLike]

    def __call__(self, victim: Victim, x: Tensor, y: Tensor, radius: float, seed: int) -> Outcome:
        """With the rows of both."""
        found = self.search(victim, x, y, radius, seed)
        rows = (~found.reached).nonzero().squeeze(1)
        if not len(rows):
            return found
        more = self.swaps(found.x_adv[rows])(victim, x[rows], y[rows], radius, seed)
        reached, backwards = found.reached.clone(), found.backwards.clone()
        reached[rows], backwards[rows] = more.reached, backwards[rows] + more.backwards
        return replace(found, reached=reached, backwards=backwards)


def then_swaps(search: Callable[[L1], AttackLike]) -> Callable[[L1], Search]:
    """As the plan goes on from where searches came closest, here from every end."""
    return lambda threat: ThenSwaps(search(threat), lambda start: swaps(8, threat, tries=6, shares=(0.1, 0.3), start=start))


SEARCHES: dict[str, Callable[[L1], Search]] = {
    "`swaps` from the clean input, 6 looks *": lambda threat: swaps(6, threat, tries=2),
    "from 3 to 30 budgets, drawn": tours(20, 3, 30),
    "from 3": tours(20, 3, 3),
    "from 3, cross-entropy *": tours(20, 3, 3, cross_entropy),
    "from 3, DLR *": tours(20, 3, 3, dlr),
    "from 30": tours(20, 30, 30),
    "from 30, cross-entropy *": tours(20, 30, 30, cross_entropy),
    "from 60 *": tours(20, 60, 60),
    "30 looks, from 3 to 30 *": tours(30, 3, 30),
    "at each of 3 classes, from 3": aimed(tours(20, 3, 3), 3),
    "at each of 9 classes, from 3 *": aimed(tours(20, 3, 3), 9),
    "from 3, DLR, then `swaps` *": then_swaps(tours(20, 3, 3, dlr)),
    "from 60, then `swaps` *": then_swaps(tours(20, 60, 60)),
    "`from_larger`": balls(20),
    "`from_larger`, cross-entropy": balls(20, cross_entropy),
    "`outside_in`, 30 looks *": lambda threat: outside_in(30, threat, 3, 2),
}
"""Of `vertices` with 20 looks on the margin, where nothing else is said; those with a star are the plan's."""


def left(at: Case, victim: Victim, threat: L1) -> tuple[Tensor, Tensor]:
    """Samples that one run of `vertices` leaves."""
    broken = vertices(20, threat)(victim, at.x, at.y, at.radius, 1).reached
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
    """What was found: a line for each network, a column for each search."""
    lines = [
        "# What a row is worth under L1",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/l1_starts.py --n {n}{' --only ' if only else ''}{' '.join(only)}`; one thread,",
        f"{RUNS} seeds. Of n right test images those that one run of `vertices` leaves; the second column says how many of them any run of",
        "any search here broke. In the cells: rows with a gradient that a run takes per sample, then how many of those samples would still",
        f"stand after {ROWS[0]} and after {ROWS[1]} rows each, spent on independent runs of that search alone: of `vertices` with 20 looks",
        "on the margin, where nothing else is said. A star: of today's plan, which was chosen with these networks in view: that a search",
        "is best elsewhere is not known.",
        "",
        "| network | breakable | " + " | ".join(SEARCHES) + " |",
        "|---" * (len(SEARCHES) + 2) + "|",
    ]
    for name, (count, hard, shares) in found.items():
        cells = []
        for search in SEARCHES:
            share, cost = shares[search]
            cells.append(f"{cost:.0f}: " + ", ".join(f"{standing(share, cost, rows):.1f}" for rows in ROWS))
        lines.append(f"| {name} | {hard} of {count} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="networks whose name holds one of these")
    parser.add_argument("--n", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = [f"{name} l1" for name in (*RADII, *other_networks.EARLY) if not arguments.only or any(word in name for word in arguments.only)]
    found = {}
    for at in (*cases(arguments.n, 0, names), *other_networks.cases(arguments.n, names)):
        name = f"{at.name}:{at.text}"
        found[name] = runs(at)
        print(f"{name}: {found[name][1]} of {found[name][0]}", flush=True)
    PAGE.write_text(page(arguments.n, arguments.only, found), encoding="utf8")


if __name__ == "__main__":
    main()
