"""Labels of any common kind, brought to int64, and mapped onto the model's order of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from epsball.errors import BadInput

LabelKind = Literal["auto", "classes", "multilabel"]
LABEL_KINDS = ("auto", "classes", "multilabel")
ClassOrder = Mapping[Any, int] | Sequence[int] | Sequence[str]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Labels:
    """``values`` int64, (N,) classes or (N, C) zeros and ones; ``names`` of the classes where known; what was done."""

    values: Ints
    names: tuple[str, ...]
    notes: tuple[str, ...]


def _whole(y: npt.NDArray[Any]) -> Ints:
    """Numbers of any type as int64; `BadInput` where they are not whole, not finite or too large."""
    if y.dtype.kind not in "buif":
        raise BadInput(f"labels: type {y.dtype} is not a label; give whole numbers")
    wrong = ~np.isfinite(y) if y.dtype.kind == "f" else np.zeros(y.shape, dtype=bool)
    if y.dtype.kind == "f":
        wrong |= y != np.floor(np.where(wrong, 0, y))
    if wrong.any():
        where = np.argwhere(wrong)[0]
        raise BadInput(f"labels: {int(wrong.sum())} are not whole numbers, first {y[tuple(where)]} at row {where[0]}; give class indices")
    if (y > 2**31).any():
        raise BadInput(f"labels: {y.max()} is no class index; count classes from 0")
    if (y < 0).any():
        where = np.argwhere(y < 0)[0]
        raise BadInput(f"labels: {int((y < 0).sum())} are negative, first {y[tuple(where)]} at row {where[0]}; count classes from 0")
    return y.astype(np.int64)


def _columns(y: Ints, kind: LabelKind) -> tuple[Ints, list[str]]:
    """(N, C) zeros and ones: one-hot classes, or multi-label rows left as they are."""
    if y.shape[1] == 1 and kind != "multilabel":
        return y[:, 0], ["labels arrived as one column; it was taken as the class"]
    if (y > 1).any():
        raise BadInput(f"labels: shape {tuple(y.shape)} with values up to {y.max()} is neither one-hot nor multi-label; give (N,) classes")
    one_hot = bool((y.sum(1) == 1).all())
    if kind == "classes" and not one_hot:
        row = int(np.argmax(y.sum(1) != 1))
        raise BadInput(f"labels: row {row} names {int(y[row].sum())} classes, not one; give one class a row, or ask for multi-label")
    if kind != "multilabel" and one_hot:
        return y.argmax(1).astype(np.int64), [f"labels arrived one-hot over {y.shape[1]} classes; brought to class indices"]
    return y, [f"labels are multi-label: {y.shape[1]} classes, each 0 or 1"]


def read_labels(y: Any, count: int, kind: LabelKind = "auto", names: tuple[str, ...] = ()) -> Labels:
    """Labels as int64.

    Args:
        y: (N,) whole numbers of any type or strings, (N, 1), one-hot (N, C), or multi-label (N, C) zeros and ones.
        count: N, the number of images.
        kind: "auto" takes (N, C) as one-hot if every row has a single 1, and as multi-label otherwise.
        names: class names, index by index, where the source has them.

    Raises:
        BadInput: wrong length, negative, not whole, out of the range of ``names``, or a single class only.
    """
    if kind not in LABEL_KINDS:
        raise BadInput(f"label_kind: {kind!r} is unknown; choose one of {', '.join(LABEL_KINDS)}")
    try:
        raw = (y.float() if y.dtype == torch.bfloat16 else y).detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    except ValueError as exc:
        raise BadInput("labels: the rows have different lengths; give one label for each image") from exc
    if raw.ndim not in (1, 2) or len(raw) != count:
        raise BadInput(f"labels: shape {tuple(raw.shape)} for {count} images; give one label for each image")
    notes: list[str] = []
    if raw.ndim == 1 and raw.dtype.kind in "UT":
        found, raw = np.unique(raw, return_inverse=True)
        names = tuple(str(v) for v in found)
        notes.append(f"labels arrived as text; numbered in sorted order, {names[0]!r} is 0")
    values = _whole(raw)
    if raw.dtype.kind == "f":
        notes.append(f"labels arrived as {raw.dtype}; brought to int64")
    if values.ndim == 2:
        values, more = _columns(values, kind)
        notes += more
    elif kind == "multilabel":
        raise BadInput(f"labels: shape {tuple(values.shape)} is one class a row, not multi-label; give (N, C) zeros and ones")
    _check_classes(values, names)
    return Labels(values, names, tuple(notes))


def _check_classes(values: Ints, names: tuple[str, ...]) -> None:
    if values.ndim == 2:
        if names and len(names) != values.shape[1]:
            raise BadInput(f"labels: {values.shape[1]} columns for {len(names)} class names; give one name for each column")
        return
    if names and values.max() >= len(names):
        raise BadInput(f"labels: {values.max()} is out of range for {len(names)} class names; count classes from 0")
    if values.min() == values.max():
        raise BadInput(f"labels: all {len(values)} samples are of class {values[0]}; give data with at least two classes")


def _targets(classes: Ints, names: tuple[str, ...], order: ClassOrder) -> dict[int, Any]:
    """For each class present, the model's index for it, unchecked."""
    if isinstance(order, Mapping):
        found: dict[int, Any] = {}
        for c in classes.tolist():
            name = names[c] if names else None
            if c not in order and name not in order:
                raise BadInput(
                    f"class_order: class {c if name is None else repr(name)} of the data is missing; map every class to the model's index"
                )
            found[c] = order[c] if c in order else order[name]
        return found
    listed = list(order)
    if listed and all(isinstance(v, str) for v in listed):
        if not names:
            raise BadInput("class_order: it lists names, but the data has no class names; give the model's indices instead")
        missing = [names[c] for c in classes.tolist() if names[c] not in listed]
        if missing:
            raise BadInput(
                f"class_order: {len(missing)} of the data's classes are missing, first {missing[0]!r}; list every class of the model"
            )
        return {c: listed.index(names[c]) for c in classes.tolist()}
    if len(listed) <= int(classes.max()):
        raise BadInput(f"class_order: {len(listed)} entries, but the labels reach {int(classes.max())}; give one entry for each class")
    if len(set(listed)) != len(listed):
        raise BadInput("class_order: two classes get the same index; give each class its own")
    return {c: listed[c] for c in classes.tolist()}


def reorder(labels: Labels, order: ClassOrder) -> Labels:
    """Labels renumbered into the model's order of classes.

    Args:
        labels: (N,) classes.
        order: a mapping from class name or index to the model's index; or a sequence of the model's class names in its order;
            or a sequence of ints, entry ``c`` the model's index for the data's class ``c``.

    >>> reorder(Labels(np.array([0, 1]), ("cat", "dog"), ()), ["dog", "cat"]).values.tolist()
    [1, 0]
    """
    if labels.values.ndim != 1:
        raise BadInput("class_order: multi-label columns cannot be renumbered here; give class_order to the model instead")
    if isinstance(order, (str, bytes)) or not isinstance(order, (Mapping, Sequence)):
        raise BadInput(f"class_order: {order!r} is no order; give a mapping, a list of names or a list of indices")
    classes = np.unique(labels.values)
    targets = _targets(classes, labels.names, order)
    for c, target in targets.items():
        if isinstance(target, bool) or not isinstance(target, (int, np.integer)) or not 0 <= target < 2**31:
            raise BadInput(f"class_order: class {c} maps to {target!r}; give the model's index, counted from 0")
    table = np.zeros(int(classes.max()) + 1, dtype=np.int64)
    table[classes] = [targets[c] for c in classes.tolist()]
    values = table[labels.values]
    if values.min() == values.max():
        raise BadInput(f"class_order: every class maps to {values[0]}; keep at least two classes")
    moved = sum(c != t for c, t in targets.items())
    note = f"labels were mapped to the model's class order ({moved} of {len(targets)} classes changed their index)"
    return Labels(values, _names(labels.names, targets, order), (*labels.notes, note))


def _names(names: tuple[str, ...], targets: dict[int, Any], order: ClassOrder) -> tuple[str, ...]:
    if not isinstance(order, Mapping) and all(isinstance(v, str) for v in order):
        return tuple(str(v) for v in order)
    if not names:
        return ()
    renamed = [str(k) for k in range(max(targets.values()) + 1)]
    for c, target in targets.items():
        renamed[target] = names[c]
    return tuple(renamed)
