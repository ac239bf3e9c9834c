"""The address of a model: http://HOST/v2/models/NAME, with or without a version."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from epsball.errors import BadInput

FORM = "http://HOST:PORT/v2/models/NAME[/versions/V]"
_PATH = re.compile(r"(?P<root>.*)/v2/models/(?P<name>[^/]+)(/versions/(?P<version>[^/]+))?(/infer|/ready)?/?")


def is_address(source: str) -> bool:
    """Whether a source is meant to be asked over the network.

    >>> is_address("https://host/v2/models/net"), is_address("net.py:make")
    (True, False)
    """
    return source.lower().startswith(("http://", "https://"))


@dataclass(frozen=True)
class Address:
    """Where a model answers.

    Attributes:
        server: up to and with "/v2". model: the model's own address. name: of the model. host: of the server.
    """

    server: str
    model: str
    name: str
    host: str

    @staticmethod
    def parse(text: str) -> Address:
        """The parts of an address.

        Raises:
            BadInput: no model in it, or something in it that could be a secret: reports and evidence name the address.

        >>> Address.parse("http://localhost:8000/v2/models/net/infer").model
        'http://localhost:8000/v2/models/net'
        """
        try:
            parts = urlsplit(text)
            host, _ = parts.hostname or "", parts.port
        except ValueError as exc:
            raise BadInput(f"model: {text!r} is no address ({exc}); write {FORM}") from exc
        if "@" in parts.netloc or parts.query or parts.fragment:
            bare = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
            raise BadInput(f"model: {bare!r} came with a user, query or fragment, which would end up in reports; use --token-env NAME")
        found = _PATH.fullmatch(parts.path)
        if not host or found is None or any(c.isspace() or not c.isprintable() for c in text):
            raise BadInput(f"model: {text!r} is an address that names no model; write {FORM}")
        server = f"{parts.scheme}://{parts.netloc}{found['root']}/v2"
        version = f"/versions/{found['version']}" if found["version"] else ""
        return Address(server, f"{server}/models/{found['name']}{version}", unquote(found["name"]), host)

    @property
    def local(self) -> bool:
        """Whether it is this machine: such an address is never asked through a proxy."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
