"""Theoretical guarantees of mAIHT, plain proximal gradient and the CG refit, checked numerically."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.losses.quadratic import largest_eigenvalue_bound
from tests.tiers import often


def make_problem(rng, n=40, columns=12, weight=0.2, ridge=0.01):
    inputs = rng.standard_normal((3 * n, n)) @ (np.eye(n) + 0.5 * rng.standard_normal((n, n)))
    gram = inputs.T @ inputs
    scale = np.sqrt(np.diag(gram))
    hessian = gram / np.outer(scale, scale) + ridge * np.eye(n)
    center = rng.standard_normal((n, columns))
    loss = so.Quadratic(jnp.asarray(hessian, jnp.float32), jnp.asarray(center, jnp.float32))
    return so.Problem(loss, so.L0(weight))


@pytest.mark.parametrize("kind", ["random", "identity", "rank one", "tiny"])
def test_eigenvalue_bound_is_above_and_tight(rng, kind):
    n = {"random": 120, "identity": 30, "rank one": 50, "tiny": 2}[kind]
    factor = rng.standard_normal((2 * n, n)) if kind != "rank one" else rng.standard_normal((1, n))
    matrix = np.eye(n) if kind == "identity" else factor.T @ factor
    exact = np.linalg.eigvalsh(matrix)[-1]
    for seed in range(5):
        bound = float(largest_eigenvalue_bound(jnp.asarray(matrix, jnp.float32), jax.random.key(seed)))
        assert exact * (1 - 1e-5) <= bound <= exact * 1.01


@pytest.mark.parametrize("monitor", often(["always", "on_increase"], "on_increase"))
@pytest.mark.parametrize("penalty", [so.L0(0.2), so.L1(0.2), so.TopK(150), so.NM(2, 4)])
def test_objective_never_increases_at_a_fixed_level(rng, monitor, penalty):
    problem = make_problem(rng)
    problem = so.Problem(problem.loss, penalty)
    answer = so.solve(problem, so.Maiht(monitor=monitor), problem.loss.center, tol=1e-6, max_steps=200, history=True)
    values = np.asarray(answer.history.objective)[: int(answer.steps)]
    assert len(values) > 5
    assert (np.diff(values) <= 1e-5 * abs(values[0])).all()
    assert np.isnan(np.asarray(answer.history.objective)[int(answer.steps) :]).all()


def test_plain_step_descends_by_the_promised_amount(rng):
    problem = make_problem(rng)
    top = np.linalg.eigvalsh(np.asarray(problem.loss.hessian, np.float64))[-1]
    step = 0.97 / top
    x = problem.loss.center
    for _ in range(20):
        before = problem.loss.value(x) + problem.penalty.value(x)
        after_x = problem.penalty.prox(x - step * problem.loss.gradient(x), step)
        after = problem.loss.value(after_x) + problem.penalty.value(after_x)
        promised = (1 / (2 * step) - top / 2) * float(jnp.sum((after_x - x) ** 2))
        assert float(before - after) >= promised - 1e-4
        x = after_x


@pytest.mark.parametrize("solver", [so.Maiht(), so.Maiht(monitor="always"), so.ProximalGradient()])
def test_fixed_point_is_l_stationary(rng, solver):
    problem = make_problem(rng)
    answer = so.solve(problem, solver, problem.loss.center, tol=3e-7, max_steps=3000).check()
    step = float(answer.state.step_size)
    weight = problem.penalty.weight
    x = np.asarray(answer.value)
    gradient = np.asarray(problem.loss.gradient(answer.value))
    kept = x != 0
    assert 0.1 < kept.mean() < 0.9
    assert np.abs(x[kept]).min() >= np.sqrt(2 * weight * step) * (1 - 1e-4)
    assert np.abs(gradient[kept]).max() <= 1e-3
    assert np.abs(gradient[~kept]).max() <= np.sqrt(2 * weight / step) * (1 + 1e-3)


def test_acceleration_needs_fewer_steps_than_the_plain_iteration(rng):
    problem = make_problem(rng, n=60, weight=1e-3, ridge=0.0)
    problem = so.Problem(problem.loss, so.L1(0.05))
    start = jnp.zeros_like(problem.loss.center)
    plain = so.solve(problem, so.ProximalGradient(), start, tol=-1.0, max_steps=150)
    fast = so.solve(problem, so.Maiht(), start, tol=-1.0, max_steps=150)
    best = so.solve(problem, so.Maiht(), start, tol=-1.0, max_steps=4000).objective
    assert fast.objective - best < 0.2 * (plain.objective - best)


def test_adaptive_level_reaches_the_sparsity_asked_for(rng):
    problem = make_problem(rng, n=64, columns=64)
    for target in (0.3, 0.5, 0.7):
        problem = so.Problem(problem.loss, so.L0(1e-3))
        answer = so.solve(problem, so.Maiht(target_sparsity=target), problem.loss.center, tol=-1.0, max_steps=80)
        assert abs(float((answer.value == 0).mean()) - target) < 0.08


def test_support_rule_stops_when_the_support_rests(rng):
    problem = make_problem(rng)
    answer = so.solve(problem, so.Maiht(stop="support"), problem.loss.center, tol=0.0, max_steps=500).check()
    again = so.Maiht(stop="support").step(problem, answer.state)
    assert ((again.x != 0) == (answer.value != 0)).mean() > 0.99


def test_refit_equals_least_squares_on_small_supports(rng):
    n, k = 7, 3
    problem = make_problem(rng, n=n, columns=1)
    hessian = np.asarray(problem.loss.hessian, np.float64)
    center = np.asarray(problem.loss.center, np.float64)[:, 0]
    for chosen in itertools.combinations(range(n), k):
        mask = np.isin(np.arange(n), chosen)[:, None]
        fixed = so.Problem(problem.loss, so.Support(jnp.asarray(mask)))
        answer = so.solve(fixed, so.Refit(), problem.loss.center, tol=1e-6, max_steps=20).check()
        inside = list(chosen)
        exact = np.linalg.solve(hessian[np.ix_(inside, inside)], (hessian @ center)[inside])
        change = -center.copy()
        change[inside] += exact
        optimum = 0.5 * change @ hessian @ change
        assert float(problem.loss.value(answer.value)) == pytest.approx(optimum, rel=1e-4)
        assert (np.asarray(answer.value)[~mask] == 0).all()


def test_refit_never_raises_the_error_and_keeps_the_support(rng):
    problem = make_problem(rng)
    mask = jnp.asarray(rng.random(problem.loss.center.shape) < 0.5)
    fixed = so.Problem(problem.loss, so.Support(mask))
    answer = so.solve(fixed, so.Refit(), problem.loss.center, tol=1e-5, max_steps=40, history=True)
    values = np.asarray(answer.history.objective)[: int(answer.steps)]
    start = float(problem.loss.value(jnp.where(mask, problem.loss.center, 0)))
    assert (np.diff(np.concatenate([[start], values])) <= 1e-4).all()
    assert values[-1] == pytest.approx(float(problem.loss.value(answer.value)), rel=1e-3)
    assert ((answer.value == 0) | mask).all()


def test_refit_leaves_solved_and_empty_columns_alone(rng):
    problem = make_problem(rng, columns=3)
    mask = jnp.ones_like(problem.loss.center, bool).at[:, 1].set(False)
    fixed = so.Problem(problem.loss, so.Support(mask))
    answer = so.solve(fixed, so.Refit(), problem.loss.center, tol=1e-6, max_steps=5)
    assert so.Status(int(answer.status)) is so.Status.CONVERGED
    assert (answer.value[:, 1] == 0).all()
    np.testing.assert_array_equal(answer.value[:, 0], problem.loss.center[:, 0])
