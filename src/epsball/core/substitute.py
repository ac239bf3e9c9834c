"""A model some of whose layers run backward as something else (BPDA). Made by `Victim.replace`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from epsball.errors import BadInput

Backward = Callable[[Tensor], Tensor]


class Swap(torch.autograd.Function):
    """The value of the first argument with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, substitute: Tensor) -> Tensor:
        """The layer's own answer, bit by bit."""
        return real.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[None, Tensor]:
        """All of the slope goes to the substitute."""
        return None, slopes[0]


class Substituted(nn.Module):
    """`model`, with hooks on the chosen layers for the time of a call only."""

    def __init__(self, model: nn.Module, layers: tuple[tuple[nn.Module, Backward], ...]) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.substitutes = nn.ModuleList(backward for _, backward in layers if isinstance(backward, nn.Module))
        self.training = model.training

    @staticmethod
    def of(model: Any, layer: str | nn.Module, backward: Backward, name: str) -> Substituted:
        """One more substitute for `model`; `layer` by dotted name or itself."""
        before = model.layers if isinstance(model, Substituted) else ()
        base = model.model if isinstance(model, Substituted) else model
        if not isinstance(base, nn.Module):
            raise BadInput(f"model '{name}': {type(base).__name__} has no layers: wrap it as a torch.nn.Module to replace one")
        known = dict(base.named_modules())
        found = known.get(layer) if isinstance(layer, str) else next((module for module in known.values() if module is layer), None)
        if found is None:
            words = layer if isinstance(layer, str) else type(layer).__name__
            raise BadInput(f"model '{name}': has no layer '{words}': use one of {', '.join(list(known)[1:9]) or 'none'}")
        return Substituted(base, (*before, (found, backward)))

    def forward(self, x: Tensor) -> Any:
        """The model's own answer; autograd sees the substitutes."""
        handles = [layer.register_forward_hook(_hook(backward)) for layer, backward in self.layers] if torch.is_grad_enabled() else []
        try:
            return self.model(x)
        finally:
            for handle in handles:
                handle.remove()


def _hook(backward: Backward) -> Callable[[nn.Module, Any, Any], Tensor]:
    def swap(module: nn.Module, inputs: Any, output: Any) -> Tensor:
        kind = type(module).__name__
        if len(inputs) != 1 or not isinstance(output, Tensor):
            raise BadInput(f"layer {kind}: maps {len(inputs)} inputs to {type(output).__name__}: only tensor to tensor can be replaced")
        substitute = backward(inputs[0])
        if substitute.shape != output.shape:
            raise BadInput(f"layer {kind}: gives {tuple(output.shape)}, its substitute {tuple(substitute.shape)}: make them equal")
        swapped: Tensor = Swap.apply(output.detach(), substitute.to(output.dtype))  # type: ignore[no-untyped-call]
        return swapped

    return swap
