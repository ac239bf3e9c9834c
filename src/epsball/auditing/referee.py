"""The independent judge: no attack's own word is believed. A fresh model in eval mode, float64 distances, no shared code.

Distances are computed here in NumPy, on purpose not by the threats that the attacks used. Where the adversary's variable z is not
the input, what is judged is the input that a fresh threat makes of x and z, and the stored one has to be that.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from epsball.core import Access, Goal, LabelsChanged, Projects, Tally, Victim, valid
from epsball.threats import Added, Composed, Flow, Rigid

Array = np.ndarray[Any, Any]

THIN = 1e-4
"""Verdicts that hang on a difference of less than this share of the largest score are judged again in float64."""


SAME = 1e-6
"""Largest difference, in widths of the box, between a stored input and the one that a fresh threat makes of its z."""


def distance(x: Array, x_adv: Array, threat: str) -> Array:
    """(B,) float64 size of the change between stored inputs, by threat name."""
    change = x_adv.astype(np.float64) - x.astype(np.float64)
    flat = change.reshape(len(change), -1)
    if threat == "l0" and change.ndim >= 4:
        flat = (change != 0).any(axis=1).reshape(len(change), -1)
    sizes: dict[str, Callable[[], Array]] = {
        "linf": lambda: np.abs(flat).max(1),
        "l2": lambda: np.sqrt(np.square(flat).sum(1)),
        "l1": lambda: np.abs(flat).sum(1),
        "l0": lambda: (flat != 0).sum(1),
        "l0f": lambda: (flat != 0).sum(1),
        "patch": lambda: np.array([_longer_side(row) for row in (change != 0).any(axis=1)]),
    }
    found: Array = sizes[threat]().astype(np.float64)
    return found


def _longer_side(changed: Array) -> int:
    """Of the smallest rectangle around every True of (H, W)."""
    places = np.argwhere(changed)
    return int(np.ptp(places, axis=0).max()) + 1 if len(places) else 0


def length(threat: Projects, x: Tensor, z: Tensor) -> Array:
    """(B,) float64 size of an adversary's variable (B, ...) that is not the input; NaN where it has one."""
    if isinstance(threat, Composed):
        pieces = zip(threat.parts, threat.budgets, threat.split(x, z), strict=True)
        shares: Array = np.stack([length(part, x, piece) / budget for part, budget, piece in pieces])
        return np.asarray(shares.max(0))
    values = z.numpy().astype(np.float64)
    if isinstance(threat, Added):
        return distance(np.zeros_like(values), values, threat.norm.name)
    if isinstance(threat, Flow):
        values = np.hypot(values[:, 0], values[:, 1])
    elif isinstance(threat, Rigid):
        values = values / np.array([threat.degrees, threat.pixels, threat.pixels])
    return np.asarray(np.abs(values).reshape(len(values), -1).max(1))


@dataclass(frozen=True)
class Ruling:
    """What the referee says of B inputs.

    Attributes:
        broken: (B,) bool: legal and the goal is reached. legal: inside radius and box, and made by its z. answered: (B,) finite output.
        predicted: (B,) top class. size: (B,) float64.
    """

    broken: Tensor
    legal: Tensor
    answered: Tensor
    predicted: Tensor
    size: Tensor


class Referee:
    """Judges stored inputs with a copy of the model that no attack has touched.

    The copy is taken when the referee is made; models that cannot be copied (functions, programs) are used as they are.
    The batch size is the referee's own, so that the run's batch size cannot change a ruling.

    Args:
        victim: the model. batch_size: rows per call. draws: answers that a ruling on a random model takes; the majority rules.
    """

    def __init__(self, victim: Victim, batch_size: int = 128, draws: int = 1) -> None:
        model = victim.model
        if isinstance(model, nn.Module):
            try:
                with warnings.catch_warnings():  # copying an exported program warns of torch's own doings
                    warnings.simplefilter("ignore")
                    model = copy.deepcopy(model)
            except Exception:  # exported programs and modules with foreign handles cannot be copied
                model = victim.model
        self.victim = Victim(
            model, box=victim.box, access=victim.access, batch_size=batch_size, fixed_batch=victim.fixed_batch, name=victim.name
        )
        self.draws = draws
        self.rows = 0

    def outputs(self, x: Tensor, goal: Goal) -> Tensor:
        """(B, C) fresh answers, float64; thin ones, as `goal` reads them, come from a float64 copy of the model.

        Of a random model, the share of `draws` answers that each class gets.
        """
        if self.draws > 1:
            return self._votes(x, goal)
        # Rounding thin answers back to float32 would make ties of them, and ties belong to the first class.
        output = self._ask(self.victim, x).double()
        if isinstance(goal, LabelsChanged) or output.shape[1] < 2:
            gap = output.abs().amin(1)
        else:
            gap = output.topk(2, dim=1).values.diff(dim=1).abs().squeeze(1)
        thin = (valid(output) & (gap < THIN * output.abs().amax(1).clamp(min=1e-12))).nonzero().squeeze(1)
        if len(thin) and isinstance(self.victim.model, nn.Module) and self.victim.access is Access.GRADIENT and not self.victim.fixed_batch:
            output[thin] = self._exact(x[thin]).double()
        return output

    def judge(self, x: Tensor, x_adv: Tensor, goal: Goal, threat: Projects, radius: float | Tensor, z: Tensor | None = None) -> Ruling:
        """Rules on stored inputs (B, ...), all on the CPU.

        Args:
            x, x_adv: clean and adversarial. goal: the adversary's. threat: what was allowed. radius: one number or (B,) float64.
            z: the adversary's variable where it is not the input itself; x_adv must then be what the threat makes of it.
        """
        low, high = self.victim.box
        if z is None:
            size, made = distance(x.numpy(), x_adv.numpy(), threat.name), torch.ones(len(x), dtype=torch.bool)
        else:
            size, again = length(threat, x, z), self._applied(threat, x, z)
            width = float((torch.as_tensor(high) - torch.as_tensor(low)).max())
            made = ((again - x_adv).abs() <= SAME * width).flatten(1).all(1)
            x_adv = again
        output, sizes = self.outputs(x_adv, goal), torch.from_numpy(size)
        inside = ((x_adv >= low) & (x_adv <= high)).flatten(1).all(1)
        legal = inside & made & (sizes <= radius)
        reached = goal.reached(output)
        return Ruling(reached & legal, legal, valid(output), output.argmax(1), sizes)

    def _applied(self, threat: Projects, x: Tensor, z: Tensor) -> Tensor:
        """(B, ...) what the threat makes of x, a few rows at a time; a z that is no number makes x, and is too long anyway."""
        bound, step = threat.within(self.victim.box), self.victim.batch_size or len(x)
        z = z.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return torch.cat([bound.apply(x[at : at + step], z[at : at + step]) for at in range(0, len(x), step)])

    def _votes(self, x: Tensor, goal: Goal) -> Tensor:
        """(B, C) share of the draws in which a class is the answer, or above 0.5 in which a label is on; NaN where any draw is no number.

        Mean probabilities, scaled to less than one vote, break ties. The generators of a victim start anew with its outermost context,
        so the same inputs in the same order get the same votes.
        """
        several = isinstance(goal, LabelsChanged)
        votes = torch.zeros(())
        with self.victim:
            for _ in range(self.draws):
                output = self._ask(self.victim, x).double()
                soft = output.sigmoid() if several else output.softmax(1)
                answer = (output > 0).double() if several else torch.nn.functional.one_hot(output.argmax(1), output.shape[1]).double()
                votes = votes + (answer + 1e-3 * soft).masked_fill(~valid(output)[:, None], torch.nan)
        return votes / self.draws - (0.5 if several else 0.0)

    def _ask(self, victim: Victim, x: Tensor) -> Tensor:
        self.rows += len(x)
        return victim.outputs(x.to(victim.device), Tally.zeros(len(x))).cpu()

    def _exact(self, x: Tensor) -> Tensor:
        assert isinstance(self.victim.model, nn.Module)
        try:
            double = copy.deepcopy(self.victim.model).double()
            return self._ask(Victim(double, box=self.victim.box, batch_size=self.victim.batch_size), x.double())
        except Exception:  # a model with float32 constants of its own stays in float32
            return self._ask(self.victim, x)
