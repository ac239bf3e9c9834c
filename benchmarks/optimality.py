"""How close each attack comes to the best known smallest change, at equal budgets: python benchmarks/optimality.py

After AttackBench (Cinà et al. 2024, arXiv 2404.19460). Four networks (nets.py), 100 correctly classified test images of each, four
norms, the attacks of contenders.py. A query is a row forward or a row backward; an attack has 400 a sample. What counts is the
smallest change among all inputs that the attack asked about within its budget and that the model got wrong (`Tracker`), so that no
library is punished for what it returns; the returned answer is judged too and shown beside it. Scores and tables: scores.py.

Every run is kept in benchmarks/cache/optimality under a hash of its settings, and the tables are made from there: `--only TEXT`,
`--models`, `--norms` run a part, `--again` runs it anew, `--tables` runs nothing; `--long` runs a few attacks with more queries.
Needs EPSBALL_DATA and the peers' environment (peers.md); a library that is not there is left out and named.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import platform
import random
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import epsball as eb
import nets
import scores
from contenders import LONG, Contender, contenders, long_contenders
from epsball.attacks import entries
from peers import Counting, P, available, distances, reached

HERE = Path(__file__).parent
PACKAGE = Path(eb.__file__).parent
CACHE = nets.CACHE / "optimality"
MODELS = ("mnist-standard", "mnist-robust", "cifar-standard", "cifar-robust")
BUDGET, SHORT = 400, "smallest 190"


class Spent(Exception):
    """Every sample has had twice its budget: whatever comes now is not counted, so the run is cut."""


class Tracker:
    """A ledger of queries per sample, and the smallest change that was found within the budget.

    The rows of a call as long as the batch belong to its samples in order. Rows of shorter or longer calls (libraries that
    drop, repeat or split samples) go to the nearest original: in L2 where that is certain (nearer than half the way to the
    next original), else in the norm of the attack. A wrong match can only lose credit: the distance is measured to the
    sample that the row was given to, with that sample's label. Time spent here is not the attack's (`seconds`).
    """

    def __init__(self, x: Tensor, y: Tensor, norm: str, budget: int) -> None:
        self.x, self.y, self.norm, self.budget = x, y, norm, budget
        self.flat = x.flatten(1)
        self.half = torch.cdist(self.flat, self.flat).fill_diagonal_(torch.inf).amin(1) / 2
        self.spent = torch.zeros(len(x), dtype=torch.int64)
        self.best = torch.full((len(x),), torch.inf, dtype=torch.float64)
        self.seconds = 0.0

    def asked(self, inputs: Tensor, output: Tensor) -> Tensor:
        """One forward for each row; remembers what the model got wrong inside the box and the budget."""
        started = time.process_time()
        if bool((self.spent > 2 * self.budget).all()):
            raise Spent
        rows = torch.arange(len(inputs)) if len(inputs) == len(self.x) else self._whose(inputs)
        self.look(inputs, output, rows, self.spent[rows] < self.budget)
        self._count(rows)
        self.seconds += time.process_time() - started
        return rows

    def pulled(self, rows: Tensor) -> None:
        """One backward for each row."""
        self._count(rows)

    def look(self, inputs: Tensor, output: Tensor, rows: Tensor, counts: Tensor) -> None:
        """Keeps the distance of rows that `counts` and that the model got wrong, finite and inside the box (to 1e-6)."""
        inside = ((inputs >= -1e-6) & (inputs <= 1 + 1e-6)).flatten(1).all(1)
        wrong = counts & inside & output.isfinite().all(1) & (output.argmax(1) != self.y[rows])
        if bool(wrong.any()):
            size = distances(self.norm, self.x[rows[wrong]], inputs[wrong])
            self.best.scatter_reduce_(0, rows[wrong], size, "amin")

    def _count(self, rows: Tensor) -> None:
        self.spent.index_add_(0, rows, torch.ones_like(rows))

    def _whose(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        near = torch.cdist(flat, self.flat).min(1)
        rows, unsure = near.indices, ~(near.values < self.half[near.indices])
        if bool(unsure.any()):
            rows[unsure] = torch.cdist(flat[unsure], self.flat, p=P[self.norm]).argmin(1)
        return rows


@dataclass(frozen=True)
class Case:
    """One network and the samples that it is attacked on."""

    model: str
    net: nn.Module
    x: Tensor
    y: Tensor


def case(name: str, n: int, seed: int) -> Case:
    """n correctly classified test images, as many of each class as can be, drawn by the seed."""
    net = nets.trained(name).requires_grad_(False)
    source = nets.mnist_file() if name.startswith("mnist") else nets.root() / "cifar10_jpeg"
    data = eb.load_data(str(source), split="test")
    with torch.no_grad():
        right = torch.cat([net(x).argmax(1) for x in data.x.split(500)]) == data.y
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(data.y)))
    order = order[right[order]]
    rank = torch.zeros(len(order), dtype=torch.int64)  # of an image among those of its class
    for label in data.y.unique():
        of_class = data.y[order] == label
        rank[of_class] = torch.arange(int(of_class.sum()))
    chosen = order[rank.argsort(stable=True)][:n]
    return Case(name, net, data.x[chosen], data.y[chosen])


@functools.cache
def source_digest(attack: str) -> str:
    """Changes with every change of the code that an attack of ours can reach: its own file, all that it imports, core and threats."""
    recipe = eb.smallest if attack == "smallest" else entries()[attack].recipe
    found, todo = set[Path](), {Path(recipe.__code__.co_filename)}
    todo |= {file for part in ("core", "threats") for file in (PACKAGE / part).glob("*.py")}
    while todo:
        file = todo.pop()
        found.add(file)
        named = {node.module for node in ast.walk(ast.parse(file.read_text("utf8"))) if isinstance(node, ast.ImportFrom) and node.module}
        paths = [PACKAGE.parent / name.replace(".", "/") for name in named if name.startswith("epsball.")]
        todo |= {path for base in paths if (path := base.with_suffix(".py")).is_file() or (path := base / "__init__.py").is_file()} - found
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(found))).hexdigest()[:12]


def place(model: str, contender: Contender, version: str, n: int, seed: int, budget: int = BUDGET) -> Path:
    """Where a run is kept: the name says what, the hash holds every setting."""
    settings = [model, contender.library, version, contender.attack, contender.norm, dict(contender.options), n, seed, budget]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    name = "".join(c if c.isalnum() else "-" for c in f"{model} {contender.norm} {contender.name}".lower())
    return CACHE / f"{name}-{digest}.npz"


def attacked(contender: Contender, at: Case, budget: int = BUDGET) -> scores.Record:
    """One run, judged. A library that raises keeps what it had asked so far, with its error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warm_up(contender, at)
        run = contender.run()
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002  (ART and foolbox draw from the global generators)
        random.seed(0)
        tracker = Tracker(at.x, at.y, contender.norm, budget)
        model = Counting(at.net, tracker).eval()
        returned, trouble = torch.full((len(at.x),), torch.inf, dtype=torch.float64), ""
        before = pace(at)
        started = time.process_time()
        try:
            x_adv = run(model, at.x.clone(), at.y.clone()).detach().float()
        except Spent:
            trouble = "cut at twice the budget"
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}".split("\n")[0][:160]
        seconds = time.process_time() - started - tracker.seconds
        around = (before + pace(at)) / 2
    if not trouble:
        x_adv = x_adv.clamp(0, 1)
        done = reached(at.net, x_adv, at.y)
        returned[done] = distances(contender.norm, at.x[done], x_adv[done])
        with torch.no_grad():  # an answer that was never asked counts like a question
            tracker.look(x_adv, at.net(x_adv), torch.arange(len(at.x)), tracker.spent <= budget)
    n = len(at.x)
    return scores.Record(
        best=tracker.best.numpy(),
        returned=returned.numpy(),
        spent=tracker.spent.numpy(),
        forwards=model.forwards / n,
        backwards=model.backwards / n,
        seconds=seconds,
        pace=around,
        trouble=trouble,
        source=source_digest(contender.attack) if contender.library == "epsball" else "",
    )


def pace(at: Case, steps: int = 5) -> float:
    """CPU seconds of one bare forward and backward of the batch: how fast the machine is just now."""
    x = at.x.clone().requires_grad_()
    started = time.process_time()
    for _ in range(steps):
        torch.autograd.grad(at.net(x).sum(), x)
    return (time.process_time() - started) / steps


def warm_up(contender: Contender, at: Case) -> None:
    """Two samples first, so that imports, compilers and caches are not on the clock; cut at a small budget."""
    x, y = at.x[:2].clone(), at.y[:2].clone()
    try:
        contender.run()(Counting(at.net, Tracker(x, y, contender.norm, 20)).eval(), x, y)
    except Exception:
        return


def told(budgets: Iterable[int]) -> str:
    """For sentences."""
    return " and ".join(f"{budget:,}" for budget in budgets)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--norms", nargs="+", default=list(P), choices=list(P))
    parser.add_argument("--only", default="", help="only attacks whose library and label contain this")
    parser.add_argument("--again", action="store_true", help="run even what is kept")
    parser.add_argument("--tables", action="store_true", help="run nothing, write the tables")
    parser.add_argument("--long", action="store_true", help=f"run those with {told(LONG)} queries, on half as many CIFAR-10 images")
    return parser.parse_args()


def wanted(arguments: argparse.Namespace, found: dict[str, str]) -> list[tuple[Contender, int]]:
    """The chosen attacks of the libraries that are here, each with its budget."""
    every = long_contenders() if arguments.long else [(c, BUDGET) for c in contenders()]
    chosen = [(c, budget) for c, budget in every if c.norm in arguments.norms and arguments.only.lower() in c.name.lower()]
    return [(c, budget) for c, budget in chosen if c.library in found]


def long_n(model: str, n: int) -> int:
    """Images for the long runs: half as many of CIFAR-10."""
    return n if model.startswith("mnist") else n // 2


def run_all(arguments: argparse.Namespace, found: dict[str, str]) -> None:
    """Runs what is asked for and not kept yet."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for name in arguments.models:
        n = long_n(name, arguments.n) if arguments.long else arguments.n
        todo = [(c, budget, place(name, c, found[c.library], n, arguments.seed, budget)) for c, budget in wanted(arguments, found)]
        todo = [(c, budget, path) for c, budget, path in todo if arguments.again or not path.exists()]
        if not todo:
            continue
        at = case(name, n, arguments.seed)
        for contender, budget, path in todo:
            record = attacked(contender, at, budget)
            record.save(path)
            median = np.median(record.best)
            print(f"{name:15} {contender.norm:4} {contender.name:46} {median:9.4g} {record.seconds:7.2f} s {record.trouble}", flush=True)


def longer(arguments: argparse.Namespace, found: dict[str, str], records: scores.Records) -> list[str]:
    """The section about the kept runs of more queries; nothing where there are none. A subset of images is a prefix of the larger."""
    kept = {}
    for name in MODELS:
        n = long_n(name, arguments.n)
        places = {c: place(name, c, found[c.library], n, arguments.seed, budget) for c, budget in long_contenders() if c.library in found}
        kept |= {(name, c): scores.Record.load(path) for c, path in places.items() if path.exists()}
    if not kept:
        return []
    missing = sorted({c.name for c, _ in long_contenders()} - {c.name for _, c in kept})
    pairs = {(name, c.norm) for name, c in records}
    best = {(m, norm): scores.union([r for (name, c), r in records.items() if (name, c.norm) == (m, norm)]) for m, norm in pairs}
    return [
        "",
        f"## With {told(LONG)} queries",
        "",
        "`--long`: half of them forwards, half backwards, on half as many CIFAR-10 images. Against the smallest changes known from any",
        "run of any budget, so that the figures are not those of the tables below, where less was known.",
        *([f"Not run: {', '.join(missing)}."] if missing else []),
        "",
        *scores.long_table(kept, MODELS, best),
        "",
        "`eb.smallest` by its steps (some 400, 1,000 and 4,000 queries), against the same smallest changes:",
        "",
        *scores.budget_table(kept, {key: r for key, r in records.items() if key[1].label == SHORT}, MODELS, best),
    ]


def machine() -> str:
    """The processor's name."""
    listed = Path("/proc/cpuinfo")
    named = (
        [line.split(":", 1)[1].strip() for line in listed.read_text().splitlines() if line.startswith("model name")]
        if listed.exists()
        else []
    )
    return named[0] if named else platform.processor() or platform.machine()


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(1)
    found, missing = available()
    if not arguments.tables:
        run_all(arguments, found)
    sample = f" --n {arguments.n} --seed {arguments.seed}"
    records = {
        (name, c): scores.Record.load(path)
        for name in MODELS
        for c in contenders()
        if c.library in found and (path := place(name, c, found[c.library], arguments.n, arguments.seed)).exists()
    }
    if not records:
        raise SystemExit("nothing has been run with these settings")
    stale = sorted({c.label for (_, c), r in records.items() if c.library == "epsball" and r.source != source_digest(c.attack)})
    head = [
        "# Optimality: how close each attack comes to the best known smallest change",
        "",
        f"`OMP_NUM_THREADS=1 PYTHONPATH=src:../peers/auto-attack python benchmarks/optimality.py{sample}`, in the peers' environment "
        "(benchmarks/peers.md).",
        f"{arguments.n} correctly classified test images per network, stratified, seed {arguments.seed}; {BUDGET} queries per image "
        "(a row forward or backward is one);",
        f"{torch.get_num_threads()} thread, torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}, {machine()}.",
        "Libraries: " + ", ".join(f"{library} {version}" for library, version in found.items()) + ".",
        *missing,
        *([f"Recorded with an earlier state of the package's source: {', '.join(stale)}."] if stale else []),
    ]
    scores.write(HERE / "results", head, records, MODELS, longer(arguments, found, records))


if __name__ == "__main__":
    main()
