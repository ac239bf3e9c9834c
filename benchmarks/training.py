"""Robust training on MNIST at Linf 0.3, measured: python benchmarks/training.py --robust --alike --speed

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
from epsball.core import Key
from epsball.core.by_input import ByInput
from epsball.data import Dataset, load_data
from epsball.defenses import training as tr
from epsball.defenses.training.batch import generator
from epsball.defenses.training.watch import Record, by_clean
from epsball.threats import Linf
from nets import CACHE, mnist_file

RADIUS, SHAPE, CLASSES = 0.3, (1, 28, 28), 10
KEPT, RESULTS = CACHE / "training", Path(__file__).parent / "results"
Pair = tuple[Tensor, Tensor]
Epoch = Callable[[nn.Module, Pair], None]


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
    "two_steps": Recipe(lambda: tr.pgd(steps=2, share=0.6), 10),
    "atta": Recipe(tr.atta, 10, options={"average": 0.9985}),
    "n_fgsm": Recipe(lambda: tr.n_fgsm(noise=1.0, share=0.75), 10),
    "trades": Recipe(lambda: tr.trades(steps=7), 10),
    "pgd_long": Recipe(lambda: tr.pgd(steps=7), 30),
    "pgd_bf16": Recipe(lambda: tr.pgd(steps=7), 10, options={"half": True}),
    "two_steps_bf16": Recipe(lambda: tr.pgd(steps=2, share=0.6), 10, options={"half": True}),
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
    save_file(model.state_dict(), weights)
    facts.write_text(json.dumps(found))
    return model.eval(), found


def test(n: int, seed: int) -> Dataset:
    """Test images of the audit."""
    return load_data(str(mnist_file()), n=n, seed=seed)


def judged(group: str, recipes: dict[str, Recipe], seed: int, n: int | None) -> None:
    """Trains and audits each, on `n` test images or the recipe's own number; keeps what was found."""
    for name, recipe in recipes.items():
        count = n or recipe.n
        place = KEPT / f"{group}-{name}-{seed}-{count}.json"
        if place.exists():
            continue
        model, found = trained(group, name, recipe, seed)
        started = time.process_time()
        report = eb.audit({name: model}, test(count, 0), f"linf:{RADIUS}", effort=recipe.effort, seed=seed, out=KEPT / f"run-{name}")
        audited = report.models[0]
        result = audited.results[0]
        kept = {
            "name": name,
            "epochs": recipe.epochs,
            "rows": recipe.rows - 1000,
            "n": count,
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


# Seconds of an epoch against other libraries: PGD-7, batches of 128, Adam.

STEPS, SHARE, BATCH, RATE = 7, 0.25, 128, 1e-3


def madry() -> nn.Module:
    """The MNIST network of Madry et al. 2018: 3,274,634 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3136, 1024), nn.ReLU(), nn.Linear(1024, 10))


def ours(model: nn.Module, data: Pair, loss: tr.Loss | None = None, **options: Any) -> None:
    """One epoch of `fit`."""
    held = (data[0][:1], data[1][:1])
    course = tr.Course(epochs=1, batch=BATCH, rate=RATE, schedule=tr.constant, warmup=0.0, **{"average": 0.0, **options})
    tr.fit(model, loss or tr.pgd(STEPS, SHARE), data, held, tr.Against(Linf(), RADIUS), course)


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


def search(model: nn.Module, data: Pair) -> None:
    """The search of `fit`, without training."""
    threat, key = Linf().within((0.0, 1.0)), Key.of(0)
    radii = torch.full((BATCH,), RADIUS, dtype=torch.float64)
    for place, (x, y) in enumerate(zip(data[0].split(BATCH), data[1].split(BATCH), strict=True)):
        tr.pgd(STEPS, SHARE).search(model, x, y, tr.Batch(threat, radii, generator(key.fold(place))))


def search_by_hand(model: nn.Module, data: Pair) -> None:
    """The same steps as one would write them down."""
    model.eval()
    for x, y in zip(data[0].split(BATCH), data[1].split(BATCH), strict=True):
        z = (x + RADIUS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
        for _ in range(STEPS):
            z.requires_grad_()
            (gradient,) = torch.autograd.grad(functional.cross_entropy(model(z), y, reduction="sum"), z)
            z = z.detach() + SHARE * RADIUS * gradient.sign()
            z = (x + (z - x).clamp(-RADIUS, RADIUS)).clamp(0, 1)
    model.train()


def search_by_hand_by_input(model: nn.Module, data: Pair) -> None:
    """The same behind the very gradient that the search of `fit` takes."""
    with ByInput():
        search_by_hand(model, data)


def last(epoch: Epoch) -> Epoch:
    """With the weights in channels_last."""
    return lambda model, data: epoch(model.to(memory_format=torch.channels_last), data)


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "the small network": (lambda: tr.small(SHAPE, CLASSES), 2560),
    "Madry's": (madry, 640),
}
"""Networks of --speed, and images of an epoch."""
CONTENDERS: dict[str, Epoch] = {
    "epsball": ours,
    "epsball, averaged weights": lambda model, data: ours(model, data, average=0.9995),
    "epsball, channels last": last(ours),
    "epsball, atta (one step)": lambda model, data: ours(model, data, loss=tr.atta()),
    "epsball, bfloat16": lambda model, data: ours(model, data, half=True),
    "epsball, bfloat16, channels last": last(lambda model, data: ours(model, data, half=True)),
    "torchattacks": with_torchattacks,
    "torchattacks, channels last": last(with_torchattacks),
    "ART": with_art,
    "search alone": search,
    "search by hand": search_by_hand,
    "search by hand, our gradient": search_by_hand_by_input,
}


def speed(rounds: int) -> None:
    """CPU-seconds of an epoch, the contenders in turn; the first round warms up."""
    found: dict[str, dict[str, list[float]]] = {net: {name: [] for name in CONTENDERS} for net in NETS}
    for net, (make, count) in NETS.items():
        data = tuple(part[:count] for part in rows(60_000)[0])
        for turn in range(rounds + 1):
            for name, epoch in CONTENDERS.items():
                model = make()
                started = time.process_time()
                epoch(model, data)
                if turn:
                    found[net][name].append(time.process_time() - started)
                    say(f"{net}, {name}: {found[net][name][-1]:.2f} s")
    (KEPT / "speed.json").write_text(json.dumps(found))


# The page.


def percent(rate: list[float]) -> str:
    """86.0 [84.0, 88.0]."""
    return f"{100 * rate[0]:.1f} [{100 * rate[1]:.1f}, {100 * rate[2]:.1f}]"


def judged_table(group: str, order: list[str]) -> list[str]:
    """What the audits of a group found, with their flags."""
    found = [json.loads(path.read_text()) for path in KEPT.glob(f"{group}-*.json") if not path.name.endswith(".train.json")]
    found.sort(key=lambda one: (order.index(one["name"]), one["seed"], one["n"]))
    lines = [
        "| training | images, epochs | held out, PGD-10 | clean, test | robust, audited | n, effort, seed | CPU-min | audit, CPU-min |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        doubt = " †" if any(flag.startswith("block") for flag in one["flags"]) else ""
        cells = (
            one["name"],
            f"{one['rows']:,}, {one['epochs']}",
            f"{100 * one['held']:.1f}",
            percent(one["clean"]),
            percent(one["robust"]) + doubt,
            f"{one['n']:,}, {one['effort']}, {one['seed']}",
            f"{one['minutes']:.1f}",
            f"{one['audit_minutes']:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *(f"- {one['name']}: {flag}" for one in found for flag in one["flags"]), ""]


def cost_part(seed: int = 0) -> list[str]:
    """Held-out accuracy against CPU-minutes, a curve for each training of all of MNIST."""
    from epsball.reproduce import figures

    curves = []
    for name in ROBUST:
        place = KEPT / f"robust-{name}-{seed}.train.json"
        if place.exists():
            found = json.loads(place.read_text())
            shares = [record["step"] / found["history"][-1]["step"] for record in found["history"]]
            robust = [100 * record["robust"] for record in found["history"]]
            curves.append(figures.Curve(name, [found["minutes"] * share for share in shares], robust))
    told = "Held-out accuracy under ten steps of PGD against the CPU-minutes that the training has taken."
    drawn = figures.lines("Cost of robust training", told, curves, "CPU-minutes", "right under PGD-10, %")
    (RESULTS / "training-cost.svg").write_text(drawn, encoding="utf8")
    return [f"![{told}](training-cost.svg)", "", f"*{told}*", ""]


def speed_part() -> list[str]:
    """Medians and ratios, a table a network."""
    lines: list[str] = []
    for net, seconds in json.loads((KEPT / "speed.json").read_text()).items():
        lines += [f"{net[0].upper()}{net[1:]}, {NETS[net][1]:,} images:", ""]
        lines += ["| loop | CPU-s an epoch, median [least, most] | over torchattacks | over ART |", "|---|---|---|---|"]
        middle = {name: float(np.median(values)) for name, values in seconds.items()}
        for name, values in seconds.items():
            ratios = [f"{middle[name] / middle[other]:.2f}" for other in ("torchattacks", "ART")]
            if name.startswith("search"):
                ratios = ["", ""]
            lines.append(f"| {name} | {middle[name]:.2f} [{min(values):.2f}, {max(values):.2f}] | {' | '.join(ratios)} |")
        plain, same = (middle["search alone"] / middle[name] for name in ("search by hand", "search by hand, our gradient"))
        lines += ["", f"The search takes {plain:.2f} of the time of the loop by hand, and {same:.2f} where that has our gradient.", ""]
    return lines


def page() -> str:
    """All that has been measured so far."""
    text = ["# Robust training on MNIST, Linf 0.3", "", NETWORK, "", "## Trained on all of MNIST, audited", "", ROBUST_TOLD, ""]
    text += [*judged_table("robust", list(ROBUST)), *cost_part(), PILOTS]
    if (KEPT / "speed.json").exists():
        text += ["## Time of an epoch", "", SPEED_TOLD, "", *speed_part()]
    if list(KEPT.glob("alike-*.json")):
        text += ["## Methods trained alike, short", "", ALIKE_TOLD, "", *judged_table("alike", list(ALIKE))]
    return "\n".join(text).rstrip() + "\n"


NETWORK = (
    "One network for all: two 4x4 convolutions of stride 2 (16 and 32 channels) and linear layers 1568-100-10, 166,406 parameters "
    "(`epsball.defenses.training.small`). AdamW 3e-3, one cycle, batches of 128, averaged weights, the radius grows over the first fifth "
    "of the steps; 1,000 training images are held out and choose the epoch. x86_64, one thread, torch 2.13.0; CPU-minutes of the process, "
    "measuring on held-out images included."
)
ROBUST_TOLD = (
    "`python benchmarks/training.py --robust --seed 0`. `pgd`: 7 steps of a quarter of the radius; `two_steps`: PGD with 2 steps of 0.6 "
    "of the radius; `atta`: one step of 0.4 an epoch, from where the one before ended, weights averaged by 0.9985; `n_fgsm`: noise of 1 "
    "radius, then a step of 0.75; `trades`: beta 6, 7 steps; long: more epochs; bf16: computed in bfloat16. Robust accuracy of test images "
    "by `epsball.audit`, an upper bound on the true one, in percent with 95 % Clopper-Pearson intervals, which cover the choice of images "
    "only; one training a row. † marks what the audit itself does not trust. Training measures itself by ten steps of PGD (held out): no "
    "verdict. `pgd`, `trades`, `atta` and `pgd_bf16` were trained with the faster gradient of convolutions with one input channel, the "
    "others without it, and none yet with the other forms that are described below."
)
PILOTS = """The recipes were chosen by pilots: 10,000 training images, 10 epochs, PGD-10 on 500 held-out images, seed 0, one training each.

| pilot | rows a sample and step | PGD-10, held out |
|---|---|---|
| `n_fgsm`, noise 2, share 1 (the default) | 2 | 3.4 (29.2 at its best; alarm from epoch 7 on) |
| `n_fgsm`, noise 1, share 1 | 2 | 55.6 |
| `n_fgsm`, noise 1, share 0.75 | 2 | 61.6 |
| `n_fgsm`, noise 0.5, share 1 | 2 | 49.8 |
| `fast`, share 1.25 | 2 | 34.4 |
| `pgd`, 2 steps, share 0.6 | 3 | 77.4 |
| `pgd`, 3 steps, share 0.45 | 4 | 79.2 |
| `trades`, 7 steps, beta 2, 6 epochs | 10 | 70.0 |
| `trades`, 7 steps, beta 6, 6 epochs | 10 | 72.6 |

On all of MNIST, 1,000 held-out images, seed 0: `two_steps` with 6 epochs (weights averaged by 0.998) comes to 90.1, `atta` with 10 to 93.8
(93.5 as kept in float16, the row above), after 2 and 1 steps of search a visit.

N-FGSM with its default, noise of 2 radii, overfits catastrophically here on all of MNIST, too: PGD-10 on 1,000 held-out images 53.1 % after
epoch 2, 0.0 % after epoch 9. How FGSM training does it, step by step: [overfitting](../../docs/reproductions/overfitting.md).
"""
SPEED_TOLD = (
    "`python benchmarks/training.py --speed`, beside torchattacks 3.5.1 and adversarial-robustness-toolbox 1.20.1: PGD-7 with a random "
    "start, the same network, AdamW 1e-3, batches of 128, float32 but where said; four or five rounds in turn in one process after one "
    "that warms up, on a machine that had other work too. "
    "The loop of torchattacks is the plain one, ART's is AdversarialTrainer with ratio 1. `fit` without averaged weights is the like of "
    "theirs. Channels last: the weights of the model in that memory format. Search: the seven steps alone, on as many images.\n\n"
    "What makes the difference is the gradient by the image: where a convolution has a stride or one input channel, oneDNN takes 2 to 12 "
    "times as long for it as for the layer itself. The search asks for it as a convolution without a stride, or as a matrix product and a "
    "few sums, and has large linear layers computed by oneDNN, twice as fast as MKL here (`by_input.py`): the same sums in another order. "
    "`torch.compile` of the model, smaller batches within the search, packed weights, and a bfloat16 copy of the weights in the place of "
    "autocast were measured and gain nothing here."
)
ALIKE_TOLD = (
    "`python benchmarks/training.py --alike --seed 0`: 9,000 training images, 8 epochs, 7 steps of search each; 300 test images, effort "
    "fast. Short trainings of one small network: an order of methods under one audit, not their papers' figures. One training a row."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--robust", action="store_true")
    parser.add_argument("--alike", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--only", help="names of --robust or --alike, by commas")
    parser.add_argument("--n", type=int, help="test images of the audits")
    parser.add_argument("--rounds", type=int, default=5, help="of --speed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    KEPT.mkdir(parents=True, exist_ok=True)
    wanted = arguments.only.split(",") if arguments.only else None
    for group, recipes in (("robust", ROBUST), ("alike", ALIKE)):
        if getattr(arguments, group):
            judged(
                group, {name: recipe for name, recipe in recipes.items() if wanted is None or name in wanted}, arguments.seed, arguments.n
            )
    if arguments.speed:
        speed(arguments.rounds)
    (RESULTS / "training.md").write_text(page(), encoding="utf8")


if __name__ == "__main__":
    main()
