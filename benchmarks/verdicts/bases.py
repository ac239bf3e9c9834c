"""Networks small enough to train in seconds, MNIST, and trained weights in benchmarks/cache/verdicts (not tracked)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import epsball as eb
from epsball.core.attack import recipe
from epsball.data import Dataset
from epsball.defenses import training
from epsball.threats import Linf
from nets import CACHE, mnist_file, root, trained

FOLDER = CACHE / "verdicts"


def network(channels: int = 1, classes: int = 10, relu: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Two strided convolutions and two linear layers on (B, channels, 28, 28): 53,210 parameters with one channel."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 4, stride=2, padding=1),
        relu(),
        nn.Conv2d(8, 16, 4, stride=2, padding=1),
        relu(),
        nn.Flatten(),
        nn.Linear(784, 64),
        relu(),
        nn.Linear(64, classes),
    )


@cache
def images() -> tuple[Tensor, Tensor]:
    """The training set, (60000, 1, 28, 28) in [0, 1]."""
    with np.load(mnist_file(), allow_pickle=False) as file:
        return torch.from_numpy(file["x_train"]).float()[:, None] / 255, torch.from_numpy(file["y_train"]).long()


def samples(n: int, seed: int) -> Dataset:
    """Test images, spread over the classes."""
    return eb.load_data(str(mnist_file()), n=n, seed=seed)


def color(n: int, seed: int) -> Dataset:
    """Test images of CIFAR-10, at most 30: its networks are dear."""
    return eb.load_data(str(root() / "cifar10_jpeg"), n=min(n, 30), seed=seed)


def color_net(name: str) -> nn.Module:
    """`cifar-standard` or `cifar-robust`, which is trained on PGD-3 at 8/255."""
    return trained(name).eval().requires_grad_(False)


def fitted(
    name: str,
    model: nn.Module,
    loss: training.Loss,
    *,
    n: int = 20000,
    epochs: int = 4,
    radius: float = 0.2,
    rate: float = 3e-3,
    by: Callable[[training.Record], tuple[float, float]] = training.by_clean,
    average: float = 0.99,
) -> nn.Module:
    """The model with weights from the cache, or trained now on n images; in eval mode, its parameters frozen."""

    def train() -> dict[str, float]:
        x, y = images()
        course = training.Course(epochs=epochs, rate=rate, average=average, merit=by)
        done = training.fit(model, loss, (x[:n], y[:n]), (x[-500:], y[-500:]), training.Against(Linf(), radius), course)
        return {"clean": done.best.clean, "robust": done.best.robust}

    return kept(name, f"{recipe(loss)} {model} {n} {epochs} {radius} {rate} {by.__name__} {average}", model, train)


def kept(name: str, words: str, model: nn.Module, train: Callable[[], dict[str, float]]) -> nn.Module:
    """The model with weights from the cache, or from `train`, which says what it found; `words` tell one recipe from another."""
    path = FOLDER / "weights" / f"{name}-{hashlib.blake2b(words.encode(), digest_size=4).hexdigest()}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval().requires_grad_(False)
    started = time.process_time()
    facts = train()
    facts["seconds"] = time.process_time() - started
    print(f"{name}: trained, {', '.join(f'{fact} {value:.3g}' for fact, value in facts.items())}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps({"name": name, **facts}), encoding="utf8")
    return model.eval().requires_grad_(False)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A new module whose first weights come from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def standard() -> nn.Module:
    """The undefended network that most defenses stand around."""
    return fitted("standard", seeded(network), training.Standard())


def adversarial() -> nn.Module:
    """Trained on PGD-7."""
    return fitted("pgd", seeded(network), training.pgd(7), epochs=10, by=training.by_robust)


def training_seconds() -> dict[str, float]:
    """Of the weights in the cache."""
    found = [json.loads(path.read_text(encoding="utf8")) for path in sorted(Path(FOLDER / "weights").glob("*.json"))]
    return {one["name"]: one["seconds"] for one in found}
