"""Who asks: requests of rows with retries, halves, a budget and honest counts. Every row gets an answer or is called unknown."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsball.errors import BadInput
from epsball.models.http.address import Address
from epsball.models.http.endpoint import Endpoint
from epsball.models.http.faults import DOWN, LARGE, Fault
from epsball.models.http.line import Line
from epsball.models.http.patience import Clock, Pace, RealClock
from epsball.models.http.protocol import TYPES, Signature, decode, encode, signature

Array = NDArray[Any]
Answer = Array | None
"""Scores (C,) of a row; None where no try brought one."""

PATIENCE = 4
"""Rows in a row without an answer before a row that was answered earlier is sent again, to see whether anybody is there."""
MOST_ROWS, MOST_REQUEST = 128, 2**23
JSON_BYTES = 13
"""A float32 in JSON."""


@dataclass
class Counts:
    """What a client has done; asked = cached + answered + unknown, unless an error ended a call.

    Attributes:
        asked: rows that somebody wanted. cached: of these answered without the server. answered: by the server. unknown: by nobody.
        sent: rows that went out, retries, halves and padding included: what the server has seen. requests: that carried them.
    """

    asked: int = 0
    cached: int = 0
    answered: int = 0
    unknown: int = 0
    sent: int = 0
    requests: int = 0


class Client:
    """Rows in, answers out.

    Args:
        address: of the model. endpoint: how to ask. clock: replaced in tests.

    Attributes:
        counts: see `Counts`. signature: what the model takes and gives. binary: whether tensors travel as raw bytes.

    Raises:
        BadInput: nobody there, no such model, no access, or a model that cannot be used.
    """

    def __init__(self, address: Address, endpoint: Endpoint, clock: Clock | None = None) -> None:
        self.address, self.endpoint, self.counts = address, endpoint, Counts()
        clock = clock or RealClock()
        self.line = Line(address, endpoint, clock)
        self.pace = Pace(clock, endpoint.backoff, endpoint.longest_wait, endpoint.rate_limit)
        self.signature: Signature = signature(self._read(address.model), address.model, endpoint.output, endpoint.classes)
        extensions = self._extensions()
        self.binary = "binary_tensor_data" in extensions and self.signature.output is not None
        most = endpoint.batch_size or MOST_ROWS
        if self.signature.batch is None and "model_configuration" in extensions:
            told = self._optional(f"{address.model}/config").get("max_batch_size")
            most = min(most, told) if isinstance(told, int) and told > 0 else most
        self.most = self.signature.batch or most
        if (endpoint.batch_size or self.most) < (self.signature.batch or 0):
            raise BadInput(f"endpoint: batch_size {endpoint.batch_size}: {address.model} takes {self.most} rows a request; leave it out")
        self.last = ""
        """Why the last unknown row is unknown."""
        self._good: Array | None = None
        self._silent = 0

    def _read(self, url: str) -> Any:
        """JSON of an address, tried again unless nobody is there."""
        for tries in count():
            try:
                self.pace.turn()
                return self.line.get(url)
            except Fault as fault:
                if fault.kind is DOWN:
                    raise BadInput(f"model: {self.address.model} {fault.words}; start the server or check the address") from fault
                if tries >= min(fault.kind.one, self.endpoint.retries):
                    raise BadInput(f"model: {url}: {fault.words} in {tries + 1} tries; look at the server") from fault
                self._wait(tries, fault)

    def _optional(self, url: str) -> dict[str, Any]:
        """JSON of an address that not every server has; empty without."""
        try:
            self.pace.turn()
            found = self.line.get(url)
        except (Fault, BadInput):
            return {}
        return found if isinstance(found, dict) else {}

    def _extensions(self) -> list[Any]:
        found = self._optional(self.address.server).get("extensions")
        return found if isinstance(found, list) else []

    def parts(self, rows: Array) -> Iterator[slice]:
        """Slices of rows (B, ...) that fit into a request."""
        size = max(1, rows[0].size) * (np.dtype(TYPES[self.signature.kind]).itemsize if self.binary else JSON_BYTES)
        start = 0
        while start < len(rows):
            step = max(1, min(self.most, MOST_REQUEST // size))
            yield slice(start, min(len(rows), start + step))
            start += step

    def answers(self, rows: Array) -> list[Answer]:
        """One answer a row of (B, ...), B at most what fits into a request; None for those that stay unknown.

        Raises:
            BadInput: nobody there any more, the budget spent, no access.
        """
        for tries in count():
            try:
                found = self._send(rows)
            except Fault as fault:
                limit = fault.kind.one if len(rows) == 1 else fault.kind.many
                if tries < min(limit, self.endpoint.retries):
                    self._wait(tries, fault)
                    continue
                return self._without(rows, fault)
            self._silent, self._good = 0, rows[:1].copy()
            self.counts.answered += len(rows)
            return list(found)
        raise AssertionError("unreachable")

    def _without(self, rows: Array, fault: Fault) -> list[Answer]:
        """What is left to do for rows that got no answer."""
        if fault.kind is DOWN:
            tried = self.endpoint.retries + 1
            raise BadInput(f"model: {self.address.model} {fault.words} in {tried} tries; start the server and run again") from fault
        if fault.kind.halves and len(rows) > 1:
            half = len(rows) // 2
            self.most = half if fault.kind is LARGE and self.signature.batch is None else self.most
            return [*self.answers(rows[:half]), *self.answers(rows[half:])]
        self.last = fault.words
        self.counts.unknown += len(rows)
        self._silent += len(rows)
        if self._silent >= PATIENCE:
            self._anybody()
        return [None] * len(rows)

    def _anybody(self) -> None:
        """Sends a row again that was answered before: bad rows are unknown, but a server that answers nothing ends the run."""
        why = f"model: {self.address.model} has answered none of the last {self._silent} rows: {self.last}"
        if self._good is None:
            raise BadInput(f"{why}; check that model, data and layout belong together, and the server's log")
        for tries in count():
            try:
                self._send(self._good)
            except Fault as fault:
                if fault.kind is DOWN or tries >= self.endpoint.retries:
                    raise BadInput(f"{why}, nor one that it had answered before; look at the server and run again") from fault
                self._wait(tries, fault)
            else:
                self._silent = 0
                return

    def _send(self, rows: Array) -> Array:
        """(B, C) answers of one request."""
        padded, name = self._pad(rows), uuid.uuid4().hex
        spent, most = self.counts.sent, self.endpoint.max_sent
        if most is not None and spent + len(padded) > most:
            raise BadInput(
                f"endpoint: max_sent {most}: {spent} rows were sent, {len(padded)} more do not fit; raise it or ask fewer samples"
            )
        body, headers = encode(padded, self.signature, name, self.binary)
        self.pace.turn()
        self.counts.sent += len(padded)
        self.counts.requests += 1
        try:
            reply = self.line.post(f"{self.address.model}/infer", body, headers)
        except Fault as fault:
            if fault.kind is DOWN:  # nothing has left
                self.counts.sent -= len(padded)
                self.counts.requests -= 1
            raise
        found = decode(reply.body, reply.headers, self.signature, len(padded), name)[: len(rows)]
        self.signature = replace(self.signature, width=found.shape[1])
        return found

    def _pad(self, rows: Array) -> Array:
        """Rows for a model that is fixed to a number of them: the last one is repeated."""
        short = (self.signature.batch or 0) - len(rows)
        return np.concatenate([rows, np.repeat(rows[-1:], short, axis=0)]) if short > 0 else rows

    def _wait(self, tries: int, fault: Fault) -> None:
        if fault.wait is not None and fault.wait > self.endpoint.longest_wait:
            asked, most = fault.wait, self.endpoint.longest_wait
            raise BadInput(f"model: {self.address.model} asks to wait {asked:g} s, longest_wait is {most:g}: come back later or raise it")
        self.pace.pause(tries, fault.wait)
