"""Threat strings: read once, exactly, or refused in one line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epsball.errors import BadInput
from epsball.threats import THREATS, named, parse_threat


@given(st.sampled_from(sorted(THREATS)), st.lists(st.tuples(st.integers(1, 255), st.integers(1, 255)), min_size=1, max_size=5))
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
