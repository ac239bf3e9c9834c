"""Every source of data, written here and read back; and every way in which it can be broken."""

import gzip
import io
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from epsball.data import from_arrays, load_data
from epsball.data import tables as tables_module
from epsball.data.digits import digits_split
from epsball.errors import BadInput

RNG = np.random.default_rng(0)
Y = np.array([0, 1, 0, 1, 2, 2])
GRAY = RNG.integers(0, 256, (6, 7, 5), dtype=np.uint8)
COLOR = RNG.integers(0, 256, (6, 7, 5, 3), dtype=np.uint8)


def fails(words, source, **settings):
    with pytest.raises(BadInput, match=words) as caught:
        load_data(str(source), **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600


def encoded(pixels, kind="PNG", mode=None):
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(stream, kind)
    return stream.getvalue()


# digits


def test_digits():
    test, train = load_data("digits"), load_data("digits", split="train")
    assert tuple(test.x.shape) == (500, 1, 8, 8)
    assert len(train.x) == 1297
    assert test.y.bincount().min() >= 48
    assert float(test.x.max()) == 1
    assert torch.equal(test.x * 16, (test.x * 16).round())
    both = torch.cat([test.x, train.x])
    assert len(both.flatten(1).unique(dim=0)) == len(both)  # disjoint: scikit-learn's digits have no duplicates
    fails("split: 'val' is unknown for digits", "digits", split="val")


def test_the_digits_split_never_moves():
    train, test = digits_split(np.arange(1797) % 10)
    assert len(np.intersect1d(train, test)) == 0
    assert len(train) + len(test) == 1797
    # the embedded models were trained on the other part, so these figures may never change
    assert load_data("digits").y[:10].tolist() == [2, 5, 9, 0, 1, 2, 4, 5, 8, 0]


# npz


@pytest.mark.parametrize(
    "keys",
    [("x", "y"), ("X", "y"), ("images", "labels"), ("x_test", "y_test"), ("test_images", "test_labels")],
)
def test_npz(tmp_path, keys):
    np.savez(tmp_path / "d.npz", **{keys[0]: GRAY, keys[1]: Y})
    data = load_data(str(tmp_path / "d.npz"))
    assert torch.equal(data.x[:, 0], torch.from_numpy(GRAY) / 255)
    assert data.y.tolist() == Y.tolist()
    assert data.name == "d.npz"
    assert repr(keys[0]) in data.notes[0]


def test_npz_splits_and_orders(tmp_path):
    np.savez_compressed(tmp_path / "d.npz", x_train=np.asfortranarray(GRAY), y_train=Y, x_test=GRAY[::-1], y_test=Y)
    train, test = load_data(str(tmp_path / "d.npz"), split="train"), load_data(str(tmp_path / "d.npz"))
    assert torch.equal(train.x, test.x.flip(0))
    fails("has keys 'x_train', 'y_train', 'x_test', 'y_test'; name the arrays x and y, or x_val and y_val", tmp_path / "d.npz", split="val")


def test_bad_npz(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, a=GRAY, b=Y)
    fails("has keys 'a', 'b'; name the arrays x and y", path)
    np.savez(path)
    fails("has keys none", path)
    np.savez(path, x=np.array([{}, []], dtype=object), y=Y)
    fails("'x' in .* holds Python objects, which would run code", path)
    path.write_bytes(b"hello")
    fails("is damaged or no zip archive", path)
    np.savez(path, x=GRAY, y=Y)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    fails("is damaged or no zip archive", path)
    flipped = bytearray(whole)
    flipped[200] ^= 255
    path.write_bytes(bytes(flipped))
    fails("'x' in .* cannot be read .*CRC", path)
    fails("cannot read|does not exist", tmp_path / "none.npz")


def test_bombs_are_refused_before_allocation(tmp_path):
    path = tmp_path / "d.npz"
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    header += b" " * (64 - (10 + len(header) + 1) % 64) + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"1234")
        archive.writestr("y.npy", b"x")
    fails(r"'x' in .* claims shape \(1000000000000,\) but holds 4 bytes", path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"hello")
        archive.writestr("y.npy", b"hello")
    fails("'x' in .* cannot be read", path)
    whole = path.read_bytes()
    lie = whole.replace(struct.pack("<LL", 5, 5), struct.pack("<LL", 5, 2**31))
    path.write_bytes(lie)
    fails("claims more than it can hold", path)


# idx


def idx_bytes(array):
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    for part, x in (("t10k", GRAY), ("train", GRAY[::-1])):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(x)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(Y.astype(np.uint8)))
    return tmp_path


def test_idx(idx_folder):
    test, train = load_data(str(idx_folder)), load_data(str(idx_folder), split="train")
    assert torch.equal(test.x[:, 0], torch.from_numpy(GRAY) / 255)
    assert torch.equal(train.x, test.x.flip(0))
    assert test.y.tolist() == Y.tolist()
    one = load_data(str(idx_folder / "train-images-idx3-ubyte.gz"))
    assert torch.equal(one.x, train.x)
    (idx_folder / "train-images-idx3-ubyte.gz").unlink()
    assert torch.equal(load_data(str(idx_folder), split="train").x, test.x)  # the only one


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "starts with , not 00000803"),
        (b"\x00\x00\x08\x03", "starts with 00000803"),
        (idx_bytes(Y.astype(np.uint8)) + bytes(20), "starts with 00000801, not 00000803; give an idx file"),
        (struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "claims 4294967295x4294967295x4294967295 bytes"),
        (idx_bytes(GRAY)[:-1], "claims 6x7x5 bytes but does not hold them"),
        (idx_bytes(GRAY) + b"1", "claims 6x7x5 bytes but does not hold them"),
    ],
)
def test_bad_idx(idx_folder, content, words):
    plain, packed = idx_folder / "t10k-images-idx3-ubyte", idx_folder / "t10k-images-idx3-ubyte.gz"
    plain.write_bytes(content)
    fails(words, plain)
    packed.write_bytes(gzip.compress(content))
    fails(words, packed)


def test_bad_idx_pairs(idx_folder):
    fails("split: 'val' matches 0 of the idx files 't10k-images", idx_folder, split="val")
    (idx_folder / "t10k-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    fails("cannot be read .*Not a gzipped", idx_folder)
    (idx_folder / "t10k-labels-idx1-ubyte").unlink()
    fails("no labels beside .*; put t10k-labels-idx1-ubyte", idx_folder)


# folders


def fill(root, images, kind="png", mode=None):
    for k, (label, image) in enumerate(zip(Y, images, strict=True)):
        folder = root / ("bee", "ant", "cat")[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.{kind}").write_bytes(encoded(image, {"jpg": "JPEG"}.get(kind.lower(), kind.upper()), mode))
    return root


def test_image_folder(tmp_path):
    fill(tmp_path / "d", COLOR)
    (tmp_path / "d" / "ant" / "notes.txt").write_text("hello")
    (tmp_path / "d" / ".hidden").mkdir()
    (tmp_path / "d" / "README.md").write_text("hello")
    data = load_data(str(tmp_path / "d"))
    rows = [1, 3, 0, 2, 4, 5]  # ant, bee, cat
    assert torch.equal(data.x, torch.from_numpy(COLOR[rows]).permute(0, 3, 1, 2) / 255)
    assert data.y.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.class_names == ("ant", "bee", "cat")
    assert "classes are the folder names in sorted order: 'ant' is 0, 'cat' is 2" in data.notes
    assert "1 files that are no images were left out" in data.notes
    part = load_data(str(tmp_path / "d"), n=3, seed=1)
    assert torch.equal(part.x, data.x[part.indices])
    moved = load_data(str(tmp_path / "d"), class_order=["cat", "bee", "ant"])
    assert moved.y.tolist() == [2, 2, 1, 1, 0, 0]
    assert moved.class_names == ("cat", "bee", "ant")


@pytest.mark.parametrize(("kind", "mode"), [("bmp", None), ("webp", None), ("JPG", None), ("png", "L"), ("png", "1"), ("png", "P")])
def test_image_formats(tmp_path, kind, mode):
    data = load_data(str(fill(tmp_path, COLOR, kind.lower() if kind != "JPG" else kind, mode)))
    assert tuple(data.x.shape) == (6, 1 if mode in ("L", "1") else 3, 7, 5)


def test_mixed_modes_become_color(tmp_path):
    fill(tmp_path, COLOR)
    (tmp_path / "ant" / "1.png").write_bytes(encoded(GRAY[0]))
    (tmp_path / "ant" / "3.png").write_bytes(encoded(np.concatenate([COLOR[0], GRAY[0][..., None]], -1)))
    data = load_data(str(tmp_path))
    assert data.x.shape[1] == 3
    assert "1 gray images of 6 were repeated into three channels" in data.notes
    assert "the transparency of 1 images was dropped" in data.notes


def test_folders_of_splits(tmp_path):
    fill(tmp_path / "train", COLOR)
    fill(tmp_path / "val", COLOR[::-1])
    data = load_data(str(tmp_path))
    assert "images were read from the folder 'val'" in data.notes
    assert torch.equal(data.x[0], load_data(str(tmp_path / "val")).x[0])
    fails("split: 'other' is not in .*, which has train, val", tmp_path, split="other")


def test_bad_folders(tmp_path):
    root = tmp_path / "d"
    root.mkdir()
    fails("has no class folders; arrange the images as folder/class/image.png", root)
    fill(root, COLOR)
    (root / "empty").mkdir()
    fails("class folder '.*empty' holds no image", root)
    (root / "empty").rmdir()
    (root / "ant" / "1.png").write_bytes(encoded(COLOR[0][:-1]))
    fails(r"images differ in size: 'ant/1.png' is 5x6, 'ant/3.png' is 5x7 .*; bring them to one size first", root)
    (root / "ant" / "1.png").write_bytes(b"hello")
    fails("image 'ant/1.png' cannot be read", root)
    (root / "ant" / "1.png").write_bytes(encoded(COLOR[0])[:60])
    fails("image 'ant/1.png' cannot be read", root)
    (root / "ant" / "1.png").write_bytes(encoded(COLOR[0], "GIF"))
    fails("image 'ant/1.png' cannot be read .*; give PNG, JPEG, WebP or BMP", root)
    (root / "ant" / "1.png").write_bytes(encoded(GRAY[0].astype(np.uint16) * 256))
    fails("image 'ant/1.png' has pixel mode I;16, not 8-bit", root)


def test_bomb_images(tmp_path, monkeypatch):
    fill(tmp_path, COLOR)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # 35 pixels: over the limit, where Pillow only warns
    fails("cannot be read .*decompression bomb", tmp_path)


def test_links_may_not_leave_the_folder(tmp_path):
    root = fill(tmp_path / "d", COLOR)
    (tmp_path / "link").symlink_to(root)
    assert len(load_data(str(tmp_path / "link")).x) == 6
    (root / "ant" / "inside.png").symlink_to(root / "bee" / "0.png")
    assert len(load_data(str(root)).x) == 7
    (tmp_path / "secret.png").write_bytes(encoded(COLOR[0]))
    (root / "ant" / "out.png").symlink_to(tmp_path / "secret.png")
    fails("out.png' is a link that leaves the folder", root)
    (root / "ant" / "out.png").unlink()
    (tmp_path / "other").mkdir()
    (root / "other").symlink_to(tmp_path / "other")
    fails("other' is a link that leaves the folder", root)
    (root / "other").unlink()
    os.mkfifo(root / "ant" / "pipe.png")
    fails("pipe.png' is not a regular file", root)


# Parquet


def write_parquet(path, images, labels, names=None, **columns):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"image": images, "label": labels, **columns})
    if names:
        features = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, path, row_group_size=2)
    return path


CELLS = [{"bytes": encoded(image), "path": f"{k}.png"} for k, image in enumerate(COLOR)]


def test_parquet(tmp_path):
    data = load_data(str(write_parquet(tmp_path / "d.parquet", CELLS, Y.tolist(), ["a", "b", "c"])))
    assert torch.equal(data.x, torch.from_numpy(COLOR).permute(0, 3, 1, 2) / 255)
    assert data.y.tolist() == Y.tolist()
    assert data.class_names == ("a", "b", "c")
    part = load_data(str(tmp_path / "d.parquet"), n=4, seed=2)
    assert torch.equal(part.x, data.x[part.indices])
    plain = load_data(str(write_parquet(tmp_path / "p.parquet", [c["bytes"] for c in CELLS], list("ababcc"))))
    assert torch.equal(plain.x, data.x)
    assert plain.class_names == ("a", "b", "c")
    assert plain.y.tolist() == Y.tolist()


def test_folders_of_parquet(tmp_path):
    (tmp_path / "data").mkdir()
    for k in (0, 1):
        write_parquet(tmp_path / "data" / f"test-{k}.parquet", CELLS[3 * k : 3 * k + 3], Y[3 * k : 3 * k + 3].tolist())
    write_parquet(tmp_path / "data" / "train-0.parquet", CELLS[:2], [0, 1])
    data = load_data(str(tmp_path))
    assert data.y.tolist() == Y.tolist()
    assert torch.equal(load_data(str(tmp_path), n=3).x, data.x[load_data(str(tmp_path), n=3).indices])
    assert len(load_data(str(tmp_path), split="train").x) == 2
    fails("split: no file of .* starts with 'val'", tmp_path, split="val")


def test_bad_parquet(tmp_path, monkeypatch):
    path = tmp_path / "d.parquet"
    write_parquet(path, CELLS, [0, None, 0, 1, 2, 2])
    fails("labels: 1 of 6 are missing", path)
    write_parquet(path, [{"bytes": None, "path": "a.png"}] * 6, Y.tolist())
    fails("row 0 of the table has no image bytes", path)
    write_parquet(path, [b"hello"] * 6, Y.tolist())
    fails("image 'row 0' cannot be read", path)
    write_parquet(path, [], [])
    fails("is empty; give at least two samples", path)
    path.write_bytes(b"hello")
    fails("cannot be read as Parquet", path)
    from pyarrow import parquet, table

    parquet.write_table(table({"pixels": [1], "label": [1]}), path)
    fails("no image column among 'pixels', 'label'; rename it to 'image'", path)
    parquet.write_table(table({"image": [b"1"], "kind": [1]}), path)
    fails("no label column among 'image', 'kind'", path)

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(tables_module.importlib, "import_module", absent)
    fails(r"needs pyarrow; pip install pyarrow, or pip install 'epsball\[store\]'", path)


@pytest.mark.parametrize("metadata", [None, {}, {b"huggingface": b"{"}, {b"huggingface": b"[]"}, {b"huggingface": b'{"info": 3}'}])
def test_odd_metadata_is_ignored(metadata):
    assert tables_module._feature_names(metadata, "label") == ()


# the datasets library


def test_hugging_face_needs_local_files_and_the_library(tmp_path, monkeypatch):
    fails("hf: reads local files only and 'user/set' does not exist; download", "hf:user/set")

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(tables_module.importlib, "import_module", absent)
    fails(r"needs datasets; pip install datasets, or pip install 'epsball\[hf\]'", f"hf:{tmp_path}")


@pytest.mark.filterwarnings("ignore")
def test_hugging_face(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    write_parquet(tmp_path / "d.parquet", CELLS, Y.tolist(), ["a", "b", "c"])
    data = load_data(f"hf:{tmp_path / 'd.parquet'}")
    assert torch.equal(data.x, torch.from_numpy(COLOR).permute(0, 3, 1, 2) / 255)
    assert data.class_names == ("a", "b", "c")
    fill(tmp_path / "folder", COLOR)
    data = load_data(f"hf:{tmp_path / 'folder'}")
    assert data.class_names == ("ant", "bee", "cat")
    assert torch.equal(data.x, load_data(str(tmp_path / "folder")).x)
    assert "examples" not in capsys.readouterr().err  # no progress bars from library code
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    saved = datasets.Dataset.from_dict({"image": CELLS, "label": Y.tolist()}, features=features)
    datasets.DatasetDict({"test": saved, "train": saved}).save_to_disk(str(tmp_path / "saved"))
    assert load_data(f"hf:{tmp_path / 'saved'}").y.tolist() == Y.tolist()
    fails("split: 'val' is not in .*, which has 'test', 'train'", f"hf:{tmp_path / 'saved'}", split="val")
    (tmp_path / "bad.parquet").write_bytes(b"hello")
    fails("datasets cannot read", f"hf:{tmp_path / 'bad.parquet'}")


# the door


def test_folders_that_may_not_be_listed(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    fails("cannot be read .*Permission denied.*; check the path", tmp_path)


def test_too_many_pixels_for_memory(tmp_path, monkeypatch):
    fill(tmp_path, COLOR)

    def refuse(*args, **settings):
        raise MemoryError

    monkeypatch.setattr("epsball.data.decode.np.empty", refuse)
    fails("data: 6x7x5x3 pixels do not fit into memory; take fewer samples", tmp_path)


def test_names_with_line_breaks_stay_on_one_line(tmp_path):
    for name in ("one\n-images-idx3-ubyte", "two\n-images-idx3-ubyte"):
        (tmp_path / name).write_bytes(b"")
    fails("split: 'test' matches 0 of the idx files", tmp_path)


def test_unknown_sources(tmp_path):
    fails("'.*nothing' does not exist; give a builtin name .digits.", tmp_path / "nothing")
    fails("is an address; only local files are read", "https://example.org/d.npz")
    (tmp_path / "d.csv").write_text("1,2")
    fails("is of an unknown kind; give a builtin name", tmp_path / "d.csv")
    os.mkfifo(tmp_path / "pipe.npz")
    fails("is not a regular file", tmp_path / "pipe.npz")


# real data


def real(name):
    root = os.environ.get("EPSBALL_DATA")
    if not root:
        pytest.skip("EPSBALL_DATA is not set")
    path = Path(root) / name
    if not path.exists():
        pytest.skip(f"{name} is not in EPSBALL_DATA")
    return path


def test_real_mnist():
    data = load_data(str(real("mnist/mnist.npz")), n=1000, seed=0)
    assert tuple(data.x.shape) == (1000, 1, 28, 28)
    assert data.total == 10_000
    assert data.y.bincount().min() >= 89
    assert abs(float(data.x.mean()) - 0.1325) < 0.01


def test_real_cifar():
    data = load_data(str(real("cifar10_jpeg/test.parquet")), n=200)
    assert tuple(data.x.shape) == (200, 3, 32, 32)
    assert data.y.bincount().tolist() == [20] * 10
    assert data.class_names[:2] == ("airplane", "automobile")
    assert data.total == 5000


def test_real_samples():
    path = real("foolbox_samples/foolbox_samples.npz")
    fails("name the arrays x and y", path)
    with np.load(path) as archive:
        for name, channels in (("mnist", 1), ("fashionMNIST", 1), ("cifar10", 3), ("cifar100", 3)):
            data = from_arrays(archive[f"{name}_x"], archive[f"{name}_y"], name=name)
            assert data.x.shape[1] == channels
