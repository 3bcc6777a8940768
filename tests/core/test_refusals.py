"""What the core refuses: an error that says what was given and what to do, before any work.

One table for each entry point: the words of the error, and the call.
"""

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
from sparseopt.core.penalties.sums import Lifted
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


class PlainMap:
    def mv(self, x):
        return x

    rmv = mv


@so.pytree
class Scaled:
    factor: float

    def mv(self, x):
        return self.factor * x

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


def of(part, refused):
    return {words: Bad(**{part: given}) for words, given in refused.items()}


APG, PD, ADMM = so.AcceleratedProximalGradient(), so.PrimalDual(), so.SplitAdmm()
OWN, ZERO, ONES = OwnSquares(MATRIX, TARGET), np.zeros(COLUMNS), np.ones(COLUMNS)
QUADRATIC, CHAIN = so.Quadratic(np.eye(COLUMNS), ZERO), Difference(GridBase((COLUMNS,)), 1)
TAKEN_APART, OF_LOSS = Split(CHAIN, CHAIN, 1.0, 1.0), LossAdmm(None, 1.0, sigma=1.0, anchor=None)


def two(hessian):
    return so.Quadratic(hessian, np.ones(2))


def of_data(scalar, target=TARGET):
    return so.DataLoss(scalar, MATRIX, target)


def squares(target=TARGET, weights=None, matrix=MATRIX):
    return so.LeastSquares(matrix, target, weights)


# What only known numbers tell: under jit it is not looked at.
VALUES = of(
    "loss",
    {
        "Poisson needs counts, finite and not negative, given -1 at target 0 \\(30 such\\)": so.PoissonLoss(
            MATRIX, -np.ones(ROWS)
        ),
        "the loss Logistic needs labels 0 or 1 or proportions between them, given 2 at target 29 \\(1 such\\)": of_data(
            so.scalar.Logistic(), np.r_[LABELS[:-1], 2.0]
        ),
        "needs finite numbers, given nan at target 0": squares(np.r_[np.nan, TARGET[1:]]),
        "the weights of least squares must be finite and not negative": squares(weights=-np.ones(ROWS)),
        "the quantile loss needs a level between 0 and 1": of_data(so.scalar.Quantile(2.0)),
        r"the matrix of least squares must hold finite numbers, given nan at \(3, 2\) \(1 such\)": squares(
            matrix=np.where(np.arange(ROWS * COLUMNS).reshape(ROWS, -1) == 38, np.nan, MATRIX)
        ),
        r"the hessian of a Quadratic must hold finite numbers, given nan": so.Quadratic(np.eye(COLUMNS) * np.nan, ONES),
        r"the center of a Quadratic must hold finite numbers, given inf at \(0,\)": so.Quadratic(
            np.eye(COLUMNS), ONES * np.inf
        ),
    },
)
BOTH_SIDES = np.vstack([np.eye(COLUMNS), -np.eye(COLUMNS)])
VALUES |= {
    "no x has `operator x` in the Box": Bad(penalty=so.Box(1.0, 2.0), operator=BOTH_SIDES),
    "no x has `operator x` in the Box: the": Bad(penalty=so.Box(np.r_[1e-8, ONES], 3.0), operator=np.eye(13, 12) * 1e9),
    "no x has `operator x` in the Simplex": Bad(penalty=so.Simplex(), operator=BOTH_SIDES),
}
# What follows from shapes and classes: refused under jit too.
SHAPES = {
    r"the operator does not accept an x of shape \(12,\)": Bad(operator=np.eye(5)),
    "needs one weight for every target": Bad(squares(weights=np.ones(3))),
    r"one target for every row of its matrix, given a matrix of 30 rows and a target of shape \(29,\)": Bad(
        squares(TARGET[1:])
    ),
    r"start needs the shape \(12,\) of the loss's x, given \(3,\)": Bad(start=np.zeros(3)),
    "Maiht .* operator Difference; .*trend_filter": Bad(QUADRATIC, so.L0(0.2), CHAIN, so.Maiht()),
    "ProximalGradient .*trend_filter": Bad(QUADRATIC, so.L0(0.2), CHAIN, so.ProximalGradient()),
    "Refit .*trend_filter": Bad(QUADRATIC, so.Support(True), CHAIN, so.Refit()),
    "Splice .*trend_filter": Bad(QUADRATIC, so.TopK(3), CHAIN, Splice()),
    "QuadraticAdmm .*trend_filter": Bad(QUADRATIC, so.L0(0.2), CHAIN, QuadraticAdmm()),
    "needs a Support as its penalty, given L0": Bad(QUADRATIC, so.L0(0.2), solver=so.Refit()),
    r"needs a penalty with mask\(score\)": Bad(QUADRATIC, so.Support(True), solver=Splice()),
    "Admm needs a Split as the problem's operator, given none": Bad(QUADRATIC, solver=Admm(None, 1.0)),
    "LossAdmm .* given Difference": Bad(QUADRATIC, operator=CHAIN, solver=OF_LOSS),
    "given Quadratic without target, weigh, mask_missing": Bad(QUADRATIC, operator=TAKEN_APART, solver=Admm(None, 1.0)),
    "needs a loss with .*, given L1 without": Bad(so.L1(1.0), so.L0(0.2), solver=so.ProximalGradient()),
    "given TopK without weight": Bad(QUADRATIC, so.TopK(3), solver=so.Maiht(target_sparsity=0.5)),
    "without an operator.* use PrimalDual": Bad(operator=np.diff(np.eye(COLUMNS), axis=0), solver=APG),
    "PrimalDual needs the prox of the loss, .* given OwnSquares": Bad(OWN, solver=PD, start=ZERO),
    "a smooth loss, given Absolute, which has kinks; use PrimalDual": Bad(of_data(so.scalar.Absolute()), solver=APG),
    r"the penalty does not accept an array of shape \(12,\): .*incompatible shapes": Bad(penalty=so.L1(np.ones(3))),
    r"a prox of the array's shape \(12,\) .* given shapes \(12, 12\)": Bad(penalty=so.L1(np.ones((12, 1)))),
    r"the penalty does not accept an array of shape \(12,\): .*\(6,\)": Bad(
        penalty=so.GroupL2(np.ones(5), groups=np.arange(12) // 2)
    ),
    "the pattern 2:5 needs a length divisible by 5": Bad(penalty=so.NM(2, 5)),
    "accepts up to 3,000, given 4,000; use PrimalDual": Bad(so.LeastSquares(None, np.zeros(4000)), solver=ADMM),
}
# What is no part of a problem.
LOSSES = {
    r"the matrix of least squares must be None, a dense matrix .* given an array of shape \(2,\)": squares(
        matrix=[1.0, 2.0]
    ),
    "a loss is an object such as sparseopt.LeastSquares.A, b., given an array of shape": MATRIX,
    r"target of least squares is an array \[rows\] or \[rows, channels\], given 3.0": so.LeastSquares(None, 3.0),
    r"a loss of data needs the loss of one observation, .* given the class Logistic: write Logistic\(\)": of_data(
        so.scalar.Logistic, LABELS
    ),
    r"the loss of one observation, such as so.scalar.Logistic\(\), given 'huber'": of_data("huber"),
    "given the class Quadratic": so.Quadratic,
    "given the function LeastSquares": so.LeastSquares,
    r"the loss of one observation: write DataLoss\(so.scalar.Logistic\(\), matrix, target\)": so.scalar.Logistic(),
    "positive, finite delta": so.HuberLoss(MATRIX, TARGET, "a"),
    "needs a positive, finite delta": of_data(so.scalar.Huber(0.0)),
    "the weights of least squares must hold numbers": squares(weights=["a"] * ROWS),
    "given MatrixLinearOperator; JAX cannot trace .* write mv and rmv in jax.numpy, or give the matrix": squares(
        matrix=aslinearoperator(MATRIX)
    ),
    "the loss must hold real numbers, given complex128": squares(matrix=MATRIX * 1j),
    "give a start: the shape of x does not follow from a OwnSquares": OWN,
    r"a hessian of shape \(2, 2\), given": two(np.eye(3)),
    "eigenvalue -1.1": two(np.diag([1.0, -1.1])),
    "a symmetric hessian": two(np.triu(np.ones((2, 2)))),
}
PENALTIES = {
    "the penalty must be a pytree of numbers, given an object of PlainPenalty: decorate .* @so.pytree": PlainPenalty(),
    "the penalty must hold numbers, given an array of dtype object": so.L1(ONES.astype(object)),
    "a penalty is an object .* the class L1": so.L1,
    "the penalty's weight must hold real numbers, given None": so.L1(None),
    "the penalty's weight must hold real numbers, given 'a'": so.L1("a"),
    r"a penalty is an object such as sparseopt.L1\(10.0\), given 1.0": 1.0,
    r"the order is Problem\(loss, penalty, operator\), given the loss DataLoss as the penalty": SQUARES,
    "weight must not be negative, given -1.0": so.L1(-1.0),
    "weight must not be negative, given -1": so.L1(np.float32(-1)),
    "must not be negative, given -1": so.L1(jnp.bfloat16(-1)),
    "weight must not be negative, given -5": so.Nonnegative(-5.0),
    "ridge must not be negative, given -0.5": so.ElasticNet(0.3, -0.5),
    "low and high of a Grid are whole numbers of at most 16777216, given 0.5 and 2": so.Grid(1.0, 0.5, 2),
    "high of a Grid are whole numbers of at most 16777216, given -1 and 1099511627776": so.Grid(1.0, -1, 2**40),
    "a Grid runs from low to high >= low, given 2 to 1": so.Grid(1.0, 2, 1),
    "the scale of a Grid must be finite, given inf": so.Grid(np.inf, -1, 1),
    "the low of Grid must be finite, given nan": so.Grid(1.0, np.nan, 1),
    "the penalty's scale must hold real numbers, given .1.0, 2.0": so.Grid([1.0, 2.0], -1, 1),
    r"the pattern of a Grid is one such as TopK\(k\), or a Support, given L0": so.Grid(1.0, -1, 1, so.L0(1.0)),
    "a pattern needs 0 on the Grid, which runs from 1 to 3": so.Grid(1.0, 1, 3, so.TopK(2)),
    "the gamma of MCP must be above 0, given -1": so.MCP(0.3, np.int64(-1)),
    "the gamma of MCP must be above 0, given -1.0": so.MCP(0.3, -1.0),
    "the a of SCAD must be above 2, given 1": so.SCAD(0.3, 1.0),
    "the eps of LogSum must be above 0": so.LogSum(0.3, 0.0),
    "the radius of Simplex must be above 0": so.Simplex(-1.0),
    "the bounds of Box must be low <= high": so.Box(2.0, np.array([3.0, -1.0])),
    "the weight of L1 must be finite, given nan": so.L1(np.nan),
    "the weight of Nonnegative must be finite, given inf": so.Nonnegative(np.inf),
    "the low of Box must be finite, given nan": so.Box(np.nan, 1.0),
    "the k of TopK is a whole number of 0 or more, given -1": so.TopK(-1),
    "the k of RowTopK is a whole number of 0 or more, given 2.5": so.RowTopK(2.5),
    r"the weight of L0 is one number, given the shape \(2,\)": so.L0(np.ones(2)),
}
OPERATORS = {
    "the operator must hold finite numbers, given inf at .1, 2. .1 such.": np.where(np.arange(24) == 14, np.inf, 0.0)
    .reshape(2, 12)
    .tolist(),
    r"the operator must be None, a dense matrix .* given an array of shape \(12,\)": ONES,
    r"an object with mv\(x\) and rmv\(e\), given ValueOnly": ValueOnly(),
    "the operator must be a pytree of numbers, given an object of PlainMap: decorate .* @so.pytree": PlainMap(),
    "given BCOO; convert it to a SciPy sparse matrix": BCOO.fromdense(jnp.eye(COLUMNS)),
    "must hold real numbers, given complex128: stack the real and the imaginary parts": sparse.csr_array(
        1j * np.eye(COLUMNS)
    ),
}
SOLVERS = {
    r"is an object such as sparseopt.PrimalDual\(\), given 0.001; a tolerance is the keyword tol": 1e-3,
    "given the class PrimalDual; or None": so.PrimalDual,
    "given 'PrimalDual'; or None, which chooses one": "PrimalDual",
}
SOLVERS |= {
    f"the {name} of {type(solver).__name__} .*, given {given}": solver
    for name, make, given in (
        ("cadence", so.AcceleratedProximalGradient, 0),
        ("cadence", so.PrimalDual, 2.5),
        ("step_size", so.AcceleratedProximalGradient, 0),
        ("step_size", so.ProximalGradient, -1.0),
        ("step_size", so.Maiht, np.nan),
        ("omega", so.PrimalDual, 0.0),
        ("omega", so.SplitAdmm, -1.0),
    )
    for solver in [make(**{name: given})]
}
STARTS = {
    r"start needs the shape \(12,\) of the loss's x, given \(\)": 0.0,
    r"start needs the shape \(12,\) .* given \(2,\)": [0.0, 0.0],
    "the start must hold real numbers": ZERO * 1j,
}
OBJECTS = of("loss", LOSSES) | of("penalty", PENALTIES) | of("operator", OPERATORS) | of("solver", SOLVERS)
OBJECTS |= of("start", STARTS)
OBJECTS |= {
    "the rmv of the operator is not the transpose of its mv": Bad(
        so.LeastSquares(None, np.zeros((4, 3))), operator=NoTranspose()
    ),
    "needs a loss with value, gradient, given ValueOnly without gradient": Bad(ValueOnly(), solver=APG, start=ZERO),
    "needs a penalty with value, prox, given ValueOnly without prox": Bad(penalty=ValueOnly(), solver=APG),
    "no solver accepts this problem": Bad(ValueOnly(), ValueOnly()),
}
BAD = VALUES | SHAPES | OBJECTS


@pytest.mark.parametrize("words", BAD)
def test_bad_input_of_solve_is_refused_in_a_sentence_before_any_work(monkeypatch, words):
    bad = BAD[words]
    for solver in {APG, PD, ADMM, bad.solver}:
        if hasattr(solver, "init"):
            monkeypatch.setattr(solver if isinstance(solver, type) else type(solver), "init", began)
    with pytest.raises(ValueError, match=words) as error:
        so.solve(bad.problem, bad.solver, bad.start)
    sentence = str(error.value)
    assert "\n" not in sentence or sentence.startswith("no solver accepts this problem")


def test_what_is_no_problem_is_refused():
    with pytest.raises(ValueError, match=r"solve needs a sparseopt.Problem.*, given DataLoss"):
        so.solve(SQUARES)


def began(*_):
    pytest.fail("it began")


def traced(bad):
    return jax.eval_shape(lambda problem, start: so.solve(problem, bad.solver, start).value, bad.problem, bad.start)


@pytest.mark.parametrize("words", VALUES)
def test_values_that_are_not_known_are_not_looked_at(words):
    assert traced(VALUES[words]).shape == (COLUMNS,)


@pytest.mark.parametrize("words", SHAPES)
def test_shapes_and_classes_are_looked_at_under_jit_too(words):
    with pytest.raises(ValueError, match=words):
        traced(SHAPES[words])


@pytest.mark.parametrize("loss", [SQUARES, QUADRATIC], ids=["least squares", "quadratic"])
@pytest.mark.parametrize(
    ("name", "given"),
    [("max_steps", most) for most in (-1, np.int64(-1), jnp.asarray(-1), 2.5, np.nan, "a", 2**40)]
    + [("tol", tol) for tol in ("a", np.nan, np.ones(2))],
)
def test_limits_that_are_no_numbers_are_refused_whatever_their_type(loss, name, given):
    with pytest.raises(ValueError, match=rf"^{name} (is a whole number|must be a finite number).*, given"):
        so.solve(so.Problem(loss, so.L0(5.0)), start=ZERO, **{name: given})


@pytest.mark.parametrize("size", [12, 300])
def test_what_is_no_pytree_of_arrays_is_refused_or_solved_at_every_size(size):
    """From 257 unknowns on the choice of a solver counts entries."""
    loss = so.LeastSquares(None, np.ones(size))
    with pytest.raises(ValueError, match="the operator must be a pytree of numbers"):
        so.chosen_solver(so.Problem(loss, so.L1(1.0), PlainMap()))
    assert so.solve(so.Problem(loss, so.L1(0.25), Scaled(2.0))).check().value == pytest.approx(0.5, abs=1e-3)


X, ROW = jnp.ones((8, 6)), jnp.ones(3)
PAIR = sparse.csr_array(np.array([[1.0, -1, 0], [0, 1, -1]]))
LIFTED = Lifted(so.L1(1.0), Difference(GridBase((4,)), 1), 2.0, np.ones((1, 4, 1), bool))
ONE_LABEL = "one label for every row, an integer from 0 on"


@so.pytree
class Silent:
    """A penalty that does not say whether it is separable."""

    weight: float = 1.0

    def value(self, x):
        return self.weight * jnp.sum(jnp.abs(x))

    def prox(self, x, step):
        return x


def update(make, *parameters, **options):
    transform = make(so.L1(1.0), 0.1, **options)
    return transform.update(ROW, transform.init(ROW), *parameters)


CALLS = [
    (r"blocks of 3 × 2 need .* shape \(8, 6\)", lambda: so.BlockTopK(1, (3, 2)).mask(X)),
    (r"shape \(48,\)", lambda: so.BlockTopK(1, (3, 2)).mask(jnp.ones(48))),
    (r"groups of 3 rows need .* shape \(8, 6\)", lambda: so.GroupTopK(1, 3).mask(X)),
    ("groups of 0 rows", lambda: so.GroupTopK(1, 0).mask(X)),
    (
        r"given 2 labels, 2 of them distinct, for an array of shape \(8, 6\)",
        lambda: so.GroupTopK(1, [0, 1]).mask(X),
    ),
    (
        "integers 0 to G - 1, each at least once; given 8 labels, 3 of them distinct",
        lambda: so.GroupTopK(1, [0, 1, 3, 0, 1, 3, 0, 1]).mask(X),
    ),
    *[
        (ONE_LABEL, lambda labels=labels: so.GroupL2(1.0, groups=labels))
        for labels in ([0.0, 1.0], [[0], [1]], [-1, 0])
    ],
    ("num_groups=2 and a label 2", lambda: so.GroupL2(1.0, groups=np.array([0, 1, 2, 2]), num_groups=2)),
    (r"an integer from 0 on, .* from -1", lambda: so.GroupL2(1.0, groups=np.array([0, -1]), num_groups=2)),
    (
        r"2 labels need an array of as many rows, given the shape \(3,\)",
        lambda: so.SparseGroup(1.0, 1.0, groups=[0, 1]).value(ROW),
    ),
    (
        "give GroupL2 num_groups",
        lambda: jax.jit(lambda labels: so.GroupL2(1.0, groups=labels).value(ROW))(jnp.array([0, 1, 1])),
    ),
    # One step a row would not be the prox of a group.
    (
        "labelled groups need one step",
        lambda: so.GroupL2(1.0, groups=[0, 1]).prox(jnp.ones((2, 3)), jnp.ones((2, 1))),
    ),
    (r"a matrix \[m, n\], given the shape \(3,\)", lambda: so.NuclearNorm(1.0).prox(ROW, 1.0)),
    (r"divisible by 4.*length 6", lambda: n_of_m_mask(jnp.ones((6, 2)), 2, 4)),
    ("given 5:4", lambda: n_of_m_mask(jnp.ones((8, 2)), 5, 4)),
    ("group 0 has 2 rows that share column 1", lambda: check_groups(PAIR, np.array([0, 0]))),
    ("one number >= 0 for each of 2 rows", lambda: check_groups(PAIR, np.array([0, -1]))),
    *[
        (rf"given {name}, .* `separable = True`.*sgd", lambda penalty=penalty: so.proximal_adam(penalty, 0.1))
        for name, penalty in (("GroupL2", so.GroupL2(1.0)), ("Silent", Silent()), ("Lifted", LIFTED))
    ],
]
for make in (so.proximal, so.proximal_adam):
    CALLS += [
        (r"such as sparseopt\.L1\(0\.01\), given float", lambda make=make: make(0.1, so.L1(1.0))),
        (r"such as sparseopt\.L1\(0\.01\), given", lambda make=make: make(so.L1, 0.1)),
        (r"0 or more, or a schedule, given -0\.1", lambda make=make: make(so.L1(1.0), -0.1)),
        *[
            ("0 or more, or a schedule, given", lambda make=make, step=step: make(so.L1(1.0), step))
            for step in (np.float32(-1), jnp.float32(-1), "a", None, jnp.nan)
        ],
        (r"call update\(updates, state, params\)", lambda make=make: update(make)),
        (
            r"given a ndarray of shape \(3,\); .* array of weights",
            lambda make=make: update(make, ROW, mask=np.array([True, False, True])),
        ),
    ]


@pytest.mark.parametrize(("words", "call"), CALLS)
def test_what_a_penalty_or_a_step_of_training_does_not_take_is_refused(words, call):
    with pytest.raises(ValueError, match=words):
        call()


def test_groups_without_a_shared_column_are_counted():
    assert check_groups(PAIR, np.array([0, 1])) == 2
