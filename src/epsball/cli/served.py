"""Options of models behind an address."""

from __future__ import annotations

from typing import Annotated, Any

import typer

TokenEnv = Annotated[str | None, typer.Option(metavar="NAME", help="For an address: environment variable that holds the token.")]
Timeout = Annotated[float | None, typer.Option(metavar="SECONDS", help="For an address: longest wait for one request; 30 by default.")]
RateLimit = Annotated[float | None, typer.Option(metavar="PER_SECOND", help="For an address: most requests a second.")]
Asked = Annotated[
    list[str] | None,
    typer.Option(
        "--endpoint",
        metavar="NAME=VALUE",
        help="For an address, any of: output, classes, batch_size, retries, backoff, longest_wait, max_sent, token_header, cache.",
    ),
]


def endpoint_of(token_env: str | None, timeout: float | None, rate_limit: float | None, others: dict[str, Any]) -> dict[str, Any] | None:
    """All of them as one mapping; None if none was given."""
    named = {"token_env": token_env, "timeout": timeout, "rate_limit": rate_limit}
    return others | {key: value for key, value in named.items() if value is not None} or None


def with_token(specs: list[dict[str, Any]], names: list[str] | None, token_env: str) -> list[Any]:
    """The models of a run, those behind an address with the token that only the caller can grant."""
    from epsball.models import ModelSpec, load_model
    from epsball.models.http import is_address

    found: list[Any] = []
    for spec, name in zip(specs, names or [spec["source"] for spec in specs], strict=False):
        if is_address(name):
            options = ModelSpec.from_dict(spec).to_dict() | {"source": name}
            found.append(load_model(**options | {"endpoint": {**(options["endpoint"] or {}), "token_env": token_env}}))
        else:
            found.append(name)
    return found
