"""The only road to the model: counts every row per sample, splits batches, and leaves the model as it was found."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from epsball.core.average import Averaged
from epsball.core.relaxed import Relaxed
from epsball.core.rows import Rows, concatenate, take
from epsball.core.steady import steady
from epsball.core.substitute import Substituted
from epsball.errors import AccessDenied, BadInput

Bound = float | Tensor


def _identity(x: Tensor) -> Tensor:
    return x


class Access(IntEnum):
    """What the adversary may see of the model."""

    LABELS = 0
    SCORES = 1
    GRADIENT = 2


@dataclass(frozen=True)
class Tally:
    """A ledger (N,) of rows forward and backward per sample, seen through `rows` (B,): the samples of this batch.

    `blind` counts the forwards through a lens of which no gradient was wanted: with `backwards` the clock of random transforms.
    """

    forwards: Tensor
    backwards: Tensor
    blind: Tensor
    rows: Tensor

    @staticmethod
    def zeros(n: int) -> Tally:
        """An empty ledger for n samples."""
        forwards, backwards, blind = torch.zeros(3, n, dtype=torch.int64).unbind(0)
        return Tally(forwards, backwards, blind, torch.arange(n))

    def take(self, rows: Rows) -> Tally:
        """The same ledger, seen by some of the samples."""
        return Tally(self.forwards, self.backwards, self.blind, self.rows[rows.cpu() if isinstance(rows, Tensor) else rows])

    @cached_property
    def _ones(self) -> Tensor:
        return torch.ones_like(self.rows)

    def count_forward(self, rows: int = 1) -> None:
        """So many more rows forward for every sample of the batch."""
        self.forwards.index_add_(0, self.rows, self._ones, alpha=rows)

    def count_backward(self, rows: int = 1) -> None:
        """So many more rows backward for every sample of the batch."""
        self.backwards.index_add_(0, self.rows, self._ones, alpha=rows)

    def count_blind(self) -> None:
        """One more look through a lens without a gradient, for every sample of the batch."""
        self.blind.index_add_(0, self.rows, self._ones)


Lens = Callable[[Tensor, Tally], Tensor]
"""(inputs (B, ...), their ledger rows) -> what the model is shown instead, differentiable; row by row."""


class Victim:
    """A model under attack.

    Args:
        model: maps (B, ...) inputs inside `box` to (B, C) scores; one score per class, any scale. `epsball.wrap` brings
            other shapes to this form.
        box: legal range (low, high) of the input; numbers, or tensors that broadcast against one sample.
        access: what attacks may see; asking for more raises `AccessDenied`.
        batch_size: most rows per call; None means no limit. Running out of memory halves it and goes on.
        fixed_batch: batch size that an exported program insists on; short batches are padded.
        name: how reports call it.

    `draws` is how many rows of the model one answer takes; `averaged` sets it. `probes`: how many more one with a gradient takes.
    `source` may say how the model can be loaded again, in plain values; who loads models sets it.

    Use it as a context: inside, every submodule is in eval mode, parameters are frozen and the global random generators
    are forked; all of it is put back on the way out, exceptions included.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        *,
        box: tuple[Bound, Bound] = (0.0, 1.0),
        access: Access = Access.GRADIENT,
        batch_size: int | None = None,
        fixed_batch: int | None = None,
        name: str = "model",
    ) -> None:
        self.model = model
        self.box = box
        self.access = access
        self.batch_size = fixed_batch or batch_size
        self.fixed_batch = fixed_batch
        self.name = name
        self.lens: Lens | None = None
        self.draws = 1
        self.probes = 0
        self.source: Mapping[str, Any] | None = None
        self._restore: list[Callable[[], None]] = []
        self._depth = 0
        tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        floats = [t for t in tensors if t.is_floating_point()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype = floats[0].dtype if floats else torch.float32

    @staticmethod
    def of(model: Victim | Callable[[Tensor], Tensor]) -> Victim:
        """A victim as it is; anything else that can be called becomes one with the default box [0, 1]."""
        return model if isinstance(model, Victim) else Victim(model)

    def through(self, lens: Lens) -> Victim:
        """This victim behind one more lens; the lens added last acts first. Made inside a context, it shares that context."""
        seen, behind = copy.copy(self), self.lens
        seen.lens = lens if behind is None else lambda x, tally: behind(lens(x, tally), tally)
        return seen

    def replace(self, layer: str | nn.Module, backward: Callable[[Tensor], Tensor] = _identity) -> Victim:
        """This victim with one layer that runs forward as it is and backward as `backward` (BPDA).

        Athalye, Carlini & Wagner 2018, arXiv 1802.00420, section 4: a substitute g(x) ~ f(x) on the backward pass only, so
        that every answer is still the model's own. The model itself is not changed.

        Args:
            layer: dotted name of a submodule, or the submodule; it takes one tensor. backward: (B, ...) -> the shape of the
                layer's output, differentiable; the identity unless given.

        Raises:
            BadInput: no such layer, no module, or shapes that differ.
        """
        return self.twin(Substituted.of(self.model, layer, backward, self.name))

    def relaxed(self, distrust: bool = False) -> Victim:
        """This victim with a substitute derivative wherever an operation of the model has none (BPDA without a layer's name).

        Athalye, Carlini & Wagner 2018, arXiv 1802.00420, section 4. `Relaxed` says what is replaced; `victim.model.met` names it
        after a look with a gradient. `distrust`: custom autograd functions get other derivatives, although they bring their own.
        """
        if isinstance(self.model, Relaxed):
            return self.twin(Relaxed(self.model.model, True) if distrust else self.model)
        return self.twin(Relaxed(self.model, distrust))

    def twin(self, model: Callable[[Tensor], Tensor]) -> Victim:
        """Another model in this one's place: the same box, access, batch size and name, a context of its own."""
        twin = copy.copy(self)
        twin._depth, twin._restore, twin.model = 0, [], model
        return twin

    def averaged(self, draws: int) -> Victim:
        """This victim answering with the mean of `draws` answers, for models that draw random numbers (EOT).

        Athalye, Engstrom, Ilyas & Kwok 2018, arXiv 1707.07397, eq. 3, with the mean taken of the scores: every search that reads
        scores or gradients then sees their expectation. Each answer costs `draws` rows, and is counted so.

        Raises:
            BadInput: draws below 1.
        """
        if draws < 1:
            raise BadInput(f"draws: {draws}: must be 1 or more")
        twin = self.twin(Averaged(self.model, draws))
        twin.draws = self.draws * draws
        twin.batch_size = self.batch_size and max(1, self.batch_size // draws)  # the graphs of all draws are held at once
        return twin

    def __enter__(self) -> Victim:
        self._depth += 1
        if self._depth == 1:
            self._restore = [
                _leave_inference_mode(),
                _leave_autocast(self.device),
                _fork_generators(),
                *([_still(self.model), steady(self.model)] if isinstance(self.model, nn.Module) else []),
            ]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth == 0:
            for restore in self._restore:
                restore()
            self._restore = []

    def outputs(self, x: Tensor, tally: Tally) -> Tensor:
        """(B, C) answers without gradient, counted. A label-only victim gives one-hot rows: no score leaks."""
        with self, torch.no_grad():
            output: Tensor = self.split(self._forward, x, tally)
        if self.access is Access.LABELS:
            finite = torch.isfinite(output).all(1, keepdim=True)  # an answer that is no number must not become class 0
            output = torch.nn.functional.one_hot(output.argmax(1), output.shape[1]).to(output.dtype).masked_fill(~finite, torch.nan)
        return output

    def differentiable(self, x: Tensor, tally: Tally) -> Tensor:
        """(B, C) answers that autograd can follow back to `x`, counted; call it inside `split`."""
        if self.access is not Access.GRADIENT:
            raise AccessDenied(f"model '{self.name}' gives {self.access.name.lower()} only: use an attack that needs no gradient")
        if self.probes:
            tally.count_forward(self.probes)
        with torch.enable_grad():
            return self._forward(x, tally)

    def split(self, function: Callable[..., Any], *trees: Any) -> Any:
        """Runs `function` on slices of at most `batch_size` rows and joins the results; the only place that splits."""
        n, start = len(trees[0]), 0
        parts: list[Any] = []
        while start < n or not parts:
            rows = slice(start, min(n, start + (self.batch_size or max(n, 1))))
            try:
                parts.append(function(*(trees if rows == slice(0, n) else (take(tree, rows) for tree in trees))))
                start = max(rows.stop, 1)
                continue
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or rows.stop - rows.start <= 1 or self.fixed_batch:
                    raise
            # Outside the except block: the exception holds the frames that hold the memory.
            self.batch_size = (rows.stop - rows.start) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return concatenate(parts)

    def _forward(self, x: Tensor, tally: Tally) -> Tensor:
        asked = x.to(self.dtype, copy=True)  # models that work in place must not change the caller's inputs
        asked = asked if self.lens is None else self.lens(asked, tally)
        if self.fixed_batch and len(x) < self.fixed_batch:
            asked = torch.cat([asked, asked[-1:].expand(self.fixed_batch - len(x), *asked.shape[1:])])
        output = self.model(asked)
        tally.count_forward(self.draws)
        if self.lens is not None and not torch.is_grad_enabled():
            tally.count_blind()
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(asked):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise BadInput(f"model '{self.name}' returned {shape} for {len(asked)} inputs: scores (B, C) are needed; epsball.wrap converts")
        output = output[: len(x)]
        return output if output.dtype is torch.float64 else output.float()


def _still(model: nn.Module) -> Callable[[], None]:
    """Eval mode and frozen parameters, module by module; returns what undoes it."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters() if parameter.is_leaf]  # a traced copy's are none
    for module, _ in modes:
        module.training = False  # the flag itself: exported programs refuse .eval(), and eval() may be overridden
    for parameter, _ in grads:
        parameter.requires_grad_(False)

    def restore() -> None:
        for module, mode in modes:
            module.training = mode
        for parameter, wanted in grads:
            parameter.requires_grad_(wanted)

    return restore


def _fork_generators() -> Callable[[], None]:
    """Gives models that draw random numbers a generator of their own with a known state; returns what undoes it."""
    python, array, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    devices: Sequence[Tensor] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.default_generator.manual_seed(0)  # torch.manual_seed would format three stack traces first, a millisecond each time
    if devices:
        torch.cuda.manual_seed_all(0)

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(array)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)

    return restore


def _leave_inference_mode() -> Callable[[], None]:
    """Gradients need ordinary tensors, also where the caller is in inference mode; returns what undoes it."""
    mode = torch.inference_mode(False)
    mode.__enter__()
    return lambda: mode.__exit__(None, None, None)


def _leave_autocast(device: torch.device) -> Callable[[], None]:
    """Verdicts are made in the model's own precision, whatever the caller has switched on; returns what undoes it."""
    mode = torch.autocast(device.type, enabled=False)
    mode.__enter__()  # type: ignore[no-untyped-call]
    return lambda: mode.__exit__(None, None, None)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text
