"""Small networks by the shape of the data, for trainings that name no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from epsball.errors import BadInput


def small(shape: Sequence[int], classes: int, seed: int = 0) -> nn.Module:
    """Two 4x4 convolutions of stride 2 and two linear layers for images (C, H, W); two hidden layers of 100 for features (F,).

    Images of fewer than 16 pixels a side have 3x3 convolutions, only the second of them strided. (1, 28, 28) and 10 classes:
    166,406 parameters. The weights come from the seed; the global generator is left as it was.

    Raises:
        BadInput: another shape, or fewer than 2 classes.
    """
    if classes < 2:
        raise BadInput(f"classes: {classes}: give data with 2 or more")
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        if len(shape) == 1:
            return nn.Sequential(nn.Linear(shape[0], 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, classes))
        return _convolutional(shape, classes)


def _convolutional(shape: Sequence[int], classes: int) -> nn.Module:
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise BadInput(f"shape: {tuple(shape)}: the small network takes (C, H, W) of 4 pixels or more, or (F,): name a model of your own")
    channels, height, width = shape
    if min(height, width) < 16:
        layers = [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
        pixels = -(-height // 2) * -(-width // 2)
    else:
        layers = [nn.Conv2d(channels, 16, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU()]
        pixels = (height // 2 // 2) * (width // 2 // 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * pixels, 100), nn.ReLU(), nn.Linear(100, classes))
