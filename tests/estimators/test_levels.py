"""Sparse linear models at one level and along a path: problems written by hand, chosen levels, the figure."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso
from sklearn.model_selection import KFold

import sparseopt as so
from sparseopt import SparseClassifierCV, SparseRegressor, SparseRegressorCV
from sparseopt.estimators.levels import NonnegativeNet
from tests.estimators.conftest import EXACT, TIGHT, M, P


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
    with pytest.warns(ConvergenceWarning, match=r"SparseRegressor stopped \(MAX_STEPS\).*raise max_steps"):
        SparseRegressor(0.1, loss="huber", max_steps=1, tol=1e-14).fit(X, y)


def test_a_net_without_negative_entries_has_a_certificate_and_a_prox_that_no_grid_point_beats(X, y):
    net, points = NonnegativeNet(0.7, 0.4), np.linspace(0, 3, 3001, dtype=np.float32)
    for v in (-2.0, 0.3, 2.0):
        costs = [0.5 * (u - v) ** 2 + 0.5 * float(net.value(np.array([u]))) for u in points]
        assert abs(net.prox(np.float32([v]), 0.5)[0] - points[np.argmin(costs)]) <= 1e-3
    assert net.value(np.float32([-1.0])) == np.inf
    problem = so.Problem(so.LeastSquares(X, y), net)
    steps = so.solve(problem, so.AcceleratedProximalGradient(), tol=1e-9).check()
    np.testing.assert_allclose(steps.value, so.solve(problem, so.WorkingSet(), tol=1e-9).check().value, atol=1e-4)
