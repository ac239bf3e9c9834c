"""What a check finds without gradients is searched for before the number is told; tables are swept in any case."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import epsball as eb
from epsball.auditing.results import ModelReport


class Pit(nn.Module):
    """Brighter pixels slowly help the second class, but only if three others go dark together does it win: a true gradient, and useless."""

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(1)
        dark = torch.sigmoid(300 * (0.02 - pixels[:, :3])).prod(1)
        lead = 2 - pixels[:, :3].mean(1) - 0.1 * pixels.mean(1) - 4 * dark
        return torch.stack([lead, -lead], 1)


class Rules(nn.Module):
    """Nine features that count smoothly, and three that have to change sides, where no slope leads."""

    def forward(self, x: Tensor) -> Tensor:
        voted = torch.sigmoid(400 * (x[:, :3] - 0.8)).sum(1)
        lead = 2.5 + 0.1 * x[:, 3:].sum(1) - 2 * voted + 0.1 * x[:, :3].sum(1)
        return torch.stack([lead, -lead], 1)


def audited(tmp_path: Path, model: nn.Module, x: Tensor, threat: str, effort: str = "default") -> ModelReport:
    labels = model(x).argmax(1)
    return eb.audit(eb.wrap(model, box=(0, 1)), (x, labels), threat, seed=0, effort=effort, out=tmp_path / effort).models[0]


def drawn(*shape: int) -> Tensor:
    return 0.2 + 0.4 * torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.doubt
def test_where_noise_wins_the_search_goes_on_without_gradients(tmp_path: Path) -> None:
    x = drawn(40, 1, 8, 8)
    x.flatten(1)[:, :3] = 0.05
    x[-4:].flatten(1)[:, :3] = 0.0  # of the other class, for data of one are refused
    result = audited(tmp_path, Pit().eval(), x, "linf:0.1").results[0]
    names = [attack.name for attack in result.attacks]
    assert names.index("check: noise") < names.index("check: black box") < names.index("square")
    left = result.attacks[names.index("square")]
    assert left.tried == left.broken > 4
    assert {flag.id for flag in result.flags} & {"masked", "noise-wins", "black-box-wins"} == {"masked"}
    assert result.value == 0


@pytest.mark.doubt
def test_tables_are_swept_and_nothing_is_said_of_honest_ones(tmp_path: Path) -> None:
    x = drawn(40, 12)
    x[-4:, :3] = 0.95
    result = audited(tmp_path, Rules().eval(), x, "linf:0.7").results[0]
    assert "sweep" in [attack.name for attack in result.attacks]
    assert result.value == 0
    assert "masked" in {flag.id for flag in result.flags}
    assert "sweep" not in [attack.name for attack in audited(tmp_path, Rules().eval(), x, "linf:0.7", "fast").results[0].attacks]
    torch.manual_seed(0)
    honest = audited(tmp_path / "honest", nn.Sequential(nn.Linear(12, 2)).eval().requires_grad_(False), x, "linf:0.01")
    assert "masked" not in {flag.id for flag in honest.results[0].flags}
