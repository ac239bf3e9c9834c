"""Lower bounds beside the attacks: what no change within a radius can break, and randomized smoothing."""

from epsball.certify.bracket import METHODS, Certified, certify, certify_each
from epsball.certify.smoothing import Smoothed, smooth

__all__ = ["METHODS", "Certified", "Smoothed", "certify", "certify_each", "smooth"]
