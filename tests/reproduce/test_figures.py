import re
from xml.etree import ElementTree

import numpy as np
import pytest

from epsball.report.svg import Bar, Point, Series
from epsball.reproduce import figures
from epsball.reproduce.figures import Curve, Scale, Tile

NS = "{http://www.w3.org/2000/svg}"
SERIES = [Series("a & b", 0, (Point(0.0, 1.0, 0.9, 1.0), Point(0.1, 0.5, 0.4, 0.6)))]
ALL = {
    "lines": figures.lines("<t>", "d", [Curve("a & b", [0, 1, 2], [-3, 0, 5])], "x", "y", marks=(1.0,)),
    "unnamed": figures.lines("<t>", "d", [Curve("a & b", [0, 1], [1, 1])], "x", "y", legend=False),
    "histogram": figures.histogram("<t>", "d", [("a & b", [1, 2, 2]), ("same", [2, 2, 2])], "x"),
    "matrix": figures.matrix("<t>", "d", ["a & b"], ["c", "d"], [[0.25, float("nan")]]),
    "images": figures.images("<t>", "d", [[Tile(np.zeros((28, 28)), "a & b"), Tile(np.ones((3, 8, 8)))]], names=("row",)),
    "surface": figures.surface("<t>", "d", np.arange(12.0).reshape(3, 4), "x", "y", "a & b"),
    "rates": figures.rates("<t>", "d", SERIES, [(0.0, "0"), (0.1, "0.1")], "radius"),
    "bars": figures.bars("<t>", "d", [Bar("a & b", 0.4, 0.3, 0.5)]),
}


@pytest.mark.parametrize("kind", list(ALL))
def test_every_figure_stands_alone(kind):
    root = ElementTree.fromstring(ALL[kind])
    assert root.tag == NS + "svg"
    assert root.find(NS + "title").text == "<t>"
    assert float(root.get("width")) > 0
    assert "prefers-color-scheme:dark" in root.find(NS + "style").text
    for link in re.findall(r'(?:href|src)="([^"]*)"', ALL[kind]):
        assert link.startswith("data:image/png;base64,")
    assert "url(" not in ALL[kind]
    assert "a & b" not in ALL[kind]
    assert "a &amp; b" in ALL[kind] or kind == "unnamed"
    used = set(re.findall(r'class="([^"]+)"', ALL[kind].partition("</style>")[2]))
    styled = set(re.findall(r"\.([a-z0-9]+)[{,]", root.find(NS + "style").text))
    assert {word for group in used for word in group.split()} <= styled, "a class without a style is black on black"


def test_points_lie_where_the_numbers_say():
    line = next(ElementTree.fromstring(ALL["lines"]).iter(NS + "polyline")).get("points")
    spots = [tuple(map(float, spot.split(","))) for spot in line.split()]
    assert spots[1][0] == pytest.approx((spots[0][0] + spots[2][0]) / 2, abs=0.1)
    assert (spots[0][1] - spots[1][1]) / (spots[0][1] - spots[2][1]) == pytest.approx(3 / 8, abs=0.01)


def test_ticks_are_round_and_inside():
    assert list(Scale(-10, 10, 0, 1).ticks()) == [-10, -5, 0, 5, 10]
    assert list(Scale(0, 1, 0, 1).ticks()) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert list(Scale(3, 3, 0, 1).ticks()) == [3]


def test_a_matrix_shows_percent_and_leaves_nan_empty():
    texts = [t.text for t in ElementTree.fromstring(ALL["matrix"]).iter(NS + "text")]
    assert "25.0" in texts
    assert len([r for r in ElementTree.fromstring(ALL["matrix"]).iter(NS + "rect") if r.get("class") == "cell"]) == 1
    asked = figures.matrix("t", "d", ["a"], ["b"], [[3.0]], [["three"]], top=4.0)
    assert "three" in asked


def test_a_histogram_counts():
    shapes = list(ElementTree.fromstring(figures.histogram("t", "d", [("a", [0, 0, 0, 1])], "x", bins=2)).iter(NS + "polyline"))
    heights = [float(spot.split(",")[1]) for spot in shapes[0].get("points").split()]
    bottom = max(heights)
    assert (bottom - heights[1]) / (bottom - heights[3]) == pytest.approx(3, abs=0.05)


def test_a_surface_has_one_face_a_cell_and_orange_where_it_is_high():
    faces = list(ElementTree.fromstring(ALL["surface"]).iter(NS + "path"))
    assert len(faces) == 2 * 3
    red = [int(face.get("fill")[1:3], 16) for face in faces]
    assert max(red[:3]) > max(red[3:])  # drawn from the back, where the heights are
