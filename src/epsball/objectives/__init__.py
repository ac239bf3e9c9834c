"""What is climbed."""

from epsball.objectives.classification import cross_entropy, dlr, dlr_targeted, kl, margin

OBJECTIVES = {"ce": cross_entropy, "margin": margin, "dlr": dlr, "dlr_targeted": dlr_targeted, "kl": kl}

__all__ = ["OBJECTIVES", "cross_entropy", "dlr", "dlr_targeted", "kl", "margin"]
