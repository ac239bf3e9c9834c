"""Threat strings: read once, exactly, or refused in one line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epsball.errors import BadInput
from epsball.report.text import allowed, radius_of, symbol, unit
from epsball.threats import THREATS, Color, Composed, Flow, Linf, Rigid, is_input, kind_of, named, parse_threat
from epsball.threats.color import LUV, RGB

WHOLE = ("patch",)  # a side below 1 is refused


@given(
    st.sampled_from(sorted(set(THREATS) - set(WHOLE))),
    st.lists(st.tuples(st.integers(1, 255), st.integers(1, 255)), min_size=1, max_size=5),
)
def test_fractions_are_exact_and_sorted(name: str, fractions: list[tuple[int, int]]) -> None:
    spec = parse_threat(f"{name}:" + ",".join(f"{a}/{b}" for a, b in fractions))
    assert spec.name == name
    assert list(spec.radii) == sorted({a / b for a, b in fractions})
    assert len(spec.texts) == len(spec.radii)
    assert spec.threat.name == name


def test_words_are_kept_as_asked() -> None:
    spec = parse_threat(" LINF: 8/255 , 0.1,2 / 255 ")
    assert spec.name == "linf"
    assert spec.radii == (2 / 255, 8 / 255, 0.1)
    assert parse_threat("l2:1e-2").radii == (0.01,)


BAD = (
    "", ":", "linf", "linf:", "linf:,", "linf:0", "linf:-1", "linf:nan", "linf:inf", "linf:1e400", "linf:1/0", "linf:0/5", "linf:x", "l7:1",
    "patch:0.05", "patch:0.99,3", "flow", "color-lab:0.1", "color+linf", "color+linf:0.06", "color+linf:0.06,8/255", "linf:0.1+0.2",
    "color+linf:0.06+8/255+1", "color+linf:0.06+0", "color+l7:1+1", "color+:1+1", "+:1+1", "color+patch:0.06+3",
    "color+linf:0.03+8/255,0.06+8/255", "color+linf:0.03+4/255,0.06+0.0321",
    "linf:1/2/3", "linf:0.1,,0.2", "linf:0x10", "linf=0.1", "linf:1e999999999", "linf:1/1e400", "linf:١e400", "\n:1", "linf:1\n2",
)  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_nonsense_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_threat(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=12))
def test_any_text_parses_or_is_refused(text: str) -> None:
    for words in (text, "linf:" + text):
        try:
            spec = parse_threat(words)
        except BadInput:
            continue
        assert all(0 < r < float("inf") for r in spec.radii)


def test_unknown_names_tell_what_there_is() -> None:
    with pytest.raises(BadInput, match="linf"):
        named("l3")


# Several at once.


def composed(text: str) -> Composed:
    threat = parse_threat(text).threat
    assert isinstance(threat, Composed)
    return threat


def test_a_composition_is_its_parts_in_order_with_their_radii() -> None:
    spec = parse_threat(" Color-LUV+flow+linf:0.06 + 1 + 8/255 ")
    assert (spec.name, spec.radii, spec.texts) == ("color-luv+flow+linf", (0.06,), ("0.06 + 1 + 8/255",))
    threat = composed(str(spec))
    assert threat.name == spec.name
    assert [type(part).__name__ for part in threat.parts] == ["Color", "Flow", "Added"]
    assert [0.06 * budget for budget in threat.budgets] == pytest.approx([0.06, 1.0, 8 / 255])
    assert kind_of(threat) == "compose"
    assert not is_input(threat)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 255)), min_size=2, max_size=3),
    st.lists(st.integers(1, 12), min_size=1, max_size=4, unique=True),
)
def test_no_part_may_do_more_than_was_asked_at_any_radius(parts: list[tuple[int, int]], factors: list[int]) -> None:
    """In exact float64: radius * budget, which is what projections use, stays within each part's own radius."""
    name = "+".join(("flow", "linf", "l2")[: len(parts)])
    texts = ["+".join(f"{factor * above}/{below}" for above, below in parts) for factor in factors]
    spec = parse_threat(f"{name}:{','.join(texts)}")
    threat = composed(str(spec))
    assert len(spec.radii) == len(factors)
    for factor, radius in zip(sorted(factors), spec.radii, strict=True):
        for (above, below), budget in zip(parts, threat.budgets, strict=True):
            asked = factor * above / below
            assert radius * budget <= asked
            assert radius * budget == pytest.approx(asked, rel=1e-12)


def test_a_spec_makes_a_fresh_threat_each_time() -> None:
    for text in ("flow:1", "color+linf:0.06+8/255"):
        spec = parse_threat(text)
        assert spec.threat is not spec.threat
        assert parse_threat(str(spec)) == spec


def test_names_are_the_ones_that_threats_call_themselves() -> None:
    for name in THREATS:
        assert named(name).name == name
        assert named(name.upper()).name == name
    assert (named("color").space, Color().space, Color().name) == (RGB, LUV, "color-luv")
    assert isinstance(named("flow"), Flow)
    assert (named("rigid").degrees, named("rigid").pixels) == (30.0, 3.0)
    assert isinstance(named("rigid"), Rigid)
    assert isinstance(named("linf"), Linf)


def test_errors_name_the_fix() -> None:
    for text, fix in {
        "patch:0.05": "patch:5",
        "color+linf:0.06,8/255": "one for each",
        "color+patch:0.06+3": "Window",
        "color+linf:0.03+8/255,0.06+8/255": "double all parts or none",
        "fog:1": "use one of linf",
    }.items():
        with pytest.raises(BadInput, match=fix):
            parse_threat(text)


def test_every_threat_has_words_and_a_unit_in_reports() -> None:
    for name in THREATS:
        assert "under the threat" not in allowed(name, "1", image=True), name
        assert symbol(name)
    units = {"flow": "px", "color": "RGB", "color-luv": "CIELUV", "rigid": "of 30 deg, 3 px", "patch": "px"}
    assert {name: unit(name) for name in THREATS} == dict.fromkeys(THREATS, "") | units
    assert radius_of("color+linf", "0.06+8/255") == "0.06+8/255"
    assert symbol("color+linf") == "color + L∞"
    assert allowed("flow+color", "1", image=True).endswith("under the threat flow+color")
