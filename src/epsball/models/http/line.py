"""One connection to a server: a request in, a whole answer or a `Fault` out. No policy: who asks decides what a fault means."""

from __future__ import annotations

import importlib
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from epsball.data.files import one_line
from epsball.errors import BadInput
from epsball.models.http.address import FORM, Address
from epsball.models.http.endpoint import Endpoint
from epsball.models.http.faults import BROKEN, DOWN, SHAKY, Fault, kind_of
from epsball.models.http.patience import Clock, retry_after

MOST_BYTES = 2**28
"""A longer answer is given up on."""


@dataclass(frozen=True)
class Reply:
    """A whole answer with status 2xx."""

    body: bytes
    headers: Mapping[str, str]


def need() -> Any:
    """httpx, imported when an address is first asked.

    Raises:
        BadInput: it is not installed.
    """
    try:
        return importlib.import_module("httpx")
    except ImportError as exc:
        raise BadInput("model: addresses need httpx: pip install 'epsball[http]'") from exc


class Line:
    """Requests to one model. Redirects are off; the token is read once and leaves only in its own header.

    Args:
        address: of the model. endpoint: time-out and token. clock: measures whole requests.

    Raises:
        BadInput: httpx or the token's variable is missing.
    """

    def __init__(self, address: Address, endpoint: Endpoint, clock: Clock) -> None:
        self._httpx, self.address, self.timeout, self._clock = need(), address, endpoint.timeout, clock
        self._authorize, self._hide = _token(endpoint)
        try:
            self._httpx.URL(address.model)
        except self._httpx.InvalidURL as exc:
            raise BadInput(f"model: {address.model} is no address ({one_line(exc, 100)}); write {FORM}") from exc
        try:
            self._client = self._httpx.Client(
                timeout=endpoint.timeout, follow_redirects=False, trust_env=not address.local, auth=self._authorize
            )
        except Exception as exc:  # a proxy or certificate file named by the environment
            raise BadInput(f"model: {address.model}: httpx cannot start ({one_line(exc, 100)}); look at the proxy variables") from exc
        self.close = weakref.finalize(self, self._client.close)

    def get(self, url: str) -> Any:
        """The JSON of an address."""
        reply = self._exchange("GET", url, b"", {})
        try:
            return json.loads(reply.body)
        except (ValueError, RecursionError) as exc:
            raise Fault(BROKEN, f"the answer of {url} is not JSON") from exc

    def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        """The answer to a body."""
        return self._exchange("POST", url, body, headers)

    def _exchange(self, method: str, url: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        httpx, deadline = self._httpx, self._clock.now() + self.timeout
        try:
            with self._client.stream(method, url, content=body or None, headers=dict(headers)) as response:
                found = self._whole(response, deadline)
                if not 200 <= response.status_code < 300:
                    self._refuse(response, found)
                return Reply(found, dict(response.headers))
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as exc:
            raise Fault(DOWN, f"cannot be reached ({self._say(exc)})") from exc
        except httpx.TimeoutException as exc:
            raise Fault(SHAKY, f"no answer in {self.timeout:g} s") from exc
        except httpx.DecodingError as exc:
            raise Fault(BROKEN, f"the answer is damaged ({self._say(exc)})") from exc
        except httpx.TransportError as exc:
            raise Fault(SHAKY, f"the connection was lost ({self._say(exc)})") from exc

    def _whole(self, response: Any, deadline: float) -> bytes:
        parts, size = [], 0
        for part in response.iter_bytes():
            size += len(part)
            parts.append(part)
            if size > MOST_BYTES:
                raise Fault(BROKEN, f"the answer is longer than {MOST_BYTES >> 20} MiB")
            if self._clock.now() > deadline:
                raise Fault(SHAKY, f"no whole answer in {self.timeout:g} s")
        return b"".join(parts)

    def _refuse(self, response: Any, body: bytes) -> None:
        """Raises what a status that is not 2xx deserves."""
        status, said = response.status_code, self._said(body)
        where = f"model: {self.address.model}: HTTP {status}"
        if 300 <= status < 400:
            target = one_line(ValueError(response.headers.get("location", "elsewhere").partition("?")[0]), 120)
            raise BadInput(f"{where}: it redirects to {self._hide(target)}; redirects are not followed, give that address")
        if status in (401, 403, 407):
            raise BadInput(f"{where}{said}: not allowed in; name the variable that holds the token, --token-env NAME")
        if status in (404, 405, 410):
            raise BadInput(f"{where}{said}: no such model there; check its name and version")
        raise Fault(kind_of(status), f"HTTP {status}{said}", retry_after(response.headers.get("retry-after")))

    def _said(self, body: bytes) -> str:
        """What a server says of an error, on one line without the token."""
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = body[:400].decode("utf-8", "replace")
        if isinstance(found, Mapping):
            found = found.get("error", found.get("detail", found.get("message", "")))
        text = self._hide(str(found).strip())
        return f" ({one_line(ValueError(text), 120)})" if text else ""

    def _say(self, exc: BaseException) -> str:
        return one_line(ValueError(self._hide(str(exc)) or type(exc).__name__), 100)


def _token(endpoint: Endpoint) -> tuple[Callable[[Any], Any] | None, Callable[[str], str]]:
    """What puts the token into a request, and what takes it out of a text."""
    if endpoint.token_env is None:
        return None, lambda text: text
    token = os.environ.get(endpoint.token_env, "").strip()
    if not token or not token.isascii() or not token.isprintable():
        # Its value is not shown: somebody may have given the token itself.
        raise BadInput("endpoint: token_env: names no variable that holds a token; export the token in one and give its name")
    plain = endpoint.token_header.lower() != "authorization" or " " in token
    value = token if plain else f"Bearer {token}"

    def authorize(request: Any) -> Iterator[Any] | Any:
        request.headers[endpoint.token_header] = value
        return request

    return authorize, lambda text: text.replace(token, "***")
