"""Derivatives of `solve` in every leaf of a problem against central differences in float64.

One program per kind solves the problem and its neighbours in a random direction of each leaf, and differentiates.
The solves run until rounding stops them, so that errors do not dominate the difference of two answers.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from scipy import sparse
from scipy.sparse.csgraph import connected_components

import sparseopt as so
from sparseopt.core.base.types import precision
from sparseopt.core.operators.differences import Difference, GridBase, edge_base
from sparseopt.core.operators.maps import Identity, Split
from sparseopt.core.operators.normal_solves import ConjugateGradient, cosine_solve
from sparseopt.core.problem.certify import Anchor
from sparseopt.core.problem.problem import Start
from sparseopt.core.solvers.admm import Admm
from sparseopt.core.solvers.fused_lasso import ChainTotalVariation
from sparseopt.core.solvers.loss_admm import LossAdmm
from tests.tiers import often

ROWS, COLUMNS, CHANNELS = 24, 10, 4
STEP = 1e-5
DIFFERENCES = np.diff(np.eye(COLUMNS), axis=0)
LABELS = np.arange(COLUMNS) // 2


class Kind(NamedTuple):
    """A problem, and what must be constant near its solution, a function of the problem and x."""

    problem: so.Problem
    active: Callable[[so.Problem, Any], Any]
    solver: Any = None  # that of `chosen_solver`
    start: Any = None


class Found(NamedTuple):
    """What `found` returns; pairs are of value and objective, with one row a leaf."""

    value: np.ndarray
    active: list[np.ndarray]
    differences: list[np.ndarray]
    tangents: list[np.ndarray]


def signs(values):
    """Of everything that is not zero up to the solver's error."""
    return jnp.sign(jnp.where(jnp.abs(values) > 1e-6, values, 0))


def of_entries(problem, x):
    """The zeros of x itself, which are exact."""
    return jnp.sign(x)


def of_rows(problem, x):
    return signs(problem.operator.mv(x))


def of_channels(problem, x):
    return jnp.any(of_rows(problem, x) != 0, axis=-1)


def of_pieces(problem, x):
    """Also which rows lie where the penalty is constant."""
    far = jnp.abs(problem.operator.mv(x)) > problem.penalty.gamma * problem.penalty.weight
    return of_rows(problem, x), far


def of_kinks(problem, x):
    return signs(problem.penalty.last.mv(problem.operator.mv(x)))


def of_groups(problem, x):
    return jnp.any(x.reshape(-1, 2) != 0, axis=1)


def of_box(problem, x):
    return jnp.stack([x == problem.penalty.low, x == problem.penalty.high, x == 0, x > 0])


def of_rank(problem, x):
    return jnp.linalg.matrix_rank(x, 1e-7)


def and_residuals(active, kinks=(0.0,)):
    """Also which side of each kink the residuals lie on."""

    def both(problem, x):
        residuals = problem.loss.image(x) - problem.loss.target
        return active(problem, x), [signs(residuals - kink) for kink in kinks]

    return both


def and_margins(problem, x):
    return jnp.sign(x), signs(problem.loss.target * problem.loss.image(x) - 1)


def regression(seed=0, shape=(ROWS,)):
    """A well-conditioned matrix, a target and weights."""
    rng = np.random.default_rng(seed)
    left, _, right = np.linalg.svd(rng.standard_normal((ROWS, COLUMNS)), full_matrices=False)
    matrix = left * rng.uniform(1, 2, COLUMNS) @ right * np.sqrt(ROWS)
    truth = rng.standard_normal((COLUMNS, *shape[1:])) * (rng.random((COLUMNS, *shape[1:])) < 0.6)
    target = matrix @ truth + rng.standard_normal(shape)
    return matrix, target, rng.uniform(0.5, 2, ROWS)


def labels(seed, low):
    """Labels are integers, in which nothing is differentiated."""
    matrix, target, weights = regression(seed)
    return matrix / 4, np.where(target > 0, 1, low), weights


def sparse_regression():
    matrix, target, weights = regression(2)
    matrix = np.where(np.random.default_rng(2).random(matrix.shape) < 0.4, matrix, 0)
    return sparse.csr_array(matrix + np.eye(ROWS, COLUMNS) * 8), target, weights


def quadratic(seed=1, shape=(COLUMNS,)):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((COLUMNS, COLUMNS)) / 3 + 2 * np.eye(COLUMNS)
    return so.Quadratic(factor.T @ factor, rng.standard_normal(shape))


def counts():
    matrix, target, weights = regression(4)
    return matrix / 8, np.round(np.exp(target / 8) * 3), weights


def graph(seed=9):
    """A ring with chords, of random weights."""
    ring = np.stack([np.arange(COLUMNS), (np.arange(COLUMNS) + 1) % COLUMNS], 1)
    edges = np.concatenate([ring, [[0, 5], [2, 7], [3, 9]]])
    return edge_base(edges, COLUMNS, np.random.default_rng(seed).uniform(0.5, 2, len(edges)), np.float64)


def split(base, order):
    """`Δ^order` as a `Split` whose metrics are integers, in which nothing is differentiated."""
    inner = Difference(base, order)
    return Split(Identity(inner.out_shape), inner, 1, 1)


def missing(weights):
    return np.where(np.arange(weights.size).reshape(weights.shape) % 11 == 5, 0, weights)


MATRIX, TARGET, WEIGHTS = regression()
GRID, CHAIN = GridBase((4, 6)), GridBase((ROWS,))
PICTURE = np.stack([TARGET, np.flip(TARGET)], 1).reshape(4, 6, 2)
KINDS = {
    "least squares, L1": Kind(so.Problem(so.LeastSquares(MATRIX, TARGET, WEIGHTS), so.L1(9.0)), of_entries),
    "least squares, L1 of differences": Kind(
        so.Problem(so.LeastSquares(MATRIX, TARGET, WEIGHTS), so.L1(6.0), DIFFERENCES), of_rows
    ),
    "least squares without a matrix, sparse operator": Kind(
        so.Problem(so.LeastSquares(None, TARGET), so.L1(0.7), sparse.csr_array(np.diff(np.eye(ROWS), 2, axis=0))),
        of_rows,
    ),
    "sparse least squares, elastic net": Kind(
        so.Problem(so.LeastSquares(*sparse_regression()), so.ElasticNet(9.0, 3.0)), of_entries
    ),
    "quadratic, groups": Kind(so.Problem(quadratic(), so.GroupL2(np.linspace(2, 8, 5), groups=LABELS)), of_groups),
    "quadratic, L1 of differences": Kind(so.Problem(quadratic(3), so.L1(1.5), DIFFERENCES), of_rows),
    "logistic, labelled groups": Kind(
        so.Problem(
            so.LogisticLoss(*labels(3, 0)),
            so.GroupL2(1.0, groups=LABELS),
        ),
        of_groups,
    ),
    "poisson, elastic net": Kind(so.Problem(so.PoissonLoss(*counts()), so.ElasticNet(2.0, 0.5)), of_entries),
    "huber, box": Kind(
        so.Problem(
            so.DataLoss(so.scalar.Huber(0.8), MATRIX, TARGET, WEIGHTS),
            so.Box(np.full(COLUMNS, -0.6), np.full(COLUMNS, 0.9), 4.0),
        ),
        and_residuals(of_box, (-0.8, 0.8)),
    ),
    "huber, L1 of differences": Kind(
        so.Problem(so.DataLoss(so.scalar.Huber(0.8), MATRIX, TARGET, WEIGHTS), so.L1(3.0), DIFFERENCES),
        and_residuals(of_rows, (-0.8, 0.8)),
    ),
    "absolute, L1": Kind(so.Problem(so.AbsoluteLoss(MATRIX, TARGET, WEIGHTS), so.L1(8.0)), and_residuals(of_entries)),
    "quantile, elastic net": Kind(
        so.Problem(so.DataLoss(so.scalar.Quantile(0.3), MATRIX, TARGET, WEIGHTS), so.ElasticNet(2.0, 3.0)),
        and_residuals(of_entries),
    ),
    "squared hinge, L1": Kind(so.Problem(so.SquaredHingeLoss(*labels(5, -1)), so.L1(1.0)), and_margins),
    "least squares, top k": Kind(so.Problem(so.LeastSquares(MATRIX, TARGET, WEIGHTS), so.TopK(5)), of_entries),
    "quadratic, L0": Kind(so.Problem(quadratic(6, (COLUMNS, 2)), so.L0(0.5)), of_entries),
    "least squares, nuclear norm": Kind(
        so.Problem(so.LeastSquares(MATRIX, regression(7, (ROWS, CHANNELS))[1], WEIGHTS), so.NuclearNorm(25.0)), of_rank
    ),
    "weighted distance, L1 of the differences of a grid": Kind(
        so.Problem(
            so.LeastSquares(None, PICTURE, WEIGHTS.reshape(4, 6)),
            so.L1(np.random.default_rng(3).uniform(0.8, 1.6, (2, 4, 6, 1))),
            Difference(GRID, 1),
        ),
        of_rows,
    ),
    "distance, groups of the second differences of a graph": Kind(
        so.Problem(
            so.LeastSquares(None, regression(7, (ROWS, 2))[1][:COLUMNS]), so.GroupL2(0.8), Difference(graph(), 2)
        ),
        of_channels,
    ),
    "distance by Admm, MCP of differences": Kind(
        so.Problem(so.LeastSquares(None, TARGET), so.MCP(0.5, 6.0), split(CHAIN, 1)),
        of_pieces,
        Admm(cosine_solve((ROWS,), (1,), np.float64), 1.0),
        Start(np.zeros(ROWS), np.zeros((1, ROWS))),
    ),
    "missing nodes by Admm, L1 of second differences": Kind(
        so.Problem(
            so.DataLoss(so.scalar.Squared(), None, TARGET.reshape(4, 6), missing(WEIGHTS.reshape(4, 6)), -50, 50),
            so.L1(0.4),
            split(GRID, 2),
        ),
        of_rows,
        Admm(ConjugateGradient(np.full((4, 6), 12.0)), 1.0),
        Start(np.zeros((4, 6)), np.zeros((4, 6))),
    ),
    "quantile loss of nodes by LossAdmm, L1 of differences": Kind(
        so.Problem(so.QuantileLoss(None, TARGET, 0.3), so.L1(0.25), split(CHAIN, 1)),
        of_rows,
        LossAdmm(
            cosine_solve((ROWS,), (1,), np.float64),
            1.0,
            cadence=10,
            sigma=1.0,
            anchor=Anchor(np.zeros((1, ROWS)), np.zeros(ROWS)),
        ),
        Start(np.zeros(ROWS), np.zeros((1, ROWS))),
    ),
    "distance by Admm, kinks of a chain": Kind(
        so.Problem(
            so.LeastSquares(None, TARGET), ChainTotalVariation(0.8, Difference(CHAIN, 1, True)), split(CHAIN, 1)
        ),
        of_kinks,
        Admm(cosine_solve((ROWS,), (1,), np.float64), 1.0),
        Start(np.zeros(ROWS), np.zeros((1, ROWS))),
    ),
}
KEPT = [
    "least squares, L1",
    "quadratic, groups",
    "poisson, elastic net",
    "huber, box",
    "least squares, top k",
    "least squares, nuclear norm",
    "weighted distance, L1 of the differences of a grid",
]
KEPT_TWICE = ["quadratic, groups"]
KEPT_BACKWARD = ["huber, box", "least squares, nuclear norm"]


@pytest.fixture(scope="module", autouse=True)
def _float64():
    with precision(np.dtype(np.float64)):
        yield


def apart(problem, kind=np.float64):
    """The leaves that are numbers, and the problem as a function of them."""
    leaves, structure = jax.tree.flatten(problem)
    moves = [not np.issubdtype(np.asarray(leaf).dtype, np.integer) for leaf in leaves]

    def rebuilt(numbers):
        rest = iter(numbers)
        return structure.unflatten([next(rest) if move else leaf for leaf, move in zip(leaves, moves, strict=True)])

    return [np.asarray(leaf, kind) for leaf, move in zip(leaves, moves, strict=True) if move], rebuilt


def solver_of(name, rebuilt, tol=0.0):
    """Value and objective at an answer that only rounding, or the step limit, ended."""

    problem, _, solver, start = KINDS[name]
    solver = solver or so.chosen_solver(problem).solver

    def solved(numbers):
        answer = so.solve(rebuilt(numbers), solver, start, tol=tol, max_steps=5000)
        return answer.value, answer.objective

    return solved


@cache
def directions(name):
    """One a leaf, `[leaves, *shape]` for every leaf: only that leaf moves; symmetrically if it is a Hessian."""
    numbers, _ = apart(KINDS[name].problem)
    rng = np.random.default_rng(8)
    moves = []
    for i, leaf in enumerate(numbers):
        move = rng.standard_normal(leaf.shape)
        if i == 0 and isinstance(KINDS[name].problem.loss, so.Quadratic):
            move = move + move.T
        alone = np.zeros((len(numbers), *leaf.shape))
        alone[i] = move
        moves.append(alone)
    return moves


@cache
def found(name):
    """Answers and active sets at the problem and at its neighbours, central differences, and our derivatives."""
    numbers, rebuilt = apart(KINDS[name].problem)
    moves, count = directions(name), len(numbers)
    steps = np.repeat([STEP, -STEP, 0.0], count)
    along = [np.concatenate([move] * 3) for move in moves]
    points = [
        leaf + steps.reshape(-1, *(1 for _ in leaf.shape)) * move for leaf, move in zip(numbers, along, strict=True)
    ]
    solved = solver_of(name, rebuilt)

    def all_of_it(x, x_dot):
        answer, tangent = jax.jvp(solved, (x,), (x_dot,))
        return answer, tangent, KINDS[name].active(rebuilt(x), answer[0])

    answers, tangents, active = jax.device_get(jax.jit(jax.vmap(all_of_it))(points, along))
    differences = [(leaf[:count] - leaf[count : 2 * count]) / (2 * STEP) for leaf in answers]
    return Found(answers[0][-1], jax.tree.leaves(active), differences, [leaf[2 * count :] for leaf in tangents])


def assert_close(ours, difference):
    """To 1e-5 of the largest entry, a leaf at a time."""
    for a, b in zip(ours, difference, strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5 * max(np.max(np.abs(b)), 1e-2)


@pytest.mark.parametrize("name", often(KINDS, *KEPT))
def test_the_derivative_of_the_answer_is_that_of_central_differences(name):
    at = found(name)
    for pattern in at.active:
        assert np.any(pattern)
        np.testing.assert_array_equal(pattern, np.broadcast_to(pattern[-1], pattern.shape))
    assert_close(at.tangents[0], at.differences[0])


@pytest.mark.parametrize("name", often(KINDS, *KEPT))
def test_the_derivative_of_the_objective_is_that_of_central_differences(name):
    assert_close(found(name).tangents[1], found(name).differences[1])


@pytest.mark.parametrize("name", ["least squares, L1", "least squares without a matrix, sparse operator"])
def test_the_objective_moves_with_the_weight_of_l1_by_the_norm_of_the_answer(name):
    at, problem = found(name), KINDS[name].problem
    norm = np.sum(np.abs(at.value if problem.operator is None else problem.operator.mv(at.value)))
    place = len(apart(problem.loss)[0])  # of the weight among the leaves
    assert at.tangents[1][place] == pytest.approx(directions(name)[place][place] * norm, rel=1e-7)


def test_behind_the_differences_of_a_grid_the_answer_moves_with_the_weighted_mean_of_each_piece():
    name = "weighted distance, L1 of the differences of a grid"
    at, move = found(name), directions(name)[0][0]
    tails, heads = (np.ravel(end) for end in GRID.ends())
    for channel in range(2):
        x, weights = at.value[..., channel], WEIGHTS.reshape(4, 6)
        joined = np.abs(x.ravel()[tails] - x.ravel()[heads]) < 1e-6
        matrix = sparse.coo_array((np.ones(joined.sum()), (tails[joined], heads[joined])), (ROWS, ROWS))
        count, labels = connected_components(matrix, directed=False)
        assert 2 < count < ROWS
        sums, over = (np.bincount(labels, v.ravel()) for v in (weights * move[..., channel], weights))
        np.testing.assert_allclose(at.tangents[0][0][..., channel].ravel(), (sums / over)[labels], atol=1e-12)


def gradient(name, kind=np.float64, tol=0.0, alone=False):
    """Of `<covector, value> + objective` in every leaf, or in the first alone, and the covector."""
    numbers, rebuilt = apart(KINDS[name].problem, kind)
    shape = jax.eval_shape(solver_of(name, rebuilt), numbers)[0].shape
    covector = np.random.default_rng(9).standard_normal(shape).astype(kind)

    def total(numbers):
        value, objective = solver_of(name, rebuilt, tol)(numbers)
        return jnp.vdot(covector, value) + objective

    if alone:
        return jax.device_get(jax.jit(jax.grad(lambda first: total([first, *numbers[1:]])))(numbers[0])), covector
    return jax.device_get(jax.jit(jax.grad(total))(numbers)), covector


def test_where_the_solver_moves_the_level_the_derivative_is_that_at_its_last_one():
    """The two largest entries stay, and only they follow the centre."""
    center, hessian = jnp.array([3.0, 0.4, -2.0, 0.3]), jnp.diag(jnp.array([1.0, 2.0, 1.5, 1.0]))

    def value(center):
        problem = so.Problem(so.Quadratic(hessian, center), so.L0(1e-4))
        return so.solve(problem, so.Maiht(target_sparsity=0.5), center, tol=-1, max_steps=60).value

    np.testing.assert_allclose(value(center), [3, 0, -2, 0], atol=1e-5)
    np.testing.assert_allclose(jax.jacfwd(value)(center), np.diag([1.0, 0, 1, 0]), atol=1e-5)


def test_with_a_level_that_the_solver_moves_the_answer_follows_the_parameters_of_the_penalty():
    center, hessian = np.array([3.0, 0.4, -2.0, 0.3]), np.diag([1.0, 2.0, 1.5, 1.0])

    def value(parameters, kind):
        problem = so.Problem(so.Quadratic(hessian, center), kind(*parameters))
        return so.solve(problem, so.Maiht(target_sparsity=0.5), center, tol=-1, max_steps=60).value

    with precision(np.dtype(np.float64)):
        for kind, parameters in ((so.L1, (0.01,)), (so.MCP, (0.01, 40.0))):
            for at in range(len(parameters)):
                move = np.eye(len(parameters))[at] * 1e-6 * parameters[at]
                near = [value(tuple(parameters + sign * move), kind) for sign in (1, -1)]
                difference = (near[0] - near[1]) / (2 * move[at])
                slope = jax.jacfwd(
                    lambda p, at=at, kind=kind, rest=parameters: value((*rest[:at], p, *rest[at + 1 :]), kind)
                )
                np.testing.assert_allclose(slope(parameters[at]), difference, rtol=1e-4, atol=1e-4)


def together(name):
    """The numbers, the problem as a function of them, and a direction that moves them all, small where they are."""
    numbers, rebuilt = apart(KINDS[name].problem)
    return numbers, rebuilt, [move[i] for i, move in enumerate(directions(name))]


@pytest.mark.parametrize("name", often(KINDS, *KEPT_TWICE))
def test_the_second_derivatives_are_those_of_central_differences(name):
    """Along one direction, in which all leaves move, of the answer and of the objective."""
    numbers, rebuilt, move = together(name)
    solved = solver_of(name, rebuilt)

    def along(numbers):
        return jax.jvp(solved, (numbers,), (move,))[1]

    def all_of_it(place):
        at = [leaf + place * step for leaf, step in zip(numbers, move, strict=True)]
        return KINDS[name].active(rebuilt(at), solved(at)[0]), *jax.jvp(along, (at,), (move,))

    active, first, second = jax.device_get(jax.jit(jax.vmap(all_of_it))(np.array([STEP, -STEP, 0])))
    for pattern in jax.tree.leaves(active):
        np.testing.assert_array_equal(pattern, np.broadcast_to(pattern[-1], pattern.shape))
    for near, exact in zip(first, second, strict=True):
        difference = (near[0] - near[1]) / (2 * STEP)
        np.testing.assert_allclose(exact[2], difference, atol=2e-5 * max(np.max(np.abs(difference)), 1e-2))


def test_the_second_derivative_of_ridge_regression_in_the_ridge_is_its_closed_form():
    matrix, target, _ = regression()

    def total(ridge):
        problem = so.Problem(so.LeastSquares(matrix, target), so.ElasticNet(0.0, ridge))
        return so.solve(problem, tol=1e-14).value.sum()

    inverse = np.linalg.inv(matrix.T @ matrix + 0.3 * np.eye(COLUMNS))
    exact = 2 * np.sum(inverse @ inverse @ inverse @ matrix.T @ target)
    assert float(jax.grad(jax.grad(total))(0.3)) == pytest.approx(exact, rel=1e-9)


def test_the_hessian_of_a_held_out_error_of_the_lasso_is_its_closed_form():
    """On the active set S the answer is affine in the weight: its slope is `-(A_Sᵀ A_S)^-1 sign`."""
    matrix, target, _ = regression()
    held_out, wanted, _ = regression(1)

    def error(weight):
        value = so.solve(so.Problem(so.LeastSquares(matrix, target), so.L1(weight)), tol=1e-14).value
        return jnp.mean((held_out @ value - wanted) ** 2), value

    second, value = jax.hessian(error, has_aux=True)(12.0)
    active = np.asarray(value) != 0
    assert 0 < active.sum() < COLUMNS
    kept = matrix[:, active]
    slope = -np.linalg.solve(kept.T @ kept, np.sign(value[active]))
    assert second == pytest.approx(2 * np.mean((held_out[:, active] @ slope) ** 2), rel=1e-9)


def test_the_second_derivatives_of_a_trend_filter_are_those_of_means():
    """Of a chain in two pieces: each is its weighted mean, moved by the weight over the weights of the piece."""
    y, weights = np.array([0.0, 0.2, 0.1, 3.1, 3.0, 3.2]), np.array([1.0, 2.0, 1.0, 1.0, 1.0, 2.0])
    solver = so.trend_solver(so.Graph.chain(6), order=0)

    def value(numbers):
        return solver(y, so.L1(numbers[0]), node_weights=numbers[1:], tol=1e-12).value

    def of_means(numbers):
        pieces = numbers[1:].reshape(2, 3)
        sums = jnp.sum(pieces * y.reshape(2, 3), axis=1) + numbers[0] * jnp.array([1, -1])
        return jnp.repeat(sums / jnp.sum(pieces, axis=1), 3)

    numbers = jnp.array([0.5, *weights])
    np.testing.assert_allclose(value(numbers), of_means(numbers), atol=1e-9)
    np.testing.assert_allclose(jax.hessian(value)(numbers), jax.hessian(of_means)(numbers), atol=1e-9)


def test_a_first_derivative_takes_one_linear_solve():
    def solves(jaxpr):
        """Not those that a linear solve makes within it."""
        here = [eqn.primitive.name == "custom_linear_solve" for eqn in jaxpr.eqns]
        rest = [eqn.params for eqn, it in zip(jaxpr.eqns, here, strict=True) if not it]
        return sum(here) + sum(solves(inner) for params in rest for inner in jaxprs_in_params(params))

    matrix, target, _ = regression()
    for loss, operator in (
        (so.LeastSquares(matrix, target), None),
        (so.LeastSquares(matrix, target), DIFFERENCES),
        (so.LeastSquares(None, target[:COLUMNS]), DIFFERENCES),
        (so.AbsoluteLoss(matrix, target), DIFFERENCES),
    ):

        def total(weight, loss=loss, operator=operator):
            return so.solve(so.Problem(loss, so.L1(weight), operator)).value.sum()

        plain, moved = (jax.make_jaxpr(f)(1.0).jaxpr for f in (total, lambda w, f=total: jax.jvp(f, (w,), (w,))))
        assert solves(moved) == solves(plain) + 1


@pytest.mark.parametrize("name", often(KINDS, *KEPT_BACKWARD))
def test_backward_derivatives_are_the_transposes_of_forward_ones(name):
    at, (leaves, covector) = found(name), gradient(name)
    for i, leaf in enumerate(leaves):
        forward = np.vdot(covector, at.tangents[0][i]) + at.tangents[1][i]
        backward = np.vdot(leaf, directions(name)[i][i])
        assert backward == pytest.approx(forward, rel=1e-6, abs=1e-6)


def test_the_gradient_in_one_leaf_is_that_among_all():
    name = "missing nodes by Admm, L1 of second differences"
    (first, *_), _ = gradient(name)
    np.testing.assert_allclose(gradient(name, alone=True)[0], first, atol=1e-9 * np.max(np.abs(first)))


@pytest.mark.parametrize(
    "name", often(["least squares, L1", "least squares without a matrix, sparse operator"], "least squares, L1")
)
def test_a_gradient_in_float32_is_close_to_that_in_float64(name):
    (narrow, _), (wide, _) = gradient(name, np.float32, 1e-6), gradient(name)
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=2e-3 * np.max(np.abs(b)))
