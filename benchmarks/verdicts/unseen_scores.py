"""Defenses made up by somebody who had not seen how the audit works: scores, keys, chance, purification, training; honest networks.

`held` and the notes say what the audit said at first sight: that of commit 04885db, same images and seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.defenses.training import Batch, GaussianNoise, Logs, Standard
from verdicts.bases import adversarial, fitted, images, network, seeded, standard
from verdicts.case import FGSM, Case, thorough, undefended
from verdicts.controls import control
from verdicts.held_out import chance, masked
from verdicts.quantize import coder, on
from verdicts.search import Climb, Seen
from verdicts.unseen import Around


class Misled(Around):
    """The lead of the best class is mirrored within steps of 1.5: where it grows the scores say that it shrinks."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.net(x)
        (best, second), (first, _) = (part.unbind(1) for part in scores.topk(2))
        lead = best - second
        mirrored = (2 * (lead / 1.5).floor().detach() + 1) * 1.5 - lead
        return scores.scatter_add(1, first[:, None], (mirrored - lead)[:, None])


class Poisoned(Around):
    """Probabilities minus a share of a flat sigmoid of their log-odds: the best class stays, above 0.98 its slope turns round."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.net(x)
        others = scores[:, None, :].masked_fill(torch.eye(scores.shape[1], dtype=torch.bool), -torch.inf)
        odds = scores - others.logsumexp(2)
        poisoned = torch.sigmoid(odds) - 0.9 * (torch.sigmoid(0.2 * odds) - 0.5)
        return poisoned / poisoned.sum(1, keepdim=True)


class Keyed(Around):
    """Every block of 4 x 4 pixels is shuffled by a secret key."""

    def __init__(self, net: nn.Module, key: int) -> None:
        super().__init__(net)
        self.register_buffer("order", torch.randperm(16, generator=torch.Generator().manual_seed(key)))

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.reshape(-1, 7, 4, 7, 4).transpose(2, 3).reshape(-1, 7, 7, 16)
        shuffled = blocks[..., self.order].view(-1, 7, 7, 4, 4)  # type: ignore[index]
        return self.net(shuffled.transpose(2, 3).reshape(-1, 1, 28, 28))


class Hashed(nn.Module):
    """Three networks with a key each; a checksum of the image, at 12 bits a pixel, says which of them answers."""

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x.detach() * 4095).round().long().flatten(1).sum(1) % len(self.nets)
        answers = torch.stack([net(x) for net in self.nets], 1)
        return answers[torch.arange(len(x)), chosen]


class Capped(Around):
    """Logarithms of probabilities that are never printed above 90 % or below 10 %."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(1).clamp(0.1, 0.9).log()


class Ballots(Around):
    """How many of 15 noisy copies are of a class."""

    def copies(self, x: Tensor) -> Tensor:
        """(B, 15, classes)"""
        many = x.repeat_interleave(15, 0)
        return self.net(many + 0.5 * torch.randn_like(many)).unflatten(0, (len(x), 15))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.copies(x)
        return F.one_hot(scores.argmax(2), scores.shape[2]).to(x).sum(1)

    def soft(self, x: Tensor) -> Tensor:
        """The logarithm of the mean probability."""
        return self.copies(x).log_softmax(2).logsumexp(1)


class Langevin(Around):
    """Eight steps up a denoiser's score, with noise, out of autograd's sight."""

    def __init__(self, coder: nn.Module, net: nn.Module) -> None:
        super().__init__(net)
        self.coder = coder

    def walk(self, x: Tensor) -> Tensor:
        for _ in range(8):
            x = x + 0.1 * (self.coder(x) - x) + 0.05 * torch.randn_like(x)
        return x

    @torch.no_grad()
    def cleaned(self, x: Tensor) -> Tensor:
        return self.walk(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.cleaned(x))

    def unrolled(self, x: Tensor) -> Tensor:
        """The same, in autograd's sight."""
        return self.net(self.walk(x))


class Adapted(Around):
    """Scales and shifts of the last features are trained on each image, until its shifted copies agree; then the copy is asked."""

    def adapted(self, x: Tensor, unroll: bool) -> Tensor:
        copies = [x, *(torch.roll(x, by, axis) for by in (-1, 1) for axis in (2, 3))]
        features = [self.net[:-1](copy) for copy in copies]  # type: ignore[index]
        features = features if unroll else [one.detach() for one in features]
        scale, shift = torch.ones_like(features[0]).requires_grad_(), torch.zeros_like(features[0]).requires_grad_()
        for _ in range(4):
            mean = torch.stack([self.net[-1](one * scale + shift).softmax(1) for one in features]).mean(0)  # type: ignore[index]
            entropy = -(mean * mean.clamp(min=1e-12).log()).sum()
            slopes = torch.autograd.grad(entropy, (scale, shift), create_graph=unroll)
            scale, shift = scale - 0.5 * slopes[0], shift - 0.5 * slopes[1]
            if not unroll:
                scale, shift = scale.detach().requires_grad_(), shift.detach().requires_grad_()
        return self.net[-1](features[0] * scale + shift)  # type: ignore[index, no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.adapted(x, False).detach()

    def unrolled(self, x: Tensor) -> Tensor:
        """Differentiable through the adaptation."""
        with torch.enable_grad():
            return self.adapted(x, True)


class Centers(Around):
    """Minus the squared distances of ten features to the corners of a simplex of radius 10."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        corners = torch.eye(10) - 0.1
        self.register_buffer("corners", 10 * corners / corners.norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return -(self.net(x)[:, None] - self.corners).square().sum(2)


@dataclass(frozen=True)
class ToCenter:
    """Mean squared distance to the center of the class."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        return -model(x).gather(1, y[:, None]).mean() / 20, {}


@dataclass(frozen=True)
class Flat:
    """Cross-entropy, and the squared length of its gradient at the input."""

    weight: float

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        leaf = x.detach().requires_grad_()
        loss = F.cross_entropy(model(leaf), y, reduction="none")
        (slope,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
        return loss.mean() + self.weight * slope.flatten(1).square().sum(1).mean(), {}


class Subspaces(nn.Module):
    """Minus the squared distances to ten affine subspaces, one a class: its mean and twelve principal components."""

    def __init__(self) -> None:
        super().__init__()
        x, y = images()
        flat = x[:20000].flatten(1)
        parts = [flat[y[:20000] == k] for k in range(10)]
        self.register_buffer("means", torch.stack([part.mean(0) for part in parts]))
        axes = [torch.linalg.eigh(torch.cov(part.T)).eigenvectors[:, -12:] for part in parts]
        self.register_buffer("axes", torch.stack(axes))

    def forward(self, x: Tensor) -> Tensor:
        off = x.flatten(1)[:, None] - self.means  # type: ignore[operator]
        inside = torch.einsum("bkd,kdj->bkj", off, self.axes)
        return inside.square().sum(2) - off.square().sum(2)


class Pairs(nn.Module):
    """The larger and the smaller of every two features."""

    def forward(self, a: Tensor) -> Tensor:
        p, q = a[:, ::2], a[:, 1::2]
        return torch.cat([torch.maximum(p, q), torch.minimum(p, q)], 1)


class Short(nn.Linear):
    """A linear layer that makes no distance longer: rows scaled so that the largest singular value is at most 1."""

    def scaled(self) -> Tensor:
        return self.weight * (self.weight @ self.weight.T).abs().sum(1, keepdim=True).clamp(min=1e-12).rsqrt()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.scaled(), self.bias)


class Times(nn.Module):
    """Times eight."""

    def forward(self, x: Tensor) -> Tensor:
        return 8 * x


def lipschitz() -> nn.Module:
    """Trained with `Short` layers, which then become plain linear ones."""
    layers = seeded(lambda: nn.Sequential(nn.Flatten(), Short(784, 128), Pairs(), Short(128, 128), Pairs(), Short(128, 10), Times()))
    net = fitted("short", layers, Standard(), epochs=8)
    plain = [nn.Linear(one.in_features, one.out_features) if isinstance(one, Short) else one for one in net]  # type: ignore[attr-defined]
    for old, new in zip(net, plain, strict=True):  # type: ignore[call-overload]
        if isinstance(old, Short):
            new.weight.data, new.bias.data = old.scaled().detach(), old.bias.detach()
    return nn.Sequential(*plain).eval().requires_grad_(False)


@cache
def keyed(key: int) -> nn.Module:
    return fitted(f"keyed-{key}", seeded(lambda: Keyed(network(), key), key), Standard())


def hashed() -> nn.Module:
    return Hashed([keyed(key) for key in (11, 12, 13)]).eval()


def member(i: int) -> Callable[[nn.Module], Seen]:
    return lambda model: model.nets[i]  # type: ignore[index, return-value]


def mean_of_all(model: nn.Module) -> Seen:
    return lambda z: torch.stack([net(z) for net in model.nets]).mean(0)  # type: ignore[attr-defined]


def likely(model: nn.Module) -> Seen:
    """Logarithm of the sum of the members' probabilities."""
    return lambda z: torch.stack([net(z).log_softmax(1) for net in model.nets]).logsumexp(0)  # type: ignore[attr-defined]


def noisy() -> nn.Module:
    return fitted("noise", seeded(network), GaussianNoise(0.5), epochs=5)


def soft(model: nn.Module) -> Seen:
    return model.soft  # type: ignore[return-value]


def unrolled(model: nn.Module) -> Seen:
    return model.unrolled  # type: ignore[return-value]


def tempered(by: float) -> Callable[[nn.Module], Seen]:
    return lambda model: lambda z: model(z) / by


def eot(*through: Callable[[nn.Module], Seen], draws: int, look: int, steps: int = 60) -> tuple[Climb, ...]:
    """Margin and cross-entropy on gradients of several draws."""
    return tuple(Climb(view, loss, steps=steps, draws=draws, look=look) for view in through for loss in ("margin", "cross-entropy"))


CASES: tuple[Case, ...] = (
    masked(
        "misled",
        lambda: Misled(adversarial()).eval(),
        undefended,
        cause="rough",
        paper="after Chen et al. 2022, arXiv 2205.12609",
        note="AAA: the lead of the best class mirrored in steps of 1.5, around PGD-7",
    ),
    masked(
        "poisoned",
        lambda: Poisoned(standard()).eval(),
        undefended,
        cause="rough",
        radius=0.1,
        paper="Lee et al. 2018, arXiv 1806.00054",
        note="reverse sigmoid against model stealing: probabilities fall where confidence grows; 81 for 12 at first sight, and blocked",
        first="wrong",
    ),
    replace(
        masked(
            "hashed",
            hashed,
            cause="rough",
            radius=0.1,
            paper="after AprilPyone & Kiya 2021, arXiv 2010.00801",
            note="a checksum of the image picks one of three networks with block-shuffle keys",
        ),
        adaptive=(*thorough(likely, mean_of_all, member(0), member(1), member(2))[:-1], *thorough()),
    ),
    masked(
        "capped",
        lambda: Capped(adversarial()).eval(),
        undefended,
        note="logarithms of probabilities between 10 and 90 %, around PGD-7",
    ),
    chance(
        "ballots",
        lambda: Ballots(noisy()).eval(),
        eot(soft, draws=8, look=10),
        paper="Cohen et al. 2019, arXiv 1902.02918",
        note="randomized smoothing: hard votes of 15 noisy copies",
    ),
    chance(
        "langevin",
        lambda: Langevin(coder(64), standard()).eval(),
        (*eot(unrolled, draws=10, look=10), *eot(on("cleaned"), undefended, draws=5, look=10)),
        paper="after Yoon et al. 2021, arXiv 2106.06041",
        note="eight noisy steps up a denoiser's score under no_grad",
    ),
    masked(
        "adapted",
        lambda: Adapted(adversarial()).eval(),
        unrolled,
        undefended,
        paper="after Zhang et al. 2022, arXiv 2110.09506",
        note="MEMO: features rescaled on each image until its shifted copies agree, answer without autograd, around PGD-7",
    ),
    masked(
        "centers",
        lambda: fitted("centers", seeded(lambda: Centers(network())), ToCenter(), epochs=5),
        tempered(20.0),
        cause="scores",
        radius=0.1,
        paper="Pang et al. 2020, arXiv 1905.10626",
        note="Max-Mahalanobis centers: scores are minus squared distances to corners of a large simplex",
    ),
    Case(
        "flat",
        "Ross & Doshi-Velez 2018, arXiv 1711.09404",
        "overstated",
        lambda: fitted("flat", seeded(network), Flat(1.0), epochs=5),
        FGSM,
        thorough(),
        radius=0.1,
        note="input gradients penalized in training, judged by FGSM",
        held="right",
    ),
    control(
        "subspaces",
        "held out",
        lambda: Subspaces().eval(),
        0.1,
        "squared distances to principal subspaces of the classes: nothing is trained by gradients",
        held="right",
    ),
    control(
        "short layers",
        "Prach & Lampert 2022, arXiv 2208.03160",
        lipschitz,
        0.1,
        "AOL layers of Lipschitz constant 1 and MaxMin; audits warned here of one sample until they searched on",
        held="wrong",
    ),
)
