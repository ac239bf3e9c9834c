"""Watches every operation of a model while it runs. Used by `core.relaxed` alone.

A model is never shown other values than its own: what autograd loses is computed a second time, on twins, beside the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from epsball.core.relaxed_book import Book, following, stand
from epsball.core.relaxed_call import AS_IT_IS, Call, soft
from epsball.core.relaxed_choices import CHOOSES, choose
from epsball.core.relaxed_rules import BREAKS, CARRIES

_ATTRIBUTES: tuple[str, ...] = ("T", "mT", "H", "mH", "data", "real", "imag")
"""Attributes of a tensor that are tensors."""
_OUT = ("numpy", "array", "tolist")
_IN = ("tensor", "as_tensor", "asarray", "new_tensor", "from_numpy")
_DRAWS: tuple[str, ...] = ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "native_dropout", "dropout1d")
_DRAWS += ("dropout2d", "dropout3d", "bernoulli", "rrelu", "normal", "poisson", "multinomial", "gumbel_softmax")
_DRAWS += ("scaled_dot_product_attention",)
_INSIDE = ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "iand", "ior", "ixor", "imod", "ipow", "ilshift", "irshift")
_SQUASHES = ("softmax", "sigmoid", "tanh", "log_softmax", "_softmax", "_log_softmax")
_RISES: tuple[str, ...] = (
    "log",
    "log2",
    "log10",
    "log1p",
    "exp",
    "sqrt",
    "round",
    "float",
    "double",
    "to",
    "clone",
    "contiguous",
    "detach",
    "cpu",
)
_RISES += ("detach", "cpu", "clamp", "clip", "clamp_min", "clamp_max", "add", "sub", "mul", "div", "true_divide", "nan_to_num")
"""Operations that keep the order of scores, with positive factors."""
_QUIET = ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "is_complex", "retain_grad", "")
"""Questions about tensors, not about values."""


class Watch(TorchFunctionMode):
    """Sees every operation inside the block, and enters in the book what autograd loses."""

    def __init__(self, book: Book) -> None:
        super().__init__()
        self.book = book

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation's own answer."""
        kwargs, name = kwargs or {}, _spelled(function)
        if not name:
            return function(*args, **kwargs)
        if name == "register_hook":  # distrusted: it may change the gradient
            return RemovableHandle(OrderedDict()) if self.book.distrust else function(*args, **kwargs)
        if name in ("requires_grad_", "backward", "grad"):
            return _inner(self.book, name, function, args, kwargs)
        if name in _OUT:
            self.book.steers(args[0])
            self.book.leave(args[0])
            return function(*(a.detach() if isinstance(a, Tensor) and a.requires_grad else a for a in args), **kwargs)
        if name in _IN:
            return _entered(self.book, function, args, kwargs)
        return _watched(Call(self.book, name, function, args, kwargs))


def _watched(call: Call) -> Any:
    """The real answer, with a shadow beside it where autograd would lose track."""
    book, tensors = call.book, [*_tensors(call.args), *_tensors(tuple(call.kwargs.values()))]
    grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    carried = any(book.carried(t) for t in tensors)
    if not carried and all(book.twin(t) is None for t in tensors):
        return call.function(*call.args, **call.kwargs)
    for tensor in tensors:
        book.steers(tensor)
    inside = call.name.endswith("_") or call.name in _INSIDE or bool(call.kwargs.get("inplace"))
    call.name = call.name[1:] if call.name in _INSIDE[1:] else call.name.removesuffix("_")
    rule = BREAKS.get(call.name) or (CARRIES.get(call.name) if carried else None)
    if rule is None and grad and not carried:
        call.real = call.function(*call.args, **call.kwargs)
    else:
        if inside:
            with following():
                call.old, call.base = _before(book, call.args[0]), _base(book, call.args[0])
        generator = torch.get_rng_state() if call.name in _DRAWS else None
        call.real = call.function(*call.args, **call.kwargs)
        if inside or isinstance(call.real, Tensor | tuple | list):
            call.real = _relaxed(call, rule, generator, tensors, grad)
    if call.name in CHOOSES:
        choose(call)
    _squashed(call)
    return call.real


def _before(book: Book, target: Tensor) -> Tensor:
    twin = book.twin(target)
    if twin is not None and twin is not target:
        return twin
    return (target if soft(target) else target.float()).clone()


def _base(book: Book, target: Tensor) -> Tensor | None:
    """From before, the twin of what the target is a view of."""
    whole = target._base if target._is_view() else None
    return None if whole is None or not whole.is_contiguous() or whole.storage_offset() else _before(book, whole)


def _relaxed(call: Call, rule: Any, generator: Tensor | None, tensors: list[Tensor], grad: bool) -> Any:
    """The real answer with its shadow, if there is one; what the rules cannot do must never stop the model."""
    try:
        with following():
            hidden = not grad or any(call.book.hidden(t) for t in tensors)
            shadow = AS_IT_IS if rule is None else rule(call)
            if shadow is AS_IT_IS:
                shadow = _again(call, generator) if hidden else None
            if shadow is None:
                return call.real
            call.label += "" if grad else ",no_grad"
            return _settled(call, shadow, tensors, fresh=grad and call.old is None)
    except Exception as error:
        if no_memory(error):
            raise
        return call.real


def _again(call: Call, generator: Tensor | None) -> Any:
    """The same operation on twins; integers and masks stay themselves where floats will not do; at worst the identity."""
    if call.name.endswith("_like") or call.name.startswith("new_"):
        return None
    after = None if generator is None else torch.get_rng_state()
    try:
        for floats_only in (False, True):
            if generator is not None:
                torch.set_rng_state(generator)
            args, kwargs = _twins(call, call.args, floats_only), _twins(call, call.kwargs, floats_only)
            if call.old is not None:
                args = (call.old.clone(), *args[1:])
            try:
                shadow = call.function(*args, **kwargs)
            except (RuntimeError, TypeError, IndexError, NotImplementedError) as error:
                if no_memory(error):
                    raise
                continue
            shadow = args[0] if call.old is not None else shadow
            if not isinstance(shadow, Tensor) or shadow.requires_grad:
                return shadow
    finally:
        if after is not None:
            torch.set_rng_state(after)
    twins = [call.book.twin(t) for t in _tensors(call.args)]
    shape = call.real.shape if isinstance(call.real, Tensor) else None
    return next((twin for twin in twins if twin is not None and twin.shape == shape), None)


def _twins(call: Call, tree: Any, floats_only: bool) -> Any:
    """The arguments with every tensor replaced by its twin."""
    if isinstance(tree, Tensor):
        twin = call.book.twin(tree) if soft(tree) or not floats_only else None
        if twin is not None:
            return twin
        return tree.clone() if tree.is_inference() or call.name.endswith("_norm") else tree  # batch norm writes its statistics
    if isinstance(tree, dict):
        return {key: _twins(call, value, floats_only) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_twins(call, value, floats_only) for value in tree)
    return tree


def _settled(call: Call, shadow: Any, tensors: list[Tensor], fresh: bool) -> Any:
    """The real answer with its shadow: entered in the book, or as one tensor where nobody can see the difference."""
    book, real = call.book, call.args[0] if call.old is not None else call.real
    if isinstance(real, tuple | list):
        for one, other in zip(real, shadow, strict=True):
            if isinstance(one, Tensor) and isinstance(other, Tensor) and other.requires_grad and one.shape == other.shape:
                book.enter(one, stand(one, other, call.label))
        return call.real
    if not isinstance(real, Tensor) or not isinstance(shadow, Tensor) or not shadow.requires_grad:
        return call.real
    twin = stand(real, shadow, call.label)
    if fresh and soft(real) and real.requires_grad and not book.leaves and not any(_share_memory(real, t) for t in tensors):
        book.touched = True
        call.real = real = twin
    else:
        book.enter(real, twin)
        if call.base is not None and real._base is not None:
            places = torch.arange(call.base.numel(), device=real.device).as_strided(real.size(), real.stride(), real.storage_offset())
            whole = call.base.reshape(-1).scatter(0, places.reshape(-1), twin.reshape(-1).to(call.base.dtype))
            book.enter(real._base, stand(real._base, whole.view_as(call.base), ""))
    if call.gap is not None and call.gap.shape == real.shape:
        book.gaps[id(real)] = (real, call.gap)
    return call.real


def _squashed(call: Call) -> None:
    """Remembers the scores behind probabilities, as long as their order is kept."""
    book, rest = call.book, [*call.args[1:], *call.kwargs.values()]
    if not isinstance(call.real, Tensor) or not call.args or not isinstance(call.args[0], Tensor):
        return
    before = book.squashed.get(id(call.args[0]))
    if call.name in _SQUASHES and call.real is not call.args[0]:
        kind = call.name.removeprefix("_")
        dim = call.raw(1, "dim")
        if kind in ("sigmoid", "tanh") or dim in (None, -1, call.real.ndim - 1):
            book.squashed[id(call.real)] = (call.real, call.args[0], "" if kind == "log_softmax" else kind)
    elif before is not None and call.name in _RISES:
        scaled = call.name in ("mul", "div", "true_divide")
        if all(_positive(value) for value in rest) if scaled else not any(isinstance(value, Tensor) for value in rest):
            label = before[2] or ("softmax" if call.name == "exp" else "")
            book.squashed[id(call.real)] = (call.real, before[1], label)


def _positive(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and bool(value > 0)
    return isinstance(value, int | float) and value > 0


def _inner(book: Book, name: str, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Optimization inside the model: its leaves are its own, and its backward passes stop there."""
    if name == "requires_grad_":
        leaf: Tensor = function(*args, **kwargs)
        book.leaves += [leaf] if leaf.is_leaf and leaf.requires_grad else []
        return leaf
    book.noted.add("autograd")
    if name == "backward" and kwargs.get("inputs") is None and book.leaves:
        kwargs = {**kwargs, "inputs": book.leaves}
    return function(*args, **kwargs)


def _entered(book: Book, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A tensor made of arrays or lists."""
    made = function(*args, **kwargs)
    data = args[1:] if args and isinstance(args[0], Tensor) else args
    if isinstance(made, Tensor) and made.numel() > 1 and book.exits and not any(isinstance(a, Tensor) for a in data):
        book.link(made)
        book.leaves += [made] if made.requires_grad else []
    return made


def _spelled(function: Any) -> str:
    """The plain name of an operation: `add`, `add_`, `setitem`, `round`; nothing for what is no operation on values."""
    name: str = getattr(function, "__name__", "")
    if name in ("__get__", "__set__"):
        attribute = function.__self__.__name__
        if name == "__set__":
            return "requires_grad_" if attribute == "requires_grad" else ""
        return attribute if attribute in _ATTRIBUTES else ""
    if name.startswith("__") and name.endswith("__"):
        return name.strip("_")
    return "" if name in _QUIET else name.partition(".")[0]


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from _tensors(value)


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def no_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out: the caller will come back with fewer rows."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text
