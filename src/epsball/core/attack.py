"""An attack is a value: who may change what, what it climbs, how it searches. Its repr is its full recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from epsball.core.descent import Strategy
from epsball.core.goal import Goal, LabelsChanged, as_goal
from epsball.core.outcome import Outcome
from epsball.core.problem import Drop, Objective, Problem, Watch
from epsball.core.random import Key, content_ids
from epsball.core.rows import moved
from epsball.core.run import run
from epsball.core.threat import Projects
from epsball.core.victim import Access, Tally, Victim
from epsball.errors import BadInput

Model = Victim | Callable[[Tensor], Tensor]


class AttackLike(Protocol):
    """What combinators take and give: a name and a call."""

    @property
    def name(self) -> str:
        """Part of the key of its randomness, and what reports print."""

    @property
    def threat(self) -> Projects:
        """What it may change."""

    def __call__(
        self,
        model: Model,
        x: Tensor,
        goal: Goal | Tensor,
        radius: float | Tensor,
        seed: int | Key = 0,
        *,
        clean: Tensor | None = None,
        drop: Drop = True,
        watch: Watch | None = None,
    ) -> Outcome:
        """See `Attack.__call__`."""


@dataclass(frozen=True)
class Attack:
    """One search under one threat.

    Attributes:
        name: as registered. threat, objective, strategy, steps: the recipe. smallest: look for the smallest change.
    """

    name: str
    threat: Projects
    objective: Objective
    strategy: Strategy
    steps: int
    smallest: bool = False
    access: Access = field(default=Access.GRADIENT, repr=False)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise BadInput(f"steps: {self.steps}: must be 0 or more")

    def __call__(
        self,
        model: Model,
        x: Tensor,
        goal: Goal | Tensor,
        radius: float | Tensor,
        seed: int | Key = 0,
        *,
        clean: Tensor | None = None,
        drop: Drop = True,
        watch: Watch | None = None,
    ) -> Outcome:
        """Attacks a batch.

        Args:
            model: a `Victim`, or anything callable that maps (B, ...) in [0, 1] to (B, C) scores.
            x: clean inputs (B, ...), floating point, inside the victim's box.
            goal: labels (B,) for untargeted, or any `Goal`.
            radius: budget in the threat's unit, one number or (B,).
            seed: the run's seed, or a key below it.
            clean: the model's outputs for `x`, where they are known; they are not asked for again.
            drop: stop working on a sample once its goal is reached; whole numbers (B,): on every row of its number, for these are runs
                at one sample, and one success is enough. Attacks made of attacks take them for True.
            watch: progress callback.

        Raises:
            BadInput: labels, radius or inputs that cannot be used, in one line.

        Cost: 1 forward row per sample for `clean` unless given, then that of `epsball.core.run.run`.
        """
        victim, goal = Victim.of(model), as_goal(goal)
        with victim:
            problem = pose(self, victim, x, goal, radius, Key.of(seed).fold(self.name), clean)
            return run(problem, self.strategy, self.steps, smallest=self.smallest, drop=moved(drop, victim.device), watch=watch)

    def __repr__(self) -> str:
        return recipe(self)


def pose(attack: Attack, victim: Victim, x: Tensor, goal: Goal, radius: float | Tensor, key: Key, clean: Tensor | None) -> Problem:
    """Checks what the caller gave and puts it into one `Problem`; asks for the clean outputs if nobody has them."""
    x, goal = moved(x, victim.device), moved(goal, victim.device)
    radii = check_inputs(victim, x, goal, radius)
    tally = Tally.zeros(len(x))
    clean = victim.outputs(x, tally) if clean is None else moved(clean, victim.device)
    check_labels(goal, clean)
    threat = attack.threat.within(victim.box)
    if bool(torch.isinf(radii).any()):  # steps are shares of the radius, and infinity times no gradient is no number
        radii = torch.where(torch.isinf(radii), threat.reach(x), radii)
        if bool(torch.isinf(radii).any()):
            raise BadInput("radius: inf: the box has no end either: give a finite radius or a finite box")
    return Problem(
        victim=victim,
        x=x,
        goal=goal,
        threat=threat,
        objective=attack.objective,
        radius=radii,
        ids=content_ids(x),
        clean=clean,
        key=key,
        tally=tally,
    )


def check_inputs(victim: Victim, x: Tensor, goal: Goal, radius: float | Tensor) -> Tensor:
    """One-line errors for inputs outside the box, wrong label counts and bad radii; returns radii (B,) float64."""
    if not x.is_floating_point() or x.ndim < 2 or len(x) == 0:
        raise BadInput(f"x: {x.dtype} of shape {tuple(x.shape)}: give a non-empty float tensor (B, ...)")
    if not bool(torch.isfinite(x).all()):
        raise BadInput("x: has NaN or infinite values: clean the data first")
    # In the precision of x: a bound that rounds outward in it is no fault of the data.
    low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in victim.box)
    if bool((x < low).any()) or bool((x > high).any()):
        words = " .. ".join("a tensor" if bound.ndim else f"{float(bound):g}" for bound in (low, high))
        raise BadInput(f"x: values {float(x.min()):g} .. {float(x.max()):g} leave the box {words}: scale x or declare the box")
    for name in ("labels", "targets"):
        labels = getattr(goal, name, None)
        if labels is not None and len(labels) != len(x):
            raise BadInput(f"{name}: {len(labels)} for {len(x)} inputs: give one per input")
    radii = torch.as_tensor(radius, dtype=torch.float64, device=x.device)
    if radii.ndim > 1 or (radii.ndim == 1 and len(radii) != len(x)):
        raise BadInput(f"radius: shape {tuple(radii.shape)} for {len(x)} inputs: give one number or one per input")
    if not bool((radii >= 0).all()):
        raise BadInput(f"radius: {float(radii.min()):g}: must be 0 or more")
    return radii.expand(len(x)).contiguous()


def check_labels(goal: Goal, clean: Tensor) -> None:
    """One-line errors for labels that the model has no score for."""
    classes = clean.shape[1]
    if classes < 2 and not isinstance(goal, LabelsChanged):
        raise BadInput(f"model: {classes} output for a goal among classes: give 2 or more scores per input")
    for field_name in ("labels", "targets"):
        labels = getattr(goal, field_name, None)
        if labels is None:
            continue
        if labels.ndim == 2:
            if labels.shape[1] != classes:
                raise BadInput(f"{field_name}: {labels.shape[1]} columns for a model with {classes} outputs: give one per output")
        elif labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise BadInput(f"{field_name}: {labels.min().item()} .. {labels.max().item()}: must be whole numbers, 0 .. {classes - 1}")


def recipe(value: Any) -> str:
    """A repr that names functions instead of their addresses."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr]
        shown = [f"{name}={recipe(part)}" for name, part in fields if part is not None]
        return f"{type(value).__name__}({', '.join(shown)})"
    if isinstance(value, tuple):
        return "(" + ", ".join(recipe(part) for part in value) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}"
    return str(getattr(value, "__name__", repr(value)))


def renamed(attack: Attack, name: str) -> Attack:
    """The same attack under its registered name."""
    return replace(attack, name=name)
