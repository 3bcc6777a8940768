import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.base.types import precision
from sparseopt.core.operators.differences import Difference, GridBase
from sparseopt.core.operators.maps import Split
from sparseopt.core.solvers.admm import Admm
from sparseopt.core.solvers.loss_admm import LossAdmm
from sparseopt.core.solvers.rising_admm import QuadraticAdmm
from sparseopt.core.solvers.splice import Splice
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
    with precision(np.dtype(np.float64)):
        problem = make_problem(rng)
        loss = jax.tree.map(lambda leaf: leaf.astype(np.float64), problem.loss)
        centers = jnp.stack([loss.center, 3 * loss.center, jnp.full_like(loss.center, jnp.nan)])

        def run(center):
            # Convex, so that rounding cannot choose another answer.
            convex = so.Problem(so.Quadratic(loss.hessian, center), so.L1(0.2))
            return so.solve(convex, so.Maiht(), center, tol=1e-5)

        together = jax.vmap(run)(centers)
        assert together.status.tolist() == [so.Status.CONVERGED, so.Status.CONVERGED, so.Status.NONFINITE]
        assert int(together.steps[2]) == 0
        for lane in (0, 1):
            alone = run(centers[lane])
            assert int(alone.steps) == int(together.steps[lane])
            np.testing.assert_allclose(alone.value, together.value[lane], rtol=1e-6, atol=1e-6)
        assert together.steps[0] != together.steps[1]


def test_negative_tolerance_runs_exactly_max_steps(rng):
    problem = make_problem(rng)
    answer = so.solve(problem, so.Maiht(), problem.loss.center, tol=-1.0, max_steps=7)
    assert int(answer.steps) == 7
    assert so.Status(int(answer.status)) is so.Status.MAX_STEPS


def test_a_history_holds_the_last_step_also_beyond_the_limit(rng):
    problem = so.Problem(so.LeastSquares(rng.standard_normal((8, 5)), rng.standard_normal(8)), so.L1(0.1))
    solution = so.solve(problem, tol=-1, max_steps=5, history=True)
    assert int(solution.steps) == solution.history.residual.shape[0] == 10
    assert float(solution.history.objective[-1]) == float(solution.objective)


def test_arrays_of_other_kinds_of_numbers_are_solved_in_one_that_holds_all(rng):
    center = np.array([3, 1, -2])
    wanted = so.solve(so.Problem(so.Quadratic(jnp.eye(3), center.astype(float)), so.L1(0.5))).value
    for problem, start in (
        (so.Problem(so.Quadratic(jnp.eye(3), jnp.asarray(center)), so.L1(0.5)), None),
        (so.Problem(so.LeastSquares(np.eye(3), center), so.L1(np.full(3, 0.5))), np.zeros(3, int)),
        (so.Problem(so.Quadratic(np.eye(3, dtype=int), center), so.L1(0.5)), None),
    ):
        np.testing.assert_allclose(so.solve(problem, start=start).value, wanted, atol=1e-6)
    labels, matrix = rng.integers(0, 2, 8), rng.standard_normal((8, 2))
    fits = [
        so.solve(so.Problem(so.LogisticLoss(matrix, labels.astype(kind)), so.L1(0.1))).value
        for kind in (bool, int, float)
    ]
    np.testing.assert_allclose(fits, [fits[-1]] * 3, atol=1e-5)
    with precision(np.dtype(np.float64)):
        narrow = so.LeastSquares(np.eye(3, dtype=np.float32), center.astype(np.float32))
        for problem in (
            so.Problem(so.LeastSquares(narrow.matrix, narrow.target, np.ones(3)), so.L1(0.5)),
            so.Problem(narrow, so.L1(np.full(3, 0.5))),
            so.Problem(so.Quadratic(np.eye(3), center.astype(np.float32)), so.L1(0.5)),
        ):
            found = so.solve(problem).value
            assert found.dtype == np.float64
            np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: so.Problem(so.Quadratic(jnp.eye(2), jnp.ones(2)), so.L1), "a penalty is an object .* the class L1"),
        (
            lambda: so.Problem(so.Quadratic(jnp.eye(2), jnp.ones(2)), so.L1(-1.0)),
            "must not be negative, given -1",
        ),
        *(
            (lambda penalty=penalty: so.Problem(so.Quadratic(jnp.eye(2), jnp.ones(2)), penalty), text)
            for penalty, text in (
                (so.Nonnegative(-5.0), "weight must not be negative, given -5"),
                (so.ElasticNet(0.3, -0.5), "ridge must not be negative, given -0.5"),
                (so.L1(np.float32(-1)), "weight must not be negative, given -1"),
                (so.L1(jnp.bfloat16(-1)), "weight must not be negative, given -1"),
                (so.MCP(0.3, np.int64(-1)), "the gamma of MCP must be above 0, given -1"),
                (so.MCP(0.3, -1.0), "the gamma of MCP must be above 0, given -1"),
                (so.SCAD(0.3, 1.0), "the a of SCAD must be above 2, given 1"),
                (so.LogSum(0.3, 0.0), "the eps of LogSum must be above 0"),
                (so.Simplex(-1.0), "the radius of Simplex must be above 0"),
                (so.Box(2.0, np.array([3.0, -1.0])), "the bounds of Box must be low <= high"),
                (so.L0(np.ones(2)), r"the weight of L0 is one number, given the shape \(2,\)"),
            )
        ),
        (lambda: so.Problem(so.Quadratic(jnp.eye(3), jnp.ones(2)), so.L1(1.0)), r"a hessian of shape \(2, 2\), given"),
        (lambda: so.Problem(so.Quadratic(np.diag([1.0, -1.1]), np.ones(2)), so.L1(1.0)), "eigenvalue -1.1"),
        (lambda: so.Problem(so.Quadratic(np.triu(np.ones((2, 2))), np.ones(2)), so.L1(1.0)), "a symmetric hessian"),
    ],
)
def test_what_is_no_problem_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        so.solve(make())


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (so.scalar.Absolute(), np.int32),
        (so.scalar.Huber(0.5), np.int32),
        (so.scalar.Logistic(), np.uint8),
        (so.scalar.Poisson(), np.uint8),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_targets_of_whole_numbers_are_those_of_floats(rng, loss, kind):
    matrix, counts = rng.standard_normal((12, 3)).astype(np.float32), rng.integers(0, 2, 12)
    whole, floats = (
        so.solve(so.Problem(so.DataLoss(loss, matrix, counts.astype(k)), so.L1(0.3)), tol=1e-4)
        for k in (kind, np.float32)
    )
    assert so.Status(int(whole.status)) is so.Status.CONVERGED
    np.testing.assert_array_equal(whole.value, floats.value)


def test_known_weights_may_be_arrays_of_jax_under_jit():
    weight, rate = jnp.asarray(0.5), jnp.asarray(0.1)
    fit = jax.jit(lambda c: so.solve(so.Problem(so.Quadratic(jnp.eye(2), c), so.L1(weight))).value)
    np.testing.assert_allclose(fit(jnp.array([2.0, 0.1])), [1.5, 0.0], atol=1e-6)
    step = jax.jit(
        lambda x: so.proximal(so.L1(weight), rate).update(-x, so.proximal(so.L1(weight), rate).init(x), x)[0]
    )
    assert np.isfinite(step(jnp.ones(2))).all()


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


CHAIN = Difference(GridBase((40,)), 1)
TAKEN_APART = Split(CHAIN, CHAIN, 1.0, 1.0)
REFUSED = {
    "an operator and mAIHT": (so.Maiht(), {"operator": CHAIN}, "Maiht .* operator Difference; .*trend_filter"),
    "an operator and proximal gradient": (
        so.ProximalGradient(),
        {"operator": CHAIN},
        "ProximalGradient .*trend_filter",
    ),
    "an operator and refit": (so.Refit(), {"operator": CHAIN, "penalty": so.Support(True)}, "Refit .*trend_filter"),
    "an operator and splicing": (Splice(), {"operator": CHAIN, "penalty": so.TopK(3)}, "Splice .*trend_filter"),
    "an operator and ADMM": (QuadraticAdmm(), {"operator": CHAIN}, "QuadraticAdmm .*trend_filter"),
    "refit without a support": (so.Refit(), {}, "needs a Support as its penalty, given L0"),
    "splicing without a pattern": (Splice(), {"penalty": so.Support(True)}, r"needs a penalty with mask\(score\)"),
    "split ADMM without an operator": (Admm(None, 1.0), {}, "Admm needs a Split as the problem's operator, given none"),
    "split ADMM of another map": (
        LossAdmm(None, 1.0, sigma=1.0, anchor=None),
        {"operator": CHAIN},
        "LossAdmm .* given Difference",
    ),
    "split ADMM of another loss": (
        Admm(None, 1.0),
        {"operator": TAKEN_APART},
        "given Quadratic without target, weigh, mask_missing",
    ),
    "a loss without a gradient": (
        so.ProximalGradient(),
        {"loss": so.L1(1.0)},
        "needs a loss with .*, given L1 without",
    ),
    "a level and no weight": (so.Maiht(target_sparsity=0.5), {"penalty": so.TopK(3)}, "given TopK without weight"),
}


@pytest.mark.parametrize(("solver", "changes", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_solver_does_not_take_is_refused_before_tracing(rng, monkeypatch, solver, changes, text):
    monkeypatch.setattr(type(solver), "init", lambda *_: pytest.fail("it began"))
    problem = dataclasses.replace(make_problem(rng), **changes)
    with pytest.raises(ValueError, match=text):
        so.solve(problem, solver, problem.penalty)
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(lambda problem: so.solve(problem, solver, jnp.zeros(3)).value, problem)


def test_zero_steps_return_the_start(rng):
    problem = make_problem(rng)
    answer = so.solve(problem, so.Maiht(), problem.loss.center, max_steps=0)
    np.testing.assert_array_equal(answer.value, problem.loss.center)
