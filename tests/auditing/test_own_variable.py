"""Audits under threats whose variable is not the input: flow, color, rigid motions, patches, compositions; and their evidence."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import digits, verdicts
from torch import Tensor, nn

import epsball as eb
from epsball.auditing.cascade import attack_round
from epsball.auditing.plan import EFFORTS, Stage, deeper, plan
from epsball.auditing.referee import SAME, Referee, length
from epsball.auditing.results import Report
from epsball.auditing.sheet import Sheet, Subject
from epsball.cli import main
from epsball.core import Key, Outcome, Untargeted, Victim, content_ids
from epsball.errors import BadInput
from epsball.models import wrap
from epsball.models.digits import load
from epsball.store import evidence
from epsball.threats import kind_of, parse_threat

THREATS = ("flow:0.2,0.4", "color:0.15", "rigid:0.15", "patch:2", "color+flow+linf:0.05+0.1+0.02,0.1+0.2+0.04")
NAMES = tuple(text.partition(":")[0] for text in THREATS)


def audited(folder: Path, **options: Any) -> Report:
    settings: dict[str, Any] = {"model": "digits-standard", "data": digits(24), "threats": THREATS, "effort": "fast"} | options
    return eb.audit(out=folder, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("own") / "run"
    return folder, audited(folder)


def test_every_threat_breaks_some_and_is_told_by_its_string(finished: tuple[Path, Report]) -> None:
    _, report = finished
    found = {(r.threat, r.radius_text): r.robust_accuracy.count for r in report.models[0].results}
    assert list(found) == [(spec.name, text) for spec in map(parse_threat, THREATS) for text in spec.texts]
    clean = report.models[0].clean_accuracy.count
    assert all(found[key] < clean for key in found if key != ("flow", "0.2"))
    assert found["flow", "0.4"] < found["flow", "0.2"] <= clean
    assert found["color+flow+linf", "0.1+0.2+0.04"] <= found["color+flow+linf", "0.05+0.1+0.02"]
    assert report.robust_accuracy["color+flow+linf", 0.1].radius_text == "0.1+0.2+0.04"
    assert report.models[0].results[0].attacks[2].name == "stadv_t"


def test_the_evidence_holds_z_and_z_makes_x_adv(finished: tuple[Path, Report]) -> None:
    """Read with NumPy and a fresh threat alone; sizes in float64 from the file."""
    arrays, header = evidence.read(finished[0] / evidence.NAME)
    x = torch.from_numpy(evidence.expand(arrays["m0/x"]))
    for spec in map(parse_threat, THREATS):
        rows, x_adv, radius = (torch.from_numpy(arrays[f"m0/{spec.name}/{name}"]) for name in ("rows", "x_adv", "radius"))
        if spec.name == "patch":  # z is the input itself
            assert "m0/patch/z" not in arrays
            assert int((x_adv != x[rows]).any(1).flatten(1).sum(1).max()) <= 4
            continue
        z = torch.from_numpy(arrays[f"m0/{spec.name}/z"])
        assert z.dtype is torch.float32
        threat = spec.threat.within((0.0, 1.0))
        assert float((threat.apply(x[rows], z) - x_adv).abs().max()) <= SAME
        size = threat.size(x[rows], z)
        assert bool((size <= radius).all())
        assert np.allclose(size.numpy(), arrays[f"m0/{spec.name}/size"], rtol=1e-12)
        assert np.allclose(length(threat, x[rows], z), size.numpy(), rtol=1e-12)
        assert set(radius.tolist()) <= set(spec.radii)
    asked = {(r["threat"], r["text"]) for r in header["models"][0]["rounds"]}
    assert asked == {(spec.name, text) for spec in map(parse_threat, THREATS) for text in spec.texts}


def test_verify_holds_and_pages_are_written(finished: tuple[Path, Report]) -> None:
    lines = eb.verify(finished[0])
    assert [line.threat for line in lines] == ["clean", "flow", "flow", "color", "rigid", "patch", "color+flow+linf", "color+flow+linf"]
    assert all(line.holds for line in lines)
    page = (finished[0] / "report.html").read_text(encoding="utf8")
    for words in ("0.4 px", "0.15 RGB", "of 30 deg, 3 px", "color + flow + L∞", "radius (px)", "every pixel may move by up to 0.4 px"):
        assert words in page, words
    assert page.count("data:image/png") >= 3 * len(NAMES)


# Corrupted evidence.


def lengthen(arrays: dict[str, Any], name: str) -> None:
    arrays[f"m0/{name}/z"][0] *= 100


def another_z(arrays: dict[str, Any], name: str) -> None:
    """Legal, but it makes another input."""
    arrays[f"m0/{name}/z"][0] *= 0.5


def nan_z(arrays: dict[str, Any], name: str) -> None:
    arrays[f"m0/{name}/z"].reshape(-1)[0] = np.nan


def infinite_z(arrays: dict[str, Any], name: str) -> None:
    arrays[f"m0/{name}/z"].reshape(-1)[0] = np.inf


def another_input(arrays: dict[str, Any], name: str) -> None:
    """Breaks the model better than the threat could: the second sample's image."""
    arrays[f"m0/{name}/x_adv"][0] = 1 - arrays[f"m0/{name}/x_adv"][0]


def one_value(arrays: dict[str, Any], name: str) -> None:
    flat = arrays[f"m0/{name}/x_adv"].reshape(len(arrays[f"m0/{name}/x_adv"]), -1)
    flat[0, 0] += 1e-4 if flat[0, 0] < 0.5 else -1e-4


def swapped(arrays: dict[str, Any], name: str) -> None:
    arrays[f"m0/{name}/z"][[0, 1]] = arrays[f"m0/{name}/z"][[1, 0]]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "patch"])
@pytest.mark.parametrize("corrupt", [lengthen, another_z, nan_z, infinite_z, another_input, one_value, swapped])
def test_verify_catches_an_edited_file(
    name: str, corrupt: Callable[[Any, str], None], finished: tuple[Path, Report], tmp_path: Path
) -> None:
    arrays, header = evidence.read(finished[0] / evidence.NAME)
    assert len(arrays[f"m0/{name}/rows"]) >= 2
    arrays = {key: value.copy() for key, value in arrays.items()}
    corrupt(arrays, name)
    evidence.write(tmp_path / evidence.NAME, arrays, header)
    (tmp_path / "report.json").write_bytes((finished[0] / "report.json").read_bytes())
    bad = [line for line in eb.verify(tmp_path) if not line.holds]
    assert {line.threat for line in bad} == {name}
    assert max(line.rejected for line in bad) >= 1


def test_verify_refuses_a_file_without_z_in_one_line(finished: tuple[Path, Report], tmp_path: Path) -> None:
    arrays, header = evidence.read(finished[0] / evidence.NAME)
    (tmp_path / "report.json").write_bytes((finished[0] / "report.json").read_bytes())
    for change in (lambda a: a.pop("m0/flow/z"), lambda a: a.update({"m0/flow/z": a["m0/flow/z"][:, :1]})):
        broken = dict(arrays)
        change(broken)
        evidence.write(tmp_path / evidence.NAME, broken, header)
        with pytest.raises(BadInput, match="cannot be judged") as caught:
            eb.verify(tmp_path)
        assert "\n" not in str(caught.value)


# Verdicts per sample.


CUTS = [
    ({"batch_size": 5}, (0,)),
    pytest.param({"batch_size": 1}, (0, 1, 2, 3, 4), marks=pytest.mark.slow),
    pytest.param({"drop": False}, (0, 1, 2, 3, 4), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("options", "which"), CUTS, ids=["batches of 5", "of 1", "dropping off"])
def test_verdicts_do_not_depend_on_how_the_work_is_cut(
    options: Any, which: tuple[int, ...], finished: tuple[Path, Report], tmp_path: Path
) -> None:
    audited(tmp_path / "run", threats=[THREATS[place] for place in which], **options)
    for place in which:
        assert verdicts(tmp_path / "run", NAMES[place]) == verdicts(finished[0], NAMES[place]), NAMES[place]


def test_verdicts_do_not_depend_on_order_or_other_threats(finished: tuple[Path, Report], tmp_path: Path) -> None:
    data, order = digits(24), torch.randperm(24, generator=torch.Generator().manual_seed(1))
    audited(tmp_path / "run", data=(data.x[order], data.y[order]), threats=THREATS[2:4])
    for name in NAMES[2:4]:
        assert verdicts(tmp_path / "run", name) == verdicts(finished[0], name), name


def test_a_patch_of_one_pixel_is_what_brute_force_finds(tmp_path: Path) -> None:
    """24 digits, 64 pixels, 11 values: the fast audit breaks every sample that this breaks, but for two at most (there are 8)."""
    data, model = digits(24), load("digits-standard")
    broken = model(data.x).argmax(1) != data.y
    with torch.no_grad():
        for row, column, value in itertools.product(range(8), range(8), torch.linspace(0, 1, 11)):
            x = data.x.clone()
            x[:, :, row, column] = value
            broken |= model(x).argmax(1) != data.y
    found = audited(tmp_path / "run", threats="patch:1").models[0].results[0].robust_accuracy.count
    assert int(broken.sum()) == 8, int(broken.sum())
    assert found <= int((~broken).sum()) + 2


# The referee.


@dataclass(frozen=True)
class Forger:
    """Hands back a z of its choice and whatever input it likes."""

    threat: Any
    make: Any
    paint: Any
    name: str = "forger"

    def __call__(self, model: Victim, x: Tensor, goal: Any, radius: float, seed: int = 0, **_: Any) -> Outcome:
        n, some, none = len(x), torch.ones(len(x), dtype=torch.bool), torch.zeros(len(x), dtype=torch.int64)
        z = self.make(self.threat.start(x, torch.full((n,), radius, dtype=torch.float64), Key((0,)), content_ids(x)))
        x_adv = self.paint(self.threat.within((0.0, 1.0)).apply(x, z.nan_to_num(0.0, 0.0, 0.0)))
        size, score = torch.zeros(n, dtype=torch.float64), torch.zeros(n)
        flags = {"invalid": ~some}
        return Outcome(x_adv=x_adv, z=z, reached=some, size=size, score=score, queries=none, backwards=none, steps=1, flags=flags)


class Brittle(nn.Module):
    """Right on the clean digits it was shown, class 0 or 1 for anything else: every true change breaks it."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.register_buffer("known", x.clone())

    def forward(self, x: Tensor) -> Tensor:
        same = (x[:, None] - self.known[None]).abs().flatten(2).amax(2).amin(1) == 0
        return torch.stack([same.to(x.dtype), 1 - same.to(x.dtype)], 1)


FORGERIES = {
    "too long": (lambda z: z * 1.01 + 1, lambda x: x, False),
    "not a number": (lambda z: torch.full_like(z, torch.nan), lambda x: x, False),
    "infinite": (lambda z: torch.full_like(z, torch.inf), lambda x: x, False),
    "another input": (lambda z: z * 0, lambda x: 1 - x, False),
    "a little beside": (lambda z: z, lambda x: x * 0.999, False),
    "honest": (lambda z: z, lambda x: x, True),
}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "patch"])
@pytest.mark.parametrize("lie", FORGERIES)
def test_the_referee_believes_no_z(name: str, lie: str) -> None:
    data, spec = digits(24), parse_threat(next(text for text in THREATS if text.startswith(name + ":")))
    victim = wrap(Brittle(data.x))
    subject = Subject(victim, data.x, torch.zeros(24, dtype=torch.int64), data.indices, "digits", {})
    referee = Referee(victim)
    sheet = Sheet.start(subject, referee.outputs(data.x, subject.goal), [], (spec,), queries=300, pace=0.0)
    make, paint, honest = FORGERIES[lie]
    attack_round(sheet, referee, sheet.rounds[0], Stage(Forger(spec.threat, make, paint), 0), 0, True, lambda *_: None)
    broken = torch.isfinite(sheet.hits[name].radius)
    assert bool(broken.all()) if honest else not bool(broken.any())
    assert set(sheet.hits[name].z) == set(broken.nonzero().squeeze(1).tolist())


def test_the_referee_judges_what_z_makes_and_not_what_is_shown() -> None:
    """Within the tolerance an input may differ from what z makes: then z's own is asked."""
    data = digits(8)
    spec, victim = parse_threat("flow:1"), wrap(Brittle(data.x))
    z = torch.zeros(8, 2, 8, 8)
    ruling = Referee(victim).judge(data.x, data.x + 5e-7, Untargeted(torch.zeros(8, dtype=torch.int64)), spec.threat, 1.0, z)
    assert bool(ruling.legal.all())
    assert not bool(ruling.broken.any())


# Plans, and what does not fit.


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("text", THREATS)
def test_every_plan_begins_cheap_and_is_all_of_its_threat(effort: str, text: str) -> None:
    for classes, single in ((2, True), (10, True), (5, False)):
        threat = parse_threat(text).threat
        stages = plan(threat, effort, classes=classes, single_label=single, gradients=True)
        assert [s.attack.name for s in stages[:2]] == (["noise", "apgd"] if threat.name == "patch" else ["pgd", "noise"])
        assert len(stages) >= 3
        again = deeper(threat, effort, classes=classes, single_label=single)
        assert all(kind_of(attack.threat) == kind_of(threat) for attack in (*(s.attack for s in stages), again))
        assert all(stage.rows > 0 for stage in stages)
        blind = plan(threat, effort, classes=classes, single_label=single, gradients=False)
        assert {s.attack.name for s in blind} <= {"noise", "rotation_translation"}


def refused(words: str, **options: Any) -> str:
    with pytest.raises(BadInput, match=words) as caught:
        audited(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_threats_that_do_not_fit_the_inputs_are_told_before_any_work(tmp_path: Path) -> None:
    asked: list[int] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            asked.append(len(x))
            return x.flatten(1)[:, :10]

    flat = (torch.rand(24, 64, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 10)
    for name in NAMES:
        refused("image", folder=tmp_path / name, model=Watched(), data=flat, threats=f"{name}:{'+'.join(['1'] * (name.count('+') + 1))}")
    assert len(asked) == len(NAMES)  # one look at whether model and data fit, no more
    assert "use color" in refused("gray", folder=tmp_path / "gray", threats="color-luv:0.06")
    wide = wrap(load("digits-standard"), box=(-1.0, 1.0))
    assert "wrap" in refused("sRGB", folder=tmp_path / "wide", model=wide, threats="color:0.06")
    assert list(tmp_path.iterdir()) == []


def test_color_images_in_both_spaces(tmp_path: Path) -> None:
    """A linear model on 3-channel images: LUV grids are kept too, and rebuilt from the file."""
    random = np.random.default_rng(3)
    x = torch.from_numpy(random.random((16, 3, 6, 6))).float()
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.from_numpy(random.standard_normal((4, 108))))
        model[1].bias.zero_()
    y = model(x).argmax(1)
    report = audited(tmp_path / "run", model=model, data=(x, y), threats=("color-luv:0.2", "color:0.2"), batch_size=7)
    assert all(r.robust_accuracy.count < 16 for r in report.models[0].results)
    arrays, _ = evidence.read(tmp_path / "run" / evidence.NAME)
    assert arrays["m0/color-luv/z"].shape[1:] == (3, 16, 32, 32)
    assert arrays["m0/color/z"].shape[1:] == (3, 16, 16, 16)
    assert all(line.holds for line in eb.verify(tmp_path / "run", [model]))


# The command line.


def test_attack_takes_these_threats_and_keeps_z(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, threat in (
        ("stadv", "flow:0.5"),
        ("pgd", "color+linf:0.06+8/255"),
        ("rotation_translation", "rigid:0.2"),
        ("noise", "patch:2"),
    ):
        few = {"rotation_translation": ["-s", "rotations=3", "-s", "shifts=3"], "noise": ["-s", "draws=20"]}.get(name, ["-s", "steps=5"])
        assert main(["attack", name, "digits-robust", "-n", "12", "-t", threat, *few, "--save", f"{tmp_path}/out.npz", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        spec = parse_threat(threat)
        with np.load(tmp_path / "out.npz") as found:
            assert ("z" in found) == (name != "noise")
            assert int(found["reached"].sum()) >= told["reached by attack"]
            assert float(found["size"].max()) <= spec.radii[0]
    assert main(["attack", "stadv", "digits-robust", "-t", "linf:0.1"]) == 2
    assert "works under flow" in capsys.readouterr().err


def test_list_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"flow", "color", "color-luv", "rigid", "patch"} <= set(found["threats"])
    assert {"stadv", "recoloradv", "rotation_translation", "physical"} <= {entry["name"] for entry in found["attacks"]}


def test_verify_exits_with_3_for_an_edited_file(finished: tuple[Path, Report], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays, header = evidence.read(finished[0] / evidence.NAME)
    arrays = {key: value.copy() for key, value in arrays.items()}
    another_z(arrays, "flow")
    evidence.write(tmp_path / evidence.NAME, arrays, header)
    (tmp_path / "report.json").write_bytes((finished[0] / "report.json").read_bytes())
    assert main(["verify", str(finished[0])]) == 0
    assert "flow 0.4 px" in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 3
    assert "DOES NOT HOLD" in capsys.readouterr().out
