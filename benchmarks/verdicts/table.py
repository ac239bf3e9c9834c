"""The verdict on each verdict, and the tables."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from scipy.stats import beta

from verdicts.case import CAUSES, Case
from verdicts.stages import Result

Row = dict[str, Result | None]
SLACK = 0.02
"""How far above the true number an audited one may lie."""


@dataclass(frozen=True)
class Verdict:
    """Right where there is nothing against it; None where a number is missing."""

    right: bool | None
    against: tuple[str, ...] = ()


def share(result: Result, n: int | None = None) -> float:
    """Of the first n samples that stand."""
    stands = result["stands"][:n]
    return sum(stands) / len(stands)


def verdict(case: Case, row: Row) -> Verdict:
    """(a) The audited number is at most 2 points above the true one. (b) A masked defense has a flag or a finding that names the cause;
    a control has no warning, and stands for at most one sample more than under AutoAttack."""
    audit, true, official = row["audit"], row["true"], row["official"]
    if audit is None or true is None or (case.kind == "control" and official is None):
        return Verdict(None)
    if audit["stands"] is None:
        return Verdict(False, (f"raises {audit['raised']}",))
    against = []
    if share(audit) > share(true) + SLACK + 1e-9:
        against.append(f"{100 * (share(audit) - share(true)):.0f} points too high")
    if case.kind == "masked" and not CAUSES[case.cause] & said(audit):
        against.append("cause not named")
    if case.kind == "control" and official is not None:
        loud = [flag["id"] for flag in audit["flags"] if flag["severity"] != "info"]
        loud += [finding["id"] for finding in audit["findings"] if finding["status"] in ("warn", "block")]
        against += [f"warns: {', '.join(sorted(set(loud)))}"] if loud else []
        n = len(official["stands"])
        more = sum(audit["stands"][:n]) - sum(official["stands"])
        against += [f"{more} samples more than AutoAttack"] if more > 1 else []
    return Verdict(not against, tuple(against))


def said(audit: Result) -> set[str]:
    """Ids of flags and of findings that did not simply pass."""
    return {one["id"] for one in (*audit["flags"], *audit["findings"])}


def clopper_pearson(count: int, n: int) -> tuple[float, float]:
    """Exact two-sided 95 % interval of a share."""
    low = beta.ppf(0.025, count, n - count + 1) if count else 0.0
    return float(low), float(beta.ppf(0.975, count + 1, n - count)) if count < n else 1.0


def percent(result: Result | None, n: int | None = None, bounds: bool = True) -> str:
    """As in `12.0 [6.4, 20.0]`; a dash where there is none."""
    if result is None or result["stands"] is None:
        return "-" if result is None else "raises"
    stands = result["stands"][:n]
    low, high = clopper_pearson(sum(stands), len(stands))
    value = f"{100 * share(result, n):.0f}" + (f" [{100 * low:.0f}, {100 * high:.0f}]" if bounds else "")
    return value + (" (old)" if result["stale"] else "")


def spoken(audit: Result | None) -> str:
    """Flags by id and severity, then findings."""
    if audit is None:
        return "-"
    flags = list(dict.fromkeys(f"{flag['id']} ({flag['severity']})" for flag in audit["flags"]))
    known = {flag["id"] for flag in audit["flags"]}
    return ", ".join([*flags, *(f"{one['id']}: {one['status']}" for one in audit["findings"] if one["id"] not in known)]) or "none"


def cost(result: Result | None) -> str:
    """Rows forward, rows backward, CPU seconds."""
    if result is None or "forwards" not in result:
        return "- | - | -"
    return f"{result['forwards']:,} | {result['backwards']:,} | {result['seconds']:.1f}"


def best_official(row: Row) -> Result | None:
    """The lower of AutoAttack's two versions."""
    ran = [found for found in (row["official"], row.get("rand")) if found is not None]
    return min(ran, key=lambda found: 2.0 if found["stands"] is None else share(found), default=None)


def numbers(cases: list[tuple[Case, Row]]) -> list[str]:
    """The table of verdicts."""
    lines = [
        "| case | kind | Linf | clean | naive | true | audited | trusted | flags and findings | AutoAttack | rand | n of AA "
        "| verdict | first sight |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, row in cases:
        found, audit, official, rand = verdict(case, row), row["audit"], row["official"], row.get("rand")
        clean = "-" if row["naive"] is None else f"{100 * row['naive']['clean'] / len(row['naive']['stands']):.0f}"
        word = "missing" if found.right is None else "right" if found.right else "wrong: " + "; ".join(found.against)
        cells = [case.name, case.kind, f"{case.radius:g}", clean, percent(row["naive"], bounds=False), percent(row["true"])]
        cells += [percent(audit), "-" if audit is None else "yes" if audit["trustworthy"] else "no", spoken(audit)]
        cells += [percent(official, bounds=False), percent(rand, bounds=False)]
        cells += ["-" if official is None or official["stands"] is None else str(len(official["stands"])), word, case.held or "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def costs(cases: list[tuple[Case, Row]]) -> list[str]:
    """The table of costs."""
    lines = [
        "| case | audit: forwards | backwards | CPU s | AutoAttack: forwards | backwards | CPU s "
        "| rand: forwards | backwards | CPU s | CPU s of true |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, row in cases:
        true = row["true"]
        seconds = "-" if true is None else f"{true['seconds']:.1f}"
        lines.append(f"| {case.name} | {cost(row['audit'])} | {cost(row['official'])} | {cost(row.get('rand'))} | {seconds} |")
    return lines


def notes(cases: list[tuple[Case, Row]]) -> list[str]:
    """What each case is, and what AutoAttack said about it."""
    lines = []
    for case, row in cases:
        heard = sorted({line for stage in ("official", "rand") for line in (row.get(stage) or {}).get("said", [])})
        words = f" AutoAttack: {'; '.join(heard)}." if heard else ""
        true = row.get("true") or {}
        if "spared" in true:
            words = f" Where it counts as not broken, {true['spared']} of {len(true['stands'])} stand under the same attacks.{words}"
        lines.append(f"- {case.name}: {case.paper}. {case.note[:1].upper() + case.note[1:] + '.' if case.note else ''}{words}")
    return lines


def summary(cases: list[tuple[Case, Row]]) -> str:
    """k of N right, and how many of those held out, now and at first sight."""
    held = [(case, row) for case, row in cases if case.held]
    first = [case.held for case, _ in held].count("right")
    return f"{counted(cases)}; of {len(held)} held out {first} at first sight, {counted(held)} now"


def counted(cases: list[tuple[Case, Row]]) -> str:
    """k of N right."""
    words = [verdict(case, row).right for case, row in cases]
    missing = words.count(None)
    return f"{words.count(True)} of {len(words) - missing} right" + (f", {missing} not run" if missing else "")


def printed(line: Callable[[str], str], names: list[str], jobs: int) -> list[str]:
    """The line of each name, worked out in so many processes side by side and printed as it comes."""
    lines = []
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for one in pool.map(line, names):
            lines.append(one)
            print(one, flush=True)
    return lines
