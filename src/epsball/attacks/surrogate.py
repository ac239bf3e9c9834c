"""Surrogates: a network trained on a victim's answers, attacked in its place; the victim is asked about the result alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsball.attacks.pgd import mi_fgsm
from epsball.core import Access, Attack, AttackLike, Model, Problem, Reading, Tally, Victim, valid
from epsball.errors import BadInput
from epsball.objectives import margin


@dataclass(frozen=True)
class Surrogate:
    """A fitted network as a victim of its own, with the bill.

    Attributes:
        victim: gives gradients; its queries cost nothing. fit_queries: rows that the real victim answered for the fit, once for all samples
            that are attacked later. agreement: share of these rows on which both name the same class at the end.
    """

    victim: Victim = field(repr=False)
    fit_queries: int
    agreement: float


class Centered(nn.Module):
    """The box as [-1, 1]; a box without an end as it is."""

    middle: Tensor
    scale: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        low, high = low.float(), high.float()
        half = (high - low) / 2
        fine = torch.isfinite(half) & (half > 0)
        self.register_buffer("middle", torch.where(fine, low + half, 0.0))
        self.register_buffer("scale", torch.where(fine, half, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """One affine map."""
        return (x - self.middle) / self.scale


def small_network(shape: tuple[int, ...], classes: int, draw: torch.Generator) -> nn.Module:
    """Two strided convolutions for images (C, H, W), else two hidden layers; weights even in +-1 / sqrt(inputs), biases 0."""
    with torch.device("meta"):  # so that no layer draws from a global generator
        if len(shape) == 3:
            first = nn.Conv2d(shape[0], 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()
            inputs, width = nn.Sequential(*first, nn.AdaptiveMaxPool2d(7), nn.Flatten(), nn.Linear(64 * 49, 128)), 128
        else:
            features = int(torch.Size(shape).numel())
            inputs, width = nn.Sequential(nn.Flatten(), nn.Linear(features, 200), nn.ReLU(), nn.Linear(200, 200)), 200
        net = nn.Sequential(inputs, nn.ReLU(), nn.Linear(width, classes)).to_empty(device="cpu")
    with torch.no_grad():
        for weights in net.parameters():  # larger ones fit as well, and their examples carry over less
            drawn = (2 * torch.rand(weights.shape, generator=draw) - 1) / weights[0].numel() ** 0.5
            weights.copy_(drawn if weights.ndim > 1 else torch.zeros_like(drawn))
    return net


def fit_surrogate(
    model: Model,
    x: Tensor,
    rounds: int = 6,
    net: nn.Module | None = None,
    *,
    step: float = 0.1,
    most: int = 1000,
    epochs: int = 10,
    rate: float = 1e-3,
    seed: int = 0,
) -> Surrogate:
    """Jacobian-based dataset augmentation, Papernot et al. 2017, arXiv 1602.02697, Algorithm 1; distillation where scores are given.

    S <- S + {x + step sgn(dF_y(x) / dx) : x in S}, y the victim's answer; the sign of the step turns every third round. The network is
    trained on all answers so far after each round: on classes where the victim gives labels only, on its softmax where it
    gives scores (Hinton et al. 2015, arXiv 1503.02531, temperature 1).

    Args:
        model: the victim, or anything callable as in `Attack`. x: (N, ...) inputs to begin with, not those to be attacked.
        rounds: of augmentation, 0 or more. net: maps inputs to (B, C) scores; trained in place and returned in eval mode; a
        small one unless given. step: of one feature, in widths of the box (in units of the input where the box has no end).
        most: new inputs per round; where S is larger, a random part of it. epochs: over S after each round. rate: of Adam. seed: of
        the first weights and of all draws.

    Returns:
        The network as a victim in the same box, and how many rows it cost.

    Raises:
        BadInput: negative rounds, counts below 1, a step or rate that is not positive, answers of which none is finite.

    Cost: N forwards, and min(most, size of S) per round: N 2^rounds up to `most`. No backward of the victim.

    Differs from the paper: S keeps all points, and a random part of it is augmented, instead of reservoir sampling.
    """
    if rounds < 0:
        raise BadInput(f"rounds: {rounds}: must be 0 or more")
    if min(most, epochs) < 1 or min(step, rate) <= 0:
        raise BadInput(f"surrogate: most {most}, epochs {epochs}, step {step:g}, rate {rate:g}: must be 1 or more, and above 0")
    with torch.inference_mode(False):
        return _fit(Victim.of(model), x.detach().clone(), rounds, net, step, most, epochs, rate, seed)


def _fit(
    victim: Victim, x: Tensor, rounds: int, net: nn.Module | None, step: float, most: int, epochs: int, rate: float, seed: int
) -> Surrogate:
    draw = torch.Generator().manual_seed(seed)
    low, high = (torch.as_tensor(bound, dtype=x.dtype, device=victim.device) for bound in victim.box)
    width = torch.where(torch.isfinite(high - low), high - low, 1.0)
    pool = x.to(victim.device)
    answers = _answers(victim, pool)
    fine = valid(answers)
    if not bool(fine.any()):
        raise BadInput("surrogate: the victim gave no finite answer to any of the inputs: check them, or the model")
    if net is None:
        net = nn.Sequential(Centered(low, high), small_network(tuple(x.shape[1:]), answers.shape[1], draw))
    net = net.to(victim.device)
    _train(net, pool[fine], answers[fine], victim.access, epochs, rate, draw)
    for number in range(rounds):
        chosen = torch.randperm(len(pool), generator=draw)[:most].to(pool.device)
        way = step * width * (-1) ** (number // 3)
        new = (pool[chosen] + way * _slope(net, pool[chosen], answers[chosen].argmax(1)).sign()).clamp(low, high)
        pool, answers = torch.cat([pool, new]), torch.cat([answers, _answers(victim, new)])
        fine = valid(answers)
        _train(net, pool[fine], answers[fine], victim.access, epochs, rate, draw)
    with torch.no_grad():
        same = net(pool[fine]).argmax(1) == answers[fine].argmax(1)
    return Surrogate(Victim(net, box=victim.box, name=f"surrogate of {victim.name}"), len(pool), float(same.double().mean()))


def _answers(victim: Victim, x: Tensor) -> Tensor:
    """(N, C): one forward row each."""
    return victim.outputs(x, Tally.zeros(len(x))).float()


def _slope(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """(N, ...) gradients of the label's score."""
    slopes = []
    with torch.enable_grad():
        for part, own in zip(torch.split(x, 256), torch.split(labels, 256), strict=True):
            leaf = part.clone().requires_grad_()
            slopes.append(torch.autograd.grad(net(leaf).gather(1, own[:, None]).sum(), leaf)[0])
    return torch.cat(slopes)


def _train(net: nn.Module, x: Tensor, answers: Tensor, access: Access, epochs: int, rate: float, draw: torch.Generator) -> None:
    """Adam on the cross-entropy with the victim's answers, in batches of 64."""
    goal = answers.argmax(1) if access is Access.LABELS else answers.softmax(1)
    optimizer = torch.optim.Adam(net.parameters(), rate)
    net.train()
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(x), generator=draw).to(x.device), 64):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), goal[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    optimizer.zero_grad()
    net.eval()


def transferred(surrogate: Surrogate | Model, attack: AttackLike | None = None) -> Attack:
    """An attack on a surrogate, of which the victim judges the result: any recipe, with all its steps, whether or not the surrogate falls.

    Args:
        surrogate: see `fit_surrogate`; or any model with gradients in the victim's box, as `ensemble` makes of several. attack: any
        attack on models with gradients; `mi_fgsm` unless given. Those for unseen models are in `transfer.py`: `di_fgsm`, `ti_fgsm` ...

    Returns:
        The attack; its name is `transferred`, its threat that of `attack`. `queries` of an outcome are what each sample cost
        itself: 1 for the clean answer, 1 to judge. `surrogate.fit_queries` come once on top, whatever the number of samples.

    Cost: 1 forward of the victim, no backward.
    """
    inner, stand_in = attack or mi_fgsm(), surrogate.victim if isinstance(surrogate, Surrogate) else Victim.of(surrogate)
    return Attack("transferred", inner.threat, margin, Transferred(stand_in, inner), 0, access=Access.LABELS)


@dataclass(frozen=True)
class _Made:
    z: Tensor


@dataclass(frozen=True)
class Transferred:
    """See `transferred`: the search is over before the first look."""

    surrogate: Victim = field(repr=False)
    attack: AttackLike

    def init(self, problem: Problem, steps: int) -> _Made:
        """What the attack makes on the surrogate; as its clean answers pass those of the victim, which no goal has reached yet."""
        made = self.attack(self.surrogate, problem.x, problem.goal, problem.radius, problem.key, clean=problem.clean.clone(), drop=False)
        return _Made(made.z)

    def step(self, problem: Problem, state: _Made) -> tuple[Reading, _Made]:
        """One look."""
        return problem.judge(state.z), state
