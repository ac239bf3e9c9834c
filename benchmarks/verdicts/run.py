"""Broken defenses and honest controls on MNIST, each a bare module, each audited without a word: does the audit find out?

`python benchmarks/verdicts --n 100 --seed 0` needs EPSBALL_DATA; AutoAttack runs where `autoattack` can be imported (peers.md), audits
where epsball's own dependencies are, so that two environments may fill one table in turn. Every number is kept in
benchmarks/cache/verdicts under a hash of what it depends on. The tables go to benchmarks/results/verdicts.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import nn

from verdicts import (
    bases,
    color,
    controls,
    detect,
    held_out,
    quantize,
    randomized,
    stages,
    table,
    train,
    unseen,
    unseen_again,
    unseen_inputs,
    unseen_scores,
)
from verdicts.case import Case

RESULTS = Path(__file__).resolve().parents[1] / "results" / "verdicts.md"
CASES = (
    *quantize.CASES,
    *randomized.CASES,
    *train.CASES,
    *detect.CASES,
    *controls.CASES,
    *color.CASES,
    *held_out.CASES,
    *unseen.CASES,
    *unseen_again.CASES,
    *unseen_inputs.CASES,
    *unseen_scores.CASES,
)


def chosen(names: list[str]) -> list[Case]:
    """All, or those of these names."""
    known = {case.name: case for case in CASES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"no case '{unknown[0]}': use some of {', '.join(known)}")
    return [known[name] for name in names] or list(CASES)


def rows(cases: list[Case], n: int, seed: int, wanted: list[str]) -> list[tuple[Case, table.Row]]:
    """Every stage of every case: computed if wanted, else from the cache."""
    found = []
    for case in cases:
        row: table.Row = {}
        model: Callable[[], nn.Module] = cache(case.model)
        data = case.samples(n, seed)
        for stage in stages.STAGES:
            if not stages.wanted(case, stage):
                continue
            started = time.process_time()
            row[stage] = one = stages.result(case, stage, data, seed, model, stage in wanted)
            spent = time.process_time() - started
            if one is not None and stage in wanted and spent > 1:
                print(f"{case.name}, {stage}: {table.percent(one)} in {spent:.0f} CPU s", flush=True)
        found.append((case, row))
    return found


def text(found: list[tuple[Case, table.Row]], n: int, seed: int) -> str:
    """The whole page."""
    trained = bases.training_seconds()
    return "\n".join(
        [
            "# Verdicts: broken defenses and honest controls on MNIST and CIFAR-10, audited without a word",
            "",
            f"`python benchmarks/verdicts --n {n} --seed {seed}`; torch {torch.__version__.split('+')[0]}, "
            f"{torch.get_num_threads()} threads.",
            f"**{table.summary(found)}.** Robust accuracy in percent of {n} test images (CIFAR-10: 30), with 95 %",
            "Clopper-Pearson intervals.",
            "",
            "- naive: what the evaluation of those who proposed the defense gives: FGSM or PGD-20 on cross-entropy through the model as it",
            "  is, one draw of a random one.",
            "- true: what stands under attacks made by hand by one who knows the defense (BPDA, EOT of 20 draws, scores before saturation,",
            "  the undefended copy, restarts, every target, Square of 5,000 queries), all together; a random model is broken where",
            "  more than half of 20 draws are wrong, then of 100 fresh ones, then of 1,000. An upper bound, too.",
            "- audited: `epsball.audit(model, data, 'linf:R')` at its default effort, told nothing.",
            "- AutoAttack: the official standard version, and its `rand` for random models, on the first `n of AA` samples, by its own",
            "  book: one wrong draw breaks a random model.",
            "- A verdict is right where the audited number is at most 2 points above the true one, and a masked defense has a flag or a",
            "  finding that names the cause (CAUSES in case.py), or a control has no flag `warn` or `block` and stands for at most one",
            "  sample more than under AutoAttack. First sight: the first verdict on a case that was held out, made up when the others were",
            "  right; `-`: the audit was tuned with this case in sight. `(old)`: measured before the code last changed.",
            "",
            *table.numbers(found),
            "",
            "Costs: rows of the bare module, forward and backward, counted by the same hooks on both sides; CPU seconds of the process.",
            "Backwards that an audit takes through a twin of a model whose own output has no gradient are not seen by the hooks.",
            "",
            *table.costs(found),
            "",
            f"Training: {len(trained)} networks, {sum(trained.values()):.0f} CPU s together, "
            f"{max(trained.values(), default=0):.0f} s at most.",
            "",
            *table.notes(found),
            "",
        ]
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python benchmarks/verdicts", description=__doc__)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these cases; the table is printed, not written")
    parser.add_argument("--stages", nargs="+", default=list(stages.STAGES), choices=list(stages.STAGES), help="the others: from the cache")
    parser.add_argument("--train", action="store_true", help="train what is missing, and stop")
    parser.add_argument("--tables", action="store_true", help="only make the tables of what is in the cache")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = chosen(arguments.only)
    if arguments.train:
        for case in cases:
            case.model()
        return
    wanted = [] if arguments.tables else [stage for stage in arguments.stages if stages.able(stage)]
    missing = [stage for stage in arguments.stages if not stages.able(stage)]
    print(f"cannot run here: {', '.join(missing)}" if missing else "", file=sys.stderr)
    try:
        found = rows(cases, arguments.n, arguments.seed, wanted)
    except KeyboardInterrupt:
        found = rows(cases, arguments.n, arguments.seed, [])
    page = text(found, arguments.n, arguments.seed)
    print(page)
    if not arguments.only:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(page, encoding="utf8")
