"""How it is searched: recipes, one file per family, and what combines them."""

from epsball.attacks.apgd import apgd, apgd_dlr, apgd_t, from_larger
from epsball.attacks.blackbox import blackbox
from epsball.attacks.boundary import boundary
from epsball.attacks.channel import physical, survival
from epsball.attacks.combine import Cascade, EveryTarget, Restarts, SmallestRadius
from epsball.attacks.cw import cw_l0, cw_l2, cw_linf
from epsball.attacks.deepfool import deepfool, superdeepfool
from epsball.attacks.differences import differences
from epsball.attacks.ead import ead
from epsball.attacks.estimate import Nes, Spsa, bandits, nes, spsa
from epsball.attacks.fab import fab, fab_t
from epsball.attacks.hop_skip_jump import hop_skip_jump
from epsball.attacks.inward import OutsideIn, corners, outside_in
from epsball.attacks.jsma import jsma
from epsball.attacks.lbfgs import lbfgs
from epsball.attacks.linear import linear_smallest, linear_worst_case
from epsball.attacks.loc_search import OutOfTop, loc_search
from epsball.attacks.minimal import ddn, fmn
from epsball.attacks.noise import noise
from epsball.attacks.one_pixel import one_pixel
from epsball.attacks.opt_attack import opt_attack, sign_opt
from epsball.attacks.pdpgd import pdpgd
from epsball.attacks.pgd import bim, fgsm, mi_fgsm, pgd
from epsball.attacks.rays import rays
from epsball.attacks.registry import Entry, entries, get
from epsball.attacks.sigma_zero import sigma_zero
from epsball.attacks.simba import simba, simba_dct
from epsball.attacks.smallest import Nearest, bisection, nearest
from epsball.attacks.sparse_rs import sparse_rs
from epsball.attacks.spatial import recoloradv, rotation_translation, stadv
from epsball.attacks.square import square
from epsball.attacks.surfree import surfree
from epsball.attacks.surrogate import Surrogate, fit_surrogate, transferred
from epsball.attacks.swaps import swaps
from epsball.attacks.sweep import sweep
from epsball.attacks.targets import by_logit, malt
from epsball.attacks.transfer import di_fgsm, ensemble, ni_fgsm, si_fgsm, ti_fgsm, vmi_fgsm
from epsball.attacks.universal import UniversalGradient, UniversalSum, cross_model_table, fooling_rate
from epsball.attacks.vertices import vertices
from epsball.attacks.zoo import zoo

__all__ = [
    "Cascade",
    "Entry",
    "EveryTarget",
    "Nearest",
    "Nes",
    "OutOfTop",
    "OutsideIn",
    "Restarts",
    "SmallestRadius",
    "Spsa",
    "Surrogate",
    "UniversalGradient",
    "UniversalSum",
    "apgd",
    "apgd_dlr",
    "apgd_t",
    "bandits",
    "bim",
    "bisection",
    "blackbox",
    "boundary",
    "by_logit",
    "corners",
    "cross_model_table",
    "cw_l0",
    "cw_l2",
    "cw_linf",
    "ddn",
    "deepfool",
    "di_fgsm",
    "differences",
    "ead",
    "ensemble",
    "entries",
    "fab",
    "fab_t",
    "fgsm",
    "fit_surrogate",
    "fmn",
    "fooling_rate",
    "from_larger",
    "get",
    "hop_skip_jump",
    "jsma",
    "lbfgs",
    "linear_smallest",
    "linear_worst_case",
    "loc_search",
    "malt",
    "mi_fgsm",
    "nearest",
    "nes",
    "ni_fgsm",
    "noise",
    "one_pixel",
    "opt_attack",
    "outside_in",
    "pdpgd",
    "pgd",
    "physical",
    "rays",
    "recoloradv",
    "rotation_translation",
    "si_fgsm",
    "sigma_zero",
    "sign_opt",
    "simba",
    "simba_dct",
    "sparse_rs",
    "spsa",
    "square",
    "stadv",
    "superdeepfool",
    "surfree",
    "survival",
    "swaps",
    "sweep",
    "ti_fgsm",
    "transferred",
    "vertices",
    "vmi_fgsm",
    "zoo",
]
