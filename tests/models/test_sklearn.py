"""scikit-learn classifiers as black boxes: columns, access, trust."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

import epsball as eb
from epsball.core import Access, Tally
from epsball.errors import AccessDenied, BadInput, Untrusted
from epsball.models.load import load_model
from epsball.models.sklearn import Estimator


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return x[:300] / 16, y[:300]


def scores(victim, x):
    return victim.outputs(x, Tally.zeros(len(x)))


class Predicts:
    """Nothing but answers."""

    classes_ = np.array(["cat", "dog", "eel"])

    def predict(self, x):
        return self.classes_[(x.sum(1) * 3 / x.shape[1]).clip(0, 2).astype(int)]


ESTIMATORS = [
    LogisticRegression(max_iter=50, tol=1),
    make_pipeline(StandardScaler(), RidgeClassifier()),
    RandomForestClassifier(5, random_state=0),
    DecisionTreeClassifier(random_state=0),
    KNeighborsClassifier(3),
    SVC(),
    SVC(decision_function_shape="ovo"),
]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("classes", [10, 2])
def test_decisions_are_the_estimators_own(digits, estimator, classes):
    x, y = digits[0][digits[1] < classes], digits[1][digits[1] < classes]
    estimator.fit(x, y)
    victim = eb.wrap(estimator)
    ovo = getattr(estimator, "decision_function_shape", "") == "ovo" and classes > 2
    assert victim.access is (Access.LABELS if ovo else Access.SCORES)
    assert victim.name == type(estimator).__name__
    images = torch.from_numpy(x).float().reshape(-1, 1, 8, 8)
    out = scores(victim, images)
    assert out.shape == (len(x), classes)
    assert bool(out.isfinite().all())
    assert torch.equal(out.argmax(1), torch.from_numpy(estimator.predict(x.astype(np.float32))))
    with pytest.raises(AccessDenied):
        victim.differentiable(images, Tally.zeros(len(x)))
    with pytest.raises(AccessDenied):
        eb.attacks.pgd(steps=1)(victim, images, torch.from_numpy(y), radius=0.1)


def test_scores_are_log_probabilities_or_decisions(digits):
    x, y = digits
    tree = RandomForestClassifier(5, random_state=0).fit(x, y)
    out = scores(eb.wrap(tree), torch.from_numpy(x).float())
    np.testing.assert_allclose(out.softmax(1).numpy(), tree.predict_proba(x.astype(np.float32)), atol=1e-6)
    two = RidgeClassifier().fit(x, y > 4)
    out = scores(eb.wrap(two), torch.from_numpy(x).float())
    assert torch.equal(out[:, 0], torch.zeros(len(x), dtype=out.dtype))
    np.testing.assert_allclose(out[:, 1].numpy(), two.decision_function(x.astype(np.float32)))


def test_classes_find_their_columns(digits):
    x, y = digits
    odd = RidgeClassifier().fit(x[y % 2 == 1], y[y % 2 == 1])
    model = Estimator(odd)
    assert "does not know class 0, 2, 4, 6, 8" in model.notes[0]
    out = model(torch.from_numpy(x).float())
    assert out.shape == (300, 10)
    assert torch.equal(out.argmax(1), torch.from_numpy(odd.predict(x)))
    assert torch.equal(out[:, 1::2], torch.from_numpy(odd.decision_function(x.astype(np.float32))).double())
    named = RidgeClassifier().fit(x, np.array(list("zyxwvutsrq"))[y])
    model = Estimator(named)
    assert model.notes[0].startswith("the classes are numbered in the estimator's order: 0 = q, 1 = r")
    assert [named.classes_[i] for i in model(torch.from_numpy(x)).argmax(1)] == named.predict(x).tolist()
    reversed_ = eb.wrap(named, class_order=list(range(9, -1, -1)))
    answers = scores(reversed_, torch.from_numpy(x).float())
    assert torch.equal(answers.argmax(1), 9 - model(torch.from_numpy(x).float()).argmax(1))


def test_labels_only():
    victim = eb.wrap(Predicts())
    assert victim.access is Access.LABELS
    x = torch.tensor([[0.0, 0.1], [0.9, 1.0], [0.5, 0.5]])
    assert scores(victim, x).tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert eb.wrap(RidgeClassifier().fit(np.eye(2), [0, 1]), access=Access.LABELS).access is Access.LABELS


def test_queries_are_counted(digits):
    x, y = digits
    victim = eb.wrap(RidgeClassifier().fit(x, y), batch_size=7)
    tally = Tally.zeros(20)
    victim.outputs(torch.from_numpy(x[:20]).float(), tally)
    assert tally.forwards.tolist() == [1] * 20


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x, y: RidgeClassifier(), "RidgeClassifier has no list classes_"),
        (lambda x, y: LinearRegression().fit(x, y), "LinearRegression has no list classes_"),
        (lambda x, y: DecisionTreeClassifier().fit(x, np.stack([y, y], 1)), "DecisionTreeClassifier has no list classes_"),
        (lambda x, y: DecisionTreeClassifier().fit(x, y * 0), "knows 1 classes; fit it on two or more"),
    ],
)
def test_what_is_no_classifier(digits, make, words):
    with pytest.raises(BadInput, match=words):
        eb.wrap(make(*digits))


def test_what_is_no_model_at_all():
    with pytest.raises(BadInput, match=r"model: int cannot be called and does not predict"):
        eb.wrap(3)


def test_wrong_features_are_told(digits):
    victim = eb.wrap(RidgeClassifier().fit(*digits))
    with pytest.raises(BadInput, match=r"RidgeClassifier on 9 features: X has 9 features, but RidgeClassifier"):
        scores(victim, torch.rand(2, 9))


def test_from_a_function(tmp_path):
    (tmp_path / "made.py").write_text(
        "from sklearn.datasets import load_digits\nfrom sklearn.linear_model import RidgeClassifier\n"
        "def make():\n    x, y = load_digits(return_X_y=True)\n    return RidgeClassifier().fit(x / 16, y)\n"
        "fitted = make()\n"
    )
    for name in ("make", "fitted"):
        model, notes = load_model(f"{tmp_path}/made.py:{name}")
        assert model.access is Access.SCORES
        assert notes[1] == "RidgeClassifier answers by decision_function: scores only, no gradients"
        assert len(notes) == 2
        assert model(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    with pytest.raises(BadInput, match=r"returns a plain function or an estimator"):
        load_model(f"{tmp_path}/made.py:make", "w.pt")
    assert eb.load_model(f"{tmp_path}/made.py:make").access is Access.SCORES


def test_pickles_need_trust(digits, tmp_path):
    import joblib

    path = tmp_path / "m.joblib"
    joblib.dump(RidgeClassifier().fit(*digits), path)
    with pytest.raises(Untrusted, match="is a pickle, which can run code; pass --trust-code if you wrote it yourself"):
        load_model(str(path))
    model, notes = load_model(str(path), trust_code=True)
    assert notes[0] == "m.joblib is a pickle that was trusted"
    assert model(torch.rand(3, 64)).shape == (3, 10)
    joblib.dump([1, 2], path)
    with pytest.raises(BadInput, match="holds list, which has no predict"):
        load_model(str(path), trust_code=True)
    path.write_bytes(b"nothing")
    with pytest.raises(BadInput, match="cannot be loaded"):
        load_model(str(path), trust_code=True)
