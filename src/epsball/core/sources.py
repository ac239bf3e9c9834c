"""Gradient sources made of gradient sources: frozen, per sample, and free to combine. `autograd` is the innermost.

`Through` belongs outermost, since it judges: `Through(transform, Eot(autograd, 10))` is the average gradient of ten draws
of the transform and one honest answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsball.core.attack import recipe
from epsball.core.gradient import Gradient, autograd
from epsball.core.problem import Problem, Reading
from epsball.core.random import Key
from epsball.core.threat import Z
from epsball.core.victim import Tally
from epsball.errors import BadInput

Transform = Callable[[Tensor, Key, Tensor], Tensor]
"""(inputs (B, ...), key, ids (B,)) -> what the model is shown instead: differentiable, every row by its own id alone."""

_ODD = 0x9E3779B97F4A7C15 - 2**64  # an odd number, so that the mixture below never maps two looks of a sample to one id


def fresh(ids: Tensor, tally: Tally) -> Tensor:
    """(B,) ids for draws that differ from look to look: mixed with the number of looks that each sample has had so far.

    A look is a gradient, or a forward through a lens of which none was wanted. The ledger is the clock: it is per sample, so
    neither batches, nor dropping, nor known clean outputs, nor the strategy can shift a draw.
    """
    looks = tally.backwards[tally.rows] + tally.blind[tally.rows]
    return ids + looks.to(ids.device) * _ODD


def shown(problem: Problem, transform: Transform) -> Problem:
    """The same problem with a model that is shown `transform` of every input, a fresh draw at every look.

    Its answers are those to transformed inputs: take its gradients, never its successes.
    """
    ids, place = problem.ids.cpu(), torch.zeros(len(problem.tally.forwards), dtype=torch.int64)
    place[problem.tally.rows] = torch.arange(len(problem))

    def lens(x: Tensor, tally: Tally) -> Tensor:
        rows = place[tally.rows]
        return transform(x, problem.key.take(rows), fresh(ids[rows], tally))

    return replace(problem, victim=problem.victim.through(lens))


@dataclass(frozen=True, repr=False)
class Eot:
    """Expectation over transformation: the average of `draws` readings of a random model, or of a random transform.

    Athalye, Engstrom, Ilyas & Kwok 2018, arXiv 1707.07397, eq. 3: gradients, scores and outputs are averaged, so a success
    is one of the average answer. Each draw has a key of its own. Cost: `draws` times that of `inner`.
    """

    inner: Gradient = autograd
    draws: int = 10

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise BadInput(f"draws: {self.draws}: must be 1 or more")

    def __call__(self, problem: Problem, z: Z) -> Reading:
        """One averaged look."""
        with problem.victim:
            mean = self._draw(problem, z, 0)
            for number in range(1, self.draws):
                one = self._draw(problem, z, number)
                # A running mean of equal values is exactly that value: a model without randomness reads as under `inner`.
                output, score, gradient = (
                    old + (new - old) / (number + 1)
                    for old, new in ((mean.output, one.output), (mean.score, one.score), (mean.gradient, one.gradient))
                )
                mean = replace(mean, output=output, score=score, gradient=gradient)
        return mean

    def __repr__(self) -> str:
        return recipe(self)

    def _draw(self, problem: Problem, z: Z, number: int) -> Reading:
        return self.inner(replace(problem, key=problem.key.fold("draw", number)), z)


@dataclass(frozen=True, repr=False)
class Through:
    """The gradient through a transform of the input, and the model's honest answer to the input itself.

    Every gradient that `inner` takes sees a fresh draw of the transform. Cost: that of `inner`, and 1 forward to judge.
    """

    transform: Transform
    inner: Gradient = autograd

    def __call__(self, problem: Problem, z: Z) -> Reading:
        """The inner gradient, the outer truth."""
        with problem.victim as victim:
            seen = shown(problem, self.transform)
            gradient = self.inner(seen, z).gradient
            victim.batch_size = seen.victim.batch_size  # what running out of memory taught it
            return replace(problem.judge(z), gradient=gradient)

    def __repr__(self) -> str:
        return recipe(self)


@dataclass(frozen=True, repr=False)
class Near:
    """The mean gradient at `draws` random points near z, and the model's honest answer at z itself.

    For models whose gradient jumps about so fast that it says nothing of the next step (k-WTA and its kin: Tramer, Carlini, Brendel &
    Madry 2020, arXiv 2002.08347, section 5). The points lie within `share` of the radius, drawn as the threat draws its starts; the
    threat's z is the input itself. Cost: `draws` times that of `inner`, and 1 forward to judge.
    """

    draws: int = 8
    share: float = 0.5
    inner: Gradient = autograd

    def __call__(self, problem: Problem, z: Z) -> Reading:
        """The mean slope, the honest answer."""
        with problem.victim:
            # The points are drawn before any is asked, for asking moves the ledger, and the ledger is the clock.
            ids, radius = fresh(problem.ids, problem.tally), self.share * problem.radius
            points = [problem.threat.start(z, radius, problem.key.fold("near", k), ids) for k in range(self.draws)]
            gradients = [self.inner(problem, point).gradient for point in points]
            return replace(problem.judge(z), gradient=torch.stack(gradients).mean(0))

    def __repr__(self) -> str:
        return recipe(self)
