"""`epsball certify`: what no change within a radius can break, one line per radius."""

from __future__ import annotations

import json
import sys
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from epsball.core import Victim
    from epsball.data import Dataset
    from epsball.threats import ThreatSpec

EXAMPLES = (
    "Examples: epsball certify digits-robust --threat linf:0.05,0.1 -n 100 | epsball certify net.py:make -w net.safetensors -d x.npz "
    "-t l2:0.5 --method crown --json | epsball certify digits-robust --method smoothing --sigma 0.25 -t l2:0.25,0.5"
)


class How(StrEnum):
    """Where the bounds come from."""

    best = "best"
    crown = "crown"
    interval = "interval"
    auto_lirpa = "auto-lirpa"
    smoothing = "smoothing"


def certify(
    model: Annotated[str, typer.Argument(help="As for audit.")],
    data: Annotated[str, typer.Option("--data", "-d", help="As for audit.")] = "digits",
    weights: Annotated[str | None, typer.Option("--weights", "-w", metavar="FILE", help="As for audit.")] = None,
    threat: Annotated[
        str, typer.Option("--threat", "-t", help="NAME:RADIUS[,RADIUS]; linf, l2, l1, l0 or l0f; for smoothing l2.")
    ] = "linf:0.05,0.1",
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="At most so many samples, spread over the classes.")] = 100,
    method: Annotated[
        How,
        typer.Option(
            help="best: crown and interval; auto-lirpa: that library, for other layers; smoothing: the model that votes under noise."
        ),
    ] = How.best,
    sigma: Annotated[float | None, typer.Option(metavar="S", help="Smoothing: standard deviation of the noise; 0.25 unless given.")] = None,
    draws: Annotated[int | None, typer.Option(metavar="N", min=1, help="Smoothing: noisy copies per sample; 1000 unless given.")] = None,
    alpha: Annotated[float | None, typer.Option(metavar="A", help="Smoothing: chance of error per sample; 0.001 unless given.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    mean: Annotated[str | None, typer.Option(metavar="M[,M,M]", help="As for audit.")] = None,
    std: Annotated[str | None, typer.Option(metavar="S[,S,S]", help="As for audit.")] = None,
    box: Annotated[str, typer.Option(metavar="LOW,HIGH", help="Legal range of inputs.")] = "0,1",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    trust_code: Annotated[bool, typer.Option("--trust-code", help="As for audit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")] = False,
) -> None:
    """Say what no attack within a radius can break: certified accuracy, a lower bound beside audit's upper one."""
    from epsball.cli import app
    from epsball.threats import parse_threat

    spec = parse_threat(threat)
    _fits(spec, method, {"--sigma": sigma, "--draws": draws, "--alpha": alpha})
    dataset = app._data(data, n, seed, "test", "auto", box, None)
    options = app._model_options(weights, mean, std, box, "logits", trust_code, None)
    loaded = app._model(model, device, "auto", options)
    if dataset.y.ndim != 1:
        raise typer.BadParameter(f"--data '{data}': certified bounds need one class per sample")
    if method is How.smoothing:
        settings = {"sigma": 0.25 if sigma is None else sigma, "draws": draws or 1000, "alpha": 0.001 if alpha is None else alpha}
        told = _smoothed(loaded.victim, dataset, spec, settings, seed)
    else:
        told = _bounded(loaded.victim, dataset, spec, method.value)
    told = {"model": loaded.victim.name, "data": dataset.name, "n": len(dataset.x), "method": method.value, **told, "seed": seed}
    if as_json:
        sys.stdout.write(json.dumps(told) + "\n")
    else:
        _show(told)


def _fits(spec: ThreatSpec, method: How, own: dict[str, Any]) -> None:
    given = [name for name, value in own.items() if value is not None]
    if method is not How.smoothing and given:
        raise typer.BadParameter(f"{', '.join(given)}: needs --method smoothing")
    if method is How.smoothing and spec.name != "l2":
        raise typer.BadParameter(f"--threat {spec}: smoothing certifies l2 only: write l2:0.25 or choose --method best")


def _bounded(victim: Victim, data: Dataset, spec: ThreatSpec, method: Any) -> dict[str, Any]:
    """Bounds on the network itself."""
    from epsball.auditing.statistics import rate
    from epsball.certify import certify_each

    clean, results = _clean(victim, data), []
    started = time.perf_counter()
    found = certify_each(victim, data.x, data.y, spec.threat, spec.radii, method)
    seconds = time.perf_counter() - started
    for radius, text, one in zip(spec.radii, spec.texts, found, strict=True):
        share = rate(int(one.certified.sum()), len(data.x)).model_dump()
        results.append({"threat": spec.name, "radius": radius, "radius_text": text, "certified_accuracy": share})
        results[-1] |= {"slack": float(one.slack.max())}
    return {"clean_accuracy": clean, "results": results, "seconds": seconds, "notes": list(found[-1].notes)}


def _smoothed(victim: Victim, data: Dataset, spec: ThreatSpec, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Randomized smoothing; what is claimed is about the smoothed model."""
    from epsball.auditing.statistics import rate
    from epsball.certify import smooth

    clean, started = _clean(victim, data), time.perf_counter()
    found = smooth(victim, data.x, settings["sigma"], n=settings["draws"], alpha=settings["alpha"], seed=seed)
    right = found.prediction.cpu() == data.y
    results = [
        {
            "threat": spec.name,
            "radius": radius,
            "radius_text": text,
            "certified_accuracy": rate(int((right & (found.radius.cpu() >= radius)).sum()), len(data.x)).model_dump(),
        }
        for radius, text in zip(spec.radii, spec.texts, strict=True)
    ]
    notes = [
        f"Holds for the model that votes under noise of sigma {settings['sigma']:g}, not for the model alone; "
        f"each sample's claim is wrong with probability at most {settings['alpha']:g}.",
        f"{int((found.prediction < 0).sum())} of {len(data.x)} abstain; {int(right.sum())} are right without any change.",
    ]
    return {"clean_accuracy": clean, "results": results, "seconds": time.perf_counter() - started, "notes": notes, **settings}


def _clean(victim: Victim, data: Dataset) -> dict[str, Any]:
    from epsball.auditing.preflight import look
    from epsball.auditing.statistics import rate
    from epsball.core import Tally

    look(victim, data.x, data.y)  # a model that does not fit the data is told here, in one line
    output = victim.outputs(data.x.to(victim.device), Tally.zeros(len(data.x))).cpu()
    return rate(int((output.argmax(1) == data.y).sum()), len(data.x)).model_dump()


def _show(told: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def percent(rate: dict[str, Any]) -> list[str]:
        return [f"{100 * rate['value']:.1f} %", f"{100 * rate['low']:.1f} to {100 * rate['high']:.1f}"]

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("threat", "certified accuracy", "95 % interval"):
        grid.add_column(head, justify="left" if head == "threat" else "right")
    grid.add_row("clean", *percent(told["clean_accuracy"]), end_section=True)
    for row in told["results"]:
        grid.add_row(f"{row['threat']} {row['radius_text']}", *percent(row["certified_accuracy"]))
    console = Console()
    line: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
    console.print(f"{told['model']} on {told['data']}, n {told['n']}, method {told['method']}, {told['seconds']:.1f} s", **line)
    console.print(grid)
    for note in told["notes"]:
        console.print(note, **line)
