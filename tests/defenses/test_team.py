"""Several workers: each draws its part of what one process draws, and together they take its steps; a killed one costs little."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from epsball.core import Key
from epsball.defenses.training import Batch, Team
from epsball.defenses.training.batch import generator
from epsball.defenses.training.team import averages_itself, shared_out, whole
from epsball.errors import BadInput
from epsball.threats import Linf

SCRIPT = Path(__file__).with_name("workers.py")


def batch(team: Team, n: int) -> Batch:
    return Batch(Linf(), torch.zeros(n, dtype=torch.float64), generator(Key.of(7)), team=team)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_all_workers_draw_is_what_one_process_draws(size: int) -> None:
    x = torch.zeros(12, 2, 2)
    alone, teams = batch(Team(), 12), [batch(Team(rank, size), 12 // size) for rank in range(size)]
    own = [each.team.part(x) for each in teams]
    for draw in (Batch.uniform, Batch.normal):
        whole_draw = draw(alone, x)
        parts = [draw(each, rows) for each, rows in zip(teams, own, strict=True)]
        assert torch.equal(torch.cat(parts), whole_draw)
    for each, rows in zip(teams, own, strict=True):
        order = each.shuffled(rows)
        assert sorted(order.tolist()) == list(range(12 // size))
    assert sorted(alone.shuffled(x).tolist()) == list(range(12))
    assert torch.equal(alone.uniform(x)[:4], teams[0].uniform(own[0])[:4])  # the draws between them were as many everywhere


def test_a_batch_that_does_not_go_up_is_refused() -> None:
    Team(0, 2).check(64, 4)
    Team().check(65, 4)
    with pytest.raises(BadInput, match="batch: 66: 2 workers and 4 parts do not divide it: give a multiple of 8"):
        Team(0, 2).check(66, 4)


def test_alone_nothing_is_sent() -> None:
    tensor, model = torch.arange(3.0), nn.Linear(2, 2)
    assert Team.here() == Team() == Team(0, 1)
    assert all(torch.equal(tensor, found) for found in (Team().mean(tensor), Team().told(tensor), Team().joined(tensor), whole(tensor)))
    assert not averages_itself(model)
    assert not shared_out(model)


def workers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("workers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def launch(out: Path, jobs: dict[str, dict[str, Any]]) -> int:
    """Two gloo workers on this machine; their exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), str(SCRIPT)]
    done = subprocess.run([*command, json.dumps({"out": str(out), "jobs": jobs})], capture_output=True, timeout=300, check=False)
    return done.returncode


def close(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


JOBS: dict[str, dict[str, Any]] = {
    "pgd": {"loss": "pgd"},
    "trades-parts": {"loss": "trades", "parts": 2},
    "free": {"loss": "free"},
    "atta-parts": {"loss": "atta", "parts": 2},
    "ddp": {"loss": "pgd", "prepare": "ddp"},
    "fsdp": {"loss": "trades", "prepare": "fsdp"},
    "wrapped-ddp": {"loss": "pgd", "wrap": "ddp"},
    "wrapped-fsdp": {"loss": "pgd", "wrap": "fsdp", "average": 0.0},
}


@pytest.mark.slow
def test_two_workers_take_the_steps_of_one(tmp_path: Path) -> None:
    here = workers()
    assert (
        launch(tmp_path, {name: {**job, "folder": str(tmp_path / name)} for name, job in JOBS.items() if not (tmp_path / name).mkdir()})
        == 0
    )
    for name, job in JOBS.items():
        alone, history = here.train(**{**job, "folder": None, "prepare": "", "wrap": ""})
        for rank in (0, 1):
            assert close(load_file(tmp_path / f"{name}-{rank}.safetensors"), alone), name
            found = json.loads((tmp_path / f"{name}-{rank}.json").read_text())
            assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in history], rel=1e-5), name
            assert [r["robust"] for r in found] == [r["robust"] for r in history], name
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["checkpoint.safetensors", "log.jsonl"], name
        if "wrap" not in job:  # finished: only read, by one process
            again, _ = here.train(**{**job, "folder": str(tmp_path / name), "prepare": ""})
            assert close(again, alone), name


@pytest.mark.slow
@pytest.mark.parametrize("prepare", ["", "fsdp"])
def test_a_killed_worker_leaves_a_checkpoint_that_goes_on(prepare: str, tmp_path: Path) -> None:
    here, job = workers(), {"loss": "free", "prepare": prepare}
    alone, _ = here.train("free", None)
    kept = tmp_path / "run"
    kept.mkdir()
    assert launch(tmp_path, {"killed": {**job, "folder": str(kept), "kill": 5}}) != 0
    assert not list(tmp_path.glob("killed-*"))
    stopped = (kept / "checkpoint.safetensors").read_bytes()
    one, _ = here.train("free", str(kept))  # by one process
    assert close(one, alone)
    (kept / "checkpoint.safetensors").write_bytes(stopped)
    assert launch(tmp_path, {"resumed": {**job, "folder": str(kept)}}) == 0
    assert close(load_file(tmp_path / "resumed-0.safetensors"), alone)
