"""Defenses made up by somebody who had not seen how the audit works: spikes, trees, tokens, gates, moments, interfaces; honest networks.

`held` and the notes say what the audit said at first sight: that of commit 04885db, same images and seed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor, nn
from torch.nn import functional as F

from verdicts.bases import adversarial, images, kept, network, seeded, standard
from verdicts.case import PGD, Case, as_it_is, straight, thorough, undefended
from verdicts.controls import control
from verdicts.held_out import masked, voter
from verdicts.search import Seen
from verdicts.unseen import Around


def fit(
    name: str,
    model: nn.Module,
    *,
    n: int = 20000,
    epochs: int = 4,
    rate: float = 2e-3,
    radius: float = 0.0,
    steps: int = 0,
    front: Callable[[Tensor], Tensor] | None = None,
    grow: bool = False,
) -> nn.Module:
    """Weights from the file, or trained now with Adam: on PGD where steps > 0, whose radius grows over the first half where `grow`."""

    def train() -> dict[str, float]:
        x, y = images()
        x, y = x[:n] if front is None else front(x[:n]), y[:n]
        model.train()
        order = torch.Generator().manual_seed(0)
        adam = torch.optim.Adam(model.parameters(), rate)
        total, done = epochs * (n // 100), 0
        plan = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=total)
        for _ in range(epochs):
            for rows in torch.randperm(n, generator=order)[: n // 100 * 100].view(-1, 100):
                a, b, done = x[rows], y[rows], done + 1
                z, box = a, radius * (min(1.0, 2 * done / total) if grow else 1.0)
                if steps:
                    z = (a + box * (2 * torch.rand(a.shape, generator=order) - 1)).clamp(0, 1)
                for _ in range(steps):
                    leaf = z.detach().requires_grad_()
                    (g,) = torch.autograd.grad(F.cross_entropy(model(leaf), b), leaf)
                    z = torch.minimum(torch.maximum(z + 2.5 / steps * box * g.sign(), a - box), a + box).clamp(0, 1).detach()
                loss = F.cross_entropy(model(z), b)
                adam.zero_grad()
                loss.backward()
                adam.step()
                plan.step()
        return {"loss": float(loss.detach())}

    return kept(name, f"{model} {n} {epochs} {rate} {radius} {steps} {front is not None} {grow}", model, train)


class Spike(torch.autograd.Function):
    """A step at 0 with the slope of a fast sigmoid."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, sharp: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.sharp = sharp
        return (v > 0).to(v)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return gradient / (1 + ctx.sharp * v.abs()).square(), None


class Spiking(nn.Module):
    """Two layers of leaky integrate-and-fire neurons over 10 steps; the scores count what the last layer's ten groups fire."""

    def __init__(self, steps: int = 10, sharp: float = 100.0) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(784, 256), nn.Linear(256, 128), nn.Linear(128, 100)
        self.steps, self.sharp = steps, sharp

    def fire(self, x: Tensor, sharp: float) -> Tensor:
        """(B, 10) spikes of each group, with a surrogate of this sharpness."""
        current = self.first(x.flatten(1))
        volts = [torch.zeros_like(current), current.new_zeros(len(x), 128), current.new_zeros(len(x), 100)]
        count = current.new_zeros(len(x), 100)
        for _ in range(self.steps):
            spikes = None
            for k, layer in enumerate((None, self.second, self.last)):
                volts[k] = 0.8 * volts[k] + (current if layer is None else layer(spikes))
                spikes = Spike.apply(volts[k] - 1, sharp)  # type: ignore[no-untyped-call]
                volts[k] = volts[k] - spikes.detach()
            count = count + spikes
        return count.view(-1, 10, 10).sum(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fire(x, 4.0) / 4 if self.training else self.fire(x, self.sharp)

    def soft(self, sharp: float) -> Seen:
        """The same counts with a wider surrogate."""
        return lambda x: self.fire(x, sharp) / 4


class Forest(nn.Module):
    """Twenty trees of scikit-learn."""

    def __init__(self, trees: RandomForestClassifier) -> None:
        super().__init__()
        self.trees = trees

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.trees.predict_proba(x.detach().cpu().numpy().reshape(len(x), -1))).float()

    def soft(self, width: float) -> Seen:
        """The logarithm of the expected shares where each node is a sigmoid."""
        features, cuts, left, right, shares, roots, start = [], [], [], [], [], [], 0
        for tree in (one.tree_ for one in self.trees.estimators_):
            inner = tree.children_left >= 0
            features.append(np.where(inner, tree.feature, 0))
            cuts.append(tree.threshold)
            left.append(np.where(inner, tree.children_left + start, -1))
            right.append(np.where(inner, tree.children_right + start, -1))
            shares.append(tree.value[:, 0] / tree.value[:, 0].sum(1, keepdims=True))
            roots.append(start)
            start += tree.node_count
        feature, cut, down, up, share = (torch.from_numpy(np.concatenate(one)) for one in (features, cuts, left, right, shares))
        cut, share = cut.float(), share.float()

        def seen(x: Tensor) -> Tensor:
            flat, nodes = x.flatten(1), torch.tensor(roots)
            reach, total = flat.new_ones(len(x), len(nodes)), flat.new_zeros(len(x), 10)
            while len(nodes):
                inner = down[nodes] >= 0
                total = total + reach[:, ~inner] @ share[nodes[~inner]]
                nodes, reach = nodes[inner], reach[:, inner]
                go = torch.sigmoid((cut[nodes] - flat[:, feature[nodes]]) / width)
                nodes, reach = torch.cat([down[nodes], up[nodes]]), torch.cat([reach * go, reach * (1 - go)], 1)
            return (total / len(roots) + 1e-6).log()

        return seen


class Oriented(nn.Module):
    """Histograms of oriented gradients: 7x7 cells, eight hard bins of orientation, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(392, 64), nn.ReLU(), nn.Linear(64, 10))

    @staticmethod
    def edges(x: Tensor) -> tuple[Tensor, Tensor]:
        """Strength and angle in 0..8, (B, 28, 28)."""
        p = F.pad(x[:, 0], (1, 1, 1, 1))
        across, down = p[:, 1:-1, 2:] - p[:, 1:-1, :-2], p[:, 2:, 1:-1] - p[:, :-2, 1:-1]
        angle = torch.atan2(down + 1e-9, across + 1e-9) * (8 / torch.pi)
        return (across.square() + down.square() + 1e-8).sqrt(), angle % 8

    def pooled(self, strength: Tensor, bins: Tensor) -> Tensor:
        """Scores of (B, 28, 28) strengths in (B, 8, 28, 28) bins."""
        cells = F.avg_pool2d(strength[:, None] * bins, 4).flatten(2)
        cells = cells / (cells.square().sum((1, 2), keepdim=True) + 1e-3).sqrt()
        return self.net(4 * cells.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        strength, angle = self.edges(x)
        return self.pooled(strength, F.one_hot(angle.long().clamp(max=7), 8).movedim(3, 1).to(x))

    def soft(self, width: float) -> Seen:
        """The same values with the gradient of soft bins."""

        def seen(x: Tensor) -> Tensor:
            strength, angle = self.edges(x)
            hard = F.one_hot(angle.detach().long().clamp(max=7), 8).movedim(3, 1).to(x)
            off = angle[:, None] - (torch.arange(8).view(1, 8, 1, 1) + 0.5)
            off = (off + 4) % 8 - 4
            return self.pooled(strength, straight(hard, (-off.square() / width).softmax(1)))

        return seen


class Gated(nn.Module):
    """Reads an image row by row; the gates of its cell are open or shut."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.enter, self.again, self.head = nn.Linear(28, 4 * width), nn.Linear(width, 4 * width, bias=False), nn.Linear(width, 10)
        self.width = width

    def read(self, x: Tensor, sharp: float) -> Tensor:
        """Scores, where the gates have the slope of a sigmoid of this sharpness; 0: none."""
        rows = self.enter(x[:, 0])
        h = c = rows.new_zeros(len(x), self.width)
        for k in range(28):
            pre = rows[:, k] + self.again(h)
            gates, new = pre[:, : 3 * self.width], pre[:, 3 * self.width :]
            hard = (gates > 0).to(x)
            enter, keep, leave = (straight(hard, torch.sigmoid(sharp * gates)) if sharp else hard).chunk(3, 1)
            c = keep * c + enter * torch.tanh(new)
            h = leave * torch.tanh(c)
        return self.head(c)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x, 2.0 if self.training else 0.0)


class Deskewed(Around):
    """Straightens each digit by its second moments, in SciPy, as old recipes for MNIST do."""

    def cleaned(self, x: Tensor) -> Tensor:
        images = x.detach().cpu().numpy()[:, 0].astype(np.float64)
        out, (i, j) = np.empty_like(images), np.mgrid[:28, :28]
        for image, place in zip(images, out, strict=True):
            total = image.sum() + 1e-6
            a, b = (i * image).sum() / total, (j * image).sum() / total
            slant = ((i - a) * (j - b) * image).sum() / (((i - a) ** 2 * image).sum() + 1e-6)
            move = np.array([[1.0, 0.0], [slant, 1.0]])
            place[:] = ndimage.affine_transform(image, move, offset=np.array([a, b]) - move @ np.array([13.5, 13.5]), order=1)
        return torch.from_numpy(out)[:, None].to(x).clamp(0, 1)

    def smooth(self, x: Tensor) -> Tensor:
        """The same in torch, moments and all."""
        at = torch.arange(28.0)
        i, j, image = at[:, None], at[None, :], x[:, 0]
        total = image.sum((1, 2)) + 1e-6
        a, b = (i * image).sum((1, 2)) / total, (j * image).sum((1, 2)) / total
        di, dj = i - a[:, None, None], j - b[:, None, None]
        slant = (di * dj * image).sum((1, 2)) / ((di.square() * image).sum((1, 2)) + 1e-6)
        from_i = a[:, None, None] + (i - 13.5) + 0 * j
        from_j = b[:, None, None] + (j - 13.5) + slant[:, None, None] * (i - 13.5)
        grid = torch.stack([from_j, from_i], 3) / 13.5 - 1
        return F.grid_sample(x, grid, align_corners=True)


class Tokens(nn.Module):
    """Each of 49 patches becomes one of 32 words, by argmax; what follows sees their embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 6, stride=4, padding=1), nn.GELU(), nn.Conv2d(32, 32, 1))
        self.words = nn.Embedding(32, 8)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(392, 64), nn.ReLU(), nn.Linear(64, 10))

    def soft(self, width: float) -> Seen:
        """The same words with the gradient of a softmax."""

        def seen(x: Tensor) -> Tensor:
            scores = self.stem(x).movedim(1, 3)
            hard = F.one_hot(scores.argmax(3), 32).to(x)
            return self.head(straight(hard, (scores / width).softmax(3)) @ self.words.weight)

        return seen

    def forward(self, x: Tensor) -> Tensor:
        return self.soft(1.0)(x) if self.training else self.head(self.words(self.stem(x).argmax(1)))


class Halves(Around):
    """Unnormalized probabilities in half precision: exp of a score above 11.1 is the largest number there is."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nan_to_num(self.net(x).half().exp()).float()


class Service(Around):
    """An interface: pictures of 8 bits in, the best three classes out, in percent with one decimal."""

    def rounded(self, x: Tensor) -> Tensor:
        """The scores before all that, through the rounding."""
        return self.net(straight((x * 255).round() / 255, x))

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            pixels = (x * 255).round().to(torch.uint8)
            best = self.net(pixels.float() / 255).softmax(1).topk(3)
            shown = torch.zeros(len(x), 10).scatter(1, best.indices, (best.values * 1000).round() / 10)
        return shown.clone()


class Median(nn.Module):
    """The median of three networks' scores, class by class."""

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets]).median(0).values

    def mean(self, x: Tensor) -> Tensor:
        """Their mean."""
        return torch.stack([net(x) for net in self.nets]).mean(0)

    def without(self, k: int) -> Seen:
        """The mean of the other two: what both get wrong, the median mostly does."""
        return lambda x: torch.stack([net(x) for i, net in enumerate(self.nets) if i != k]).mean(0)


class MaxMin(nn.Module):
    """Sorts pairs of features."""

    def forward(self, a: Tensor) -> Tensor:
        p, q = a.chunk(2, 1)
        return torch.cat([torch.maximum(p, q), torch.minimum(p, q)], 1)


class Attention(nn.Module):
    """Sixteen patches of 7x7, two encoder layers of PyTorch's own, the mean of what they say."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.places = nn.Parameter(0.1 * torch.randn(1, 16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 96, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        words = self.patches(x).flatten(2).mT + self.places
        return self.head(self.layers(words).mean(1))


@cache
def forest() -> nn.Module:
    x, y = images()
    trees = RandomForestClassifier(20, max_depth=10, max_features=28, random_state=0)
    return Forest(trees.fit(x[:10000].flatten(1).numpy(), y[:10000].numpy())).eval()


CASES: tuple[Case, ...] = (
    masked(
        "spikes",
        lambda: fit("spikes", seeded(Spiking), epochs=4),
        lambda m: m.soft(4.0),
        lambda m: m.soft(15.0),
        cause="rough",
        radius=0.1,
        paper="Sharmin et al. 2020, arXiv 2003.10399",
        note="leaky integrate-and-fire over 10 steps, a narrow surrogate gradient, scores are spike counts; 5 for 2 at first sight",
        first="wrong",
    ),
    masked(
        "forest",
        forest,
        lambda m: m.soft(0.02),
        lambda m: m.soft(0.1),
        cause="dead",
        radius=0.1,
        note="a random forest of scikit-learn: 20 trees of depth 10, shares of leaves",
    ),
    masked(
        "edge histograms",
        lambda: fit("oriented", seeded(Oriented)),
        lambda m: m.soft(0.3),
        lambda m: m.soft(1.0),
        as_it_is,
        cause="rough",
        radius=0.1,
        paper="Dalal & Triggs 2005, CVPR",
        note="HOG with hard bins of orientation: the gradient knows strengths only",
    ),
    masked(
        "shut gates",
        lambda: fit("gated", seeded(Gated), n=20000, epochs=4),
        lambda m: lambda z: m.read(z, 2.0),
        lambda m: lambda z: m.read(z, 0.7),
        cause="rough",
        radius=0.1,
        note="a recurrent net over rows, gates by comparison: the gradient flows through the cell's content only",
    ),
    masked(
        "deskewed",
        lambda: Deskewed(fit("straightened", seeded(network), n=20000, epochs=3, front=Deskewed(nn.Identity()).cleaned)).eval(),
        lambda m: lambda z: m.net(straight(m.cleaned(z), m.smooth(z))),
        lambda m: lambda z: m.net(m.smooth(z)),
        cause="dead",
        radius=0.1,
        paper="LeCun et al. 1998, Proc. IEEE",
        note="each digit straightened by its moments, in SciPy",
    ),
    masked(
        "tokens",
        lambda: fit("tokens", seeded(Tokens)),
        lambda m: m.soft(1.0),
        lambda m: m.soft(3.0),
        cause="dead",
        radius=0.1,
        paper="after van den Oord et al. 2017, arXiv 1711.00937",
        note="49 patches become words by argmax, their embeddings are classified",
    ),
    masked(
        "half precision",
        lambda: Halves(adversarial()).eval(),
        undefended,
        cause="scores",
        radius=0.2,
        note="exp of the scores in float16, infinities replaced by 65504, around PGD-7",
    ),
    masked(
        "service",
        lambda: Service(standard()).eval(),
        lambda m: m.rounded,
        undefended,
        cause="dead",
        radius=0.1,
        note="8 bits in, best three classes in percent with one decimal out, under inference_mode",
    ),
    Case(
        "median of three",
        "held out",
        "overstated",
        lambda: Median([standard(), voter(1), voter(2)]).eval(),
        PGD,
        thorough(lambda m: m.mean, as_it_is, lambda m: m.without(0), lambda m: m.without(1), lambda m: m.without(2)),
        radius=0.1,
        note="class by class the median of three networks' scores",
        held="right",
    ),
    control(
        "sorted pairs",
        "Anil et al. 2019, arXiv 1811.05381",
        lambda: fit("sorting", seeded(lambda: network(relu=MaxMin)), n=10000, epochs=4, radius=0.1, steps=5),
        0.1,
        "MaxMin in place of ReLU, PGD-5",
        held="right",
    ),
    control(
        "attention",
        "after Dosovitskiy et al. 2021, arXiv 2010.11929",
        lambda: fit("attention", seeded(Attention), n=20000, epochs=5, rate=3e-3, radius=0.1, steps=2, grow=True),
        0.1,
        "a small transformer of patches, LayerNorm and GELU, PGD-2",
        held="right",
    ),
)
