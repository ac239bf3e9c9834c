"""Rebuild the recorded models, cases and suite results of the official AutoAttack code, and the peers' smallest changes.

From `apgd.npz` and `smallest.npz`; needs torch and numpy only. What every array means, and how closely to expect agreement, is in
README.md beside this file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

RECORD = Path(__file__).with_name("apgd.npz")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What one run did at each iteration; T = n_iter."""

    loss: Tensor  # (T + 1, N) float32: row 0 at the start, row i + 1 after step i
    step: Tensor  # (T, N) float32: the step size used in step i
    kept: Tensor | None  # (T, N) int64, L1 only: coordinates asked for in step i, before ties


@dataclass(frozen=True, eq=False)
class Case:
    """One call of the official `attack_single_run`."""

    name: str
    model: nn.Module
    loss: str  # "ce", "dlr" or "dlr-targeted"
    norm: str  # "Linf", "L2" or "L1"
    eps: float
    n_iter: int
    init: str  # "clean": x_init=x; "random": x_init=None, the point it drew is in `start`; "given": x_init=start
    x: Tensor
    y: Tensor
    y_target: Tensor | None
    start: Tensor | None  # None where the start is x
    start_topk: Tensor | None  # (N,) float32, L1 only: the `topk` fraction before the first checkpoint
    start_support: Tensor | None  # (N,) int64, L1 only: the number of changed features before the first checkpoint
    loss_best: Tensor
    robust: Tensor
    size: Tensor  # distance of the last misclassified iterate; of the start where none was found
    spread: Tensor  # how far loss_best moved, at most, when the model's arithmetic was jolted by one rounding
    fragile: Tensor  # (N,) bool: `robust` changed under such a jolt
    trajectory: Trajectory | None


@dataclass(frozen=True, eq=False)
class Standard:
    """One run of `AutoAttack(version="standard")`."""

    name: str
    model: nn.Module
    norm: str
    eps: float
    x: Tensor
    y: Tensor
    robust: Tensor  # (M,) bool after the whole suite
    stages: tuple[str, ...]
    alive: tuple[int, ...]  # robust samples: on clean data, then after each stage
    forwards: tuple[int, ...]  # rows through the model: in the checks before the first stage, then in each stage
    backwards: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Reference:
    models: dict[str, nn.Module]
    cases: list[Case]
    standard: list[Standard]


def architectures() -> dict[str, nn.Sequential]:
    """The three models with arbitrary weights; input (N, 1, 8, 8) in [0, 1], output (N, 10) logits."""
    return {
        "linear": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        "mlp": nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        "conv": nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 10),
        ),
    }


def images(pixels: np.ndarray[Any, Any]) -> Tensor:
    """(N, 64) integers 0..16 to (N, 1, 8, 8) float32 in [0, 1], exactly."""
    return torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16


def load_reference(path: Path = RECORD) -> Reference:
    """Read the record: nothing is computed, no generator is read."""
    with np.load(path, allow_pickle=False) as archive:
        record = {name: archive[name] for name in archive.files}
    models: dict[str, nn.Module] = {}
    for name, net in architectures().items():
        net.load_state_dict({key: torch.from_numpy(record[f"model/{name}/{key}"]) for key in net.state_dict()})
        models[name] = net.eval().requires_grad_(False)
    return Reference(models, _cases(record, models), _standard(record, models))


def _cases(record: dict[str, np.ndarray[Any, Any]], models: dict[str, nn.Module]) -> list[Case]:
    x, y = images(record["x"]), torch.from_numpy(record["y"]).long()
    cases = []
    for row, full in enumerate(record["case/name"]):
        name = str(full)
        model, loss, norm, init = (str(record[f"case/{key}"][row]) for key in ("model", "loss", "norm", "init"))
        result = {key: torch.from_numpy(record[f"case/{key}"][row]) for key in ("loss_best", "robust", "size", "spread", "fragile")}
        start = None if init == "clean" else torch.from_numpy(record[f"start/{norm}"]).view_as(x)
        cases.append(
            Case(
                name=name,
                model=models[model],
                loss=loss,
                norm=norm,
                eps=float(record["case/eps"][row]),
                n_iter=int(record["case/n_iter"][row]),
                init=init,
                x=x,
                y=y,
                y_target=torch.from_numpy(record[f"y_target/{model}"]).long() if loss == "dlr-targeted" else None,
                start=start,
                start_topk=torch.from_numpy(record[f"l1/{init}/topk"]) if norm == "L1" else None,
                start_support=torch.from_numpy(record[f"l1/{init}/support"]).long() if norm == "L1" else None,
                trajectory=_trajectory(record, name),
                **result,
            )
        )
    return cases


def _trajectory(record: dict[str, np.ndarray[Any, Any]], name: str) -> Trajectory | None:
    if f"trajectory/{name}/loss" not in record:
        return None
    kept = record.get(f"trajectory/{name}/kept")
    loss, step = (torch.from_numpy(record[f"trajectory/{name}/{key}"]) for key in ("loss", "step"))
    return Trajectory(loss, step, None if kept is None else torch.from_numpy(kept).long())


def _standard(record: dict[str, np.ndarray[Any, Any]], models: dict[str, nn.Module]) -> list[Standard]:
    x, y = images(record["aa_standard/x"]), torch.from_numpy(record["aa_standard/y"]).long()
    runs = []
    for row, full in enumerate(record["aa_standard/name"]):
        alive, forwards, backwards = (
            tuple(int(n) for n in record[f"aa_standard/{key}"][row]) for key in ("alive", "forwards", "backwards")
        )
        runs.append(
            Standard(
                name=str(full),
                model=models[str(record["aa_standard/model"][row])],
                norm=str(record["aa_standard/norm"][row]),
                eps=float(record["aa_standard/eps"][row]),
                x=x,
                y=y,
                robust=torch.from_numpy(record["aa_standard/robust"][row]),
                stages=tuple(str(stage) for stage in record["aa_standard/stages"]),
                alive=alive,
                forwards=forwards,
                backwards=backwards,
            )
        )
    return runs


SMALLEST = Path(__file__).with_name("smallest.npz")


@dataclass(frozen=True, eq=False)
class Search:
    """One search of a peer for the smallest change, and what of ours is to be compared with it."""

    peer: str
    model: str
    attack: str  # ours
    threat: str
    options: dict[str, Any]  # ours: as many steps as the peer made
    settings: str  # the peer's
    targeted: bool
    size: Tensor  # (N,) float64, +inf where the peer did not reach its goal

    @property
    def name(self) -> str:
        return f"{self.peer}/{self.attack}/{self.threat}/{self.model}/{self.settings}"


@dataclass(frozen=True, eq=False)
class Smallest:
    x: Tensor
    y: Tensor
    targets: dict[str, Tensor]  # by model: the second most likely class
    searches: list[Search]


def load_smallest(path: Path = SMALLEST) -> Smallest:
    """Read the record of the peers' smallest changes; the models are those of `load_reference`."""
    with np.load(path, allow_pickle=False) as archive:
        record = {name: archive[name] for name in archive.files}
    words = [[str(word) for word in record[f"search/{key}"]] for key in ("peer", "model", "attack", "threat", "options", "settings")]
    sizes, aimed = torch.from_numpy(record["search/size"]), record["search/targeted"].tolist()
    searches = [
        Search(peer, model, attack, threat, json.loads(options), settings, targeted, size)
        for peer, model, attack, threat, options, settings, targeted, size in zip(*words, aimed, sizes, strict=True)
    ]
    targets = {name: torch.from_numpy(record[f"target/{name}"]).long() for name in architectures()}
    return Smallest(images(record["x"]), torch.from_numpy(record["y"]).long(), targets, searches)
