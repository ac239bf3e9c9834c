"""The attacks of the optimality study, each with the steps that fit its budget of 200 forwards and 200 backwards a sample.

Peers run at their defaults where those fit, else with the number of steps cut to the budget. Second rows have settings that suit
short runs better: AttackBench's, or for C&W and EAD the best of a small grid over rounds, rate and first constant on both normally
trained networks, without the early abort that leaves budget unspent. Ours run at their registered defaults, `steps` cut alike.
What one step costs is written beside the steps. Ours with fewer steps still (`_ours_brief`) show what the peers' time is enough for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from peers import ADAPTERS, P, Run

LONG = 1_000, 4_000
"""Larger budgets."""
FEW_ROUNDS = ((2, 100, 0.1), (1, 200, 0.03))


@dataclass(frozen=True)
class Contender:
    """One attack under one norm: the library's own name for it, its options, and `same`: the name that both sides share."""

    library: str
    attack: str
    label: str
    norm: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    same: str = ""

    @property
    def name(self) -> str:
        """Library and attack, as the tables have it."""
        return f"{self.library} {self.label}"

    def run(self) -> Run:
        """The attack, ready to be called."""
        return ADAPTERS[self.library](self.attack, **self.options)


def contenders() -> list[Contender]:
    """All, ours first."""
    return [*_ours(), *_ours_brief(), *_adv_lib(), *_foolbox(), *_torchattacks(), *_art(), *_official()]


def long_contenders() -> Iterator[tuple[Contender, int]]:
    """With a budget each: `eb.smallest`, and for the smaller budget the two peers of each norm that were best with 400 queries."""
    least, most = LONG
    for norm in P:
        yield mine("smallest", "smallest 480", norm, steps=480), least
        yield mine("smallest", "smallest 1,950", norm, steps=1950), most
    for norm, name in (("linf", "Linfinity"), ("l2", "L2"), ("l1", "L1"), ("l0f", "L0")):
        brendel = {"from_data": True, "steps": 490}
        yield Contender("foolbox", f"{name}BrendelBethgeAttack", "BB 490, from an image", norm, brendel), least
    bisected = {"norm": P["linf"], "max_eps": 0.5, "binary_search_steps": 9, "n_iter": 50, "use_large_reps": False}
    yield Contender("adv-lib", "auto_pgd.minimal_apgd", "APGD 50, 9 bisections", "linf", bisected), least
    yield Contender("adv-lib", "ddn", "DDN 500, no levels", "l2", {"steps": 500, "levels": None}), least
    yield Contender("adv-lib", "pdpgd", "PDPGD 500", "l1", {"norm": P["l1"], "num_steps": 500}), least
    yield Contender("adv-lib", "sigma_zero", "sigma-zero 500", "l0f", {"num_steps": 500}), least


def mine(attack: str, label: str, norm: str, same: str = "", /, **options: Any) -> Contender:
    """An attack of ours."""
    return Contender("epsball", attack, label, norm, {"threat": norm, **options}, same)


def _ours_brief() -> Iterator[Contender]:
    for norm in ("linf", "l2", "l0f"):
        yield mine("fmn", "FMN 170", norm, "FMN", steps=170)
    for norm in ("l2", "l1"):
        yield mine("pdpgd", "PDPGD 185", norm, "PDPGD", steps=185)
    yield mine("ddn", "DDN 170", "l2", "DDN", steps=170)
    for steps in (35, 25):
        yield mine("cw_l2", f"C&W 4 x {steps}", "l2", "C&W", steps=steps, rounds=4)
    yield mine("cw_l0", "C&W 20 x 20", "l0f", "C&W", steps=20, rounds=20)
    yield mine("ead", "EAD 7 x 10", "l1", "EAD", steps=10, rounds=7)
    yield mine("ead", "EAD 6 x 9", "l1", "EAD", steps=9, rounds=6)
    yield mine("sigma_zero", "sigma-zero 180", "l0f", "sigma-zero", steps=180)


def _ours() -> Iterator[Contender]:
    for norm in P:
        yield mine("smallest", "smallest 190", norm, steps=190)
        yield mine("smallest", "smallest 500 (default)", norm)
        yield mine("fmn", "FMN 199", norm, "FMN", steps=199)
    yield mine("ddn", "DDN 199", "l2", "DDN", steps=199)
    yield mine("cw_l2", "C&W 9 x 22", "l2", "C&W", steps=22)
    yield mine("cw_l2", "C&W 4 x 50", "l2", "C&W", steps=50, rounds=4)
    yield mine("cw_linf", "C&W 20 x 10", "linf", "C&W", steps=20, rounds=10)
    yield mine("cw_linf", "C&W 20 x 40 (default)", "linf")
    yield mine("cw_l0", "C&W 20 x 40 (default)", "l0f", "C&W")
    yield mine("ead", "EAD 9 x 22", "l1", "EAD", steps=22)
    yield mine("ead", "EAD 9 x 50 (default)", "l1", "EAD")
    yield mine("lbfgs", "L-BFGS 10 x 20 (default)", "l2")
    yield mine("superdeepfool", "SuperDeepFool (default)", "l2", "SuperDeepFool")
    for norm in ("linf", "l2"):
        yield mine("deepfool", "DeepFool (default)", norm, "DeepFool")
    for norm in ("linf", "l2", "l1"):
        yield mine("fab", "FAB 35", norm, "FAB", steps=35)  # 2 forwards, 9 backwards
        yield mine("fab_t", "FAB-T 9 x 14", norm, "FAB-T", steps=14)  # 2 forwards, 1 backward
        yield mine("pdpgd", "PDPGD 199", norm, "PDPGD", steps=199)
    yield mine("sigma_zero", "sigma-zero 209", "l0f", "sigma-zero", steps=209)
    yield mine("jsma", "JSMA (default)", "l0f", "JSMA")


def _adv_lib() -> Iterator[Contender]:
    def theirs(attack: str, label: str, norm: str, same: str = "", /, **options: Any) -> Contender:
        return Contender("adv-lib", attack, label, norm, options, same)

    for norm, p in P.items():
        yield theirs("fmn", "FMN 200", norm, "FMN", norm=p, steps=200)
    yield theirs("fmn", "FMN 200, step 10 (AttackBench)", "linf", "FMN", norm=P["linf"], steps=200, α_init=10.0)
    yield theirs("ddn", "DDN 200", "l2", "DDN", steps=200)
    yield theirs("ddn", "DDN 200, no levels", "l2", "DDN", steps=200, levels=None)
    yield theirs("carlini_wagner_l2", "C&W 9 x 22", "l2", "C&W", max_iterations=22)
    for rounds, steps, rate in FEW_ROUNDS:
        few = {"binary_search_steps": rounds, "max_iterations": steps, "learning_rate": rate, "initial_const": 1.0, "abort_early": False}
        yield theirs("carlini_wagner_l2", f"C&W {rounds} x {steps}, rate {rate}, c 1", "l2", "C&W", **few)
    yield theirs("carlini_wagner_linf", "C&W x 10", "linf", "C&W", max_iterations=10)
    yield theirs("carlini_wagner_linf", "C&W x 10, rate 0.1", "linf", "C&W", max_iterations=10, learning_rate=0.1)
    for norm in ("l2", "l1"):
        yield theirs("alma", "ALMA 200", norm, distance=norm, num_steps=200)
        yield theirs("alma", "ALMA 200, first step 1 (AttackBench)", norm, distance=norm, num_steps=200, init_lr_distance=1.0)
    yield theirs("pdgd", "PDGD 200", "l2", num_steps=200)
    for norm in P:
        yield theirs("pdpgd", "PDPGD 200", norm, "" if norm == "l0f" else "PDPGD", norm=P[norm], num_steps=200)
    for norm in ("linf", "l2"):
        yield theirs("df", "DeepFool (default)", norm, "DeepFool", norm=P[norm])
        yield theirs("tr", "TR (default)", norm, p=P[norm])
        yield theirs("tr", "TR adaptive", norm, p=P[norm], adaptive=True)
    yield theirs("sdf", "SuperDeepFool (default)", "l2", "SuperDeepFool")
    for norm, reach in (("linf", 0.5), ("l2", 8.0), ("l1", 64.0)):
        yield theirs("fab", "FAB 36", norm, "FAB", norm=P[norm], n_iter=36)  # 2 forwards, 9 backwards
        yield theirs("fab", "FAB-T 9 x 14", norm, "FAB-T", norm=P[norm], n_iter=14, targeted_restarts=True)
        bisected = {"norm": P[norm], "max_eps": reach, "binary_search_steps": 9, "n_iter": 20, "use_large_reps": norm == "l1"}
        yield theirs("auto_pgd.minimal_apgd", "APGD 20, 9 bisections", norm, **bisected)
    yield theirs("sigma_zero", "sigma-zero 200", "l0f", "sigma-zero", num_steps=200)
    yield theirs("vfga", "VFGA (default)", "l0f", targeted=False)


def _foolbox() -> Iterator[Contender]:
    def theirs(attack: str, label: str, norm: str, same: str = "", /, **options: Any) -> Contender:
        return Contender("foolbox", attack, label, norm, options, same)

    own = {"linf": "LInf", "l2": "L2", "l1": "L1", "l0f": "L0"}
    for norm, name in own.items():
        yield theirs(f"{name}FMNAttack", "FMN 200", norm, "FMN", steps=200)
        brendel = f"{name.replace('LInf', 'Linfinity')}BrendelBethgeAttack"
        yield theirs(brendel, "BB 190, from an image", norm, from_data=True, steps=190)
    yield theirs("DDNAttack", "DDN 200", "l2", "DDN", steps=200)
    yield theirs("L2CarliniWagnerAttack", "C&W 9 x 22", "l2", "C&W", steps=22)
    for rounds, steps, rate in FEW_ROUNDS:
        few = {"binary_search_steps": rounds, "steps": steps, "stepsize": rate, "initial_const": 1.0, "abort_early": False}
        yield theirs("L2CarliniWagnerAttack", f"C&W {rounds} x {steps}, rate {rate}, c 1", "l2", "C&W", **few)
    for rule in ("EN", "L1"):
        yield theirs("EADAttack", f"EAD 9 x 14, {rule}", "l1", "EAD", steps=14, decision_rule=rule)  # 2 forwards, 1 backward
    few = {"binary_search_steps": 2, "steps": 66, "initial_const": 10.0, "decision_rule": "L1", "abort_early": False}
    yield theirs("EADAttack", "EAD 2 x 66, L1, c 10", "l1", "EAD", **few)
    for norm, name in (("linf", "Linf"), ("l2", "L2")):
        yield theirs(f"{name}DeepFoolAttack", "DeepFool (default)", norm, "DeepFool")


def _torchattacks() -> Iterator[Contender]:
    def theirs(attack: str, label: str, norm: str, same: str = "", /, **options: Any) -> Contender:
        return Contender("torchattacks", attack, label, norm, options, same)

    yield theirs("CW", "C&W 200, c 1 (default)", "l2", "C&W", steps=200)
    yield theirs("CW", "C&W 200, c 1, rate 0.1", "l2", "C&W", steps=200, lr=0.1)
    yield theirs("DeepFool", "DeepFool (default)", "l2", "DeepFool")
    yield theirs("EADL1", "EAD 9 x 14", "l1", "EAD", max_iterations=14)  # 2 forwards, 1 backward
    few = {"binary_search_steps": 2, "max_iterations": 66, "initial_const": 0.1}
    yield theirs("EADL1", "EAD 2 x 66, c 0.1", "l1", "EAD", **few)
    for norm in ("linf", "l2", "l1"):
        yield theirs("FAB", "FAB 33", norm, "FAB", norm=norm.capitalize(), eps=None, steps=33)  # 2 forwards, 10 backwards
    yield theirs("SparseFool", "SparseFool (default)", "l0f")
    yield theirs("JSMA", "JSMA toward y + 1, gamma 1", "l0f", "JSMA", gamma=1.0)


def _art() -> Iterator[Contender]:
    def theirs(attack: str, label: str, norm: str, same: str = "", /, **options: Any) -> Contender:
        return Contender("ART", attack, label, norm, options, same)

    yield theirs("CarliniL2Method", "C&W 10 x 10 (default)", "l2", "C&W")
    yield theirs("CarliniL2Method", "C&W 4 x 10, rate 0.1, c 1", "l2", "C&W", binary_search_steps=4, learning_rate=0.1, initial_const=1.0)
    yield theirs("CarliniLInfMethod", "C&W (default)", "linf", "C&W")
    yield theirs("CarliniL0Method", "C&W (default)", "l0f", "C&W")
    yield theirs("DeepFool", "DeepFool (default)", "l2", "DeepFool")
    yield theirs("ElasticNet", "EAD 9 x 8", "l1", "EAD", max_iter=8)  # 4 forwards, 2 backwards
    few = {"binary_search_steps": 4, "max_iter": 18, "initial_const": 1.0, "decision_rule": "L1"}
    yield theirs("ElasticNet", "EAD 4 x 18, L1, c 1", "l1", "EAD", **few)


def _official() -> Iterator[Contender]:
    for norm in ("linf", "l2", "l1"):
        yield Contender("AutoAttack", "FABAttack_PT", "FAB 33", norm, {"norm": norm, "n_iter": 33}, "FAB")  # 2 forwards, 10 backwards
        options = {"norm": norm, "n_iter": 14, "targeted": True, "eps": 0.0}  # 2 forwards, 1 backward
        yield Contender("AutoAttack", "FABAttack_PT", "FAB-T 9 x 14", norm, options, "FAB-T")
