"""What can go wrong with one request, and what is worth doing about it."""

from __future__ import annotations

from dataclasses import dataclass

ALWAYS = 10**9


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        many: most tries again of a batch as it is. one: the same for a single row; both also bounded by `retries`.
        halves: whether a batch that still has no answer is asked again in halves, so that one bad row does not lose the others.
    """

    name: str
    many: int
    one: int
    halves: bool


DOWN = Kind("no server", ALWAYS, ALWAYS, False)
"""Nobody accepts the connection; nothing was sent."""
BUSY = Kind("busy", ALWAYS, ALWAYS, False)
"""429, 502, 503: wait, smaller batches do not help."""
SHAKY = Kind("shaky", 1, ALWAYS, True)
"""Time-outs and dropped connections: chance, or a batch that takes too long."""
BROKEN = Kind("broken", 0, 2, True)
"""500 and answers that make no sense: one row may be to blame, and would be again."""
REFUSED = Kind("refused", 0, 0, True)
"""400, 422 and their like: the same question gets the same answer."""
LARGE = Kind("too large", 0, 0, True)
"""413: smaller batches from now on."""


class Fault(Exception):
    """One request without an answer that can be used; never leaves this package.

    Args:
        kind: what to do. words: what to say. wait: seconds that the server asks for.
    """

    def __init__(self, kind: Kind, words: str, wait: float | None = None) -> None:
        super().__init__(words)
        self.kind, self.words, self.wait = kind, words, wait


def kind_of(status: int) -> Kind:
    """The kind of fault of an HTTP status that is not 2xx.

    >>> kind_of(429).name, kind_of(500).name, kind_of(422).name
    ('busy', 'broken', 'refused')
    """
    if status == 413:
        return LARGE
    if status in (429, 502, 503):
        return BUSY
    if status in (408, 425, 504):
        return SHAKY
    return BROKEN if status >= 500 else REFUSED
