"""Substitute derivatives of what selects: sorted places, ranks, look-ups and labels. Used by `core.relaxed_rules` and its watch alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from epsball.core.relaxed_book import SHARE, Book, Choice
from epsball.core.relaxed_call import AS_IT_IS, Call, Shadow, reshaped, soft

RIVALS, COOL = 10, 0.3
"""Runners-up whose mean gap to the best score sets the temperature of a soft choice, and the share of that gap."""
MOST = 4096
"""Most rows of a table that is looked up by a number, and most labels."""
LARGEST = 2**26
"""Most numbers in the rows of all tables at once."""


def chosen(call: Call) -> Shadow:
    """argmax -> sum_k k softmax(x / w)_k."""
    choice = call.book.choice(call.real)
    if choice is None:
        return None
    call.named(call.name)
    share = _shares(choice)
    number = (share * torch.arange(share.shape[-1], dtype=share.dtype, device=share.device)).sum(-1)
    return number.unsqueeze(choice.dim) if call.real.ndim == choice.source.ndim else number


def ranked(call: Call) -> Shadow:
    """The order of an order, that is the rank of each value: a straight line through the ranks."""
    choice = call.book.choice(call.raw(0))
    if choice is None or not _all_chosen(choice):
        return AS_IT_IS
    call.named("ranks")
    down = -1.0 if call.raw(2, "descending") else 1.0
    real = call.real[1] if call.name == "sort" else call.real
    call.book.places[id(real)] = Choice(real, -down * choice.sign * choice.source, choice.dim, 1.0)
    places = _ranks(choice) * down
    return (call.real[0], places) if call.name == "sort" else places


def beyond(places: Choice, number: float, within: bool) -> Tensor:
    """By how much each value lies above those between which that rank divides them, itself `within` the upper ones or not.

    Ranks know no distance, and equal values have many.
    """
    source, last = places.source, places.source.shape[places.dim] - 1
    ordered, above = source.detach().sort(places.dim).values, math.ceil(number) if within else math.floor(number) + 1
    ends = (ordered.narrow(places.dim, min(max(place, 0), last), 1) for place in (above - 1, above))
    gap: Tensor = source - sum(ends) / 2
    return gap


def _all_chosen(choice: Choice) -> bool:
    """Whether it is the whole order."""
    return not choice.settled and choice.tensor.shape == choice.source.shape


def _ranks(choice: Choice) -> Tensor:
    """In its order, the place of each: straight lines between the ends."""
    source = -choice.sign * choice.source
    low, high = (bound(choice.dim, keepdim=True) for bound in (source.detach().amin, source.detach().amax))
    return source * (source.shape[choice.dim] - 1) / (high - low).clamp_min(1e-12)


def scattered(call: Call) -> Shadow:
    """A constant written where a selection points: a mask of what is at least the least chosen; where all are chosen, their ranks."""
    choice, value, dim = call.book.choice(call.raw(2, "index")), call.raw(3, "src"), call.raw(1, "dim")
    value = call.kwargs.get("value") if value is None else value
    if choice is None or call.book.twin(value) is not None or call.real.shape != choice.source.shape or dim % call.real.ndim != choice.dim:
        return AS_IT_IS
    if _all_chosen(choice) and isinstance(value, Tensor) and value.shape == choice.source.shape:
        first, last = (value.narrow(dim, place, 1).to(choice.source.dtype) for place in (0, value.shape[dim] - 1))
        call.named("ranks")
        places: Tensor = _ranks(choice) * (last - first)
        return places.div(max(value.shape[dim] - 1, 1))
    source = choice.sign * choice.source
    gap = source - source.gather(dim, call.raw(2, "index")).amin(dim, keepdim=True)
    call.named("choice")
    call.gap = gap.detach()
    return torch.sigmoid(gap / call.book.width(gap)) * (value if isinstance(value, int | float) else 1.0)


def one_hot(call: Call) -> Shadow:
    """Soft shares of the classes."""
    call.named("one_hot")
    return _rows(call.book, call.args[0], call.real.shape[-1])


def looked_up(call: Call) -> Shadow:
    """table[index] and embeddings: the average row under soft shares, of labels the share of each; index[:, :k]: still what was chosen."""
    index, table = (call.args[0], call.raw(1, "weight")) if call.name == "embedding" else (call.raw(1), call.args[0])
    if (choice := call.book.choice(table)) is not None:
        _some_of(call, choice)
        return AS_IT_IS
    if call.book.gap(table) is not None:
        return reshaped(call)
    if isinstance(index, tuple) and len(index) == 2:
        return _from_tables(call, table, *index)
    if not isinstance(index, Tensor) or soft(index) or index.dtype is torch.bool or call.book.twin(table) is not None:
        return AS_IT_IS
    labels = not soft(table) and table.ndim == 1 and len(table) > 0 and int(table.min()) >= 0 and int(table.max()) < MOST
    if not (labels or soft(table)):
        return AS_IT_IS
    share = _rows(call.book, index, len(table))
    if share is None:
        return None
    call.named("lookup")
    if labels:
        return _labels(call, share @ torch.nn.functional.one_hot(table.long()).to(share.dtype))
    mean: Tensor = share.to(table.dtype) @ table.detach().reshape(len(table), -1)
    return mean.reshape(call.real.shape)


def _from_tables(call: Call, table: Tensor, first: Any, second: Any) -> Shadow:
    """tables[g, index], or the other way round, as of a product codebook: the average row of each table under soft shares."""
    for numbers, index, tables in ((first, second, table), (second, first, table.transpose(0, 1) if table.ndim > 1 else table)):
        if not all(isinstance(part, Tensor) and not soft(part) and part.dtype is not torch.bool for part in (numbers, index)):
            return AS_IT_IS
        carried = [call.book.choice(part) is not None or call.book.twin(part) is not None for part in (numbers, index)]
        if carried != [False, True] or not soft(table) or call.book.twin(table) is not None:
            continue
        share = _rows(call.book, index, tables.shape[1])
        if share is None or share.numel() * tables[0, 0].numel() > LARGEST:
            return None
        call.named("lookup")
        rows = tables.detach()[torch.broadcast_to(numbers, index.shape)].flatten(index.ndim + 1)
        return (share.to(rows.dtype)[..., None, :] @ rows).reshape(call.real.shape)
    return AS_IT_IS


def bagged(call: Call) -> Shadow:
    """Sums and means of rows of a table: of the average rows under soft shares."""
    index, table, mode = call.args[0], call.raw(1, "weight"), call.kwargs.get("mode", "mean")
    share = _rows(call.book, index, len(table)) if isinstance(index, Tensor) and index.ndim == 2 and mode in ("sum", "mean") else None
    if share is None:
        return None
    call.named("lookup")
    rows: Tensor = share.to(table.dtype) @ table.detach()
    return rows.sum(1) if mode == "sum" else rows.mean(1)


def _labels(call: Call, share: Tensor) -> Tensor:
    """The mean label under the shares (..., labels) of each, which are remembered for whoever asks which label it is."""
    call.book.choices[id(call.real)] = Choice(call.real, share.clamp_min(1e-12).log(), share.ndim - 1, 1.0, settled=True)
    return (share * torch.arange(share.shape[-1], dtype=share.dtype, device=share.device)).sum(-1)


def _some_of(call: Call, choice: Choice) -> None:
    """Remembers that the first of sorted indices are a selection, and the last one of the other end."""
    real, whole, dim = call.real, choice.tensor, choice.dim
    if not isinstance(real, Tensor) or real.ndim != whole.ndim or real.stride() != whole.stride() or choice.settled:
        return
    if any(a != b for k, (a, b) in enumerate(zip(real.shape, whole.shape, strict=True)) if k != dim):
        return
    start = (real.storage_offset() - whole.storage_offset()) // max(whole.stride(dim), 1)
    if start in (0, whole.shape[dim] - real.shape[dim]):
        call.book.choices[id(real)] = replace(choice, tensor=real, sign=-choice.sign if start else choice.sign)


def _rows(book: Book, index: Tensor, n: int) -> Tensor | None:
    """(..., n) soft shares of n rows: of the scores that were compared, or of the distance to the number."""
    choice = book.choice(index)
    if choice is not None and choice.settled and choice.source.shape[-1] <= n:
        return torch.nn.functional.pad(choice.source.softmax(-1), (0, n - choice.source.shape[-1]))
    if choice is not None and choice.source.shape[choice.dim] == n:
        if index.ndim == choice.source.ndim - 1:
            return _shares(choice)
        if choice.dim == index.ndim - 1 and index.shape[-1] < n:
            return _members(choice, index.shape[-1]).unsqueeze(-2).expand(*index.shape, n)
    number = book.twin(index)
    if number is None or n > MOST:
        return None
    return torch.softmax(-(number[..., None] - torch.arange(n, dtype=number.dtype, device=number.device)).square(), -1)


def _members(choice: Choice, k: int) -> Tensor:
    """(..., n) share of each score among the k best: soft steps at the middle between the last that is in and the first that is out.

    Their width is a share of the best one's distance from there. What decides a vote is who is about to join or to leave, not who is best.
    """
    scores = choice.sign * choice.source
    best = scores.detach().topk(k + 1, -1).values
    edge = best[..., k - 1 : k + 1].mean(-1, keepdim=True)
    width = (SHARE * (best[..., :1] - edge)).nan_to_num(nan=0.0, posinf=0.0)
    inside = torch.sigmoid((scores - edge) / torch.where(width > 0, width, torch.ones_like(width)))
    return inside / inside.sum(-1, keepdim=True)


def _shares(choice: Choice) -> Tensor:
    """(..., n) softmax of the scores along the axis of the choice, which comes last.

    Its temperature is a share of the mean gap between the best score and the ten next, so that a handful of candidates count, however
    many there are: on a lookup of the nearest of 3,000 images the spread of all scores made too smooth a choice (26 of 40 samples
    left standing, 17 so).
    """
    scores = choice.scores()
    best = scores.detach().topk(min(1 + RIVALS, scores.shape[-1]), -1).values
    gap = (best[..., :1] - best[..., 1:]).nan_to_num(nan=0.0, posinf=0.0).mean(-1, keepdim=True)
    return torch.softmax(scores / torch.where(gap > 0, COOL * gap, torch.ones_like(gap)), -1)


CHOOSES = {"topk": 2, "sort": 1, "argsort": 1, "max": 1, "min": 1, "argmax": 1, "argmin": 1, "kthvalue": 2, "amax": 1, "amin": 1}
"""Operations that give indices, or the largest -> the place of their axis."""


def choose(call: Call) -> None:
    """Remembers of what a selection gave the indices."""
    values, indices = call.real if isinstance(call.real, tuple) and len(call.real) == 2 else (call.real, call.real)
    source, ends = call.book.twin(call.args[0]), call.name in ("max", "min", "amax", "amin")
    if not isinstance(indices, Tensor) or source is None or not source.is_floating_point():
        return
    dim = call.raw(CHOOSES[call.name], "dim")
    if dim is None and (ends or call.name in ("argmax", "argmin")):
        return
    rises = call.name in ("sort", "argsort") and not call.raw(2, "descending")
    small = rises or call.name in ("argmin", "min", "amin", "kthvalue") or call.raw(3, "largest") is False
    if isinstance(dim, int | None):
        choice = Choice(indices, source, (-1 if dim is None else dim) % source.ndim, -1.0 if small else 1.0)
        if not soft(indices):
            call.book.choices[id(indices)] = choice
        if ends:
            call.book.tops[id(values)] = (values, call.args[0], choice)


def topped(call: Call) -> None:
    """Notes a decision where scores are compared with the largest of them."""
    one, other = call.raw(0), call.raw(1, "other")
    for score, end in ((one, other), (other, one)):
        found = call.book.tops.get(id(end))
        if found is not None and found[1] is score:
            call.book.fork(call.real, found[2].scores())
