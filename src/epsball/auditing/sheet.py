"""The working sheet of one model's audit: what is known so far, valid at every moment, so that Ctrl-C loses nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from epsball.auditing.react import Sight
from epsball.auditing.results import AttackRow, Finding, Flag, Interval, Place, Stopped
from epsball.core import Access, Goal, Projects, Victim, as_goal, content_ids, valid
from epsball.store.evidence import Arrays, compact
from epsball.threats import ThreatSpec


@dataclass(frozen=True)
class Subject:
    """A model and the data that it is audited on.

    Attributes:
        victim: the model. x: (N, ...) inputs in random order. y: (N,) or (N, C) labels. index: (N,) places in the source.
        data: name of the data. source: how the model can be loaded again, JSON-safe. class_names: may be empty.
        normalization: (mean, std) that the adapter applies, if any. notes: what was done on the way in.
        population: size of the data set that the samples were drawn from, where it is known.
    """

    victim: Victim
    x: Tensor
    y: Tensor
    index: Tensor
    data: str
    source: Mapping[str, Any]
    class_names: tuple[str, ...] = ()
    normalization: tuple[Tensor, Tensor] | None = None
    notes: tuple[str, ...] = ()
    population: int | None = None

    @property
    def goal(self) -> Goal:
        """Untargeted, or any change of the label set."""
        return as_goal(self.y)

    @property
    def order(self) -> Tensor:
        """(N,) the samples in the order of their content hashes: random, but the same however the data is sorted."""
        return content_ids(self.x).argsort(stable=True)


@dataclass
class Hits:
    """The confirmed adversarial inputs under one threat: at most one per sample, found at the smallest radius asked.

    Attributes:
        radius: (N,) float64, infinite where the sample stands. x_adv: (N, ...), the clean input where it stands.
        size: (N,) float64. predicted: (N,) class answered. invalid: (N,) float64, the smallest radius at which the search
            met a NaN or infinite answer; infinite where it met none.
        near: (N,) float64, the smallest margin that searches came down to, as a share of the clean one; 1 before any. rival: (N,) the class
            (of many labels: the label) that came nearest there; -1 before any.
        closest: row -> (share, (...)): how near, and where, searches under L1 came since the last that went on from there.
        z: row -> (...) the adversary's variable, for threats where it is not the input; else empty.
    """

    radius: Tensor
    x_adv: Tensor
    size: Tensor
    predicted: Tensor
    invalid: Tensor
    near: Tensor
    rival: Tensor
    closest: dict[int, tuple[float, Tensor]] = field(default_factory=dict)
    z: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def none(x: Tensor) -> Hits:
        """Everything stands."""
        n = len(x)
        return Hits(
            radius=torch.full((n,), torch.inf, dtype=torch.float64),
            x_adv=x.clone(),
            size=torch.zeros(n, dtype=torch.float64),
            predicted=torch.full((n,), -1, dtype=torch.int64),
            invalid=torch.full((n,), torch.inf, dtype=torch.float64),
            near=torch.ones(n, dtype=torch.float64),
            rival=torch.full((n,), -1, dtype=torch.int64),
        )

    def revoke(self, rows: Tensor) -> None:
        """The referee no longer confirms these (K,): they stand again."""
        self.radius[rows] = torch.inf


@dataclass
class Round:
    """One threat at one radius: what was run, what it cost, and which samples (N,) are proven to stand, if anybody asked.

    `planned` and `ran` count attacks; `asked` is the most rows per sample that those that ran could cost, and `late` the samples that
    broke after more than half of the queries of a model without gradients. `beyond` counts those that broke only by searches
    that do not follow the model's own gradients. `unfunded`: there were no rows left for the last attack.
    """

    threat: str
    radius: float
    text: str
    planned: int = 0
    ran: int = 0
    asked: int = 0
    late: int = 0
    beyond: int = 0
    unfunded: bool = False
    attacks: list[AttackRow] = field(default_factory=list)
    flags: list[Flag] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False
    certified: Tensor | None = None


@dataclass
class Sheet:
    """Everything known about one model so far.

    Attributes:
        sight: how searches with gradients look at the model. queries: most rows that searches without may ask per sample and radius.
        pace: seconds that one row forward takes.
        unions: threats that a sample has to withstand at once, by the places where its hits are known.
        interval: kind of the intervals of its rates. stopped: why it ended early, if it did.
    """

    subject: Subject
    clean: Tensor
    findings: list[Finding]
    threats: tuple[ThreatSpec, ...]
    hits: dict[str, Hits]
    rounds: list[Round]
    queries: int
    pace: float
    sight: Sight
    rounded: dict[str, Tensor] = field(default_factory=dict)
    unions: tuple[tuple[Place, ...], ...] = ()
    interval: Interval = "clopper-pearson"
    stopped: Stopped | None = None

    @staticmethod
    def start(
        subject: Subject,
        clean: Tensor,
        findings: list[Finding],
        threats: tuple[ThreatSpec, ...],
        queries: int,
        pace: float,
        sight: Sight | None = None,
    ) -> Sheet:
        """Nothing attacked yet."""
        hits = {spec.name: Hits.none(subject.x) for spec in threats}
        rounds = [Round(spec.name, r, t) for spec in threats for r, t in zip(spec.radii, spec.texts, strict=True)]
        return Sheet(subject, clean, findings, threats, hits, rounds, queries, pace, sight or Sight(subject.victim))

    @property
    def shown(self) -> bool:
        """The victim shows gradients, dead or alive."""
        return self.subject.victim.access is Access.GRADIENT

    def found(self, *names: str) -> bool:
        """A check of one of these names blocked."""
        return any(f.id in names and f.status == "block" for f in self.findings)

    @property
    def correct(self) -> Tensor:
        """(N,) bool: right and finite on the clean input."""
        return ~self.subject.goal.reached(self.clean) & valid(self.clean)

    def threat(self, name: str) -> Projects:
        """The threat of that name, made anew from its string."""
        return next(spec.threat for spec in self.threats if spec.name == name)

    def standing(self, threat: str, radius: float) -> Tensor:
        """(N,) bool: correct, and not known to be broken within the radius."""
        return self.correct & (self.hits[threat].radius > radius)

    def unsure(self, threat: str, radius: float) -> Tensor:
        """(N,) bool: standing, but the model gave no finite answer somewhere within the radius."""
        return self.standing(threat, radius) & (self.hits[threat].invalid <= radius)

    def arrays(self, prefix: str) -> Arrays:
        """The evidence of this model, as stored."""
        out: Arrays = {
            f"{prefix}/x": compact(self.subject.x.cpu().numpy()),
            f"{prefix}/y": self.subject.y.cpu().numpy(),
            f"{prefix}/index": self.subject.index.cpu().numpy(),
            f"{prefix}/correct": self.correct.cpu().numpy(),
        }
        for threat, hits in self.hits.items():
            rows = torch.isfinite(hits.radius).nonzero().squeeze(1)
            columns = {"x_adv": hits.x_adv, "radius": hits.radius, "size": hits.size, "predicted": hits.predicted}
            out[f"{prefix}/{threat}/rows"] = rows.numpy()
            out[f"{prefix}/{threat}/invalid"] = hits.invalid.numpy()
            out |= {f"{prefix}/{threat}/{name}": column[rows].cpu().numpy() for name, column in columns.items()}
            if hits.z and len(rows):
                out[f"{prefix}/{threat}/z"] = torch.stack([hits.z[row] for row in rows.tolist()]).numpy()
        return out
