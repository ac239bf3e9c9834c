"""The contract check before any attack: does the model get and give what everybody thinks it does?

Each check looks at one thing, ends in one sentence, and either passes, mends what is safe to mend, warns, or blocks: a
blocked model is audited, but its number is not called robust accuracy.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from epsball.auditing.results import Finding
from epsball.auditing.statistics import mcnemar
from epsball.core import Access, Goal, Key, Objective, Problem, Tally, Untargeted, Victim, as_goal, autograd, content_ids, valid
from epsball.core.inside import further_in
from epsball.errors import BadInput, EpsballError
from epsball.objectives import cross_entropy, margin
from epsball.threats import Linf

BLIND = 0.05
"""Share of samples without a gradient of the margin above which no number stands; of fewer the report warns."""
SAMPLE = 128
"""Most samples that a check looks at; checks cost at most about 16 forward and 4 backward rows for each of them."""
FEW, ALONE = 32, 8
"""The same for victims without gradients, whose every row may be paid for: about 2 rows each; and how many of them are asked alone."""
LEFT_OUT = "Searches ask other batches, so checks that compare them were left out."
"""Said wherever an answer hangs on its batch."""
SAME = 1e-4
"""Largest difference of two answers, as a share of the largest score, that is none."""


@dataclass(frozen=True)
class Bench:
    """A small sample of the data on which the checks run."""

    victim: Victim
    x: Tensor
    goal: Goal
    output: Tensor

    @property
    def thrifty(self) -> bool:
        """The victim shows no gradients: it may be a service that counts rows."""
        return self.victim.access < Access.GRADIENT

    def ask(self, x: Tensor) -> Tensor:
        """(B, C) outputs; nobody's budget is charged."""
        return self.victim.outputs(x, Tally.zeros(len(x)))


RAW = "; inputs that are no images go as they are with --layout raw, in Python with epsball.data.from_arrays(x, y, layout='raw')"


def classes_fit(y: Tensor, output: Tensor) -> None:
    """Refuses labels that the model has no score for.

    Raises:
        BadInput: names the label, the number of classes and the fix.
    """
    if y.ndim == 2:
        if y.shape[1] != output.shape[1]:
            raise BadInput(f"labels: {y.shape[1]} columns, the model has {output.shape[1]} outputs: one column per output is needed")
        return
    if int(y.max()) >= output.shape[1]:
        raise BadInput(
            f"labels: class {int(y.max())} in the data, the model scores {output.shape[1]} classes: map the labels or fix the model"
        )


def look(victim: Victim, x: Tensor, y: Tensor) -> Bench:
    """Takes the first samples (the caller has put them in random order) and asks once.

    Raises:
        BadInput: the model raises, or its answers do not fit the labels.
    """
    part = x[: SAMPLE if victim.access is Access.GRADIENT else FEW].to(victim.device)
    try:
        output = victim.outputs(part, Tally.zeros(len(part)))
    except EpsballError:
        raise
    except Exception as error:  # a model that does not fit the data can raise anything
        said = " ".join(str(error).split())[:160] or "no message"
        raise BadInput(
            f"model '{victim.name}': raised {type(error).__name__} ({said}) for inputs of shape {tuple(part.shape)}: "
            f"check that model, data and layout belong together{RAW if part.ndim == 4 and part.shape[1] == 1 else ''}"
        ) from error
    classes_fit(y, output)
    return Bench(victim, part, as_goal(y[: len(part)].to(victim.device)), output)


PROBABILITIES, DENSITIES = "probabilities", "positive scores that span decades"


def unlogged(output: Tensor) -> str:
    """What scores are that steer better by their logarithm; empty where they are neither, or fewer than 8 rows.

    Probabilities: every row lies in [0, 1] and sums to 1 within 1e-4, and some lie between. Densities: nothing is below 0, and in most
    rows the best score is more than a thousand times the second, so that no loss sees any other class.
    """
    fine = output[valid(output)]
    if len(fine) < 8 or output.shape[1] < 2 or not bool((fine >= 0).all()):
        return ""
    if bool((fine <= 1).all() and ((fine.sum(1) - 1).abs() < 1e-4).all()):
        return PROBABILITIES if bool(((fine > 0) & (fine < 1)).any()) else ""  # the logarithm of a label leads nowhere
    best, second = fine.topk(2, 1).values.unbind(1)
    return DENSITIES if bool(((second > 0) & (best > 1000 * second)).double().mean() > 0.5) else ""


def answers(bench: Bench) -> Iterator[Finding]:
    """Finite scores, and more than one class ever answered."""
    bad = int((~valid(bench.output)).sum())
    if bad == len(bench.x):
        yield Finding(id="finite", status="block", message=f"All {bad} outputs looked at are NaN or infinite.")
    elif bad:
        yield Finding(
            id="finite",
            status="warn",
            message=f"{bad} of {len(bench.x)} outputs are NaN or infinite: they count as broken and as robust at once.",
        )
    else:
        yield Finding(id="finite", status="pass", message="All outputs are finite.")
    if isinstance(bench.goal, Untargeted):
        given = bench.output[valid(bench.output)].argmax(1)
        if (
            len(bench.x) >= 20
            and len(given)
            and bool((given == given[0]).all())
            and bool((bench.goal.labels != bench.goal.labels[0]).any())
        ):
            message = f"The model answers class {int(given[0])} for all {len(given)} samples looked at."
            yield Finding(id="constant", status="block", message=message)


def repeats(bench: Bench) -> Iterator[Finding]:
    """The same question gets the same answer, four times; a victim without gradients is asked only once more.

    In reverse, for the generators of a victim start anew with every context and may draw the same again. What changes in reverse, each
    time alike, and not in the same order, hangs on the place in the batch: the model seeds its own draws.
    """
    others = [bench.ask(bench.x.flip(0)).flip(0) for _ in range(1 if bench.thrifty else 4)]
    worst = max(_apart(bench.output, o) for o in others)
    flips = sum(int((o.argmax(1) != bench.output.argmax(1)).sum()) for o in others)
    if worst <= SAME and not flips:
        yield Finding(id="random", status="pass", message="Same input, same output.")
    elif not bench.thrifty and _all_same(others) and _all_same([bench.output, bench.ask(bench.x), bench.ask(bench.x)]):
        message = (
            f"Answers depend on the place in the batch: turned around, {flips // len(others)} of {len(bench.x)} change their class, "
            f"each time alike: the model seeds its own random numbers. {LEFT_OUT}"
        )
        yield Finding(id="batch", status="block", message=message)
    else:
        message = (
            f"The model is random: in {len(others)} repeats {flips} of {len(others) * len(bench.x)} answers "
            f"changed their class, scores moved by {worst:.1e} of their range."
        )
        yield Finding(id="random", status="block", message=message)


def _all_same(answers: list[Tensor]) -> bool:
    """Whether each answer is the one before, but for rounding."""
    return all(_apart(one, other) <= SAME for one, other in pairwise(answers))


def independent(bench: Bench) -> Iterator[Finding]:
    """A sample's answer does not depend on its neighbors in the batch."""
    part = bench.x[: ALONE if bench.thrifty else 32]
    alone = torch.cat([bench.ask(part[i : i + 1]) for i in range(len(part))])
    worst = _apart(bench.output[: len(part)], alone)
    if worst > 1e-3:
        message = (
            f"Answers depend on the batch: alone or in a batch of {len(bench.x)}, "
            f"scores differ by {worst:.1e} of their range (batch statistics?). {LEFT_OUT}"
        )
        yield Finding(id="batch", status="block", message=message)
    else:
        yield Finding(id="batch", status="pass", message="Answers do not depend on the batch.")


def _apart(first: Tensor, second: Tensor) -> float:
    """Largest difference of two answers as a share of the largest score; what is not finite is another check's business."""
    a, b = (t.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for t in (first, second))
    return float((a - b).abs().amax() / a.abs().amax().clamp(min=1e-12))


def steady(bench: Bench, before: str) -> Iterator[Finding]:
    """Neither chance nor history nor neighbors change an answer. Each cause is named once: what the first explains is not held
    against the model again."""
    again = [*repeats(bench)]
    changes = again[0].status == "block"
    trace = [*still(bench, before, changes)]
    if not (changes and trace[0].status == "block"):
        yield from again
    if not changes:
        yield from independent(bench)
    yield from trace


def still(bench: Bench, before: str, changes: bool) -> Iterator[Finding]:
    """Asking leaves no trace in the model: in its tensors, and unless its answers change anyway, in what it answers next."""
    if fingerprint(bench.victim.model) != before:
        message = "Asking the model changes its buffers or parameters: its answers depend on what was asked before."
        yield Finding(id="state", status="block", message=message)
    elif not changes and (apart := remembered(bench)) is not None:
        message = (
            f"The model remembers what it was asked: two copies of it, asked the same in another order, differ by {apart:.1e} of their "
            "range. Attacks, and whoever repeats them, see other answers than a fresh model gives."
        )
        yield Finding(id="state", status="block", message=message)
    else:
        yield Finding(id="state", status="pass", message="Asking leaves the model unchanged.")


def remembered(bench: Bench) -> float | None:
    """By how much answers of two copies of the model differ that were asked the same inputs, none of which it has seen, in other orders.

    The inputs lie in pairs, two hundredths of the box apart, between two samples each. None: not at all, or it cannot be copied.

    Cost: 2 forward rows of each of two copies for each of at most 16 samples; none is in the ledger.
    """
    model = bench.victim.model
    if bench.thrifty or not isinstance(model, nn.Module):
        return None
    x = bench.x[:16]
    between = (x + x.roll(1, 0)) / 2
    beside = further_in(between, bench.victim.box, 0.02)
    answers = []
    for order in ((between, beside), (beside, between)):
        try:  # weights are shared: they are large, and nobody changes them
            twin = bench.victim.twin(copy.deepcopy(model, {id(weight): weight for weight in model.parameters()}))
            given = [twin.outputs(inputs, Tally.zeros(len(inputs))) for inputs in order]
        except Exception:  # what cannot be copied cannot be asked twice
            return None
        answers.append(given if order[0] is between else given[::-1])
    apart = max(_apart(one, other) for one, other in zip(*answers, strict=True))
    return apart if apart > SAME else None


def scaled(bench: Bench, adapter_stats: tuple[Tensor, Tensor] | None) -> Iterator[Finding]:
    """Inputs reach the model in the scale it was trained on: no other usual scaling gives clearly better answers.

    Compared with x * 255, 2x - 1, standardized x and, where a normalization was declared, with x without it. A gain of 10
    points that exact McNemar calls significant (p < 0.001) blocks.
    """
    fine = valid(bench.output)  # where the model gives no answer, another scale giving one proves nothing
    if not isinstance(bench.goal, Untargeted) or int(fine.sum()) < 32:
        return
    x, labels = bench.x[fine], bench.goal.labels[fine]
    axes = (0, 2, 3) if x.ndim == 4 else 0
    mean, std = x.mean(axes, keepdim=True), x.std(axes, keepdim=True).clamp(min=1e-3)
    ways = {"multiplied by 255": x * 255, "scaled to [-1, 1]": 2 * x - 1, "standardized by their own mean and deviation": (x - mean) / std}
    if adapter_stats is not None:
        ways["without the declared mean and std"] = x * adapter_stats[1] + adapter_stats[0]
    right = bench.output[fine].argmax(1) == labels
    hopeless = int((~right).sum()) < 0.1 * len(x)  # what is right already leaves no room for a gain that blocks
    for words, inputs in {} if hopeless else ways.items():
        other = bench.ask(inputs).argmax(1) == labels
        gain, loss = int((other & ~right).sum()), int((right & ~other).sum())
        if gain - loss >= 0.1 * len(x) and mcnemar(gain, loss) < 0.001:
            message = (
                f"Accuracy is {right.float().mean():.0%} as declared but {other.float().mean():.0%} "
                f"when inputs are {words}: normalization is missing, doubled or wrong."
            )
            yield Finding(id="scaling", status="block", message=message)
            return
    yield Finding(id="scaling", status="pass", message="No other usual input scaling gives better answers.")


def alive(bench: Bench, seed: int) -> Iterator[Finding]:
    """Gradients exist, are finite and are not zero, for cross-entropy and for the margin, at x and beside it.

    Not asked of a victim that shows none: nothing is hidden there, and the verdict says what that means.
    """
    if bench.thrifty:
        return
    victim, right = bench.victim, ~bench.goal.reached(bench.output) & valid(bench.output)
    rows = right.nonzero().squeeze(1)
    if not len(rows):
        return
    x, goal = bench.x[rows], bench.goal.take(rows)
    low, high = (torch.as_tensor(bound, device=x.device) for bound in victim.box)
    shift = (Key.of(seed).fold("preflight").uniform(content_ids(x), x) - 0.5) * 0.02 * (high - low)
    dead, wild = {"cross-entropy": 0, "margin": 0}, 0
    for name, objective in (("cross-entropy", cross_entropy), ("margin", margin)):
        for point in (x, (x + shift.to(x.dtype)).clamp(low, high)):
            try:
                gradient = slopes(victim, point, goal, objective)
            except Exception:  # an in-place step, a backward that raises, integers: no gradient is to be had
                gradient = torch.zeros_like(point)
            odd = ~torch.isfinite(gradient).flatten(1).all(1)
            sick = odd | (gradient.flatten(1).abs().amax(1) == 0)
            dead[name], wild = max(dead[name], int(sick.sum())), max(wild, int(odd.sum()))
    yield _alive_finding(dead, wild, len(rows))


def _alive_finding(dead: dict[str, int], wild: int, n: int) -> Finding:
    """Blocks where the margin, which searches climb, has no gradient for more than `BLIND` of the samples; warns of fewer, and of a
    cross-entropy alone that has none."""
    if dead["margin"] == n:
        message = "No gradient reaches the input." if wild < n else "The gradient that reaches the input is NaN or infinite."
        return Finding(id="no-gradient", status="block", message=message)
    if dead["margin"] > 0.01 * n:
        message = f"The margin's gradient is zero or not finite for {dead['margin']} of {n} samples: gradient attacks are blind there."
        return Finding(id="gradient", status="block" if dead["margin"] > BLIND * n else "warn", message=message)
    if dead["cross-entropy"] > 0.01 * n:
        message = (
            f"Cross-entropy's gradient vanishes for {dead['cross-entropy']} of {n} samples "
            "(saturated scores): any evaluation by cross-entropy alone would look too good."
        )
        return Finding(id="gradient", status="warn", message=message)
    return Finding(id="gradient", status="pass", message="Gradients are finite and alive.")


def slopes(victim: Victim, x: Tensor, goal: Goal, objective: Objective) -> Tensor:
    """(B, ...) gradient of an objective at x; zeros where the output is detached from the input."""
    gradient: Tensor = autograd(posed(victim, x, goal, objective), x).gradient
    return gradient


def posed(victim: Victim, x: Tensor, goal: Goal, objective: Objective) -> Problem:
    """Something to take gradients and scores from; its radius is 0."""
    n, tally = len(x), Tally.zeros(len(x))
    radius = torch.zeros(n, dtype=torch.float64, device=x.device)
    ids, clean = torch.zeros(n, dtype=torch.int64, device=x.device), victim.outputs(x, tally)
    return Problem(victim, x, goal, Linf().within(victim.box), objective, radius, ids, clean, Key.of(0), tally)


def foretold(problem: Problem, z: Tensor, beside: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """How the score changes from z to D points (B, ...) beside it: (B, D) as measured and (B, D) as the gradient at z foretells.

    Cost: D + 1 forward rows and 1 backward row for each sample.
    """
    reading, seen, told = autograd(problem, z), [], []
    for there in beside:
        seen.append(problem.judge(there).score.double() - reading.score.double())
        told.append(((there - z) * reading.gradient).flatten(1).double().sum(1))
    return torch.stack(seen, 1), torch.stack(told, 1)


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """(B,) cosine of rows; 0 where only one of them is zero, NaN where both are."""
    lengths = first.norm(dim=1) * second.norm(dim=1)
    found = torch.where(lengths > 0, (first * second).sum(1) / lengths, torch.zeros_like(lengths))
    return torch.where((first.norm(dim=1) > 0) | (second.norm(dim=1) > 0), found, torch.nan)


def fingerprint(model: object) -> str:
    """Hash of all parameters and buffers; empty for models that are plain functions."""
    if not isinstance(model, nn.Module):
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def preflight(victim: Victim, x: Tensor, y: Tensor, *, seed: int = 0, normalization: tuple[Tensor, Tensor] | None = None) -> list[Finding]:
    """`examine` for the first `SAMPLE` samples, `FEW` of a victim without gradients.

    Args:
        victim: the model, used as a context already or not. x: inputs (N, ...) in random order. y: labels (N,) or (N, C).
        seed, normalization: as there.
    """
    with victim:
        return examine(look(victim, x, y), seed=seed, normalization=normalization)


def examine(bench: Bench, *, seed: int = 0, normalization: tuple[Tensor, Tensor] | None = None) -> list[Finding]:
    """Runs every check.

    Args:
        bench: the samples, asked once. seed: of the small shifts at which gradients are looked at.
        normalization: (mean, std) that the adapter applies, in shapes that broadcast against x, if any.

    Cost: about 12 forward and 4 backward rows for each sample looked at, and 3 or 4 more where a tenth or more is wrong; 64 of copies;
        without gradients about 1, and those 3.
    """
    with bench.victim:
        findings = [*answers(bench), *steady(bench, fingerprint(bench.victim.model))]
        findings += [*scaled(bench, normalization), *alive(bench, seed)]
    return findings
