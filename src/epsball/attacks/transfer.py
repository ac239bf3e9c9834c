"""Examples that carry over to models the adversary cannot see: MI-FGSM with a lookahead, or with better gradients.

Lookahead (NI), input diversity (DI), smoothed gradients (TI), scaled copies (SI) and tuned variance (VMI) are independent
parts: DI, SI and `Eot` are gradient sources, TI and VMI are rule links, NI is a search that takes any of them. To attack an
unseen model, fit on a surrogate (or `ensemble`) with `drop=False`, so that the search does not stop when the surrogate falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.attacks.registry import register
from epsball.core import (
    Attack,
    Descent,
    Fixed,
    Gradient,
    Key,
    Momentum,
    Objective,
    OfRadius,
    Problem,
    Projects,
    Reading,
    Rule,
    Steepest,
    Unit,
    Victim,
    autograd,
    chain,
)
from epsball.core.attack import recipe
from epsball.core.rows import per_sample, rowwise
from epsball.core.rule import Memory, normalized
from epsball.core.sources import Through, shown
from epsball.core.threat import Z
from epsball.errors import BadInput
from epsball.objectives import cross_entropy
from epsball.threats import Linf

_NORMS = ("linf", "l2")


@register(
    paper="Lin et al. 2020, arXiv 1908.06281, section 3.2",
    threats=("linf",),
    cost="steps forwards and backwards, 1 forward to judge",
)
def ni_fgsm(
    steps: int = 10,
    step: float | None = None,
    decay: float = 1.0,
    threat: Projects | None = None,
    objective: Objective = cross_entropy,
    gradient: Gradient = autograd,
) -> Attack:
    """Nesterov iterative FGSM, eq. 6 to 8: MI-FGSM that looks ahead along its momentum before it takes the gradient.

    `step` None is radius / steps. As in the released code gradients are scaled to mean absolute value 1 (the paper's 1-norm
    would make the lookahead vanish); unlike it, the point ahead is projected, so that each look is a legal candidate.
    """
    return Attack("ni_fgsm", threat or Linf(), objective, Lookahead(step, decay, gradient=gradient), steps)


@register(
    paper="Xie et al. 2019, arXiv 1803.06978",
    threats=_NORMS,
    cost="steps * (2 forwards, 1 backward), 1 forward to judge",
)
def di_fgsm(
    steps: int = 10,
    step: float | None = None,
    decay: float = 1.0,
    chance: float = 0.5,
    smallest: float = 0.9,
    threat: Projects | None = None,
    objective: Objective = cross_entropy,
) -> Attack:
    """Diverse inputs (M-DI2-FGSM, eq. 5): with probability `chance` the gradient sees a smaller copy on a random place.

    The paper enlarges 299 pixels to 299..330 and pads to 330; models of one input size see the same up to scale when the
    copy shrinks to `smallest`..1 of its size and is padded back, as in the code of its successors. Bilinear, not nearest.
    """
    return _momentum("di_fgsm", Through(Diverse(chance, smallest)), (), steps, step, decay, threat, objective)


@register(paper="Dong et al. 2019, arXiv 1904.02884", threats=_NORMS, cost="steps forwards and backwards, 1 forward to judge")
def ti_fgsm(
    steps: int = 10,
    step: float | None = None,
    decay: float = 1.0,
    length: int = 15,
    threat: Projects | None = None,
    objective: Objective = cross_entropy,
) -> Attack:
    """Translation invariant: the gradient is convolved with a Gaussian kernel before anything else (TI-MI-FGSM, eq. 9)."""
    return _momentum("ti_fgsm", autograd, (Smooth(length),), steps, step, decay, threat, objective)


@register(
    paper="Lin et al. 2020, arXiv 1908.06281, section 3.3",
    threats=_NORMS,
    cost="copies * steps forwards and backwards, 1 forward to judge",
)
def si_fgsm(
    steps: int = 10,
    step: float | None = None,
    decay: float = 1.0,
    copies: int = 5,
    threat: Projects | None = None,
    objective: Objective = cross_entropy,
) -> Attack:
    """Scale invariant, eq. 9: the average gradient over the copies x, x / 2, x / 4 ...; on momentum, as MI-FGSM."""
    return _momentum("si_fgsm", Scaled(copies), (), steps, step, decay, threat, objective)


@register(
    paper="Wang & He 2021, arXiv 2103.15571, Algorithm 1",
    threats=_NORMS,
    cost="steps * (neighbors + 1) forwards and backwards, 1 forward to judge",
)
def vmi_fgsm(
    steps: int = 10,
    step: float | None = None,
    decay: float = 1.0,
    neighbors: int = 20,
    reach: float = 1.5,
    threat: Projects | None = None,
    objective: Objective = cross_entropy,
) -> Attack:
    """Variance tuning: each gradient is corrected by how the last one differed from those in its neighborhood."""
    return _momentum("vmi_fgsm", autograd, (Tuned(neighbors, reach),), steps, step, decay, threat, objective)


def _momentum(
    name: str,
    gradient: Gradient,
    links: tuple[Rule, ...],
    steps: int,
    step: float | None,
    decay: float,
    threat: Projects | None,
    objective: Objective,
) -> Attack:
    """MI-FGSM around a gradient source and links."""
    size = OfRadius(1.0 / max(steps, 1)) if step is None else Fixed(step)
    rule = chain(*links, Unit(1), Momentum(decay), Steepest())
    return Attack(name, threat or Linf(), objective, Descent(size, rule, gradient), steps)


@dataclass(frozen=True)
class _Ahead:
    z: Tensor
    speed: Tensor
    step: Tensor
    memory: Memory


@dataclass(frozen=True, repr=False)
class Lookahead:
    """ahead = P(z + step * decay * m); m <- decay * m + g / mean|g|; z <- P(z + step * steepest(m)), g taken at `ahead`.

    `links` turn g first (TI, VMI); `gradient` is any source (DI, SI). For Linf: the lookahead is scaled feature by feature.
    """

    step_size: float | None = None
    decay: float = 1.0
    gradient: Gradient = autograd
    links: tuple[Rule, ...] = ()

    def init(self, problem: Problem, steps: int) -> _Ahead:
        """At the clean input, at rest."""
        z = problem.threat.start(problem.x, problem.radius, None, problem.ids)
        step = problem.radius / max(steps, 1) if self.step_size is None else torch.full_like(problem.radius, self.step_size)
        return _Ahead(z, torch.zeros_like(z), step, chain(*self.links).start(problem, z))

    def step(self, problem: Problem, state: _Ahead) -> tuple[Reading, _Ahead]:
        """One look ahead, one move."""
        threat, x, step = problem.threat, problem.x, per_sample(state.step, state.z)
        reading = self.gradient(problem, threat.project(x, state.z + step * self.decay * state.speed, problem.radius))
        gradient, memory = chain(*self.links).turn(problem, reading.z, reading.gradient, state.memory)
        speed = self.decay * state.speed + normalized(gradient, 1) * gradient[0].numel()
        z = threat.project(x, state.z + step * threat.steepest(x, state.z, speed), problem.radius)
        return reading, replace(state, z=z, speed=speed, memory=memory)

    def __repr__(self) -> str:
        return recipe(self)


@dataclass(frozen=True)
class Diverse:
    """Random resize and pad of images (B, C, H, W): with probability `chance`, a copy of `smallest`..1 of the size, padded with 0.

    Inputs without height and width are left as they are.
    """

    chance: float = 0.5
    smallest: float = 0.9

    def __call__(self, x: Tensor, key: Key, ids: Tensor) -> Tensor:
        """One draw per row."""
        if x.ndim != 4:
            return x
        size, right, down, coin = key.fold("diverse").uniform(ids, x.flatten(1)[:, :1].detach().expand(-1, 4)).unbind(1)
        scale = self.smallest + (1 - self.smallest) * size
        room = 1 - scale  # the copy's middle may stand this far from the frame's, in half frames
        zero = torch.zeros_like(scale)
        rows = (1 / scale, zero, -(2 * right - 1) * room / scale, zero, 1 / scale, -(2 * down - 1) * room / scale)
        grid = F.affine_grid(torch.stack(rows, 1).reshape(-1, 2, 3), list(x.shape), align_corners=False)
        return torch.where(rowwise(coin < self.chance, x), F.grid_sample(x, grid, align_corners=False), x)


@dataclass(frozen=True)
class _Dimmed:
    factor: float

    def __call__(self, x: Tensor, key: Key, ids: Tensor) -> Tensor:
        return x * self.factor


@dataclass(frozen=True, repr=False)
class Scaled:
    """SI (Lin et al. 2020, eq. 9): the mean gradient over `copies` of the input, each half as bright as the one before.

    Gradients are by x, as in paper and code, so that copy i weighs 2^-i. Answer and score are those of x itself. Cost:
    `copies` times that of `inner`.
    """

    copies: int = 5
    inner: Gradient = autograd

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise BadInput(f"copies: {self.copies}: must be 1 or more")

    def __call__(self, problem: Problem, z: Z) -> Reading:
        """All copies."""
        with problem.victim:
            first = self.inner(problem, z)
            others = [self.inner(shown(problem, _Dimmed(0.5**i)), z).gradient for i in range(1, self.copies)]
        return replace(first, gradient=sum(others, start=first.gradient) / self.copies)

    def __repr__(self) -> str:
        return recipe(self)


@dataclass(frozen=True)
class Smooth:
    """TI (Dong et al. 2019): convolves image gradients (B, C, H, W) with a Gaussian kernel; others pass as they are.

    `length` pixels span 3 standard deviations to each side, as in the released code (the paper's text: length / 2 / sqrt 3).
    """

    length: int = 15

    def __post_init__(self) -> None:
        if self.length < 1 or self.length % 2 == 0:
            raise BadInput(f"length: {self.length}: must be odd and above 0")

    def start(self, problem: Problem, z: Z) -> Memory:
        """No memory."""
        return ()

    def turn(self, problem: Problem, z: Z, gradient: Z, memory: Memory) -> tuple[Z, Memory]:
        """W * g, channel by channel, zeros outside the image."""
        if gradient.ndim != 4:
            return gradient, memory
        at = torch.linspace(-3, 3, self.length, dtype=torch.float64) if self.length > 1 else torch.zeros(1, dtype=torch.float64)
        bell = torch.exp(-at.square() / 2)
        work = torch.float64 if gradient.dtype is torch.float64 else torch.float32
        bell = (bell / bell.sum()).to(gradient.device, work).expand(gradient.shape[1], 1, 1, -1)
        wide = F.conv2d(gradient.to(work), bell, padding=(0, self.length // 2), groups=len(bell))
        both = F.conv2d(wide, bell.transpose(2, 3), padding=(self.length // 2, 0), groups=len(bell))
        return both.to(gradient.dtype), memory


@dataclass(frozen=True)
class _Variance:
    excess: Tensor
    number: int


@dataclass(frozen=True, repr=False)
class Tuned:
    """VMI (Wang & He 2021, eq. 6 and Algorithm 1): g + v, where v was the mean gradient of neighbors less g, one step ago.

    Neighbors are random points of the ball of `reach` * radius around z; unlike the paper's they stay inside the box. Cost:
    `neighbors` times that of `gradient`, the last step included (its v goes unused, as in the released code).
    """

    neighbors: int = 20
    reach: float = 1.5
    gradient: Gradient = autograd

    def __post_init__(self) -> None:
        if self.neighbors < 1:
            raise BadInput(f"neighbors: {self.neighbors}: must be 1 or more")

    def start(self, problem: Problem, z: Z) -> Memory:
        """No variance known."""
        return _Variance(torch.zeros_like(z), 0)

    def turn(self, problem: Problem, z: Z, gradient: Z, memory: Memory) -> tuple[Z, Memory]:
        """Corrects, then measures for the next step."""
        mean = torch.zeros_like(gradient)
        for number in range(self.neighbors):
            key, ids = problem.key.fold("neighbor", memory.number, number), problem.ids
            near = problem.threat.start(z, self.reach * problem.radius, key, ids)
            mean = mean + self.gradient(problem, near).gradient / self.neighbors
        return gradient + memory.excess, _Variance(mean - gradient, memory.number + 1)

    def __repr__(self) -> str:
        return recipe(self)


class Ensemble(nn.Module):
    """The weighted average of the logits of several models (Liu et al. 2017; Dong et al. 2018, section 3.3)."""

    def __init__(self, models: Sequence[Callable[[Tensor], Any]], weights: Sequence[float]) -> None:
        super().__init__()
        self.models = tuple(models)
        self.modules_of = nn.ModuleList(model for model in models if isinstance(model, nn.Module))
        self.weights = tuple(weights)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) average logits, each member asked in its own precision."""
        answers = []
        for model, weight in zip(self.models, self.weights, strict=True):
            floats = [p for p in model.parameters() if p.is_floating_point()] if isinstance(model, nn.Module) else []
            answers.append(weight * model(x.to(floats[0].dtype) if floats else x))
        return torch.stack(answers).sum(0)


def ensemble(models: Sequence[Victim | Callable[[Tensor], Tensor]], weights: Sequence[float] | None = None) -> Victim:
    """Surrogates as one victim that answers with their average logits. One row counts once, though every member works on it.

    Args:
        models: victims of one box, or callables; scores (B, C) of one C. weights: sum to 1; equal unless given.

    Raises:
        BadInput: no model, boxes that differ, or weights that do not fit.
    """
    victims = [Victim.of(model) for model in models]
    if not victims:
        raise BadInput("models: none given: give one surrogate or more")
    shares = [1 / len(victims)] * len(victims) if weights is None else list(weights)
    if len(shares) != len(victims) or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise BadInput(f"weights: {len(shares)} for {len(victims)} models, sum {sum(shares):g}: give one each, sum 1")
    low, high = (torch.as_tensor(bound) for bound in victims[0].box)
    for victim in victims[1:]:
        if not (torch.equal(low, torch.as_tensor(victim.box[0])) and torch.equal(high, torch.as_tensor(victim.box[1]))):
            raise BadInput(f"models: '{victim.name}' has another box than '{victims[0].name}': wrap them to one input range")
    limits = [victim.batch_size for victim in victims if victim.batch_size]
    name = "+".join(victim.name for victim in victims)
    return Victim(
        Ensemble([victim.model for victim in victims], shares),
        box=victims[0].box,
        access=min(victim.access for victim in victims),
        batch_size=min(limits, default=None),
        name=name,
    )
