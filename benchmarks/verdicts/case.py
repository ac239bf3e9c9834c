"""What a case is: a defense, how it was judged by those who proposed it, and how somebody judges it who knows what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from epsball.data import Dataset
from verdicts.bases import samples
from verdicts.search import Climb, Judge, Seen, Squares, majority

Kind = Literal["masked", "overstated", "control"]
Attack = Climb | Squares

CAUSES: dict[str, frozenset[str]] = {
    "dead": frozenset({"no-gradient", "gradient", "hidden-steps", "optimizes"}),
    "scores": frozenset({"gradient", "losses-disagree", "probabilities"}),
    "random": frozenset({"random"}),
    "batch": frozenset({"batch"}),
    "rough": frozenset({"rough", "unstable", "hidden-steps", "false-gradient", "landscape"}),
}
"""Cause -> ids of the flags and findings that name it: gradients that do not reach the input; scores that saturate or vanish; chance;
neighbors in the batch; gradients that lead nowhere."""


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name, paper: how it is called, where it comes from.
        kind: masked: gradients through the model as it is mislead; overstated: they do not, but the first evaluation was weak;
            control: nothing is wrong with it.
        model: makes it, in eval mode. naive: the evaluation of those who proposed it. adaptive: by somebody who knows it.
        cause: of a masked one, a key of `CAUSES`. radius: Linf. judge: what counts as broken. random: one answer proves nothing.
        official: most samples for AutoAttack, of which one may be dear. note: what a reader of the table should know.
        samples: (n, seed) -> test images. held: the audit was not tuned on it, and its first
            verdict was that; empty: it was. lenient: another reading of what counts as broken, that of
            those who proposed it: the naive number uses it, and a note says what stands by it.
    """

    name: str
    paper: str
    kind: Kind
    model: Callable[[], nn.Module]
    naive: Climb
    adaptive: tuple[Attack, ...]
    cause: str = ""
    radius: float = 0.2
    judge: Callable[[nn.Module], Judge] = majority
    random: bool = False
    official: int = 50
    note: str = ""
    samples: Callable[[int, int], Dataset] = samples
    held: Literal["", "right", "wrong"] = ""
    lenient: Callable[[nn.Module], Judge] | None = None


def thorough(*through: Callable[[nn.Module], Seen], draws: int = 1, look: int = 1) -> tuple[Attack, ...]:
    """Cross-entropy, margin and every target, through each view of the model in turn, and Square."""
    climbs: list[Attack] = []
    for view in through or (as_it_is,):
        if draws > 1:
            climbs += [Climb(view, loss, steps=60, draws=draws, look=look) for loss in ("margin", "cross-entropy")]
        else:
            climbs += [Climb(view, "cross-entropy", restarts=2), Climb(view, "margin", restarts=5), Climb(view, "aimed", steps=50)]
    return (*climbs, Squares())


def as_it_is(model: nn.Module) -> Seen:
    """The defended model itself."""
    return model


def undefended(model: nn.Module) -> Seen:
    """The network inside, without the defense around it."""
    net: nn.Module = model.net  # type: ignore[assignment]
    return net


FGSM = Climb(as_it_is, "cross-entropy", steps=1, start="clean", share=1.0, schedule="constant", look=0)
PGD = Climb(as_it_is, "cross-entropy", steps=20, share=0.1, schedule="constant", look=0)
"""20 steps of a tenth of the radius from a random start; only where it ends is judged."""


def straight(real: Tensor, smooth: Tensor) -> Tensor:
    """The value of `real` with the gradient of `smooth` (BPDA)."""
    return smooth + (real - smooth).detach()
