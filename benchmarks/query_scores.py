"""Tables and curves of queries.py, from kept runs alone.

Ratios are ours over the peer's on the samples that both had, below 1 in our favor, with 95 % intervals from 2,000 bootstrap draws of
samples: of mean queries, and the median of the samples' own ratios of distances. A row is behind where the whole interval lies above 1,
or where fewer samples were broken by more than the interval of the difference; ahead where neither is so and one is the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from query_contenders import RADII, Contender

Floats = NDArray[np.float64]
NORMS = {"linf": "Linf", "l2": "L2", "l0": "L0 (pixels)"}
MOST, FAR = 10000, 10  # queries and distance at the ends of the axes of Opt-Attack and Sign-OPT
COLORS = ("#c0392b", "#2471a3", "#1e8449", "#b9770e", "#7d3c98", "#117a65", "#5d6d7e", "#d35400")


@dataclass(frozen=True)
class Record:
    """One run: steps (S, 3) of sample, query and distance, in order; queries spent per sample; the attack's own CPU seconds for
    `timed` queries.

    `pace`: CPU seconds of one bare forward and backward of the whole batch around the run; ratios of CPU time are taken in it.
    """

    steps: Floats
    spent: NDArray[np.int64]
    timed: int
    seconds: float
    pace: float
    trouble: str
    source: str

    def save(self, path: Path) -> None:
        """As one npz."""
        np.savez(path, **{name: np.asarray(value) for name, value in asdict(self).items()})

    @staticmethod
    def load(path: Path) -> Record:
        """From that npz."""
        with np.load(path, allow_pickle=False) as file:
            return Record(**{name: value if value.ndim else value.item() for name, value in file.items()})

    def at(self, queries: int) -> Floats:
        """(N,) the smallest distance after so many queries, infinite before the first success."""
        best = np.full(len(self.spent), np.inf)
        rows = self.steps[self.steps[:, 1] <= queries]
        np.minimum.at(best, rows[:, 0].astype(int), rows[:, 2])
        return best

    def first(self, radius: float) -> Floats:
        """(N,) the query that first succeeded inside the radius (1e-5 of it is left to rounding), infinite without one."""
        number = np.full(len(self.spent), np.inf)
        rows = self.steps[self.steps[:, 2] <= radius * (1 + 1e-5)]
        np.minimum.at(number, rows[:, 0].astype(int), rows[:, 1])
        return number

    @property
    def cost(self) -> float:
        """CPU seconds per query."""
        return self.seconds / max(self.timed, 1)

    def summary(self, c: Contender) -> str:
        """One number for the screen."""
        if c.kind == "distance":
            return f"median {_median(self.at(c.budget)):.4g}"
        return f"asked {self.spent.mean():.0f}, broken {np.isfinite(self.at(c.budget)).mean():.2f}"


Records = Mapping[tuple[str, Contender], Record]


def _median(values: Floats) -> float:
    ordered = np.sort(values)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return float(high if np.isinf(high) else (low + high) / 2)


def _number(value: float) -> str:
    return "∞" if np.isinf(value) else f"{value:.4g}"


def _bold(c: Contender) -> str:
    return f"**{c.name}**" if c.library == "epsball" else c.name


Interval = tuple[float, float, float]  # value, low, high


def interval(measure: Callable[[NDArray[np.int64]], float], n: int) -> Interval:
    """A measure of chosen samples: of all, and the 95 % interval over bootstrap draws of them."""
    draws = np.random.default_rng(0).integers(0, n, (2000, n))
    ordered = np.sort([measure(rows) for rows in draws])
    return measure(np.arange(n)), float(ordered[50]), float(ordered[-51])


def quotients(ours: Floats, theirs: Floats) -> Floats:
    """(N,) ours / theirs, 1 where neither has anything."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(ours) & np.isinf(theirs), 1.0, ours / theirs)


@dataclass(frozen=True)
class Pair:
    """Ours against one peer on one network: a ratio, by how much more samples are broken (0 for distances), intervals, CPU."""

    model: str
    ours: Contender
    peer: Contender
    what: str
    n: int
    ratio: Interval
    more: Interval
    cells: str
    seconds: float

    @property
    def verdict(self) -> str:
        """ahead, even or behind."""
        if self.ratio[1] > 1 or self.more[2] < 0:
            return "behind"
        return "ahead" if self.ratio[2] < 1 or self.more[1] > 0 else "even"


def pairs(records: Records) -> list[Pair]:
    """Every attack of ours with every peer's of the same name, budget and threat."""
    made: list[Pair] = []
    for (model, a), mine in records.items():
        for (other, b), theirs in records.items():
            same = (model, a.same, a.norm, a.budget) == (other, b.same, b.norm, b.budget)
            if a.library == "epsball" and b.library != "epsball" and same and not theirs.trouble:
                made.append(_pair(model, a, mine, b, theirs))
    return made


def _pair(model: str, a: Contender, mine: Record, b: Contender, theirs: Record) -> Pair:
    n = min(len(mine.spent), len(theirs.spent))
    seconds = (mine.cost / mine.pace) / (theirs.cost / theirs.pace)
    if a.kind == "fixed":
        radius = RADII[model][a.norm]
        firsts = [np.minimum(record.first(radius)[:n], a.budget) for record in (mine, theirs)]
        won = [np.isfinite(record.first(radius)[:n]) for record in (mine, theirs)]
        queries = interval(lambda rows: float(firsts[0][rows].mean() / firsts[1][rows].mean()), n)
        more = interval(lambda rows: float(won[0][rows].mean() - won[1][rows].mean()), n)
        cells = f"{100 * won[0].mean():.0f} / {100 * won[1].mean():.0f} %"
        return Pair(model, a, b, "mean queries", n, queries, more, cells, seconds)
    at = [record.at(a.budget)[:n] for record in (mine, theirs)]
    each = quotients(at[0], at[1])
    cells = " / ".join(_number(_median(size)) + _partly(size) for size in at)
    cells = f"{_number(_median(at[0]))} / {_number(_median(at[1]))}"
    return Pair(model, a, b, "distance", n, interval(lambda rows: _median(each[rows]), n), (0.0, 0.0, 0.0), cells, seconds)


def _partly(size: Floats) -> str:
    """How many found anything, where not all did."""
    some = np.isfinite(size)
    return "" if some.all() else f" ({100 * some.mean():.0f} % found)"


def pair_table(made: Sequence[Pair]) -> list[str]:
    """Rows of pairs, ours first in every cell."""
    lines = [
        "| network | norm | ours | peer | budget | n | what | ratio (95 %) | ours / peer | verdict | CPU per query |",
        "|---" * 11 + "|",
    ]
    for p in made:
        middle, low, high = (_number(value) for value in p.ratio)
        verdict = f"**{p.verdict}**" if p.verdict == "behind" else p.verdict
        names = f"| {p.model} | {p.ours.norm} | {p.ours.label} | {p.peer.name} | {p.ours.budget} | {p.n} "
        lines.append(f"{names}| {p.what} | {middle} ({low} .. {high}) | {p.cells} | {verdict} | {p.seconds:.2f} |")
    return lines


def summary(made: Sequence[Pair]) -> list[str]:
    """How many rows are ahead, even and behind, by name."""
    lines = ["| attack | rows | ahead | even | behind |", "|---|---|---|---|---|"]
    names = list(dict.fromkeys(p.ours.same for p in made))
    for name in [*names, "all"]:
        chosen = [p.verdict for p in made if name in ("all", p.ours.same)]
        lines.append(f"| {name} | {len(chosen)} | " + " | ".join(str(chosen.count(word)) for word in ("ahead", "even", "behind")) + " |")
    return lines


def fixed_table(records: dict[Contender, Record], radius: float) -> list[str]:
    """Queries to the first success inside the radius."""
    lines = ["| attack | budget | n | broken, % | mean queries | median | CPU ms a query |", "|---" * 7 + "|"]
    for c, r in records.items():
        first = r.first(radius)
        counted = np.minimum(first, c.budget)
        middle = _median(counted)
        words = f"{counted.mean():.0f} | {'none' if middle >= c.budget else f'{middle:.0f}'} | {1e3 * r.cost:.3f}"
        lines.append(f"| {_bold(c)} | {c.budget} | {len(first)} | {_share(first <= c.budget)} | {words} |")
    return lines


def _share(won: NDArray[np.bool_]) -> str:
    """With the interval of Clopper and Pearson."""
    k, n = int(won.sum()), len(won)
    low, high = beta.ppf(0.025, k, n - k + 1) if k else 0.0, beta.ppf(0.975, k + 1, n - k) if k < n else 1.0
    return f"{100 * won.mean():.0f} ({100 * low:.0f} .. {100 * high:.0f})"


def distance_table(records: dict[Contender, Record]) -> list[str]:
    """Median distance after so many queries, who found anything, and the mean of those."""
    lines = ["| attack | budget | n | found, % | median | mean of found | CPU ms a query |", "|---" * 7 + "|"]
    for c, r in records.items():
        size = r.at(c.budget)
        some = np.isfinite(size)
        mean = _number(float(size[some].mean())) if some.any() else "none"
        words = f"{100 * some.mean():.0f} | {_number(_median(size))} | {mean} | {1e3 * r.cost:.3f}"
        lines.append(f"| {_bold(c)} | {c.budget} | {len(size)} | {words} |")
    return lines


def write(folder: Path, head: list[str], records: Records, missing: list[str]) -> None:
    """queries.md and a picture of curves for each threat; `missing` says which rows were not run."""
    made = pairs(records)
    raised = sorted({f"{c.name} ({name}, {c.norm}): {r.trouble}" for (name, c), r in records.items() if r.trouble})
    text = [*head, *([f"Raised: {'; '.join(raised)}."] if raised else []), *NOTES]
    text += ["", "## Ours against each peer of the same name: rows by verdict", "", *summary(made)]
    behind = [p for p in made if p.verdict == "behind"]
    text += ["", "## Rows where ours is behind", "", *(pair_table(behind) if behind else ["None."])]
    for norm, title in NORMS.items():
        here = {key: record for key, record in records.items() if key[1].norm == norm}
        if not here:
            continue
        text += ["", f"## {title}", "", f"![Share broken against queries]({curves(folder, here, norm).name})"]
        for model in dict.fromkeys(name for name, _ in here):
            of = {c: r for (name, c), r in here.items() if name == model}
            radius = RADII[model][norm]
            groups = [{c: r for c, r in of.items() if c.kind == kind} for kind in ("fixed", "distance")]
            if groups[0]:
                text += ["", f"### {model}, radius {radius:.4g}", "", *fixed_table(groups[0], radius)]
            if groups[1]:
                text += ["", f"### {model}, smallest distance", "", *distance_table(groups[1])]
    text += descent_section(folder, {c: r for (name, c), r in records.items() if name == "mnist-standard" and c.budget == MOST})
    text += ["", "## All pairs", "", *pair_table(made)]
    if missing:
        text += ["", "## Rows that were not run", "", "For want of time; the command above, which keeps what is there, runs them.", ""]
        text += missing
    folder.mkdir(exist_ok=True)
    (folder / "queries.md").write_text("\n".join(text) + "\n", encoding="utf8")


NOTES = [
    "",
    "Ours in bold. A query is one row forward of the model for one sample, counted the same way on every side by the model itself;",
    "each attack is run once with each budget. *Mean queries*: a sample that was not broken counts the whole budget. Intervals are at",
    "95 %: Clopper and Pearson's for shares, 2,000 bootstrap draws of samples for ratios. *Ratio*: ours over the peer's, below 1 in our",
    "favor: of mean queries, or the median of each sample's ratio of distances; *ours / peer*: the share broken within the budget, or",
    "the medians of the distances. *Behind*: the ratio's interval is above 1, or fewer samples were broken by more than the interval of",
    "the difference; *ahead*: the same the other way; else *even*. Peers run at their defaults with the budget cut, and once more with",
    "settings that suit short runs better. *CPU per query*: seconds of the run, without our bookkeeping, per query, ours over the",
    "peer's, each in units of a bare forward and backward timed around it; on networks this small it is mostly overhead. Peers that",
    "take batches but would let one sample pay for another, or ask too far away to tell whose question it is, are counted on one",
    "sample at a time and timed on the batch. At 10,000 queries only each library's best variant of a family runs (by its results at",
    "1,000), on fewer samples (n; the intervals follow). attackbox: the code of the authors of Opt-Attack",
    "and Sign-OPT.",
]


def descent_section(folder: Path, records: dict[Contender, Record]) -> list[str]:
    """Opt-Attack and Sign-OPT on one network: median distance against queries, as a table and as a picture, from single runs."""
    chosen = {c: r for c, r in records.items() if c.same in ("Opt-Attack", "Sign-OPT") and not r.trouble}
    if not chosen:
        return []
    marks = (100, 300, 1000, 3000, MOST)
    lines = [
        "",
        "## Opt-Attack and Sign-OPT: distance against queries",
        "",
        "mnist-standard, L2, median of the samples; one run each to 10,000.",
    ]
    lines += ["", "![Distance against queries](queries-opt.svg)", "", "| attack | n | " + " | ".join(f"{q:,}" for q in marks) + " |"]
    lines.append("|---" * (2 + len(marks)) + "|")
    for c, r in chosen.items():
        lines.append(f"| {_bold(c)} | {len(r.spent)} | " + " | ".join(_number(_median(r.at(q))) for q in marks) + " |")
    y, parts, names = 34, ['<path class="axis" d="M40 22V212H240"/>'], list(dict.fromkeys(c.same for c in chosen))
    parts.append('<text x="40" y="14" font-weight="bold">mnist-standard, L2, median distance</text>')
    parts += [f'<text x="{40 + 100 * (p - 2):.0f}" y="227" text-anchor="middle">{10**p}</text>' for p in (2, 3, 4)]
    parts += [f'<text x="36" y="{216 - 190 * far / FAR:.0f}" text-anchor="end">{far}</text>' for far in range(0, FAR + 1, 2)]
    for c, r in chosen.items():
        color, dash = COLORS[names.index(c.same)], "" if c.library == "epsball" else "4 3"
        parts.append(f'<path d="{_falling(r)}" stroke="{color}" stroke-dasharray="{dash}"/>')
        parts.append(
            f'<path d="M248 {y - 4}H262" stroke="{color}" stroke-dasharray="{dash}"/><text x="266" y="{y}">{escape(c.name)}</text>'
        )
        y += 15
    _draw(folder / "queries-opt.svg", "Distance against queries", 430, 250, parts)
    return lines


def _falling(record: Record) -> str:
    """Median distance from 100 to 10,000 queries, 50 places on a logarithmic axis; cut at the top."""
    places = np.linspace(2, np.log10(MOST), 50)
    height = [min(_median(record.at(int(10**p))), FAR) for p in places]
    return "M" + "L".join(f"{40 + 100 * (p - 2):.1f} {212 - 190 * far / FAR:.1f}" for p, far in zip(places, height, strict=True))


def _draw(path: Path, title: str, wide: int, high: int, parts: Sequence[str]) -> None:
    style = "text{font:11px sans-serif;fill:#222}path{fill:none;stroke-width:1.4}.axis{stroke:#999;stroke-width:1}"
    box = f'viewBox="0 0 {wide} {high}" width="{wide}" height="{high}"'
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img"><title>{title}</title>'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n',
        encoding="utf8",
    )


def curves(folder: Path, records: Records, norm: str) -> Path:
    """Share of samples broken at the radius against queries (logarithmic), one panel a network, one curve an attack and library."""
    wide, high = 430, 250
    panels, models = [], list(dict.fromkeys(name for name, _ in records))
    for number, model in enumerate(models):
        of = {c: r for (name, c), r in records.items() if name == model and not r.trouble}
        panels.append(f'<g transform="translate({wide * number} 0)">{_panel(model, of, RADII[model][norm])}</g>')
    path = folder / f"queries-{norm}.svg"
    _draw(path, f"Share broken against queries, {NORMS[norm]}", wide * len(models), high, panels)
    return path


def _panel(model: str, records: dict[Contender, Record], radius: float) -> str:
    """The best run of each attack and side: dashed is the best peer's."""
    names = list(dict.fromkeys(c.same for c in records))
    top = np.log10(max((c.budget for c in records), default=10))
    title = f"{escape(model)}, radius {radius:.3g}"
    parts = [f'<text x="40" y="14" font-weight="bold">{title}</text>', '<path class="axis" d="M40 22V212H240"/>']
    parts += [f'<text x="36" y="{216 - 190 * share:.0f}" text-anchor="end">{100 * share:.0f}</text>' for share in (0, 0.5, 1)]
    parts += [f'<text x="{40 + 200 * p / top:.0f}" y="227" text-anchor="middle">{10**p}</text>' for p in range(int(top) + 1)]
    y = 34
    for name, color in zip(names, COLORS, strict=False):
        for mine, dash in ((True, ""), (False, "4 3")):
            side = [(c, r) for c, r in records.items() if c.same == name and (c.library == "epsball") is mine]
            if not side:
                continue
            c, r = max(side, key=lambda item: (item[0].budget, -np.minimum(item[1].first(radius), item[0].budget).mean()))
            parts.append(f'<path d="{_rising(r.first(radius), c.budget, top)}" stroke="{color}" stroke-dasharray="{dash}"/>')
            parts.append(f'<path d="M248 {y - 4}H262" stroke="{color}" stroke-dasharray="{dash}"/>')
            parts.append(f'<text x="266" y="{y}">{escape(c.name.split(",")[0])}</text>')
            y += 15
    return "".join(parts)


def _rising(first: Floats, budget: int, top: float) -> str:
    """A staircase from (1, 0), one step a sample."""
    found, n = np.sort(first[first <= budget]), len(first)
    corners = [f"H{40 + 200 * np.log10(queries) / top:.1f}V{212 - 190 * (number + 1) / n:.1f}" for number, queries in enumerate(found)]
    return "M40 212" + "".join(corners) + f"H{40 + 200 * np.log10(budget) / top:.1f}"
