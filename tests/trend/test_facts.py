"""What is true of every trend fit: each case of `cases.CASES` has each fact below, but where `WITHOUT` says why not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

import sparseopt as so
from sparseopt.core.solvers.admm import Admm
from sparseopt.core.solvers.loss_admm import LossAdmm
from tests.trend import problems
from tests.trend.cases import SMOOTH, Doge, has
from tests.trend.problems import LOSSES, VALUES, largest_weight_by_clarabel, unpenalised


@has(
    "optimum",
    *["grid", "grid, order 1", "grid, coupled", "cube, a weight a row", "uneven chain", "three orders"],
    *["free grid", "free grid, order 2", "two orders, free", "isotropic", "isotropic, channels apart"],
    *["elastic", "elastic, huber", "own square", "counts", "labels", "hinge", "median", "counts, free"],
    *["random, order 1", *[f"weighted, order {order}" for order in range(6)]],
    *[f"free, order {order}" for order in range(4)],
)
def test_every_method_ends_at_the_optimum_that_clarabel_finds(case):
    problem = case.problem
    for method in case.methods:
        found = case.found(method)
        assert found.status == so.Status.CONVERGED, method
        assert -1e-14 <= float(found.gap) <= case.tol, method
        reached = problem.objective(found.value)
        assert float(found.objective) == pytest.approx(reached, rel=1e-9), method
        # No point of any solver lies below the bound, and the independent one is good enough to be a test.
        assert reached <= problem.least * (1 + 1.1 * case.tol) + 1e-12, method
        assert problem.least <= reached * (1 + (1e-8 if case.loss == "square" else 2e-6)), method
        if case.loss == "square":
            np.testing.assert_allclose(found.value, problem.exact, atol=case.near, err_msg=str(method))


@has("bound", "random, order 1", "counts", "labels", "median", "elastic", "isotropic")
def test_the_gap_is_never_below_the_true_suboptimality(case):
    problem = case.problem
    least = min(problem.least, problem.objective(case.fit.value))
    for steps in (5, 10, 20, 40, 80, 400):
        early = case.found(tol=1e-15, max_steps=steps)
        lacks = problem.objective(early.value) / least - 1
        assert lacks <= float(early.gap) * (1 + 1e-3) + (1e-12 if case.loss == "square" else 2e-7)
    assert float(early.gap) < 0.1


@has("float32", "grid, order 1")
def test_float32_stays_and_is_as_close_as_its_gap_says(case):
    problem, narrow = case.problem, case.problem.y.astype(np.float32)
    found = case.found(y=narrow, tol=1e-5)
    assert (found.status, found.value.dtype) == (so.Status.CONVERGED, np.float32)
    assert problem.objective(found.value) <= problem.least * (1 + 1.1e-5)
    if case.loss == "square" and not case.weighted:
        assert np.linalg.norm(found.value - problem.exact) <= np.sqrt(2e-5 * problem.least) + 1e-5
    far = (100 + narrow).astype(np.float32)
    moved = problem.but(y=far.astype(float))
    for steps in (5, 10, 20, 40, 80, 400):
        early = case.found(y=far, tol=1e-15, max_steps=steps)
        # Lengths of gradients are rounded to float32 one by one.
        rounding = np.finfo(np.float32).eps if isinstance(case.penalty, so.GroupL2) else 1e-12
        assert moved.objective(early.value) / moved.least - 1 <= float(early.gap) * (1 + 1e-3) + rounding
        assert float(early.objective) == pytest.approx(moved.objective(early.value), rel=1e-5)
    if case.loss != "square":
        return
    # Whether JAX has 64-bit types or not.
    with jax.enable_x64(True):
        wide = case.found(y=far, tol=1e-15, max_steps=400)
    assert wide.value.dtype == np.float32
    assert float(wide.gap) == pytest.approx(float(early.gap), rel=1e-3, abs=1e-6)
    assert float(wide.objective) == pytest.approx(float(early.objective), rel=1e-6)


@has("missing", "grid", "random, order 1", "counts", "uneven chain", "weighted, order 0")
def test_missing_nodes_have_no_say(case):
    problem, seen = case.problem, np.ones(case.problem.graph.num_nodes)
    seen[[3, 7, 8]] = 0
    y, holes = problem.y, problem.y.copy()
    holes[seen == 0] = np.nan
    weights = seen if problem.node_weights is None else seen * problem.node_weights
    tol = max(case.tol, 1e-8) * (10 if case.loss != "square" else 1)
    least = problem.but(node_weights=weights).least
    for method in {case.methods[0], case.methods[-1]}:
        found = case.found(method, y=holes, missing="nan", tol=tol)
        assert found.status == so.Status.CONVERGED
        reached = problem.but(node_weights=weights).objective(found.value)
        assert least * (1 - 2e-6) <= reached <= least * (1 + 1.1 * tol)
        if case.order == 0 and case.loss == "square":
            assert np.nanmin(holes) <= np.min(found.value) <= np.max(found.value) <= np.nanmax(holes)
        # Its value, NaN or not, is not read.
        same = case.found(method, y=np.where(np.isnan(holes), y + 7, holes), node_weights=weights, tol=tol)
        if case.loss == "square":
            np.testing.assert_array_equal(same.value, found.value)


@has("start", "grid, order 1", "counts")
def test_a_start_at_the_answer_saves_steps_and_keeps_no_memory(case):
    cold = case.fit
    assert getattr(cold.state, "past", None) is None
    if int(cold.steps) > 20:
        assert int(case.found(start=cold).steps) < int(cold.steps) / 2


@has("history", "grid, order 1")
def test_history_shows_the_gap_and_the_steps_of_every_check(case):
    method = dataclasses.replace(case.iterative, cadence=5) if isinstance(case.iterative, Doge) else case.iterative
    if isinstance(method, str):
        method = {"name": method, "cadence": 5}
    found = case.found(method, history=True, max_steps=500, tol=1e-6)
    steps, gaps = int(found.steps), np.asarray(found.history.gap)
    assert np.all(np.isfinite(gaps[4:steps:5]))
    assert np.all(np.isnan(np.delete(gaps[:steps], np.arange(4, steps, 5))))
    assert gaps[4] >= gaps[steps - 1]
    for name in ("rho",) if case.loss == "square" else ("rho", "sigma"):
        assert np.all(np.asarray(found.history.extra[name])[4:steps:5] > 0)


@has("named", "grid", "uneven chain", "three orders")
def test_what_is_chosen_is_what_its_name_gives(case):
    problem, call = case.problem, {"node_weights": case.problem.node_weights, "tol": case.tol}
    method = so.trend.chosen_method(problem.y, problem.graph, problem.penalty, problem.order, **call)
    auto, named = case.found("auto"), case.found(method, loss=so.scalar.Squared())
    for name in ("value", "gap", "steps", "objective", "status"):
        np.testing.assert_array_equal(getattr(auto, name), getattr(named, name))


@has("once", "grid, order 1", "counts")
def test_one_trace_serves_all_data_weights_and_tolerances(case, traces_of):
    """Also for all deltas of a loss."""
    traces, rng = traces_of(Admm if case.loss == "square" else LossAdmm), np.random.default_rng(0)
    for scale in (1.0, 2.0, 3.0):
        y = rng.permuted(np.stack([case.problem.y] * 5, axis=-1), axis=0)  # a number of channels that is nowhere else
        loss = so.scalar.Huber(scale) if case.loss == "huber" else LOSSES[case.loss]
        penalty = jax.tree.map(lambda leaf, scale=scale: leaf * scale, case.problem.penalty)
        case.found(y=y, penalty=penalty, loss=loss, tol=10.0**-scale, max_steps=50 + int(scale))
    assert len(traces) == 1


@has("limit", "grid", "random, order 1", "free grid, order 2", "hinge", "median, free")
def test_from_the_largest_weight_on_only_what_costs_nothing_is_left(case):
    problem, graph = case.problem, case.problem.graph
    y, weights, loss = problem.y, problem.node_weights, LOSSES[case.loss]
    if case.loss in ("square", "own square"):
        flat = unpenalised(y, graph, case.order, 1.0 if weights is None else weights)
    elif not case.free:
        mass = np.ones(y.size) if weights is None else weights.astype(float)
        flat = loss.location(y, mass, graph.components)[graph.components]
    else:
        flat = problem.but(penalty=so.L1(1e3)).exact
    largest, tight = 1e3, 1e-6 if case.free and case.loss != "square" else 1e-9 if case.free else 1e-12
    if case.loss == "square":
        largest = so.trend.largest_weight(y, graph, case.order, weights)
        best = largest_weight_by_clarabel(y, graph, case.order, weights)
        assert largest == pytest.approx(best, rel=2e-6)
        assert largest >= best * (1 - 1e-8)  # an upper end, never below
        below = case.found(penalty=so.L1(0.9 * largest))
        assert np.abs(below.value - flat).max() > 1e-3
        assert float(below.objective) < problem.objective(flat) * (1 - 1e-6)
        at = case.found(penalty=so.L1(largest))
        np.testing.assert_allclose(at.value, flat, rtol=1e-4, atol=1e-4)
    for factor in (1.01, 100.0, 1e8):
        found = case.found(penalty=so.L1(factor * largest))
        assert found.status == so.Status.CONVERGED, factor
        np.testing.assert_allclose(found.value, flat, rtol=tight, atol=tight)
        if not case.free:
            assert all(np.ptp(found.value[graph.components == part]) == 0 for part in range(graph.num_components))


@has("path", "grid, order 1", "uneven chain", "counts", "median")
def test_levels_of_a_path_are_fits_whose_dimension_is_counted(case):
    problem, tol = case.problem, 1e-8 if case.loss == "square" else 1e-6
    given = problem.y, problem.graph, case.order, problem.node_weights
    call = {"order": case.order, "node_weights": problem.node_weights, "loss": LOSSES[case.loss]}
    method = "interior" if "interior" in case.methods else "auto"
    call |= {"method": method, "num": 4, "ratio": 0.05, "tol": tol}
    path = so.trend.trend_path(problem.y, problem.graph, **call).check()
    assert np.all(np.diff(path.weights) < 0)
    assert path.weights[-1] == pytest.approx(0.05 * path.weights[0])
    largest = so.trend.largest_weight(*given, loss=LOSSES[case.loss])
    assert path.weights[0] == path.largest_weight >= largest / (1 + 1e-3)
    matrix = problem.graph.matrix(case.order + 1).toarray()
    assert np.abs(matrix @ path.values[0]).max() <= 1e-5
    assert path.degrees_of_freedom[0] == problem.graph.num_nodes - np.linalg.matrix_rank(matrix)
    assert np.all(np.diff(path.deviances) < 0)
    if case.loss in SMOOTH:
        below = case.found(penalty=so.L1(0.95 * path.weights[0]))
        assert np.abs(matrix @ below.value).max() > 1e-4
    for index, weight in enumerate(path.weights):
        level = problem.but(penalty=so.L1(weight))
        here = level.objective(path.values[index])
        assert here == pytest.approx(path.objectives[index], rel=1e-9)
        assert -2e-6 <= here / level.least - 1 <= path.gaps[index] + 1e-12 <= tol + 1e-12
        deviance = 2 * level.mass * VALUES[case.loss](path.values[index], problem.y)[0]
        assert path.deviances[index] == pytest.approx(np.sum(deviance))
        if case.loss == "square":
            zeros = np.abs(matrix @ level.exact) < 1e-6
            rank = np.linalg.matrix_rank(matrix[zeros]) if zeros.any() else 0
            assert path.degrees_of_freedom[index] == problem.graph.num_nodes - rank
        assert path.at(index).check().gap == path.gaps[index]


@has("unit", "grid, order 1")
def test_the_unit_of_the_signal_does_not_matter(case):
    """RuntimeWarnings of the package are errors in tests."""
    y, plain = case.problem.y, case.found(tol=1e-5)
    far = 2 * np.sqrt(2e-5 * float(plain.objective) / (0.5 if case.weighted else 1))
    for kind, powers in ((np.float64, (480, -400)), (np.float32, (45, -40))):
        for power in powers:
            changes = {"y": np.ldexp(y, power).astype(kind), "penalty": so.L1(np.ldexp(case.penalty.weight, power))}
            found = case.found(**changes, tol=1e-5).check()
            assert np.linalg.norm(np.ldexp(np.asarray(found.value, float), -power) - plain.value) <= far


@has("short", "random, order 1")
def test_a_start_in_float32_ends_at_the_float64_fit(case, monkeypatch):
    problem = case.problem
    for kind in (so.trend.Doge, so.trend.Admm):
        monkeypatch.setattr(kind, "short_from", 1)
    y = 50 + 2 * problem.y
    exact = problem.but(y=y).exact
    found = case.found(y=y, tol=1e-10).check()
    np.testing.assert_allclose(found.value, exact, atol=1e-3)
    assert found.gap <= 1e-10
    assert found.dual.dtype == np.float64
    limited = case.found(y=y, tol=1e-16, max_steps=20)
    assert int(limited.steps) <= 20
    assert limited.status in (so.Status.MAX_STEPS, so.Status.PRECISION)
    # Squares of these are beyond float32.
    large = case.found(y=1e30 * y, penalty=so.L1(1e30 * case.penalty.weight), tol=1e-10).check()
    np.testing.assert_allclose(large.value / 1e30, exact, atol=1e-3)


@has("dual", "grid, order 1", "random, order 1", "free grid, order 2", "three orders", "counts, free", "labels")
def test_the_dual_has_the_rows_of_the_graph_and_holds_the_loss(case):
    problem, found = case.problem, case.fit
    orders = problem.penalty if isinstance(problem.penalty, dict) else (case.order,)
    rows = sparse.vstack([problems.rows_of(problem.graph, order) for order in orders])
    image = rows @ found.value
    assert found.dual.shape == image.shape
    if len(orders) == 1:
        assert found.nonzero.shape == image.shape
        assert np.all(np.abs(image[~found.nonzero]) < 2e-3)
    slope = problem.mass.reshape(problem.y.shape) * VALUES[case.loss](found.value, problem.y)[1]
    np.testing.assert_allclose(rows.T @ found.dual, -slope, atol=2e-3 if case.loss == "square" else 1e-2)
    if case.loss == "square":
        assert int(case.found("doge" if "doge" in case.methods else None, start=found, tol=1e-6).steps) <= 20


@has("pieces", "grid", "grid, coupled", "weighted, order 0", "counts", "isotropic, channels apart")
def test_pieces_have_one_value_to_the_last_bit_and_are_those_of_the_optimum(case):
    problem = case.problem
    found = case.found(case.methods[0])
    labels = found.pieces()
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, problems.searched(problem.graph, found.value))
    if case.loss == "square" and case.l1:
        np.testing.assert_array_equal(labels, problems.searched(problem.graph, problem.exact.round(7)))
        assert so.trend.degrees_of_freedom(found.nonzero, problem.graph) == labels.max() + 1
    if case.loss != "square":
        np.testing.assert_array_equal(labels, case.found(case.methods[0], tol=1e-10).pieces())
    # The weight of the absolute loss joins no nodes.
    assert (labels.max() + 1 < problem.graph.num_nodes) == (case.loss != "absolute")
    if case.penalty == so.GroupL2(1.5):
        same = np.diff(np.asarray(found.value)[problem.graph.edges], axis=1)[:, 0] == 0
        assert np.all(same.all(axis=1) == same.any(axis=1))
        assert 0 < same.all(axis=1).sum() < len(same)


@has("knots", "uneven chain", *[f"free, order {order}" for order in range(4)])
def test_knots_are_where_the_optimum_bends(case):
    problem = case.problem
    bends = np.flatnonzero(np.abs(problem.graph.matrix(case.order + 1) @ problem.exact) > 1e-5)
    for method in case.methods:
        # Row j is of the nodes j to j + order + 1.
        np.testing.assert_array_equal(case.found(method).knots(), bends + case.order // 2 + 1)
    assert 0 < len(bends) < problem.graph.num_nodes - case.order - 1


def planned(case, **settings):
    return so.trend_solver(case.problem.graph, case.order, case.iterative, **settings)


@has("solver", "random, order 1")
def test_a_solver_planned_once_fits_as_the_filter_does(case):
    problem, expected = case.problem, case.found(tol=1e-6)
    channels = problem.channels if case.channels else None
    with jax.enable_x64(True):
        solver = planned(case, channels=channels)
        found = solver(problem.y, problem.penalty, problem.node_weights)
        again = solver(problem.y, problem.penalty, problem.node_weights, start=found)
        from_filter = solver(problem.y, problem.penalty, problem.node_weights, start=expected)
    if case.order:  # at order 0 the filter takes the means of the pieces
        np.testing.assert_allclose(found.value, expected.value, atol=1e-12)
    assert int(found.steps) == int(expected.steps)
    assert found.dual.shape == expected.dual.shape
    if problem.node_weights is None:
        rows = problem.graph.matrix(case.order + 1)
        left = rows.T @ np.asarray(found.dual) - (problem.y - np.asarray(found.value))
        assert np.linalg.norm(left) <= 0.01 * np.linalg.norm(problem.y)
    assert int(again.steps) < max(int(found.steps) / 2, 11)
    assert int(from_filter.steps) <= int(found.steps)


@has("derivative", "random, order 1")
def test_derivatives_are_those_of_central_differences(case):
    problem, rng = case.problem, np.random.default_rng(2)
    n, rows = problem.y.size, problem.graph.matrix(case.order + 1).shape[0]
    with jax.enable_x64(True):
        solver, pull = planned(case), jnp.asarray(rng.normal(size=n))

        @jax.jit
        def found(y, weight, node_weights):
            fit = solver(y, so.L1(weight), node_weights, tol=1e-13, max_steps=100_000)
            return jnp.stack([jnp.vdot(pull, fit.value), fit.objective])

        levels = case.penalty.weight * rng.uniform(0.8, 1.2, rows)
        point = (jnp.asarray(problem.y), jnp.asarray(levels), jnp.asarray(rng.uniform(0.5, 2, n)))
        move = tuple(jnp.asarray(rng.normal(size=part.shape)) for part in point)
        gradients = jax.jit(jax.jacrev(found, (0, 1, 2)))(*point)
        for place, (gradient, along) in enumerate(zip(gradients, move, strict=True)):
            ends = [found(*(p + s * along if i == place else p for i, p in enumerate(point))) for s in (1e-5, -1e-5)]
            np.testing.assert_allclose(gradient @ along, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-7)


@has("lanes", "grid, order 1")
def test_lanes_under_vmap_are_as_many_calls(case):
    problem, rng = case.problem, np.random.default_rng(3)
    with jax.enable_x64(True):
        solver = planned(case)
        signals = jnp.asarray(problem.y + rng.normal(size=(24, problem.y.size)))
        weights, nodes = jnp.asarray(rng.uniform(0.1, 2, 24)), jnp.asarray(rng.uniform(0.5, 2, (24, problem.y.size)))
        one = jax.jit(lambda y, weight, nodes: solver(y, so.L1(weight), nodes, tol=1e-8))
        many = jax.jit(jax.vmap(one))(signals, weights, nodes)
        each = [one(*lane) for lane in zip(signals, weights, nodes, strict=True)]
    np.testing.assert_allclose(many.value, np.stack([fit.value for fit in each]), atol=1e-12)
    np.testing.assert_array_equal(many.steps, np.stack([fit.steps for fit in each]))
    assert set(np.asarray(many.status)) == {so.Status.CONVERGED}
