"""Models in: any common source and output shape, brought to ``box -> logits``."""

from epsball.models.adapt import Adapted
from epsball.models.load import ModelSpec
from epsball.models.load import load_model as load_adapted
from epsball.models.wrap import load_model, normalization, wrap

__all__ = ["Adapted", "ModelSpec", "load_adapted", "load_model", "normalization", "wrap"]
