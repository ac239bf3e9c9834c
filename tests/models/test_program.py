import copy
import json
import os
import pickle
import warnings
import zipfile

import pytest
import torch
from torch import nn

from epsball.errors import BadInput, Untrusted
from epsball.models.load import load_model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop, self.head = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Linear(72, 4)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x)).relu()).flatten(1))


class Two(nn.Module):
    def forward(self, x, y):
        return x + y


def export(path, net, *example, dynamic=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
        torch.export.save(torch.export.export(net, example, dynamic_shapes=shapes), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    torch.manual_seed(0)
    net, x = Net().eval(), torch.rand(4, 1, 8, 8)
    torch.save(net.state_dict(), folder / "net.pt")
    export(folder / "any.pt2", net, x, dynamic=True)
    export(folder / "four.pt2", net, x)
    export(folder / "train.pt2", Net().train(), x, dynamic=True)
    export(folder / "two.pt2", Two(), x, x)
    return folder


def rewrite(source, target, change):
    """The same archive with each member passed through ``change(name, bytes) -> bytes``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def fails(words, path, kind=BadInput, **more):
    with pytest.raises(kind, match=words) as caught:
        load_model(str(path), **more)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_program_equals_the_module(folder):
    net = Net().eval()
    net.load_state_dict(torch.load(folder / "net.pt", weights_only=True))
    for name, batches in (("any.pt2", (1, 2, 7)), ("four.pt2", (4,))):
        model, notes = load_model(str(folder / name), mean=0.5, std=0.5)
        assert model.fixed_batch == (4 if name == "four.pt2" else None)
        assert "exported program" in notes[0]
        for batch in batches:
            x = torch.rand(batch, 1, 8, 8, requires_grad=True)
            mine, other = model(x), net((x - 0.5) / 0.5)
            torch.testing.assert_close(mine, other)
            torch.testing.assert_close(torch.autograd.grad(mine.sum(), x)[0], torch.autograd.grad(other.sum(), x)[0])


def test_modes_are_harmless(folder):
    model, _ = load_model(str(folder / "any.pt2"))
    x = torch.rand(2, 1, 8, 8)
    before = model(x)
    for part in model.modules():
        part.train()
        part.eval()
    assert torch.equal(model(x), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        twin = copy.deepcopy(model).train().eval()
    assert torch.equal(twin(x), before)


def test_training_mode_is_noted(folder):
    _, notes = load_model(str(folder / "train.pt2"))
    assert any("exported in training mode" in note for note in notes)


def test_what_does_not_fit(folder, tmp_path):
    fails("does not take one batch of inputs .it has 2 names|has 2", folder / "two.pt2")
    fails("carries its own; leave --weights out", folder / "any.pt2", weights="w.pt")
    whole = (folder / "any.pt2").read_bytes()
    (tmp_path / "cut.pt2").write_bytes(whole[: len(whole) // 2])
    fails("is damaged or no zip archive", tmp_path / "cut.pt2")
    (tmp_path / "text.pt2").write_text("hello")
    fails("is damaged or no zip archive", tmp_path / "text.pt2")
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("a/b.txt", "hello")
    fails("is no exported program", tmp_path / "other.pt2")
    rewrite(folder / "any.pt2", tmp_path / "json.pt2", lambda name, data: b"{" if name.endswith("models/model.json") else data)
    fails("is damaged", tmp_path / "json.pt2")

    def poison(name, data):
        return b"\x00\x00\xc0\x7f" * (len(data) // 4) if name.endswith("weights/weight_0") else data

    rewrite(folder / "any.pt2", tmp_path / "nan.pt2", poison)
    fails("tensor '.*' of .* NaN or infinite", tmp_path / "nan.pt2")


class Payload:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


def test_hostile_programs_do_not_run(folder, tmp_path):
    mark = tmp_path / "ran"

    def sample(name, data):
        return pickle.dumps(Payload(mark), protocol=2) if name.endswith("sample_inputs/model.pt") else data

    def edit(key, value):
        def change(name, data):
            if not name.endswith(".json"):
                return data
            content = json.loads(data)

            def walk(found):
                for k, v in found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ():
                    if k == key:
                        found[k] = value
                    else:
                        walk(v)

            walk(content)
            return json.dumps(content).encode()

        return change

    rewrite(folder / "any.pt2", tmp_path / "sample.pt2", sample)
    fails("holds the pickle 'model.pt', which can run code; pass --trust-code", tmp_path / "sample.pt2", Untrusted)
    code = f"__import__('os').mkdir({str(mark)!r})"
    for key, value, words in (
        ("expr_str", code, "the expression .__import__"),
        ("expr_str", "exec(chr(49))", "the expression"),
        ("target", "torch.os.mkdir", "the operation 'torch.os.mkdir'"),
        ("target", "torch.ops.aten.from_file.default", "the operation"),
        ("target", "torch.ops.aten.relu.__globals__", "the operation"),
        ("target", "#extension:code", "the operation"),
        ("use_pickle", True, "pickled tensors"),
        ("guards_code", [code], "guard code"),
        ("range_constraints", {code: {}}, "range constraints"),
    ):
        rewrite(folder / "any.pt2", tmp_path / "edited.pt2", edit(key, value))
        fails(words, tmp_path / "edited.pt2", Untrusted)
    assert not mark.exists()


def test_trust_opens_the_door(folder, tmp_path):
    def change(name, data):
        return data.replace(b'"guards_code": []', b'"guards_code": ["True"]') if name.endswith("models/model.json") else data

    rewrite(folder / "any.pt2", tmp_path / "guard.pt2", change)
    fails("guard code", tmp_path / "guard.pt2", Untrusted)
    model, _ = load_model(str(folder / "any.pt2"), trust_code=True)
    assert model(torch.rand(1, 1, 8, 8)).shape == (1, 4)
