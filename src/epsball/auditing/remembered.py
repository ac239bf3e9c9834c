"""Canaries that were judged right before: remembered on disk, under a digest of all that decides how they are judged."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from epsball.auditing.results import Canaries
from epsball.errors import BadInput
from epsball.store import evidence

LOADED = time.time()
"""What is written to a source file after this is not what runs here."""


def digest(*words: str) -> str:
    """Hash of everything that decides a verdict on planted models, and of some words; empty where that cannot be told.

    Source files of epsball, Python and libraries, the processor, and how torch counts: number format, threads, precision.

    Cost: no rows; about 5 ms once in a process, for the source files, and a quarter of one after that.
    """
    sources = _sources(Path(__file__).parents[1], LOADED)
    return _hash(*words, sources, *_settings()) if sources else ""


@cache
def _sources(package: Path, loaded: float) -> str:
    """Hash of every source file; empty where there are none, or one cannot be read or was written after the code had been loaded."""
    try:
        found = sorted(package.rglob("*.py"))
        if not found or any(max(stat.st_mtime, stat.st_ctime) > loaded for stat in map(os.stat, found)):
            return ""
        return _hash(*(part for path in found for part in (path.relative_to(package).as_posix(), path.read_bytes())))
    except OSError:
        return ""


def _settings() -> Iterator[str]:
    """Libraries and their instruction set, the processor (planted models never leave it), and how torch counts."""
    import scipy

    yield from (sys.version, np.__version__, scipy.__version__, torch.__version__, torch.__config__.show())
    yield from (platform.system(), platform.machine(), _processor())
    yield from map(str, (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), torch.is_autocast_enabled("cpu")))
    yield from map(str, (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()))


@cache
def _processor() -> str:
    """Its name, where the system tells without starting another program."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next((line for line in lines if line.startswith("model name")), "")
    except OSError:
        return os.environ.get("PROCESSOR_IDENTIFIER", "")


def _hash(*parts: str | bytes) -> str:
    """Of the parts with their lengths, so that no two lists of parts are alike."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        blob = part.encode() if isinstance(part, str) else part
        found.update(f"{len(blob)}\0".encode() + blob)
    return found.hexdigest()


def folder() -> Path | None:
    """Where it is kept: EPSBALL_CACHE, nowhere if that is empty; else the user's cache folder by the custom of the system."""
    asked = os.environ.get("EPSBALL_CACHE")
    if asked is not None:
        return Path(asked) if asked else None
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home
        return None
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "epsball"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "epsball"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else home / ".cache") / "epsball"  # as the XDG directories have it: a relative path is ignored


def recall(code: str) -> Canaries | None:
    """When canaries were judged right under that digest before; None where that is not known, or not readable, or of another digest."""
    path = _path(code)
    if path is None:
        return None
    try:
        found = Canaries.model_validate_json(path.read_bytes(), strict=True)
        then = datetime.datetime.fromisoformat(found.judged).astimezone(datetime.UTC)
    except (OSError, ValueError, OverflowError, ValidationError):
        return None
    if found.code != code or then > datetime.datetime.now(datetime.UTC):
        return None
    return Canaries(judged=then.isoformat(timespec="seconds"), code=code)


def keep(judged: Canaries) -> None:
    """Remembers canaries that were judged right; where nothing can be written they are judged again next time."""
    path = _path(judged.code)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        evidence.atomic(path, judged.model_dump_json().encode() + b"\n")
    except (OSError, ValueError, BadInput):
        return


def _path(code: str) -> Path | None:
    place = folder()
    return place / f"canaries-{code}.json" if place is not None and code else None
