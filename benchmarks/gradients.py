"""How far gradients hold on honest networks and behind defenses: what the preflight's thresholds rest on. Writes results/gradients.md.

`OMP_NUM_THREADS=1 python benchmarks/gradients.py`, with EPSBALL_DATA; two minutes once all networks are trained. Networks and images are
those of auto_attack.py, other_networks.py and verdicts (but random ones), the first 64 of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

import nets
import other_networks
from auto_attack import RADII, sample
from epsball.auditing.preflight import look
from epsball.auditing.react import ALIKE, alike
from epsball.auditing.ways import BLANK, FAR, REACH, TRUE, blank, truth
from epsball.core import Victim
from epsball.models.digits import NAMES, load
from verdicts.run import CASES

PAGE = Path(__file__).parent / "results" / "gradients.md"
N = 64


def networks() -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """Name, network, images, labels; honest ones first."""
    for name in (*RADII, *other_networks.NAMES):
        net = (load(name) if name in NAMES else nets.trained(name)).eval().requires_grad_(False)
        yield f"{name} | honest", net, *sample(name, net, N, 0)
    for case in sorted((case for case in CASES if not case.random), key=lambda case: case.kind):
        data = case.samples(N, 0)
        yield f"{case.name} | {'honest' if case.kind == 'control' else case.kind}", case.model(), data.x, data.y


def main() -> None:
    """The table."""
    lines = [
        "# How far gradients hold",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/gradients.py`; the first {N} images (CIFAR-10 in the zoo: 30), of which 32 that are right",
        "are looked at, seed 0. Medians: cosine of neighboring gradients; share of features without a gradient; correlation of changes",
        f"with those foretold within 0.02 and {REACH:g} of the box. The audit reacts below {ALIKE:g}, above {BLANK:g}, below {TRUE:g} and",
        f"below {FAR:g}. No gradient reads as 1, 0, 0, 0.",
        "",
        f"| network | kind | neighbors | left out | within 0.02 | within {REACH:g} |",
        "|---|---|---|---|---|---|",
    ]
    for name, net, x, y in networks():
        victim = Victim(net)
        with victim:
            bench = look(victim, x, y)
            figures = alike(bench, 0), blank(bench), truth(bench, 0), truth(bench, 0, REACH)
        lines.append(f"| {name} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")
        print(lines[-1], flush=True)
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
