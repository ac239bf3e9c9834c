"""Substitute derivatives, one rule for each kind of operation that has none. Used by `core.relaxed` alone.

A rule gets a call and returns its shadow: a tensor of the shape of the real answer, or a tuple of them, whose gradient is the
substitute. Its value does not matter. `AS_IT_IS` leaves the operation's own derivative; `None` means that nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from epsball.core.relaxed_book import Book
from epsball.core.relaxed_call import AS_IT_IS, Call, Shadow, reshaped, soft
from epsball.core.relaxed_choices import bagged, beyond, chosen, looked_up, one_hot, ranked, scattered, topped
from epsball.core.relaxed_layers import INTEGER_LAYERS, integer_layer, integer_sum, singular_values

LEAK = 0.1
"""Share of the gradient that what is masked lets through: far below a threshold the soft mask alone passes next to nothing."""

RISES = {"tanh": ((-1.0, 1.0), (-1.0, 1.0)), "sigmoid": ((-2.0, 2.0), (0.0, 1.0))}
"""Between which inputs they rise, and from which value to which."""
FLAT, CUT = 10.0, 3.0
"""How far off the middle of the stretch that rises, in halves of it, a sample's mean makes a step of those, and of bounds. At 10 a tanh
has a slope of 1e-8; bounds have none from 1 on, and every picture has some pixels there."""


def _carries(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


# Operations that break a gradient.


def straight(call: Call) -> Shadow:
    """Rounding and its kin: the identity."""
    call.named(call.name)
    return call.twin(0)  # type: ignore[no-any-return]


def cast(call: Call) -> Shadow:
    """Float to integer and back: the identity."""
    if not isinstance(call.real, Tensor) or (soft(call.real) and soft(call.args[0])):
        return AS_IT_IS
    call.gap = call.book.gap(call.args[0])
    if not soft(call.real) and soft(call.args[0]):
        call.named("integers")
    return call.twin(0)  # type: ignore[no-any-return]


class _Tamed(torch.autograd.Function):
    """The identity; what comes back endless comes back as long as the sample's longest finite entry, and what is no number as 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, book: Book) -> Tensor:
        """x."""
        ctx.book = book
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        """Finite."""
        (slope,) = slopes
        sizes = ctx.book.by_sample(torch.where(slope.isfinite(), slope.abs(), torch.zeros_like(slope)))
        most = ctx.book.spread(sizes.amax(1), slope)
        endless = torch.where(slope.isinf(), slope.sign() * most, torch.zeros_like(slope))
        return torch.where(slope.isfinite(), slope, endless), None


def endless(call: Call) -> Shadow:
    """Roots, logarithms and angles: where their slope is endless or no number, as at 0, a finite one."""
    x = call.twin(0)
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
        return AS_IT_IS
    leaf = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(call.function(leaf, *call.args[1:], **call.kwargs).sum(), leaf, allow_unused=True)
    if slope is None or bool(slope.isfinite().all()):
        return AS_IT_IS
    call.named(f"endless {call.name}")
    return call.function(_Tamed.apply(x, call.book), *call.args[1:], **call.kwargs)  # type: ignore[no-any-return, no-untyped-call]


def divided(call: Call) -> Shadow:
    """Division that rounds: division."""
    if call.name == "div" and not call.kwargs.get("rounding_mode"):
        return AS_IT_IS
    call.named("floor_divide")
    a, b = call.twin(0), call.twin(1)
    return b / a if call.name == "rfloordiv" else a / b  # type: ignore[no-any-return]


def leftover(call: Call) -> Shadow:
    """x mod m = x - m floor(x / m), with floor as the identity: a constant. Its own derivative cancels that of x where it cuts steps."""
    x = call.twin(0)
    if not isinstance(x, Tensor) or not soft(x):
        return AS_IT_IS
    call.named("remainder")
    return 0 * x


def step(call: Call) -> Shadow:
    """sign(x) -> tanh(x / 2 w), Heaviside -> sigmoid(x / w)."""
    call.named(call.name)
    x = call.twin(0)
    soft_step = torch.sigmoid(x / call.book.width(x))
    return soft_step if call.name == "heaviside" else 2 * soft_step - 1


def saturated(call: Call) -> Shadow:
    """tanh, sigmoid and bounds, where a sample's mean lies far outside the stretch in which they rise: a step, of that sample's width."""
    x, found = call.twin(0), _stretch(call)
    if found is None or not isinstance(x, Tensor) or not x.is_floating_point():
        return AS_IT_IS
    (start, end), (low, high) = found
    place = (x - (start + end) / 2) / ((end - start) / 2)
    mean = call.book.by_sample(place.detach().abs().nan_to_num(nan=0.0, posinf=0.0)).mean(1)
    far = call.book.spread(mean > (FLAT if call.name in RISES else CUT), place)
    if not bool(far.any()):
        return AS_IT_IS
    call.named(f"steep {call.name}")
    soft_step = low + (high - low) * torch.sigmoid(place / call.book.width(place))
    return torch.where(far, soft_step, call.function(x.clone(), *call.args[1:], **call.kwargs))  # it may work in place


def _stretch(call: Call) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Between which inputs the operation rises, and from which value to which; None where a bound is missing or no number."""
    if call.name in RISES:
        return RISES[call.name]
    words = ("min_val", "max_val") if call.name == "hardtanh" else ("min", "max")
    low, high = (call.raw(place, word) for place, word in enumerate(words, 1))
    if not isinstance(low, int | float) or not isinstance(high, int | float) or not low < high:
        return None
    return (low, high), (low, high)


def compare(call: Call) -> Shadow:
    """a > b -> sigmoid((a - b) / w); a == b -> a bump of height 1, or half of one where a sample's a never passes b, as at a maximum.

    A rank that is compared with a number: the value that has it, with those of the ranks next to the number.
    """
    a, b = call.twin(0), call.twin(1)
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return None
    places, number = call.book.ranked(call.raw(0)), call.raw(1, "other")
    falls = call.name in ("lt", "le", "less", "less_equal")
    if places is not None and isinstance(number, int | float) and call.name not in ("eq", "ne"):
        upper = call.name in ("lt", "less", "ge", "greater_equal")
        a, b = beyond(places, number, upper), torch.zeros((), dtype=places.source.dtype, device=places.source.device)
    gap = b - a if falls else a - b
    if not gap.is_floating_point():
        return None
    call.named("compare")
    topped(call)
    rise = torch.sigmoid(gap / call.book.width(gap))
    if call.name in ("eq", "ne"):
        bump = 4 * rise * (1 - rise)
        for side, half in ((1, 2 * rise), (-1, 2 - 2 * rise)):  # the top of a bump has no slope
            whole = call.book.by_sample((side * gap.detach() <= 0).to(gap.dtype)).amin(1)
            bump = torch.where(call.book.spread(whole, gap) > 0, half, bump)
        return bump if call.name == "eq" else 1 - bump
    call.gap = gap.detach()
    call.book.margins[id(call.real)] = (call.real, gap)
    return rise


def detached(call: Call) -> Shadow:
    """The identity."""
    call.named("detach")
    call.gap = call.book.gap(call.args[0])
    return call.twin(0)  # type: ignore[no-any-return]


def bucket(call: Call) -> Shadow:
    """The number of a bucket: a straight line through the buckets."""
    place = 0 if call.name == "bucketize" else 1
    bounds, x = call.raw(1 - place), call.twin(place)
    if not isinstance(bounds, Tensor) or bounds.ndim != 1 or not len(bounds):
        return None
    call.named(call.name)
    return x * len(bounds) / (bounds[-1] - bounds[0]).abs().clamp_min(1e-12)  # type: ignore[no-any-return]


# Operations that pass on what a twin carries.


def product(call: Call) -> Shadow:
    """x * mask = where(mask, x, 0)."""
    for mask, value in ((0, 1), (1, 0)):
        gap, x, kept = call.book.gap(call.raw(mask)), call.book.twin(call.raw(value)), call.book.twin(call.raw(mask))
        if gap is None or x is None or kept is None or not x.is_floating_point():
            continue
        return _gated(call, gap, kept, x, torch.zeros((), dtype=x.dtype, device=x.device))
    return AS_IT_IS


def where(call: Call) -> Shadow:
    """where(mask, a, b) -> its own derivative, and where the mask tears that of the soft mask and a share of what is masked.

    Two branches with gradients keep their own derivative: a piecewise function is honest. Two constants leave all to the mask.
    """
    if len(call.args) + len(call.kwargs) < 3:
        return None
    return _switch(call, call.raw(0, "condition"), call.raw(1, "self"), call.raw(2, "other"))


def filled(call: Call) -> Shadow:
    """x.masked_fill(mask, v) = where(mask, v, x)."""
    x = call.old if call.old is not None else call.args[0]
    return _switch(call, call.raw(1, "mask"), call.raw(2, "value"), x)


def assigned(call: Call) -> Shadow:
    """x[mask] = v = where(mask, v, x)."""
    index, value = call.args[1], call.args[2]
    if call.old is None or call.book.gap(index) is None or index.shape != call.old.shape or (isinstance(value, Tensor) and value.ndim):
        return AS_IT_IS
    return _switch(call, index, value, call.old)


def _switch(call: Call, condition: Tensor, a: Any, b: Any) -> Shadow:
    book, gap, soft_condition = call.book, call.book.gap(condition), call.book.twin(condition)
    twins = [book.twin(side) for side in (a, b)]
    sides = [side if twin is None else twin for side, twin in zip((a, b), twins, strict=True)]
    like = next((twin for twin in (*twins, soft_condition) if twin is not None), None)
    if like is None:
        return None
    a, b = (side if isinstance(side, Tensor) else torch.tensor(float(side), dtype=like.dtype, device=like.device) for side in sides)
    if soft_condition is not None and not (_carries(a) or _carries(b)):
        call.named("mask")
        switched: Tensor = soft_condition * (a - b) + b
        return switched
    if soft_condition is None or gap is None:
        return torch.where(condition, a, b)
    if _carries(a) and _carries(b):
        return _joined(call, condition, gap, soft_condition, a, b)
    return _gated(call, gap, soft_condition, a, b) if _carries(a) else _gated(call, -gap, 1 - soft_condition, b, a)


def _joined(call: Call, condition: Tensor, gap: Tensor, kept: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """where(mask, a, b) of two branches with gradients: its own derivative, and where the mask tears that of the soft mask as well."""
    torn, both = call.book.jumps(a - b, gap), torch.where(condition, a, b)
    if not bool(torn.any()):
        return both
    call.named("mask")
    return torch.where(torn, kept * a + (1 - kept) * b, both)


def _gated(call: Call, gap: Tensor, kept: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """Where `kept` is 1 x, else the constant `other`."""
    change, hard = (x - other).detach(), kept.detach()
    torn = call.book.jumps(change, gap)
    if not bool(torn.any()):
        return x * hard + other * (1 - hard)
    call.named("mask")
    most = call.book.spread(call.book.by_sample(x.detach().abs()).amax(1), x)  # a mask may write minus infinity
    change = torch.where(torn, torch.minimum(torch.maximum(change, -most), most), torch.zeros_like(change))
    return x * torch.where(torn, LEAK + (1 - LEAK) * hard, hard) + change * kept


def logic(call: Call) -> Shadow:
    """and -> a b, or -> a + b - a b, xor -> a + b - 2 a b, not -> 1 - a."""
    if call.real.dtype is not torch.bool:
        return call.twin(0)  # type: ignore[no-any-return]
    kind = call.name.removeprefix("logical_").removeprefix("bitwise_")
    a, first = call.twin(0), call.book.gap(call.args[0])
    if kind in ("not", "invert"):
        call.gap = None if first is None else -first
        return 1 - a  # type: ignore[no-any-return]
    b, second = call.twin(1), call.book.gap(call.args[1])
    if first is not None and second is not None and kind in ("and", "or"):
        call.gap = torch.minimum(first, second) if kind == "and" else torch.maximum(first, second)
    return a * b if kind == "and" else a + b - (1 if kind == "or" else 2) * a * b  # type: ignore[no-any-return]


def shifted(call: Call) -> Shadow:
    """Bits moved up or down: a factor."""
    factor = 2.0 ** call.raw(1) if isinstance(call.raw(1), int) else 1.0
    return call.twin(0) * factor if call.name in ("lshift", "bitwise_left_shift") else call.twin(0) / factor  # type: ignore[no-any-return]


def some(call: Call) -> Shadow:
    """any -> the largest, all -> the smallest."""
    reduce = torch.amax if call.name == "any" else torch.amin
    dim = call.raw(1, "dim")
    return reduce(call.twin(0)) if dim is None else reduce(call.twin(0), dim, bool(call.raw(2, "keepdim")))


BREAKS: dict[str, Callable[[Call], Shadow]] = {
    **dict.fromkeys(("round", "rint", "floor", "ceil", "trunc", "fix", "hardshrink"), straight),
    **dict.fromkeys(("quantize_per_tensor", "quantize_per_channel"), straight),
    **dict.fromkeys(("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"), straight),
    **dict.fromkeys(("to", "type", "type_as", "long", "int", "short", "char", "byte", "bool", "float", "double", "half", "bfloat16"), cast),
    **dict.fromkeys(("floor_divide", "floordiv", "rfloordiv", "div"), divided),
    **dict.fromkeys(("remainder", "fmod", "mod", "frac"), leftover),
    **dict.fromkeys(("sign", "sgn", "heaviside"), step),
    **dict.fromkeys(("gt", "ge", "lt", "le", "greater", "greater_equal", "less", "less_equal", "eq", "ne"), compare),
    **dict.fromkeys(("detach", "data"), detached),
    **dict.fromkeys(("bucketize", "searchsorted"), bucket),
    **dict.fromkeys(("argmax", "argmin"), chosen),
    **dict.fromkeys(("svd", "linalg_svd"), singular_values),
    **dict.fromkeys(INTEGER_LAYERS, integer_layer),
    **dict.fromkeys(("tanh", "sigmoid", "clamp", "clip", "hardtanh"), saturated),
    **dict.fromkeys(("sqrt", "rsqrt", "pow", "log", "log2", "log10", "acos", "arccos", "asin", "arcsin", "atanh"), endless),
}
"""Name of an operation -> its rule, whatever its arguments carry."""
CARRIES: dict[str, Callable[[Call], Shadow]] = {
    **dict.fromkeys(("mul", "multiply", "rmul"), product),
    "where": where,
    "masked_fill": filled,
    "setitem": assigned,
    **dict.fromkeys((f"logical_{kind}" for kind in ("and", "or", "xor", "not")), logic),
    **dict.fromkeys((f"bitwise_{kind}" for kind in ("and", "or", "xor", "not")), logic),
    **dict.fromkeys(("and", "or", "xor", "invert"), logic),
    **dict.fromkeys(("any", "all"), some),
    **dict.fromkeys(("scatter", "scatter_add"), scattered),
    **dict.fromkeys(("argsort", "sort"), ranked),
    **dict.fromkeys(("lshift", "rshift", "bitwise_left_shift", "bitwise_right_shift"), shifted),
    "one_hot": one_hot,
    **dict.fromkeys(("embedding", "getitem"), looked_up),
    "embedding_bag": bagged,
    "dequantize": cast,
    **dict.fromkeys(("add", "add_relu"), integer_sum),
    **dict.fromkeys(("unsqueeze", "squeeze", "view", "view_as", "reshape", "reshape_as", "expand", "expand_as", "flatten"), reshaped),
    **dict.fromkeys(("permute", "transpose", "movedim", "repeat", "repeat_interleave"), reshaped),
}
"""The same, where an argument carries what autograd does not see."""
