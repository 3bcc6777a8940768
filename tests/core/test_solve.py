import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from tests.core.test_solvers import make_problem


def test_user_penalty_is_traced_once(rng):
    traces = []

    class Counting:
        def value(self, x):
            return 0.1 * jnp.sum(jnp.abs(x))

        def prox(self, x, step):
            traces.append(1)
            return x - jnp.clip(x, -0.1 * step, 0.1 * step)

    penalty = jax.tree_util.register_static(Counting)()
    problem = make_problem(rng)
    solver = so.ProximalGradient()
    for seed in range(3):
        center = jnp.asarray(np.random.default_rng(seed).standard_normal(problem.loss.center.shape), jnp.float32)
        so.solve(so.Problem(so.Quadratic(problem.loss.hessian, center), penalty), solver, center, tol=1e-3)
    assert len(traces) == 1


def test_vmap_gives_each_lane_its_own_status_and_answer(rng):
    problem = make_problem(rng)
    problem = so.Problem(problem.loss, so.L1(0.2))  # convex, so that rounding cannot choose another answer
    centers = jnp.stack([problem.loss.center, 3 * problem.loss.center, jnp.full_like(problem.loss.center, jnp.nan)])

    def run(center):
        return so.solve(
            so.Problem(so.Quadratic(problem.loss.hessian, center), problem.penalty),
            so.Maiht(),
            center,
            tol=1e-5,
        )

    together = jax.vmap(run)(centers)
    assert together.status.tolist() == [so.Status.CONVERGED, so.Status.CONVERGED, so.Status.NONFINITE]
    assert int(together.steps[2]) == 0
    for lane in (0, 1):
        alone = run(centers[lane])
        assert int(alone.steps) == pytest.approx(int(together.steps[lane]), rel=0.2)
        np.testing.assert_allclose(alone.value, together.value[lane], rtol=1e-2, atol=1e-2)
    assert together.steps[0] != together.steps[1]


def test_negative_tolerance_runs_exactly_max_steps(rng):
    problem = make_problem(rng)
    answer = so.solve(problem, so.Maiht(), problem.loss.center, tol=-1.0, max_steps=7)
    assert int(answer.steps) == 7
    assert so.Status(int(answer.status)) is so.Status.MAX_STEPS


def test_check_says_how_it_ended_and_what_to_try(rng):
    problem = make_problem(rng)
    short = so.solve(problem, so.Maiht(), problem.loss.center, tol=1e-9, max_steps=3)
    with pytest.raises(RuntimeError, match=r"MAX_STEPS\) after 3 steps.*raise max_steps"):
        short.check()
    wild = so.solve(problem, so.ProximalGradient(step_size=1e6), problem.loss.center + 1, max_steps=50)
    with pytest.raises(RuntimeError, match=r"NONFINITE.*smaller step size"):
        wild.check()


def test_a_negative_limit_is_refused(rng):
    problem = make_problem(rng)
    with pytest.raises(ValueError, match="max_steps must be 0 or more, given -1"):
        so.solve(problem, so.Maiht(), problem.loss.center, max_steps=-1)


def test_zero_steps_return_the_start(rng):
    problem = make_problem(rng)
    answer = so.solve(problem, so.Maiht(), problem.loss.center, max_steps=0)
    np.testing.assert_array_equal(answer.value, problem.loss.center)
