"""Trainings that experiments keep, and the places that they measure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from epsball.core import Key
from epsball.data import Dataset
from epsball.defenses.training import Against, Course, Record, Standard, checkpoint
from epsball.reproduce import Setting, maxout_training, nets, robust, tradeoff
from epsball.threats import Linf


def dataset(n: int = 40) -> Dataset:
    draws = nets.generator(Key.of(0))
    y = torch.arange(n) % 2
    return Dataset(torch.rand(n, 1, 2, 2, generator=draws) / 2 + y[:, None, None, None] / 2, y, "planted", (), torch.arange(n), n, ())


def line() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))


def test_a_training_that_is_over_is_not_repeated_and_gives_the_same_weights(tmp_path: Path) -> None:
    data, held = robust.split(dataset(), 5, Setting(seed=3))
    setting, seen = Setting(seed=3, cache=tmp_path), []

    def watch(net: nn.Module, folder: Path):
        return lambda step, steps, record: seen.append(step)

    def train(setting: Setting) -> Tensor:
        course = Course(epochs=3, batch=7)
        fitted = robust.trained("line", line, Standard(), data, held, Against(Linf(), 0.1), course, setting, watch)
        assert not fitted.model.training
        return fitted.model[1].weight

    first = train(setting)
    assert seen == list(range(1, 16))
    torch.manual_seed(99)  # the weights to start from are the key's
    assert torch.equal(train(setting), first)
    assert len(seen) == 15
    assert not torch.equal(train(replace(setting, seed=4)), first)
    assert len(seen) == 30


def test_held_out_samples_are_not_trained_on() -> None:
    data = dataset()
    kept, held = robust.split(data, 3, Setting(seed=1))
    assert (len(kept.x), len(held.x)) == (37, 3)
    assert sorted([*kept.indices.tolist(), *held.indices.tolist()]) == list(range(40))
    assert len(robust.split(data, 30, Setting(seed=1))[1].x) == 5  # an eighth


@pytest.mark.parametrize(("labels", "rows", "epochs"), [(500, 5_000, 8), (2_000, 4_000, 10), (5_000, 5_000, 8), (20_000, 20_000, 2)])
def test_all_trainings_are_shown_the_same_number_of_images(labels: int, rows: int, epochs: int) -> None:
    data = Dataset(torch.zeros(20_000, 1), torch.zeros(20_000).long(), "planted", (), torch.arange(20_000), 20_000, ())
    chosen, count = tradeoff.shown(data, labels)
    assert (len(chosen.x), count) == (rows, epochs)
    assert rows * epochs == tradeoff.SHOWN
    assert len(set(chosen.indices.tolist())) == labels


def test_thirty_trainings_with_one_standard_for_all_radii() -> None:
    places = tradeoff.places()
    standard = {place.radius for place in places if place.name == tradeoff.STANDARD and place.labels == tradeoff.USUAL}
    assert standard == set(tradeoff.RADII)
    assert len(set(places)) == len(places)
    assert len(places) - len(standard) + 1 == 30


def test_the_stopper_keeps_the_weights_with_the_least_error_behind_fgsm(tmp_path: Path) -> None:
    net, held = line(), dataset()
    weight = torch.tensor([[-1.0] * 4, [1.0] * 4])
    stopper = maxout_training.Stopper(net, held, Against(Linf(), 0.05), tmp_path / "best.safetensors")

    def epoch(number: int, bias: float) -> None:
        with torch.no_grad():
            net[1].weight.copy_(weight)
            net[1].bias.copy_(torch.tensor([bias, -bias]))
        stopper(number, 9, None)
        stopper(number, 9, Record(number, number, 0.0, 1.0, {}, 1.0, 0.0, 0.1, 0.05))

    moved = held.x.flatten(1).sum(1) + 0.2 * (1 - 2 * held.y)
    errors = {bias: float(((moved > bias) != held.y.bool()).double().mean()) for bias in (0.0, 2.0, 3.9)}
    assert errors[2.0] < min(errors[0.0], errors[3.9])
    for number, bias in enumerate((0.0, 2.0, 3.9), 1):
        epoch(number, bias)
    tensors, plain = checkpoint.load(stopper.path)
    assert plain == {"error": errors[2.0], "epoch": 2}
    assert tensors["1.bias"].tolist() == [2.0, -2.0]
    assert maxout_training.Stopper(net, held, stopper.against, stopper.path).best == errors[2.0]  # after a stop


def test_how_many_pixels_share_a_filters_weight() -> None:
    filters = torch.zeros(3, 28, 28)
    filters[0, 3, 4] = -2.0
    filters[1] = 0.1
    filters[2, :2, :2] = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    assert maxout_training.spread(filters).tolist() == pytest.approx([1.0, 784.0, 4.0], rel=1e-4)
    net = nets.maxout(6, 2)
    assert torch.equal(maxout_training.first_layer(net)[4, 1].flatten(), net[2].linear.weight[9])
