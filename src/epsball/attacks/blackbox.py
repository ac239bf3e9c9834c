"""The black-box recipe: which searches without gradients run, in which order, on how much of a budget of queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from epsball.attacks.combine import Cascade, Restarts, opened
from epsball.attacks.differences import differences
from epsball.attacks.hop_skip_jump import hop_skip_jump
from epsball.attacks.noise import noise
from epsball.attacks.pgd import mi_fgsm
from epsball.attacks.rays import rays
from epsball.attacks.registry import EVERY, register
from epsball.attacks.simba import simba
from epsball.attacks.sparse_rs import sparse_rs
from epsball.attacks.spatial import rotation_translation
from epsball.attacks.square import square
from epsball.attacks.surrogate import Surrogate, transferred
from epsball.attacks.sweep import VALUES, sweep
from epsball.attacks.transfer import di_fgsm
from epsball.core import Attack, AttackLike, Drop, Goal, Key, Model, Outcome, Problem, Projects, Reading, Victim, Watch
from epsball.core.attack import recipe
from epsball.core.descent import Strategy
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.threats import L0, L1, L2, Linf, Rigid

ENOUGH = 1000
"""Queries from which on a second kind of search gets a share: with fewer, cutting the first one short loses more."""
NARROW = 128
"""Most features for which each is tried by itself: tables are read by trees and rules as often as by networks."""
_SIDE = 8
"""Shortest side of an image: what has a shorter one is none."""
_STEPS = 8
"""Fewest steps of a climb on differences."""
_L1_STEP = 0.5  # of SimBA under L1: a quarter of the radius breaks most at radius 2, all of it as many at radius 1
_L2_HEIGHT = 0.6  # of Sparse-RS under L2: above half of the box, where pictures are cut into black and white
_EDGE = 1e6  # a step of SimBA that ends at the edge of any ball


@register(
    paper="epsball; parts: Square arXiv 1912.00049, SimBA 1905.07121, Sparse-RS 2006.12834, RayS 2006.12792, HopSkipJump 1904.02144",
    access=Access.LABELS,
    threats=EVERY,
    cost="at most budget forwards, the clean answer included",
)
def blackbox(budget: int = 1000, threat: Projects | None = None, surrogate: Surrogate | Model | None = None) -> BlackBox:
    """The searches without gradients that break most per query, in turn, each on the samples that still stand.

    What runs hangs on what the victim shows; of a victim with gradients only scores are asked.

    | threat | scores | labels |
    |---|---|---|
    | Linf | Square; from 1,000 queries on a quarter for SimBA | RayS; a quarter for HopSkipJump likewise |
    | L2 | Square; from 1,000 queries on a quarter for Sparse-RS, an eighth for HopSkipJump | HopSkipJump |
    | L1 | Sparse-RS; a quarter for SimBA, its moves projected onto the L1 ball | random points of the ball |
    | L0, pixels or features | Sparse-RS | random sets, at corners of the box |
    | rigid | an even grid, as fine as the budget allows | the same |
    | others | random points of the ball | the same |

    Of inputs of at most 128 features that are no images (a side below 8), half of the queries by scores go to a sweep of every feature
    first where they last for a round (16 queries a feature, under Linf and L2 not below 1,000), then an eighth each to two climbs on
    differences along every feature, where that makes 8 steps, and under L1 what is left all to SimBA.

    A surrogate is attacked before all of these, by DI-FGSM under Linf and L2, else by MI-FGSM: the victim is asked once whether
    that carried over, and the searches above run only where it did not.

    Args:
        budget: queries per sample, the clean answer included; never exceeded. threat: any; Linf unless given.
        surrogate: of `fit_surrogate`, whose own queries come on top once, or any model with gradients in the victim's box, as `ensemble`
        makes of several.

    Returns:
        The attack; its name is `blackbox`. A sample is not asked about any more once it is broken.

    Raises:
        BadInput: budget below 2.

    Cost: at most budget forwards, the clean answer included, no backward.

    >>> blackbox(budget=100).name
    'blackbox'
    """
    if budget < 2:
        raise BadInput(f"budget: {budget}: must be 2 or more queries per sample, for the clean answer is one")
    threat = threat or Linf()
    follow = di_fgsm if isinstance(threat, Linf | L2) else mi_fgsm
    return BlackBox(threat, budget, None if surrogate is None else transferred(surrogate, follow(threat=threat)))


@dataclass(frozen=True)
class Share:
    """A search and the most queries that it asks for one sample."""

    attack: AttackLike
    queries: int


def searches(threat: Projects, access: Access, queries: int, x: Tensor) -> tuple[Share, ...]:
    """The searches of `blackbox` for inputs like x (B, ...), by what the victim shows: at most `queries` beside the clean answer."""
    if access is Access.LABELS:
        return tuple(_by_labels(threat, queries))
    found = tuple(_by_features(threat, queries, x)) if narrow(threat, x) else ()
    return (*found, *_by_scores(threat, queries - sum(share.queries for share in found), narrow(threat, x)))


def _by_features(threat: Projects, queries: int, x: Tensor) -> Iterator[Share]:
    """A sweep, for half of the queries, where these last for a round; for a quarter climbs on differences, where they make some steps."""
    if queries // 2 >= VALUES * x[0].numel() and (queries >= ENOUGH or isinstance(threat, L1)):
        yield Share(sweep(queries // 2, threat), queries // 2)
    look = 2 * x[0].numel() + 1
    steps = (queries // 8 - 1) // look
    if steps >= _STEPS:
        for share in (0.1, 0.5):
            yield Share(replace(differences(steps, threat, share=share), name=f"differences_{share:g}"), steps * look + 1)


def narrow(threat: Projects, x: Tensor) -> bool:
    """Whether each feature can be tried by itself: inputs (B, ...) of few, and no images, as rows of tables, short signals, some points."""
    few = x[0].numel() <= NARROW and (x.ndim == 2 or min(x.shape[-2:]) < _SIDE)
    return few and isinstance(threat, Linf | L2 | L1)


def _by_scores(threat: Projects, queries: int, few: bool) -> Iterator[Share]:
    """`few`: inputs are narrow, so that under L1 SimBA comes through all features."""
    part = queries // 4 if queries >= ENOUGH else 0
    if isinstance(threat, Linf):
        yield Share(square(queries - part, threat=threat), queries - part)
        if part:
            yield Share(simba(part, step=_EDGE, threat=threat), part)
    elif isinstance(threat, L2):
        last = part // 2
        yield Share(square(queries - part - last, threat=threat), queries - part - last)
        if part:
            yield Share(sparse_rs(part, threat=threat, height=_L2_HEIGHT), part)
            yield Share(_hop(last, threat), last)
    elif isinstance(threat, L1):
        last = queries if few else queries // 4
        if last < queries:
            yield Share(sparse_rs(queries - last, threat=threat), queries - last)
        if last:
            yield Share(replace(simba(last, step=_L1_STEP), threat=threat), last)
    elif isinstance(threat, L0):
        yield Share(sparse_rs(queries, threat=threat), queries)
    else:
        yield from _anywhere(threat, queries)


def _by_labels(threat: Projects, queries: int) -> Iterator[Share]:
    if isinstance(threat, Linf):
        last = queries // 4 if queries >= ENOUGH else 0
        yield Share(first_success(rays(queries - last, threat=threat)), queries - last)
        if last:
            yield Share(_hop(last, threat), last)
    elif isinstance(threat, L2):
        yield Share(_hop(queries, threat), queries)
    elif isinstance(threat, L0):  # one random set of corners after the other: nothing tells which of them is better
        yield Share(Restarts(sparse_rs(1, threat=threat), queries), queries)
    else:
        yield from _anywhere(threat, queries)


def _hop(queries: int, threat: Projects) -> AttackLike:
    """HopSkipJump with estimates a fifth as long as the paper's: with a thousand queries, many rough steps beat a few good ones."""
    return first_success(hop_skip_jump(queries, draws=20, tries=20, threat=threat))


def _anywhere(threat: Projects, queries: int) -> Iterator[Share]:
    """A grid of rigid motions, two queries of which are spent on the identity; random points of other balls."""
    points = queries - 2
    if isinstance(threat, Rigid) and points > 0:
        shifts = max(side for side in (1, 3, 5, 7, 9, 11) if side == 1 or 6 * side**3 <= points)
        yield Share(rotation_translation(points // shifts**2, shifts, threat), points // shifts**2 * shifts**2 + 2)
    else:
        yield Share(noise(queries, threat=threat), queries)


def first_success(attack: Attack) -> Attack:
    """A label-only search for the smallest change as one for any change within the radius."""
    return replace(attack, strategy=FirstSuccess(attack.strategy), smallest=False)


@dataclass(frozen=True)
class FirstSuccess:
    """Ends a label-only search for a sample with the query that breaks it, or with the last of its budget."""

    search: Strategy

    def init(self, problem: Problem, steps: int) -> Any:
        """The search's own, content with the radius."""
        state = self.search.init(problem, steps)
        return replace(state, found=replace(state.found, enough=problem.radius))

    def step(self, problem: Problem, state: Any) -> tuple[Reading, Any]:
        """What the search has found after its move, not before."""
        _, after = self.search.step(problem, state)
        return replace(after.found.reading(problem), over=after.found.left(problem) <= 0), after


@dataclass(frozen=True, repr=False)
class BlackBox:
    """See `blackbox`."""

    threat: Projects
    budget: int
    first: Attack | None = None
    name: str = "blackbox"

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
        """As `Attack.__call__`."""
        with Victim.of(model) as victim:
            case = opened(victim, x, goal, radius, clean, seed)
            parts = Cascade(tuple(share.attack for share in self._shares(victim.access, x)), self.name)
            outcome = case.run(parts, drop, watch)
        return replace(outcome, queries=outcome.queries + case.queries)

    def _shares(self, access: Access, x: Tensor) -> Iterator[Share]:
        """What carries over from a surrogate, one query; then searches for the rest of the budget."""
        left = self.budget - 1
        if self.first is not None:
            yield Share(self.first, 1)
            left -= 1
        if left:
            yield from searches(self.threat, access, left, x)

    def __repr__(self) -> str:
        return recipe(self)
