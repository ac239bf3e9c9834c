"""Robust training: one loss per method beside its paper, one loop for all. An audit of the result is the only number that counts."""

from epsball.defenses.training.awp import Awp
from epsball.defenses.training.batch import Batch, Formula, Logs, Loss
from epsball.defenses.training.course import Against, Course, adam, sgd
from epsball.defenses.training.cure import Cure
from epsball.defenses.training.distillation import Distilled, Tempered
from epsball.defenses.training.fgsm import fgsm_mix
from epsball.defenses.training.fit import Fitted, fit
from epsball.defenses.training.free import Free
from epsball.defenses.training.grad_align import grad_align
from epsball.defenses.training.inner import Adversarial, Search, perturb
from epsball.defenses.training.interpolated import avmixup, iat
from epsball.defenses.training.llr import llr
from epsball.defenses.training.mart import mart
from epsball.defenses.training.methods import METHODS, Method, make, method
from epsball.defenses.training.nets import small
from epsball.defenses.training.pairing import CleanPairing, Squeezing, alp
from epsball.defenses.training.pgd import fast, n_fgsm, pgd
from epsball.defenses.training.schedule import constant, cosine, one_cycle
from epsball.defenses.training.standard import GaussianNoise, Standard
from epsball.defenses.training.trades import trades
from epsball.defenses.training.watch import Record, by_clean, by_robust

__all__ = [
    "METHODS",
    "Adversarial",
    "Against",
    "Awp",
    "Batch",
    "CleanPairing",
    "Course",
    "Cure",
    "Distilled",
    "Fitted",
    "Formula",
    "Free",
    "GaussianNoise",
    "Logs",
    "Loss",
    "Method",
    "Record",
    "Search",
    "Squeezing",
    "Standard",
    "Tempered",
    "adam",
    "alp",
    "avmixup",
    "by_clean",
    "by_robust",
    "constant",
    "cosine",
    "fast",
    "fgsm_mix",
    "fit",
    "grad_align",
    "iat",
    "llr",
    "make",
    "mart",
    "method",
    "n_fgsm",
    "one_cycle",
    "perturb",
    "pgd",
    "sgd",
    "small",
    "trades",
]
