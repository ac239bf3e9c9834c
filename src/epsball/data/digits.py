"""The builtin data: 1,797 handwritten digits of 8x8 pixels that come with scikit-learn, no download."""

from __future__ import annotations

import numpy as np

from epsball.data.sample import Rows, subset
from epsball.data.source import Source, array_source
from epsball.errors import BadInput

TEST_SIZE = 500


def digits_split(labels: np.typing.NDArray[np.int64]) -> tuple[Rows, Rows]:
    """(train, test) rows of scikit-learn's digits: 1,297 and 500, in the original order, disjoint, stratified by class.

    The test rows are the 500 that `subset` picks with seed 0; nothing random is involved, so training and auditing agree.

    Args:
        labels: (1797,) the labels as scikit-learn returns them.
    """
    test = np.sort(subset(labels.astype(np.int64), TEST_SIZE, seed=0))
    return np.setdiff1d(np.arange(len(labels), dtype=np.int64), test), test


def digits(split: str) -> Source:
    """The digits as (N, 1, 8, 8) in [0, 1] (sixteenths): ``split`` "test" (500) or "train" (1,297)."""
    if split not in ("train", "test"):
        raise BadInput(f"split: {split!r} is unknown for digits; choose test or train")
    from sklearn.datasets import load_digits  # slow to import, so only here

    bunch = load_digits()
    train, test = digits_split(bunch.target)
    rows = test if split == "test" else train
    x = (bunch.images[rows, None] / 16).astype(np.float32)
    return array_source("digits", x, bunch.target[rows], tuple("0123456789"), (f"digits: {len(rows)} {split} images of 8x8 pixels",))
