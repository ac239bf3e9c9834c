"""A forest has no gradient, and its exact worst case is a small integer program: the audit is never below it, and hardly above."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import digits
from scipy.optimize import Bounds, LinearConstraint, milp
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor, nn

import epsball as eb

RADIUS = 0.08
Leaf = tuple[np.ndarray, list[tuple[tuple[int, float], bool]]]


def trained(trees: int) -> list[Any]:
    """scikit-learn's trees, on the digits that are not asked about."""
    data = eb.load_data("digits")
    forest = RandomForestClassifier(trees, max_depth=8, random_state=0)
    rest = ~torch.isin(data.indices, digits(40).indices)
    forest.fit(data.x[rest].flatten(1).numpy(), data.y[rest].numpy())
    return [tree.tree_ for tree in forest.estimators_]


class Forest(nn.Module):
    """The mean of the leaves' shares, found by comparing and stepping down."""

    def __init__(self, trees: list[Any]) -> None:
        super().__init__()
        self.trees = [
            tuple(torch.tensor(part) for part in (t.feature, t.threshold.astype(np.float32), t.children_left, t.children_right, shares(t)))
            for t in trees
        ]

    def forward(self, x: Tensor) -> Tensor:
        x, total = x.flatten(1), torch.zeros(())
        for feature, threshold, left, right, share in self.trees:
            node = torch.zeros(len(x), dtype=torch.int64)
            for _ in range(8):
                below = x.gather(1, feature[node].clamp(min=0)[:, None])[:, 0] <= threshold[node]
                node = torch.where(feature[node] < 0, node, torch.where(below, left[node], right[node]))
            total = total + share[node]
        return total / len(self.trees)


def shares(tree: Any) -> np.ndarray:
    """(nodes, 10)"""
    value = tree.value[:, 0]
    return np.asarray(value / value.sum(1, keepdims=True), dtype=np.float32)


def reached(tree: Any, x: np.ndarray, node: int = 0, path: tuple[Any, ...] = ()) -> Iterator[Leaf]:
    """Leaves within the ball, and the choices on the way that the ball leaves open."""
    if tree.children_left[node] < 0:
        yield shares(tree)[node], list(path)
        return
    feature, threshold = int(tree.feature[node]), float(np.float32(tree.threshold[node]))
    left, right = max(x[feature] - RADIUS, 0.0) <= threshold, min(x[feature] + RADIUS, 1.0) > threshold
    for below, possible, child in ((True, left, tree.children_left), (False, right, tree.children_right)):
        if possible:
            choice = (((feature, threshold), below),) if left and right else ()
            yield from reached(tree, x, child[node], path + choice)


def breakable(trees: list[Any], x: np.ndarray, label: int) -> bool:
    """Kantchelian, Tygar & Joseph 2016, arXiv 1509.07892: a variable for each threshold in reach and each leaf, exactly."""
    leaves = [list(reached(tree, x)) for tree in trees]
    keys = sorted({key for tree in leaves for _, path in tree for key, _ in path})
    place, first, n = {key: k for k, key in enumerate(keys)}, len(keys), len(keys) + sum(map(len, leaves))
    rows, most, least, values = [], [], [], []

    def bound(entries: dict[int, float], low: float, high: float) -> None:
        row = np.zeros(n)
        row[list(entries)] = list(entries.values())
        rows.append(row)
        least.append(low)
        most.append(high)

    for one, other in pairwise(keys):
        if one[0] == other[0]:  # below the lower threshold is below the higher
            bound({place[one]: 1, place[other]: -1}, -np.inf, 0)
    at = first
    for tree in leaves:
        bound({at + k: 1 for k in range(len(tree))}, 1, 1)
        for value, path in tree:
            values.append(value)
            for key, below in path:
                bound({at: 1, place[key]: -1 if below else 1}, -np.inf, 0 if below else 1)
            at += 1
    whole = np.concatenate((np.ones(first), np.zeros(n - first)))
    for rival in set(range(10)) - {label}:
        gain = np.concatenate((np.zeros(first), [v[rival] - v[label] for v in values]))
        found = milp(-gain, constraints=LinearConstraint(np.stack(rows), least, most), bounds=Bounds(0, 1), integrality=whole)
        assert found.status == 0
        if -found.fun > 1e-5:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("trees", [1, 8])
def test_the_audit_of_a_forest_is_hardly_above_the_exact_number(trees: int, tmp_path: Path) -> None:
    forest, data = trained(trees), digits(40)
    model = Forest(forest)
    right = model(data.x).argmax(1) == data.y
    exact = sum(bool(good) and not breakable(forest, x.flatten().numpy(), int(y)) for x, y, good in zip(data.x, data.y, right, strict=True))
    result = eb.audit(model, (data.x, data.y), f"linf:{RADIUS}", out=tmp_path / "run").models[0].results[0]
    assert exact <= result.robust_accuracy.count <= exact + 1
