"""Re-checks a run from its evidence alone: one forward pass over the stored inputs, on any machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epsball.auditing.referee import Referee
from epsball.auditing.results import ModelReport, Rate
from epsball.auditing.statistics import rate
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
        lines = [*_lines(number, arrays, settings["rounds"], Referee(victim), told)]
        return lines if settings["name"] == told.name else [replace(line, follows=False) for line in lines]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        said = " ".join(str(error).split())[:120]
        raise BadInput(
            f"evidence: model '{told.name}' cannot be judged ({type(error).__name__}: {said}): "
            "the file is damaged or of another version, or this is another model; run the audit again"
        ) from error


def _lines(number: int, arrays: evidence.Arrays, rounds: list[dict[str, Any]], referee: Referee, told: ModelReport) -> Iterator[Line]:
    x = torch.from_numpy(evidence.expand(arrays[f"m{number}/x"]))
    y = torch.from_numpy(arrays[f"m{number}/y"])
    output = referee.outputs(x, as_goal(y))
    correct, invalid = ~as_goal(y).reached(output) & valid(output), int((~valid(output)).sum())
    clean = rate(int(correct.sum()), len(x), invalid)
    yield Line(told.name, "clean", "", told.clean_accuracy.count, clean.count, len(x), 0, _alike(told.clean_accuracy, clean))
    judged: dict[str, tuple[Tensor, Tensor, int]] = {}
    # By position: a line that was added, left out or renamed on one side finds no partner.
    for r, claim in zip_longest(rounds, told.results):
        if r is None or claim is None or (r["threat"], r["text"]) != (claim.threat, claim.radius_text):
            threat, text = (claim.threat, claim.radius_text) if claim is not None else (r["threat"], r["text"])
            yield Line(told.name, threat, text, claim.robust_accuracy.count if claim else None, None, len(x), 0, False)
            continue
        if claim.threat not in judged:
            texts = [one["text"] for one in rounds if one["threat"] == claim.threat]
            judged[claim.threat] = _broken_at(number, parse_threat(f"{claim.threat}:{','.join(texts)}"), arrays, referee, x, y)
        broken_at, invalid_at, rejected = judged[claim.threat]
        standing = correct & (broken_at > r["radius"])
        unsure = int((standing & (invalid_at <= r["radius"])).sum())
        seen = rate(int(standing.sum()) - unsure, len(x), unsure + invalid)
        follows = claim.radius == r["radius"] and _alike(claim.robust_accuracy, seen)
        yield Line(told.name, claim.threat, r["text"], claim.robust_accuracy.count, seen.count, len(x), rejected, follows)


def _alike(claimed: Rate, seen: Rate) -> bool:
    """Equal but for the last digits, in which other machines compute intervals differently."""
    pairs = zip(claimed.model_dump().values(), seen.model_dump().values(), strict=True)
    return all(abs(a - b) <= 1e-9 for a, b in pairs)


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
