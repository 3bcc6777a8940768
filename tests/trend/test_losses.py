"""Counts, labels and outliers: what single losses add to the facts of every fit."""

import numpy as np
import pytest

import sparseopt as so
from tests.trend.problems import Problem, observations


@pytest.mark.parametrize(("loss", "slope"), [("huber", 0.75), ("absolute", 1.0)])
def test_a_shift_of_the_data_shifts_the_fit_and_a_far_outlier_may_move_further(rng, loss, slope):
    y, weights = observations(rng, loss, 20), rng.uniform(0.5, 2, 20)
    y[11], weights[11] = 40, 1  # so that its four edges, at .31 each, hold it against its loss
    problem, further = Problem(y, so.Graph.grid((4, 5)), so.L1(0.31), 0, weights, loss), y.copy()
    further[11] = 400
    plain, shifted = (problem.fit("admm", y=y, tol=1e-9) for y in (y, y + 100))
    moved = problem.fit("admm", y=further, tol=1e-10)
    assert float(shifted.objective) == pytest.approx(float(plain.objective), rel=3e-9)
    # The loss of the outlier grows by its slope; nothing else changes.
    assert float(moved.objective) - slope * 360 == pytest.approx(float(plain.objective), rel=1e-6)
    if loss == "huber":
        np.testing.assert_allclose(shifted.value - 100, plain.value, atol=1e-2)
        np.testing.assert_allclose(moved.value, plain.value, atol=1e-2)


def test_rates_far_below_one_have_their_own_range_at_missing_nodes():
    """On a chain at order 0 a missing node only joins its neighbours, so leaving it out is the same problem."""
    rng = np.random.default_rng(0)
    rate, exposure = np.where(np.arange(60) < 30, 2e-3, 6e-3), rng.integers(500, 3000, 60).astype(float)
    y, seen = rng.poisson(rate * exposure) / exposure, rng.random(60) >= 0.4
    options = {"loss": "poisson", "tol": 1e-8}
    whole = so.trend_filter(y, so.Graph.chain(60), so.L1(2.0), node_weights=exposure * seen, **options)
    left = so.trend_filter(y[seen], so.Graph.chain(seen.sum()), so.L1(2.0), node_weights=exposure[seen], **options)
    assert 0 <= float(whole.gap) <= 1e-8
    assert float(whole.objective) == pytest.approx(float(left.objective), rel=1e-7)


def test_a_quantile_leaves_its_share_of_the_observations_below_the_fit(rng):
    graph, y = so.Graph.chain(40), rng.standard_normal(40)
    loss = so.scalar.Quantile(0.9)
    constant = so.trend_filter(y, graph, so.L1(1e4), 0, "admm", tol=1e-8, loss=loss)
    assert constant.status == so.Status.CONVERGED
    assert np.ptp(constant.value) == 0
    assert np.mean(y <= constant.value[0]) == 0.9
    assert np.quantile(y, 0.9, method="inverted_cdf") == constant.value[0]
    # So does every fit: the penalty does not see constants, so the subgradients of the loss sum to 0.
    found = so.trend_filter(y, graph, so.L1(0.05), 0, "admm", tol=1e-8, loss=loss)
    assert np.mean(y < np.asarray(found.value) - 1e-6) <= 0.9 <= np.mean(y <= np.asarray(found.value) + 1e-6)


def test_a_part_of_one_label_is_fitted_at_margin_1_and_has_no_say(rng):
    # Its dual is 0, an end of the conjugate's domain: a rounding error of a warm start or of cosines must not matter.
    graph = so.Graph.from_edges([(i, i + 1) for i in range(19) if i != 9], 20)
    mixed, w = observations(rng, "squared_hinge", 20), rng.uniform(0.5, 2, 20)
    pure = Problem(np.where(np.arange(20) < 10, mixed, 1), graph, so.L1(0.3), 1, w, "squared_hinge")
    apart = pure.fit("admm", y=mixed, tol=1e-7)
    half = Problem(mixed[:10], so.Graph.chain(10, ends="graph"), so.L1(0.3), 1, w[:10], "squared_hinge")
    for found in (pure.fit("admm", tol=1e-7), pure.fit("admm", tol=1e-7, start=apart)):
        assert found.status == so.Status.CONVERGED
        np.testing.assert_array_equal(found.value[10:], 1)
        assert float(found.objective) == pytest.approx(half.objective(apart.value[:10]), rel=2e-7)


@pytest.mark.parametrize(("loss", "weight"), [("absolute", 0.5), ("huber", 1e4)])
def test_a_history_shows_the_check_of_an_answer_that_needs_no_step(rng, loss, weight):
    """By linear programming, and the polynomial."""
    y, graph = np.repeat([0.0, 4.0], 10) + rng.standard_normal(20), so.Graph.chain(20)
    fit = so.trend_filter(y, graph, so.L1(weight), 1, loss=loss)
    seen = so.trend_filter(y, graph, so.L1(weight), 1, loss=loss, history=True, max_steps=100).check()
    gaps = np.asarray(seen.history.gap)
    assert int(fit.steps) == 0 < int(seen.steps)
    assert 0 <= gaps[int(seen.steps) - 1] <= 1e-6
    assert float(seen.objective) == pytest.approx(float(fit.objective), rel=1e-6)


@pytest.mark.parametrize("loss", ["poisson", "huber", "absolute"])
def test_exact_answers_need_no_step(loss):
    link = np.log if loss == "poisson" else np.asarray
    found = so.trend_filter(np.full(12, 3.0), so.Graph.grid((3, 4)), so.L1(1.0), 1, loss=loss)
    np.testing.assert_allclose(found.value, link(np.full(12, 3.0)), rtol=1e-15)
    assert (int(found.steps), float(found.gap), float(found.objective)) == (0, 0, 0)
    y = np.arange(1.0, 5.0)
    for graph, weight in ((so.Graph.chain(4), 0.0), (so.Graph.from_edges([], 4), 1.0)):
        np.testing.assert_allclose(so.trend_filter(y, graph, so.L1(weight), loss=loss).value, link(y), rtol=1e-15)
