"""What the laws share: small repeatable models and problems, attacks in small sizes, and the checks as plain functions.

A check raises `AssertionError`; `test_mutants.py` shows for each that a broken attack makes it raise.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from epsball.attacks import Entry, entries
from epsball.core import Attack, AttackLike, Descent, Goal, Key, OfRadius, Outcome, Problem, Projects, Targeted, Untargeted, Victim, as_goal
from epsball.core.attack import pose
from epsball.objectives import OBJECTIVES
from epsball.threats import THREATS, named

SMALL = {"steps": 6, "restarts": 2, "targets": 2, "draws": 6}
RADII = {"linf": 0.12, "l2": 0.35, "l1": 0.9, "l0": 2.0, "l0f": 2.0}
UNIT = (0.0, 1.0)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([7, *seed])


def tensor(array: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


# Models: weights from NumPy's generators, so that no torch release can change them.


def filled(model: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    """Weights of variance gain^2 / fan-in, small biases, honest batch statistics; eval mode."""
    random = rng(seed, 1)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fan = parameter[0].numel() if parameter.ndim > 1 else 4
            values = random.standard_normal(parameter.shape) * gain / fan**0.5
            if isinstance(module, nn.BatchNorm2d):
                values = 1 + 0.1 * values
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(values))
            del name
    return model.eval()


def linear(features: int, classes: int, seed: int = 0, gain: float = 1.0) -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.Linear(features, classes))
    filled(model, seed, gain)
    return model


def mlp(features: int, classes: int, seed: int = 0, smooth: bool = False) -> nn.Module:
    """Double precision inside, so that no batch size moves a verdict by rounding."""
    middle = nn.Tanh() if smooth else nn.ReLU()
    return filled(nn.Sequential(nn.Flatten(), nn.Linear(features, 16), middle, nn.Linear(16, classes)), seed, 2.0).double()


def conv(classes: int, channels: int = 2, seed: int = 0) -> nn.Module:
    """Batch statistics and dropout: things that an attack could disturb."""
    layers = (nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 9, classes))
    return filled(nn.Sequential(*layers), seed, 2.0).double()


# Attacks and threats in the sizes that the laws use.


def small(entry: Entry, threat: str | Projects | None = None, **options: Any) -> AttackLike:
    """The registered recipe in few steps; options that it does not have are left out."""
    known = inspect.signature(entry.recipe).parameters
    wanted = {name: value for name, value in {**SMALL, **options}.items() if name in known}
    if threat is not None:
        wanted["threat"] = named(threat) if isinstance(threat, str) else threat
    return entry.recipe(**wanted)


def has(entry: Entry, option: str) -> bool:
    return option in inspect.signature(entry.recipe).parameters


def pairs() -> Iterator[tuple[str, str]]:
    """Every registered attack with every threat it claims."""
    for name, entry in entries().items():
        for threat in entry.threats:
            yield name, threat


def radius_of(threat: str) -> float:
    """A radius at which attacks on `bench` are neither hopeless nor certain; a new threat gets a quarter of its reach."""
    if threat in RADII:
        return RADII[threat]
    inside = named(threat).within(UNIT)
    return float(inside.reach(torch.full((1, 2, 3, 3), 0.5))[0]) / 4


@dataclass(frozen=True)
class Bench:
    model: nn.Module
    x: Tensor
    labels: Tensor
    wrong: Tensor  # rows that are misclassified from the start

    def goal(self, targeted: bool) -> Goal:
        classes = int(self.model(self.x.double()).shape[1])
        return Targeted((self.labels + 1) % classes) if targeted else Untargeted(self.labels)


def bench(classes: int = 4, n: int = 10, seed: int = 0, kind: str = "mlp", wrong: int = 2) -> Bench:
    """`n` images (2, 3, 3) labelled by the model itself, but for the first `wrong` of them."""
    model = conv(classes, seed=seed) if kind == "conv" else mlp(18, classes, seed)
    x = tensor(rng(seed, 2).random((n, 2, 3, 3)))
    labels = model(x.double()).argmax(1)
    mistaken = torch.arange(n) < wrong
    return Bench(model, x, torch.where(mistaken, (labels + 1) % classes, labels), mistaken)


def answers(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A fresh look at the model, outside every mechanism of ours."""
    dtype = next((p.dtype for p in model.parameters()), x.dtype) if isinstance(model, nn.Module) else x.dtype
    with torch.no_grad():
        return model(x.to(dtype))


def through_disk(x: Tensor) -> Tensor:
    """What comes back from an .npy file, in float64."""
    file = io.BytesIO()
    np.save(file, x.numpy())
    file.seek(0)
    return torch.from_numpy(np.load(file, allow_pickle=False)).double()


def measured(threat: str, x: Tensor, x_adv: Tensor) -> Tensor:
    """(B,) sizes, written again from the definitions; a threat without a definition here must measure itself."""
    change = (x_adv.double() - x.double()).flatten(1)
    if threat == "linf":
        return change.abs().amax(1)
    if threat in ("l1", "l2"):
        return torch.tensor([np.linalg.norm(row, 1 if threat == "l1" else 2) for row in change.numpy()], dtype=torch.float64)
    if threat == "l0f" or (threat == "l0" and x.ndim < 4):
        return (change != 0).sum(1).double()
    if threat == "l0":
        return (x_adv != x).any(1).flatten(1).sum(1).double()
    return named(threat).size(x, x_adv)


# Checks.


def check_legal(threat: str, x: Tensor, x_adv: Tensor, radius: float | Tensor, box: tuple[Any, Any] = UNIT) -> None:
    """P1, P2: inside the ball in float64 after a round trip through disk, inside the box, same shape and type, finite."""
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert bool(torch.isfinite(x_adv).all()), "not finite"
    stored, clean = through_disk(x_adv), through_disk(x)
    size = measured(threat, clean.reshape(x.shape), stored.reshape(x.shape))
    limit = torch.as_tensor(radius, dtype=torch.float64).expand(len(x))
    assert bool((size <= limit).all()), f"outside the ball by {float((size - limit).max()):g}"
    low, high = (torch.as_tensor(b, dtype=torch.float64) for b in box)
    assert bool((stored >= low).all()), "below the box"
    assert bool((stored <= high).all()), "above the box"


def wins(goal: Goal, output: Tensor) -> Tensor:
    """`Goal.reached`, written again from the definition."""
    finite = torch.from_numpy(np.isfinite(output.numpy()).all(1))
    top = torch.from_numpy(output.numpy().argmax(1))
    if isinstance(goal, Untargeted):
        return (top != goal.labels) & finite
    if isinstance(goal, Targeted):
        return (top == goal.labels) & finite
    return goal.reached(output)


def check_replay(threat: str, model: Callable[[Tensor], Tensor], x: Tensor, goal: Goal | Tensor, outcome: Outcome) -> None:
    """P6: `reached` and `size` are what a fresh look finds."""
    fresh = wins(as_goal(goal), answers(model, outcome.x_adv))
    assert torch.equal(outcome.reached, fresh), f"claimed {outcome.reached.tolist()}, fresh {fresh.tolist()}"
    assert torch.allclose(outcome.size, measured(threat, x, outcome.x_adv), rtol=1e-12, atol=0)


def check_same(one: Outcome, other: Outcome) -> None:
    """P12: the same verdicts, at nearly the same places."""
    assert torch.equal(one.reached, other.reached), f"{one.reached.tolist()} != {other.reached.tolist()}"
    assert torch.allclose(one.x_adv, other.x_adv, atol=1e-5), f"inputs differ by {float((one.x_adv - other.x_adv).abs().max()):g}"
    assert torch.equal(one.queries, other.queries)
    assert torch.equal(one.backwards, other.backwards)


def check_nested(fewer: Outcome, more: Outcome) -> None:
    """P5, P13: no success is lost, and no score got worse where nothing was reached."""
    assert bool((more.reached | ~fewer.reached).all()), "a success was lost"


def rows_of(outcome: Outcome, rows: Tensor) -> Outcome:
    """Part of an outcome."""
    names = ("x_adv", "z", "reached", "size", "score", "queries", "backwards")
    return replace(outcome, flags={}, **{name: getattr(outcome, name)[rows] for name in names})


def objective_for(classes: int) -> list[str]:
    """Objectives that are defined for so many classes."""
    return [name for name in OBJECTIVES if classes > 2 or not name.startswith("dlr")]


ALL_THREATS = tuple(THREATS)


def posed(
    model: Any, x: Tensor, goal: Goal | Tensor, *, threat: str | Projects = "linf", objective: Any = None, radius: Any = 0.1, **options: Any
) -> Problem:
    """A problem as an attack would see it."""
    attack = Attack(
        "law", named(threat) if isinstance(threat, str) else threat, objective or OBJECTIVES["margin"], Descent(OfRadius(0.25)), 1
    )
    return pose(attack, Victim.of(model), x, as_goal(goal), radius, Key((0,)), options.get("clean"))


def check_gradient_rows(gradient: Any, problem: Problem, z: Tensor, atol: float = 1e-12) -> None:
    """P12: what a row reads does not depend on the rows beside it, nor on how many there are."""
    whole = gradient(problem, z)
    for row in range(len(z)):
        one = gradient(problem.take(slice(row, row + 1)), z[row : row + 1])
        assert torch.allclose(one.gradient[0], whole.gradient[row], rtol=1e-9, atol=atol), f"row {row} hangs on its neighbors"
        assert torch.allclose(one.score[0], whole.score[row], rtol=1e-6)


def check_finite_differences(problem: Problem, z: Tensor, gradient: Any, step: float = 1e-6) -> None:
    """P15: central differences of the score along random directions, in float64."""
    reading = gradient(problem, z)
    for seed in range(3):
        d = tensor(rng(seed, 9).standard_normal(z.shape), torch.float64)
        up, down = (gradient(problem, z + sign * step * d).score.double() for sign in (1, -1))
        slope = (reading.gradient * d).flatten(1).sum(1)
        assert torch.allclose((up - down) / (2 * step), slope, rtol=2e-4, atol=2e-5), "the gradient is not that of the score"
