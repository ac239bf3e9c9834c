"""Re-checks a run from its evidence alone: one forward pass over the stored inputs, on any machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epsball.auditing.referee import Referee
from epsball.auditing.results import ModelReport, Place, Rate, Result
from epsball.auditing.statistics import rate
from epsball.auditing.union import UNION, Places
from epsball.auditing.verdict import of_all
from epsball.core import Victim, as_goal, valid
from epsball.errors import BadInput
from epsball.store import evidence
from epsball.threats import ThreatSpec, is_input, parse_threat


@dataclass(frozen=True)
class Line:
    """One claim and what a fresh look says.

    Attributes:
        model, threat, radius: what was claimed about ("clean" as the threat for clean accuracy). claimed, seen: samples that
            stand, of `n`; None where only one side knows the claim. rejected: stored inputs that do not break the model, or
            are outside radius or box. follows: radius, rate and interval in the report follow from what was seen.
    """

    model: str
    threat: str
    radius: str
    claimed: int | None
    seen: int | None
    n: int
    rejected: int
    follows: bool

    @property
    def holds(self) -> bool:
        """The fresh look agrees with the report."""
        return self.rejected == 0 and self.claimed == self.seen and self.follows


def check_model(number: int, arrays: evidence.Arrays, settings: dict[str, Any], victim: Victim, told: ModelReport) -> list[Line]:
    """Judges model `number` of the evidence.

    Args:
        arrays, settings: as read from the evidence file and its header. victim: the model, loaded afresh. told: the report.

    Raises:
        BadInput: the evidence lacks a part, or the model cannot read it.
    """
    try:
        lines = [*_lines(number, arrays, settings, Referee(victim, draws=settings.get("draws", 1)), told)]
        return lines if settings["name"] == told.name else [replace(line, follows=False) for line in lines]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        said = " ".join(str(error).split())[:120]
        raise BadInput(
            f"evidence: model '{told.name}' cannot be judged ({type(error).__name__}: {said}): "
            "the file is damaged or of another version, or this is another model; run the audit again"
        ) from error


@dataclass(frozen=True)
class _Seen:
    """What a fresh look at one model's evidence found.

    Attributes:
        correct, invalid: (N,) bool, of the clean answers. broken: by threat (broken_at, invalid_at, rejected), as from `_broken_at`.
    """

    correct: Tensor
    invalid: Tensor
    broken: dict[str, tuple[Tensor, Tensor, int]]

    def counted(self, places: Sequence[Place]) -> tuple[int, int]:
        """Samples that stand for sure at all of the places, and those of unknown outcome."""
        stands, unsure = self.correct, torch.zeros_like(self.correct)
        for place in places:
            broken_at, invalid_at, _ = self.broken[place.threat]
            stands, unsure = stands & (broken_at > place.radius), unsure | (invalid_at <= place.radius)
        return int((stands & ~unsure).sum()), int((stands & unsure).sum()) + int(self.invalid.sum())

    def rejected(self, places: Sequence[Place]) -> int:
        """Stored inputs that do not break the model, under any of the threats."""
        return sum(self.broken[place.threat][2] for place in places)


def _lines(number: int, arrays: evidence.Arrays, settings: dict[str, Any], referee: Referee, told: ModelReport) -> Iterator[Line]:
    x = torch.from_numpy(evidence.expand(arrays[f"m{number}/x"]))
    y = torch.from_numpy(arrays[f"m{number}/y"])
    n, kind, population = len(x), settings.get("interval", "clopper-pearson"), settings.get("population")
    output = referee.outputs(x, as_goal(y))
    seen = _Seen(~as_goal(y).reached(output) & valid(output), ~valid(output), {})
    count, unknown = seen.counted(())
    clean = rate(count, n, unknown, interval=kind)
    follows = _alike(told.clean_accuracy, clean) and told.population == population
    yield Line(told.name, "clean", "", told.clean_accuracy.count, count, n, 0, follows)
    rounds = [Place(threat=r["threat"], radius=r["radius"], radius_text=r["text"]) for r in settings["rounds"]]
    # By position: a line that was added, left out or renamed on one side finds no partner.
    for known, claim in zip_longest(_claims(rounds, settings.get("unions", [])), told.results):
        if known is None or claim is None or known[:2] != (claim.threat, claim.radius_text):
            threat, text = (claim.threat, claim.radius_text) if claim is not None else known[:2]
            yield Line(told.name, threat, text, claim.robust_accuracy.count if claim else None, None, n, 0, False)
            continue
        threat, text, places = known
        for name in {place.threat for place in places} - set(seen.broken):
            spec = parse_threat(f"{name}:{','.join(one.radius_text for one in rounds if one.threat == name)}")
            seen.broken[name] = _broken_at(number, spec, arrays, referee, x, y)
        count, unknown = seen.counted(places)
        follows = _alike(claim.robust_accuracy, rate(count, n, unknown, interval=kind)) and _belongs(claim, places)
        follows = follows and _alike(claim.whole_data, of_all(count, n, unknown, kind, population))
        yield Line(told.name, threat, text, claim.robust_accuracy.count, count, n, seen.rejected(places), follows)


def _claims(rounds: Sequence[Place], unions: Sequence[str]) -> Iterator[tuple[str, str, Places]]:
    """Threat, radius and places of everything that the run made a claim about."""
    for place in rounds:
        yield place.threat, place.radius_text, (place,)
    for text in unions:
        named = [part.partition(":")[::2] for part in text.split("|")]
        yield UNION, text, tuple(next(p for p in rounds if (p.threat, p.radius_text) == name) for name in named)


def _belongs(claim: Result, places: Places) -> bool:
    """The claim is about these places."""
    return tuple(claim.union) == places if claim.threat == UNION else claim.radius == places[0].radius and not claim.union


def _alike(claimed: Rate | None, seen: Rate | None) -> bool:
    """Equal but for the last digits, in which other machines compute intervals differently."""
    if claimed is None or seen is None:
        return claimed is seen
    ends = ((claimed.value, seen.value), (claimed.low, seen.low), (claimed.high, seen.high))
    same = (claimed.count, claimed.n, claimed.unknown, claimed.interval) == (seen.count, seen.n, seen.unknown, seen.interval)
    return same and all(abs(a - b) <= 1e-9 for a, b in ends)


def _broken_at(
    number: int, spec: ThreatSpec, arrays: evidence.Arrays, referee: Referee, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, int]:
    """(N,) smallest radius at which each sample is shown broken, (N,) at which the model gave no answer, and how many claims failed."""

    def stored(name: str) -> Tensor:
        return torch.from_numpy(np.array(arrays[f"m{number}/{spec.name}/{name}"]))

    rows, x_adv, radius, invalid_at = (stored(name) for name in ("rows", "x_adv", "radius", "invalid"))
    broken_at = torch.full((len(x),), torch.inf, dtype=torch.float64)
    if not len(rows):
        return broken_at, invalid_at, 0
    threat = spec.threat
    ruling = referee.judge(x[rows], x_adv, as_goal(y[rows]), threat, radius, None if is_input(threat) else stored("z"))
    broken_at[rows[ruling.broken]] = radius[ruling.broken]
    return broken_at, invalid_at, int((~ruling.broken).sum())
