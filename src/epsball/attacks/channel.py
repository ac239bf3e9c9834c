"""The physical world between an adversarial input and the model: print, light, camera, file; and what survives it.

`Channel` is a keyed, differentiable transform of images (B, C, H, W) in [0, 1]; under `Through` and `Eot` any gradient attack
sees through it. Kurakin et al. 2017, arXiv 1607.02533; Athalye et al. 2018, arXiv 1707.07397.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from epsball.attacks.registry import register
from epsball.core import Attack, Descent, Goal, Key, Model, Objective, OfRadius, Projects, Tally, Victim, as_goal, autograd, content_ids
from epsball.core.rows import moved
from epsball.core.sources import Eot, Through
from epsball.errors import BadInput
from epsball.objectives import cross_entropy
from epsball.threats import Linf
from epsball.threats.flow import places, sample

# Annex K of the JPEG standard (ITU-T T.81): quantization of brightness and of color at quality 50.
_BRIGHT = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_COLOR = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))  # 99 everywhere else
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


@dataclass(frozen=True)
class Channel:
    """Perspective, blur, gamut, exposure, JPEG and sensor noise, in this order; every image draws its own of each.

    Each field is the most that can happen, and 0 (JPEG: 100 or more) leaves its stage out:
        tilt: how far each corner may wander, share of the image's height or width. blur: standard deviation, pixels.
        gamut: loss of contrast and of saturation, share. exposure: gain 1 +- exposure, offset +- exposure / 4.
        quality: the worst JPEG quality, 1 to 100 (drawn up to 100). noise: standard deviation of the sensor's noise.

    Cost: no query; about one convolution and one resampling of the image.
    """

    tilt: float = 0.08
    blur: float = 0.7
    gamut: float = 0.2
    exposure: float = 0.2
    quality: float = 60.0
    noise: float = 0.02

    def __call__(self, x: Tensor, key: Key, ids: Tensor) -> Tensor:
        """One draw per row."""
        if x.ndim != 4:
            raise BadInput(f"channel: x of shape {tuple(x.shape)} has no height and width: give images (B, C, H, W)")
        key = key.fold("channel")
        draws = key.uniform(ids, x.flatten(1)[:, :1].detach().expand(-1, 16))
        if self.tilt > 0:
            x = tilted(x, self.tilt * (2 * draws[:, :8] - 1))
        if self.blur > 0:
            x = blurred(x, self.blur * draws[:, 8], self.blur)
        if self.gamut > 0:
            x = printed(x, self.gamut * draws[:, 9], self.gamut * draws[:, 10])
        if self.exposure > 0:
            x = exposed(x, 1 + self.exposure * (2 * draws[:, 11] - 1), self.exposure / 4 * (2 * draws[:, 12] - 1))
        if self.quality < 100:
            x = jpeg(x, self.quality + (100 - self.quality) * draws[:, 13])
        if self.noise > 0:
            x = x + self.noise * key.fold("noise").normal(ids, x.detach())
        return x.clamp(0, 1)


def _rows(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def tilted(x: Tensor, corners: Tensor) -> Tensor:
    """Perspective: corner i is read at its place plus `corners` (B, 8), (down, right) in shares of height and width.

    The homography through the four corners, solved per image; beyond the border the border is read.
    """
    height, width = x.shape[2:]
    size = corners.new_tensor([height - 1, width - 1])
    before = corners.new_tensor([[0, 0], [0, 1], [1, 0], [1, 1]]) * size
    after = before + corners.reshape(-1, 4, 2) * size
    a, b = (before[:, i].expand(len(x), 4) for i in (0, 1))
    u, v = after.unbind(2)
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    first = torch.stack([a, b, one, zero, zero, zero, -a * u, -b * u], 2)
    second = torch.stack([zero, zero, zero, a, b, one, -a * v, -b * v], 2)
    system, right_side = torch.cat([first, second], 1), torch.cat([u, v], 1)
    h = torch.linalg.solve(system.double(), right_side.double()).to(x.dtype)[:, :, None, None]
    down, right = places(x)
    scale = h[:, 6] * down + h[:, 7] * right + 1
    return sample(x, (h[:, 0] * down + h[:, 1] * right + h[:, 2]) / scale, (h[:, 3] * down + h[:, 4] * right + h[:, 5]) / scale)


def blurred(x: Tensor, deviation: Tensor, most: float) -> Tensor:
    """Gaussian blur with one standard deviation (B,) per image, at most `most` pixels; the border is repeated."""
    reach = max(1, round(3 * most))
    at = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    bell = torch.exp(-at.square() / (2 * deviation.to(x.dtype).clamp(min=1e-2).square()[:, None]))
    bell = (bell / bell.sum(1, keepdim=True)).repeat_interleave(x.shape[1], 0)[:, None, None]
    flat = F.pad(x, (reach, reach, reach, reach), mode="replicate").reshape(1, -1, x.shape[2] + 2 * reach, x.shape[3] + 2 * reach)
    flat = F.conv2d(F.conv2d(flat, bell, groups=len(bell)), bell.transpose(2, 3), groups=len(bell))
    return flat.reshape(x.shape)


def printed(x: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """The gamut of ink: values squeezed toward the middle, colors toward their gray, by shares (B,)."""
    gray = x.mean(1, keepdim=True)
    x = x + _rows(saturation) * (gray - x)
    return x + _rows(contrast) * (0.5 - x)


def exposed(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """gain * x + offset (B,), clipped as a sensor clips."""
    return (_rows(gain) * x + _rows(offset)).clamp(0, 1)


def jpeg(x: Tensor, quality: Tensor) -> Tensor:
    """JPEG at quality (B,) in 1..100, differentiable: round(c) + (c - round(c))^3 for each quantized coefficient.

    Shin & Song 2017 (NIPS workshop). Color (3 channels) goes through YCbCr without subsampling; any other number of channels
    is coded channel by channel as brightness. Sizes that are no multiple of 8 are padded with the border.
    """
    height, width = x.shape[2:]
    values = F.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate") * 255
    turn = torch.tensor(_TO_YCC, dtype=x.dtype, device=x.device)
    color = x.shape[1] == 3
    if color:
        values = torch.einsum("ij,bjhw->bihw", turn, values)
    values = values - (torch.tensor([128.0, 0, 0] if color else [128.0], device=x.device, dtype=x.dtype).reshape(1, -1, 1, 1))
    quality = quality.to(x.dtype).clamp(1, 100)
    share = torch.where(quality < 50, 50 / quality, 2 - quality / 50)
    table = (_tables(x, color)[None] * share.reshape(-1, 1, 1, 1)).clamp(min=1.0)[:, :, None, None]
    basis = _cosines(x)
    blocks = values.unfold(2, 8, 8).unfold(3, 8, 8)
    steps = basis @ blocks @ basis.T / table
    near = steps.detach().round()
    blocks = basis.T @ ((near + (steps - near) ** 3) * table) @ basis
    values = blocks.permute(0, 1, 2, 4, 3, 5).reshape(values.shape)
    values = values + (torch.tensor([128.0, 0, 0] if color else [128.0], device=x.device, dtype=x.dtype).reshape(1, -1, 1, 1))
    if color:
        values = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(turn), values)
    return (values[:, :, :height, :width] / 255).clamp(0, 1)


def _cosines(like: Tensor) -> Tensor:
    """The orthonormal DCT-II of 8 values, as a matrix (8, 8)."""
    n = torch.arange(8, dtype=torch.float64)
    basis = torch.cos(torch.pi * n[:, None] * (2 * n + 1) / 16) / 2
    basis[0] /= 2**0.5
    return basis.to(like)


def _tables(like: Tensor, color: bool) -> Tensor:
    """(3 or 1, 8, 8) quantization steps at quality 50."""
    bright = torch.tensor(_BRIGHT, dtype=like.dtype, device=like.device)
    if not color:
        return bright[None]
    chroma = torch.full_like(bright, 99.0)
    chroma[:4, :4] = torch.tensor(_COLOR, dtype=like.dtype, device=like.device)
    return torch.stack([bright, chroma, chroma])


@register(
    paper="Athalye et al. 2018, arXiv 1707.07397; Kurakin et al. 2017, arXiv 1607.02533",
    threats=("linf", "l2", "patch"),
    cost="steps * (draws + 1 forwards, draws backwards), 1 forward to judge",
)
def physical(
    steps: int = 40,
    draws: int = 8,
    channel: Channel | None = None,
    step: float = 0.1,
    threat: Projects | None = None,
    objective: Objective = cross_entropy,
) -> Attack:
    """PGD on the expectation over the channel: each step follows the mean gradient of `draws` photographs (Athalye 2018).

    Its own successes are judged without the channel, as all successes here; `survival` says what the channel leaves. Call it
    with `drop=False`: the search must go on after the first success without a channel.

    Cost: steps * (draws + 1 forwards, draws backwards), 1 forward to judge.
    """
    source = Through(channel or Channel(), Eot(autograd, draws))
    return Attack("physical", threat or Linf(), objective, Descent(OfRadius(step), gradient=source), steps)


@dataclass(frozen=True)
class Survival:
    """What a channel leaves of an attack.

    Attributes:
        reached: (N,) bool, without the channel. shares: (N,) float64, share of draws that still reach the goal.
    """

    reached: Tensor
    shares: Tensor

    @property
    def rate(self) -> float:
        """Mean share over the inputs that succeed without the channel; NaN where none does. 1 - destruction rate."""
        return float(self.shares[self.reached].mean())

    @property
    def through(self) -> float:
        """Mean share over all inputs, whatever they did without the channel."""
        return float(self.shares.mean())


def survival(model: Model, x_adv: Tensor, goal: Goal | Tensor, draws: int = 20, channel: Channel | None = None, seed: int = 0) -> Survival:
    """How much success survives the channel: Kurakin et al. 2017, eq. 1, is 1 - rate.

    For untargeted goals compare with `survival(model, x, goal, ...)` of clean inputs: a harsh channel breaks those too.

    Args:
        x_adv: (N, C, H, W) in [0, 1]. goal: labels (N,) or any goal. draws: photographs of each input.

    Cost: draws + 1 forwards per input.
    """
    if draws < 1:
        raise BadInput(f"draws: {draws}: must be 1 or more")
    victim, channel = Victim.of(model), channel or Channel()
    x_adv, aim = moved(x_adv, victim.device), moved(as_goal(goal), victim.device)
    ids, key, tally = content_ids(x_adv), Key.of(seed).fold("survival"), Tally.zeros(len(x_adv))
    with victim, torch.no_grad():
        reached = aim.reached(victim.outputs(x_adv, tally))
        hits = torch.zeros(len(x_adv), dtype=torch.float64, device=x_adv.device)
        for number in range(draws):
            hits += aim.reached(victim.outputs(channel(x_adv, key.fold("draw", number), ids), tally))
    return Survival(reached, hits / draws)
