"""Training by several processes: who takes which rows, and what the workers tell one another. One process is a team of one.

Everything is a sum over `torch.distributed`'s default group: gloo on CPUs, nccl on GPUs. Models that share their weights out by
themselves (DDP, FSDP2) are left to do so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from epsball.errors import BadInput


@dataclass(frozen=True)
class Team:
    """Which of how many workers this process is.

    Attributes:
        rank: from 0, which leads: it alone writes. size: how many.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def here() -> Team:
        """The process group that this process is in; a team of one where there is none."""
        if distributed.is_available() and distributed.is_initialized():
            return Team(distributed.get_rank(), distributed.get_world_size())
        return ALONE

    @property
    def leads(self) -> bool:
        """Whether this worker writes and speaks."""
        return self.rank == 0

    def part(self, rows: Tensor) -> Tensor:
        """This worker's rows of a whole batch (B, ...), B a multiple of the size."""
        each = len(rows) // self.size
        return rows[self.rank * each : (self.rank + 1) * each]

    def check(self, batch: int, parts: int) -> None:
        """Raises BadInput where a batch in so many parts does not go up evenly."""
        if batch % (self.size * parts) and self.size > 1:
            raise BadInput(
                f"batch: {batch}: {self.size} workers and {parts} parts do not divide it: give a multiple of {self.size * parts}"
            )

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of every worker's tensor of this shape."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        distributed.all_reduce(total)
        return total / self.size

    def told(self, tensor: Tensor) -> Tensor:
        """What the leader has in the place of this tensor."""
        if self.size > 1:
            distributed.broadcast(tensor, 0)
        return tensor

    def joined(self, tensor: Tensor) -> Tensor:
        """The rows of all workers, in their order."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            distributed.barrier()

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Every worker's gradients become their mean; a parameter that no worker has a gradient for keeps none."""
        if self.size == 1:
            return
        held = list(parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in held]
        known = torch.tensor([float(p.grad is not None) for p in held], device=held[0].device)
        together = self.mean(torch.cat([*(g.flatten() for g in grads), known]))
        pieces = torch.split(together, [g.numel() for g in grads] + [len(held)])
        for parameter, mean, any_has in zip(held, pieces, pieces[-1].tolist(), strict=False):
            parameter.grad = mean.view_as(parameter).to(parameter.dtype) if any_has else None

    def average_statistics(self, model: nn.Module) -> None:
        """Floating-point buffers (batch norm) become the mean of all workers'."""
        held = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if self.size == 1 or not held:
            return
        pieces = torch.split(self.mean(torch.cat([buffer.flatten() for buffer in held])), [buffer.numel() for buffer in held])
        for buffer, mean in zip(held, pieces, strict=True):
            buffer.copy_(mean.view_as(buffer))


ALONE = Team()


def averages_itself(model: nn.Module) -> bool:
    """Whether a model averages its gradients over the workers itself: DDP, or weights that are shared out (FSDP2)."""
    return isinstance(model, nn.parallel.DistributedDataParallel) or shared_out(model)


def shared_out(model: nn.Module) -> bool:
    """Whether each worker holds only a part of some weights (`fully_shard`)."""
    return _grouped() and any(_is_part(p) for p in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, copied; where it is shared out every worker has to ask at once."""
    if _grouped() and _is_part(tensor):
        return tensor.full_tensor().detach().clone()  # type: ignore[attr-defined,no-any-return]
    return tensor.detach().clone()


def like(value: Tensor, own: Tensor) -> Tensor:
    """A whole tensor, shared out as `own` is."""
    if not (_grouped() and _is_part(own)):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)  # type: ignore[attr-defined]


def load(model: nn.Module, state: dict[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors."""
    own = model.state_dict()
    model.load_state_dict({name: like(value, own[name]) if name in own else value for name, value in state.items()})


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _is_part(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
