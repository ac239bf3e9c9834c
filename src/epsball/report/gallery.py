"""Pictures of broken samples, read from the evidence file: clean, adversarial and the difference amplified.

Nothing here can fail a report: whatever is missing or damaged becomes a sentence. Only the rows shown are read.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsball.auditing.results import ModelReport, Report
from epsball.report.text import clean, radius_of
from epsball.report.view import class_names

_SHOWN, _LARGEST, _SMALL = 4, 192, 96
# Bytes divided by 255 and stored floats differ in the last bits; less than this share of the input range is no change.
_INVISIBLE = 1e-6
# Orange for lighter, blue for darker, white for unchanged: told apart by every common kind of color vision.
_LIGHTER, _DARKER = np.array([217, 95, 2], dtype=np.float64), np.array([0, 90, 181], dtype=np.float64)

Array = NDArray[Any]


@dataclass(frozen=True)
class Picture:
    """One broken sample as three PNG data URIs with what is known about it."""

    clean: str
    adversarial: str
    difference: str
    gain: int
    label: str
    predicted: str
    radius_text: str
    size: str
    pixelated: bool


@dataclass(frozen=True)
class Panel:
    """The pictures of one model under one threat, or the sentence that says why there are none."""

    threat: str
    broken: int
    pictures: tuple[Picture, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """All panels of a report: `panels[i]` belongs to model i; `note` replaces everything when the file cannot be used."""

    panels: tuple[tuple[Panel, ...], ...] = ()
    note: str = ""
    image: tuple[bool, ...] = field(default=())


def load(report: Report, evidence: Path | None) -> Gallery:
    """Read what the gallery shows. A missing or damaged file gives a gallery that is one sentence."""
    if evidence is None:
        return Gallery(note="No evidence file was given, so there are no pictures.")
    if not Path(evidence).is_file():
        return Gallery(note="The evidence file is missing, so there are no pictures.")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(evidence), framework="numpy") as tensors:
            names = frozenset(tensors.keys())
            panels = tuple(tuple(_panels(model, index, tensors, names)) for index, model in enumerate(report.models))
            image = tuple(f"m{i}/x" in names and _is_image(_shape(tensors, f"m{i}/x")) for i in range(len(report.models)))
    except (SafetensorError, OSError, ValueError, TypeError, IndexError, KeyError) as error:
        return Gallery(note=f"The evidence file could not be read, so there are no pictures: {clean(str(error), 160)}")
    return Gallery(panels, image=image)


def _panels(model: ModelReport, index: int, tensors: Any, names: frozenset[str]) -> Iterator[Panel]:
    for threat in dict.fromkeys(result.threat for result in model.results if not result.union):
        prefix = f"m{index}/{threat}"
        needed = {f"m{index}/x", f"m{index}/y", f"{prefix}/rows", f"{prefix}/x_adv", f"{prefix}/radius"}
        if not needed <= names:
            yield Panel(threat, 0, note="The evidence file holds nothing for this threat.")
        elif not _is_image(_shape(tensors, f"m{index}/x")):
            shape = " x ".join(str(side) for side in _shape(tensors, f"m{index}/x")[1:])
            yield Panel(threat, 0, note=f"Pictures are shown for image-shaped inputs only; these inputs have shape {shape or 'scalar'}.")
        else:
            yield _panel(model, index, threat, tensors, names)


def _panel(model: ModelReport, index: int, threat: str, tensors: Any, names: frozenset[str]) -> Panel:
    prefix = f"m{index}/{threat}"
    labels, rows, radii = (tensors.get_tensor(key) for key in (f"m{index}/y", f"{prefix}/rows", f"{prefix}/radius"))
    count = len(rows)
    fits = len(radii) == count == _shape(tensors, f"{prefix}/x_adv")[0] and _shape(tensors, f"m{index}/x")[0] == len(labels)
    if not fits or (count and (rows.min() < 0 or rows.max() >= len(labels))):
        return Panel(threat, 0, note="The evidence for this threat does not fit together, so it is not shown.")
    extra = {key: tensors.get_tensor(f"{prefix}/{key}") for key in ("predicted", "size") if f"{prefix}/{key}" in names}
    texts = {result.radius: result.radius_text for result in model.results if result.threat == threat}
    pictures: list[Picture] = []
    for k in _varied(rows, radii, labels):
        before = _unit(tensors.get_slice(f"m{index}/x")[int(rows[k]) : int(rows[k]) + 1][0], model.box)
        after = _unit(tensors.get_slice(f"{prefix}/x_adv")[k : k + 1][0], model.box)
        if before.shape != after.shape:
            return Panel(threat, 0, note="The evidence for this threat does not fit together, so it is not shown.")
        if np.abs(after - before).max() < _INVISIBLE:  # wrong from the start: nothing to see
            continue
        facts = _facts(model, int(labels[rows[k]]), k, extra, threat)
        facts["radius_text"] = radius_of(threat, texts.get(float(radii[k]), f"{radii[k]:.4g}"))
        pictures.append(_picture(before, after, facts))
        if len(pictures) == _SHOWN:
            break
    note = "" if pictures else "No broken sample to show: nothing was changed, or nothing was broken."
    return Panel(threat, count, tuple(pictures), note)


def _varied(rows: Array, radii: Array, labels: Array) -> list[int]:
    """Smallest radius first, but one of each class before the second of any; at most 64, so that reading stays cheap."""
    order = np.lexsort((rows, radii))
    seen: dict[int, int] = {}
    ranked = []
    for position, k in enumerate(order.tolist()):
        label = int(labels[rows[k]])
        ranked.append((seen.get(label, 0), position, k))
        seen[label] = seen.get(label, 0) + 1
    return [k for _, _, k in sorted(ranked)[:64]]


def _facts(model: ModelReport, label: int, k: int, extra: Mapping[str, Array], threat: str) -> dict[str, str]:
    names = class_names(model)
    predicted = extra.get("predicted")
    size = extra.get("size")
    return {
        "label": names.get(label, str(label)),
        "predicted": "" if predicted is None else names.get(int(predicted[k]), str(int(predicted[k]))),
        "size": "" if size is None else radius_of(threat, f"{float(size[k]):.3g}"),
    }


def _shape(tensors: Any, name: str) -> tuple[int, ...]:
    return tuple(tensors.get_slice(name).get_shape())


def _is_image(shape: tuple[int, ...]) -> bool:
    return len(shape) in (3, 4) and min(shape[-2:]) > 1 and (len(shape) == 3 or shape[1] in (1, 3, 4))


def _unit(sample: Array, box: tuple[float, float]) -> NDArray[np.float64]:
    """One sample as (H, W, C) in [0, 1]: uint8 means /255, anything else is scaled by the box."""
    low, high = (0.0, 255.0) if sample.dtype == np.uint8 else box
    values = (np.nan_to_num(sample.astype(np.float64), nan=low, posinf=high, neginf=low) - low) / ((high - low) or 1.0)
    return np.moveaxis(values, 0, -1) if values.ndim == 3 else values[..., None]


def _picture(before: NDArray[np.float64], after: NDArray[np.float64], facts: dict[str, str]) -> Picture:
    # Differences are taken in three colors at most: a transparency channel is shown, not compared.
    delta = (after - before)[..., :3]
    gain = max(1, min(10_000, int((1 + 1e-6) / np.abs(delta).max()))) if np.abs(delta).any() else 1
    return Picture(
        clean=_png(before),
        adversarial=_png(after),
        difference=_png(_diverging(np.clip(delta * gain, -1, 1))),
        gain=gain,
        pixelated=max(before.shape[:2]) < _SMALL,
        **facts,
    )


def _diverging(delta: NDArray[np.float64]) -> NDArray[np.float64]:
    """Signed change in [-1, 1] as colors: one channel on a blue-white-orange scale, three channels around middle gray."""
    if delta.shape[-1] == 3:
        return 0.5 + 0.5 * delta
    strength = np.sqrt(np.abs(delta))  # square root: small changes stay visible beside the largest
    target = np.where(delta > 0, _LIGHTER, _DARKER) / 255
    return 1 + strength * (target - 1)


def _png(image: NDArray[np.float64]) -> str:
    from PIL import Image

    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if max(picture.size) > _LARGEST:
        picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.BOX)
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
