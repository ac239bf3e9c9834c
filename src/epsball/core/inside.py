"""Ways into a model: the scores of a layer before whatever follows them, and the input of a layer as if nothing had come before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from epsball.core.random import Key, content_ids
from epsball.core.substitute import Swap

ALIKE = 0.5
"""Least correlation of an input with what a layer sees of it, in the middle of the samples, for that to be the input, changed."""
_APART, _PROBE = 3, 0.05
"""Pixels between those that are changed at once, and by how much."""
_HELD = 2**25
"""Numbers that random directions may take at once."""
_NUDGE = 1e-6
"""Share of the box by which a gradient is taken further in: enough to leave a kink, too little to move any score."""


class _AtLayer(nn.Module):
    """A model and the dotted name of one of its submodules."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        self.model = model
        self.layer = layer
        self.training = model.training


class Inside(_AtLayer):
    """`model` answering with the scores of its submodule `layer`; its best class is the model's own.

    Where the best class of the layer is another, the two classes change scores. Every decision is therefore the model's, and
    autograd sees only the way to the layer. Where one look asks the layer several times, the last answer counts.

    Args:
        model: maps (B, ...) to (B, C) scores. layer: dotted name of a submodule that answers with (B, C) scores.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C)."""
        seen: list[Tensor] = []
        handle = self.model.get_submodule(self.layer).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            own = self.model(x)
        finally:
            handle.remove()
        return _decided(own, seen[-1])


class Part(_AtLayer):
    """`model` answering with the scores that its submodule `layer` gives for the model's input as it is; its best class is the model's own.

    As `Inside`, for a network around which something works out what to show it: what misleads where that ends may not mislead here.

    Args:
        model: maps (B, ...) to (B, C) scores. layer: dotted name of a submodule that maps the same inputs to (B, C) scores.

    Cost: `probes` more rows forward.
    """

    probes = 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, C)."""
        with torch.no_grad():
            own = self.model(x)
        return _decided(own, self.model.get_submodule(self.layer)(x))


def _decided(own: Tensor, inner: Tensor) -> Tensor:
    """The scores `inner` (B, C) with those of two classes exchanged wherever the best class of `own` is another."""
    rows = torch.arange(len(own), device=own.device)
    places = torch.arange(own.shape[1], device=own.device).repeat(len(own), 1)
    best, first = own.argmax(1), inner.argmax(1)
    places[rows, best], places[rows, first] = first, best
    return inner.gather(1, places)


def score_layers(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Submodules that answer one look at x (B, ...) with finite scores (B, C), C as of the model; in the order of their answers.

    Those are left out that answer with the same numbers as the model, or as one after them.
    """
    found: dict[str, Any] = {}

    def attach(name: str, module: nn.Module) -> RemovableHandle:
        return module.register_forward_hook(lambda _module, _inputs, output: found.__setitem__(name, output))

    own = _looked(model, x, attach)
    kept: dict[str, Tensor] = {}
    for name, output in reversed(found.items()):  # a module answers after its parts
        fits = isinstance(output, Tensor) and output.shape == own.shape and output.is_floating_point() and bool(output.isfinite().all())
        if fits and not any(torch.equal(output, other) for other in (own, *kept.values())):
            kept[name] = output
    return dict(reversed(kept.items()))


def parts(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Submodules that one look at x (B, ...) asks for scores (..., C) of samples of its shape, with those that they give x itself.

    Also those that are asked sample by sample, or by a function that `torch.func` turned into another.
    """
    found: dict[str, Any] = {}

    def attach(name: str, module: nn.Module) -> RemovableHandle:
        def look(_module: nn.Module, inputs: Any, output: Any) -> None:
            z = inputs[0] if inputs else None
            if isinstance(z, Tensor) and isinstance(output, Tensor) and z.shape[1:] == x.shape[1:]:
                found[name] = output.shape[1:]

        return module.register_forward_hook(look)

    own = _looked(model, x, attach)
    return {name: model.get_submodule(name)(x) for name, shape in found.items() if shape == own.shape[1:]}


class Straight(_AtLayer):
    """`model` whose submodule `layer` sees what it always sees, while its gradient goes to the model's input as it is.

    The oldest form of BPDA (Athalye, Carlini & Wagner 2018, arXiv 1802.00420, section 4.1): what cleans an input changes little of it,
    so its derivative is taken to be the identity. Every value is the model's own.

    Args:
        model: maps (B, ...) to scores. layer: dotted name of a submodule whose first input has the shape of the model's.
    """

    probes = 0

    def forward(self, x: Tensor) -> Any:
        """The model's own answer."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.model(x)
        handle = self._before(lambda _module, inputs: (self.led(inputs[0], x), *inputs[1:]))
        try:
            return self.model(x)
        finally:
            handle.remove()

    def led(self, real: Tensor, x: Tensor) -> Tensor:
        """The value of `real` with a gradient that goes to x."""
        return Swap.apply(real, x)  # type: ignore[no-untyped-call, no-any-return]

    def _before(self, hook: Callable[[nn.Module, Any], Any]) -> RemovableHandle:
        # Before other hooks: those that fill small batches come later.
        return self.model.get_submodule(self.layer).register_forward_pre_hook(hook, prepend=True)


def further_in(x: Tensor, box: tuple[float | Tensor, float | Tensor], share: float) -> Tensor:
    """x (B, ...) moved toward the middle of its range in every feature, by a share of the box, of which none counts as wider than 1."""
    low, high = (torch.as_tensor(bound, device=x.device) for bound in box)
    toward = torch.where(x.detach() - low <= high - x.detach(), 1.0, -1.0)
    return x + (share * (high - low).clamp(max=1) * toward).to(x.dtype)


class Nudged(nn.Module):
    """`model` whose gradient is taken a millionth of the box, at most of 1, further in than the input, toward the middle of its range.

    A kink exactly there, as of |x| at 0, where many inputs lie, has no slope of its own. Every value is the model's own.

    Args:
        model: maps (B, ...) to scores. box: legal range of its input.

    Cost: `probes` more rows forward for a look with a gradient.
    """

    probes = 1

    def __init__(self, model: nn.Module, box: tuple[float | Tensor, float | Tensor]) -> None:
        super().__init__()
        self.model = model
        self.box = box
        self.training = model.training

    def forward(self, x: Tensor) -> Any:
        """The model's own answer."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.model(x)
        with torch.no_grad():
            own = self.model(x)
        return Swap.apply(own, self.model(further_in(x, self.box, _NUDGE)))  # type: ignore[no-untyped-call]


class _Sensed(Straight, ABC):
    """`Straight` with the derivative of what comes before the layer in the place of the identity: by differences of what the layer sees.

    Cost: `probes` more rows forward, part of the way, for a look with a gradient.
    """

    probes: int

    def led(self, real: Tensor, x: Tensor) -> Tensor:
        """The value of `real` with a gradient that goes to x."""
        return _Differences.apply(real, x, self.derivative)  # type: ignore[no-untyped-call, no-any-return]

    @abstractmethod
    def derivative(self, x: Tensor, slope: Tensor) -> Tensor:
        """(B, ...) slope for x of what the layer sees, where `slope` is that for the layer's input."""

    def seen(self, x: Tensor) -> Tensor:
        """What the layer sees of x."""
        found: list[Tensor] = []

        def stop(_module: nn.Module, inputs: Any) -> None:
            found.append(inputs[0].detach().clone())
            raise _Enough

        handle = self._before(stop)
        try:
            with torch.no_grad():
                self.model(x)
        except _Enough:
            pass
        finally:
            handle.remove()
        return found[0]


class Probed(_Sensed):
    """By differences of images (B, C, H, W) in [0, 1], of which pixels change little but their neighbors.

    Every third pixel of every third row is changed at once in all its channels, up and down by a twentieth of [0, 1], in nine turns; what
    changes in the layer's input around a pixel, one pixel far, is that pixel's doing (the coloring of Curtis, Powell & Reid 1974, for
    filters of 3 x 3), and each of its channels gets all of it. For what runs outside of autograd: filters, thresholds and codecs in
    NumPy or C. The model is asked no further than to the layer.
    """

    probes = 2 * _APART**2

    def derivative(self, x: Tensor, slope: Tensor) -> Tensor:
        """The sum over 3 x 3 neighbors of slope times change, by the width of the change."""
        total, rows, columns = torch.zeros_like(x), torch.arange(x.shape[2], device=x.device), torch.arange(x.shape[3], device=x.device)
        for turn in range(_APART**2):
            mask = ((rows % _APART == turn // _APART)[:, None] & (columns % _APART == turn % _APART)).to(x)
            up, down = (x + _PROBE * mask).clamp(max=1), (x - _PROBE * mask).clamp(min=0)
            change = slope * (self.seen(up) - self.seen(down))
            near = F.avg_pool2d(change.sum(1, keepdim=True), _APART, 1, _APART // 2, divisor_override=1)
            total += mask * near / (up - down).amax(1, keepdim=True).clamp(min=1e-6)
        return total


class Shaken(_Sensed):
    """By differences in random directions that change every feature at once (simultaneous perturbation; Spall 1992), whatever the shapes.

    For what moves, mixes or measures features outside of autograd. In the mean over directions it is the derivative; of d features the
    cosine with that is about sqrt(m / (m + d)) for m directions. Where the layer sees the shape of the input, that part of the differences
    which the identity foretells is taken from there, so that only the rest of the directions' noise is left (a control variate). Few
    features are changed one by one, which is the derivative itself.

    Args:
        model, layer: as for `Straight`; the layer's first input may have any shape (B, ...). box: legal range of the model's input.
        features: of one sample of the model's input. most: directions. width: by how much each feature changes, up and down, in boxes, of
            which none counts as wider than 1. Thresholds are only met by wide changes.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        box: tuple[float | Tensor, float | Tensor],
        features: int,
        most: int = 32,
        width: float = _PROBE,
    ) -> None:
        super().__init__(model, layer)
        self.box, self.width = box, width
        self.single = features <= most
        self.probes = 2 * min(features, most)

    def derivative(self, x: Tensor, slope: Tensor) -> Tensor:
        """(B, ...): what the directions tell, each by the width of the change."""
        rows = max(1, _HELD // (self.probes * x[0].numel()))
        return torch.cat([self._told(*some) for some in zip(torch.split(x, rows), torch.split(slope, rows), strict=True)])

    def _told(self, x: Tensor, slope: Tensor) -> Tensor:
        ids = content_ids(x)
        ways, changes = zip(*(self._along(x, ids, slope, turn) for turn in range(self.probes // 2)), strict=True)
        way, change = torch.stack(ways, 1), torch.stack(changes, 1)
        guide = slope.flatten(1) if slope.shape == x.shape and not self.single else torch.zeros_like(way[:, 0])
        foretold = (way @ guide[:, :, None]).squeeze(2)
        share = (foretold * change).sum(1, keepdim=True) / foretold.square().sum(1, keepdim=True).clamp(min=1e-20)
        rest = ((change - share * foretold)[:, None] @ way).squeeze(1) / way.square().sum(1).clamp(min=1e-12)
        return (share * guide + rest).view_as(x)

    def _along(self, x: Tensor, ids: Tensor, slope: Tensor, turn: int) -> tuple[Tensor, Tensor]:
        """A change of every feature (B, F), and that of <slope, what the layer sees> (B,)."""
        low, high = (torch.as_tensor(bound, device=x.device) for bound in self.box)
        if self.single:
            way = torch.zeros_like(x)
            way.flatten(1)[:, turn] = 1
        else:
            way = Key.of(turn).uniform(ids, x).sub_(0.5).sign_()
        width = self.width * (high - low).clamp(max=1) * way
        up, down = (x + width).clamp(low, high).to(x.dtype), (x - width).clamp(low, high).to(x.dtype)
        return (up - down).flatten(1), (slope * (self.seen(up) - self.seen(down))).flatten(1).sum(1)


class _Enough(Exception):
    """The layer has been reached."""


class _Differences(torch.autograd.Function):
    """The value of the first argument; what `derivative` makes of its slope for the second."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, x: Tensor, derivative: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The layer's own input, bit by bit."""
        ctx.save_for_backward(x)
        ctx.derivative = derivative
        return real.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[None, Tensor, None]:
        """The slope goes to x."""
        (x,) = ctx.saved_tensors
        return None, ctx.derivative(x, *slopes), None


def changed_input(model: nn.Module, x: Tensor) -> str | None:
    """The last submodule in one look at x (B, ...) that sees x changed: its shape, other numbers, alike (`ALIKE`); None: none does."""
    found: dict[str, Any] = {}

    def attach(name: str, module: nn.Module) -> RemovableHandle:
        def look(_module: nn.Module, inputs: Any) -> None:
            found.setdefault(name, inputs[0] if inputs else None)

        return module.register_forward_pre_hook(look, prepend=True)

    _looked(model, x, attach)
    last: tuple[str, Tensor] | None = None
    for name, z in found.items():
        if not isinstance(z, Tensor) or z.shape != x.shape or not z.is_floating_point() or torch.equal(z, x):
            continue
        if (last is None or not torch.equal(z, last[1])) and _correlation(z, x) > ALIKE:
            last = name, z
    return last and last[0]


def behind_break(model: nn.Module, x: Tensor) -> str | None:
    """The first submodule in one look at x (B, ...) whose input differs from sample to sample, and that autograd cannot follow back to x.

    The parameters of the model have to be frozen, as they are inside a `Victim`. None: there is no such submodule.
    """
    found: list[str] = []

    def attach(name: str, module: nn.Module) -> RemovableHandle:
        def look(_module: nn.Module, inputs: Any) -> None:
            z = inputs[0] if inputs else None
            if isinstance(z, Tensor) and z.is_floating_point() and not z.requires_grad and z.shape[:1] == x.shape[:1]:
                found.extend([name] * (len(z) == 1 or not torch.equal(z, z[:1].expand_as(z))))

        return module.register_forward_pre_hook(look, prepend=True)

    with torch.enable_grad():
        _looked(model, x.detach().clone().requires_grad_(), attach)
    return found[0] if found else None


def _looked(model: nn.Module, x: Tensor, attach: Callable[[str, nn.Module], RemovableHandle]) -> Any:
    """The answer of a model with a hook at every submodule that can have one, for this look only."""
    handles = [attach(name, m) for name, m in model.named_modules() if name and not isinstance(m, torch.jit.ScriptModule)]
    try:
        return model(x)
    finally:
        for handle in handles:
            handle.remove()


def _correlation(z: Tensor, x: Tensor) -> float:
    a, b = ((t - t.mean(1, keepdim=True)) for t in (z.flatten(1).double(), x.flatten(1).double()))
    return float(F.cosine_similarity(a, b).nan_to_num(nan=0.0).median())
