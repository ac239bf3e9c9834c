"""Seconds per query of black-box attacks, in units of the model's own batched forward; a network of ResNet-18's size, 3 x 32 x 32.

`python benchmarks/query_speed.py [NAME ...]`. One thread, 16 images, CPU time. Once the victim is asked 16 rows at a time, against a
plain forward of the 16 images right before and after; once as many rows a call as the attack wants, against plain forwards of the
same numbers of rows, call by call, right after. What a row costs the model hangs on how many are asked together (last columns), which
is the model's and the machine's, not the attack's. *All / inside*: CPU time of the whole attack over that inside the model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import epsball as eb
from epsball.core import Access, AttackLike, Victim


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch statistics around a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outer),
            nn.ReLU(),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outer),
        )
        same = inner == outer and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18(classes: int = 10) -> nn.Sequential:
    """He et al. 2016 as used on small images: 11.2 million parameters, 0.56 billion multiplications a row."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inner = 64
    for outer, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(inner, outer, stride), Block(outer, outer, 1)]
        inner = outer
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


@dataclass
class Timed:
    """A model that keeps the CPU seconds and the rows of its forwards."""

    model: nn.Module
    seconds: float = 0.0
    calls: list[int] = field(default_factory=list)

    def __call__(self, x: Tensor) -> Tensor:
        started = time.process_time()
        output: Tensor = self.model(x)
        self.seconds += time.process_time() - started
        self.calls.append(len(x))
        return output


A = eb.attacks
CASES: dict[str, tuple[Callable[[], AttackLike], Access, float]] = {
    "square": (lambda: A.square(30), Access.SCORES, 1e-3),
    "square l2": (lambda: eb.get("square", threat="l2", steps=30), Access.SCORES, 1e-2),
    "nes": (lambda: A.nes(52, draws=50), Access.SCORES, 1e-3),
    "rays": (lambda: A.rays(40), Access.LABELS, 8.0),
    "hop_skip_jump": (lambda: A.hop_skip_jump(60, draws=20, tries=5), Access.LABELS, 99.0),
    "simba": (lambda: A.simba(30), Access.SCORES, 1e-2),
    "sparse_rs": (lambda: A.sparse_rs(30), Access.SCORES, 2.0),
    "loc_search": (lambda: A.loc_search(34), Access.SCORES, 2.0),
    "surfree": (lambda: A.surfree(60, tries=5), Access.LABELS, 99.0),
    "zoo": (lambda: A.zoo(67), Access.SCORES, 99.0),
}


def plain(model: nn.Module, x: Tensor, repeats: int = 4) -> float:
    """CPU seconds per row of the forward alone."""
    with torch.no_grad():
        started = time.process_time()
        for _ in range(repeats):
            model(x)
        return (time.process_time() - started) / repeats / len(x)


def again(model: nn.Module, x: Tensor, calls: list[int]) -> float:
    """CPU seconds of plain forwards of the same numbers of rows."""
    inputs = {rows: x.repeat(-(-rows // len(x)), 1, 1, 1)[:rows] for rows in set(calls)}
    with torch.no_grad():
        started = time.process_time()
        for rows in calls:
            model(inputs[rows])
        return time.process_time() - started


def asked(name: str, model: nn.Module, x: Tensor, labels: Tensor, limit: int | None) -> tuple[float, Timed]:
    """CPU seconds of one attack, and what it asked."""
    make, access, radius = CASES[name]
    timed, started = Timed(model), time.process_time()
    outcome = make()(Victim(timed, access=access, batch_size=limit), x, labels, radius, drop=False)
    spent = time.process_time() - started
    assert int(outcome.queries.sum()) == sum(timed.calls)
    return spent, timed


def measure(name: str, model: nn.Module, x: Tensor, labels: Tensor) -> str:
    """One row of the table."""
    before = plain(model, x)
    small, timed = asked(name, model, x, labels, len(x))
    pace = (before + plain(model, x)) / 2
    free, wide = asked(name, model, x, labels, None)
    same, rows = again(model, x, wide.calls), sum(wide.calls)
    ratios = f"{small / sum(timed.calls) / pace:.3f} | {free / same:.3f} | {small / timed.seconds:.3f} | {free / wide.seconds:.3f}"
    return f"| {name} | {ratios} | {rows} | {rows / len(wide.calls):.0f} | {1e3 * pace:.2f} | {1e3 * same / rows:.2f} |"


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = resnet18().eval(), torch.rand(16, 3, 32, 32)
    with torch.no_grad():
        labels = model(x).argmax(1)
    plain(model, x)
    print(
        "| attack | 16 rows a call | as it wants | all / inside | as it wants | queries | rows a call | ms a plain row of 16 | of as many |"
    )
    print("|---" * 9 + "|")
    for name in sys.argv[1:] or CASES:
        print(measure(name, model, x, labels), flush=True)


if __name__ == "__main__":
    main()
