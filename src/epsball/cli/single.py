"""What `epsball attack` and `epsball list` do once their words are parsed."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epsball.attacks import entries
from epsball.auditing.statistics import rate
from epsball.core import AttackLike, Targeted, as_goal, valid
from epsball.data import Dataset
from epsball.door import Loaded
from epsball.errors import BadInput
from epsball.models import told
from epsball.models.digits import NAMES
from epsball.objectives import OBJECTIVES
from epsball.threats import THREATS, is_input


def catalog() -> dict[str, Any]:
    """Everything registered, as plain data."""
    attacks = [
        {
            "name": e.name,
            "summary": e.summary,
            "paper": e.paper,
            "access": e.access.name.lower(),
            "threats": list(e.threats),
            "targeted": e.targeted,
            "kind": e.kind,
            "cost": e.cost,
        }
        for e in entries().values()
    ]
    return {"attacks": attacks, "threats": list(THREATS), "objectives": list(OBJECTIVES), "models": list(NAMES), "data": ["digits"]}


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "Objective": ((str,), f"one of {', '.join(OBJECTIVES)}"),
}


def check_options(name: str, options: dict[str, Any]) -> None:
    """Refuses values that the recipe's annotations do not allow; unknown names are `get`'s to refuse.

    Raises:
        BadInput: in one line, the option, its value and what it takes.
    """
    entry = entries().get(name.replace("-", "_"))
    known = inspect.signature(entry.recipe).parameters if entry else {}
    for option, value in options.items():
        if option == "threat":
            raise BadInput(f"option threat {value!r} of attack '{name}': is given by --threat")
        words = str(known[option].annotation).split(" | ") if option in known else []
        if not words or (value is None and "None" in words):
            continue
        kinds, meant = _KINDS.get(words[0], ((), "a Python object, so it is set from Python only"))
        if (
            not isinstance(value, kinds)
            or (isinstance(value, bool) and bool not in kinds)
            or value in (math.inf, -math.inf)
            or value != value
        ):
            raise BadInput(f"option {option} {value!r} of attack '{name}': takes {meant}")


def run_attack(
    attack: AttackLike, loaded: Loaded, data: Dataset, radius: float, target: int | None, seed: int, save: Path | None
) -> dict[str, Any]:
    """One attack on a data set; a fresh evaluation of its result, as plain data."""
    from epsball.auditing.preflight import look
    from epsball.auditing.referee import Referee

    if target is not None and data.y.ndim != 1:
        raise BadInput("--target: needs data with one class per sample")
    victim, referee = loaded.victim, Referee(loaded.victim)
    look(victim, data.x, data.y)  # a model that does not fit the data is told here, in one line
    goal = as_goal(data.y) if target is None else Targeted(torch.full_like(data.y, target))
    with victim:
        outcome = attack(victim, data.x, goal, radius, seed)
    clean = referee.outputs(data.x, goal)
    begun = ~goal.reached(clean) & valid(clean)
    z = None if is_input(attack.threat) else outcome.z.cpu()
    ruling = referee.judge(data.x, outcome.x_adv.cpu(), goal, attack.threat, radius, z)
    broken = ruling.broken & begun
    success = rate(int(broken.sum()), int(begun.sum()))
    if save is not None:
        own = {} if z is None else {"z": z}
        _save(save, x=data.x, y=data.y, x_adv=outcome.x_adv.cpu(), reached=ruling.broken, size=ruling.size, **own)
    return {
        "attack": repr(attack),
        "model": victim.name,
        "data": data.name,
        "radius": radius,
        "samples": len(data.x),
        "reached before": int(goal.reached(clean).sum()),
        "reached by attack": success.count,
        "success rate": success.value,
        "interval": [success.low, success.high],
        "median size": float(ruling.size[broken].median()) if success.count else None,
        "forwards": int(outcome.queries.sum()),
        "backwards": int(outcome.backwards.sum()),
        "seed": seed,
        **({"notes": notes} if (notes := told(victim)) else {}),
    }


def _save(path: Path, **arrays: torch.Tensor) -> None:
    try:
        with path.open("wb") as file:
            np.savez_compressed(file, **{name: array.numpy() for name, array in arrays.items()})  # type: ignore[arg-type]
    except OSError as error:
        raise BadInput(f"save '{path}': cannot be written ({error.strerror}): choose another place") from error
