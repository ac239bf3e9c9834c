"""The records of a training as TensorBoard scalars; the package is an extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from epsball.defenses.training.watch import Record
from epsball.errors import BadInput


class Board:
    """Writes each epoch's record to an event file: what `fit` takes as `progress`.

    Raises:
        BadInput: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise BadInput("tensorboard: is not installed: pip install 'epsball[tensorboard]'") from error
        self.writer: Any = SummaryWriter(str(folder))

    def __call__(self, step: int, steps: int, record: Record | None) -> None:
        """After a step."""
        if record is None:
            return
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record.step)
        self.writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self.writer.close()


def scalars(record: Record) -> dict[str, float]:
    """Name -> value: the loss and its means under train/, the held-out shares under held/, and the course."""
    held = {"held/clean": record.clean, "held/robust": record.robust}
    if record.certified is not None:
        held["held/certified"] = record.certified
    means = {f"train/{name}": value for name, value in record.means.items()}
    return {"train/loss": record.loss, **means, **held, "course/rate": record.rate, "course/radius": record.radius}
