"""Canaries that were judged right are not judged again by the same code; whatever else is found on disk is not believed."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from planted import digits

import epsball as eb
from epsball.auditing import remembered, run
from epsball.auditing.results import Canaries, Report
from epsball.auditing.run import canaries

THEN = "2026-01-02T03:04:05+00:00"
CODE = "0" * 32


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to remember in; source files as they were when this process began, whoever edits them now."""
    monkeypatch.setenv("EPSBALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "LOADED", time.time() + 3600)
    run._RIGHT.clear()
    yield tmp_path / "cache"
    run._RIGHT.clear()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The norms of every time that planted models were really judged, which here says that all is well."""
    times: list[tuple[str, ...]] = []
    monkeypatch.setattr(run, "misjudged", lambda _look, norms: times.append(norms) or [])
    return times


def new_process() -> None:
    run._RIGHT.clear()


def test_the_same_code_judges_them_once(kept: Path, asked: list[tuple[str, ...]]) -> None:
    first = canaries(("linf", "flow"))
    assert canaries(("linf",)) == first  # a flow has no dual norm: nothing more to judge
    new_process()
    assert canaries(("linf",)) == first
    assert asked == [("linf",)]
    finding, judged = first
    assert (finding.id, finding.status) == ("canaries", "pass")
    assert [path.name for path in kept.iterdir()] == [f"canaries-{judged.code}.json"]
    assert json.loads((kept / f"canaries-{judged.code}.json").read_bytes()) == {"judged": judged.judged, "code": judged.code}


def test_each_set_of_norms_is_judged_for_itself(kept: Path, asked: list[tuple[str, ...]]) -> None:
    codes = {canaries(threats)[1].code for threats in (("linf",), ("l2",), ("l1", "l2"), ("l2", "l1", "linf"))}
    assert asked == [("linf",), ("linf", "l2"), ("linf", "l2", "l1")]
    assert len(codes) == len([*kept.iterdir()]) == 3


def test_what_was_misjudged_is_judged_again(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "misjudged", lambda _look, _norms: ["noise: 3 of 24 samples can be broken and were not"])
    finding, _ = canaries(("linf",))
    assert finding.status == "block"
    assert "3 of 24" in finding.message
    assert not kept.exists()
    monkeypatch.setattr(run, "misjudged", lambda _look, _norms: [])
    assert canaries(("linf",))[0].status == "pass"


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a source file": lambda patch: patch.setattr(remembered, "_sources", lambda *_: "other"),
    "torch": lambda patch: patch.setattr(torch, "__version__", "0.0"),
    "the processor": lambda patch: patch.setattr(remembered, "_processor", lambda: "other"),
    "the number format": lambda patch: patch.setattr(torch, "get_default_dtype", lambda: torch.float64),
    "threads": lambda patch: patch.setattr(torch, "get_num_threads", lambda: 77),
    "autocast": lambda patch: patch.setattr(torch, "is_autocast_enabled", lambda _: True),
}


@pytest.mark.parametrize("what", CHANGES)
def test_any_change_of_what_decides_judges_them_again(
    what: str, kept: Path, asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = canaries(("linf",))[1]
    new_process()
    CHANGES[what](monkeypatch)
    after = canaries(("linf",))[1]
    assert len(asked) == 2
    assert before.code != after.code
    assert len([*kept.iterdir()]) == 2


BAD = {
    "nothing": b"",
    "half": b'{"judged": "2026-01-02T03:04:05+00:00", "co',
    "no object": b"[]",
    "null": b"null",
    "no text": b"\xff\xfe",
    "of another digest": json.dumps({"judged": THEN, "code": "1" * 32}).encode(),
    "without a digest": json.dumps({"judged": THEN}).encode(),
    "more than it should hold": json.dumps({"judged": THEN, "code": CODE, "also": 1}).encode(),
    "no date": json.dumps({"judged": "yesterday", "code": CODE}).encode(),
    "a number for a date": json.dumps({"judged": 1767323045, "code": CODE}).encode(),
    "a date to come": json.dumps({"judged": "9998-01-01T00:00:00+00:00", "code": CODE}).encode(),
    "a date out of range": json.dumps({"judged": "0001-01-01T00:00:00+23:59", "code": CODE}).encode(),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_is_not_as_written_is_not_believed(
    what: str, kept: Path, asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "digest", lambda *_: CODE)
    kept.mkdir()
    path = kept / f"canaries-{CODE}.json"
    path.write_bytes(BAD[what])
    assert remembered.recall(CODE) is None
    canaries(("linf",))
    new_process()
    canaries(("linf",))
    assert len(asked) == 1  # and what is written instead is
    assert [one.name for one in kept.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written_is_no_error(
    kept: Path, asked: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("long" * 100)):
        monkeypatch.setenv("EPSBALL_CACHE", str(place))
        new_process()
        assert canaries(("linf",))[0].status == "pass"
    assert len(asked) == 3
    assert not kept.exists()


def test_a_write_that_fails_leaves_nothing_behind(kept: Path, asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_source: str, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert canaries(("linf",))[0].status == "pass"
    assert [*kept.iterdir()] == []


def test_an_empty_variable_remembers_nothing(kept: Path, asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPSBALL_CACHE", "")
    canaries(("linf",))
    new_process()
    canaries(("linf",))
    assert remembered.folder() is None
    assert len(asked) == 2
    assert not kept.exists()


@pytest.mark.parametrize(
    ("system", "variables", "place"),
    [
        ("linux", {}, "/home/ada/.cache/epsball"),
        ("linux", {"XDG_CACHE_HOME": "/scratch"}, "/scratch/epsball"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/ada/.cache/epsball"),
        ("darwin", {"XDG_CACHE_HOME": "/scratch"}, "/home/ada/Library/Caches/epsball"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/epsball"),
        ("win32", {}, "/home/ada/AppData/Local/epsball"),
        ("linux", {"EPSBALL_CACHE": "/mine", "XDG_CACHE_HOME": "/scratch"}, "/mine"),
        ("win32", {"EPSBALL_CACHE": "mine"}, "mine"),
    ],
)
def test_where_it_is_kept(system: str, variables: dict[str, str], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EPSBALL_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setattr(sys, "platform", system)
    assert remembered.folder() == Path(place)


def test_without_a_home_it_is_kept_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("EPSBALL_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    assert remembered.folder() is None


def test_every_source_file_counts(tmp_path: Path) -> None:
    def told() -> str:
        remembered._sources.cache_clear()
        return remembered._sources(tmp_path, time.time() + 3600)

    assert told() == ""  # a package without source files could be any
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.py").write_text("")
    seen = {told()}
    (tmp_path / "note.txt").write_text("not code")
    assert {told()} == seen
    (tmp_path / "a.py").write_text("x = 2\n")
    seen.add(told())
    (tmp_path / "a.py").rename(tmp_path / "c.py")
    seen.add(told())
    (tmp_path / "sub" / "b.py").unlink()
    seen.add(told())
    assert len(seen) == 4
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    assert told() == ""  # one that cannot be read
    remembered._sources.cache_clear()


def test_code_written_after_it_was_loaded_is_not_what_runs(kept: Path, asked: list[tuple[str, ...]], tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    written = (tmp_path / "a.py").stat().st_mtime
    os.utime(tmp_path / "a.py", (written - 9999, written - 9999))  # as unpacked from an archive: the inode still tells
    remembered._sources.cache_clear()
    assert remembered._sources(tmp_path, written - 1) == ""
    assert remembered._sources(tmp_path, written + 10) != ""
    assert remembered.recall("") is None
    remembered.keep(Canaries(judged=THEN, code=""))
    assert not kept.exists()


def test_the_report_says_when_they_were_judged(kept: Path, asked: list[tuple[str, ...]], tmp_path: Path) -> None:
    def audited(name: str) -> tuple[Report, str]:
        report = eb.audit("digits-standard", digits(20), "linf:0.1", effort="fast", out=tmp_path / name)
        assert Report.model_validate_json((tmp_path / name / "report.json").read_bytes()) == report
        return report, " ".join((tmp_path / name / "report.html").read_text().split())

    report, page = audited("first")
    assert report.canaries is not None
    assert report.started <= report.canaries.judged <= datetime.datetime.now(datetime.UTC).isoformat()
    assert f"judged {report.canaries.judged}, in this run, by code {report.canaries.code}" in page
    (path,) = kept.iterdir()
    path.write_text(json.dumps({"judged": "2026-01-02T04:04:05+01:00", "code": report.canaries.code}))
    new_process()
    again, page = audited("again")
    assert again.canaries == Canaries(judged=THEN, code=report.canaries.code)
    assert f"judged {THEN}, not again in this run, by code {report.canaries.code}" in page
    assert again.models[0].findings == report.models[0].findings
    assert len(asked) == 1
