"""ONNX files: every operator against onnxruntime, exported networks against torch, and files that must be refused."""

import copy
import warnings
import zlib
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")

import epsball as eb  # noqa: E402
from epsball.core import Access, Tally  # noqa: E402
from epsball.errors import AccessDenied, BadInput  # noqa: E402
from epsball.models.load import load_model  # noqa: E402
from epsball.models.onnx import load_onnx  # noqa: E402
from epsball.models.onnx.interpreter import Graph, Program  # noqa: E402
from epsball.models.onnx.load import _read  # noqa: E402
from epsball.models.onnx.node import Node, Unsupported  # noqa: E402
from epsball.models.onnx.operators import OPERATORS  # noqa: E402
from epsball.models.onnx.runtime import Scores  # noqa: E402

FLOAT, INT64, BOOL = 1, 7, 9
make = onnx.helper


@dataclass(frozen=True)
class Case:
    """One node on x: `more` are constant inputs (None: left out), `into` casts x first, `at` is the place of x among the inputs."""

    op: str
    shape: tuple = (2, 3)
    more: tuple = ()
    opset: int = 17
    into: int | None = None
    out: int = 0
    outs: int = 1
    at: int = 0
    low: float = -2.0
    high: float = 2.0
    smooth: bool = False
    attrs: dict = field(default_factory=dict)

    def __str__(self):
        words = [f"{k}={v}" for k, v in self.attrs.items()]
        return "-".join([self.op, str(self.opset), "x".join(map(str, self.shape)), *words])


def case(op, shape=(2, 3), *more, **options):
    known = {k: options.pop(k) for k in list(options) if k in Case.__dataclass_fields__}
    return Case(op, shape, more, attrs=options, **known)


def graph_of(c):
    """The node between casts, so that input and output are floating point."""
    values = [v if v is None else np.asarray(v) for v in c.more]
    names = ["" if v is None else f"c{i}" for i, v in enumerate(values)]
    inputs = [*names[: c.at], "t" if c.into else "x", *names[c.at :]]
    outputs = [f"y{i}" for i in range(c.outs)]
    nodes = [make.make_node("Cast", ["x"], ["t"], to=c.into)] if c.into else []
    nodes += [make.make_node(c.op, inputs, outputs, **c.attrs), make.make_node("Cast", [outputs[c.out]], ["y"], to=FLOAT)]
    tensors = [onnx.numpy_helper.from_array(v, n) for n, v in zip(names, values, strict=True) if v is not None]
    return model_of(nodes, tensors, c.shape, c.opset)


def model_of(nodes, tensors, shape, opset=17, out="y", domains=()):
    x = make.make_tensor_value_info("x", FLOAT, shape)
    y = make.make_tensor_value_info(out, FLOAT, None)
    opsets = [make.make_opsetid("", opset), *(make.make_opsetid(d, 1) for d in domains)]
    model = make.make_model(make.make_graph(nodes, "g", [x], [y], tensors), opset_imports=opsets)
    model.ir_version = 8 if opset < 21 else 10
    return model


def saved(model, path):
    onnx.save(model, str(path))
    return path


F = np.float32


def rnd(*shape, seed=1, low=-1.0, high=1.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(F)


def i64(*values):
    return np.array(values, dtype=np.int64)


SYMMETRIC = "half_pixel_symmetric"
IMG, LINE, CUBE = (2, 4, 6, 7), (2, 4, 9), (1, 2, 4, 5, 4)
CASES = [
    *(case(op, (2, 3), rnd(3), smooth=True) for op in ("Add", "Sub", "Mul", "Max", "Min", "Sum", "Mean")),
    case("Sum", (2, 3), rnd(3), rnd(2, 1), opset=13),
    case("Max", (2, 3), opset=8),
    case("Div", (2, 3), rnd(3, low=1, high=2), smooth=True),
    case("Div", (3, 4), i64(3), into=INT64, low=-20, high=20),
    case("Mod", (3, 4), i64(3), into=INT64, low=-20, high=20),
    case("Mod", (3, 4), np.array(0.7, F), fmod=1),
    case("Pow", (2, 3), np.array(3, F), smooth=True),
    case("Pow", (2, 3), np.array(2, np.int64)),
    case("Pow", (2, 3), np.array(0.5, F), low=0.5, smooth=True),
    *(case(op, (3, 4), np.array(0.2, F), opset=o) for op in ("Greater", "Less") for o in (9, 17)),
    *(case(op, (3, 4), i64(1), into=INT64) for op in ("Equal", "GreaterOrEqual", "LessOrEqual")),
    *(case(op, (2, 2), np.array([True, False]), into=BOOL, low=-0.4, high=0.4) for op in ("And", "Or", "Xor")),
    case("Not", (2, 2), into=BOOL),
    *(case(op, (2, 3), smooth=True) for op in ("Erf", "Exp", "Neg", "Sin", "Cos", "Tanh", "Atan", "Sigmoid", "Softsign", "Identity")),
    *(case(op, (2, 3)) for op in ("Abs", "Sign", "Floor", "Ceil", "Round", "Relu")),
    *(case(op, (2, 3), low=0.5, smooth=True) for op in ("Sqrt", "Log", "Reciprocal")),
    *(case(op, (2, 3), opset=7) for op in ("Relu", "LeakyRelu", "Elu", "Selu", "HardSigmoid", "Softplus")),
    case("LeakyRelu", (2, 3), alpha=0.3),
    case("PRelu", (2, 3, 4), rnd(3, 1), smooth=True),
    case("PRelu", (2, 3, 4), rnd(3, 1), opset=7),
    case("Elu", (2, 3), alpha=0.7, smooth=True),
    case("Celu", (2, 3), alpha=0.7),
    case("Selu", (2, 3), smooth=True),
    case("Selu", (2, 3), alpha=1.1, gamma=2.0),
    case("ThresholdedRelu", (2, 3), alpha=0.4),
    case("HardSigmoid", (2, 3), alpha=0.3, beta=0.4),
    case("HardSwish", (4, 3), opset=14, low=-5, high=5),
    case("Softplus", (2, 3), smooth=True),
    case("Softplus", (2, 8), low=-40, high=40),
    case("Mish", (2, 3), opset=18, smooth=True),
    case("Gelu", (2, 3), opset=20, smooth=True),
    case("Gelu", (2, 3), opset=20, approximate="tanh", smooth=True),
    case("Clip", (2, 3), opset=7, min=-0.5, max=0.5),
    case("Clip", (2, 3), opset=10, max=0.5),
    case("Clip", (2, 3), opset=10),
    case("Clip", (2, 3), np.array(-0.5, F), np.array(0.5, F)),
    case("Clip", (2, 3), None, np.array(0.5, F)),
    case("Clip", (2, 3), np.array(-0.5, F), opset=12),
    *(case(op, (2, 3, 4), opset=o) for op in ("Softmax", "LogSoftmax") for o in (7, 12, 13)),
    *(case(op, (2, 3, 4), opset=o, axis=a) for op in ("Softmax", "LogSoftmax") for o, a in ((11, 2), (11, -1), (12, 0), (13, 1))),
    case("Gemm", (2, 3), rnd(3, 4), smooth=True),
    case("Gemm", (2, 3), rnd(4, 3), rnd(4), transB=1),
    case("Gemm", (3, 2), rnd(4, 3), rnd(1, 4), transA=1, transB=1, alpha=0.5, beta=2.0),
    case("Gemm", (20, 3), rnd(3, 4), rnd(4), opset=7, alpha=2.0),
    case("MatMul", (2, 3), rnd(3, 4)),
    case("MatMul", (2, 5, 3), rnd(3, 4)),
    case("MatMul", (2, 3, 5, 4), rnd(3, 4, 2)),
    case("MatMul", (2, 3), rnd(3)),
    case("Einsum", (2, 3, 4), rnd(2, 4, 5), equation="bij,bjk->bik", smooth=True),
    case("Einsum", (2, 3, 4), equation="...ij->...ji"),
    case("Conv", LINE, rnd(3, 4, 3), rnd(3), pads=[1, 1], smooth=True),
    case("Conv", IMG, rnd(3, 4, 3, 3), rnd(3), strides=[2, 2], pads=[1, 1, 1, 1]),
    case("Conv", IMG, rnd(4, 1, 3, 3), group=4, opset=7),
    case("Conv", IMG, rnd(4, 2, 3, 2), group=2, dilations=[2, 1], pads=[0, 1, 2, 3]),
    case("Conv", IMG, rnd(3, 4, 3, 2), auto_pad="SAME_UPPER", strides=[2, 2]),
    case("Conv", IMG, rnd(3, 4, 2, 4), auto_pad="SAME_LOWER", strides=[1, 2]),
    case("Conv", IMG, rnd(3, 4, 2, 3), auto_pad="VALID"),
    case("Conv", CUBE, rnd(3, 2, 2, 2, 2), strides=[1, 2, 1]),
    case("ConvTranspose", LINE, rnd(4, 3, 3), rnd(3), strides=[2], smooth=True),
    case("ConvTranspose", IMG, rnd(4, 3, 3, 3), rnd(3), strides=[2, 2], pads=[1, 0, 1, 2], output_padding=[1, 1]),
    case("ConvTranspose", IMG, rnd(4, 2, 3, 3), group=2, dilations=[2, 1], opset=11),
    case("ConvTranspose", IMG, rnd(4, 3, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    case("ConvTranspose", IMG, rnd(4, 3, 3, 3), strides=[2, 2], auto_pad="SAME_LOWER"),
    case("ConvTranspose", IMG, rnd(4, 3, 4, 3), strides=[2, 2], output_shape=[13, 14]),
    case("ConvTranspose", CUBE, rnd(2, 3, 2, 2, 2)),
    case("MaxPool", LINE, kernel_shape=[3], strides=[2]),
    case("MaxPool", IMG, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("MaxPool", IMG, kernel_shape=[2, 3], strides=[2, 2], ceil_mode=1),
    case("MaxPool", IMG, kernel_shape=[3, 3], strides=[3, 2], ceil_mode=1, pads=[1, 1, 1, 1]),
    case("MaxPool", IMG, kernel_shape=[2, 2], strides=[3, 3], ceil_mode=1, pads=[0, 0, 1, 1]),
    case("MaxPool", IMG, kernel_shape=[2, 2], dilations=[2, 3], opset=10),
    case("MaxPool", IMG, kernel_shape=[3, 2], auto_pad="SAME_UPPER", strides=[2, 2], opset=7),
    case("MaxPool", IMG, kernel_shape=[3, 2], auto_pad="SAME_LOWER", strides=[2, 2]),
    case("MaxPool", CUBE, kernel_shape=[2, 2, 2], opset=8),
    case("AveragePool", LINE, kernel_shape=[3], strides=[2], smooth=True),
    case("AveragePool", IMG, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("AveragePool", IMG, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 0, 1, 2], count_include_pad=1, opset=7),
    case("AveragePool", IMG, kernel_shape=[3, 2], strides=[2, 2], ceil_mode=1, opset=10),
    case("AveragePool", IMG, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, pads=[1, 1, 1, 1], opset=19),
    case("AveragePool", IMG, kernel_shape=[3, 2], auto_pad="SAME_UPPER", strides=[2, 2]),
    case("AveragePool", CUBE, kernel_shape=[2, 2, 2]),
    *(case(op, s) for op in ("GlobalAveragePool", "GlobalMaxPool") for s in (LINE, IMG)),
    *(case("BatchNormalization", IMG, rnd(4), rnd(4), rnd(4), rnd(4, low=0.5), opset=o) for o in (7, 9, 14, 15)),
    case("BatchNormalization", (2, 4), rnd(4), rnd(4), rnd(4), rnd(4, low=0.5), epsilon=0.1, smooth=True),
    case("InstanceNormalization", IMG, rnd(4), rnd(4), smooth=True),
    case("InstanceNormalization", LINE, rnd(4), rnd(4), epsilon=0.1, opset=7),
    case("LayerNormalization", (2, 3, 4), rnd(4), rnd(4), smooth=True),
    case("LayerNormalization", (2, 3, 4), rnd(3, 4), axis=1, epsilon=0.1),
    case("GroupNormalization", IMG, rnd(2), rnd(2), num_groups=2, opset=18),
    case("GroupNormalization", IMG, rnd(4), rnd(4), num_groups=2, opset=21),
    case("LRN", IMG, size=3, alpha=0.1, bias=2.0, beta=0.6, smooth=True),
    case("LRN", IMG, size=5, alpha=0.5, opset=7),
    case("LpNormalization", (2, 3, 4), axis=1),
    case("LpNormalization", (2, 3, 4), p=1),
    *(
        case(f"Reduce{op}", (2, 3, 4), opset=o, **how)
        for op in ("Mean", "Max", "Min", "L1", "L2", "SumSquare", "LogSumExp", "Sum")
        for o, how in ((7 if op != "Max" else 12, {"axes": [1], "keepdims": 0}), (12, {"axes": [-1, 0]}), (11, {}))
    ),
    *(
        case(f"Reduce{op}", (2, 3, 4), i64(0, -1), opset=18, keepdims=0)
        for op in ("Mean", "Max", "Min", "L1", "L2", "SumSquare", "LogSumExp", "Sum")
    ),
    case("ReduceSum", (2, 3, 4), i64(1), opset=13),
    case("ReduceSum", (2, 3, 4), opset=13, noop_with_empty_axes=1),
    case("ReduceMean", (2, 3, 4), opset=18),
    *(case(op, (3, 4), axis=1, keepdims=k) for op in ("ArgMax", "ArgMin") for k in (0, 1)),
    case("ArgMax", (3, 4), into=INT64, low=-2, high=2, axis=-1, select_last_index=1),
    case("TopK", (3, 5), i64(2), outs=2),
    case("TopK", (3, 5), i64(2), outs=2, out=1, largest=0, axis=0),
    case("CumSum", (3, 5), np.array(1, np.int64), smooth=True),
    case("Reshape", (2, 3, 4), i64(0, -1)),
    case("Reshape", (2, 3, 4), i64(4, 6), opset=7),
    case("Reshape", (2, 3, 4), i64(-1), opset=14, allowzero=1),
    case("Flatten", (2, 3, 4)),
    case("Flatten", (2, 3, 4), axis=-1, opset=11),
    case("Flatten", (2, 3, 4), axis=0, opset=9),
    case("Transpose", (2, 3, 4)),
    case("Transpose", (2, 3, 4), perm=[0, 2, 1]),
    case("Squeeze", (2, 1, 3, 1), opset=11, axes=[1]),
    case("Squeeze", (2, 1, 3, 1), i64(-1), opset=13),
    case("Squeeze", (2, 1, 3, 1), opset=13),
    case("Unsqueeze", (2, 3), opset=11, axes=[0, 3]),
    case("Unsqueeze", (2, 3), i64(-1, 1), opset=13),
    case("Concat", (2, 3), rnd(2, 2), axis=1),
    case("Concat", (2, 3), rnd(2, 2), axis=-1, at=1),
    case("Split", (2, 6), outs=2, out=1, axis=1, opset=7),
    case("Split", (2, 6), outs=2, out=1, axis=1, split=[4, 2], opset=11),
    case("Split", (2, 6), i64(4, 2), outs=2, axis=-1, opset=13),
    case("Split", (2, 7), outs=3, out=2, axis=1, num_outputs=3, opset=18),
    case("Slice", (4, 6), starts=[1, -4], ends=[3, 100], opset=9),
    case("Slice", (4, 6), axes=[1], starts=[2], ends=[-1], opset=7),
    case("Slice", (4, 6), i64(0), i64(2**63 - 1), i64(1), i64(2), opset=10),
    case("Slice", (4, 6), i64(-1, 3), i64(-(2**62), 1), i64(1, 0), i64(-2, -1)),
    case("Slice", (4, 6), i64(1, 1), i64(3, 4)),
    case("Gather", (4, 5), i64(0, -1, 2)),
    case("Gather", (4, 5), np.array([[0, 1], [2, -2]]), axis=1),
    case("Gather", (4, 5), np.array(1), axis=1, opset=7),
    case("Gather", (4,), np.array(-1)),
    case("Squeeze", (1, 1), i64(0, 1), opset=13),
    case("Reshape", (1, 1), np.zeros(0, np.int64)),
    case("GatherElements", (3, 3), np.array([[0, -1], [1, 2]]), axis=1),
    case("Expand", (3, 1), i64(2, 1, 4)),
    case("Tile", (2, 3), i64(2, 1)),
    case("Pad", (2, 3, 4), pads=[0, 1, 0, 0, 0, 2], value=0.5, opset=7),
    case("Pad", (2, 3, 4), i64(0, 1, -1, 0, 0, 2), np.array(0.5, F), opset=11),
    case("Pad", (2, 3, 4), i64(0, 1, 2, 0, 0, 3), opset=13, mode="reflect"),
    case("Pad", (2, 3, 4), i64(0, 1, 2, 0, 0, 3), opset=13, mode="edge"),
    case("Pad", (2, 3, 4), i64(2, 1), np.array(1, F), i64(-1), opset=18),
    case("Pad", (2, 3, 4), i64(0, 1, 2, 0, 0, 3), opset=19, mode="wrap"),
    case("Shape", (2, 3, 4)),
    case("Shape", (2, 3, 4), opset=15, start=1, end=-1),
    case("Size", (2, 3, 4)),
    case("ConstantOfShape", (2,), into=INT64, low=2, high=4),
    case("ConstantOfShape", (2,), into=INT64, low=2, high=4, value=onnx.numpy_helper.from_array(np.array([7], np.int64))),
    case("Range", (), np.array(11, np.int64), np.array(3, np.int64), into=INT64, low=1, high=2),
    case("Range", (), np.array(-3, F), np.array(-1, F), low=1, high=1.5),
    case("Where", (2, 3), np.array([True, False, True]), rnd(2, 1), at=1, opset=9),
    case("Where", (2, 2), rnd(2), rnd(2, 1), into=BOOL),
    case("Cast", (2, 3), to=INT64, low=-9, high=9),
    case("Cast", (2, 3), to=11),
    case("Cast", (2, 3), to=BOOL),
    case("CastLike", (2, 3), i64(1), low=-9, high=9),
    case("Dropout", (2, 3), opset=7),
    case("Dropout", (2, 3), np.array(0.5, F), np.array(False), opset=13),
    case("Trilu", (3, 4)),
    case("Trilu", (3, 4), np.array(-1), upper=0),
    case("NonZero", (3, 4), into=INT64, high=3),
    case("DepthToSpace", (2, 8, 2, 3), blocksize=2),
    case("DepthToSpace", (2, 8, 2, 3), blocksize=2, mode="CRD", opset=11),
    case("SpaceToDepth", (2, 3, 4, 6), blocksize=2),
    case("Upsample", (1, 2, 3, 4), np.array([1, 1, 2, 3], F), opset=9),
    case("Upsample", (1, 2, 3, 4), np.array([1, 1, 2, 2], F), opset=9, mode="linear"),
    case("Upsample", (1, 2, 3, 4), opset=7, scales=[1.0, 1.0, 2.0, 2.0]),
    case("Resize", (1, 2, 3, 4), np.array([1, 1, 2, 2], F), opset=10),
    case("Resize", (1, 2, 3, 4), np.array([1, 1, 2, 2], F), opset=10, mode="linear"),
    *(
        case("Resize", (1, 2, 5, 6), None, np.array([1, 1, 2, 0.6], F), coordinate_transformation_mode=rule, nearest_mode=near)
        for rule in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        for near in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
    ),
    *(
        case("Resize", (1, 2, 5, 6), None, None, i64(1, 2, 8, 3), coordinate_transformation_mode=rule, mode=mode)
        for rule in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        for mode in ("linear", "cubic")
    ),
    case(
        "Resize", (1, 2, 5, 6), None, None, i64(1, 2, 8, 4), opset=19, mode="linear", coordinate_transformation_mode="half_pixel_symmetric"
    ),
    case("Resize", (1, 2, 5, 6), None, None, i64(8, 3), opset=18, mode="linear", axes=[2, 3], smooth=True),
]


def input_of(c):
    # the seed hangs on the case, so that a case keeps its numbers when others are added
    rng = np.random.default_rng(zlib.crc32(str(c).encode()))
    return torch.from_numpy(np.asarray(rng.uniform(c.low, c.high, c.shape), dtype=F))


def both(model, path):
    """The interpreter and the runtime on one file."""
    program, why, _ = _read(saved(model, path))
    assert why is None, why
    return Graph(program), Scores(path, program)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_operator_equals_onnxruntime(c, tmp_path):
    graph, scores = both(graph_of(c), tmp_path / "m.onnx")
    x = input_of(c)
    mine, other = graph(x), scores(x)
    assert mine.shape == other.shape
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("c", [c for c in CASES if c.smooth], ids=str)
def test_gradients_are_right(c, tmp_path):
    graph, _ = both(graph_of(c), tmp_path / "m.onnx")
    graph = graph.double()
    assert torch.autograd.gradcheck(graph, input_of(c).double().requires_grad_(), fast_mode=True)


def test_every_operator_has_a_case():
    assert set(OPERATORS) - {c.op for c in CASES} == set()


class Block(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.a, self.b = nn.Conv2d(n, n, 3, padding=1, bias=False), nn.Conv2d(n, n, 3, padding=1)
        self.norm, self.pool = nn.BatchNorm2d(n), nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(torch.relu(x + self.b(torch.relu(self.norm(self.a(x))))))


class Patches(nn.Module):
    def __init__(self, size, width):
        super().__init__()
        self.cut = nn.Conv2d(1, width, size, size)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))

    def forward(self, x):
        patches = self.cut(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(x.shape[0], -1, -1), patches], 1) + self.place


class First(nn.Module):
    def forward(self, x):
        return x[:, 0]


class Inverted(nn.Module):
    """MobileNetV3's block: wide, depthwise, squeezed and excited, narrow."""

    def __init__(self, n):
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(n, 2 * n, 1, bias=False), nn.BatchNorm2d(2 * n), nn.Hardswish())
        self.deep = nn.Sequential(nn.Conv2d(2 * n, 2 * n, 3, padding=1, groups=2 * n, bias=False), nn.BatchNorm2d(2 * n), nn.ReLU6())
        squeezed = nn.AdaptiveAvgPool2d(1), nn.Conv2d(2 * n, 4, 1), nn.ReLU(), nn.Conv2d(4, 2 * n, 1)
        self.share, self.narrow = nn.Sequential(*squeezed, nn.Hardsigmoid()), nn.Sequential(nn.Conv2d(2 * n, n, 1), nn.BatchNorm2d(n))

    def forward(self, x):
        y = self.deep(self.wide(x))
        return x + self.narrow(y * self.share(y))


class Next(nn.Module):
    """ConvNeXt's block: depthwise 7 x 7, channels last, layer norm, two linear layers, layer scale."""

    def __init__(self, n):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(n, n, 7, padding=3, groups=n), nn.Parameter(torch.full((n, 1, 1), 0.5))
        self.mlp = nn.Sequential(nn.LayerNorm(n, eps=1e-6), nn.Linear(n, 4 * n), nn.GELU(), nn.Linear(4 * n, n))

    def forward(self, x):
        return x + self.scale * self.mlp(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    def __init__(self, width, heads, plain=False):
        super().__init__()
        self.heads, self.plain, self.norm = heads, plain, nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        b, n, width = x.shape
        q, k, v = self.mix(self.norm(x)).reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if self.plain:
            seen = torch.softmax(q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5, -1) @ v
        else:
            seen = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(seen.transpose(1, 2).reshape(b, n, width))
        return x + self.mlp(x)


def nets(plain=False):
    torch.manual_seed(0)
    mobile = [nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish(), Inverted(8), Inverted(8)]
    wide = [nn.Conv2d(1, 8, 2, 2), nn.GroupNorm(1, 8), Next(8), nn.Conv2d(8, 16, 2, 2), Next(16)]
    flat = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return {
        "mlp": nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 4)),
        "cnn": nn.Sequential(nn.Conv2d(1, 4, 3), nn.LeakyReLU(), nn.AvgPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(36, 4)),
        "resnet": nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), Block(6), Block(6), *flat, nn.Linear(6, 4)),
        "mobilenet": nn.Sequential(*mobile, *flat, nn.Linear(8, 16), nn.Hardswish(), nn.Linear(16, 4)),
        "convnext": nn.Sequential(*wide, *flat, nn.LayerNorm(16), nn.Linear(16, 4)),
        "vit": nn.Sequential(Patches(4, 8), Attention(8, 2, plain), Attention(8, 2, plain), First(), nn.LayerNorm(8), nn.Linear(8, 4)),
        "up": nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.ConvTranspose2d(1, 2, 3, 2), nn.Flatten(), nn.LazyLinear(4)),
    }


def export(net, path, *, opset=17, batch=2, dynamic=True):
    axes = {"x": {0: "batch"}, "y": {0: "batch"}} if dynamic else None
    x = torch.rand(batch, 1, 8, 8)
    net.eval()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        names = {"input_names": ["x"], "output_names": ["y"]}
        torch.onnx.export(net, (x,), str(path), opset_version=opset, dynamo=False, dynamic_axes=axes, **names)
    return path


FIRST_SET = {"convnext": 9, "vit": 9, "up": 11}  # before: no Erf, no Expand, an Upsample of other coordinates


@pytest.mark.parametrize(
    ("name", "opset"), [(n, o) for n in nets() for o in (7, 8, 9, 10, 11, 12, 13, 14, 17, 20) if o >= FIRST_SET.get(n, 7)]
)
def test_exported_networks(name, opset, tmp_path):
    """From the first set of operators that the exporter can write each of them in; attention is spelled out where it is none yet."""
    net = nets(plain=opset < 14)[name]
    model, notes = load_model(str(export(net, tmp_path / "m.onnx", opset=opset)), mean=0.4, std=0.5)
    assert model.access is Access.GRADIENT, notes
    for batch in (1, 5):
        x = torch.rand(batch, 1, 8, 8, requires_grad=True)
        mine, other = model(x), net((x - 0.4) / 0.5)
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
        (g,), (h,) = torch.autograd.grad(mine[:, 1].sum(), x), torch.autograd.grad(other[:, 1].sum(), x)
        assert float((g - h).norm() / h.norm()) < 1e-4


def test_fixed_batch_and_the_shape_of_inputs(tmp_path):
    net = nets()["cnn"]
    model = eb.load_model(str(export(net, tmp_path / "m.onnx", batch=3, dynamic=False)))
    assert model.fixed_batch == model.batch_size == 3
    x = torch.rand(7, 1, 8, 8)
    outcome = eb.attacks.pgd(steps=2)(model, x, net(x).argmax(1), radius=0.1)
    assert len(outcome.x_adv) == 7
    with pytest.raises(BadInput, match=r"input of shape \(3, 1, 9, 8\), but the ONNX file wants \(3, 1, 8, 8\)"):
        model.model(torch.rand(3, 1, 9, 8))


def test_a_batch_of_one_that_the_exporter_fixed(tmp_path):
    w, shape = onnx.numpy_helper.from_array(rnd(6, 3), "w"), onnx.numpy_helper.from_array(i64(1, 6), "s")
    nodes = [make.make_node("Reshape", ["x", "s"], ["f"]), make.make_node("MatMul", ["f", "w"], ["y"])]
    path = saved(model_of(nodes, [w, shape], ["n", 2, 3]), tmp_path / "m.onnx")
    victim = eb.load_model(str(path))
    assert (victim.access, victim.fixed_batch) == (Access.GRADIENT, 1)
    x = torch.rand(4, 2, 3)
    torch.testing.assert_close(victim.outputs(x, Tally.zeros(4)), x.flatten(1) @ torch.from_numpy(rnd(6, 3)))


def test_ties_at_a_bound_keep_their_gradient(tmp_path):
    graph, _ = both(graph_of(case("Clip", (1, 3), np.array(0, F), np.array(6, F))), tmp_path / "m.onnx")
    x = torch.tensor([[0.0, 6.0, 7.0]], requires_grad=True)
    assert torch.autograd.grad(graph(x).sum(), x)[0].tolist() == [[1, 1, 0]]


def test_attacks_see_the_same_model_as_in_torch(tmp_path):
    net = nets()["resnet"]
    x = torch.rand(6, 1, 8, 8)
    y = net.eval()(x).argmax(1)
    files = eb.load_model(str(export(net, tmp_path / "m.onnx")))
    own = eb.wrap(net)
    a, b = (eb.attacks.pgd(steps=5)(m, x, y, radius=0.02) for m in (files, own))
    assert torch.equal(a.reached, b.reached)
    assert float((a.x_adv - b.x_adv).abs().max()) < 1e-3
    assert torch.equal(a.backwards, b.backwards)


def test_it_moves_and_copies_and_small_batches_agree(tmp_path):
    model, _ = load_model(str(export(nets()["cnn"], tmp_path / "m.onnx")))
    x = torch.rand(40, 1, 8, 8)
    assert torch.equal(torch.cat([model(row[None]) for row in x[:5]]), model(x)[:5])
    twin = copy.deepcopy(model).double()
    assert twin(x.double()).dtype is torch.float64
    assert float((twin(x.double()) - model(x)).abs().max()) < 1e-5
    assert not list(model.parameters())
    there = copy.deepcopy(model).to("meta")
    assert {b.device.type for b in there.module.buffers()} == {"meta"}


def unknown(path, op="Det", **attrs):
    nodes = [make.make_node(op, ["x"], ["d"], **attrs), make.make_node("Flatten", ["d"], ["f"], axis=1)]
    nodes += [make.make_node("Gemm", ["f", "w"], ["y"])]
    return saved(model_of(nodes, [onnx.numpy_helper.from_array(rnd(2, 3), "w")], ["n", 2, 4, 4], 17), path)


def test_unknown_operators_leave_scores(tmp_path):
    path = unknown(tmp_path / "m.onnx")
    model, notes = load_model(str(path))
    assert model.access is Access.SCORES
    assert notes[-1] == "operator Det is not known to the interpreter: scores by onnxruntime only, no gradients"
    x = torch.rand(5, 2, 4, 4)
    torch.testing.assert_close(model(x), torch.linalg.det(x) @ torch.from_numpy(rnd(2, 3)), rtol=1e-4, atol=1e-6)
    victim = eb.load_model(str(path))
    assert victim.access is Access.SCORES
    with pytest.raises(AccessDenied):
        eb.attacks.pgd(steps=1)(victim, x, torch.zeros(5, dtype=torch.int64), radius=0.1)
    # unless the output does not hang on it
    nodes = [make.make_node("Det", ["x"], ["d"]), make.make_node("GlobalMaxPool", ["x"], ["y"])]
    graph, _ = both(model_of(nodes, [], [2, 2, 4, 4]), path)
    assert [node.kind for node in graph.nodes] == ["GlobalMaxPool"]


@pytest.mark.parametrize(
    ("c", "words"),
    [
        (case("AveragePool", IMG, kernel_shape=[2, 2], dilations=[2, 2], opset=19), "AveragePool with dilations"),
        (case("MaxPool", IMG, kernel_shape=[2, 2], outs=2, out=1), "reading 'y1', an output that is not computed"),
        (case("CumSum", (2, 3), np.array(1), reverse=1), "CumSum with reverse=1"),
        (case("Cast", (2, 3), to=13), "Cast to element type 13"),
        (case("Relu", (2, 3), opset=6), "operator set 6 is older than 7"),
    ],
    ids=str,
)
def test_unknown_options_leave_scores(c, words, tmp_path):
    import re

    model = graph_of(c)
    loaded = None
    try:
        loaded = load_onnx(saved(model, tmp_path / "m.onnx"))
    except BadInput as refused:  # the runtime may not know it either
        assert "refused by onnxruntime" in str(refused)  # noqa: PT017
    if loaded is not None:
        assert loaded.access is Access.SCORES
        assert re.search(words, loaded.notes[-1]), loaded.notes


def test_an_interpreter_that_differs_is_not_used(tmp_path, monkeypatch):
    path = saved(graph_of(case("Relu", (2, 3))), tmp_path / "m.onnx")
    assert load_onnx(path).access is Access.GRADIENT
    monkeypatch.setitem(OPERATORS, "Relu", lambda node, x: x.relu() * 1.001)
    loaded = load_onnx(path)
    assert loaded.access is Access.SCORES
    assert "the interpreter differs from onnxruntime by 0.001 of the largest score" in loaded.notes[-1]

    def fails(node, x):
        raise RuntimeError("shapes\ndiffer")

    monkeypatch.setitem(OPERATORS, "Relu", fails)
    assert "the interpreter fails (shapes differ)" in load_onnx(path).notes[-1]


def test_outputs_are_chosen(tmp_path):
    nodes = [make.make_node("ArgMax", ["x"], ["label"], axis=1), make.make_node("Relu", ["x"], ["feature"])]
    nodes += [make.make_node("Neg", ["x"], ["logits"])]
    model = model_of(nodes, [], ["n", 3], out="logits")
    for name, kind in (("label", INT64), ("feature", FLOAT)):
        model.graph.output.insert(0, make.make_tensor_value_info(name, kind, None))
    found, notes = load_model(str(saved(model, tmp_path / "m.onnx")))
    assert found(torch.tensor([[1.0, 2, 3]])).tolist() == [[-1, -2, -3]]
    assert "of the outputs feature, label, logits the scores are logits" in notes
    del model.graph.output[2], model.graph.output[0]
    with pytest.raises(BadInput, match=r"has no output of scores .label."):
        load_model(str(saved(model, tmp_path / "m.onnx")))


def external(path, where, **more):
    weights = onnx.numpy_helper.from_array(rnd(3, 4), "w")
    data = weights.raw_data
    weights.ClearField("raw_data")
    weights.data_location = 1
    for key, value in {"location": where, **more}.items():
        weights.external_data.add(key=key, value=str(value))
    saved(model_of([make.make_node("MatMul", ["x", "w"], ["y"])], [weights], ["n", 3]), path)
    return data


def test_external_data_stays_in_the_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    data = external(folder / "m.onnx", "w.bin")
    (folder / "w.bin").write_bytes(data)
    (tmp_path / "w.bin").write_bytes(data)
    x = torch.rand(2, 3)
    torch.testing.assert_close(load_onnx(folder / "m.onnx").module(x), x @ torch.from_numpy(rnd(3, 4)))
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    for where in ("../w.bin", str(tmp_path / "w.bin"), "link.bin"):
        external(folder / "m.onnx", where)
        with pytest.raises(BadInput, match=r"leaves the folder of the model; put it beside the model"):
            load_onnx(folder / "m.onnx")
    for more in ({"length": 49}, {"offset": 8, "length": 48}, {"offset": -1}):
        external(folder / "m.onnx", "w.bin", **more)
        with pytest.raises(BadInput, match=r"is shorter than the model says"):
            load_onnx(folder / "m.onnx")
    external(folder / "m.onnx", "w.bin", offset="many")
    with pytest.raises(BadInput, match=r"cannot be read"):
        load_onnx(folder / "m.onnx")


def test_external_data_of_attributes_and_functions_is_looked_at(tmp_path):
    tensor = onnx.numpy_helper.from_array(rnd(3), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    tensor.external_data.add(key="location", value="../w.bin")
    node = make.make_node("Constant", [], ["c"], value=tensor)
    inner = make.make_graph([node], "inner", [], [make.make_tensor_value_info("c", FLOAT, [3])])
    plain = [make.make_node("Relu", ["x"], ["y"])]
    function = make.make_function("own", "F", ["a"], ["c"], [node], [make.make_opsetid("", 17)])
    outer = make.make_node("If", ["k"], ["z"], then_branch=inner, else_branch=inner)
    for nodes, functions in (([node, *plain], []), ([outer, *plain], []), (plain, [function])):
        model = model_of(nodes, [], ["n", 3])
        model.functions.extend(functions)
        with pytest.raises(BadInput, match=r"leaves the folder"):
            load_onnx(saved(model, tmp_path / "m.onnx"))


def test_what_does_not_fit(tmp_path, monkeypatch):
    path = export(nets()["mlp"], tmp_path / "m.onnx")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"hello", b"", b"\xff" * 100):
        (tmp_path / "cut.onnx").write_bytes(damaged)
        with pytest.raises(BadInput, match=r"damaged or no ONNX file|does not take one batch|refused by onnxruntime") as caught:
            load_model(str(tmp_path / "cut.onnx"))
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match=r"carries its own; leave --weights out"):
        load_model(str(path), "w.pt")
    with pytest.raises(BadInput, match=r"cannot read 'missing.onnx'"):
        load_model("missing.onnx")
    two = onnx.load(str(path))
    two.graph.input.append(make.make_tensor_value_info("z", FLOAT, [1]))
    with pytest.raises(BadInput, match=r"does not take one batch of inputs .it has 2."):
        load_model(str(saved(two, tmp_path / "two.onnx")))
    short = onnx.load(str(path))
    short.graph.initializer[0].dims[0] += 1
    with pytest.raises(BadInput, match=r"tensor .* is damaged|refused by onnxruntime"):
        load_model(str(saved(short, tmp_path / "short.onnx")))
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(BadInput, match=r"ONNX files need onnxruntime: pip install 'epsball\[onnx\]'"):
        load_model(str(path))


@pytest.mark.parametrize("kind", ["ConstantOfShape", "Range", "Expand", "Tile", "Pad"])
def test_small_inputs_do_not_fill_the_memory(kind):
    huge = torch.tensor([2**20, 2**20])
    node = Node(kind, (), (), {}, 13)
    inputs = {"ConstantOfShape": (huge,), "Range": (torch.tensor(0), torch.tensor(2**40), torch.tensor(1)), "Pad": (torch.ones(1), huge**2)}
    with pytest.raises(torch.OutOfMemoryError, match=r"a tensor of \d{13} elements"):
        OPERATORS[kind](node, *inputs.get(kind, (torch.ones(1, 1), huge)))


def test_whole_numbers_and_odd_types_leave_scores(tmp_path):
    model = graph_of(case("Relu", (2, 3)))
    model.graph.input[0].type.tensor_type.elem_type = INT64
    model.graph.node[0].op_type = "Neg"
    loaded = load_onnx(saved(model, tmp_path / "m.onnx"))
    assert loaded.access is Access.SCORES
    assert "the input is of type int64" in loaded.notes[-1]
    assert loaded.module(torch.tensor([[1.0, 2.0, 3.0], [0, 0, 0]])).tolist() == [[-1, -2, -3], [0, 0, 0]]


def test_a_program_without_its_output_says_so():
    with pytest.raises(Unsupported, match=r"does not compute its output 'y'"):
        Graph(Program((), {}, "x", None, torch.float32, "y"))(torch.zeros(1))


def test_masks_of_infinity_pass_the_check_of_weights(tmp_path):
    mask = np.where(np.eye(3, dtype=bool), 0, -np.inf).astype(F)
    nodes = [make.make_node("Add", ["x", "m"], ["s"]), make.make_node("Softmax", ["s"], ["y"], axis=-1)]
    model = model_of(nodes, [onnx.numpy_helper.from_array(mask, "m")], [3, 3])
    found, _ = load_model(str(saved(model, tmp_path / "m.onnx")))
    assert torch.equal(found(torch.rand(3, 3)), torch.eye(3))
