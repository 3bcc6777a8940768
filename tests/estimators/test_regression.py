"""Sparse linear models as estimators: they agree with scikit-learn, and with problems written by hand."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.base import clone
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression
from sklearn.metrics import mean_poisson_deviance
from sklearn.model_selection import ShuffleSplit
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks

import sparseopt as so
from sparseopt import SparseClassifier, SparseClassifierCV, SparseRegressor, SparseRegressorCV
from tests.estimators.conftest import EXACT, TIGHT, M, P

CHECKED = [SparseClassifier(**TIGHT), SparseRegressorCV(alphas=5), SparseClassifierCV(alphas=3, cv=3)]


# The data of the checks have a standard deviation of 1: an alpha of 1 would leave no coefficient.
@pytest.mark.thorough
@parametrize_with_checks([SparseRegressor(0.01), *CHECKED])
def test_scikit_learn_accepts_it(estimator, check):
    check(estimator)


@pytest.mark.parametrize("name", ["check_regressors_train", "check_estimator_sparse_array", "check_fit_idempotent"])
def test_scikit_learn_accepts_it_in_short(name):
    getattr(estimator_checks, name)("SparseRegressor", SparseRegressor(0.01))


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
def test_it_agrees_with_lasso_and_elastic_net(X, y, weights, intercept, positive):
    shared = {"alpha": 0.2, "fit_intercept": intercept, "positive": positive}
    ours = SparseRegressor(**shared, **TIGHT).fit(X, y, weights)
    theirs = Lasso(**shared, **EXACT).fit(X, y, weights)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-6)
    assert ours.intercept_ == pytest.approx(theirs.intercept_, abs=1e-6)
    assert 0 <= ours.gap_ <= 1e-12
    assert ours.score(X, y) == pytest.approx(theirs.score(X, y))
    np.testing.assert_array_equal(ours.sparse_coef_.toarray(), ours.coef_[None])
    net = SparseRegressor(penalty="elastic_net", l1_ratio=0.3, **shared, **TIGHT).fit(sparse.csr_array(X), y)
    theirs = ElasticNet(l1_ratio=0.3, **shared, **EXACT).fit(X, y)
    np.testing.assert_allclose(net.predict(X), theirs.predict(X), atol=1e-6)


def test_it_agrees_with_logistic_regression_of_two_and_more_classes(X, y, weights):
    two = SparseClassifier(0.05, **TIGHT).fit(X, np.where(y > 5, "yes", "no"), weights)
    # liblinear would penalise the intercept.
    theirs = LogisticRegression(C=1 / 0.05 / weights.sum(), l1_ratio=1, solver="saga", **EXACT)
    theirs.fit(X, np.where(y > 5, "yes", "no"), weights)
    np.testing.assert_allclose(two.coef_, theirs.coef_, atol=1e-5)
    np.testing.assert_allclose(two.predict_proba(X), theirs.predict_proba(X), atol=1e-5)
    np.testing.assert_array_equal(two.predict(X) == "yes", two.decision_function(X) > 0)
    labels = np.digitize(y, [3.0, 6.0])
    three = SparseClassifier(0.05, loss="squared_hinge").fit(X, labels)
    apart = SparseClassifier(0.05, loss="squared_hinge").fit(X, labels == 2)
    np.testing.assert_allclose(three.decision_function(X)[:, 2], apart.decision_function(X), rtol=1e-12)
    assert (three.coef_.shape, len(three.solution_)) == ((3, P), 3)
    assert not hasattr(three, "predict_proba")
    np.testing.assert_allclose(clone(three).set_params(loss="logistic").fit(X, labels).predict_proba(X).sum(axis=1), 1)


def test_counts_have_means_and_the_score_is_the_explained_deviance(X, rng):
    counts = rng.poisson(np.exp(X[:, 0] / 2 + 1))
    model = SparseRegressor(0.1, loss="poisson", **TIGHT).fit(X, counts)
    found = model.predict(X)
    np.testing.assert_allclose(found, np.exp(X @ model.coef_ + model.intercept_), rtol=1e-12)
    assert found.mean() == pytest.approx(counts.mean())  # by the intercept
    deviances = [mean_poisson_deviance(counts, means) for means in (found, np.full(M, counts.mean()))]
    assert model.score(X, counts) == pytest.approx(1 - deviances[0] / deviances[1])


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("alpha is the weight", SparseRegressor(-1.0)),
        ("l1_ratio is a number from 0 to 1", SparseRegressor(l1_ratio=2)),
        ("l1_ratio is of penalty=.elastic_net., given 0.5 with 'l1'", SparseRegressor(l1_ratio=0.5)),
        ("one of l1, elastic_net, mcp, scad, or an object", SparseRegressor(penalty=so.L1)),
        ("one of l1, elastic_net with positive=True", SparseRegressor(penalty="mcp", positive=True)),
        ("tol must be positive", SparseRegressor(tol=0)),
        ("max_steps is a whole number", SparseRegressor(max_steps=0)),
        ("use SparseClassifier", SparseRegressor(loss="logistic")),
        ("use SparseRegressor", SparseClassifier(loss="square")),
        ("needs counts", SparseRegressor(loss="poisson")),
        ("unknown rule", SparseRegressorCV(rule="best")),
        ("alphas is a whole number", SparseRegressorCV(alphas=0)),
        ("hold out every sample once", SparseRegressorCV(cv=ShuffleSplit(3))),
        ("has no first level: give alphas", SparseRegressorCV(penalty="elastic_net", l1_ratio=0)),
    ],
)
def test_what_is_wrong_is_said_before_any_work(X, y, text, model):
    with pytest.raises(ValueError, match=text):
        model.fit(X, y - 5)
