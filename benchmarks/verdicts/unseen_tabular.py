"""Masked models and honest ones that read tables of scikit-learn, by the one who made up those of `unseen_more.py`."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from nets import Arrays
from verdicts.bases import seeded
from verdicts.search import Judge, majority
from verdicts.unseen_more import Trial, fit, mlp, valued

WIDE = (-20.0, 20.0)
"""The box of columns of mean 0 and deviation 1."""


@cache
def table(name: str) -> tuple[Arrays, Arrays]:
    """Rows to train on, rows to test: a quarter, at least 60. `cancer` and `made` have mean 0 and deviation 1, `wine` is in [0, 1]."""
    if name == "made":
        x, y = datasets.make_classification(
            4000, 40, n_informative=24, n_redundant=8, n_classes=26, n_clusters_per_class=1, class_sep=2.5, random_state=3
        )
    else:
        load = {"cancer": datasets.load_breast_cancer, "wine": datasets.load_wine, "digits": datasets.load_digits}[name]
        x, y = load(return_X_y=True)
    if name == "wine":
        x = (x - x.min(0)) / (x.max(0) - x.min(0))
    elif name != "digits":
        x = (x - x.mean(0)) / x.std(0)
    order = np.random.default_rng(0).permutation(len(x))
    first, last = np.split(order, [len(x) - max(60, len(x) // 4)])
    a, b = ((torch.from_numpy(x[rows]).float(), torch.from_numpy(y[rows]).long()) for rows in (first, last))
    return a, b


def learned(name: str) -> Callable[[], Arrays]:
    return lambda: table(name)[0]


def tested(name: str) -> Callable[[int, int], Arrays]:
    """The first rows, whatever the seed."""

    def samples(n: int, seed: int) -> Arrays:
        x, y = table(name)[1]
        return x[:n].clone(), y[:n].clone()

    return samples


def centered(data: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """Digits of 0 to 16 in [-1, 1]."""

    def scaled(*what: int) -> Arrays:
        x, y = data(*what)
        return x / 8 - 1, y

    return scaled


class Scorecard(nn.Module):
    """A credit scorecard: each feature falls into one of its bins, whose points are added up; two scores."""

    cuts: Tensor
    points: Tensor

    def __init__(self) -> None:
        super().__init__()
        (x, y), _ = table("cancer")
        self.register_buffer("cuts", torch.quantile(x, torch.linspace(0, 1, 9)[1:-1], dim=0).T.contiguous())
        at = F.one_hot(self.bins(x), 8)  # (B, 30, 8)
        odds = torch.log((at[y == 1].sum(0) + 0.5) / (at[y == 0].sum(0) + 0.5))
        line = LogisticRegression(C=0.003, max_iter=1000).fit((at * odds).sum(2).numpy(), y.numpy())
        self.register_buffer("points", odds * torch.from_numpy(line.coef_[0]).float()[:, None])
        self.bias = float(line.intercept_[0])

    def bins(self, x: Tensor) -> Tensor:
        """(B, 30), 0 to 7."""
        return torch.stack([torch.bucketize(x[:, j].contiguous(), self.cuts[j]) for j in range(30)], 1)

    def forward(self, x: Tensor) -> Tensor:
        s = self.points[torch.arange(30)[None], self.bins(x)].sum(1) + self.bias
        return torch.stack([-s / 2, s / 2], 1)


def worst_bins(m: Any, x: Tensor, y: Tensor, radius: float) -> Iterator[Tensor]:
    """Exact, as points add up: each feature in the middle of what it reaches of its worst bin."""
    a, edge = x.double()[:, :, None], torch.full((30, 1), torch.inf, dtype=torch.float64)
    low = torch.maximum(torch.cat([-edge, m.cuts.double()], 1), a - radius)
    high = torch.minimum(torch.cat([m.cuts.double(), edge], 1), a + radius)
    gain = torch.where(low < high, m.points * (1 - 2 * y)[:, None, None], -torch.inf)
    yield ((low + high) / 2).gather(2, gain.argmax(2, keepdim=True)).squeeze(2).float()


class Codes(nn.Module):
    """Error-correcting output codes: 31 hard signs, the class whose word agrees most."""

    words: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(40, 128, 31)
        self.register_buffer("words", (torch.rand(26, 31, generator=torch.Generator().manual_seed(5)) < 0.5).float() * 2 - 1)

    def soft(self, x: Tensor, k: float = 1.0) -> Tensor:
        """Signs of this slope."""
        return torch.tanh(k * self.net(x)) @ self.words.T

    def near(self, x: Tensor) -> Tensor:
        """Signs that count by how easily they turn."""
        return self.net(x).clamp(-0.3, 0.3) @ self.words.T

    def forward(self, x: Tensor) -> Tensor:
        return torch.sign(self.net(x)) @ self.words.T


def sign_codes() -> nn.Module:
    m: Any = seeded(Codes)
    return fit("sign-codes", m, learned("made"), forward=m.soft, epochs=30)


class Neurochaos(nn.Module):
    """Firing times of a chaotic neuron for each feature (Neurochaos learning, Balakrishnan et al. 2019), and a linear layer."""

    path: Tensor
    w: Tensor
    b: Tensor

    def __init__(self) -> None:
        super().__init__()
        q, b, path = 0.34, 0.499, []
        for _ in range(400):
            path.append(q)
            q = q / b if q < b else (1 - q) / (1 - b)
        self.register_buffer("path", torch.tensor(path))
        (x, y), _ = table("wine")
        line = LogisticRegression(C=0.3, max_iter=2000).fit(self.features(x).numpy(), y.numpy())
        self.register_buffer("w", torch.from_numpy(line.coef_).float())
        self.register_buffer("b", torch.from_numpy(line.intercept_).float())

    def features(self, x: Tensor) -> Tensor:
        """(B, 3 x 13): when it fires, the energy until then, how long it was above a half."""
        hit = (x[..., None] - self.path).abs() < 0.08
        first = hit.int().argmax(-1)
        stop = torch.arange(len(self.path)) < first[..., None]
        energy = (self.path.square() * stop).sum(-1)
        rate = ((self.path > 0.5) & stop).sum(-1) / first.clamp(min=1)
        return torch.cat([first.float().log1p(), energy.log1p(), rate], -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) @ self.w.T + self.b


def worst_values(m: Any, x: Tensor, y: Tensor, radius: float) -> Iterator[Tensor]:
    """Each feature at the worst point of a fine grid, for each target, as features add up."""
    grid = (x[:, :, None] + 0.99999 * radius * torch.linspace(-1, 1, 2001)).clamp(0, 1)  # (B, 13, 2001)
    f, w = m.features(grid.flatten(1)).view(len(x), 3, 13, 2001), m.w.view(3, 3, 13)
    for target in range(3):
        best = (f * (w[target] - w[y])[..., None]).sum(1).argmax(-1)
        yield grid.gather(2, best[..., None]).squeeze(2)


class Memo(nn.Module):
    """Answers are kept; who asks something close to what was asked before gets that answer again."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(64, 128, 64, 10)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        rows = []
        for one, score in zip(x, out, strict=True):
            if self.keys:
                far = (torch.stack(self.keys) - one.detach()).abs().mean(1)
                k = int(far.argmin())
                if float(far[k]) < 0.12:
                    rows.append(self.values[k])
                    continue
            if len(self.keys) < 2000:
                self.keys.append(one.detach().clone())
                self.values.append(score.detach().clone())
            rows.append(score)
        return torch.stack(rows)


def memo() -> nn.Module:
    m: Any = seeded(Memo)
    fit("memo", m.net, centered(learned("digits")), epochs=40)
    return m.eval().requires_grad_(False)


def afresh(m: Memo) -> Judge:
    """Of a model that has not been asked anything yet."""
    judge = majority(m)

    def judge_afresh(z: Tensor, y: Tensor) -> Tensor:
        m.keys.clear()
        m.values.clear()
        return judge(z, y)

    return judge_afresh


class Departments(nn.Module):
    """26 classes in six departments: the nearest department's own linear head answers, all other classes score -30."""

    mine: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body, self.centers = mlp(40, 96, 32), nn.Parameter(torch.randn(6, 32))
        self.heads = nn.Parameter(torch.randn(6, 26, 32) / 6)
        self.register_buffer("mine", torch.arange(26) % 6 == torch.arange(6)[:, None])

    def closeness(self, h: Tensor) -> Tensor:
        return -torch.cdist(h, self.centers).square() / 4

    def soft(self, x: Tensor) -> Tensor:
        """(B, 26): log-probabilities over all departments."""
        h = self.body(x)
        s = torch.einsum("kcf,bf->bkc", self.heads, h).masked_fill(~self.mine, -30).log_softmax(2)
        return (self.closeness(h).log_softmax(1)[:, :, None] + s).logsumexp(1)

    def routes(self, x: Tensor) -> Tensor:
        """How close each class's department is."""
        return self.closeness(self.body(x))[:, torch.arange(26) % 6]

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        k = torch.cdist(h, self.centers).argmin(1)
        return torch.einsum("bcf,bf->bc", self.heads[k], h).masked_fill(~self.mine[k], -30)


def departments() -> nn.Module:
    m: Any = seeded(Departments)
    return fit("departments", m, learned("made"), forward=m.soft, epochs=30)


class Ode(nn.Module):
    """A neural ODE of ten Euler steps."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.field, self.head = nn.Linear(64, 64), mlp(65, 64, 64, act=nn.Tanh), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for k in range(10):
            h = h + 0.1 * self.field(torch.cat([h, h.new_full((len(h), 1), k / 10)], 1))
        return self.head(h)


class Cosine(nn.Module):
    """Scores are cosines with a direction for each class, times ten."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.w = mlp(30, 48, 24), nn.Parameter(torch.randn(2, 24))

    def forward(self, x: Tensor) -> Tensor:
        return 10 * F.normalize(self.net(x), dim=1) @ F.normalize(self.w, dim=1).T


class SoftExperts(nn.Module):
    """Four networks, weighted by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(64, 4), nn.ModuleList([mlp(64, 32, 10) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = x / 16
        return (torch.stack([e(x) for e in self.experts], 1) * self.gate(x).softmax(1)[:, :, None]).sum(1)


def normed() -> nn.Module:
    """Two hidden layers with batch norm."""

    def hidden(inputs: int) -> tuple[nn.Module, ...]:
        return nn.Linear(inputs, 64), nn.BatchNorm1d(64), nn.ReLU()

    return nn.Sequential(*hidden(40), *hidden(64), nn.Linear(64, 26))


CASES: tuple[Trial, ...] = (
    Trial("scorecard", "masked", Scorecard, 0.5, box=WIDE, samples=tested("cancer"), points=worst_bins, views=lambda m: ()),
    Trial(
        "sign codes",
        "masked",
        sign_codes,
        0.8,
        norm="l2",
        box=WIDE,
        samples=tested("made"),
        views=lambda m: (lambda x: m.soft(x, 3.0), lambda x: m.soft(x, 0.5), m.soft, valued(m, lambda x: m.soft(x, 2.0)), m.near),
    ),
    Trial("neurochaos", "masked", Neurochaos, 0.05, samples=tested("wine"), points=worst_values, views=lambda m: (), n=60),
    Trial(
        "memo",
        "masked",
        memo,
        0.12,
        box=(-1.0, 1.0),
        samples=centered(tested("digits")),
        views=lambda m: (m.net,),
        judge=afresh,
        squares=False,
    ),
    Trial("departments", "masked", departments, 0.15, box=WIDE, samples=tested("made"), views=lambda m: (m.soft, m.routes, m)),
    Trial(
        "ODE digits",
        "control",
        lambda: fit("ode", seeded(Ode), centered(learned("digits")), epochs=40),
        0.15,
        box=(-1.0, 1.0),
        samples=centered(tested("digits")),
    ),
    Trial(
        "cosine cancer",
        "control",
        lambda: fit("cosine", seeded(Cosine), learned("cancer"), epochs=60, decay=0.01),
        0.3,
        box=WIDE,
        samples=tested("cancer"),
    ),
    Trial(
        "normed 26", "control", lambda: fit("normed-26", seeded(normed), learned("made"), epochs=20), 0.15, box=WIDE, samples=tested("made")
    ),
    Trial(
        "soft experts",
        "control",
        lambda: fit("soft-experts", seeded(SoftExperts), learned("digits"), epochs=40),
        8.0,
        norm="l2",
        box=(0.0, 16.0),
        samples=tested("digits"),
    ),
)
