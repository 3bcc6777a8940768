"""`solve` on every kind of problem: under vmap and jit, from any start, with custom parts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import linprog

import sparseopt as so
from sparseopt.core.base.types import precision
from sparseopt.core.problem.certify import certificate
from sparseopt.core.solvers.rising_admm import QuadraticAdmm
from sparseopt.core.solvers.splice import Splice
from tests.tiers import often

ROWS, COLUMNS = 30, 12
DIFFERENCES = np.diff(np.eye(COLUMNS), axis=0)
APG, PD, ADMM = so.AcceleratedProximalGradient(), so.PrimalDual(), so.SplitAdmm()


@pytest.fixture(scope="module", autouse=True)
def _float64():
    with precision(np.dtype(np.float64)):
        yield


def drawn(seed=0, many=()):
    """A matrix, and a target that half of its columns explain."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((ROWS, COLUMNS))
    truth = rng.standard_normal((*many, COLUMNS)) * (np.arange(COLUMNS) % 2)
    return matrix, truth @ matrix.T + rng.standard_normal((*many, ROWS))


MATRIX, TARGET = drawn()
SQUARES = so.LeastSquares(MATRIX, TARGET)
LASSO = so.Problem(SQUARES, so.L1(5.0))
FUSED = so.Problem(SQUARES, so.L1(5.0), DIFFERENCES)
LABELS = (TARGET > 0).astype(float)


def behind(solver, penalty=None):
    """A problem for the solver: with an operator where it takes one."""
    return dataclasses.replace(LASSO if solver is APG else FUSED, **({"penalty": penalty} if penalty else {}))


def test_a_gap_found_far_from_the_answer_is_no_bound_later():
    """Where x is still far too short, what a dual point lacks of its equation is charged too little for what follows.

    An ill-conditioned matrix, against a linear program.
    """
    rng, (rows, columns), weight = np.random.default_rng(5), (64, 48), 30.0
    left = np.linalg.qr(rng.standard_normal((rows, columns)))[0]
    right = np.linalg.qr(rng.standard_normal((columns, columns)))[0]
    matrix = (left * 10.0 ** np.linspace(0, -6, columns)) @ right.T
    target = matrix @ np.repeat(rng.standard_normal(6) * 50, 8) + 1e-3 * rng.standard_normal(rows)
    differences = np.diff(np.eye(columns), axis=0)
    # Over x, and bounds on the absolute residuals and on the absolute differences.
    residual, difference = -np.eye(rows), -np.eye(columns - 1)
    no_residual, no_difference = np.zeros((columns - 1, rows)), np.zeros((rows, columns - 1))
    stacked = np.block(
        [
            *([sign * matrix, residual, no_difference] for sign in (1, -1)),
            *([sign * differences, no_residual, difference] for sign in (1, -1)),
        ]
    )
    sides = np.r_[target, -target, np.zeros(2 * (columns - 1))]
    costs = np.r_[np.zeros(columns), np.ones(rows), np.full(columns - 1, weight)]
    free = [(None, None)] * columns + [(0, None)] * (rows + columns - 1)
    optimum = linprog(costs, stacked, sides, bounds=free).fun
    problem = so.Problem(so.AbsoluteLoss(matrix, target), so.L1(weight), differences)
    found = so.solve(problem, PD, tol=1e-4, max_steps=1000)
    above = float(found.objective) / optimum - 1
    assert above > 1e-2
    assert float(found.gap) >= above


@pytest.mark.parametrize("solver", often([APG, ADMM, PD], APG), ids=lambda solver: type(solver).__name__)
def test_many_problems_at_once_are_solved_as_one_by_one(solver):
    _, targets = drawn(1, (64,))
    weights = np.linspace(1, 9, 64)
    problem = behind(solver)

    def solved(target, weight):
        loss = dataclasses.replace(SQUARES, target=target)
        return so.solve(dataclasses.replace(problem, loss=loss, penalty=so.L1(weight)), solver, tol=1e-12)

    together = jax.device_get(jax.jit(jax.vmap(solved))(targets, weights))
    alone = [jax.device_get(solved(*pair)) for pair in zip(targets, weights, strict=True)]
    np.testing.assert_allclose(together.value, [each.value for each in alone], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(together.steps, [each.steps for each in alone])
    np.testing.assert_array_equal(together.status, so.Status.CONVERGED)
    assert len(set(together.steps.tolist())) > 3


@pytest.mark.parametrize("solver", often([APG, ADMM, PD], APG), ids=lambda solver: type(solver).__name__)
def test_changed_leaves_and_their_gradients_need_no_new_trace(solver):
    traces = []

    @so.pytree
    class Counting:
        weight: Any

        def value(self, x):
            return self.weight * jnp.sum(jnp.abs(x))

        def prox(self, x, step):
            traces.append(1)
            return x - jnp.clip(x, -self.weight * step, self.weight * step)

    def solved(weight, target):
        problem = behind(solver, Counting(weight))
        loss = dataclasses.replace(SQUARES, target=target)
        return so.solve(dataclasses.replace(problem, loss=loss), solver, tol=1e-4).value.sum()

    for function in (solved, jax.jit(jax.grad(solved))):
        function(2.0, jnp.asarray(TARGET))
        first = len(traces)
        assert first > 0
        for weight in (3.0, 4.0):
            function(weight, jnp.asarray(TARGET) * weight)
        assert len(traces) == first


PENALTIES = {"L1": so.L1(5.0), "MCP": so.MCP(5.0, 3.0), "L0": so.L0(3.0), "log-sum": so.LogSum(5.0, 0.3)}


@pytest.mark.parametrize("name", often(PENALTIES, "L1", "L0"))
def test_accelerated_steps_never_raise_the_objective(name):
    problem = so.Problem(SQUARES, PENALTIES[name])
    solver = so.AcceleratedProximalGradient(cadence=1)
    found = so.solve(problem, solver, np.zeros(COLUMNS), tol=1e-9, max_steps=300, history=True)
    objective = np.asarray(found.history.objective)[: int(found.steps)]
    assert len(objective) > 8
    assert objective[0] > objective[-1]
    assert np.all(np.diff(objective) <= 16 * np.finfo(float).eps * objective[:-1])
    assert np.all(np.isnan(found.history.objective[int(found.steps) :]))


def test_a_start_at_the_answer_ends_at_the_first_check():
    found = so.solve(LASSO, tol=1e-9).check()
    again = so.solve(LASSO, APG, found.value, tol=1e-8).check()
    assert int(again.steps) <= APG.cadence < int(found.steps)
    np.testing.assert_allclose(again.value, found.value, atol=1e-9)


QUADRATIC = so.Quadratic(MATRIX.T @ MATRIX, TARGET[:COLUMNS])
ABSOLUTE = so.AbsoluteLoss(MATRIX, TARGET)
LARGE = so.LeastSquares(None, np.zeros(4000))
CHOICES = {
    "smooth": (LASSO, so.AcceleratedProximalGradient),
    "smooth, not convex": (so.Problem(SQUARES, so.TopK(3)), so.AcceleratedProximalGradient),
    "quadratic": (so.Problem(QUADRATIC, so.L1(1.0)), so.AcceleratedProximalGradient),
    "quadratic, not convex": (so.Problem(QUADRATIC, so.L0(1.0)), so.Maiht),
    "quadratic on a support": (so.Problem(QUADRATIC, so.Support(np.arange(COLUMNS) < 5)), so.Refit),
    "least squares on a support": (
        so.Problem(SQUARES, so.Support(np.arange(COLUMNS) < 5)),
        so.AcceleratedProximalGradient,
    ),
    "operator": (FUSED, so.SplitAdmm),
    "kinks": (so.Problem(ABSOLUTE, so.L1(1.0)), so.SplitAdmm),
    "operator, many unknowns": (
        so.Problem(LARGE, so.L1(1.0), sparse.diags_array([-1.0, 1.0], offsets=[0, 1], shape=(3999, 4000))),
        so.PrimalDual,
    ),
}


@pytest.mark.parametrize(("problem", "solver"), CHOICES.values(), ids=CHOICES)
def test_the_chosen_solver_follows_from_the_structure_of_a_problem(problem, solver):
    choice = so.chosen_solver(problem)
    assert type(choice.solver) is solver
    assert choice.why
    chosen = jax.eval_shape(lambda problem: so.solve(problem).state, problem)
    given = jax.eval_shape(lambda problem: so.solve(problem, solver()).state, problem)
    assert jax.tree.structure(chosen) == jax.tree.structure(given)


@so.pytree
class OwnSquares:
    """A loss with nothing but its value and its gradient."""

    matrix: Any
    target: Any

    def value(self, x):
        return 0.5 * jnp.sum((self.matrix @ x - self.target) ** 2)

    def gradient(self, x):
        return self.matrix.T @ (self.matrix @ x - self.target)


def test_a_loss_of_your_own_needs_value_and_gradient_alone():
    found = so.solve(so.Problem(OwnSquares(MATRIX, TARGET), so.L1(5.0)), start=np.zeros(COLUMNS), tol=1e-9)
    assert so.Status(int(found.status)) is so.Status.CONVERGED
    np.testing.assert_allclose(found.value, so.solve(LASSO, tol=1e-12).value, atol=1e-7)


@so.pytree
class ImageGradient:
    """Differences down and to the right, `[h, w]` to `[2, h, w]`, 0 at the edges."""

    def mv(self, x):
        down = jnp.zeros_like(x).at[:-1].set(x[1:] - x[:-1])
        right = jnp.zeros_like(x).at[:, :-1].set(x[:, 1:] - x[:, :-1])
        return jnp.stack([down, right])

    def rmv(self, e):
        down, right = e
        x = jnp.zeros_like(down).at[1:].add(down[:-1]).at[:-1].add(-down[:-1])
        return x.at[:, 1:].add(right[:, :-1]).at[:, :-1].add(-right[:, :-1])


@pytest.mark.parametrize("solver", often([ADMM, PD], ADMM), ids=lambda solver: type(solver).__name__)
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


@pytest.mark.parametrize(
    "form", [sparse.csr_array, sparse.csc_matrix, sparse.coo_array], ids=lambda form: form.__name__
)
def test_scipy_matrices_of_every_form_are_taken(form):
    given = so.Problem(so.LeastSquares(form(MATRIX), TARGET), so.L1(5.0), form(DIFFERENCES))
    x = np.arange(COLUMNS, dtype=float)
    np.testing.assert_allclose(given.operator.mv(x), DIFFERENCES @ x)
    np.testing.assert_allclose(given.loss.gradient(x), SQUARES.gradient(x))
    assert given.loss.start().dtype == np.float64


@pytest.mark.parametrize(
    "problem", [LASSO, pytest.param(FUSED, marks=pytest.mark.thorough)], ids=["accelerated", "split ADMM"]
)
def test_no_start_is_a_start_at_zero_and_jit_changes_nothing(problem):
    without = so.solve(problem)
    given = so.solve(problem, start=np.zeros(COLUMNS))
    inside = jax.jit(so.solve)(problem)
    # Another program rounds otherwise.
    for other in (given, inside):
        np.testing.assert_allclose(other.value, without.value, rtol=1e-9, atol=1e-12)
        assert int(other.steps) == int(without.steps)
        assert float(other.gap) == pytest.approx(float(without.gap), rel=1e-3)


def many_labels():
    """Of 60 rows, most of them surely on their side: their dual is 0."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((60, 20))
    sides = matrix @ rng.standard_normal(20) + rng.standard_normal(60)
    return so.SquaredHingeLoss(matrix, np.where(sides > 0, 1, -1))


ROUNDED = {
    "squares": SQUARES,
    "huber": so.DataLoss(so.scalar.Huber(0.8), MATRIX, TARGET),
    "squared hinge": many_labels(),
    "poisson": so.PoissonLoss(MATRIX / 4, np.round(np.exp(TARGET / 4))),
    "logistic": so.LogisticLoss(MATRIX / 4, LABELS),
}


DEEP = [(name, solver) for name in ROUNDED for solver in ("APG", "PD")]


@pytest.mark.parametrize(("name", "solver"), often(DEEP, ("poisson", "APG"), ("logistic", "APG")))
def test_a_gap_far_below_the_root_of_eps_is_reached(name, solver):
    so.solve(so.Problem(ROUNDED[name], so.L1(1.0)), {"APG": APG, "PD": PD}[solver], tol=1e-12).check()


def test_a_dual_just_outside_its_domain_costs_no_more_than_its_rounding_error():
    problem = so.Problem(many_labels(), so.L1(1.0))
    x = so.solve(problem, tol=1e-12).check().value
    image = problem.loss.image(x)
    dual = problem.loss.rows.gradient(image)
    assert jnp.sum(dual == 0) > 10
    outside = jnp.where(dual == 0, 1e-18 * problem.loss.target, dual)
    for s in (dual, outside):
        gap = jax.jit(certificate)(problem, x, image, s, -problem.loss.pull(s)).gap
        assert 0 <= gap <= 1e-11


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
        assert so.Status(int(ours.status)) is so.Status.STATIONARY
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
    assert alone.state.x.shape == (COLUMNS,)


@pytest.mark.parametrize(
    ("penalty", "solver", "ended"),
    [
        (so.L0(0.5), None, "STATIONARY"),
        (so.L1(0.5), so.Maiht(), "CONVERGED"),
        (so.L0(0.5), so.ProximalGradient(), "STATIONARY"),
        (so.TopK(2), QuadraticAdmm(), "STATIONARY"),
        (so.TopK(2), Splice(), "STATIONARY"),
        (so.Support(np.array([[True], [False], [True], [True]])), None, "CONVERGED"),
    ],
)
def test_only_where_the_penalty_is_known_to_be_convex_a_solve_converges(penalty, solver, ended):
    problem = so.Problem(so.Quadratic(np.eye(4), np.array([3.0, 0.1, -2.0, 0.7])[:, None]), penalty)
    assert so.Status(int(so.solve(problem, solver).status)).name == ended
