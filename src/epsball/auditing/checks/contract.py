"""What a model does while it answers, and what it can be asked: checks that need no threat."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from epsball.auditing.preflight import Bench
from epsball.auditing.results import Finding
from epsball.core import LabelsChanged

WATCHED = 4


def answers_in_one_pass(bench: Bench) -> Iterator[Finding]:
    """The model takes no gradients while it answers: purification and other searches at test time do.

    A backward pass has to read the tensors that its forward pass has kept. Both are watched from outside during one answer
    without gradients, so loops in compiled code are seen as well; `torch.func` refuses to be watched, which tells the same.
    Searches that take no gradients are not seen.

    Cost: 4 forward rows.
    """
    if bench.thrifty:
        return
    kept, read = 0, 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 1
        return tensor

    def take(tensor: Tensor) -> Tensor:
        nonlocal read
        read += 1
        return tensor

    part = bench.x[:WATCHED]
    refused = False
    try:
        with saved_tensors_hooks(keep, take):
            bench.ask(part)
    except RuntimeError as error:
        refused = "saved tensor hooks" in str(error)
        if not refused:
            raise
    if read or refused:
        message = (
            "The model takes gradients while it answers (an optimization at test time): attacks through it are slow and see "
            "only its last step, so robustness is easily overstated. Attack the loop itself, or its result with BPDA."
        )
        yield Finding(id="optimizes", status="warn", message=message)


def classes_suffice(bench: Bench) -> Iterator[Finding]:
    """Two classes leave nothing to aim at and no third score to divide by. Cost: none."""
    if isinstance(bench.goal, LabelsChanged) or bench.thrifty or bench.output.shape[1] >= 3:
        return
    message = f"The model scores {bench.output.shape[1]} classes: aimed attacks and DLR need 3, so APGD on the margin runs in their place."
    yield Finding(id="classes", status="note", message=message)
