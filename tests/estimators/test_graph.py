"""The estimators of scikit-learn: samples, neighbours, new points, losses and labels."""

import pickle
import sys
import warnings

import numpy as np
import pytest
from sklearn import config_context
from sklearn.base import clone
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import mean_poisson_deviance
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

import sparseopt as so
from sparseopt import GraphTrendClassifier, GraphTrendFilter
from tests.trend.problems import Problem, random_graph

N = 60
CHAIN = so.Graph.chain(N)
STEPS = np.repeat([0.0, 4.0, -2.0], N // 3)


def column(numbers):
    return np.asarray(numbers, float).reshape(-1, 1)


NODES = column(range(N))


@pytest.fixture
def noisy(rng):
    return STEPS + 0.7 * rng.standard_normal(N)


def test_samples_of_a_node_count_as_their_weighted_mean(rng):
    graph = random_graph(rng, weighted=True)
    nodes = np.concatenate([rng.permutation(14), rng.integers(0, 14, 26)])
    y, weights = 5 * rng.standard_normal(40), rng.integers(1, 4, 40)
    member = nodes[:, None] == np.arange(14)
    mass = weights @ member
    problem = Problem((weights * y) @ member / mass, graph, so.L1(0.7), 1, mass)
    model = GraphTrendFilter(1, 0.7, graph, tol=1e-9).fit(column(nodes), y, sample_weight=weights)
    np.testing.assert_allclose(model.fitted_values_, problem.exact, atol=2e-3)
    direct = problem.fit(tol=1e-9)
    np.testing.assert_allclose(model.predict(column(range(14))), direct.value, rtol=1e-9)
    assert model.gap_ == pytest.approx(float(direct.gap), rel=1e-3)
    assert 0 <= model.gap_ <= 1e-9
    assert model.n_iter_ == int(direct.steps)
    repeated = clone(model).fit(column(nodes.repeat(weights)), y.repeat(weights))
    np.testing.assert_allclose(repeated.fitted_values_, model.fitted_values_, rtol=1e-9)


def test_counts_have_rates_and_the_score_is_the_explained_deviance(rng):
    rates = 3 + STEPS
    model = GraphTrendFilter(0, 2.0, CHAIN, tol=1e-8, loss="poisson")
    model.fit(np.tile(NODES, (2, 1)), np.concatenate([rates - 1, rates + 1]))
    direct = so.trend_filter(rates, CHAIN, so.L1(2.0), tol=1e-8, node_weights=np.full(N, 2.0), loss="poisson")
    np.testing.assert_allclose(model.fitted_values_, direct.value, rtol=1e-9)
    found = model.predict(NODES)
    np.testing.assert_allclose(found, np.exp(model.fitted_values_), rtol=1e-14)
    # Each end of a plateau of 40 samples moves it by alpha / 40.
    np.testing.assert_allclose(found, rates + np.repeat([2, -4, 2], 20) / 40, atol=1e-3)
    held_out, weights = rng.poisson(rates), rng.integers(1, 3, N)
    null = np.full(N, np.average(held_out, weights=weights))
    deviances = [mean_poisson_deviance(held_out, means, sample_weight=weights) for means in (found, null)]
    assert model.score(NODES, held_out, weights) == pytest.approx(1 - deviances[0] / deviances[1])


def test_a_loss_with_another_mean_takes_equal_samples_of_a_node_alone(noisy):
    noisy[::10] += 50
    model = GraphTrendFilter(0, 1.0, CHAIN, loss=so.scalar.Huber(0.5)).fit(NODES, noisy, np.full(N, 2.0))
    options = {"tol": 1e-4, "node_weights": np.full(N, 2.0), "loss": so.scalar.Huber(0.5)}
    direct = so.trend_filter(noisy, CHAIN, so.L1(1.0), **options)
    np.testing.assert_array_equal(model.predict(NODES), direct.value)
    X, y = np.tile(NODES, (2, 1)), np.tile(noisy, 2)
    np.testing.assert_array_equal(clone(model).fit(X, y).predict(NODES), model.predict(NODES))
    y[[3, 4]] = [1.0, 2.0]
    with pytest.raises(ValueError, match=r"must be equal.*given 1.0 in row 3 and .* in row 63.*\(2 such nodes\)"):
        model.fit(X, y)


def test_labels_of_a_node_count_as_a_proportion(rng):
    graph = random_graph(rng)
    nodes, weights = np.tile(np.arange(14), 4), rng.integers(1, 4, 56)
    ones = rng.random(56) < np.where(nodes < 7, 0.2, 0.8)
    mass = np.bincount(nodes, weights)
    proportions = np.bincount(nodes, weights * np.where(ones, 0.95, 0.05)) / mass
    model = GraphTrendClassifier(0, 0.5, graph, tol=1e-8, label_smoothing=0.1)
    model.fit(column(nodes), np.where(ones, "yes", "no"), weights)
    assert model.classes_.tolist() == ["no", "yes"]
    # A notebook shows the parameters, as for every estimator, and how the fit ended.
    shown, parameters = model._repr_html_(), clone(model)._repr_html_()
    assert ("TrendSolution" in shown, "TrendSolution" in parameters, "label_smoothing" in parameters) == (1, 0, 1)
    assert "<th>status</th><td>CONVERGED</td>" in model._repr_mimebundle_()["text/html"]
    with config_context(display="text"):
        assert not hasattr(model, "_repr_html_")
        assert set(model._repr_mimebundle_()) == {"text/plain"}
    direct = so.trend_filter(proportions, graph, so.L1(0.5), tol=1e-8, node_weights=mass, loss="logistic")
    np.testing.assert_allclose(model.fitted_values_, direct.value, atol=1e-9)
    every = column(range(14))
    np.testing.assert_allclose(model.decision_function(every), model.fitted_values_, atol=1e-12)
    np.testing.assert_allclose(model.predict_proba(every)[:, 1], 1 / (1 + np.exp(-model.fitted_values_)), rtol=1e-12)
    np.testing.assert_array_equal(model.predict(every) == "yes", model.decision_function(every) > 0)
    repeated = clone(model).fit(column(nodes.repeat(weights)), ones.repeat(weights))
    np.testing.assert_allclose(repeated.fitted_values_, model.fitted_values_, atol=1e-9)


def test_a_cluster_of_one_label_has_a_finite_fit_by_label_smoothing(rng):
    X = np.concatenate([rng.uniform(0, 1, (6, 2)), rng.uniform(50, 51, (6, 2))])
    model = GraphTrendClassifier(n_neighbors=3).fit(X, np.arange(12) >= 6)
    np.testing.assert_allclose(model.decision_function(X), np.repeat([-1, 1], 6) * np.log(199), rtol=1e-12)
    y = np.repeat(["a", "b", "c"], 4)
    np.testing.assert_array_equal(OneVsRestClassifier(model).fit(X, y).predict(X[[0, 11]]), ["a", "c"])
    with pytest.raises(ValueError, match="only one of the labels"):
        model.set_params(label_smoothing=0).fit(X, np.arange(12) >= 6)


def test_outputs_are_smoothed_together_and_a_penalty_has_a_name_or_is_a_function_of_alpha(rng, noisy):
    graph = random_graph(rng)
    y = 5 * rng.standard_normal((14, 2))
    model = GraphTrendFilter(0, 1.0, graph, penalty="group_l2", tol=1e-6).fit(column(range(14)), y)
    direct = so.trend_filter(y, graph, so.GroupL2(1.0), 0)
    np.testing.assert_array_equal(model.predict(column([3, 3, 0])), np.asarray(direct.value)[[3, 3, 0]])
    assert model.solution_.status == so.Status.CONVERGED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = GraphTrendFilter(0, 2.0, CHAIN, penalty="mcp").fit(NODES, noisy)
    made = clone(named).set_params(penalty=so.MCP).fit(NODES, noisy)
    assert (named.solution_.status, np.isnan(named.gap_)) == (so.Status.STATIONARY, True)
    np.testing.assert_array_equal(made.fitted_values_, named.fitted_values_)


def test_missing_nodes_are_filled_in():
    # Each plateau of two samples gives way by alpha / 2; between them the total variation leaves a choice.
    model = GraphTrendFilter(0, 1.0, so.Graph.chain(6), tol=1e-9).fit(column([5, 0, 4, 1]), [6.5, 0.0, 5.5, 0.0])
    values = model.predict(column(range(6)))
    np.testing.assert_allclose(values[[0, 1, 4, 5]], [0.5, 0.5, 5.5, 5.5], atol=1e-3)
    assert np.all(np.diff(values) >= -1e-3)
    dropped = clone(model).fit(column(range(6)), [0.0, 0.0, 9.0, -9.0, 5.5, 6.5], sample_weight=[1, 1, 0, 0, 1, 1])
    np.testing.assert_allclose(dropped.fitted_values_, values, rtol=1e-9)


def test_a_large_alpha_gives_the_weighted_mean_of_each_component(rng):
    points = np.concatenate([rng.uniform(0, 1, (6, 2)), rng.uniform(50, 51, (6, 2))])
    counts = np.arange(1, 13)
    X, y = points.repeat(counts, axis=0), rng.standard_normal(counts.sum())
    model = GraphTrendFilter(alpha=1e3, n_neighbors=3).fit(X, y)
    assert (model.graph_.num_nodes, model.graph_.num_components) == (12, 2)
    np.testing.assert_array_equal(model.positions_, points)
    split = counts[:6].sum()
    means = np.repeat([y[:split].mean(), y[split:].mean()], [split, len(y) - split])
    np.testing.assert_allclose(model.predict(X), means)


def test_neighbours_join_two_points_where_either_chose_the_other():
    # The nearest of 0, 1, 3, 7 are 1, 0, 1, 3: only 0 and 1 chose each other.
    model = GraphTrendFilter(alpha=0, n_neighbors=1).fit(column([0, 1, 3, 7]), np.zeros(4))
    assert sorted(map(tuple, np.sort(model.graph_.edges, axis=1).tolist())) == [(0, 1), (1, 2), (2, 3)]
    # More neighbours than points: everyone.
    assert GraphTrendFilter(alpha=0).fit(column([0, 1, 3, 7]), np.zeros(4)).graph_.num_edges == 6
    lonely = GraphTrendFilter().fit([[1.0, 2.0]] * 3, [1.0, 2.0, 6.0])
    np.testing.assert_allclose(lonely.predict([[1.0, 2.0], [9.0, 9.0]]), 3.0, rtol=1e-15)


@pytest.mark.parametrize("features", [1, 2, 30])  # 30 features: a search whose distances are rounded
def test_points_of_the_fit_get_their_own_value(rng, features):
    X = 1e6 + rng.standard_normal((40, features))
    X[7] = np.nextafter(X[6], np.inf)
    X[8] = 0.0
    y = rng.standard_normal((40, 2))
    model = GraphTrendFilter(alpha=0).fit(X, y)
    shuffled = rng.permutation(40)
    np.testing.assert_array_equal(model.predict(X[shuffled]), y[shuffled])
    np.testing.assert_array_equal(model.predict(-X[[8]]), y[[8]])  # -0.0 is 0.0
    new = model.predict(1e6 + rng.standard_normal((25, features)))
    assert np.isfinite(new).all()
    assert np.all((new >= y.min(axis=0)) & (new <= y.max(axis=0)))


def test_other_points_get_the_mean_by_inverse_distance_of_values_rates_and_probabilities():
    X, new = column([0, 1, 5]), column([0.25, 0.5, -1.0])
    model = GraphTrendFilter(alpha=0, n_neighbors=2).fit(X, [0.0, 8.0, 100.0])
    np.testing.assert_allclose(model.predict(new), [2.0, 4.0, 8 / 3])
    assert model.predict(column([5e-324])) == pytest.approx(0, abs=1e-300)  # at a distance whose square is 0
    rates = GraphTrendFilter(alpha=0, n_neighbors=2, loss="poisson").fit(X, [1, 9, 100])
    np.testing.assert_allclose(rates.predict(new), [3.0, 5.0, 11 / 3])
    labels = GraphTrendClassifier(alpha=0, n_neighbors=2, label_smoothing=0.2).fit(X, [7, 9, 7])
    np.testing.assert_allclose(labels.predict_proba(new)[:, 1], [0.3, 0.5, 0.1 + 0.8 / 3])
    np.testing.assert_array_equal(labels.predict(np.concatenate([X, new])), [7, 9, 7, 7, 7, 7])


def test_grid_search_finds_order_and_alpha_of_steps_on_a_chain_in_a_pipeline(rng):
    # Three observations of every node, and a fold for each: what is held out is noise, no node.
    y = np.tile(STEPS, 3) + 1.5 * rng.standard_normal(3 * N)
    X, folds = np.tile(NODES, (3, 1)), PredefinedSplit(np.arange(3).repeat(N))
    model = make_pipeline(FunctionTransformer(), GraphTrendFilter(graph=CHAIN))
    grid = {"graphtrendfilter__alpha": [0.1, 4.0, 100.0], "graphtrendfilter__order": [0, 1]}
    search = GridSearchCV(model, grid, cv=folds).fit(X, y)
    assert list(search.best_params_.values()) == [4.0, 0]
    means = y.reshape(3, N).mean(axis=0)
    assert np.mean((search.predict(NODES) - STEPS) ** 2) < 0.2 * np.mean((means - STEPS) ** 2)


def test_copies_predict_and_fit_alike_and_a_fit_is_judged_by_how_it_was_made(noisy):
    model = GraphTrendFilter(0, 1.0, CHAIN).fit(NODES, noisy)
    assert model.get_params()["graph"] is CHAIN
    thawed = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(thawed.predict(NODES), model.predict(NODES))
    for copy in (thawed, clone(model)):
        np.testing.assert_array_equal(copy.fit(NODES, noisy).fitted_values_, model.fitted_values_)
    assert isinstance(thawed.solution_.dual, np.ndarray)
    model.set_params(graph=None)
    np.testing.assert_array_equal(model.predict(NODES), thawed.predict(NODES))


def test_a_setting_of_the_method_is_a_parameter():
    model = GraphTrendFilter(1, 1.0, CHAIN, method="doge").set_params(method__B=1, alpha=2.0)
    assert (model.method, model.alpha) == (so.trend.Doge(B=1), 2.0)
    assert model.get_params()["method__B"] == 1
    assert model.set_params(method__rho=3.0).method == so.trend.Doge(rho=3.0, B=1)


def test_without_scikit_learn_the_estimator_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.utils.validation", None)
    for module in ("sparseopt.estimators", "sparseopt.estimators.graph"):
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError, match=r"pip install 'sparseopt\[sklearn\]'") as caught:
        _ = so.GraphTrendFilter
    assert caught.value.name == "sklearn.utils.validation"


def test_held_out_nodes_get_the_covariates_part_and_the_season(noisy, rng):
    x, wave = rng.standard_normal((N, 1)), np.tile([3.0, -1.0, -2.0], N // 3)
    y, seen = noisy + 5 * x[:, 0] + wave, rng.random(N) < 0.8
    model = GraphTrendFilter(alpha=2.0, graph=CHAIN, covariates=x, season=3, tol=1e-6)
    predicted = model.fit(NODES[seen], y[seen]).predict(NODES)
    mass = seen.astype(float)
    fit = so.trend_filter(y, CHAIN, so.L1(2.0), node_weights=mass, covariates=x, season=3, tol=1e-6)
    np.testing.assert_allclose(predicted, fit.fitted, atol=1e-6)
    assert model.score(NODES[~seen], y[~seen]) > 0.9
    with pytest.raises(ValueError, match="give graph"):
        clone(model).set_params(graph=None).fit(NODES, y)


def test_a_monotone_fit_without_a_weight_is_isotonic_regression(rng):
    y = NODES[:, 0] / 20 + rng.standard_normal(N)
    model = GraphTrendFilter(alpha=0.0, graph=CHAIN, monotone="up", bounds=(None, 2.0)).fit(NODES, y)
    expected = np.minimum(IsotonicRegression().fit_transform(NODES[:, 0], y), 2.0)
    np.testing.assert_allclose(model.predict(NODES), expected, atol=1e-8)
