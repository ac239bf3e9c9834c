"""The adapter around every model: normalization, output shape and class order are declared once, here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from epsball.core import Access
from epsball.errors import BadInput
from epsball.models.outputs import one_column, probabilities_to_logits, to_logits, unpack

Outputs = Literal["logits", "probabilities", "multilabel"]
OUTPUTS = ("logits", "probabilities", "multilabel")


class _Function(nn.Module):
    """A plain callable as a module."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def _statistic(field: str, value: float | Sequence[float] | None, default: float) -> Tensor:
    """A mean or std as a float32 vector: one value for all channels, or one for each."""
    if value is None:
        return torch.tensor([default])
    try:
        found = torch.as_tensor(value, dtype=torch.float32).detach().clone().reshape(-1)
    except (TypeError, ValueError, RuntimeError) as exc:
        raise BadInput(f"{field}: {value!r} is not a number or a list of numbers; give one for each channel") from exc
    if not len(found) or not bool(found.isfinite().all()):
        raise BadInput(f"{field}: {value!r} is empty or not finite; give one number for each channel")
    return found


def _order(class_order: Sequence[int] | None) -> Tensor | None:
    if class_order is None:
        return None
    listed = list(class_order)
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in listed)
    if not whole or not listed or sorted(listed) != list(range(len(listed))):
        raise BadInput(f"class_order: {listed[:12]!r} is not a permutation of 0..{max(len(listed) - 1, 0)}; name each model column once")
    return torch.tensor(listed, dtype=torch.int64)


def _first_dtype(tensors: Iterator[Tensor]) -> torch.dtype | None:
    return next((t.dtype for t in tensors if t.is_floating_point()), None)


class Adapted(nn.Module):
    """A classifier as attacks see it: x in the box, (B, C, H, W) or (B, F) -> logits (B, C). Set once, never changed.

    ``forward`` computes ``to_logits(module((x - mean) / std))[:, class_order]``, differentiably and row by row. The input is
    cast to the type of the module's parameters.

    Args:
        module: an `nn.Module` or any callable on a batch.
        mean, std: per channel (per feature for flat input), or one number for all; None leaves the input as it is.
        outputs: what the module returns. "logits"; "probabilities", turned into their logarithm; "multilabel", one sigmoid
            logit a class, passed on unchanged.
        class_order: column i of the result is the module's column ``class_order[i]``, that is, dataset label i. A permutation.
        fixed_batch: the only batch size that the module accepts (exported programs); None for any.
        access: the most that the module can give: no gradients from a foreign runtime, no scores from a bare prediction.

    Raises:
        BadInput: a zero or negative std, lengths that do not fit each other or the input, an output that is not one row of
            scores a sample.

    Cost: one forward of the module.

    >>> model = Adapted(nn.Flatten(), mean=0.5, std=0.5)
    >>> model(torch.tensor([[[[0.0, 1.0]]]])).tolist()
    [[-1.0, 1.0]]
    """

    mean: Tensor
    std: Tensor
    order: Tensor | None

    def __init__(
        self,
        module: nn.Module | Callable[[Tensor], Any],
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        outputs: Outputs = "logits",
        class_order: Sequence[int] | None = None,
        fixed_batch: int | None = None,
        access: Access = Access.GRADIENT,
    ) -> None:
        super().__init__()
        if outputs not in OUTPUTS:
            raise BadInput(f"outputs: {outputs!r} is unknown; choose one of {', '.join(OUTPUTS)}")
        if not callable(module):
            raise BadInput(f"model: {type(module).__name__} cannot be called; give an nn.Module or a function of a batch")
        self.module = module if isinstance(module, nn.Module) else _Function(module)
        self.outputs: Outputs = outputs
        self.fixed_batch = fixed_batch
        self.access = access
        self.normalizes = mean is not None or std is not None
        m, s = _statistic("mean", mean, 0.0), _statistic("std", std, 1.0)
        if not bool((s > 0).all()):
            raise BadInput(f"std: {std!r} has a value that is not above 0; give the standard deviations that the model was trained with")
        if len(m) != len(s) and 1 not in (len(m), len(s)):
            raise BadInput(f"mean, std: {len(m)} and {len(s)} values; give one of each for each channel")
        # float32, so that a float64 input is normalized by the very numbers that float32 inputs are
        self.register_buffer("mean", m, persistent=False)
        self.register_buffer("std", s, persistent=False)
        self.register_buffer("order", _order(class_order), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) for x of shape (B, C, H, W) or (B, F) in the box."""
        dtype = _first_dtype(chain(self.module.parameters(), self.module.buffers())) or x.dtype
        normalized = self._normalize(x) if self.normalizes else x
        if normalized.is_floating_point():  # whole numbers, such as tokens, stay as they are
            normalized = normalized.to(dtype)
        logits = self._read(self.module(normalized))
        if len(logits) != len(x):
            raise BadInput(f"outputs: {len(logits)} rows for a batch of {len(x)}; the model must return one row a sample")
        if self.order is None:
            return logits
        if logits.shape[1] != len(self.order):
            raise BadInput(f"class_order: {len(self.order)} entries, but the model has {logits.shape[1]} classes; name each column once")
        return logits.index_select(1, self.order)

    def _normalize(self, x: Tensor) -> Tensor:
        for field, value in (("mean", self.mean), ("std", self.std)):
            if x.ndim < 2 or len(value) not in (1, x.shape[1]):
                raise BadInput(f"{field}: {len(value)} values for input of shape {tuple(x.shape)}; give one, or one for each channel")
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x - self.mean.to(x.dtype).view(shape)) / self.std.to(x.dtype).view(shape)

    def _read(self, output: Any) -> Tensor:
        if self.outputs == "logits":
            return to_logits(output)
        scores = one_column(unpack(output))
        if self.outputs == "multilabel":
            return scores
        if scores.shape[1] == 1:  # the probability of the second of two classes
            scores = torch.cat([1 - scores, scores], dim=1)
        return probabilities_to_logits(scores)
