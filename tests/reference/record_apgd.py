"""Record what the official AutoAttack code does on three tiny models, into `apgd.npz` beside this file.

Needs torch, numpy, scikit-learn and `autoattack`: github.com/fra31/auto-attack at commit
a39220048b3c9f2cca9a4d3a54604793c68eca7e on PYTHONPATH (see benchmarks/peers.md). The tests need none of this: they read
the file through `models.py`. README.md says what every array means.

    python tests/reference/record_apgd.py             # fit the models, run everything, write apgd.npz (a few minutes)
    python tests/reference/record_apgd.py --compare   # rerun the recorded cases on the recorded models, write nothing
"""

# ruff: noqa: T201  (a script: it reports on stdout)

import argparse
import copy
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import autoattack
import numpy as np
import torch
from autoattack import autopgd_base
from sklearn.datasets import load_digits
from torch import Tensor, nn

from models import RECORD, architectures, images, load_reference

COMMIT = "a39220048b3c9f2cca9a4d3a54604793c68eca7e"
SEED, N_CASE, N_STANDARD, N_JOLT = 0, 24, 100, 6
EPS = {"Linf": 0.1, "L2": 0.6, "L1": 2.5}
STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")
TRACED = {
    "linear/ce/Linf/0.1/40/clean",
    "mlp/dlr-targeted/Linf/0.1/40/random",
    "conv/ce/Linf/0.1/100/clean",
    "conv/ce/L2/0.6/40/clean",
    "mlp/dlr-targeted/L2/0.6/40/random",
    "linear/ce/L1/2.5/40/clean",
    "mlp/ce/L1/2.5/40/given",
    "conv/ce/L1/2.5/100/random",
}


@dataclass(frozen=True)
class Setting:
    model: str
    loss: str
    norm: str
    eps: float
    n_iter: int
    init: str

    @property
    def name(self) -> str:
        return f"{self.model}/{self.loss}/{self.norm}/{self.eps}/{self.n_iter}/{self.init}"


def settings() -> Iterator[Setting]:
    for model in architectures():
        for norm, eps in EPS.items():
            for loss in ("ce", "dlr", "dlr-targeted"):
                yield Setting(model, loss, norm, eps, 40, "clean")
            for loss in ("ce", "dlr-targeted"):
                yield Setting(model, loss, norm, eps, 40, "random")
        yield Setting(model, "ce", "L1", EPS["L1"], 40, "given")
    yield Setting("mlp", "ce", "Linf", 0.2, 40, "clean")
    yield Setting("conv", "ce", "Linf", EPS["Linf"], 100, "clean")
    yield Setting("conv", "dlr", "L2", EPS["L2"], 100, "clean")
    yield Setting("conv", "ce", "L1", EPS["L1"], 100, "random")


@dataclass
class Trace:
    """What the criterion saw of the caller's local variables, call by call: call 0 is the start."""

    points: list[Tensor] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)
    step: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    topk: Tensor | None = None
    support: Tensor | None = None

    def watch(self, criterion: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def watched(logits: Tensor, y: Tensor) -> Tensor:
            loss = criterion(logits, y)
            seen = sys._getframe(1).f_locals
            self.loss.append(loss.detach().clone())
            self.points.append(seen["x_adv"].detach().clone())
            if "i" in seen:
                self.step.append(seen["step_size"].flatten().clone())
            if "topk_curr" in seen:
                self.kept.append(seen["n_fts"] - seen["topk_curr"])
                if seen["i"] == 0:
                    self.topk, self.support = seen["topk"].clone(), seen["sp_old"].clone()
            return loss

        return watched


def attack(net: nn.Module, s: Setting, x: Tensor, y: Tensor, y_target: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor, Trace]:
    """One official `attack_single_run`: (robust, loss_best, x_best_adv, trace)."""
    kind = autopgd_base.APGDAttack_targeted if s.loss == "dlr-targeted" else autopgd_base.APGDAttack
    official, trace, official_nn = kind(net, n_iter=s.n_iter, norm=s.norm, eps=s.eps), Trace(), autopgd_base.nn
    official.loss, official.y_target = s.loss, y_target
    official.init_hyperparam(x)
    official.dlr_loss = trace.watch(official.dlr_loss)
    if s.loss == "dlr-targeted":
        official.dlr_loss_targeted = trace.watch(official.dlr_loss_targeted)
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "there are points with zero gradient"
        autopgd_base.nn = types.SimpleNamespace(CrossEntropyLoss=lambda reduction: trace.watch(nn.CrossEntropyLoss(reduction=reduction)))
        try:
            _, robust, loss_best, x_adv = official.attack_single_run(x, y, {"clean": x, "random": None, "given": start}[s.init])
        finally:
            autopgd_base.nn = official_nn
    return robust, loss_best, x_adv.detach(), trace


def distance(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    order = {"Linf": float("inf"), "L2": 2.0, "L1": 1.0}[norm]
    return torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), ord=order, dim=1)


class Jolted(nn.Module):
    """The same model evaluated in float64, its weights moved by about one float32 rounding (seed 0: not at all)."""

    def __init__(self, net: nn.Module, seed: int) -> None:
        super().__init__()
        self.net, rng = copy.deepcopy(net).double(), np.random.default_rng(seed)
        for weight in self.net.parameters():
            weight.data *= 1 + 2.0**-24 * torch.from_numpy(rng.uniform(-1, 1, weight.shape)) * (seed > 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double()).float()


def fit(x: Tensor, y: Tensor) -> dict[str, nn.Sequential]:
    """Full-batch Adam from a numpy seed, with a weight decay so that the robust accuracies are neither 0 nor 1."""
    nets = architectures()
    for number, net in enumerate(nets.values()):
        rng = np.random.default_rng([SEED, number])
        for weight in net.parameters():
            bound = 1 / np.sqrt(max(weight[0].numel(), 1))
            weight.data = torch.from_numpy(rng.uniform(-bound, bound, weight.shape).astype(np.float32))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=1e-3)
        for _ in range(300):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        net.eval().requires_grad_(False)
    return nets


class Counted(nn.Module):
    """Counts rows forward, and rows for which a gradient came back to the logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forwards, self.backwards = net, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits = self.net(x)
        if logits.requires_grad:
            logits.register_hook(self._back)
        return logits

    def _back(self, grad: Tensor) -> None:
        self.backwards += len(grad)


def standard(net: nn.Module, norm: str, x: Tensor, y: Tensor) -> dict[str, Any]:
    """One official standard suite: survivors, and rows forward and backward, stage by stage."""
    model, marks = Counted(net), []
    suite = autoattack.AutoAttack(model, norm=norm, eps=EPS[norm], seed=SEED, verbose=False, device="cpu")

    def marked(perturb: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def perturb_and_mark(x: Tensor, y: Tensor) -> Tensor:
            marks.append((len(x), model.forwards, model.backwards))
            return perturb(x, y)

        return perturb_and_mark

    for part in (suite.apgd, suite.apgd_targeted, suite.fab, suite.square):
        part.perturb = marked(part.perturb)
    x_adv = suite.run_standard_evaluation(x, y)
    robust = net(x_adv).argmax(1) == y
    marks.append((int(robust.sum()), model.forwards, model.backwards))
    marks += [marks[-1]] * (len(STAGES) + 1 - len(marks))  # the suite stops when nothing is left
    alive, forwards, backwards = (np.array(column, np.int64) for column in zip(*marks, strict=True))
    return {
        "robust": robust.numpy(),
        "alive": alive.astype(np.int32),
        "forwards": np.diff(forwards, prepend=0),
        "backwards": np.diff(backwards, prepend=0),
        "excess": float((distance(x_adv, x, norm) - EPS[norm]).max()),
    }


def record() -> dict[str, np.ndarray[Any, Any]]:
    digits = load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.data))
    pixels, labels = digits.data[order].astype(np.uint8), digits.target[order].astype(np.int64)
    nets = fit(images(pixels[:1300]), torch.from_numpy(labels[:1300]))
    pixels, labels = pixels[1300:], labels[1300:]
    x, y = images(pixels), torch.from_numpy(labels)
    right = torch.stack([net(x).argmax(1) == y for net in nets.values()])
    print("test accuracy", dict(zip(nets, right.double().mean(1).tolist(), strict=True)))

    chosen = right.all(0).nonzero().flatten()[:N_CASE]
    out: dict[str, np.ndarray[Any, Any]] = {
        "version": np.array([f"autoattack {COMMIT}", f"torch {torch.__version__}", f"numpy {np.__version__}"]),
        "x": pixels[chosen],
        "y": labels[chosen].astype(np.uint8),
    }
    for name, net in nets.items():
        out |= {f"model/{name}/{key}": weight.numpy() for key, weight in net.state_dict().items()}
        out[f"y_target/{name}"] = net(x[chosen]).sort(dim=1)[1][:, -2].numpy().astype(np.uint8)
    out |= record_cases(nets, x[chosen], y[chosen], out)
    out |= record_standard(nets, x[:N_STANDARD], y[:N_STANDARD])
    out |= {"aa_standard/x": pixels[:N_STANDARD], "aa_standard/y": labels[:N_STANDARD].astype(np.uint8)}
    return out


def record_cases(nets: dict[str, nn.Sequential], x: Tensor, y: Tensor, known: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    out: dict[str, np.ndarray[Any, Any]] = {}
    table: dict[str, list[Any]] = {key: [] for key in ("name", "model", "loss", "norm", "eps", "n_iter", "init")}
    results: dict[str, list[Any]] = {key: [] for key in ("loss_best", "robust", "size", "spread", "fragile")}
    starts: dict[str, Tensor] = {}
    for s in sorted(settings(), key=lambda s: s.init == "given"):  # stable: "given" needs the start that "random" drew
        net, y_target = nets[s.model], torch.from_numpy(known[f"y_target/{s.model}"]).long()
        start = starts.get(s.norm, x)
        robust, loss_best, x_adv, trace = attack(net, s, x, y, y_target, start)
        jolted = [attack(Jolted(net, seed), s, x, y, y_target, start) for seed in range(N_JOLT)]
        for key in table:
            table[key].append(getattr(s, key))
        spread = torch.stack([other[1] - loss_best for other in jolted]).abs().amax(0)
        fragile = torch.stack([other[0] != robust for other in jolted]).any(0)
        for key, value in zip(results, (loss_best, robust, distance(x_adv, x, s.norm), spread, fragile), strict=True):
            results[key].append(value.numpy())
        if s.init == "random":
            assert torch.equal(starts.setdefault(s.norm, trace.points[0]), trace.points[0]), "the start hangs on the model"
        if s.norm == "L1":
            out[f"l1/{s.init}/topk"] = trace.topk.numpy().astype(np.float32)
            out[f"l1/{s.init}/support"] = trace.support.numpy().astype(np.int32)
        if s.name in TRACED:
            out[f"trajectory/{s.name}/loss"] = torch.stack(trace.loss).numpy()
            out[f"trajectory/{s.name}/step"] = torch.stack(trace.step).numpy()
            if trace.kept:
                out[f"trajectory/{s.name}/kept"] = torch.stack(trace.kept).numpy().astype(np.uint8)
        seen = torch.stack(trace.points)
        print(
            f"{s.name:40s} robust {int(robust.sum()):2d}/{len(x)} loss {loss_best.mean():9.5f} spread {spread.max():.1e} "
            f"fragile {int(fragile.sum())} out of ball {distance(x_adv, x, s.norm).max() - s.eps:8.1e} "
            f"out of box {max(-seen.min().item(), seen.max().item() - 1):8.1e}"
        )
    assert set(table["name"]) >= TRACED
    out |= {f"start/{norm}": start.flatten(1).numpy() for norm, start in starts.items()}
    out |= {f"case/{key}": np.array(column) for key, column in table.items()}
    out |= {f"case/{key}": np.stack(column).astype(bool if column[0].dtype == bool else np.float32) for key, column in results.items()}
    return out


def record_standard(nets: dict[str, nn.Sequential], x: Tensor, y: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    out: dict[str, list[Any]] = {key: [] for key in ("name", "model", "norm", "eps", "robust", "alive", "forwards", "backwards")}
    for model, net in nets.items():
        for norm, eps in EPS.items():
            result = standard(net, norm, x, y)
            row = result | {"name": f"{model}/{norm}/{eps}", "model": model, "norm": norm, "eps": eps}
            for key in out:
                out[key].append(row[key])
            counts = {key: row[key].tolist() for key in ("alive", "forwards", "backwards")}
            print("standard", row["name"], counts, f"out of ball {row['excess']:.1e}")
    return {f"aa_standard/{key}": np.array(column) for key, column in out.items()} | {"aa_standard/stages": np.array(STAGES)}


def compare() -> None:
    """Rerun every recorded case; print how far loss_best and robust moved, in all and where the record calls it stable."""
    reference = load_reference()
    for case in reference.cases:
        model = next(name for name, net in reference.models.items() if net is case.model)
        s = Setting(model, case.loss, case.norm, case.eps, case.n_iter, case.init)
        y_target = case.y if case.y_target is None else case.y_target
        robust, loss_best, _, trace = attack(case.model, s, case.x, case.y, y_target, case.x if case.start is None else case.start)
        moved, stable = (loss_best - case.loss_best).abs(), case.spread < 1e-5
        print(
            f"{case.name:40s} loss_best moved {moved.max():.1e}, on {int(stable.sum())} stable samples "
            f"{moved[stable].max() if stable.any() else 0:.1e}; robust differs on {int((robust != case.robust).sum())}"
        )
        if case.start is not None:
            assert torch.allclose(trace.points[0], case.start, atol=1e-6, rtol=0), "another start"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="rerun the recorded cases and print the differences")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.compare:
        return compare()
    np.savez_compressed(RECORD, **record())
    print(f"{RECORD.name}: {RECORD.stat().st_size / 1000:.0f} kB")
    return None


if __name__ == "__main__":
    main()
