"""Ways to look at a model whose gradients are in doubt: past what comes before a layer, by a part of it, by what decides inside it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from epsball.auditing.preflight import Bench, cosine, foretold, posed, slopes
from epsball.core import Key, Untargeted, Victim, content_ids
from epsball.core.forks import forks
from epsball.core.inside import Nudged, Part, Probed, Shaken, Straight, behind_break, changed_input, parts
from epsball.objectives import margin

TRUE, ASIDE, DIRECTIONS = 0.2, 0.02, 8
"""Median correlation of changes measured and foretold below which gradients are false; how far aside, as a share of the box; how often."""
FAR, REACH = 0.75, 0.05
"""The same correlation farther aside, below which searches that go by gradients need others beside them
(`benchmarks/gradients.py`)."""
TOLD, SHAKEN = 0.6, 0.1
"""The same correlation of other twins, below which differences in random directions are tried; the least of those for them to be followed:
few directions of many tell little of any one."""
MANY_AND_WIDE = ((32, 0.05), (128, 0.05), (32, 0.3))
"""How many directions searches follow, and how wide changes, one after the other: few, many where these pay, and wide ones."""
BLANK = 0.75
"""Share of features without a gradient above which searches that go by gradients need others beside them."""
FORKS = 3
"""Most decisions inside a model that are searched by themselves."""
SAME_CLASS, WIDEST = 0.9, 1.0
"""Least share of samples for which the best class of scores inside is the model's; widest box that neighborhoods are measured by."""


def shaken(bench: Bench, others: list[Victim], seed: int) -> tuple[Victim, ...]:
    """Twins with a derivative by differences in random directions of what comes before a layer, where it tells how scores change and no
    other twin does.

    Cost: that of `truth` for each of the others; where none is true, 1 forward row for each of at most 32 samples; where there is such a
    layer that of `truth` again, with `probes`.
    """
    rows, victim, model = fine(bench), bench.victim, opened(bench.victim)
    if model is None or not len(rows) or any(truth(replace(bench, victim=way), seed, REACH) >= TOLD for way in others):
        return ()
    x = bench.x[rows]
    try:
        with victim:
            layer = behind_break(model, x)
        if layer is None:
            return ()
        ways = tuple(_within(victim, Shaken(model, layer, victim.box, x[0].numel(), count, width)) for count, width in MANY_AND_WIDE)
        # Wide changes say little of the short ways on which truth is measured.
        tells = reaches(bench, ways[0]) and truth(replace(bench, victim=ways[0]), seed, REACH) >= SHAKEN
        return ways if tells else ()
    except Exception:  # what raises here is the business of other checks
        return ()


def straight(bench: Bench) -> Victim | None:
    """A twin that goes past what changes the input before a layer sees it.

    Cost: 1 forward row for each of at most 32 samples; where there is such a layer 2 and 1 backward row more, and those of `probes`.
    """
    rows, victim, model = fine(bench), bench.victim, opened(bench.victim)
    if model is None or not len(rows):
        return None
    x = bench.x[rows]
    try:
        with victim, torch.no_grad():
            layer = changed_input(model, x)
        if layer is None:
            return None
        image = x.ndim == 4 and not any(isinstance(end, Tensor) for end in victim.box) and victim.box == (0.0, 1.0)
        twin = _within(victim, (Probed if image else Straight)(model, layer))
        return twin if reaches(bench, twin) else None
    except Exception:  # what raises here is the business of other checks
        return None


def part(bench: Bench, own: Victim, seed: int) -> Victim | None:
    """Where the gradients of `bench` do not tell how scores change: a twin that goes by those of a network inside, for the input as it is.

    Cost: that of `truth`; where it says no 1 forward row for each of at most 32 samples, and 1 more for every such network; where one
    answers as the model does that of `truth` again.
    """
    rows, model = fine(bench), opened(own)
    if model is None or not len(rows) or not isinstance(bench.goal, Untargeted) or (told := truth(bench, seed, REACH)) >= FAR:
        return None
    try:
        with own, torch.no_grad():
            alike = same_class(parts(model, bench.x[rows]), bench.output[rows])
        if not alike:
            return None
        twin = _within(own, Part(model, alike[0]))
        return twin if reaches(bench, twin) and truth(replace(bench, victim=twin), seed, REACH) > told else None
    except Exception:  # what raises here is the business of other checks
        return None


def nudged(bench: Bench) -> Victim | None:
    """Where most features have no gradient exactly at the input, but a little aside: a twin whose gradient is taken there.

    Cost: that of `blank`; where it is large 2 forward rows and 1 backward row more.
    """
    model, own = opened(bench.victim), blank(bench)
    if model is None or own <= BLANK:
        return None
    twin = _within(bench.victim, Nudged(model, bench.victim.box))
    return twin if blank(replace(bench, victim=twin)) < own / 2 else None


def forked(bench: Bench) -> tuple[Victim, ...]:
    """Twins that answer with the scores of what decides inside the model, the first `FORKS` of them.

    Cost: 1 forward row for each of at most 8 samples.
    """
    rows, victim, model = fine(bench)[:8], bench.victim, opened(bench.victim)
    if model is None or not len(rows):
        return ()
    try:
        with victim:
            return tuple(victim.twin(fork) for fork in forks(model, bench.x[rows])[:FORKS])
    except Exception:  # what raises here is the business of other checks
        return ()


def blank(bench: Bench) -> float:
    """Median share of a sample's features at which the margin's gradient is exactly 0; 0 where there is no gradient.

    Cost: 1 forward and 1 backward row for each of at most 32 samples.
    """
    rows = fine(bench)
    try:
        gradient = slopes(bench.victim, bench.x[rows], bench.goal.take(rows), margin).flatten(1)
    except Exception:  # a model without gradients is another finding's business
        return 0.0
    shares = (gradient == 0).double().mean(1)[gradient.abs().amax(1) > 0]
    return float(shares.median()) if len(shares) else 0.0


def truth(bench: Bench, seed: int, aside: float = ASIDE) -> float:
    """Median correlation of changes of the margin at random points within `aside` of the box with those that its gradient foretells.

    Not the cosine: on a curved surface any noise moves the margin the same way. 1 where nothing can be compared.

    Cost: 10 forward rows and 1 backward row for each of at most 32 samples.
    """
    rows = fine(bench)
    if not len(rows):
        return 1.0
    x, ways = bench.x[rows], (Key.of(seed).fold("aside", number) for number in range(DIRECTIONS))
    problem = posed(bench.victim, x, bench.goal.take(rows), margin)
    try:
        changes = foretold(problem, x, (points_aside(bench.victim, x, 2 * aside, way) for way in ways))
    except Exception:  # a model without gradients has none that lie
        return 1.0
    found = cosine(*(change - change.mean(1, keepdim=True) for change in changes))
    known = found[torch.isfinite(found)]
    return float(known.median()) if len(known) else 1.0


def opened(victim: Victim) -> nn.Module | None:
    """The module whose layers can be looked at with any batch; None where there is none, or something stands before it."""
    return victim.model if isinstance(victim.model, nn.Module) and victim.lens is None and not victim.fixed_batch else None


def _within(victim: Victim, model: Straight | Part | Nudged) -> Victim:
    """A twin whose looks with a gradient book the model's probes."""
    twin = victim.twin(model)
    twin.probes = model.probes
    return twin


def reaches(bench: Bench, twin: Victim) -> bool:
    """Whether a gradient of the twin reaches some sample that is right."""
    rows = fine(bench)
    return bool(slopes(twin, bench.x[rows], bench.goal.take(rows), margin).any())


def same_class(scores: dict[str, Tensor], own: Tensor) -> list[str]:
    """Names of those scores (B, C) whose best class is mostly that of `own` (B, C)."""
    return [name for name, one in scores.items() if share(one.argmax(1) == own.argmax(1)) >= SAME_CLASS]


def share(those: Tensor) -> float:
    """Of those, how many are true."""
    return float(those.double().mean())


def fine(bench: Bench) -> Tensor:
    """At most 32 samples that are right, with a finite answer."""
    return (~bench.goal.reached(bench.output) & torch.isfinite(bench.output).all(1)).nonzero().squeeze(1)[:32]


def points_aside(victim: Victim, x: Tensor, width: float, key: Key) -> Tensor:
    """Points of the box up to half of `width` boxes away from x in every feature."""
    low, high = (torch.as_tensor(bound, device=x.device) for bound in victim.box)
    shift = (key.uniform(content_ids(x), x) - 0.5) * width * (high - low).clamp(max=WIDEST)
    return (x + shift.to(x.dtype)).clamp(low, high)
