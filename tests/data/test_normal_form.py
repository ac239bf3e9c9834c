"""What arrays become: pixels, layouts, boxes, labels, subsets."""

import numpy as np
import pytest
import torch

from epsball.data import from_arrays
from epsball.data.labels import Labels, read_labels, reorder
from epsball.data.sample import ranks, subset
from epsball.errors import BadInput

Y = [0, 1, 0, 1]


def pixels(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 256, (4, *shape)).astype(dtype)


def fails(words, x, y=Y, **settings):
    with pytest.raises(BadInput, match=words) as caught:
        from_arrays(x, y, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "layout", "result"),
    [
        ((28, 28), "auto", (1, 28, 28)),
        ((28, 28), "hw", (1, 28, 28)),
        ((28, 28, 1), "auto", (1, 28, 28)),
        ((8, 9, 3), "auto", (3, 8, 9)),
        ((4, 8, 9), "auto", (4, 8, 9)),
        ((3, 8, 3), "chw", (3, 8, 3)),
        ((3, 8, 3), "hwc", (3, 3, 8)),
        ((13, 8, 9), "chw", (13, 8, 9)),
        ((3, 8, 9), "flat", (216,)),
        ((20,), "auto", (20,)),
        ((2, 128), "auto", (2, 128)),
        ((128, 2), "auto", (128, 2)),
        ((7, 14), "auto", (7, 14)),
        ((7, 13), "auto", (1, 7, 13)),
        ((8, 100), "auto", (1, 8, 100)),
        ((2, 128), "hw", (1, 2, 128)),
        ((28, 28), "raw", (28, 28)),
        ((5, 32, 3), "raw", (5, 32, 3)),
        ((2, 3, 4, 5), "raw", (2, 3, 4, 5)),
        ((20,), "raw", (20,)),
    ],
)
def test_layouts(shape, layout, result):
    raw = pixels(*shape)
    data = from_arrays(raw, Y, layout=layout)
    assert tuple(data.x.shape) == (4, *result)
    assert data.x.dtype == torch.float32
    assert data.x.is_contiguous()
    assert data.total == 4
    assert data.indices.tolist() == [0, 1, 2, 3]
    assert len(data.notes) == 1
    channels_first = len(shape) == 3 and result[0] == shape[-1] and layout not in ("flat", "raw") and shape[0] != result[0]
    expected = np.moveaxis(raw, -1, 1) if channels_first or (layout == "hwc") else raw
    assert np.array_equal(data.x.numpy().reshape(-1), expected.reshape(-1).astype(np.float32) / np.float32(255))


def test_the_sentence():
    expected = "images arrived as uint8 8x9x3 (HWC); brought to float32 3x8x9 in [0, 1], 0..255 mapped onto it"
    assert from_arrays(pixels(8, 9, 3), Y).notes == (expected,)


@pytest.mark.parametrize(
    ("shape", "layout", "words"),
    [
        ((3, 32, 3), "auto", "unclear which axis of 4x3x32x3 holds the channels; say --layout"),
        ((5, 32, 32), "auto", "unclear which axis"),
        ((1, 2, 3, 4), "auto", "unclear which axis"),
        ((8, 8), "hwc", "layout: 'hwc' needs 4 axes"),
        ((64,), "hw", "layout: 'hw' needs 3 axes"),
        ((8, 8), "nchw", "layout: 'nchw' is unknown; choose one of auto"),
        ((), "auto", r"shape \(4,\) is not a batch"),
    ],
)
def test_bad_layouts(shape, layout, words):
    fails(words, pixels(*shape), layout=layout)


def test_float_in_the_box_is_left_alone():
    x = torch.rand(4, 1, 5, 5)
    data = from_arrays(x, torch.tensor(Y))
    assert torch.equal(data.x, x)
    assert data.notes == ()
    assert data.x.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.bool])
def test_other_types_are_converted_with_a_note(dtype):
    x = torch.rand(4, 1, 5, 5).to(dtype)
    data = from_arrays(x, Y)
    torch.testing.assert_close(data.x, x.float())
    assert ("brought to float32" in "".join(data.notes)) == (dtype in (torch.float64, torch.bool))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.float64, np.uint16])
def test_bytes_of_any_type_are_scaled_alike(dtype):
    raw = pixels(6, 6)
    data = from_arrays(raw.astype(dtype), Y)
    assert np.array_equal(data.x.numpy()[:, 0], raw.astype(np.float32) / np.float32(255))
    assert "0..255 mapped onto it" in data.notes[0]


def test_other_boxes():
    raw = pixels(6, 6)
    assert np.array_equal(from_arrays(raw, Y, box=(0, 255)).x.numpy()[:, 0], raw)
    assert np.array_equal(from_arrays(raw.astype(np.float32), Y, box=(0, 255)).x.numpy()[:, 0], raw)
    np.testing.assert_allclose(from_arrays(raw, Y, box=(-1, 1)).x.numpy()[:, 0], raw / 127.5 - 1, atol=1e-6)
    high = from_arrays(np.array([[0.0], [0.3], [0.1], [0.2]]), Y, box=(0, 0.3)).x.max()
    assert float(high) <= 0.3  # float32(0.3) is above 0.3


def test_slight_excess_is_clamped():
    def with_peak(peak):
        x = np.full((4, 6), 0.5)
        x[0, 0] = peak
        return from_arrays(x.astype(np.float32), Y)

    assert with_peak(1 + 5e-7).x.max() == 1
    assert with_peak(1 + 5e-7).notes == ()
    assert with_peak(-5e-5).x.min() == 0
    assert "values beyond the box by up to 5.0e-05 were clamped" in with_peak(-5e-5).notes[-1]


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.linspace(-2, 2, 16).reshape(4, 4), r"values in \[-2, 2\] leave the box \[0, 1\]; undo the normalization"),
        (np.linspace(0, 254.5, 16).reshape(4, 4), r"values in \[0, 254.5\] leave the box .*; divide by"),
        (np.arange(16.0).reshape(4, 4), r"values in \[0, 15\] leave the box"),
        (np.full((4, 4), 1.001), "leave the box"),
        (np.full((4, 4), 999), "leave the box"),
        (np.full((4, 4), -1), "leave the box"),
        (np.where(np.eye(4) > 0, np.nan, 0), "4 of 16 values are NaN or infinite"),
        (np.where(np.eye(4) > 0, np.inf, 0), "4 of 16 values are NaN or infinite"),
        (np.zeros((4, 4), dtype=complex), "type complex128 holds no pixel values"),
        (np.full((4, 4), "a"), "holds no pixel values"),
        (np.zeros((0, 4)), r"the data is empty, shape \(0, 4\)"),
        (np.zeros((4, 0)), "the data is empty"),
        ([[1, 2], [3]], "different shapes"),
    ],
)
def test_bad_pixels(x, words):
    fails(words, x)


def test_dark_bytes_get_a_note():
    assert any("largest pixel value is 16 of 255" in note for note in from_arrays(np.full((4, 8, 8), 16, dtype=np.uint8), Y).notes)


def test_the_scale_comes_from_the_whole_data():
    x = np.zeros((40, 5))
    x[7, 0] = 255.0
    for n in (2, 5, 39):
        assert "0..255 mapped" in " ".join(from_arrays(x, [0, 1] * 20, n=n).notes)


@pytest.mark.parametrize("box", [(1, 0), (0, 0), (0, float("nan")), 3, "ab", (0, 1, 2)])
def test_bad_boxes(box):
    fails("box: .*; give", pixels(4, 4), box=box)


@pytest.mark.parametrize(
    "y",
    [
        Y,
        np.array(Y, dtype=np.uint8),
        np.array(Y, dtype=np.uint64),
        np.array(Y, dtype=np.int8),
        np.array(Y, dtype=bool),
        np.array(Y, dtype=np.float32),
        torch.tensor(Y, dtype=torch.int32),
        torch.tensor(Y, dtype=torch.bfloat16),
        np.array(Y)[:, None],
        np.eye(2)[Y],
        torch.eye(2, dtype=torch.int64)[Y],
        np.array(["cat", "dog"])[Y],
    ],
)
def test_labels_of_every_kind(y):
    data = from_arrays(pixels(4, 4), y)
    assert data.y.dtype == torch.int64
    assert data.y.tolist() == Y


def test_label_notes_and_names():
    assert "brought to int64" in from_arrays(pixels(4, 4), np.array(Y, dtype=float)).notes[-1]
    assert "one-hot over 2 classes" in from_arrays(pixels(4, 4), np.eye(2, dtype=int)[Y]).notes[-1]
    assert from_arrays(pixels(4, 4), np.array(["cat", "dog"])[Y]).class_names == ("cat", "dog")
    assert from_arrays(pixels(4, 4), Y, class_names=("a", "b")).class_names == ("a", "b")


def test_multilabel():
    y = np.array([[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0]])
    data = from_arrays(pixels(4, 4), y, n=2)
    assert data.y.shape == (2, 3)
    assert any("multi-label: 3 classes" in note for note in data.notes)
    one_each = np.eye(3, dtype=int)[[0, 1, 2, 0]]
    assert from_arrays(pixels(4, 4), one_each, label_kind="multilabel").y.tolist() == one_each.tolist()
    assert from_arrays(pixels(4, 4), np.array(Y)[:, None], label_kind="multilabel").y.shape == (4, 1)


@pytest.mark.parametrize(
    ("y", "settings", "words"),
    [
        ([0, 1, 0], {}, r"labels: shape \(3,\) for 4 images; give one label for each image"),
        (np.zeros((4, 2, 2)), {}, "labels: shape"),
        ([[0], [1, 2], [0], [1]], {}, "labels: the rows have different lengths"),
        (3, {}, r"labels: shape \(\) for 4 images"),
        ([0, -1, 0, -2], {}, "labels: 2 are negative, first -1 at row 1; count classes from 0"),
        ([0, 1.5, 0, 1], {}, "labels: 1 are not whole numbers, first 1.5 at row 1"),
        ([0, np.nan, 0, np.inf], {}, "labels: 2 are not whole numbers, first nan at row 1"),
        ([0, 2**40, 0, 1], {}, "is no class index"),
        (np.array([0, 2**63, 0, 1], dtype=np.uint64), {}, "is no class index"),
        (np.array([0, None, 0, 1]), {}, "labels: type object"),
        (np.array([0, 1j, 0, 1]), {}, "labels: type complex128"),
        ([3, 3, 3, 3], {}, "labels: all 4 samples are of class 3; give data with at least two classes"),
        (np.full((4, 2), 7), {}, "values up to 7 is neither one-hot nor multi-label"),
        ([[1, 1], [0, 1], [1, 0], [1, 0]], {"label_kind": "classes"}, "row 0 names 2 classes"),
        (Y, {"label_kind": "multilabel"}, "is one class a row, not multi-label"),
        (Y, {"label_kind": "soft"}, "label_kind: 'soft' is unknown"),
        ([0, 1, 2, 1], {"class_names": ("a", "b")}, "2 is out of range for 2 class names"),
        ([[1, 1], [0, 1], [1, 0], [1, 0]], {"class_names": ("a",)}, "2 columns for 1 class names"),
    ],
)
def test_bad_labels(y, settings, words):
    fails(words, pixels(4, 4), y, **settings)


LABELS = Labels(np.array([0, 2, 1]), ("ant", "bee", "cat"), ())


@pytest.mark.parametrize(
    ("order", "values", "names"),
    [
        ({"ant": 5, "bee": 1, "cat": 0}, [5, 0, 1], ("cat", "bee", "2", "3", "4", "ant")),
        ({0: 1, 1: 0, 2: 2}, [1, 2, 0], ("bee", "ant", "cat")),
        (["cat", "dog", "ant", "bee"], [2, 0, 3], ("cat", "dog", "ant", "bee")),
        ([1, 2, 0], [1, 0, 2], ("cat", "ant", "bee")),
    ],
)
def test_class_order(order, values, names):
    found = reorder(LABELS, order)
    assert found.values.tolist() == values
    assert found.names == names
    assert "model's class order" in found.notes[-1]


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ({"ant": 5, "bee": 1}, "class 'cat' of the data is missing; map every class"),
        (["cat", "ant"], "1 of the data's classes are missing, first 'bee'"),
        ([1, 0], "2 entries, but the labels reach 2"),
        ([1, 0, 0], "two classes get the same index"),
        ([1, 0, -4], "class 2 maps to -4"),
        ([1, 0, 0.5], "class 2 maps to 0.5"),
        ({"ant": 0, "bee": 0, "cat": 0}, "every class maps to 0"),
        ("cat,ant", "is no order"),
        (7, "is no order"),
        ([], "0 entries"),
    ],
)
def test_bad_class_orders(order, words):
    with pytest.raises(BadInput, match=words):
        reorder(LABELS, order)


def test_class_order_needs_names_or_classes():
    with pytest.raises(BadInput, match="the data has no class names"):
        reorder(Labels(np.array([0, 1]), (), ()), ["a", "b"])
    with pytest.raises(BadInput, match="multi-label columns"):
        reorder(read_labels(np.ones((2, 2)), 2), [1, 0])
    assert reorder(Labels(np.array([0, 1]), (), ()), [1, 0]).names == ()


@pytest.mark.parametrize("n", [1, 7, 50, 99])
def test_subset_is_stratified_seeded_and_repeatable(n):
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    rows = subset(labels, n, seed=3)
    assert len(set(rows.tolist())) == n
    counts = np.bincount(labels[rows], minlength=3)
    assert (abs(counts - n * np.array([0.5, 0.3, 0.2])) < 1).all()
    assert np.array_equal(rows, subset(labels, n, seed=3))
    assert n in (1, 99) or not np.array_equal(np.sort(rows), np.sort(subset(labels, n, seed=4)))


def test_hashes_look_random():
    for seed in (0, 1, -1, 2**70):
        values = ranks(seed, 20_000)
        assert len(np.unique(values)) == 20_000
        assert abs((values / 2.0**64).mean() - 0.5) < 0.01
    assert abs(np.corrcoef(ranks(0, 5000) / 2.0**64, ranks(1, 5000) / 2.0**64)[0, 1]) < 0.05


def test_n():
    x = np.random.default_rng(0).random((40, 3)).astype(np.float32)
    y = np.arange(40) % 4
    data = from_arrays(x, y, n=10, seed=5)
    assert torch.equal(data.x, torch.from_numpy(x)[data.indices])
    assert torch.equal(data.y, torch.from_numpy(y)[data.indices])
    assert sorted(data.y.bincount().tolist()) == [2, 2, 3, 3]
    assert data.total == 40
    assert data.indices.tolist() != sorted(data.indices.tolist())
    assert any("10 of 40 samples" in note for note in data.notes)
    assert from_arrays(x, y, n=40).indices.tolist() == list(range(40))
    more = from_arrays(x, y, n=41)
    assert len(more.x) == 40
    assert more.notes == ("all 40 samples were taken; at most 41 were asked for",)
    state = torch.get_rng_state()
    from_arrays(x, y, n=7)
    assert torch.equal(torch.get_rng_state(), state)
    for n, words in ((0, "n: 0 is too small; give at least 1"), (-3, "n: -3"), (2.5, "n: 2.5 is not a whole number"), (True, "n: True")):
        fails(words, x, y, n=n)
    fails("seed: 'a' is not a whole number", x, y, seed="a")
