"""A scikit-learn random forest as a model: epsball audit examples/forest.py:make --threat linf:0.1 -n 100 --effort fast"""

from __future__ import annotations

from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier


def make() -> RandomForestClassifier:
    """Fitted on the half of scikit-learn's digits that the audit never sees, pixels in 0..1."""
    from epsball.data import load_data

    seen = {row.tobytes() for row in load_data("digits").x.numpy()}
    images, labels = load_digits(return_X_y=True)
    fit = [i for i, image in enumerate(images) if (image / 16).astype("float32").tobytes() not in seen]
    return RandomForestClassifier(100, random_state=0).fit(images[fit] / 16, labels[fit])
