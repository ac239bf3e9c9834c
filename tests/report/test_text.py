import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epsball.auditing.results import Rate
from epsball.report.text import allowed, clean, duration, interval, percent, symbol


@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=80))
def test_clean_leaves_nothing_that_hides_or_steers(text):
    shown = clean(text)
    assert all(c.isprintable() or c in "\u200c\u200d" for c in shown)
    assert not any(unicodedata.category(c) in {"Cc", "Cs", "Co", "Zl", "Zp"} for c in shown)
    assert clean(shown) == shown
    shown.encode("utf-8")


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain name-1.0", "plain name-1.0"),
        ("数字 ünï é", "数字 ünï é"),
        ("a\nb\tc\u2028d\xa0e", "a b c d e"),
        ("\x1b[2Jx", "\\x1b[2Jx"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\udc80", "\\udc80"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
        ("[bold]x[/bold]", "[bold]x[/bold]"),
    ],
)
def test_clean_examples(raw, shown):
    assert clean(raw) == shown


def test_clean_keeps_names_apart_that_differ_in_hidden_characters():
    assert clean("cat") != clean("cat\u200b")


@given(st.text(max_size=300), st.integers(7, 60))
def test_clean_limits_length(text, limit):
    assert len(clean("x" * len(text), limit)) <= limit


@given(st.floats(0, 1))
def test_percent_never_rounds_to_certainty(value):
    shown = percent(value)
    assert (shown == "100.0 %") == (value == 1)
    assert (shown == "0.0 %") == (value == 0)


def test_numbers_in_words():
    assert percent(0.413) == "41.3 %"
    assert interval(Rate(value=0.413, low=0.382, high=0.444, count=413, n=1000)) == "[38.2, 44.4]"
    assert allowed("linf", "8/255", image=True) == "every pixel value may move by 8/255"
    assert "input value" in allowed("linf", "8/255", image=False)
    assert "\\u202e" in allowed("flow\u202e", "1", image=True)
    assert symbol("linf") == "L∞"
    assert symbol("patch") == "patch"
    assert [duration(s) for s in (0.0, 0.01, 59.96, 3599.8)] == ["0.0 s", "<0.1 s", "1 min 0 s", "1 h 0 min"]
