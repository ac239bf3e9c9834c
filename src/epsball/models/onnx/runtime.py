"""An ONNX file behind onnxruntime: scores, no gradients; also the judge of the interpreter."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epsball.data.files import one_line
from epsball.errors import BadInput
from epsball.models.onnx.interpreter import Program


def need(name: str) -> Any:
    """An optional package.

    Raises:
        BadInput: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise BadInput(f"model: ONNX files need {name}: pip install 'epsball[onnx]'") from exc


class Scores(nn.Module):
    """A file run by onnxruntime on the CPU.

    Args:
        path: the file. program: what was read from it: names, shape and type of input and output.

    Raises:
        BadInput: a file that the runtime refuses.

    Cost: one run of the graph.
    """

    def __init__(self, path: Path, program: Program) -> None:
        super().__init__()
        runtime = need("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)
        except Exception as exc:  # the runtime has many kinds of errors
            raise BadInput(f"model: {str(path)!r} is refused by onnxruntime ({one_line(exc, 120)}); export it again") from exc
        self.source, self.output, self.dtype = program.source, program.output, program.dtype

    def forward(self, x: Tensor) -> Tensor:
        """The wanted output for a batch, detached."""
        asked = x.detach().cpu().to(self.dtype).contiguous().numpy()
        try:
            answer = self.session.run([self.output], {self.source: asked})[0]
        except Exception as exc:
            raise BadInput(
                f"model: onnxruntime on input of shape {tuple(x.shape)}: {one_line(exc, 120)}; give data of the shape it wants"
            ) from exc
        return torch.from_numpy(answer).to(x.device)
