"""How it is searched: recipes, one file per family, and what combines them."""

from epsball.attacks.apgd import apgd, apgd_dlr, apgd_t
from epsball.attacks.combine import Cascade, EveryTarget, Restarts, SmallestRadius
from epsball.attacks.noise import noise
from epsball.attacks.pgd import bim, fgsm, mi_fgsm, pgd
from epsball.attacks.registry import Entry, entries, get
from epsball.attacks.targets import by_logit, malt

__all__ = [
    "Cascade",
    "Entry",
    "EveryTarget",
    "Restarts",
    "SmallestRadius",
    "apgd",
    "apgd_dlr",
    "apgd_t",
    "bim",
    "by_logit",
    "entries",
    "fgsm",
    "get",
    "malt",
    "mi_fgsm",
    "noise",
    "pgd",
]
