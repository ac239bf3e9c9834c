"""Robust training by Ray Train: python examples/train_ray.py --workers 2 --out /mnt/shared/trades (needs ray[train])."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ray.train.torch
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from epsball.data import load_data
from epsball.defenses.training import Against, Course, fit, small, trades
from epsball.threats import Linf


def train(asked: dict[str, Any]) -> None:
    """What each worker runs: Ray Train has made the process group, `fit` shares the rows of each batch out."""
    data, out = load_data("digits", split="train"), Path(asked["out"])
    out.mkdir(parents=True, exist_ok=True)
    held = torch.arange(len(data.x)) % 10 == 0
    parts = [(data.x[rows], data.y[rows]) for rows in (~held, held)]
    model = small((1, 8, 8), 10).to(ray.train.torch.get_device())
    fit(model, trades(), parts[0], parts[1], Against(Linf(), 0.1), Course(epochs=10, batch=64), folder=out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", required=True)
    parser.add_argument("--gpu", action="store_true")
    words = parser.parse_args()
    TorchTrainer(
        train, train_loop_config={"out": words.out}, scaling_config=ScalingConfig(num_workers=words.workers, use_gpu=words.gpu)
    ).fit()
