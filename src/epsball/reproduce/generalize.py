"""Szegedy et al. 2014, arXiv 1312.6199, section 4.2: adversarial examples of one network fool others, noise of equal length does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epsball.attacks import fgsm, lbfgs
from epsball.core import Key, Targeted, Victim, content_ids
from epsball.core.rows import per_sample
from epsball.core.rule import normalized
from epsball.data import Dataset
from epsball.reproduce import figures, nets
from epsball.reproduce.base import NOT_READ, Figure, Finding, Line, Setting, experiment, mean_of, percent_of

PAPER = "Szegedy et al. 2014, arXiv 1312.6199, tables 1 to 4"
SOURCE = "The paper's figures are as a public summary quotes them (tables 1 to 4, in part); the paper itself was not at hand."
FGSM_RADIUS = 0.1

# Table 1: average smallest distortion, sqrt(sum (x' - x)^2 / 784).
DISTORTION = {"FC10(1e-4)": "0.062", "FC10(1e-2)": "0.1", "FC10(1)": "0.14", "FC100-100-10": "0.058", "FC200-200-10": "0.065"}
# Table 2: errors of the column's network on examples made for the row's.
TRANSFER = {
    ("FC10(1e-4)", "FC100-100-10"): "2 %",
    ("FC10(1e-2)", "FC10(1e-4)"): "87.1 %",
    ("FC10(1e-2)", "FC100-100-10"): "35.9 %",
    ("FC10(1)", "FC10(1e-4)"): "71.9 %",
    ("FC10(1)", "FC100-100-10"): "48.1 %",
    ("FC100-100-10", "FC10(1e-4)"): "28.9 %",
    ("FC200-200-10", "FC10(1e-4)"): "38.2 %",
    ("FC200-200-10", "FC100-100-10"): "20.3 %",
}
NOISE = {(0.1, "FC10(1e-4)"): "5.0 %", (0.1, "FC100-100-10"): "0 %", (0.3, "FC10(1e-4)"): "15.6 %", (0.3, "FC100-100-10"): "5 %"}


@dataclass(frozen=True)
class Made:
    """Examples that were made for one network: x_adv (N, ...), and for which samples they reached their goal (N,)."""

    x_adv: Tensor
    reached: Tensor
    size: Tensor


Nets = Mapping[str, nn.Module]


def _sigmoid(*hidden: int) -> Callable[[], nn.Module]:
    return lambda: nets.mlp(*hidden, activation=nn.Sigmoid)


def _networks(data: Dataset, setting: Setting) -> dict[str, nn.Module]:
    """Those of table 1 but the autoencoder, and a convolutional one."""

    def fit(name: str, build: Callable[[], nn.Module], decay: float, epochs: int) -> nn.Module:
        return nets.fitted(name, build, data, setting, epochs, decay=decay, rate=3e-3)

    return {
        "FC10(1e-4)": fit("fc10-1e-4", nets.softmax, 1e-4, 8),
        "FC10(1e-2)": fit("fc10-1e-2", nets.softmax, 1e-2, 8),
        "FC10(1)": fit("fc10-1", nets.softmax, 1.0, 8),
        "FC100-100-10": fit("fc100-100-10", _sigmoid(100, 100), 1e-5, 15),
        "FC200-200-10": fit("fc200-200-10", _sigmoid(200, 200), 1e-5, 15),
        "CNN": fit("cnn", nets.cnn, 0.0, 3),
    }


@experiment("generalize", title="Examples of one network fool others, MNIST", paper=PAPER, minutes=9)
def generalize(setting: Setting) -> Finding:
    """Tables 1 and 2 (other networks), tables 3 and 4 (other training data), and FGSM examples beside those of L-BFGS."""
    data = nets.mnist(setting, setting.count(500, quick=8))
    found = _networks(data.train, setting)
    made = {name: smallest(net, data.test, setting) for name, net in found.items()}
    stepped = {name: one_step(net, data.test) for name, net in found.items()}
    named = list(found)
    controls = {
        "noise, same length": same_length(data.test.x, made["FC100-100-10"], setting),
        "noise, stddev 0.1": gaussian(data.test.x, 0.1, setting),
        "noise, stddev 0.3": gaussian(data.test.x, 0.3, setting),
    }
    cross = {(a, b): fooled(found[b], data.test, made[a]) for a in named for b in named}
    fast = {(a, b): fooled(found[b], data.test, stepped[a]) for a in named for b in named}
    noise = {(a, b): fooled(found[b], data.test, controls[a]) for a in controls for b in named}
    halves = _halves(data, setting)
    lines = (*_distortions(made, data.test), *_transfers(cross, noise, fast, named), *halves.lines)
    notes = (
        SOURCE,
        "A rate counts the samples that the second network classified right before, among those for which the first has an example.",
        "The target class is any other, drawn for each sample; images are test images, the paper's are training images.",
        "Noise is not clipped, so that its length is what it says. The autoencoder AE400-10 is left out.",
    )
    return Finding(lines, (*_maps(cross | noise, fast, named, list(controls)), *halves.figures), notes)


def smallest(net: nn.Module, data: Dataset, setting: Setting) -> Made:
    """L-BFGS towards a class drawn for each sample."""
    setting.say("L-BFGS on one more network")
    draw = Key.of(setting.seed).fold("target").uniform(content_ids(data.x), data.x.flatten(1)[:, :1]).squeeze(1)
    others = nets.answers(net, data.x[:1]).shape[1] - 1
    goal = Targeted((data.y + 1 + (others * draw).long().clamp(max=others - 1)) % (others + 1))
    outcome = lbfgs()(Victim(net), data.x, goal, math.inf, setting.seed)
    return Made(outcome.x_adv, outcome.reached & (outcome.size > 0), outcome.size)


def one_step(net: nn.Module, data: Dataset) -> Made:
    """FGSM, clipped to the box; samples that were wrong before are no examples."""
    outcome = fgsm()(Victim(net), data.x, data.y, FGSM_RADIUS)
    return Made(outcome.x_adv, outcome.reached & (outcome.size > 0), outcome.size)


def same_length(x: Tensor, made: Made, setting: Setting) -> Made:
    """Gaussian noise of the length of each sample's own perturbation."""
    way = normalized(Key.of(setting.seed).fold("control").normal(content_ids(x), x), 2)
    return Made(x + per_sample(made.size, x) * way, made.reached, made.size)


def gaussian(x: Tensor, stddev: float, setting: Setting) -> Made:
    """Gaussian noise of one standard deviation."""
    noise = stddev * Key.of(setting.seed).fold("gaussian").normal(content_ids(x), x)
    return Made(x + noise, torch.ones(len(x), dtype=torch.bool), noise.flatten(1).double().norm(dim=1))


def amplified(x: Tensor, made: Made, stddev: float) -> Made:
    """The same directions, every one of root mean square `stddev`."""
    length = stddev * math.sqrt(x[0].numel())
    return Made(x + length * normalized(made.x_adv - x, 2), made.reached, torch.full_like(made.size, length))


def fooled(net: nn.Module, data: Dataset, made: Made) -> tuple[int, int]:
    """(wrong now, all) of the samples that have an example and that the network classified right before."""
    counted = made.reached & (nets.answers(net, data.x).argmax(1) == data.y)
    wrong = counted & (nets.answers(net, made.x_adv).argmax(1) != data.y)
    return int(wrong.sum()), int(counted.sum())


Rates = Mapping[tuple[str, str], tuple[int, int]]


def _rms(made: Made, data: Dataset) -> str:
    return mean_of((made.size[made.reached] / math.sqrt(data.x[0].numel())).tolist(), 3)


def _distortions(made: Mapping[str, Made], data: Dataset) -> tuple[Line, ...]:
    why = "Adam and our own schedule instead of L-BFGS training; the distortion hangs on the weights' size"
    return tuple(
        Line(f"average distortion of L-BFGS on {name}", DISTORTION.get(name, "not in the paper"), _rms(one, data), why)
        for name, one in made.items()
    )


def _transfers(cross: Rates, noise: Rates, fast: Rates, named: Sequence[str]) -> tuple[Line, ...]:
    other = "smallest distortions lie just behind the source's boundary, and how far others see them hangs on both trainings"
    lines = [Line(f"L-BFGS, {a} -> {b}", TRANSFER[a, b], percent_of(*cross[a, b]), other) for a, b in TRANSFER]
    lines += [
        Line(
            f"noise of stddev {dev:g} -> {b}", paper, percent_of(*noise[f"noise, stddev {dev:g}", b]), "errors of test images right before"
        )
        for (dev, b), paper in NOISE.items()
    ]
    control = "the control that the paper's claim needs: as long as the L-BFGS change of FC100-100-10, in a random direction"
    lines += [
        Line(f"noise of equal length -> {b}", "not reported", percent_of(*noise["noise, same length", b]), control)
        for b in ("FC100-100-10", "FC10(1e-4)")
    ]
    pairs = [(a, b) for a in named for b in named if a != b]
    told = f"all ordered pairs of {len(named)} networks together"
    lines.append(Line("L-BFGS examples, other networks", NOT_READ, percent_of(*_together(cross, pairs)), told))
    lines.append(Line(f"FGSM examples at Linf {FGSM_RADIUS:g}, other networks", NOT_READ, percent_of(*_together(fast, pairs)), told))
    return tuple(lines)


def _together(rates: Rates, pairs: Sequence[tuple[str, str]]) -> tuple[int, int]:
    return sum(rates[pair][0] for pair in pairs), sum(rates[pair][1] for pair in pairs)


def _maps(cross: Rates, fast: Rates, named: Sequence[str], controls: Sequence[str]) -> tuple[Figure, ...]:
    return (
        Figure(
            "lbfgs",
            heat_map("L-BFGS examples", cross, [*named, *controls], named),
            "Errors in percent of the column's network on L-BFGS examples of the row's, and on noise: of samples right before.",
        ),
        Figure(
            "fgsm",
            heat_map("FGSM examples", fast, named, named),
            f"The same for FGSM examples at Linf {FGSM_RADIUS:g}, clipped to the box, that fooled the row's network.",
        ),
    )


def heat_map(title: str, rates: Rates, rows: Sequence[str], columns: Sequence[str]) -> str:
    """Rates in percent, rows made for, columns fed to."""
    values = [[rates[a, b][0] / rates[a, b][1] if rates[a, b][1] else math.nan for b in columns] for a in rows]
    return figures.matrix(
        title, "Rows: made for. Columns: fed to. Error rates in percent.", rows, columns, values, corner="made for / fed to"
    )


# Tables 3 and 4: networks that have not seen the same data.


def _halves(data: nets.Data, setting: Setting) -> Finding:
    """FC100-100-10 and FC123-456-10 learn one half of the training set, FC100-100-10' the other."""
    first, second = nets.halves(data.train, setting)
    found: Nets = {
        "FC100-100-10": nets.fitted("half1-100", _sigmoid(100, 100), first, setting, 20, decay=1e-5, rate=3e-3),
        "FC123-456-10": nets.fitted("half1-123", _sigmoid(123, 456), first, setting, 20, decay=1e-5, rate=3e-3),
        "FC100-100-10'": nets.fitted("half2-100", _sigmoid(100, 100), second, setting, 20, decay=1e-5, rate=3e-3),
    }
    made = {name: smallest(net, data.test, setting) for name, net in found.items()}
    louder = {name: amplified(data.test.x, one, 0.1) for name, one in made.items()}
    noise = gaussian(data.test.x, 0.1, setting)
    plain = {(a, b): fooled(found[b], data.test, made[a]) for a in found for b in found}
    loud = {(a, b): fooled(found[b], data.test, louder[a]) for a in found for b in found}
    loud |= {("noise", b): fooled(found[b], data.test, noise) for b in found}
    other = "as above; the halves are drawn by the seed"
    lines = [
        Line("halves: L-BFGS, other network, same half", "26.2 %", percent_of(*plain["FC100-100-10", "FC123-456-10"]), other),
        Line("halves: L-BFGS, same network, other half", "5.9 %", percent_of(*plain["FC100-100-10", "FC100-100-10'"]), other),
        Line("halves: amplified to stddev 0.1, other network", "98 %", percent_of(*loud["FC100-100-10", "FC123-456-10"]), other),
        Line("halves: amplified to stddev 0.1, other half", "43 %", percent_of(*loud["FC100-100-10", "FC100-100-10'"]), other),
        Line("halves: noise of stddev 0.1", "2.6 to 2.8 %", percent_of(*_together(loud, [("noise", b) for b in found])), other),
    ]
    pictures = (
        Figure("halves", heat_map("L-BFGS examples, halves", plain, list(found), list(found)), "Networks of disjoint training halves (')."),
        Figure(
            "amplified",
            heat_map("Amplified examples, halves", loud, [*found, "noise"], list(found)),
            "The same examples scaled to a standard deviation of 0.1, and noise of that size.",
        ),
    )
    return Finding(tuple(lines), pictures)
