"""Writes digits-standard as an ONNX file: python examples/export_onnx.py net.onnx && epsball audit net.onnx"""

from __future__ import annotations

import sys

import torch

from epsball.models.digits import load

if __name__ == "__main__":
    x = torch.zeros(1, 1, 8, 8)
    axes = {"x": {0: "batch"}, "scores": {0: "batch"}}
    torch.onnx.export(
        load("digits-standard"), (x,), sys.argv[1], dynamo=False, input_names=["x"], output_names=["scores"], dynamic_axes=axes
    )
