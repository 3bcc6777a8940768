"""The usual trend filter on a line at any times, and the Kronecker trend filter on grids: free ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import null_space

import sparseopt as so
from tests.tiers import often
from tests.trend.problems import FREE, LOSSES, TIMES, VALUES, Problem

N, SHAPE, SPACING = 30, (6, 5), (1.0, 1.5)
EVEN, UNEVEN, GRID = (make(None) for make in FREE.values())
ROW, COLUMN = np.indices(SHAPE)
SIGNAL = np.abs(np.arange(N) - N / 3) / 5 + np.random.default_rng(1).standard_normal(N)
Y = np.abs(ROW - 2.0) + np.random.default_rng(0).standard_normal(SHAPE)


def test_times_that_are_less_near_are_taken():
    """Nor are steps that change from node to node too near, however large the range."""
    times = np.arange(float(N))
    times[10] = times[9] + 1e-3
    for taken in (times, np.geomspace(1e-3, 1e3, N)):
        for order in (1, 2, 3):
            for dtype in (np.float32, np.float64):
                with jax.enable_x64(dtype == np.float64):
                    assert so.trend_solver(so.Graph.chain(N, times=taken), order, dtype=dtype).shapes == [(N,)]


@pytest.mark.parametrize("graph", [EVEN, UNEVEN, GRID], ids=repr)
@pytest.mark.parametrize(("order", "weight"), [(1, 1e-3), (2, 1e6)])
def test_polynomials_and_their_products_come_back_unchanged(graph, order, weight):
    at = np.arange(N) if graph is EVEN else TIMES
    y = 1e3 + 7 * at - (0.3 * at**2 if order == 2 else 0)
    holes = np.isin(np.arange(N), (0, 7, N - 1))
    if graph is GRID:
        y = 1e3 + 7 * (ROW + 1) * (COLUMN - 2) - (0.3 * ROW**2 * COLUMN**2 + COLUMN**2 if order == 2 else 0)
        holes = (ROW + COLUMN) % 4 == 3
    np.testing.assert_array_equal(so.trend_filter(y, graph, {np.int64(order): so.L1(weight)}).value, y)
    for penalty in (so.L1(weight), so.MCP(weight), so.L0(weight)):
        found = so.trend_filter(y, graph, penalty, order).check()
        np.testing.assert_array_equal(found.value, y)
        assert graph is GRID or found.knots().size == 0
    # Where nothing is observed, the polynomial goes on.
    filled = so.trend_filter(np.where(holes, np.nan, y), graph, so.L1(weight), order, missing="nan").check()
    np.testing.assert_allclose(filled.value, y, rtol=1e-11)
    if graph is GRID:
        basis, noisy = null_space(GRID.matrix(order + 1).toarray()), y + Y
        strong = so.trend_filter(noisy, GRID, so.L1(1e6), order).check()
        np.testing.assert_allclose(strong.value.reshape(-1), basis @ (basis.T @ noisy.reshape(-1)), atol=1e-9)
        assert strong.steps == 0


@pytest.mark.parametrize(("graph", "order"), [(UNEVEN, 1), (GRID, 1)])
def test_a_solver_and_a_prox_leave_polynomials_free_and_derivatives_follow_them(graph, order):
    line = (ROW * COLUMN / 10.0).reshape(-1) if graph is GRID else (TIMES - 100) / 10
    problem = Problem(SIGNAL, graph, so.L1(0.5), order)
    with jax.enable_x64(True):
        solver = so.trend_solver(graph, order)

        @jax.jit
        def fitted(y):
            found = solver(y, so.L1(0.5), tol=1e-10)
            return found.value, found.status

        (value, status), (moved, _) = jax.jvp(fitted, (jnp.asarray(SIGNAL),), (jnp.asarray(line),))
        assert so.Status(int(status)) == so.Status.CONVERGED
        np.testing.assert_allclose(value, problem.exact, atol=1e-4)
        np.testing.assert_allclose(moved, line, atol=1e-6)
        value, status = fitted(jnp.asarray(line))
        assert so.Status(int(status)) == so.Status.CONVERGED
        np.testing.assert_allclose(value, line, rtol=0, atol=1e-9 if graph is GRID else 0)
    prox = so.TotalVariation(graph, 5.0, order=order).prox(jnp.asarray(line, jnp.float32), 1.0)
    np.testing.assert_allclose(prox, line, rtol=1e-6, atol=1e-6)


def test_a_chain_has_free_ends_by_default_in_float64_and_the_ends_of_the_graph_move_lines_and_products():
    narrow, line, saddle = SIGNAL.astype(np.float32), np.arange(N, dtype=np.float32), (ROW - 2.5) * (COLUMN - 2.0)
    found = so.trend_filter(narrow, EVEN, so.L1(2.0), 1, tol=1e-12)
    np.testing.assert_allclose(found.value, Problem(narrow.astype(float), EVEN, so.L1(2.0), 1).exact, atol=1e-6)
    kept, moved = (so.trend_filter(line, so.Graph.chain(N, ends=ends), so.L1(5.0), 1) for ends in ("free", "graph"))
    np.testing.assert_array_equal(kept.value, line)
    assert found.value.dtype == kept.value.dtype == np.float64
    assert np.abs(moved.value - line).max() > 0.02
    assert np.abs(so.trend_filter(saddle, so.Graph.grid(SHAPE), so.L1(1.0), 1).value - saddle).max() > 0.1
    assert "graph=Graph.chain(30), order=1" in repr(kept)
    assert "graph=Graph.chain(30, ends='graph'), order=1" in repr(moved)


def test_at_order_0_the_ends_make_no_difference():
    trend, rises = so.trend, np.diff(SIGNAL) > 0
    chains = UNEVEN, so.Graph.chain(N, ends="graph")
    for y, graphs in ((SIGNAL, chains), (Y, (GRID, so.Graph.grid(SHAPE, SPACING)))):
        other = {"penalty": {-1: so.L1(0.1), 0: so.L1(1.0)}}
        if y is Y:
            other = {"y": y.astype(np.float32), "penalty": so.L1(1.0), "method": "doge_groups"}
        for found in (
            lambda graph, y=y: so.trend_filter(y, graph, so.L1(1.0)).value,
            lambda graph, y=y, other=other: so.trend_filter(**{"y": y, "graph": graph} | other).value,
            lambda graph, y=y: trend.chosen_method(y, graph, so.L1(1.0)),
            lambda graph, y=y: trend.largest_weight(y, graph),
            lambda graph, y=y: trend.noise_level(y, graph),
        ):
            np.testing.assert_array_equal(*map(found, graphs))
    np.testing.assert_array_equal(*[so.trend_filter(Y, each, so.GroupL2(0.5, axis=0)).value for each in graphs])
    assert trend.chosen_method(SIGNAL, UNEVEN, so.L1(1.0)) == "fused_lasso"
    assert len({trend.degrees_of_freedom(rises, graph) for graph in chains}) == 1
    x = jnp.asarray(SIGNAL, jnp.float32)
    np.testing.assert_array_equal(*[so.TotalVariation(graph, 0.5).prox(x, 1.0) for graph in chains])


def test_one_axis_is_the_chain_and_an_axis_that_is_too_short_is_not_penalised():
    line = so.Graph.grid((30,), ends="free")
    fits = [so.trend_filter(SIGNAL, graph, so.L1(1.0), 1, "admm").value for graph in (line, EVEN)]
    np.testing.assert_array_equal(*fits)
    # Each of two columns is a chain of its own.
    y = SIGNAL.reshape(15, 2)
    found = so.trend_filter(y, so.Graph.grid((15, 2), ends="free"), so.L1(0.5), 1, tol=1e-12)
    apart = so.trend_filter(y, so.Graph.chain(15, ends="free"), so.L1(0.5), 1, tol=1e-12)
    np.testing.assert_allclose(found.value, apart.value, atol=1e-6)


@pytest.mark.parametrize("method", often(["interior", "doge", "grid"], "interior", "doge"))
def test_the_unit_of_time_or_spacing_makes_no_difference(method):
    if method == "grid":
        y, method, unit, factor = Y, "admm", 1000.0, 1000.0**2
        small, large = (so.Graph.grid(SHAPE, [size * h for h in SPACING], ends="free") for size in (1.0, unit))
    else:
        y, unit, factor = SIGNAL, 86400.0, 86400.0
        small, large = (so.Graph.chain(N, times=size * TIMES) for size in (1.0, unit))
    found = so.trend_filter(y, small, so.L1(0.5), 1, method)
    other = so.trend_filter(y, large, so.L1(0.5 * factor), 1, method)
    np.testing.assert_allclose(other.value, found.value, atol=1e-3)
    assert abs(int(other.steps) - int(found.steps)) <= 0.1 * int(found.steps) + 10


def test_cross_validation_finds_a_bend_and_pictures_keep_a_ramp():
    clean = np.abs(TIMES - TIMES[12])
    y = clean + 0.5 * np.random.default_rng(0).standard_normal(N)
    chosen = so.cross_validate(so.trend.trend_path(y, UNEVEN, order=1, num=6), 3)
    assert np.mean((chosen.value - clean) ** 2) < 0.3 * 0.25
    assert so.trend.noise_level(y, UNEVEN, 1) == pytest.approx(0.5, rel=0.4)
    ramp = 20.0 * ROW + 30.0 * COLUMN
    np.testing.assert_array_equal(so.trend.denoise(ramp, 5.0, order=1, ends="free").image, ramp)
    chosen = so.cross_validate(so.trend.trend_path(Y, GRID, order=1, num=3, ratio=0.1, tol=1e-3), 2)
    assert chosen.value.shape == SHAPE
    assert so.trend.noise_level(Y, GRID, 1) == pytest.approx(1.0, rel=0.5)
    assert so.trend.chosen_method(Y, GRID, so.L1(50.0), 1) == "admm"
    assert so.trend.chosen_method(Y, GRID, so.L1(0.1), 1) == "doge"


@pytest.mark.thorough
def test_strong_smoothing_of_a_long_series_takes_few_steps():
    times = np.cumsum(np.random.default_rng(0).uniform(0.2, 2.0, 3000))
    y = np.sin(times / 200) + np.random.default_rng(1).standard_normal(3000)
    graph = so.Graph.chain(3000, times=times)
    found = so.trend_filter(y, graph, so.L1(1e-2 * so.trend.largest_weight(y, graph, 2)), 2).check()
    assert found.steps < 1000
    assert 0 < len(found.knots()) < 30
    flat = so.trend_filter(y, graph, so.L1(1e12), 2).check()
    assert (int(flat.steps), flat.knots().size) == (0, 0)
    np.testing.assert_allclose(flat.value, np.polynomial.Polynomial.fit(times, y, 2)(times), atol=1e-9)


RATES = np.abs(np.arange(N) - N / 3) / 8
OBSERVED = {
    "poisson": np.random.default_rng(2).poisson(np.exp(RATES)).astype(float),
    "logistic": (np.random.default_rng(2).random(N) < 1 / (1 + np.exp(1 - 2 * RATES))).astype(float),
    "huber": SIGNAL,
}
SEEN = (~np.isin(np.arange(N), (7, 8))).astype(float)


@pytest.mark.parametrize(
    ("graph", "order", "loss"),
    often(
        [(UNEVEN, 1, "poisson"), (UNEVEN, 1, "logistic"), (EVEN, 2, "huber"), *[(GRID, 1, loss) for loss in OBSERVED]],
        *[(UNEVEN, 1, "poisson"), (UNEVEN, 1, "logistic"), (EVEN, 2, "huber")],
    ),
)
def test_for_a_large_weight_the_fit_is_the_polynomial_of_least_loss(graph, order, loss):
    """Its gradient no polynomial sees."""
    problem = Problem(OBSERVED[loss], graph, so.L1(1e8), order, SEEN, loss)
    limit = problem.fit("admm").check()
    basis = null_space(graph.matrix(order + 1).toarray())
    np.testing.assert_allclose(basis @ (basis.T @ limit.value), limit.value, atol=1e-7)
    slope = VALUES[loss](np.asarray(limit.value), problem.y)[1]
    np.testing.assert_allclose(basis.T @ (SEEN * slope), 0, atol=1e-5)


@pytest.mark.parametrize(("loss", "order"), [("absolute", 1), ("quantile", 2)])
def test_losses_with_kinks_leave_the_polynomial_below_the_largest_weight(loss, order):
    problem = Problem(SIGNAL + 20 * (np.arange(N) % 9 == 4), UNEVEN, so.L1(1.0), order, SEEN, loss)
    largest = so.trend.largest_weight(problem.y, UNEVEN, order, SEEN, loss=LOSSES[loss])
    for share, method in ((0.01, "auto"), (0.2, "admm"), (0.2, "auto")):
        level = problem.but(penalty=so.L1(share * largest))
        found = level.fit(method, tol=1e-7).check()
        assert (found.steps == 0) == (method == "auto")
        assert float(found.objective) == pytest.approx(level.least, rel=1e-6)
    level = problem.but(penalty=so.L1(1.0001 * largest))
    above = level.fit().check()
    assert (int(above.steps), above.knots().size) == (0, 0)
    assert float(above.objective) == pytest.approx(level.least, rel=1e-8)
    basis = null_space(UNEVEN.matrix(order + 1).toarray())
    np.testing.assert_allclose(basis @ (basis.T @ above.value), above.value, atol=1e-10)
    below = problem.fit(penalty=so.L1(0.9 * largest), tol=1e-8).check()
    assert below.knots().size > 0
    assert float(below.objective) < float(above.objective) * (1 - 1e-7)


def test_outliers_do_not_move_a_line_that_other_observations_meet():
    line, y = 1e3 + 7 * TIMES, 1e3 + 7 * TIMES
    y[[4, 13, 22]] += (50, 4e3, -80)
    problem = Problem(y, UNEVEN, so.L1(1.0), 1, SEEN, "absolute")
    largest = so.trend.largest_weight(y, UNEVEN, 1, SEEN, loss="absolute")
    # Many subgradients prove the line; the one that needs the least weight counts.
    assert problem.but(penalty=so.L1(1.001 * largest)).least == pytest.approx(4130, rel=1e-8)
    assert problem.but(penalty=so.L1(0.999 * largest)).least < 4130 * (1 - 1e-6)
    for weight in (1.001 * largest, 1e6):
        found = problem.fit(penalty=so.L1(weight)).check()
        np.testing.assert_allclose(found.value, line, rtol=1e-14)
        assert (int(found.steps), found.knots().size) == (0, 0)
    for loss in ("absolute", "huber"):
        exact = problem.fit(y=line, penalty=so.L1(1e6), loss=loss).check()
        np.testing.assert_allclose(exact.value, line, rtol=1e-14)
        assert float(exact.objective) == 0


def test_a_gap_is_never_negative_where_the_line_leaves_the_range_of_the_data():
    """Ten observations of a slope, and 290 nodes beyond: the fit of the ten, continued, is the answer."""
    y = np.full(300, np.nan)
    y[:10] = np.arange(10) + 0.5 * np.random.default_rng(0).standard_normal(10)
    optimum = so.trend_filter(y[:10], so.Graph.chain(10), so.L1(0.3), 1, tol=1e-9).objective
    for tol in (1e-2, 1e-4):
        found = so.trend_filter(y, so.Graph.chain(300), so.L1(0.3), 1, tol=tol, missing="nan")
        assert float(found.gap) >= max(float(found.objective / optimum) - 1, 0) - 1e-8
