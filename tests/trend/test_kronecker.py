"""The Kronecker trend filter: differences along each axis of a grid, with free ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, sparse

import sparseopt as so
from sparseopt.core.operators.normal_solves import free_solve
from sparseopt.trend.base.layout import layout_of
from sparseopt.trend.filter import chosen_method
from sparseopt.trend.images import denoise
from sparseopt.trend.paths.path import trend_path
from tests.core import conic
from tests.tiers import often
from tests.trend.test_free_ends import FORMS, conic_fit, genlasso_matrix

SHAPE = (6, 5)
SPACING = (1.0, 1.5)
GRID = so.Graph.grid(SHAPE, SPACING, ends="free")
ROW, COLUMN = np.indices(SHAPE)
Y = np.abs(ROW - 2.0) + np.random.default_rng(0).standard_normal(SHAPE)


def kronecker_matrix(shape, order, spacing):
    """`D^(order)` of all lines: `D ⊗ I` over `I ⊗ D`, each over its power of the spacing."""
    (n, m), (h, g) = shape, spacing
    down = np.kron(genlasso_matrix(None, n, order), np.eye(m)) / h**order
    across = np.kron(np.eye(n), genlasso_matrix(None, m, order)) / g**order
    return (-1) ** order * np.concatenate([down, across])


@pytest.mark.parametrize("order", often([1, 2, 3], 2, 3))
def test_the_operator_is_that_of_the_paper_and_its_transform_diagonalises_it(order):
    wanted = kronecker_matrix(SHAPE, order, SPACING)
    np.testing.assert_allclose(GRID.matrix(order).toarray(), wanted, atol=1e-13)
    rng = np.random.default_rng(1)
    x, e = rng.standard_normal((*SHAPE, 2)), rng.standard_normal((len(wanted), 2))
    with jax.enable_x64(True):
        operator = GRID.free_difference(order, np.float64)
        np.testing.assert_allclose(operator.mv(jnp.asarray(x)), wanted @ x.reshape(-1, 2), atol=1e-12)
        np.testing.assert_allclose(operator.rmv(jnp.asarray(e)).reshape(-1, 2), wanted.T @ e, atol=1e-12)
        transform = free_solve(SHAPE, (order, 0), np.float64, SPACING)
        product = transform.apply(jnp.asarray(x), lambda level: level)
    np.testing.assert_allclose(product.reshape(-1, 2), (wanted.T @ wanted + np.eye(30)) @ x.reshape(-1, 2), atol=1e-10)


@pytest.mark.parametrize(
    ("method", "order"),
    often(
        [("admm", 1), ("admm", 2), ("doge", 1), ("doge", 2), ("interior", 2)], ("admm", 2), ("doge", 1), ("interior", 2)
    ),
)
def test_fits_agree_with_a_conic_solver(method, order):
    found = so.trend_filter(Y, GRID, so.L1(0.5), order, method, tol=1e-12, max_steps=50_000).check()
    wanted = conic_fit(Y.reshape(-1), kronecker_matrix(SHAPE, order + 1, SPACING), 0.5)
    np.testing.assert_allclose(found.value.reshape(-1), wanted, atol=1e-6)
    assert np.asarray(found.nonzero).shape == (len(GRID.matrix(order + 1).toarray()),)


@pytest.mark.parametrize("order", often([1, 2], 1))
def test_weights_missing_nodes_and_channels_agree_with_a_conic_solver(order):
    rng = np.random.default_rng(3)
    weights = rng.uniform(0.5, 2, SHAPE) * (rng.random(SHAPE) > 0.3)
    y = np.stack([Y, -Y.T.reshape(SHAPE)], axis=-1)
    found = so.trend_filter(y, GRID, so.L1(0.5), order, "admm", tol=1e-12, node_weights=weights).check()
    matrix = kronecker_matrix(SHAPE, order + 1, SPACING)
    for channel in range(2):
        wanted = conic_fit(y[..., channel].reshape(-1), matrix, 0.5, weights.reshape(-1))
        np.testing.assert_allclose(found.value[..., channel].reshape(-1), wanted, atol=1e-5)


@pytest.mark.thorough
def test_several_orders_agree_with_a_conic_solver():
    found = so.trend_filter(Y, GRID, {-1: so.L1(0.1), 1: so.L1(0.5)}, tol=1e-12, max_steps=50_000).check()
    stacked = np.concatenate([0.1 * np.eye(30), 0.5 * kronecker_matrix(SHAPE, 2, SPACING)])
    np.testing.assert_allclose(found.value.reshape(-1), conic_fit(Y.reshape(-1), stacked, 1.0), atol=1e-5)


@pytest.mark.parametrize("order", often([1, 2], 2))
@pytest.mark.parametrize("weight", [1e-3, 1e6])
def test_products_of_polynomials_come_back_unchanged(order, weight):
    y = 1e3 + 7 * (ROW + 1) * (COLUMN - 2) - (0.3 * ROW**2 * COLUMN**2 + COLUMN**2 if order == 2 else 0)
    for penalty in (so.L1(weight), so.MCP(weight), so.L0(weight)):
        np.testing.assert_array_equal(so.trend_filter(y, GRID, penalty, order).check().value, y)
    holes = np.where((ROW + COLUMN) % 4 == 3, np.nan, y)
    filled = so.trend_filter(holes, GRID, so.L1(weight), order, missing="nan").check()
    np.testing.assert_allclose(filled.value, y, rtol=1e-11)
    strong = so.trend_filter(y + Y, GRID, so.L1(1e6), order).check()
    basis = GRID.polynomials(order)
    np.testing.assert_allclose(strong.value.reshape(-1), basis @ (basis.T @ (y + Y).reshape(-1)), atol=1e-9)
    assert strong.steps == 0


def test_the_graph_bends_a_product_and_free_ends_do_not():
    saddle = (ROW - 2.5) * (COLUMN - 2.0)
    assert np.abs(so.trend_filter(saddle, so.Graph.grid(SHAPE), so.L1(1.0), 1).value - saddle).max() > 0.1


def test_one_axis_is_the_chain_and_order_0_the_graph():
    line, chain = so.Graph.grid((30,), ends="free"), so.Graph.chain(30, ends="free")
    y = Y.reshape(-1)
    np.testing.assert_array_equal(
        so.trend_filter(y, line, so.L1(1.0), 1, "admm").value, so.trend_filter(y, chain, so.L1(1.0), 1, "admm").value
    )
    plain = so.Graph.grid(SHAPE, SPACING)
    for penalty in (so.L1(0.5), so.GroupL2(0.5, axis=0)):
        np.testing.assert_array_equal(so.trend_filter(Y, GRID, penalty).value, so.trend_filter(Y, plain, penalty).value)
    assert so.trend.largest_weight(Y, GRID) == so.trend.largest_weight(Y, plain)


def test_an_axis_that_is_too_short_is_not_penalised():
    """Each of two columns is a chain of its own."""
    y, chain = Y.reshape(15, 2), so.Graph.chain(15, ends="free")
    found = so.trend_filter(y, so.Graph.grid((15, 2), ends="free"), so.L1(0.5), 1, tol=1e-12)
    apart = so.trend_filter(y, chain, so.L1(0.5), 1, tol=1e-12)
    np.testing.assert_allclose(found.value, apart.value, atol=1e-6)


@pytest.mark.parametrize("order", often([1, 2], 2))
def test_the_largest_weight_is_that_of_a_linear_program(order):
    matrix, basis = kronecker_matrix(SHAPE, order + 1, SPACING), GRID.polynomials(order)
    rows, pull = len(matrix), Y.reshape(-1) - basis @ (basis.T @ Y.reshape(-1))
    size = -np.ones((rows, 1))
    wanted = optimize.linprog(
        np.r_[np.zeros(rows), 1],
        A_ub=np.block([[np.eye(rows), size], [-np.eye(rows), size]]),
        b_ub=np.zeros(2 * rows),
        A_eq=np.c_[matrix.T, np.zeros(30)],
        b_eq=pull,
        bounds=[(None, None)] * (rows + 1),
    ).fun
    assert so.trend.largest_weight(Y, GRID, order, tol=1e-5) == pytest.approx(wanted, rel=1e-5)


def test_a_path_counts_a_dimension():
    path = so.trend.trend_path(Y, GRID, order=1, num=4, ratio=0.03, tol=1e-8).check()
    matrix = kronecker_matrix(SHAPE, 2, SPACING)
    zeros = [np.abs(matrix @ conic_fit(Y.reshape(-1), matrix, weight)) < 1e-5 for weight in path.weights]
    wanted = [30 - np.linalg.matrix_rank(matrix[zero]) for zero in zeros]
    assert path.degrees_of_freedom.tolist() == wanted
    assert wanted[0] == 4  # 1, i, j and i j
    assert so.trend.degrees_of_freedom(~zeros[1], GRID, 1) == wanted[1]


def test_a_solver_has_the_derivative_of_the_projection():
    """Products of lines are not penalised, so the fit moves with them."""
    plane = (ROW * COLUMN / 10.0).reshape(-1)
    with jax.enable_x64(True):
        solver = so.trend_solver(GRID, 1)

        def fitted(y):
            return solver(y, so.L1(0.5), tol=1e-10).value

        value, moved = jax.jvp(jax.jit(fitted), (jnp.asarray(Y.reshape(-1)),), (jnp.asarray(plane),))
        wanted = conic_fit(Y.reshape(-1), kronecker_matrix(SHAPE, 2, SPACING), 0.5)
        np.testing.assert_allclose(value, wanted, atol=1e-4)
        np.testing.assert_allclose(moved, plane, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("loss", ["poisson", "huber"])
def test_smooth_losses_reach_the_optimum_and_leave_products_free(loss):
    rates = (ROW * COLUMN / 10).reshape(-1)
    y = np.random.default_rng(2).poisson(np.exp(rates)).astype(float).reshape(SHAPE)
    fit = so.trend_filter(y, GRID, so.L1(0.3), 1, tol=1e-6, loss=loss).check()
    program = conic.Conic(30)
    FORMS[loss](program, sparse.eye_array(30).tocsr(), y.reshape(-1), np.ones(30))
    conic.absolute(program, GRID.matrix(2), 0.3)
    assert float(fit.objective) == pytest.approx(program.least(), rel=2e-6)
    limit = so.trend_filter(y, GRID, so.L1(1e8), 1, loss=loss).check()
    assert np.abs(GRID.matrix(2) @ limit.value.reshape(-1)).max() < 1e-6
    assert so.trend.trend_path(y, GRID, order=1, num=2, ratio=0.5, loss=loss, tol=1e-3).degrees_of_freedom[0] == 4


@pytest.mark.thorough
def test_the_unit_of_the_spacing_makes_no_difference():
    metres, millimetres = (so.Graph.grid(SHAPE, [unit * h for h in SPACING], ends="free") for unit in (1.0, 1000.0))
    found = so.trend_filter(Y, metres, so.L1(0.5), 1, "admm")
    other = so.trend_filter(Y, millimetres, so.L1(0.5e6), 1, "admm")
    np.testing.assert_allclose(other.value, found.value, atol=1e-3)
    assert abs(int(other.steps) - int(found.steps)) <= 10


def test_pictures_cross_validation_and_noise():
    ramp = 20.0 * ROW + 30.0 * COLUMN
    found = denoise(ramp, 5.0, order=1, ends="free")
    np.testing.assert_array_equal(found.image, ramp)
    chosen = so.trend.cross_validate(Y, GRID, order=1, num=3, folds=2, ratio=0.1, tol=1e-3)
    assert chosen.value.shape == SHAPE
    assert so.trend.noise_level(Y, GRID, 1) == pytest.approx(1.0, rel=0.5)
    assert chosen_method(Y, GRID, so.L1(50.0), 1) == "admm"
    assert chosen_method(Y, GRID, so.L1(0.1), 1) == "doge"
    assert repr(GRID) == "Graph.grid((6, 5), spacing=(1.0, 1.5), ends='free')"


def test_the_estimator_and_a_penalty_of_rows_leave_products_free():
    y = (ROW * COLUMN / 3.0).reshape(-1)
    nodes = np.arange(30)[:, None]
    fit = so.GraphTrendFilter(1, 5.0, GRID).fit(nodes, y)
    np.testing.assert_allclose(fit.predict(nodes), y, atol=1e-9)
    prox = so.TotalVariation(GRID, 5.0, order=1).prox(jnp.asarray(y, jnp.float32), 1.0)
    np.testing.assert_allclose(prox, y, rtol=1e-6)


def test_what_free_ends_do_not_take_is_refused():
    with pytest.raises(ValueError, match="unknown ends 'open'; known are graph, free"):
        so.Graph.grid(SHAPE, ends="open")
    with pytest.raises(ValueError, match="a grid of one axis takes no spacing"):
        so.Graph.grid((5,), (2.0,), "free")
    with pytest.raises(ValueError, match="order 5 with free ends needs at least 7 nodes along an axis, given 6"):
        so.trend_filter(Y, GRID, so.L1(1.0), 5)
    with pytest.raises(ValueError, match="takes a grid of at most 4,096 nodes along an axis, given 5,000"):
        so.trend_filter(np.zeros((2, 5000)), so.Graph.grid((2, 5000), ends="free"), so.L1(1.0), 1)
    with pytest.raises(ValueError, match="at least 4 observed nodes, given 5, and they must determine a polynomial"):
        so.trend_filter(Y, GRID, so.L1(1.0), 1, node_weights=ROW == 0)
    with pytest.raises(ValueError, match="knots are ordered along a chain"):
        so.trend_filter(Y, GRID, so.L1(1.0), 1).knots()
    for options, message in (
        ({"loss": "absolute"}, "free ends at order 1 take smooth losses"),
        ({"method": so.trend.Doge(B=1)}, "treats all differences row by row, given B=1"),
        ({"method": "doge_groups"}, "needs the ends of the graph"),
        ({"method": "fast_admm"}, "needs a chain"),
    ):
        with pytest.raises(ValueError, match=message):
            so.trend_filter(Y, GRID, so.L1(1.0), 1, **options)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("devices",))
    with pytest.raises(ValueError, match="several devices take the ends of the graph"):
        layout_of(GRID, mesh)
    large = so.Graph.grid((40, 40), ends="free")
    with pytest.raises(ValueError, match="the rank of a matrix, which is found for at most 1,024 nodes, given 1,600"):
        so.trend.degrees_of_freedom(np.zeros(2 * 38 * 40, bool), large, 1)
    with pytest.raises(ValueError, match="a path with a loss takes a grid with free ends of at most 1,024 nodes"):
        trend_path(np.ones((40, 40)), large, order=1, loss="poisson")
