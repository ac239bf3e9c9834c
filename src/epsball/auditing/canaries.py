"""Planted models whose truth is known in closed form. Every audit judges them first: one wrong verdict, and the tool has failed.

All are linear inside, y = argmax w_c x + b_c, in a box so wide that it never matters; a sample breaks under a norm exactly where
some gap (w_y - w_c) x + b_y - b_c is less than radius * ||w_y - w_c|| in the dual norm. What is put around them hides that:
saturated scores, rounded inputs, gradients that jump, noise, answers that are no numbers, statistics of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epsball.auditing.sheet import Sheet, Subject
from epsball.core import Key, Victim
from epsball.threats import ThreatSpec, parse_threat

N, FEATURES, CLASSES, GRID = 24, 16, 3, 0.05
NORMS = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}
"""Threats that have a dual norm, and which."""

Look = Callable[[Subject, tuple[ThreatSpec, ...]], Sheet]
"""Runs the preflight and the search stages of an audit."""


@dataclass(frozen=True)
class Truth:
    """What is certain: the least radius (N,) that breaks a sample, up to `slack` as a share of it, and the finding that must be made."""

    least: Tensor
    slack: float = 0.0
    finding: str = ""


class Canary(nn.Module):
    """change(linear, x) with fixed weights."""

    def __init__(self, weight: Tensor, bias: Tensor, change: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            self.linear.bias.copy_(bias)
        self.change = change
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(B, CLASSES) scores."""
        return self.change(self.linear, x)


def plain(linear: nn.Module, x: Tensor) -> Tensor:
    """Nothing is hidden."""
    scores: Tensor = linear(x)
    return scores


def saturated(linear: nn.Module, x: Tensor) -> Tensor:
    """Scores so wide that cross-entropy has no gradient."""
    return 1e4 * plain(linear, x)


def certain(linear: nn.Module, x: Tensor) -> Tensor:
    """Probabilities that have run into 0 and 1."""
    return (300 * plain(linear, x)).softmax(1)


def rounded(linear: nn.Module, x: Tensor) -> Tensor:
    """Inputs on a grid: the gradient is zero everywhere."""
    return plain(linear, (x / GRID).round() * GRID)


def shattered(linear: nn.Module, x: Tensor) -> Tensor:
    """A wave of a hundredth of the radius whose slope is ten times that of the model."""
    return plain(linear, x + 0.001 * torch.sin(1e4 * x))


def noisy(linear: nn.Module, x: Tensor) -> Tensor:
    """Another answer every time."""
    return plain(linear, x + 0.02 * (nn.functional.dropout(torch.ones_like(x), 0.5, training=True) - 1))


def silent(linear: nn.Module, x: Tensor) -> Tensor:
    """No number where the first feature is high."""
    return plain(linear, x).masked_fill(x[:, :1] > 0.5, torch.nan)


def crowded(linear: nn.Module, x: Tensor) -> Tensor:
    """Batch norm in training mode: an answer depends on who else asks."""
    return plain(linear, x - 0.5 * x.mean(0, keepdim=True))


@dataclass(frozen=True)
class Planted:
    """The linear model and the data of all canaries."""

    weight: Tensor
    bias: Tensor
    x: Tensor
    y: Tensor

    @staticmethod
    def make() -> Planted:
        """Random numbers of a fixed key; labels are what the model answers, so that all samples are right."""
        key = Key.of(0).fold("canaries")

        def draw(name: str, *shape: int) -> Tensor:
            return key.fold(name).normal(torch.arange(shape[0]), torch.empty(shape))

        weight, bias, x = draw("weight", CLASSES, FEATURES), draw("bias", CLASSES, 1)[:, 0], 0.4 * draw("x", N, FEATURES)
        return Planted(weight, bias, x, (x @ weight.T + bias).argmax(1))

    def subject(self, name: str, change: Callable[[nn.Module, Tensor], Tensor]) -> Subject:
        """The canary with its data."""
        victim = Victim(Canary(self.weight, self.bias, change), box=(-10.0, 10.0), batch_size=N, name=f"canary {name}")
        return Subject(victim, self.x, self.y, torch.arange(N), "canaries", {})

    def least(self, dual: float, x: Tensor | None = None) -> Tensor:
        """(N,) float64 least radius that breaks a sample, in the norm whose dual this is."""
        x, weight, bias = (self.x if x is None else x).double(), self.weight.double(), self.bias.double()
        scores = x @ weight.T + bias
        ratios = torch.full((N, CLASSES), torch.inf, dtype=torch.float64)
        for other in range(CLASSES):
            rows = self.y != other
            gaps = scores[rows].gather(1, self.y[rows, None]).squeeze(1) - scores[rows, other]
            ratios[rows, other] = gaps.clamp(min=0) / (weight[self.y[rows]] - weight[other]).norm(dual, dim=1)
        return ratios.amin(1)

    def radius(self, dual: float) -> float:
        """One that breaks half of the samples."""
        return float(self.least(dual).median()) * 1.02


def cases(planted: Planted) -> Iterator[tuple[str, Callable[[nn.Module, Tensor], Tensor], Truth]]:
    """Name, model and truth under Linf."""
    exact = planted.least(1.0)
    yield "saturated scores", saturated, Truth(exact, 1e-3, "gradient")
    yield "probabilities", certain, Truth(exact, 1e-2, "probabilities")
    yield "shattered gradients", shattered, Truth(exact, 0.05)
    yield "noise", noisy, Truth(exact, 0.3, "random")
    # Rounding adds or takes half a step of the grid from what each feature can move.
    yield "missing answers", silent, Truth(exact, 1.0, "finite")
    yield "batch statistics", crowded, Truth(exact, torch.inf, "batch")
    yield "rounded inputs", rounded, Truth(exact, 0.5 * GRID / planted.radius(1.0), "no-gradient")


def misjudged(look: Look, threats: tuple[str, ...]) -> Iterator[str]:
    """One sentence for every planted model that an audit would judge wrongly; under the norms among `threats`, and Linf.

    Cost: some thousand rows of a linear model with 16 inputs: about two seconds of a processor.
    """
    planted = Planted.make()
    for norm, dual in NORMS.items():
        if norm in threats or norm == "linf":
            radius = planted.radius(dual)
            sheet = look(planted.subject("linear", plain), (parse_threat(f"{norm}:{radius!r}"),))
            yield from wrong(sheet, norm, radius, "a linear model", Truth(planted.least(dual), 1e-3))
    radius = planted.radius(1.0)
    for name, change, truth in cases(planted):
        sheet = look(planted.subject(name, change), (parse_threat(f"linf:{radius!r}"),))
        yield from wrong(sheet, "linf", radius, name, truth)


def wrong(sheet: Sheet, threat: str, radius: float, name: str, truth: Truth) -> Iterator[str]:
    """What the sheet says against the truth."""
    said = {finding.id for finding in sheet.findings if finding.status != "pass"}
    if truth.finding and truth.finding not in said:
        yield f"{name}: '{truth.finding}' was not found"
    standing = sheet.standing(threat, radius).cpu()
    missed = int((standing & (truth.least < radius * (1 - truth.slack))).sum())
    invented = int((~standing & sheet.correct.cpu() & (truth.least > radius * (1 + truth.slack))).sum())
    if missed:
        yield f"{name} under {threat}: {missed} of {N} samples can be broken and were not"
    if invented:
        yield f"{name} under {threat}: {invented} of {N} samples cannot be broken and were"
