"""Serves digits-standard by the Open Inference Protocol v2: python examples/serve.py 8080 (needs fastapi and uvicorn)."""

from __future__ import annotations

import sys
from typing import Any

import fastapi
import torch
import uvicorn

from epsball.models.digits import load

app, model = fastapi.FastAPI(), load("digits-standard")


@app.get("/v2/models/digits")
def metadata() -> dict[str, Any]:
    """What goes in and what comes out."""
    return {
        "name": "digits",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 1, 8, 8]}],
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 10]}],
    }


@app.post("/v2/models/digits/infer")
def infer(question: dict[str, Any]) -> dict[str, Any]:
    """Scores of a batch."""
    given = question["inputs"][0]
    with torch.no_grad():
        scores = model(torch.tensor(given["data"], dtype=torch.float32).reshape(given["shape"]))
    answer = {"name": "scores", "datatype": "FP32", "shape": list(scores.shape), "data": scores.flatten().tolist()}
    return {"id": question.get("id", ""), "model_name": "digits", "outputs": [answer]}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
