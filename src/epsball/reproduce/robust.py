"""Robust trainings of the experiments, kept and used again, and what an audit says of the networks."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from epsball.auditing.results import ModelReport, Rate
from epsball.core import Key
from epsball.core.attack import recipe
from epsball.data import Dataset
from epsball.defenses.training import Against, Course, Fitted, Loss, fit
from epsball.defenses.training.fit import Progress
from epsball.door import audit
from epsball.reproduce import nets
from epsball.reproduce.base import Setting, percent_of

QUICK_EPOCHS = 2


def fresh(build: Callable[[], nn.Module], key: Key) -> nn.Module:
    """An untrained network whose weights come from the key; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(nets.generator(key).get_state())
        return build()


def split(data: Dataset, held: int, setting: Setting) -> tuple[Dataset, Dataset]:
    """All but `held` samples, and these, drawn by the seed (an eighth of the data at most)."""
    order = torch.randperm(len(data.x), generator=nets.generator(Key.of(setting.seed).fold("held out")))
    held = min(held, len(order) // 8)
    return nets.rows(data, order[held:]), nets.rows(data, order[:held])


def folder_of(name: str, net: nn.Module, loss: Loss, data: Dataset, against: Against, course: Course, setting: Setting) -> Path:
    """Where a training keeps what it has: another recipe, other data, another folder."""
    digest = hashlib.blake2b(digest_size=6)
    for part in (repr(net), recipe(loss), recipe(course), recipe(against), str(setting.seed)):
        digest.update(part.encode())
    digest.update(data.x.numpy().tobytes())
    digest.update(data.y.numpy().tobytes())
    return setting.cache / f"{name.replace(' ', '-')}-{digest.hexdigest()}"


def trained(
    name: str,
    build: Callable[[], nn.Module],
    loss: Loss,
    data: Dataset,
    held: Dataset,
    against: Against,
    course: Course,
    setting: Setting,
    watch: Callable[[nn.Module, Path], Progress] | None = None,
) -> Fitted:
    """A training by `fit` that goes on where it stopped, and is not repeated once it is over; 2 epochs in quick runs.

    Args:
        name: of its folder and of its first weights. build: makes the network. loss, against, course: see `fit`.
        data, held: disjoint. watch: (network, folder of the training) -> what is told after every step; a training that is over
            already tells nothing any more.

    Returns:
        What `fit` does, its network in eval mode.
    """
    course = replace(course, epochs=min(course.epochs, QUICK_EPOCHS)) if setting.quick else course
    net = fresh(build, Key.of(setting.seed).fold(name))
    folder = folder_of(name, net, loss, data, against, course, setting)
    folder.mkdir(parents=True, exist_ok=True)
    setting.say(f"training {name}: {course.epochs} epochs of {len(data.x):,} images")
    told = None if watch is None else watch(net, folder)
    fitted = fit(net, loss, (data.x, data.y), (held.x, held.y), against, course, setting.seed, folder=folder, progress=told)
    fitted.model.eval()
    return fitted


def audited(net: nn.Module, test: Dataset, threats: str | tuple[str, ...], effort: str, setting: Setting) -> ModelReport:
    """What `epsball.audit` says of a network; effort fast in quick runs."""
    setting.say(f"auditing on {len(test.x):,} images, {threats if isinstance(threats, str) else ' '.join(threats)}")
    with tempfile.TemporaryDirectory() as folder:
        report = audit(net, test, threats, effort="fast" if setting.quick else effort, seed=setting.seed, out=folder)
    return report.models[0]


def error(rate: Rate) -> str:
    """What is left of 1, with its interval and n."""
    return percent_of(rate.n - rate.count, rate.n)


def flags(found: ModelReport) -> str:
    """What the audit itself says about its numbers: 'block losses-disagree, warn effort'; or no flag."""
    seen = {(flag.severity, flag.id) for flag in [*found.flags, *(flag for result in found.results for flag in result.flags)]}
    names = [f"{severity} {name}" for severity, name in sorted(seen) if severity != "info"]
    return ", ".join(names) or "no flag"
