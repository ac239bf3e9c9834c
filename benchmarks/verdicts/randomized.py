"""Defenses that draw random numbers, and one whose answers hang on the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.defenses.training import Standard
from verdicts.bases import fitted, images, network, seeded, standard
from verdicts.case import PGD, Case, as_it_is, straight, thorough, undefended
from verdicts.search import DRAWS, Judge, Seen, by_votes


class ResizePad(nn.Module):
    """Shrinks to a random side and pads to a random place, one draw for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        side = int(torch.randint(20, 29, ()))
        left, top = (int(torch.randint(0, 29 - side, ())) for _ in range(2))
        small = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
        return self.net(F.pad(small, (left, 28 - side - left, top, 28 - side - top)))


class Noise(nn.Module):
    """Normal noise, in training and after it."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sigma * torch.randn_like(x)


class Ensemble(nn.Module):
    """Noise in front of every convolution, and the mean probability of five draws."""

    def __init__(self) -> None:
        super().__init__()
        layers = [*network()]
        self.net = nn.Sequential(Noise(0.3), *layers[:2], Noise(0.2), *layers[2:])

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.net(x)
        return torch.stack([self.net(x).softmax(1) for _ in range(5)]).mean(0).clamp(min=1e-30).log()


class Pruning(nn.Module):
    """Keeps an activation with probability 1 - (1 - p)^n, p its share of the layer and n as many as there are, and scales it up."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.share = share

    def forward(self, a: Tensor) -> Tensor:
        flat = a.flatten(1).abs()
        p = flat / flat.sum(1, keepdim=True).clamp(min=1e-12)
        kept = (1 - (1 - p).pow(self.share * flat.shape[1])).clamp(1e-6, 1).reshape(a.shape).detach()
        return a * (torch.rand_like(a) < kept) / kept


class Pruned(nn.Module):
    """A trained network with stochastic activation pruning behind each ReLU."""

    def __init__(self, net: nn.Module, share: float) -> None:
        super().__init__()
        layers = [(layer, Pruning(share)) if isinstance(layer, nn.ReLU) else (layer,) for layer in net]  # type: ignore[attr-defined]
        self.net = nn.Sequential(*(layer for pair in layers for layer in pair))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Flips(nn.Module):
    """Four bits a pixel, of which the lowest two flip by chance."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def drawn(self, x: Tensor) -> Tensor:
        levels = (x.detach() * 15).round().int()
        for bit, chance in ((1, 0.3), (2, 0.1)):
            levels = levels ^ (bit * (torch.rand_like(x) < chance).int())
        return levels.to(x) / 15

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.drawn(x))


class Normed(nn.Module):
    """Batch norm that only knows the batch."""

    def __init__(self) -> None:
        super().__init__()
        layers = [*network()]
        norms = [nn.BatchNorm2d(width, track_running_stats=False) for width in (8, 16)]
        self.net = nn.Sequential(layers[0], norms[0], layers[1], layers[2], norms[1], *layers[3:])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def in_company(model: nn.Module) -> Judge:
    """Broken where more than half of twenty batches of 31 clean training images and this one get it wrong."""
    pool = images()[0][:5000]

    @torch.no_grad()
    def judge(z: Tensor, y: Tensor) -> Tensor:
        others = [pool[torch.randperm(len(pool))[:31]] for _ in range(DRAWS)]
        answers = [[int(model(torch.cat([one[None], rest]))[:1].argmax(1)) for rest in others] for one in z]
        return 2 * (torch.tensor(answers) != y[:, None]).sum(1) > DRAWS

    return judge


def among(count: int) -> Callable[[nn.Module], Seen]:
    """The model, asked in the company of clean training images."""

    def through(model: nn.Module) -> Seen:
        pool = images()[0][5000 : 5000 + count]
        return lambda z: model(torch.cat([z, pool]))[: len(z)]

    return through


def averaged(front: str) -> Callable[[nn.Module], Seen]:
    """BPDA through a random front."""
    return lambda model: lambda z: model.net(straight(getattr(model, front)(z), z))


RANDOM = thorough(as_it_is, draws=DRAWS, look=10)

CASES = (
    Case(
        "resize and pad",
        "Xie et al. 2018, arXiv 1711.01991",
        "masked",
        lambda: fitted("resize", seeded(ResizePad), Standard(), epochs=5),
        PGD,
        (*thorough(undefended, look=10)[:-1], *RANDOM),
        cause="random",
        judge=by_votes,
        random=True,
        radius=0.1,
        note="20 to 28 pixels a side",
    ),
    Case(
        "noise ensemble",
        "Liu et al. 2018, arXiv 1712.00673",
        "masked",
        lambda: fitted("ensemble", seeded(Ensemble), Standard(), epochs=5),
        PGD,
        RANDOM,
        cause="random",
        judge=by_votes,
        random=True,
        radius=0.1,
        note="RSE: noise layers, five draws",
    ),
    Case(
        "activation pruning",
        "Dhillon et al. 2018, arXiv 1803.01442",
        "masked",
        lambda: Pruned(standard(), 1.0).eval(),
        PGD,
        RANDOM,
        cause="random",
        judge=by_votes,
        random=True,
        radius=0.1,
        note="SAP",
    ),
    Case(
        "bit flips",
        "after Guo et al. 2018, arXiv 1711.00117",
        "masked",
        lambda: Flips(standard()).eval(),
        PGD,
        (*thorough(undefended, look=10)[:-1], *thorough(averaged("drawn"), draws=DRAWS, look=10)),
        cause="random",
        judge=by_votes,
        random=True,
        note="random and quantized: no gradient either",
    ),
    Case(
        "batch statistics",
        "Ioffe & Szegedy 2015, arXiv 1502.03167",
        "masked",
        lambda: fitted("normed", seeded(Normed), Standard()),
        PGD,
        tuple(one for one in thorough(among(200), look=25) if one.__class__.__name__ == "Climb"),
        cause="batch",
        judge=in_company,
        note="batch norm left in training mode; judged among clean images, 20 batches",
    ),
)
