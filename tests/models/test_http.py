"""Models behind an address: scores, labels, counts, access, secrets and the command line, against a real server on loopback."""

import json
import logging
import socket

import pytest
import torch

import epsball as eb
from epsball.cli import main
from epsball.core import Access, Tally
from epsball.errors import AccessDenied, BadInput
from epsball.models import Endpoint

TOKEN = "s3cret-" + "canary-71"


def batch(n, seed=0):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("binary", [False, True])
def test_scores_are_the_servers_own(served, model, binary):
    served.extensions = ["binary_tensor_data"] if binary else []
    found, x = model(), batch(300)
    assert found.client.binary is binary
    served.agrees(found(x), x)
    assert served.requests == 3  # 128 rows each
    assert (found.counts.asked, found.counts.answered, found.counts.sent) == (300, 300, 300)
    served.balanced(found)
    assert found.client.pace.clock.slept == []


def test_it_is_a_victim_that_gives_scores_and_no_gradients(served, model):
    victim = eb.wrap(model(), batch_size=7)
    assert victim.access is Access.SCORES
    x, tally = batch(20), Tally.zeros(20)
    served.agrees(victim.outputs(x, tally), x)
    assert tally.forwards.tolist() == [1] * 20
    assert served.rows == 20
    assert served.requests == 3
    with pytest.raises(AccessDenied):
        victim.differentiable(x, Tally.zeros(20))


@pytest.mark.parametrize("name", ["noise", "square"])
def test_counted_queries_are_seen_queries(served, model, name):
    found, (x, y) = model(batch_size=16), (batch(12), torch.arange(12) % 10)
    attack = eb.get(name, **{"draws": 6} if name == "noise" else {"steps": 15})
    outcome = attack(eb.wrap(found), x, y, radius=0.2)
    assert int(outcome.queries.sum()) == served.rows == found.counts.sent
    served.balanced(found)


def test_from_its_source(served):
    victim = eb.load_model(f"{served.url}/versions/3/infer", mean=0.5, std=0.5, endpoint={"batch_size": 4, "cache": 9})
    x = batch(6)
    served.agrees(victim.outputs(x, Tally.zeros(6)), (x - 0.5) / 0.5)
    assert served.requests == 2
    assert victim.source["endpoint"] == {"batch_size": 4, "cache": 9}
    with pytest.raises(BadInput, match=r"endpoint: given, but 'digits-robust' is no address"):
        eb.load_model("digits-robust", endpoint={"retries": 1})
    with pytest.raises(BadInput, match="carries its own; leave --weights out"):
        eb.load_model(served.url, "w.safetensors")


def test_a_function_may_return_one(served, tmp_path):
    file = tmp_path / "far.py"
    file.write_text(f"from epsball.models import HttpModel\ndef make(): return HttpModel({served.url!r})\n")
    assert eb.load_model(f"{file}:make").access is Access.SCORES


def test_labels_alone(served, model):
    served.metadata["outputs"] = [served.tensor("label", "INT64", -1, 1)]
    with pytest.raises(BadInput, match=r"one label a row in 'label'; say how many classes there are, --endpoint classes=N"):
        model()
    found, x = model(classes=10), batch(12)
    victim = eb.wrap(found)
    assert victim.access is Access.LABELS
    out = victim.outputs(x, Tally.zeros(12))
    assert torch.equal(out.argmax(1), served.scores(x.numpy()).argmax(1))
    assert torch.equal(out.sum(1), torch.ones(12))
    few = model(classes=2, retries=0)
    with pytest.raises(BadInput, match="not one label below 2 a row"):
        few(x)


def test_what_the_metadata_asks_for(served, model):
    served.extensions, served.config = ["model_configuration"], {"max_batch_size": 5}
    served.metadata["inputs"] = [served.tensor("x", "FP32", -1, 64)]
    served.metadata["outputs"] = [
        served.tensor("hidden", "FP32", -1, 3),
        served.tensor("text", "BYTES", -1),
        served.tensor("logits", "FP32", -1, 10),
    ]
    found, x = model(), batch(12)
    served.agrees(found(x), x)
    assert served.requests == 3
    with pytest.raises(BadInput, match=r"output 'probs': .* gives hidden, text, logits; name one of them"):
        model(output="probs")
    with pytest.raises(BadInput, match=r"takes rows of shape \(64,\), the data has \(1, 9, 9\)"):
        found(torch.zeros(2, 1, 9, 9))
    served.metadata["inputs"] = served.metadata["outputs"]
    with pytest.raises(BadInput, match=r"takes 3 inputs \(hidden, text, logits\); serve a model of one batch"):
        model()


def test_a_server_that_says_nothing_of_its_tensors(served, model):
    served.metadata = {}
    found, x = model(), batch(3)
    served.agrees(found(x), x)
    named = model(output="label", classes=10)
    assert named.access is Access.LABELS
    assert torch.equal(named(x).argmax(1), served.scores(x.numpy()).argmax(1))


def test_a_fixed_batch_is_filled_up(served, model):
    served.metadata["inputs"] = [served.tensor("x", "FP32", 4, 1, 8, 8)]
    found, x = model(), batch(6)
    served.agrees(found(x), x)
    assert (found.counts.answered, found.counts.sent, served.rows) == (6, 8, 8)
    served.balanced(found)
    with pytest.raises(BadInput, match=r"batch_size 3: .* takes 4 rows a request; leave it out"):
        model(batch_size=3)


# --- secrets


def test_the_token_goes_into_its_header_and_nowhere_else(served, model, monkeypatch, caplog, capsys):
    monkeypatch.setenv("NET_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    served.plan = lambda number, rows: 500 if number % 2 else None
    found = model(token_env="NET_TOKEN", retries=1)
    out = found(batch(2))
    assert out.isfinite().all()
    found(batch(3))
    assert {a for a, _ in served.tokens} == {f"Bearer {TOKEN}"}
    bare = model(token_env="NET_TOKEN", token_header="x-api-key")
    served.tokens.clear()
    bare(batch(1))
    assert set(served.tokens) == {(None, TOKEN)}
    served.plan = lambda number, rows: 500
    with pytest.raises(BadInput) as told:
        found(batch(8))
    served.secret = "another"
    with pytest.raises(BadInput) as closed:
        model(token_env="NET_TOKEN")
    served.secret = TOKEN
    assert "HTTP 401 (bad token Bearer ***): not allowed in; name the variable that holds the token" in str(closed.value)
    assert "***" in str(told.value)
    victim = eb.load_model(served.url, endpoint=Endpoint(token_env="NET_TOKEN"))
    seen = [
        str(told.value),
        str(closed.value),
        repr(found),
        repr(found.endpoint),
        *found.tell(),
        *found.notes(),
        str(vars(found.client.line)),
    ]
    seen += [caplog.text, *capsys.readouterr(), json.dumps(dict(victim.source)), repr(victim.model)]
    assert not any(TOKEN in text for text in seen)
    assert "token_env" not in victim.source["endpoint"]
    assert "POST" in caplog.text  # the logs were on


def test_a_token_that_is_not_there(served, model, monkeypatch):
    monkeypatch.delenv("NET_TOKEN", raising=False)
    with pytest.raises(BadInput, match="token_env: names no variable that holds a token; export the token in one"):
        model(token_env="NET_TOKEN")


# --- nobody there


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone", r"HTTP 404 \(no model gone\): no such model there; check its name and version"),
        ("moved", r"HTTP 307: it redirects to http://127.0.0.2/v2/models/net; redirects are not followed, give that address"),
        ("page", r"v2/models/page is not JSON in 3 tries; look at the server"),
    ],
)
def test_models_that_are_not_there(served, model, name, words):
    with pytest.raises(BadInput, match=words):
        model(f"{served.root}/v2/models/{name}")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (307, "it redirects to elsewhere; redirects are not followed"),
        (401, "not allowed in; name the variable"),
        (404, "no such model there"),
    ],
)
def test_what_ends_a_run_at_once(served, model, status, words):
    found = model()
    served.plan = lambda number, rows: status
    with pytest.raises(BadInput, match=f"HTTP {status}.*{words}"):
        found(batch(9))
    assert (served.requests, found.counts.sent) == (1, 9)


def test_loopback_is_never_asked_through_a_proxy(served, model, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert model()(batch(1)).isfinite().all()


def test_a_server_that_is_down(served, model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v2/models/net"
        with pytest.raises(BadInput, match=rf"model: {url} cannot be reached \(.*\); start the server or check the address"):
            model(url)
        found = model(retries=3)
        found.client.line.address = None
        found.client.address = type(found.address)(url, url, "net", "127.0.0.1")
        with pytest.raises(BadInput, match=r"cannot be reached .* in 4 tries; start the server and run again"):
            found(batch(3))
        assert (found.counts.sent, found.counts.requests, len(found.client.pace.clock.slept)) == (0, 0, 3)


# --- the command line


def test_an_attack_from_the_command_line(served, capsys, monkeypatch):
    monkeypatch.setenv("NET_TOKEN", TOKEN)
    words = ["--token-env", "NET_TOKEN", "--timeout", "9", "--rate-limit", "10000", "--endpoint", "batch_size=50", "-n", "60", "--json"]
    assert main(["attack", "noise", served.url, "--set", "draws=2", "--threat", "linf:0.3", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["samples"] == 60
    assert told["notes"] == [f"net: {served.rows} rows asked, 0 answered from the cache, {served.rows} sent in {served.requests} requests"]
    assert told["reached before"] <= 5
    assert {a for a, _ in served.tokens} == {f"Bearer {TOKEN}"}
    assert max(served.contents.values()) <= 4  # clean rows: a first look, the attack, the referee, and thin verdicts once more


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--endpoint", "speed=3"], "endpoint: speed is no option; choose from output, classes"),
        (["--endpoint", "retries"], "--endpoint 'retries': write NAME=VALUE, as retries=3"),
        (["--timeout", "0"], "endpoint: timeout 0.0: give a number above 0"),
        (["--endpoint", "retries=-1"], "endpoint: retries -1: give a whole number of at least 0"),
        (["--endpoint", "output=[1]"], "endpoint: output [1]: give a name"),
    ],
)
def test_options_that_cannot_be(served, capsys, words, said):
    assert main(["audit", served.url, *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_options_of_an_address_need_one(capsys):
    assert main(["audit", "--timeout", "3"]) == 2
    assert "options of addresses describe a MODEL: name it first" in capsys.readouterr().err


def test_an_audit_leaves_no_secret_and_can_be_verified(served, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("NET_TOKEN", TOKEN)
    served.secret = TOKEN
    served.plan = lambda number, rows: 500 if number % 7 == 3 else None
    words = ["-n", "12", "--threat", "linf:0.1", "--effort", "fast", "--endpoint", "backoff=0.001", "-o", str(tmp_path / "run")]
    assert main(["audit", served.url, *words, "--token-env", "NET_TOKEN"]) == 0
    assert main(["verify", str(tmp_path / "run"), "--token-env", "NET_TOKEN"]) == 0
    assert main(["verify", str(tmp_path / "run"), "--model", "digits-standard"]) == 0  # the same model, here
    assert main(["verify", str(tmp_path / "run")]) == 2
    told = capfd.readouterr()
    assert "HTTP 401 (bad token None): not allowed in; name the variable that holds the token, --token-env NAME" in told.err
    assert TOKEN not in told.out + told.err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        assert TOKEN.encode() not in path.read_bytes(), path
