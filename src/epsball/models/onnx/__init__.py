"""ONNX files in: scores by onnxruntime, gradients by an interpreter of the graph in torch."""

from epsball.models.onnx.load import load_onnx

__all__ = ["load_onnx"]
