"""Concave penalties by reweighted L1: descent, fixed points, and the bias compared with L1."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.trend import reweighted
from tests.trend.problems import random_graph

LEVELS = np.repeat([0.0, 6.0, 2.0, 9.0], 15)
CHAIN = so.Graph.chain(60)


# A penalty of a user's own.
LOG = SimpleNamespace(value=lambda x: 2 * jnp.sum(jnp.log1p(jnp.abs(x))), slope=lambda x: 2 / (1 + jnp.abs(x)))


def objective(b, y, graph, penalty, order):
    with jax.enable_x64(True):
        rows = jnp.asarray(graph.matrix(order + 1) @ b)
        return 0.5 * np.sum((b - y) ** 2) + float(penalty.value(rows))


@pytest.mark.parametrize("penalty", [so.MCP(1.5, 4.0), so.SCAD(1.5), LOG], ids=lambda p: type(p).__name__)
def test_the_objective_falls_to_a_fixed_point(rng, penalty):
    graph, order = random_graph(rng, n=30, extra=10), 1
    y = 3 * rng.standard_normal(30)
    found = reweighted(y, graph, penalty, order, rounds=60, tol=1e-9)
    assert (found.settled, found.status) == (True, so.Status.STATIONARY)
    assert np.all(np.diff(found.objectives) <= 1e-8 * found.objectives[:-1])
    assert found.objectives[-1] == pytest.approx(objective(found.value, y, graph, penalty, order), rel=1e-9)
    l1 = so.trend_filter(y, graph, so.L1(np.asarray(penalty.slope(np.zeros(1)))[0]), order, tol=1e-9)
    assert found.objectives[0] == pytest.approx(objective(l1.value, y, graph, penalty, order), rel=1e-6)
    # The tangent at the fit is the one that it was found with, so the fit is stationary for the concave problem.
    with jax.enable_x64(True):
        again = np.asarray(penalty.slope(jnp.asarray(graph.matrix(order + 1) @ found.value)))
    same = so.trend_filter(y, graph, so.L1(again), order, tol=1e-9)
    np.testing.assert_allclose(same.value, found.value, atol=2e-2)


def test_two_rounds_are_the_one_step_estimate(rng):
    y = LEVELS + 0.5 * rng.standard_normal(60)
    penalty = so.SCAD(1.0)
    first = so.trend_filter(y, CHAIN, so.L1(1.0), tol=1e-9)
    slopes = np.asarray(penalty.slope(jnp.asarray(CHAIN.matrix(1) @ first.value)), float)
    second = so.trend_filter(y, CHAIN, so.L1(slopes), tol=1e-9)
    found = reweighted(y, CHAIN, penalty, rounds=2, tol=1e-9)
    assert len(found.objectives) == 2
    assert (found.settled, found.status) == (False, so.Status.MAX_STEPS)
    np.testing.assert_allclose(found.value, second.value, atol=1e-3)
    np.testing.assert_allclose(found.weights, slopes, atol=1e-4)


@pytest.mark.parametrize(("penalty", "loss"), [(so.MCP(2.0), "huber"), (so.SCAD(2.0), "absolute")])
def test_a_step_that_costs_no_more_keeps_its_size_under_other_losses(rng, penalty, loss):
    """The weight of its row is 0 for the square loss; here it stays a little above, and the fit is finite."""
    y = np.repeat([2.0, 20.0, 5.0], 20) + 0.1 * rng.standard_normal(60)
    y[10] = 100
    found = reweighted(y, so.Graph.chain(60), penalty, loss=loss)
    assert found.settled
    np.testing.assert_allclose(found.solution.value[[5, 30, 50]], [2, 20, 5], atol=0.2)


def test_the_best_round_is_returned_if_the_last_one_is_worse():
    """Rows keep a part of their weights with a loss, so that a round may raise the objective."""
    y = np.repeat([0.0, 3, 1, 4], 15) + np.random.default_rng(0).standard_t(2, 60)
    penalty, graph = so.LogSum(0.5, 0.05), so.Graph.chain(60, ends="graph")
    found = reweighted(y, graph, penalty, loss="absolute", tol=1e-2)
    assert found.objectives[-1] > found.objectives[-2]
    with jax.enable_x64(True):
        price = float(penalty.value(jnp.asarray(graph.matrix(1) @ found.value)))
    assert np.abs(found.value - y).sum() + price == pytest.approx(found.objectives.min(), rel=1e-9)


def test_counts_begin_a_round_with_the_rho_of_their_weights():
    """With the last round's rho the third one ended at the step limit, with a gap of 1e-3."""
    rng = np.random.default_rng(19)
    y = rng.poisson(np.exp(np.repeat(rng.uniform(-1, 3, 4), 10))).astype(float)
    assert reweighted(y, so.Graph.chain(40), so.SCAD(0.3), loss="poisson").settled


def test_a_missing_node_that_every_jump_cuts_off_stays_between_its_neighbours():
    fit = reweighted([[0, np.nan, 4.0]], so.Graph.grid((1, 3)), so.MCP(0.5), missing="nan").value
    assert fit.shape == (1, 3)
    np.testing.assert_allclose(fit[0, [0, 2]], [0, 4], atol=1e-3)
    assert 0 <= fit[0, 1] <= 4


def test_a_round_that_did_not_converge_is_an_error():
    with pytest.raises(RuntimeError, match="MAX_STEPS"):
        reweighted(LEVELS + np.arange(60) % 2, CHAIN, so.MCP(1.0), max_steps=5, method=so.trend.Doge(rho=1e-6))
