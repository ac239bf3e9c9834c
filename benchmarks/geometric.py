"""DeepFool, SuperDeepFool, FAB, JSMA, sigma-zero and PDPGD against the peers: python benchmarks/geometric.py

Needs EPSBALL_DATA (a folder with mnist/mnist.npz) and the network that benchmarks/mnist.py trains. Run it in the peers'
environment (peers.md) with PYTHONPATH=src:benchmarks; a peer that cannot be imported is left out, and the table says so.
Every answer is judged here: fresh outputs, sizes in float64, a sample counts only where its class changed. Sizes are medians
over all attacked samples, a failure counts as infinite. Rows are those that the network saw, by a counter around it.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import epsball as eb
import mnist
from epsball.core import Targeted, Victim
from epsball.threats import named

RESULTS = Path(__file__).parent / "results"
Run = Callable[[nn.Module, Tensor, Tensor], Tensor]
P = {"linf": float("inf"), "l2": 2, "l1": 1, "l0f": 0}


class Counted(nn.Module):
    """Counts rows forward, and rows backward through the output."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forwards, self.backwards = net, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        output = self.net(x)
        self.forwards += len(x)
        if output.requires_grad:
            output.register_hook(lambda g: self._back(len(g)))
        return output

    def _back(self, rows: int) -> None:
        self.backwards += rows


def ours(name: str, norm: str, targeted: bool = False, **options: object) -> Run:
    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        goal = Targeted(y) if targeted else y
        return eb.get(name, threat=norm, **options)(Victim(model), x, goal, float("inf")).x_adv

    return run


def smallest(norm: str) -> Run:
    return lambda model, x, y: eb.smallest(norm)(Victim(model), x, y, None).x_adv


def adv_lib(module: str, name: str, **options: object) -> Run:
    stubbed("torchvision", "torchvision.transforms", "torchvision.models", "visdom")
    function = getattr(importlib.import_module(f"adv_lib.attacks.{module}"), name)
    return lambda model, x, y: function(model, x, y, **options)


def stubbed(*names: str) -> None:
    """Stands in for packages that adv-lib imports on its way but these attacks never use."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            module = types.ModuleType(name)
            module.__getattr__ = lambda _: type("Unused", (), {})  # type: ignore[method-assign]
            module.__path__ = []
            sys.modules[name] = module


def foolbox(name: str, **options: object) -> Run:
    fb = importlib.import_module("foolbox")
    attack = getattr(fb.attacks, name)(**options)
    return lambda model, x, y: attack(fb.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=None)[0]


def torchattacks(name: str, targeted: bool = False, **options: object) -> Run:
    ta = importlib.import_module("torchattacks")

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        attack = getattr(ta, name)(model, **options)
        if targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        return attack(x, y)

    return run


def official_fab(norm: str, steps: int, targeted: bool = False) -> Run:
    base = importlib.import_module("autoattack.fab_pt").FABAttack_PT
    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        # eps=inf: the best of its one run is kept whatever its size; its noise is not used then.
        return base(model, norm=name, n_iter=steps, eps=float("inf"), device="cpu", targeted=targeted, seed=0).perturb(x, y)

    return run


def cases(n: int, slow: int) -> list[tuple[str, str, int, bool, dict[str, Callable[[], Run]]]]:
    """(attack, norm, samples, targeted, who -> how)."""
    out: list[tuple[str, str, int, bool, dict[str, Callable[[], Run]]]] = []
    for norm, p in (("l2", 2), ("linf", float("inf"))):
        out.append(
            ("DeepFool", norm, n, False, {
                "epsball": lambda norm=norm: ours("deepfool", norm),
                "adv-lib": lambda p=p: adv_lib("deepfool", "df", norm=p, steps=50),
                "foolbox": lambda norm=norm: foolbox("L2DeepFoolAttack" if norm == "l2" else "LinfDeepFoolAttack"),
                **({"torchattacks": lambda: torchattacks("DeepFool")} if norm == "l2" else {}),
            })
        )  # fmt: skip
    out.append(
        ("SuperDeepFool", "l2", n, False, {
            "epsball": lambda: ours("superdeepfool", "l2"),
            "adv-lib": lambda: adv_lib("superdeepfool", "sdf"),
            "epsball smallest": lambda: smallest("l2"),
        })
    )  # fmt: skip
    for norm, p in (("linf", float("inf")), ("l2", 2), ("l1", 1)):
        out.append(
            (f"FAB, {20} steps", norm, slow, False, {
                "epsball": lambda norm=norm: ours("fab", norm, steps=20),
                "official": lambda norm=norm: official_fab(norm, 20),
                "adv-lib": lambda p=p: adv_lib("fast_adaptive_boundary", "fab", norm=p, n_iter=20),
                "epsball smallest": lambda norm=norm: smallest(norm),
            })
        )  # fmt: skip
        out.append(
            (f"FAB-T, 9 x {20} steps", norm, slow, False, {
                "epsball": lambda norm=norm: ours("fab_t", norm, steps=20),
                "adv-lib": lambda p=p: adv_lib("fast_adaptive_boundary", "fab", norm=p, n_iter=20, targeted_restarts=True),
            })
        )  # fmt: skip
    out.append(
        ("JSMA, theta 1, target y + 1", "l0f", n, True, {
            "epsball": lambda: ours("jsma", "l0f", targeted=True, steps=56, gamma=0.145),
            "torchattacks": lambda: torchattacks("JSMA", targeted=True, theta=1.0, gamma=0.145),
        })
    )  # fmt: skip
    out.append(("JSMA, theta 1, untargeted", "l0f", n, False, {"epsball": lambda: ours("jsma", "l0f", steps=56, gamma=0.145)}))
    out.append(
        ("sigma-zero, 300 steps", "l0f", n, False, {
            "epsball": lambda: ours("sigma_zero", "l0f", steps=300),
            "adv-lib": lambda: adv_lib("sigma_zero", "sigma_zero", num_steps=300),
            "epsball smallest": lambda: smallest("l0f"),
        })
    )  # fmt: skip
    for norm, p in (("linf", float("inf")), ("l2", 2), ("l1", 1)):
        out.append(
            ("PDPGD, 300 steps", norm, n, False, {
                "epsball": lambda norm=norm: ours("pdpgd", norm, steps=300),
                "adv-lib": lambda p=p: adv_lib("primal_dual_gradient_descent", "pdpgd", norm=p, num_steps=300),
            })
        )  # fmt: skip
    return out


def judged(net: nn.Module, x: Tensor, y: Tensor, norm: str, targeted: bool, x_adv: Tensor) -> tuple[float, float]:
    """(success, median size), by a fresh look."""
    with torch.no_grad():
        top = net(x_adv.clamp(0, 1)).argmax(1)
    reached = (top == y) if targeted else (top != y)
    size = named(norm).size(x, x_adv.clamp(0, 1))
    return float(reached.double().mean()), float(torch.where(reached, size, torch.inf).median())


def measured(run: Run, net: nn.Module, x: Tensor, y: Tensor, norm: str, targeted: bool) -> str:
    model = Counted(net).eval()
    started = time.process_time()
    x_adv = run(model, x.clone(), y.clone()).detach()
    seconds = time.process_time() - started
    success, median = judged(net, x, y, norm, targeted, x_adv)
    n = len(x)
    return f"{100 * success:.1f} | {median:.4g} | {model.forwards / n:.1f} | {model.backwards / n:.1f} | {seconds:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--slow-n", type=int, default=64, help="for FAB")
    parser.add_argument("--only", default="", help="attacks whose name holds this")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    net = mnist.standard()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    x_all, y_all = test_images()
    with torch.no_grad():
        right = (net(x_all).argmax(1) == y_all).nonzero().squeeze(1)
    machine = f"{torch.get_num_threads()} thread, torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"
    lines = [
        "| attack | norm | n | who | success % | median size | forwards | backwards | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for attack, norm, n, targeted, peers in cases(arguments.n, arguments.slow_n):
        if arguments.only not in attack:
            continue
        x, y = x_all[right[:n]], y_all[right[:n]]
        y = (y + 1) % 10 if targeted else y
        for who, make in peers.items():
            try:
                run = make()
            except ImportError as error:
                cells = f"not importable: {error} | | | |"
            else:
                run(net, x[:2], y[:2])
                cells = measured(run, net, x, y, norm, targeted)
            lines.append(f"| {attack} | {norm} | {n} | {who} | {cells} |")
            print(lines[-1], flush=True)
    if not arguments.only:
        write(lines, arguments, machine)


def test_images() -> tuple[Tensor, Tensor]:
    import numpy as np

    with np.load(mnist.mnist_file(), allow_pickle=False) as file:
        x, y = torch.from_numpy(file["x_test"][:1000]), torch.from_numpy(file["y_test"][:1000])
    return x.float()[:, None] / 255, y.long()


def write(lines: list[str], arguments: argparse.Namespace, machine: str) -> None:
    text = [
        "# DeepFool, FAB, JSMA, sigma-zero, PDPGD and their peers on a small MNIST CNN",
        "",
        f"`OMP_NUM_THREADS=1 PYTHONPATH=src:benchmarks:../peers/auto-attack python benchmarks/geometric.py --n {arguments.n} "
        f"--slow-n {arguments.slow_n}`, in the peers' environment; {machine}.",
        "The first n correctly classified images of the test set, all in one batch; seed 0. Rows are per image. One run of each, after a",
        "warm-up on two images, on a machine with other work: CPU seconds are good to about 20 %. Medians are over all n images, a failure",
        "counts as infinite. An answer outside the box is clipped first.",
        "",
        *lines,
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "geometric.md").write_text("\n".join(text) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
