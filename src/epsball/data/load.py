"""The door for data: one function for names and paths, one for arrays; both end in the same normal form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epsball.data.files import one_line
from epsball.data.labels import ClassOrder, LabelKind, read_labels, reorder
from epsball.data.pixels import Box, Layout, check_box, normal_form
from epsball.data.sample import Rows, subset
from epsball.data.source import Array, Source, array_source
from epsball.errors import BadInput

FORMS = "a builtin name (digits), a .npz file, a folder of class folders, MNIST idx files, a .parquet file, or hf:PATH"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled samples in normal form.

    Attributes:
        x: (n, C, H, W) or (n, F) float32, inside the box.
        y: (n,) int64 classes, or (n, C) int64 zeros and ones (multi-label).
        name: the source's name.
        class_names: one name for each class, or empty where unknown.
        indices: (n,) int64, the position of each sample in the source's split.
        total: the size of that split.
        notes: one sentence for each thing that was done to the data.
    """

    x: Tensor
    y: Tensor
    name: str
    class_names: tuple[str, ...]
    indices: Tensor
    total: int
    notes: tuple[str, ...]


def _whole_number(field: str, value: Any, least: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise BadInput(f"{field}: {value!r} is not a whole number; give one")
    if least is not None and value < least:
        raise BadInput(f"{field}: {value} is too small; give at least {least}")
    return int(value)


def _choose(labels: Any, count: int, n: int | None, seed: int) -> tuple[Rows, list[str]]:
    everything = np.arange(count, dtype=np.int64)
    if n is None or n == count:
        return everything, []
    if n > count:
        return everything, [f"all {count} samples were taken; at most {n} were asked for"]
    how = "each class in proportion" if labels.ndim == 1 else "at random"
    return subset(labels, n, seed), [f"{n} of {count} samples, {how}, chosen by seed {seed}"]


def _assemble(
    source: Source, n: int | None, seed: int, layout: Layout, box: Box, order: ClassOrder | None = None, kind: LabelKind = "auto"
) -> Dataset:
    if n is not None:
        n = _whole_number("n", n, least=1)
    seed = _whole_number("seed", seed)
    box = check_box(box)
    labels = read_labels(source.labels, source.count, kind, source.class_names)
    if order is not None:
        labels = reorder(labels, order)
    rows, chosen = _choose(labels.values, source.count, n, seed)
    span = source.span()
    images, taken = source.take(rows)
    x, brought = normal_form(images, span, layout, box)
    notes = (*source.notes, *chosen, *taken, *brought, *labels.notes)
    y = torch.from_numpy(labels.values[rows])
    return Dataset(x, y, source.name, labels.names, torch.from_numpy(rows), source.count, notes)


def _as_array(x: Any) -> Array:
    if isinstance(x, Tensor):
        tensor = x.detach().cpu()
        return (tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor).numpy()
    try:
        return np.asarray(x)
    except ValueError as exc:
        raise BadInput("images: they have different shapes; bring them to one size first") from exc


def from_arrays(
    x: Any,
    y: Any,
    *,
    name: str = "arrays",
    n: int | None = None,
    seed: int = 0,
    layout: Layout = "auto",
    box: Box = (0.0, 1.0),
    class_names: tuple[str, ...] = (),
    label_kind: LabelKind = "auto",
) -> Dataset:
    """Arrays or tensors, brought to normal form.

    Args:
        x: (N, F), (N, H, W), (N, C, H, W), (N, H, W, C), or any (N, ...) with layout "raw"; uint8, or float in the box, or whole numbers
            0..255.
        y: (N,) whole numbers, one-hot (N, C), or multi-label (N, C).
        name: shown in reports.
        n: take a class-stratified subset of this size; None takes all, in order.
        seed: decides the subset.
        layout: the axes of ``x`` after the first; "auto" looks for an axis of 1, 3 or 4, and leaves (N, C, T) as it is where one side is
            below 8 and the other at least twice as long; "raw" leaves any shape as it is.
        box: the range of valid values; 0..255 is mapped onto it.
        class_names: one name for each class.
        label_kind: "classes" or "multilabel"; "auto" takes (N, C) as one-hot if every row has a single 1.

    Raises:
        BadInput: in one line, for whatever cannot be used: empty data, one class, values outside the box, an unclear layout,
            labels of the wrong length, negative or not whole.

    >>> data = from_arrays(np.full((4, 8, 8), 255, dtype=np.uint8), [0, 1, 0, 1])
    >>> tuple(data.x.shape), float(data.x.max()), data.notes[0]
    ((4, 1, 8, 8), 1.0, 'images arrived as uint8 8x8 (HW); brought to float32 1x8x8 in [0, 1], 0..255 mapped onto it')
    """
    source = array_source(name, _as_array(x), y, tuple(class_names))
    return _assemble(source, n, seed, layout, box, kind=label_kind)


def load_data(
    source: str | Path,
    *,
    n: int | None = None,
    seed: int = 0,
    split: str = "test",
    layout: Layout = "auto",
    box: Box = (0.0, 1.0),
    class_order: ClassOrder | None = None,
    label_kind: LabelKind = "auto",
) -> Dataset:
    """Read a data set by name or path, and bring it to normal form.

    Args:
        source: "digits"; a ``.npz`` (x, y, or x_test, y_test, or images, labels); a folder ``root/class/image.png``; MNIST idx
            files (a folder of them, or the images file); a ``.parquet`` file, or a folder of them, in the Hugging Face image
            layout; ``hf:PATH``, a local file or folder read by the ``datasets`` library.
        n, seed, layout, box, label_kind: as in `from_arrays`.
        split: which part, where the source has several.
        class_order: how the data's classes are numbered in the model: a mapping from class name or index to the model's
            index, the model's class names in its order, or the model's index of each class. Use this or the model's own
            ``class_order``, never both.

    Raises:
        BadInput: in one line, with the value and the fix. Only local regular files are read; nothing in them is executed.

    >>> data = load_data("digits", n=100)
    >>> tuple(data.x.shape), data.y.bincount().tolist(), data.total
    ((100, 1, 8, 8), [10, 10, 10, 10, 10, 10, 10, 10, 10, 10], 500)
    """
    try:
        opened = _open(str(source), split)
    except OSError as exc:  # a folder that may not be listed, say
        raise BadInput(f"data: {str(source)!r} cannot be read ({one_line(exc, 80)}); check the path and its permissions") from exc
    return _assemble(opened, n, seed, layout, box, class_order, label_kind)


def _open(source: str, split: str) -> Source:
    # the readers import their libraries only when they are needed
    if source == "digits":
        from epsball.data.digits import digits

        return digits(split)
    if source.startswith("hf:"):
        from epsball.data.tables import hugging_face

        return hugging_face(source.removeprefix("hf:"), split)
    if "://" in source:
        raise BadInput(f"data: {source!r} is an address; only local files are read, so download it and give the path")
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, split)
    return _open_file(path, split)


def _open_folder(path: Path, split: str) -> Source:
    from epsball.data import archives, folder, tables

    if archives.idx_files(path):
        return archives.idx(path, split)
    if tables.parquet_files(path):
        return tables.parquet(path, split)
    return folder.image_folder(path, split)


def _open_file(path: Path, split: str) -> Source:
    from epsball.data import archives, tables

    if path.suffix.lower() == ".npz":
        return archives.npz(path, split)
    if path.suffix.lower() == ".parquet":
        return tables.parquet(path, split)
    if archives.is_idx_name(path.name):
        return archives.idx(path, split)
    if not path.exists():
        raise BadInput(f"data: {str(path)!r} does not exist; give {FORMS}")
    raise BadInput(f"data: {str(path)!r} is of an unknown kind; give {FORMS}")
