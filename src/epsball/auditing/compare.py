"""Two audited models side by side on the same samples, from reports and evidence alone. No model is touched."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from epsball.auditing.results import ModelReport, Place, Report, Result
from epsball.auditing.statistics import holm, mcnemar, paired_difference
from epsball.errors import BadInput
from epsball.store.evidence import Arrays, expand

Array = np.ndarray[Any, Any]
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Side:
    """One model of a finished run: the run's folder and effort, what the report says of it, and the arrays of its evidence."""

    folder: str
    effort: str
    told: ModelReport
    arrays: Arrays
    prefix: str

    def array(self, name: str) -> Array:
        """One array of this model's evidence.

        Raises:
            BadInput: the evidence lacks it.
        """
        found = self.arrays.get(f"{self.prefix}/{name}")
        if found is None:
            raise BadInput(f"evidence of {self.folder}: has no '{self.prefix}/{name}': an older epsball wrote it; run the audit again")
        return found

    def ids(self) -> list[tuple[bytes, int]]:
        """Each sample's content, and which copy of it this is."""
        x, y = expand(self.array("x")), self.array("y")
        copies: Counter[bytes] = Counter()
        found = []
        for one, label in zip(x, y, strict=True):
            content = hashlib.blake2b(one.tobytes() + label.tobytes() + str(one.shape).encode(), digest_size=16).digest()
            found.append((content, copies[content]))
            copies[content] += 1
        return found

    def correct(self) -> Array:
        """(N,) bool: right and finite on the clean input."""
        return self._checked(self.array("correct"), self.told.clean_accuracy.count, "clean accuracy")

    def stands(self, result: Result) -> Array:
        """(N,) bool: correct, no adversarial input within the radius, and no NaN or infinite answer met there."""
        stands = self.array("correct")
        for place in result.union or [Place(threat=result.threat, radius=result.radius, radius_text=result.radius_text)]:
            broken_at = np.full(len(stands), np.inf)
            broken_at[self.array(f"{place.threat}/rows")] = self.array(f"{place.threat}/radius")
            stands = stands & (broken_at > place.radius) & ~(self.array(f"{place.threat}/invalid") <= place.radius)
        return self._checked(stands, result.robust_accuracy.count, f"{result.threat}:{result.radius_text}")

    def _checked(self, stands: Array, claimed: int, what: str) -> Array:
        if int(stands.sum()) != claimed:
            raise BadInput(
                f"run {self.folder}: the report counts {claimed} samples for {what}, the evidence {int(stands.sum())}: "
                "they are not of one run; run the audit again"
            )
        return stands


@dataclass(frozen=True)
class Row:
    """Both models under one threat at one radius, on the samples that both were audited on.

    Attributes:
        threat, radius, radius_text: as in the report; "clean", 0 and "" for clean accuracy. a, b: accuracies.
        difference, low, high: b - a with its 95 % score interval. only_a, only_b: samples that stand under one model alone.
        p: exact McNemar. p_adjusted: the same, adjusted for all radii by Holm's rule. trustworthy: in both reports.
    """

    threat: str
    radius: float
    radius_text: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    p: float
    p_adjusted: float
    trustworthy: bool

    @property
    def worse(self) -> bool:
        """B is worse than A, at 5 % over all radii of the comparison together."""
        return self.only_a > self.only_b and self.p_adjusted <= SIGNIFICANT


@dataclass(frozen=True)
class Comparison:
    """Model `a` and model `b`.

    Attributes:
        paired: samples that both were audited on. clean: clean accuracy. rows: every threat and radius that both were audited at.
        notes: what a reader must know, a sentence each.
    """

    a: str
    b: str
    paired: int
    clean: Row
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def worse(self) -> bool:
        """B is significantly worse at some radius, or some number may not be believed."""
        return any(row.worse or not row.trustworthy for row in self.rows)


def side(folder: str, report: Report, arrays: Arrays, name: str | None, option: str) -> Side:
    """The model called `name` of a run; None where it has one only.

    Raises:
        BadInput: no such model, or one has to be named by `option`.
    """
    names = [model.name for model in report.models]
    if name is None and len(names) != 1:
        raise BadInput(f"{option}: needed, run {folder} has {len(names)} models: give one of {', '.join(names)}")
    if name is not None and name not in names:
        raise BadInput(f"{option} '{name}': not in run {folder}: give one of {', '.join(names)}")
    number = 0 if name is None else names.index(name)
    return Side(folder, report.effort, report.models[number], arrays, f"m{number}")


def compare(a: Side, b: Side) -> Comparison:
    """Pairs the samples of two audits and asks whether the models differ.

    Samples are paired by content: input and label, the k-th copy with the k-th copy. A sample stands where its clean answer is right, the
    evidence holds no adversarial input within the radius, and no answer there was NaN or infinite.

    Args:
        a, b: audited models, as from `side`.

    Returns:
        Rates, differences with Tango's interval, discordant counts, and the exact McNemar test, adjusted over all radii.

    Raises:
        BadInput: efforts or data differ, no radius is shared, or a report contradicts its evidence.
    """
    if a.effort != b.effort:
        raise BadInput(
            f"effort: {a.effort} in {a.folder}, {b.effort} in {b.folder}: "
            "a difference could be the attacks': audit both with the same --effort"
        )
    try:
        return _compare(a, b)
    except (IndexError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:120]
        raise BadInput(f"evidence of {a.folder} or {b.folder}: damaged ({type(error).__name__}: {said}): run the audit again") from error


def _compare(a: Side, b: Side) -> Comparison:
    rows_a, rows_b = _paired(a.ids(), b.ids())
    if not len(rows_a):
        raise BadInput(f"data: {a.folder} and {b.folder} share no sample: audit both on the same --data with the same --seed and --n")
    shared = list(_shared(a.told, b.told))
    if not shared:
        raise BadInput(f"threats: {_audited(a.told)} in {a.folder}, {_audited(b.told)} in {b.folder}: audit both at the same radii")
    found = [
        _row(one.threat, one.radius, one.radius_text, a.stands(one)[rows_a], b.stands(two)[rows_b], _told(one) and _told(two))
        for one, two in shared
    ]
    rows = tuple(replace(row, p_adjusted=p) for row, p in zip(found, holm([row.p for row in found]), strict=True))
    clean = _row("clean", 0.0, "", a.correct()[rows_a], b.correct()[rows_b], trustworthy=True)
    return Comparison(a.told.name, b.told.name, len(rows_a), clean, rows, tuple(_notes(a, b, len(rows_a), rows)))


def _paired(first: list[tuple[bytes, int]], second: list[tuple[bytes, int]]) -> tuple[Array, Array]:
    """Rows of the samples that both have, in the order of the first."""
    places = {sample: row for row, sample in enumerate(second)}
    pairs = [(row, places[sample]) for row, sample in enumerate(first) if sample in places]
    return np.array([row for row, _ in pairs], dtype=np.int64), np.array([row for _, row in pairs], dtype=np.int64)


def _same(one: Result, two: Result) -> bool:
    """The same threat at the same radius; radii of compositions and unions must agree part by part, so their texts must too."""
    alike = abs(one.radius - two.radius) <= 1e-9 * max(1.0, abs(one.radius))
    whole = "+" not in one.threat and not one.union
    return one.threat == two.threat and alike and (whole or one.radius_text == two.radius_text)


def _told(result: Result) -> bool:
    """The number may be believed, and all attacks of its plan ran."""
    return result.trustworthy and not result.early


def _shared(a: ModelReport, b: ModelReport) -> Iterator[tuple[Result, Result]]:
    yield from ((one, two) for one in a.results for two in b.results if _same(one, two))


def _audited(model: ModelReport) -> str:
    return " ".join(f"{result.threat}:{result.radius_text}" for result in model.results) or "none"


def _row(threat: str, radius: float, text: str, a: Array, b: Array, trustworthy: bool) -> Row:
    only_a, only_b, n = int((a & ~b).sum()), int((b & ~a).sum()), len(a)
    low, high = paired_difference(only_b, only_a, n)
    p = mcnemar(only_a, only_b)
    return Row(threat, radius, text, float(a.mean()), float(b.mean()), (only_b - only_a) / n, low, high, only_a, only_b, p, p, trustworthy)


def _notes(a: Side, b: Side, paired: int, rows: tuple[Row, ...]) -> Iterator[str]:
    if paired < max(a.told.n, b.told.n):
        yield f"Only the {paired:,} samples that both were audited on are compared (A {a.told.n:,}, B {b.told.n:,})."
    left = [
        *({r.threat + ":" + r.radius_text for r in (*a.told.results, *b.told.results)} - {r.threat + ":" + r.radius_text for r in rows})
    ]
    if left:
        yield f"Audited for one model only and left out: {' '.join(sorted(left))}."
    hidden = [name for name, one in (("A", a), ("B", b)) if any(finding.id == "black-box" for finding in one.told.findings)]
    if len(hidden) == 1:
        yield f"{hidden[0]} was attacked without gradients, the other with them: a difference could be the attacks'."
    untrusted = [f"{row.threat}:{row.radius_text}" for row in rows if not row.trustworthy]
    if untrusted:
        yield f"Not trustworthy yet, or cut short, as the runs' own reports say: {' '.join(untrusted)}."
