"""Options that may end an audit before its plan does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from epsball.auditing.stopping import Limits

MaxSeconds = Annotated[
    float | None, typer.Option(metavar="S", help="Stop after so long, cheap attacks at every radius first; what ran counts.")
]
MaxForwards = Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop before attacks send more rows forward than this.")]
UntilWidth = Annotated[
    str | None,
    typer.Option(metavar="WIDTH", help="Add samples, in random order, only until every interval is that narrow: 2pp is 2 points."),
]
Union = Annotated[bool, typer.Option("--union", help="Also: robust accuracy under all threats at once, from the same attacks.")]


def limits_of(max_seconds: float | None, max_forwards: int | None, until_width: str | None, fail_under: float | None) -> Limits:
    """What was asked for, in the library's units.

    Raises:
        BadInput: a number that makes no sense, or a width that is no number.
    """
    from epsball.auditing.stopping import Limits

    return Limits(max_seconds, max_forwards, points(until_width), None if fail_under is None else fail_under / 100)


def points(text: str | None) -> float | None:
    """`2pp`, `2 pp`, `2%` or `2` as a fraction: 0.02.

    >>> points("2pp"), points("0.5"), points(None)
    (0.02, 0.005, None)
    """
    if text is None:
        return None
    try:
        return float(text.strip().removesuffix("pp").removesuffix("%")) / 100
    except ValueError:
        raise typer.BadParameter(f"--until-width '{text}': write percentage points, as 2pp") from None
