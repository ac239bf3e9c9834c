"""JAX functions and Keras 3 models as modules, with gradients: tensors cross by DLPack, gradients by jax.vjp."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from epsball.errors import BadInput


def need(name: str, extra: str) -> Any:
    """An optional package.

    Raises:
        BadInput: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise BadInput(f"model: {extra} models need {name}: pip install 'epsball[{extra}]'") from exc


class JaxModel(nn.Module):
    """A JAX function as a module: (B, ...) -> (B, C), differentiable in its input.

    It is compiled once for each power of two: shorter batches are filled up with their last row. It computes in float32 unless
    `jax_enable_x64` is set.

    Args:
        function: x -> scores, or (weights, x) -> scores where weights are given; traceable, one row of scores a row of input.
        weights: any tree of arrays; as an argument they are not compiled into the program.
        channels_last: the function takes (B, H, W, C), while (B, C, H, W) comes in.

    Raises:
        BadInput: jax is not installed, or the function returns something else than one array.

    Cost: one run of the function; one of its transpose backward.
    """

    def __init__(self, function: Callable[..., Any], weights: Any = None, *, channels_last: bool = False) -> None:
        super().__init__()
        jax = need("jax", "jax")

        def scores(given: Any, x: Any) -> Any:
            answer = function(x) if given is None else function(given, x)
            if not isinstance(answer, jax.Array):
                raise BadInput(f"outputs: the JAX function returned {type(answer).__name__}; return one array of scores (B, C)")
            return answer

        self.weights, self.channels_last = weights, channels_last
        self.ask = jax.jit(scores)
        self.both = jax.jit(lambda given, x: jax.vjp(lambda inputs: scores(given, inputs), x))
        self.pull = jax.jit(lambda back, gradient: back(gradient)[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> JaxModel:
        """Itself: arrays of JAX never change."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, C)."""
        inputs = x.movedim(1, -1) if self.channels_last and x.ndim > 2 else x
        if torch.is_grad_enabled() and inputs.requires_grad:
            scores: Tensor = _Call.apply(inputs, self)  # type: ignore[no-untyped-call]
            return scores
        return _to_torch(self.ask(self.weights, _to_jax(inputs)), inputs)


class _Call(torch.autograd.Function):
    """One run of the function that remembers its pullback."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, model: JaxModel) -> Tensor:
        answer, ctx.back = model.both(model.weights, _to_jax(x))
        ctx.model, ctx.like = model, torch.empty_like(x, device="meta")
        return _to_torch(answer, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        filled = _to_jax(gradient, last=False)
        return _to_torch(ctx.model.pull(ctx.back, filled), gradient).to(ctx.like.dtype), None


def _to_jax(x: Tensor, last: bool = True) -> Any:
    """A copy in JAX, filled up to a power of two rows: with the last row, or with zeros."""
    jax = importlib.import_module("jax")
    short = (1 << (len(x) - 1).bit_length()) - len(x) if len(x) else 0
    fill = x[-1:] if last else torch.zeros_like(x[-1:])
    whole = torch.cat([x.detach(), fill.detach().expand(short, *x.shape[1:])]).contiguous()
    device = jax.devices()[0]
    return jax.device_put(jax.dlpack.from_dlpack(whole if device.platform == "gpu" else whole.cpu()), device)


def _to_torch(answer: Any, like: Tensor) -> Tensor:
    """The rows that were asked for, on the device of `like`, once they are computed."""
    return from_dlpack(answer.block_until_ready())[: len(like)].to(like.device, copy=True)


def from_keras(model: Any) -> nn.Module:
    """A Keras 3 model as a module that takes (B, C, H, W), for inference.

    Args:
        model: built, of the backend jax or torch; images go in channels last where Keras is set so.

    Raises:
        BadInput: keras is not installed, or another backend.
    """
    keras = need("keras", "keras")
    backend = keras.config.backend()
    last = keras.config.image_data_format() == "channels_last"
    if backend == "torch":
        return _KerasTorch(model, last)
    if backend != "jax":
        raise BadInput(f"model: Keras runs on {backend}; set KERAS_BACKEND to jax or torch and load the model again")
    weights = tuple([v.value for v in part] for part in (model.trainable_variables, model.non_trainable_variables))
    return JaxModel(lambda given, x: model.stateless_call(*given, x, training=False)[0], weights, channels_last=last)


class _KerasTorch(nn.Module):
    """A Keras model on torch, its axes and its mode."""

    def __init__(self, model: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.model, self.channels_last = model, channels_last

    def forward(self, x: Tensor) -> Any:
        """What the model returns for inference."""
        return self.model(x.movedim(1, -1) if self.channels_last and x.ndim > 2 else x, training=False)
