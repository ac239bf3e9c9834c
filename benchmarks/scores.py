"""Optimality, the tables and the curves of optimality.py, from kept runs alone.

With d_i the change an attack needed for sample i (infinite where it failed), d*_i the smallest that any attack here found, and r0
the largest finite d*, local optimality is one minus the area between the attack's curve of robust accuracy and the best curve,
over the area between the clean accuracy and the best curve, all from 0 to r0. The samples are all correct at first, the curves are
steps, so the areas are means and

    optimality = (r0 - mean(min(d, r0))) / (r0 - mean(min(d*, r0))).

AttackBench's code takes the areas by the trapezoid rule from the first success on, which hides failures and can pass 1 on samples
that are all correct at first; the definition in the paper is the one above.
Global optimality is the mean over networks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from contenders import Contender

Floats = NDArray[np.float64]
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1", "l0f": "L0 (features)"}
COLORS = ("#c0392b", "#2471a3", "#1e8449", "#b9770e", "#7d3c98", "#117a65")


@dataclass(frozen=True)
class Record:
    """One run: per sample the smallest change found in the budget, the one returned, the queries spent; and totals per sample.

    `pace`: CPU seconds of one bare forward and backward of the whole batch, measured around the run. Ratios of CPU time are taken
    in it, because other work on the machine changes both alike.
    """

    best: Floats
    returned: Floats
    spent: NDArray[np.int64]
    forwards: float
    backwards: float
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


Records = Mapping[tuple[str, Contender], Record]


def union(records: Sequence[Record], known: Floats | None = None) -> Floats:
    """The smallest change that any run found, per sample, or that was `known` before (of as many samples or more)."""
    found = [record.best for record in records]
    return np.min(found if known is None else [*found, known[: len(found[0])]], axis=0)


def reach(best: Floats) -> float:
    """r0: where the best curve ends."""
    finite = best[np.isfinite(best)]
    return float(finite.max()) if len(finite) else 0.0


def optimality(found: Floats, best: Floats) -> float:
    """Local optimality of one run, in [0, 1]."""
    r0 = reach(best)
    room = r0 - np.minimum(best, r0).mean()
    return float((r0 - np.minimum(found, r0).mean()) / room) if room > 0 else float("nan")


def _of(records: Records, model: str, norm: str) -> dict[Contender, Record]:
    return {c: r for (name, c), r in records.items() if name == model and c.norm == norm}


def _number(value: float) -> str:
    return "∞" if np.isinf(value) else f"{value:.4g}"


def _middle(sizes: Floats) -> float:
    """The median, a failure being infinite: the upper middle value of an even number where the two differ by infinity."""
    ordered = np.sort(sizes)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return float(high if np.isinf(high) else (low + high) / 2)


def main_table(records: dict[Contender, Record]) -> list[str]:
    """All attacks on one network under one norm, by optimality."""
    best = union(list(records.values()))
    lines = [
        "| attack | optimality, % | reached, % | median | returned: median | forwards | backwards | CPU s |",
        "|---|---|---|---|---|---|---|---|",
        f"| *best of all* | 100 | {100 * np.isfinite(best).mean():.0f} | {_number(_middle(best))} | | | | |",
    ]
    for c, r in sorted(records.items(), key=lambda item: -optimality(item[1].best, best)):
        name = f"**{c.name}**" if c.library == "epsball" else c.name
        returned = _number(_middle(r.returned)) if not r.trouble else "cut" if r.trouble.startswith("cut") else "raised"
        lines.append(
            f"| {name} | {100 * optimality(r.best, best):.2f} | {100 * np.isfinite(r.best).mean():.0f} | {_number(_middle(r.best))} "
            f"| {returned} | {r.forwards:.0f} | {r.backwards:.0f} | {r.seconds:.2f} |"
        )
    return lines


@dataclass(frozen=True)
class Pair:
    """Ours against a peer's attack of the same name on one network: ratios ours / peer's."""

    model: str
    ours: Contender
    peer: Contender
    median: float
    mean: float
    optimality: tuple[float, float]
    reached: tuple[float, float]
    seconds: float

    @property
    def farther(self) -> bool:
        """By more than 1 %, or fewer samples."""
        return self.median > 1.01 or self.mean > 1.01 or self.reached[0] < self.reached[1]

    @property
    def behind(self) -> bool:
        """Farther or slower."""
        return self.farther or self.seconds > 1


def pairs(records: Records, models: Sequence[str]) -> list[Pair]:
    """Every attack of ours with every peer's of the same name."""
    made = []
    for model in models:
        for norm in NORMS:
            here = _of(records, model, norm)
            best = union(list(here.values())) if here else np.zeros(0)
            mine = [c for c in here if c.library == "epsball" and c.same]
            theirs = [c for c in here if c.library != "epsball" and c.same]
            made += [_pair(model, here, best, a, b) for a in mine for b in theirs if a.same == b.same]
    return made


def _pair(model: str, here: dict[Contender, Record], best: Floats, a: Contender, b: Contender) -> Pair:
    mine, theirs = here[a], here[b]
    both = np.isfinite(mine.best) & np.isfinite(theirs.best)
    top, bottom = _middle(mine.best), _middle(theirs.best)
    return Pair(
        model,
        a,
        b,
        median=1.0 if np.isinf(top) and np.isinf(bottom) else top / bottom,
        mean=float(mine.best[both].mean() / theirs.best[both].mean()) if both.any() else float("nan"),
        optimality=(optimality(mine.best, best), optimality(theirs.best, best)),
        reached=(float(np.isfinite(mine.best).mean()), float(np.isfinite(theirs.best).mean())),
        seconds=(mine.seconds / mine.pace) / (theirs.seconds / theirs.pace),
    )


def pair_table(made: Sequence[Pair]) -> list[str]:
    """Ratios below 1 are in our favor; bold ones are not."""
    lines = [
        "| network | norm | ours | peer | median ratio | mean ratio | optimality, ours / peer | reached, ours / peer | CPU ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in made:
        median, mean = (f"**{_ratio(v)}**" if v > 1.01 else _ratio(v) for v in (p.median, p.mean))
        shares = f"{100 * p.optimality[0]:.1f} / {100 * p.optimality[1]:.1f} | {100 * p.reached[0]:.0f} / {100 * p.reached[1]:.0f}"
        seconds = f"**{p.seconds:.2f}**" if p.seconds > 1 else f"{p.seconds:.2f}"
        lines.append(f"| {p.model} | {p.ours.norm} | {p.ours.label} | {p.peer.name} | {median} | {mean} | {shares} | {seconds} |")
    return lines


def tally(made: Sequence[Pair]) -> list[str]:
    """Of how many rows of peers some setting of ours, of the same name, is behind in nothing; and the other rows, by name."""
    rows: dict[tuple[str, str, str], list[Pair]] = {}
    for p in made:
        rows.setdefault((p.model, p.ours.norm, p.peer.name), []).append(p)
    farther = {key: all(p.farther for p in group) for key, group in rows.items()}
    left = [key for key, group in rows.items() if all(p.behind for p in group)]
    lines = [
        f"Rows of peers: {len(rows)}. In {len(rows) - sum(farther.values())} a setting of ours is at most 1 % farther and reaches as "
        f"many; in {len(rows) - len(left)} one is that and faster as well.{' The others:' if left else ''}"
    ]
    for key in left:
        p = min(rows[key], key=lambda p: (p.farther, p.seconds))
        why = f"median {p.median:.3f}, mean {p.mean:.3f}, reached {p.reached[0]:.2f} / {p.reached[1]:.2f}, CPU {p.seconds:.2f}"
        lines.append(f"- {', '.join(key)}: {p.ours.label}: {why}")
    return lines


def _ratio(value: float) -> str:
    return "∞" if np.isinf(value) else f"{value:.3f}"


def global_table(records: Records, models: Sequence[str], norm: str) -> list[str]:
    """Mean optimality over the networks, for attacks that ran on all of them."""
    shares: dict[Contender, list[float]] = {}
    for model in models:
        here = _of(records, model, norm)
        best = union(list(here.values())) if here else np.zeros(0)
        for c, r in here.items():
            shares.setdefault(c, []).append(100 * optimality(r.best, best))
    full = sorted(((np.mean(v), c, v) for c, v in shares.items() if len(v) == len(models)), key=lambda item: -item[0])
    lines = ["| attack | global optimality, % | " + " | ".join(models) + " |", "|---" * (2 + len(models)) + "|"]
    for mean, c, each in full:
        name = f"**{c.name}**" if c.library == "epsball" else c.name
        lines.append(f"| {name} | {mean:.2f} | " + " | ".join(f"{share:.2f}" for share in each) + " |")
    return lines


def leader_table(records: Records, models: Sequence[str]) -> list[str]:
    """The best of ours, `eb.smallest` with the steps that fit, and the best peer in each place, with their optimality."""
    lines = ["| network | norm | best of ours | `eb.smallest` within the budget | best peer |", "|---|---|---|---|---|"]
    for model in models:
        for norm in NORMS:
            here = _of(records, model, norm)
            best = union(list(here.values())) if here else np.zeros(0)
            shares = sorted(((100 * optimality(r.best, best), c) for c, r in here.items()), key=lambda item: -item[0])
            mine = [(share, c) for share, c in shares if c.library == "epsball"]
            theirs = [(share, c) for share, c in shares if c.library != "epsball"]
            default = [(share, c) for share, c in mine if c.attack == "smallest" and "steps" in c.options]
            if mine and theirs:
                cells = [f"{group[0][1].name.removeprefix('epsball ')} {group[0][0]:.2f}" for group in (mine, default, theirs) if group]
                lines.append(f"| {model} | {norm} | " + " | ".join(cells) + " |")
    return lines


def _known(kept: Records, models: Sequence[str], best: Mapping[tuple[str, str], Floats]) -> Iterator[tuple[str, str, Floats]]:
    """(model, norm, the smallest changes known from any run) of what was kept."""
    for model in models:
        for norm in NORMS:
            if here := _of(kept, model, norm):
                yield model, norm, union([*here.values()], best.get((model, norm)))


def long_table(records: Records, models: Sequence[str], best: Mapping[tuple[str, str], Floats]) -> list[str]:
    """Runs of larger budgets against the smallest changes known from any run (`best`, by model and norm)."""
    lines = ["| network | norm | images | attack | optimality, % | reached, % | median | forwards | backwards |", "|---" * 9 + "|"]
    for model, norm, known in _known(records, models, best):
        closeness = {c: optimality(r.best, known) for c, r in _of(records, model, norm).items()}
        for c in sorted(closeness, key=lambda c: -closeness[c]):
            r, name = records[model, c], f"**{c.name}**" if c.library == "epsball" else c.name
            shares = f"{100 * closeness[c]:.2f} | {100 * np.isfinite(r.best).mean():.0f}"
            numbers = f"{_number(_middle(r.best))} | {r.forwards:.0f} | {r.backwards:.0f}"
            lines.append(f"| {model} | {norm} | {len(r.best)} | {name} | {shares} | {numbers} |")
    return lines


def budget_table(kept: Records, short: Records, models: Sequence[str], best: Mapping[tuple[str, str], Floats]) -> list[str]:
    """Optimality of `eb.smallest` by its steps, those of `short` on the images that `kept` has; and how often it is 99 % or more."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for model, norm, known in _known(kept, models, best):
        every = _of(short, model, norm) | _of(kept, model, norm)
        rows[model, norm] = {c.label: 100 * optimality(r.best[: len(known)], known) for c, r in every.items() if c.attack == "smallest"}
    labels = [label for label in next(iter(rows.values())) if all(label in row for row in rows.values())] if rows else []
    met = " | ".join(str(sum(row[label] >= 99 for row in rows.values())) for label in labels)
    return [
        f"| network | norm | {' | '.join(labels)} |",
        "|---" * (2 + len(labels)) + "|",
        *(f"| {model} | {norm} | {' | '.join(f'{row[label]:.2f}' for label in labels)} |" for (model, norm), row in rows.items()),
        f"| *99 % or more, of {len(rows)}* | | {met} |",
    ]


def write(folder: Path, head: list[str], records: Records, models: Sequence[str], longer: Sequence[str] = ()) -> None:
    """optimality.md and a picture of curves for each norm. `longer`: lines about runs of a larger budget."""
    models = [model for model in models if any(name == model for name, _ in records)]
    made = pairs(records, models)
    raised = sorted({f"{c.name} ({c.norm}): {r.trouble}" for (_, c), r in records.items() if r.trouble and not r.trouble.startswith("cut")})
    text = [*head, *([f"Raised: {'; '.join(raised)}."] if raised else []), *NOTES]
    text += ["", "## Who leads where (optimality, %)", "", *leader_table(records, models), *longer]
    for norm, title in NORMS.items():
        if any(c.norm == norm for _, c in records):
            text += ["", f"## {title}: global optimality", "", *global_table(records, models, norm)]
            text += ["", f"![Robust accuracy against radius]({curves(folder, records, models, norm).name})"]
    text += ["", "## Same names: ours over the peer's", "", *tally(made), "", *pair_table(made)]
    for model in models:
        for norm, title in NORMS.items():
            if here := _of(records, model, norm):
                text += ["", f"## {model}, {title}", "", *main_table(here)]
    folder.mkdir(exist_ok=True)
    (folder / "optimality.md").write_text("\n".join(text) + "\n", encoding="utf8")


NOTES = [
    "",
    "Ours in bold. *Median* and *reached* are over the smallest change among all inputs asked within the budget; *returned* is what the",
    "attack gave back, whatever it spent. A failure counts as infinite in medians. Forwards and backwards are rows per image over the",
    "whole run, also beyond the budget; a run is cut when every image has had twice its budget. CPU seconds are of one run on all",
    "images after a warm-up, without our bookkeeping, on a machine with other work: good to about 20 %. Ratios are ours over the",
    "peer's, below 1 in our favor, bold where not (1 % for distances). *Mean ratio*: over images that both sides changed. *CPU ratio*:",
    "each side in units of a bare forward and backward of the batch that was timed right before and after its run.",
]


def curves(folder: Path, records: Records, models: Sequence[str], norm: str) -> Path:
    """Robust accuracy against radius, one panel a network: the best of all, and the best six attacks of different names."""
    wide, high, per_row = 430, 250, 2
    panels = []
    for number, model in enumerate(models):
        if here := _of(records, model, norm):
            x, y = wide * (number % per_row), high * (number // per_row)
            panels.append(f'<g transform="translate({x} {y})">{_panel(model, here)}</g>')
    rows = -(-len(models) // per_row)
    style = "text{font:11px sans-serif;fill:#222}path{fill:none;stroke-width:1.4}.axis{stroke:#999;stroke-width:1}"
    box = f'viewBox="0 0 {wide * per_row} {high * rows}" width="{wide * per_row}" height="{high * rows}"'
    title = f"Robust accuracy against {NORMS[norm]} radius"
    path = folder / f"optimality-{norm}.svg"
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img"><title>{title}</title><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(panels)}</svg>\n',
        encoding="utf8",
    )
    return path


def _panel(model: str, records: dict[Contender, Record]) -> str:
    best = union(list(records.values()))
    top = 1.25 * reach(best) or 1.0
    ordered = sorted(records.items(), key=lambda item: -optimality(item[1].best, best))
    kinds: dict[str, tuple[Contender, Record]] = {}  # the best of each name
    for c, r in ordered:
        kinds.setdefault(c.same or c.attack, (c, r))
    lines = [("best of all", best, "#000", "4 3")]
    for (c, r), color in zip(kinds.values(), COLORS, strict=False):
        lines.append((f"{c.name.split(',')[0]} {100 * optimality(r.best, best):.1f} %", r.best, color, ""))
    parts = [f'<text x="40" y="14" font-weight="bold">{escape(model)}</text>', '<path class="axis" d="M40 22V212H240"/>']
    parts += [f'<text x="36" y="{216 - 190 * share:.0f}" text-anchor="end">{100 * share:.0f}</text>' for share in (0, 0.5, 1)]
    parts += [f'<text x="{40 + 200 * part:.0f}" y="227" text-anchor="middle">{top * part:.3g}</text>' for part in (0, 0.5, 1)]
    for number, (name, sizes, color, dash) in enumerate(reversed(lines)):
        parts.append(f'<path d="{_steps(sizes, top)}" stroke="{color}" stroke-dasharray="{dash}"/>')
        y = 34 + 15 * (len(lines) - 1 - number)
        parts.append(f'<path d="M248 {y - 4}H262" stroke="{color}" stroke-dasharray="{dash}"/><text x="266" y="{y}">{escape(name)}</text>')
    return "".join(parts)


def _steps(sizes: Floats, top: float) -> str:
    """A falling staircase from (0, 1), one step a sample."""
    inside, n = np.sort(sizes[sizes <= top]), len(sizes)
    corners = [f"H{40 + 200 * size / top:.1f}V{22 + 190 * (number + 1) / n:.1f}" for number, size in enumerate(inside)]
    return "M40 22" + "".join(corners) + "H240"
