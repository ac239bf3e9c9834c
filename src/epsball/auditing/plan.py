"""Which attacks, in which order: cheap before strong, each on the samples that all before it left standing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks import (
    Cascade,
    EveryTarget,
    apgd,
    apgd_dlr,
    apgd_t,
    by_logit,
    corners,
    from_larger,
    nearest,
    noise,
    outside_in,
    pgd,
    recoloradv,
    rotation_translation,
    sigma_zero,
    sparse_rs,
    stadv,
    swaps,
    sweep,
    vertices,
)
from epsball.attacks.blackbox import narrow, searches
from epsball.attacks.combine import Restarts, restarted
from epsball.attacks.hopeless import while_hopeful
from epsball.attacks.swaps import Swaps
from epsball.attacks.sweep import of_rounds
from epsball.attacks.vertices import Vertices
from epsball.core import Access, Attack, AttackLike, Objective, Projects, Victim
from epsball.errors import BadInput
from epsball.objectives import cross_entropy, dlr, dlr_targeted, margin
from epsball.threats import L0, L1, L2, Color, Flow, Linf, Patch, Rigid

EFFORTS = ("fast", "default", "max")
STEPS = {"fast": 10, "default": 40, "max": 100}
PROMISING, NEAR, NEARER, VERY_NEAR = 0.3, 0.15, 0.1, 0.04
"""Shares of the clean margin that searches must have come down to for another start, for more starts, for one more walk, and for many, to
be worth their rows."""
CLOSE = 0.07
"""The share down to which a search under L1 has to come for another to go on from there: who came less near hardly ever breaks."""
_BALLS = (8.0, 4.0, 2.0, 1.0)
"""In budgets: the balls of long `from_larger`."""
_STANDS, _BROKEN = 187, 11
"""Rows with a gradient, for each sample that stands and that broke, up to which stages that fill go on. AutoAttack takes ten times
as many: some 1,900 and 150 to 250."""
_PROBED = 0.25
"""Share of the samples that stand, those that came nearest, on which walks under L1 are tried first."""
PAYS = 0.05
"""Share of the samples tried that a search has to break for more of its kind to follow."""
QUERIES = {"fast": 300, "default": 2000, "max": 10000}
"""Most rows per sample and radius that searches without gradients ask."""


@dataclass(frozen=True)
class Stage:
    """An attack of the cascade and the most rows that it spends on one sample, for the estimate of time; with gradients if it takes any.

    `victim` is what it looks at where that is not the model itself; `keep` goes on with samples that seem broken, for a random model's
    answer may have been luck; `beyond` marks what does not follow the model's own gradients although it has some; `near` leaves out samples
    whose best margin so far is more than this share of the clean one; `nearest` tries only so many of the samples, as a share, those that
    came nearest; `nearer`, for `Restarts`, a smaller share and a number, gives those beyond that share only so many of the runs; `fill`,
    for `Restarts` and `EveryTarget`, the rows with a gradient that a run takes of a sample in the mean, gives as many runs as the round has
    rows for (`row_budget`), the last to those that came nearest; with `once` one at least to those within `nearer`, and beyond only what
    all get; `pays` leaves out the whole stage where the attack before broke less than this share of those it tried, or had no rows for any;
    `at_rival` aims at the class that came nearest so far, and leaves out samples for which none came nearer than the clean input;
    `from_closest`, for `vertices` and `swaps`, begins where searches since the last such stage came closest, and leaves out samples that
    none came close to (`CLOSE`).
    """

    attack: AttackLike
    rows: int
    victim: Victim | None = None
    keep: bool = False
    beyond: bool = False
    near: float = 1.0
    nearest: float = 1.0
    nearer: tuple[float, int] | None = None
    fill: int = 0
    once: bool = False
    pays: float = 0.0
    from_closest: bool = False
    at_rival: bool = False

    @property
    def last(self) -> bool:
        """No stage goes on from where this one ends: a second round of `swaps` from there found nothing."""
        return self.from_closest and isinstance(self.attack, Attack) and isinstance(self.attack.strategy, Swaps)

    def suited(self, near: Tensor, left: int, start: Tensor | None = None) -> AttackLike | None:
        """The attack for samples that came down to `near` (B,) of their clean margins; None where no run fits.

        Args:
            near: of the samples to be searched. left: rows with a gradient that the round may still spend.
            start: (B, ...) where a `from_closest` stage begins.
        """
        if self.from_closest:
            assert isinstance(self.attack, Attack)
            assert isinstance(self.attack.strategy, Swaps | Vertices)
            return replace(self.attack, strategy=replace(self.attack.strategy, start=start))
        if self.nearer is None and not self.fill:
            return self.attack
        assert isinstance(self.attack, Restarts | EveryTarget)
        runs = torch.full_like(near, self.attack.count, dtype=torch.int64)
        runs = runs if self.nearer is None else torch.where(near <= self.nearer[0], runs, self.nearer[1])
        if self.fill:
            least = (near <= self.nearer[0]).long() if self.once and self.nearer else torch.zeros_like(runs)
            each, over = divmod(max(left, 0) // self.fill, len(near))
            over = 0 if self.once else over  # such runs are counted at half their rows: no remainder is left of them
            share = torch.full_like(runs, each).index_fill(0, near.argsort(stable=True)[:over], each + 1)
            runs = torch.minimum(runs, torch.maximum(least, share))
        return replace(self.attack, abreast=runs) if bool(runs.any()) else None


def row_budget(standing: int, broken: int) -> int:
    """Rows with a gradient that a round may come to where some fill what is left."""
    return _STANDS * standing + _BROKEN * broken


def plan(threat: Projects, effort: str, *, classes: int, single_label: bool, gradients: bool, trusted: bool = True) -> tuple[Stage, ...]:
    """The cascade for one threat.

    Args:
        threat: any registered one. effort: fast, default or max. classes: scores per sample.
        single_label: one class per sample; aimed attacks and DLR need that, and 3 classes.
        gradients: whether any gradient reaches the input; without, only noise is left, and the grid of rigid motions; `black_box` follows.
        trusted: nothing speaks against them, so that at effort default, under Linf and L2, searches end that lead nowhere (`WhileHopeful`).
    """
    if effort not in EFFORTS:
        raise BadInput(f"effort '{effort}': unknown: use one of {', '.join(EFFORTS)}")
    level, aimed = EFFORTS.index(effort), single_label and classes >= 3
    draws = (5, 10, 100)[level]
    if isinstance(threat, Patch):
        return _squares(threat, effort, gradients)
    if not gradients:
        blind = [Stage(noise(100 * draws, threat=threat), 50 * draws)]
        return (*blind, _grid(threat, level)) if isinstance(threat, Rigid) else tuple(blind)
    cheap = Stage(swaps(6, threat, tries=2), 12) if isinstance(threat, L1) else Stage(pgd(10, threat=threat, objective=margin), 10)
    draws = draws // 5 if isinstance(threat, L1) else draws  # spread over all features a change under L1 is next to none
    stages = [cheap, Stage(noise(draws, threat=threat), max(draws // 2, 1))]
    if isinstance(threat, L0):
        return (*stages, *_pixels(threat, effort))
    if isinstance(threat, Rigid):
        return (*stages, _grid(threat, level), from_starts(threat, effort, (1, 3, 5)[level], margin))
    if isinstance(threat, Linf | L2 | L1):
        return (*stages, *_norms(threat, effort, classes if aimed else 0, trusted))
    return (*stages, _variable(threat, steps_of(threat, effort), (5, 9, 9)[level], classes if aimed else 0), from_starts(threat, effort, 1))


def black_box(threat: Projects, access: Access, queries: int, x: Tensor) -> tuple[Stage, ...]:
    """The searches of `epsball.blackbox` for inputs like x (B, ...), each a stage."""
    return tuple(Stage(share.attack, share.queries) for share in searches(threat, access, queries, x))


def swept(threat: Projects, effort: str, x: Tensor) -> Iterator[Stage]:
    """Each feature by itself, where inputs (B, ...) have few: tables are read in steps, by rules and bins, that gradients pass over.

    So many rounds, which cost a row of a table next to nothing.
    """
    rounds = (0, 4, 12)[EFFORTS.index(effort)]
    if rounds and narrow(threat, x):
        queries = of_rounds(rounds, x[0].numel())
        yield Stage(sweep(queries, threat), queries // 2, beyond=True)


def beside(threat: Projects, access: Access, effort: str, queries: int, x: Tensor) -> Iterator[Stage]:
    """The same for models that have gradients which are doubted; a search that broke a twentieth of what it tried starts anew with four
    times as many queries, but at effort fast."""
    longer = black_box(threat, access, 4 * queries, x) if effort != "fast" else ()
    for number, search in enumerate(black_box(threat, access, queries, x)):
        yield replace(search, beyond=True)
        if longer:
            yield replace(longer[number], beyond=True, pays=PAYS)


def from_starts(threat: Projects, effort: str, restarts: int, objective: Objective = cross_entropy) -> Stage:
    """APGD from so many starts."""
    steps = steps_of(threat, effort)
    return Stage(apgd(steps, restarts, threat=threat, objective=objective), steps * restarts)


def _pixels(threat: L0, effort: str) -> Iterator[Stage]:
    """Corners and sigma-zero find pixels whose gradients are small at first; which ones PGD_0 settles on hangs on where it starts.

    Of few pixels random search tries so many sets that gradients, which only tell of small changes, find no more.
    """
    steps, restarts = steps_of(threat, effort), (1, 2, 5)[EFFORTS.index(effort)]
    for search in (corners(2 * steps, threat=threat), sigma_zero(8 * steps, threat=threat)):
        yield Stage(replace(search, smallest=False), search.steps)  # any success within the radius will do
    yield Stage(nearest(6 * steps, threat), 6 * steps)  # its way by L1 finds what those miss on networks trained against Linf
    yield Stage(sparse_rs(25 * steps, threat=threat), 13 * steps)
    yield Stage(pgd(3 * steps, restarts=restarts, threat=threat, objective=margin), 3 * steps * restarts)


def _squares(threat: Patch, effort: str, gradients: bool) -> tuple[Stage, ...]:
    """Which square a search settles on hangs on where it starts, so many short ones beat few long ones, and solid colors most of both."""
    level = EFFORTS.index(effort)
    draws, restarts = (100, 400, 2000)[level], (20, 40, 100)[level]
    paint = Stage(noise(draws if gradients else 5 * draws, threat=threat), draws // 2 if gradients else 5 * draws // 2)
    if not gradients:
        return (paint,)
    short = Stage(apgd(10, restarts, threat=threat, objective=margin), 10 * restarts)
    return paint, short, from_starts(threat, effort, (1, 3, 5)[level])


def _grid(threat: Rigid, level: int) -> Stage:
    """Every angle with every shift: in three dimensions nothing beats looking."""
    rotations, shifts = ((11, 3), (31, 5), (61, 9))[level]
    return Stage(rotation_translation(rotations, shifts, threat), rotations * shifts**2 // 2)


def _norms(threat: Projects, effort: str, classes: int, trusted: bool) -> Iterator[Stage]:
    """Aimed APGD on the margin, then others from other starts; the largest effort adds long ones, and other losses.

    `classes` is 0 where nothing can be aimed at.
    """
    if effort == "default" and isinstance(threat, L1):
        yield from _sparse(threat, classes)
    elif effort == "default":
        stages = _default(threat, classes)
        yield from (replace(stage, attack=while_hopeful(stage.attack)) for stage in stages) if trusted else stages
    elif effort == "fast" and isinstance(threat, L1):
        yield from _one_of_each(threat, classes)
        yield from _from_closest(threat)
        yield _walks(threat, 30, 1, far=3, rounds=2)
    elif effort == "fast":
        yield at_nearest(threat, 10, 1, 3, classes)
        yield _walks(threat, 30, 1, far=3, rounds=2)
    else:
        yield at_nearest(threat, 20, 3, 3, classes)
        yield Stage(apgd(20, 10, threat=threat, objective=margin), 200)
        yield _walks(threat, 30, 10, far=3, rounds=2)
        if isinstance(threat, L1):
            yield _walks(threat, 60, 3, far=3, rounds=2)
            yield Stage(from_larger(100, 5, threat=threat, objective=margin, scales=_BALLS), 500)
            yield side_by_side(_four_kinds(threat, classes), 20, 1, 40)
            yield from _from_closest(threat, climb=True)
            yield side_by_side(vertices(60, threat), 60, 41, 5)
            yield from _from_closest(threat, climb=True)
        yield from _long(threat, classes)


def _default(threat: Projects, classes: int) -> Iterator[Stage]:
    """Twenty steps toward each of the three nearest classes break what a hundred toward nine do, but for 1 or 2 of 100 samples.

    Under Linf other starts find what they miss, other losses and other classes; more pay only for samples that came near. Under L2 a walk
    from far away breaks what nothing from near by does, on networks whose gradients mislead; one each shows whether more pay. Last comes
    targeted DLR, which leaves saddles of the margin.
    """
    yield at_nearest(threat, 20, 3, 3, classes)
    if isinstance(threat, Linf):
        for first, loss in ((3, margin), (5, cross_entropy)):
            yield replace(side_by_side(apgd(20, threat=threat, objective=loss), 20, first, 2), near=PROMISING, nearer=(NEAR, 1))
        yield replace(at_nearest(threat, 40, 3, 1, classes), near=NEARER)
        if classes:
            yield replace(at_nearest(threat, 20, 3, 9, classes, dlr_targeted), near=NEAR)
        # Runs are counted as if all samples had as many; most have one, hence half of what a walk takes.
        yield replace(_walks(threat, 60, 5, far=3, rounds=2), near=NEARER, nearer=(VERY_NEAR, 1), fill=33, once=True)
    else:
        yield from _while_it_pays(outside_in(30, threat, far=3, rounds=2), 39, 1, 2)
        yield replace(side_by_side(outside_in(40, threat, far=3, rounds=2), 49, 3, 9), near=NEARER, nearer=(0.03, 1))
        if classes:
            yield replace(at_nearest(threat, 20, 3, 2, classes, dlr_targeted), near=0.5, fill=16)


def _while_it_pays(search: AttackLike, rows: int, *counts: int) -> Iterator[Stage]:
    """So many runs, then so many more at a time, as long as that pays."""
    first, *more = (side_by_side(search, rows, sum(counts[:turn]), count) for turn, count in enumerate(counts))
    yield first
    yield from (replace(stage, pays=PAYS) for stage in more)


def _sparse(threat: L1, classes: int) -> Iterator[Stage]:
    """Under L1 many short searches from larger balls, for the right sparsity has to be found, and where a search ends hangs on luck.

    None is best everywhere (`benchmarks/l1_starts.py`), so there are several: one run of each of four kinds, and one at each class. A local
    search goes on from where they came closest, for few gradients; of the closest points of long searches a climb in short steps makes
    more. Samples that came near get more and longer runs at the class that came nearest: that is mostly the right one, and a run at it
    breaks what one at no class hardly ever does. Where gradients mislead near the clean input a walk inward breaks what all of these leave:
    one each for the quarter that came nearest shows whether more pay, and those whether still more, whatever rows are left, for where few
    stand there are none. What still falls then is anywhere, so that rows that are left go to all that stand: one more run of each kind, and
    then runs at the class that came nearest.
    """
    nearer, near, far, farther = _four_kinds(threat, classes)
    yield from _one_of_each(threat, classes)
    yield _at_classes(threat, classes, 5)
    yield from _from_closest(threat, climb=True)
    aimed = side_by_side(vertices(30, threat), 30, 8, 8, fill=24)
    yield replace(aimed, near=PROMISING, nearer=(0.05, 3), at_rival=classes > 0)
    yield _climb(threat)
    walk, *more = _while_it_pays(outside_in(30, threat, far=3, rounds=2), 39, 1, 2, 2, 2, 2)
    yield from (replace(walk, nearest=_PROBED), *more)
    yield side_by_side((far, near, farther, nearer), 20, 22, 4, fill=14)
    yield from _from_closest(threat)
    yield replace(side_by_side(vertices(30, threat), 30, 26, 16, fill=22), at_rival=classes > 0)
    yield from _from_closest(threat)


def _from_closest(threat: L1, climb: bool = False) -> Iterator[Stage]:
    """A local search from there; where told to `climb`, one in short steps toward vertices of the budget first. In the estimate of rows a
    look without a gradient counts half."""
    if climb:
        yield _climb(threat)
    yield Stage(swaps(8, threat, tries=6, shares=(0.1, 0.3)), 32, from_closest=True)


def _climb(threat: L1) -> Stage:
    """In short steps toward vertices of the budget, from there."""
    return Stage(Attack("vertices", threat, cross_entropy, Vertices((1.0, 1.0), (0.3, 0.3), 0.02), 20), 20, from_closest=True)


def _four_kinds(threat: L1, classes: int) -> tuple[AttackLike, ...]:
    """`vertices` from balls of 3 budgets and from far larger ones, on several losses. Runs of different kinds fail on different samples,
    more than runs of one kind that each draw their first ball. Most end before their 20 looks, in the mean after 14."""
    kinds = ((3.0, dlr if classes else margin), (3.0, cross_entropy), (30.0, cross_entropy), (60.0, margin))
    return tuple(vertices(20, threat, loss, (budgets, budgets)) for budgets, loss in kinds)


def _one_of_each(threat: L1, classes: int) -> Iterator[Stage]:
    """A run of each kind: alone the first, for many samples break by it, then two side by side; from the second of the large balls where
    those pay."""
    nearer, near, far, farther = _four_kinds(threat, classes)
    yield side_by_side(nearer, 20, 1, 1)
    yield side_by_side((near, far), 20, 2, 2)
    yield replace(side_by_side(farther, 20, 4, 1), pays=PAYS)


def _at_classes(threat: L1, classes: int, first: int) -> Stage:
    """`vertices` at each of the nine best other classes, or three runs from number `first` on where nothing can be aimed at."""
    search = vertices(20, threat, first=(3.0, 3.0))
    if not classes:
        return side_by_side(search, 20, first, 3)
    count = min(9, classes - 1)
    return Stage(EveryTarget(search, count, by_logit, name="vertices_t", abreast=True), 20 * count)


def side_by_side(search: AttackLike | tuple[AttackLike, ...], rows: int, first: int, count: int, fill: int = 0) -> Stage:
    """Runs of a search, or of several in turn, each of at most so many rows, from the one of number `first` on, side by side."""
    return Stage(Restarts(search, count, first=first, abreast=True), rows * count, fill=fill)


def _long(threat: Projects, classes: int) -> Iterator[Stage]:
    steps = steps_of(threat, "max")
    yield _walks(threat, 160, 5, far=20, rounds=4)
    yield at_nearest(threat, steps, 3, 9, classes)
    yield from_starts(threat, "max", 3, margin)
    yield from_starts(threat, "max", 3)
    if classes:
        yield Stage(apgd_dlr(steps, 3, threat=threat), 3 * steps)


def at_nearest(threat: Projects, steps: int, restarts: int, targets: int, classes: int, objective: Objective = margin) -> Stage:
    """At the nearest classes; the margin from several starts where nothing can be aimed at."""
    if not classes:
        return Stage(apgd(steps, restarts, threat=threat, objective=margin), steps * restarts)
    count = min(targets, classes - 1)
    # By the margin first, not by targeted DLR: on robust models it breaks more in the same steps.
    aimed = replace(apgd_t(steps, targets=count, threat=threat, objective=objective), abreast=True)
    return Stage(aimed, steps * count + count + 4)


def _walks(threat: Projects, steps: int, count: int, far: int, rounds: int) -> Stage:
    many = restarted(outside_in(steps, threat, far, rounds), count, abreast=True)
    return Stage(many, count * (steps + (rounds + 1) * far))


def _variable(threat: Projects, steps: int, targets: int, classes: int) -> Stage:
    """The threat's own attack, or APGD for compositions, aimed at one class after another by falling score where there are classes.

    Not in MALT order, which measures distances in the input.
    """
    own: dict[type, Callable[..., AttackLike]] = {Flow: stadv, Color: recoloradv}
    recipe = own.get(type(threat), apgd)
    if not classes:
        return Stage(recipe(3 * steps, threat=threat, objective=margin), 3 * steps)
    attack = recipe(steps, threat=threat, objective=margin)
    count = min(targets, classes - 1)
    return Stage(EveryTarget(attack, count, by_logit, name=f"{attack.name}_t"), steps * count)


def steps_of(threat: Projects, effort: str) -> int:
    """L1 gets twice the steps: its search has to find the right sparsity as well, and still gains where the others have ended."""
    return STEPS[effort] * (2 if isinstance(threat, L1) else 1)


def deeper(threat: Projects, effort: str, *, classes: int, single_label: bool) -> AttackLike:
    """The plan's strongest attack again with twice the steps and all the targets: what would more effort still find?"""
    steps, aimed = 2 * steps_of(threat, effort), single_label and classes >= 3
    if isinstance(threat, L0):
        wide = replace(sigma_zero(8 * steps, threat=threat), smallest=False)
        random = sparse_rs(25 * steps, threat=threat)
        return Cascade((wide, random, pgd(3 * steps, restarts=2, threat=threat, objective=margin)), "sigma_zero, sparse_rs and pgd")
    level = EFFORTS.index(effort)
    if isinstance(threat, Rigid):
        return apgd(steps, (2, 6, 10)[level], threat=threat, objective=margin)
    if isinstance(threat, Patch):
        return apgd(20, (20, 40, 100)[level], threat=threat, objective=margin)
    if not isinstance(threat, Linf | L2 | L1):
        return _variable(threat, steps, 9, classes if aimed else 0).attack
    short, walks = (20, 20, 200)[level], (1, 2, 5)[level]
    again = at_nearest(threat, short, (2, 6, 6)[level], 9, classes if aimed else 0).attack
    far = _walks(threat, (60, 60, 200)[level], walks, far=3 if level < 2 else 20, rounds=2 if level < 2 else 4).attack
    return Cascade((again, far), f"{again.name} and {far.name}")


def default_threats(shape: tuple[int, ...], width: float) -> list[str]:
    """Threats to ask about when nobody says: the field's usual ones for inputs of that shape (without B).

    Small gray images (digits): Linf 0.05 to 0.2; color images: 2/255 to 8/255; other inputs: shares of the box width.
    """
    if len(shape) == 3 and shape[0] == 1 and shape[1] <= 64:
        big = shape[1] >= 20
        linf, l2 = (("0.1", "0.2", "0.3"), ("1", "2")) if big else (("0.05", "0.1", "0.2"), ("0.5", "1"))
        return [scale_text("linf", linf, width), scale_text("l2", l2, width)]
    if len(shape) == 3:
        l2 = ("0.25", "0.5") if shape[1] <= 64 else ("1", "3")
        return [scale_text("linf", ("2/255", "4/255", "8/255"), width), scale_text("l2", l2, width)]
    return [scale_text("linf", ("0.01", "0.05", "0.1"), width)]


def scale_text(name: str, radii: tuple[str, ...], width: float) -> str:
    """Radii for a box of another width than 1.

    >>> scale_text("linf", ("0.1", "0.2"), 2.0)
    'linf:0.2,0.4'
    """
    if width == 1.0:
        return f"{name}:{','.join(radii)}"
    from fractions import Fraction

    return f"{name}:{','.join(format(float(Fraction(r)) * width, 'g') for r in radii)}"
