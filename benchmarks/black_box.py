"""Black-box attacks against each other and against white-box ones, on the small networks of nets.py.

`python benchmarks/black_box.py [TABLE ...]` with tables zoo, label_only, l0, surrogate, after_transfer. Needs EPSBALL_DATA. Samples
are the first correctly classified of a draw of seed 0; queries are per sample.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import epsball as eb
from epsball.core import Access, AttackLike, Victim
from nets import mnist_file, root, trained

A = eb.attacks


def samples(name: str, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The network and n images that it classifies correctly."""
    source = str(mnist_file() if name.startswith("mnist") else root() / "cifar10_jpeg")
    net, data = trained(name), eb.load_data(source, n=4 * n, seed=0)
    x, y = torch.as_tensor(data.x), torch.as_tensor(data.y).long()
    right = net(x).argmax(1) == y
    return net, x[right][:n], y[right][:n]


def zoo() -> None:
    """Mean L2 on MNIST, n = 20, and as a share of white-box C&W's."""
    net, x, y = samples("mnist-standard", 20)
    white = A.cw_l2()(net, x, y, torch.inf)
    base = float(torch.where(white.reached, white.size, torch.inf).mean())
    print(f"cw_l2: mean L2 {base:.4f}\n\n| attack | queries | mean L2 | of C&W |\n|---|---|---|---|")
    cases: list[tuple[str, AttackLike]] = [("zoo", A.zoo(steps)) for steps in (4000, 4500, 5000, 10000)]
    cases += [("zoo, ADAM", A.zoo(newton=False)), ("zoo, ADAM, c bisected", A.zoo(newton=False, searches=4))]
    for words, attack in cases:
        outcome = attack(Victim(net, access=Access.SCORES), x, y, torch.inf)
        mean = float(torch.where(outcome.reached, outcome.size, torch.inf).mean())
        print(f"| {words} | {float(outcome.queries.double().mean()):.0f} | {mean:.4f} | {mean / base:.3f} |", flush=True)


def label_only() -> None:
    """Mean and median L2, n = 20."""
    print("| network | queries | attack | mean L2 | median L2 |\n|---|---|---|---|---|")
    for name, budgets in (("mnist-standard", (500, 2000)), ("mnist-robust", (500, 2000)), ("cifar-standard", (500,))):
        net, x, y = samples(name, 20)
        for steps in budgets:
            for attack in (A.hop_skip_jump(steps), A.surfree(steps), A.sign_opt(steps), A.boundary(steps)):
                size = attack(Victim(net, access=Access.LABELS), x, y, torch.inf).size
                print(f"| {name} | {steps} | {attack.name} | {float(size.mean()):.3f} | {float(size.median()):.3f} |", flush=True)


def l0() -> None:
    """Robust accuracy and mean queries, 1,000 queries, n = 40."""
    print("| network | pixels | attack | robust accuracy | queries |\n|---|---|---|---|---|")
    paper = "loc_search, p = 10, r = 3/2, 128 probes"
    for name, radius in (("mnist-standard", 15), ("cifar-standard", 3)):
        net, x, y = samples(name, 40)
        cases = {"sparse_rs": A.sparse_rs(1000), "loc_search": A.loc_search(1000), paper: A.loc_search(1000, p=10, r=1.5, probes=128)}
        for words, attack in cases.items():
            outcome = attack(Victim(net, access=Access.SCORES), x, y, radius)
            robust = 100 * float((~outcome.reached).double().mean())
            print(f"| {name} | {radius} | {words} | {robust:.1f} % | {float(outcome.queries.double().mean()):.0f} |", flush=True)


def surrogate() -> None:
    """Share of 200 MNIST images broken by examples made on a surrogate, of which the victim is asked once; 150 others begin the fit."""
    net, x, y = samples("mnist-standard", 350)
    pool, x, y = x[:150], x[150:], y[150:]
    print("| answers | fit queries | attack | broken at 0.2 | at 0.3 |\n|---|---|---|---|---|")
    for access in (Access.LABELS, Access.SCORES):
        for rounds, most in ((0, 1000), (6, 1000), (6, 10000)):
            victim = Victim(net, access=access)
            fitted = A.fit_surrogate(victim, pool, rounds, most=most)
            for attack in (A.mi_fgsm(), A.di_fgsm(), A.ti_fgsm(length=5)):
                broken = [float(A.transferred(fitted, attack)(victim, x, y, r).reached.double().mean()) for r in (0.2, 0.3)]
                shares = " | ".join(f"{100 * share:.1f} %" for share in broken)
                print(f"| {access.name.lower()} | {fitted.fit_queries} | {attack.name} | {shares} |", flush=True)


def after_transfer() -> None:
    """`blackbox(300)` on 100 MNIST images, Linf, alone and after DI-FGSM on surrogates, each fitted to 4,200 scores of 150 other images."""
    net, x, y = samples("mnist-standard", 250)
    pool, x, y = x[:150], x[150:], y[150:]
    victim = Victim(net, access=Access.SCORES)
    fits = [A.fit_surrogate(victim, pool, 6, seed=seed) for seed in range(3)]
    stand_ins = {"none": None, "one": fits[0], "three, averaged": A.ensemble([fit.victim for fit in fits])}
    print("| surrogates | radius | by transfer | broken | mean queries | of those left |\n|---|---|---|---|---|---|")
    for words, stand_in in stand_ins.items():
        for radius in (0.12, 0.2):
            outcome = eb.blackbox(300, surrogate=stand_in)(victim, x, y, radius)
            rest = outcome.queries > 2 if stand_in else outcome.queries > 0
            queries = f"{float(outcome.queries.double().mean()):.0f} | {float(outcome.queries[rest].double().mean()):.0f}"
            print(f"| {words} | {radius} | {int((~rest).sum())} % | {int(outcome.reached.sum())} % | {queries} |", flush=True)


TABLES: dict[str, Callable[[], None]] = {
    "zoo": zoo,
    "label_only": label_only,
    "l0": l0,
    "surrogate": surrogate,
    "after_transfer": after_transfer,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or TABLES:
        print(f"\n## {chosen}\n\n{TABLES[chosen].__doc__}\n")
        TABLES[chosen]()
