"""A model behind an address as a module: a batch in, scores or labels out, no gradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from epsball.core import Access
from epsball.errors import BadInput
from epsball.models.http.address import Address
from epsball.models.http.cache import Cache, content
from epsball.models.http.client import Answer, Client, Counts
from epsball.models.http.endpoint import Endpoint
from epsball.models.http.patience import Clock
from epsball.models.http.protocol import TYPES, Signature

Array = NDArray[Any]


class HttpModel(nn.Module):
    """A served model: (B, ...) -> (B, C), asked by the Open Inference Protocol v2.

    Tensors travel as JSON, or as raw bytes where the server knows `binary_tensor_data`. A row that stays without an answer after all
    tries is a row of NaN, which nobody takes for a class; `counts` and `tell` say how many. Rows that are not finite are not sent.
    Channels go last, and rows are flattened, where the server's metadata says so. Whole-number inputs are rounded.

    Args:
        url: http://HOST:PORT/v2/models/NAME[/versions/V], with or without /infer. endpoint: how to ask, `Endpoint` or its options.
        clock: replaced in tests.

    Raises:
        BadInput: in one line: nobody there, no such model, no access, redirects, data of another shape, a budget spent.

    Cost: rows sent are counted in `counts.sent`, retries included; rows that a cache answers are not sent, though a `Tally` counts
    them like all others.
    """

    def __init__(self, url: str, endpoint: Endpoint | Mapping[str, Any] | None = None, *, clock: Clock | None = None) -> None:
        super().__init__()
        self.endpoint = Endpoint.of(endpoint)
        self.address = Address.parse(url)
        self.client = Client(self.address, self.endpoint, clock)
        self.cache = Cache(self.endpoint.cache)
        self.access = Access.LABELS if self.client.signature.labels else Access.SCORES

    @property
    def counts(self) -> Counts:
        """Rows asked, cached, answered, unknown and sent, of this model and its copies."""
        return self.client.counts

    def __deepcopy__(self, memo: dict[int, Any]) -> HttpModel:
        """The same server and counts behind an empty cache: who copies a model to judge it afresh asks afresh."""
        twin = copy.copy(self)
        twin.cache = Cache(self.endpoint.cache)
        return twin

    def extra_repr(self) -> str:
        """The address and the options, without any secret."""
        return f"{self.address.model}, {self.endpoint}"

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, C), NaN where unknown; float64 where the server computes in it."""
        rows = arrange(x.detach().double().cpu().numpy(), self.client.signature, self.address.model)
        fine = x.detach().flatten(1).isfinite().all(1).cpu().numpy() & np.isfinite(rows).reshape(len(rows), -1).all(1)
        found: list[Answer] = [None] * len(rows)
        self.counts.asked += len(rows)
        self.counts.unknown += int((~fine).sum())
        self._fill(rows, np.flatnonzero(fine), found)
        good = {i: answer for i, answer in enumerate(found) if answer is not None}
        width = self.client.signature.width
        if width is None:
            raise BadInput(f"model: {self.address.model} has answered none of {len(rows)} rows: {self.client.last or 'none is finite'}")
        scores = np.full((len(rows), width), np.nan, np.result_type(np.float32, *good.values()))
        for i, answer in good.items():
            scores[i] = answer
        return torch.from_numpy(scores).to(x.device)

    def _fill(self, rows: Array, wanted: Array, found: list[Answer]) -> None:
        """Answers from the cache first, then from the server, the same content once."""
        same: dict[bytes, list[int]] = {}
        for i in wanted.tolist():
            key = content(rows[i]) if self.cache.most else i.to_bytes(8, "big")
            found[i] = self.cache.get(key)
            if found[i] is None:
                same.setdefault(key, []).append(i)
            else:
                self.counts.cached += 1
        keys = list(same)
        ask = rows[[same[key][0] for key in keys]]
        for part in self.client.parts(ask) if keys else ():
            for key, answer in zip(keys[part], self.client.answers(ask[part]), strict=True):
                self._spread(key, answer, same[key], found)

    def _spread(self, key: bytes, answer: Answer, places: list[int], found: list[Answer]) -> None:
        """One answer to every row of its content."""
        for i in places:
            found[i] = answer
        if answer is None:
            self.counts.unknown += len(places) - 1
            return
        self.counts.cached += len(places) - 1
        if self.cache.most:
            self.cache.put(key, answer)

    def notes(self) -> list[str]:
        """Sentences on how it is asked."""
        found, most = self.client.signature, self.client.most
        gives = f"one of {found.width} labels" if found.labels else f"scores ({found.output or 'its only output'})"
        notes = [f"{self.address.model} answers {gives} for at most {most} rows a request: {self.access.name.lower()} only, no gradients"]
        if not found.kind.startswith("FP"):
            notes.append(f"{self.address.name} takes {found.kind}: inputs are rounded to whole numbers before they are sent")
        if self.endpoint.token_env and not self.address.local and self.address.server.startswith("http:"):
            notes.append(f"the token goes to {self.address.host} unencrypted: use https")
        if self.cache.most:
            notes.append(
                f"up to {self.cache.most} answers are kept by content: the same question is not sent twice, so chance would not show"
            )
        return notes

    def tell(self) -> list[str]:
        """Sentences on what has happened so far."""
        c = self.counts
        notes = [f"{self.address.name}: {c.asked} rows asked, {c.cached} answered from the cache, {c.sent} sent in {c.requests} requests"]
        if c.unknown:
            notes.append(
                f"{self.address.name}: {c.unknown} of {c.asked} answers stayed unknown (the last: {self.client.last or 'not finite'})"
            )
        return notes


def arrange(x: Array, found: Signature, where: str) -> Array:
    """Inputs (B, ...) in the type and shape that the server takes.

    Shapes that do not match are mended where only one reading is possible: channels last, flat rows, axes of length 1.

    Raises:
        BadInput: any other shape.
    """
    want, have = None if found.shape is None else found.shape[1:], x.shape[1:]
    if want is not None and not _match(have, want):
        last = (*have[1:], have[0]) if len(have) == 3 else None
        if last is not None and _match(last, want):
            x = np.moveaxis(x, 1, -1)
        elif -1 not in want and _bare(have, len(want)) == _bare(want, len(want)):
            x = x.reshape(len(x), *want)
        else:
            raise BadInput(f"model: {where} takes rows of shape {want}, the data has {have}; give data of that shape (--layout)")
    kind = np.dtype(TYPES[found.kind])
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        x = np.clip(np.round(x.astype(np.float64)), limits.min, limits.max)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(x.astype(kind))


def _match(have: tuple[int, ...], want: tuple[int, ...]) -> bool:
    return len(have) == len(want) and all(w in (-1, h) for h, w in zip(have, want, strict=True))


def _bare(shape: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """The shape flattened where the server takes flat rows, else without axes of length 1."""
    return (int(np.prod(shape)),) if axes == 1 else tuple(n for n in shape if n != 1)
