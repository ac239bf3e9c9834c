"""Randomized smoothing against closed forms: of a linear model, the smoothed classifier is the model itself."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from scipy.stats import beta
from torch import Tensor, nn

from epsball.certify import smooth
from epsball.certify.smoothing import lower
from epsball.core import Access, Victim
from epsball.errors import BadInput


def halfspace() -> tuple[nn.Module, Tensor]:
    """Class 1 where 3 x0 + 4 x1 > 1, and points at distances 0.02, 0.2, 0.6 and -0.4 from there."""
    layer = nn.Linear(2, 2)
    layer.weight.data, layer.bias.data = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([0.0, -1.0])
    return layer, torch.tensor([0.02, 0.2, 0.6, -0.4])


def test_the_radius_is_that_of_the_counts_and_below_the_true_distance() -> None:
    net, away = halfspace()
    x = ((1 / 5 + away)[:, None] * torch.tensor([0.6, 0.8])).float()
    found = smooth(net, x, 0.25, n=20_000, alpha=0.001, seed=2)
    assert found.prediction.tolist() == [1, 1, 1, 0]
    expected = torch.tensor([0.25 * NormalDist().inv_cdf(p) for p in found.low.tolist()])
    assert torch.allclose(found.radius, expected.double(), atol=1e-6)
    assert bool((found.radius <= away.abs()).all())  # exact: the smoothed radius of a halfspace is the distance
    close = found.radius[:2]
    assert torch.allclose(close, away[:2].double(), atol=0.02)
    most = 0.25 * NormalDist().inv_cdf(0.001 ** (1 / 20_000))  # where every draw agrees
    assert float(found.radius[2]) <= most
    assert 0.5 < float(found.radius[2]) / most <= 1


def test_it_abstains_at_the_boundary() -> None:
    net, _ = halfspace()
    found = smooth(net, torch.tensor([[0.12, 0.16]]), 0.25, n=500)
    assert found.prediction.tolist() == [-1]
    assert found.radius.tolist() == [0.0]


def test_the_bound_is_clopper_and_pearsons() -> None:
    counts = torch.tensor([0, 1, 57, 99, 100])
    found = lower(counts, 100, 0.01)
    for count, low in zip(counts.tolist(), found.tolist(), strict=True):
        assert low == pytest.approx(0.0 if count == 0 else beta.ppf(0.01, count, 100 - count + 1), abs=1e-12)
    assert found[-1] == pytest.approx(0.01 ** (1 / 100))


def test_draws_belong_to_the_sample_not_to_the_batch() -> None:
    net, away = halfspace()
    x = ((1 / 5 + away)[:, None] * torch.tensor([0.6, 0.8])).float()
    whole, alone = smooth(net, x, 0.3, n=300), smooth(net, x[1:2], 0.3, n=300)
    assert torch.equal(whole.low[1:2], alone.low)
    assert not torch.equal(whole.low, smooth(net, x, 0.3, n=300, seed=1).low)


def test_labels_are_enough_and_every_draw_is_one_row() -> None:
    asked: list[int] = []

    def model(x: Tensor) -> Tensor:
        asked.append(len(x))
        return torch.stack([x[:, 0], 1 - x[:, 0]], 1)

    found = smooth(Victim(model, access=Access.LABELS), torch.tensor([[0.9], [0.1]]), 0.1, n0=10, n=50)
    assert found.prediction.tolist() == [0, 1]
    assert sum(asked) == 2 * 60


def test_answers_that_are_no_numbers_win_nothing() -> None:
    found = smooth(lambda x: torch.full((len(x), 2), math.nan), torch.zeros(1, 2), 0.1, n=50)
    assert found.prediction.tolist() == [-1]


@pytest.mark.parametrize("bad", [{"sigma": 0.0}, {"sigma": 0.1, "n": 0}, {"sigma": 0.1, "alpha": 1.0}])
def test_settings_that_cannot_be_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="smoothing: sigma"):
        smooth(halfspace()[0], torch.zeros(1, 2), **bad)  # type: ignore[arg-type]
