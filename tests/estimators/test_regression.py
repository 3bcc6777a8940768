"""All estimators pass scikit-learn's checks; sparse linear models agree with its own, at one level and along a path."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression
from sklearn.metrics import mean_poisson_deviance
from sklearn.model_selection import KFold, ShuffleSplit
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks

import sparseopt as so
from sparseopt import SparseClassifier, SparseClassifierCV, SparseRegressor, SparseRegressorCV
from sparseopt.estimators.levels import NonnegativeNet

M, P = 60, 30
# For our estimators and for scikit-learn's.
TIGHT = {"tol": 1e-12}
EXACT = {"tol": 1e-14, "max_iter": 100_000}
# The data of the checks have a standard deviation of 1 and 13 edges a node: an alpha of 1 would leave nothing.
REGRESSORS = [SparseRegressor(0.01), so.GraphTrendFilter(alpha=0.01)]
CHECKED = [SparseClassifier(**TIGHT), SparseRegressorCV(alphas=5), SparseClassifierCV(alphas=3, cv=3)]


@pytest.fixture
def X(rng):
    return rng.standard_normal((M, P))


@pytest.fixture
def y(X, rng):
    return X[:, 0] - 2 * X[:, 1] + X[:, 2] + rng.standard_normal(M) + 5


@pytest.fixture
def weights(rng):
    return rng.integers(0, 3, M)


@pytest.mark.thorough
@parametrize_with_checks([*REGRESSORS, *CHECKED, so.GraphTrendClassifier()])
def test_scikit_learn_accepts_it(estimator, check):
    check(estimator)


@pytest.mark.parametrize("estimator", REGRESSORS, ids=lambda estimator: type(estimator).__name__)
def test_scikit_learn_accepts_it_in_short(estimator):
    special = "regressor_multioutput" if isinstance(estimator, so.GraphTrendFilter) else "estimator_sparse_array"
    for name in ("regressors_train", "fit_idempotent", special):
        getattr(estimator_checks, f"check_{name}")(type(estimator).__name__, estimator)


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


def test_other_losses_and_penalties_are_the_problem_of_the_mean_loss(X, y):
    loss = so.HuberLoss(X, y, weights=1 / M, intercept=True)
    for name, penalty in {"mcp": so.MCP(0.1), "scad": so.SCAD(0.1)}.items():
        model = SparseRegressor(0.1, penalty=name, loss="huber").fit(X, y)
        np.testing.assert_allclose(model.coef_, so.solve(so.Problem(loss, penalty), tol=1e-6).value[:-1], atol=1e-9)
    adapted = SparseRegressor(0.1, penalty=so.L1(np.arange(P) + 1.0), **TIGHT).fit(X, y)
    scaled = Lasso(0.1, **EXACT).fit(X / (np.arange(P) + 1), y)
    np.testing.assert_allclose(adapted.coef_ * (np.arange(P) + 1), scaled.coef_, atol=1e-6)


def test_float32_stays_and_a_warm_start_needs_fewer_steps(X, y):
    narrow = SparseRegressor(0.1).fit(X.astype(np.float32), y)
    assert (narrow.coef_.dtype, narrow.predict(X.astype(np.float32)).dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(narrow.coef_, SparseRegressor(0.1).fit(X, y).coef_, atol=1e-4)
    model = SparseRegressor(0.1, warm_start=True).fit(X, y)
    assert model.n_iter_ > model.fit(X, y).n_iter_ == 0
    assert model.fit(X[:, :5], y).coef_.shape == (5,)  # which is another shape


@pytest.mark.parametrize("penalty", ["l1", "elastic_net"])
def test_the_level_is_chosen_on_the_path_of_all_samples(X, y, penalty):
    model = SparseRegressorCV(alphas=20, penalty=penalty, rule="one_se").fit(X, y)
    assert np.flatnonzero(np.diff(model.path_.values.indptr) > 1)[0] == 1  # nothing but the intercept enters at first
    simple, best = model.alpha_, clone(model).set_params(rule="min").fit(X, y).alpha_
    assert simple > best == model.alphas_[model.cv_errors_.mean(axis=1).argmin()]
    at = SparseRegressor(simple, penalty=penalty, **TIGHT).fit(X, y)
    np.testing.assert_allclose(model.coef_, at.coef_, atol=1e-2)
    given = SparseRegressorCV(alphas=model.alphas_[[7, 2]], penalty=penalty, cv=KFold(4)).fit(X, y)
    np.testing.assert_array_equal(given.alphas_, model.alphas_[[2, 7]])
    assert given.cv_errors_.shape == (2, 4)


def test_classes_share_a_level_and_the_path_is_drawn(X, y):
    model = SparseClassifierCV(alphas=6, cv=3).fit(X, np.digitize(y, [3.0, 6.0]))
    assert model.cv_errors_.shape == (6, 3)
    assert [path.levels[0] for path in model.path_] == [model.alphas_[0]] * 3
    ax = model.plot_path()
    assert [text.get_text() for text in ax.get_legend().get_texts()][:2] == ["class 0", "class 1"]
    regressor, ax = SparseRegressorCV(alphas=6).fit(X, y), plt.subplots()[1]
    assert regressor.plot_path(ax) is ax
    assert ax.lines[-1].get_xdata()[0] == regressor.alpha_
    plt.close("all")


def test_a_missed_tolerance_is_a_warning_with_advice(X, y):
    for model in (SparseRegressor(loss="huber", max_steps=1), so.GraphTrendFilter(max_steps=1)):
        said = rf"{type(model).__name__} stopped \(MAX_STEPS\).*raise max_steps"
        with pytest.warns(ConvergenceWarning, match=said) as told:
            model.set_params(alpha=0.1, tol=1e-14).fit(X, y)
        assert f"after {model.n_iter_} steps" in str(told[0].message)
        assert not model.gap_ <= 1e-14


def test_a_net_without_negative_entries_has_a_certificate_and_a_prox_that_no_grid_point_beats(X, y):
    net, points = NonnegativeNet(0.7, 0.4), np.linspace(0, 3, 3001, dtype=np.float32)
    for v in (-2.0, 0.3, 2.0):
        costs = [0.5 * (u - v) ** 2 + 0.5 * float(net.value(np.array([u]))) for u in points]
        assert abs(net.prox(np.float32([v]), 0.5)[0] - points[np.argmin(costs)]) <= 1e-3
    assert net.value(np.float32([-1.0])) == np.inf
    problem = so.Problem(so.LeastSquares(X, y), net)
    steps = so.solve(problem, so.AcceleratedProximalGradient(), tol=1e-9).check()
    np.testing.assert_allclose(steps.value, so.solve(problem, so.WorkingSet(), tol=1e-9).check().value, atol=1e-4)
