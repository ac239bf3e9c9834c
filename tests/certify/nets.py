"""Small random networks of every part that certified bounds know."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions around which the input is added, normalization inside, a mean over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.second, self.last = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.Linear(2, 3)
        self.register_buffer("mean", torch.tensor([0.4, 0.5]).view(1, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / 0.25
        h = torch.relu(self.norm(self.first(x)))
        h = torch.relu(x + self.second(h) * 0.5)
        return self.last(h.mean((2, 3)))


class Reshaped(nn.Module):
    """Shapes taken from the input, functions in place of layers, 1 - x."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.line = nn.Conv2d(2, 3, 2, stride=2), nn.Linear(27, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nn.functional.leaky_relu(self.conv(1 - x), 0.1)
        return self.line(torch.nn.functional.dropout(h.view(x.size(0), -1), training=self.training))


def networks() -> dict[str, nn.Module]:
    """Name -> network of (B, 2, 6, 6) -> (B, 3), in eval mode, with norm statistics that are not 0 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made: dict[str, nn.Module] = {
            "mlp": nn.Sequential(nn.Flatten(), nn.Linear(72, 12), nn.ReLU(), nn.Linear(12, 8), nn.LeakyReLU(0.2), nn.Linear(8, 3)),
            "curves": nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Tanh(), nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 3)),
            "norm": nn.Sequential(
                nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(27, 3)
            ),
            "pools": nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
                nn.MaxPool2d(3, stride=2, padding=1),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(16, 3),
            ),
            "series": nn.Sequential(
                nn.Flatten(2),
                nn.Conv1d(2, 3, 5, stride=2, padding=2),
                nn.MaxPool1d(2),
                nn.ReLU(),
                nn.AvgPool1d(3, stride=1),
                nn.Flatten(),
                nn.Linear(21, 3),
            ),
            "residual": Residual(),
            "reshaped": Reshaped(),
        }
        for module in (m for net in made.values() for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            module.running_mean.normal_(0.0, 0.3)  # type: ignore[union-attr]
            module.running_var.uniform_(0.3, 2.0)  # type: ignore[union-attr]
            module.weight.data.normal_(1.0, 0.5)
    return {name: net.eval() for name, net in made.items()}


def samples(net: nn.Module, n: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs (n, 2, 6, 6) in [0, 1], some features at its ends, and the classes that the network gives them."""
    x = (torch.rand(n, 2, 6, 6, generator=torch.Generator().manual_seed(3)) * 1.4 - 0.2).clamp(0, 1)
    with torch.no_grad():
        return x, net(x).argmax(1)
