"""DeepFool, SuperDeepFool, FAB, JSMA, sigma-zero and PDPGD against the peers: python benchmarks/geometric.py

Needs EPSBALL_DATA (a folder with mnist/mnist.npz) and the network of benchmarks/nets.py. Run it in the peers'
environment (peers.md) with PYTHONPATH=src; a peer that cannot be imported is left out, and the table says so.
Every answer is judged here: fresh outputs, sizes in float64, a sample counts only where its class changed. Sizes are medians
over all attacked samples, a failure counts as infinite. Rows are those that the network saw, by a counter around it.
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nets import mnist_file, trained
from peers import Counting, P, Run, adv_lib, distances, foolbox, official, ours, reached, torchattacks

RESULTS = Path(__file__).parent / "results"
Case = tuple[str, str, int, bool, dict[str, Callable[[], Run]]]


def cases(n: int, slow: int) -> list[Case]:
    """(attack, norm, samples, targeted, who -> how)."""
    return [*_deepfool(n), *_fab(slow), *_sparse(n), *_pdpgd(n)]


def _deepfool(n: int) -> list[Case]:
    out: list[Case] = []
    for norm, name in (("l2", "L2DeepFoolAttack"), ("linf", "LinfDeepFoolAttack")):
        runs: dict[str, Callable[[], Run]] = {
            "epsball": partial(ours, "deepfool", norm),
            "adv-lib": partial(adv_lib, "df", norm=P[norm], steps=50),
            "foolbox": partial(foolbox, name),
        }
        if norm == "l2":
            runs["torchattacks"] = partial(torchattacks, "DeepFool")
        out.append(("DeepFool", norm, n, False, runs))
    runs = {
        "epsball": partial(ours, "superdeepfool", "l2"),
        "adv-lib": partial(adv_lib, "sdf"),
        "epsball smallest": partial(ours, "smallest", "l2"),
    }
    return [*out, ("SuperDeepFool", "l2", n, False, runs)]


def _fab(n: int) -> list[Case]:
    out: list[Case] = []
    for norm in ("linf", "l2", "l1"):
        runs = {
            "epsball": partial(ours, "fab", norm, steps=20),
            "official": partial(official, "FABAttack_PT", norm, n_iter=20),
            "adv-lib": partial(adv_lib, "fab", norm=P[norm], n_iter=20),
            "epsball smallest": partial(ours, "smallest", norm),
        }
        out.append(("FAB, 20 steps", norm, n, False, runs))
        runs = {
            "epsball": partial(ours, "fab_t", norm, steps=20),
            "adv-lib": partial(adv_lib, "fab", norm=P[norm], n_iter=20, targeted_restarts=True),
        }
        out.append(("FAB-T, 9 x 20 steps", norm, n, False, runs))
    return out


def _sparse(n: int) -> list[Case]:
    toward = {
        "epsball": partial(ours, "jsma", "l0f", targeted=True, steps=56, gamma=0.145),
        "torchattacks": partial(torchattacks, "JSMA", targeted=True, theta=1.0, gamma=0.145),
    }
    sigma_zero = {
        "epsball": partial(ours, "sigma_zero", "l0f", steps=300),
        "adv-lib": partial(adv_lib, "sigma_zero", num_steps=300),
        "epsball smallest": partial(ours, "smallest", "l0f"),
    }
    return [
        ("JSMA, theta 1, target y + 1", "l0f", n, True, toward),
        ("JSMA, theta 1, untargeted", "l0f", n, False, {"epsball": partial(ours, "jsma", "l0f", steps=56, gamma=0.145)}),
        ("sigma-zero, 300 steps", "l0f", n, False, sigma_zero),
    ]


def _pdpgd(n: int) -> list[Case]:
    return [
        ("PDPGD, 300 steps", norm, n, False, {
            "epsball": partial(ours, "pdpgd", norm, steps=300),
            "adv-lib": partial(adv_lib, "pdpgd", norm=P[norm], num_steps=300),
        })
        for norm in ("linf", "l2", "l1")
    ]  # fmt: skip


def measured(run: Run, net: nn.Module, x: Tensor, y: Tensor, norm: str, targeted: bool) -> str:
    """One run, judged by a fresh look."""
    model = Counting(net).eval()
    started = time.process_time()
    x_adv = run(model, x.clone(), y.clone()).detach().clamp(0, 1)
    seconds = time.process_time() - started
    done, n = reached(net, x_adv, y, targeted), len(x)
    median = torch.where(done, distances(norm, x, x_adv), torch.inf).median()
    return f"{100 * done.double().mean():.1f} | {median:.4g} | {model.forwards / n:.1f} | {model.backwards / n:.1f} | {seconds:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--slow-n", type=int, default=64, help="for FAB")
    parser.add_argument("--only", default="", help="attacks whose name holds this")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    net = trained("mnist-standard").requires_grad_(False)
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
    with np.load(mnist_file(), allow_pickle=False) as file:
        x, y = torch.from_numpy(file["x_test"][:1000]), torch.from_numpy(file["y_test"][:1000])
    return x.float()[:, None] / 255, y.long()


def write(lines: list[str], arguments: argparse.Namespace, machine: str) -> None:
    text = [
        "# DeepFool, FAB, JSMA, sigma-zero, PDPGD and their peers on a small MNIST CNN",
        "",
        f"`OMP_NUM_THREADS=1 PYTHONPATH=src:../peers/auto-attack python benchmarks/geometric.py --n {arguments.n} "
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
