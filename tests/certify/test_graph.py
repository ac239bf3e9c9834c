"""What is read off a model, and what is refused in one line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import epsball as eb
from epsball.certify import certify
from epsball.certify.graph import trace
from epsball.certify.ops import Map, Relu
from epsball.core import Victim
from epsball.errors import BadInput
from epsball.threats import Flow, Linf
from nets import networks, samples


class Own(nn.Module):
    def __init__(self, does: object) -> None:
        super().__init__()
        self.layer, self.does = nn.Linear(4, 3), does

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self.layer, x)  # type: ignore[operator, no-any-return]


def refused(net: nn.Module, words: str, shape: tuple[int, ...] = (4,)) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        certify(net, torch.zeros(2, *shape), torch.zeros(2).long(), Linf(), 0.1)
    assert "\n" not in str(caught.value)


def test_an_unknown_layer_is_named() -> None:
    refused(
        nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3)),
        "layer '1' has no certified bounds: use --method smoothing, or",
    )
    refused(nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), "layer '1' has no certified bounds")
    refused(nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(1.5)), "layer '1' has no certified bounds")
    refused(Own(lambda layer, x: layer(x).exp()), r"operation 'exp' \(exp\)")
    refused(Own(lambda layer, x: layer(x) * x.sum()), "operation 'sum'")
    refused(Own(lambda layer, x: layer(x * x)), "operation 'mul'")
    refused(Own(lambda layer, x: layer(x - x.mean(0))), "operation 'mean'")
    refused(Own(lambda layer, x: layer(x) * x.max().item()), "operation 'max'|cannot be traced")
    refused(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)), "layer '0'")


def test_a_subclass_of_a_layer_is_not_taken_for_it() -> None:
    class Twice(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * torch.relu(x)

    net = nn.Sequential(nn.Linear(4, 3), Twice())
    x = torch.ones(2, 4)
    y = net(x).argmax(1)
    assert torch.allclose(certify(net, x, y, Linf(), 0.0).margin.float(), net(x).topk(2).values.diff().abs().squeeze(1).detach())


def test_what_cannot_be_traced_is_refused() -> None:
    refused(Own(lambda layer, x: layer(x) if x.sum() > 0 else layer(-x)), "cannot be traced")
    with pytest.raises(BadInput, match="is no module"):
        certify(lambda x: x, torch.zeros(2, 4), torch.zeros(2).long(), Linf(), 0.1)


def test_an_alias_changed_in_place_is_found_out() -> None:
    refused(Own(_aliased), "differs from the model")


def _aliased(layer: nn.Module, x: Tensor) -> Tensor:
    h = x - 1
    torch.relu_(h)
    out: Tensor = layer(h)
    return out


def test_other_threats_and_labels_are_refused() -> None:
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.zeros(2, 1, 4, 4)
    with pytest.raises(BadInput, match="threat 'flow': has no certified bounds"):
        certify(net, x, torch.zeros(2).long(), Flow(), 1.0)
    with pytest.raises(BadInput, match="labels: 0 to 3 for 3 scores"):
        certify(net, x, torch.tensor([0, 3]), Linf(), 0.1)
    with pytest.raises(BadInput, match="one class for each"):
        certify(net, x, torch.zeros(2, 3).long(), Linf(), 0.1)
    with pytest.raises(BadInput, match="method 'lirpa'"):
        certify(net, x, torch.zeros(2).long(), Linf(), 0.1, "lirpa")  # type: ignore[arg-type]


def test_what_wrap_adds_is_read_too() -> None:
    net = networks()["pools"]
    x, _ = samples(net)
    bare = nn.Sequential(nn.BatchNorm2d(2, affine=False, eps=0.0), net)
    bare[0].running_mean, bare[0].running_var = torch.tensor([0.4, 0.5]), torch.tensor([0.2, 0.3]).square()
    y = bare.eval()(x).argmax(1)
    plain = certify(bare, x, y, Linf(), 0.01).margin
    wrapped = eb.wrap(net, mean=(0.4, 0.5), std=(0.2, 0.3), class_order=[2, 0, 1])
    moved = (y + 1) % 3  # column 1 of the result is the model's column 0
    assert torch.allclose(certify(wrapped, x, moved, Linf(), 0.01).margin, plain, rtol=0, atol=1e-5)
    with pytest.raises(BadInput, match="its outputs are probabilities"):
        certify(eb.wrap(net, outputs="probabilities"), x, y, Linf(), 0.01)


def test_a_single_score_is_read_as_two() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
    x = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    score = net(x).detach()[:, 0]
    found = certify(eb.wrap(net), x, (score > 0).long(), Linf(), 0.0)
    assert torch.allclose(found.margin.float(), score.abs(), atol=1e-6)


def test_the_parts_of_the_digit_networks() -> None:
    model = eb.load_model("digits-robust")
    with Victim(model.model):
        graph = trace(model, torch.zeros(1, 1, 8, 8))
    assert [type(node.op) for node in graph.nodes[1:]] == [Map, Relu, Map, Relu, Map, Map, Relu, Map]
    assert [graph.straight(place) for place in range(4)] == [0, 1, 2, 2]
    assert graph.bends() == [1, 3, 6]


def test_the_model_is_left_as_it_was() -> None:
    net = networks()["norm"].train()
    x, _ = samples(net)
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    certify(net, x, torch.zeros(len(x)).long(), Linf(), 0.01)
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(kept[name], value) for name, value in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
