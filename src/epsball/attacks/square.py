"""Square Attack: random search whose proposals are square windows, under Linf and L2."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from epsball.attacks.random_search import Proposal, RandomSearch, margin_or_entropy, schedule
from epsball.attacks.registry import register
from epsball.core import Attack, Objective, Problem, Projects
from epsball.core.rows import per_sample
from epsball.core.rule import normalized
from epsball.core.victim import Access
from epsball.errors import BadInput
from epsball.threats import L2, Linf


@register(
    paper="Andriushchenko et al. 2020, arXiv 1912.00049",
    access=Access.SCORES,
    threats=("linf", "l2"),
    cost="steps forwards",
)
def square(
    steps: int = 5000,
    p: float = 0.8,
    threat: Projects | None = None,
    objective: Objective = margin_or_entropy,
) -> Attack:
    """Square Attack: random square windows at the edge of the ball, Andriushchenko et al. 2020, arXiv 1912.00049, Algorithm 1.

    Linf (Algorithm 2): starts from vertical stripes of +-radius; a proposal sets a window to +-radius, one sign per channel.
    L2 (Algorithm 3): starts from a tiling of bumps; a proposal moves the length of a second window into a first one.
    The window covers a share p of the image, halved along `schedule`; defaults and loss (margin, cross-entropy toward a
    target) are those of the released AutoAttack.

    Args:
        steps: queries per sample, the first point included. p: first share of the image, 0 .. 1. threat: Linf or L2.

    Returns:
        The attack; its name is `square`.

    Raises:
        BadInput: p outside 0 .. 1, or another threat.

    Cost: at most steps forwards (1 where steps is 0), no backward.

    Differs from the released code: every sample has windows of its own; windows reach the last row and column, which there
    are never touched; a Linf proposal that would change nothing turns its signs instead of asking the same again (as in the
    paper's first code); on images that are not square the window keeps its area; a vector is an image of one row.
    """
    if steps < 0:
        raise BadInput(f"steps: {steps}: must be 0 or more")
    if not 0 < p <= 1:
        raise BadInput(f"p: {p}: must lie above 0 and be at most 1")
    threat = threat or Linf()
    if not isinstance(threat, (Linf, L2)):
        raise BadInput(f"threat '{threat.name}': has no squares: use linf or l2")
    proposal: Proposal = Corners(p) if isinstance(threat, Linf) else Bumps(p)
    return replace(Attack("square", threat, objective, RandomSearch(proposal), max(steps - 1, 0)), access=Access.SCORES)


def as_image(values: Tensor) -> Tensor:
    """(B, ...) as (B, C, H, W): axes between the channels and the last are joined; fewer than three axes are one row."""
    n = len(values)
    return values.reshape(n, values.shape[1], -1, values.shape[-1]) if values.ndim >= 4 else values.reshape(n, 1, 1, -1)


def signs(uniform: Tensor) -> Tensor:
    """+1 or -1 from numbers in [0, 1)."""
    return 1 - 2 * (uniform < 0.5).to(uniform.dtype)


def sides(h: int, w: int, p: float, least: int = 1, odd: bool = False) -> tuple[int, int]:
    """Height and width of a window with share p of an image; equal unless the image is too low or too narrow."""
    side = max(round(math.sqrt(p * h * w)), least)
    side += odd and side % 2 == 0
    height, width = min(side, h), min(side, w)
    if height < side:
        width = min(max(round(p * h * w / height), least), w)
    elif width < side:
        height = min(max(round(p * h * w / width), least), h)
    return height, width


def corner(uniform: Tensor, shape: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """(B, 2) upper left corners of windows inside an image, evenly, from uniform (B, 2)."""
    room = torch.tensor([shape[0] - window[0], shape[1] - window[1]], device=uniform.device)
    return torch.minimum((uniform.double() * (room + 1)).long(), room)


def inside(corners: Tensor, shape: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """(B, 1, H, W) bool: the pixels of each sample's window."""
    masks = []
    for axis in (0, 1):
        place = torch.arange(shape[axis], device=corners.device) - corners[:, axis : axis + 1]
        masks.append((place >= 0) & (place < window[axis]))
    return masks[0][:, None, :, None] & masks[1][:, None, None, :]


@dataclass(frozen=True)
class Corners:
    """Windows of +-radius."""

    p: float

    def first(self, problem: Problem) -> Tensor:
        """Stripes: one sign per channel and column."""
        x = as_image(problem.x)
        drawn = problem.key.fold("stripes").uniform(problem.ids, x[:, :, :1].float())
        return self._corner(problem, signs(drawn).expand(x.shape))

    def next(self, problem: Problem, best: Tensor, number: int, budget: int) -> Tensor:
        """One window per sample, one sign per channel."""
        image = as_image(best)
        n, c, h, w = image.shape
        window = sides(h, w, self.p * schedule(number, budget))
        drawn = problem.key.fold("window", number).uniform(problem.ids, torch.empty(n, 2 + c, device=image.device))
        mask = inside(corner(drawn[:, :2], (h, w), window), (h, w), window)
        sign = signs(drawn[:, 2:])[:, :, None, None].expand(n, c, h, w)
        z = torch.where(mask, as_image(self._corner(problem, sign)), image)
        same = (z == image).flatten(1).all(1)
        if bool(same.any()):
            z = torch.where(mask & same[:, None, None, None], as_image(self._corner(problem, -sign)), z)
        return z.reshape(best.shape)

    def _corner(self, problem: Problem, sign: Tensor) -> Tensor:
        """x +- radius, as far as mask, budgets and box allow."""
        x = problem.x
        z: Tensor = problem.threat.project(x, x + per_sample(problem.radius, x) * sign.reshape(x.shape).to(x.dtype), problem.radius)
        return z


@lru_cache(maxsize=256)
def _pyramid(height: int, width: int) -> Tensor:
    """Centered rectangles, the k-th weighing 1 / k^2, of length 1: the eta of the paper, section 3.3."""
    made: Tensor = torch.zeros(height, width)
    for k in range(max(height // 2, width // 2) + 1):
        top, left = height // 2 - k, width // 2 - k
        made[max(top, 0) : max(top + 2 * k + 1, 0), max(left, 0) : max(left + 2 * k + 1, 0)] += 1 / (k + 1) ** 2
    made /= made.norm().clamp(min=1e-12)
    return made


@lru_cache(maxsize=256)
def bump(height: int, width: int) -> Tensor:
    """(height, width) of length 1: a pyramid above its negative."""
    made: Tensor = torch.cat([_pyramid(height // 2, width), -_pyramid(height - height // 2, width)])
    made /= made.norm()
    return made


def turned(height: int, width: int) -> Tensor:
    """(2, height, width): a pyramid above its negative, and beside it."""
    return torch.stack([bump(height, width), bump(width, height).T])


@dataclass(frozen=True)
class Bumps:
    """Windows with the length that another window gives up."""

    p: float

    def first(self, problem: Problem) -> Tensor:
        """Tiles of a fifth of the side, a bump with a sign of its own in each."""
        x = as_image(problem.x)
        n, c, h, w = x.shape
        tile = max(h // 5, 1), max(w // 5, 1)
        rows, columns = h // tile[0], w // tile[1]
        top, left = (h - rows * tile[0]) // 2, (w - columns * tile[1]) // 2
        drawn = problem.key.fold("tiles").uniform(problem.ids, torch.empty(n, rows * columns, c + 1, device=x.device))
        drawn = drawn.reshape(n, rows, columns, c + 1)
        patterns, change = turned(*tile).to(x.device), torch.zeros(n, c, h, w, device=x.device)
        for i in range(rows):
            for j in range(columns):
                pattern = patterns[(drawn[:, i, j, c] > 0.5).long()][:, None]
                down, right = top + i * tile[0], left + j * tile[1]
                change[:, :, down : down + tile[0], right : right + tile[1]] += pattern * signs(drawn[:, i, j, :c])[:, :, None, None]
        return self._scaled(problem, change)

    def next(self, problem: Problem, best: Tensor, number: int, budget: int) -> Tensor:
        """A bump on top of what the first window holds, as long as both windows and what is left of the radius allow."""
        x, image = as_image(problem.x), as_image(best)
        n, c, h, w = image.shape
        window = sides(h, w, self.p * schedule(number, budget), least=3, odd=True)
        drawn = problem.key.fold("window", number).uniform(problem.ids, torch.empty(n, 5 + c, device=image.device))
        at = corner(drawn[:, :2], (h, w), window)
        taker, giver = inside(at, (h, w), window), inside(corner(drawn[:, 2:4], (h, w), window), (h, w), window)
        change = (image.double() - x.double()).to(torch.promote_types(x.dtype, torch.float32))
        left = (problem.radius.square() - change.double().square().flatten(1).sum(1)).clamp(min=0)[:, None, None, None] / c
        moved = (left + _length(change * (taker | giver)).double().square()).sqrt().to(change.dtype)
        pattern = turned(*window).to(change)[(drawn[:, 4] > 0.5).long()][:, None] * signs(drawn[:, 5:])[:, :, None, None].to(change)
        old = change * taker
        new = torch.zeros_like(change).masked_scatter(taker.expand_as(change), pattern) + old / (1e-12 + _length(old))
        new = new / (1e-12 + _length(new)) * moved
        return self._scaled(problem, torch.where(taker, new, change.masked_fill(giver, 0.0)))

    def _scaled(self, problem: Problem, change: Tensor) -> Tensor:
        """The change on the edge of the ball, cut to the box."""
        x, unit = problem.x, normalized(change, 2).reshape(problem.x.shape)
        edge = problem.radius * (1 - 1e-12)  # on the sphere itself, two ways to sum a norm disagree in the last bit
        z: Tensor = problem.threat.project(x, (x + per_sample(edge, unit) * unit).to(x.dtype), edge)
        return z


def _length(values: Tensor) -> Tensor:
    """(B, C, 1, 1)."""
    length: Tensor = torch.linalg.vector_norm(values, 2, dim=(-2, -1), keepdim=True)
    return length
