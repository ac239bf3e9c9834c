"""SVG figures that stand alone: colors for light and dark pages inside, pictures embedded, nothing fetched.

Every function returns a complete document and escapes the text it is given. Rates use the charts of `epsball.report.svg`.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from epsball.report import svg as charts
from epsball.report.text import clean

_STYLE = """<style>
svg{--paper:#fdfdfc;--ink:#16181d;--soft:#5b616e;--rule:#e3e5e9;--gray:#a3a9b5;
--c0:#0b62a8;--c1:#bf4a06;--c2:#00755a;--c3:#98387d;--c4:#7d6200;--c5:#4b5060}
@media (prefers-color-scheme:dark){svg{--paper:#121418;--ink:#e9ebef;--soft:#a2a9b6;--rule:#2c313a;--gray:#6d7584;
--c0:#62b4f6;--c1:#f79a5e;--c2:#45cfa2;--c3:#e394cd;--c4:#e0c24a;--c5:#b9bfcc}}
text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif;fill:var(--ink)}
.tick,.label,.small{fill:var(--soft)}.number{font-weight:600}
.c0{--accent:var(--c0)}.c1{--accent:var(--c1)}.c2{--accent:var(--c2)}.c3{--accent:var(--c3)}.c4{--accent:var(--c4)}.c5{--accent:var(--c5)}
.muted{--accent:var(--gray)}.axis{stroke:var(--gray)}.grid{stroke:var(--rule)}.line{stroke:var(--accent);stroke-width:2;fill:none}
.doubt{stroke:var(--accent);stroke-width:1.6;opacity:.75;fill:none}.band{fill:var(--accent);opacity:.14}
.dot{fill:var(--accent);stroke:var(--paper)}.hollow{fill:var(--paper);stroke:var(--accent)}.bar{fill:var(--accent);opacity:.85}
.whisker{stroke:var(--ink)}.goal{stroke:var(--soft);stroke-width:2}.paper{fill:var(--paper)}
.cell{fill:var(--c1)}.mark{stroke:var(--soft);stroke-dasharray:4 3}.face{stroke:var(--paper);stroke-width:.3}.name{fill:var(--accent)}
</style>"""
_DASHES = ("", "8 4", "3 3", "9 3 2 3", "14 4")
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 16.0, 14.0, 44.0
_HIGH, _LOW = np.array([217.0, 95.0, 2.0]), np.array([0.0, 90.0, 181.0])  # told apart by every common kind of color vision


@dataclass(frozen=True)
class Curve:
    """One line of a chart: points (x, y) in order, and its name at its right end and in the legend."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Tile:
    """One picture with a few words below: values in [0, 1], (H, W), (1, H, W) or (3, H, W)."""

    pixels: ArrayLike
    words: str = ""


@dataclass(frozen=True)
class Scale:
    """Numbers from low to high at places on the page from start to end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where the number lies."""
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.end - self.start)

    def ticks(self) -> Iterator[float]:
        """Round numbers inside the range, seven at most."""
        span = (self.high - self.low) or 1.0
        power = 10.0 ** math.floor(math.log10(span / 6))
        step = power * next(m for m in (1, 2, 5, 10) if span / (m * power) <= 6)
        yield from (step * i for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1))


def rates(title: str, description: str, series: Sequence[charts.Series], ticks: Sequence[tuple[float, str]], x_label: str) -> str:
    """Rates in [0, 1] with bands against a number from 0 up, and a legend; see `epsball.report.svg.line_chart`."""
    chart = charts.line_chart("f", title, description, series, ticks, x_label)
    found = re.match(r'<svg viewBox="0 0 (\S+) (\S+)"', chart)
    assert found is not None
    width, height = float(found.group(1)), float(found.group(2))
    legend, taken = _legend([(s.name, s.index) for s in series], width, height)
    body = chart.partition("</desc>")[2].removesuffix("</svg>")
    return _document(title, description, width, height + taken, body + legend)


def bars(title: str, description: str, rows: Sequence[charts.Bar], index: int = 0) -> str:
    """Horizontal bars of rates in [0, 1] with intervals; see `epsball.report.svg.bars`."""
    names = max((len(row.name) for row in rows), default=8) * 7.0 + 14
    notes = max((len(row.note) for row in rows), default=0) * 6.5 + 75
    chart = charts.bars("f", title, description, rows, index, (names, 220.0, notes))
    return _document(title, description, names + 220 + notes, 24.0 * len(rows) + 4, chart.partition("</desc>")[2].removesuffix("</svg>"))


def lines(
    title: str,
    description: str,
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    marks: Sequence[float] = (),
    size: tuple[float, float] = (520.0, 300.0),
    legend: bool = True,
) -> str:
    """Any numbers against any numbers; `marks` are x where an upright dashed line stands. Without `legend`, alike and unnamed."""
    width, height = size
    xs = [float(x) for curve in curves for x in curve.xs] or [0.0, 1.0]
    ys = [float(y) for curve in curves for y in curve.ys] or [0.0, 1.0]
    across = Scale(min(xs), max(xs), _LEFT, width - _RIGHT - 14)
    up = Scale(min(ys), max(ys), height - _BOTTOM, _TOP)
    parts = [_axes(across, up, x_label, y_label, height)]
    parts += [f'<line x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{up.start:g}" y2="{up.end:g}" class="mark"/>' for x in marks]
    for index, curve in enumerate(curves):
        points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in zip(curve.xs, curve.ys, strict=True))
        kind = f'line {charts.color(index)}" stroke-dasharray="{_DASHES[index % len(_DASHES)]}' if legend else "doubt c0"
        parts.append(f'<polyline points="{points}" class="{kind}"/>')
    names, taken = _legend([(curve.name, index) for index, curve in enumerate(curves)] if legend else [], width, height)
    return _document(title, description, width, height + taken, "".join(parts) + names)


def histogram(
    title: str,
    description: str,
    groups: Sequence[tuple[str, Sequence[float]]],
    x_label: str,
    bins: int = 30,
    size: tuple[float, float] = (520.0, 260.0),
) -> str:
    """How often numbers fall into equal bins, several groups in the same bins, as steps."""
    everything = [float(v) for _, values in groups for v in values] or [0.0, 1.0]
    low, high = min(everything), max(everything)
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    curves = []
    for name, values in groups:
        counts = np.histogram(np.asarray(values, dtype=np.float64), edges)[0]
        corners = [(edge, count) for pair, count in zip(pairwise(edges), counts, strict=True) for edge in pair]
        corners = [(float(edges[0]), 0), *corners, (float(edges[-1]), 0)]
        curves.append(Curve(name, [float(x) for x, _ in corners], [float(y) for _, y in corners]))
    return lines(title, description, curves, x_label, "how many", size=size)


def matrix(
    title: str,
    description: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]] | None = None,
    top: float = 1.0,
    corner: str = "",
) -> str:
    """A heat map with its numbers: (rows, columns) of values from 0 to `top`; NaN stays empty.

    `texts` replaces what the cells say (percent of `top` by default); `corner` says what rows and columns are.
    """
    left = max([len(name) for name in rows] + [len(corner)]) * 6.8 + 14
    cell = max(58.0, max((len(name) for name in columns), default=0) * 6.8 + 10)
    head, tall = 30.0, 30.0
    parts = [_text(6, head - 11, corner, "small")]
    parts += [_text(left + cell * (j + 0.5), head - 11, name, "tick", "middle") for j, name in enumerate(columns)]
    for i, name in enumerate(rows):
        y = head + tall * i
        parts.append(_text(left - 8, y + tall / 2 + 4, name, "tick", "end"))
        for j, value in enumerate(values[i]):
            if value != value:
                continue
            share = min(1.0, max(0.0, value / top))
            said = texts[i][j] if texts is not None else f"{100 * share:.1f}"
            parts.append(
                f'<rect x="{left + cell * j + 1:.1f}" y="{y + 1:.1f}" width="{cell - 2:.1f}" height="{tall - 2:.1f}" rx="2" class="cell" '
                f'fill-opacity="{0.06 + 0.6 * share:.3f}"/>{_text(left + cell * (j + 0.5), y + tall / 2 + 4, said, "", "middle")}'
            )
    return _document(title, description, left + cell * len(columns) + 6, head + tall * len(rows) + 6, "".join(parts))


def images(title: str, description: str, grid: Sequence[Sequence[Tile]], side: float = 68.0, names: Sequence[str] = ()) -> str:
    """Rows of pictures with words below each; `names` stand left of the rows."""
    left = max((len(name) for name in names), default=0) * 6.8 + (14 if names else 4)
    worded = any(tile.words for row in grid for tile in row)
    gap, below = 6.0, 17.0 if worded else 6.0
    parts = []
    for i, row in enumerate(grid):
        y = 4 + i * (side + below)
        if names:
            parts.append(_text(left - 8, y + side / 2 + 4, names[i], "tick", "end"))
        for j, tile in enumerate(row):
            x = left + j * (side + gap)
            parts.append(
                f'<image x="{x:.1f}" y="{y:.1f}" width="{side:g}" height="{side:g}" style="image-rendering:pixelated" '
                f'href="{_png(np.asarray(tile.pixels, dtype=np.float64))}"/>'
            )
            if tile.words:
                parts.append(_text(x + side / 2, y + side + 12, tile.words, "small", "middle"))
    wide = left + max((len(row) for row in grid), default=0) * (side + gap) + 4
    return _document(title, description, wide, 8 + len(grid) * (side + below), "".join(parts))


def surface(
    title: str,
    description: str,
    heights: ArrayLike,
    x_label: str,
    y_label: str,
    z_label: str,
    top: float | None = None,
    size: tuple[float, float] = (460.0, 300.0),
) -> str:
    """A surface seen from above at an angle: heights (rows along y, columns along x), from 0 up to `top` (their largest).

    Faces are drawn from the back to the front; blue is low, orange is high.
    """
    z = np.asarray(heights, dtype=np.float64)
    width, height = size
    low, high = min(0.0, float(z.min())), float(z.max()) if top is None else top
    rise, depth = height * 0.5, height * 0.3
    base, left, span, shear = height - 40.0, 24.0, width * 0.54, width * 0.2
    count_y, count_x = z.shape

    def at(i: int, j: int) -> tuple[float, float]:
        back = i / max(count_y - 1, 1)
        lift = (min(z[i, j], high) - low) / ((high - low) or 1.0)
        return left + span * j / max(count_x - 1, 1) + shear * back, base - depth * back - rise * lift

    parts = []
    for i in range(count_y - 2, -1, -1):
        for j in range(count_x - 1):
            corners = [at(i, j), at(i, j + 1), at(i + 1, j + 1), at(i + 1, j)]
            share = (float(z[i : i + 2, j : j + 2].mean()) - low) / ((high - low) or 1.0)
            red, green, blue = (_LOW + min(1.0, share) * (_HIGH - _LOW)).astype(int)
            points = " ".join(f"{x:.0f},{y:.0f}" for x, y in corners)
            parts.append(f'<path d="M{points.replace(" ", "L")}Z" fill="#{red:02x}{green:02x}{blue:02x}" class="face"/>')
    parts.append(_text(left + span / 2, height - 16, x_label, "label", "middle"))
    parts.append(_text(left + span + shear / 2 + 12, base - depth / 2 + 16, y_label, "label"))
    parts.append(_text(8, 16, f"{z_label}, {low:.3g} .. {high:.3g}", "label"))
    return _document(title, description, width, height, "".join(parts))


def _axes(across: Scale, up: Scale, x_label: str, y_label: str, height: float) -> str:
    parts = []
    for value in up.ticks():
        y = up(value)
        parts.append(f'<line x1="{across.start:g}" x2="{across.end:g}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(_text(across.start - 7, y + 4, f"{value:.6g}", "tick", "end"))
    parts.append(f'<line x1="{across.start:g}" x2="{across.end:g}" y1="{up.start:g}" y2="{up.start:g}" class="axis"/>')
    for value in across.ticks():
        x = across(value)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up.start:g}" y2="{up.start + 4:g}" class="axis"/>')
        parts.append(_text(x, up.start + 17, f"{value:.6g}", "tick", "middle"))
    parts.append(_text((across.start + across.end) / 2, height - 8, x_label, "label", "middle"))
    middle = (up.start + up.end) / 2
    parts.append(f'<g transform="rotate(-90 13 {middle:.1f})">{_text(13, middle, y_label, "label", "middle")}</g>')
    return "".join(parts)


def _legend(names: Sequence[tuple[str, int]], width: float, y: float) -> tuple[str, float]:
    """Pieces of line with their names, in rows below `y`; and the room that they take."""
    parts, x, row = [], 12.0, 0
    for name, index in names:
        wide = 40 + 7.0 * len(name) + 14
        if x > 12 and x + wide > width:
            x, row = 12.0, row + 1
        at = y + 10 + 18 * row
        kind, dash = charts.color(index), _DASHES[index % len(_DASHES)]
        parts.append(f'<line x1="{x:.1f}" x2="{x + 30:.1f}" y1="{at:.1f}" y2="{at:.1f}" class="line {kind}" stroke-dasharray="{dash}"/>')
        parts.append(_text(x + 36, at + 4, name, "tick"))
        x += wide
    return "".join(parts), (18.0 * (row + 1) + 6 if names else 0.0)


def _document(title: str, description: str, width: float, height: float, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-labelledby="f-t f-d"><title id="f-t">{escape(clean(title))}</title><desc id="f-d">{escape(clean(description))}</desc>'
        f'{_STYLE}<rect width="100%" height="100%" class="paper"/>{body}</svg>\n'
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(clean(text))}</text>'


def _png(values: NDArray[np.float64]) -> str:
    """Values in [0, 1] as a data URI."""
    from PIL import Image

    pixels = np.moveaxis(values, 0, 2) if values.ndim == 3 else values
    pixels = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    stream = io.BytesIO()
    Image.fromarray(np.round(255 * pixels.clip(0, 1)).astype(np.uint8)).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
