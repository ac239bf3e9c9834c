"""The methods by name, for the command line: a loss, and what it wants of the course. Strings end here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from epsball.defenses.training.aligned import class_mean, nearest, one_image
from epsball.defenses.training.attribution import art, ig_norm
from epsball.defenses.training.awp import Awp
from epsball.defenses.training.batch import Loss
from epsball.defenses.training.certified import crown_ibp, ibp
from epsball.defenses.training.cure import Cure
from epsball.defenses.training.distillation import Tempered, distilled
from epsball.defenses.training.fgsm import fgsm_mix
from epsball.defenses.training.free import Free
from epsball.defenses.training.grad_align import grad_align
from epsball.defenses.training.interpolated import avmixup, iat
from epsball.defenses.training.llr import llr
from epsball.defenses.training.mart import mart
from epsball.defenses.training.pairing import CleanPairing, Squeezing, alp
from epsball.defenses.training.pgd import fast, n_fgsm, pgd
from epsball.defenses.training.standard import GaussianNoise, Standard
from epsball.defenses.training.trades import trades
from epsball.defenses.training.warm import atta
from epsball.defenses.training.watch import by_certified, by_clean
from epsball.errors import BadInput


def pgd_awp(gamma: float = 0.01, steps: int = 10, share: float = 0.25) -> Awp:
    """PGD training with adversarial weight perturbation."""
    return Awp(pgd(steps, share), gamma)


def trades_awp(gamma: float = 0.005, beta: float = 6.0, steps: int = 10, share: float = 0.25) -> Awp:
    """TRADES with adversarial weight perturbation."""
    return Awp(trades(beta, steps, share), gamma)


@dataclass(frozen=True)
class Method:
    """A loss by name.

    Attributes:
        name, paper, summary: for lists. make: its options -> the loss. course: what it wants of the course unless told otherwise.
        needs: what `make` takes besides numbers: the training `data` (x, y), or a trained `teacher`.
    """

    name: str
    paper: str
    summary: str
    make: Callable[..., Loss]
    course: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    def check(self, options: Mapping[str, Any]) -> None:
        """Raises BadInput: an unknown option, or a value that is no number."""
        known = {name: entry for name, entry in inspect.signature(self.make).parameters.items() if name not in self.needs}
        for option, value in options.items():
            if option not in known:
                raise BadInput(f"method '{self.name}': has no option '{option}': use one of {', '.join(known) or 'none'}")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise BadInput(f"method '{self.name}': option {option}={value!r}: give a number")
            if isinstance(known[option].default, int) and not isinstance(value, int):
                raise BadInput(f"method '{self.name}': option {option}={value!r}: give a whole number")


BOUNDS: Mapping[str, Any] = {"merit": by_certified, "certify": True, "warmup": 0.6}
"""What training by bounds wants: a long warm-up, and weights chosen by what is proven."""

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("standard", "none", "cross-entropy, no adversary", Standard, {"merit": by_clean}),
        Method("fgsm_mix", "arXiv 1412.6572", "a mix of the clean and the FGSM loss", fgsm_mix),
        Method("pgd", "arXiv 1706.06083", "cross-entropy at PGD inputs", pgd),
        Method("fast", "arXiv 2001.03994", "one step from a random start", fast),
        Method("n_fgsm", "arXiv 2202.01181", "one step from noise beyond the ball", n_fgsm),
        Method("atta", "arXiv 1912.11969", "one step an epoch, from where the last one ended", atta),
        Method("grad_align", "arXiv 2007.02617", "FGSM with aligned gradients", grad_align),
        Method("free", "arXiv 1904.12843", "one backward for weights and change, batches replayed", Free, {"replays": 8, "epochs": 4}),
        Method("trades", "arXiv 1901.08573", "clean cross-entropy and KL inside the ball", trades),
        Method("mart", "ICLR 2020 rklOg6EFwS", "boosted cross-entropy and KL where the model is unsure", mart),
        Method("alp", "arXiv 1803.06373", "adversarial logit pairing", alp),
        Method("clp", "arXiv 1803.06373", "clean logit pairing, under noise", CleanPairing, {"merit": by_clean}),
        Method("lsq", "arXiv 1803.06373", "logit squeezing, under noise", Squeezing, {"merit": by_clean}),
        Method("pgd_awp", "arXiv 2004.05884", "PGD training at the worst weights nearby", pgd_awp),
        Method("trades_awp", "arXiv 2004.05884", "TRADES at the worst weights nearby", trades_awp),
        Method("iat", "arXiv 1906.06784", "mixup of clean and of PGD inputs", iat),
        Method("avmixup", "arXiv 2003.02484", "mixes toward a vertex beyond the PGD input", avmixup),
        Method("tempered", "arXiv 1511.04508", "the teacher of defensive distillation", Tempered, {"merit": by_clean}),
        Method("cure", "arXiv 1811.09716", "low curvature of the loss", Cure),
        Method("llr", "arXiv 1907.02610", "a loss that is linear inside the ball", llr),
        Method("distilled", "arXiv 1511.04508", "a student of a tempered teacher", distilled, {"merit": by_clean}, ("teacher",)),
        Method("ibp", "arXiv 1810.12715", "the worst scores that intervals allow, so that certify can prove them", ibp, BOUNDS),
        Method("crown_ibp", "arXiv 1906.06316", "linear bounds at first, intervals at last", crown_ibp, BOUNDS),
        Method("pag_one_image", "arXiv 2207.11378", "gradients toward one image of each class", one_image, {}, ("data",)),
        Method("pag_class_mean", "arXiv 2207.11378", "gradients toward the mean of each class", class_mean, {}, ("data",)),
        Method("pag_nearest", "arXiv 2207.11378", "gradients toward the nearest sample of each class", nearest, {}, ("data",)),
        Method("art", "arXiv 1911.13073", "explanations that stay with the image", art),
        Method("ig_norm", "arXiv 1905.09957", "integrated gradients that stay small inside the ball", ig_norm),
        Method("noise", "arXiv 1902.02918", "cross-entropy under Gaussian noise", GaussianNoise, {"merit": by_clean}),
    )
}


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        BadInput: unknown; the message names the nearest.
    """
    found = METHODS.get(name.lower().replace("-", "_"))
    if found is None:
        near = get_close_matches(name.lower(), METHODS, n=3) or list(METHODS)
        raise BadInput(f"method '{name}': unknown: use one of {', '.join(near)}")
    return found


def make(name: str, options: Mapping[str, Any], **given: Any) -> Loss:
    """The loss of a method with options of its own. `given`: what it needs besides numbers (`Method.needs`); the rest is left aside.

    Raises:
        BadInput: an unknown method or option, a value that is no number, or something that it needs and is not given.
    """
    chosen = method(name)
    chosen.check(options)
    for need in chosen.needs:
        if need not in given:
            raise BadInput(f"method '{chosen.name}': needs {need}: call epsball.defenses.training.{chosen.make.__name__} with it")
    return chosen.make(**options, **{need: given[need] for need in chosen.needs})
