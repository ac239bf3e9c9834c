"""Attacks made of attacks. Each is an attack itself: frozen, with a name and a repr, and judged per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.joined import joined
from epsball.core import (
    Aimed,
    AttackLike,
    Drop,
    Goal,
    Key,
    Model,
    Outcome,
    Projects,
    Tally,
    Untargeted,
    Victim,
    Watch,
    as_goal,
    valid,
)
from epsball.core.attack import check_inputs, check_labels, recipe
from epsball.core.problem import ends
from epsball.core.rows import moved, take
from epsball.errors import BadInput


@dataclass(frozen=True)
class Case:
    """One call's arguments, checked once, with the clean outputs that every stage shares."""

    victim: Victim
    x: Tensor
    goal: Goal
    radius: Tensor
    clean: Tensor
    key: Key
    queries: int  # rows forward per sample spent on the clean outputs

    def take(self, rows: Tensor) -> Case:
        """The same call for some of the samples."""
        x, goal, radius = self.x[rows], self.goal.take(rows), self.radius[rows]
        return replace(self, x=x, goal=goal, radius=radius, clean=self.clean[rows], key=self.key.take(rows))

    def run(self, attack: AttackLike, drop: Drop, watch: Watch | None) -> Outcome:
        """What the attack makes of it."""
        return attack(self.victim, self.x, self.goal, self.radius, self.key, clean=self.clean, drop=drop, watch=watch)


def opened(model: Model, x: Tensor, goal: Goal | Tensor, radius: float | Tensor, clean: Tensor | None, seed: int | Key) -> Case:
    """Checks the arguments of a call and asks for the clean outputs if nobody has them."""
    victim = Victim.of(model)
    x, aim = moved(x, victim.device), moved(as_goal(goal), victim.device)
    radii = check_inputs(victim, x, aim, radius)
    asked = clean is None
    clean = victim.outputs(x, Tally.zeros(len(x))) if clean is None else moved(clean, victim.device)
    check_labels(aim, clean)
    return Case(victim, x, aim, radii, clean, Key.of(seed), int(asked))


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
Turn = Callable[[Case, Tensor, Tensor], tuple[Case, AttackLike]]
"""(some samples, which of the call's they are (R,), run (R,)) -> what each of them is given in that run, and what runs."""
WIDE = 1024
"""Rows of a batch that runs side by side may fill."""


def union(case: Case, threat: Projects, stages: list[Stage], steps: int, drop: bool) -> Outcome:
    """Runs stages in turn, each on the samples that no stage before it has broken (all that began unbroken if not `drop`)."""
    whole = nothing(case, threat, steps)
    begun = ~whole.reached & ~whole.flags["invalid"]
    for stage in stages:
        rows = ((begun & ~whole.reached) if drop else begun).nonzero().squeeze(1)
        if not len(rows):
            break
        whole = merged(whole, rows, stage(case.take(rows), rows))
    return whole


Abreast = bool | Tensor | None
"""Whether runs of one attack go side by side; (B,) whole numbers: they do, and each sample gets only so many of them."""


def _repeated(case: Case, threat: Projects, turn: Turn, runs: range, abreast: Abreast, drop: bool, watch: Watch | None) -> Outcome:
    """Runs in turn, or side by side: the same successes, in fewer and larger batches."""
    if isinstance(abreast, Tensor) or abreast:
        counts = abreast.to(case.x.device) if isinstance(abreast, Tensor) else torch.full((len(case.x),), len(runs), device=case.x.device)
        return _abreast(case, threat, turn, runs, counts.clamp(max=len(runs)), drop, watch)

    def stage(number: int) -> Stage:
        def ran(c: Case, rows: Tensor) -> Outcome:
            given, attack = turn(c, rows, torch.full_like(rows, number))
            return given.run(attack, drop, watch)

        return ran

    return union(case, threat, [stage(number) for number in runs], len(runs), drop)


def _abreast(case: Case, threat: Projects, turn: Turn, runs: range, counts: Tensor, drop: bool, watch: Watch | None) -> Outcome:
    """The first `counts` (B,) runs of every sample in one batch; the first success of any of them ends the others if `drop`.

    All runs of a sample are in one batch, and earlier runs win ties, so that the batch decides nothing.
    """
    whole = nothing(case, threat, len(runs))
    begun = (~whole.reached & ~whole.flags["invalid"] & (counts > 0)).nonzero().squeeze(1)
    most = int(counts.amax())
    for rows in torch.split(begun, max(WIDE, len(begun)) // most or 1) if len(begun) else ():
        asked = torch.arange(most, device=rows.device)[:, None] < counts[rows]
        number, place = asked.nonzero(as_tuple=True)

        def samples(step: int, steps: int, left: int, all_of: int = len(rows)) -> None:
            if watch is not None:
                watch(step, steps, min(left, all_of))

        several = rows[place]
        given, attack = turn(case.take(several), several, runs.start + number)
        found = given.run(attack, several if drop else False, samples)
        whole = merged(whole, rows, _best_runs(found, asked, place))
    return whole


def _best_runs(found: Outcome, asked: Tensor, place: Tensor) -> Outcome:
    """Of runs at R samples, those that `asked` (K, R) marks, row by row: for each sample its first success, else the best score; costs of
    all. `place` (len(found),): which of the R each is at."""
    reached = torch.zeros_like(asked).masked_scatter(asked, found.reached)
    score = torch.full(asked.shape, -torch.inf, dtype=found.score.dtype, device=asked.device)
    score = score.masked_scatter(asked, found.score.nan_to_num(nan=-torch.inf))
    run = torch.where(reached.any(0), reached.int().argmax(0), score.argmax(0))
    rows = (asked.flatten().cumsum(0) - 1).reshape(asked.shape).gather(0, run[None]).squeeze(0)

    def summed(costs: Tensor) -> Tensor:
        return costs.new_zeros(asked.shape[1]).index_add(0, place.cpu(), costs)

    flags = {name: torch.zeros_like(asked).masked_scatter(asked, flag).any(0) for name, flag in found.flags.items()}
    best: Outcome = take(found, rows)
    return replace(best, queries=summed(found.queries), backwards=summed(found.backwards), flags=flags)


@dataclass(frozen=True, repr=False)
class Restarts:
    """`count` runs of one attack, each with fresh noise, on the samples that still stand. More never lose a success.

    `first` is the number of the first run: to go on where others, of that many runs, have ended. `abreast` has all runs of a
    sample side by side in one batch: the same samples break in up to `count` times fewer calls of the model, for the rows that
    runs take before the first of them succeeds. Whole numbers (B,) do so too, and give each sample only so many runs.

    Several attacks take turns: run after run, each is the next one's. They may differ in their losses, and in numbers that their
    strategies read sample by sample (`Vertices.first`).
    """

    attack: AttackLike | tuple[AttackLike, ...]
    count: int
    first: int | None = None
    abreast: Abreast = None

    @property
    def attacks(self) -> tuple[AttackLike, ...]:
        """One or several."""
        return self.attack if isinstance(self.attack, tuple) else (self.attack,)

    @property
    def name(self) -> str:
        """That of the first attack."""
        return self.attacks[0].name

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
        drop: Drop = True,
        watch: Watch | None = None,
    ) -> Outcome:
        """As `Attack.__call__`. Cost: at most `count` times the attack's.

        Raises:
            BadInput: also several attacks that differ in more than they may.
        """

        def own(key: Key, number: int) -> Key:
            return key.fold("restart", number) if number else key

        def turn(c: Case, _: Tensor, numbers: Tensor) -> tuple[Case, AttackLike]:
            return replace(c, key=c.key.branch(numbers, own)), joined(attacks, (numbers - first) % len(attacks))

        with Victim.of(model) as victim:
            case, first, attacks = opened(victim, x, goal, radius, clean, seed), self.first or 0, self.attacks
            threat = self.threat.within(victim.box)
            return _repeated(case, threat, turn, range(first, first + self.count), self.abreast, ends(drop), watch)

    def __repr__(self) -> str:
        return recipe(self)


def restarted(attack: AttackLike, count: int, abreast: bool | None = None) -> AttackLike:
    """`attack` itself for one run, else `Restarts`."""
    if count < 1:
        raise BadInput(f"restarts: {count}: must be 1 or more")
    return attack if count == 1 else Restarts(attack, count, abreast=abreast)


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
        drop: Drop = True,
        watch: Watch | None = None,
    ) -> Outcome:
        """As `Attack.__call__`. Cost: at most the sum of the attacks'."""

        def stage(attack: AttackLike) -> Stage:
            return lambda c, _: c.run(attack, ends(drop), watch)

        with Victim.of(model) as victim:
            case = opened(victim, x, goal, radius, clean, seed)
            return union(
                case, self.threat.within(case.victim.box), [stage(attack) for attack in self.attacks], len(self.attacks), ends(drop)
            )

    def __repr__(self) -> str:
        return recipe(self)


Order = Callable[[Victim, Tensor, Tensor, Tensor, Projects, int, Tally], Tensor]
"""(victim, x, labels, clean outputs, threat, how many, ledger) -> (B, how many) target classes, most promising first."""


@dataclass(frozen=True, repr=False)
class EveryTarget:
    """An aimed attack at the `count` most promising other classes in turn; fewer when the model has fewer classes.

    `abreast` as of `Restarts`.
    """

    attack: AttackLike
    count: int
    order: Order
    name: str = "every_target"
    abreast: Abreast = None

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
        drop: Drop = True,
        watch: Watch | None = None,
    ) -> Outcome:
        """As `Attack.__call__`, for untargeted goals. Cost: that of the order, then at most `count` times the attack's."""
        with Victim.of(model) as victim:
            case = opened(victim, x, goal, radius, clean, seed)
            if not isinstance(case.goal, Untargeted):
                raise BadInput(f"attack '{self.name}': chooses its own targets, so it takes labels only: use the inner attack for a target")
            labels, count = case.goal.labels, min(self.count, case.clean.shape[1] - 1)
            begun = (~case.goal.reached(case.clean) & valid(case.clean)).nonzero().squeeze(1)
            tally, threat = Tally.zeros(len(case.x)), self.threat.within(victim.box)
            targets = labels[:, None].repeat(1, count)
            if len(begun):
                ordered = self.order(victim, case.x[begun], labels[begun], case.clean[begun], threat, count, tally.take(begun))
                targets = targets.index_copy(0, begun, ordered)

            def turn(c: Case, rows: Tensor, ranks: Tensor) -> tuple[Case, AttackLike]:
                key = c.key.branch(ranks, lambda key, rank: key.fold("target", rank))
                return replace(c, goal=Aimed(labels[rows], targets[rows, ranks]), key=key), self.attack

            whole = _repeated(case, threat, turn, range(count), self.abreast, ends(drop), watch)
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
        drop: Drop = True,
        watch: Watch | None = None,
    ) -> Outcome:
        """As `Attack.__call__`; `radius` is the largest change of interest, None all that the box allows.

        Cost: at most (rounds + 1) times the attack's.
        """
        with Victim.of(model) as victim:
            box_reach = self.threat.within(victim.box).reach(x.to(victim.device)) if radius is None else radius
            case = opened(victim, x, goal, box_reach, clean, seed)
            whole = nothing(case, self.threat.within(case.victim.box), self.rounds)
            low, high = torch.zeros_like(case.radius), case.radius.clone()
            rows = (~whole.reached & ~whole.flags["invalid"]).nonzero().squeeze(1)
            for number in range(self.rounds + 1):
                if not len(rows):
                    break
                ask = high if number == 0 else (low + high) / 2
                c = case.take(rows)
                part = replace(c, radius=ask[rows], key=c.key.fold("round", number)).run(self.attack, ends(drop), watch)
                whole = merged(whole, rows, part, smallest=True)
                high[rows] = torch.where(part.reached, torch.minimum(part.size, high[rows]), high[rows])
                low[rows] = torch.where(part.reached, low[rows], ask[rows])
                if number == 0:
                    rows = rows[part.reached]
        return whole

    def __repr__(self) -> str:
        return recipe(self)
