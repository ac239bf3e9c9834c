"""Black-box attacks against the peers' at equal queries, on trained networks: python benchmarks/queries.py

Every model is asked through a ledger that counts the rows forward of each sample, the same way for every library, and remembers
each input that was legal, misclassified and nearer than those before, with the number of the query that asked about it. So
one run gives queries to the first success inside a radius, and the distance after any number of queries; what a library
returns was a query, too. A query beyond the budget does not count.

Attacks and budgets: query_contenders.py; libraries: query_peers.py; tables and curves: query_scores.py. Every run is kept in
benchmarks/cache/queries under a hash of its settings: `--models`, `--budgets`, `--only TEXT ...` run a part, `--again` runs it anew,
`--tables` runs nothing. Needs EPSBALL_DATA, the peers' environment (peers.md), and for official code EPSBALL_OFFICIAL.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import nets
import query_peers
import query_scores
from optimality import Case, Spent, Tracker, case, machine, pace
from peers import Counting
from query_contenders import RADII, Contender, contenders
from query_source import digest

HERE = Path(__file__).parent
CACHE = nets.CACHE / "queries"
BUDGETS = (100, 1000, 10000)


def size(norm: str, x: Tensor, x_adv: Tensor) -> Tensor:
    """(B,) in float64; `l0` counts pixels."""
    change = x_adv.double() - x.double()
    if norm == "l0":
        return (change.abs() > 1e-6).any(1).flatten(1).sum(1).double()  # ART scales to 255 and back
    return torch.linalg.vector_norm(change.flatten(1), {"linf": torch.inf, "l2": 2}[norm], dim=1)


class Ledger:
    """Queries of each sample, and every step nearer: sample, number of the query, distance.

    The rows of a call are matched to samples by `Tracker`, unless the attack has told whose they are. Time spent here is not
    the attack's (`seconds`).
    """

    def __init__(self, x: Tensor, y: Tensor, norm: str, budget: int) -> None:
        self.x, self.y, self.norm, self.budget = x, y, norm, budget
        self.tracker = Tracker(x, y, {"l0": "l0f"}.get(norm, norm), budget)
        self.spent = torch.zeros(len(x), dtype=torch.int64)
        self.best = torch.full((len(x),), torch.inf, dtype=torch.float64)
        self.steps: list[tuple[int, int, float]] = []
        self.seconds, self.hint = 0.0, torch.empty(0, dtype=torch.int64)

    def told(self, rows: Tensor) -> None:
        """The next call is about these samples."""
        self.hint = rows

    def asked(self, inputs: Tensor, output: Tensor) -> Tensor:
        """One query for each row."""
        started = time.process_time()
        if bool((self.spent >= self.budget).all()):
            raise Spent
        rows = self._whose(inputs)
        self.look(inputs, output, rows)
        self.seconds += time.process_time() - started
        return rows

    def pulled(self, rows: Tensor) -> None:
        """A black-box attack takes no gradients."""
        raise AssertionError("a gradient was taken")

    def look(self, inputs: Tensor, output: Tensor, rows: Tensor) -> None:
        """Counts the rows and keeps those that are legal (to 1e-6), wrong, nearer than before, and within the budget."""
        number = self.spent[rows] + _ranks(rows)
        self.spent.index_add_(0, rows, torch.ones_like(rows))
        inside = ((inputs >= -1e-6) & (inputs <= 1 + 1e-6)).flatten(1).all(1)
        wrong = (number <= self.budget) & inside & output.isfinite().all(1) & (output.argmax(1) != self.y[rows])
        places = wrong.nonzero().squeeze(1)
        if not len(places):
            return
        distance = size(self.norm, self.x[rows[places]], inputs[places])
        for place, far in zip(places.tolist(), distance.tolist(), strict=True):
            sample = int(rows[place])
            if far < self.best[sample]:
                self.best[sample] = far
                self.steps.append((sample, int(number[place]), far))

    def _whose(self, inputs: Tensor) -> Tensor:
        told, self.hint = self.hint, torch.empty(0, dtype=torch.int64)
        if len(told) == len(inputs):
            return told
        return torch.arange(len(inputs)) if len(inputs) == len(self.x) else self.tracker._whose(inputs)


def _ranks(rows: Tensor) -> Tensor:
    """1 for the first row of a sample in a call, 2 for its second, and so on."""
    order = rows.argsort(stable=True)
    ordered = rows[order]
    place = torch.arange(len(rows))
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    ranks = torch.empty_like(rows)
    ranks[order] = place - torch.where(first, place, 0).cummax(0).values + 1
    return ranks


def place(model: str, contender: Contender, version: str, seed: int) -> Path:
    """Where a run is kept: the name says what, the hash holds every setting."""
    c = contender
    settings = [model, c.library, version, c.attack, c.norm, dict(c.options), c.n, seed, c.budget, c.alone]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    name = "".join(letter if letter.isalnum() else "-" for letter in f"{model} {c.budget} {c.norm} {c.name}".lower())
    return CACHE / f"{name}-{digest}.npz"


def groups(contender: Contender, at: Case) -> Iterator[Tensor]:
    """Which samples go into one call."""
    rows = torch.arange(contender.n)
    yield from rows.split(1) if contender.alone else [rows]


def attacked(contender: Contender, at: Case) -> query_scores.Record:
    """One run. What a library had asked before it raised is kept, with the error."""
    steps, spent, seconds, trouble = [], [], 0.0, ""
    source = digest(contender.attack) if contender.library == "epsball" else ""
    before = pace(at)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = contender.run()
        ask(contender, run, at, torch.arange(2 - contender.alone), 20)  # imports, compilers and caches first
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002  (ART and foolbox draw from the global generators)
        torch.manual_seed(0)
        for rows in groups(contender, at):
            ledger, used, raised = ask(contender, run, at, rows, contender.budget)
            steps += [(int(rows[sample]), number, far) for sample, number, far in ledger.steps]
            spent.append(ledger.spent)
            seconds, trouble = seconds + used, trouble or raised
        timed = torch.cat(spent)
        if contender.together:
            ledger, seconds, _ = ask(contender, run, at, torch.arange(contender.n), contender.budget)
            timed = ledger.spent
    table = np.array(steps, dtype=np.float64).reshape(-1, 3)
    return query_scores.Record(table, torch.cat(spent).numpy(), int(timed.sum()), seconds, (before + pace(at)) / 2, trouble, source)


def ask(contender: Contender, run: query_peers.Run, at: Case, rows: Tensor, budget: int) -> tuple[Ledger, float, str]:
    """One call of the attack on some samples: the ledger, the attack's CPU seconds, and what went wrong."""
    x, y, raised = at.x[rows], at.y[rows], ""
    ledger = Ledger(x, y, contender.norm, budget)
    model: nn.Module = Counting(at.net, ledger).eval()
    started = time.process_time()
    try:
        x_adv = run(model, x.clone(), y.clone()).detach().float()
    except Spent:
        x_adv = x
    except Exception as error:
        x_adv, raised = x, f"{type(error).__name__}: {error}".split("\n")[0][:120]
    used = time.process_time() - started - ledger.seconds
    with torch.no_grad():
        ledger.look(x_adv.clamp(0, 1), at.net(x_adv.clamp(0, 1)), torch.arange(len(x)))
    return ledger, used, raised


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=50, help="most samples a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", nargs="+", default=list(RADII), choices=list(RADII))
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS), choices=BUDGETS)
    parser.add_argument("--only", nargs="+", default=[""], help="only attacks whose library and label contain one of these")
    parser.add_argument("--again", action="store_true", help="run even what is kept")
    parser.add_argument("--tables", action="store_true", help="run nothing, write the tables")
    return parser.parse_args()


def run_all(arguments: argparse.Namespace, found: dict[str, str]) -> None:
    """Runs what is asked for and not kept yet, cheap budgets first."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for budget in arguments.budgets:
        for name in arguments.models:
            wanted = [c for c in contenders(name, budget, arguments.n) if any(text.lower() in c.name.lower() for text in arguments.only)]
            todo = [c for c in wanted if c.library in found]
            paths = {c: place(name, c, found[c.library], arguments.seed) for c in todo}
            todo = [c for c in todo if arguments.again or not paths[c].exists()]
            at = case(name, arguments.n, arguments.seed) if todo else None
            for c in todo:
                assert at is not None
                record = attacked(c, at)
                record.save(paths[c])
                words = f"{record.summary(c)} {record.seconds:7.2f} s {record.trouble}"
                print(f"{name:15} {budget:6} {c.norm:4} {c.name:45} {words}", flush=True)


def not_run(missing: list[tuple[str, Contender]]) -> list[str]:
    """Which rows the tables lack, by network and budget."""
    places = dict.fromkeys((name, c.budget) for name, c in missing)
    rows = {at: [f"{c.name} ({c.norm})" for name, c in missing if (name, c.budget) == at] for at in places}
    return [f"- {name} at {budget:,} queries: {'; '.join(rows[name, budget])}." for name, budget in places]


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(1)
    found, missing = query_peers.available()
    if not arguments.tables:
        run_all(arguments, found)
    wanted = [(name, c) for budget in BUDGETS for name in RADII for c in contenders(name, budget, arguments.n) if c.library in found]
    paths = {(name, c): place(name, c, found[c.library], arguments.seed) for name, c in wanted}
    records = {key: query_scores.Record.load(path) for key, path in paths.items() if path.exists()}
    if not records:
        raise SystemExit("nothing has been run with these settings")
    stale = sorted({f"{c.label} ({name}, {c.budget})" for (name, c), r in records.items() if r.source and r.source != digest(c.attack)})
    head = [
        "# Black-box attacks against the peers at equal queries",
        "",
        f"`OMP_NUM_THREADS=1 PYTHONPATH=src:../peers/auto-attack python benchmarks/queries.py --n {arguments.n} --seed {arguments.seed}`, "
        "in the peers' environment (benchmarks/peers.md).",
        f"Correctly classified test images, stratified, seed {arguments.seed}; {torch.get_num_threads()} thread, "
        f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}, {machine()}.",
        "Libraries: " + ", ".join(f"{library} {version}" for library, version in found.items()) + ".",
        *missing,
        *([f"Recorded with an earlier state of the package's source: {', '.join(stale)}."] if stale else []),
    ]
    query_scores.write(HERE / "results", head, records, not_run([key for key in wanted if key not in records]))


if __name__ == "__main__":
    main()
