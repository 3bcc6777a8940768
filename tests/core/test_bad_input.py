"""Bad input of `solve`: an error that says what was given and what to do, before any work."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO
from scipy import sparse
from scipy.sparse.linalg import aslinearoperator

import sparseopt as so
from sparseopt.core.base.types import precision
from tests.core.test_any_problem import (
    ABSOLUTE,
    ADMM,
    APG,
    COLUMNS,
    FUSED,
    LABELS,
    LARGE,
    LASSO,
    MATRIX,
    PD,
    ROWS,
    SQUARES,
    TARGET,
    ImageGradient,
    OwnSquares,
)


@so.pytree
class NoTranspose(ImageGradient):
    def rmv(self, e):
        return -super().rmv(e)


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


IMAGE = so.LeastSquares(None, np.zeros((4, 3)))
# What is solved, how, and what the error says.
BAD: dict[str, tuple[Callable[[], so.Problem], dict[str, Any], str]] = {
    "an operator of another shape": (
        lambda: so.Problem(SQUARES, so.L1(1.0), np.eye(5)),
        {},
        r"the operator does not take an x of shape \(12,\)",
    ),
    "an rmv that is no transpose": (
        lambda: so.Problem(IMAGE, so.L1(1.0), NoTranspose()),
        {},
        "the rmv of the operator is not the transpose of its mv",
    ),
    "an operator that is none": (
        lambda: so.Problem(SQUARES, so.L1(1.0), np.ones(12)),
        {},
        r"the operator must be None, a dense matrix .* given an array of shape \(12,\)",
    ),
    "an operator without mv": (
        lambda: so.Problem(SQUARES, so.L1(1.0), ValueOnly()),
        {},
        r"an object with mv\(x\) and rmv\(e\), given ValueOnly",
    ),
    "a matrix that is none": (
        lambda: so.Problem(so.LeastSquares([1.0, 2.0], TARGET), so.L1(1.0)),
        {},
        "the matrix of least squares must be None, a dense matrix .* given list",
    ),
    "a loss of its own for a primal-dual method": (
        lambda: so.Problem(OwnSquares(MATRIX, TARGET), so.L1(1.0)),
        {"solver": PD, "start": np.zeros(COLUMNS)},
        "PrimalDual needs the prox of the loss .* given OwnSquares",
    ),
    "a loss without a gradient": (
        lambda: so.Problem(ValueOnly(), so.L1(1.0)),
        {"solver": APG, "start": np.zeros(COLUMNS)},
        "needs a loss with value, gradient, given ValueOnly without gradient",
    ),
    "a loss with kinks": (
        lambda: so.Problem(ABSOLUTE, so.L1(1.0)),
        {"solver": APG},
        "needs a smooth loss, given Absolute, which has kinks; use PrimalDual",
    ),
    "a penalty without a prox": (
        lambda: so.Problem(SQUARES, ValueOnly()),
        {"solver": APG},
        "needs a penalty with value, prox, given ValueOnly without prox",
    ),
    "an operator for a method without": (lambda: FUSED, {"solver": APG}, "without an operator.* use PrimalDual"),
    "nothing that fits": (lambda: so.Problem(ValueOnly(), ValueOnly()), {}, "no solver takes this problem"),
    "a negative count": (
        lambda: so.Problem(so.PoissonLoss(MATRIX, -np.ones(ROWS)), so.L1(1.0)),
        {},
        r"the loss Poisson takes counts, finite and not negative, given -1 at target 0 \(30 such\)",
    ),
    "a label 2": (
        lambda: so.Problem(so.LogisticLoss(MATRIX, np.r_[LABELS[:-1], 2.0]), so.L1(1.0)),
        {},
        r"the loss Logistic takes labels 0 or 1 or proportions between them, given 2 at target 29 \(1 such\)",
    ),
    "a NaN target": (
        lambda: so.Problem(so.LeastSquares(MATRIX, np.r_[np.nan, TARGET[1:]]), so.L1(1.0)),
        {},
        "takes finite numbers, given nan at target 0",
    ),
    "negative weights": (
        lambda: so.Problem(so.LeastSquares(MATRIX, TARGET, -np.ones(ROWS)), so.L1(1.0)),
        {},
        "the weights of least squares must be finite and not negative",
    ),
    "weights of another length": (
        lambda: so.Problem(so.LeastSquares(MATRIX, TARGET, np.ones(3)), so.L1(1.0)),
        {},
        "needs one weight for every target",
    ),
    "a target of another length": (
        lambda: so.Problem(so.LeastSquares(MATRIX, TARGET[1:]), so.L1(1.0)),
        {},
        r"one target for every row of its matrix, given a matrix of 30 rows and a target of shape \(29,\)",
    ),
    "a start of another shape": (
        lambda: LASSO,
        {"start": np.zeros(3)},
        r"start needs the shape \(12,\) of the loss's x, given \(3,\)",
    ),
    "no start for a loss of its own": (
        lambda: so.Problem(OwnSquares(MATRIX, TARGET), so.L1(1.0)),
        {},
        "give a start: the shape of x does not follow from a OwnSquares",
    ),
    "an inverse of many unknowns": (
        lambda: so.Problem(LARGE, so.L1(1.0)),
        {"solver": ADMM},
        "takes up to 3,000, given 4,000; use PrimalDual",
    ),
    "no problem": (lambda: SQUARES, {}, "solve needs a sparseopt.Problem.*, given DataLoss"),
    "a quantile of level 2": (
        lambda: so.Problem(so.DataLoss(so.scalar.Quantile(2.0), MATRIX, TARGET), so.L1(1.0)),
        {},
        "the quantile loss needs a level between 0 and 1",
    ),
    "a tolerance as solver": (
        lambda: LASSO,
        {"solver": 1e-3},
        r"the solver is an object such as sparseopt.PrimalDual\(\), given 0.001; a tolerance is the keyword tol",
    ),
    "a class as solver": (lambda: LASSO, {"solver": so.PrimalDual}, "given the class PrimalDual; or None"),
    "a name as solver": (lambda: LASSO, {"solver": "PrimalDual"}, "given 'PrimalDual'; or None, which chooses one"),
    "a class as scalar loss": (
        lambda: so.Problem(so.DataLoss(so.scalar.Logistic, MATRIX, LABELS), so.L1(1.0)),
        {},
        r"a loss of data takes the loss of one observation, .* given the class Logistic: write Logistic\(\)",
    ),
    "a class as loss": (lambda: so.Problem(so.Quadratic, so.L1(1.0)), {}, "given the class Quadratic"),
    "a name as scalar loss": (
        lambda: so.Problem(so.DataLoss("huber", MATRIX, TARGET), so.L1(1.0)),
        {},
        r"the loss of one observation, such as so.scalar.Logistic\(\), given 'huber'",
    ),
    "text as weights": (
        lambda: so.Problem(so.LeastSquares(MATRIX, TARGET, ["a"] * ROWS), so.L1(1.0)),
        {},
        "the weights of least squares must hold numbers",
    ),
    "no weight": (
        lambda: so.Problem(SQUARES, so.L1(None)),
        {},
        "the penalty's weight must hold real numbers, given None",
    ),
    "a text as delta": (
        lambda: so.Problem(so.HuberLoss(MATRIX, TARGET, "a"), so.L1(1.0)),
        {},
        "positive, finite delta",
    ),
    "a function as loss": (lambda: so.Problem(so.LeastSquares, so.L1(1.0)), {}, "given the function LeastSquares"),
    "a loss without its data": (
        lambda: so.Problem(so.scalar.Logistic(), so.L1(1.0)),
        {},
        r"given one of a single observation: write DataLoss\(so.scalar.Logistic\(\), matrix, target\)",
    ),
    "a penalty that is no pytree": (
        lambda: so.Problem(SQUARES, PlainPenalty()),
        {},
        "the penalty must be a pytree of numbers, given an object of PlainPenalty: decorate .* @so.pytree",
    ),
    "an operator that is no pytree": (
        lambda: so.Problem(SQUARES, so.L1(1.0), PlainMap()),
        {},
        "the operator must be a pytree of numbers, given an object of PlainMap: decorate .* @so.pytree",
    ),
    "a sparse matrix of JAX": (
        lambda: so.Problem(SQUARES, so.L1(1.0), BCOO.fromdense(jnp.eye(COLUMNS))),
        {},
        "given BCOO; convert it to a SciPy sparse matrix",
    ),
    "a linear operator of SciPy": (
        lambda: so.Problem(so.LeastSquares(aslinearoperator(MATRIX), TARGET), so.L1(1.0)),
        {},
        "given MatrixLinearOperator; JAX cannot trace .* write mv and rmv in jax.numpy, or give the matrix",
    ),
    "a weight that is a text": (
        lambda: so.Problem(SQUARES, so.L1("a")),
        {},
        "the penalty's weight must hold real numbers, given 'a'",
    ),
    "an array of objects": (
        lambda: so.Problem(SQUARES, so.L1(np.array([1.0] * COLUMNS, object))),
        {},
        "the penalty must hold numbers, given an array of dtype object",
    ),
    "a complex sparse operator": (
        lambda: so.Problem(SQUARES, so.L1(1.0), sparse.csr_array(1j * np.eye(COLUMNS))),
        {},
        "the operator must hold real numbers, given complex128: stack the real and the imaginary parts",
    ),
    "a complex matrix": (
        lambda: so.Problem(so.LeastSquares(MATRIX * 1j, TARGET), so.L1(1.0)),
        {},
        "the loss must hold real numbers, given complex128",
    ),
    "a complex start": (lambda: LASSO, {"start": np.zeros(COLUMNS) * 1j}, "the start must hold real numbers"),
    "a number as start": (lambda: LASSO, {"start": 0.0}, r"start needs the shape \(12,\) of the loss's x, given \(\)"),
    "a short list as start": (lambda: LASSO, {"start": [0.0, 0.0]}, r"start needs the shape \(12,\) .* given \(2,\)"),
    "a Huber loss of delta 0": (
        lambda: so.Problem(so.DataLoss(so.scalar.Huber(0.0), MATRIX, TARGET), so.L1(1.0)),
        {},
        "needs a positive, finite delta",
    ),
}


@pytest.mark.parametrize(("problem", "how", "text"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_a_sentence_before_any_work(monkeypatch, problem, how, text):
    for kind in (so.AcceleratedProximalGradient, so.PrimalDual, so.SplitAdmm):
        monkeypatch.setattr(kind, "init", lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match=text) as error:
        so.solve(problem(), how.get("solver"), how.get("start"))
    sentence = str(error.value)
    assert "\n" not in sentence or sentence.startswith("no solver takes this problem")


VALUES = ["a negative count", "a label 2", "a NaN target", "negative weights", "a quantile of level 2"]
SHAPES = ["a target of another length", "an operator of another shape", "weights of another length"]


@pytest.mark.parametrize("name", VALUES)
def test_values_that_are_not_known_are_not_looked_at(name):
    assert jax.eval_shape(lambda problem: so.solve(problem).value, BAD[name][0]()).shape == (COLUMNS,)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_looked_at_under_jit_too(name):
    with pytest.raises(ValueError, match=BAD[name][2]):
        jax.eval_shape(lambda problem: so.solve(problem).value, BAD[name][0]())


def test_a_start_is_looked_at_under_jit_too():
    with pytest.raises(ValueError, match="start needs the shape"):
        jax.eval_shape(lambda start: so.solve(LASSO, start=start).value, np.zeros(3))


@pytest.mark.parametrize("most", [-1, np.int64(-1), jnp.asarray(-1)])
def test_a_negative_number_of_steps_is_refused_whatever_its_type(most):
    with pytest.raises(ValueError, match="max_steps must be 0 or more, given -1"):
        so.solve(LASSO, max_steps=most)


def test_none_is_no_penalty():
    wanted = np.linalg.lstsq(MATRIX, TARGET)[0]
    np.testing.assert_allclose(so.solve(so.Problem(SQUARES, None), tol=1e-5).check().value, wanted, atol=1e-3)


def test_a_start_may_be_a_list():
    np.testing.assert_array_equal(so.solve(LASSO, start=[0.0] * COLUMNS).value, so.solve(LASSO, APG).value)


def test_data_of_integers_are_solved_in_the_widest_float():
    with precision(np.dtype(np.float64)):
        loss = so.LeastSquares(np.eye(2, dtype=int), np.array([2**24 + 1, 5]))
        found = so.solve(so.Problem(loss, so.L1(0.0)), tol=1e-14)
        assert found.value.dtype == np.float64
        np.testing.assert_allclose(found.value, [2**24 + 1, 5], rtol=1e-14)
        squares = so.solve(so.Problem(so.Quadratic(np.eye(2, dtype=int), np.array([2**24 + 1, 5])), so.L1(0.0)))
        assert squares.value.dtype == np.float64
