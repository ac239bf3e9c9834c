"""Twelve more defenses and four honest networks, made up by somebody who had not seen how the audit works, for L2 and L1 above all.

What most of them do lies outside of autograd: features in NumPy and SciPy of other shapes than the image. Used by `verdicts_norms.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from verdicts.bases import FOLDER, images, network, seeded, standard
from verdicts.case import Case, as_it_is, straight, undefended
from verdicts.search import Climb, Seen, by_votes, majority
from verdicts.unseen_inputs import fit


def arrays(x: Tensor) -> np.ndarray:
    """(B, 28, 28) float64."""
    return x.detach().cpu().numpy()[:, 0].astype(np.float64)


def back(a: np.ndarray, x: Tensor) -> Tensor:
    """As a tensor of x's kind."""
    return torch.from_numpy(np.ascontiguousarray(a)).to(x)


def dense(inputs: int, hidden: int = 128) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 64), nn.ReLU(), nn.Linear(64, 10))


def convs(channels: int, flat: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(flat, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def sampled(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear values of x (B, 1, 28, 28) at pixel coordinates (B, H, W), black outside: ndimage's order 1, grid-constant."""
    grid = torch.stack([columns * (2 / 27) - 1, rows * (2 / 27) - 1], -1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


class Behind(nn.Module):
    """Scores of a network on features; `features` is the defense, `smooth` what an expert differentiates."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def smooth(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.features(x))


def smoothly(m: Any) -> Seen:
    """Through the smooth features, with their own values."""
    return lambda x: m.net(m.smooth(x))


def true_values(m: Any) -> Seen:
    """Through the smooth features, at the values of the real ones."""
    return lambda x: m.net(straight(m.features(x), m.smooth(x)))


def radon_features(a: np.ndarray) -> np.ndarray:
    """(B, 336): sums along 28 lines at 12 angles, tenths."""
    return np.concatenate([ndimage.rotate(a, 15 * k, axes=(2, 1), reshape=False, order=1).sum(1) for k in range(12)], 1) / 10


class Radon(Behind):
    """A tomograph: line sums at twelve angles, SciPy; a small network reads the sinogram."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.register_buffer("matrix", torch.from_numpy(radon_features(np.eye(784).reshape(784, 28, 28))).float())

    def features(self, x: Tensor) -> Tensor:
        return back(radon_features(arrays(x)), x)

    def smooth(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.to(x)


def radon() -> nn.Module:
    m = Radon(seeded(lambda: dense(336)))
    fit("radon", m.net, front=m.smooth)
    return m.eval().requires_grad_(False)


class Spectrum(Behind):
    """Log-magnitudes of the Fourier transform, NumPy, and the mean brightness, whose gradient is the only one there is."""

    def features(self, x: Tensor) -> Tensor:
        size = np.log1p(np.abs(np.fft.rfft2(arrays(x)))).reshape(len(x), -1)
        return torch.cat([back(size, x), 4 * x.mean((1, 2, 3))[:, None]], 1)

    def smooth(self, x: Tensor) -> Tensor:
        f = torch.fft.rfft2(x[:, 0])
        size = (f.real.square() + f.imag.square() + 1e-12).sqrt().log1p().flatten(1)
        return torch.cat([size, 4 * x.mean((1, 2, 3))[:, None]], 1)


def spectrum() -> nn.Module:
    m = Spectrum(seeded(lambda: dense(421, 256)))
    fit("spectrum", m.net, front=m.features, n=60000, epochs=12)
    return m.eval().requires_grad_(False)


class LogPolar(Behind):
    """Log-polar about the center of mass; the image is read without autograd, the center with it: half a gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        radius, angle = torch.exp(torch.linspace(float(np.log(0.7)), float(np.log(14)), 16)), torch.arange(32) * (2 * torch.pi / 32)
        self.register_buffer("down", radius[:, None] * angle.sin())
        self.register_buffer("right", radius[:, None] * angle.cos())

    def read(self, seen: Tensor, x: Tensor) -> Tensor:
        """`seen` about the center of x."""
        line, mass = torch.arange(28, device=x.device).to(x), x.sum((1, 2, 3)) + 1e-4
        row, column = (x.sum((1, 3)) * line).sum(1) / mass, (x.sum((1, 2)) * line).sum(1) / mass
        return sampled(seen, row[:, None, None] + self.down.to(x), column[:, None, None] + self.right.to(x))

    def features(self, x: Tensor) -> Tensor:
        return self.read(x.detach(), x)

    def smooth(self, x: Tensor) -> Tensor:
        return self.read(x, x)


def logpolar() -> nn.Module:
    m = LogPolar(seeded(lambda: convs(1, 16 * 4 * 8)))
    fit("logpolar", m.net, front=m.features)
    return m.eval().requires_grad_(False)


class Boxed(Behind):
    """Cuts the square around all pixels above 0.35 and blows it up to 20 x 20, as scanners do; SciPy."""

    def boxes(self, x: Tensor) -> np.ndarray:
        """(B, 4): first row, last row, first column, last column."""
        on, out = arrays(x) > 0.35, np.tile(np.array([0.0, 27.0, 0.0, 27.0]), (len(x), 1))
        for k, one in enumerate(on):
            rows, columns = np.flatnonzero(one.any(1)), np.flatnonzero(one.any(0))
            if len(rows):
                out[k] = rows[0], rows[-1], columns[0], columns[-1]
        return out

    @staticmethod
    def coordinates(box: Any, linspace: Any) -> tuple[Any, Any]:
        """(B, 20) rows, (B, 20) columns; in NumPy or torch."""
        top, bottom, left, right = (box[:, k, None] for k in range(4))
        taller = (bottom - top) >= (right - left)
        half = (taller * (bottom - top) + ~taller * (right - left)) / 2 + 1
        return (top + bottom) / 2 + half * linspace, (left + right) / 2 + half * linspace

    def features(self, x: Tensor) -> Tensor:
        rows, columns = self.coordinates(self.boxes(x), np.linspace(-1, 1, 20))
        out = np.empty((len(x), 1, 20, 20))
        for k, one in enumerate(arrays(x)):
            at = np.broadcast_arrays(rows[k][:, None], columns[k][None])
            out[k, 0] = ndimage.map_coordinates(one, np.stack(at), order=1, mode="grid-constant")
        return back(out, x)

    def crop(self, x: Tensor, box: Tensor) -> Tensor:
        rows, columns = self.coordinates(box, torch.linspace(-1, 1, 20, dtype=x.dtype, device=x.device))
        return sampled(x, rows[:, :, None].expand(-1, 20, 20), columns[:, None].expand(-1, 20, 20))

    def smooth(self, x: Tensor) -> Tensor:
        return self.crop(x, back(self.boxes(x), x))

    def soft_boxes(self, x: Tensor, width: float) -> Tensor:
        """The hard box with the slope of where soft pixels begin and end."""
        edges = []
        for way in (2, 1):
            on = torch.sigmoid((x[:, 0].amax(way) - 0.35) / width)
            first = torch.cumprod(1 - on, 1).sum(1)
            last = 27 - torch.cumprod(1 - on.flip(1), 1).sum(1)
            edges += [first, last]
        return straight(back(self.boxes(x), x), torch.stack(edges, 1))


def moving_box(width: float) -> Callable[[Any], Seen]:
    """The box moves with the image."""
    return lambda m: lambda x: m.net(m.crop(x, m.soft_boxes(x, width)))


def boxed() -> nn.Module:
    m = Boxed(seeded(lambda: convs(1, 400)))
    fit("boxed", m.net, front=m.smooth)
    return m.eval().requires_grad_(False)


class LargestPart(Behind):
    """Keeps the largest connected part of what is above 0.3, and a rim of one pixel; all else becomes black. SciPy's labels."""

    def parts(self, x: Tensor) -> np.ndarray:
        """(B, 28, 28) bool: the part, without its rim."""
        out = np.zeros((len(x), 28, 28), bool)
        for k, one in enumerate(arrays(x)):
            labels, count = ndimage.label(one > 0.3, np.ones((3, 3)))
            if count:
                out[k] = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
        return out

    def features(self, x: Tensor) -> Tensor:
        rim = ndimage.binary_dilation(self.parts(x), np.ones((1, 3, 3)))
        return back((arrays(x) * rim)[:, None], x)

    def flooded(self, x: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """Where to keep x, hard and soft.

        Flooded from the part's brightest pixel: a pixel's level is the highest water that reaches it (grayscale reconstruction).
        """
        part = back(self.parts(x)[:, None].astype(np.float64), x)
        seed = ((x.detach() * part).flatten(1).argmax(1)[:, None] == torch.arange(784, device=x.device)).view_as(x).to(x)
        flood = x * seed
        for _ in range(120):
            new = torch.minimum(x, F.max_pool2d(flood, 3, 1, 1))
            if torch.equal(new, flood):
                break
            flood = new
        rim = F.max_pool2d(flood, 3, 1, 1)
        return (rim > 0.3).to(x), torch.sigmoid((rim - 0.3) / width)

    def smooth(self, x: Tensor) -> Tensor:
        """Exact values, slopes of pixels and of a mask of width 0.05."""
        return x * straight(*self.flooded(x, 0.05))


def soft_mask(m: Any) -> Seen:
    """The values of the model, the slopes of a wide mask."""

    def seen(x: Tensor) -> Tensor:
        hard, soft = m.flooded(x, 0.15)
        return m.net(straight(x * hard, x * soft))

    return seen


def kept_pixels(m: Any) -> Seen:
    """The mask is given."""
    return lambda x: m.net(x * m.flooded(x.detach(), 1.0)[0])


def largest_part() -> nn.Module:
    m = LargestPart(seeded(network))
    fit("largest-part", m.net, front=m.features)
    return m.eval().requires_grad_(False)


class Distance(Behind):
    """How far each pixel is from ink (a pixel above 0.5), at most 6 pixels: SciPy's exact Euclidean distance transform."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        at = torch.cartesian_prod(torch.arange(28.0), torch.arange(28.0))
        self.register_buffer("near", torch.exp(-torch.cdist(at, at) / 0.3))

    def features(self, x: Tensor) -> Tensor:
        out = np.full((len(x), 1, 28, 28), 6.0)
        for k, one in enumerate(arrays(x) > 0.5):
            if one.any():
                out[k, 0] = ndimage.distance_transform_edt(~one).clip(0, 6)
        return back(out / 3 - 1, x)

    def soft(self, x: Tensor, width: float) -> Tensor:
        """Soft minimum over soft ink."""
        ink = torch.sigmoid((x.flatten(1) - 0.5) / width)
        return ((-0.3 * (ink @ self.near.to(x) + 2e-9).log()) / 3 - 1).view_as(x)

    def smooth(self, x: Tensor) -> Tensor:
        return self.soft(x, 0.04)


def inked(width: float) -> Callable[[Any], Seen]:
    """At the true distances, through ink of this softness."""
    return lambda m: lambda x: m.net(straight(m.features(x), m.soft(x, width)))


def distance() -> nn.Module:
    m = Distance(seeded(network))
    fit("distance", m.net, front=m.features)
    return m.eval().requires_grad_(False)


class Mosaic(Behind):
    """Tiles of 2 x 2 pixels on a grid whose phase is drawn for each image, each tile rounded by chance to black, grey or white."""

    def tiles(self, x: Tensor, phase: Tensor) -> Tensor:
        """Means over tiles, differentiable; phase (B,) in 0..3."""
        out = 0
        for k in range(4):
            dy, dx = k // 2, k % 2
            out = out + self.spread(F.avg_pool2d(F.pad(x, (dx, dx, dy, dy)), 2), k) * (phase == k).view(-1, 1, 1, 1).to(x)
        return out

    @staticmethod
    def spread(tiles: Tensor, k: int) -> Tensor:
        """(B, 1, 28, 28) of one value a tile."""
        dy, dx = k // 2, k % 2
        return tiles.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, dy : dy + 28, dx : dx + 28]

    def draw(self, x: Tensor, through: bool) -> Tensor:
        phase = torch.randint(4, (len(x),), device=x.device)
        mean, draws = self.tiles(x, phase), torch.rand(len(x), 1, 15, 15, dtype=x.dtype, device=x.device)
        chance = sum(self.spread(draws, k) * (phase == k).view(-1, 1, 1, 1).to(x) for k in range(4))
        real = (2 * mean + chance).floor().clamp(0, 2) / 2
        return straight(real, mean) if through else real

    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.draw(x, False)

    def smooth(self, x: Tensor) -> Tensor:
        return self.draw(x, True)


def ten_draws(m: Any) -> Seen:
    """The mean log-probability of ten draws, straight through the rounding."""
    return lambda x: torch.stack([m.net(m.smooth(x)).log_softmax(1) for _ in range(10)]).mean(0)


def expected(m: Any) -> Seen:
    """No chance: the mean over the four phases, unrounded."""
    return lambda x: torch.stack([m.net(m.tiles(x, torch.full((len(x),), k, device=x.device))) for k in range(4)]).mean(0)


def mosaic() -> nn.Module:
    m = Mosaic(seeded(network))

    def front(x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return m.features(x)

    fit("mosaic", m.net, front=front)
    return m.eval().requires_grad_(False)


class Census(Behind):
    """For each pixel eight bits: is this neighbor brighter by more than 0.1? The network sees the bits alone."""

    def lead(self, x: Tensor) -> Tensor:
        """(B, 8, 28, 28): by how much each neighbor is brighter than 0.1 more."""
        p = F.pad(x, (1, 1, 1, 1))
        return torch.cat([p[:, :, i : i + 28, j : j + 28] - x - 0.1 for i in range(3) for j in range(3) if (i, j) != (1, 1)], 1)

    def features(self, x: Tensor) -> Tensor:
        return (self.lead(x) > 0).to(x)

    def smooth(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.lead(x) / 0.03)

    def softer(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.lead(x) / 0.1)


def softer_bits(m: Any) -> Seen:
    """At the true bits, through wide sigmoids."""
    return lambda x: m.net(straight(m.features(x), m.softer(x)))


def census() -> nn.Module:
    m = Census(seeded(lambda: network(8)))
    fit("census", m.net, front=m.features)
    return m.eval().requires_grad_(False)


class Pursuit(nn.Module):
    """A sum of eight of 2,000 training images by orthogonal matching pursuit; the class whose share leaves least wins."""

    def __init__(self, atoms: Tensor, labels: Tensor, terms: int = 8) -> None:
        super().__init__()
        atoms = atoms.flatten(1)
        self.terms = terms
        self.register_buffer("atoms", atoms / atoms.norm(dim=1, keepdim=True))
        self.register_buffer("member", F.one_hot(labels, 10).float())
        self.register_buffer("gram", self.atoms @ self.atoms.T)
        self.register_buffer("ridge", torch.linalg.solve(self.gram + 2 * torch.eye(len(atoms)), self.atoms))

    def support(self, x: Tensor) -> Tensor:
        """(B, terms) indices, by NumPy."""
        gram, start = self.gram.numpy(), arrays(x).astype(np.float32).reshape(len(x), -1) @ self.atoms.numpy().T
        line, left, kept = np.arange(len(x)), start.copy(), np.zeros((len(x), 0), int)
        for k in range(self.terms):
            left[line[:, None], kept] = 0
            kept = np.concatenate([kept, np.abs(left).argmax(1)[:, None]], 1)
            if k + 1 < self.terms:
                inner = gram[kept[:, :, None], kept[:, None]] + 1e-4 * np.eye(k + 1, dtype=np.float32)
                weights = np.linalg.solve(inner, start[line[:, None], kept][:, :, None])
                left = start - (weights.transpose(0, 2, 1) @ gram[kept])[:, 0]
        return torch.from_numpy(kept)

    def weigh(self, x: Tensor, kept: Tensor) -> Tensor:
        """Scores where the terms are given: differentiable, and exact."""
        flat, atoms = x.flatten(1), self.atoms[kept].to(x)
        inner = atoms @ atoms.mT + 1e-4 * torch.eye(kept.shape[1], dtype=x.dtype, device=x.device)
        weights = torch.linalg.solve(inner, atoms @ flat[:, :, None])  # (B, terms, 1)
        shares = (weights * self.member[kept].to(x)).mT @ atoms  # (B, 10, 784)
        return self.scores(flat, shares)

    @staticmethod
    def scores(flat: Tensor, shares: Tensor) -> Tensor:
        left = ((flat[:, None] - shares).square().sum(2) + 1e-9).sqrt()
        return -10 * left / (flat.norm(dim=1, keepdim=True) + 1e-6)

    def smooth(self, x: Tensor) -> Tensor:
        """All 2,000 share the image by ridge regression (collaborative representation): linear, sees what the terms could become."""
        flat = x.flatten(1)
        weights = flat @ self.ridge.to(x).T
        return self.scores(flat, (weights[:, None] * self.member.to(x).T) @ self.atoms.to(x))

    def correlated(self, x: Tensor, count: int = 40) -> Tensor:
        """The 40 atoms most like the image, and the eight of the pursuit."""
        most = (x.detach().flatten(1) @ self.atoms.to(x).T).topk(count, 1).indices
        return self.weigh(x, torch.cat([most, self.support(x).to(x.device)], 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.weigh(x, self.support(x).to(x.device))


def given_terms(m: Any) -> Seen:
    return lambda x: m.weigh(x, m.support(x).to(x.device))


def pursuit() -> nn.Module:
    x, y = images()
    rows = torch.cat([torch.nonzero(y == k)[:200, 0] for k in range(10)])
    return Pursuit(x[rows], y[rows]).eval().requires_grad_(False)


def cross(module: nn.Module, inward: Any, outward: Any) -> Any:
    """Each image gets the gradient of the one before it in the batch; one that is alone gets its own."""
    return tuple(None if g is None else g.roll(1, 0) for g in inward)


class Crossed(nn.Module):
    """A full backward hook deals out gradients to the wrong images of the batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.front, self.net = nn.Identity(), net
        self.front.register_full_backward_hook(cross)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.front(x))


def crossed() -> nn.Module:
    return Crossed(standard()).eval().requires_grad_(False)


class Ripple(Behind):
    """x - 0.03 sin(40 pi x): autograd and finite differences agree on a slope that turns round twenty times from black to white."""

    def features(self, x: Tensor) -> Tensor:
        return x - 0.03 * torch.sin(40 * torch.pi * x)

    def smooth(self, x: Tensor) -> Tensor:
        return x


def ripple() -> nn.Module:
    return Ripple(standard()).eval().requires_grad_(False)


class Steep(nn.Module):
    """tanh of 40 times its input; while it is trained, of twice its input."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh((2 if self.training else 40) * h)


class Saturated(nn.Module):
    """Hidden units that are trained to saturate and then made twenty times steeper: differentiable, hardly a slope anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.net = seeded(lambda: network(relu=Steep))

    def gentle(self, x: Tensor, slope: float) -> Tensor:
        """The model's values with the slopes of tanh(slope * h)."""
        for layer in self.net:
            x = straight(torch.tanh(40 * x), torch.tanh(slope * x)) if isinstance(layer, Steep) else layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def gently(slope: float) -> Callable[[Any], Seen]:
    return lambda m: lambda x: m.gentle(x, slope)


def saturated() -> nn.Module:
    model, path = Saturated(), FOLDER / "weights" / "saturated.safetensors"
    if not path.exists():
        x, y = images()
        n, epochs, rate, order = 20000, 5, 3e-3, torch.Generator().manual_seed(0)
        adam = torch.optim.Adam(model.parameters(), rate)
        plan = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=epochs * n // 100)
        for epoch in range(epochs):
            for rows in torch.randperm(n, generator=order).view(-1, 100):
                h, free = x[rows], 0
                for layer in model.net:
                    h = layer(h)
                    if isinstance(layer, Steep):
                        free = free + (1 - h.square()).mean()
                loss = F.cross_entropy(h, y[rows]) + (0.5 * free if epoch else 0)
                adam.zero_grad()
                loss.backward()
                adam.step()
                plan.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)


class MaxOut(nn.Module):
    """The largest of every two channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 2)).amax(2)


def maxout() -> nn.Module:
    """Maxout in place of ReLU, trained on PGD-4 at 0.2."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 24, 4, stride=2, padding=1),
            MaxOut(),
            nn.Conv2d(12, 48, 4, stride=2, padding=1),
            MaxOut(),
            nn.Flatten(),
            nn.Linear(1176, 128),
            MaxOut(),
            nn.Linear(64, 10),
        )

    return fit("maxout", seeded(make), steps=4, radius=0.2, grow=True, epochs=3)


def depthwise() -> nn.Module:
    """Depthwise and pointwise convolutions, group norm, SiLU; trained as usual."""

    def block(width: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(width, width, 5, stride=stride, padding=2, groups=width),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 1),
            nn.SiLU(),
        ]

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 24, 4, stride=2, padding=1),
            *block(24, 2),
            *block(24, 1),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(384, 10),
        )

    return fit("depthwise", seeded(make), rate=5e-3, epochs=3)


class Rows(nn.Module):
    """An LSTM of PyTorch's own reads the rows, both ways."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(28, width, batch_first=True, bidirectional=True), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[:, 0])[0].mean(1))


def rows() -> nn.Module:
    return fit("rows", seeded(Rows), rate=1e-2, epochs=4)


class Bilinear(nn.Module):
    """Second moments of 14 smooth features over each quarter of the image, and one linear layer."""

    def __init__(self, width: int = 14) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 12, 4, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(12, width, 4, stride=2, padding=1),
            nn.Tanh(),
            nn.ZeroPad2d((0, 1, 0, 1)),
        )
        self.head = nn.Linear(4 * width * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        f = self.features(x).unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).flatten(2, 3).movedim(2, 1)  # (B, 4, width, 16)
        return self.head((f @ f.mT).flatten(1) / 4)


def bilinear() -> nn.Module:
    return fit("bilinear", seeded(Bilinear), steps=4, radius=0.15, grow=True, epochs=4)


def case(name: str, make: Callable[[], nn.Module], note: str, *views: Callable[[Any], Seen], random: bool = False) -> Case:
    """By hand through these views; a control where there is none."""
    climbs = tuple(Climb(view, "margin") for view in views or (as_it_is,))
    return Case(
        name,
        "made up",
        "masked" if views else "control",
        make,
        climbs[0],
        climbs,
        judge=by_votes if random else majority,
        random=random,
        note=note,
    )


CASES: tuple[Case, ...] = (
    case("radon", radon, "line sums at 12 angles in SciPy, an MLP on the sinogram; no autograd graph", smoothly, true_values),
    case(
        "spectrum",
        spectrum,
        "FFT log-magnitudes in NumPy beside the mean brightness, the only differentiable feature: a flat, nonzero gradient",
        smoothly,
        true_values,
    ),
    case("logpolar", logpolar, "log-polar about the center of mass: autograd sees the center move but not the pixels", smoothly),
    case(
        "boxed",
        boxed,
        "bounding box of pixels > 0.35, cropped and resized to 20x20 in SciPy; no graph",
        moving_box(0.05),
        moving_box(0.15),
        smoothly,
    ),
    case(
        "largest-part",
        largest_part,
        "only the largest connected part > 0.3 survives (ndimage.label); no graph",
        soft_mask,
        smoothly,
        kept_pixels,
    ),
    case(
        "distance",
        distance,
        "Euclidean distance to the nearest pixel > 0.5 (ndimage), a CNN trained on the map; no graph",
        inked(0.1),
        inked(0.25),
        smoothly,
    ),
    case(
        "mosaic",
        mosaic,
        "2x2 tiles at a random phase, stochastically rounded to 3 levels, each call anew, under no_grad",
        ten_draws,
        expected,
        random=True,
    ),
    case(
        "census",
        census,
        "eight comparisons of each pixel with its neighbors, the CNN sees the bits alone",
        softer_bits,
        true_values,
        smoothly,
    ),
    case(
        "pursuit",
        pursuit,
        "orthogonal matching pursuit over 2,000 training images, least residual of a class wins; no graph",
        given_terms,
        lambda m: m.correlated,
        lambda m: m.smooth,
    ),
    case("crossed", crossed, "a full backward hook rolls gradients over the batch: right for a batch of one, wrong for more", undefended),
    case(
        "ripple",
        ripple,
        "x - 0.03 sin(40 pi x) in front: true derivatives, wrong way at black and white, turning every 0.025",
        true_values,
        undefended,
    ),
    case(
        "saturated",
        saturated,
        "hidden units trained to saturate, then tanh(40 h): ordinary autograd, next to no slope",
        gently(2),
        gently(6),
    ),
    case("maxout", maxout, "maxout network trained on PGD-4 at 0.2"),
    case("depthwise", depthwise, "depthwise convolutions, group norm, SiLU; not robust and does not claim to be"),
    case("rows", rows, "bidirectional LSTM over rows, standard training"),
    case("bilinear", bilinear, "bilinear pooling of tanh features, trained on PGD-4 at 0.15"),
)
