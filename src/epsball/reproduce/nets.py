"""The data and the small networks of the experiments, and the one training loop; trained weights are kept and used again."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.attacks import pgd
from epsball.core import Key, Tally, Victim
from epsball.data import Dataset, load_data
from epsball.errors import BadInput
from epsball.reproduce.base import Setting

QUICK_ROWS, QUICK_BATCH = 2000, 32


@dataclass(frozen=True)
class Data:
    """A training set and a test set in normal form, both in [0, 1]."""

    train: Dataset
    test: Dataset


def mnist(setting: Setting, n: int) -> Data:
    """MNIST (N, 1, 28, 28): all 60,000 training images (2,000 in quick runs) and `n` test images, each class in proportion."""
    return _data(str(setting.place("mnist")), setting, n)


def cifar(setting: Setting, n: int) -> Data:
    """CIFAR-10 (N, 3, 32, 32), a JPEG copy: its training images (2,000 in quick runs) and `n` test images."""
    return _data(str(setting.place("cifar")), setting, n)


def _data(source: str, setting: Setting, n: int) -> Data:
    train = load_data(source, split="train", n=QUICK_ROWS if setting.quick else None, seed=setting.seed)
    return Data(train, load_data(source, split="test", n=n, seed=setting.seed))


def rows(data: Dataset, chosen: Tensor) -> Dataset:
    """Some samples of a data set: `chosen` (M,) indices or (N,) bool."""
    return replace(data, x=data.x[chosen], y=data.y[chosen], indices=data.indices[chosen])


def halves(data: Dataset, setting: Setting) -> tuple[Dataset, Dataset]:
    """Two disjoint halves, drawn by the setting's seed."""
    order = torch.randperm(len(data.x), generator=generator(Key.of(setting.seed).fold("halves")))
    middle = len(order) // 2
    return rows(data, order[:middle]), rows(data, order[middle : 2 * middle])


def generator(key: Key) -> torch.Generator:
    """A generator of its own, from a key."""
    seed = int.from_bytes(hashlib.blake2b(repr(key.path).encode(), digest_size=8).digest(), "little") % 2**63
    return torch.Generator().manual_seed(seed)


# Networks. All map (B, C, H, W) in [0, 1] to (B, 10) logits.


def softmax(pixels: int = 784, classes: int = 10) -> nn.Module:
    """Softmax regression: one linear layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))


def mlp(*hidden: int, activation: Callable[[], nn.Module] = nn.ReLU, pixels: int = 784, classes: int = 10) -> nn.Module:
    """Fully connected: `mlp(100, 100)` is 784-100-100-10."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip((pixels, *hidden), hidden, strict=False):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1] if hidden else pixels, classes))


class Maxout(nn.Module):
    """Goodfellow et al. 2013, arXiv 1302.4389: `units` outputs, each the largest of `pieces` linear functions."""

    def __init__(self, inputs: int, units: int, pieces: int) -> None:
        super().__init__()
        self.pieces = pieces
        self.linear = nn.Linear(inputs, units * pieces)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) -> (B, units)."""
        return self.linear(x).unflatten(1, (-1, self.pieces)).amax(2)  # type: ignore[no-any-return]


class MaxoutConv(nn.Module):
    """The same for images: `units` maps, each the largest of `pieces` 5 x 5 convolutions and of each 2 x 2 window of them."""

    def __init__(self, inputs: int, units: int, pieces: int) -> None:
        super().__init__()
        self.pieces = pieces
        self.conv = nn.Conv2d(inputs, units * pieces, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, units, (H - 4) / 2, (W - 4) / 2)."""
        return F.max_pool2d(self.conv(x), 2).unflatten(1, (self.pieces, -1)).amax(1)  # type: ignore[no-untyped-call,no-any-return]


def maxout(
    units: int = 240,
    pieces: int = 5,
    pixels: int = 784,
    classes: int = 10,
    drop: tuple[float, float] = (0.2, 0.5),
    start: float | None = None,
) -> nn.Module:
    """Two maxout layers with dropout (`drop`: on the input, after each layer), then a linear layer.

    `start`: weights begin uniform within it and biases at 0, as in the maxout paper's code; None: as torch has it.
    """
    net = nn.Sequential(
        nn.Flatten(),
        nn.Dropout(drop[0]),
        Maxout(pixels, units, pieces),
        nn.Dropout(drop[1]),
        Maxout(units, units, pieces),
        nn.Dropout(drop[1]),
        nn.Linear(units, classes),
    )
    if start is not None:
        for parameter in net.parameters():
            nn.init.uniform_(parameter, -start, start) if parameter.ndim > 1 else nn.init.zeros_(parameter)
    return net


def maxout_conv(units: tuple[int, int] = (20, 40), hidden: int = 128, pieces: int = 2) -> nn.Module:
    """For MNIST: two convolutional maxout layers, a fully connected one, dropout, a linear layer; 206,506 parameters."""
    first, second = units
    net = nn.Sequential(
        MaxoutConv(1, first, pieces),
        nn.Dropout(0.1),
        MaxoutConv(first, second, pieces),
        nn.Flatten(),
        nn.Dropout(0.25),
        Maxout(second * 4 * 4, hidden, pieces),
        nn.Dropout(0.4),
        nn.Linear(hidden, 10),
    )
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # pooling is faster so
    return net


def cnn() -> nn.Module:
    """For MNIST, like LeNet with strides instead of pooling: two convolutions and two linear layers; 166,406 parameters."""
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


def cifar_cnn() -> nn.Module:
    """For CIFAR-10: four convolutions, two of them strided, and two linear layers; 627,882 parameters."""
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


# Training.


def fitted(
    name: str,
    build: Callable[[], nn.Module],
    data: Dataset,
    setting: Setting,
    epochs: int,
    *,
    batch: int = 128,
    rate: float = 1e-3,
    decay: float = 0.0,
    radius: float = 0.0,
    steps: int = 7,
) -> nn.Module:
    """A trained network in eval mode, from the cache or trained now: cross-entropy, Adam, a one-cycle rate.

    Everything random (weights, order, dropout) comes from the seed and the name; the global generators are left as they were.

    Args:
        name: of the file and of the randomness. build: makes the untrained network. data: what it learns.
        epochs: passes; 1 in quick runs. batch: rows a step; 32 in quick runs. rate: the largest of the cycle.
        decay: adds decay * (sum of squared weights / outputs of the layer), for every layer, to the loss (Szegedy et al. 2014).
        radius: above 0, every batch is attacked by PGD under Linf first (adversarial training; the radius grows over the first
            fifth). steps: of that PGD.
    """
    epochs, batch = (1, QUICK_BATCH) if setting.quick else (epochs, batch)
    key = Key.of(setting.seed).fold(name)
    with _own_randomness(key):
        net = build()
        recipe = f"{net!r} {key.path} {epochs} {batch} {rate} {decay} {radius} {steps} {len(data.x)} {_digest(data)}"
        path = setting.cache / f"{name}-{hashlib.blake2b(recipe.encode(), digest_size=6).hexdigest()}.safetensors"
        if not _loaded(net, path):
            _train(net, data, setting, name, Course(epochs, batch, rate, decay, radius, steps))
            _save(net, path)
    return net.eval()


@dataclass(frozen=True)
class Course:
    """How long and how hard a network is trained."""

    epochs: int
    batch: int
    rate: float
    decay: float
    radius: float
    steps: int


def _train(net: nn.Module, data: Dataset, setting: Setting, name: str, course: Course) -> None:
    per_epoch = max(1, len(data.x) // course.batch)
    total = course.epochs * per_epoch
    optimizer = torch.optim.Adam(net.parameters(), lr=course.rate)
    weights = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, course.rate, total_steps=max(total, 2))
    attack, step, loss = pgd(steps=course.steps), 0, torch.zeros(())
    net.train()
    for epoch in range(course.epochs):
        order = torch.randperm(len(data.x), generator=torch.default_generator)[: per_epoch * course.batch]  # lent by the caller
        for chosen in order.split(course.batch):  # type: ignore[no-untyped-call]
            x, y, step = data.x[chosen], data.y[chosen], step + 1
            if course.radius:
                reach = course.radius * min(1.0, 5 * step / total)
                x = attack(Victim(net), x, y, reach, seed=Key.of(setting.seed).fold(name, step), drop=False).x_adv
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            if course.decay:
                loss = loss + course.decay * torch.stack([w.square().sum() / len(w) for w in weights]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        setting.say(f"training {name}: epoch {epoch + 1} of {course.epochs}, loss {loss.item():.3f}")


@contextmanager
def _own_randomness(key: Key) -> Iterator[None]:
    """Layers draw from torch's global generator when they are made and in dropout: it is lent a known state, then put back."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator(key).get_state())
        yield


def _digest(data: Dataset) -> str:
    return hashlib.blake2b(data.x.numpy().tobytes() + data.y.numpy().tobytes(), digest_size=8).hexdigest()


def _loaded(net: nn.Module, path: Path) -> bool:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        return False
    try:
        net.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise BadInput(f"cache: '{path}' is damaged ({str(error).splitlines()[0]}): delete it") from error
    return True


def _save(net: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, temporary)
        temporary.replace(path)
    except OSError as error:
        raise BadInput(f"cache: '{path.parent}' cannot be written ({error.strerror}): choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


# Answers.


def answers(net: nn.Module, x: Tensor, batch: int = 1000) -> Tensor:
    """Logits (N, C) of any inputs, in slices, without gradient; no box is asked for."""
    return Victim(net, batch_size=batch).outputs(x, Tally.zeros(len(x)))


def accuracy(net: nn.Module, data: Dataset) -> tuple[int, int]:
    """(right, all)."""
    return int((answers(net, data.x).argmax(1) == data.y).sum()), len(data.x)


# Networks that several experiments attack.


def lenet(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """LeNet for MNIST: two 5 x 5 convolutions (20, 50) with pooling and a hidden layer of 500; 431,080 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        activation(),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        activation(),
        nn.Flatten(),
        nn.Linear(800, 500),
        activation(),
        nn.Linear(500, 10),
    )


def cifar_normed() -> nn.Module:
    """For CIFAR-10: three 3 x 3 convolutions (32, 64, 128), each with batch norm and pooling, and a linear layer."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))


def fitted_cifar(data: Data, setting: Setting) -> nn.Module:
    """`cifar_normed` on all training images."""
    return fitted("cifar-normed", cifar_normed, data.train, setting, epochs=4, rate=5e-3)
