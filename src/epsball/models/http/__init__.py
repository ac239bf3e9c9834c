"""Models behind an address that speaks the Open Inference Protocol v2 (KServe, Triton, MLServer): scores or labels, no gradients."""

from epsball.models.http.address import Address, is_address
from epsball.models.http.client import Counts
from epsball.models.http.endpoint import Endpoint
from epsball.models.http.model import HttpModel

__all__ = ["Address", "Counts", "Endpoint", "HttpModel", "is_address"]
