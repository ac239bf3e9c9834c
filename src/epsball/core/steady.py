"""The same bits for a sample in a batch of 1 as in a batch of 1,000, as far as a model's layers let us.

Matrix and convolution kernels for very small batches add in another order, and a sign that flips in the last bit sends a whole
search another way. So linear layers never see fewer than 16 rows and convolutions never fewer than 4: the rest are zeros
that are cut off again right behind the layer. The model itself, and every count of its rows, sees only the true batch.

Convolutions are filled to one of a few sizes whatever the batch: their kernels are made anew for every size, which for a small
network takes longer than a look at it, and a search that drops samples comes through nearly all sizes. Those of few channels get a
faster gradient (`by_input.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from epsball.core.by_input import convolved, folds

_LEAST = {nn.Linear: (2, 16), nn.Conv1d: (3, 4), nn.Conv2d: (4, 4), nn.Conv3d: (5, 4)}
"""Layer -> (axes of a batched input, fewest rows whose kernels agree with those of large batches on CPUs)."""


def steady(model: nn.Module) -> Callable[[], None]:
    """Stands before the linear and convolution layers of a model; returns what takes it away again.

    In the place of their `forward`: hooks, two of them a layer, take as long as a small layer itself.
    """
    stands = []
    for module in model.modules():
        if type(module) in _LEAST and all(p.device.type == "cpu" for p in module.parameters(recurse=False)):
            own = vars(module).get("forward")  # somebody else's, or, where a twin shares the layer, ours already
            if not (isinstance(own, partial) and own.func is _answered):
                module.forward = partial(_answered, module.forward, *_LEAST[type(module)])
                stands.append((module, own, module.forward))
    # A layer that somebody has given another way to convolve keeps it.
    quick = [m for m in model.modules() if type(m) is nn.Conv2d and folds(m) and "_conv_forward" not in vars(m)]
    for layer in quick:
        layer._conv_forward = partial(convolved, layer)  # type: ignore[method-assign]

    def restore() -> None:
        for module, own, ours in stands:
            if vars(module).get("forward") is ours:
                del module.forward
                if own is not None:
                    module.forward = own
        for layer in quick:
            del layer._conv_forward

    return restore


def _filled(n: int, axes: int, least: int) -> int:
    """Rows that a layer sees of n: sizes a sixteenth to an eighth apart for convolutions, but no fewer than `least` apart."""
    if n <= least or axes == 2:
        return max(n, least)
    step = max(least, 1 << max(n.bit_length() - 4, 0))
    return -(-n // step) * step


def _answered(own: Callable[..., Any], axes: int, least: int, *inputs: Any, **named: Any) -> Any:
    """What a layer answers, given zeros beside its input where the batch is of a size it should not see."""
    x = inputs[0] if len(inputs) == 1 and not named else None
    if not isinstance(x, Tensor) or x.ndim != axes or not (n := len(x)):
        return own(*inputs, **named)
    missing = _filled(n, axes, least) - n
    if not missing:
        return own(x)
    layout = x.detach()[:missing]  # zeros like these keep it
    blank = torch.zeros_like(layout) if missing <= n else x.new_zeros(missing, *x.shape[1:])
    return own(torch.cat([x, blank]))[:n]
