"""What the core rejects before any work: a ValueError that names what is wrong and what was given.

Each row of a table: what is given, and words of the error.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO
from scipy import sparse
from scipy.sparse.linalg import aslinearoperator

import sparseopt as so
from sparseopt.core.base.thresholds import n_of_m_mask
from sparseopt.core.operators.differences import Difference, GridBase
from sparseopt.core.operators.maps import Split
from sparseopt.core.operators.row_tables import check_groups
from sparseopt.core.solvers.admm import Admm
from sparseopt.core.solvers.loss_admm import LossAdmm
from sparseopt.layers.methods.admm import QuadraticAdmm
from sparseopt.layers.methods.splice import Splice
from tests.core.regression import COLUMNS, LABELS, MATRIX, ROWS, SQUARES, TARGET, ImageGradient, OwnSquares


@so.pytree
class NoTranspose(ImageGradient):
    def rmv(self, e):
        return -super().rmv(e)


@so.pytree
class ValueOnly:
    def value(self, x):
        return jnp.sum(x)


class PlainPenalty(ValueOnly):
    def prox(self, x, step):
        return x - step


@so.pytree
class Silent(PlainPenalty):
    """A penalty that does not say whether it is separable."""


class PlainMap:
    def mv(self, x):
        return x

    rmv = mv


class Bad(NamedTuple):
    """A problem, which is good where nothing is said, and how it is solved."""

    loss: Any = SQUARES
    penalty: Any = so.L1(1.0)
    operator: Any = None
    solver: Any = None
    start: Any = None

    @property
    def problem(self):
        return so.Problem(self.loss, self.penalty, self.operator)


def of(part, *rows):
    return [(Bad(**{part: given}), *words) for given, *words in rows]


APG, PD, ADMM, SET = so.AcceleratedProximalGradient(), so.PrimalDual(), so.SplitAdmm(), so.WorkingSet()
OWN, ZERO, ONES = OwnSquares(MATRIX, TARGET), np.zeros(COLUMNS), np.ones(COLUMNS)
QUADRATIC, CHAIN = so.Quadratic(np.eye(COLUMNS), ZERO), Difference(GridBase((COLUMNS,)), 1)
TAKEN_APART, OF_LOSS = Split(CHAIN, CHAIN, 1.0, 1.0), LossAdmm(None, 1.0, sigma=1.0, anchor=None)
BOTH_SIDES = np.vstack([np.eye(COLUMNS), -np.eye(COLUMNS)])
ONE_NAN = np.where(np.arange(ROWS * COLUMNS).reshape(ROWS, -1) == 38, np.nan, MATRIX)
IMAGES = so.LeastSquares(None, np.zeros((4, 3)))


def of_data(scalar, target=TARGET):
    return so.DataLoss(scalar, MATRIX, target)


def squares(target=TARGET, weights=None, matrix=MATRIX):
    return so.LeastSquares(matrix, target, weights)


# What only known numbers tell: under jit it is not looked at.
VALUES = of(
    "loss",
    (so.PoissonLoss(MATRIX, -np.ones(ROWS)), "Poisson needs counts", "given -1 at target 0 (30 such)"),
    (of_data(so.scalar.Logistic(), np.r_[LABELS[:-1], 2.0]), "Logistic needs labels", "2 at target 29 (1 such)"),
    (squares(np.r_[np.nan, TARGET[1:]]), "needs finite numbers", "given nan at target 0"),
    (squares(weights=-np.ones(ROWS)), "the weights of least squares", "not negative"),
    (of_data(so.scalar.Quantile(2.0)), "the quantile loss", "level between 0 and 1"),
    (squares(matrix=ONE_NAN), "the matrix of least squares", "given nan at (3, 2) (1 such)"),
    (so.Quadratic(np.eye(COLUMNS) * np.nan, ONES), "the hessian of a Quadratic", "given nan"),
    (so.Quadratic(np.eye(COLUMNS), ONES * np.inf), "the center of a Quadratic", "given inf at (0,)"),
)
VALUES += [
    (Bad(penalty=so.Box(1.0, 2.0), operator=BOTH_SIDES), "no x has", "in the Box"),
    (Bad(penalty=so.Box(np.r_[1e-8, ONES], 3.0), operator=np.eye(13, 12) * 1e9), "no x has", "in the Box"),
    (Bad(penalty=so.Simplex(), operator=BOTH_SIDES), "no x has", "in the Simplex"),
]
# What follows from shapes and classes: rejected under jit too.
SHAPES = [
    (Bad(operator=np.eye(5)), "the operator", "x of shape (12,)"),
    (Bad(squares(weights=np.ones(3))), "one weight for every target"),
    (Bad(squares(TARGET[1:])), "matrix of 30 rows", "target of shape (29,)"),
    (Bad(start=np.zeros(3)), "start needs the shape (12,)", "given (3,)"),
    (Bad(QUADRATIC, so.L0(0.2), CHAIN, so.Maiht()), "Maiht", "operator Difference"),
    (Bad(QUADRATIC, so.L0(0.2), CHAIN, so.ProximalGradient()), "ProximalGradient", "trend_filter"),
    (Bad(QUADRATIC, so.Support(True), CHAIN, so.Refit()), "Refit", "trend_filter"),
    (Bad(QUADRATIC, so.TopK(3), CHAIN, Splice()), "Splice", "trend_filter"),
    (Bad(QUADRATIC, so.L0(0.2), CHAIN, QuadraticAdmm()), "QuadraticAdmm", "trend_filter"),
    (Bad(QUADRATIC, so.L0(0.2), solver=so.Refit()), "needs a Support", "given L0"),
    (Bad(QUADRATIC, so.Support(True), solver=Splice()), "needs a penalty with mask(score)"),
    (Bad(QUADRATIC, solver=Admm(None, 1.0)), "Admm needs a Split", "given none"),
    (Bad(QUADRATIC, operator=CHAIN, solver=OF_LOSS), "LossAdmm", "given Difference"),
    (Bad(QUADRATIC, operator=TAKEN_APART, solver=Admm(None, 1.0)), "given Quadratic", "mask_missing"),
    (Bad(so.L1(1.0), so.L0(0.2), solver=so.ProximalGradient()), "needs a loss with", "given L1 without"),
    (Bad(QUADRATIC, so.TopK(3), solver=so.Maiht(target_sparsity=0.5)), "given TopK without weight"),
    (Bad(operator=np.diff(np.eye(COLUMNS), axis=0), solver=APG), "without an operator", "use PrimalDual"),
    (Bad(OWN, solver=PD, start=ZERO), "PrimalDual needs the prox of the loss", "given OwnSquares"),
    (Bad(of_data(so.scalar.Absolute()), solver=APG), "a smooth loss", "given Absolute"),
    (Bad(penalty=so.L1(np.ones(3))), "the penalty does not accept", "shape (12,)"),
    (Bad(penalty=so.L1(np.ones((12, 1)))), "the penalty needs a prox", "(12, 12)"),
    (Bad(penalty=so.GroupL2(np.ones(5), groups=np.arange(12) // 2)), "the penalty does not accept", "(6,)"),
    (Bad(penalty=so.NM(2, 5)), "2:5", "divisible by 5"),
    (Bad(so.LeastSquares(None, np.zeros(4000)), solver=ADMM), "up to 3,000, given 4,000", "use PrimalDual"),
]
# What is no part of a problem, or of no use in it.
OBJECTS = of(
    "loss",
    (squares(matrix=[1.0, 2.0]), "the matrix of least squares", "array of shape (2,)"),
    (MATRIX, "a loss is an object", "an array of shape"),
    (so.LeastSquares(None, 3.0), "target of least squares", "given 3.0"),
    (of_data(so.scalar.Logistic, LABELS), "the loss of one observation", "the class Logistic"),
    (of_data("huber"), "the loss of one observation", "given 'huber'"),
    (so.LeastSquares, "a loss is an object", "the function LeastSquares"),
    (so.scalar.Logistic(), "the loss of one observation", "write DataLoss(so.scalar.Logistic()"),
    (so.HuberLoss(MATRIX, TARGET, "a"), "delta"),
    (of_data(so.scalar.Huber(0.0)), "positive, finite delta"),
    (squares(weights=["a"] * ROWS), "the weights of least squares", "numbers"),
    (squares(matrix=aslinearoperator(MATRIX)), "given MatrixLinearOperator", "write mv and rmv"),
    (squares(matrix=MATRIX * 1j), "the loss", "complex128"),
    (OWN, "give a start", "OwnSquares"),
    (so.Quadratic(np.eye(3), np.ones(2)), "hessian of shape (2, 2)"),
    (so.Quadratic(np.diag([1.0, -1.1]), np.ones(2)), "eigenvalue -1.1"),
    (so.Quadratic(np.triu(np.ones((2, 2))), np.ones(2)), "symmetric hessian"),
)
OBJECTS += of(
    "penalty",
    (PlainPenalty(), "the penalty must be a pytree", "@so.pytree"),
    (so.L1(ONES.astype(object)), "the penalty", "dtype object"),
    (so.L1, "a penalty is an object", "the class L1"),
    (1.0, "a penalty is an object", "given 1.0"),
    (SQUARES, "Problem(loss, penalty, operator)", "given the loss DataLoss"),
    (so.L1(None), "the penalty's weight", "None"),
    (so.L1(np.nan), "the weight of L1 must be finite", "nan"),
    (so.L1(np.float32(-1)), "weight must not be negative", "-1"),
    (so.L1(jnp.bfloat16(-1)), "weight must not be negative", "-1"),
    (so.ElasticNet(0.3, -0.5), "ridge must not be negative", "-0.5"),
    (so.MCP(0.3, np.int64(-1)), "the gamma of MCP must be above 0", "-1"),
    (so.SCAD(0.3, 1.0), "the a of SCAD must be above 2", "1"),
    (so.LogSum(0.3, 0.0), "the eps of LogSum must be above 0", "0"),
    (so.Simplex(-1.0), "the radius of Simplex must be above 0", "-1"),
    (so.Box(2.0, np.array([3.0, -1.0])), "the bounds of Box", "low <= high"),
    (so.Box(np.nan, 1.0), "the low of Box must be finite", "nan"),
    (so.TopK(-1), "the k of TopK", "-1"),
    (so.RowTopK(2.5), "the k of RowTopK", "2.5"),
    (so.L0(np.ones(2)), "the weight of L0", "the shape (2,)"),
    (so.Grid(1.0, 0.5, 2), "low and high of a Grid are whole numbers", "0.5"),
    (so.Grid(1.0, -1, 2**40), "high of a Grid are whole numbers", "1099511627776"),
    (so.Grid(1.0, 2, 1), "high >= low", "2 to 1"),
    (so.Grid(np.inf, -1, 1), "the scale of a Grid must be finite", "inf"),
    (so.Grid([1.0, 2.0], -1, 1), "the penalty's scale", "[1.0, 2.0]"),
    (so.Grid(1.0, -1, 1, so.L0(1.0)), "the pattern of a Grid", "given L0"),
    (so.Grid(1.0, 1, 3, so.TopK(2)), "a pattern needs 0 on the Grid", "1 to 3"),
)
OBJECTS += of(
    "operator",
    ([[0.0] * COLUMNS, [0.0, 0.0, np.inf] + [0.0] * (COLUMNS - 3)], "the operator", "inf at (1, 2) (1 such)"),
    (ONES, "the operator", "array of shape (12,)"),
    (ValueOnly(), "mv(x) and rmv(e)", "given ValueOnly"),
    (PlainMap(), "the operator must be a pytree", "PlainMap"),
    (BCOO.fromdense(jnp.eye(COLUMNS)), "given BCOO", "SciPy"),
    (sparse.csr_array(1j * np.eye(COLUMNS)), "the operator", "complex128"),
)
OBJECTS += of(
    "solver",
    (1e-3, "the solver", "given 0.001; a tolerance is the keyword tol"),
    (so.PrimalDual, "the solver", "the class PrimalDual"),
    (so.AcceleratedProximalGradient(cadence=0), "the cadence of AcceleratedProximalGradient", "given 0"),
    (so.PrimalDual(cadence=2.5), "the cadence of PrimalDual", "given 2.5"),
    (so.AcceleratedProximalGradient(step_size=0), "the step_size of AcceleratedProximalGradient", "given 0"),
    (so.ProximalGradient(step_size=-1.0), "the step_size of ProximalGradient", "given -1.0"),
    (so.Maiht(step_size=np.nan), "the step_size of Maiht", "given nan"),
    (so.PrimalDual(omega=0.0), "the omega of PrimalDual", "given 0.0"),
    (so.SplitAdmm(omega=-1.0), "the omega of SplitAdmm", "given -1.0"),
)
OBJECTS += of(
    "start",
    ([0.0, 0.0], "start needs the shape (12,)", "given (2,)"),
    (ZERO * 1j, "the start", "complex128"),
)
OBJECTS += [
    (Bad(IMAGES, operator=NoTranspose()), "the rmv of the operator", "not the transpose"),
    (Bad(ValueOnly(), solver=APG, start=ZERO), "needs a loss with", "given ValueOnly without gradient"),
    (Bad(penalty=ValueOnly(), solver=APG), "needs a penalty with", "given ValueOnly without prox"),
    (Bad(ValueOnly(), ValueOnly()), "no solver accepts this problem", "Maiht"),
    (Bad(so.AbsoluteLoss(MATRIX, TARGET), solver=SET), "smooth loss; use PrimalDual"),
    (Bad(penalty=so.GroupL2(1.0), solver=SET), "GroupL2 without entry_terms"),
    (Bad(squares(MATRIX), solver=SET), "needs a dense or SciPy sparse matrix and a target [rows]"),
    (Bad(so.LeastSquares(None, TARGET, intercept=True), solver=SET), "an intercept needs a dense or SciPy sparse"),
    (Bad(so.LeastSquares(MATRIX, TARGET, intercept=True), solver=SET, start=ZERO), "start needs the shape (13,)"),
    (Bad(operator=np.eye(COLUMNS), solver=SET), "solves problems without an operator"),
]


def rows(table):
    return pytest.mark.parametrize(("bad", "words"), [pytest.param(bad, words, id=words[0]) for bad, *words in table])


def assert_says(words, call):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        call()
    assert words[-1] in str(error.value)


@rows(VALUES + SHAPES + OBJECTS)
def test_bad_input_of_solve_is_rejected_before_any_work(monkeypatch, bad, words):
    def began(*_):
        pytest.fail("it began")

    for solver in {APG, PD, ADMM, bad.solver}:
        if hasattr(solver, "init"):
            monkeypatch.setattr(solver if isinstance(solver, type) else type(solver), "init", began)
    assert_says(words, lambda: so.solve(bad.problem, bad.solver, bad.start))


def traced(bad):
    return jax.eval_shape(lambda problem, start: so.solve(problem, bad.solver, start).value, bad.problem, bad.start)


@rows(VALUES)
def test_values_that_are_not_known_are_not_looked_at(bad, words):
    assert traced(bad).shape == (COLUMNS,), words


@rows(SHAPES)
def test_shapes_and_classes_are_looked_at_under_jit_too(bad, words):
    assert_says(words, lambda: traced(bad))


@pytest.mark.parametrize(
    ("name", "given"),
    [("max_steps", most) for most in (-1, np.int64(-1), jnp.asarray(-1), 2.5, np.nan, "a", 2**40)]
    + [("tol", tol) for tol in ("a", np.nan, np.ones(2))],
)
def test_limits_that_are_no_numbers_are_rejected_whatever_their_type(name, given):
    assert_says([name, "given"], lambda: so.solve(so.Problem(QUADRATIC, so.L0(5.0)), start=ZERO, **{name: given}))


X, ROW = jnp.ones((8, 6)), jnp.ones(3)
PAIR = sparse.csr_array(np.array([[1.0, -1, 0], [0, 1, -1]]))
ONE_LABEL = "one label for every row, an integer from 0 on"


def labelled(labels, **options):
    return lambda: so.GroupL2(1.0, groups=labels, **options)


def on_path(bad=None, **options):
    return lambda: so.path((bad or Bad()).problem, **options)


def update(make, *parameters, **options):
    transform = make(so.L1(1.0), 0.1, **options)
    return transform.update(ROW, transform.init(ROW), *parameters)


# From 257 unknowns on, the choice of a solver counts entries.
MANY = so.Problem(so.LeastSquares(None, np.ones(300)), so.L1(1.0), PlainMap())
CALLS = [
    (lambda: so.chosen_solver(MANY), "the operator must be a pytree", "PlainMap"),
    (lambda: so.solve(SQUARES), "sparseopt.Problem", "given DataLoss"),
    (lambda: so.path(SQUARES), "sparseopt.Problem", "given DataLoss"),
    (on_path(Bad(operator=np.eye(COLUMNS))), "a path needs a loss of data", "no operator"),
    (on_path(Bad(so.LeastSquares(None, TARGET))), "a path needs a loss of data", "matrix"),
    (on_path(Bad(penalty=so.TopK(3))), "a path needs a penalty with a weight", "given TopK"),
    (on_path(levels=[1.0, 2.0]), "levels fall"),
    (on_path(levels=[1.0, -1.0]), "positive and finite", "-1."),
    (on_path(levels=[]), "positive and finite"),
    (on_path(num=0), "num is a whole number", "given 0"),
    (on_path(ratio=2.0), "ratio is the last level over the first", "given 2.0"),
    (on_path(tol=0.0), "tol must be positive", "given 0.0"),
    (lambda: so.BlockTopK(1, (3, 2)).mask(X), "blocks of 3 × 2", "shape (8, 6)"),
    (lambda: so.GroupTopK(1, 3).mask(X), "groups of 3 rows", "shape (8, 6)"),
    (lambda: so.GroupTopK(1, 0).mask(X), "groups of 0 rows"),
    (lambda: so.GroupTopK(1, [0, 1]).mask(X), "given 2 labels", "shape (8, 6)"),
    (lambda: so.GroupTopK(1, [0, 1, 3, 0, 1, 3, 0, 1]).mask(X), "integers 0 to G - 1", "3 of them distinct"),
    (labelled([0.0, 1.0]), ONE_LABEL),
    (labelled([-1, 0]), ONE_LABEL),
    (labelled(np.array([0, 1, 2, 2]), num_groups=2), "num_groups=2", "label 2"),
    (labelled(np.array([0, -1]), num_groups=2), "an integer from 0 on", "-1"),
    (lambda: so.SparseGroup(1.0, 1.0, groups=[0, 1]).value(ROW), "2 labels", "shape (3,)"),
    (lambda: jax.jit(lambda g: so.GroupL2(1.0, groups=g).value(ROW))(jnp.array([0, 1, 1])), "num_groups"),
    # One step a row would not be the prox of a group.
    (lambda: labelled([0, 1])().prox(jnp.ones((2, 3)), jnp.ones((2, 1))), "labelled groups need one step"),
    (lambda: so.NuclearNorm(1.0).prox(ROW, 1.0), "a matrix [m, n]", "shape (3,)"),
    (lambda: n_of_m_mask(jnp.ones((6, 2)), 2, 4), "divisible by 4", "length 6"),
    (lambda: n_of_m_mask(jnp.ones((8, 2)), 5, 4), "given 5:4"),
    (lambda: check_groups(PAIR, np.array([0, 0])), "group 0 has 2 rows", "column 1"),
    (lambda: check_groups(PAIR, np.array([0, -1])), "one number >= 0 for each of 2 rows"),
    (lambda: so.proximal_adam(so.GroupL2(1.0), 0.1), "given GroupL2", "`separable = True`"),
    (lambda: so.proximal_adam(Silent(), 0.1), "given Silent", "`separable = True`"),
    (lambda: so.proximal(0.1, so.L1(1.0)), "sparseopt.L1(0.01)", "given float"),
    (lambda: so.proximal_adam(so.L1, 0.1), "sparseopt.L1(0.01)", "given"),
    (lambda: so.proximal_adam(so.L1(1.0), -0.1), "learning_rate", "given -0.1"),
    *[
        (lambda step=step: so.proximal(so.L1(1.0), step), "step size of 0 or more", f"given {step}")
        for step in (-0.1, np.float32(-1), jnp.float32(-1), "a", None, jnp.nan)
    ],
    (lambda: update(so.proximal), "call update(updates, state, params)"),
    (lambda: update(so.proximal, ROW, mask=np.array([True, False, True])), "given a ndarray", "array of weights"),
]


@rows(CALLS)
def test_a_bad_argument_of_a_penalty_or_a_step_of_training_is_rejected(bad, words):
    assert_says(words, bad)
