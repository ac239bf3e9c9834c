"""Hand-made reports: `build` gives a plausible one, `hostile` one in which every string is an attack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epsball.auditing.results import AttackRow, Canaries, ClassRate, Finding, Flag, ModelReport, Rate, Report, Result

RADII = {"linf": ((0.05, "0.05"), (0.1, "0.1"), (0.2, "0.2")), "l2": ((0.5, "0.5"), (1.0, "1.0")), "l1": ((3.0, "3"),)}
EVIL = (
    "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(1)>]]>--><!-- {{ 7*7 }} [bold red]b[/bold red] :skull: "
    "\x1b[31mred\x1b]0;title\x07\u202egnp.exe\u2066\u200b\ufeff\x00\x9b2J\u2028\udc80 ünï 数字 " + "long" * 60
)


def rate(value: float, n: int = 1000) -> Rate:
    """A rate with a rough interval."""
    count = round(value * n)
    half = 1.96 * (max(value * (1 - value), 0.25 / n) / n) ** 0.5
    return Rate(value=count / n, low=max(0.0, count / n - half), high=min(1.0, count / n + half), count=count, n=n)


def result(threat: str, radius: float, text: str, value: float, **changes: Any) -> Result:
    """One result with two attacks and ten classes of 100, the last with 12 samples."""
    attacks = [
        AttackRow(name="fgsm", recipe="Attack(Linf(), ...)", tried=950, broken=300, forwards=950, backwards=950, seconds=0.4),
        AttackRow(
            name="apgd-ce", recipe="Attack(Linf(), ..., steps=100)", tried=650, broken=90, forwards=65000, backwards=65000, seconds=9.0
        ),
    ]
    classes = [
        ClassRate(label=i, name=f"class {i}", rate=rate(min(1.0, value * (0.7 + 0.05 * i)), 100 if i < 9 else 12)) for i in range(10)
    ]
    plain: dict[str, Any] = {
        "threat": threat,
        "radius": radius,
        "radius_text": text,
        "robust_accuracy": rate(value),
        "trustworthy": True,
        "forwards": 65950,
        "backwards": 65950,
        "seconds": 9.4,
        "attacks": attacks,
        "per_class": classes,
    }
    return Result(**(plain | changes))


def model(name: str, strength: float, **changes: Any) -> ModelReport:
    """One model over `RADII`, weaker as the radius grows."""
    results = [
        result(threat, radius, text, max(0.0, 0.97 - radius * (0.3 if threat != "linf" else 8) / strength / (4 if threat == "l1" else 1)))
        for threat, radii in RADII.items()
        for radius, text in radii
    ]
    plain: dict[str, Any] = {
        "name": name,
        "data": "digits",
        "n": 1000,
        "source": f"builtin {name}",
        "clean_accuracy": rate(0.971),
        "clean_per_class": [ClassRate(label=i, name=f"class {i}", rate=rate(0.97, 100)) for i in range(10)],
        "findings": [Finding(id="range", status="pass", message="inputs lie in 0..1.")],
        "results": results,
    }
    return ModelReport(**(plain | changes))


def report(*models: ModelReport, **changes: Any) -> Report:
    """One run over the models."""
    plain: dict[str, Any] = {
        "models": list(models) or [model("digits-standard", 1.0), model("digits-robust", 3.0)],
        "seed": 7,
        "versions": {"epsball": "0.1.0", "torch": "2.13.0"},
        "run": "runs/first",
        "command": "epsball audit --seed 7",
        "settings": {"n": "1000"},
        "started": "2026-03-01T12:00:00Z",
        "seconds": 61.0,
    }
    return Report(**(plain | changes))


def evidence(path: Path, shape: tuple[int, ...] = (1, 8, 8), as_bytes: bool = True, models: int = 2) -> Path:
    """An evidence file for `report()`: noise pictures, six broken samples per threat, the last one unchanged."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for index in range(models):
        x = rng.integers(0, 256, (20, *shape), dtype=np.uint8)
        start = x.astype(np.float32) / 255
        tensors[f"m{index}/x"] = x if as_bytes else start
        tensors[f"m{index}/y"] = np.arange(20) % 10
        for threat in RADII:
            rows = np.array([3, 13, 4, 5, 6, 7])
            moved = np.clip(start[rows] + rng.choice([-0.1, 0.1], (6, *shape)), 0, 1).astype(np.float32)
            moved[-1] = start[7]
            tensors[f"m{index}/{threat}/rows"] = rows
            tensors[f"m{index}/{threat}/x_adv"] = moved
            tensors[f"m{index}/{threat}/radius"] = np.full(6, RADII[threat][0][0])
            tensors[f"m{index}/{threat}/predicted"] = (rows + 1) % 10
            tensors[f"m{index}/{threat}/size"] = np.full(6, 0.0498)
    save_file(tensors, str(path))
    return path


def hostile() -> Report:
    """A report whose every free string is an attack on the page or the terminal."""
    flag = Flag(id=EVIL, severity="block", message=EVIL, fix=EVIL)
    bad = result(EVIL, 0.5, EVIL, 0.5, flags=[flag], trustworthy=False, per_class=[ClassRate(label=0, name=EVIL, rate=rate(0.5, 40))])
    good = result("linf", 0.1, EVIL, 0.5, per_class=[ClassRate(label=i, name=EVIL, rate=rate(0.5, 40)) for i in range(20)])
    good.attacks[0] = good.attacks[0].model_copy(update={"name": EVIL, "recipe": EVIL})
    finding = Finding(id=EVIL, status="warn", message=EVIL)
    warn = Flag(id=EVIL, severity="warn", message=EVIL, fix=EVIL)
    evil = model(EVIL, 1.0, data=EVIL, source=EVIL, findings=[finding, finding.model_copy(update={"status": "pass"})], results=[good])
    evil = evil.model_copy(update={"flags": [warn]})
    worse = model(EVIL, 1.0, data=EVIL, source=EVIL, results=[bad])
    return report(
        evil,
        worse,
        run=EVIL,
        command=EVIL,
        notes=[EVIL],
        settings={EVIL: EVIL},
        versions={EVIL: EVIL},
        effort=EVIL,
        started=EVIL,
        canaries=Canaries(judged=EVIL, code=EVIL),
    )


class Build:
    """What the tests build with."""

    rate = staticmethod(rate)
    result = staticmethod(result)
    model = staticmethod(model)
    report = staticmethod(report)
    evidence = staticmethod(evidence)
    hostile = staticmethod(hostile)
    evil = EVIL


@pytest.fixture(scope="session")
def build() -> type[Build]:
    """The factories above."""
    return Build


@pytest.fixture
def paint() -> Callable[..., str]:
    """Print something the way a terminal would show it, as text."""
    import io

    from rich.console import Console

    def show(renderable: Any, width: int = 80, encoding: str = "utf-8", color: bool = False) -> str:
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
        Console(file=stream, width=width, force_terminal=color, no_color=not color, legacy_windows=False).print(renderable)
        return raw.getvalue().decode(encoding)

    return show
