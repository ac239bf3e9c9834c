"""The loop: the same bits after a stop at any place, nothing of the caller's changed, the best weights kept, collapse noticed."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import epsball as eb
from epsball.core import Key
from epsball.data import load_data
from epsball.defenses.training import (
    Against,
    Course,
    Fitted,
    Free,
    Loss,
    Record,
    Standard,
    atta,
    by_clean,
    constant,
    cosine,
    fast,
    fit,
    one_cycle,
    pgd,
    sgd,
    small,
    trades,
)
from epsball.defenses.training.batch import generator
from epsball.defenses.training.schedule import keep, warmed
from epsball.defenses.training.watch import collapsed, measure
from epsball.errors import BadInput, EpsballError
from epsball.threats import L2, Color, Linf

Pair = tuple[Tensor, Tensor]


def blobs(n: int, seed: int = 0) -> Pair:
    """Two classes that the sign of the first feature tells apart, and two features of noise."""
    x = torch.rand(n, 3, generator=generator(Key.of(seed)))
    return x, (x[:, 0] > 0.5).long()


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


COURSE = Course(epochs=3, batch=16, rate=0.05, average=0.9, smoothing=0.1)
AGAINST = Against(Linf(), 0.05)
DATA, HELD = blobs(64), blobs(40, 1)


class Killed(Exception):
    pass


def kill_after(steps: int) -> object:
    def progress(step: int, of: int, record: Record | None) -> None:
        if step == steps:
            raise Killed

    return progress


def weights(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


RESUMED: dict[str, tuple[Loss, Course]] = {
    "pgd": (pgd(steps=2), COURSE),
    "trades, sgd, parts, clip": (trades(steps=2), replace(COURSE, optimizer=sgd, accumulate=3, clip=0.5, schedule=cosine)),
    "free": (Free(), replace(COURSE, replays=2)),
    "atta, parts": (atta(), replace(COURSE, accumulate=2)),
    "no average, augmented": (fast(), replace(COURSE, average=0.0, augment=lambda x, noise: x + 0 * torch.rand(1, generator=noise))),
}


@pytest.mark.parametrize("steps", [1, 4, 7, 12])
@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_training_goes_on_bit_for_bit(name: str, steps: int, tmp_path: Path) -> None:
    loss, course = RESUMED[name]
    whole = net()
    straight = fit(whole, loss, DATA, HELD, AGAINST, course)
    with pytest.raises(Killed):
        fit(net(), loss, DATA, HELD, AGAINST, course, folder=tmp_path, progress=kill_after(steps))  # type: ignore[arg-type]
    again = net()
    resumed = fit(again, loss, DATA, HELD, AGAINST, course, folder=tmp_path)
    assert same(weights(again), weights(whole))
    assert [replace(r, seconds=0) for r in resumed.history] == [replace(r, seconds=0) for r in straight.history]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_go_on_bit_for_bit_in_either_layout(layout: torch.memory_format, tmp_path: Path) -> None:
    def made() -> nn.Module:
        return small((1, 8, 8), 2).to(memory_format=layout)  # type: ignore[call-overload,no-any-return]

    x = torch.rand(96, 1, 8, 8, generator=generator(Key.of(4)))
    data, held = ((part, (part.mean((1, 2, 3)) > 0.5).long()) for part in (x[:64], x[64:]))
    whole, again = made(), made()
    fit(whole, pgd(steps=2), data, held, AGAINST, COURSE)
    with pytest.raises(Killed):
        fit(made(), pgd(steps=2), data, held, AGAINST, COURSE, folder=tmp_path, progress=kill_after(5))  # type: ignore[arg-type]
    fit(again, pgd(steps=2), data, held, AGAINST, COURSE, folder=tmp_path)
    assert same(weights(again), weights(whole))
    assert all(p.is_contiguous(memory_format=layout) for p in again.parameters() if p.ndim == 4)


def test_a_process_that_dies_loses_only_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    whole = net()
    fit(whole, pgd(steps=2), DATA, HELD, AGAINST, COURSE)

    kept = tmp_path / "checkpoint.safetensors"
    blobs_seen: list[bytes] = []

    def progress(step: int, of: int, record: Record | None) -> None:
        if kept.exists():
            blobs_seen.append(kept.read_bytes())

    fit(net(), pgd(steps=2), DATA, HELD, AGAINST, COURSE, folder=tmp_path, progress=progress, save_every=0.0)
    assert len(blobs_seen) == 12
    for blob in (blobs_seen[1], blobs_seen[5]):
        kept.write_bytes(blob)
        again = net()
        fit(again, pgd(steps=2), DATA, HELD, AGAINST, COURSE, folder=tmp_path)
        assert same(weights(again), weights(whole))
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_finished_training_is_only_read(tmp_path: Path) -> None:
    first, second = net(), net()
    done = fit(first, pgd(steps=1), DATA, HELD, AGAINST, COURSE, folder=tmp_path)
    seen: list[int] = []
    again = fit(second, pgd(steps=1), DATA, HELD, AGAINST, COURSE, folder=tmp_path, progress=lambda *_: seen.append(1))
    assert again.history == done.history
    assert same(weights(first), weights(second))
    assert not seen
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [record.to_dict() for record in done.history]
    assert [line["step"] for line in lines] == [4, 8, 12]


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    fit(net(), Standard(), DATA, HELD, AGAINST, COURSE, folder=tmp_path)
    for loss, course, data in ((pgd(), COURSE, DATA), (Standard(), replace(COURSE, rate=0.1), DATA), (Standard(), COURSE, blobs(64, 5))):
        with pytest.raises(BadInput, match="belongs to another training"):
            fit(net(), loss, data, HELD, AGAINST, course, folder=tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadInput, match="unreadable"):
        fit(net(), Standard(), DATA, HELD, AGAINST, COURSE, folder=tmp_path)


def test_nothing_of_the_callers_is_changed() -> None:
    model = net().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # noqa: NPY002
    x, y = DATA[0].clone(), DATA[1].clone()
    fit(model, pgd(steps=2), (x, y), HELD, AGAINST, COURSE)
    assert modes == [module.training for module in model.modules()]
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert torch.equal(states[2], torch.get_rng_state())
    assert torch.equal(x, DATA[0])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_seed_decides_and_noise_is_fresh_in_every_epoch() -> None:
    seen: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor, y: Tensor, batch: object) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(batch.uniform(x))  # type: ignore[attr-defined]
        return F.cross_entropy(model(x), y), {}

    first, second, third = net(), net(), net()
    fit(first, loss, DATA, HELD, AGAINST, COURSE)
    drawn = len({tuple(noise.flatten().tolist()) for noise in seen})
    assert drawn == len(seen) == 12
    torch.rand(5)  # the global generator has no say
    fit(second, loss, DATA, HELD, AGAINST, COURSE)
    fit(third, loss, DATA, HELD, AGAINST, COURSE, seed=1)
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(third))


def test_an_epoch_shows_every_sample_once_and_replays_show_batches_again() -> None:
    seen: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor, y: Tensor, batch: object) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(x)
        return F.cross_entropy(model(x), y), {}

    fit(net(), loss, DATA, HELD, AGAINST, replace(COURSE, epochs=1, replays=2))
    assert len(seen) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    shown = torch.cat(seen[::2])
    assert sorted(map(tuple, shown.tolist())) == sorted(map(tuple, DATA[0].tolist()))


def test_parts_of_a_step_add_up_to_the_step() -> None:
    plain = Course(epochs=2, batch=16, rate=0.1, optimizer=sgd, average=0.0, merit=by_clean)
    linear = [nn.Linear(3, 2) for _ in range(2)]
    linear[1].load_state_dict(linear[0].state_dict())
    for model, parts in zip(linear, (1, 3), strict=True):
        fit(model, Standard(), DATA, HELD, AGAINST, replace(plain, accumulate=parts))
    assert torch.allclose(linear[0].weight, linear[1].weight, atol=1e-6)


def test_clipping_bounds_the_step() -> None:
    model, course = nn.Linear(3, 2), Course(epochs=1, batch=64, rate=1.0, optimizer=sgd, decay=0.0, average=0.0, schedule=constant)
    before = weights(model)
    fit(model, Standard(), DATA, HELD, AGAINST, replace(course, clip=1e-3))
    length = sum(float((a - b).square().sum()) for a, b in zip(before, weights(model), strict=True)) ** 0.5
    assert length == pytest.approx(1e-3, rel=1e-3)


def test_the_average_is_a_running_mean_of_the_weights() -> None:
    course = Course(epochs=2, batch=32, rate=0.1, optimizer=sgd, average=0.5, patience=None)
    model, path = nn.Linear(3, 2), []
    start = model.weight.detach().clone()
    done = fit(model, Standard(), DATA, HELD, AGAINST, course, progress=lambda *_: path.append(model.weight.detach().clone()))
    mean, means = start, []
    for step, weight in enumerate(path, 1):
        kept = min(0.5, step / (step + 9))
        mean = kept * mean + (1 - kept) * weight
        means.append(mean)
    assert torch.allclose(model.weight, means[done.best.step - 1], atol=1e-6)


def test_schedules() -> None:
    assert (one_cycle(0.0), one_cycle(0.3)) == (0.04, 1.0)
    assert one_cycle(0.15) == pytest.approx(0.52)
    assert [one_cycle(0.65), cosine(0.5)] == pytest.approx([0.5, 0.5])
    assert [warmed(p, 0.2) for p in (0.0, 0.1, 0.5)] == [0.0, 0.5, 1.0]
    assert warmed(0.0, 0.0) == 1.0
    assert keep(0.99, 1) == 0.1
    assert keep(0.99, 10**6) == 0.99


def test_the_radius_grows_with_the_warm_up() -> None:
    radii: list[float] = []

    def loss(model: nn.Module, x: Tensor, y: Tensor, batch: object) -> tuple[Tensor, dict[str, Tensor]]:
        radii.append(float(batch.radius[0]))  # type: ignore[attr-defined]
        return F.cross_entropy(model(x), y), {}

    fit(net(), loss, DATA, HELD, Against(Linf(), 0.4), replace(COURSE, warmup=0.5))
    assert radii == pytest.approx([0.4 * min(1, step / 6) for step in range(12)])


def record(robust: float, clean: float = 0.9, adversarial: float | None = None, best: bool = False) -> Record:
    means = {} if adversarial is None else {"adversarial": adversarial}
    return Record(epoch=1, step=1, seconds=0, loss=1.0, means=means, clean=clean, robust=robust, rate=0.1, radius=0.1, best=best)


def test_collapse_is_a_robust_accuracy_that_falls_while_the_trainings_own_rises() -> None:
    before = [record(0.3, adversarial=0.4), record(0.5, adversarial=0.6)]
    assert collapsed(before, record(0.1, adversarial=0.9))
    assert not collapsed(before, record(0.3, adversarial=0.9))  # a wobble
    assert not collapsed(before, record(0.1, adversarial=0.3))  # the whole training fails: another illness
    assert not collapsed(before, record(0.1))  # a loss that makes no adversarial inputs
    assert not collapsed([], record(0.0, adversarial=1.0))


class Planned(nn.Module):
    """Answers by a script: robust in early epochs, not later."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]))
        self.bias = nn.Parameter(torch.tensor([0.0, -2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def ruin(model: nn.Module, x: Tensor, y: Tensor, batch: object) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss that leans on two useless features ever more, and reports that its own attacks fail."""
    assert isinstance(model, Planned)
    return (-model.weight[1, 1:] + model.bias[1] / 2).sum(), {"adversarial": torch.tensor(1.0)}


def test_the_best_weights_by_robust_accuracy_are_kept_and_collapse_is_logged() -> None:
    x, y = blobs(200, 3)
    far = (x[:, 0] - 0.5).abs() > 0.2
    held = (x[far], y[far])
    model, course = Planned(), Course(epochs=8, batch=32, rate=0.1, optimizer=sgd, average=0.0, decay=0.0, schedule=constant)
    done = fit(model, ruin, held, held, Against(Linf(), 0.1), course)
    assert done.best.epoch == 1
    assert [r.best for r in done.history] == [True] + [False] * 7
    assert done.history[-1].robust < 0.5 * done.best.robust
    assert done.history[-1].collapsed
    assert not done.history[0].collapsed
    assert not done.early
    assert measure(model, *held, Linf(), 0.1, (0.0, 1.0), 0) == (done.best.clean, done.best.robust)
    stopped = fit(Planned(), ruin, held, held, Against(Linf(), 0.1), replace(course, patience=2))
    assert stopped.early
    assert len(stopped.history) == 3


def test_measured_accuracy_is_the_closed_form_on_a_linear_model() -> None:
    x, y = blobs(300, 4)
    margin = (2.0 * y - 1) * (x[:, 0] - 0.5)
    clean, robust = measure(Planned(), x, y, Linf(), 0.13, (-9.0, 9.0), 0)
    assert clean == pytest.approx(float((margin > 0).float().mean()))
    assert robust == pytest.approx(float((margin > 0.13).float().mean()))


FAULTS = [
    (lambda: fit(nn.Flatten(), Standard(), DATA, HELD, AGAINST), "no weights that can be trained"),
    (lambda: fit(nn.Linear(3, 1), Standard(), DATA, HELD, AGAINST), r"gives \(1, 1\) for one input, labels go up to 1"),
    (lambda: fit(net(), Standard(), (DATA[0], DATA[1][:3]), HELD, AGAINST), "data: 64 inputs and 3 labels"),
    (lambda: fit(net(), Standard(), DATA, (HELD[0], HELD[1].float()), AGAINST), "held: labels torch.float32"),
    (lambda: Against(Color(), 0.1), "training knows linf, l2 and l1"),
    (lambda: Against(Linf(), -1.0), "radius: -1.0"),
    (lambda: Course(epochs=0), "epochs: 0: must be 1 or more"),
    (lambda: Course(average=1.0), "average: 1.0"),
    (lambda: Course(rate=0.0), "rate: 0.0"),
    (lambda: fit(net(), Free(), DATA, HELD, AGAINST, replace(COURSE, batch=15, accumulate=2)), "accumulate must be 1"),
]


@pytest.mark.parametrize(("call", "words"), FAULTS, ids=range(len(FAULTS)))
def test_faults_are_one_line(call: object, words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_no_number_stops_the_training() -> None:
    with pytest.raises(EpsballError, match=r"loss: (nan|inf) in the epoch that ended at step 4"):
        fit(nn.Linear(3, 2), lambda model, x, y, batch: (model(x).sum() * torch.nan, {}), DATA, HELD, AGAINST, COURSE)


def test_bfloat16_is_used_where_it_is_asked_for() -> None:
    seen: list[torch.dtype] = []

    def loss(model: nn.Module, x: Tensor, y: Tensor, batch: object) -> tuple[Tensor, dict[str, Tensor]]:
        output = model(x)
        seen.append(output.dtype)
        return F.cross_entropy(output.float(), y), {}

    fit(net(), loss, DATA, HELD, AGAINST, replace(COURSE, epochs=1, half=True))
    assert set(seen) == {torch.bfloat16}


def trained(loss: Loss, against: Against, epochs: int) -> tuple[nn.Module, Fitted]:
    data = load_data("digits", split="train")
    model, inside = small((1, 8, 8), 10), torch.arange(len(data.x)) % 10 > 0
    course = Course(epochs=epochs, batch=64, average=0.99)
    parts = [(data.x[rows], data.y[rows]) for rows in (inside, ~inside)]
    return model, fit(model, loss, parts[0], parts[1], against, course)


def test_a_short_training_on_digits_is_robust_under_audit(tmp_path: Path) -> None:
    model, _ = trained(fast(), Against(Linf(), 0.1), 8)
    report = eb.audit(eb.wrap(model), "digits", ["linf:0.1"], n=200, effort="fast", out=tmp_path)
    assert report.robust_accuracy["linf", 0.1].value >= 0.60
    assert report.models[0].clean_accuracy.value >= 0.90


def test_l2_is_trained_against_as_well() -> None:
    _, done = trained(pgd(steps=3, share=0.5), Against(L2(), 0.3), 3)
    assert done.best.robust > 0.5
