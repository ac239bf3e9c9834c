"""Defenses and controls that the audit was not tuned on: made up when the rest of the table was right.

`held` says what the first audit of each was worth; what was wrong then has been mended in its cause.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.defenses import training
from verdicts.bases import adversarial, fitted, images, network, seeded, standard
from verdicts.case import PGD, Case, straight, thorough, undefended
from verdicts.controls import control
from verdicts.quantize import Jpeg, on
from verdicts.randomized import RANDOM, averaged
from verdicts.search import DRAWS, by_votes
from verdicts.train import Probabilities


class Wavelet(nn.Module):
    """Haar wavelets in NumPy: details below a threshold become 0."""

    def __init__(self, net: nn.Module, least: float = 0.15) -> None:
        super().__init__()
        self.net, self.least = net, least

    def cleaned(self, x: Tensor) -> Tensor:
        a = x.detach().cpu().numpy()
        p, q, r, s = a[..., ::2, ::2], a[..., ::2, 1::2], a[..., 1::2, ::2], a[..., 1::2, 1::2]
        mean, details = (p + q + r + s) / 4, [(p - q + r - s) / 4, (p + q - r - s) / 4, (p - q - r + s) / 4]
        across, down, both = (np.where(np.abs(one) < self.least / 2, 0, one) for one in details)
        out = np.empty_like(a)
        out[..., ::2, ::2], out[..., ::2, 1::2] = mean + across + down + both, mean - across + down - both
        out[..., 1::2, ::2], out[..., 1::2, 1::2] = mean + across - down - both, mean - across - down + both
        return torch.from_numpy(out).to(x).clamp(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.cleaned(x))


class Stem(nn.Module):
    """The first convolution runs without autograd, as a frozen feature extractor would."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.net[:2](x)
        return self.net[2:](features)


class Hush(torch.autograd.Function):
    """Rounds in place; its backward pass gives zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clone()
        return out.mul_(7).round_().div_(7)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


class Hushed(nn.Module):
    """The features behind the first layer pass through `Hush`."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2:](Hush.apply(self.net[:2](x)))  # type: ignore[no-untyped-call]


class Votes(nn.Module):
    """How many networks vote for a class; the first breaks ties."""

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        votes = [F.one_hot(net(x).argmax(1), 10).float() for net in self.nets]
        return torch.stack(votes).sum(0) + 0.5 * votes[0]


class Cold(nn.Module):
    """Logarithms of probabilities at a temperature of 1e-4."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return (self.net(x) / 1e-4).log_softmax(1)


class AnyJpeg(Jpeg):
    """Quality 30 to 90, drawn for each batch."""

    def saved(self, x: Tensor) -> Tensor:
        self.quality = int(torch.randint(30, 91, ()))
        return super().saved(x)


class Sometimes(nn.Module):
    """Every second image, by chance, gets noise."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        coin = (torch.rand(len(x), 1, 1, 1) < 0.5).to(x)
        return self.net(x + coin * 0.3 * torch.randn_like(x))


class Cents(nn.Module):
    """Probabilities rounded to two decimals, as an interface would print them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return (self.net(x).softmax(1) * 100).round() / 100


class Nearest(nn.Module):
    """Classifies the nearest of 3,000 stored training images in place of the input."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("stored", images()[0][:3000].clone())

    def cleaned(self, x: Tensor) -> Tensor:
        return self.stored[torch.cdist(x.flatten(1), self.stored.flatten(1)).argmin(1)]  # type: ignore[index]

    def soft(self, x: Tensor, width: float) -> Tensor:
        """The nearest one's value, with the gradient of a mean that weighs near ones most."""
        stored: Tensor = self.stored  # type: ignore[assignment]
        near = (-torch.cdist(x.flatten(1), stored.flatten(1)).square() / width).softmax(1)
        return self.net(straight(self.cleaned(x), (near @ stored.flatten(1)).view_as(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.cleaned(x))


class Dropping(nn.Module):
    """GELU layers whose dropout is never switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*network(relu=nn.GELU))

    def forward(self, x: Tensor) -> Tensor:
        features = F.dropout(self.net[:4](x), 0.5, training=True)
        return self.net[6:](F.dropout(self.net[4:6](features), 0.3, training=True))


class Crops(nn.Module):
    """The mean of the scores of five crops, a pixel apart."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        wide = F.pad(x, (1, 1, 1, 1))
        places = ((0, 0), (0, 2), (2, 0), (2, 2), (1, 1))
        return torch.stack([self.net(wide[..., i : i + 28, j : j + 28]) for i, j in places]).mean(0)


def pooled() -> nn.Module:
    """Batch norm and average pooling in place of strides."""
    blocks = [
        layer for a, b in ((1, 8), (8, 16)) for layer in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.SiLU(), nn.AvgPool2d(2))
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(784, 64), nn.SiLU(), nn.Linear(64, 10))


def voter(seed: int) -> nn.Module:
    return fitted(f"voter-{seed}", seeded(network, seed), training.Standard())


def voters() -> nn.Module:
    return Votes([standard(), *map(voter, (1, 2))]).eval()


def masked(
    name: str,
    model: Any,
    *through: Any,
    cause: str = "dead",
    radius: float = 0.2,
    note: str,
    first: Literal["right", "wrong"] = "right",
    paper: str = "held out",
) -> Case:
    """A defense that hides gradients, ours where there is no paper."""
    return Case(name, paper, "masked", model, PGD, thorough(*through), cause=cause, radius=radius, note=note, held=first)


def chance(
    name: str,
    model: Any,
    adaptive: Any,
    *,
    radius: float = 0.1,
    note: str,
    first: Literal["right", "wrong"] = "right",
    paper: str = "held out",
) -> Case:
    """A random defense, ours where there is no paper."""
    common: dict[str, Any] = {"judge": by_votes, "random": True, "radius": radius, "note": note, "held": first}
    return Case(name, paper, "masked", model, PGD, adaptive, cause="random", **common)


CASES = (
    masked("wavelets", lambda: Wavelet(standard()).eval(), on("cleaned"), undefended, note="Haar details below 0.15 cut in NumPy"),
    masked("frozen stem", lambda: Stem(standard()).eval(), undefended, note="the first layer under no_grad"),
    masked("hushed rounding", lambda: Hushed(standard()).eval(), undefended, note="features rounded in place, a backward pass of zeros"),
    masked(
        "votes",
        voters,
        lambda m: lambda z: torch.stack([net(z) for net in m.nets]).mean(0),
        lambda m: lambda z: torch.stack([net(z).softmax(1) for net in m.nets]).mean(0).log(),
        note="three networks vote, scores are counts",
    ),
    masked("cold", lambda: Cold(standard()).eval(), undefended, cause="scores", note="log-softmax at a temperature of 1e-4"),
    masked("cents", lambda: Cents(standard()).eval(), undefended, note="probabilities rounded to two decimals"),
    masked(
        "nearest image",
        lambda: Nearest(standard()).eval(),
        lambda m: lambda z: m.soft(z, 5.0),
        lambda m: lambda z: m.soft(z, 20.0),
        on("cleaned"),
        undefended,
        note="the nearest of 3,000 stored images is classified; 49 at first sight, and the audit blocked itself",
        first="wrong",
    ),
    chance(
        "any jpeg",
        lambda: AnyJpeg(standard()).eval(),
        (*thorough(undefended, look=10)[:-1], *thorough(averaged("saved"), draws=DRAWS, look=10)),
        radius=0.2,
        note="JPEG of a random quality, by Pillow",
    ),
    chance("sometimes", lambda: Sometimes(standard()).eval(), RANDOM, note="noise of 0.3 with probability one half"),
    chance("dropout", lambda: fitted("dropping", seeded(Dropping), training.Standard(), epochs=5), RANDOM, note="GELU, dropout left on"),
    control("five crops", "held out", lambda: Crops(adversarial()).eval(), note="mean of five crops, PGD-7", held="right"),
    control("probabilities", "held out", lambda: Probabilities(adversarial(), 1.0).eval(), note="softmax behind PGD-7", held="right"),
    control(
        "batch norm",
        "held out",
        lambda: fitted("pooled", seeded(pooled), training.pgd(5, 0.3), n=10000, epochs=3, by=training.by_robust),
        note="batch norm, SiLU, average pooling, PGD-5",
        held="right",
    ),
)
