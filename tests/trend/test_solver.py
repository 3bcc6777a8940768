"""`so.trend_solver`: plan once, call often, under jit, vmap and grad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.solvers.admm import Admm

N = 24


def test_the_jacobian_in_y_is_the_mean_of_every_piece_at_order_0(rng):
    with jax.enable_x64(True):
        solver = so.trend_solver(so.Graph.chain(N, ends="graph"), 0)
        y = jnp.asarray(np.repeat([0.0, 3.0, 1.0, 5.0], 6) + 0.1 * rng.normal(size=N))
        fit = jax.jit(lambda y: solver(y, so.L1(0.5)).value)
        pieces = np.cumsum(np.r_[0, np.abs(np.diff(fit(y))) > 1e-9])
        same = pieces[:, None] == pieces
        np.testing.assert_allclose(jax.jit(jax.jacrev(fit))(y), same / same.sum(axis=1), atol=1e-9)


def test_channels_and_pictures_keep_their_shape(rng):
    picture = rng.normal(size=(4, 6, 3)).astype(np.float32)
    solver = so.trend_solver(so.Graph.grid((4, 6)), 0, channels=3)
    found = solver(picture, so.GroupL2(0.5), tol=1e-4)
    assert found.value.shape == picture.shape
    flat = solver(picture.reshape(N, 3), so.GroupL2(0.5), tol=1e-4).value
    np.testing.assert_allclose(flat, found.value.reshape(N, 3))


FIRST_CALLS = {
    "prox": lambda graph, x, weight: so.TotalVariation(graph, weight).prox(x, 1.0),
    "solver": lambda graph, x, weight: so.trend_solver(graph)(x, so.L1(weight)).value,
    "solve": lambda graph, x, weight: (
        so.solve(so.Problem(so.LeastSquares(None, x), so.TotalVariation(graph, weight)), max_steps=3).value
    ),
}


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("name", FIRST_CALLS)
def test_a_first_call_under_jit_leaves_no_tracer_in_the_tables_of_a_graph(name, kind):
    ring, x = [(i, (i + 1) % 12) for i in range(12)], np.ones(12, kind)
    with jax.enable_x64(kind == np.float64):
        for graph in (so.Graph.chain(12), so.Graph.grid((3, 4)), so.Graph.from_edges(ring)):
            jax.eval_shape(lambda weight, graph=graph: FIRST_CALLS[name](graph, x, weight), 1.0)
            leaves = jax.tree.leaves((so.trend_solver(graph), so.TotalVariation(graph)))
            assert not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def test_a_call_is_trend_filter_also_of_a_solver_made_under_jit(rng):
    graph, y = so.Graph.grid((4, 6)), np.repeat(rng.normal(size=6), 4) * 3 + 0.3 * rng.normal(size=N)
    found = jax.jit(lambda y, weight: so.trend_solver(graph)(y, so.L1(weight)).value)(y.astype(np.float32), 0.3)
    np.testing.assert_allclose(found, so.trend_filter(y, graph, so.L1(0.3)).check().value.reshape(-1), atol=1e-2)
    with jax.enable_x64(True):
        found = so.trend_solver(graph, 1, "doge")(y, so.MCP(0.5))
    expected = so.trend_filter(y, graph, so.MCP(0.5), 1, "doge")
    np.testing.assert_allclose(found.value, expected.value, atol=1e-12)
    assert int(found.steps) == int(expected.steps)


def test_jit_grad_and_plain_calls_share_one_trace(rng, traces_of):
    traces, shape = traces_of(Admm), (3, 11)  # of no other test
    solver = so.trend_solver(so.Graph.grid(shape), 0)
    loss = jax.jit(jax.grad(lambda y, weight: jnp.sum(solver(y, so.L1(weight)).value ** 2)))
    for _ in range(3):
        y = jnp.asarray(rng.normal(size=shape))
        solver(y, so.L1(rng.uniform(0.1, 1)))
        loss(y, rng.uniform(0.1, 1))
    assert len(traces) == 1


SMALL = np.r_[0.1, -0.1, 0, 5.1, 4.9, 5]


def test_a_start_of_a_larger_weight_is_no_certificate_by_itself():
    """Its dual lies outside the ball of the smaller weight, and no step brings it inside."""
    solver = so.trend_solver(so.Graph.chain(6), order=0, method="doge")
    found = solver(SMALL, so.L1(0.05), max_steps=0, start=solver(SMALL, so.L1(3.0)))
    optimum = float(solver(SMALL, so.L1(0.05), tol=1e-6).objective)
    assert int(found.steps) == 0
    assert float(found.gap) >= float(found.objective) / optimum - 1 > 1


def test_a_negative_weight_under_jit_is_no_answer():
    """Where it is known it is an error."""
    solver = so.trend_solver(so.Graph.chain(6), method="doge")
    found = jax.jit(lambda weight: solver(SMALL, so.L1(weight)))(-1.0)
    assert found.status == so.Status.NONFINITE
    assert np.isnan(found.value).all()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_series_that_grows_has_the_fits_of_its_values_and_one_program(rng, order):
    room, y = 40, np.cumsum(rng.normal(size=30))
    with jax.enable_x64(True):
        solver, traces = so.trend_solver(so.Graph.chain(room), order, "fused_lasso" if order == 0 else "interior"), []

        @jax.jit
        def fit(values, known):
            traces.append(1)
            return solver(values, so.L1(0.8), known, tol=1e-10)

        for count in (20, 21, 30):
            found = fit(np.append(y[:count], np.zeros(room - count)), np.arange(room) < count)
            expected = so.trend_filter(y[:count], so.Graph.chain(count), so.L1(0.8), order, tol=1e-12)
            np.testing.assert_allclose(found.value[:count], expected.value, atol=1e-4)
            assert float(found.gap) <= 1e-7
    assert len(traces) == 1


@pytest.mark.parametrize("order", [0, 1])
def test_a_fit_after_a_change_of_few_nodes_takes_fewer_steps_from_the_one_before(rng, order):
    shape = (32, 32)
    truth = np.zeros(shape)
    truth[8:20, 10:24] = 3
    before = truth + 0.5 * rng.normal(size=shape)
    after = before.copy()
    after[4:8, 4:8] += 1
    with jax.enable_x64(True):
        solver = so.trend_solver(so.Graph.grid(shape), order)
        cold = solver(after, so.L1(1.0), tol=1e-5)
        warm = solver(after, so.L1(1.0), tol=1e-5, start=solver(before, so.L1(1.0), tol=1e-5))
    assert float(warm.gap) <= 1e-5
    assert float(warm.objective) == pytest.approx(float(cold.objective), rel=2e-5)
    assert int(warm.steps) < int(cold.steps)
