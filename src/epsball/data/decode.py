"""Image files to arrays: four formats, one size, nothing bigger than Pillow's bomb limit."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from epsball.data.files import one_line, regular_file
from epsball.data.source import Array
from epsball.errors import BadInput

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_GRAY = ("1", "L", "LA")
_COLOR = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB", "La", "RGBa")

Item = tuple[str, bytes | Path]  # a name for messages, and the encoded image or where it lies


def _with_image(item: Item, use: Callable[[Any], Any]) -> Any:
    """Open one image and use it; every fault of the file becomes one line."""
    from PIL import Image  # only where images are decoded

    name, place = item
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            stream = io.BytesIO(place) if isinstance(place, bytes) else regular_file(place, "data")
            with Image.open(stream, formats=FORMATS) as image:
                return use(image)
    except BadInput:
        raise
    except Exception as exc:  # a hostile file can raise nearly anything from a decoder
        raise BadInput(f"data: image {name!r} cannot be read ({one_line(exc, 100)}); give PNG, JPEG, WebP or BMP files") from exc


def _header(item: Item) -> tuple[tuple[int, int], str]:
    size, mode = _with_image(item, lambda image: (image.size, image.mode))
    if mode not in (*_GRAY, *_COLOR):
        raise BadInput(f"data: image {item[0]!r} has pixel mode {mode}, not 8-bit gray or color; convert it first")
    return size, mode


def decode(items: Sequence[Item]) -> tuple[Array, tuple[str, ...]]:
    """Images as stored (EXIF rotation is not applied): uint8 (N, H, W) if all are gray, else (N, H, W, 3), and what was done.

    Raises:
        BadInput: a file that is no image of the four formats, a bomb, 16-bit pixels, or two sizes.
    """
    headers = [_header(item) for item in items]
    size = headers[0][0]
    other = next((k for k, head in enumerate(headers) if head[0] != size), None)
    if other is not None:
        one, two = (f"{items[k][0]!r} is {headers[k][0][0]}x{headers[k][0][1]}" for k in (0, other))
        raise BadInput(f"data: images differ in size: {one}, {two} (width x height); bring them to one size first")
    modes = [mode for _, mode in headers]
    color = any(mode not in _GRAY for mode in modes)
    target = "RGB" if color else "L"
    shape = (len(items), size[1], size[0], *([3] if color else []))
    try:
        out = np.empty(shape, dtype=np.uint8)
    except MemoryError as exc:
        raise BadInput(f"data: {'x'.join(map(str, shape))} pixels do not fit into memory; take fewer samples with n") from exc
    for k, item in enumerate(items):
        out[k] = _with_image(item, lambda image: np.asarray(image.convert(target)))
    notes = []
    gray = sum(mode in _GRAY for mode in modes)
    if color and gray:
        notes.append(f"{gray} gray images of {len(items)} were repeated into three channels")
    alpha = sum(mode in ("LA", "RGBA", "PA", "La", "RGBa") for mode in modes)
    if alpha:
        notes.append(f"the transparency of {alpha} images was dropped")
    return out, tuple(notes)
