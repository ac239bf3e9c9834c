"""What the preflight found decides how the searches look at the model: through a twin that answers alike and hides less.

Nobody tells an audit what a defense is. Steps without a useful derivative run backward as smooth ones (BPDA), scores so wide that
losses saturate are divided, the answers of a random model are averaged (EOT), and gradients that jump are smoothed. The referee
always judges the model itself; a twin only says where to look.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from epsball.auditing.preflight import Bench, alive, cosine, slopes
from epsball.auditing.results import Finding
from epsball.auditing.ways import (
    BLANK,
    FAR,
    REACH,
    TRUE,
    blank,
    fine,
    forked,
    nudged,
    opened,
    part,
    points_aside,
    same_class,
    shaken,
    share,
    straight,
    truth,
)
from epsball.core import Key, Tally, Untargeted, Victim
from epsball.core.inside import Inside, score_layers
from epsball.objectives import margin

DRAWS = {"fast": 5, "default": 10, "max": 20}
"""Answers of a random model that one look of a search averages."""
SQUASHES = frozenset({"softmax", "log_softmax", "sigmoid", "tanh"})
"""Last steps that keep the order of scores."""
ALIKE = 0.5
"""Median cosine of neighboring gradients below which they say nothing of the next step."""
JUDGES = 100
"""Draws that a ruling on a random model takes; the majority rules. What is stored is ruled on again and again, and each time a narrow
majority may turn: with 40 draws 8 of 83 did so on a network that drops activations."""
CUSTOM = "custom backward"
"""The hidden step where derivatives that custom autograd functions bring along are false."""
KINK = "kink"
"""The hidden step where most features have no gradient exactly at the input."""
STRAIGHT = "before a layer"
"""The hidden step where nothing but `Straight` has a gradient."""
LAYERS, TURNED = 3, 0.05
"""Layers with scores that are looked at, last first; share of samples whose gradient points the other way there above which searches go
by these scores as well."""
WIDE, CALM = 50.0, 5.0
"""Median gap between the two best scores from which on scores are divided, and the gap that is left."""


@dataclass(frozen=True)
class Sight:
    """How searches with gradients look at a model.

    Attributes:
        victim: whose gradients are followed: the model itself, or a twin. own: the model's own gradients are worth following first.
        bare: of a random model, `victim` without its averaging.
        judges: draws of a ruling; more than 1 for a random model. hidden: steps of the model that have no useful derivative.
        rough: gradients jump, so smoothed ones are tried as well. dead: no gradient is to be had anywhere. blind: for some samples
            none is, whichever way the model is looked at. straight: where there is doubt, a twin that goes past what changes
            the input, or by a network inside. shaken: twins with a derivative by differences in random directions, where no
            other tells how scores change. forks: what decides inside the model without a gradient, each as a model of its own.
    """

    victim: Victim
    own: bool = True
    bare: Victim | None = None
    judges: int = 1
    hidden: tuple[str, ...] = ()
    rough: bool = False
    dead: bool = False
    blind: bool = False
    straight: Victim | None = None
    shaken: tuple[Victim, ...] = ()
    forks: tuple[Victim, ...] = ()

    def each(self, change: Callable[[Victim], Victim]) -> Sight:
        """The same with every victim changed."""
        bare, straight = (None if one is None else change(one) for one in (self.bare, self.straight))
        shaken, forks = (tuple(change(one) for one in some) for some in (self.shaken, self.forks))
        return replace(self, victim=change(self.victim), bare=bare, straight=straight, shaken=shaken, forks=forks)

    @property
    def doubted(self) -> bool:
        """The model's own gradients are not all that should be followed."""
        return self.hidden != () or self.rough or self.blind or not self.own

    @property
    def random(self) -> bool:
        """The model draws random numbers."""
        return self.judges > 1

    @property
    def distrusts(self) -> bool:
        """Derivatives that custom autograd functions bring along are gone around."""
        return CUSTOM in self.hidden


class After(nn.Module):
    """A model whose scores pass through one more function."""

    def __init__(self, model: Callable[[Tensor], Tensor], change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.change = change
        self.training = bool(getattr(model, "training", False))

    def forward(self, x: Tensor) -> Tensor:
        """change(model(x))."""
        return self.change(self.model(x))


def react(bench: Bench, findings: list[Finding], effort: str, seed: int) -> tuple[Sight, list[Finding]]:
    """The sight that the findings call for, and the findings as they read after it: what could be met is no longer a reason to stop.

    Args:
        bench: the sample of the preflight. findings: its results. effort, seed: of the run.

    Cost: 1 forward and 1 backward row for each of 8 samples, then 21 and 3 for each of 32, and those of `alike`; where gradients are
    dead 8 forward and 4 backward for every sample looked at and way around, of which wide scores have two.
    """
    if bench.thrifty:
        return Sight(bench.victim), findings
    # A few dead gradients only warn, and there is a way around them all the same.
    faults = {f.id for f in findings if f.status == "block" or (f.id == "gradient" and f.status == "warn")}
    sight, findings = _backward(bench, findings, faults, seed)
    if "random" in faults and not faults & {"batch", "state"}:
        draws = DRAWS[effort]
        sight = replace(sight, victim=sight.victim.averaged(draws), judges=JUDGES, bare=sight.victim)
        message = f" Searches saw the mean of {draws} answers; an input counts as broken where most of {JUDGES} draws are wrong."
        findings = [_met(f, message) if f.id == "random" else f for f in findings]
        return sight, findings
    steady = not faults & {"random", "batch", "state", "no-gradient"}
    if steady and "gradient" not in faults:
        sight, findings = _truthful(bench, sight, findings, seed)
    if steady and sight.victim is bench.victim:
        sight, findings = _turned(bench, sight, findings)
    message = _rough(replace(bench, victim=sight.victim), seed, steady and not sight.rough)
    if message:
        message += " Their mean over neighborhoods was followed as well, and searches without gradients ran."
        sight, findings = replace(sight, rough=True), [*findings, Finding(id="rough", status="note", message=message)]
    return (sight, findings) if faults & {"batch", "state"} else _forked(bench, *_past_layers(bench, sight, findings, seed))


def _forked(bench: Bench, sight: Sight, findings: list[Finding]) -> tuple[Sight, list[Finding]]:
    """What decides inside the model without a gradient is searched by itself."""
    found = forked(bench)
    if not found:
        return sight, findings
    counted = "A decision inside the model has" if len(found) == 1 else f"{len(found)} decisions inside the model have"
    message = f"{counted} no gradient: inputs that turn it were searched, and from there others that are taken wrongly."
    return replace(sight, forks=found), [*findings, Finding(id="hidden-steps", status="note", message=message)]


def _past_layers(bench: Bench, sight: Sight, findings: list[Finding], seed: int) -> tuple[Sight, list[Finding]]:
    """Where gradients are in doubt or dead: ways past what comes before a layer, beside or in the place of others."""
    if sight.doubted and sight.hidden != (STRAIGHT,):
        if (kink := nudged(bench)) is not None:
            message = "Most features have no gradient exactly at the input: searches also took it a little further in."
            sight = replace(sight, victim=kink, hidden=(*sight.hidden, KINK))
            findings = [*findings, Finding(id="hidden-steps", status="note", message=message)]
        sight = replace(sight, straight=straight(bench) or part(replace(bench, victim=sight.victim), bench.victim, seed))
    others = [way for way in (sight.victim, sight.straight) if way is not None and not sight.dead]
    twins = shaken(bench, others, seed) if sight.doubted or sight.dead else ()
    if not twins:
        return sight, findings
    message = "What comes before a layer inside got a derivative by differences in random directions as well."
    if sight.dead:
        findings = [_met(f, f" {message}", "warn") if f.id == "no-gradient" else f for f in findings]
    else:
        findings = [*findings, Finding(id="hidden-steps", status="note", message=message)]
    return replace(sight, shaken=twins), findings


def _rough(bench: Bench, seed: int, steady: bool) -> str:
    """How gradients jump, or, of `steady` models, what they leave out or over how short a way they hold; empty where all is well."""
    likeness = alike(bench, seed)
    if likeness < ALIKE:
        return f"Gradients jump: at two points a two-hundredth of the box apart, their cosine is {likeness:.2f} in the middle."
    if steady and (share := blank(bench)) > BLANK:
        return f"Gradients leave out {share:.0%} of the features of a sample in the middle."
    if steady and (told := truth(bench, seed, REACH)) < FAR:
        return (
            f"Gradients hold for short ways only: within {REACH:g} of the box the correlation of changes of the margin with those that "
            f"they foretell is {told:.2f} in the middle."
        )
    return ""


def _truthful(bench: Bench, sight: Sight, findings: list[Finding], seed: int) -> tuple[Sight, list[Finding]]:
    """Where gradients do not tell how scores change: a twin that goes around custom backward passes and hooks, if its own do."""
    told = truth(replace(bench, victim=sight.victim), seed)
    if told >= FAR:
        return sight, findings
    message = f"The gradient does not tell how the margin changes: its correlation with measured changes is {told:.2f} in the middle."
    twin = bench.victim.relaxed(distrust=True)
    around = truth(replace(bench, victim=twin), seed)
    if told >= TRUE and around < told + TRUE:
        return sight, findings
    if around > max(told, 0.0):
        sight = replace(sight, victim=twin, own=told >= TRUE or around < TRUE, hidden=(CUSTOM, *_hidden(bench, twin)))
        message += f" Behind the operations inside custom backward passes it is {around:.2f}: searches followed that gradient."
    if around < TRUE:
        sight, message = replace(sight, rough=True), message + " Means over neighborhoods were followed as well."
    message += " Searches without gradients ran."
    return sight, [*findings, Finding(id="false-gradient", status="warn", message=message)]


def _turned(bench: Bench, sight: Sight, findings: list[Finding]) -> tuple[Sight, list[Finding]]:
    """Where what follows the scores of a layer turns their gradients around: a twin that goes by those scores.

    Cost: 1 forward row for each of at most 32 samples; where there are such layers 2 and 1 backward row more, and as many for each of 3.
    """
    rows, victim, model = fine(bench), bench.victim, opened(bench.victim)
    if model is None or not len(rows) or not isinstance(bench.goal, Untargeted):
        return sight, findings
    x, goal = bench.x[rows], bench.goal.take(rows)
    try:
        with victim, torch.no_grad():
            layers = same_class(score_layers(model, x), bench.output[rows])
        if not layers:
            return sight, findings
        own = slopes(victim, x, goal, margin).flatten(1).double()
        for layer in reversed(layers[-LAYERS:]):
            twin = victim.twin(Inside(model, layer))
            turned = share(cosine(own, slopes(twin, x, goal, margin).flatten(1).double()) < 0)
            if turned > TURNED:
                message = f"What follows the scores of layer '{layer}' turns the gradient around for {turned:.0%} of the samples."
                message += " Those scores were followed as well."
                found = Finding(id="hidden-steps", status="note", message=message)
                return replace(sight, victim=twin, hidden=(f"after {layer}",)), [*findings, found]
    except Exception:  # what raises here is the business of other checks
        return sight, findings
    return sight, findings


def alike(bench: Bench, seed: int) -> float:
    """Median cosine between the margin's gradients at pairs of random points 0.005 of the box apart; 1 where there are none to compare.

    Cost: 4 forward and 2 backward rows for each of at most 32 samples.
    """
    rows = fine(bench)
    x, goal, found = bench.x[rows], bench.goal.take(rows), []
    for side in ("left", "right"):
        try:
            found.append(
                slopes(bench.victim, points_aside(bench.victim, x, 0.01, Key.of(seed).fold(side)), goal, margin).flatten(1).double()
            )
        except Exception:  # a model without gradients has none that jump
            return 1.0
    cosines = cosine(*found)
    known = torch.isfinite(cosines) & (found[0].norm(dim=1) > 0) & (found[1].norm(dim=1) > 0)
    return float(cosines[known].median()) if bool(known.any()) else 1.0


def _backward(bench: Bench, findings: list[Finding], faults: set[str], seed: int) -> tuple[Sight, list[Finding]]:
    """A twin through which gradients are alive, if the model's own are not or some of its steps have none."""
    victim, twin = bench.victim, bench.victim.relaxed()
    hidden = _hidden(bench, twin)
    dead = faults & {"no-gradient", "gradient"}
    if not dead:
        if set(hidden) <= SQUASHES:  # probabilities whose logarithm has a gradient hide nothing
            return Sight(victim), findings
        message = f"Steps without a useful derivative: {', '.join(hidden)}. They were also attacked as if they were smooth (BPDA)."
        return Sight(twin, hidden=hidden), [*findings, Finding(id="hidden-steps", status="note", message=message)]
    best, said = (twin, f" {', '.join(hidden)} ran backward as if smooth (BPDA).") if hidden else (victim, "")
    ways = [(best, said)]
    if (gap := _gap(bench, best)) > WIDE:
        divided = best.twin(After(best.model, _Divide(gap / CALM)))
        ways.append((divided, f"{said} Scores were divided by {gap / CALM:.3g} for the search, so that no loss saturates."))
    own, partly = "no-gradient" not in faults, []
    for way, message in ways:
        left = [f for f in alive(replace(bench, victim=way), seed) if f.status != "pass"]
        if not left:
            return Sight(way, own, hidden=hidden), [_met(f, message) if f.id in dead else f for f in findings]
        if left[0].id == "gradient" and not own:
            partly.append((way, f"{message} {left[0].message}", left[0].status))
    if partly:  # alive for some samples: better than nothing, and a reason to doubt where they are too few
        way, message, status = partly[-1]
        return Sight(way, own, hidden=hidden, blind=True), [_met(f, message, status) if f.id in dead else f for f in findings]
    if not own and (past := straight(bench)) is not None:
        message = " Only what follows a layer that sees the input changed was followed, and the change by differences where it is an image."
        return Sight(past, own, hidden=(STRAIGHT,), blind=True), [_met(f, message) if f.id in dead else f for f in findings]
    unmet = [_met(f, " Searches without gradients ran.", "block") if f.id == "no-gradient" else f for f in findings]
    return Sight(best, own, hidden=hidden, dead=not own, blind=own), unmet


@dataclass(frozen=True)
class _Divide:
    """Scores divided by one number."""

    by: float

    def __call__(self, scores: Tensor) -> Tensor:
        return scores / self.by


def _met(finding: Finding, how: str, status: str = "warn") -> Finding:
    """How the plan reacted to what was found: said beside the number, and mostly no longer a reason to withhold it."""
    return finding.model_copy(update={"status": status, "message": finding.message + how})


def _hidden(bench: Bench, twin: Victim) -> tuple[str, ...]:
    """Names of the steps that the twin had to give a derivative."""
    try:
        slopes(twin, bench.x[:8], bench.goal.take(slice(0, 8)), margin)
    except Exception:  # what raises on the way back is the business of the check of gradients
        return ()
    return tuple(getattr(twin.model, "met", ()))


def _gap(bench: Bench, victim: Victim) -> float:
    """Median difference of the two best finite scores that a search would see. Cost: 1 forward row for each of 32 samples."""
    x = bench.x[:32]
    with victim:
        output = victim.differentiable(x.detach().clone().requires_grad_(), Tally.zeros(len(x))).detach()
    fine = output[torch.isfinite(output).all(1)]
    if len(fine) == 0 or fine.shape[1] < 2:
        return 0.0
    best = fine.topk(2, dim=1).values
    return float((best[:, 0] - best[:, 1]).median())
