"""No solver accepts a NaN, results are reproducible, and float32 and float64 agree."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.base.types import precision
from sparseopt.core.problem.certify import Anchor
from sparseopt.core.problem.problem import Start
from sparseopt.core.solvers.admm import Admm
from sparseopt.core.solvers.loss_admm import LossAdmm
from sparseopt.core.solvers.rising_admm import QuadraticAdmm, solve_rising
from sparseopt.core.solvers.splice import Splice
from sparseopt.trend.base.job import Job
from sparseopt.trend.base.layout import layout_of
from sparseopt.trend.methods.choice import METHODS
from tests.tiers import often

N = 12


def dense(penalty, kind):
    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((40, N))
    gram = inputs.T @ inputs
    scale = np.sqrt(np.diag(gram))
    loss = so.Quadratic(gram / np.outer(scale, scale), rng.standard_normal((N, 2)))
    return so.Problem(jax.tree.map(lambda leaf: jnp.asarray(leaf, kind), loss), penalty)


def on_chain(method, order, kind):
    """Problem, solver and start of a trend filter on a chain, as the core takes them."""
    graph, y = so.Graph.chain(N, ends="graph"), np.random.default_rng(4).standard_normal(N).astype(kind)
    penalty = so.L1(kind(0.3))
    ready = METHODS[method].plan(Job(layout_of(graph), {order: penalty}, np.dtype(kind)))
    penalty = ready.solver_penalty(penalty)
    start = Start(jnp.asarray(y), jnp.zeros(ready.split.row_shape(jnp.asarray(y)), kind))
    problem = so.Problem(so.LeastSquares(None, jnp.asarray(y)), penalty, ready.split)
    return problem, Admm(ready.node_solve, kind(1.0)), start


def by_gradients(solver, penalty):
    def make(kind):
        problem = dense(penalty, kind)
        return problem, solver, jnp.zeros_like(problem.loss.center)

    return make


def of_data(solver, split=False):
    """Least squares, of which a primal-dual method holds no copy; `split`: behind the differences of x."""

    def make(kind):
        rng = np.random.default_rng(5)
        loss = so.LeastSquares(rng.standard_normal((40, N)).astype(kind), rng.standard_normal(40).astype(kind))
        operator = np.diff(np.eye(N, dtype=kind), axis=0) if split else None
        return so.Problem(loss, so.L1(kind(3.0)), operator), solver, jnp.zeros(N, kind)

    return make


def refit(kind):
    problem = dense(None, kind)
    mask = jnp.arange(N)[:, None] % 3 > 0
    return dataclasses.replace(problem, penalty=so.Support(mask)), so.Refit(), jnp.zeros_like(problem.loss.center)


def from_centre(solver, penalty):
    def make(kind):
        problem = dense(penalty, kind)
        return problem, solver, problem.loss.center

    return make


def outliers(kind):
    squares, solver, start = on_chain("doge", 0, kind)
    loss = so.HuberLoss(None, squares.loss.target, kind(0.5))
    anchor = Anchor(start.dual, squares.operator.rmv(start.dual))
    return (
        dataclasses.replace(squares, loss=loss),
        LossAdmm(solver.node_solve, kind(1), sigma=kind(1), anchor=anchor),
        start,
    )


# Problem, solver and start by the dtype of the computation.
SOLVERS = {
    "maiht": by_gradients(so.Maiht(), so.L1(0.1)),
    "maiht, always": by_gradients(so.Maiht(monitor="always"), so.L0(0.05)),
    "proximal gradient": by_gradients(so.ProximalGradient(), so.L1(0.1)),
    "accelerated": of_data(so.AcceleratedProximalGradient()),
    "primal-dual": of_data(so.PrimalDual(), split=True),
    "split admm": of_data(so.SplitAdmm(), split=True),
    "refit": refit,
    "splice": from_centre(Splice(), so.TopK(10)),
    "quadratic admm": from_centre(QuadraticAdmm(1.0), so.TopK(10)),
    "quadratic admm, unwatched": from_centre(QuadraticAdmm(1.0, watch=False), so.TopK(10)),
    "admm": lambda kind: on_chain("admm", 1, kind),
    "doge": lambda kind: on_chain("doge", 0, kind),
    "fast admm": lambda kind: on_chain("fast_admm", 1, kind),
    "loss admm": outliers,
}
# They run the code of others but for one branch.
ONCE_MORE = ("maiht, always", "quadratic admm, unwatched", "fast admm")
# Functions that call `solve` more than once.
OTHERS = {
    "rising": lambda kind, penalty: solve_rising(
        dense(penalty, kind), dense(penalty, kind).loss.center, rho=0.1, growth=3.0, levels=3, period=4
    ),
}


def run(name, kind=np.float32):
    with precision(np.dtype(kind)):
        if name in OTHERS:
            found = OTHERS[name](kind, so.TopK(10))
        else:
            problem, solver, start = SOLVERS[name](kind)
            found = so.solve(problem, solver, start, tol=3e-6, max_steps=2000 if "unwatched" not in name else 20)
        return jax.device_get(found)


def status(solution):
    return so.Status(int(solution.status))


@so.pytree
class Fragile:
    """L1 to the letter, but NaN from all entries as soon as one argument is larger than `bound`; its value hides it."""

    weight: Any
    bound: Any

    def value(self, x):
        return jnp.nansum(self.weight * jnp.abs(x))

    def broken(self, x, answer):
        return jnp.where(jnp.max(jnp.abs(x)) > self.bound, jnp.nan, answer)

    def prox(self, x, step):
        return self.broken(x, so.L1(self.weight).prox(x, step))


@so.pytree
class FragileCount(so.TopK):
    """TopK that fails once the step is shorter than 2."""

    def prox(self, x, step):
        return jnp.where(step < 2, jnp.nan, super().prox(x, step))


@so.pytree
class Broken:
    """A solver whose step number `at` sees a loss, or a penalty, that is NaN."""

    solver: Any
    what: str = so.static()
    at: int = so.static(default=6)

    @property
    def stride(self):
        return getattr(self.solver, "stride", 1)

    def init(self, problem, start):
        return self.solver.init(problem, start), jnp.zeros((), jnp.int32)

    def step(self, problem, state):
        inner, count = state

        def spoilt(leaf):
            return jnp.where(count == self.at, jnp.nan, leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        part = jax.tree.map(lambda leaf: spoilt(jnp.asarray(leaf)), getattr(problem, self.what))
        return self.solver.step(dataclasses.replace(problem, **{self.what: part}), inner), count + 1

    def measure(self, problem, state):
        return self.solver.measure(problem, state[0])

    def extract(self, problem, state):
        return self.solver.extract(problem, state[0])


# These two run the programs of others but for one branch.
NARROW = [name for name in SOLVERS if name not in ("maiht, always", "quadratic admm, unwatched")]


@pytest.fixture(scope="module")
def runs():
    """A solver's run, each made once."""
    return functools.cache(run)


# The others differ from these in what a NaN does not meet: another monitor, a watch, the penalty.
@pytest.mark.parametrize(
    "name",
    often(
        [name for name in SOLVERS if name not in ("maiht, always", "quadratic admm", "fast admm")],
        *[name for name in SOLVERS if name not in (*ONCE_MORE, "splice", "split admm", "quadratic admm")],
        "quadratic admm, unwatched",
    ),
)
def test_a_loss_that_turns_nan_in_the_seventh_step_is_named(name):
    problem, solver, start = SOLVERS[name](np.float32)
    found = so.solve(problem, Broken(solver, "loss"), start, tol=-1.0, max_steps=200)
    assert status(found) is so.Status.NONFINITE
    if "unwatched" not in name:  # which looks at nothing before its end
        assert int(found.steps) == 7 * getattr(solver, "stride", 1)
    with pytest.raises(RuntimeError, match=r"NONFINITE.*became infinite or NaN"):
        found.check()


@pytest.mark.parametrize("name", ["proximal gradient", "accelerated", "primal-dual", "admm", "loss admm"])
def test_a_penalty_that_turns_nan_in_the_seventh_step_is_named(name):
    problem, solver, start = SOLVERS[name](np.float32)
    found = so.solve(problem, Broken(solver, "penalty"), start, tol=-1.0, max_steps=200)
    assert status(found) is so.Status.NONFINITE
    assert int(found.steps) == 7 * getattr(solver, "stride", 1)


@pytest.mark.parametrize("name", ["maiht", "proximal gradient"])
def test_a_prox_that_returns_nan_on_the_way_is_named(runs, name):
    problem, solver, start = SOLVERS[name](np.float32)
    whole = runs(name).check()
    bound = 0.9 * float(jnp.max(jnp.abs(whole.value)))
    found = so.solve(so.Problem(problem.loss, Fragile(0.1, bound)), solver, start, tol=1e-6, max_steps=2000)
    assert status(found) is so.Status.NONFINITE
    assert 1 < int(found.steps) < int(whole.steps)


def test_a_nan_in_one_of_several_solves_is_named():
    assert status(OTHERS["rising"](np.float32, FragileCount(10))) is so.Status.NONFINITE


def test_a_lane_that_turns_nan_leaves_the_others_alone(runs):
    problem, whole = dense(None, np.float32), runs("maiht")
    bounds = jnp.asarray([np.inf, 0.9 * float(jnp.max(jnp.abs(whole.value)))])
    found = jax.vmap(
        lambda bound: so.solve(
            so.Problem(problem.loss, Fragile(0.1, bound)), so.Maiht(), jnp.zeros((N, 2)), tol=1e-6, max_steps=2000
        )
    )(bounds)
    assert [so.Status(int(s)) for s in found.status] == [so.Status.STATIONARY, so.Status.NONFINITE]
    np.testing.assert_allclose(found.value[0], whole.value, atol=1e-4)
    with pytest.raises(RuntimeError, match="NONFINITE"):
        found.check()


def assert_alike(one, other):
    alike = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), one, other)
    assert all(jax.tree.leaves(alike))


@pytest.mark.parametrize(
    "name", often([*SOLVERS, *OTHERS], *(name for name in [*SOLVERS, *OTHERS] if name not in ONCE_MORE))
)
def test_two_runs_agree_to_the_last_bit(runs, name):
    assert_alike(runs(name), run(name))
    ended = so.Status.CONVERGED
    if name in ("rising", "quadratic admm, unwatched"):  # a fixed number of steps
        ended = so.Status.MAX_STEPS
    elif name in ("maiht, always", "splice", "quadratic admm"):
        ended = so.Status.STATIONARY
    assert status(runs(name)) is ended


def test_runs_of_two_compilations_agree_to_the_last_bit(runs, compiled_afresh):
    assert_alike(runs("maiht"), compiled_afresh(run, "maiht"))


@pytest.mark.parametrize("name", often(NARROW, "maiht", "accelerated", "admm", "quadratic admm", "splice"))
def test_float32_and_float64_agree(runs, name):
    short, wide = runs(name), run(name, np.float64)
    assert short.value.dtype == np.float32
    assert wide.value.dtype == np.float64
    np.testing.assert_allclose(short.value, wide.value, atol=1e-4 * np.abs(wide.value).max())
