"""Robust training: one loss per method beside its paper, one loop for all. An audit of the result is the only number that counts."""

from epsball.defenses.training.aligned import Direction, PerceptuallyAligned, class_mean, nearest, one_image
from epsball.defenses.training.attribution import IgNorm, art, ig_norm, integrated_gradients
from epsball.defenses.training.awp import Awp
from epsball.defenses.training.batch import Batch, Formula, Logs, Loss
from epsball.defenses.training.board import Board
from epsball.defenses.training.certified import Certifiable, crown_ibp, ibp
from epsball.defenses.training.course import Against, Course, adam, sgd
from epsball.defenses.training.cure import Cure
from epsball.defenses.training.distillation import Distilled, Tempered, distilled
from epsball.defenses.training.fgsm import fgsm_mix
from epsball.defenses.training.fit import Fitted, fit
from epsball.defenses.training.free import Free
from epsball.defenses.training.grad_align import grad_align
from epsball.defenses.training.inner import Adversarial, Search, perturb
from epsball.defenses.training.interpolated import avmixup, iat
from epsball.defenses.training.llr import llr
from epsball.defenses.training.logistic import adversarial_logistic, fit_logistic
from epsball.defenses.training.mart import mart
from epsball.defenses.training.methods import METHODS, Method, make, method
from epsball.defenses.training.nets import small
from epsball.defenses.training.pairing import CleanPairing, Squeezing, alp
from epsball.defenses.training.pgd import fast, n_fgsm, pgd
from epsball.defenses.training.schedule import constant, cosine, one_cycle
from epsball.defenses.training.standard import GaussianNoise, Standard
from epsball.defenses.training.team import Team
from epsball.defenses.training.trades import trades
from epsball.defenses.training.warm import atta
from epsball.defenses.training.watch import Record, by_certified, by_clean, by_robust

__all__ = [
    "METHODS",
    "Adversarial",
    "Against",
    "Awp",
    "Batch",
    "Board",
    "Certifiable",
    "CleanPairing",
    "Course",
    "Cure",
    "Direction",
    "Distilled",
    "Fitted",
    "Formula",
    "Free",
    "GaussianNoise",
    "IgNorm",
    "Logs",
    "Loss",
    "Method",
    "PerceptuallyAligned",
    "Record",
    "Search",
    "Squeezing",
    "Standard",
    "Team",
    "Tempered",
    "adam",
    "adversarial_logistic",
    "alp",
    "art",
    "atta",
    "avmixup",
    "by_certified",
    "by_clean",
    "by_robust",
    "class_mean",
    "constant",
    "cosine",
    "crown_ibp",
    "distilled",
    "fast",
    "fgsm_mix",
    "fit",
    "fit_logistic",
    "grad_align",
    "iat",
    "ibp",
    "ig_norm",
    "integrated_gradients",
    "llr",
    "make",
    "mart",
    "method",
    "n_fgsm",
    "nearest",
    "one_cycle",
    "one_image",
    "perturb",
    "pgd",
    "sgd",
    "small",
    "trades",
]
