"""What is true of every solver: no NaN is accepted, runs repeat, float32 and float64 agree, and lanes are as alone."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.base.types import precision
from sparseopt.core.problem.problem import Start
from sparseopt.core.solvers.admm import Admm
from sparseopt.core.solvers.loss_admm import LossAdmm
from sparseopt.layers.methods.admm import AdmmPruning, QuadraticAdmm
from sparseopt.layers.methods.splice import Splice
from tests.core.regression import on_chain
from tests.tiers import often

N = 12


def quadratic(solver, penalty, centred=False):
    """A quadratic loss of two columns; from its centre, or from 0."""

    def make(kind):
        rng = np.random.default_rng(3)
        inputs = rng.standard_normal((40, N))
        gram = inputs.T @ inputs
        scale = np.sqrt(np.diag(gram))
        hessian, center = gram / np.outer(scale, scale), rng.standard_normal((N, 2))
        loss = so.Quadratic(jnp.asarray(hessian, kind), jnp.asarray(center, kind))
        return so.Problem(loss, penalty), solver, loss.center if centred else jnp.zeros_like(loss.center)

    return make


def of_data(solver, split=False):
    """Least squares, of which a primal-dual method holds no copy; `split`: behind the differences of x."""

    def make(kind):
        rng = np.random.default_rng(5)
        loss = so.LeastSquares(rng.standard_normal((40, N)).astype(kind), rng.standard_normal(40).astype(kind))
        operator = np.diff(np.eye(N, dtype=kind), axis=0) if split else None
        return so.Problem(loss, so.L1(kind(3.0)), operator), solver, jnp.zeros(N, kind)

    return make


def of_nodes(loss, solver=Admm, **options):
    """A trend filter on a chain."""

    def make(kind):
        y = np.random.default_rng(4).standard_normal(N).astype(kind)
        options_of = {name: kind(number) for name, number in options.items()}
        return on_chain(loss(None, y), so.L1(kind(0.3)), solver, **options_of)

    return make


SUPPORT, COUNT = so.Support(jnp.arange(N)[:, None] % 3 > 0), so.TopK(10)
# Problem, solver and start by the dtype of the computation.
SOLVERS = {
    "maiht": quadratic(so.Maiht(), so.L1(0.1)),
    "proximal gradient": quadratic(so.ProximalGradient(), so.L1(0.1)),
    "accelerated": of_data(so.AcceleratedProximalGradient()),
    "primal-dual": of_data(so.PrimalDual(), split=True),
    "split admm": of_data(so.SplitAdmm(), split=True),
    "refit": quadratic(so.Refit(), SUPPORT),
    "splice": quadratic(Splice(), COUNT, centred=True),
    "quadratic admm": quadratic(QuadraticAdmm(1.0), COUNT, centred=True),
    "quadratic admm, unwatched": quadratic(QuadraticAdmm(1.0, watch=False), COUNT, centred=True),
    "admm": of_nodes(so.LeastSquares),
    "loss admm": of_nodes(so.HuberLoss, LossAdmm, sigma=1),
}
WITHOUT_GAP = ("maiht", "proximal gradient", "refit", "splice", "quadratic admm")
# The answers of the others are not unique, so that rounding may choose another one.
CONVEX = [name for name in SOLVERS if name.split()[0] not in ("splice", "quadratic")]


def run(name, kind=np.float32):
    with precision(np.dtype(kind)):
        if name == "rising":  # it calls `solve` more than once
            problem, _, center = quadratic(None, COUNT, centred=True)(kind)
            found = AdmmPruning(rho=0.1, growth=3.0, levels=3, period=4).rising(problem, center)
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

    def prox(self, x, step):
        return jnp.where(jnp.max(jnp.abs(x)) > self.bound, jnp.nan, so.L1(self.weight).prox(x, step))


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


# The one left out differs in what a NaN does not meet: a watch.
SPOILT = [(name, "loss") for name in SOLVERS if name != "quadratic admm"]
SPOILT += [(name, "penalty") for name in ("proximal gradient", "accelerated", "primal-dual", "admm", "loss admm")]
SELDOM = [("splice", "loss"), ("split admm", "loss"), ("loss admm", "loss"), ("accelerated", "loss")]
SELDOM += [("proximal gradient", "loss"), ("primal-dual", "loss"), ("admm", "penalty")]


@pytest.mark.parametrize(("name", "what"), often(SPOILT, *(case for case in SPOILT if case not in SELDOM)))
def test_what_turns_nan_in_the_seventh_step_is_named(name, what):
    problem, solver, start = SOLVERS[name](np.float32)
    found = so.solve(problem, Broken(solver, what), start, tol=-1.0, max_steps=200)
    assert status(found) is so.Status.NONFINITE
    if "unwatched" not in name:  # which looks at nothing before its end
        assert int(found.steps) == 7 * getattr(solver, "stride", 1)


def test_a_prox_that_returns_nan_on_the_way_is_named_and_leaves_other_lanes_alone(runs):
    problem, solver, start = SOLVERS["maiht"](np.float32)
    whole = runs("maiht").check()
    bounds = jnp.asarray([np.inf, 0.9 * float(jnp.max(jnp.abs(whole.value)))])

    def solved(bound):
        return so.solve(so.Problem(problem.loss, Fragile(0.1, bound)), solver, start, tol=1e-6, max_steps=2000)

    found = jax.vmap(solved)(bounds)
    assert [so.Status(int(s)) for s in found.status] == [so.Status.STATIONARY, so.Status.NONFINITE]
    assert 1 < int(found.steps[1]) < int(whole.steps)
    np.testing.assert_allclose(found.value[0], whole.value, atol=1e-4)


@pytest.fixture(scope="module")
def runs():
    """A solver's run, each made once."""
    return functools.cache(run)


def assert_alike(one, other):
    alike = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), one, other)
    assert all(jax.tree.leaves(alike))


OFTEN = ("maiht", "accelerated", "split admm", "refit", "splice", "quadratic admm", "admm", "rising")


@pytest.mark.parametrize("name", often([*SOLVERS, "rising"], *OFTEN))
def test_runs_agree_to_the_last_bit_and_up_to_rounding_in_float64(runs, name):
    short = runs(name)
    assert_alike(short, run(name))
    of_few_steps = name in ("rising", "quadratic admm, unwatched")
    ended = so.Status.STATIONARY if name in WITHOUT_GAP else so.Status.CONVERGED
    assert status(short) is (so.Status.MAX_STEPS if of_few_steps else ended)
    assert np.isfinite(short.gap) == (ended is so.Status.CONVERGED and not of_few_steps)
    if not of_few_steps:
        wide = run(name, np.float64)
        assert (short.value.dtype, wide.value.dtype) == (np.float32, np.float64)
        np.testing.assert_allclose(short.value, wide.value, atol=1e-4 * np.abs(wide.value).max())


def scaled(name, kind=np.float64):
    """The solve of a family of problems: data times a number."""
    problem, solver, start = SOLVERS[name](kind)

    def solve(scale, **limits):
        loss = jax.tree.map(lambda leaf: leaf * scale, problem.loss)
        return so.solve(dataclasses.replace(problem, loss=loss), solver, start, **limits)

    return solve


@pytest.mark.parametrize("name", often(CONVEX, "maiht", "accelerated"))
def test_many_problems_at_once_are_solved_as_one_by_one_each_with_its_own_end(name):
    deep = name in ("accelerated", "primal-dual", "split admm")
    limits = {"tol": 1e-12 if deep else 1e-5, "max_steps": 5000}
    scales, atol = np.array([*np.linspace(0.5, 2, 8), np.nan]), 1e-9 if deep else 1e-6
    with precision(np.dtype(np.float64)):
        solve = scaled(name)
        together = jax.device_get(jax.jit(jax.vmap(lambda scale: solve(scale, **limits)))(scales))
        alone = [jax.device_get(solve(scale, **limits)) for scale in scales[:-1]]
    np.testing.assert_allclose(together.value[:-1], [each.value for each in alone], rtol=atol, atol=atol)
    np.testing.assert_array_equal(together.steps[:-1], [each.steps for each in alone])
    ended = so.Status.CONVERGED if np.isfinite(together.gap[0]) else so.Status.STATIONARY
    np.testing.assert_array_equal(together.status, [ended] * 8 + [so.Status.NONFINITE])
    # Methods of few steps end at the same check.
    assert len(set(together.steps.tolist())) > (3 if deep else 1)


@pytest.mark.parametrize("name", often(CONVEX, "accelerated"))
def test_changed_numbers_and_their_gradients_need_no_new_trace(traces_of, name):
    solve = scaled(name, np.float32)
    seen = traces_of(type(SOLVERS[name](np.float32)[1]))

    def total(scale):
        # Of a length of its own, so that no other test has traced it.
        return solve(scale, tol=1e-3, max_steps=230, history=True).value.sum()

    for function in (total, jax.jit(jax.grad(total))):
        function(np.float32(1.0))
        first = len(seen)
        assert first > 0
        for scale in np.float32([0.7, 1.3]):
            function(scale)
        assert len(seen) == first


@pytest.mark.parametrize("name", often(CONVEX, "accelerated", "proximal gradient"))
def test_limits_of_steps_are_kept_also_by_the_history_and_a_start_at_the_answer_ends_soon(runs, name):
    problem, solver, start = SOLVERS[name](np.float32)
    stride = getattr(solver, "stride", 1)
    seven = so.solve(problem, solver, start, tol=-1.0, max_steps=7, history=True)
    # A step of several iterations may end beyond the limit.
    assert int(seven.steps) == seven.history.residual.shape[0] == 7 + -7 % stride
    assert status(seven) is so.Status.MAX_STEPS
    assert float(seven.history.objective[-1]) == float(seven.objective)
    # Solvers with a dual part must find it from any x, and a refit projects its start.
    if not isinstance(start, Start) and name not in ("primal-dual", "split admm", "refit"):
        none = so.solve(problem, solver, start + 1, max_steps=0)
        np.testing.assert_array_equal(none.value, start + 1)
        again = so.solve(problem, solver, jnp.asarray(runs(name).value), tol=1e-5)
        assert int(again.steps) < int(runs(name).steps)
        assert name != "accelerated" or int(again.steps) <= solver.cadence
