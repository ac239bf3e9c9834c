"""What an audit found, as plain data: the only thing that reports read. No tensor and no model in here.

Written to `report.json`; `Report.model_json_schema()` is its documented schema (`docs/report.schema.json`).
All rates are fractions in [0, 1]; all intervals are two-sided and hold with 95 %, those of classes widened so that all classes of
a list hold at once. `Rate.interval` says of which kind they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1
EARLY = ("budget", "gate")
"""Flags of results whose attacks ended before their plan did, on purpose."""
Interval = Literal["clopper-pearson", "at-any-time", "finite-population"]


class Plain(BaseModel):
    """Base of every result: unknown fields are an error, so that a report never silently loses one."""

    model_config = ConfigDict(extra="forbid")


class Rate(Plain):
    """`count` of `n` samples. The interval covers sampling error; samples of unknown outcome widen it to both sides."""

    value: float
    low: float
    high: float
    count: int
    n: int
    unknown: int = Field(default=0, description="samples without a finite answer: not in count, but in the high end of the interval")
    interval: Interval = Field(
        default="clopper-pearson",
        description="clopper-pearson: n was chosen beforehand; at-any-time: samples were added until enough was known, which it allows "
        "for; finite-population: of a whole data set of which n samples were drawn",
    )
    population: int | None = Field(default=None, description="of a finite population: its size")


class Flag(Plain):
    """Something that a reader must know before believing a number. `block` takes the headline away."""

    id: str = Field(description="stable name of the check, for example zero-gradient")
    severity: Literal["block", "warn", "info"]
    message: str = Field(description="one sentence: what was seen, with its figure")
    fix: str = Field(default="", description="one sentence: what to do about it")


class Finding(Plain):
    """One line of the preflight contract check."""

    id: str
    status: Literal["pass", "note", "mended", "warn", "block"]
    message: str


class AttackRow(Plain):
    """One stage of the cascade, on the samples that had survived all stages before it."""

    name: str
    recipe: str = Field(description="repr of the attack: its full settings")
    tried: int
    broken: int = Field(description="samples that the referee confirmed as broken by this stage")
    forwards: int
    backwards: int
    seconds: float


class ClassRate(Plain):
    """Accuracy of one class. The intervals of all classes of a list hold at once with 95 %."""

    label: int
    name: str
    rate: Rate


class Place(Plain):
    """One threat at one radius."""

    threat: str
    radius: float
    radius_text: str


class Stopped(Plain):
    """Why the audit of a model ended before its plan did, and what that saved."""

    reason: Literal["seconds", "forwards", "width", "gate"]
    message: str = Field(description="one sentence, with its figures")
    samples: int = Field(description="samples that count")
    of: int = Field(description="samples that were there")
    forwards: int = Field(description="rows forward of all attacks and checks")
    planned: int = Field(description="about the most rows forward that the attacks of the whole plan could have cost")


class Result(Plain):
    """The verdict for one threat at one radius: robust accuracy is at most `robust_accuracy`."""

    threat: str = Field(description="name as in threat strings: linf, l2, l1, l0 (pixels), l0f (features), flow, ..., color+linf; or union")
    radius: float = Field(description="in the threat's own unit; of a composition, that of its first part; of a union, its number from 1")
    radius_text: str = Field(description="as the user wrote it, for example 8/255, 0.06+8/255 of a composition, linf:0.1|l2:1 of a union")
    robust_accuracy: Rate
    certified_accuracy: float | None = Field(default=None, description="lower bound, where one could be computed")
    trustworthy: bool = Field(description="false: do not quote robust_accuracy; the block flags say why")
    after_rounding: Rate | None = Field(default=None, description="robust accuracy when adversarial inputs are first rounded to 8 bits")
    forwards: int = Field(description="model rows forward for this radius, all samples together")
    backwards: int
    seconds: float
    flags: list[Flag] = []
    attacks: list[AttackRow] = []
    per_class: list[ClassRate] = []
    union: list[Place] = Field(default=[], description="of a union (threat `union`): a sample stands where it stands at all of these")
    whole_data: Rate | None = Field(default=None, description="the rate of the whole data set, where n samples of it were drawn beforehand")

    @property
    def early(self) -> bool:
        """The attacks here ended before their plan did, on purpose: below a bar is a verdict, above it is none."""
        return any(flag.id in EARLY for flag in self.flags)

    @property
    def value(self) -> float:
        """Share of samples that no attack broke: true robust accuracy is at most this, up to sampling error."""
        return self.robust_accuracy.value

    @property
    def low(self) -> float:
        """Low end of the 95 % interval."""
        return self.robust_accuracy.low

    @property
    def high(self) -> float:
        """High end of the 95 % interval."""
        return self.robust_accuracy.high

    @property
    def certified(self) -> float | None:
        """Lower bound, where one could be computed."""
        return self.certified_accuracy


class Verdicts:
    """Results by (threat, radius): `report.robust_accuracy["linf", 8 / 255]`."""

    def __init__(self, results: list[Result]) -> None:
        self._results = results

    def __getitem__(self, key: tuple[str, float]) -> Result:
        for result in self._results:
            if result.threat == key[0] and abs(result.radius - key[1]) <= 1e-9 * max(1.0, abs(key[1])):
                return result
        known = ", ".join(f"{r.threat}:{r.radius_text}" for r in self._results)
        raise KeyError(f"{key[0]}:{key[1]:g} was not audited; there is {known}")

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return iter((r.threat, r.radius) for r in self._results)

    def __len__(self) -> int:
        return len(self._results)


class ModelReport(Plain):
    """Everything about one model."""

    name: str
    data: str
    n: int
    source: str = Field(description="where the model came from: module:function, a file or a builtin name")
    clean_accuracy: Rate
    clean_per_class: list[ClassRate] = []
    invalid: int = Field(default=0, description="samples whose clean output is NaN or infinite")
    box: tuple[float, float] = Field(default=(0.0, 1.0), description="legal input range; per-feature boxes give their extremes")
    findings: list[Finding] = []
    flags: list[Flag] = []
    results: list[Result] = []
    population: int | None = Field(default=None, description="size of the data set that the n samples were drawn from, where it is known")
    stopped: Stopped | None = Field(default=None, description="why the audit ended early, if it did; every number is an upper bound")

    @property
    def robust_accuracy(self) -> Verdicts:
        """The results by (threat, radius)."""
        return Verdicts(self.results)


class Canaries(Plain):
    """When planted models whose truth is known were judged, and by what."""

    judged: str = Field(description="UTC, ISO 8601; before `started`: not in this run, but by the same code on the same kind of machine")
    code: str = Field(description="digest of source files, libraries, processor and settings of torch; empty: not known, so not remembered")


class Report(Plain):
    """One run of `epsball audit`."""

    schema_version: int = SCHEMA_VERSION
    models: list[ModelReport]
    seed: int
    effort: str = "default"
    versions: dict[str, str] = {}
    run: str = Field(description="folder that holds report.json, report.html and evidence.safetensors")
    command: str = ""
    settings: dict[str, str] = {}
    started: str = Field(default="", description="UTC, ISO 8601")
    seconds: float = 0.0
    canaries: Canaries | None = Field(default=None, description="when the tool itself was last put to the test; None: interrupted before")
    partial: bool = Field(default=False, description="true: interrupted; every number is still a valid upper bound")
    notes: list[str] = Field(default=[], description="what was done to the data and the model on the way in, a sentence each")

    @property
    def robust_accuracy(self) -> Verdicts:
        """The first model's results by (threat, radius); `models[i].robust_accuracy` has the others'."""
        return self.models[0].robust_accuracy
