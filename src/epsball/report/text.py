"""Words and numbers as every report shows them: hostile strings made harmless, rates and radii in plain English."""

from __future__ import annotations

import unicodedata

from epsball.auditing.results import Rate

# Joiners shape letters and emoji and cannot reorder or hide text, so names in Persian or with a family emoji stay whole.
_JOINERS = "\u200c\u200d"

# threat -> (symbol, what the adversary may do; {r} is the radius as the user wrote it, {value} "pixel value" or "input value")
_THREATS = {
    "linf": ("L∞", "every {value} may move by {r}"),
    "l2": ("L2", "the whole change may have Euclidean length {r} (L2)"),
    "l1": ("L1", "all changes together may add up to {r} (L1)"),
    "l0": ("L0, pixels", "up to {r} pixels may change at will (L0)"),
    "l0f": ("L0, features", "up to {r} input values may change at will (L0)"),
    "flow": ("flow", "every pixel may move by up to {r} px"),
    "color": ("color", "every color may turn into another, the same everywhere, by up to {r} in each of red, green and blue"),
    "color-luv": ("color, CIELUV", "every color may turn into another, the same everywhere, by up to {r} of each axis of CIELUV"),
    "rigid": ("rotation, shift", "the image may turn and move by up to {r} of 30 degrees and 3 pixels"),
    "patch": ("patch", "any square of {r} x {r} pixels may be painted over"),
}
UNION = "union"
# threat -> what its radius is counted in, where that is not the unit of the values themselves
_UNITS = {"flow": "px", "color": "RGB", "color-luv": "CIELUV", "rigid": "of 30 deg, 3 px", "patch": "px"}


def clean(text: str, limit: int = 0) -> str:
    r"""Make a string from outside safe to show: one line, nothing invisible, nothing that steers a terminal.

    Escape, control, bidirectional, surrogate and unassigned characters appear as their Python escapes, so that two names
    that differ only in hidden characters still look different. Kinds of white space become a space. `limit` > 0 cuts the
    middle out of longer text. Markup is not touched: HTML is escaped by the template, rich text is built as `Text`.

    >>> clean("\x1b[31mred\u202e")
    '\\x1b[31mred\\u202e'
    >>> clean("abcdefghij", limit=7)
    'ab...ij'
    """
    if limit > 0 and len(text) > limit:
        half = max(1, (limit - 3) // 2)
        text = text[:half] + "..." + text[-half:]
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _JOINERS else _visible(c) for c in text)


def _visible(character: str) -> str:
    if character in "\t\n\v\f\r\x85" or unicodedata.category(character).startswith("Z"):
        return " "
    return character.encode("unicode_escape").decode("ascii")


def percent(fraction: float) -> str:
    """One decimal; never "0.0 %" or "100.0 %" unless it is exactly that.

    >>> percent(0.413), percent(0.99996), percent(0.0)
    ('41.3 %', '>99.9 %', '0.0 %')
    """
    if fraction < 1 and round(100 * fraction, 1) >= 100:
        return ">99.9 %"
    if fraction > 0 and round(100 * fraction, 1) <= 0:
        return "<0.1 %"
    return f"{100 * fraction:.1f} %"


def interval(rate: Rate) -> str:
    """The 95 % interval in percent.

    >>> interval(Rate(value=0.5, low=0.25, high=0.75, count=5, n=10))
    '[25.0, 75.0]'
    """
    return f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def symbol(threat: str) -> str:
    """How a threat is written on paper, a composition part by part; an unknown threat keeps its registry name.

    >>> symbol("color+linf")
    'color + L∞'
    """
    return " + ".join(_THREATS[part][0] if part in _THREATS else clean(part, 40) for part in threat.split("+"))


def unit(threat: str) -> str:
    """What a radius of this threat is counted in; empty where it is counted as the values are, and for compositions.

    >>> unit("flow"), unit("linf")
    ('px', '')
    """
    return _UNITS.get(threat, "")


def radius_of(threat: str, radius_text: str, limit: int = 40) -> str:
    """A radius, or a size, with its unit.

    >>> radius_of("flow", "1"), radius_of("linf", "8/255")
    ('1 px', '8/255')
    """
    return f"{clean(radius_text, limit)} {unit(threat)}".rstrip()


def allowed(threat: str, radius_text: str, image: bool) -> str:
    """What the adversary may do, as the end of a sentence that begins with "when".

    >>> allowed("linf", "8/255", image=True)
    'every pixel value may move by 8/255'
    >>> allowed("flow+linf", "1+8/255", image=True)
    'every pixel may move by up to 1 px and every pixel value may move by 8/255'
    >>> allowed("union", "linf:0.1|l0:4", image=True)
    'every pixel value may move by 0.1 or up to 4 pixels may change at will (L0)'
    """
    if threat == UNION:
        places = [part.partition(":") for part in radius_text.split("|")]
        return " or ".join(allowed(name, radius, image) for name, _, radius in places)
    parts, radii = threat.split("+"), clean(radius_text, 80).split("+")
    if len(parts) != len(radii) or not all(part in _THREATS for part in parts):
        return f"the input may change by {clean(radius_text, 40)} under the threat {clean(threat, 40)}"
    value = "pixel value" if image else "input value"
    words = zip(parts, radii, strict=True)
    return " and ".join(_THREATS[part][1].replace("{value}", value).replace("{r}", radius) for part, radius in words)


def duration(seconds: float) -> str:
    """A length of time that a person can read.

    >>> duration(0.42), duration(75), duration(7320)
    ('0.4 s', '1 min 15 s', '2 h 2 min')
    """
    if 0 < seconds < 0.05:
        return "<0.1 s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
