"""Total variation as a penalty: its prox is the trend filter, and solvers carry the state of the last prox."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparseopt as so
from sparseopt.core.base.types import precision
from sparseopt.trend.total_variation import Rows
from tests.tiers import often
from tests.trend.problems import random_graph

GRID = so.Graph.grid((5, 6))
FLOAT64 = np.dtype(np.float64)
# One program each for all tests.
prox = jax.jit(lambda penalty, x, step: penalty.prox(x, step))
prox_from = jax.jit(lambda penalty, x, step, memory: penalty.prox_from(x, step, memory))


@pytest.fixture
def wide():
    with precision(FLOAT64):
        yield


@so.pytree
class Blur:
    """The mean of five neighbours along both axes, on a torus."""

    def mv(self, x):
        for axis in (0, 1):
            x = sum(jnp.roll(x, shift, axis) for shift in range(-2, 3)) / 5
        return x

    rmv = mv


def picture(rng, kind=np.float64, size=16):
    clean = np.zeros((size, size))
    clean[4:11, 5:13] = 1
    clean[9:14, 2:7] += 0.5
    return jnp.asarray(Blur().mv(clean) + 0.02 * rng.standard_normal(clean.shape), kind)


CASES = {
    "chain": (lambda rng: so.Graph.chain(15), 0, None),
    "chain, order 1": (lambda rng: so.Graph.chain(15, ends="graph"), 1, None),
    "grid, channels": (lambda rng: GRID, 0, 2),
    "isotropic": (lambda rng: GRID, 0, None),
    "weighted edges, order 1": (lambda rng: random_graph(rng, weighted=True), 1, None),
}
QUICK = [(np.float32, "chain"), (np.float32, "grid, channels")]
QUICK += [(np.float64, "weighted edges, order 1"), (np.float64, "isotropic")]


@pytest.mark.parametrize(("kind", "case"), often(itertools.product([np.float32, np.float64], CASES), *QUICK))
def test_the_prox_is_the_trend_filter(case, kind, rng):
    make, order, channels = CASES[case]
    graph, step, axis = make(rng), 0.4, 0 if case == "isotropic" else None
    matrix = graph.matrix(order + 1)
    weight = 0.5 if case in ("chain", "isotropic") else rng.uniform(0.2, 1, matrix.shape[0])
    x = rng.standard_normal((graph.num_nodes, *([channels] if channels else []))).astype(kind)
    with precision(np.dtype(kind)):
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
    cold = sum(int(prox_from(penalty, signal, step, penalty.memory(x))[1].steps) for signal in signals)
    assert memory.all_steps <= 0.75 * cold
    u, following = prox_from(penalty, signals[-1], step, memory)
    assert following.steps < memory.steps
    # The fit hardly moved, so the next one has to be more exact.
    assert following.tol < 1e-10
    assert jax.tree.map(jnp.shape, memory) == jax.tree.map(jnp.shape, penalty.memory(x))
    assert jax.tree.map(jnp.result_type, memory) == jax.tree.map(jnp.result_type, penalty.memory(x))


@pytest.mark.thorough
def test_a_blurred_picture_is_restored_as_by_the_primal_dual_method(rng, wide):
    blurred = picture(rng)
    graph, loss = so.Graph.grid(blurred.shape), so.LeastSquares(Blur(), blurred)
    penalty = so.TotalVariation(graph, 0.01, tol=1e-4)
    problem = so.Problem(loss, penalty)
    assert isinstance(so.chosen_solver(problem).solver, so.AcceleratedProximalGradient)
    found = so.solve(problem, tol=1e-6).check()
    inner, rows = penalty.parts(blurred)
    split = so.solve(so.Problem(loss, inner, rows), so.PrimalDual(), tol=1e-6).check()
    assert so.Status(int(found.status)) == so.Status.CONVERGED
    assert found.gap <= 1e-6
    assert float(found.objective) == pytest.approx(float(split.objective), rel=2e-6)
    # The gap by the problem's own dual point: what the prox found certifies the whole.
    assert found.dual.shape == split.dual.shape
    assert np.abs(found.dual).max() <= 0.01
    memory = found.state.prox_memory
    assert memory.gap < 1e-6  # more exact than asked for, as the iterates came to rest
    # As many steps with every prox from a cold start, to the tolerance that was reached here.
    cold = Cold(dataclasses.replace(penalty, tol=memory.gap))
    cold = so.solve(so.Problem(loss, cold), tol=-1, max_steps=int(found.steps))
    assert memory.all_steps < 0.7 * cold.state.prox_memory.all_steps


@so.pytree
class Cold:
    """The same penalty without the memory, but for the count of its iterations."""

    penalty: so.TotalVariation

    def value(self, x):
        return self.penalty.value(x)

    def prox(self, x, step):
        return self.penalty.prox(x, step)

    def memory(self, x):
        return self.penalty.memory(x)

    def prox_from(self, x, step, memory):
        u, after = self.penalty.prox_from(x, step, self.memory(x))
        return u, dataclasses.replace(after, all_steps=memory.all_steps + after.steps)


def test_other_losses_and_solvers_take_it_and_plain_penalties_leave_no_memory(rng, wide):
    factor = rng.standard_normal((40, 30))
    loss = so.Quadratic(factor.T @ factor + np.eye(30), rng.standard_normal(30))
    penalty = so.TotalVariation(GRID, 2.0, tol=1e-4)
    problem = so.Problem(loss, penalty)
    assert isinstance(so.chosen_solver(problem).solver, so.AcceleratedProximalGradient)
    first = so.solve(problem, so.ProximalGradient(), tol=1e-8, max_steps=5000)
    second = so.solve(problem, tol=1e-8)
    for found in (first, second):
        assert so.Status(int(found.status)) == so.Status.STATIONARY
        assert np.isnan(found.gap)
        assert found.state.prox_memory.all_steps > 0
    np.testing.assert_allclose(first.value, second.value, atol=1e-5)
    for solver in (so.ProximalGradient(), so.AcceleratedProximalGradient()):
        state = solver.init(so.Problem(loss, so.L1(1.0)), jnp.zeros(30))
        assert state.prox_memory is None


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


@pytest.mark.thorough
def test_derivatives_of_the_prox_and_of_a_solution_are_those_of_central_differences(rng, wide):
    x, weight = rng.standard_normal(GRID.shape), rng.uniform(0.1, 0.4, GRID.num_edges)
    plan = so.TotalVariation(GRID, weight, tol=1e-13)
    against = rng.standard_normal(GRID.shape)
    loss = so.LeastSquares(rng.standard_normal((45, 30)), rng.standard_normal(45))

    def of_prox(x, weight, step):
        return jnp.sum(against * dataclasses.replace(plan, weight=weight).prox(x, step))

    def of_solution(target, weight):
        problem = so.Problem(dataclasses.replace(loss, target=target), dataclasses.replace(plan, weight=weight))
        return jnp.sum(against.reshape(-1) * so.solve(problem, tol=1e-11).value)

    points = ((of_prox, (x, weight, np.asarray(0.7))), (of_solution, (np.asarray(loss.target), 5 * weight)))
    for function, point in points:
        slopes = jax.jit(jax.grad(function, tuple(range(len(point)))))(*point)
        function = jax.jit(function)
        for place, (slope, leaf) in enumerate(zip(slopes, point, strict=True)):
            along = rng.standard_normal(leaf.shape)

            def moved(size, place=place, along=along, point=point, function=function):
                return function(*(p + size * along if i == place else p for i, p in enumerate(point)))

            difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
            assert float(jnp.sum(slope * along)) == pytest.approx(float(difference), rel=1e-5, abs=1e-6)


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


def test_without_a_weight_or_a_step_the_prox_is_x_with_finite_slopes(rng):
    penalty = so.TotalVariation(GRID, 0.5)
    x = rng.standard_normal(GRID.shape).astype(np.float32)
    for still, step in ((penalty, 0.0), (dataclasses.replace(penalty, weight=0.0), 1.0)):
        u, memory = prox_from(still, x, step, penalty.memory(x))
        np.testing.assert_allclose(u, x, rtol=1e-6)
        assert memory.status == so.Status.CONVERGED
        assert memory.gap == 0
    slopes = jax.jit(jax.grad(lambda x, step: jnp.sum(x * penalty.prox(x, step)), argnums=(0, 1)))(x, 0.0)
    assert all(np.isfinite(slope).all() for slope in slopes)


def test_half_precision_is_computed_in_single(rng):
    x = rng.standard_normal(GRID.shape).astype(jnp.bfloat16)
    found = prox(so.TotalVariation(GRID, 0.5), x, 1.0)
    assert found.dtype == jnp.bfloat16
    wide = prox(so.TotalVariation(GRID, 0.5), x.astype(np.float32), 1.0)
    np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))


def test_its_rows_are_a_linear_map_with_its_transpose(rng):
    penalty = so.TotalVariation(GRID, 0.5, channels=2)
    x = rng.standard_normal((30, 2)).astype(np.float32)
    _, rows = penalty.parts(x)
    assert isinstance(rows, Rows)
    image = rows.mv(x)
    e = rng.standard_normal(image.shape).astype(np.float32)
    assert float(jnp.vdot(e, image)) == pytest.approx(float(jnp.vdot(rows.rmv(e), x)), rel=1e-4)
