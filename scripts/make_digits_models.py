"""Trains the two packaged digit classifiers anew (about a minute on one core): python scripts/make_digits_models.py"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional

from epsball.attacks import pgd
from epsball.core import Victim
from epsball.data import load_data
from epsball.models.digits import NAMES, network

EPOCHS, BATCH, RADIUS, SEED = 60, 64, 0.2, 0


def train(adversarial: bool) -> torch.nn.Module:
    """Adam with a falling rate; the adversarial one sees only the worst inputs that a 10-step PGD finds within Linf 0.2."""
    torch.manual_seed(SEED)
    model, data = network(), load_data("digits", split="train")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=EPOCHS * (len(data.x) // BATCH))
    attack = pgd(steps=10)
    for epoch in range(EPOCHS):
        radius = RADIUS * min(1.0, (epoch + 1) / 15)
        for rows in torch.randperm(len(data.x))[: len(data.x) // BATCH * BATCH].split(BATCH):
            x, y = data.x[rows], data.y[rows]
            if adversarial:
                # Only noise depends on the seed here, so a new one each step keeps starts fresh.
                x = attack(Victim(model), x, y, radius, seed=epoch * 10_000 + int(rows[0]), drop=False).x_adv
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    """Writes both files beside the module that loads them."""
    torch.set_num_threads(1)
    folder = Path(__file__).parents[1] / "src" / "epsball" / "models"
    test = load_data("digits")
    for name in NAMES:
        model = train(adversarial=name.endswith("robust"))
        save_file(model.state_dict(), folder / f"{name}.safetensors")
        attacked = pgd(steps=40)(model, test.x, test.y, 0.1)
        clean = (model(test.x).argmax(1) == test.y).float().mean()
        print(f"{name}: clean {clean:.1%}, PGD-40 at Linf 0.1 {(~attacked.reached).float().mean():.1%}")


if __name__ == "__main__":
    main()
