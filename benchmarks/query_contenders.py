"""The black-box attacks of queries.py, ours and the peers', under four threats, each with a budget of queries a sample.

Peers run at their defaults with the budget cut; second rows have settings that suit short runs better. Ours run at their
registered defaults. `alone`: the attack is called once for each sample, because the library takes samples one by one, or because
one sample of its batch pays for another (foolbox goes on until the last sample succeeds), or because its questions lie too far
from the samples to tell whose they are. `together`: such an attack that takes batches is run once more, on one, for the clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from peers import Run
from query_peers import BLACK_BOX

RADII = {
    "mnist-standard": {"linf": 0.12, "l2": 1.75, "l0": 8},
    "mnist-robust": {"linf": 0.32, "l2": 2.0, "l0": 6},
    "cifar-standard": {"linf": 4 / 255, "l2": 0.5, "l0": 3},
}


@dataclass(frozen=True)
class Contender:
    """One attack under one threat. `same`: the name that both sides share; `kind`: what is compared, queries or distances."""

    library: str
    attack: str
    label: str
    norm: str
    same: str
    kind: str
    budget: int
    n: int
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    alone: bool = False
    together: bool = False

    @property
    def name(self) -> str:
        """Library and attack, as the tables have it."""
        return f"{self.library} {self.label}"

    def run(self) -> Run:
        """The attack, ready to be called."""
        return BLACK_BOX[self.library](self.attack, **self.options)


DOMINATED = (  # at 1,000 queries by another variant of the same library, and left out at 10,000
    "torchattacks SPSA 39 x 128 pairs linf",
    "cleverhans SPSA, 128 pairs linf",
    "torchattacks one-pixel, 10 x 10 (default) l0",
    "foolbox HopSkipJump l2",
    "foolbox HopSkipJump, 30 first draws linf",
    "ART HopSkipJump l2",
    "ART HopSkipJump linf",
    "foolbox Boundary l2",
    "ART Boundary l2",
    "ART Sign-OPT l2",
)


def contenders(model: str, budget: int, most: int) -> list[Contender]:
    """All of one network at one budget, ours first, on at most so many samples each; ZOO from 1,000 queries on, Opt-Attack at 10,000."""
    radii = RADII[model]
    everyone = [*_ours(radii, budget), *_fixed(radii, budget), *_distance(budget)]
    everyone = [c for c in everyone if budget > 100 or c.same != "ZOO"]
    if budget > 1000:
        everyone = [c for c in everyone if f"{c.name} {c.norm}" not in DOMINATED]
    if model != "mnist-standard" or budget <= 1000:
        everyone = [c for c in everyone if c.same != "Opt-Attack" and c.library != "attackbox"]
    return [replace(c, n=min(most, _n(model, c))) for c in everyone]


def _n(model: str, c: Contender) -> int:
    """Samples a row: fewer where a query or a run is dear. `alone` and those compared with them ask one by one."""
    single = c.alone or c.kind == "distance"
    if c.budget > 1000:
        return 10 if c.same == "ZOO" or model.startswith("cifar") or (single and model != "mnist-standard") else 20
    return 20 if c.budget > 100 and (c.same == "ZOO" or (single and model.startswith("cifar"))) else 50


def _ours(radii: Mapping[str, float], budget: int) -> Iterator[Contender]:
    def mine(attack: str, label: str, norm: str, same: str, kind: str, **options: Any) -> Contender:
        radius = radii[norm] if kind == "fixed" else torch.inf
        options = {"threat": norm, "radius": radius, "steps": budget, **options}
        return Contender("epsball", attack, label, norm, same, kind, budget, 0, options)

    for norm in ("linf", "l2"):
        yield mine("square", "Square", norm, "Square", "fixed")
    yield mine("spsa", "SPSA", "linf", "SPSA", "fixed")
    yield mine("rays", "RayS", "linf", "RayS", "distance")
    yield mine("one_pixel", "one-pixel", "l0", "one-pixel", "fixed")
    yield mine("sparse_rs", "Sparse-RS", "l0", "Sparse-RS", "fixed")
    for norm in ("l2", "linf"):
        yield mine("hop_skip_jump", "HopSkipJump", norm, "HopSkipJump", "distance")
    yield mine("boundary", "Boundary", "l2", "Boundary", "distance")
    yield mine("surfree", "SurFree", "l2", "SurFree", "distance")
    yield mine("sign_opt", "Sign-OPT", "l2", "Sign-OPT", "distance")
    yield mine("opt_attack", "Opt-Attack", "l2", "Opt-Attack", "distance")
    yield mine("zoo", "ZOO", "l2", "ZOO", "distance")


def _fixed(radii: Mapping[str, float], budget: int) -> Iterator[Contender]:
    def theirs(library: str, attack: str, label: str, norm: str, same: str, alone: bool = False, /, **options: Any) -> Contender:
        return Contender(library, attack, label, norm, same, "fixed", budget, 0, options, alone)

    for norm, name in (("linf", "Linf"), ("l2", "L2")):
        yield theirs("official", "Square", "Square", norm, "Square", norm=name, eps=radii[norm], n_queries=budget)
        yield theirs("torchattacks", "Square", "Square", norm, "Square", norm=name, eps=radii[norm], n_queries=budget)
        p, rounds = {"linf": torch.inf, "l2": 2}[norm], budget // 3  # 3 forwards a round
        yield theirs("ART", "SquareAttack", f"Square {rounds} rounds", norm, "Square", eps=radii[norm], norm=p, max_iter=rounds)
    linf, k = radii["linf"], int(radii["l0"])
    rounds = max(budget // 256, 1)
    yield theirs("torchattacks", "SPSA", f"SPSA {rounds} x 128 pairs", "linf", "SPSA", eps=linf, nb_iter=rounds)
    count, step = 32 if budget > 100 else 8, round(linf / 3, 4)
    rounds = budget // (2 * count)
    options = {"eps": linf, "nb_iter": rounds, "nb_sample": count, "lr": step}
    yield theirs("torchattacks", "SPSA", f"SPSA {rounds} x {count} pairs, rate eps / 3", "linf", "SPSA", **options)
    options = {"eps": linf, "nb_iter": budget}
    yield theirs("cleverhans", "spsa.spsa", "SPSA, 128 pairs", "linf", "SPSA", True, **options)
    options |= {"spsa_samples": count, "learning_rate": step}
    yield theirs("cleverhans", "spsa.spsa", f"SPSA, {count} pairs, rate eps / 3", "linf", "SPSA", True, **options)
    yield theirs("torchattacks", "OnePixel", "one-pixel, 10 x 10 (default)", "l0", "one-pixel", True, pixels=k)
    options = {"pixels": k, "popsize": 100, "steps": max(budget // 90, 1)}
    yield theirs("torchattacks", "OnePixel", "one-pixel, 100 members", "l0", "one-pixel", True, **options)
    yield theirs("ART", "PixelAttack", "one-pixel, DE", "l0", "one-pixel", True, th=k, es=1)
    yield theirs("official", "Sparse-RS", "Sparse-RS", "l0", "Sparse-RS", eps=k, n_queries=budget)


def _distance(budget: int) -> Iterator[Contender]:
    def theirs(library: str, attack: str, label: str, norm: str, same: str, alone: bool = True, /, **options: Any) -> Contender:
        together = library == "foolbox" or attack in ("RayS", "SurFree")
        return Contender(library, attack, label, norm, same, "distance", budget, 0, options, alone, together)

    yield theirs("official", "RayS", "RayS", "linf", "RayS", True, query_limit=budget)
    for norm, p in (("l2", 2), ("linf", torch.inf)):
        yield theirs("foolbox", "HopSkipJumpAttack", "HopSkipJump", norm, "HopSkipJump", constraint=norm)
        short = {"constraint": norm, "first": 20, "initial_gradient_eval_steps": 30}
        yield theirs("foolbox", "HopSkipJumpAttack", "HopSkipJump, 30 first draws", norm, "HopSkipJump", **short)
        yield theirs("ART", "HopSkipJump", "HopSkipJump", norm, "HopSkipJump", norm=p)
        yield theirs("ART", "HopSkipJump", "HopSkipJump, 30 first draws", norm, "HopSkipJump", norm=p, init_eval=30, init_size=20)
        path = "hop_skip_jump_attack.hop_skip_jump_attack"
        yield theirs("cleverhans", path, "HopSkipJump", norm, "HopSkipJump", norm=p, constraint=p, verbose=False)
        yield theirs("official", "HSJA", "HopSkipJump", norm, "HopSkipJump", constraint=norm)
    yield theirs("foolbox", "BoundaryAttack", "Boundary", "l2", "Boundary")
    short = {"first": 20, "spherical_step": 0.1, "source_step": 0.03}
    yield theirs("foolbox", "BoundaryAttack", "Boundary, long steps", "l2", "Boundary", **short)
    yield theirs("ART", "BoundaryAttack", "Boundary", "l2", "Boundary", targeted=False)
    short = {"delta": 0.1, "epsilon": 0.1, "sample_size": 5}
    yield theirs("ART", "BoundaryAttack", "Boundary, long steps, 5 tries", "l2", "Boundary", targeted=False, **short)
    yield theirs("official", "SurFree", "SurFree", "l2", "SurFree", steps=budget, max_queries=budget)
    yield theirs("ART", "SignOPTAttack", "Sign-OPT", "l2", "Sign-OPT", targeted=False)
    yield theirs("ART", "SignOPTAttack", "Sign-OPT, 30 draws, 20 trials", "l2", "Sign-OPT", targeted=False, k=30, num_trial=20)
    yield theirs("attackbox", "OPT_attack", "Opt-Attack", "l2", "Opt-Attack", query_limit=budget)
    yield theirs("attackbox", "Sign_OPT", "Sign-OPT", "l2", "Sign-OPT", query_limit=budget)
    plain = {"use_resize": False, "use_importance": False, "max_iter": budget, "abort_early": False}
    yield theirs("ART", "ZooAttack", "ZOO, cut to the box", "l2", "ZOO", **plain)
    plain |= {"nb_parallel": 16, "learning_rate": 0.1, "initial_const": 10.0, "variable_h": 0.01}
    yield theirs("ART", "ZooAttack", "ZOO, cut to the box, 16 a round, rate 0.1, c 10", "l2", "ZOO", **plain)
