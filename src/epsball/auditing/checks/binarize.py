"""The binarization test: can the attack find an input that exists by construction? Zimmermann et al. 2022, arXiv 2206.13991."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from epsball.attacks import apgd, noise
from epsball.auditing.checks.scene import Scene, attack_row
from epsball.auditing.results import Flag
from epsball.auditing.statistics import clopper_pearson
from epsball.core import AttackLike, Outcome, Problem, Victim, valid
from epsball.core.rows import per_sample
from epsball.core.threat import Z
from epsball.threats import L2, Linf

SAMPLE, FEWEST = 24, 10
INNER, CLOSE = 48, 0.9
STEPS, DRAWS = 40, 50
PASSED, TOO_EASY = 0.9, 0.5


@dataclass(frozen=True)
class Crossed:
    """Reached where the features (B, D) lie beyond a plane of their own: features . weight (B, D) > offset (B,)."""

    weight: Tensor
    offset: Tensor

    def height(self, output: Tensor) -> Tensor:
        """(B,) above the plane."""
        return (output * self.weight).sum(1) - self.offset

    def reached(self, output: Tensor) -> Tensor:
        """(B,) bool."""
        return (self.height(output) > 0) & valid(output)

    def take(self, rows: Tensor | slice) -> Crossed:
        """Some of the planes."""
        return Crossed(self.weight[rows], self.offset[rows])


def height(problem: Problem, z: Z, x_adv: Tensor, output: Tensor) -> Tensor:
    """(B,) what the attack climbs: how far beyond its plane a sample is."""
    assert isinstance(problem.goal, Crossed)
    return problem.goal.height(output)


class Features(nn.Module):
    """A model that answers with the input (B, D) of the linear layer that it calls last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """(B, D); (B, 0) where no linear layer was called on one vector per sample."""
        seen: list[Tensor] = []

        def keep(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])

        layers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        handles = [layer.register_forward_pre_hook(keep) for layer in layers]
        try:
            self.model(x)
        finally:
            for handle in handles:
                handle.remove()
        fits = [features for features in seen if features.ndim == 2 and len(features) >= len(x)]
        return fits[-1][: len(x)] if fits else x.flatten(1)[:, :0]


def planted_inputs_are_found(scene: Scene) -> Iterator[Flag]:
    """The attack finds inputs that exist by construction, and chance does not.

    For each sample a read-out of the model's last features is fitted that tells one random point of the edge from 48 random points
    inside the ball; beyond its plane, drawn at 0.9 of the way to the point of the edge, lies an adversarial input. APGD on the
    read-out has to cross it nearly always: it blocks where even the high end of the 95 % interval of its success is below 90 %. Samples
    on which random points do are no test.

    Args:
        scene: of a model with a linear layer whose input are features; Linf or L2.

    Cost: 50 + 50 forward rows, and at most 80 gradient rows and 2 forward rows, for each of 24 samples.

    Differs from the paper: the read-out is the closed-form discriminant of the inner points instead of a trained layer.
    """
    rows = scene.correct(SAMPLE)
    if not isinstance(scene.threat, Linf | L2) or len(rows) < FEWEST or scene.current.radius == 0:
        return
    problem, started = scene.problem(rows, height, "planted inputs"), time.perf_counter()
    features = _features(scene, problem)
    if features is None:
        reason = "The binarization test was skipped: the model shows no linear layer whose input could be read."
        yield Flag(id="binarization", severity="info", message=reason)
        return
    goal, fitted = _planes(problem, features)
    scene.spent(problem.tally, "planted inputs: fit", f"{INNER} points inside, 1 at the edge", started)
    chosen = fitted.nonzero().squeeze(1)
    if len(chosen) < FEWEST:
        return
    trial = _Trial(scene, features, problem, goal)
    lucky = trial.run(noise(DRAWS, threat=scene.threat, objective=height), chosen, "chance").reached
    hard = chosen[~lucky.to(chosen.device)]
    if len(hard) < FEWEST or len(hard) < TOO_EASY * len(chosen):
        return
    found = int(trial.run(apgd(STEPS, 2, threat=scene.threat, objective=height), hard, "search").reached.sum())
    if clopper_pearson(found, len(hard))[1] < PASSED:
        message = (
            f"Of {len(hard)} inputs that exist by construction within the radius gradients through the model's features find {found}: "
            "attacks that find none on the model itself prove little."
        )
        fix = "Find the layer before the features that hides gradients and replace its backward pass (BPDA)."
        yield Flag(id="binarization", severity="block", message=message, fix=fix)


@dataclass(frozen=True)
class _Trial:
    """A search on the read-outs, booked as a check."""

    scene: Scene
    features: Victim
    problem: Problem
    goal: Crossed

    def run(self, attack: AttackLike, chosen: Tensor, what: str) -> Outcome:
        started, x = time.perf_counter(), self.problem.x[chosen]
        outcome = attack(self.features, x, self.goal.take(chosen), self.scene.current.radius, self.scene.seed)
        row = attack_row(f"check: planted inputs: {what}", repr(attack), len(chosen), 0, outcome, time.perf_counter() - started)
        self.scene.current.attacks.append(row)
        return outcome


def _features(scene: Scene, problem: Problem) -> Victim | None:
    """The features of the model itself, looked at as the searches look at its scores: relaxed and averaged where these are.

    Features of a relaxed model would not do: what was given a gradient there runs beside the tensors that a layer is called with. None
    where there are none, or now so many and now others, as of a model that draws which of its parts answers.
    """
    own, sight = scene.sheet.subject.victim, scene.sheet.sight
    if not isinstance(own.model, nn.Module):
        return None
    features, draws = own.twin(Features(own.model)), scene.victim.draws if sight.random else 1
    with features:
        widths = {features.outputs(problem.x, problem.tally).shape[1] for _ in range(draws)}
    if len(widths) > 1 or 0 in widths:
        return None
    features = features.relaxed(distrust=sight.distrusts) if sight.hidden else features
    return features.averaged(draws) if sight.random else features


def _planes(problem: Problem, features: Victim) -> tuple[Crossed, Tensor]:
    """A plane for each sample between 48 points inside and one at the edge, and (B,) bool: it separates them.

    weight = (S + r I)^-1 (f_edge - mean), S the covariance of the inner points' features; r is a hundredth of its mean variance.
    """
    key, threat = problem.key, problem.threat
    inside = [threat.start(problem.x, 0.9 * problem.radius, key.fold("inner", i), problem.ids) for i in range(INNER)]
    drawn = threat.start(problem.x, problem.radius, key.fold("edge"), problem.ids)
    reach = threat.reach(problem.x)
    far = problem.x + (drawn - problem.x) * per_sample(4 * reach / problem.radius.clamp(min=1e-12), problem.x)
    edge = threat.project(problem.x, far, problem.radius)
    f_in = torch.stack([features.outputs(z, problem.tally).double() for z in inside], 1)
    f_edge = features.outputs(edge, problem.tally).double()
    mean = f_in.mean(1)
    spread = f_in - mean[:, None]
    covariance = spread.transpose(1, 2) @ spread / INNER
    ridge = covariance.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12) / 100
    eye = torch.eye(covariance.shape[1], dtype=torch.float64, device=covariance.device)
    weight = torch.linalg.solve(covariance + ridge[:, None, None] * eye, f_edge - mean)
    weight = weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-30)
    inner, outer = (f_in * weight[:, None]).sum(2).amax(1), (f_edge * weight).sum(1)
    offset = inner + CLOSE * (outer - inner)
    fitted = (outer > inner) & torch.isfinite(outer) & torch.isfinite(inner)
    return Crossed(weight.to(problem.x.dtype), offset.to(problem.x.dtype)), fitted
