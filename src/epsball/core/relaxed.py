"""Gradients through models that have none: automatic BPDA. Made by `Victim.relaxed`.

Athalye, Carlini & Wagner 2018, arXiv 1802.00420, section 4: run the model forward as it is, and backward through a substitute
wherever an operation has no useful derivative. The paper picks the layer by hand. Here every operation of the model is watched
while it runs, and the rules of `core.relaxed_rules` supply the substitutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from epsball.core.relaxed_book import Book, Stand, following, stand
from epsball.core.relaxed_call import soft
from epsball.core.relaxed_watch import Watch, no_memory


class Relaxed(nn.Module):
    """`model` with substitute gradients; every value is the model's own.

    The one exception: where the answer is a softmax, sigmoid or tanh, possibly behind a logarithm, a positive factor, a bound
    or a rounding, its scores from before are returned, in every row where they have the same largest entry.

    `met` names the operations that were given a substitute derivative and that the answer hangs on, sorted; it grows from
    forward to forward. Without grad mode, or for inputs that want no gradient, the model is just called.

    Cost: the forward of the model, twice behind what has lost its gradient. The first forward is followed by one backward that
    looks whether a gradient arrives; if none does, by up to two more looks at the model. None of these is in the ledger.

    Differences from the paper: substitutes are chosen per operation, not per layer. Only where an operation is unknown to the
    rules, the smallest submodule that keeps its input's shape runs backward as the identity. Steps become sigmoids whose width
    is a share of the mean distance to the step in each sample, so that no neighbor in the batch changes a gradient.

    Args:
        model: maps (B, ...) to anything; one that cannot be watched is called as it is.
        distrust: go back through the operations inside custom autograd functions, not through their own backward.
    """

    met: tuple[str, ...]

    def __init__(self, model: Callable[[Tensor], Any], distrust: bool = False) -> None:
        super().__init__()
        self.model = model
        self.met = ()
        self.training = model.training if isinstance(model, nn.Module) else False
        self.dead: tuple[str, ...] | None = None  # submodules that run backward as the identity; None before the first look
        self.distrust = distrust
        self.plain = False

    def forward(self, x: Tensor) -> Any:
        """The model's own answer; autograd sees the substitutes."""
        if self.plain or not (torch.is_grad_enabled() and x.requires_grad):
            return self.model(x)
        look = self._look(x)
        if look is None:
            answer = self.model(x)  # may raise: then it was not the watching
            self.plain = True
            return answer
        if self.dead is None:
            look = self._examined(x, look)
        self.met = tuple(sorted({*self.met, *look.names()}))
        return look.answer

    def _look(self, x: Tensor) -> Look | None:
        """One watched pass; None where watching makes the model raise."""
        look = Look(x, self.model, self.distrust, self.dead)
        try:
            look.run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if no_memory(error):
                raise
            return None
        return look

    def _examined(self, x: Tensor, first: Look) -> Look:
        """The first look, mended if no gradient arrives: without custom backwards, then without the modules that stop it."""
        self.dead = tuple(first.stopped())
        if not isinstance(first.answer, Tensor) or first.arrives():
            return first
        self.distrust, self.dead = True, None
        second = self._look(x)
        if second is not None and second.arrives():
            self.dead = tuple(second.stopped())
            return second
        self.distrust, self.dead = False, (*first.stopped(), *first.guilty())
        third = self._look(x)
        if third is not None and third.arrives():
            return third
        self.dead = tuple(first.stopped())
        return first


class Look:
    """One watched forward pass of a model.

    Args:
        x: inputs (B, ...) that require a gradient. model: what is asked. distrust: as in `Book`.
        dead: names of submodules that run backward as the identity; None makes every submodule that stops a gradient one.
    """

    def __init__(self, x: Tensor, model: Any, distrust: bool, dead: tuple[str, ...] | None) -> None:
        self.x, self.model, self.dead = x, model, dead
        self.book = Book(len(x), partial(_constants, model), distrust)
        self.passed: list[tuple[str, Tensor, Tensor]] = []
        self.identities: list[str] = []
        self.answer: Any = None

    def run(self) -> None:
        """Asks the model."""
        handles = [module.register_forward_hook(self._hook(name)) for name, module in self._modules()]
        try:
            with Watch(self.book):
                answer = self.model(self.x)
        finally:
            for handle in handles:
                handle.remove()
        self.answer = _finished(self.book, answer) if isinstance(answer, Tensor) else answer

    def names(self) -> set[str]:
        """What the answer's gradient passes in place of a derivative."""
        names, seen = set(self.book.noted), set()
        stack: list[Any] = [self.answer.grad_fn] if isinstance(self.answer, Tensor) and self.book.touched else []
        while stack:
            node: Any = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            ours = isinstance(node, Stand._backward_cls)
            names.update(node.label.split(",") if ours else ())
            stack += [before for before, _ in node.next_functions]
        return names - {""}

    def arrives(self) -> bool:
        """Whether any sample gets a gradient: finite, not zero."""
        return isinstance(self.answer, Tensor) and _passes(self.answer, self.x)

    def stopped(self) -> list[str]:
        """Submodules at whose output no gradient was left."""
        return self.identities

    def guilty(self) -> list[str]:
        """The smallest submodules that stop a gradient on its way back, or raise."""
        found: list[str] = []
        for name, entered, left in self.passed:
            inside = any(other.startswith(name + ".") for other in found)
            if not inside and name not in found and not _passes(left, entered):
                found.append(name)
        return found

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(self.model, nn.Module):
            for name, module in self.model.named_modules():
                if name and not isinstance(module, torch.jit._script.RecursiveScriptModule) and (self.dead is None or name in self.dead):
                    yield name, module

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def watch(module: nn.Module, inputs: Any, output: Any) -> None:
            x = inputs[0] if inputs else None
            if not isinstance(x, Tensor) or not isinstance(output, Tensor) or output is x or output.shape != x.shape or not soft(output):
                return
            with following():
                entered, left = self.book.twin(x), self.book.twin(output)
            if entered is not None and (left is None or self.dead is not None):
                self.identities.append(name)
                self.book.enter(output, stand(output, entered, f"module {type(module).__name__}"))
            elif entered is not None and left is not None and self.dead is None:
                self.passed.append((name, entered, left))

        return watch


def _constants(model: Any) -> Iterable[Tensor]:
    return [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []


def _finished(book: Book, answer: Tensor) -> Tensor:
    """The answer with its gradient; scores from before the last squashing where there was one."""
    with following():
        found = book.squashed.get(id(answer))
        scores = book.twin(found[1]) if found else None
        if found is None or not found[2] or scores is None or scores.shape != answer.shape or answer.ndim != 2:
            twin = book.twin(answer)
            return answer if twin is None else twin
        same = (answer.argmax(1) == scores.argmax(1)) & torch.isfinite(answer).all(1) & torch.isfinite(scores).all(1)
        values = torch.where(same[:, None], scores.detach().to(answer.dtype), answer.detach())
        book.touched = True
        return stand(values, scores, found[2])


def _passes(answer: Tensor, x: Tensor) -> bool:
    """Whether some sample of `x` gets a finite gradient other than zero from `answer`. Cost: 1 backward."""
    if not answer.requires_grad:
        return False
    slopes = torch.linspace(1, 2, answer.numel(), dtype=answer.dtype, device=answer.device).reshape(answer.shape)
    try:
        (gradient,) = torch.autograd.grad(answer, x, slopes, retain_graph=True, allow_unused=True)
    except Exception as error:
        if no_memory(error):
            raise
        return False
    if gradient is None or not len(gradient):
        return gradient is not None
    rows = gradient.reshape(len(gradient), -1)
    return bool((torch.isfinite(rows).all(1) & (rows != 0).any(1)).any())
