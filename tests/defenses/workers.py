"""What each worker of a team runs in `test_team.py`: trainings on blobs, described by the JSON in its first argument."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from epsball.core import Key
from epsball.defenses.training import Against, Course, Free, Loss, Team, atta, fit, pgd, sgd, trades
from epsball.defenses.training.batch import generator
from epsball.defenses.training.fit import Prepare
from epsball.defenses.training.team import whole
from epsball.threats import Linf

COURSE = Course(epochs=2, batch=16, rate=0.05, average=0.9, optimizer=sgd, clip=1.0)
LOSSES: dict[str, Loss] = {"pgd": pgd(steps=2), "trades": trades(steps=2), "free": Free(), "atta": atta()}


def blobs(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 3, generator=generator(Key.of(seed)))
    return x, (x[:, 0] > 0.5).long()


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def prepared(how: str) -> Prepare | None:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel
    if how == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        return lambda model: fully_shard(model, mesh=mesh)
    return None


def train(
    loss: str, folder: str | None, prepare: str = "", kill: int = 0, parts: int = 1, wrap: str = "", average: float = 0.9
) -> tuple[dict[str, Tensor], list[dict[str, object]]]:
    """The weights and the history; the last worker dies hard after step `kill`."""
    team = Team.here()

    def progress(step: int, steps: int, record: object) -> None:
        if step == kill and team.rank == team.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    course, wrapping = replace(COURSE, accumulate=parts, replays=2 if loss == "free" else 1, average=average), prepared(wrap)
    model = net() if wrapping is None else wrapping(net())
    done = fit(
        model,
        LOSSES[loss],
        blobs(64, 0),
        blobs(40, 1),
        Against(Linf(), 0.05),
        course,
        folder=Path(folder) if folder else None,
        progress=progress,
        save_every=0.0,
        prepare=prepared(prepare),
    )
    weights = {name.removeprefix("module."): whole(tensor) for name, tensor in model.state_dict().items()}
    return weights, [{**record.to_dict(), "seconds": 0.0} for record in done.history]


def main() -> None:
    from safetensors.torch import save_file

    asked = json.loads(sys.argv[1])
    distributed.init_process_group("gloo")
    for name, job in asked["jobs"].items():
        weights, history = train(**job)
        stem = Path(asked["out"]) / f"{name}-{distributed.get_rank()}"
        save_file(weights, stem.with_suffix(".safetensors"))
        stem.with_suffix(".json").write_text(json.dumps(history))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
