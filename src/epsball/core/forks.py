"""Decisions inside a model on which hangs what it works out next, and which no gradient crosses: which expert answers, whether it stops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from epsball.core.relaxed import Look


class Fork(nn.Module):
    """`model` answering with the scores between which it decides at one place inside; the largest is the way that it takes.

    Searches that climb the model's own scores learn nothing of the ways not taken. The scores of a comparison are 0 and by how much it
    holds. Where a look does not come to the decision, all are 0.

    Args:
        model: maps (B, ...) to anything. number: of the decision among those of one look, in order. ways: between how many it decides.
    """

    def __init__(self, model: nn.Module, number: int, ways: int) -> None:
        super().__init__()
        self.model = model
        self.number = number
        self.ways = ways
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """(B, ways)."""
        return self.looked(x)[1]

    def looked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own answer, and (B, ways)."""
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            answer, found = _decisions(self.model, leaf)
            scores = found[self.number] if self.number < len(found) else leaf.new_zeros(0)
            if scores.shape != (len(x), self.ways):
                scores = (0 * leaf.flatten(1).sum(1, keepdim=True)).expand(-1, self.ways)
        return (answer, scores) if torch.is_grad_enabled() and x.requires_grad else (answer.detach(), scores.detach())


class Both(nn.Module):
    """The model's own scores (B, C) and, behind them, those of a fork (B, ways)."""

    def __init__(self, fork: Fork) -> None:
        super().__init__()
        self.fork = fork
        self.training = fork.training

    def forward(self, x: Tensor) -> Tensor:
        """(B, C + ways)."""
        return torch.cat(self.fork.looked(x), 1)


def forks(model: nn.Module, x: Tensor) -> tuple[Fork, ...]:
    """One for each decision that one look at x (B, ...) comes to. The parameters of the model have to be frozen, as inside a `Victim`."""
    with torch.enable_grad():
        _, found = _decisions(model, x.detach().clone().requires_grad_())
    return tuple(Fork(model, number, scores.shape[1]) for number, scores in enumerate(found))


def _decisions(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The answer, and (B, K) scores of each decision, as autograd can follow them back to x."""
    look = Look(x, model, False, ())
    look.run()
    return look.answer, look.book.decisions()
