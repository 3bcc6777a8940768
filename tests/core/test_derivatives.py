"""Derivatives of `solve` in every leaf of a problem against central differences in float64.

One program per kind solves the problem and its neighbours in a random direction of each leaf, and differentiates.
The solves run until rounding stops them, so that errors do not dominate the difference of two answers.
"""

import dataclasses
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import sparseopt as so
from sparseopt.core.operators.differences import Difference, GridBase, edge_base
from sparseopt.core.operators.normal_solves import ConjugateGradient
from sparseopt.core.problem.problem import Start
from sparseopt.core.solvers.admm import Admm
from sparseopt.core.solvers.loss_admm import LossAdmm
from tests.core import problems
from tests.core.problems import made
from tests.core.regression import on_chain, split
from tests.tiers import often

ROWS, COLUMNS, CHANNELS = 24, 10, 4
STEP = 1e-5
DIFFERENCES = np.diff(np.eye(COLUMNS), axis=0)


class Kind(NamedTuple):
    """A problem, the solver, None for that of `chosen_solver`, and where it starts."""

    problem: so.Problem
    solver: Any = None
    start: Any = None


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


def graph():
    """A ring with chords, of random weights."""
    ring = np.stack([np.arange(COLUMNS), (np.arange(COLUMNS) + 1) % COLUMNS], 1)
    edges = np.concatenate([ring, [[0, 5], [2, 7], [3, 9]]])
    return edge_base(edges, COLUMNS, np.random.default_rng(9).uniform(0.5, 2, len(edges)), np.float64)


MATRIX, TARGET, WEIGHTS = regression()
WIDE, PAIRS = regression(7, (ROWS, CHANNELS))[1], regression(7, (ROWS, 2))[1][:COLUMNS]
GRID = GridBase((4, 6))
PICTURE, LEVELS = np.stack([TARGET, np.flip(TARGET)], 1).reshape(4, 6, 2), np.linspace(0.8, 1.6, 48)
SEEN = np.where(np.arange(ROWS) % 11 == 5, 0, WEIGHTS).reshape(4, 6)
OF_PIXELS = so.DataLoss(so.scalar.Squared(), None, TARGET.reshape(4, 6), SEEN, -50, 50)
PROBLEMS = {
    "least squares, top k": (so.LeastSquares(MATRIX, TARGET, WEIGHTS), so.TopK(5)),
    "quadratic, L0": (so.Quadratic(MATRIX.T @ MATRIX / 8, PAIRS), so.L0(0.5)),
    "least squares, nuclear norm": (so.LeastSquares(MATRIX, WIDE, WEIGHTS), so.NuclearNorm(25.0)),
    "weighted distance, L1 of the differences of a grid": (
        so.LeastSquares(None, PICTURE, WEIGHTS.reshape(4, 6)),
        so.L1(LEVELS.reshape(2, 4, 6, 1)),
        Difference(GRID, 1),
    ),
    "distance, groups of the second differences of a graph": (
        so.LeastSquares(None, PAIRS),
        so.GroupL2(0.8),
        Difference(graph(), 2),
    ),
}
SPECIAL = {name: Kind(so.Problem(*parts)) for name, parts in PROBLEMS.items()} | {
    "distance by Admm, MCP of differences": Kind(*on_chain(so.LeastSquares(None, TARGET), so.MCP(0.5, 6.0))),
    "quantile loss of nodes by LossAdmm, L1 of differences": Kind(
        *on_chain(so.QuantileLoss(None, TARGET, 0.3), so.L1(0.25), LossAdmm, cadence=10, sigma=1.0)
    ),
    "missing nodes by Admm, L1 of second differences": Kind(
        so.Problem(OF_PIXELS, so.L1(0.4), split(GRID, 2)),
        Admm(ConjugateGradient(np.full((4, 6), 12.0)), 1.0),
        Start(np.zeros((4, 6)), np.zeros((4, 6))),
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
BOX = "huber, box, dense"
KEPT = [GROUPS, "poisson, elastic net, dense", BOX, "least squares, top k", "least squares, nuclear norm"]
KEPT += ["weighted distance, L1 of the differences of a grid"]


@cache
def kind_of(name):
    return SPECIAL[name] if name in SPECIAL else drawn(name)


pytestmark = pytest.mark.usefixtures("double")


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


@cache
def found(name):
    """Central differences of answer and objective, and our derivatives of both, with one row a leaf.

    Near the answer the active set must not change, and here it does not.
    """
    numbers, rebuilt = apart(kind_of(name).problem)
    moves, count = directions(name), len(numbers)
    steps = np.repeat([STEP, -STEP, 0.0], count)
    along = [np.concatenate([move] * 3) for move in moves]
    points = [
        leaf + steps.reshape(-1, *(1 for _ in leaf.shape)) * move for leaf, move in zip(numbers, along, strict=True)
    ]
    solved = solver_of(name, rebuilt)
    answers, tangents = jax.device_get(
        jax.jit(jax.vmap(lambda at, move: jax.jvp(solved, (at,), (move,))))(points, along)
    )
    assert np.any(answers[0][-1])
    differences = [(leaf[:count] - leaf[count : 2 * count]) / (2 * STEP) for leaf in answers]
    return differences, [leaf[2 * count :] for leaf in tangents]


@pytest.mark.parametrize("name", often(KINDS, *KEPT))
def test_the_derivatives_of_answer_and_objective_are_those_of_central_differences(name):
    # To 1e-5 of the largest entry, a leaf at a time.
    for near, ours in zip(*found(name), strict=True):
        for a, b in zip(ours, near, strict=True):
            assert np.max(np.abs(a - b)) <= 1e-5 * max(np.max(np.abs(b)), 1e-2)


@cache
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


@pytest.mark.parametrize("name", often(KINDS, BOX))
def test_backward_derivatives_are_the_transposes_of_forward_ones(name):
    (values, objectives), (leaves, covector) = found(name)[1], gradient(name)
    for i, leaf in enumerate(leaves):
        forward = np.vdot(covector, values[i]) + objectives[i]
        backward = np.vdot(leaf, directions(name)[i][i])
        assert backward == pytest.approx(forward, rel=1e-6, abs=1e-6)


def test_the_gradient_in_one_leaf_is_that_among_all():
    (first, *_), _ = gradient(BOX)
    np.testing.assert_allclose(gradient(BOX, alone=True)[0][0], first, atol=1e-9 * np.max(np.abs(first)))


def test_the_gradient_in_a_whole_problem_passes_over_its_labels():
    whole = jax.grad(lambda problem: so.solve(problem, tol=1e-12).value.sum(), allow_int=True)(kind_of(GROUPS).problem)
    forward = found(GROUPS)[1][0][-1].sum()
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

    def both(place):
        at = [leaf + place * step for leaf, step in zip(numbers, move, strict=True)]
        return jax.jvp(along, (at,), (move,))

    first, second = jax.device_get(jax.jit(jax.vmap(both))(np.array([STEP, -STEP, 0])))
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

    @jax.jit
    @partial(jax.jacfwd, has_aux=True)
    def of_center(center):
        return (value := at_its_own_level(so.L0(1e-4), center)), value

    slopes, value = of_center(CENTER)
    np.testing.assert_allclose(value, [3, 0, -2, 0], atol=1e-5)
    np.testing.assert_allclose(slopes, np.diag([1.0, 0, 1, 0]), atol=1e-5)

    @jax.jit
    @partial(jax.jacfwd, has_aux=True)
    def of_parameters(given):
        return (value := at_its_own_level(so.MCP(*given))), value

    parameters = np.array([0.01, 40.0])
    slopes, _ = of_parameters(parameters)
    for at, move in enumerate(np.diag(1e-6 * parameters)):
        ahead, behind = (of_parameters(parameters + sign * move)[1] for sign in (1, -1))
        np.testing.assert_allclose(slopes[:, at], (ahead - behind) / (2 * move[at]), rtol=1e-4, atol=1e-4)


def test_the_hessian_of_a_held_out_error_of_the_lasso_is_its_closed_form():
    """On the active set S the answer is affine in the weight: its slope is `-(A_Sᵀ A_S)^-1 sign`."""
    held_out, wanted, _ = regression(1)

    def error(weight):
        value = so.solve(so.Problem(so.LeastSquares(MATRIX, TARGET), so.L1(weight)), tol=1e-14).value
        return jnp.mean((held_out @ value - wanted) ** 2), value

    second, value = jax.jit(jax.hessian(error, has_aux=True))(12.0)
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

    def twice(function):
        """Value and derivatives along one direction."""
        numbers, along = (jnp.array([0.5, *weights]),), (jnp.linspace(0.5, 2, 7),)
        return jnp.stack(jax.tree.leaves(jax.jvp(lambda at: jax.jvp(function, (at,), along), numbers, along)))

    twice = jax.jit(twice, static_argnums=0)
    np.testing.assert_allclose(twice(value), twice(of_means), atol=1e-9)


def test_a_first_derivative_takes_one_linear_solve():
    def solves(jaxpr):
        """Not those that a linear solve makes within it."""
        here = [eqn.primitive.name == "custom_linear_solve" for eqn in jaxpr.eqns]
        rest = [eqn.params for eqn, it in zip(jaxpr.eqns, here, strict=True) if not it]
        return sum(here) + sum(solves(inner) for params in rest for inner in jaxprs_in_params(params))

    for loss, operator in (
        (so.LeastSquares(MATRIX, TARGET), None),
        (so.AbsoluteLoss(MATRIX, TARGET), DIFFERENCES),
    ):

        def total(weight, loss=loss, operator=operator):
            return so.solve(so.Problem(loss, so.L1(weight), operator)).value.sum()

        plain, moved = (jax.make_jaxpr(f)(1.0).jaxpr for f in (total, lambda w, f=total: jax.jvp(f, (w,), (w,))))
        assert solves(moved) == solves(plain) + 1
