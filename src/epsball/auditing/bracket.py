"""The lower end of the bracket: which of the samples that still stand nothing can break."""

from __future__ import annotations

import torch
from torch import Tensor

from epsball.auditing.results import Finding
from epsball.auditing.sheet import Sheet
from epsball.certify.bracket import Method, certify
from epsball.errors import BadInput
from epsball.threats import L0, L1, L2, Linf


def prove(sheet: Sheet, method: Method) -> None:
    """Fills in `Round.certified` for every norm, from the largest radius down: what holds there holds within smaller ones.

    Where the model has no bounds, a note says why and nothing is filled in.

    Cost: that of `certify` for every sample that still stands and is not proven yet, per radius.
    """
    subject = sheet.subject
    for spec in sheet.threats:
        if not isinstance(spec.threat, Linf | L2 | L1 | L0):
            continue
        proven = torch.zeros(len(subject.x), dtype=torch.bool)
        for current in reversed([r for r in sheet.rounds if r.threat == spec.name and r.finished]):
            rows = (sheet.standing(spec.name, current.radius) & ~proven).nonzero().squeeze(1)
            if len(rows):
                try:
                    found = certify(subject.victim, subject.x[rows], subject.y[rows], spec.threat, current.radius, method)
                except BadInput as why:
                    sheet.findings.append(Finding(id="certify", status="note", message=f"No certified bounds: {why}."))
                    return
                proven = proven.index_put((rows,), found.certified.cpu())
            current.certified = proven & sheet.standing(spec.name, current.radius)


def share(certified: Tensor | None) -> float | None:
    """Of all samples; None where nothing was asked for."""
    return None if certified is None else float(certified.double().mean())
