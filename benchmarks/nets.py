"""The small networks that the benchmarks attack, and how they were trained. Weights are kept in benchmarks/cache (not tracked).

`python benchmarks/nets.py NAME` trains one (`RECIPES`): up to two minutes on digits, minutes for the normal ones on MNIST and CIFAR-10,
up to an hour of one core for the robust ones there. Needs EPSBALL_DATA.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import epsball as eb
from epsball.core import Projects, Victim
from epsball.threats import L1, L2, Linf

CACHE = Path(__file__).parent / "cache"
Arrays = tuple[Tensor, Tensor]


def mnist_network() -> nn.Module:
    """Two strided convolutions and two linear layers on (B, 1, 28, 28): 166,406 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def cifar_network() -> nn.Module:
    """Four convolutions and two linear layers on (B, 3, 32, 32): 627,882 parameters, 11 million multiplications a row."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(128, 64, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def digits_mlp() -> nn.Module:
    """Three linear layers on (B, 1, 8, 8)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def digits_tanh() -> nn.Module:
    """Three linear layers with tanh on (B, 1, 8, 8)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 10))


def digits_wide() -> nn.Module:
    """One wide convolution and two linear layers on (B, 1, 8, 8)."""
    return nn.Sequential(nn.Conv2d(1, 48, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10))


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def _block(channels: int) -> nn.Module:
    conv = partial(nn.Conv2d, channels, channels, 3, padding=1, bias=False)
    return Residual(conv(), nn.BatchNorm2d(channels), nn.ReLU(), conv(), nn.BatchNorm2d(channels))


def digits_residual() -> nn.Module:
    """A convolution and two residual blocks with batch norm, averaged over space, on (B, 1, 8, 8)."""
    head = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10))
    return nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), _block(24), nn.ReLU(), _block(24), nn.ReLU(), *head)


def digits_gelu() -> nn.Module:
    """Two convolutions and two linear layers with GELU on (B, 1, 8, 8)."""
    convs = (nn.Conv2d(1, 24, 3, padding=1), nn.GELU(), nn.Conv2d(24, 32, 3, stride=2, padding=1), nn.GELU())
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(512, 64), nn.GELU(), nn.Linear(64, 10))


class Attention(nn.Module):
    """Sixteen patches of 2 x 2 pixels of (B, 1, 8, 8), two transformer layers, their mean."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.places = nn.Parameter(0.1 * torch.randn(16, width))
        layers = [nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.layers(tokens).mean(1))


def mnist_pooled() -> nn.Module:
    """Two convolutions with max pooling and two linear layers on (B, 1, 28, 28)."""
    convs = (nn.Conv2d(1, 10, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(10, 20, 5), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(320, 50), nn.ReLU(), nn.Linear(50, 10))


def mnist_average() -> nn.Module:
    """Three convolutions with ELU, averaged over space, on (B, 1, 28, 28)."""
    convs = (nn.Conv2d(1, 16, 5, stride=2), nn.ELU(), nn.Conv2d(16, 24, 3), nn.ELU(), nn.Conv2d(24, 32, 3), nn.ELU())
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10))


def mnist_mlp() -> nn.Module:
    """Three linear layers on (B, 1, 28, 28)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10))


def root() -> Path:
    """The data folder that EPSBALL_DATA names."""
    found = os.environ.get("EPSBALL_DATA")
    if not found:
        raise SystemExit("EPSBALL_DATA is not set: point it at a folder with mnist/mnist.npz and cifar10_jpeg/")
    return Path(found)


def mnist_file() -> Path:
    """MNIST as one file."""
    return root() / "mnist" / "mnist.npz"


def _mnist() -> Arrays:
    with np.load(mnist_file(), allow_pickle=False) as file:
        return torch.from_numpy(file["x_train"]).float()[:, None] / 255, torch.from_numpy(file["y_train"]).long()


def _digits() -> Arrays:
    data = eb.load_data("digits", split="train")
    return data.x, data.y


def _cifar() -> Arrays:
    data = eb.load_data(str(root() / "cifar10_jpeg"), split="train")
    return data.x, data.y


def _moved(x: Tensor) -> Tensor:
    """Random mirror images and shifts by up to 3 pixels."""
    mirrored = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
    padded = functional.pad(mirrored, (3, 3, 3, 3), mode="reflect")
    down, right = (torch.randint(0, 7, (len(x), 1)) + torch.arange(32) for _ in range(2))
    image, channel = torch.arange(len(x))[:, None, None, None], torch.arange(3)[:, None, None]
    return padded[image, channel, down[:, None, :, None], right[:, None, None, :]]


@dataclass(frozen=True)
class Recipe:
    """How one network is trained: Adam, one-cycle rate, on PGD within `radius` of `threat`, which grows over the first fifth."""

    network: Callable[[], nn.Module]
    arrays: Callable[[], Arrays]
    epochs: int
    radius: float = 0.0
    steps: int = 7
    threat: Projects = field(default_factory=Linf)
    augment: Callable[[Tensor], Tensor] = lambda x: x


RECIPES = {
    "digits-mlp": Recipe(digits_mlp, _digits, epochs=60),
    "digits-residual": Recipe(digits_residual, _digits, epochs=40),
    "digits-gelu-l2": Recipe(digits_gelu, _digits, epochs=60, radius=0.8, threat=L2()),
    "digits-attention-linf": Recipe(Attention, _digits, epochs=80, radius=0.15),
    "digits-tanh-linf": Recipe(digits_tanh, _digits, epochs=60, radius=0.08),
    "digits-wide-linf": Recipe(digits_wide, _digits, epochs=60, radius=0.25),
    "digits-gelu-l1": Recipe(digits_gelu, _digits, epochs=40, radius=2.0, threat=L1()),
    "digits-residual-l2": Recipe(digits_residual, _digits, epochs=40, radius=0.5, threat=L2()),
    "digits-attention": Recipe(Attention, _digits, epochs=60),
    "mnist-average-l1": Recipe(mnist_average, _mnist, epochs=2, radius=6.0, threat=L1()),
    "mnist-average": Recipe(mnist_average, _mnist, epochs=2),
    "mnist-pooled": Recipe(mnist_pooled, _mnist, epochs=3),
    "mnist-mlp-linf": Recipe(mnist_mlp, _mnist, epochs=8, radius=0.1),
    "mnist-pooled-l2": Recipe(mnist_pooled, _mnist, epochs=4, radius=1.5, threat=L2()),
    "mnist-standard": Recipe(mnist_network, _mnist, epochs=5),
    "mnist-robust": Recipe(mnist_network, _mnist, epochs=15, radius=0.3),
    "cifar-standard": Recipe(cifar_network, _cifar, epochs=15, augment=_moved),
    "cifar-robust": Recipe(cifar_network, _cifar, epochs=15, radius=8 / 255, steps=3, augment=_moved),
}


def trained(name: str, batch: int = 128) -> nn.Module:
    """The network of that name in eval mode, from benchmarks/cache or trained now."""
    recipe, path = RECIPES[name], CACHE / f"{name}.safetensors"
    model = recipe.network()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    torch.manual_seed(0)
    model, (x_train, y_train) = recipe.network(), recipe.arrays()
    steps = recipe.epochs * (len(x_train) // batch)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    attack, step = eb.attacks.pgd(steps=recipe.steps, threat=recipe.threat), 0
    for epoch in range(recipe.epochs):
        started = time.perf_counter()
        for rows in torch.randperm(len(x_train))[: len(x_train) // batch * batch].split(batch):
            x, y = recipe.augment(x_train[rows]), y_train[rows]
            step += 1
            if recipe.radius:
                radius = recipe.radius * min(1.0, step / (steps / 5))
                x = attack(Victim(model), x, y, radius, seed=step, drop=False).x_adv
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds = time.perf_counter() - started
        print(f"{name}: epoch {epoch + 1} of {recipe.epochs}, loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    CACHE.mkdir(exist_ok=True)
    save_file(model.state_dict(), path)
    return model.eval()


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        trained(chosen)
