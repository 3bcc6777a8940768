"""Total variation as a penalty: its prox is the trend filter, and solvers carry the state of the last prox."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt as so
from tests.trend.problems import random_graph

GRID = so.Graph.grid((5, 6))
# One program each for all tests.
prox = jax.jit(lambda penalty, x, step: penalty.prox(x, step))
prox_from = jax.jit(lambda penalty, x, step, memory: penalty.prox_from(x, step, memory))


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("graph", "order", "channels", "axis", "kind"),
    [
        (so.Graph.chain(15), 0, None, None, np.float32),
        (GRID, 0, 2, None, np.float32),
        (GRID, 0, None, 0, np.float64),
        (random_graph(np.random.default_rng(0), weighted=True), 1, None, None, np.float64),
    ],
    ids=["chain", "grid, channels", "isotropic", "order 1"],
)
def test_the_prox_is_the_trend_filter(graph, order, channels, axis, kind, rng):
    matrix, step = graph.matrix(order + 1), 0.4
    weight = 0.5 if order == 0 and channels is None else rng.uniform(0.2, 1, matrix.shape[0])
    x = rng.standard_normal((graph.num_nodes, *([channels] if channels else []))).astype(kind)
    with jax.enable_x64(kind == np.float64):
        penalty = so.TotalVariation(graph, weight, order, channels=channels, axis=axis)
        found = prox(penalty, x, step)
        assert found.dtype == kind
        alone = so.L1(step * np.asarray(weight)) if axis is None else so.GroupL2(step * weight, axis=0)
        wanted = so.trend_filter(x, graph, alone, order, tol=1e-6)
        # Twice the distance at which a gap of 1e-6 leaves a fit.
        close = np.sqrt(8e-6 * 0.5 * np.sum(x**2))
        np.testing.assert_allclose(found, wanted.value, atol=close)
        value = float(penalty.value(wanted.value))
        loss = float(np.sum((x - np.asarray(wanted.value)) ** 2)) / 2
        assert loss + step * value == pytest.approx(float(wanted.objective), rel=1e-5)
        if axis is None:
            by_rows = np.sum((np.asarray(weight) * np.abs(matrix @ np.asarray(x, np.float64)).T).T)
            assert float(penalty.value(x)) == pytest.approx(by_rows, rel=1e-5)
        if graph.shape is not None and channels:
            np.testing.assert_array_equal(prox(penalty, x.reshape(5, 6, channels), step).reshape(x.shape), found)


def test_the_memory_says_how_exact_a_prox_was_and_the_next_one_starts_there(rng, wide):
    penalty = so.TotalVariation(GRID, 2.0, tol=1e-8)
    x, step = rng.standard_normal(GRID.shape) + 2 * (np.arange(5)[:, None] > 2), 0.7
    signals = [x + 0.002 * i * np.cos(x) for i in range(6)]
    memory = penalty.memory(x)
    for signal in signals:
        before = memory.u
        u, memory = prox_from(penalty, signal, step, memory)
        inner, rows = penalty.parts(signal)
        assert memory.status == so.Status.CONVERGED
        assert memory.gap <= 1e-8
        # The gap by the dual itself: both terms of the primal, and the dual's only one.
        assert np.abs(memory.dual).max() <= 2
        assert inner.weight == 2
        primal = 0.5 * np.sum((u - signal) ** 2) + step * penalty.value(u)
        bound = 0.5 * np.sum(signal**2) - 0.5 * np.sum((signal - step * rows.rmv(memory.dual)) ** 2)
        assert 0 <= primal - bound <= 2e-8 * bound
        # A gap of that leaves the next one an error of a fifth of this change.
        assert np.sqrt(2 * memory.tol * primal) == pytest.approx(0.2 * np.linalg.norm(u - before), rel=1e-6)
    cold = sum(int(prox_from(penalty, signal, step, penalty.memory(x))[1].steps) for signal in signals)
    assert memory.all_steps <= 0.75 * cold
    u, following = prox_from(penalty, signals[-1], step, memory)
    assert following.steps < memory.steps
    assert jax.tree.map(jnp.shape, memory) == jax.tree.map(jnp.shape, penalty.memory(x))
    assert jax.tree.map(jnp.result_type, memory) == jax.tree.map(jnp.result_type, penalty.memory(x))


def test_a_solution_is_that_of_the_primal_dual_method_and_the_last_prox_certifies_it(rng, wide):
    matrix, penalty = rng.standard_normal((45, 30)), so.TotalVariation(GRID, 3.0, tol=1e-4)
    loss = so.LeastSquares(matrix, matrix @ (np.arange(30) % 6 > 2) + 0.1 * rng.standard_normal(45))
    problem = so.Problem(loss, penalty)
    assert isinstance(so.chosen_solver(problem).solver, so.AcceleratedProximalGradient)
    found = so.solve(problem, tol=1e-8).check()
    split = so.solve(so.Problem(loss, so.L1(3.0), GRID.matrix(1)), so.PrimalDual(), tol=1e-8).check()
    assert found.gap <= 1e-8
    assert float(found.objective) == pytest.approx(float(split.objective), rel=2e-8)
    np.testing.assert_allclose(found.value, split.value, atol=1e-3)
    assert np.abs(found.dual).max() <= 3
    assert found.state.prox_memory.gap < 1e-6  # more exact than asked for, as the iterates came to rest


def test_other_losses_and_solvers_take_it_and_plain_penalties_leave_no_memory(rng, wide):
    factor = rng.standard_normal((40, 30))
    loss = so.Quadratic(factor.T @ factor + np.eye(30), rng.standard_normal(30))
    penalty = so.TotalVariation(GRID, 2.0, tol=1e-4)
    problem = so.Problem(loss, penalty)
    first = so.solve(problem, so.ProximalGradient(), tol=1e-8, max_steps=5000)
    second = so.solve(problem, tol=1e-8)
    for found in (first, second):
        assert (found.status, np.isnan(found.gap)) == (so.Status.STATIONARY, True)
        assert found.state.prox_memory.all_steps > 0
    np.testing.assert_allclose(first.value, second.value, atol=1e-5)
    plain = so.solve(so.Problem(loss, so.L1(1.0)), so.AcceleratedProximalGradient(), max_steps=5)
    assert plain.state.prox_memory is None


def test_a_chain_of_optax_lands_on_the_prox_and_remembers(rng):
    penalty, rate = so.TotalVariation(GRID, 0.5), 0.7
    params = {"field": rng.standard_normal(GRID.shape).astype(np.float32), "bias": np.ones(3, np.float32)}
    gradient = jax.tree.map(lambda p: 0.1 * p, params)
    tx = optax.chain(optax.sgd(rate), so.proximal(penalty, rate, mask={"field": True, "bias": False}))
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(gradient, state, params)
    landed = optax.apply_updates(params, updates)
    wanted = prox(penalty, params["field"] * np.float32(1 - 0.1 * rate), rate)
    np.testing.assert_allclose(landed["field"], wanted, atol=1e-5)
    np.testing.assert_allclose(landed["bias"], 1 - 0.1 * rate, rtol=1e-6)
    memory = state[1].memories["field"]
    assert state[1].memories["bias"] is None
    assert memory.steps > 0
    _, state = jax.jit(tx.update)(gradient, state, params)
    assert state[1].memories["field"].steps < memory.steps


def test_derivatives_of_the_prox_are_those_of_central_differences(rng, wide):
    plan, against = so.TotalVariation(GRID, tol=1e-13), rng.standard_normal(GRID.shape)
    point = (rng.standard_normal(GRID.shape), rng.uniform(0.1, 0.4, GRID.num_edges), np.asarray(0.7))
    move = [rng.standard_normal(part.shape) for part in point]

    @jax.jit
    def pulled(x, weight, step):
        return jnp.sum(against * dataclasses.replace(plan, weight=weight).prox(x, step))

    slopes = jax.jit(jax.grad(pulled, (0, 1, 2)))(*point)
    for place, (slope, along) in enumerate(zip(slopes, move, strict=True)):
        ends = [pulled(*(p + s * along if i == place else p for i, p in enumerate(point))) for s in (1e-5, -1e-5)]
        assert float(jnp.sum(slope * along)) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-6)


def test_lanes_are_solved_as_one_by_one_and_changed_leaves_need_no_new_trace(rng):
    penalty = so.TotalVariation(GRID, 0.3)
    traces = []

    @jax.jit
    def fits(penalty, x, weights):
        traces.append(1)
        return jax.vmap(lambda weight: dataclasses.replace(penalty, weight=weight).prox(x, 1.0))(weights)

    x, weights = rng.standard_normal(GRID.shape).astype(np.float32), np.array([0.1, 0.4], np.float32)
    found = fits(penalty, x, weights)
    for lane, weight in zip(found, weights, strict=True):
        np.testing.assert_allclose(lane, prox(dataclasses.replace(penalty, weight=weight), x, 1.0), atol=2e-3)
    coarse = fits(dataclasses.replace(penalty, tol=1e-2), 2 * x, 3 * weights)
    assert len(traces) == 1
    assert coarse.shape == (2, *GRID.shape)


def test_half_precision_is_computed_in_single(rng):
    x = rng.standard_normal(GRID.shape).astype(jnp.bfloat16)
    found = prox(so.TotalVariation(GRID, 0.5), x, 1.0)
    assert found.dtype == jnp.bfloat16
    wide = prox(so.TotalVariation(GRID, 0.5), x.astype(np.float32), 1.0)
    np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))


def test_without_a_weight_or_a_step_the_prox_is_x_with_finite_slopes(rng):
    penalty = so.TotalVariation(GRID, 0.5)
    x = rng.standard_normal(GRID.shape).astype(np.float32)
    for still, step in ((penalty, 0.0), (dataclasses.replace(penalty, weight=0.0), 1.0)):
        u, memory = prox_from(still, x, step, penalty.memory(x))
        np.testing.assert_allclose(u, x, rtol=1e-6)
        assert (memory.status, memory.gap) == (so.Status.CONVERGED, 0)
    slopes = jax.jit(jax.grad(lambda x, step: jnp.sum(x * penalty.prox(x, step)), argnums=(0, 1)))(x, 0.0)
    assert all(np.isfinite(slope).all() for slope in slopes)
