"""The API's door for models: a module or a source becomes a `Victim`, whose box is all that attacks see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from epsball.core import Access, Victim
from epsball.models.adapt import Adapted, Outputs
from epsball.models.http import HttpModel
from epsball.models.load import ModelSpec
from epsball.models.load import load_model as load_adapted
from epsball.models.sklearn import Classifier, Estimator


def wrap(
    model: nn.Module | Callable[[Tensor], Any] | Classifier,
    *,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    box: tuple[float, float] = (0.0, 1.0),
    outputs: Outputs = "logits",
    class_order: Sequence[int] | None = None,
    access: Access = Access.GRADIENT,
    batch_size: int | None = None,
    name: str | None = None,
) -> Victim:
    """A model as attacks and audits want it: inputs in the box in, scores (B, C) out.

    Args:
        model: any module or function of a batch; tuples, dictionaries, objects with `.logits` and single logits are read too,
            and so are a fitted scikit-learn classifier and an `HttpModel`, which give scores or labels but no gradients.
        mean, std: the normalization that the model expects, applied inside, so that radii are in units of the box.
        box: legal input range. outputs: "logits", "probabilities" or "multilabel".
        class_order: column i of the result is the model's column `class_order[i]`.
        access: the most that attacks may see; never more than the model gives. batch_size: most rows per call. name: how reports call it.

    Raises:
        BadInput: statistics or a class order that cannot be.

    >>> wrap(nn.Flatten(), mean=0.5, std=0.5, name="tiny").name
    'tiny'
    """
    module = model if callable(model) else Estimator(model)
    most = module.access if isinstance(module, (Estimator, HttpModel)) else Access.GRADIENT
    adapted = module if isinstance(module, Adapted) else Adapted(module, mean, std, outputs, class_order, access=most)
    what = model if isinstance(module, Estimator) else adapted.module
    return Victim(
        adapted,
        box=box,
        access=min(access, adapted.access),
        batch_size=batch_size,
        fixed_batch=adapted.fixed_batch,
        name=name or (module.address.name if isinstance(module, HttpModel) else type(what).__name__),
    )


def load_model(
    source: str, weights: str | None = None, *, name: str | None = None, batch_size: int | None = None, **options: Any
) -> Victim:
    """A model from its source, ready to attack: `package.module:function`, `file.py:function`, a file, an address or a builtin name.

    Files: a `.pt2` program of `torch.export`, an `.onnx` graph (extra onnx), a `.joblib` estimator (needs `trust_code`).
    Addresses: `http://HOST/v2/models/NAME` of a server that speaks the Open Inference Protocol v2 (extra http).

    Args:
        source, weights: as in `epsball.models.load.load_model`, and so are the other options: mean, std, box, outputs,
            class_order, trust_code, endpoint.
        name: how reports call it; the source by default. batch_size: most rows per call.

    Raises:
        BadInput: in one line, whatever cannot be used.
        Untrusted: a file that would run code.

    >>> load_model("digits-robust").name
    'digits-robust'
    """
    adapted, _ = load_adapted(source, weights, **options)
    box = tuple(float(bound) for bound in options.get("box", (0.0, 1.0)))
    victim = wrap(adapted, box=(box[0], box[1]), batch_size=batch_size, name=name or source)
    given = {key: value for key, value in options.items() if value is not None}
    victim.source = ModelSpec.from_dict({"source": source, "weights": weights, **given}).to_dict()
    return victim


def normalization(victim: Victim, ndim: int) -> tuple[Tensor, Tensor] | None:
    """(mean, std) that a wrapped model applies, shaped to broadcast against inputs of `ndim` axes; None if it applies none."""
    model = victim.model
    if not isinstance(model, Adapted) or not model.normalizes:
        return None
    shape = (1, -1, *[1] * (ndim - 2))
    return model.mean.view(shape), model.std.view(shape)


def told(victim: Victim) -> list[str]:
    """What a model has to say once it was asked: rows sent and answers that stayed unknown, of a model behind an address."""
    model = victim.model.module if isinstance(victim.model, Adapted) else victim.model
    return model.tell() if isinstance(model, HttpModel) else []
