"""One operation of a watched model, as the rules of `core.relaxed_rules` see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from epsball.core.relaxed_book import Book


class AsItIs:
    """The operation's own derivative is the right one."""


AS_IT_IS = AsItIs()
Shadow = Tensor | tuple[Tensor, ...] | AsItIs | None


@dataclass
class Call:
    """One operation of the model, with its real answer. Rules may leave marks: the gap of a mask, another name."""

    book: Book
    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    old: Tensor | None = None  # the twin of what an in-place operation changes, from before
    base: Tensor | None = None  # the same of what that is a view of
    real: Any = None
    gap: Tensor | None = None
    label: str = field(default="")

    def raw(self, place: int, word: str = "") -> Any:
        """An argument by place or by word."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(word)

    def twin(self, place: int, word: str = "") -> Any:
        """The same, as what carries its gradient; integers and masks become floats."""
        given = self.raw(place, word)
        if place == 0 and self.old is not None:
            return self.old
        twin = self.book.twin(given)
        if twin is not None:
            return twin
        return given if not isinstance(given, Tensor) or soft(given) else given.float()

    def named(self, label: str) -> None:
        """What `met` will say."""
        self.label = label


def soft(tensor: Tensor) -> bool:
    """Whether its dtype can carry a gradient."""
    return tensor.is_floating_point() or tensor.is_complex()


def reshaped(call: Call) -> Shadow:
    """Another shape of a mask: its gap goes along."""
    gap = call.book.gap(call.args[0])
    call.gap = None if gap is None else call.function(gap, *call.args[1:], **call.kwargs)
    return AS_IT_IS
