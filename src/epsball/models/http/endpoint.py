"""How a model behind an address is asked, in plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from epsball.errors import BadInput

_WHOLE = {"classes": 2, "batch_size": 1, "retries": 0, "max_sent": 1, "cache": 0}
_POSITIVE = ("timeout", "backoff", "longest_wait", "rate_limit")
_NAMES = ("output", "token_env", "token_header")


@dataclass(frozen=True)
class Endpoint:
    """Options of a model behind an address; all have defaults.

    Args:
        output: name of the output that holds the scores; by default "logits", else the first of floating point.
        classes: number of classes of a server that answers one label a row; None: it answers scores.
        batch_size: most rows in one request; None: what the server says it takes, at most 128 rows and about 8 MiB.
        timeout: seconds for one whole request. retries: further tries after 429, 502, 503 and for a row whose answer was late or lost; at
            most 2 for a row after a 500 or an answer that makes no sense; none after 400 and its like. Batches are tried in halves.
        backoff: seconds before the first of them, doubled each time up to `longest_wait` and drawn from the upper half; `Retry-After` is
            obeyed, and a server that asks for more than `longest_wait` seconds ends the run.
        rate_limit: most requests a second; None for no limit.
        max_sent: most rows ever sent, retries included; None for no limit.
        token_env: environment variable that holds a token; never the token itself. token_header: where it goes, "Bearer " before it
            in Authorization, bare in any other.
        cache: most rows whose answers are kept, by content; 0 asks the server each time. With a cache a random model looks steady.

    Raises:
        BadInput: a value out of range.

    >>> Endpoint(timeout=5).stored()
    {'timeout': 5.0}
    """

    output: str | None = None
    classes: int | None = None
    batch_size: int | None = None
    timeout: float = 30.0
    retries: int = 5
    backoff: float = 0.25
    longest_wait: float = 60.0
    rate_limit: float | None = None
    max_sent: int | None = None
    token_env: str | None = None
    token_header: str = "Authorization"
    cache: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if field.name in _WHOLE:
                least = _WHOLE[field.name]
                if not isinstance(value, int) or isinstance(value, bool) or value < least:
                    raise BadInput(f"endpoint: {field.name} {value!r}: give a whole number of at least {least}")
            elif field.name in _POSITIVE:
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if not number or not 0 < value < math.inf:
                    raise BadInput(f"endpoint: {field.name} {value!r}: give a number above 0")
                object.__setattr__(self, field.name, float(value))
            elif not isinstance(value, str) or not value.isprintable() or not value.strip():
                raise BadInput(f"endpoint: {field.name} {value!r}: give a name")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.token_header):
            raise BadInput(f"endpoint: token_header {self.token_header!r}: give the name of a header")
        if self.token_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.token_env):
            raise BadInput("endpoint: token_env: not the name of a variable; export the token in one and give its name, never the token")

    @staticmethod
    def of(values: Endpoint | Mapping[str, Any] | None) -> Endpoint:
        """Options as they are, or from a mapping of their names.

        Raises:
            BadInput: an unknown name or a value out of range.
        """
        if isinstance(values, Endpoint):
            return values
        known = [field.name for field in fields(Endpoint)]
        given = {} if values is None else values
        unknown = [str(name) for name in given if name not in known] if isinstance(given, Mapping) else [repr(given)]
        if unknown:
            raise BadInput(f"endpoint: {unknown[0][:60]} is no option; choose from {', '.join(known)}")
        return Endpoint(**given)

    def stored(self) -> dict[str, Any]:
        """What a run may keep to ask again: every option that is not the default, but for `token_env`.

        A stored file must not say which variable of the reader's environment goes to which address.
        """
        plain = asdict(Endpoint())
        return {k: v for k, v in asdict(self).items() if v != plain[k] and k != "token_env"}
