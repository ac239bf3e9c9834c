"""Image folders: ``root/class/image.png``, classes in sorted order of their names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from epsball.data.decode import SUFFIXES, Item, decode
from epsball.data.files import regular_file
from epsball.data.source import BYTES, Source
from epsball.errors import BadInput

_SPLITS = ("train", "test", "val", "valid", "validation")


def _members(folder: Path, root: Path) -> list[Path]:
    """Visible members, sorted by name; `BadInput` for one that leads out of the root (a symlink elsewhere)."""
    found = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
    for member in found:
        if member.is_symlink() and not member.resolve().is_relative_to(root):
            raise BadInput(f"data: {str(member)!r} is a link that leaves the folder; copy the file into it")
    return found


def _descend(root: Path, split: str) -> tuple[Path, list[str]]:
    """``root`` itself, or its part for ``split`` where its folders are named train, test, val."""
    folders = [p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    if not folders or not all(name in _SPLITS for name in folders):
        return root, []
    wanted = (split, "val", "valid", "validation") if split == "test" else (split,)
    chosen = next((name for name in wanted if name in folders), None)
    if chosen is None:
        raise BadInput(f"split: {split!r} is not in {str(root)!r}, which has {', '.join(sorted(folders))}; choose one of these")
    return root / chosen, [f"images were read from the folder {chosen!r}"]


def image_folder(path: Path, split: str) -> Source:
    """A folder with one folder for each class; their sorted names are the classes 0, 1, ...

    Raises:
        BadInput: no class folders, a class without an image, a link that leaves the folder, a member that is no regular file.
    """
    root = path.resolve()
    start, notes = _descend(root, split)
    items: list[Item] = []
    labels: list[int] = []
    skipped = 0
    classes = [p for p in _members(start, root) if p.is_dir()]
    for label, folder in enumerate(classes):
        members = _members(folder, root)
        images = [p for p in members if p.suffix.lower() in SUFFIXES]
        skipped += len(members) - len(images)
        if not images:
            raise BadInput(f"data: class folder {str(folder)!r} holds no image ({', '.join(SUFFIXES)}); add some or remove the folder")
        items += [(f"{folder.name}/{p.name}", regular_file(p, "data")) for p in images]
        labels += [label] * len(images)
    if not classes:
        raise BadInput(f"data: {str(path)!r} has no class folders; arrange the images as folder/class/image.png")
    names = tuple(folder.name for folder in classes)
    notes.append(f"classes are the folder names in sorted order: {names[0]!r} is 0, {names[-1]!r} is {len(names) - 1}")
    if skipped:
        notes.append(f"{skipped} files that are no images were left out")
    return Source(
        path.name or root.name,
        len(items),
        np.array(labels, dtype=np.int64),
        lambda: BYTES,
        lambda rows: decode([items[k] for k in rows]),
        names,
        tuple(notes),
    )
