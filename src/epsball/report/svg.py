"""Charts as inline SVG: a line chart with confidence bands and horizontal bars with intervals. Colors come from the page's CSS.

Model number i is told apart three ways, so that neither color vision nor a printer matters: class `c{i % 6}`, marker, dash.
Every function escapes the text it is given and returns a complete `<svg>` element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from epsball.report.text import clean, percent

_COLORS = 6
_DASHES = ("", "8 4", "3 3", "9 3 2 3", "14 4")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 350.0, 250.0, 47.0, 14.0, 12.0, 44.0


@dataclass(frozen=True)
class Point:
    """A rate with its interval at one radius; `solid` is false where the number is not trustworthy."""

    x: float
    value: float
    low: float
    high: float
    solid: bool = True


@dataclass(frozen=True)
class Series:
    """One model's curve, points in ascending x; `floor` holds (x, certified accuracy)."""

    name: str
    index: int
    points: tuple[Point, ...]
    floor: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Bar:
    """One bar: a rate with its interval, a short note at its end, and optionally a tick at the clean accuracy."""

    name: str
    value: float
    low: float
    high: float
    note: str = ""
    tick: float | None = None
    muted: bool = False


def color(index: int) -> str:
    """CSS class of model number `index`."""
    return f"c{index % _COLORS}"


def line_chart(ident: str, title: str, description: str, series: Sequence[Series], ticks: Sequence[tuple[float, str]], x_label: str) -> str:
    """Rates in [0, 1] against a radius from 0 up.

    Args:
        ident: unique in the page; names the title and description for screen readers.
        title: short title, read aloud and not drawn.
        description: what the chart shows, in a sentence, read aloud.
        series: the curves.
        ticks: (radius, text) along the bottom.
        x_label: text under the axis.
    """
    top = max([x for x, _ in ticks] + [p.x for s in series for p in s.points], default=0.0) or 1.0
    parts = [_axes(ticks, top, x_label)]
    parts += [_band(s, top) for s in series]
    parts += [_floor(s, top) for s in series]
    parts += [_curve(s, top) for s in series]
    return _svg(ident, title, description, _WIDTH, _HEIGHT, "".join(parts))


def _px(x: float, top: float) -> float:
    return _LEFT + x / top * (_WIDTH - _LEFT - _RIGHT)


def _py(value: float) -> float:
    return _TOP + (1 - min(1.0, max(0.0, value))) * (_HEIGHT - _TOP - _BOTTOM)


def _svg(ident: str, title: str, description: str, width: float, height: float, body: str) -> str:
    name = escape(clean(ident))
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{name}-t {name}-d" xmlns="http://www.w3.org/2000/svg">'
        f'<title id="{name}-t">{escape(clean(title))}</title><desc id="{name}-d">{escape(clean(description))}</desc>{body}</svg>'
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(clean(text))}</text>'


def _axes(ticks: Sequence[tuple[float, str]], top: float, x_label: str) -> str:
    parts = []
    for quarter in range(5):
        y = _py(quarter / 4)
        parts.append(
            f'<line x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}" class="{"axis" if quarter == 0 else "grid"}"/>'
        )
        parts.append(_text(_LEFT - 7, y + 4, f"{25 * quarter} %" if quarter == 4 else f"{25 * quarter}", "tick", "end"))
    taken = float("-inf")
    for x, text in ticks:
        at, text = _px(x, top), clean(text, 12)
        half = 3.4 * len(text)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_py(0):.1f}" y2="{_py(0) + 4:.1f}" class="axis"/>')
        if at - half > taken:  # labels that would run into each other keep their tick and lose their text
            parts.append(_text(min(at, _WIDTH - half), _py(0) + 17, text, "tick", "middle"))
            taken = at + half + 4
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_label, "label", "middle"))
    return "".join(parts)


def _band(series: Series, top: float) -> str:
    """The interval as an area, over every stretch of neighboring trustworthy points."""
    stretches: list[list[Point]] = [[]]
    for point in series.points:
        if point.solid:
            stretches[-1].append(point)
        else:
            stretches.append([])
    areas = []
    for stretch in (s for s in stretches if len(s) > 1):
        edge = [(p.x, p.high) for p in stretch] + [(p.x, p.low) for p in reversed(stretch)]
        corners = " ".join(f"{_px(x, top):.1f},{_py(v):.1f}" for x, v in edge)
        areas.append(f'<polygon points="{corners}" class="band {color(series.index)}"/>')
    return "".join(areas)


def _floor(series: Series, top: float) -> str:
    """Certified accuracy: a thin line with a flat cap at each radius, like the bottom of a bracket."""
    spots = [(_px(x, top), _py(v)) for x, v in series.floor]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    caps = "".join(
        f'<line x1="{x - 6:.1f}" x2="{x + 6:.1f}" y1="{y:.1f}" y2="{y:.1f}" class="cap {color(series.index)}"/>' for x, y in spots
    )
    return (f'<polyline points="{line}" class="floor {color(series.index)}"/>' if len(spots) > 1 else "") + caps


def _curve(series: Series, top: float) -> str:
    parts = []
    for a, b in pairwise(series.points):
        kind, dash = ("line", _DASHES[series.index % len(_DASHES)]) if a.solid and b.solid else ("doubt", "1.5 4")
        parts.append(
            f'<line x1="{_px(a.x, top):.1f}" y1="{_py(a.value):.1f}" x2="{_px(b.x, top):.1f}" y2="{_py(b.value):.1f}"'
            f' class="{kind} {color(series.index)}" stroke-dasharray="{dash}"/>'
        )
    for p in series.points:
        said = f"{percent(p.value)} [{100 * p.low:.1f}, {100 * p.high:.1f}]" if p.solid else "not trustworthy yet"
        hint = f"<title>{escape(clean(series.name, 80))} at {p.x:g}: {said}</title>"
        parts.append(_marker(_px(p.x, top), _py(p.value), series.index, p.solid, hint))
    return "".join(parts)


def _marker(x: float, y: float, index: int, solid: bool = True, inner: str = "", size: float = 4.6) -> str:
    kind = f'class="{"dot" if solid else "hollow"} {color(index)}"'
    if index % 5 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" {kind}>{inner}</circle>'
    shapes = {
        1: ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        2: ((0, -1.2), (1.15, 0.85), (-1.15, 0.85)),
        3: ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        4: ((0, 1.2), (1.15, -0.85), (-1.15, -0.85)),
    }
    corners = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in shapes[index % 5])
    return f'<polygon points="{corners}" {kind}>{inner}</polygon>'


def icon(index: int) -> str:
    """A short piece of a model's line with its marker, for legends and headings; decoration, hidden from screen readers."""
    dash = _DASHES[index % len(_DASHES)]
    line = f'<line x1="0" x2="30" y1="8" y2="8" class="line {color(index)}" stroke-dasharray="{dash}"/>'
    return f'<svg viewBox="0 0 30 16" class="icon" aria-hidden="true">{line}{_marker(15, 8, index)}</svg>'


def bars(
    ident: str, title: str, description: str, rows: Sequence[Bar], index: int, widths: tuple[float, float, float] = (92.0, 206.0, 134.0)
) -> str:
    """Horizontal bars from 0 to 100 % with intervals; the model's color, or gray for muted bars.

    `widths`: room for the names, the bars, and the numbers with their notes.
    """
    name_width, span, note_width = widths
    width = name_width + span + note_width
    pitch = 24.0
    height = pitch * len(rows) + 4
    parts = []
    for edge in (0.0, 0.5, 1.0):
        x = name_width + edge * span
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height:g}" class="{"grid" if edge else "axis"}"/>')
    parts += [_bar(bar, index, pitch * number + pitch / 2 + 2, name_width, span) for number, bar in enumerate(rows)]
    return _svg(ident, title, description, width, height, "".join(parts))


def _bar(bar: Bar, index: int, y: float, left: float, span: float) -> str:
    kind = "muted" if bar.muted else color(index)
    at = {name: left + min(1.0, max(0.0, v)) * span for name, v in (("value", bar.value), ("low", bar.low), ("high", bar.high))}
    label = _text(left - 8, y + 4, clean(bar.name, max(4, int(left / 7))), "tick", "end")
    parts = [
        f"<g><title>{escape(clean(bar.name, 200))}</title>{label}</g>",
        f'<rect x="{left:.1f}" y="{y - 7:.1f}" width="{at["value"] - left:.1f}" height="14" rx="1.5" class="bar {kind}"/>',
        f'<line x1="{at["low"]:.1f}" x2="{at["high"]:.1f}" y1="{y:.1f}" y2="{y:.1f}" class="whisker"/>',
    ]
    parts += [f'<line x1="{at[e]:.1f}" x2="{at[e]:.1f}" y1="{y - 4:.1f}" y2="{y + 4:.1f}" class="whisker"/>' for e in ("low", "high")]
    if bar.tick is not None:
        x = left + min(1.0, max(0.0, bar.tick)) * span
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 9:.1f}" y2="{y + 9:.1f}" class="goal"/>')
    parts.append(_text(left + span + 60, y + 4, percent(bar.value), "number", "end"))
    parts.append(_text(left + span + 67, y + 4, bar.note, "small"))
    return "".join(parts)
