"""Madry et al. 2018, arXiv 1706.06083, appendix A: the loss around an image, and where PGD ends from many starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.attacks import fgsm, pgd
from epsball.core import Attack, Key, Untargeted, Victim, content_ids
from epsball.core.attack import pose
from epsball.data import Dataset
from epsball.reproduce import figures, nets
from epsball.reproduce.base import Figure, Finding, Line, Setting, experiment, mean_of, percent_of

PAPER = "Madry et al. 2018, arXiv 1706.06083, appendix A, figures 3 and 4"
RADIUS, STEP = 0.3, 0.01
SOURCE = "The paper's figures give no numbers; its statements are taken from a transcript of the ICLR version."
NONE = "not reported"


@dataclass(frozen=True)
class Climb:
    """Losses (S + 1, R, N) at 0 .. S steps of PGD from R starts, and where it began and ended (R, N, ...)."""

    losses: Tensor
    starts: Tensor
    ends: Tensor

    def final(self) -> Tensor:
        """(R, N)."""
        return self.losses[-1]


@experiment("loss-surface", title="The loss around an image and many PGD runs, MNIST", paper=PAPER, minutes=18)
def loss_surface(setting: Setting) -> Finding:
    """A normal and an adversarially trained small network: surfaces, trajectories and final losses of PGD from many starts."""
    data = nets.mnist(setting, setting.count(100, quick=3))
    restarts, steps = (3, 6) if setting.quick else (20, 100)
    found = {
        "normal": nets.fitted("surface-normal", nets.cnn, data.train, setting, 3, rate=3e-3),
        "adversarial": nets.fitted("surface-robust", nets.cnn, data.train, setting, 8, rate=3e-3, radius=RADIUS),
    }
    climbs = {}
    for name, net in found.items():
        setting.say(f"PGD on the {name} network: {restarts} starts of {len(data.test.x)} images, {steps} steps")
        climbs[name] = climb(net, data.test, restarts, steps, setting.seed)
    lines = [line for name, net in found.items() for line in _told(name, net, data.test, climbs[name])]
    notes = (
        SOURCE,
        f"Linf {RADIUS:g}, steps of {STEP:g} from uniform starts, {steps} steps, {restarts} starts for each of {len(data.test.x)} images.",
        "The paper runs 20 starts for its trajectories and 1e5 starts on five images for its histograms.",
        "Intervals of means over images; the starts of one image are averaged first.",
    )
    return Finding((*lines, _ratio(climbs)), _pictures(found, climbs, data.test, setting), notes)


def climb(net: nn.Module, data: Dataset, restarts: int, steps: int, seed: int) -> Climb:
    """PGD from several starts, every iterate seen: the strategy of `pgd`, step by step, without dropping."""
    attack = pgd(steps=steps, step=STEP)
    assert isinstance(attack, Attack)
    losses, starts, ends = [], [], []
    with Victim(net) as victim, torch.no_grad():
        for number in range(restarts):
            key = Key.of(seed).fold("start", number, attack.name)  # that of the attack itself under the key ("start", number)
            problem = pose(attack, victim, data.x, Untargeted(data.y), RADIUS, key, None)
            state, seen = attack.strategy.init(problem, steps), []
            starts.append(state.z)
            for _ in range(steps + 1):
                reading, state = attack.strategy.step(problem, state)
                seen.append(reading.score)
            losses.append(torch.stack(seen))
            ends.append(reading.x_adv)
    return Climb(torch.stack(losses, 1), torch.stack(starts), torch.stack(ends))


def _told(name: str, net: nn.Module, data: Dataset, run: Climb) -> tuple[Line, ...]:
    right, n = nets.accuracy(net, data)
    wrong = torch.stack([nets.answers(net, end).argmax(1) != data.y for end in run.ends]).any(0)
    final, early = run.final(), run.losses[len(run.losses) // 2]
    spread = final.std(0) / final.mean(0).clamp(min=1e-6)
    widest = (final.amax(0) - final.mean(0)) / final.std(0).clamp(min=1e-6)
    near = "one small network each; where a loss is nearly 0, as on the robust one, the ratio says little; the paper shows plots"
    slow = f"steps of {STEP:g} take {2 * RADIUS / STEP:.0f} to cross the ball"
    boxed = "inside the box a black pixel can only become lighter, so that even random starts are nearer than 90; ends are nearer still"
    return (
        Line(f"{name}: accuracy, clean", NONE, percent_of(right, n)),
        Line(f"{name}: wrong from at least one start", NONE, percent_of(int(wrong.sum()), n)),
        Line(f"{name}: loss at the start", NONE, mean_of(run.losses[0].mean(0).tolist(), 2)),
        Line(f"{name}: final loss", NONE, mean_of(final.mean(0).tolist(), 2)),
        Line(f"{name}: share of it after half of the steps", "plateaus rapidly", _share(early, final), slow),
        Line(
            f"{name}: spread of an image's final losses, stddev / mean", "well concentrated", mean_of(spread.tolist(), 1, " %", 100), near
        ),
        Line(f"{name}: largest of them, in stddev above the mean", "no extreme outliers", mean_of(widest.tolist(), 2), near),
        Line(f"{name}: angle between two starts, degrees", NONE, mean_of(angles(run.starts - data.x).tolist(), 1)),
        Line(f"{name}: angle between two ends, degrees", "close to 90", mean_of(angles(run.ends - data.x).tolist(), 1), boxed),
    )


def _share(early: Tensor, final: Tensor) -> str:
    return mean_of((early.mean(0) / final.mean(0).clamp(min=1e-6)).tolist(), 1, " %", 100)


def angles(changes: Tensor) -> Tensor:
    """(N,): mean angle in degrees between all pairs of R changes (R, N, ...)."""
    flat = F.normalize(changes.flatten(2).double(), dim=2)
    cosines = torch.einsum("rnf,snf->nrs", flat, flat)
    first, second = torch.triu_indices(len(changes), len(changes), 1)
    return torch.rad2deg(cosines[:, first, second].clamp(-1, 1).acos()).mean(1)


def _ratio(climbs: Mapping[str, Climb]) -> Line:
    normal, robust = (climbs[name].final().mean(0) for name in ("normal", "adversarial"))
    share = int((robust < normal).sum())
    why = "the same images and starts on both networks"
    return Line("images whose final loss is smaller adversarially trained", "significantly smaller", percent_of(share, len(normal)), why)


# Pictures.


def plane(net: nn.Module, x: Tensor, label: Tensor, seed: int, count: int) -> Tensor:
    """(count, count) losses at x + a * sign(gradient) + b * random signs, a along columns, from -RADIUS to RADIUS, in the box."""
    victim = Victim(net, box=(-math.inf, math.inf))
    way = (fgsm()(victim, x[None], label[None], RADIUS).x_adv - x[None]).sign()
    other = Key.of(seed).fold("plane").normal(content_ids(x[None]), x[None]).sign()
    ends = torch.linspace(-RADIUS, RADIUS, count)
    a, b = ends.repeat(count), ends.repeat_interleave(count)
    points = (x[None] + a[:, None, None, None] * way + b[:, None, None, None] * other).clamp(0, 1)
    return F.cross_entropy(nets.answers(net, points), label.expand(len(points)), reduction="none").reshape(count, count)


def _pictures(found: Mapping[str, nn.Module], climbs: Mapping[str, Climb], data: Dataset, setting: Setting) -> tuple[Figure, ...]:
    at = int(climbs["adversarial"].final().mean(0).median(0).indices)
    count, pictures = 7 if setting.quick else 23, []
    for name, net in found.items():
        heights = plane(net, data.x[at], data.y[at], setting.seed, count).numpy()
        shown = f"Cross-entropy in a plane through the image of median final loss, {name} network."
        drawn = figures.surface(f"Loss surface, {name}", shown, heights, "sign of the gradient, -0.3 .. 0.3", "random signs", "loss")
        pictures.append(Figure(f"surface-{name}", drawn, shown + " Both axes span -0.3 .. 0.3; corners reach Linf 0.6, outside the ball."))
        steps = list(range(len(climbs[name].losses)))
        runs = [figures.Curve(str(i), steps, climbs[name].losses[:, i, at].tolist()) for i in range(climbs[name].losses.shape[1])]
        words = f"Loss of {len(runs)} PGD runs from random starts around the same image, {name} network."
        path = figures.lines(f"PGD runs, {name}", words, runs, "step", "loss", size=(460.0, 240.0), legend=False)
        pictures.append(Figure(f"runs-{name}", path, words))
    groups = [(name, (run.final() / run.final().mean(0)).flatten().tolist()) for name, run in climbs.items()]
    words = "Final losses of all runs on all images, each divided by the mean of its image."
    pictures.append(Figure("final", figures.histogram("Final losses", words, groups, "final loss / mean of its image"), words))
    return tuple(pictures)
