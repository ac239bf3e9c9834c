"""Tables in the Hugging Face image layout: Parquet files, and whatever the ``datasets`` library reads from local files."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from epsball.data.decode import Item, decode
from epsball.data.files import one_line, regular_file
from epsball.data.sample import Rows
from epsball.data.source import BYTES, Source
from epsball.errors import BadInput

_IMAGE = ("image", "img")
_LABEL = ("label", "labels", "fine_label", "target", "y")


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        package = name.partition(".")[0]
        raise BadInput(f"data: reading this needs {package}; pip install {package}, or pip install 'epsball[{extra}]'") from exc


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files in a folder or in its ``data`` folder, sorted by name."""
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))


def _column(names: list[str], wanted: tuple[str, ...], what: str) -> str:
    found = next((name for name in wanted if name in names), None)
    if found is None:
        have = ", ".join(repr(n) for n in names[:12])
        raise BadInput(f"data: no {what} column among {have}; rename it to {wanted[0]!r}")
    return found


def _feature_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    """Class names from the Hugging Face metadata of a Parquet file; none where it is absent or odd."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(n, str) for n in names) else ()


def _encoded(value: Any, row: int) -> Item:
    """One cell of an image column: bytes, or a struct with bytes."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise BadInput(f"data: row {row} of the table has no image bytes; write the images into the table (embed them)")
    return f"row {row}", content


def _take(files: list[Any], column: str, rows: Rows) -> list[Item]:
    """The image cells of ``rows``, reading only the row groups that hold any of them."""
    items: dict[int, Item] = {}
    wanted = np.sort(rows)
    start = 0
    for file in files:
        for group in range(file.metadata.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            inside = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, stop)]
            if len(inside):
                cells = file.read_row_group(group, columns=[column]).column(column)
                for row, cell in zip(inside.tolist(), cells.take(inside - start).to_pylist(), strict=True):
                    items[row] = _encoded(cell, row)
            start = stop
    return [items[row] for row in rows.tolist()]


def _choose_files(path: Path, split: str) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = parquet_files(path)
    chosen = [p for p in found if p.name.startswith(split)]
    if not chosen and len(found) > 1:
        raise BadInput(
            f"split: no file of {str(path)!r} starts with {split!r} (first is {found[0].name!r}); choose a split or name the file"
        )
    return chosen or found


def parquet(path: Path, split: str) -> Source:
    """Parquet in the Hugging Face image layout: ``image`` = {bytes, path} or bytes, ``label`` = whole numbers or text.

    Args:
        path: a file, or a folder whose file names start with the split (``test-00000-of-00001.parquet``).
        split: picks the files of a folder.
    """
    paths = [regular_file(p, "data") for p in _choose_files(path, split)]
    pq = _library("pyarrow.parquet", "store")
    arrow = _library("pyarrow", "store")
    try:
        files = [pq.ParquetFile(p) for p in paths]
        names = list(files[0].schema_arrow.names)
        image, label = _column(names, _IMAGE, "image"), _column(names, _LABEL, "label")
        cells = [v for file in files for v in file.read(columns=[label]).column(label).to_pylist()]
        metadata = files[0].schema_arrow.metadata
    except (arrow.ArrowException, OSError) as exc:
        raise BadInput(f"data: {str(paths[0])!r} cannot be read as Parquet ({one_line(exc, 80)}); write it again") from exc

    def take(rows: Rows) -> tuple[Any, tuple[str, ...]]:
        try:
            items = _take(files, image, rows)
        except (arrow.ArrowException, OSError) as exc:
            raise BadInput(f"data: images of {str(path)!r} cannot be read ({one_line(exc, 80)}); write it again") from exc
        return decode(items)

    return _table(path.name, cells, take, _feature_names(metadata, label), (f"{path.name}: images from {image!r}, labels from {label!r}",))


def _table(name: str, cells: list[Any], take: Any, names: tuple[str, ...], notes: tuple[str, ...]) -> Source:
    if not cells:
        raise BadInput(f"data: {name!r} is empty; give at least two samples")
    empty = sum(cell is None for cell in cells)
    if empty:
        raise BadInput(f"labels: {empty} of {len(cells)} are missing in {name!r}; remove those rows")
    try:
        labels = np.asarray(cells)
    except ValueError as exc:
        raise BadInput(f"labels: the rows of {name!r} have different shapes; give one class a row") from exc
    return Source(name, len(cells), labels, lambda: BYTES, take, names, notes)


def _open_hugging_face(datasets: Any, path: Path, split: str, cache: str) -> Any:
    """A local data set; the builder is named, so that no script is ever looked for, neither here nor on a server."""
    if path.is_dir() and any((path / mark).exists() for mark in ("dataset_dict.json", "dataset_info.json")):
        return datasets.load_from_disk(str(path))
    if path.is_dir() and not parquet_files(path):
        return datasets.load_dataset("imagefolder", data_dir=str(path), cache_dir=cache)
    files = {split: [str(regular_file(p, "data")) for p in _choose_files(path, split)]}
    kind = "arrow" if path.suffix == ".arrow" else "parquet"
    return datasets.load_dataset(kind, data_files=files, cache_dir=cache)


@contextmanager
def _no_progress(datasets: Any) -> Iterator[None]:
    """Progress bars of ``datasets`` off, and back on afterwards if they were."""
    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()


def hugging_face(place: str, split: str) -> Source:
    """A local file or folder through the ``datasets`` library (extra ``hf``): saved data sets, image folders, Parquet, Arrow."""
    path = Path(place)
    if not path.exists():
        raise BadInput(f"data: hf: reads local files only and {place!r} does not exist; download the data set and give its path")
    datasets = _library("datasets", "hf")
    with _no_progress(datasets), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        try:
            found = _open_hugging_face(datasets, path, split, cache)
            if isinstance(found, dict):
                if split not in found and len(found) != 1:
                    raise BadInput(f"split: {split!r} is not in {place!r}, which has {', '.join(map(repr, found))}; choose one of these")
                found = found[split] if split in found else next(iter(found.values()))
            return _hugging_face_source(datasets, found.with_format(None), path.name)
        except BadInput:
            raise
        except Exception as exc:  # the library has no exception tree of its own
            raise BadInput(f"data: datasets cannot read {place!r} ({one_line(exc, 100)}); give a saved data set or Parquet") from exc


def _hugging_face_source(datasets: Any, found: Any, name: str) -> Source:
    image, label = _column(found.column_names, _IMAGE, "image"), _column(found.column_names, _LABEL, "label")
    # decoding stays with us: four formats and a size limit, whatever the library would accept
    raw = found.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    names = tuple(getattr(found.features[label], "names", None) or ())
    cells = list(raw[label])
    held = {k: _hugging_face_item(v, k) for k, v in enumerate(raw[image])}
    return _table(
        name, cells, lambda rows: decode([held[k] for k in rows.tolist()]), names, (f"{name}: read by datasets {datasets.__version__}",)
    )


def _hugging_face_item(value: Any, row: int) -> Item:
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
        return str(value["path"]), regular_file(value["path"], "data")
    return _encoded(value, row)
