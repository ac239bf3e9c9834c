from xml.etree import ElementTree

from epsball.report.svg import Bar, Point, Series, bars, color, icon, line_chart

NS = "{http://www.w3.org/2000/svg}"


def chart(series, ticks=((0.0, "0"), (0.1, "0.1"), (0.2, "0.2"))):
    return ElementTree.fromstring(line_chart("c", "title", "said", series, ticks, "radius"))


def test_points_lie_where_the_numbers_say():
    points = (Point(0.0, 1.0, 0.9, 1.0), Point(0.1, 0.5, 0.4, 0.6), Point(0.2, 0.0, 0.0, 0.1))
    spots = [(float(c.get("cx")), float(c.get("cy"))) for c in chart([Series("a", 0, points)]).iter(NS + "circle")]
    assert spots[0][0] < spots[1][0] < spots[2][0]
    assert abs(spots[1][0] - (spots[0][0] + spots[2][0]) / 2) < 0.11
    assert abs(spots[1][1] - (spots[0][1] + spots[2][1]) / 2) < 0.11
    assert spots[0][1] < spots[2][1]


def test_untrusted_points_are_hollow_without_band_on_a_dotted_line():
    points = (Point(0.0, 1.0, 0.9, 1.0), Point(0.1, 0.5, 0.4, 0.6, solid=False), Point(0.2, 0.2, 0.1, 0.3))
    drawn = chart([Series("a", 0, points)])
    assert [c.get("class").split()[0] for c in drawn.iter(NS + "circle")] == ["dot", "hollow", "dot"]
    assert not [p for p in drawn.iter(NS + "polygon") if "band" in p.get("class")]
    assert len([line for line in drawn.iter(NS + "line") if "doubt" in line.get("class")]) == 2
    hints = [t.text for t in drawn.iter(NS + "title")]
    assert "not trustworthy yet" in hints[2]
    assert "50.0" not in hints[2]


def test_certified_accuracy_is_drawn_with_a_cap_at_each_radius():
    drawn = chart([Series("a", 0, (Point(0.0, 1.0, 0.9, 1.0),), floor=((0.1, 0.4), (0.2, 0.1)))])
    assert len([line for line in drawn.iter(NS + "line") if "cap" in line.get("class")]) == 2


def test_crowded_tick_labels_give_way():
    drawn = chart([], ticks=[(i / 100, f"0.{i:02d}") for i in range(60)])
    labels = [t for t in drawn.iter(NS + "text") if t.get("class") == "tick" and t.get("text-anchor") == "middle"]
    assert 2 < len(labels) < 15


def test_nothing_to_draw_is_still_a_chart():
    assert chart([], ticks=[]).tag == NS + "svg"
    assert ElementTree.fromstring(bars("b", "t", "d", [], 0)).tag == NS + "svg"


def test_models_differ_in_color_marker_and_dash():
    icons = [icon(i) for i in range(5)]
    assert len({color(i) for i in range(5)}) == 5
    assert len({i.split("stroke-dasharray=")[1].split("/>")[0] for i in icons}) == 5


def test_bars_escape_names_and_show_numbers():
    drawn = bars("b", "<t>", "d&d", [Bar('<script>"', 0.413, 0.38, 0.44, "of 100", tick=0.9)], 2)
    root = ElementTree.fromstring(drawn)
    assert root.find(NS + "title").text == "<t>"
    assert "41.3 %" in [t.text for t in root.iter(NS + "text")]
    assert "<script" not in drawn
