"""NumPy archives and MNIST idx files, their declared sizes checked before a byte is allocated."""

from __future__ import annotations

import gzip
import re
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.lib import format as npy

from epsball.data.files import DEFLATE_LIMIT, one_line, open_zip, regular_file
from epsball.data.source import Array, Source, array_source
from epsball.errors import BadInput

_IDX = re.compile(r"images[-.]idx3-ubyte(\.gz)?$")


def _pairs(split: str) -> list[tuple[str, str]]:
    """Key pairs in order of preference; a split named in the key wins over an unnamed one."""
    named = [(f"x_{split}", f"y_{split}"), (f"X_{split}", f"y_{split}"), (f"{split}_images", f"{split}_labels")]
    return [*named, ("x", "y"), ("X", "y"), ("images", "labels")]


def _read_npy(archive: zipfile.ZipFile, key: str, path: Path) -> Array:
    """One array of a .npz; the header must describe exactly the bytes that follow, and never holds objects."""
    info = archive.getinfo(f"{key}.npy")
    try:
        with archive.open(info) as stream:
            version = npy.read_magic(stream)
            header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = header(stream)
            start = stream.tell()
            if dtype.hasobject:
                raise BadInput(f"data: {key!r} in {str(path)!r} holds Python objects, which would run code; save plain number arrays")
            if prod(shape) * dtype.itemsize != info.file_size - start:
                raise BadInput(
                    f"data: {key!r} in {str(path)!r} claims shape {shape} but holds {info.file_size - start} bytes; write it again"
                )
            flat = np.frombuffer(stream.read(), dtype=dtype)
    except BadInput:
        raise
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as exc:
        raise BadInput(f"data: {key!r} in {str(path)!r} cannot be read ({one_line(exc, 80)}); write it again") from exc
    return flat.reshape(shape, order="F" if fortran else "C")


def npz(path: Path, split: str) -> Source:
    """A NumPy archive with keys x, y, or x_<split>, y_<split>, or images, labels (also ``<split>_images``)."""
    with open_zip(regular_file(path, "data"), "data") as archive:
        keys = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        pair = next(((a, b) for a, b in _pairs(split) if a in keys and b in keys), None)
        if pair is None:
            found = ", ".join(repr(k) for k in keys[:12]) or "none"
            raise BadInput(f"data: {str(path)!r} has keys {found}; name the arrays x and y, or x_{split} and y_{split}")
        x, y = (_read_npy(archive, key, path) for key in pair)
    return array_source(path.name, x, y, (), (f"{path.name}: images from {pair[0]!r}, labels from {pair[1]!r}",))


def is_idx_name(name: str) -> bool:
    """Whether a file name is that of an idx images file, such as ``t10k-images-idx3-ubyte.gz``."""
    return _IDX.search(name) is not None


def idx_files(folder: Path) -> list[Path]:
    """The idx images files in a folder, sorted by name."""
    return sorted(p for p in folder.iterdir() if is_idx_name(p.name))


def _read_idx(path: Path, axes: int) -> Array:
    """An idx file of unsigned bytes: magic 0x0000080<axes>, big-endian sizes, then exactly their product in bytes."""
    size = regular_file(path, "data").stat().st_size
    packed = path.suffix == ".gz"
    field = f"data: idx file {str(path)!r}"
    try:
        with cast(IO[bytes], gzip.open(path, "rb") if packed else open(path, "rb")) as stream:
            head = stream.read(4 + 4 * axes)
            if len(head) < 4 + 4 * axes or head[:4] != bytes((0, 0, 8, axes)):
                raise BadInput(f"{field} starts with {head[:4].hex()}, not 0000080{axes}; give an idx file of unsigned bytes")
            shape = tuple(int(v) for v in np.frombuffer(head, dtype=">u4", offset=4))
            expected, limit = prod(shape), size * DEFLATE_LIMIT if packed else size - len(head)
            body = stream.read(expected + 1) if expected <= limit else b""
    except (OSError, EOFError, zlib.error, MemoryError) as exc:
        raise BadInput(f"{field} cannot be read ({one_line(exc, 80)}); download it again") from exc
    if len(body) != expected or expected > limit:
        raise BadInput(f"{field} claims {'x'.join(map(str, shape))} bytes but does not hold them exactly; download it again")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def _pick(folder: Path, split: str) -> Path:
    found = idx_files(folder)
    marks = ("t10k", "test") if split == "test" else (split,)
    chosen = [p for p in found if any(mark in p.name for mark in marks)]
    if len(chosen) != 1 and len(found) != 1:
        names = ", ".join(repr(p.name) for p in found[:6])
        raise BadInput(f"split: {split!r} matches {len(chosen)} of the idx files {names}; name the images file itself")
    return chosen[0] if len(chosen) == 1 else found[0]


def idx(path: Path, split: str) -> Source:
    """MNIST's own files: a folder of them (``split`` picks t10k or train) or the images file; labels lie beside it."""
    images = _pick(path, split) if path.is_dir() else path
    stem = images.name.removesuffix(".gz")
    beside = stem.replace("images", "labels").replace("idx3", "idx1")
    options = [images.with_name(beside), images.with_name(beside + ".gz")]
    labels = next((p for p in options if p.exists()), None)
    if labels is None:
        raise BadInput(f"data: no labels beside {str(images)!r}; put {beside} or {beside}.gz into the same folder")
    return array_source(images.name, _read_idx(images, 3), _read_idx(labels, 1))
