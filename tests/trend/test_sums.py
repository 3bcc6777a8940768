"""Several penalties at once, and weights for rows."""

import numpy as np
import pytest

import sparseopt as so
from sparseopt.trend.filter import chosen_method
from tests.tiers import often
from tests.trend.problems import GRAPHS, exact_fit, exact_sum, rows_of

CHAIN = so.Graph.chain(12)
Y = np.array([0, 0.2, -0.1, 3, 3.2, 2.9, 3.1, 0.1, 0, -0.2, 0.1, 0.0])


def value(b, y, graph, weights, node_weights=1.0):
    apart = 0.5 * np.sum(node_weights * (b - y) ** 2)
    return apart + sum(np.sum(np.abs(w * (rows_of(graph, k) @ b))) for k, w in weights.items())


@pytest.mark.parametrize(
    ("name", "orders"),
    often(
        [
            ("cube", (-1, 0)),
            ("parts", (-1, 0)),
            ("chain", (0, 1)),
            ("grid", (-1, 1, 2)),
            ("weighted", (0, 1)),
            ("grid", (-1,)),
        ],
        ("grid", (-1, 1, 2)),
    ),
    ids=str,
)
def test_the_sum_has_the_exact_answer(rng, name, orders):
    graph = GRAPHS[name](rng)
    y, weights = 3 * rng.standard_normal(graph.num_nodes), {k: 0.3 + 0.2 * i for i, k in enumerate(orders)}
    expected = exact_sum(y, graph, weights)
    for method in ("doge", "admm", "auto"):
        penalty = {k: so.L1(w) for k, w in weights.items()}
        found = so.trend_filter(y, graph, penalty, method=method, tol=1e-9).check()
        assert value(found.value, y, graph, weights) / value(expected, y, graph, weights) - 1 <= 1.1e-9
        np.testing.assert_allclose(found.value, expected, atol=2e-3, err_msg=method)


def test_the_sparse_fused_lasso_is_the_fused_lasso_thresholded(rng):
    # Friedman, Hastie, Höfling, Tibshirani, "Pathwise coordinate optimization", 2007, proposition 1.
    graph = so.Graph.grid((6, 7))
    y = rng.standard_normal((6, 7)) + np.where(np.arange(7) > 3, 2.0, 0.0)
    fused = so.trend_filter(y, graph, so.L1(0.8), tol=1e-10).check()
    both = so.trend_filter(y, graph, {-1: so.L1(0.4), 0: so.L1(0.8)}, tol=1e-10).check()
    expected = np.sign(fused.value) * np.maximum(np.abs(fused.value) - 0.4, 0)
    np.testing.assert_allclose(both.value, expected, atol=1e-4)
    # The zeros are exact, and all there.
    np.testing.assert_array_equal(both.value == 0, expected == 0)
    assert 0 < np.sum(both.value == 0) < y.size


def test_a_large_weight_on_the_values_gives_zero():
    found = so.trend_filter(Y, CHAIN, {-1: so.L1(10.0), 0: so.L1(0.1)}).check()
    np.testing.assert_array_equal(found.value, 0)


@pytest.mark.parametrize("orders", [(0, 1), pytest.param((-1, 0), marks=pytest.mark.thorough)], ids=str)
def test_node_weights_missing_values_and_channels(rng, orders):
    graph = GRAPHS["random"](rng)
    w = rng.uniform(0.5, 2.0, graph.num_nodes)
    y = 3 * rng.standard_normal((graph.num_nodes, 2))
    weights = dict.fromkeys(orders, 0.4)
    penalty = {k: so.L1(0.4) for k in orders}
    found = so.trend_filter(y, graph, penalty, tol=1e-10, node_weights=w).check()
    for channel in range(2):
        expected = exact_sum(y[:, channel], graph, weights, w)
        np.testing.assert_allclose(found.value[:, channel], expected, atol=2e-3)
    w[[2, 5]] = 0
    light = np.where(w == 0, 1e-7, w)
    found = so.trend_filter(y[:, 0], graph, penalty, tol=1e-8, node_weights=w).check()
    nearly = value(exact_sum(y[:, 0], graph, weights, light), y[:, 0], graph, weights, w)
    assert value(found.value, y[:, 0], graph, weights, w) <= nearly * (1 + 1e-5)


def test_a_penalty_without_a_dual_ends_at_a_stationary_point(rng):
    y = np.repeat([0.0, 4.0, 1.0], 10) + 0.3 * rng.standard_normal(30)
    found = so.trend_filter(y, so.Graph.chain(30), {-1: so.L1(0.01), 0: so.MCP(1.0, 4.0)}).check()
    assert so.Status(int(found.status)) is so.Status.STATIONARY
    assert np.isnan(found.gap)


def test_zero_terms_are_left_out_and_one_term_is_the_ordinary_filter():
    plain = so.trend_filter(Y, CHAIN, so.L1(0.5), 1)
    for penalty in ({1: so.L1(0.5)}, {-1: so.L1(0.0), 1: so.L1(0.5)}):
        np.testing.assert_array_equal(so.trend_filter(Y, CHAIN, penalty).value, plain.value)
    np.testing.assert_array_equal(so.trend_filter(Y, CHAIN, {-1: so.L1(0.0), 1: so.L1(0.0)}).value, Y)


def test_a_warm_start_is_quicker():
    penalty = {-1: so.L1(0.1), 0: so.L1(0.5)}
    cold = so.trend_filter(Y, CHAIN, penalty, tol=1e-9)
    warm = so.trend_filter(Y, CHAIN, penalty, tol=1e-9, start=cold)
    assert int(warm.steps) < int(cold.steps)


@pytest.mark.parametrize(
    ("name", "order"),
    often(
        [("chain", 0), ("grid", 1), ("cube", 2), ("weighted", 0), ("random", 2)],
        *[("chain", 0), ("grid", 1)],
    ),
)
def test_row_weights_have_the_exact_answer(rng, name, order):
    graph = GRAPHS[name](rng)
    y = 3 * rng.standard_normal(graph.num_nodes)
    weights = rng.uniform(0.1, 1.5, graph.matrix(order + 1).shape[0])
    weights[::5] = 0
    expected = exact_sum(y, graph, {order: weights})
    for method in ("doge", "admm", "auto"):
        found = so.trend_filter(y, graph, so.L1(weights), order, method, tol=1e-9).check()
        np.testing.assert_allclose(found.value, expected, atol=2e-3, err_msg=method)


@pytest.mark.thorough
def test_row_weights_follow_the_edges_as_they_were_given(rng):
    grid = so.Graph.grid((3, 4))
    shuffled = rng.permutation(grid.num_edges)
    edges = grid.edges[shuffled]
    edges[::2] = edges[::2, ::-1]
    given = so.Graph.from_edges(edges)
    assert given.shape == (3, 4)
    y, weights = rng.standard_normal(12), rng.uniform(0.1, 1.0, grid.num_edges)
    one = so.trend_filter(y, grid, so.L1(weights), tol=1e-10)
    other = so.trend_filter(y, given, so.L1(weights[shuffled]), tol=1e-10)
    np.testing.assert_allclose(one.value, other.value, atol=1e-12)
    # Equal weights are one weight, for every channel.
    y = rng.standard_normal((12, 2))
    many = so.trend_filter(y, given, so.L1(np.full(17, 0.3)), tol=1e-10)
    np.testing.assert_allclose(many.value, so.trend_filter(y, given, so.L1(0.3), tol=1e-10).value, atol=1e-4)


@pytest.mark.thorough
def test_row_weights_serve_other_losses(rng):
    counts = rng.poisson(np.repeat([2.0, 9.0], 10)).astype(float)
    graph = so.Graph.chain(20)
    many = so.trend_filter(counts, graph, so.L1(np.full(19, 1.5)), loss="poisson", tol=1e-8).check()
    one = so.trend_filter(counts, graph, so.L1(1.5), loss="poisson", tol=1e-8).check()
    np.testing.assert_allclose(many.value, one.value, atol=1e-3)


def test_the_chosen_method_is_told():
    penalty = {0: so.L1(1.0), 1: so.L1(1.0)}
    assert chosen_method(Y, CHAIN, penalty) == "admm"
    assert chosen_method(Y, CHAIN, {-1: so.L1(1.0), 0: so.L1(1.0)}) == "doge"
    # One weight for each difference is no fused lasso of one weight.
    assert chosen_method(Y, CHAIN, so.L1(np.ones(11))) != "fast_admm"


BOTH = {-1: so.L1(1.0), 0: so.L1(1.0)}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"penalty": {}}, "keyed by their orders.*given none"),
        ({"penalty": {-2: so.L1(1.0)}}, "the order of each .* whole number from -1 .*given -2"),
        ({"penalty": BOTH, "order": 1}, r"keyed by their orders \[-1, 0\], leave order out; given order=1"),
        ({"penalty": BOTH, "method": so.trend.Doge(B=1)}, "leave out B"),
        ({"penalty": BOTH, "loss": "poisson"}, "several penalties take the square loss"),
        ({"penalty": BOTH, "graph": so.Graph.from_edges([], 12)}, "no edges.*apply its prox"),
        ({"penalty": BOTH, "method": "fast_admm"}, "solves single orders.*doge, admm"),
        ({"penalty": {0: so.L1(1.0), 1: so.L1(-1.0)}}, "must not be negative, given -1.0"),
        ({"penalty": {0: so.L1(np.ones(4))}}, r"one for each of the 11 rows.*\(4,\)"),
        ({"penalty": so.L1(np.full(11, -2.0))}, "must not be negative, given -2.0"),
        ({"penalty": so.L1(np.ones(11)), "method": "fast_admm"}, "one weight for all differences"),
        ({"penalty": so.L1(np.arange(11.0)), "loss": "huber"}, "must be positive, given 1 of 11 that are 0"),
    ],
)
def test_bad_input_is_an_error_that_names_it(arguments, match):
    with pytest.raises(ValueError, match=match):
        so.trend_filter(**{"y": Y, "graph": CHAIN, **arguments})


def test_exact_fit_agrees_with_the_single_order_oracle(rng):
    y = rng.standard_normal(12)
    np.testing.assert_allclose(exact_sum(y, CHAIN, {1: 0.4}), exact_fit(y, CHAIN, 0.4, 1), atol=1e-9)
