"""scikit-learn classifiers, and whatever speaks as they do: scores or labels in, no gradients."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from epsball.core import Access
from epsball.data.files import one_line, regular_file
from epsball.errors import BadInput, Untrusted
from epsball.models.outputs import probabilities_to_logits

MOST_CLASSES = 10_000


class Classifier(Protocol):
    """What scikit-learn's classifiers have in common."""

    def predict(self, x: Any, /) -> Any:
        """(B, F) -> (B,) classes."""


def is_estimator(thing: object) -> bool:
    """Whether it is an instance that predicts and cannot be called, as scikit-learn's estimators are."""
    return not callable(thing) and callable(getattr(thing, "predict", None))


def load_estimator(path: str | Path, trust_code: bool) -> Any:
    """The estimator in a ``.joblib`` file, a pickle: loading one runs code.

    Raises:
        Untrusted: `trust_code` is off. BadInput: a missing or damaged file, or something that does not predict.
    """
    found = regular_file(path, "model")
    if not trust_code:
        raise Untrusted(f"model: {str(path)!r} is a pickle, which can run code; pass --trust-code if you wrote it yourself")
    try:
        estimator = importlib.import_module("joblib").load(found)
    except Exception as exc:  # a pickle raises what it likes
        raise BadInput(f"model: {str(path)!r} cannot be loaded ({one_line(exc, 100)}); write it with joblib.dump") from exc
    if not is_estimator(estimator):
        raise BadInput(f"model: {str(path)!r} holds {type(estimator).__name__}, which has no predict; store a fitted classifier")
    return estimator


def _columns(classes: NDArray[Any]) -> tuple[list[int], list[str]]:
    """The column of the result for each class, and notes: whole numbers are labels themselves, other classes are counted."""
    if classes.dtype.kind in "iub":
        values = [int(c) for c in classes]
        if min(values) >= 0 and max(values) < MOST_CLASSES:
            missing = sorted(set(range(max(values) + 1)) - set(values))
            shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            return values, [f"the estimator does not know class {shown}; it never answers so"] if missing else []
    named = ", ".join(f"{i} = {c}" for i, c in enumerate(classes[:5])) + (", ..." if len(classes) > 5 else "")
    return list(range(len(classes))), [f"the classes are numbered in the estimator's order: {named}"]


class Estimator(nn.Module):
    """A fitted classifier as a module: (B, ...) -> (B, C); every sample is flattened to one row of features.

    Of `decision_function`, `predict_proba` and `predict` the first that it has and that gives one column a class is asked; two
    classes may share one column. Probabilities become their logarithm; predicted labels become one-hot rows, and `access` is then
    LABELS, else SCORES. Column i is the class i where classes are whole numbers from 0, else the i-th of `classes_`.

    Args:
        estimator: fitted, with `classes_`.

    Raises:
        BadInput: not fitted, no classifier, one class, several outputs.

    Cost: one call of the estimator a batch, on the CPU.
    """

    def __init__(self, estimator: Any) -> None:
        super().__init__()
        name = type(estimator).__name__
        if not is_estimator(estimator):
            raise BadInput(f"model: {name} cannot be called and does not predict; give an nn.Module, a function or a fitted classifier")
        classes = getattr(estimator, "classes_", None)
        if classes is None or (isinstance(classes, Sequence) and classes and not np.isscalar(classes[0])):
            raise BadInput(f"model: {name} has no list classes_; give a classifier that is fitted and has one output")
        self.classes: NDArray[Any] = np.asarray(classes)
        if self.classes.ndim != 1 or len(self.classes) < 2:
            raise BadInput(f"model: {name} knows {self.classes.size} classes; fit it on two or more")
        self.estimator = estimator
        self.places, self.notes = _columns(self.classes)
        names = ("decision_function", "predict_proba", "predict")
        self.methods = [n for n in names if callable(getattr(estimator, n, None))]
        if getattr(estimator, "decision_function_shape", "ovr") == "ovo" and len(self.classes) > 2:
            self.methods.remove("decision_function")  # one column a pair of classes
        self.method = self.methods[0]
        self.access = Access.LABELS if self.method == "predict" else Access.SCORES
        self.notes.append(f"{name} answers by {self.method}: {self.access.name.lower()} only, no gradients")

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, C), float64 where the estimator computes in it."""
        rows = x.detach().flatten(1).cpu().numpy()
        try:
            answer = np.asarray(getattr(self.estimator, self.method)(rows))
        except ValueError as exc:
            raise BadInput(
                f"model: {type(self.estimator).__name__} on {rows.shape[1]} features: {one_line(exc, 120)}; give such data"
            ) from exc
        scores = self._scores(answer)
        width = max(self.places) + 1
        if scores.shape[1] == width:
            return scores.index_select(1, torch.tensor(self.places).argsort()).to(x.device)
        # Classes that the estimator has never seen stay below all others.
        full = (scores.amin(1, keepdim=True) - 1).repeat(1, width)
        return full.index_copy(1, torch.tensor(self.places), scores).to(x.device)

    def _scores(self, answer: NDArray[Any]) -> Tensor:
        if self.method == "predict":
            return torch.from_numpy((answer[:, None] == self.classes[None]).astype(np.float64))
        scores = torch.from_numpy(np.asarray(answer, dtype=np.float64))
        if scores.ndim == 1:  # one column for two classes: above 0 is the second
            scores = torch.stack([torch.zeros_like(scores), scores], 1)
        if scores.ndim != 2 or scores.shape[1] != len(self.classes):
            raise BadInput(f"model: {self.method} gave {tuple(scores.shape)} for {len(self.classes)} classes; give one column a class")
        return probabilities_to_logits(scores) if self.method == "predict_proba" else scores
