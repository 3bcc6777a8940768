"""ADMM with a rising rho: the optimum of convex problems, exact counts for others, one trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.solvers.rising_admm import QuadraticAdmm, solve_rising
from tests.core.test_solvers import make_problem
from tests.tiers import often


def objective(problem, x):
    return float(problem.loss.value(x) + problem.penalty.value(x))


def test_with_l1_it_reaches_the_optimum_that_monotone_fista_reaches(rng):
    problem = so.Problem(make_problem(rng, ridge=0.1).loss, so.L1(0.2))
    start = jnp.zeros_like(problem.loss.center)
    theirs = so.solve(problem, so.Maiht(), start, tol=1e-7, max_steps=3000)
    ours = so.solve(problem, QuadraticAdmm(rho=0.5), start, tol=-1.0, max_steps=400)
    assert objective(problem, ours.value) == pytest.approx(objective(problem, theirs.value), rel=1e-5)
    np.testing.assert_allclose(ours.value, theirs.value, atol=2e-3)
    # The fixed point is one: b and x agree, and v is the gradient there with its sign turned.
    np.testing.assert_allclose(ours.state.dual, -problem.loss.gradient(ours.value), atol=2e-3)


PATTERNS = [so.TopK(150), so.RowTopK(13), so.NM(2, 4), so.BlockTopK(17, (4, 3))]


@pytest.mark.parametrize("penalty", often(PATTERNS, PATTERNS[0], PATTERNS[2]), ids=repr)
def test_every_answer_lies_in_the_sparse_set_and_has_its_exact_count(rng, penalty):
    problem = so.Problem(make_problem(rng).loss, penalty)
    center = problem.loss.center
    answer = solve_rising(problem, center, rho=0.1, growth=2.0, levels=5, period=4)
    assert float(penalty.value(answer.value)) == 0
    assert np.count_nonzero(answer.value) == np.count_nonzero(penalty.mask(jnp.ones_like(center)))
    assert int(answer.steps) == 20
    # Far better than the dense values on the support of the largest.
    assert objective(problem, answer.value) < 0.8 * objective(problem, penalty.prox(center, 1.0))


def test_a_rising_rho_closes_the_gap_between_both_copies(rng):
    problem = so.Problem(make_problem(rng).loss, so.TopK(200))
    apart = []
    for levels in (1, 4, 8):
        state = solve_rising(problem, problem.loss.center, rho=0.1, growth=2.0, levels=levels, period=4).state
        last = QuadraticAdmm().step(problem, state)
        b = last.x + (last.dual - state.dual) / last.rho
        apart.append(float(jnp.linalg.norm(b - last.x) / jnp.linalg.norm(last.x)))
    assert apart[2] < 1e-2 * apart[0]
    assert apart[1] < apart[0]


def test_the_objective_is_the_loss_at_b(rng):
    problem = so.Problem(make_problem(rng).loss, so.TopK(200))
    solver = QuadraticAdmm()
    hessian, center = (np.asarray(a, np.float64) for a in (problem.loss.hessian, problem.loss.center))
    state = solver.init(problem, problem.loss.center)
    step = jax.jit(solver.step)
    for _ in range(9):
        previous, state = state, step(problem, state)
        rho = float(state.rho)
        right = rho * (np.asarray(previous.x, np.float64) - center) - np.asarray(previous.dual, np.float64)
        moved = np.linalg.solve(hessian + rho * np.eye(len(hessian)), right)
        assert float(state.objective) == pytest.approx(0.5 * np.sum(moved * (hessian @ moved)), rel=1e-3)


def test_the_residual_is_the_share_of_the_support_that_moved(rng):
    problem = so.Problem(make_problem(rng).loss, so.TopK(200))
    solver = QuadraticAdmm(rho=0.2)
    state = solver.init(problem, problem.loss.center)
    step = jax.jit(solver.step)
    for _ in range(6):
        previous, state = state, step(problem, state)
        changed = np.mean((np.asarray(state.x) != 0) != (np.asarray(previous.x) != 0))
        assert float(state.residual) == pytest.approx(changed, abs=1e-6)


def test_a_level_starts_where_the_one_before_ended(rng):
    """At a growth of 1 the levels are one solve in pieces; the last rho is that of the last level."""
    problem = so.Problem(make_problem(rng).loss, so.TopK(200))
    whole = so.solve(problem, QuadraticAdmm(rho=0.2), problem.loss.center, tol=-1.0, max_steps=9)
    parts = solve_rising(problem, problem.loss.center, rho=0.2, growth=1.0, levels=3, period=3)
    np.testing.assert_array_equal(parts.value != 0, whole.value != 0)
    np.testing.assert_allclose(parts.value, whole.value, rtol=1e-3, atol=1e-5)
    rising = solve_rising(problem, problem.loss.center, rho=0.2, growth=3.0, levels=3, period=2)
    assert float(rising.state.rho) == pytest.approx(0.2 * 9)
    assert int(rising.steps) == 6


def test_a_support_at_rest_ends_a_level_early(rng):
    """With a share of 1 every step is at rest, and every level has one step, the first after which it is known."""
    problem = so.Problem(make_problem(rng).loss, so.TopK(200))
    rising = solve_rising(problem, problem.loss.center, rho=0.2, growth=2.0, levels=4, period=5, rest=1.0)
    assert int(rising.steps) == 4
    never = solve_rising(problem, problem.loss.center, rho=0.2, growth=2.0, levels=4, period=5, rest=0.0)
    assert 4 < int(never.steps) <= 20


def test_levels_counts_and_rho_are_leaves_one_trace_serves_all(rng):
    problem = make_problem(rng)
    traces = []

    @jax.jit
    def run(solver, penalty, x):
        traces.append(1)
        return so.solve(so.Problem(problem.loss, penalty), solver, x, tol=-1.0, max_steps=3).value

    for k, rho in ((40, 0.1), (90, 0.1), (90, 0.3)):
        kept = run(QuadraticAdmm(rho=rho), so.TopK(k), problem.loss.center)
        assert np.count_nonzero(kept) == k
    assert len(traces) == 1


def test_without_watching_the_answer_is_the_same(rng):
    problem = so.Problem(make_problem(rng).loss, so.TopK(200))
    watched, blind = (
        so.solve(problem, QuadraticAdmm(watch=watch), problem.loss.center, tol=-1.0, max_steps=12)
        for watch in (True, False)
    )
    np.testing.assert_array_equal(blind.value, watched.value)
    assert int(blind.steps) == 12
    assert np.isfinite(float(blind.objective))
