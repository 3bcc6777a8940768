"""`solve` on every kind of problem: under vmap, jit and grad, from any start, in any dtype, with parts of your own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

import sparseopt as so
from tests.core.regression import COLUMNS, DIFFERENCES, MATRIX, ROWS, SQUARES, TARGET, ImageGradient, OwnSquares
from tests.tiers import often

APG, PD, ADMM = so.AcceleratedProximalGradient(), so.PrimalDual(), so.SplitAdmm()
LASSO = so.Problem(SQUARES, so.L1(5.0))
FUSED = so.Problem(SQUARES, so.L1(5.0), DIFFERENCES)
QUADRATIC = so.Quadratic(MATRIX.T @ MATRIX, TARGET[:COLUMNS])


pytestmark = pytest.mark.usefixtures("double")


def status(found):
    return so.Status(int(found.status))


def solver_name(value):
    return type(value).__name__


@pytest.mark.parametrize("k", [12, 7])
def test_integer_least_squares_end_where_all_combinations_were_tried(k):
    rng = np.random.default_rng(k)
    matrix, truth = rng.standard_normal((60, 12)), rng.integers(-1, 2, 12) * (np.arange(12) < k)
    y = matrix @ truth + 0.5 * rng.standard_normal(60)
    points = np.stack(np.meshgrid(*[(-1, 0, 1)] * 12, indexing="ij"), axis=-1).reshape(-1, 12)
    points = points[np.count_nonzero(points, axis=1) <= k]
    best = points[np.argmin(np.sum((points @ matrix.T - y) ** 2, axis=1))]
    problem = so.Problem(so.LeastSquares(matrix, y), so.Grid(1.0, -1, 1, so.TopK(k)))
    start = np.linalg.lstsq(matrix, y, rcond=None)[0]
    found = so.solve(problem, start=start, history=True)
    np.testing.assert_array_equal(found.value, best)
    assert status(found) is so.Status.STATIONARY
    assert not (np.diff(np.asarray(found.history.objective)[1 : int(found.steps)]) > 1e-12).any()


@pytest.mark.parametrize(
    "problem", [LASSO, pytest.param(FUSED, marks=pytest.mark.thorough)], ids=["accelerated", "split ADMM"]
)
def test_no_start_is_a_start_at_zero_or_a_list_and_jit_changes_nothing(problem):
    solver = so.AcceleratedProximalGradient() if problem is LASSO else None  # which `jit` takes
    without = so.solve(problem, solver)
    given = [so.solve(problem, solver, start) for start in (np.zeros(COLUMNS), [0.0] * COLUMNS)]
    # Another program rounds otherwise.
    for other in (*given, jax.jit(so.solve)(problem)):
        np.testing.assert_allclose(other.value, without.value, rtol=1e-9, atol=1e-12)
        assert int(other.steps) == int(without.steps)
        assert float(other.gap) == pytest.approx(float(without.gap), rel=1e-3)


SUPPORT = so.Support(np.arange(COLUMNS) < 5)
CHOICES = {
    "entries": (LASSO, so.WorkingSet),
    "smooth": (so.Problem(SQUARES, so.GroupL2(1.0)), so.AcceleratedProximalGradient),
    "smooth, not convex": (so.Problem(SQUARES, so.TopK(3)), so.AcceleratedProximalGradient),
    "quadratic": (so.Problem(QUADRATIC, so.L1(1.0)), so.AcceleratedProximalGradient),
    "quadratic, not convex": (so.Problem(QUADRATIC, so.L0(1.0)), so.Maiht),
    "quadratic on a support": (so.Problem(QUADRATIC, SUPPORT), so.Refit),
    "least squares on a support": (so.Problem(SQUARES, SUPPORT), so.AcceleratedProximalGradient),
    "operator": (FUSED, so.SplitAdmm),
    "kinks": (so.Problem(so.AbsoluteLoss(MATRIX, TARGET), so.L1(1.0)), so.SplitAdmm),
    "operator, many unknowns": (
        so.Problem(
            so.LeastSquares(None, np.zeros(4000)),
            so.L1(1.0),
            sparse.diags_array([-1.0, 1.0], offsets=[0, 1], shape=(3999, 4000)),
        ),
        so.PrimalDual,
    ),
    "own operator, many unknowns": (
        so.Problem(so.LeastSquares(None, np.zeros((20, 20))), so.GroupL2(1.0, axis=0), ImageGradient()),
        so.PrimalDual,
    ),
}


@pytest.mark.parametrize(("problem", "solver"), CHOICES.values(), ids=CHOICES)
def test_the_chosen_solver_follows_from_the_structure_of_a_problem(problem, solver):
    choice = so.chosen_solver(problem)
    assert type(choice.solver) is solver
    assert choice.why
    if solver is so.WorkingSet:  # of arrays that are known
        return
    chosen = jax.eval_shape(lambda problem: so.solve(problem).state, problem)
    given = jax.eval_shape(lambda problem: so.solve(problem, solver()).state, problem)
    assert jax.tree.structure(chosen) == jax.tree.structure(given)


def test_a_loss_of_your_own_needs_value_and_gradient_alone_and_none_is_no_penalty():
    own = so.solve(so.Problem(OwnSquares(MATRIX, TARGET), so.L1(5.0)), start=np.zeros(COLUMNS), tol=1e-9)
    assert status(own) is so.Status.STATIONARY
    np.testing.assert_allclose(own.value, so.solve(LASSO, tol=1e-12).value, atol=1e-7)
    free = so.solve(so.Problem(SQUARES, None), tol=1e-9).check().value
    np.testing.assert_allclose(free, np.linalg.lstsq(MATRIX, TARGET)[0], atol=1e-6)


@pytest.mark.parametrize("solver", often([ADMM, PD], ADMM), ids=solver_name)
def test_an_operator_of_your_own_on_images_needs_no_matrix(solver):
    """Total variation of an image, the same with a sparse matrix and labelled groups of a flat one."""
    height, width = 6, 5
    image = np.zeros((height, width))
    image[2:, 1:4] = 1
    image = image + 0.3 * np.random.default_rng(2).standard_normal(image.shape)
    own = so.Problem(so.LeastSquares(None, image), so.GroupL2(0.2, axis=0), ImageGradient())
    found = so.solve(own, solver, tol=1e-9).check()

    def chain(n):
        return sparse.vstack([sparse.diags_array([-1.0, 1.0], offsets=[0, 1], shape=(n - 1, n)), np.zeros((1, n))])

    flat = sparse.vstack(
        [sparse.kron(chain(height), sparse.eye_array(width)), sparse.kron(sparse.eye_array(height), chain(width))]
    )
    groups = so.GroupL2(0.2, groups=np.tile(np.arange(image.size), 2))
    same = so.solve(so.Problem(so.LeastSquares(None, image.ravel()), groups, flat), tol=1e-9).check()
    np.testing.assert_allclose(found.value.ravel(), same.value, atol=1e-4)
    assert float(found.objective) == pytest.approx(float(same.objective), rel=1e-8)
    assert float(found.gap) <= 1e-9


def test_scipy_matrices_of_every_form_are_taken():
    x = np.arange(COLUMNS, dtype=float)
    for form in (sparse.csr_array, sparse.csc_matrix, sparse.coo_array):
        given = so.Problem(so.LeastSquares(form(MATRIX), TARGET), so.L1(5.0), form(DIFFERENCES))
        np.testing.assert_allclose(given.operator.mv(x), DIFFERENCES @ x)
        np.testing.assert_allclose(given.loss.gradient(x), SQUARES.gradient(x))
        assert given.loss.start().dtype == np.float64


EYE, WHOLE, HALVES = np.eye(3), np.array([3, 1, -2]), np.full(3, 0.5)
NARROW = so.LeastSquares(EYE.astype(np.float32), WHOLE.astype(np.float32))
LARGE = np.array([2**24 + 1, 1, -2])  # no float32
MIXED = {
    "a centre of integers": (so.Quadratic(EYE, WHOLE), so.L1(0.5)),
    "a target of integers": (so.LeastSquares(EYE, WHOLE), so.L1(HALVES)),
    "float32 with weights of float64": (so.LeastSquares(NARROW.matrix, NARROW.target, np.ones(3)), so.L1(0.5)),
    "float32 with a penalty of float64": (NARROW, so.L1(HALVES)),
    "integers alone": (so.Quadratic(EYE.astype(int), LARGE), so.L1(0.5)),
}


@pytest.mark.parametrize("name", MIXED)
def test_arrays_of_several_kinds_of_numbers_are_solved_in_one_that_holds_all(name):
    loss, penalty = MIXED[name]
    wanted = np.array(LARGE if "alone" in name else WHOLE) - 0.5 * np.sign(WHOLE)
    for start in (None, np.zeros(3, int)):
        found = so.solve(so.Problem(loss, penalty), start=start, tol=1e-12).value
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, wanted, rtol=1e-14, atol=1e-9)
    with jax.enable_x64(False):
        wide = so.solve(so.Problem(loss, penalty), tol=1e-12)
        assert {type(leaf) for leaf in jax.tree.leaves(wide)} <= {np.ndarray, np.int32, np.float64}
        np.testing.assert_array_equal(wide.value, found)
        if "alone" not in name:
            narrow = so.solve(jax.tree.map(jnp.asarray, so.Problem(loss, penalty))).value
            assert isinstance(narrow, jax.Array)
            assert narrow.dtype == np.float32
            np.testing.assert_allclose(narrow, wanted, atol=1e-4)


def test_jax_arrays_decide_the_precision_of_numpy_beside_them_and_a_trace_leaves_it_to_the_flag():
    narrow, wide = jnp.asarray(EYE, jnp.float32), jnp.asarray(EYE)
    for matrix, weight, kind in ((narrow, HALVES, np.float32), (wide, HALVES.astype(np.float32), np.float64)):
        problem = so.Problem(so.LeastSquares(matrix, 1.0 * WHOLE), so.L1(weight))
        found = so.solve(problem).check().value
        assert isinstance(found, jax.Array)
        assert found.dtype == kind
    numpy = so.Problem(so.LeastSquares(EYE, 1.0 * WHOLE), so.L1(0.5))
    with jax.enable_x64(False):
        assert jax.jit(lambda: so.solve(numpy).value)().dtype == np.float32
        assert jax.grad(lambda w: so.solve(so.Problem(numpy.loss, so.L1(w))).value.sum())(0.5).dtype == np.float32
        # Nor does a trace that closed over an array leave its precision behind.
        assert jax.jit(lambda x: numpy.loss.gradient(x))(jnp.zeros(3)).dtype == np.float32
        assert so.solve(numpy, PD).value.dtype == np.float64
        # One number alone does not decide.
        assert so.solve(so.Problem(numpy.loss, so.L1(jnp.float32(0.5)))).value.dtype == np.float64


@pytest.mark.parametrize(
    ("scalar", "kinds"),
    [
        (so.scalar.Huber(0.5), (np.float32, np.int32)),
        (so.scalar.Logistic(), (np.float32, np.uint8, bool)),
        (so.scalar.Poisson(), (np.float32, np.uint8)),
    ],
)
def test_targets_of_whole_numbers_and_of_truth_are_those_of_floats(rng, scalar, kinds):
    matrix, counts = rng.standard_normal((12, 3)).astype(np.float32), rng.integers(0, 2, 12)
    with jax.enable_x64(False):
        floats, *whole = (
            so.solve(so.Problem(so.DataLoss(scalar, matrix, counts.astype(kind)), so.L1(0.3)), tol=1e-4)
            for kind in kinds
        )
    for found in whole:
        assert status(found) is so.Status.CONVERGED
        np.testing.assert_array_equal(found.value, floats.value)


def test_known_weights_may_be_arrays_of_jax_under_jit():
    weight, rate = jnp.asarray(0.5), jnp.asarray(0.1)
    fit = jax.jit(lambda c: so.solve(so.Problem(so.Quadratic(jnp.eye(2), c), so.L1(weight))).value)
    np.testing.assert_allclose(fit(jnp.array([2.0, 0.1])), [1.5, 0.0], atol=1e-6)
    tx = so.proximal(so.L1(weight), rate)
    step = jax.jit(lambda x: so.proximal(so.L1(weight), rate).update(-x, tx.init(x), x)[0])
    assert np.isfinite(step(jnp.ones(2))).all()


def test_check_says_how_it_ended_and_what_to_try():
    problem, start = so.Problem(QUADRATIC, so.L0(0.2)), TARGET[:COLUMNS]
    with pytest.raises(RuntimeError, match=r"MAX_STEPS\) after 3 steps.*raise max_steps"):
        so.solve(problem, so.Maiht(), start + 1, tol=1e-9, max_steps=3).check()
    with pytest.raises(RuntimeError, match=r"NONFINITE.*became infinite or NaN.*smaller step size"):
        so.solve(problem, so.ProximalGradient(step_size=1e6), start + 1, max_steps=50).check()


def correlated(scaled):
    """100 rows of 200 columns with correlations `0.6 ** |i - j|`, 40 of which explain 90 % of the target's square."""
    draws = np.random.RandomState(0)
    column, columns = draws.randn(100), []
    for place in range(200):
        column = 0.6 * column + 0.8 * draws.randn(100) if place else column
        columns.append(column)
    matrix, truth = np.stack(columns, axis=1), np.zeros(200)
    active = draws.choice(200, 40, replace=False)
    truth[active] = draws.randn(40)
    target, noise = matrix @ truth, draws.randn(100)
    target = target + noise / np.linalg.norm(noise) * np.linalg.norm(target) / 3
    return matrix / (np.linalg.norm(matrix, axis=0) / 10 if scaled else 1), target


# Of the problem and data of benchopt's benchmark_mcp: the objectives of skglm 0.5, MCPRegression with tol=1e-12 and
# 1,000 iterations, at .5, .1 and .01 of the largest weight.
OF_SKGLM = {
    False: (27.8017331636, 6.61586737084, 0.190184076077),
    True: (27.1852499983, 6.35576769029, 0.182965840005),
}


@jax.jit
def graduated(matrix, target, share, start=None):
    weight = share * jnp.max(jnp.abs(matrix.T @ target)) / target.size
    loss = so.LeastSquares(matrix, target, jnp.full(target.size, 1 / target.size))
    return so.solve(so.Problem(loss, so.MCP(weight, 3.0)), start=start)


@pytest.mark.parametrize("scaled", OF_SKGLM)
def test_mcp_ends_no_higher_than_coordinate_descent(scaled):
    found = [graduated(*correlated(scaled), share) for share in (0.5, 0.1, 0.01)]
    for ours, theirs in zip(found, OF_SKGLM[scaled], strict=True):
        assert status(ours) is so.Status.STATIONARY
        assert ours.objective <= theirs * (1 + 1e-9)
    # From a given start there are no paths: here the answer is far above.
    plain = graduated(*correlated(scaled), 0.01, np.zeros(200))
    assert plain.objective > 1.5 * found[-1].objective
    assert plain.steps <= 200 < found[-1].steps


@pytest.mark.parametrize("penalty", often([so.MCP(2.0), so.SCAD(2.0), so.LogSum(2.0, 0.5)], so.SCAD(2.0)))
def test_the_paths_of_a_concave_penalty_run_under_jit_vmap_and_grad(penalty):
    traced = []

    def solved(weight):
        traced.append(weight)
        return so.solve(so.Problem(SQUARES, dataclasses.replace(penalty, weight=weight)), tol=1e-12)

    weights = np.array([0.5, 3.0, 3.0 + 1e-5, 3.0 - 1e-5, 1e3])
    together, slopes = jax.jit(jax.vmap(lambda w: (solved(w), jax.grad(lambda w: solved(w).objective)(w))))(weights)
    assert len(traced) == 2
    np.testing.assert_array_equal(together.status, so.Status.STATIONARY)
    assert not together.value[-1].any()
    np.testing.assert_allclose(slopes[1], (together.objective[2] - together.objective[3]) / 2e-5, rtol=1e-6)
    alone = solved(weights[0])
    np.testing.assert_allclose(together.value[0], alone.value, atol=1e-9)


@so.pytree
class Means:
    """Means of neighbours."""

    def mv(self, x):
        return (x[1:] + x[:-1]) / 2

    def rmv(self, e):
        return (jnp.pad(e, (0, 1)) + jnp.pad(e, (1, 0))) / 2


DESIGNS = {"identity": None, "dense": MATRIX, "sparse": sparse.csr_array(MATRIX), "map": Means()}
OF_DATA = {
    "squares": so.scalar.Squared(),
    "huber": so.scalar.Huber(0.8),
    "logistic": so.scalar.Logistic(),
    "poisson": so.scalar.Poisson(),
    "squared hinge": so.scalar.SquaredHinge(),
    "absolute": so.scalar.Absolute(),
    "quantile": so.scalar.Quantile(0.9),
}
FIXED = so.ProximalGradient(step_size=0.01)
# Every design with one loss, and every loss on one design.
REPORTED = [(solver, "squares", design) for solver in (FIXED, APG, PD, ADMM) for design in DESIGNS]
REPORTED += [(PD, loss, "dense") for loss in OF_DATA if loss != "squares"]
REPORTED += [(FIXED, "logistic", "dense"), (FIXED, "poisson", "map"), (ADMM, "quantile", "dense")]
OFTEN = [*((FIXED, "squares", design) for design in ("dense", "sparse", "map")), *REPORTED[-2:]]


@pytest.mark.parametrize(("solver", "loss", "design"), often(REPORTED, *OFTEN), ids=lambda part: str(part)[:20])
def test_the_objective_reported_is_that_of_the_answer_before_convergence_too(solver, loss, design):
    size = {"identity": COLUMNS, "map": COLUMNS - 1}.get(design, ROWS)
    target = np.where(TARGET[:size] > 0, 1.0, -1.0 if "hinge" in loss else 0.0)
    problem = so.Problem(so.DataLoss(OF_DATA[loss], DESIGNS[design], target), so.L1(0.1))
    found = so.solve(problem, solver, tol=1e-14, max_steps=10)
    assert float(found.objective) == pytest.approx(float(problem.value(found.value)), rel=1e-12)


STEEP = so.Problem(so.Quadratic(np.diag(np.arange(1.0, 6)), np.ones(5)), so.L1(0.1))


@pytest.mark.parametrize("solver", [so.ProximalGradient, so.Maiht, APG.__class__])
def test_a_tiny_step_size_is_not_convergence(solver):
    found = so.solve(STEEP, solver(step_size=1e-9), start=np.full(5, 3.0), max_steps=100)
    assert status(found) is so.Status.MAX_STEPS
    best = float(so.solve(STEEP, tol=1e-12).objective)
    settled = so.solve(STEEP, solver(), start=np.full(5, 3.0)).check()
    assert float(settled.objective) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(
    ("weights", "operator"), [(np.r_[np.zeros(4), np.ones(ROWS - 4)], DIFFERENCES), (2.0, None)], ids=["missing", "one"]
)
def test_what_is_not_observed_does_not_count_and_one_weight_is_that_of_all_rows(weights, operator):
    rows = np.broadcast_to(weights, ROWS)
    target = np.where(rows > 0, TARGET, np.nan)
    found = so.solve(so.Problem(so.LeastSquares(MATRIX, target, weights), so.L1(5.0), operator), tol=1e-12).check()
    seen = so.LeastSquares(MATRIX[rows > 0], TARGET[rows > 0], rows[rows > 0])
    np.testing.assert_allclose(
        found.value, so.solve(so.Problem(seen, so.L1(5.0), operator), tol=1e-12).value, atol=1e-6
    )
    assert float(found.objective) == pytest.approx(float(so.Problem(seen, so.L1(5.0), operator).value(found.value)))
