"""Re-checks a run from its evidence alone: one forward pass over the stored inputs, on any machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epsball.auditing.referee import Referee
from epsball.core import Victim, as_goal, valid
from epsball.errors import BadInput
from epsball.store import evidence


@dataclass(frozen=True)
class Line:
    """One claim and what a fresh look says.

    Attributes:
        model, threat, radius: what was claimed about ("clean" as the threat for clean accuracy). claimed, seen: samples that
            stand, of `n`. rejected: stored inputs that do not break the model, or are outside radius or box.
    """

    model: str
    threat: str
    radius: str
    claimed: int | None
    seen: int
    n: int
    rejected: int

    @property
    def holds(self) -> bool:
        """The fresh look agrees with the report."""
        return self.rejected == 0 and (self.claimed is None or self.claimed == self.seen)


def check_model(
    number: int, arrays: evidence.Arrays, header: dict[str, Any], victim: Victim, claims: dict[tuple[str, str], int]
) -> list[Line]:
    """Judges model `number` of the evidence.

    Args:
        arrays, header: as read from the evidence file. victim: the model, loaded afresh.
        claims: samples that stand by (threat, radius text), ("clean", "") for clean accuracy, as the report says.

    Raises:
        BadInput: the evidence lacks a part, or the model cannot read it.
    """
    settings = header["models"][number]
    try:
        x = torch.from_numpy(evidence.expand(arrays[f"m{number}/x"]))
        y = torch.from_numpy(arrays[f"m{number}/y"])
        referee = Referee(victim)
        output = referee.outputs(x)
        goal = as_goal(y)
        correct = ~goal.reached(output) & valid(output)
        lines = [Line(settings["name"], "clean", "", claims.get(("clean", "")), int(correct.sum()), len(x), 0)]
        judged: dict[str, tuple[Tensor, int]] = {}
        for r in settings["rounds"]:
            threat = r["threat"]
            if threat not in judged:
                judged[threat] = _broken_at(number, threat, arrays, referee, x, y)
            broken_at, rejected = judged[threat]
            stands = int((correct & (broken_at > r["radius"])).sum())
            lines.append(Line(settings["name"], threat, r["text"], claims.get((threat, r["text"])), stands, len(x), rejected))
    except KeyError as error:
        raise BadInput(f"evidence: has no {error}: the file is damaged or from another version; run the audit again") from error
    return lines


def _broken_at(number: int, threat: str, arrays: evidence.Arrays, referee: Referee, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """(N,) smallest radius at which each sample is shown broken, infinite where it is not; and how many claims failed."""
    rows, x_adv, radius = (torch.from_numpy(np.array(arrays[f"m{number}/{threat}/{name}"])) for name in ("rows", "x_adv", "radius"))
    broken_at = torch.full((len(x),), torch.inf, dtype=torch.float64)
    if not len(rows):
        return broken_at, 0
    ruling = referee.judge(x[rows], x_adv, as_goal(y[rows]), threat, radius)
    broken_at[rows[ruling.broken]] = radius[ruling.broken]
    return broken_at, int((~ruling.broken).sum())
