"""Models that answer with the mean of several answers. Made by `Victim.averaged`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Averaged(nn.Module):
    """The mean of `draws` answers of a random model, one after the other: a model may draw once for a whole batch."""

    def __init__(self, model: Callable[[Tensor], Tensor], draws: int) -> None:
        super().__init__()
        self.model = model
        self.draws = draws
        self.training = bool(getattr(model, "training", False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) mean scores. What a draw does in place to its input stays its own."""
        mean = self.model(x.clone())
        for number in range(2, self.draws + 1):
            mean = mean + (self.model(x.clone()) - mean) / number
        return mean
