"""The audit against AutoAttack on networks that are not in auto_attack.py. Writes results/other_networks.md.

`OMP_NUM_THREADS=1 PYTHONPATH=../peers/auto-attack python benchmarks/other_networks.py`, as auto_attack.py, whose sides and images these
are. Small networks of other shapes, activations and trainings (nets.py); the plan was mended with them in view, those of `EARLY` first.
The radius is that at which 20 steps of PGD on cross-entropy leave 60 % standing, in two digits. Every run is
kept as there. `--only WORD ...` takes the cases whose name holds a word and writes nothing. `--turns SEED ...` keeps nothing: AutoAttack
with the first of its seeds, then the search with each of these, one after the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

import nets
from auto_attack import OFFICIAL, Case, Run, below, in_turn, kept, official, place, sample, searched, source
from epsball.attacks import pgd
from epsball.core import Victim
from epsball.threats import named

PAGE = Path(__file__).parent / "results" / "other_networks.md"
EARLY = (
    *("digits-mlp", "digits-residual", "digits-gelu-l2", "digits-attention-linf", "mnist-pooled", "mnist-mlp-linf", "mnist-pooled-l2"),
    *("digits-tanh-linf", "digits-wide-linf", "digits-gelu-l1", "mnist-average"),
)
NAMES = (*EARLY, "digits-residual-l2", "digits-attention", "mnist-average-l1")
LEFT = 0.6


def radius(net: nn.Module, x: Tensor, y: Tensor, norm: str) -> str:
    """Where PGD leaves `LEFT`, by bisection of the logarithm."""
    attack, victim = pgd(20, threat=named(norm)), Victim(net)
    low, high = 1e-3, 1e2
    while high / low > 1.005:
        middle = (low * high) ** 0.5
        stands = 1 - attack(victim, x, y, middle, 0).reached.double().mean().item()
        low, high = (middle, high) if stands > LEFT else (low, middle)
    return f"{high:.2g}"


def cases(n: int, words: list[str]) -> Iterator[Case]:
    """As `auto_attack.cases`."""
    for name in NAMES:
        wanted = [norm for norm in OFFICIAL if not words or any(word in f"{name} {norm}" for word in words)]
        if not wanted:
            continue
        net = nets.trained(name).requires_grad_(False)
        x, y = sample(name, net, n, 0)
        for norm in wanted:
            yield Case(name, net, x, y, norm, radius(net, x, y, norm))


def ran(case: Case, rivals: list[int], seeds: list[int]) -> tuple[list[Run], list[Run]]:
    """AutoAttack's runs and the audit's searches, one a seed."""
    now = source()
    theirs = [kept(place(case, "autoattack", seed), lambda _: False, partial(official, case, seed)) for seed in rivals]
    mine = [kept(place(case, "default", seed), lambda old: old.source != now, partial(searched, case, seed, "default")) for seed in seeds]
    return [run for run in theirs if run is not None], [run for run in mine if run is not None]


def row(case: Case, theirs: list[Run], mine: list[Run]) -> str:
    """One line of the table."""
    cells = [f"{case.name} {case.norm}:{case.text}", str(len(case.x))]
    for side in (theirs, mine):
        counts = [run.robust for run in side]
        cells += [" ".join(map(str, counts)), f"{mean(counts):.1f}"]
    for part in ("backwards", "forwards", "seconds"):
        ours, rival = (mean(getattr(run, part) for run in side) for side in (mine, theirs))
        cells.append(f"{100 * ours / rival:.1f} %")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--rivals", nargs="+", type=int, default=[0, 1], help="AutoAttack's seeds")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="the audit's seeds")
    parser.add_argument("--only", nargs="+", default=[], help="only cases whose name holds one of these")
    parser.add_argument("--turns", nargs="+", type=int, metavar="SEED", help="both sides in turn, the search with these seeds; prints only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.turns:
        in_turn(cases(arguments.n, arguments.only), arguments.rivals[0], arguments.turns, passes=1)
        return
    lines = [
        "# The audit against AutoAttack on other networks",
        "",
        f"`OMP_NUM_THREADS=1 PYTHONPATH=../peers/auto-attack python benchmarks/other_networks.py --n {arguments.n} "
        f"--rivals {' '.join(map(str, arguments.rivals))} --seeds {' '.join(map(str, arguments.seeds))}`;",
        f"one thread, torch {torch.__version__.split('+')[0]}. As autoattack.md; the radius is that at which 20 steps of PGD on",
        "cross-entropy leave 60 % standing. Standing of n right test images, seed by seed and in the mean; the share of AutoAttack's",
        "gradient rows, forward rows and CPU seconds that the audit's default search takes, in the mean (measured at different times,",
        "beside other work). The plan was mended with these networks in view: none is held out.",
        "",
        "| case | n | AutoAttack | mean | audit | mean | gradient rows | forward rows | CPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases(arguments.n, arguments.only):
        lines.append(row(case, *ran(case, arguments.rivals, arguments.seeds)))
        print(lines[-1], flush=True)
    if not arguments.only:
        PAGE.write_text("\n".join(lines) + "\n" + below(PAGE), encoding="utf8")


if __name__ == "__main__":
    main()
