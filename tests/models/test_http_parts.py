"""Addresses, options, tensors and waits, without a server."""

import builtins
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from epsball.errors import BadInput
from epsball.models import Endpoint, http, load_adapted
from epsball.models.http.address import Address
from epsball.models.http.cache import Cache, content
from epsball.models.http.faults import Fault
from epsball.models.http.line import need
from epsball.models.http.model import arrange
from epsball.models.http.patience import Pace, retry_after
from epsball.models.http.protocol import LENGTH, Signature, decode, encode, signature
from epsball.models.load import ModelSpec

SCORES = Signature("x", "FP32", (-1, 4), "logits", False, 3)


@pytest.mark.parametrize(
    ("text", "model", "local"),
    [
        ("http://localhost:8000/v2/models/net", "http://localhost:8000/v2/models/net", True),
        ("http://[::1]:8000/v2/models/net/infer", "http://[::1]:8000/v2/models/net", True),
        ("https://host/deep/path/v2/models/a%20b/versions/7/infer/", "https://host/deep/path/v2/models/a%20b/versions/7", False),
        ("HTTPS://host/v2/models/net/", "https://host/v2/models/net", False),
    ],
)
def test_addresses(text, model, local):
    found = Address.parse(text)
    assert (found.model, found.local) == (model, local)
    assert found.model.startswith(found.server + "/models/")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http://host/models/net", "names no model; write http://HOST:PORT/v2/models/NAME"),
        ("http:///v2/models/net", "names no model"),
        ("http://host/v2/models/net/else", "names no model"),
        ("http://host:x/v2/models/net", "is no address"),
        ("http://ho st/v2/models/net", "names no model"),
        ("http://me:hush@host/v2/models/net", r"'http://host/v2/models/net' came with a user, query or fragment"),
        ("http://host/v2/models/net?key=hush", r"'http://host/v2/models/net' came with a user"),
        ("http://host/v2/models/net#hush", "came with a user"),
    ],
)
def test_addresses_that_cannot_be(text, words):
    with pytest.raises(BadInput, match=words) as told:
        Address.parse(text)
    assert "hush" not in str(told.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout": 0}, "timeout 0: give a number above 0"),
        ({"timeout": float("inf")}, "timeout inf"),
        ({"rate_limit": "fast"}, "rate_limit 'fast': give a number"),
        ({"rate_limit": True}, "rate_limit True"),
        ({"retries": 1.5}, "retries 1.5: give a whole number of at least 0"),
        ({"classes": 1}, "classes 1: give a whole number of at least 2"),
        ({"max_sent": 0}, "max_sent 0: give a whole number of at least 1"),
        ({"token_env": " "}, "token_env ' ': give a name"),
        ({"token_env": "sk-hush"}, "token_env: not the name of a variable; export the token"),
        ({"token_header": "X Key"}, "token_header 'X Key': give the name of a header"),
        ({"timeout": None}, "timeout None"),
        ({"speed": 1}, "speed is no option; choose from output, classes, batch_size"),
        ([1], r"\[1\] is no option"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(BadInput, match=f"endpoint: {words}") as told:
        Endpoint.of(options)
    assert "hush" not in str(told.value)


def test_a_stored_spec_cannot_name_a_token():
    spec = ModelSpec.from_dict({"source": "http://h/v2/models/m", "endpoint": {"token_env": "HOME", "token_header": "x-key", "retries": 2}})
    stored = json.loads(json.dumps(spec.to_dict()))
    assert stored["endpoint"] == {"retries": 2, "token_header": "x-key"}
    assert ModelSpec.from_dict(stored) == spec
    assert ModelSpec.from_dict({"source": "digits"}).endpoint is None
    with pytest.raises(BadInput, match="speed is no option"):
        ModelSpec.from_dict({"source": "http://h/v2/models/m", "endpoint": {"speed": 2}})


def test_httpx_waits_for_an_address():
    for path in Path(http.__file__).parent.glob("*.py"):
        assert not re.search(r"^\s*(import|from) httpx", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_httpx_is_missing(monkeypatch):
    real = builtins.__import__

    def none(name, *rest, **words):
        if name.split(".")[0] == "httpx":
            raise ImportError(name)
        return real(name, *rest, **words)

    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.setattr(builtins, "__import__", none)
    with pytest.raises(BadInput, match=r"model: addresses need httpx: pip install 'epsball\[http\]'"):
        need()
    with pytest.raises(BadInput, match=r"pip install 'epsball\[http\]'"):
        load_adapted("http://127.0.0.1:9/v2/models/net")


# --- tensors


def metadata(outputs, inputs=(("x", "FP32", [-1, 4]),)):
    listed = [[{"name": n, "datatype": k, "shape": s} for n, k, s in part] for part in (inputs, outputs)]
    return {"inputs": listed[0], "outputs": listed[1]}


@pytest.mark.parametrize(
    ("outputs", "options", "chosen"),
    [
        ([("a", "FP32", [-1, 5]), ("logits", "FP64", [-1, 3])], (None, None), ("logits", False, 3)),
        ([("a", "INT64", [-1, 1]), ("b", "FP32", [-1, -1])], (None, None), ("b", False, None)),
        ([("a", "INT64", [-1, 1]), ("b", "FP32", [-1, 5])], ("a", 7), ("a", True, 7)),
        ([("a", "INT8", [-1, 6])], (None, None), ("a", False, 6)),
        ([("a", "FP32", [-1])], (None, None), ("a", False, None)),
        ([], ("proba", None), ("proba", False, None)),
    ],
)
def test_the_output_is_found(outputs, options, chosen):
    found = signature(metadata(outputs), "there", *options)
    assert (found.output, found.labels, found.width) == chosen


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (metadata([("a", "BYTES", [-1])]), "there gives a, none of them numbers"),
        (metadata([("a", "INT64", [-1])]), "one label a row in 'a'"),
        (metadata([], [("x", "BYTES", [-1])]), "there takes BYTES; serve it with numbers"),
        ({"inputs": [{"name": "x"}]}, "does not describe its inputs; it must speak the Open Inference Protocol v2"),
        ({"inputs": "x"}, "does not describe its inputs"),
        ([], "does not describe its inputs"),
        (metadata([("a\x1b[31m", "FP32", [-1, 3])]), "does not describe its outputs"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": ["?"]}]}, "does not describe its inputs"),
    ],
)
def test_metadata_that_cannot_be_used(said, words):
    with pytest.raises(BadInput, match=words):
        signature(said, "there", None, None)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(("kind", "dtype"), [("FP32", "<f4"), ("FP64", "<f8"), ("FP16", "<f2"), ("UINT8", "u1")])
def test_rows_arrive_bit_by_bit(kind, dtype, binary):
    rows = (np.random.default_rng(0).random((5, 4)) * 200).astype(dtype)
    rows[0] = [0, 1, np.float16(1 / 3), 255]
    body, headers = encode(rows, Signature("x", kind, None, "logits", False, None), "q", binary)
    head = int(headers.get(LENGTH, len(body)))
    sent = json.loads(body[:head])
    tensor = sent["inputs"][0]
    assert (sent["id"], tensor["shape"], tensor["datatype"]) == ("q", [5, 4], kind)
    flat = np.frombuffer(body[head:], dtype) if binary else np.array(tensor["data"]).astype(dtype)
    assert np.array_equal(flat.reshape(5, 4), rows)
    assert (len(body) - head) == (tensor["parameters"]["binary_data_size"] if binary else 0)


def answered(**changes):
    output = {"name": "logits", "datatype": "FP32", "shape": [2, 3], "data": [1, 2, 3, 4, 5, 6]} | changes
    return json.dumps({"id": "q", "outputs": [output]}).encode()


def test_answers_are_read():
    want = np.array([[1, 2, 3], [4, 5, 6]])
    found = decode(answered(), {}, SCORES, 2, "q")
    assert found.dtype == np.float32
    assert np.array_equal(found, want)
    assert np.array_equal(decode(answered(data=want.tolist()), {}, SCORES, 2, "q"), want)
    assert decode(answered(datatype="FP64"), {}, SCORES, 2, "q").dtype == np.float64
    assert np.array_equal(decode(answered(shape=[2, 3, 1, 1]), {}, SCORES, 2, "q"), want)
    labels = Signature("x", "FP32", None, "logits", True, 4)
    assert decode(answered(datatype="INT64", shape=[2], data=[3, 0]), {}, labels, 2, "q").tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    assert decode(answered(datatype="FP64", shape=[2, 1], data=[1.0, 2.0]), {}, labels, 2, "q").argmax(1).tolist() == [1, 2]
    one = Signature("x", "FP32", None, None, False, None)
    assert decode(answered(shape=[6]), {}, one, 6, "q").shape == (6, 1)


def test_raw_answers_lie_in_the_order_of_the_outputs():
    first, second = np.arange(4, dtype="<i8"), np.arange(6, dtype="<f4")
    outputs = [
        {"name": "text", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 5}},
        {"name": "ids", "datatype": "INT64", "shape": [2, 2], "parameters": {"binary_data_size": 32}},
        {"name": "logits", "datatype": "FP32", "shape": [2, 3], "parameters": {"binary_data_size": 24}},
    ]
    head = json.dumps({"outputs": outputs}).encode()
    body = head + b"\x01\0\0\0a" + first.tobytes() + second.tobytes()
    assert decode(body, {LENGTH: str(len(head))}, SCORES, 2, "q").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"[" * 100_000,
        answered()[:-9],
        answered(data=[1, 2, 3]),
        answered(data=[1, 2, 3, 4, 5, "x"]),
        answered(data=[[1, 2, 3], [4, 5]]),
        answered(shape=[3, 2]),
        answered(shape=[2, 3, 1], data=[1] * 5),
        answered(shape=[1, 6]),
        answered(shape=[]),
        answered(shape=[2, 0], data=[]),
        answered(shape=[2, 2], data=[1] * 4),
        answered(shape=[2, 3, 2], data=[1] * 12),
        answered(shape="ab"),
        answered(name="other"),
        answered(parameters={"binary_data_size": 24}),
        answered(parameters={"binary_data_size": "many"}),
        answered().replace(b'"q"', b'"another"'),
    ],
)
def test_answers_that_make_no_sense_are_faults(body):
    with pytest.raises(Fault):
        decode(body, {}, SCORES, 2, "q")


@pytest.mark.parametrize("labels", [[4, 0], [-1, 0], [0.5, 1], [None, 1]])
def test_labels_that_cannot_be_are_faults(labels):
    with pytest.raises(Fault):
        decode(answered(datatype="FP32", shape=[2], data=labels), {}, Signature("x", "FP32", None, "logits", True, 4), 2, "q")


def test_labels_where_scores_were_promised():
    with pytest.raises(BadInput, match="say how many classes there are"):
        decode(answered(datatype="INT64", shape=[6, 1]), {}, Signature("x", "FP32", None, None, False, None), 6, "q")


def takes(*shape, kind="FP32"):
    return Signature("x", kind, (-1, *shape), None, False, None)


def test_inputs_are_arranged():
    x = np.random.default_rng(0).random((2, 3, 4, 5))
    assert np.array_equal(arrange(x, takes(3, 4, 5), ""), x.astype(np.float32))
    assert np.array_equal(arrange(x, takes(3, -1, -1), ""), x.astype(np.float32))
    assert np.array_equal(arrange(x, takes(4, 5, 3), ""), x.transpose(0, 2, 3, 1).astype(np.float32))
    assert np.array_equal(arrange(x, takes(-1, -1, 3), ""), x.transpose(0, 2, 3, 1).astype(np.float32))
    assert np.array_equal(arrange(x, takes(60), ""), x.reshape(2, 60).astype(np.float32))
    assert arrange(x[:, :1], takes(4, 5), "").shape == (2, 4, 5)
    assert arrange(x[:, :1], takes(4, 5, 1), "").shape == (2, 4, 5, 1)
    assert np.array_equal(arrange(x * 300 - 10, takes(3, 4, 5, kind="UINT8"), ""), np.clip(np.round(x * 300 - 10), 0, 255))
    for shape in ((5, 4, 3), (12, 5), (61,), (-1,)):
        with pytest.raises(BadInput, match=r"there takes rows of shape .*, the data has \(3, 4, 5\); give data of that shape"):
            arrange(x, takes(*shape), "there")


# --- waits and the cache


def test_retry_after():
    assert retry_after("Fri, 31 Dec 2100 23:59:59 GMT") > 1e9
    assert retry_after("-3") is None
    assert retry_after("") is None


class Written:
    def __init__(self):
        self.time, self.slept = 0.0, []

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.time += seconds


def test_pace():
    clock = Written()
    pace = Pace(clock, 1.0, 5.0, 2.0)
    for _ in range(3):
        pace.turn()
    clock.time += 10
    pace.turn()
    assert clock.slept == [0.5, 0.5]
    pace.pause(3, 2.0)
    pace.pause(0, 2.0)
    assert 2.5 <= clock.slept[2] < 5
    assert clock.slept[3] == 2.0
    assert Pace(clock, 1.0, 5.0, None).gap == 0


def test_content_is_type_shape_and_bytes():
    row = np.arange(4, dtype=np.float32)
    others = [row[::-1], row.reshape(2, 2), row.astype(np.int32), row.view(np.int32), row.astype(np.float64)]
    keys = {content(np.array(one)) for one in (row, *others)}
    assert len(keys) == 6
    assert content(row) == content(np.arange(8, dtype=np.float32)[:4])


def test_the_cache_forgets_what_was_not_wanted_for_longest():
    cache = Cache(2)
    for key in (b"a", b"b"):
        cache.put(key, np.zeros(1))
    assert cache.get(b"a") is not None
    cache.put(b"c", np.ones(1))
    assert (cache.get(b"b"), len(cache)) == (None, 2)
    assert cache.get(b"a") is not None
