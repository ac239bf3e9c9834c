"""Goodfellow, Shlens & Szegedy 2015, arXiv 1412.6572: FGSM on a linear and on a maxout network, and what lies along its direction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epsball.attacks import fgsm
from epsball.core import Key, Victim, content_ids
from epsball.data import Dataset
from epsball.reproduce import figures, nets
from epsball.reproduce.base import NOT_READ, Figure, Finding, Line, Setting, experiment, mean_of, percent_of

PAPER = "Goodfellow, Shlens & Szegedy 2015, arXiv 1412.6572"
EVERYWHERE = (-math.inf, math.inf)
SOURCE = "The paper's figures are as public reproductions quote its LaTeX source; where none quotes a figure the table says not read."
OVER = "over the errors that the step made; samples wrong before are not touched here, the paper's step moves them too"


@dataclass(frozen=True)
class Broken:
    """What one FGSM step did: who was right before, who is wrong behind it, and the confidence there, (N,) each."""

    right: Tensor
    wrong: Tensor
    confidence: Tensor

    def error(self) -> str:
        """Share of all samples that are wrong now."""
        return percent_of(int(self.wrong.sum()), len(self.wrong))

    def sure(self) -> str:
        """Mean probability of the wrong class, over the errors that the step made."""
        return mean_of(self.confidence[self.wrong & self.right].tolist(), 1, " %", 100)


def step(net: nn.Module, data: Dataset, radius: float, box: tuple[float, float]) -> Broken:
    """One step of FGSM under Linf, cut at the box."""
    outcome = fgsm()(Victim(net, box=box, batch_size=1000), data.x, data.y, radius)
    found = nets.answers(net, outcome.x_adv).softmax(1).max(1)
    return Broken(nets.answers(net, data.x).argmax(1) == data.y, found.indices != data.y, found.values)


def fitted_softmax(setting: Setting, data: nets.Data) -> nn.Module:
    """Softmax regression on all of MNIST, 3 epochs."""
    return nets.fitted("softmax", nets.softmax, data.train, setting, epochs=3)


def fitted_maxout(setting: Setting, data: nets.Data) -> nn.Module:
    """Two maxout layers of 240 units with 5 pieces, dropout as in the maxout paper, 15 epochs."""
    return nets.fitted("maxout", nets.maxout, data.train, setting, epochs=15)


def _free_and_boxed(net: nn.Module, data: Dataset, error: str, sure: str, why: str, label: str = "") -> tuple[Line, ...]:
    """Error and confidence behind a step of 0.25, as the paper does it and inside the box of images."""
    free, boxed = step(net, data, 0.25, EVERYWHERE), step(net, data, 0.25, (0.0, 1.0))
    none = "not reported"
    return (
        Line(f"error at Linf 0.25, not clipped{label}", error, free.error(), why),
        Line(f"mean confidence in the wrong class, not clipped{label}", sure, free.sure(), OVER),
        Line(f"error at Linf 0.25, clipped to [0, 1]{label}", none, boxed.error(), "the paper adds eps * sign(gradient) and does not clip"),
        Line(f"mean confidence in the wrong class, clipped{label}", none, boxed.sure(), OVER),
    )


def _before(net: nn.Module, data: Dataset, paper: str, why: str = "", label: str = "") -> Line:
    right, n = nets.accuracy(net, data)
    return Line(f"error before{label}", paper, percent_of(n - right, n), why)


@experiment("fgsm-softmax", title="FGSM on softmax regression, MNIST", paper=PAPER, minutes=0.7)
def fgsm_softmax(setting: Setting) -> Finding:
    """Section 5: a shallow softmax classifier of all ten digits."""
    data = nets.mnist(setting, setting.count(10_000, quick=60))
    net = fitted_softmax(setting, data)
    longer = nets.fitted("softmax-20", nets.softmax, data.train, setting, epochs=20)
    why = "ours is trained by Adam for 3 epochs; how long the paper trained is not read, and the confidence hangs on it"
    grown = "the same network after 20 epochs: larger weights, the same error, more confidence"
    lines = (
        _before(net, data.test, NOT_READ),
        *_free_and_boxed(net, data.test, "99.9 %", "79.3 %", why),
        _before(longer, data.test, NOT_READ, label=", 20 epochs"),
        *_free_and_boxed(longer, data.test, "99.9 %", "79.3 %", grown, ", 20 epochs"),
    )
    chosen = nets.rows(data.test, torch.arange(min(8, len(data.test.x))))
    outcome = fgsm()(Victim(net), chosen.x, chosen.y, 0.25)
    pictures = figures.images(
        "FGSM on softmax regression",
        "Digits, and the same digits behind one clipped step of 0.25, with what the network says.",
        [_tiles(net, chosen.x), _tiles(net, outcome.x_adv)],
        names=("clean", "eps 0.25"),
    )
    caption = "First test images in the order of the seed, before and behind a clipped step; below each the class and its probability."
    return Finding(lines, (Figure("images", pictures, caption),), (SOURCE,))


def _tiles(net: nn.Module, x: Tensor) -> list[figures.Tile]:
    sure = nets.answers(net, x).softmax(1).max(1)
    said = zip(sure.indices.tolist(), sure.values.tolist(), strict=True)
    return [figures.Tile(image.numpy(), f"{label}, {100 * p:.0f} %") for image, (label, p) in zip(x, said, strict=True)]


@experiment("fgsm-maxout", title="FGSM on a maxout network, MNIST", paper=PAPER, minutes=5)
def fgsm_maxout(setting: Setting) -> Finding:
    """Section 5: two maxout layers of 240 units with 5 pieces."""
    data = nets.mnist(setting, setting.count(10_000, quick=60))
    net = fitted_maxout(setting, data)
    trained = "ours: 15 epochs of Adam with dropout, without the paper's momentum, norm constraint and long schedule"
    lines = (
        _before(net, data.test, "0.94 %", trained),
        *_free_and_boxed(net, data.test, "89.4 %", "97.6 %", "a network of the same size, trained in another way"),
    )
    return Finding(lines, (), (SOURCE,))


# The logits along the direction.

REACH = 10.0


@dataclass(frozen=True)
class Walk:
    """Logits (N, E, C) at x + eps * direction for signed eps (E,), and the labels (N,)."""

    eps: Tensor
    logits: Tensor
    labels: Tensor

    def wrong(self) -> Tensor:
        """(N, E) bool."""
        return self.logits.argmax(2) != self.labels[:, None]

    def straight(self, side: Tensor) -> Tensor:
        """(N,): share of the variance over the points `side` (E,) that straight lines explain, one line a class."""
        x, y = self.eps[side].double(), self.logits[:, side].double()
        x = x - x.mean()
        y = y - y.mean(1, keepdim=True)
        slope = (x[None, :, None] * y).sum(1, keepdim=True) / x.square().sum()
        left = (y - slope * x[None, :, None]).square().sum((1, 2))
        return 1 - left / y.square().sum((1, 2))


def walk(net: nn.Module, x: Tensor, labels: Tensor, direction: Tensor, reach: float = REACH, steps: int = 100) -> Walk:
    """Asks the network at 2 * steps + 1 points of each line, from -reach to reach; nothing is clipped."""
    eps = torch.linspace(-reach, reach, 2 * steps + 1)
    logits = [nets.answers(net, x + float(e) * direction) for e in eps]
    return Walk(eps, torch.stack(logits, 1), labels)


def directions(net: nn.Module, data: Dataset) -> Tensor:
    """sign(gradient of the cross-entropy), by one unclipped FGSM step; zeros where the gradient vanishes."""
    outcome = fgsm()(Victim(net, box=EVERYWHERE, batch_size=1000), data.x, data.y, 0.25)
    return (outcome.x_adv - data.x).sign()


@experiment("signed-epsilon", title="Logits along the signed FGSM direction, MNIST, maxout", paper=PAPER + ", figure 4", minutes=6)
def signed_epsilon(setting: Setting) -> Finding:
    """Section 8, figure 4: logits are piecewise linear in eps, and wrong classes fill a wide region."""
    data = nets.mnist(setting, setting.count(500, quick=20))
    net = fitted_maxout(setting, data)
    right = nets.answers(net, data.test.x).argmax(1) == data.test.y
    test = nets.rows(data.test, right)
    direction = directions(net, test)
    moving = direction.flatten(1).abs().amax(1) > 0
    test, direction = nets.rows(test, moving), direction[moving]
    steps = 20 if setting.quick else 100
    setting.say(f"walking along {len(test.x)} directions")
    path = walk(net, test.x, test.y, direction, steps=steps)
    random = Key.of(setting.seed).fold("signs").normal(content_ids(test.x), test.x).sign()
    control = walk(net, test.x, test.y, random, steps=steps)
    lines = (*_linearity(path), *_region(path, control))
    notes = (
        SOURCE,
        f"{int((~right).sum())} of {len(right)} test images were wrong before and {int((~moving).sum())} had no gradient: left out.",
        f"eps in [{-REACH:g}, {REACH:g}] in steps of {REACH / steps:g}, unclipped; pixels are in [0, 1].",
    )
    return Finding(lines, _pictures(test, path, control, direction), notes)


def _linearity(path: Walk) -> tuple[Line, ...]:
    told, why = "conspicuously piecewise linear", "one line a class and side; the paper shows one image and gives no figure"
    sides = {
        f"0 to {REACH:g}": path.eps >= 0,
        f"-{REACH:g} to 0": path.eps <= 0,
        "0 to 1": (path.eps >= 0) & (path.eps <= 1),
        f"-{REACH:g} to {REACH:g}, one line for both sides": path.eps > -math.inf,
    }
    return tuple(
        Line(
            f"variance of the logits that straight lines explain, eps {name}",
            told,
            mean_of(path.straight(side).tolist(), 2, " %", 100),
            why,
        )
        for name, side in sides.items()
    )


def _region(path: Walk, control: Walk) -> tuple[Line, ...]:
    ahead, near = path.eps > 0, (path.eps > 0) & (path.eps <= 1)
    wrong, noise = path.wrong(), control.wrong()
    positive = wrong[:, ahead].long()
    closed = positive.cummax(1).values == positive  # once wrong, wrong to the end
    wide = "stable across a wide region of eps"
    spread = "a share of points of the line, averaged over images; the paper gives no figure"
    first = [float(path.eps[ahead][int(row.argmax())]) for row in positive if bool(row.any())]
    return (
        Line(f"share of eps in (0, {REACH:g}] that is wrong", wide, _share(wrong[:, ahead]), spread),
        Line("share of eps in (0, 1] that is wrong", wide, _share(wrong[:, near]), spread),
        Line(
            f"share of eps in [-{REACH:g}, 0) that is wrong",
            wide,
            _share(wrong[:, path.eps < 0]),
            "far against the gradient is rubbish too",
        ),
        Line("images that stay wrong from the first wrong eps on", wide, percent_of(int(closed.all(1).sum()), len(closed))),
        Line("first wrong eps", "not reported", mean_of(first, 2)),
        Line(
            "random signs: share of eps in (0, 1] that is wrong", "not reported", _share(noise[:, near]), "control: the direction matters"
        ),
    )


def _share(wrong: Tensor) -> str:
    return mean_of(wrong.double().mean(1).tolist(), 1, " %", 100)


def _pictures(test: Dataset, path: Walk, control: Walk, direction: Tensor) -> tuple[Figure, ...]:
    """One image, a 4 as in the paper where there is one; and the share of wrong answers over all images."""
    fours = (test.y == 4).nonzero().squeeze(1)
    at = int(fours[0]) if len(fours) else 0
    eps = path.eps.tolist()
    logits = [figures.Curve(str(label), eps, path.logits[at, :, label].tolist()) for label in range(path.logits.shape[2])]
    one = figures.lines(
        "Logits against signed epsilon",
        f"Ten logits of one digit {int(test.y[at])} along the FGSM direction.",
        logits,
        "eps",
        "logit",
        (0.0,),
    )
    means = [
        figures.Curve(name, eps, [100 * v for v in w.wrong().double().mean(0).tolist()])
        for name, w in (("FGSM direction", path), ("random signs", control))
    ]
    many = figures.lines("Errors against signed epsilon", "Share of images that are wrong at each eps.", means, "eps", "wrong, %", (0.0,))
    tried = torch.linspace(-1, 1, 9).tolist()
    row = [figures.Tile((test.x[at] + e * direction[at]).clamp(0, 1).numpy(), f"{e:g}: {_class(path, at, e)}") for e in tried]
    inputs = figures.images("Inputs along the direction", "The digit at nine values of eps, with the predicted class.", [row])
    return (
        Figure("logits", one, f"Logits of one test image of class {int(test.y[at])}; the dashed line is the clean image."),
        Figure("errors", many, f"Share of {len(test.x)} images that are wrong, along the FGSM direction and along random signs."),
        Figure("inputs", inputs, "The same image, shown clipped; below each eps and the class that the network gives the unclipped input."),
    )


def _class(path: Walk, at: int, eps: float) -> int:
    return int(path.logits[at, int((path.eps - eps).abs().argmin())].argmax())
