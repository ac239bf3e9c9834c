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
from epsball.threats import L0, L1, L2, LUV, RGB, THREATS, Added, Color, Composed, Linf, compose, is_input, named

SMALL = {"steps": 6, "restarts": 2, "targets": 2, "draws": 6, "rotations": 3, "shifts": 3}
SLOW = {"physical": {"draws": 2, "steps": 3}, "blackbox": {"budget": 16}}
"""Smaller still."""
RADII = {"linf": 0.12, "l2": 0.35, "l1": 0.9, "l0": 2.0, "l0f": 2.0}
RADII |= {"flow": 0.5, "color": 0.12, "color-luv": 0.12, "rigid": 0.4, "patch": 1.0, "compose": 0.1}
UNIT = (0.0, 1.0)
NORMS = ("linf", "l2", "l1", "l0", "l0f")
"""Threats whose x is any tensor and whose `Room` can be set; the others change images."""


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


def threat_of(name: str) -> Projects:
    """The registered threat, colors on small grids; `compose` stands for one that moves, recolors and adds."""
    few = {"color": Color(RGB, (4, 5, 3)), "color-luv": Color(LUV, (4, 5, 3))}
    if name == "compose":
        return compose((few["color"], 1.0), (named("flow"), 2.0), (named("linf"), 0.4))
    return few.get(name) or named(name)


def channels_of(threat: str) -> int:
    """Channels of the images that the threat is tried on."""
    return 3 if threat in ("color", "color-luv", "compose") else 2


def bounds_of(threat: str) -> tuple[float, float]:
    """A box other than [0, 1] that the threat can live in."""
    return (0.1, 0.7) if channels_of(threat) == 3 else (-3.0, 5.0)


def small(entry: Entry, threat: str | Projects | None = None, **options: Any) -> AttackLike:
    """The registered recipe in few steps; options that it does not have are left out."""
    known = inspect.signature(entry.recipe).parameters
    wanted = {name: value for name, value in {**SMALL, **SLOW.get(entry.name, {}), **options}.items() if name in known}
    if threat is not None:
        wanted["threat"] = threat_of(threat) if isinstance(threat, str) else threat
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
    inside = threat_of(threat).within(UNIT)
    return float(inside.reach(torch.full((1, channels_of(threat), 3, 3), 0.5))[0]) / 4


@dataclass(frozen=True)
class Bench:
    model: nn.Module
    x: Tensor
    labels: Tensor
    wrong: Tensor  # rows that are misclassified from the start

    def goal(self, targeted: bool) -> Goal:
        classes = int(self.model(self.x.double()).shape[1])
        return Targeted((self.labels + 1) % classes) if targeted else Untargeted(self.labels)


def bench(classes: int = 4, n: int = 10, seed: int = 0, kind: str = "mlp", wrong: int = 2, threat: str = "linf") -> Bench:
    """`n` images (2, 3, 3), or as many channels as the threat needs, labelled by the model itself, but for the first `wrong`."""
    channels = channels_of(threat)
    model = conv(classes, channels, seed=seed) if kind == "conv" else mlp(9 * channels, classes, seed)
    x = tensor(rng(seed, 2).random((n, channels, 3, 3)))
    labels = model(x.double()).argmax(1)
    mistaken = torch.arange(n) < wrong
    return Bench(model, x, torch.where(mistaken, (labels + 1) % classes, labels), mistaken)


def answers(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A fresh look at the model, outside every mechanism of ours."""
    dtype = next((p.dtype for p in model.parameters()), x.dtype) if isinstance(model, nn.Module) else x.dtype
    with torch.no_grad():
        return model(x.to(dtype))


def through_disk(x: Tensor) -> Tensor:
    """What comes back from an .npy file, in float64; the format has no bfloat16, of which float32 loses nothing."""
    file = io.BytesIO()
    np.save(file, (x.float() if x.dtype is torch.bfloat16 else x).numpy())
    file.seek(0)
    return torch.from_numpy(np.load(file, allow_pickle=False)).double()


def measured(threat: str, x: Tensor, z: Tensor) -> Tensor:
    """(B,) sizes, written again from the definitions; a threat without a definition here must measure itself."""
    return measure(threat_of(threat), x, z)


def measure(threat: Projects, x: Tensor, z: Tensor) -> Tensor:
    """`measured`, of a threat itself."""
    if isinstance(threat, Composed):
        pieces = threat.split(x, z)
        return torch.stack([measure(p, x, piece) / b for p, b, piece in zip(threat.parts, threat.budgets, pieces, strict=True)]).amax(0)
    if isinstance(threat, Added):
        return measure(threat.norm, torch.zeros_like(z), z)
    values = z.double().numpy()
    if threat.name == "flow":
        return torch.from_numpy(np.hypot(values[:, 0], values[:, 1]).reshape(len(x), -1).max(1))
    if threat.name in ("color", "color-luv"):
        return torch.from_numpy(np.abs(values).reshape(len(x), -1).max(1))
    if threat.name == "rigid":
        return torch.from_numpy(np.abs(values / [30.0, 3.0, 3.0]).max(1))
    change = (z.double() - x.double()).flatten(1)
    if isinstance(threat, Linf):
        return change.abs().amax(1)
    if isinstance(threat, L1 | L2):
        return torch.tensor([np.linalg.norm(row, 1 if isinstance(threat, L1) else 2) for row in change.numpy()], dtype=torch.float64)
    if isinstance(threat, L0):
        pixels = (z != x).any(1).flatten(1) if not threat.features and x.ndim == 4 else change != 0
        return pixels.sum(1).double()
    if threat.name == "patch":
        return torch.tensor([_side(row) for row in (z != x).any(1).numpy()], dtype=torch.float64)
    return threat.size(x, z)


def _side(changed: Any) -> int:
    """Longer side of the smallest rectangle that holds every True of (H, W)."""
    places = np.argwhere(changed)
    return int((places.max(0) - places.min(0) + 1).max()) if len(places) else 0


# Checks.


LOOSE = 1e-6
"""Powers and sines round by their place in a batch: what rests on them is made again to this, everything else to the bit."""


def check_legal(
    threat: str | Projects, x: Tensor, x_adv: Tensor, radius: float | Tensor, box: tuple[Any, Any] = UNIT, z: Tensor | None = None
) -> None:
    """P1, P2: inside the ball in float64 after a round trip through disk, inside the box, same shape and type, finite.

    Where the threat's variable `z` is not the input, it is what is measured, and x_adv must be what it makes of x.
    """
    threat = threat_of(threat) if isinstance(threat, str) else threat
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert bool(torch.isfinite(x_adv).all()), "not finite"
    stored, clean = through_disk(x_adv), through_disk(x)
    if is_input(threat):
        size = measure(threat, clean.reshape(x.shape), stored.reshape(x.shape))
    else:
        assert z is not None, "a threat with a variable of its own"
        size = measure(threat, clean.reshape(x.shape), through_disk(z).reshape(z.shape))
        made = threat.within(box).apply(x, z)
        exact = not any(word in threat.name for word in ("luv", "rigid"))
        assert torch.equal(made, x_adv) if exact else torch.allclose(made, x_adv, rtol=0, atol=LOOSE), "z does not make x_adv"
    limit = torch.as_tensor(radius, dtype=torch.float64).expand(len(x))
    assert bool((size <= limit).all()), f"outside the ball by {float((size - limit).max()):g}"
    low, high = (torch.as_tensor(b, dtype=torch.float64) for b in box)
    assert bool((stored >= low).all()), "below the box"
    assert bool((stored <= high).all()), "above the box"


def check_outcome(threat: str, x: Tensor, outcome: Outcome, radius: float | Tensor, box: tuple[Any, Any] = UNIT) -> None:
    """`check_legal` of what an attack handed back; z is the input where the threat says so."""
    if is_input(threat_of(threat)):
        assert torch.equal(outcome.z, outcome.x_adv)
    check_legal(threat, x, outcome.x_adv, radius, box, outcome.z)


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
    """P6: `reached` and `size` are what a fresh look finds; where z is the input, it is the one handed back."""
    fresh = wins(as_goal(goal), answers(model, outcome.x_adv))
    assert torch.equal(outcome.reached, fresh), f"claimed {outcome.reached.tolist()}, fresh {fresh.tolist()}"
    assert torch.equal(outcome.z, outcome.x_adv) or not is_input(threat_of(threat))
    assert torch.allclose(outcome.size, measured(threat, x, outcome.z), rtol=1e-12, atol=0)


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


ALL_THREATS = (*THREATS, "compose")


def posed(
    model: Any, x: Tensor, goal: Goal | Tensor, *, threat: str | Projects = "linf", objective: Any = None, radius: Any = 0.1, **options: Any
) -> Problem:
    """A problem as an attack would see it."""
    attack = Attack(
        "law", threat_of(threat) if isinstance(threat, str) else threat, objective or OBJECTIVES["margin"], Descent(OfRadius(0.25)), 1
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
