"""Defenses that pass the input through something without a gradient."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.defenses.training import Batch, Logs, Standard
from verdicts.bases import adversarial, fitted, images, network, seeded, standard
from verdicts.case import PGD, Case, straight, thorough, undefended
from verdicts.search import Seen


class Bits(nn.Module):
    """Rounds to 2^bits levels."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.levels = 2**bits - 1

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.levels).round() / self.levels


class Behind(nn.Module):
    """A network behind a module that changes its input."""

    def __init__(self, first: nn.Module, net: nn.Module) -> None:
        super().__init__()
        self.first, self.net = first, net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.first(x))


class Binary(nn.Module):
    """Black or white, cut within the network's own forward pass."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x > 0.5).float())


class Jpeg(nn.Module):
    """Each image saved as JPEG and read again."""

    def __init__(self, net: nn.Module, quality: int = 75) -> None:
        super().__init__()
        self.net, self.quality = net, quality

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.saved(x))

    def saved(self, x: Tensor) -> Tensor:
        pixels = (x.detach().cpu().numpy() * 255).round().astype(np.uint8)
        out = np.empty_like(pixels)
        for image, place in zip(pixels[:, 0], out[:, 0], strict=True):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=self.quality)
            place[:] = np.asarray(Image.open(file))
        return torch.from_numpy(out).to(x) / 255


class Median(nn.Module):
    """A 3x3 median filter in NumPy."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        padded = np.pad(x.detach().cpu().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        middle = np.median(windows.reshape(*windows.shape[:-2], 9), axis=-1)
        return self.net(torch.from_numpy(middle).to(x))


def median(x: Tensor) -> Tensor:
    """The same filter with the gradient of the pixel that is chosen."""
    windows = F.unfold(F.pad(x, (1, 1, 1, 1)), 3).reshape(len(x), 9, *x.shape[2:])
    return windows.median(1, keepdim=True).values


class Thermometer(nn.Module):
    """One channel for each level: is the pixel above it? Trained on that."""

    def __init__(self, levels: int = 16) -> None:
        super().__init__()
        self.register_buffer("at", torch.arange(levels).float().view(1, -1, 1, 1) / levels)
        self.net = network(channels=levels)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x > self.at).float())

    def soft(self, x: Tensor, sharp: float) -> Tensor:
        """The encoding's own value with a sigmoid's slope."""
        return self.net(straight((x > self.at).float(), torch.sigmoid(sharp * (x - self.at))))


class Denoiser(nn.Module):
    """A denoising autoencoder and rounding, both out of autograd's sight (as MagNet, HGD and purifiers run them)."""

    def __init__(self, coder: nn.Module, net: nn.Module) -> None:
        super().__init__()
        self.coder, self.net = coder, net

    @torch.no_grad()
    def cleaned(self, x: Tensor) -> Tensor:
        return (self.coder(x).clamp(0, 1) * 15).round() / 15

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.cleaned(x))


class Projected(nn.Module):
    """Searches the latent code whose image is nearest to the input, by gradient steps in the forward pass, and classifies that image."""

    def __init__(self, coder: nn.Module, net: nn.Module, steps: int = 5, rate: float = 0.5) -> None:
        super().__init__()
        self.coder, self.net, self.steps, self.rate = coder, net, steps, rate

    def cleaned(self, x: Tensor) -> Tensor:
        encode, decode = self.coder[0], self.coder[1]  # type: ignore[index]
        with torch.enable_grad():
            code = encode(x).detach()
            for _ in range(self.steps):
                code = code.requires_grad_()
                (slope,) = torch.autograd.grad((decode(code) - x.detach()).square().sum(), code)
                code = (code - self.rate * slope).detach()
        return decode(code).clamp(0, 1).detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.cleaned(x))


class Mute(torch.autograd.Function):
    """The identity, with a backward pass that says nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


class Muted(nn.Module):
    """A network whose scores pass through `Mute`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return Mute.apply(self.net(x))


class Band(nn.Module):
    """Keeps low frequencies and rounds to 16 levels."""

    def __init__(self, net: nn.Module, kept: int = 8) -> None:
        super().__init__()
        self.net, self.kept = net, kept

    def forward(self, x: Tensor) -> Tensor:
        return self.net((self.low(x) * 15).round() / 15)

    def low(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x)
        rows = torch.fft.fftfreq(x.shape[-2]).abs() * x.shape[-2] <= self.kept
        columns = torch.arange(spectrum.shape[-1]) <= self.kept
        return torch.fft.irfft2(spectrum * (rows[:, None] & columns), s=x.shape[-2:])


class Sparse(nn.Module):
    """Channels near their mean become their mean: |a - mean| < width * deviation, in front of a ReLU."""

    def __init__(self, mean: Tensor, deviation: Tensor, width: float) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("reach", width * deviation)

    def forward(self, a: Tensor) -> Tensor:
        return torch.where((a - self.mean).abs() < self.reach, self.mean, a)


class Thresholded(nn.Module):
    """A trained network with `Sparse` in front of its first two ReLUs, fitted to 2,000 training images."""

    def __init__(self, net: nn.Sequential, width: float) -> None:
        super().__init__()
        self.first, self.second, self.rest = net[0], net[2], net[3:]
        x = images()[0][:2000]
        with torch.no_grad():
            a = self.first(x)
            self.cut = self._fit(a, width)
            self.cut_again = self._fit(self.second(F.relu(self.cut(a))), width)

    @staticmethod
    def _fit(a: Tensor, width: float) -> Sparse:
        return Sparse(a.mean((0, 2, 3), keepdim=True), a.std((0, 2, 3), keepdim=True), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.cut_again(self.second(F.relu(self.cut(self.first(x))))))

    def through(self, x: Tensor) -> Tensor:
        """The same value, the gradient as if nothing were cut."""
        a = self.first(x)
        b = self.second(F.relu(straight(self.cut(a), a)))
        return self.rest(straight(self.cut_again(b), b))


class Denoise:
    """Squared error of the coder's answer to noise of half the box, uniform and normal."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        noisy = (x + 0.2 * batch.normal(x)).clamp(0, 1)
        return 20 * (model.coder(noisy) - x).square().mean(), {}  # type: ignore[operator]

    def __repr__(self) -> str:
        return "Denoise(0.2)"


class Coder(nn.Module):
    """An autoencoder that passes for a classifier while it is fitted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        encode = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, width))
        decode = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 784), nn.Sigmoid(), nn.Unflatten(1, (1, 28, 28)))
        self.coder = nn.Sequential(encode, decode)

    def forward(self, x: Tensor) -> Tensor:
        return self.coder(x).flatten(1)[:, :10]


def coder(width: int) -> nn.Module:
    return fitted(f"coder-{width}", seeded(lambda: Coder(width)), Denoise(), epochs=8, by=latest).coder  # type: ignore[return-value]


def latest(record: Any) -> tuple[float, float]:
    """The last weights are kept."""
    return record.epoch, 0.0


def thermometer() -> nn.Module:
    return fitted("thermometer", seeded(Thermometer), Standard(), epochs=3)


def on(front: str) -> Any:
    """BPDA: the net behind the front's own values, with the input's gradient in place of the front's."""

    def through(model: nn.Module) -> Seen:
        return lambda z: model.net(straight(getattr(model, front)(z), z))

    return through


CASES = (
    Case(
        "bit depth",
        "Xu et al. 2018, arXiv 1704.01155",
        "masked",
        lambda: Behind(Bits(3), standard()).eval(),
        PGD,
        thorough(on("first"), undefended),
        cause="dead",
        note="3 bits",
    ),
    Case(
        "binary",
        "Xu et al. 2018, arXiv 1704.01155",
        "masked",
        lambda: Binary(standard()).eval(),
        PGD,
        thorough(
            lambda m: lambda z: m.net(straight((z > 0.5).float(), torch.sigmoid(10 * (z - 0.5)))),
            lambda m: lambda z: m.net(straight((z > 0.5).float(), z)),
        ),
        cause="dead",
        radius=0.3,
        note="digits are nearly binary, so that the cut does help",
    ),
    Case(
        "jpeg",
        "Guo et al. 2018, arXiv 1711.00117",
        "masked",
        lambda: Jpeg(standard()).eval(),
        PGD,
        thorough(on("saved"), undefended),
        cause="dead",
        note="quality 75, by Pillow",
    ),
    Case(
        "thermometer",
        "Buckman et al. 2018, ICLR S18Su--CW",
        "masked",
        thermometer,
        PGD,
        thorough(lambda m: lambda z: m.soft(z, 10.0), lambda m: lambda z: m.soft(z, 30.0)),
        cause="dead",
        note="16 levels, trained without an adversary",
    ),
    Case(
        "denoiser",
        "Meng & Chen 2017, arXiv 1705.09064",
        "masked",
        lambda: Denoiser(coder(64), standard()).eval(),
        PGD,
        thorough(lambda m: lambda z: m.net(straight(m.cleaned(z), m.coder(z))), on("cleaned"), undefended),
        cause="dead",
        note="autoencoder and rounding under no_grad",
    ),
    Case(
        "median",
        "Xu et al. 2018, arXiv 1704.01155",
        "masked",
        lambda: Median(standard()).eval(),
        PGD,
        thorough(lambda m: lambda z: m.net(median(z)), undefended),
        cause="dead",
        note="3x3, in NumPy",
    ),
    Case(
        "projected",
        "Samangouei et al. 2018, arXiv 1805.06605",
        "masked",
        lambda: Projected(coder(32), standard()).eval(),
        PGD,
        thorough(lambda m: lambda z: m.net(straight(m.cleaned(z), m.coder(z))), on("cleaned"), undefended),
        cause="dead",
        note="5 gradient steps on a latent code inside forward",
    ),
    Case(
        "muted",
        "Athalye et al. 2018, arXiv 1802.00420",
        "masked",
        lambda: Muted(standard()).eval(),
        PGD,
        thorough(undefended),
        cause="dead",
        note="a backward pass of zeros",
    ),
    Case(
        "band limit",
        "Dziedzic et al. 2019, arXiv 1911.09287",
        "masked",
        lambda: Band(standard()).eval(),
        PGD,
        thorough(lambda m: lambda z: m.net(straight((m.low(z) * 15).round() / 15, m.low(z))), undefended),
        cause="dead",
        note="FFT filter, then 16 levels",
    ),
    Case(
        "threshold on PGD",
        "Amini et al. 2024, arXiv 2406.05927",
        "overstated",
        lambda: Thresholded(adversarial(), 0.25).eval(),
        PGD,
        thorough(lambda m: m, lambda m: m.through),
        note="features near their mean become their mean, after PGD training",
    ),
    Case(
        "threshold",
        "Amini et al. 2024, arXiv 2406.05927",
        "overstated",
        lambda: Thresholded(standard(), 0.5).eval(),
        PGD,
        thorough(lambda m: m, lambda m: m.through),
        note="the same, after standard training",
    ),
)
