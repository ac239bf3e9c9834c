"""Goodfellow, Shlens & Szegedy 2015, arXiv 1412.6572, section 6: adversarial training of maxout networks, and what its figure was worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from epsball.attacks import fgsm
from epsball.auditing.results import ModelReport
from epsball.core import Victim
from epsball.data import Dataset
from epsball.defenses.training import Against, Course, Record, checkpoint, fgsm_mix, pgd
from epsball.report.text import percent
from epsball.reproduce import figures, nets, robust
from epsball.reproduce.base import NOT_READ, Figure, Finding, Line, Setting, experiment, percent_of
from epsball.reproduce.fgsm import EVERYWHERE, OVER, PAPER, SOURCE, Broken, fitted_maxout, step
from epsball.threats import Linf

RADIUS, HELD, AUDITED = 0.25, 1000, 1000
LOCAL = 100
"""A filter whose weight no more of the 784 pixels share is local; see `spread`."""
UNITS, LARGE, DROP = 240, 400, (0.1, 0.25)
EPOCHS, LARGE_EPOCHS, PGD_EPOCHS = 20, 6, 8
STANDARD, MIXED, LARGER, SEARCHED = "standard", "FGSM mix", f"FGSM mix, {LARGE} units", "PGD, 2 steps"
PAPERS: dict[str, tuple[str, str, str]] = {
    STANDARD: ("0.94 %", "89.4 %", "97.6 %"),
    MIXED: (NOT_READ, "17.9 %", "81.4 %"),
    LARGER: ("0.782 %", NOT_READ, NOT_READ),
}
"""Training -> error, error behind the step, mean confidence of the errors: the paper's."""
BEST = "best.safetensors"


@dataclass
class Stopper:
    """Keeps the weights whose error behind FGSM on held-out samples is the smallest; looks after every epoch. The paper's early stopping.

    The file holds the best so far, so that a training that goes on after a stop goes on here, too.
    """

    model: nn.Module
    held: Dataset
    against: Against
    path: Path
    best: float = float("inf")

    def __post_init__(self) -> None:
        if self.path.exists():
            self.best = checkpoint.load(self.path)[1]["error"]

    def __call__(self, step: int, steps: int, record: Record | None) -> None:
        """After a step."""
        if record is None:
            return
        victim = Victim(self.model, box=self.against.box, batch_size=1000)
        moved = fgsm()(victim, self.held.x, self.held.y, self.against.radius).x_adv
        error = float((nets.answers(self.model, moved).argmax(1) != self.held.y).double().mean())
        if error < self.best:
            self.best = error
            checkpoint.save(self.path, self.model.state_dict(), {"error": error, "epoch": record.epoch})


def last(record: Record) -> tuple[float, float]:
    """Later weights are better: which ones are kept is the stopper's business."""
    return record.epoch, 0.0


def mixed(units: int, epochs: int, data: Dataset, held: Dataset, setting: Setting) -> nn.Module:
    """Half clean loss, half behind a step of FGSM that is not clipped; the epoch with the least error behind FGSM on held-out images."""
    against, name = Against(Linf(), RADIUS, EVERYWHERE), f"maxout-fgsm-{units}"
    course, places = Course(epochs=epochs, rate=2e-3, average=0.0, merit=last), []

    def watch(net: nn.Module, folder: Path) -> Stopper:
        places.append(folder / BEST)
        return Stopper(net, held, against, folder / BEST)

    fitted = robust.trained(name, lambda: nets.maxout(units, drop=DROP), fgsm_mix(), data, held, against, course, setting, watch)
    fitted.model.load_state_dict(checkpoint.load(places[0])[0])
    return fitted.model


def searched(data: Dataset, held: Dataset, setting: Setting) -> nn.Module:
    """The same network behind two steps of PGD from a random start; the epoch that stands best under PGD-10."""
    against, course = Against(Linf(), RADIUS), Course(epochs=PGD_EPOCHS, rate=2e-3)
    return robust.trained("maxout-pgd", lambda: nets.maxout(drop=DROP), pgd(steps=2, share=0.6), data, held, against, course, setting).model


def first_layer(net: nn.Module) -> Tensor:
    """(units, pieces, H, W): weights of the first maxout layer of MNIST's networks."""
    layer = next(part for part in net.modules() if isinstance(part, nets.Maxout))
    return layer.linear.weight.detach().view(-1, layer.pieces, 28, 28)


def spread(filters: Tensor) -> Tensor:
    """(sum w^2)^2 / sum w^4 for every filter (..., H, W): how many pixels share its weight; 1 for a single one, all for equal ones."""
    squares = filters.flatten(-2).square()
    return squares.sum(-1).square() / squares.square().sum(-1)


def _lines(name: str, net: nn.Module, free: Broken, found: ModelReport, test: Dataset) -> tuple[Line, ...]:
    """Error as it is, behind the step with and without clipping, under audit; and how many filters are local."""
    paper, none = PAPERS.get(name, (NOT_READ,) * 3), "not reported"
    right, n = nets.accuracy(net, test)
    boxed, pixels = step(net, test, RADIUS, (0.0, 1.0)), spread(first_layer(net)).flatten()
    size = f"ours has {LARGE} units and {LARGE_EPOCHS} epochs, the paper's 1,600 units" if name == LARGER else ""
    return (
        Line(f"{name}: error before", paper[0], percent_of(n - right, n), size),
        Line(f"{name}: error at Linf 0.25, one step, not clipped", paper[1], free.error()),
        Line(f"{name}: mean confidence in the wrong class, not clipped", paper[2], free.sure(), OVER),
        Line(f"{name}: error at Linf 0.25, one step, clipped to [0, 1]", none, boxed.error()),
        Line(f"{name}: error at Linf 0.25, audited", none, robust.error(found.results[0].robust_accuracy), robust.flags(found)),
        Line(
            f"{name}: first-layer filters whose weight {LOCAL} pixels or fewer share",
            "localized" if name == MIXED else NOT_READ,
            percent_of(int((pixels <= LOCAL).sum()), len(pixels)),
            "the paper shows pictures and gives no figure" if name == MIXED else "",
        ),
    )


def _picture(trained: dict[str, nn.Module]) -> Figure:
    """The filters of the largest norm; grey is 0."""
    grid, names = [], []
    for name in (STANDARD, MIXED, SEARCHED):
        filters = first_layer(trained[name]).flatten(0, 1)
        chosen = filters[filters.flatten(1).norm(dim=1).argsort(descending=True)[:24]]
        tiles = [figures.Tile((0.5 + 0.5 * w / w.abs().amax().clamp(min=1e-12)).numpy()) for w in chosen]
        grid += [tiles[:12], tiles[12:]]
        names += [name, ""]
    told = "The 24 first-layer filters of the largest norm of three maxout networks; grey is 0, each has a scale of its own."
    return Figure("filters", figures.images("First-layer filters", told, grid, side=52.0, names=names), told)


@experiment("maxout-training", title="Adversarially trained maxout networks, MNIST, Linf 0.25", paper=PAPER, minutes=35)
def maxout_training(setting: Setting) -> Finding:
    """Section 6: an error of 89.4 % behind one step falls to 17.9 %; and what stands under an audit."""
    data = nets.mnist(setting, 10_000)
    few = nets.mnist(setting, setting.count(AUDITED, quick=20)).test
    train, held = robust.split(data.train, HELD, setting)
    builds: dict[str, Callable[[], nn.Module]] = {
        STANDARD: lambda: fitted_maxout(setting, data),
        MIXED: lambda: mixed(UNITS, EPOCHS, train, held, setting),
        LARGER: lambda: mixed(LARGE, LARGE_EPOCHS, train, held, setting),
        SEARCHED: lambda: searched(train, held, setting),
    }
    trained: dict[str, nn.Module] = {}
    lines: list[Line] = []
    worth: list[str] = []
    for name, build in builds.items():
        trained[name] = net = build()
        free, found = step(net, data.test, RADIUS, EVERYWHERE), robust.audited(net, few, f"linf:{RADIUS}", "default", setting)
        lines += _lines(name, net, free, found, data.test)
        alone, audited = float(free.wrong.double().mean()), 1 - found.results[0].robust_accuracy.value
        worth.append(f"{name} {percent(alone)} behind one step and {percent(audited)} under the audit")
    notes = (
        f"What the error behind one step is worth: {'; '.join(worth)}.",
        SOURCE,
        f"{UNITS} units of 5 pieces in two layers; {STANDARD}: as in fgsm-maxout. The others: dropout {DROP[0]:g} on the input and "
        f"{DROP[1]:g} behind layers, AdamW 2e-3, one cycle, batches of 128; {EPOCHS} epochs, {LARGE_EPOCHS} of the larger, {PGD_EPOCHS} of "
        f"PGD. The step of the FGSM mix is not clipped, as in the paper; {HELD:,} training images are held out, and the epoch with the "
        "least error behind FGSM on them is kept. How many pixels share the weight of a filter: (sum w^2)^2 / sum w^4. The largest "
        "filters of the FGSM mix weigh the border, which is blank in clean images and where a step that is not clipped writes.",
        f"Audited: `epsball.audit`, effort default, n = {len(few.x):,}, inputs in [0, 1]; its error is a lower bound on the true one.",
    )
    return Finding(tuple(lines), (_picture(trained),), notes)
