"""Masked models and honest ones that read MNIST, made up by somebody who had not seen how the audit works.

Most of them choose: a branch, a place, a step, another look. `unseen_tabular.py` has those that read tables. Used by `verdicts_more.py`.
"""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nets import Arrays
from verdicts.bases import images, kept, network, samples, seeded
from verdicts.case import straight
from verdicts.search import Judge, Seen, majority, slope

Points = Callable[[Any, Tensor, Tensor, float], Iterator[Tensor]]
"""(model, inputs, labels, radius) -> points to judge."""


def digits(n: int, seed: int) -> Arrays:
    """Test images of MNIST."""
    data = samples(n, seed)
    return data.x, data.y


@dataclass(frozen=True)
class Trial:
    """One row of the table.

    Attributes:
        name, kind: how it is called; masked: gradients through the model as it is mislead; control: nothing is wrong with it.
        model: makes it, in eval mode. radius, norm, box: the ball, and what an input can be. samples: (n, seed) -> test inputs, labels.
        views: model -> what is differentiated, one after another. points: tried before; without views they are all there is.
        judge: what counts as broken. squares: with views, Square is tried as well. n: samples.
    """

    name: str
    kind: Literal["masked", "control"]
    model: Callable[[], nn.Module]
    radius: float
    norm: Literal["linf", "l2"] = "linf"
    box: tuple[float, float] = (0.0, 1.0)
    samples: Callable[[int, int], Arrays] = digits
    views: Callable[[Any], Sequence[Seen]] = lambda m: (m,)
    points: Points | None = None
    judge: Callable[[Any], Judge] = majority
    squares: bool = True
    n: int = 50

    @property
    def ball(self) -> str:
        """As audits want it."""
        return f"{self.norm}:{self.radius:g}"


def fit(
    name: str,
    model: nn.Module,
    data: Callable[[], Arrays] = images,
    *,
    forward: Seen | None = None,
    n: int = 20000,
    epochs: int = 4,
    radius: float = 0.0,
    steps: int = 0,
    decay: float = 0.0,
) -> nn.Module:
    """Weights from the file, or trained now through `forward`: on PGD where steps > 0, whose radius grows over the first half."""
    seen: Seen = forward or model

    def train() -> dict[str, float]:
        x, y = (one[:n] for one in data())
        torch.manual_seed(0)
        adam = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=decay)
        total, done = epochs * (len(x) // 100), 0
        plan = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, total_steps=total)
        model.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(x))[: len(x) // 100 * 100].view(-1, 100):
                a, b, reach = x[rows], y[rows], radius * min(1.0, 2 * done / total)
                z = (a + reach * (2 * torch.rand_like(a) - 1)).clamp(0, 1) if steps else a
                for _ in range(steps):
                    leaf = z.detach().requires_grad_()
                    (g,) = torch.autograd.grad(F.cross_entropy(seen(leaf), b), leaf)
                    z = torch.minimum(torch.maximum(z + 2.0 / steps * reach * g.sign(), a - reach), a + reach).clamp(0, 1).detach()
                loss = F.cross_entropy(seen(z), b)
                adam.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                adam.step()
                plan.step()
                done += 1
        return {"loss": float(loss.detach())}

    return kept(name, f"{model} {n} {epochs} {radius} {steps} {decay} {forward is not None}", model, train)


def mlp(*sizes: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers, `act` between them."""
    layers = [layer for inputs, outputs in pairwise(sizes) for layer in (nn.Linear(inputs, outputs), act())]
    return nn.Sequential(*layers[:-1])


def valued(m: Any, view: Seen) -> Seen:
    """The values of the model with the gradient of the view."""
    return lambda x: straight(m(x), view(x))


def chooser() -> nn.Sequential:
    """`network` at half its width, for two classes."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(392, 64),
        nn.ReLU(),
        nn.Linear(64, 2),
    )


class Hierarchy(nn.Module):
    """A router decides on one of five pairs of digits; that pair's own network decides between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.router = network(classes=5)
        self.experts = nn.ModuleList([chooser() for _ in range(5)])

    def soft(self, x: Tensor) -> Tensor:
        """(B, 10): log-probabilities of the pair and of the digit in it, added."""
        pairs = self.router(x).log_softmax(1)
        return (pairs[:, :, None] + torch.stack([expert(x).log_softmax(1) for expert in self.experts], 1)).flatten(1)

    def routes(self, x: Tensor) -> Tensor:
        return self.router(x).repeat_interleave(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_full((len(x), 10), -20.0)
        pair = self.router(x).argmax(1)
        for k, expert in enumerate(self.experts):
            rows = (pair == k).nonzero().squeeze(1)
            if len(rows):
                out[rows, 2 * k : 2 * k + 2] = expert(x[rows])
        return out


def hierarchy() -> nn.Module:
    m: Any = seeded(Hierarchy)
    return fit("hierarchy", m, forward=m.soft)


class Equilibrium(nn.Module):
    """Features are the fixed point of z = tanh(W z + U x), found without autograd, which sees a linear layer beside them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.w = nn.Linear(784, 100), nn.Linear(100, 100, bias=False)
        self.head, self.skip = nn.Linear(100, 10), nn.Linear(784, 10, bias=False)
        nn.init.zeros_(self.skip.weight)

    def solve(self, x: Tensor, steps: int) -> Tensor:
        u = self.u(x.flatten(1))
        w = self.w.weight / torch.linalg.matrix_norm(self.w.weight, 2).detach().clamp(min=1.0) * 0.95
        z = torch.zeros_like(u)
        for _ in range(steps):
            new = torch.tanh(z @ w.T + u)
            if not torch.is_grad_enabled() and float((new - z).abs().amax()) < 1e-5:
                return new
            z = new
        return z

    def soft(self, x: Tensor, steps: int = 12) -> Tensor:
        """Through so many steps of the search."""
        return self.head(self.solve(x, steps)) + 0.1 * self.skip(x.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = self.solve(x, 60)
        return self.head(z) + 0.1 * self.skip(x.flatten(1))


def equilibrium() -> nn.Module:
    m: Any = seeded(Equilibrium)
    return fit("equilibrium", m, forward=m.soft, radius=0.1, steps=1, epochs=5)


class Keypoints(nn.Module):
    """Where does each of 32 detectors fire most? The classifier sees these places alone."""

    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2, padding=2))
        self.net = mlp(64, 128, 64, 10)
        line = torch.arange(14.0) / 7 - 1
        self.register_buffer("grid", torch.cartesian_prod(line, line))

    def soft(self, x: Tensor, heat: float = 1.0) -> Tensor:
        """Mean places under a softmax."""
        return self.net(((self.stem(x).flatten(2) / heat).softmax(2) @ self.grid).flatten(1))

    def through(self, x: Tensor, heat: float = 1.0) -> Tensor:
        """The true places with the gradient of mean ones."""
        fire = self.stem(x).flatten(2)
        return self.net(straight(self.grid[fire.argmax(2)], (fire / heat).softmax(2) @ self.grid).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.grid[self.stem(x).flatten(2).argmax(2)].flatten(1))


def keypoints() -> nn.Module:
    m: Any = seeded(Keypoints)
    return fit("keypoints", m, forward=m.through, epochs=5)


def quarters(h: Tensor) -> Tensor:
    return (4 * h).round() / 4


class StepGru(nn.Module):
    """A GRU over rows whose state is stored in steps of a quarter, as on a small chip."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(28, 64), nn.Linear(64, 10)

    def walk(self, x: Tensor, store: Seen) -> Tensor:
        h = x.new_zeros(len(x), 64)
        for row in x[:, 0].unbind(1):
            h = store(self.cell(row, h))
        return self.head(h)

    def soft(self, x: Tensor) -> Tensor:
        """Stored states have the gradient of exact ones."""
        return self.walk(x, lambda h: straight(quarters(h), h))

    def smooth(self, x: Tensor) -> Tensor:
        """States are exact."""
        return self.walk(x, lambda h: h)

    def forward(self, x: Tensor) -> Tensor:
        return self.walk(x, quarters)


def step_gru() -> nn.Module:
    m: Any = seeded(StepGru)
    return fit("step-gru", m, forward=m.soft)


class Hellinger(nn.Module):
    """RootSIFT on convolutional features: the square root of shares. Its slope at zero is infinite, autograd's answer NaN."""

    def __init__(self) -> None:
        super().__init__()
        whole = network()
        self.stem, self.net = whole[:5], whole[5:]

    def shares(self, x: Tensor) -> Tensor:
        f = self.stem(x)
        return f / (f.sum(1, keepdim=True) + 1e-6)

    def soft(self, x: Tensor, floor: float = 1e-6) -> Tensor:
        """No share is below the floor."""
        return self.net(10 * torch.sqrt(self.shares(x) + floor))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(10 * torch.sqrt(self.shares(x)))


def hellinger() -> nn.Module:
    m: Any = seeded(Hellinger)
    return fit("hellinger", m, forward=m.soft)


class Retry(nn.Module):
    """Not sure? Look again at a blurred copy, up to four times."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        line = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", (line[:, None] * line / 16)[None, None])

    def blur(self, x: Tensor, times: int = 1) -> Tensor:
        for _ in range(times):
            x = F.conv2d(x, self.kernel, padding=1)
        return x

    def look(self, x: Tensor, times: int) -> Tensor:
        """At a copy that is blurred so many times."""
        return self.net(self.blur(x, times))

    def mixed(self, x: Tensor) -> Tensor:
        """At any of them."""
        return self.look(x, int(torch.randint(5, ())))

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for one in x:
            one = one[None]
            score = self.net(one)
            for _ in range(4):
                if score.softmax(1).amax().item() >= 0.95:
                    break
                one = self.blur(one.detach())
                score = self.net(one)
            out.append(score)
        return torch.cat(out)


def retry() -> nn.Module:
    m: Any = seeded(Retry)
    return fit("retry", m, forward=m.mixed)


class Polarity(nn.Module):
    """Scans that look inverted (bright on average) are inverted back first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean((1, 2, 3), keepdim=True) > 0.22
        return self.net(torch.where(bright, 1 - x, x))


def polarity() -> nn.Module:
    m: Any = seeded(Polarity)
    fit("polarity", m.net, radius=0.2, steps=5, n=15000)
    return m.eval().requires_grad_(False)


def brightened(m: Any, x: Tensor, y: Tensor, radius: float) -> Iterator[Tensor]:
    """Bright all over, then along the gradient of the inverted branch, brightened where that costs least until the mean is back."""
    low, high = (x - radius).clamp(min=0), (x + radius).clamp(max=1)
    yield high
    for _ in range(3):
        z = high
        for step in range(60):
            g = slope(lambda one: m.net(1 - one), "margin", z, y, y, 1)
            some = torch.rand_like(g) < 0.7
            z = torch.minimum(torch.maximum(z + (0.3 - 0.28 * step / 60) * radius * g.sign() * some, low), high)
            cheap = g.abs() <= g.abs().flatten(1).quantile(0.5, dim=1)[:, None, None, None]
            for _ in range(40):
                dark = z.mean((1, 2, 3), keepdim=True) <= 0.2205
                z = torch.where(dark, torch.minimum(z + 0.05 * radius * (cheap + 0.1), high), z)
            yield z


class Attributions(nn.Module):
    """The second network classifies an explanation of the first: gradient times input of its best class, by torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = network(), network()

    def maps(self, x: Tensor) -> Tensor:
        def best(one: Tensor) -> Tensor:
            return self.first(one[None])[0].amax()

        return torch.vmap(torch.func.grad(best))(x) * x

    def soft(self, x: Tensor) -> Tensor:
        """Through the explanation."""
        return self.second(self.maps(x))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            seen = self.maps(x.detach())
        return self.second(seen)


def attributions() -> nn.Module:
    m: Any = seeded(Attributions)
    fit("explained", m.first)
    fit("attributions", m.second, forward=lambda x: m.second(m.maps(x).detach()))
    return m.eval().requires_grad_(False)


class Gru(nn.Module):
    """A GRU of PyTorch's own over rows, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(28, 48, batch_first=True), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x[:, 0])[0].mean(1))


class MixerBlock(nn.Module):
    """Mixes tokens, then features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.LayerNorm(32), nn.LayerNorm(32)
        self.mix, self.feed = mlp(16, 32, 16, act=nn.GELU), mlp(32, 64, 32, act=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.a(x).transpose(1, 2)).transpose(1, 2)
        return x + self.feed(self.b(x))


class Mixer(nn.Module):
    """An MLP-Mixer of two blocks on sixteen patches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 7, 7)
        self.blocks = nn.Sequential(MixerBlock(), MixerBlock())
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x).flatten(2).transpose(1, 2))).mean(1))


class SiluResidual(nn.Module):
    """Two residual blocks with group norm and SiLU before each convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 4, 4)
        self.blocks = nn.ModuleList([nn.Sequential(*self.ahead(), *self.ahead()) for _ in range(2)])
        self.head = nn.Linear(588, 10)

    @staticmethod
    def ahead() -> tuple[nn.Module, ...]:
        return nn.GroupNorm(3, 12), nn.SiLU(), nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(F.silu(x).flatten(1))


class Separable(nn.Module):
    """Depthwise separable convolutions with squeeze and excitation, hard swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 4, 4)
        self.depth, self.point = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 32, 1)
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1), nn.Hardsigmoid())
        self.head = nn.Linear(32 * 49, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.point(self.depth(F.hardswish(self.stem(x)))))
        return self.head((x * self.se(x)).flatten(1))


class Squared(nn.Module):
    """A polynomial: squares are its only activations, as under homomorphic encryption."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 8, 4, 4), nn.Linear(392, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.c((0.5 * self.b(self.a(x).square().flatten(1))).square())


CASES: tuple[Trial, ...] = (
    Trial("hierarchy", "masked", hierarchy, 0.06, views=lambda m: (m.soft, m, m.routes)),
    Trial("equilibrium", "masked", equilibrium, 0.1, views=lambda m: (lambda x: m.soft(x, 25), lambda x: m.soft(x, 8))),
    Trial(
        "keypoints",
        "masked",
        keypoints,
        0.03,
        views=lambda m: (m.soft, m.through, lambda x: m.soft(x, 0.5), lambda x: m.through(x, 3.0)),
    ),
    Trial("step GRU", "masked", step_gru, 0.04, views=lambda m: (m.soft, m.smooth, valued(m, m.smooth))),
    Trial("hellinger", "masked", hellinger, 0.07, views=lambda m: (m.soft, lambda x: m.soft(x, 1e-4), lambda x: m.soft(x, 1e-5))),
    Trial(
        "retry",
        "masked",
        retry,
        0.06,
        views=lambda m: (m.net, lambda x: m.look(x, 1), lambda x: m.look(x, 4), lambda x: m.net(x) + m.look(x, 2) + m.look(x, 4)),
    ),
    Trial("polarity", "masked", polarity, 0.1, points=brightened, views=lambda m: (m, m.net)),
    Trial("attributions", "masked", attributions, 0.05, views=lambda m: (m.soft, m.first, valued(m, m.soft))),
    Trial("GRU", "control", lambda: fit("gru", seeded(Gru), radius=0.1, steps=2, n=10000), 0.1),
    Trial("mixer", "control", lambda: fit("mixer", seeded(Mixer), radius=0.1, steps=3, n=15000, epochs=5), 0.1),
    Trial("SiLU resnet", "control", lambda: fit("silu-resnet", seeded(SiluResidual), radius=0.1, steps=3, n=15000, epochs=5), 0.1),
    Trial("separable SE", "control", lambda: fit("separable", seeded(Separable)), 0.03),
    Trial("squared", "control", lambda: fit("squared", seeded(Squared), radius=0.08, steps=2, epochs=5), 0.08),
)
