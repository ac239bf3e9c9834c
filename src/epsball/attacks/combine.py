"""Attacks made of attacks. Each is an attack itself: frozen, with a name and a repr, and judged per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.core import Aimed, AttackLike, Goal, Key, Model, Outcome, Projects, Tally, Untargeted, Victim, Watch, as_goal, valid
from epsball.core.attack import check_inputs, check_labels, recipe
from epsball.core.rows import moved
from epsball.errors import BadInput


@dataclass(frozen=True)
class Case:
    """One call's arguments, checked once, with the clean outputs that every stage shares."""

    victim: Victim
    x: Tensor
    goal: Goal
    radius: Tensor
    clean: Tensor
    queries: int  # rows forward per sample spent on the clean outputs

    def take(self, rows: Tensor) -> Case:
        """The same call for some of the samples."""
        return replace(self, x=self.x[rows], goal=self.goal.take(rows), radius=self.radius[rows], clean=self.clean[rows])


def opened(model: Model, x: Tensor, goal: Goal | Tensor, radius: float | Tensor, clean: Tensor | None) -> Case:
    """Checks the arguments of a call and asks for the clean outputs if nobody has them."""
    victim = Victim.of(model)
    x, aim = moved(x, victim.device), moved(as_goal(goal), victim.device)
    radii = check_inputs(victim, x, aim, radius)
    asked = clean is None
    clean = victim.outputs(x, Tally.zeros(len(x))) if clean is None else moved(clean, victim.device)
    check_labels(aim, clean)
    return Case(victim, x, aim, radii, clean, int(asked))


def nothing(case: Case, threat: Projects, steps: int) -> Outcome:
    """The outcome before any stage: clean inputs, with what the clean answers already say."""
    n, none = len(case.x), torch.zeros(len(case.x), dtype=torch.int64)
    return Outcome(
        x_adv=case.x.clone(),
        z=threat.start(case.x, case.radius, None, torch.zeros(n, dtype=torch.int64)),
        reached=case.goal.reached(case.clean),
        size=torch.zeros_like(case.radius),
        score=case.clean.new_full((n,), -torch.inf),
        queries=none + case.queries,
        backwards=none.clone(),
        steps=steps,
        flags={"invalid": ~valid(case.clean)},
    )


def merged(whole: Outcome, rows: Tensor, part: Outcome, smallest: bool = False) -> Outcome:
    """`whole` with the better of both at `rows` (R,), and the costs added: per-sample union, no success is ever lost."""
    had = whole.reached[rows]
    # Scores of two objectives do not compare, but any success beats any failure and ties keep the first.
    smaller = (part.size < whole.size[rows]) & smallest
    win = torch.where(had, part.reached & smaller, part.reached | (part.score > whole.score[rows]))
    places, won = rows[win], win.nonzero().squeeze(1)
    flags = {name: whole.flags[name].index_put((rows,), whole.flags[name][rows] | part.flags[name]) for name in whole.flags}
    spent = rows.cpu()
    return Outcome(
        x_adv=whole.x_adv.index_copy(0, places, part.x_adv[won]),
        z=whole.z.index_copy(0, places, part.z[won]),
        reached=whole.reached.index_put((rows,), had | part.reached),
        size=whole.size.index_copy(0, places, part.size[won]),
        score=whole.score.index_copy(0, places, part.score[won]),
        queries=whole.queries.index_add(0, spent, part.queries),
        backwards=whole.backwards.index_add(0, spent, part.backwards),
        steps=whole.steps,
        flags=flags,
    )


Stage = Callable[[Case, Tensor], Outcome]


def _union(case: Case, threat: Projects, stages: list[Stage], steps: int, drop: bool) -> Outcome:
    """Runs stages in turn, each on the samples that no stage before it has broken (all that began unbroken if not `drop`)."""
    whole = nothing(case, threat, steps)
    begun = ~whole.reached & ~whole.flags["invalid"]
    for stage in stages:
        rows = ((begun & ~whole.reached) if drop else begun).nonzero().squeeze(1)
        if not len(rows):
            break
        whole = merged(whole, rows, stage(case.take(rows), rows))
    return whole


@dataclass(frozen=True, repr=False)
class Restarts:
    """`count` runs of one attack, each with fresh noise, on the samples that still stand. More never lose a success.

    `first` is the number of the first run: to go on where others, of that many runs, have ended.
    """

    attack: AttackLike
    count: int
    first: int | None = None

    @property
    def name(self) -> str:
        """That of the attack."""
        return self.attack.name

    @property
    def threat(self) -> Projects:
        """That of the attack."""
        return self.attack.threat

    def __call__(
        self,
        model: Model,
        x: Tensor,
        goal: Goal | Tensor,
        radius: float | Tensor,
        seed: int | Key = 0,
        *,
        clean: Tensor | None = None,
        drop: bool = True,
        watch: Watch | None = None,
    ) -> Outcome:
        """As `Attack.__call__`. Cost: at most `count` times the attack's."""

        def stage(number: int) -> Stage:
            key = Key.of(seed).fold("restart", number) if number else Key.of(seed)
            return lambda c, _: self.attack(c.victim, c.x, c.goal, c.radius, key, clean=c.clean, drop=drop, watch=watch)

        with Victim.of(model) as victim:
            case = opened(victim, x, goal, radius, clean)
            first = self.first or 0
            stages = [stage(number) for number in range(first, first + self.count)]
            return _union(case, self.threat.within(case.victim.box), stages, self.count, drop)

    def __repr__(self) -> str:
        return recipe(self)


def restarted(attack: AttackLike, count: int) -> AttackLike:
    """`attack` itself for one run, else `Restarts`."""
    if count < 1:
        raise BadInput(f"restarts: {count}: must be 1 or more")
    return attack if count == 1 else Restarts(attack, count)


@dataclass(frozen=True, repr=False)
class Cascade:
    """Different attacks under one threat in turn, each on the samples that still stand."""

    attacks: tuple[AttackLike, ...]
    name: str = "cascade"

    @property
    def threat(self) -> Projects:
        """That of the first attack."""
        return self.attacks[0].threat

    def __call__(
        self,
        model: Model,
        x: Tensor,
        goal: Goal | Tensor,
        radius: float | Tensor,
        seed: int | Key = 0,
        *,
        clean: Tensor | None = None,
        drop: bool = True,
        watch: Watch | None = None,
    ) -> Outcome:
        """As `Attack.__call__`. Cost: at most the sum of the attacks'."""

        def stage(attack: AttackLike) -> Stage:
            return lambda c, _: attack(c.victim, c.x, c.goal, c.radius, seed, clean=c.clean, drop=drop, watch=watch)

        with Victim.of(model) as victim:
            case = opened(victim, x, goal, radius, clean)
            return _union(case, self.threat.within(case.victim.box), [stage(attack) for attack in self.attacks], len(self.attacks), drop)

    def __repr__(self) -> str:
        return recipe(self)


Order = Callable[[Victim, Tensor, Tensor, Tensor, Projects, int, Tally], Tensor]
"""(victim, x, labels, clean outputs, threat, how many, ledger) -> (B, how many) target classes, most promising first."""


@dataclass(frozen=True, repr=False)
class EveryTarget:
    """An aimed attack at the `count` most promising other classes in turn; fewer when the model has fewer classes."""

    attack: AttackLike
    count: int
    order: Order
    name: str = "every_target"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise BadInput(f"targets: {self.count}: must be 1 or more")

    @property
    def threat(self) -> Projects:
        """That of the attack."""
        return self.attack.threat

    def __call__(
        self,
        model: Model,
        x: Tensor,
        goal: Goal | Tensor,
        radius: float | Tensor,
        seed: int | Key = 0,
        *,
        clean: Tensor | None = None,
        drop: bool = True,
        watch: Watch | None = None,
    ) -> Outcome:
        """As `Attack.__call__`, for untargeted goals. Cost: that of the order, then at most `count` times the attack's."""
        with Victim.of(model) as victim:
            case = opened(victim, x, goal, radius, clean)
            if not isinstance(case.goal, Untargeted):
                raise BadInput(f"attack '{self.name}': chooses its own targets, so it takes labels only: use the inner attack for a target")
            labels, count = case.goal.labels, min(self.count, case.clean.shape[1] - 1)
            begun = (~case.goal.reached(case.clean) & valid(case.clean)).nonzero().squeeze(1)
            tally = Tally.zeros(len(case.x))
            targets = labels[:, None].repeat(1, count)
            if len(begun):
                threat = self.attack.threat.within(victim.box)
                ordered = self.order(victim, case.x[begun], labels[begun], case.clean[begun], threat, count, tally.take(begun))
                targets = targets.index_copy(0, begun, ordered)

            def stage(rank: int) -> Stage:
                def run_stage(c: Case, rows: Tensor) -> Outcome:
                    aimed = Aimed(labels[rows], targets[rows, rank])
                    key = Key.of(seed).fold("target", rank)
                    return self.attack(c.victim, c.x, aimed, c.radius, key, clean=c.clean, drop=drop, watch=watch)

                return run_stage

            whole = _union(case, self.threat.within(case.victim.box), [stage(rank) for rank in range(count)], count, drop)
        return replace(whole, queries=whole.queries + tally.forwards, backwards=whole.backwards + tally.backwards)

    def __repr__(self) -> str:
        return recipe(self)


@dataclass(frozen=True, repr=False)
class SmallestRadius:
    """Bisects each sample's radius with a fixed-radius attack; the answer is the smallest success seen.

    Attributes:
        attack: asked at one radius per sample and round. rounds: bisections after the first success.
    """

    attack: AttackLike
    rounds: int = 14

    @property
    def name(self) -> str:
        """Names the attack inside."""
        return f"smallest_{self.attack.name}"

    @property
    def threat(self) -> Projects:
        """That of the attack."""
        return self.attack.threat

    def __call__(
        self,
        model: Model,
        x: Tensor,
        goal: Goal | Tensor,
        radius: float | Tensor | None = None,
        seed: int | Key = 0,
        *,
        clean: Tensor | None = None,
        drop: bool = True,
        watch: Watch | None = None,
    ) -> Outcome:
        """As `Attack.__call__`; `radius` is the largest change of interest, None all that the box allows.

        Cost: at most (rounds + 1) times the attack's.
        """
        with Victim.of(model) as victim:
            box_reach = self.threat.within(victim.box).reach(x.to(victim.device)) if radius is None else radius
            case = opened(victim, x, goal, box_reach, clean)
            whole = nothing(case, self.threat.within(case.victim.box), self.rounds)
            low, high = torch.zeros_like(case.radius), case.radius.clone()
            rows = (~whole.reached & ~whole.flags["invalid"]).nonzero().squeeze(1)
            for number in range(self.rounds + 1):
                if not len(rows):
                    break
                ask = high if number == 0 else (low + high) / 2
                c = replace(case.take(rows), radius=ask[rows])
                key = Key.of(seed).fold("round", number)
                part = self.attack(victim, c.x, c.goal, c.radius, key, clean=c.clean, drop=drop, watch=watch)
                whole = merged(whole, rows, part, smallest=True)
                high[rows] = torch.where(part.reached, torch.minimum(part.size, high[rows]), high[rows])
                low[rows] = torch.where(part.reached, low[rows], ask[rows])
                if number == 0:
                    rows = rows[part.reached]
        return whole

    def __repr__(self) -> str:
        return recipe(self)
