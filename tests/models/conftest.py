"""One torch thread, and a server that speaks the Open Inference Protocol v2 on loopback, with faults on demand."""

import asyncio
import json
import socket
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from epsball.models import HttpModel
from epsball.models.digits import load as digits

LENGTH = "inference-header-content-length"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


class FakeClock:
    """Sleeps are written down, not slept."""

    def __init__(self):
        self.time, self.slept = 100.0, []

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.time += seconds


class Served:
    """The digit classifier behind the protocol. `plan(number, rows)` names the fault of an infer request, or None."""

    def __init__(self):
        self.model = digits("digits-standard").eval()
        self.loop, self.server = None, None
        self.reset()

    def reset(self):
        self.plan = lambda number, rows: None
        self.rows, self.requests, self.contents, self.tokens = 0, 0, Counter(), []
        self.metadata = {"inputs": [self.tensor("x", "FP32", -1, 1, 8, 8)], "outputs": [self.tensor("logits", "FP32", -1, 10)]}
        self.extensions, self.config, self.patient, self.secret = [], {}, True, None

    def scores(self, x):
        with torch.no_grad():
            return self.model(torch.from_numpy(np.array(x, dtype=np.float32)))

    @staticmethod
    def tensor(name, kind, *shape):
        return {"name": name, "datatype": kind, "shape": list(shape)}

    def balanced(self, found):
        """The law of counts: every row asked has one fate, and the server has seen what the client says."""
        c = found.counts
        assert c.asked == c.cached + c.answered + c.unknown
        assert (c.sent, c.requests) == (self.rows, self.requests)

    def agrees(self, found, x):
        """Scores are those of the model that is served."""
        torch.testing.assert_close(found, self.scores(x.numpy()), rtol=1e-5, atol=1e-5)

    def read(self, body, headers):
        head = int(headers.get(LENGTH, len(body)))
        question = json.loads(body[:head])
        given = question["inputs"][0]
        flat = np.frombuffer(body[head:], "<f4") if LENGTH in headers else np.array(given["data"], dtype="<f4")
        return question, flat.reshape(given["shape"])

    def answer(self, question, rows):
        found = self.scores(rows.reshape(-1, 1, 8, 8)).numpy()
        name = question.get("outputs", [{"name": "logits"}])[0]["name"]
        if name == "label":
            return {"name": name, "datatype": "INT64", "shape": [len(rows), 1]}, found.argmax(1).astype("<i8")
        return {"name": name, "datatype": "FP32", "shape": list(found.shape)}, found.astype("<f4")

    def drop(self, port):
        """Cuts the connection from this port without a word."""
        for protocol in list(self.server.server_state.connections):
            if protocol.client and protocol.client[1] == port:
                protocol.transport.abort()


def build(served):
    import fastapi

    app = fastapi.FastAPI(openapi_url=None)
    plain = fastapi.responses.JSONResponse

    @app.middleware("http")
    async def door(request: fastapi.Request, go):
        given = request.headers.get("authorization")
        if served.secret is None or given == f"Bearer {served.secret}":
            return await go(request)
        return plain({"error": f"bad token {given}"}, 401)

    @app.get("/v2")
    async def about():
        return {"name": "served", "extensions": served.extensions}

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/{version}")
    async def metadata(name: str, request: fastapi.Request, version: str = "1"):
        if name == "gone":
            return plain({"error": f"no model {name}"}, 404)
        if name == "moved":
            return plain(None, 307, {"location": "http://127.0.0.2/v2/models/net?key=1"})
        if name == "page":
            return fastapi.responses.HTMLResponse("<h1>hello</h1>")
        return {"name": name, "versions": [version], **served.metadata}

    @app.get("/v2/models/{name}/config")
    async def config(name: str):
        return served.config

    @app.post("/v2/models/{name}/infer")
    @app.post("/v2/models/{name}/versions/{version}/infer")
    async def infer(name: str, request: fastapi.Request, version: str = "1"):
        question, rows = served.read(await request.body(), request.headers)
        number, served.requests, served.rows = served.requests, served.requests + 1, served.rows + len(rows)
        served.contents.update(row.astype("<f4").tobytes() for row in rows)
        served.tokens.append((request.headers.get("authorization"), request.headers.get("x-api-key")))
        return await respond(served, served.plan(number, rows), question, rows, request)

    return app


async def respond(served, fault, question, rows, request):
    import fastapi

    plain, raw = fastapi.responses.JSONResponse, fastapi.Response
    if isinstance(fault, int):
        return plain({"error": f"fault {fault} {request.headers.get('authorization')}"}, fault)
    if isinstance(fault, tuple):
        return plain({"error": "later"}, fault[0], {"retry-after": fault[1]})
    if fault == "slow":
        while served.patient:
            await asyncio.sleep(0.01)
    if fault == "drop":
        served.drop(request.client.port)
        await asyncio.sleep(0.01)
    head, values = served.answer(question, rows)
    whole = {"id": question["id"], "model_name": "net", "outputs": [head | {"data": values.reshape(-1).tolist()}]}
    if question.get("outputs", [{}])[0].get("parameters", {}).get("binary_data"):
        text = json.dumps(whole | {"outputs": [head | {"parameters": {"binary_data_size": values.nbytes}}]}).encode()
        body, headers = text + values.tobytes(), {LENGTH: str(len(text))}
        return raw(body[:-3] if fault == "truncated" else body, headers=headers, media_type="application/octet-stream")
    if fault == "rows":
        whole["outputs"][0] = head | {"shape": [len(rows) - 1, 10], "data": values[:-1].reshape(-1).tolist()}
    if fault == "shape":
        whole["outputs"][0]["shape"] = [len(rows), 11]
    if fault == "null":
        whole["outputs"][0]["data"][:10] = [None] * 10
    if fault == "other":
        whole["id"] = "another"
    text = json.dumps(whole).encode()
    if fault == "truncated":
        return raw(text[: len(text) // 2], media_type="application/json")
    if fault == "cut":  # fewer bytes than the length says
        return fastapi.responses.StreamingResponse(iter([text[:20]]), headers={"content-length": str(len(text))})
    return raw(text, media_type="application/json")


@pytest.fixture(scope="module")
def running():
    """A server in a thread, one for each test file; skips where httpx, FastAPI or uvicorn are not installed."""
    pytest.importorskip("httpx", reason="httpx is not installed")
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    served = Served()
    place = socket.socket(proto=socket.IPPROTO_TCP)  # asyncio sends without delay only where the protocol is named
    place.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        build(served), loop="asyncio", lifespan="off", ws="none", timeout_keep_alive=60, log_config=None, log_level="critical"
    )
    served.server = uvicorn.Server(config)
    thread = threading.Thread(target=served.server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    while not served.server.started:
        time.sleep(0.005)
    served.root = f"http://127.0.0.1:{place.getsockname()[1]}"
    served.url = f"{served.root}/v2/models/net"
    yield served
    served.patient = False
    served.server.should_exit = True
    thread.join(10)
    place.close()


@pytest.fixture
def served(running):
    running.reset()
    yield running
    running.patient = False


@pytest.fixture
def model(served):
    """Makes clients with a clock that does not wait, and closes them."""
    made = []

    def make(url=None, **options):
        made.append(HttpModel(url or served.url, options, clock=FakeClock()))
        return made[-1]

    yield make
    for one in made:
        one.client.line.close()
