"""The small networks that the benchmarks attack, and how they were trained. Weights are kept in benchmarks/cache (not tracked).

`python benchmarks/nets.py NAME` trains one (mnist-standard, mnist-robust, cifar-standard, cifar-robust): minutes for the
normal ones, up to an hour of one core for the robust ones. Needs EPSBALL_DATA.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import epsball as eb
from epsball.core import Victim

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
    """How one network is trained: Adam, one-cycle rate, the radius grows over the first fifth."""

    network: Callable[[], nn.Module]
    arrays: Callable[[], Arrays]
    epochs: int
    radius: float = 0.0
    steps: int = 7
    augment: Callable[[Tensor], Tensor] = lambda x: x


RECIPES = {
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
    attack, step = eb.attacks.pgd(steps=recipe.steps), 0
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
