import pytest
import torch
from torch import nn

from epsball.errors import BadInput
from epsball.models.adapt import Adapted


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


def test_normalizes_each_channel():
    x = torch.rand(2, 3, 4, 5)
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    expected = (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    torch.testing.assert_close(Adapted(nn.Flatten(), mean, std)(x), expected.flatten(1), rtol=0, atol=0)


def test_normalizes_flat_input_by_feature_or_at_once():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert Adapted(nn.Identity(), [1, 2], [1, 2])(x).tolist() == [[0.0, 0.0], [2.0, 1.0]]
    assert Adapted(nn.Identity(), mean=1)(x).tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert Adapted(nn.Identity(), std=2.0)(x).tolist() == [[0.5, 1.0], [1.5, 2.0]]
    assert Adapted(nn.Identity(), mean=[0, 1], std=2.0)(x).tolist() == [[0.5, 0.5], [1.5, 1.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.float64])
def test_any_float_goes_in_and_gradients_come_out(dtype, own):
    model = Adapted(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).to(own), mean=0.5, std=0.25, class_order=[2, 0, 1])
    x = torch.rand(5, 1, 2, 2, dtype=dtype, requires_grad=True)
    (g,) = torch.autograd.grad(model(x).logsumexp(1).sum(), x)
    assert g.dtype == dtype
    assert g.abs().sum() > 0


def test_tokens_stay_whole():
    assert Adapted(nn.Sequential(nn.EmbeddingBag(5, 3)))(torch.tensor([[1, 2], [3, 4]])).shape == (2, 3)


def test_a_function_is_a_model():
    assert Adapted(lambda x: x.flatten(1))(torch.ones(2, 1, 1, 3)).shape == (2, 3)


def test_class_order_moves_columns():
    z = torch.tensor([[10.0, 11.0, 12.0]])
    assert Adapted(Returns(z), class_order=[2, 0, 1])(torch.zeros(1, 2)).tolist() == [[12.0, 10.0, 11.0]]
    assert Adapted(Returns(torch.tensor([3.0])), class_order=[1, 0])(torch.zeros(1, 2)).tolist() == [[3.0, 0.0]]


def test_probabilities_and_multilabel():
    p = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    torch.testing.assert_close(Adapted(Returns(p), outputs="probabilities")(torch.zeros(2, 1)).softmax(1), p)
    one = Adapted(Returns(torch.tensor([0.25, 1.0])), outputs="probabilities")(torch.zeros(2, 1))
    torch.testing.assert_close(one.softmax(1), torch.tensor([[0.75, 0.25], [0.0, 1.0]]))
    many = torch.randn(2, 4)
    assert Adapted(Returns(many), outputs="multilabel")(torch.zeros(2, 1)) is many
    assert Adapted(Returns(torch.zeros(2, 1)), outputs="multilabel")(torch.zeros(2, 1)).shape == (2, 1)
    assert Adapted(Returns(torch.zeros(2)), outputs="multilabel")(torch.zeros(2, 1)).shape == (2, 1)


def test_buffers_are_not_saved():
    assert set(Adapted(nn.Linear(2, 2), 0.5, 0.5, class_order=[1, 0]).state_dict()) == {"module.weight", "module.bias"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"std": [0.5, 0.0]}, r"std: \[0.5, 0.0\] has a value that is not above 0"),
        ({"std": -1.0}, "std: -1.0 has a value"),
        ({"mean": float("nan")}, "mean: nan is empty or not finite"),
        ({"mean": []}, r"mean: \[\] is empty"),
        ({"mean": "x"}, "mean: 'x' is not a number"),
        ({"mean": [1, 2], "std": [1, 2, 3]}, "2 and 3 values"),
        ({"outputs": "softmax"}, "outputs: 'softmax' is unknown; choose one of logits"),
        ({"class_order": [0, 0]}, r"class_order: \[0, 0\] is not a permutation of 0..1"),
        ({"class_order": []}, "is not a permutation"),
        ({"class_order": ["a"]}, "is not a permutation"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(BadInput, match=words) as caught:
        Adapted(nn.Identity(), **settings)
    assert "\n" not in str(caught.value)


def test_bad_calls():
    with pytest.raises(BadInput, match="model: int cannot be called"):
        Adapted(3)
    with pytest.raises(BadInput, match=r"mean: 3 values for input of shape \(2, 1, 8, 8\)"):
        Adapted(nn.Flatten(), mean=[0.1, 0.2, 0.3])(torch.rand(2, 1, 8, 8))
    with pytest.raises(BadInput, match="class_order: 3 entries, but the model has 2 classes"):
        Adapted(nn.Identity(), class_order=[0, 1, 2])(torch.rand(4, 2))
    with pytest.raises(BadInput, match="outputs: 1 rows for a batch of 4"):
        Adapted(Returns(torch.zeros(1, 10)))(torch.rand(4, 2))
