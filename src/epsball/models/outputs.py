"""What a model returned, brought to logits of shape (B, C)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from epsball.errors import BadInput


def unpack(output: Any) -> Tensor:
    """The one floating-point tensor of a model's output.

    Args:
        output: a tensor; an object with ``.logits`` (Hugging Face); a mapping with "logits" or a single tensor; a tuple or list
            (its first tensor).

    Raises:
        BadInput: none of these, or no floating-point tensor in it.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
        tensors = [v for v in output.values() if isinstance(v, Tensor)]
        if found is None and len(tensors) != 1:
            keys = ", ".join(repr(str(k)) for k in list(output)[:6])
            raise BadInput(f"outputs: a dict with keys {keys} and {len(tensors)} tensors; return the class scores under 'logits'")
        found = tensors[0] if found is None else found
    elif found is None and isinstance(output, (tuple, list)):
        found = next((v for v in output if isinstance(v, Tensor)), None)
    if not isinstance(found, Tensor):
        raise BadInput(f"outputs: the model returned {type(output).__name__} without a tensor of logits; return a (batch, classes) tensor")
    if not found.is_floating_point():
        raise BadInput(f"outputs: {found.dtype} of shape {tuple(found.shape)} are not scores; return logits, not decisions")
    return found


def to_logits(output: Any) -> Tensor:
    """Logits (B, C) of a classifier's output of any common shape.

    (B,) or (B, 1) is the single logit z of a binary classifier: it becomes the two logits (0, z), which leaves both the decision
    (z > 0) and the probabilities as they were.

    Raises:
        BadInput: any other shape, such as the (B, C, H, W) of a segmentation model.

    >>> to_logits((torch.tensor([[-2.0], [3.0]]), "hidden states")).tolist()
    [[0.0, -2.0], [0.0, 3.0]]
    """
    z = one_column(unpack(output))
    return torch.cat([torch.zeros_like(z), z], dim=1) if z.shape[1] == 1 else z


def one_column(z: Tensor) -> Tensor:
    """(B,) as (B, 1), (B, C) as it is; `BadInput` for any other shape."""
    if z.ndim == 1:
        return z[:, None]
    if z.ndim != 2 or z.shape[1] == 0:
        raise BadInput(
            f"outputs: shape {tuple(z.shape)} is not (batch, classes); wrap the model so that it returns one row of logits a sample"
        )
    return z


def probabilities_to_logits(p: Tensor) -> Tensor:
    """log p, finite at 0, with a finite gradient everywhere: softmax of the result gives p back.

    Args:
        p: probabilities in [0, 1]; values below the smallest normal float count as that float. NaN stays NaN.

    >>> probabilities_to_logits(torch.tensor([1.0, 0.0])).isfinite().all().item()
    True
    """
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()
