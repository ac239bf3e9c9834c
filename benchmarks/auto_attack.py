"""The audit against AutoAttack: who breaks more samples, for how many rows and seconds. Writes results/autoattack.md.

`OMP_NUM_THREADS=1 PYTHONPATH=../peers/auto-attack python benchmarks/auto_attack.py` in epsball's environment (AutoAttack needs
nothing else; peers.md says how it is installed), with EPSBALL_DATA. One thread; both sides get the same correctly classified
test images. AutoAttack is the official code, version `standard`, which drops what it has broken as the audit does; its answers
are judged by a fresh look, as ours are. Every run is kept in cache/autoattack: AutoAttack's once, ours until the package's
search code changes. `--tables` runs nothing. `--only WORD ...` takes the cases whose name holds a word. `--turns SEED ...` keeps
nothing and writes nothing: it prints, case by case, AutoAttack and the search with each of these seeds in turn, twice;
`--rival SEED` gives AutoAttack another seed than that of the images, `--radius R` both sides another budget.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import epsball as eb
import nets
from epsball.auditing.cascade import attack_round, stages_of
from epsball.auditing.plan import EFFORTS
from epsball.auditing.run import Plan, canaries, prepare
from epsball.auditing.sheet import Subject
from epsball.auditing.statistics import clopper_pearson
from epsball.core import Victim
from epsball.models.digits import load
from epsball.threats import parse_threat
from peers import Counting, distances, reached

HERE = Path(__file__).parent
CACHE = nets.CACHE / "autoattack"
OFFICIAL = {"linf": "Linf", "l2": "L2", "l1": "L1"}
RADII = {
    "digits-standard": ("0.1", "0.5", "1.2"),
    "digits-robust": ("0.2", "0.6", "1"),
    "mnist-standard": ("0.08", "1", "6"),
    "mnist-robust": ("0.3", "1.25", "3.5"),
    "cifar-standard": ("1/255", "0.2", "2.5"),
    "cifar-robust": ("4/255", "0.5", "5"),
}
"""Under Linf, L2 and L1; between 5 and 90 of 100 samples stand."""


@dataclass(frozen=True)
class Case:
    """A network, the samples that it is attacked on, and the budget."""

    name: str
    net: nn.Module
    x: Tensor
    y: Tensor
    norm: str
    text: str

    @property
    def radius(self) -> float:
        """The budget as a number."""
        above, _, below = self.text.partition("/")
        return float(above) / float(below or 1)


@dataclass
class Run:
    """What one side did: which samples stand (n), rows forward and backward, CPU seconds; rows of the audit's checks apart."""

    stands: list[bool]
    forwards: int
    backwards: int
    seconds: float
    source: str = ""
    whole: dict[str, float] = field(default_factory=dict)

    @property
    def robust(self) -> int:
        """How many stand."""
        return sum(self.stands)


@dataclass
class Books:
    """Rows of a model and of all its copies."""

    forwards: int = 0
    backwards: int = 0

    def __deepcopy__(self, memo: object) -> Books:
        return self

    def asked(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Rows forward."""
        self.forwards += len(inputs)
        return torch.arange(len(inputs))

    def pulled(self, rows: Tensor) -> None:
        """Rows backward."""
        self.backwards += len(rows)


def cases(n: int, seed: int, words: list[str]) -> Iterator[Case]:
    """n correctly classified test images per network, as many of each class as can be."""
    for name, radii in RADII.items():
        pairs = zip(OFFICIAL, radii, strict=True)
        wanted = [(norm, text) for norm, text in pairs if not words or any(word in f"{name} {norm}" for word in words)]
        if not wanted:
            continue
        net = (load(name) if name.startswith("digits") else nets.trained(name)).requires_grad_(False)
        x, y = sample(name, net, n, seed)
        for norm, text in wanted:
            yield Case(name, net, x, y, norm, text)


def sample(name: str, net: nn.Module, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """As `cases`: images and labels."""
    sources = {"digits": "digits", "mnist": str(nets.mnist_file()), "cifar": str(nets.root() / "cifar10_jpeg")}
    data = eb.load_data(sources[name.split("-")[0]], split="test")
    with torch.no_grad():
        right = torch.cat([net(x).argmax(1) for x in data.x.split(500)]) == data.y
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(data.y)))
    order = order[right[order]]
    rank = torch.zeros(len(order), dtype=torch.int64)  # of an image among those of its class
    for label in data.y.unique():
        of_class = data.y[order] == label
        rank[of_class] = torch.arange(int(of_class.sum()))
    chosen = order[rank.argsort(stable=True)][:n]
    return data.x[chosen], data.y[chosen]


def _stands(at: Case, x_adv: Tensor, slack: float) -> list[bool]:
    """By a fresh look: right, or outside the budget (times 1 + slack) or the box."""
    inside = (distances(at.norm, at.x, x_adv) <= at.radius * (1 + slack)) & ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
    return (~(reached(at.net, x_adv, at.y) & inside)).tolist()


def official(at: Case, seed: int) -> Run:
    """AutoAttack standard on all samples at once. Its float32 balls are granted 1e-5 of the radius."""
    from autoattack import AutoAttack

    model = Counting(at.net).eval()
    judge = AutoAttack(model, norm=OFFICIAL[at.norm], eps=at.radius, seed=seed, version="standard", device="cpu", verbose=False)
    started = time.process_time()
    x_adv = judge.run_standard_evaluation(at.x.clone(), at.y.clone(), bs=len(at.x))
    return Run(_stands(at, x_adv.clamp(0, 1), 1e-5), model.forwards, model.backwards, time.process_time() - started)


def searched(at: Case, seed: int, effort: str) -> Run:
    """The audit's search alone, with the referee."""
    books = Books()
    model = Counting(copy.deepcopy(at.net), books).eval()
    subject = Subject(Victim(model), at.x, at.y, torch.arange(len(at.x)), "benchmark", {})
    sheet, referee = prepare(subject, Plan((parse_threat(f"{at.norm}:{at.text}"),), effort, seed))
    books.forwards = books.backwards = 0
    started, (current,) = time.process_time(), sheet.rounds
    for stage in stages_of(sheet, current, effort):
        attack_round(sheet, referee, current, stage, seed, True, lambda *_: None)
    seconds, rows = time.process_time() - started, (books.forwards, books.backwards)
    return Run(_stands(at, sheet.hits[current.threat].x_adv, 0.0), *rows, seconds, source())


def ours(at: Case, seed: int, effort: str) -> Run:
    """The audit's search; then the whole audit, with preflight and checks."""
    return replace(searched(at, seed, effort), whole=_audited(at, seed, effort))


def _audited(at: Case, seed: int, effort: str) -> dict[str, float]:
    """The canaries, which a process runs once, apart."""
    books = Books()
    model = Counting(copy.deepcopy(at.net), books).eval()
    canaries((at.norm,))
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        report = eb.audit(model, (at.x, at.y), f"{at.norm}:{at.text}", effort=effort, seed=seed, out=Path(folder) / "run")
        seconds = time.process_time() - started
    count = report.models[0].results[0].robust_accuracy.count
    flags = len(report.models[0].results[0].flags)
    return {"robust": count, "forwards": books.forwards, "backwards": books.backwards, "seconds": seconds, "flags": flags}


def source() -> str:
    """Changes with every change of what an audit does."""
    root = Path(eb.__file__).parent
    files = sorted(file for part in ("core", "threats", "objectives", "attacks", "auditing") for file in (root / part).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def kept(place: Path, stale: Callable[[Run], bool], make: Callable[[], Run] | None) -> Run | None:
    """The run at that place, made anew where there is none or it is stale; None where nothing may run."""
    found = Run(**json.loads(place.read_text())) if place.exists() else None
    if make is None or (found is not None and not stale(found)):
        return found
    found = make()
    CACHE.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(asdict(found)))
    return found


def place(at: Case, side: str, seed: int) -> Path:
    """Where a run is kept."""
    return CACHE / f"{at.name}-{at.norm}-{at.text.replace('/', '_')}-{len(at.x)}-{seed}-{side}.json"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="only cases whose name holds one of these")
    parser.add_argument("--efforts", nargs="*", default=list(EFFORTS), choices=EFFORTS)
    parser.add_argument("--tables", action="store_true", help="run nothing, write the tables")
    parser.add_argument("--turns", nargs="+", type=int, metavar="SEED", help="both sides in turn, the search with these seeds; prints only")
    parser.add_argument("--rival", type=int, metavar="SEED", help="AutoAttack's seed with --turns; that of the images if left out")
    parser.add_argument("--radius", metavar="R", help="with --turns: another budget than the table's")
    arguments = parser.parse_args()
    if arguments.rival is not None and not arguments.turns:
        parser.error("--rival: AutoAttack's kept runs have the seed of the images: give --turns too")
    if arguments.radius is not None and not arguments.turns:
        parser.error("--radius: the table has its own budgets: give --turns too")
    return arguments


def row(at: Case, seed: int, effort: str) -> str | None:
    """One line of the table; None where a side has not run."""
    theirs, mine = (kept(place(at, side, seed), lambda _: False, None) for side in ("autoattack", effort))
    if theirs is None or mine is None:
        return None
    n, whole = len(at.x), mine.whole
    only_theirs, only_ours = (sum(a and not b for a, b in zip(*pair, strict=True)) for pair in _pairs(mine, theirs))
    cells = [
        f"{at.name} {at.norm}:{at.text}",
        effort,
        _interval(theirs.robust, n),
        _interval(mine.robust, n),
        f"{only_theirs} / {only_ours}",
        f"{theirs.backwards:,} / {mine.backwards:,} ({100 * mine.backwards / theirs.backwards:.1f} %)",
        f"{theirs.forwards:,} / {mine.forwards:,} ({100 * mine.forwards / theirs.forwards:.1f} %)",
        f"{100 * whole['forwards'] / theirs.forwards:.1f} %",
        f"{theirs.seconds:.1f} / {mine.seconds:.2f} ({100 * mine.seconds / theirs.seconds:.1f} %)",
        f"{100 * whole['seconds'] / theirs.seconds:.1f} %",
        mine.source,
    ]
    return f"| {' | '.join(cells)} |"


def _pairs(mine: Run, theirs: Run) -> tuple[tuple[list[bool], list[bool]], tuple[list[bool], list[bool]]]:
    return (mine.stands, theirs.stands), (theirs.stands, mine.stands)


def _interval(count: int, n: int) -> str:
    low, high = clopper_pearson(count, n)
    return f"{count} of {n} [{100 * low:.0f}, {100 * high:.0f}]"


COLUMNS = ("case", "effort", "AutoAttack stands", "audit stands", "only one side", "gradient rows", "forward rows")
COLUMNS += ("with checks", "CPU seconds", "CPU with checks", "code")


def table(rows: list[str], seed: int, efforts: list[str]) -> str:
    """The page; `efforts` are those that have run."""
    head = [
        "# The audit against AutoAttack",
        "",
        f"`OMP_NUM_THREADS=1 PYTHONPATH=../peers/auto-attack python benchmarks/auto_attack.py --seed {seed} "
        f"--efforts {' '.join(efforts)}`;",
        f"one thread, torch {torch.__version__.split('+')[0]}. Official AutoAttack (commit in peers.md), version standard, on the same",
        "correctly classified test images. Standing: samples that the side did not break, by a fresh look, with 95 % Clopper-Pearson",
        "intervals in percent. Only one side: samples that AutoAttack alone broke / that the audit alone broke. Rows and seconds:",
        "AutoAttack / the audit's search with its referee (share). With checks: forward rows of the whole audit, preflight, checks and",
        "referee included, as a share of AutoAttack's; CPU with checks: its seconds, without the canaries, which a process runs once",
        "(about 2 s). The two sides of a case ran one after the other where none was kept from before, while other work shared the",
        "machine. Code: a digest of the search code.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    return "\n".join([*head, *rows]) + "\n"


def below(page: Path) -> str:
    """What stands below the table, by hand: measurements beside it."""
    _, mark, text = page.read_text(encoding="utf8").partition("\n## ") if page.exists() else ("", "", "")
    return mark + text


def run_all(arguments: argparse.Namespace) -> None:
    """Runs what is asked for and not kept yet, AutoAttack before ours."""
    now, seed = source(), arguments.seed
    for at in cases(arguments.n, seed, arguments.only):
        kept(place(at, "autoattack", seed), lambda _: False, partial(official, at, seed))
        for effort in arguments.efforts:
            kept(place(at, effort, seed), lambda old: old.source != now, partial(ours, at, seed, effort))
            print(row(at, seed, effort), flush=True)


def in_turn(asked: Iterable[Case], rival: int, seeds: list[int], passes: int = 2) -> None:
    """Both sides under the same load: AutoAttack, then the search with each seed, all of it so many times."""
    for at in asked:
        for _ in range(passes):
            theirs = official(at, rival)
            print(f"{at.name} {at.norm}:{at.text}, n {len(at.x)}: AutoAttack stands {theirs.robust}, {theirs.seconds:.2f} s")
            for seed in seeds:
                mine = searched(at, seed, "default")
                share, rows = mine.seconds / theirs.seconds, mine.backwards / theirs.backwards
                print(f"  seed {seed}: {mine.robust}, {mine.seconds:.2f} s ({share:.1%}), gradient rows {rows:.1%}", flush=True)


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(1)
    if arguments.turns:
        asked = (replace(at, text=arguments.radius or at.text) for at in cases(arguments.n, arguments.seed, arguments.only))
        in_turn(asked, arguments.seed if arguments.rival is None else arguments.rival, arguments.turns)
        return
    if not arguments.tables:
        run_all(arguments)
    lines = {
        (at.name, at.norm, effort): row(at, arguments.seed, effort) for at in cases(arguments.n, arguments.seed, []) for effort in EFFORTS
    }
    rows = {key: line for key, line in lines.items() if line is not None}
    page, ran = HERE / "results" / "autoattack.md", [effort for effort in EFFORTS if any(effort == other for _, _, other in rows)]
    page.write_text(table(list(rows.values()), arguments.seed, ran) + below(page), encoding="utf8")


if __name__ == "__main__":
    main()
