from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from epsball.errors import BadInput
from epsball.models.outputs import probabilities_to_logits, to_logits

Z = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


@dataclass
class Output:
    logits: torch.Tensor
    loss: float | None = None


class ModelOutput(OrderedDict):  # as Hugging Face has it: a mapping with attributes
    @property
    def logits(self):
        return self["logits"]


Aux = namedtuple("Aux", ["logits", "aux_logits"])


@pytest.mark.parametrize(
    "output",
    [
        Z,
        (Z, torch.zeros(2, 3)),
        [None, Z],
        {"logits": Z, "hidden": torch.zeros(2, 9)},
        {"out": Z},
        {"out": Z, "name": "text"},
        Output(Z),
        ModelOutput(loss=torch.tensor(1.0), logits=Z),
        Aux(Z, torch.zeros(2, 3)),
    ],
)
def test_common_shapes(output):
    assert to_logits(output) is Z


@pytest.mark.parametrize("z", [torch.tensor([-1.0, 2.0]), torch.tensor([[-1.0], [2.0]])])
def test_one_logit_becomes_two_with_the_same_probability(z):
    found = to_logits(z)
    assert found.tolist() == [[0.0, -1.0], [0.0, 2.0]]
    torch.testing.assert_close(found.softmax(1)[:, 1], z.flatten().sigmoid())


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (torch.zeros(2, 21, 8, 8), r"outputs: shape \(2, 21, 8, 8\) is not \(batch, classes\); wrap"),
        (torch.zeros(()), r"shape \(\)"),
        (torch.zeros(3, 0), r"shape \(3, 0\)"),
        (torch.zeros(2, dtype=torch.int64), r"torch.int64 of shape \(2,\) are not scores"),
        ({"a": Z, "b": Z}, "keys 'a', 'b' and 2 tensors"),
        ({}, "0 tensors"),
        ((), "returned tuple without a tensor"),
        (None, "returned NoneType without a tensor"),
        ("text", "returned str"),
        (Output("no tensor"), "returned Output"),
    ],
)
def test_bad_outputs_are_one_line(output, words):
    with pytest.raises(BadInput, match=words) as caught:
        to_logits(output)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities(dtype):
    p = torch.tensor([[0.0, 1.0], [0.25, 0.75], [1e-45, 1.0]], dtype=dtype, requires_grad=True)
    z = probabilities_to_logits(p)
    (g,) = torch.autograd.grad(z.sum(), p)
    assert z.isfinite().all()
    assert g.isfinite().all()
    torch.testing.assert_close(z.softmax(1), p.detach())
    assert probabilities_to_logits(torch.tensor([float("nan")])).isnan().all()
