"""Models in: any common source and output shape, brought to ``box -> logits``."""

from epsball.models.adapt import Adapted
from epsball.models.http import Endpoint, HttpModel
from epsball.models.jax import JaxModel, from_keras
from epsball.models.load import ModelSpec
from epsball.models.load import load_model as load_adapted
from epsball.models.wrap import load_model, normalization, told, wrap

__all__ = [
    "Adapted",
    "Endpoint",
    "HttpModel",
    "JaxModel",
    "ModelSpec",
    "from_keras",
    "load_adapted",
    "load_model",
    "normalization",
    "told",
    "wrap",
]
