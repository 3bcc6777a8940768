"""Derivatives of `solve` in every leaf of a problem against central differences in float64.

One program per kind solves the problem and its neighbours in a random direction of each leaf, and differentiates.
The solves run until rounding stops them, so that errors do not dominate the difference of two answers.
"""

import dataclasses
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
from tests.core import problems
from tests.core.problems import made
from tests.tiers import often

ROWS, COLUMNS, CHANNELS = 24, 10, 4
STEP = 1e-5
DIFFERENCES = np.diff(np.eye(COLUMNS), axis=0)


class Kind(NamedTuple):
    """A problem, the solver, None for that of `chosen_solver`, and where it starts."""

    problem: so.Problem
    solver: Any = None
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


def active(problem, x):
    """What must be constant near a solution: zeros and signs, the pieces of the penalty, the sides of all kinks."""
    loss, penalty = problem.loss, problem.penalty
    if isinstance(penalty, so.NuclearNorm):
        return [jnp.linalg.matrix_rank(x, 1e-7)]
    if problem.operator is None:
        parts = [jnp.sign(x)]  # the zeros of x itself are exact
    else:
        rows = problem.operator.mv(x)
        parts = [signs(penalty.last.mv(rows) if isinstance(penalty, ChainTotalVariation) else rows)]
    if isinstance(penalty, so.MCP):
        parts.append(jnp.abs(rows) > penalty.gamma * penalty.weight)
    if isinstance(penalty, so.Box):
        parts.append(jnp.stack([x == penalty.low, x == penalty.high, x == 0]))
    kind = getattr(loss, "scalar", None)
    if isinstance(kind, so.scalar.SquaredHinge):
        parts.append(signs(loss.target * loss.image(x) - 1))
    elif isinstance(kind, so.scalar.Huber | so.scalar.Absolute | so.scalar.Quantile):
        for kink in (-kind.delta, kind.delta) if isinstance(kind, so.scalar.Huber) else (0.0,):
            parts.append(signs(loss.image(x) - loss.target - kink))
    return parts


def regression(seed=0, shape=(ROWS,)):
    """A well-conditioned matrix, a target and weights."""
    rng = np.random.default_rng(seed)
    left, _, right = np.linalg.svd(rng.standard_normal((ROWS, COLUMNS)), full_matrices=False)
    matrix = left * rng.uniform(1, 2, COLUMNS) @ right * np.sqrt(ROWS)
    truth = rng.standard_normal((COLUMNS, *shape[1:])) * (rng.random((COLUMNS, *shape[1:])) < 0.6)
    target = matrix @ truth + rng.standard_normal(shape)
    return matrix, target, rng.uniform(0.5, 2, ROWS)


def drawn(name):
    """One of the random problems; labels are integers, in which nothing is differentiated, and all counts positive."""
    problem = made(problems.KINDS[name], 3)[0][0]
    kind = getattr(problem.loss, "scalar", None)
    if isinstance(kind, so.scalar.Logistic | so.scalar.SquaredHinge):
        target = problem.loss.target.astype(int)
    elif isinstance(kind, so.scalar.Poisson):
        target = problem.loss.target + 1
    else:
        return Kind(problem)
    return Kind(dataclasses.replace(problem, loss=dataclasses.replace(problem.loss, target=target)))


def graph(seed=9):
    """A ring with chords, of random weights."""
    ring = np.stack([np.arange(COLUMNS), (np.arange(COLUMNS) + 1) % COLUMNS], 1)
    edges = np.concatenate([ring, [[0, 5], [2, 7], [3, 9]]])
    return edge_base(edges, COLUMNS, np.random.default_rng(seed).uniform(0.5, 2, len(edges)), np.float64)


def split(base, order):
    """`Δ^order` as a `Split` whose metrics are integers, in which nothing is differentiated."""
    inner = Difference(base, order)
    return Split(Identity(inner.out_shape), inner, 1, 1)


MATRIX, TARGET, WEIGHTS = regression()
WIDE = regression(7, (ROWS, CHANNELS))[1]
GRID, CHAIN = GridBase((4, 6)), GridBase((ROWS,))
PICTURE = np.stack([TARGET, np.flip(TARGET)], 1).reshape(4, 6, 2)
ON_CHAIN, COSINES = split(CHAIN, 1), cosine_solve((ROWS,), (1,), np.float64)
FROM_ZERO = Start(np.zeros(ROWS), np.zeros((1, ROWS)))
SEEN = np.where(np.arange(ROWS) % 11 == 5, 0, WEIGHTS).reshape(4, 6)
SPECIAL = {
    "least squares, top k": Kind(so.Problem(so.LeastSquares(MATRIX, TARGET, WEIGHTS), so.TopK(5))),
    "quadratic, L0": Kind(
        so.Problem(so.Quadratic(MATRIX.T @ MATRIX / 8, regression(6, (ROWS, 2))[1][:COLUMNS]), so.L0(0.5))
    ),
    "least squares, nuclear norm": Kind(so.Problem(so.LeastSquares(MATRIX, WIDE, WEIGHTS), so.NuclearNorm(25.0))),
    "weighted distance, L1 of the differences of a grid": Kind(
        so.Problem(
            so.LeastSquares(None, PICTURE, WEIGHTS.reshape(4, 6)),
            so.L1(np.random.default_rng(3).uniform(0.8, 1.6, (2, 4, 6, 1))),
            Difference(GRID, 1),
        )
    ),
    "distance, groups of the second differences of a graph": Kind(
        so.Problem(
            so.LeastSquares(None, regression(7, (ROWS, 2))[1][:COLUMNS]), so.GroupL2(0.8), Difference(graph(), 2)
        )
    ),
    "distance by Admm, MCP of differences": Kind(
        so.Problem(so.LeastSquares(None, TARGET), so.MCP(0.5, 6.0), ON_CHAIN), Admm(COSINES, 1.0), FROM_ZERO
    ),
    "missing nodes by Admm, L1 of second differences": Kind(
        so.Problem(
            so.DataLoss(so.scalar.Squared(), None, TARGET.reshape(4, 6), SEEN, -50, 50), so.L1(0.4), split(GRID, 2)
        ),
        Admm(ConjugateGradient(np.full((4, 6), 12.0)), 1.0),
        Start(np.zeros((4, 6)), np.zeros((4, 6))),
    ),
    "quantile loss of nodes by LossAdmm, L1 of differences": Kind(
        so.Problem(so.QuantileLoss(None, TARGET, 0.3), so.L1(0.25), ON_CHAIN),
        LossAdmm(COSINES, 1.0, cadence=10, sigma=1.0, anchor=Anchor(np.zeros((1, ROWS)), np.zeros(ROWS))),
        FROM_ZERO,
    ),
    "distance by Admm, kinks of a chain": Kind(
        so.Problem(so.LeastSquares(None, TARGET), ChainTotalVariation(0.8, Difference(CHAIN, 1, True)), ON_CHAIN),
        Admm(COSINES, 1.0),
        FROM_ZERO,
    ),
}
L1, BENT, GROUPS = "squares, L1, dense", "squares, L1, of bends, no matrix", "quadratic, groups, dense"
DRAWN = [
    L1,
    BENT,
    GROUPS,
    "squares, L1, of differences, dense",
    "squares, elastic net, sparse",
    "quadratic, L1, of differences, dense",
    "logistic, sparse groups, dense",
    "poisson, elastic net, dense",
    "huber, box, dense",
    "huber, L1, of differences, dense",
    "absolute, L1, dense",
    "quantile, elastic net, dense",
    "squared hinge, L1, dense",
]
KINDS = [*DRAWN, *SPECIAL]
ON_GRID = "weighted distance, L1 of the differences of a grid"
KEPT_BACKWARD = ["huber, box, dense", "least squares, nuclear norm"]
KEPT = [L1, GROUPS, "poisson, elastic net, dense", *KEPT_BACKWARD, "least squares, top k", ON_GRID]


@cache
def kind_of(name):
    return SPECIAL[name] if name in SPECIAL else drawn(name)


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
    problem, solver, start = kind_of(name)
    solver = solver or so.chosen_solver(problem).solver

    def solved(numbers):
        answer = so.solve(rebuilt(numbers), solver, start, tol=tol, max_steps=5000)
        return answer.value, answer.objective

    return solved


@cache
def directions(name):
    """One a leaf, `[leaves, *shape]` for every leaf: only that leaf moves; symmetrically if it is a Hessian."""
    numbers, _ = apart(kind_of(name).problem)
    rng = np.random.default_rng(8)
    moves = []
    for i, leaf in enumerate(numbers):
        move = rng.standard_normal(leaf.shape)
        if i == 0 and isinstance(kind_of(name).problem.loss, so.Quadratic):
            move = move + move.T
        alone = np.zeros((len(numbers), *leaf.shape))
        alone[i] = move
        moves.append(alone)
    return moves


def assert_constant(patterns):
    for pattern in jax.tree.leaves(patterns):
        np.testing.assert_array_equal(pattern, np.broadcast_to(pattern[-1], pattern.shape))


@cache
def found(name):
    """Answers and active sets at the problem and at its neighbours, central differences, and our derivatives."""
    numbers, rebuilt = apart(kind_of(name).problem)
    moves, count = directions(name), len(numbers)
    steps = np.repeat([STEP, -STEP, 0.0], count)
    along = [np.concatenate([move] * 3) for move in moves]
    points = [
        leaf + steps.reshape(-1, *(1 for _ in leaf.shape)) * move for leaf, move in zip(numbers, along, strict=True)
    ]
    solved = solver_of(name, rebuilt)

    def all_of_it(x, x_dot):
        answer, tangent = jax.jvp(solved, (x,), (x_dot,))
        return answer, tangent, active(rebuilt(x), answer[0])

    answers, tangents, patterns = jax.device_get(jax.jit(jax.vmap(all_of_it))(points, along))
    differences = [(leaf[:count] - leaf[count : 2 * count]) / (2 * STEP) for leaf in answers]
    return Found(answers[0][-1], patterns, differences, [leaf[2 * count :] for leaf in tangents])


@pytest.mark.parametrize("name", often(KINDS, *KEPT))
def test_the_derivatives_of_answer_and_objective_are_those_of_central_differences(name):
    at = found(name)
    assert all(np.any(pattern) for pattern in at.active)
    assert_constant(at.active)
    # To 1e-5 of the largest entry, a leaf at a time.
    for ours, differences in zip(at.tangents, at.differences, strict=True):
        for a, b in zip(ours, differences, strict=True):
            assert np.max(np.abs(a - b)) <= 1e-5 * max(np.max(np.abs(b)), 1e-2)


@pytest.mark.parametrize("name", [L1, BENT])
def test_the_objective_moves_with_the_weight_of_l1_by_the_norm_of_the_answer(name):
    at, problem = found(name), kind_of(name).problem
    rows = at.value if problem.operator is None else problem.operator.mv(at.value)
    place = len(apart(problem.loss)[0])  # of the weight among the leaves
    norms = np.sum(directions(name)[place][place] * np.abs(rows))
    assert at.tangents[1][place] == pytest.approx(norms, rel=1e-7)


def test_behind_the_differences_of_a_grid_the_answer_moves_with_the_weighted_mean_of_each_piece():
    at, move = found(ON_GRID), directions(ON_GRID)[0][0]
    tails, heads = (np.ravel(end) for end in GRID.ends())
    for channel in range(2):
        x, weights = at.value[..., channel], WEIGHTS.reshape(4, 6)
        joined = np.abs(x.ravel()[tails] - x.ravel()[heads]) < 1e-6
        matrix = sparse.coo_array((np.ones(joined.sum()), (tails[joined], heads[joined])), (ROWS, ROWS))
        count, pieces = connected_components(matrix, directed=False)
        assert 2 < count < ROWS
        sums, over = (np.bincount(pieces, v.ravel()) for v in (weights * move[..., channel], weights))
        np.testing.assert_allclose(at.tangents[0][0][..., channel].ravel(), (sums / over)[pieces], atol=1e-12)


def gradient(name, kind=np.float64, tol=0.0, alone=False):
    """Of `<covector, value> + objective` in every leaf, or in the first alone, and the covector."""
    numbers, rebuilt = apart(kind_of(name).problem, kind)
    shape = jax.eval_shape(solver_of(name, rebuilt), numbers)[0].shape
    covector = np.random.default_rng(9).standard_normal(shape).astype(kind)

    def total(numbers):
        value, objective = solver_of(name, rebuilt, tol)([*numbers, *rest])
        return jnp.vdot(covector, value) + objective

    given, rest = (numbers[:1], numbers[1:]) if alone else (numbers, [])
    return jax.device_get(jax.jit(jax.grad(total))(given)), covector


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
    np.testing.assert_allclose(gradient(name, alone=True)[0][0], first, atol=1e-9 * np.max(np.abs(first)))


def test_the_gradient_in_a_whole_problem_passes_over_its_labels():
    whole = jax.grad(lambda problem: so.solve(problem, tol=1e-12).value.sum(), allow_int=True)(kind_of(GROUPS).problem)
    forward = found(GROUPS).tangents[0][-1].sum()
    assert np.vdot(whole.penalty.weight, directions(GROUPS)[-1][-1]) == pytest.approx(forward, rel=1e-5)


@pytest.mark.parametrize("name", often([L1, BENT], L1))
def test_a_gradient_in_float32_is_close_to_that_in_float64(name):
    (narrow, _), (wide, _) = gradient(name, np.float32, 1e-6), gradient(name)
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=2e-3 * np.max(np.abs(b)))


@pytest.mark.parametrize("name", often(KINDS, GROUPS))
def test_the_second_derivatives_are_those_of_central_differences(name):
    """Along one direction, in which all leaves move, of the answer and of the objective."""
    numbers, rebuilt = apart(kind_of(name).problem)
    move, solved = [move[i] for i, move in enumerate(directions(name))], solver_of(name, rebuilt)

    def along(numbers):
        return jax.jvp(solved, (numbers,), (move,))[1]

    def all_of_it(place):
        at = [leaf + place * step for leaf, step in zip(numbers, move, strict=True)]
        return active(rebuilt(at), solved(at)[0]), *jax.jvp(along, (at,), (move,))

    patterns, first, second = jax.device_get(jax.jit(jax.vmap(all_of_it))(np.array([STEP, -STEP, 0])))
    assert_constant(patterns)
    for near, exact in zip(first, second, strict=True):
        difference = (near[0] - near[1]) / (2 * STEP)
        np.testing.assert_allclose(exact[2], difference, atol=2e-5 * max(np.max(np.abs(difference)), 1e-2))


CENTER, HESSIAN = np.array([3.0, 0.4, -2.0, 0.3]), np.diag([1.0, 2.0, 1.5, 1.0])


def at_its_own_level(penalty, center=CENTER):
    """By a solver that moves the level until half of the entries are 0."""
    problem = so.Problem(so.Quadratic(HESSIAN, center), penalty)
    return so.solve(problem, so.Maiht(target_sparsity=0.5), center, tol=-1, max_steps=60).value


def test_where_the_solver_moves_the_level_the_derivative_is_that_at_its_last_one():
    """The two largest entries stay, and only they follow the centre; the answer follows the penalty's parameters."""

    def value(center):
        return at_its_own_level(so.L0(1e-4), center)

    np.testing.assert_allclose(value(jnp.array(CENTER)), [3, 0, -2, 0], atol=1e-5)
    np.testing.assert_allclose(jax.jacfwd(value)(jnp.array(CENTER)), np.diag([1.0, 0, 1, 0]), atol=1e-5)
    for kind, parameters in ((so.L1, (0.01,)), (so.MCP, (0.01, 40.0))):
        slopes = jax.jacfwd(lambda given, kind=kind: at_its_own_level(kind(*given)))(jnp.array(parameters))
        for at, parameter in enumerate(parameters):
            move = np.eye(len(parameters))[at] * 1e-6 * parameter
            ahead, behind = (at_its_own_level(kind(*(parameters + sign * move))) for sign in (1, -1))
            np.testing.assert_allclose(slopes[:, at], (ahead - behind) / (2 * move[at]), rtol=1e-4, atol=1e-4)


def test_the_second_derivative_of_ridge_regression_in_the_ridge_is_its_closed_form():
    def total(ridge):
        problem = so.Problem(so.LeastSquares(MATRIX, TARGET), so.ElasticNet(0.0, ridge))
        return so.solve(problem, tol=1e-14).value.sum()

    inverse = np.linalg.inv(MATRIX.T @ MATRIX + 0.3 * np.eye(COLUMNS))
    exact = 2 * np.sum(inverse @ inverse @ inverse @ MATRIX.T @ TARGET)
    assert float(jax.grad(jax.grad(total))(0.3)) == pytest.approx(exact, rel=1e-9)


def test_the_hessian_of_a_held_out_error_of_the_lasso_is_its_closed_form():
    """On the active set S the answer is affine in the weight: its slope is `-(A_Sᵀ A_S)^-1 sign`."""
    held_out, wanted, _ = regression(1)

    def error(weight):
        value = so.solve(so.Problem(so.LeastSquares(MATRIX, TARGET), so.L1(weight)), tol=1e-14).value
        return jnp.mean((held_out @ value - wanted) ** 2), value

    second, value = jax.hessian(error, has_aux=True)(12.0)
    kept = np.asarray(value) != 0
    assert 0 < kept.sum() < COLUMNS
    slope = -np.linalg.solve(MATRIX[:, kept].T @ MATRIX[:, kept], np.sign(value[kept]))
    assert second == pytest.approx(2 * np.mean((held_out[:, kept] @ slope) ** 2), rel=1e-9)


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

    for loss, operator in (
        (so.LeastSquares(MATRIX, TARGET), None),
        (so.LeastSquares(MATRIX, TARGET), DIFFERENCES),
        (so.LeastSquares(None, TARGET[:COLUMNS]), DIFFERENCES),
        (so.AbsoluteLoss(MATRIX, TARGET), DIFFERENCES),
    ):

        def total(weight, loss=loss, operator=operator):
            return so.solve(so.Problem(loss, so.L1(weight), operator)).value.sum()

        plain, moved = (jax.make_jaxpr(f)(1.0).jaxpr for f in (total, lambda w, f=total: jax.jvp(f, (w,), (w,))))
        assert solves(moved) == solves(plain) + 1
