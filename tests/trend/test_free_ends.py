"""The usual trend filter on a line: divided differences at any times, with free ends."""

import clarabel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import linprog

import sparseopt as so
from sparseopt.core.base.types import precision
from sparseopt.core.losses.scalar import LOSSES
from sparseopt.trend.base.layout import layout_of
from sparseopt.trend.filter import chosen_method
from tests.core import conic
from tests.tiers import often

N = 30


def times_of(kind, n=N):
    """Even times, or uneven ones whose steps differ by a factor of up to ten."""
    return None if kind == "even" else np.cumsum(np.random.default_rng(5).uniform(0.2, 2.0, n)) + 100


def genlasso_matrix(times, n, order):
    """`D^(order)` as R's genlasso builds it: `D <- D0 %*% (wts * D)` with `wts = i / diff(pos, lag = i)`."""
    at = np.arange(n, dtype=float) if times is None else times
    found = np.diff(np.eye(n), axis=0)
    for i in range(1, order):
        found = np.diff((i / (at[i:] - at[:-i]))[:, None] * found, axis=0)
    return found


def conic_fit(y, matrix, weight, node_weights=None):
    """The L1 fit by Clarabel: `min 1/2 sum w (b - y)² + weight sum s` with `-s <= D b <= s`."""
    rows, n = matrix.shape
    w = np.ones(n) if node_weights is None else node_weights
    quadratic = sparse.block_diag([sparse.diags_array(w), sparse.csc_array((rows, rows))], format="csc")
    linear = np.r_[-w * y, np.full(rows, weight)]
    eye = np.eye(rows)
    bounds = sparse.csc_matrix(np.block([[matrix, -eye], [-matrix, -eye]]))
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-12
    cones = [clarabel.NonnegativeConeT(2 * rows)]
    solver = clarabel.DefaultSolver(sparse.csc_matrix(quadratic), linear, bounds, np.zeros(2 * rows), cones, settings)
    return np.array(solver.solve().x)[:n]


def noisy(n=N, channels=()):
    rng = np.random.default_rng(1)
    return np.abs(np.arange(n) - n / 3).reshape(-1, *(1 for _ in channels)) / 5 + rng.standard_normal((n, *channels))


@pytest.mark.parametrize("key", [1, np.int64(1), 1.0])
def test_a_penalty_has_the_ends_of_the_graph_whatever_the_type_of_its_key(key):
    line = np.linspace(0, 10, N)
    fit = so.trend_filter(line, so.Graph.chain(N), {key: so.L1(50.0)})
    np.testing.assert_array_equal(fit.value, line)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "apart"), [(np.float64, 1e-6), (np.float64, 1e-12), (np.float32, 1e-5)])
def test_nearly_equal_times_are_an_error_that_names_them(dtype, apart, order):
    """As equal times are; solves with their differences lose all digits."""
    times = np.arange(float(N))
    times[10] = times[9] + apart
    graph = so.Graph.chain(N, times=times)
    text = rf"the times of the nodes 9 and 10 are {apart:.3g} apart, .*order {order + 1} in {np.dtype(dtype)}: take one"
    for fit in (
        lambda: so.trend_filter(noisy(), graph, so.L1(1.0), order, dtype=dtype),
        lambda: so.trend.trend_path(noisy(), graph, order=order, dtype=dtype),
    ):
        with pytest.raises(ValueError, match=text):
            fit()
    # Steps that change from node to node are none, however large the range, nor are times that are less near.
    times[10] = times[9] + 1e-3
    for taken in (times, np.geomspace(1e-3, 1e3, N)):
        so.Graph.chain(N, times=taken).free_difference(order + 1, dtype)


@pytest.mark.parametrize("kind", ["even", "uneven"])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_the_operator_is_that_of_genlasso(kind, order):
    times = times_of(kind)
    graph = so.Graph.chain(N, times=times)
    wanted = (-1) ** (order + 1) * genlasso_matrix(times, N, order + 1)
    np.testing.assert_allclose(graph.matrix(order + 1).toarray(), wanted, rtol=1e-12, atol=1e-13)
    x, e = np.random.default_rng(0).standard_normal((2, N, 3))
    with jax.enable_x64(True):
        difference = graph.free_difference(order + 1, np.float64)
        rows = e[: N - order - 1]
        np.testing.assert_allclose(difference.mv(jnp.asarray(x)), wanted @ x, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(difference.rmv(jnp.asarray(rows)), wanted.T @ rows, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(difference.potential(jnp.asarray(wanted.T @ rows)), rows, rtol=1e-6, atol=1e-7)


CASES = [(kind, "interior", order) for kind in ("even", "uneven") for order in (0, 1, 2, 3)]
CASES += [("even", "fast_admm", 2), ("uneven", "fast_admm", 1), ("uneven", "fast_admm", 3)]
CASES += [("uneven", "doge", 1), ("uneven", "admm", 2)]


@pytest.mark.parametrize(("kind", "method", "order"), often(CASES, *CASES[:8], ("even", "fast_admm", 2), *CASES[-2:]))
def test_fits_and_knots_agree_with_a_conic_solver(kind, method, order):
    times, y = times_of(kind), noisy()
    matrix = genlasso_matrix(times, N, order + 1)
    found = so.trend_filter(y, so.Graph.chain(N, times), so.L1(2.0), order, method, tol=1e-13, max_steps=50_000)
    wanted = conic_fit(y, matrix, 2.0)
    assert found.gap <= 1e-11
    np.testing.assert_allclose(found.value, wanted, atol=1e-6)
    bends = np.flatnonzero(np.abs(matrix @ wanted) > 1e-5)  # row j is of nodes j to j + order + 1
    np.testing.assert_array_equal(found.knots(), bends + order // 2 + 1)
    assert 0 < len(bends) < N - order - 1


@pytest.mark.parametrize("kind", ["even", "uneven"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("weight", [1e-3, 1.0, 1e6])
def test_polynomials_come_back_unchanged(kind, order, weight):
    times = times_of(kind)
    at = np.arange(N) if times is None else times
    graph = so.Graph.chain(N, times=times)
    y = 1e3 + 7 * at - (0.3 * at**2 if order == 2 else 0)
    for penalty in (so.L1(weight), so.MCP(weight), so.L0(weight)):
        found = so.trend_filter(y, graph, penalty, order).check()
        np.testing.assert_array_equal(found.value, y)
        assert found.knots().size == 0
    y[[0, 7, N - 1]] = np.nan  # where nothing is observed, the polynomial goes on
    found = so.trend_filter(y, graph, so.L1(weight), order, missing="nan").check()
    np.testing.assert_allclose(found.value, 1e3 + 7 * at - (0.3 * at**2 if order == 2 else 0), rtol=1e-12)


@pytest.mark.parametrize("order", often([1, 2], 1))
def test_a_solver_keeps_polynomials_and_its_derivative_does(order):
    graph = so.Graph.chain(N, times=times_of("uneven"))
    line = (times_of("uneven") - 100) / 10
    with jax.enable_x64(True):
        solver = so.trend_solver(graph, order)

        @jax.jit
        def fitted(y):
            found = solver(y, so.L1(2.0), tol=1e-10)
            return found.value, found.status

        (value, status), (moved, _) = jax.jvp(fitted, (jnp.asarray(noisy()),), (jnp.asarray(line),))
        assert so.Status(int(status)) == so.Status.CONVERGED
        np.testing.assert_allclose(value, conic_fit(noisy(), graph.matrix(order + 1).toarray(), 2.0), atol=1e-4)
        np.testing.assert_allclose(moved, line, atol=1e-6)
        value, status = fitted(jnp.asarray(line))
        assert so.Status(int(status)) == so.Status.CONVERGED
        np.testing.assert_array_equal(value, line)


def test_the_ends_of_the_graph_move_a_line():
    line = np.linspace(0, 10, 50)
    graph = so.Graph.chain(50, ends="graph")
    assert np.abs(so.trend_filter(line, graph, so.L1(5.0), 1, "interior").value - line).max() > 0.02


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_groups_of_a_chains_edges_are_their_parities(n):
    assert so.Graph.chain(n).groups(1).tolist() == (np.arange(n - 1) % 2).tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_chain_has_free_ends_by_default(dtype):
    chain, y = so.Graph.chain(N), noisy().astype(dtype)
    found = so.trend_filter(y, chain, so.L1(2.0), 1, tol=1e-12)
    np.testing.assert_allclose(found.value, conic_fit(y, genlasso_matrix(None, N, 2), 2.0), atol=1e-6)
    line = np.arange(N, dtype=dtype)
    kept = so.trend_filter(line, chain, so.L1(5.0), 1)
    np.testing.assert_array_equal(kept.value, line)
    assert found.value.dtype == kept.value.dtype == np.float64
    assert "graph=Graph.chain(30), order=1" in repr(kept)
    moved = so.trend_filter(line, so.Graph.chain(N, ends="graph"), so.L1(5.0), 1)
    assert "graph=Graph.chain(30, ends='graph'), order=1" in repr(moved)


AT_ORDER_0 = {
    "L1": (so.L1(1.0), {}),
    "a set, which zeros cost something": (so.Box(1.0, 2.0), {"loss": "huber"}),
    "counts": (so.L1(1.0), {"loss": "poisson"}),
    "groups": (so.L1(1.0), {"method": "doge_groups"}),
    "several": ({-1: so.L1(0.1), 0: so.L1(1.0)}, {}),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", AT_ORDER_0)
def test_at_order_0_a_chain_is_that_with_the_ends_of_the_graph(case, dtype):
    penalty, options = AT_ORDER_0[case]
    y = np.round(np.abs(noisy())).astype(dtype)
    free, plain = (so.trend_filter(y, so.Graph.chain(N, ends=ends), penalty, **options) for ends in ("free", "graph"))
    assert free.value.dtype == plain.value.dtype == dtype
    np.testing.assert_array_equal(free.value, plain.value)
    assert int(free.steps) == int(plain.steps)
    prox = so.TotalVariation(so.Graph.chain(N), 0.5).prox(jnp.asarray(y), 1.0)
    np.testing.assert_array_equal(prox, so.TotalVariation(so.Graph.chain(N, ends="graph"), 0.5).prox(jnp.asarray(y), 1))


def test_at_order_0_the_ends_make_no_difference():
    y, graph = noisy(), so.Graph.chain(N, times=times_of("uneven"))
    plain = so.Graph.chain(N, ends="graph")
    np.testing.assert_array_equal(
        so.trend_filter(y, graph, so.L1(1.0)).value, so.trend_filter(y, plain, so.L1(1.0)).value
    )
    assert so.trend.degrees_of_freedom(np.diff(y) > 0, graph) == so.trend.degrees_of_freedom(np.diff(y) > 0, plain)
    np.testing.assert_array_equal(graph.groups(1), plain.groups(1))
    assert chosen_method(y, graph, so.L1(1.0)) == chosen_method(y, plain, so.L1(1.0)) == "fast_admm"
    assert so.trend.largest_weight(y, graph) == so.trend.largest_weight(y, plain)
    assert so.trend.noise_level(y, graph) == so.trend.noise_level(y, plain)


@pytest.mark.parametrize("order", [1, 2])
def test_weights_and_missing_nodes_agree_with_a_conic_solver(order):
    y, rng = noisy(), np.random.default_rng(3)
    graph = so.Graph.chain(N, times=times_of("uneven"))
    weights = rng.uniform(0.5, 2, N) * (rng.random(N) > 0.3)
    weights[-2:] = 0
    found = so.trend_filter(y, graph, so.L1(1.0), order, "interior", tol=1e-12, node_weights=weights)
    matrix = graph.matrix(order + 1).toarray()
    np.testing.assert_allclose(found.value, conic_fit(y, matrix, 1.0, weights), atol=1e-5)
    assert found.gap < 1e-9


def test_several_orders_agree_with_a_conic_solver():
    y, graph = noisy(), so.Graph.chain(N, times=times_of("uneven"))
    found = so.trend_filter(y, graph, {0: so.L1(0.3), 1: so.L1(1.0)}, tol=1e-12, max_steps=100_000)
    stacked = np.concatenate([0.3 * genlasso_matrix(graph.times, N, 1), genlasso_matrix(graph.times, N, 2)])
    np.testing.assert_allclose(found.value, conic_fit(y, stacked, 1.0), atol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_the_largest_weight_leaves_the_polynomial(order):
    y, times = noisy(), times_of("uneven")
    graph = so.Graph.chain(N, times=times)
    weight = so.trend.largest_weight(y, graph, order)
    fit = np.polynomial.Polynomial.fit(times, y, order)(times)
    dual = np.linalg.lstsq(genlasso_matrix(times, N, order + 1).T, y - fit)[0]
    assert weight == pytest.approx(np.abs(dual).max(), rel=1e-8)
    above = so.trend_filter(y, graph, so.L1(1.001 * weight), order).check()
    np.testing.assert_allclose(above.value, fit, atol=1e-9)
    below = so.trend_filter(y, graph, so.L1(0.9 * weight), order).check()
    assert np.abs(below.value - fit).max() > 1e-3


@pytest.mark.parametrize(("method", "order"), [("interior", 1), ("interior", 2), ("auto", 2)])
def test_a_path_counts_the_knots_and_the_polynomial(order, method):
    y, graph = noisy(), so.Graph.chain(N, times=times_of("uneven"))
    path = so.trend.trend_path(y, graph, order=order, num=5, ratio=1e-2, tol=1e-8, method=method).check()
    matrix = graph.matrix(order + 1).toarray()
    knots = [np.sum(np.abs(matrix @ conic_fit(y, matrix, weight)) > 1e-5) for weight in path.weights]
    assert path.degrees_of_freedom.tolist() == [order + 1 + count for count in knots]
    assert path.degrees_of_freedom[0] == order + 1


def test_degrees_of_freedom_are_a_dimension():
    graph = so.Graph.chain(12, times=times_of("uneven", 12))
    for order in (1, 2):
        matrix = graph.matrix(order + 1).toarray()
        nonzero = np.random.default_rng(order).random(len(matrix)) < 0.3
        wanted = 12 - np.linalg.matrix_rank(matrix[~nonzero])
        assert so.trend.degrees_of_freedom(nonzero, graph, order) == wanted


def test_cross_validation_finds_a_bend():
    times = times_of("uneven")
    clean = np.abs(times - times[12])
    y = clean + 0.5 * np.random.default_rng(0).standard_normal(N)
    chosen = so.trend.cross_validate(y, so.Graph.chain(N, times=times), order=1, num=6, folds=3)
    assert np.mean((chosen.value - clean) ** 2) < 0.3 * 0.25
    assert so.trend.noise_level(y, so.Graph.chain(N, times=times), 1) == pytest.approx(0.5, rel=0.4)


@pytest.mark.parametrize("method", ["interior", "doge", "fast_admm"])
def test_the_unit_of_time_makes_no_difference(method):
    y, times = noisy(), times_of("uneven")
    days, seconds = (so.Graph.chain(N, times=unit * times) for unit in (1.0, 86400.0))
    found = so.trend_filter(y, days, so.L1(1.0), 1, method)
    other = so.trend_filter(y, seconds, so.L1(86400.0), 1, method)
    np.testing.assert_allclose(other.value, found.value, atol=1e-3)
    assert abs(int(other.steps) - int(found.steps)) <= 0.1 * int(found.steps) + 10


def test_channels_are_fitted_one_by_one():
    y, graph = noisy(channels=(2,)), so.Graph.chain(N)
    both = so.trend_filter(y, graph, so.L1(1.0), 1, tol=1e-10).check()
    for channel in range(2):
        single = so.trend_filter(y[:, channel], graph, so.L1(1.0), 1, tol=1e-10).check()
        np.testing.assert_allclose(both.value[:, channel], single.value, atol=1e-4)


def test_the_graph_stays_itself():
    graph = so.Graph.chain(4, times=[0, 1, 3, 4])
    assert repr(graph) == "Graph.chain(4, times)"
    assert repr(so.Graph.chain(5)) == repr(so.Graph.grid((5,), ends="free")) == "Graph.chain(5)"
    assert repr(so.Graph.chain(5, ends="graph")) == repr(so.Graph.grid((5,))) == "Graph.chain(5, ends='graph')"
    assert graph.shape == (4,)
    assert graph.renumber()[0] is graph
    assert graph.edges.tolist() == so.Graph.chain(4).edges.tolist()


BAD_CHAINS = {
    "as many times, \\[3\\], given the shape \\(2,\\)": {"times": [0.0, 1.0]},
    "times are finite, given nan at node 1": {"times": [0.0, np.nan, 2.0]},
    "increase from node to node, given 2 and then 2 at node 2": {"times": [0.0, 2.0, 2.0]},
    "unknown ends 'fre'; known are graph, free; did you mean 'free'": {"ends": "fre"},
    'times need ends="free"': {"times": [0.0, 1.0, 2.0], "ends": "graph"},
    "times must hold real numbers": {"times": ["a", "b", "c"]},
}


@pytest.mark.parametrize("message", BAD_CHAINS)
def test_bad_chains_are_refused(message):
    with pytest.raises(ValueError, match=message):
        so.Graph.chain(3, **BAD_CHAINS[message])


@so.pytree
class Kinked(so.scalar.Huber):
    smooth = False


BAD_FITS = {
    "free ends at order 1 take smooth losses, and on a chain Absolute and .*, given Kinked": {"loss": Kinked()},
    "treats all differences row by row, given B=1": {"method": so.trend.Doge(B=1)},
    'method="doge_groups" needs the ends of the graph': {"method": "doge_groups"},
    "at least 2 observed nodes, given 1": {"node_weights": [1, 0, 0, 0]},
    "order 3 with free ends needs at least 5 nodes, given 4": {"order": 3},
}


@pytest.mark.parametrize("message", BAD_FITS)
def test_what_free_ends_do_not_take_is_refused(message):
    options = {"order": 1} | BAD_FITS[message]
    with pytest.raises(ValueError, match=f'{message}.*take .*ends="graph"'):
        so.trend_filter(np.array([0.0, 2.0, 1.0, 3.0]), so.Graph.chain(4), so.L1(1.0), **options)


def test_several_devices_are_refused():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("devices",))
    with pytest.raises(ValueError, match=r'several devices take .* or take ends="graph"'):
        layout_of(so.Graph.chain(4), mesh)


def test_times_beyond_the_precision_are_refused():
    graph = so.Graph.chain(4, times=1e-30 * np.arange(4))
    with pytest.raises(ValueError, match="squares are beyond float32: divide the times by a typical step"):
        so.trend_filter(np.array([0.0, 2.0, 1.0, 3.0]), graph, so.L1(1.0), 1, dtype=np.float32)


@pytest.mark.thorough
def test_strong_smoothing_of_a_long_series_takes_few_steps():
    times = np.cumsum(np.random.default_rng(0).uniform(0.2, 2.0, 3000))
    y = np.sin(times / 200) + np.random.default_rng(1).standard_normal(3000)
    graph = so.Graph.chain(3000, times=times)
    found = so.trend_filter(y, graph, so.L1(1e-2 * so.trend.largest_weight(y, graph, 2)), 2).check()
    assert found.steps < 1000
    assert 0 < len(found.knots()) < 30
    flat = so.trend_filter(y, graph, so.L1(1e12), 2).check()
    assert flat.steps == 0
    assert flat.knots().size == 0
    np.testing.assert_allclose(flat.value, np.polynomial.Polynomial.fit(times, y, 2)(times), atol=1e-9)


RATES = np.abs(np.arange(N) - N / 3) / 8
OBSERVED = {
    "poisson": np.random.default_rng(2).poisson(np.exp(RATES)).astype(float),
    "logistic": (np.random.default_rng(2).random(N) < 1 / (1 + np.exp(1 - 2 * RATES))).astype(float),
    "huber": noisy(),
}
FORMS_OF_CHAINS = [("uneven", 1, "admm"), ("even", 2, "admm"), ("uneven", 1, "doge")]
FORMS = {"poisson": conic.poisson, "logistic": conic.logistic, "huber": conic.huber(1.0)}


@pytest.mark.parametrize(
    ("loss", "kind", "order", "method"),
    often(
        [(loss, *form) for loss in OBSERVED for form in FORMS_OF_CHAINS],
        *[("poisson", "uneven", 1, "admm"), ("logistic", "uneven", 1, "doge"), ("huber", "even", 2, "admm")],
    ),
)
def test_other_losses_leave_polynomials_free_and_reach_the_optimum(loss, kind, order, method):
    times, y, weight = times_of(kind), OBSERVED[loss], 1.5
    graph, seen = so.Graph.chain(N, times=times), np.ones(N)
    seen[7:9] = 0
    program = conic.Conic(N)
    FORMS[loss](program, sparse.eye_array(N).tocsr()[seen > 0], y[seen > 0], np.ones(N - 2))
    conic.absolute(program, graph.matrix(order + 1), weight)
    fit = so.trend_filter(y, graph, so.L1(weight), order, method, tol=1e-7, node_weights=seen, loss=loss).check()
    assert float(fit.objective) == pytest.approx(program.least(), rel=2e-6)

    # For a large weight the fit is the polynomial of least loss, whose gradient no polynomial sees.
    limit = so.trend_filter(y, graph, so.L1(1e8), order, method, node_weights=seen, loss=loss).check()
    at = np.arange(N) if times is None else times
    powers = np.vander((at - at.mean()) / np.ptp(at), order + 1)
    np.testing.assert_allclose(powers @ np.linalg.lstsq(powers, limit.value)[0], limit.value, atol=1e-7)
    with precision(np.dtype(np.float64)):
        slope = np.asarray(LOSSES[loss].derivative(jnp.asarray(limit.value), jnp.asarray(y)))
    np.testing.assert_allclose(powers.T @ (seen * slope), 0, atol=1e-5)


@pytest.mark.thorough
def test_a_path_of_counts_with_free_ends_begins_at_the_polynomial():
    graph = so.Graph.chain(N)
    path = so.trend.trend_path(OBSERVED["poisson"], graph, order=1, num=4, ratio=0.05, loss="poisson").check()
    assert path.degrees_of_freedom[0] == 2
    assert np.abs(np.diff(path.values[0], 2)).max() < 1e-6
    below = so.trend_filter(OBSERVED["poisson"], graph, so.L1(0.9 * path.weights[0]), 1, loss="poisson").check()
    assert below.knots().size > 0


def test_labels_that_a_line_parts_have_no_fit():
    labels = (np.arange(N) > 11).astype(float)
    with pytest.raises(ValueError, match="no fit exists at order 1: Logistic falls without end along a polynomial"):
        so.trend_filter(labels, so.Graph.chain(N), so.L1(1.0), 1, loss="logistic")


SEEN = (~np.isin(np.arange(N), (7, 8))).astype(float)
KINKED = [("absolute", (-1, 1), 1), (so.scalar.Quantile(0.8), (-0.8, 0.2), 2)]


def linear_optimum(y, matrix, weight, slopes):
    """The least objective by linear programming: `|matrix b| <= s` and `slopes (b - y) <= t` at the nodes SEEN."""
    rows, seen = matrix.shape[0], np.flatnonzero(SEEN)
    nodes, none = sparse.eye_array(N).tocsr()[seen], sparse.csr_array((rows, seen.size))
    loss = [[slope * nodes, -sparse.eye_array(seen.size), none.T] for slope in slopes]
    penalty = [[sign * matrix, none, -sparse.eye_array(rows)] for sign in (1, -1)]
    limit = np.r_[slopes[0] * y[seen], slopes[1] * y[seen], np.zeros(2 * rows)]
    cost = np.r_[np.zeros(N), SEEN[seen], np.full(rows, weight)]
    return linprog(cost, sparse.block_array(loss + penalty, format="csc"), limit, bounds=(None, None)).fun


@pytest.mark.parametrize(("loss", "slopes", "order"), KINKED)
def test_losses_with_kinks_reach_the_optimum_and_leave_the_polynomial_below_the_largest_weight(loss, slopes, order):
    times, y = times_of("uneven"), noisy() + 20 * (np.arange(N) % 9 == 4)
    graph = so.Graph.chain(N, times=times)
    matrix, largest = graph.matrix(order + 1), so.trend.largest_weight(y, graph, order, SEEN, loss=loss)

    def fit(weight, **options):
        return so.trend_filter(y, graph, so.L1(weight), order, node_weights=SEEN, loss=loss, **options)

    for share, method in ((0.01, "auto"), (0.2, "admm"), (0.2, "auto")):
        found = fit(share * largest, method=method, tol=1e-7).check()
        assert (found.steps == 0) == (method == "auto")
        assert float(found.objective) == pytest.approx(linear_optimum(y, matrix, share * largest, slopes), rel=1e-6)
    above = fit(1.0001 * largest).check()
    assert (int(above.steps), above.knots().size) == (0, 0)
    assert float(above.objective) == pytest.approx(linear_optimum(y, matrix, 1.0001 * largest, slopes), rel=1e-12)
    powers = np.vander((times - times.mean()) / np.ptp(times), order + 1)
    np.testing.assert_allclose(powers @ np.linalg.lstsq(powers, above.value)[0], above.value, atol=1e-10)
    below = fit(0.9 * largest, tol=1e-8).check()
    assert below.knots().size > 0
    assert float(below.objective) < float(above.objective) * (1 - 1e-7)


def test_outliers_do_not_move_a_line_that_other_observations_meet():
    times, y = times_of("uneven"), 1e3 + 7 * times_of("uneven")
    graph, line = so.Graph.chain(N, times=times), y.copy()
    y[[4, 13, 22]] += (50, 4e3, -80)
    matrix, largest = graph.matrix(2), so.trend.largest_weight(y, graph, 1, SEEN, loss="absolute")
    # Many subgradients prove the line; the one that needs the least weight counts.
    assert linear_optimum(y, matrix, 1.001 * largest, (-1, 1)) == pytest.approx(4130, rel=1e-9)
    assert linear_optimum(y, matrix, 0.999 * largest, (-1, 1)) < 4130 * (1 - 1e-6)
    for weight in (1.001 * largest, 1e6):
        found = so.trend_filter(y, graph, so.L1(weight), 1, node_weights=SEEN, loss="absolute").check()
        np.testing.assert_allclose(found.value, line, rtol=1e-14)
        assert (int(found.steps), found.knots().size) == (0, 0)
    for loss in ("absolute", "huber"):
        exact = so.trend_filter(line, graph, so.L1(1e6), 1, node_weights=SEEN, loss=loss).check()
        np.testing.assert_allclose(exact.value, line, rtol=1e-14)
        assert float(exact.objective) == 0
    with pytest.raises(ValueError, match="the signal is a polynomial of this degree"):
        so.trend.trend_path(line, graph, order=1, loss="absolute")


@pytest.mark.thorough
def test_a_median_with_free_ends_is_chosen_by_cross_validation_whatever_the_outliers():
    times = times_of("uneven")
    clean, rng = np.abs(times - times[12]), np.random.default_rng(0)
    y = clean + 0.3 * rng.standard_normal(N) + 1e3 * (np.arange(N) % 9 == 4)
    graph = so.Graph.chain(N, times=times)
    path = so.trend.trend_path(y, graph, order=1, num=4, node_weights=SEEN, loss="absolute").check()
    assert path.degrees_of_freedom[0] == 2
    assert np.all(np.diff(path.degrees_of_freedom) >= 0)
    chosen = so.trend.cross_validate(y, graph, order=1, num=5, folds=3, loss="absolute")
    assert np.mean(np.abs(chosen.value - clean)) < 0.5


def test_channels_of_medians_are_fitted_one_by_one():
    y, graph = noisy(channels=(2,)), so.Graph.chain(N, times=times_of("uneven"))
    both = so.trend_filter(y, graph, so.L1(1.0), 1, tol=1e-7, node_weights=SEEN, loss="absolute").check()
    least = sum(linear_optimum(column, graph.matrix(2), 1.0, (-1, 1)) for column in y.T)
    assert float(both.objective) == pytest.approx(least, rel=1e-6)


def test_a_gap_is_never_negative_where_the_line_leaves_the_range_of_the_data():
    """Ten observations of a slope, and 290 nodes beyond: the fit of the ten, continued, is the answer."""
    y = np.full(300, np.nan)
    y[:10] = np.arange(10) + 0.5 * np.random.default_rng(0).standard_normal(10)
    optimum = so.trend_filter(y[:10], so.Graph.chain(10), so.L1(0.3), 1, tol=1e-9).objective
    for tol in (1e-2, 1e-4):
        found = so.trend_filter(y, so.Graph.chain(300), so.L1(0.3), 1, tol=tol, missing="nan")
        assert float(found.gap) >= max(float(found.objective / optimum) - 1, 0) - 1e-8
