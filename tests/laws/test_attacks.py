"""Attack laws: every registered attack, under every threat it claims, untargeted and targeted, on small repeatable models."""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lawkit import (
    NORMS,
    Bench,
    answers,
    bench,
    bounds_of,
    channels_of,
    check_nested,
    check_outcome,
    check_replay,
    check_same,
    has,
    linear,
    pairs,
    radius_of,
    rng,
    rows_of,
    small,
    tensor,
    threat_of,
)
from torch import Tensor, nn

from epsball.attacks import entries, get
from epsball.core import Access, Goal, Key, Outcome, Tally, Targeted, Untargeted, Victim
from epsball.errors import AccessDenied, BadInput, EpsballError
from epsball.threats import Flow, Linf, compose

PAIRS = list(pairs())
QUICK = {"pgd": (*NORMS, "compose"), "apgd": (*NORMS, "patch")}
IMAGES = ("physical",)
"""Attacks that need images in [0, 1] whatever the threat."""


def spread(cases: list[tuple[Any, ...]]) -> list[Any]:
    """Every case; those beyond an attack's first two threats are slow, but for the two attacks that everything rests on.

    The channel takes long to see through; its own tests are the quick ones.
    """

    def slow(name: str, threat: str) -> bool:
        first = entries()[name].threats.index(threat) < 2
        return name == "physical" or not (first or threat in QUICK.get(name, ()))

    return [pytest.param(*case, marks=pytest.mark.slow) if slow(case[0], case[1]) else case for case in cases]


every_pair = pytest.mark.parametrize(("name", "threat"), spread(PAIRS))
every_goal = pytest.mark.parametrize(
    ("name", "threat", "targeted"),
    spread([(name, threat, aimed) for name, threat in PAIRS for aimed in (False, True) if entries()[name].targeted or not aimed]),
)
every_attack = pytest.mark.parametrize("name", list(entries()))


def attack_on(b: Bench, name: str, threat: str, goal: Goal | None = None, model: Any = None, **options: Any) -> Outcome:
    recipe = {key: options.pop(key) for key in ("steps", "restarts", "draws", "targets", "noise", "objective") if key in options}
    assert not set(recipe) - {*inspect.signature(entries()[name].recipe).parameters, "restarts", "steps"}, "an option that is ignored"
    call = {"radius": radius_of(threat), "seed": 0, **options}
    return small(entries()[name], threat, **recipe)(model or b.model, b.x, goal or Untargeted(b.labels), **call)


def first(name: str) -> str:
    """A threat that the attack works under."""
    return entries()[name].threats[0]


# Legal and honest.


@every_goal
@pytest.mark.parametrize(("classes", "kind"), [(3, "mlp"), (4, "conv"), pytest.param(10, "mlp", marks=pytest.mark.slow)])
def test_legal_honest_and_wrong_rows_untouched(name: str, threat: str, targeted: bool, classes: int, kind: str) -> None:
    b = bench(classes, kind=kind, threat=threat)
    goal, radius = b.goal(targeted), tensor(np.linspace(0, 2, 10), torch.float64) * radius_of(threat)
    outcome = attack_on(b, name, threat, goal, radius=radius)
    check_outcome(threat, b.x, outcome, radius)
    check_replay(threat, b.model, b.x, goal, outcome)
    assert bool((outcome.size <= radius).all())
    assert torch.equal(outcome.x_adv[radius == 0], b.x[radius == 0])
    begun = goal.reached(answers(b.model, b.x))
    assert torch.equal(outcome.x_adv[begun], b.x[begun])
    assert bool((outcome.queries[begun] == 1).all())
    assert bool((outcome.backwards[begun] == 0).all())
    assert bool((outcome.reached[begun]).all())
    assert bool((outcome.size[begun] == 0).all())
    assert not bool(outcome.flags["invalid"].any())
    assert bool(torch.isfinite(outcome.score[~begun]).all())


@every_goal
def test_two_classes_work_or_are_refused_in_one_line(name: str, threat: str, targeted: bool) -> None:
    b = bench(2, threat=threat)
    if name in ("apgd_dlr", "apgd_t"):  # their losses rank three classes
        with pytest.raises(BadInput, match=r"dlr.*3 classes") as caught:
            attack_on(b, name, threat, b.goal(targeted))
        assert "\n" not in str(caught.value)
        return
    outcome = attack_on(b, name, threat, b.goal(targeted))
    check_outcome(threat, b.x, outcome, radius_of(threat))
    check_replay(threat, b.model, b.x, b.goal(targeted), outcome)


@every_pair
def test_radius_zero_is_identity(name: str, threat: str) -> None:
    b = bench(threat=threat)
    outcome = attack_on(b, name, threat, radius=0.0)
    assert torch.equal(outcome.x_adv, b.x)
    assert torch.equal(outcome.reached, b.wrong)


@every_pair
def test_other_boxes_and_shapes(name: str, threat: str) -> None:
    flat = ((-3.0, 5.0), (6,)), ((torch.full((4, 2), -1.0), torch.linspace(0.5, 2, 8).reshape(4, 2)), (4, 2))
    c = channels_of(threat)
    upper = torch.linspace(0.5, 0.8, c * 20).reshape(c, 4, 5)
    images = ((0.1, 0.7) if name in IMAGES else bounds_of(threat), (c, 5, 2)), ((torch.full((c, 4, 5), 0.2), upper), (c, 4, 5))
    for box, shape in flat if threat in NORMS and name not in IMAGES else images:
        x = tensor(rng(3).random((6, *shape)) * 1.5 - 1.0).clamp(*box)
        model = Victim(linear(int(np.prod(shape)), 4, gain=3), box=box)
        outcome = small(entries()[name], threat)(model, x, answers(model.model, x).argmax(1), radius_of(threat) * 2)
        check_outcome(threat, x, outcome, radius_of(threat) * 2, box)


@every_pair
def test_some_sample_is_broken_and_some_stands(name: str, threat: str) -> None:
    """The bench of these laws must not be trivial; noise may be too weak for it."""
    b = bench(n=24, threat=threat)
    outcome = attack_on(b, name, threat)
    reached = outcome.reached[~b.wrong]
    assert not bool(reached.all())
    assert bool(reached.any()) or entries()[name].access is not Access.GRADIENT


@every_goal
def test_a_target_is_really_hit(name: str, threat: str, targeted: bool) -> None:
    b = bench(n=24, threat=threat)
    goal = b.goal(targeted)
    outcome = attack_on(b, name, threat, goal, radius=radius_of(threat) * 3)
    top = answers(b.model, outcome.x_adv).argmax(1)
    if targeted:
        assert bool((top[outcome.reached] == goal.labels[outcome.reached]).all())
        easier = attack_on(b, name, threat, radius=radius_of(threat) * 3)
        assert int(outcome.reached.sum()) <= int(easier.reached.sum()) + int(b.wrong.sum())
    else:
        assert bool((top[outcome.reached] != goal.labels[outcome.reached]).all())
    if entries()[name].access is Access.GRADIENT and (name != "fgsm" or threat in NORMS):  # one step along a curve need not arrive
        assert int(outcome.reached.sum()) > int(goal.reached(answers(b.model, b.x)).sum())


# The same answer however the work is cut.


def batches(b: Bench, sizes: list[int], run: Callable[[Bench], Outcome]) -> Iterator[tuple[Tensor, Outcome]]:
    start = 0
    while start < len(b.x):
        rows = torch.arange(start, min(len(b.x), start + sizes[0]))
        yield rows, run(replace(b, x=b.x[rows], labels=b.labels[rows], wrong=b.wrong[rows]))
        start += sizes[0]


@every_pair
def test_batch_order_duplicates_and_dropping(name: str, threat: str) -> None:
    b = bench(n=9, threat=threat)
    run = lambda part, **options: attack_on(part, name, threat, **options)  # noqa: E731
    whole = run(b)
    for size in (1, 2, 7, None):
        check_same(whole, run(b, model=Victim(b.model, batch_size=size)))
    for rows, part in batches(b, [4], run):
        check_same(rows_of(whole, rows), part)
    order = torch.tensor([5, 3, 8, 0, 3, 1, 3, 7, 6, 2, 4])  # shuffled, with one row three times
    check_same(rows_of(whole, order), run(replace(b, x=b.x[order], labels=b.labels[order])))
    kept = run(b, drop=False)
    assert torch.equal(kept.reached, whole.reached)
    assert bool((kept.queries >= whole.queries).all())
    check_replay(threat, b.model, b.x, b.labels, kept)
    clean = answers(b.model, b.x)
    known = run(b, clean=clean)
    assert torch.equal(known.reached, whole.reached)
    assert torch.equal(known.queries, whole.queries - 1)


@every_pair
def test_same_seed_same_result_and_seeds_differ(name: str, threat: str) -> None:
    b = bench(threat=threat)
    one, again, other = (attack_on(b, name, threat, seed=seed, drop=False) for seed in (0, 0, 1))
    assert torch.equal(one.x_adv, again.x_adv)
    assert torch.equal(one.reached, again.reached)
    if name == "noise":  # a descent may well end in the same corner, and a grid has no seed
        assert not torch.equal(one.x_adv, other.x_adv)
    keyed = attack_on(b, name, threat, seed=Key.of(0), drop=False)
    assert torch.equal(keyed.x_adv, one.x_adv)


@pytest.mark.parametrize("name", [name for name in entries() if has(entries()[name], "noise") or name == "noise"])
def test_noise_hangs_on_seed_attack_and_restart(name: str) -> None:
    """Seen at the first look of the search itself, so that no descent hides it."""
    threat, repeats = first(name), has(entries()[name], "restarts")
    b = bench(3, threat=threat)
    seen: dict[tuple[int, int], list[Tensor]] = {}
    for seed in (0, 1):
        for restarts in (1, 2):
            looks: list[Tensor] = []
            victim = Victim(lambda x, looks=looks: (looks.append(x.detach().clone()), b.model(x.double()))[1])
            options = {"draws": 1} if name == "noise" else {"steps": 0, "restarts": restarts} if repeats else {"steps": 0, "noise": True}
            attack_on(b, name, threat, model=victim, radius=1e-3, seed=seed, **options)
            seen[seed, restarts] = looks[1:]
    assert not torch.equal(seen[0, 1][0], seen[1, 1][0])
    assert torch.equal(seen[0, 1][0], seen[0, 2][0])
    if repeats:
        assert not torch.equal(seen[0, 2][0], seen[0, 2][1])


# More never hurts.


@pytest.mark.parametrize("threat", [*NORMS, *(pytest.param(name, marks=pytest.mark.slow) for name in ("flow", "color", "patch"))])
@pytest.mark.parametrize(
    ("name", "option"), [("bim", "steps"), ("pgd", "steps"), ("noise", "draws"), ("pgd", "restarts"), ("apgd", "restarts")]
)
def test_more_never_loses_a_success(name: str, option: str, threat: str) -> None:
    if threat not in entries()[name].threats:
        threat = "linf"
    b = bench(n=24, threat=threat)
    results = [attack_on(b, name, threat, **{"restarts": 1, "steps": 5, option: count}) for count in (1, 2, 3, 5, 9)]
    for fewer, more in itertools.pairwise(results):
        check_nested(fewer, more)
        assert bool((more.queries >= fewer.queries).all())
    free = [attack_on(b, name, threat, drop=False, **{"restarts": 1, "steps": 5, option: count}) for count in (1, 3, 9)]
    for fewer, more in itertools.pairwise(free):
        check_nested(fewer, more)
        assert bool((more.score[more.reached == fewer.reached] >= fewer.score[more.reached == fewer.reached]).all())


@pytest.mark.parametrize("name", [name for name in entries() if has(entries()[name], "steps")])
def test_no_steps_and_no_noise_return_x(name: str) -> None:
    """Where the recipe has no switch for its noise, two seeds tell whether there is any."""
    options = {"noise": False} if has(entries()[name], "noise") else {}
    for threat in entries()[name].threats:
        b = bench(threat=threat)
        one, other = (attack_on(b, name, threat, steps=0, seed=seed, **options) for seed in (0, 1))
        check_outcome(threat, b.x, one, radius_of(threat))
        if options or torch.equal(one.x_adv, other.x_adv):
            assert torch.equal(one.x_adv, b.x)
            assert torch.equal(one.reached, b.wrong)


@every_pair
def test_negative_counts_are_refused(name: str, threat: str) -> None:
    for option in ("steps", "restarts", "targets", "draws"):
        if has(entries()[name], option):
            with pytest.raises(BadInput, match=option):
                get(name, threat=threat_of(threat), **{option: -1})


# NaN, infinity, raising models.


class Broken(nn.Module):
    """Answers with something that is no number for the rows whose first feature is large."""

    def __init__(self, net: nn.Module, value: float, everywhere: bool) -> None:
        super().__init__()
        self.net, self.value, self.everywhere = net, value, everywhere

    def forward(self, x: Tensor) -> Tensor:
        output = self.net(x)
        bad = x.flatten(1)[:, 0] > 0.5
        column = torch.arange(output.shape[1]) >= (0 if self.everywhere else 1)
        return torch.where(bad[:, None] & column, torch.full_like(output, self.value), output)


@every_pair
@pytest.mark.parametrize(("value", "everywhere"), [(torch.nan, True), (torch.nan, False), (torch.inf, False), (-torch.inf, True)])
@pytest.mark.parametrize("access", [Access.GRADIENT, Access.LABELS])
def test_answers_that_are_no_numbers(name: str, threat: str, value: float, everywhere: bool, access: Access) -> None:
    b = bench(n=8, wrong=0, threat=threat)
    model = Broken(b.model, value, everywhere)
    bad = b.x.flatten(1)[:, 0] > 0.5
    try:
        outcome = attack_on(b, name, threat, model=Victim(model, access=access))
    except AccessDenied:
        assert access < entries()[name].access
        return
    assert bool(outcome.flags["invalid"][bad].all())
    assert not bool(outcome.reached[bad].any())
    assert torch.equal(outcome.x_adv[bad], b.x[bad])
    assert bool((outcome.queries[bad] == 1).all())
    check_outcome(threat, b.x, outcome, radius_of(threat))
    fresh = answers(model, outcome.x_adv)
    assert bool(torch.isfinite(fresh[outcome.reached]).all())
    assert bool((fresh.argmax(1) != b.labels)[outcome.reached].all())


@every_pair
@pytest.mark.parametrize("kind", ["constant", "detached", "nan gradient", "inf gradient", "saturated", "tiny"])
def test_useless_gradients_end_and_stay_legal(name: str, threat: str, kind: str) -> None:
    b = bench(n=5, wrong=0, threat=threat)
    weird: dict[str, Callable[[Tensor], Tensor]] = {
        "constant": lambda x: b.model(x.double()) * 0 + b.model(torch.zeros_like(x).double()),
        "detached": lambda x: b.model(x.detach().double()),
        "nan gradient": lambda x: b.model(x.double()) + (x.flatten(1)[:, :1] * 0).double().sqrt(),
        "inf gradient": lambda x: b.model(x.double()) + (x.flatten(1)[:, :1].detach() - x.flatten(1)[:, :1]).abs().double().sqrt(),
        "saturated": lambda x: b.model(x.double()) * 1e4,
        "tiny": lambda x: b.model(x.double()) * 1e-25,
    }
    model = weird[kind]
    outcome = attack_on(b, name, threat, goal=Untargeted(model(b.x).argmax(1)), model=model)
    check_outcome(threat, b.x, outcome, radius_of(threat))
    if kind == "constant":
        assert not bool(outcome.reached.any())


# Purity.


class Fickle(nn.Module):
    """Raises at its n-th call; has everything that an attack could disturb."""

    def __init__(self, calls: int | None, threat: str) -> None:
        super().__init__()
        self.net, self.calls, self.made = bench(4, kind="conv", threat=threat).model, calls, 0
        self.net[1].train()
        self.net[0].weight.requires_grad_(False)
        for p in self.net.parameters():
            p.grad = torch.ones_like(p)
        self.net[2].register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        self.made += 1
        if self.made == self.calls:
            raise ValueError("a fault of the model")
        torch.rand(3)
        np.random.rand(2)  # noqa: NPY002
        random.random()
        return self.net(x)


def state_of(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Any]:
    hooks = [len(d) for m in model.modules() for n, d in vars(m).items() if n.endswith("_hooks") and isinstance(d, dict)]
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "wanted": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": hooks,
        "x": x.clone(),
        "labels": labels.clone(),
        "leaf": (x.requires_grad, x.grad is None),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "python": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state(legacy=True)],  # noqa: NPY002
        "torch": torch.get_rng_state(),
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


@every_pair
@pytest.mark.parametrize("calls", [None, 1, 3])
def test_purity_even_when_the_model_raises(name: str, threat: str, calls: int | None) -> None:
    model, b = Fickle(calls, threat), bench(4, n=4, wrong=0, threat=threat)
    x, labels = b.x.clone(), b.model(b.x.double()).argmax(1)
    x.requires_grad_()
    before = state_of(model, x, labels)
    fault = None
    try:
        small(entries()[name], threat)(model, x, labels, radius_of(threat) / 100)
    except ValueError as error:
        fault = str(error)
    assert fault == ("a fault of the model" if calls is not None and model.made >= calls else None)
    after = state_of(model, x, labels)
    changed = [key for key in before if not equal(before[key], after[key])]
    assert not changed


def test_an_attack_leaves_no_graph_behind() -> None:
    for name in entries():
        outcome = attack_on(bench(threat=first(name)), name, first(name))
        for part in (outcome.x_adv, outcome.score, outcome.size, outcome.reached):
            assert not part.requires_grad
            assert part.grad_fn is None


# Ledgers.


class Counting(nn.Module):
    """Counts the rows that it answers, and those for which a gradient comes back to its answer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forwards, self.backwards = net, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        output = self.net(x)
        if output.requires_grad:
            output.register_hook(self._back)
        return output

    def _back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@every_goal
@pytest.mark.parametrize(("drop", "batch_size"), [(True, None), (False, 3)])
def test_the_ledger_is_what_the_model_saw(name: str, threat: str, targeted: bool, drop: bool, batch_size: int | None) -> None:
    """In all, and sample by sample: a sample attacked alone costs what its row of the whole ledger says."""
    b = bench(4, n=6, wrong=1, threat=threat)
    goal, attack = b.goal(targeted), small(entries()[name], threat)
    model = Counting(b.model)
    outcome = attack(Victim(model, batch_size=batch_size), b.x, goal, radius_of(threat), drop=drop)
    assert int(outcome.queries.sum()) == model.forwards
    assert int(outcome.backwards.sum()) == model.backwards
    for row in range(6):
        one = slice(row, row + 1)
        alone = Counting(b.model)
        attack(alone, b.x[one], goal.take(one), radius_of(threat), drop=drop)
        assert (int(outcome.queries[row]), int(outcome.backwards[row])) == (alone.forwards, alone.backwards)
    if entries()[name].access is not Access.GRADIENT:
        assert int(outcome.backwards.sum()) == 0


def test_pgd_40_costs_exactly_40_and_41() -> None:
    b = bench(n=6, wrong=0)
    outcome = get("pgd", steps=40)(b.model, b.x, b.labels, 0.02, clean=answers(b.model, b.x), drop=False)
    assert outcome.backwards.tolist() == [40] * 6
    assert outcome.queries.tolist() == [41] * 6


# Access.


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError("backward was called")


@every_attack
@pytest.mark.parametrize("access", [Access.LABELS, Access.SCORES])
def test_access_is_enforced(name: str, access: Access) -> None:
    b = bench(4, wrong=0, threat=first(name))
    victim = Victim(lambda x: b.model(Raises.apply(x).double()), access=access)
    denied = False
    try:
        outcome = attack_on(b, name, first(name), model=victim)
    except AccessDenied:
        denied = True
    assert denied or entries()[name].access is not Access.GRADIENT, "a gradient attack went on without gradients"
    assert not denied or entries()[name].access > access, "denied what the registry says is enough"
    if not denied:
        assert torch.equal(outcome.reached, answers(b.model, outcome.x_adv).argmax(1) != b.labels)
        assert int(outcome.backwards.sum()) == 0


def test_a_label_only_victim_leaks_no_score() -> None:
    b = bench(4)
    shown = Victim(b.model, access=Access.LABELS).outputs(b.x, Tally.zeros(len(b.x)))
    assert set(shown.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(shown.argmax(1), answers(b.model, b.x).argmax(1))


# The door.


def test_unknown_names_are_refused() -> None:
    for bad in (
        lambda: get("pgdd"),
        lambda: get("pgd", stepz=3),
        lambda: get("pgd", threat="l7"),
        lambda: get("apgd", threat="l0"),
        lambda: get("stadv", threat="linf"),
        lambda: get("pgd", threat="color+linf"),
        lambda: get("stadv", threat=compose((Flow(), 1.0), (Linf(), 0.1))),
        lambda: get("pgd", objective="hinge"),
        lambda: get("pgd", restarts=0),
    ):
        with pytest.raises(BadInput) as caught:
            bad()
        assert "\n" not in str(caught.value)


BAD_CALLS: dict[str, Callable[[Bench], tuple[Any, Any, Any]]] = {
    "labels too few": lambda b: (b.x, b.labels[:3], 0.1),
    "labels too high": lambda b: (b.x, b.labels + 4, 0.1),
    "labels below zero": lambda b: (b.x, b.labels - 4, 0.1),
    "labels as floats": lambda b: (b.x, b.labels.float(), 0.1),
    "labels as a list": lambda b: (b.x, b.labels.tolist(), 0.1),
    "targets too few": lambda b: (b.x, Targeted(b.labels[:3]), 0.1),
    "radius below zero": lambda b: (b.x, b.labels, -0.1),
    "radius not a number": lambda b: (b.x, b.labels, float("nan")),
    "radius of wrong length": lambda b: (b.x, b.labels, torch.full((3,), 0.1)),
    "radius of wrong shape": lambda b: (b.x, b.labels, torch.full((len(b.x), 1), 0.1)),
    "x with nan": lambda b: (b.x.clone().index_fill(0, torch.tensor(1), torch.nan), b.labels, 0.1),
    "x with infinity": lambda b: (b.x.clone().index_fill(0, torch.tensor(1), torch.inf), b.labels, 0.1),
    "x outside the box": lambda b: (b.x * 255, b.labels, 0.1),
    "x of integers": lambda b: ((b.x * 255).to(torch.uint8), b.labels, 0.1),
    "x empty": lambda b: (b.x[:0], b.labels[:0], 0.1),
    "x without a batch": lambda b: (b.x[0, 0, 0], b.labels, 0.1),
}


@every_attack
@pytest.mark.parametrize("words", list(BAD_CALLS))
def test_bad_calls_are_refused_in_one_line(name: str, words: str) -> None:
    b = bench(4, threat=first(name))
    x, goal, radius = BAD_CALLS[words](b)
    with pytest.raises(BadInput) as caught:
        small(entries()[name], first(name))(Victim(b.model, box=(torch.zeros_like(b.x[0]), torch.ones_like(b.x[0]))), x, goal, radius)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@every_attack
def test_a_model_with_one_output_is_refused(name: str) -> None:
    x = torch.full((3, 4), 0.5)
    with pytest.raises(BadInput, match="1"):
        small(entries()[name])(linear(4, 1), x, torch.zeros(3, dtype=torch.int64), 0.1)


@every_attack
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_every_width(name: str, dtype: torch.dtype) -> None:
    b = bench(4, threat=first(name))
    plain = attack_on(b, name, first(name))
    check_same(plain, attack_on(b, name, first(name), goal=Untargeted(b.labels.to(dtype))))
    if entries()[name].targeted:
        aimed = [attack_on(b, name, first(name), goal=Targeted(((b.labels + 1) % 4).to(t))) for t in (dtype, torch.int64)]
        check_same(*aimed)


@every_attack
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inputs_of_every_precision(name: str, dtype: torch.dtype) -> None:
    for threat in entries()[name].threats:
        b = bench(4, threat=threat)
        b = replace(b, x=b.x.to(dtype))
        outcome = attack_on(b, name, threat)
        check_outcome(threat, b.x, outcome, radius_of(threat))


@every_attack
def test_under_no_grad_and_inference_mode(name: str) -> None:
    b = bench(4, threat=first(name))
    plain = attack_on(b, name, first(name))
    with torch.no_grad():
        check_same(plain, attack_on(b, name, first(name)))
    with torch.inference_mode():
        x = b.x.clone()
        check_same(plain, attack_on(replace(b, x=x), name, first(name)))
    check_same(plain, attack_on(replace(b, x=x), name, first(name)))


@every_pair
def test_infinite_radius_means_all_that_the_box_allows(name: str, threat: str) -> None:
    b = bench(4, threat=threat)

    def half_blind(x: Tensor) -> Tensor:  # most features have no gradient: infinity times zero lurks
        seen = x.clone()
        seen[:, :, 1:] = 0.5
        return b.model(seen.double())

    labels = half_blind(b.x).argmax(1)
    outcome = attack_on(b, name, threat, goal=Untargeted(labels), model=half_blind, radius=torch.inf)
    check_outcome(threat, b.x, outcome, torch.inf)
    assert not bool(outcome.flags["invalid"].any())
    reach = threat_of(threat).within((0.0, 1.0)).reach(b.x)
    same = attack_on(b, name, threat, goal=Untargeted(labels), model=half_blind, radius=reach)
    assert torch.equal(outcome.reached, same.reached)


# Invariance to the logits' scale.


@pytest.mark.parametrize("threat", ["linf", "l2", "l1"])
@pytest.mark.parametrize("scale", [1e-3, 1e2, 1e4])
def test_scale_of_the_logits(threat: str, scale: float) -> None:
    b = bench(4, n=24)
    for name, options in (("apgd_dlr", {}), ("apgd_t", {}), ("pgd", {"objective": "margin"}), ("bim", {"objective": "margin"})):
        options = dict(options)
        attack = get(name, threat=threat, steps=8, **options)
        plain, scaled = (attack(lambda x, s=s: b.model(x.double()) * s, b.x, b.labels, radius_of(threat)) for s in (1.0, scale))
        assert torch.equal(plain.reached, scaled.reached), name


@every_pair
def test_a_constant_on_the_logits(name: str, threat: str) -> None:
    b = bench(4, threat=threat)
    plain, moved = (attack_on(b, name, threat, model=lambda x, c=c: b.model(x.double()) + c) for c in (0.0, 1024.0))
    assert torch.equal(plain.reached, moved.reached)


def test_every_error_of_ours_is_in_the_tree() -> None:
    assert issubclass(BadInput, EpsballError)
    assert issubclass(AccessDenied, EpsballError)


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_data_on_the_edge_of_a_box_that_rounds_inward_are_accepted(kind: str) -> None:
    """float32 of a float64 bound may lie half a step beyond it: that is rounding, not data outside the box."""
    high = next(h for h in ((1 - m) / s for m in (0.485, 0.456, 0.406) for s in (0.229, 0.224, 0.225)) if float(torch.tensor(h)) > h)
    x = torch.full((3, 2), high)
    box = (0.0, high) if kind == "number" else (torch.zeros(2, dtype=torch.float64), torch.full((2,), high, dtype=torch.float64))
    for threat in ("linf", "l2", "l1", "l0"):
        outcome = get("pgd", threat=threat, steps=3)(Victim(linear(2, 3), box=box), x, torch.zeros(3, dtype=torch.int64), 0.5)
        assert bool((outcome.x_adv <= x).all())
        assert bool((outcome.size <= 0.5).all())
