"""The best search for the smallest change, per norm: near searches, then walks inward from what fools the model already."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.attacks.apgd import apgd
from epsball.attacks.combine import Case, SmallestRadius, merged, nothing, opened
from epsball.attacks.inward import inward, outside_in
from epsball.attacks.minimal import ddn, fmn
from epsball.attacks.pgd import pgd
from epsball.attacks.registry import register
from epsball.attacks.sigma_zero import sigma_zero
from epsball.attacks.targets import malt
from epsball.core import Aimed, AttackLike, Drop, Goal, Key, Model, Outcome, Projects, Untargeted, Victim, Watch
from epsball.core.attack import recipe
from epsball.core.problem import ends
from epsball.core.rows import take
from epsball.core.victim import Tally
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L0, L1, L2, Linf, named


def smallest(norm: str, steps: int = 500) -> Nearest:
    """The strongest search for the smallest change known here: `nearest` under the norm.

    Args:
        norm: linf, l2, l1, l0 or l0f. steps: most gradient rows per sample, about.

    >>> smallest("l2").name
    'nearest'
    """
    return nearest(steps, named(norm))


def bisection(norm: str, steps: int = 40, rounds: int = 14) -> SmallestRadius:
    """Bisects each sample's radius with a fixed-radius attack: APGD on the margin, PGD_0 under L0.

    Args:
        norm: linf, l2, l1, l0 or l0f. steps: of each attack. rounds: bisections.

    Cost: at most (rounds + 1) * steps forwards and backwards per sample.
    """
    attack = pgd if norm.startswith("l0") else apgd
    return SmallestRadius(attack(steps, threat=named(norm), objective=margin), rounds)


@register(
    paper="epsball; parts: FMN arXiv 2102.12827, DDN 1811.09600, sigma-zero 2402.01879, MALT 2407.02240, APGD 2003.01690",
    kind="smallest",
    cost="about steps forwards and backwards",
)
def nearest(steps: int = 500, threat: Projects | None = None) -> Nearest:
    """A portfolio in which every part only looks for less than the best so far.

    1. A quick search from the clean input: DDN under L2, FMN under Linf and L1, sigma-zero under L0.
    2. Linf: quick searches aimed at each of the nearest classes (MALT's order), within the size found so far. The others gain
       more from step 3.
    3. L0: the same search under L1, and what it changed, counted: more than half of the steps. Elsewhere walks inward from far
       examples, each made by a few signed steps from another start. Where gradients mislead near the clean input, as in networks
       trained against Linf, this finds changes several times smaller than any search that starts there; and several short walks
       find smaller ones than a long one. Under L2 and L1 one more for every 250 steps.
    4. A walk inward from the best (`epsball.attacks.inward`).

    Args:
        steps: most gradient rows per sample, about. threat: Linf, L2, L1 or L0.

    Differs from its parts: they each start at the clean input and end where they end.
    """
    threat = threat or L2()
    if steps < 0:
        raise BadInput(f"steps: {steps}: must be 0 or more")

    def share(of: float) -> int:
        return round(of * steps)

    if isinstance(threat, L0):
        first, sparse = sigma_zero(share(0.25), threat=threat), Counted(threat, nearest(share(0.6), L1(threat.room)))
        return Nearest(first, first, (sparse,), share(0.18), targets=0, order=threat)
    if isinstance(threat, Linf):
        walk = replace(outside_in(share(0.27), threat), smallest=True)
        return Nearest(fmn(share(0.2), threat=threat), fmn(share(0.05), threat=threat), (walk,), share(0.2), targets=3, order=threat)
    if not isinstance(threat, (L2, L1)):
        raise BadInput(f"threat '{threat.name}': has no smallest search: use linf, l2, l1, l0 or l0f")
    first, walks = (ddn if isinstance(threat, L2) else fmn)(share(0.28), threat=threat), 2 + steps // 250
    far = SmallestRadius(apgd(min(6, steps), threat=Linf(threat.room), objective=margin), 3)
    walk = replace(outside_in(share(0.36 / walks), threat), far=far, smallest=True)
    return Nearest(first, first, (walk,) * walks, share(0.2), targets=0, order=threat)


@dataclass(frozen=True, repr=False)
class Nearest:
    """See `nearest`.

    Attributes:
        first, aimed: searches from the clean input. walks: those from elsewhere. polish: steps of the last walk.
        targets: classes aimed at. order: the threat whose norm ranks them.
    """

    first: AttackLike
    aimed: AttackLike
    walks: tuple[AttackLike, ...]
    polish: int
    targets: int
    order: Projects
    name: str = "nearest"

    @property
    def threat(self) -> Projects:
        """That of its parts."""
        return self.first.threat

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
        """As `Attack.__call__`; `radius` is the largest change of interest, None all that the box allows."""
        with Victim.of(model) as victim:
            case = opened(victim, x, goal, torch.inf if radius is None else radius, clean, Key.of(seed).fold(self.name))
            threat = self.threat.within(victim.box)
            whole = nothing(case, threat, 1)
            rows = (~whole.reached & ~whole.flags["invalid"]).nonzero().squeeze(1)
            if not len(rows):
                return whole
            drop = ends(drop)
            part, begun = case.take(rows), replace(nothing(case.take(rows), threat, 1), queries=torch.zeros_like(rows.cpu()))
            found = self._near(part, begun, drop, watch)
            for number, walk in enumerate(self.walks):
                found = _better(found, replace(part, key=part.key.fold("walk", number)).run(walk, drop, watch))
            last = inward(threat, found.x_adv, self.polish, 0.3, 0.03)
            found = _better(found, part.run(last, drop, watch))
        return merged(whole, rows, found, smallest=True)

    def _near(self, c: Case, found: Outcome, drop: bool, watch: Watch | None) -> Outcome:
        """The quick search, then the same toward each of the nearest classes, within what is found so far."""
        found = _better(found, c.run(self.first, drop, watch))
        count = min(self.targets, c.clean.shape[1] - 1)
        if not isinstance(c.goal, Untargeted) or count < 2:
            return found
        labels, tally = c.goal.labels, Tally.zeros(len(c.x))
        order = malt(c.victim, c.x, labels, c.clean, self.order.within(c.victim.box), count, tally)
        found = replace(found, queries=found.queries + tally.forwards, backwards=found.backwards + tally.backwards)
        for rank in range(count):
            goal, within = Aimed(labels, order[:, rank]), torch.where(found.reached, _less(self.threat, found.size), c.radius)
            found = _better(found, replace(c, goal=goal, radius=within, key=c.key.fold("target", rank)).run(self.aimed, drop, watch))
        return found

    def __repr__(self) -> str:
        return recipe(self)


@dataclass(frozen=True, repr=False)
class Counted:
    """A search for the smallest change under another norm, judged by the pixels that it changes."""

    threat: L0
    search: AttackLike
    name: str = "counted"

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
        """As `Attack.__call__`; successes of more than `radius` pixels come back as failures."""
        with Victim.of(model) as victim:
            case = opened(victim, x, goal, radius, clean, seed)
            found = self.search(victim, case.x, case.goal, torch.inf, case.key, clean=case.clean, drop=drop, watch=watch)
            whole = nothing(case, self.threat.within(victim.box), found.steps)
            size = self.threat.size(case.x, found.x_adv)
        rows = (found.reached & (size <= case.radius)).nonzero().squeeze(1)
        spent = replace(whole, queries=whole.queries + found.queries, backwards=found.backwards)
        gain = replace(take(found, rows), size=size[rows], queries=0 * rows.cpu(), backwards=0 * rows.cpu())
        return merged(spent, rows, gain, smallest=True)

    def __repr__(self) -> str:
        return recipe(self)


def _better(found: Outcome, other: Outcome) -> Outcome:
    """The smaller success of both, per sample, and the costs of both."""
    return merged(found, torch.arange(len(found.size), device=found.size.device), other, smallest=True)


def _less(threat: Projects, size: Tensor) -> Tensor:
    """The largest radius that is a real gain on `size` (B,): one pixel less where pixels are counted."""
    return (size - 1).clamp(min=0) if isinstance(threat, L0) else size * 0.9999
