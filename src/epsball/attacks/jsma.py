"""Jacobian-based Saliency Map Attack (JSMA): few features, changed a lot, chosen by the derivatives of what the model answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from epsball.attacks.registry import register
from epsball.attacks.walk import UntilReached, best_others
from epsball.core import Aimed, Attack, Problem, Projects, Targeted
from epsball.core.gradient import logit_gradients
from epsball.core.victim import Tally
from epsball.errors import BadInput
from epsball.objectives import margin
from epsball.threats import L0

_ENTRIES = 2**22  # of a block of the pair search: 32 MiB in float64

Outputs = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, C), target (B,)) -> (B, 2): F_t and the sum of the other F_j; or (B, 1) where that sum falls as F_t rises."""


def probabilities(output: Tensor, target: Tensor) -> Tensor:
    """F are the softmax's: log p_t. All p sum to 1, so eq. (8) takes p_t' and -p_t'; over p_t the order stays and nothing underflows."""
    return output.log_softmax(1).gather(1, target[:, None])


def logits(output: Tensor, target: Tensor) -> Tensor:
    """F are the logits."""
    own = output.gather(1, target[:, None])
    return torch.cat([own, output.sum(1, keepdim=True) - own], 1)


@register(
    paper="Papernot et al. 2016, arXiv 1511.07528",
    threats=("l0f", "l0"),
    kind="smallest",
    cost="per step a sample needs: 2 forwards (the first step 1), 1 backward (2 over logits), whatever the classes",
)
def jsma(
    steps: int = 100,
    theta: float = 1.0,
    gamma: float = 1.0,
    pairs: bool = True,
    outputs: Outputs = probabilities,
    threat: Projects | None = None,
) -> Attack:
    """JSMA, Algorithms 2 and 3: change the features of most saliency by theta until the target is hit.

    Saliency of p, eq. (8): 0 if dF_t/dx_p < 0 or the sum over the other classes dF_j/dx_p > 0, else dF_t/dx_p * |that sum|; for
    theta < 0 with both signs turned, eq. (9). For a pair both derivatives are summed over its two features first.

    Args:
        steps: moves at most. theta: change of a feature, in units of the input; its sign says whether features grow or shrink.
        gamma: share of all features that may change (the paper's 0.145): at most floor(gamma * F / 2) pairs are moved.
        pairs: two features at once, as in Algorithm 3; else one.
        outputs: what F are: `probabilities`, which hit more targets with fewer features, or `logits`.
        threat: L0, counting features (default) or pixels; the features are chosen one by one either way.

    The paper is targeted. An untargeted goal aims at the best other class by clean logit and ends at any other class.
    As in the paper and unlike the first released code, a feature may be changed again until it meets the edge of the box.
    Differs from both: a derivative is multiplied by how far its feature can still move, theta at most, so that no move is
    spent on a feature that is all but at its bound. On a ReLU LeNet, gamma 0.145, 450 pairs of digit and target:
    probabilities hit 98 % growing and 98 % shrinking with 4.1 and 4.2 % of the features, logits 92 % and 65 % with 5.1 and
    4.4 % (`epsball reproduce jsma`).
    """
    if not 0 <= gamma <= 1:
        raise BadInput(f"gamma: {gamma}: must lie in 0 .. 1")
    return Attack(
        "jsma", threat or L0(features=True), margin, UntilReached(MostSalient(theta, gamma, pairs, outputs)), steps, smallest=True
    )


@dataclass(frozen=True)
class MostSalient:
    """Moves the pair of features (or the one) of most saliency by theta."""

    theta: float
    gamma: float
    pairs: bool
    outputs: Outputs

    def start(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """The target class and the number of moves made, (B,) each."""
        goal = problem.goal
        others = best_others(goal, problem.clean, 1).squeeze(1)
        target = goal.labels if isinstance(goal, Targeted) else goal.targets if isinstance(goal, Aimed) else others
        return target, torch.zeros_like(target)

    def go(self, problem: Problem, z: Tensor, output: Tensor, memory: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One move; z itself where no feature is salient or gamma is spent. Cost: 1 forward and 1 or 2 backward rows."""
        target, made = memory
        gain, loss = self._derivatives(problem, z, target)  # of the paper; below: of a move
        low, high = problem.threat.room.interval(problem.x)  # type: ignore[attr-defined]
        reach = ((high - z) if self.theta > 0 else (z - low)).clamp(max=abs(self.theta)).double().flatten(1)
        free = reach > 0
        gain, loss = gain * reach, loss * reach
        free &= (made < int(self.gamma * free.shape[1] / (2 if self.pairs else 1)))[:, None]
        chosen, found = best_pair(gain, loss, free) if self.pairs else best_single(gain, loss, free)
        change = torch.zeros_like(gain).scatter(1, chosen, self.theta) * found[:, None]
        moved = z + change.reshape(z.shape).to(z.dtype)
        return problem.threat.project(problem.x, moved, problem.radius), (target, made + 1)

    def _derivatives(self, problem: Problem, z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F) float64: how fast F_t rises and how fast the sum of the others falls when a feature moves as theta says."""

        def two(at: Tensor, aim: Tensor, books: Tally) -> tuple[Tensor, Tensor]:
            _, _, slopes = logit_gradients(problem.victim, at, books, lambda output: self.outputs(output, aim))
            own = torch.nan_to_num(next(slopes).double().flatten(1), nan=0.0, posinf=0.0, neginf=0.0)
            return own, torch.nan_to_num(next(slopes, -own).double().flatten(1), nan=0.0, posinf=0.0, neginf=0.0)

        own, others = problem.victim.split(two, z, target, problem.tally)
        sign = 1.0 if self.theta > 0 else -1.0
        return sign * own, -sign * others


def best_single(gain: Tensor, loss: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """The free feature with the largest gain * loss, both positive: (index (B, 1), whether there is one (B,))."""
    saliency = torch.where(free & (gain > 0) & (loss > 0), gain * loss, 0.0)
    value, place = saliency.max(1, keepdim=True)
    return place, value.squeeze(1) > 0


def best_pair(gain: Tensor, loss: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """The two free features p, q with the largest (gain_p + gain_q) * (loss_p + loss_q), both sums positive.

    Exact, without an F x F table: a feature that two others match or beat in both gain and loss can be left out, for one of
    the two is not its partner and would do at least as well. Of features sorted by gain, those stay whose loss exceeds the
    second largest loss before them: a few dozen of hundreds. Their pairs are tried block by block.

    Returns:
        (indices (B, 2), whether there is a salient pair (B,)); the indices mean nothing where there is none.
    """
    gain, loss = gain.masked_fill(~free, -torch.inf), loss.masked_fill(~free, -torch.inf)
    gain, order = gain.sort(dim=1, descending=True, stable=True)
    loss = loss.gather(1, order)
    largest = _before(loss).cummax(1).values
    second = _before(torch.minimum(loss, largest)).cummax(1).values
    keep = torch.isfinite(loss) & (loss > second)
    count = int(keep.sum(1).max())
    if count < 2:
        return order[:, :2], torch.zeros_like(keep[:, 0])
    slots = keep.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    kept = keep.gather(1, slots)
    gain, loss = (t.gather(1, slots).masked_fill(~kept, -torch.inf) for t in (gain, loss))
    pair, value = _best_of_all_pairs(gain, loss)
    return order.gather(1, slots.gather(1, pair)), value > 0


def _before(values: Tensor) -> Tensor:
    """Each column moved one place to the right, -inf in front."""
    return torch.nn.functional.pad(values, (1, 0), value=-torch.inf)[:, :-1]


def _best_of_all_pairs(gain: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """((B, 2) places, (B,) saliency) of the best pair; at most `_ENTRIES` pairs are held at once."""
    rows, count = gain.shape
    best, pair = gain.new_zeros(rows), torch.zeros(rows, 2, dtype=torch.int64, device=gain.device)
    block = max(1, _ENTRIES // (rows * count))
    for start in range(0, count, block):
        a = gain[:, start : start + block, None] + gain[:, None, :]
        b = loss[:, start : start + block, None] + loss[:, None, :]
        saliency = torch.where((a > 0) & (b > 0), a * b, 0.0)
        first = torch.arange(start, start + a.shape[1], device=gain.device)
        saliency[:, first - start, first] = 0.0
        value, place = saliency.flatten(1).max(1)
        better = value > best
        pair = torch.where(better[:, None], torch.stack([start + place // count, place % count], 1), pair)
        best = torch.where(better, value, best)
    return pair, best
