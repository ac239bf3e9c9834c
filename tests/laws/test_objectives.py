"""Objective and gradient laws, over everything in `OBJECTIVES`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lawkit import check_finite_differences, check_gradient_rows, mlp, objective_for, posed, rng, tensor
from torch import Tensor

from epsball.core import Aimed, Goal, LabelsChanged, Targeted, Untargeted, autograd
from epsball.errors import BadInput
from epsball.objectives import OBJECTIVES

GOALS = ("untargeted", "targeted", "aimed", "multi-label")
CLASSES = (2, 3, 4, 10)


def goal_of(kind: str, n: int, classes: int, seed: int = 0) -> Goal:
    labels = tensor(rng(seed, 3).integers(0, classes, n), torch.int64)
    targets = (labels + 1 + tensor(rng(seed, 4).integers(0, classes - 1, n), torch.int64)) % classes
    if kind == "multi-label":
        return LabelsChanged(tensor(rng(seed, 5).integers(0, 2, (n, classes)), torch.int64))
    return {"untargeted": Untargeted(labels), "targeted": Targeted(targets), "aimed": Aimed(labels, targets)}[kind]


def speaks(name: str, kind: str, classes: int) -> bool:
    """Whether the objective is defined there; everywhere else it must refuse."""
    if name == "kl":
        return kind == "untargeted"
    return not (name.startswith("dlr") and (classes < 3 or kind == "multi-label"))


def scores(name: str, goal: Goal, output: Tensor) -> Tensor:
    """The objective on given outputs; what a model would answer on clean inputs is fixed."""
    x = torch.full((len(output), 3), 0.5)
    clean = tensor(rng(8).standard_normal(tuple(output.shape))).to(output.dtype)
    problem = posed(lambda z: z, x, goal, clean=clean)
    return OBJECTIVES[name](problem, x, x, output)


COMBINATIONS = [(name, kind, classes) for name in OBJECTIVES for kind in GOALS for classes in CLASSES]
SPOKEN = [c for c in COMBINATIONS if speaks(*c)]


@pytest.mark.parametrize(("name", "kind", "classes"), [c for c in COMBINATIONS if not speaks(*c)])
def test_undefined_is_refused_in_one_line(name: str, kind: str, classes: int) -> None:
    with pytest.raises(BadInput) as caught:
        scores(name, goal_of(kind, 4, classes), torch.zeros(4, classes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "kind", "classes"), SPOKEN)
def test_per_sample_and_shift_free(name: str, kind: str, classes: int) -> None:
    goal, output = goal_of(kind, 6, classes), tensor(rng(1).standard_normal((6, classes)) * 3, torch.float64)
    score = scores(name, goal, output)
    assert score.shape == (6,)
    assert bool(torch.isfinite(score).all())
    changed = output.clone()
    changed[3] = tensor(rng(2).standard_normal(classes), torch.float64) * 50
    other = scores(name, goal, changed)
    keep = torch.arange(6) != 3
    assert torch.equal(other[keep], score[keep])
    assert not torch.equal(other[3], score[3])
    if kind != "multi-label":  # there the sign of every score is the decision
        assert torch.allclose(scores(name, goal, output + 64.0), score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", GOALS)
@given(seed=st.integers(0, 10**6), classes=st.sampled_from(CLASSES), scale=st.sampled_from((1e-6, 1.0, 1e6)))
def test_margin_is_positive_exactly_where_reached(kind: str, seed: int, classes: int, scale: float) -> None:
    goal = goal_of(kind, 16, classes, seed)
    output = tensor(rng(seed, 6).standard_normal((16, classes)) * scale)
    if kind == "aimed":  # its goal is wider than its direction: any other class will do
        assert bool((goal.reached(output) | (scores("margin", goal, output) <= 0)).all())
    else:
        assert torch.equal(scores("margin", goal, output) > 0, goal.reached(output))


@pytest.mark.parametrize("kind", GOALS[:3])
@pytest.mark.parametrize("classes", CLASSES)
def test_every_objective_grows_when_the_goal_gets_nearer(kind: str, classes: int) -> None:
    """Moving score from the label to the target helps, whatever is climbed: a wrong sign anywhere fails here."""
    goal = goal_of(kind, 8, classes)
    output = tensor(rng(4).standard_normal((8, classes)), torch.float64)
    top = lambda but: output.scatter(1, but[:, None], -torch.inf).argmax(1)  # noqa: E731
    label = top(goal.labels) if kind == "targeted" else goal.labels
    target = {"untargeted": top(goal.labels), "targeted": goal.labels, "aimed": getattr(goal, "targets", None)}[kind]
    # The label first and the target second: only there is a ratio of differences monotone.
    output = output.scatter(1, label[:, None], 5.0).scatter(1, target[:, None], 4.0)
    push = torch.zeros_like(output).scatter(1, label[:, None], -0.01).scatter(1, target[:, None], 0.01)
    for name in objective_for(classes):
        if name != "kl" and speaks(name, kind, classes):
            assert bool((scores(name, goal, output + push) > scores(name, goal, output)).all()), name


@pytest.mark.parametrize(("name", "kind", "classes"), [c for c in SPOKEN if c[0].startswith("dlr")])
@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_dlr_knows_no_scale(name: str, kind: str, classes: int, scale: float) -> None:
    goal, output = goal_of(kind, 12, classes), tensor(rng(5).standard_normal((12, classes)), torch.float64)
    assert torch.allclose(scores(name, goal, output * scale), scores(name, goal, output), rtol=1e-6)


@pytest.mark.parametrize(("name", "kind", "classes"), SPOKEN)
def test_gradients(name: str, kind: str, classes: int) -> None:
    model = mlp(12, classes, smooth=True)
    x = tensor(0.1 + 0.8 * rng(6).random((5, 3, 2, 2)), torch.float64)
    problem = posed(model, x, goal_of(kind, 5, classes), objective=OBJECTIVES[name])
    z = x + 0.01
    check_finite_differences(problem, z, autograd)
    check_gradient_rows(autograd, problem, z)


@pytest.mark.parametrize(("name", "kind", "classes"), SPOKEN)
@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
def test_extreme_logits_give_no_nan(name: str, kind: str, classes: int, scale: float) -> None:
    output = (tensor(rng(7).standard_normal((6, classes))) * scale).requires_grad_()
    score = scores(name, goal_of(kind, 6, classes), output)
    (gradient,) = torch.autograd.grad(score.sum(), output)
    assert not bool(torch.isnan(score).any())
    assert not bool(torch.isnan(gradient).any())


@pytest.mark.parametrize(("name", "kind", "classes"), SPOKEN)
def test_ties_give_finite_scores(name: str, kind: str, classes: int) -> None:
    output = torch.zeros(4, classes, requires_grad=True)
    score = scores(name, goal_of(kind, 4, classes), output)
    (gradient,) = torch.autograd.grad(score.sum(), output)
    assert bool(torch.isfinite(score).all())
    assert bool(torch.isfinite(gradient).all())


def test_unwatched_labels_do_not_count() -> None:
    labels, watched = torch.tensor([[1, 0, 1]]), torch.tensor([True, False, True])
    goal = LabelsChanged(labels, watched)
    assert not bool(goal.reached(torch.tensor([[1.0, 5.0, 1.0]])))
    assert bool(goal.reached(torch.tensor([[1.0, 5.0, -1.0]])))
    for name in ("ce", "margin"):
        quiet, loud = (scores(name, goal, torch.tensor([[1.0, other, 1.0]])) for other in (-5.0, 5.0))
        assert torch.equal(quiet, loud)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", GOALS)
def test_an_answer_that_is_not_finite_reaches_nothing(kind: str, bad: float) -> None:
    classes = 4
    for place in range(classes):
        output = tensor(rng(9).standard_normal((20, classes)))
        output[:, place] = bad
        assert not bool(goal_of(kind, 20, classes).reached(output).any())


def test_row_selection_of_goals() -> None:
    rows = torch.tensor([4, 1])
    for kind in GOALS:
        goal: Goal = goal_of(kind, 6, 4)
        output = tensor(rng(10).standard_normal((6, 4)))
        assert torch.equal(goal.take(rows).reached(output[rows]), goal.reached(output)[rows])
        assert torch.equal(goal.take(slice(1, 3)).reached(output[1:3]), goal.reached(output)[1:3])
