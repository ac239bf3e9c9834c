import argparse
import os
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from epsball.errors import BadInput, Untrusted
from epsball.models.weights import load_weights, read_weights


class Payload:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


@pytest.fixture
def net():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * 36, 4))


@pytest.fixture
def state(net):
    return {k: v + 1 if v.is_floating_point() else v for k, v in net.state_dict().items()}


def fails(words, net, path, kind=BadInput, **more):
    with pytest.raises(kind, match=words) as caught:
        load_weights(net, path, **more)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text
    assert "\x1b" not in text
    assert len(text) < 400


def same(net, state):
    return all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_safetensors_and_plain_checkpoints(tmp_path, net, state):
    save_file(state, tmp_path / "w.safetensors")
    assert "tensors were loaded from w.safetensors" in load_weights(net, tmp_path / "w.safetensors")[0]
    assert same(net, state)
    for name, new in (("a.pt", True), ("b.pth", False)):
        other = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * 36, 4))
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=new)
        load_weights(other, tmp_path / name)
        assert same(other, state)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net", "params", "some_name"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes(tmp_path, net, state, key, prefix):
    torch.save({"epoch": 3, key: {prefix + k: v for k, v in state.items()}}, tmp_path / "w.ckpt")
    notes = load_weights(net, tmp_path / "w.ckpt")
    assert same(net, state)
    assert any(repr(key) in note for note in notes)
    assert any(repr(prefix) in note for note in notes) == bool(prefix)


def test_plain_weights_come_before_averages_and_wrappers_nest(tmp_path, net, state):
    average = {k: torch.zeros_like(v) for k, v in state.items()}
    torch.save({"ema_state_dict": average, "checkpoint": None, "model": {"state_dict": state}}, tmp_path / "w.pt")
    notes = load_weights(net, tmp_path / "w.pt")
    assert same(net, state)
    assert any("'ema_state_dict' were left aside" in note for note in notes)


def test_a_prefix_of_the_model_itself_stays(tmp_path):
    net = nn.ModuleDict({"model": nn.Linear(2, 2)})
    torch.save(net.state_dict(), tmp_path / "w.pt")
    assert len(load_weights(net, tmp_path / "w.pt")) == 1


def test_strict(tmp_path, net, state):
    path = tmp_path / "w.safetensors"
    save_file({k: v for k, v in state.items() if "0." in k} | {"head.weight": torch.ones(1)}, path)
    fails(r"missing '1.weight', '1.bias', '1.running_mean' and \d more; unexpected 'head.weight'; use", net, path)
    save_file(state | {"3.weight": torch.ones(9, 72), "3.bias": torch.ones(9)}, path)
    fails(r"'3.(bias|weight)', '3.(bias|weight)' in .* do not fit: float32 \(9.*\) where the model has float32 \(4", net, path)
    save_file(state | {"3.bias": torch.ones(4, dtype=torch.int64)}, path)
    fails("do not fit: int64", net, path)
    bad = state["3.weight"].clone()
    bad[0, 0] = float("nan")
    save_file(state | {"3.weight": bad}, path)
    fails("tensor '3.weight' of .* has 1 NaN or infinite values", net, path)
    save_file(state | {"3.bias": torch.full((4,), float("-inf"))}, path)
    fails("tensor '3.bias' of .* has 4 NaN", net, path)


def test_masks_may_be_minus_infinity(tmp_path):
    net = nn.Linear(2, 2)
    net.register_buffer("mask", torch.zeros(2, 2))
    torch.save(net.state_dict() | {"mask": torch.full((2, 2), float("-inf"))}, tmp_path / "w.pt")
    load_weights(net, tmp_path / "w.pt")


def test_pickles_do_not_run(tmp_path, net, state):
    mark = tmp_path / "ran"
    torch.save({"state_dict": state, "extra": Payload(mark)}, tmp_path / "a.pt")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Payload(mark), protocol=2))
    (tmp_path / "c.bin").write_bytes(pickle.dumps(Payload(mark), protocol=4))
    torch.save(net, tmp_path / "d.pt")
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, tmp_path / "e.ckpt")
    for name in ("a.pt", "b.pth", "c.bin", "d.pt", "e.ckpt"):
        fails(rf"{name}' holds a pickle that would run code when loaded; save .* --trust-code", net, tmp_path / name, Untrusted)
    assert not mark.exists()


def test_trusted_files_may_hold_anything(tmp_path, net, state):
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, tmp_path / "e.ckpt")
    load_weights(net, tmp_path / "e.ckpt", trust_code=True)
    assert same(net, state)
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    notes = load_weights(nn.Linear(2, 2), tmp_path / "whole.pt", trust_code=True)
    assert any("a whole model" in note for note in notes)


def test_damaged_files(tmp_path, net, state):
    save_file(state, tmp_path / "ok.safetensors")
    good = (tmp_path / "ok.safetensors").read_bytes()
    torch.save(state, tmp_path / "ok.pt")
    packed = (tmp_path / "ok.pt").read_bytes()
    files = {
        "cut.safetensors": good[: len(good) // 2],
        "empty.safetensors": b"",
        "huge.safetensors": struct.pack("<Q", 2**62) + good[8:],
        "long.safetensors": struct.pack("<Q", 5 * len(good)) + good[8:],
        "type.safetensors": good.replace(b'"F32"', b'"F99"', 1),
        "cut.pt": packed[: len(packed) // 2],
        "text.pt": b"hello world" * 10,
        "empty.pt": b"",
        "zeros.pt": bytes(1000),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        fails(rf"weights: '.*{name}' .*; write it again", net, tmp_path / name)


def test_zip_tricks(tmp_path, net):
    path = tmp_path / "twice.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/data.pkl", b"2")
    fails("repeats a member name", net, path)
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/constants.pkl", b"1")
    fails("is a TorchScript program, not weights", net, path)


def test_other_faults(tmp_path, net):
    fails("weights: cannot read '.*none.pt'", net, tmp_path / "none.pt")
    fails("has an unknown extension; give .safetensors or .pt", net, tmp_path / "w.h5")
    (tmp_path / "folder.pt").mkdir()
    fails("is not a regular file", net, tmp_path / "folder.pt")
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    fails("holds no state dict .found 'epoch'.; save model.state_dict", net, tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "a.pt")
    fails("holds no state dict .found list.", net, tmp_path / "a.pt")
    torch.save({}, tmp_path / "a.pt")
    fails("found nothing", net, tmp_path / "a.pt")
    torch.save({"g": {"a": torch.ones(1)}, "d": {"a": torch.ones(1)}}, tmp_path / "a.pt")
    fails("holds no state dict .found 'g', 'd'.", net, tmp_path / "a.pt")
    with pytest.raises(BadInput, match="unknown extension"):
        read_weights("w")
