"""Robust training on MNIST at Linf 0.3, measured: python benchmarks/training.py --robust --overfitting --alike --speed

Needs EPSBALL_DATA (a folder with mnist/mnist.npz). Weights and raw results are kept in benchmarks/cache/training (not tracked), every
result is written to benchmarks/results/training.md as soon as it is there. `--speed` wants torchattacks and
adversarial-robustness-toolbox beside epsball. One thread; CPU-minutes are those of this process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import epsball as eb
from epsball.core import Tally, Victim
from epsball.data import Dataset, load_data
from epsball.defenses import training as tr
from epsball.defenses.training.inner import Search, clean
from epsball.defenses.training.pgd import at_adversarial
from epsball.defenses.training.watch import Record, by_clean, measure
from epsball.threats import Linf
from nets import CACHE, mnist_file

RADIUS, SHAPE, CLASSES = 0.3, (1, 28, 28), 10
KEPT, RESULTS = CACHE / "training", Path(__file__).parent / "results"
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """A training and its audit: rows of the training set (the last 1,000 held out), test images of the audit, its effort."""

    loss: Callable[[], tr.Loss]
    epochs: int
    rows: int = 60_000
    n: int = 1000
    effort: str = "default"
    options: dict[str, Any] = field(default_factory=dict)

    def course(self) -> tr.Course:
        """Adam 3e-3, one cycle, batches of 128, averaged weights, the radius grows over the first fifth."""
        return tr.Course(epochs=self.epochs, **self.options)


ROBUST = {
    "pgd": Recipe(lambda: tr.pgd(steps=7), 10),
    "n_fgsm": Recipe(tr.n_fgsm, 10),
    "trades": Recipe(lambda: tr.trades(steps=7), 10),
}
"""Trained on all of MNIST."""

SHORT: dict[str, Any] = {"epochs": 8, "rows": 10_000, "n": 300, "effort": "fast"}
ALIKE = {
    "standard": Recipe(tr.Standard, options={"merit": by_clean}, **SHORT),
    "pgd": Recipe(lambda: tr.pgd(steps=7), **SHORT),
    "trades": Recipe(lambda: tr.trades(steps=7), **SHORT),
    "iat": Recipe(lambda: tr.iat(steps=7), **SHORT),
    "avmixup": Recipe(lambda: tr.avmixup(steps=7), **SHORT),
}
"""Trained alike, for a comparison of methods."""


def rows(count: int) -> tuple[Pair, Pair]:
    """Training and held-out part of the first `count` training images in a fixed random order."""
    with np.load(mnist_file(), allow_pickle=False) as file:
        x, y = torch.from_numpy(file["x_train"]).float()[:, None] / 255, torch.from_numpy(file["y_train"]).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]
    kept, held = order[:-1000], order[-1000:]
    return (x[kept], y[kept]), (x[held], y[held])


def say(text: str) -> None:
    """One line, now."""
    print(text, flush=True)


@dataclass
class Told:
    """Prints every epoch."""

    name: str

    def __call__(self, step: int, steps: int, record: Record | None) -> None:
        """After a step."""
        if record is not None:
            say(f"{self.name}: epoch {record.epoch}, loss {record.loss:.3f}, clean {record.clean:.3f}, robust {record.robust:.3f}")


def trained(group: str, name: str, recipe: Recipe, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and what its training took; from the cache or trained now."""
    weights, facts = KEPT / f"{group}-{name}-{seed}.safetensors", KEPT / f"{group}-{name}-{seed}.train.json"
    model = tr.small(SHAPE, CLASSES, seed=seed)
    if weights.exists():
        model.load_state_dict(load_file(weights))
        return model.eval(), json.loads(facts.read_text())
    data, held = rows(recipe.rows)
    started = time.process_time()
    fitted = tr.fit(model, recipe.loss(), data, held, tr.Against(Linf(), RADIUS), recipe.course(), seed, progress=Told(f"{group} {name}"))
    found = {"minutes": (time.process_time() - started) / 60, "history": [asdict(record) for record in fitted.history]}
    KEPT.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), weights)
    facts.write_text(json.dumps(found))
    return model.eval(), found


def test(n: int, seed: int) -> Dataset:
    """Test images of the audit."""
    return load_data(str(mnist_file()), n=n, seed=seed)


def judged(group: str, recipes: dict[str, Recipe], seed: int) -> None:
    """Trains and audits each; keeps what was found."""
    for name, recipe in recipes.items():
        place = KEPT / f"{group}-{name}-{seed}.json"
        if place.exists():
            continue
        model, found = trained(group, name, recipe, seed)
        started = time.process_time()
        report = eb.audit({name: model}, test(recipe.n, seed), f"linf:{RADIUS}", effort=recipe.effort, seed=seed, out=KEPT / "run")
        audited = report.models[0]
        result = audited.results[0]
        kept = {
            "name": name,
            "epochs": recipe.epochs,
            "rows": recipe.rows - 1000,
            "n": recipe.n,
            "effort": recipe.effort,
            "seed": seed,
            "clean": [getattr(audited.clean_accuracy, part) for part in ("value", "low", "high")],
            "robust": [getattr(result.robust_accuracy, part) for part in ("value", "low", "high")],
            "held": max(record["robust"] for record in found["history"]),
            "minutes": found["minutes"],
            "audit_minutes": (time.process_time() - started) / 60,
            "flags": [f"{flag.severity}: {flag.message}" for flag in [*audited.flags, *result.flags]],
        }
        place.write_text(json.dumps(kept, indent=1))
        say(f"{group} {name}: {kept['robust']}, {kept['minutes']:.1f} CPU-minutes, audit {kept['audit_minutes']:.1f}")


# Catastrophic overfitting.


def fgsm_accuracy(model: nn.Module, held: Pair) -> float:
    """Share of samples that are right behind one step of FGSM at the whole radius."""
    with Victim(model, batch_size=512) as victim:
        outcome = eb.attacks.fgsm()(victim, *held, RADIUS)
        right = victim.outputs(outcome.x_adv, Tally.zeros(len(held[0]))).argmax(1) == held[1]
    return float(right.float().mean())


@dataclass
class Watched:
    """Held-out accuracy of the moving weights every `every` steps: none, FGSM, ten steps of PGD; and the alarms of the training."""

    model: nn.Module
    held: Pair
    every: int = 47
    points: list[tuple[int, float, float, float]] = field(default_factory=list)
    alarms: list[int] = field(default_factory=list)

    def __call__(self, step: int, steps: int, record: Record | None) -> None:
        """After a step."""
        if record is not None and record.collapsed:
            self.alarms.append(step)
        if step % self.every == 0 or record is not None:
            clean, robust = measure(self.model, *self.held, Linf(), RADIUS, (0.0, 1.0), 0)
            self.points.append((step, clean, fgsm_accuracy(self.model, self.held), robust))
        if record is not None:
            say(f"epoch {record.epoch}: {self.points[-1]}, averaged weights {record.robust:.3f}, collapsed {record.collapsed}")

    def happened(self) -> int | None:
        """First step where PGD accuracy is below half of its best so far, and FGSM accuracy no lower than it was there."""
        for at, (step, _, own, robust) in enumerate(self.points):
            best = max(self.points[: at + 1], key=lambda point: point[3])
            if best[3] > 0.05 and robust < 0.5 * best[3] and own >= best[2]:
                return step
        return None


def overfitting(seed: int, epochs: int = 8) -> None:
    """FGSM training without a random start at the whole radius, watched step by step."""
    data, held = rows(60_000)
    model = tr.small(SHAPE, CLASSES, seed=seed)
    watched, started = Watched(model, (held[0][:500], held[1][:500])), time.process_time()
    loss = tr.Adversarial(Search(1, 1.0, start=clean), at_adversarial)
    fitted = tr.fit(model, loss, data, held, tr.Against(Linf(), RADIUS), tr.Course(epochs=epochs), seed, progress=watched)
    found = {
        "points": watched.points,
        "alarms": watched.alarms,
        "step": watched.happened(),
        "per_epoch": fitted.history[0].step,
        "history": [asdict(record) for record in fitted.history],
        "seed": seed,
        "minutes": (time.process_time() - started) / 60,
    }
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / "overfitting.json").write_text(json.dumps(found))
    say(f"collapse at step {found['step']}, alarms at {found['alarms']}")


# Seconds of an epoch against other libraries: PGD-7, batches of 128, Adam.

STEPS, SHARE, BATCH, RATE = 7, 0.25, 128, 1e-3


def ours(model: nn.Module, data: Pair, **options: Any) -> None:
    """One epoch of `fit`."""
    held = (data[0][:1], data[1][:1])
    course = tr.Course(epochs=1, batch=BATCH, rate=RATE, schedule=tr.constant, warmup=0.0, **{"average": 0.0, **options})
    tr.fit(model, tr.pgd(STEPS, SHARE), data, held, tr.Against(Linf(), RADIUS), course)


def ours_averaged(model: nn.Module, data: Pair) -> None:
    """The same with averaged weights."""
    ours(model, data, average=0.9995)


def with_torchattacks(model: nn.Module, data: Pair) -> None:
    """One epoch of a plain loop around torchattacks.PGD."""
    import torchattacks

    attack = torchattacks.PGD(model, eps=RADIUS, alpha=SHARE * RADIUS, steps=STEPS, random_start=True)
    optimizer = tr.adam(model.parameters(), RATE, 5e-4)
    model.train()
    for chosen in torch.randperm(len(data[0]))[: len(data[0]) // BATCH * BATCH].split(BATCH):
        x, y = data[0][chosen], data[1][chosen]
        x_adv = attack(x, y)
        optimizer.zero_grad()
        functional.cross_entropy(model(x_adv), y).backward()
        optimizer.step()


def with_art(model: nn.Module, data: Pair) -> None:
    """One epoch of ART's AdversarialTrainer, all inputs adversarial."""
    from art.attacks.evasion import ProjectedGradientDescent
    from art.defences.trainer import AdversarialTrainer
    from art.estimators.classification import PyTorchClassifier

    optimizer = tr.adam(model.parameters(), RATE, 5e-4)
    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), SHAPE, CLASSES, optimizer, clip_values=(0.0, 1.0), device_type="cpu")
    attack = ProjectedGradientDescent(
        classifier, eps=RADIUS, eps_step=SHARE * RADIUS, max_iter=STEPS, num_random_init=1, batch_size=BATCH, verbose=False
    )
    AdversarialTrainer(classifier, attack, ratio=1.0).fit(data[0].numpy(), data[1].numpy(), batch_size=BATCH, nb_epochs=1)


CONTENDERS = {"epsball": ours, "epsball, averaged weights": ours_averaged, "torchattacks": with_torchattacks, "ART": with_art}


def speed(count: int, rounds: int) -> None:
    """CPU-seconds of an epoch of `count` images, the contenders in turn; the first round warms up."""
    data, seconds = (part[:count] for part in rows(60_000)[0]), {name: [] for name in CONTENDERS}
    chosen = tuple(data)
    for turn in range(rounds + 1):
        for name, epoch in CONTENDERS.items():
            model = tr.small(SHAPE, CLASSES)
            started = time.process_time()
            epoch(model, chosen)
            if turn:
                seconds[name].append(time.process_time() - started)
                say(f"{name}: {seconds[name][-1]:.2f} s")
    (KEPT / "speed.json").write_text(json.dumps({"count": count, "rounds": rounds, "seconds": seconds}))


# The page.


def percent(rate: list[float]) -> str:
    """86.0 [84.0, 88.0]."""
    return f"{100 * rate[0]:.1f} [{100 * rate[1]:.1f}, {100 * rate[2]:.1f}]"


def judged_table(group: str) -> list[str]:
    """What the audits of a group found, with their flags."""
    found = [json.loads(path.read_text()) for path in sorted(KEPT.glob(f"{group}-*-*.json")) if not path.name.endswith(".train.json")]
    lines = [
        "| training | images, epochs | held out, PGD-10 | clean, test | robust, audited | n, effort, seed | CPU-min | audit, CPU-min |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        lines.append(
            f"| {one['name']} | {one['rows']:,}, {one['epochs']} | {100 * one['held']:.1f} | {percent(one['clean'])} | "
            f"{percent(one['robust'])} | {one['n']:,}, {one['effort']}, {one['seed']} | {one['minutes']:.1f} | {one['audit_minutes']:.1f} |"
        )
    return [*lines, "", *(f"- {one['name']}: {flag}" for one in found for flag in one["flags"]), ""]


def overfitting_part() -> list[str]:
    """Accuracy by epoch, the step of the collapse, and the figure."""
    from epsball.reproduce import figures

    found = json.loads((KEPT / "overfitting.json").read_text())
    ends = {record["step"]: record for record in found["history"]}
    lines = [
        "| epoch | clean | FGSM | PGD-10 | averaged weights, PGD-10 | training's own attacks | alarm |",
        "|---|---|---|---|---|---|---|",
    ]
    for step, plain, own, robust in found["points"]:
        if step in ends:
            record = ends[step]
            lines.append(
                f"| {record['epoch']} | {100 * plain:.1f} | {100 * own:.1f} | {100 * robust:.1f} | {100 * record['robust']:.1f} | "
                f"{100 * record['means']['adversarial']:.1f} | {'yes' if record['collapsed'] else ''} |"
            )
    steps = [point[0] for point in found["points"]]
    names = ("clean", "FGSM", "PGD-10")
    curves = [figures.Curve(name, steps, [100 * point[i + 1] for point in found["points"]]) for i, name in enumerate(names)]
    marks = [step for step in [found["step"], *found["alarms"][:1]] if step is not None]
    told = "Held-out accuracy while FGSM training without a random start runs at Linf 0.3."
    drawn = figures.lines("Catastrophic overfitting", told, curves, "step", "right, %", marks)
    (RESULTS / "training-overfitting.svg").write_text(drawn, encoding="utf8")
    return [*lines, "", f"![{told}](training-overfitting.svg)", ""]


def speed_part() -> list[str]:
    """Medians and ratios."""
    found = json.loads((KEPT / "speed.json").read_text())
    middle = {name: float(np.median(values)) for name, values in found["seconds"].items()}
    lines = ["| loop | CPU-s an epoch, median [least, most] | epsball over it |", "|---|---|---|"]
    for name, values in found["seconds"].items():
        lines.append(f"| {name} | {middle[name]:.2f} [{min(values):.2f}, {max(values):.2f}] | {middle['epsball'] / middle[name]:.2f} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--robust", action="store_true")
    parser.add_argument("--alike", action="store_true")
    parser.add_argument("--overfitting", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--only", help="names of --robust or --alike, by commas")
    parser.add_argument("--count", type=int, default=2560, help="images of --speed")
    parser.add_argument("--rounds", type=int, default=5, help="of --speed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = arguments.only.split(",") if arguments.only else None
    for group, recipes in (("robust", ROBUST), ("alike", ALIKE)):
        if getattr(arguments, group):
            judged(group, {name: recipe for name, recipe in recipes.items() if wanted is None or name in wanted}, arguments.seed)
    if arguments.overfitting:
        overfitting(arguments.seed)
    if arguments.speed:
        speed(arguments.count, arguments.rounds)


if __name__ == "__main__":
    main()
