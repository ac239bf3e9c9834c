"""Attributional robustness: explanations that stay where they are, as a training goal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.defenses.training.batch import Batch, Logs, Model, accuracy
from epsball.defenses.training.inner import Adversarial, Climb, Objective, Search, input_gradient, still
from epsball.errors import BadInput


def integrated_gradients(
    score: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, points: int, *, create_graph: bool = False
) -> Tensor:
    """(B, ...): (x - baseline) * mean of the gradient at `points` midpoints of the straight way from the baseline to x.

    Sundararajan et al. 2017, arXiv 1703.01365. They sum up to score(x) - score(baseline), the better the more points.

    Args:
        score: (B, ...) -> (B,), each sample for itself. x, baseline: (B, ...). points: 1 or more.
        create_graph: differentiable by whatever `score`, x and the baseline depend on.

    Cost: `points` forwards and backwards.
    """
    total = torch.zeros_like(x)
    with torch.enable_grad():
        for place in range(points):
            point = baseline + (place + 0.5) / points * (x - baseline)
            point = point if create_graph and point.requires_grad else point.detach().requires_grad_()
            total = total + input_gradient(score(point), point, create_graph=create_graph)
    return (x - baseline) * total / points


# The triplet: the image lies nearer to the explanation of its class than to that of the rival.


def explanations(output: Tensor, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by z (B, F) of the label's score and of the largest other score; differentiable."""
    own = output.gather(1, y[:, None]).squeeze(1)
    rival = output.scatter(1, y[:, None], -torch.inf).amax(1)
    first, second = (input_gradient(score, z, create_graph=True) for score in (own, rival))
    return first.flatten(1), second.flatten(1)


def apart(z: Tensor, gradient: Tensor) -> Tensor:
    """1 - cos."""
    return 1 - F.cosine_similarity(z, gradient, dim=-1, eps=1e-15)


def triplet(near: Tensor, far: Tensor) -> Tensor:
    """log(1 + exp(near - far)): soft margin."""
    return F.softplus(near - far)


@dataclass(frozen=True)
class Explanation:
    """The triplet loss of z over the `top` share of features that the label's gradient at x is largest in. Cost: 1 forward, backward."""

    top: float = 1 / 3

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Objective:
        """What the search climbs; it takes two more backwards a step."""
        with still(model), torch.enable_grad():
            leaf = x.detach().requires_grad_()
            gradient = input_gradient(model(leaf).gather(1, y[:, None]).squeeze(1), leaf).flatten(1)
        count = max(1, round(self.top * gradient.shape[1]))
        rows = gradient.abs().topk(count, dim=1).indices

        def climb(z: Tensor, output: Tensor) -> Tensor:
            near, far = (apart(z.flatten(1).gather(1, rows), g.gather(1, rows)) for g in explanations(output, z, y))
            return triplet(near, far)

        return climb


@dataclass(frozen=True)
class Attributional:
    """J(x_adv) + weight * mean triplet loss of x and x_adv, the hardest of the two explanations taken for each."""

    weight: float = 0.5

    def __call__(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """Both gradients are differentiated by the weights."""
        with torch.enable_grad():
            leaves = [z.detach().requires_grad_() for z in (x, x_adv)]
            outputs = [model(leaf) for leaf in leaves]
            own, rival = zip(*(explanations(output, leaf, y) for output, leaf in zip(outputs, leaves, strict=True)), strict=True)
        images = torch.stack([x.flatten(1), x_adv.flatten(1)])[:, None]
        near, far = (apart(images, torch.stack(gradients)[None]) for gradients in (own, rival))
        strayed = triplet(near.amax(1), far.amin(1)).mean()
        loss = batch.cross_entropy(outputs[1], y) + self.weight * strayed
        return loss, {"adversarial": accuracy(outputs[1], y), "strayed": strayed.detach()}


def art(weight: float = 0.5, steps: int = 3, share: float = 0.625, top: float = 1 / 3) -> Adversarial:
    """Attributional robustness training. Singh et al. 2020, arXiv 1911.13073, Algorithm 1.

    Args:
        weight: lambda. steps, share: of the search for an input whose explanation strays, 3 steps of 5/255 at 8/255 in the released code.
        top: share of features that the search looks at; 1000 of 3072 there.

    The released code swaps ReLU for softplus (beta 50) in the gradients, so that they bend; here the model is taken as it is, and
    the search of a ReLU network feels the image's own part only. There the image is normalized before it is compared, too.
    Cost: steps + 3 forwards; 3 backwards a step, 1 before, 4 by the inputs and 1 through all of it, double backward included.
    """
    return Adversarial(Search(steps, share, climb=Explanation(top)), Attributional(weight))


# IG-NORM: the loss has the same attributions all over the ball.


@dataclass(frozen=True)
class Moved:
    """||IG of the loss from x to z||_1, by `points` points. Cost of a step: `points` forwards and backwards, twice differentiated."""

    points: int = 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Objective:
        """What the search climbs."""
        return lambda z, output: integrated_gradients(_loss(model, y), z, x, self.points, create_graph=True).flatten(1).abs().sum(1)


def _loss(model: Model, y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: F.cross_entropy(model(z), y, reduction="none")


@dataclass(frozen=True)
class IgNorm:
    """J(x) + weight * mean over samples of the largest ||IG of J from x to x_adv||_1 that the search finds.

    Chen et al. 2019, arXiv 1905.09957, section 4 (IG-NORM). The attributions are taken in eval mode.

    Raises:
        BadInput: fewer than one point.

    Cost: steps * (coarse + 1) + points + 1 forwards and backwards, most of them differentiated twice.
    """

    search: Search
    weight: float = 1.0
    points: int = 5

    def __post_init__(self) -> None:
        if self.points < 1:
            raise BadInput(f"points: {self.points}: must be 1 or more")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
        """Search, then both terms."""
        x_adv = self.search(model, x, y, batch)
        with still(model):
            moved = integrated_gradients(_loss(model, y), x_adv, x, self.points, create_graph=True).flatten(1).abs().sum(1).mean()
        return batch.cross_entropy(model(x), y) + self.weight * moved, {"attributions": moved.detach()}


def ig_norm(weight: float = 1.0, steps: int = 7, share: float = 0.25, points: int = 5, coarse: int = 1) -> IgNorm:
    """Robust attribution regularization. Chen et al. 2019, arXiv 1905.09957.

    Args:
        weight: lambda; 1 on MNIST. steps, share: of the search. points: of the path; coarse: of the path inside the search.

    The released code on MNIST searches 40 steps of a thirtieth of the radius with 10 points and trains with 50: ten times the
    cost for the same kind of network. A fifth of the points in the search is theirs.
    """
    climb: Climb = Moved(coarse)
    return IgNorm(Search(steps, share, climb=climb), weight, points)
