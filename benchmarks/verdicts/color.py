"""CIFAR-10: a network of benchmarks/nets.py, bare and behind something that masks its gradients."""

from __future__ import annotations

from verdicts.bases import color, color_net
from verdicts.case import PGD, Case, thorough, undefended
from verdicts.controls import control
from verdicts.quantize import Behind, Bits, on

CASES = (
    control("CIFAR PGD", "Madry et al. 2018, arXiv 1706.06083", lambda: color_net("cifar-robust"), 8 / 255, "PGD-3", color),
    Case(
        "CIFAR bit depth",
        "Xu et al. 2018, arXiv 1704.01155",
        "masked",
        lambda: Behind(Bits(4), color_net("cifar-robust")).eval(),
        PGD,
        thorough(on("first"), undefended),
        cause="dead",
        radius=8 / 255,
        note="4 bits in front of the same network",
        samples=color,
        official=20,
    ),
)
