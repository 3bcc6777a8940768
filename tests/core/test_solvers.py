"""Solvers of a quadratic loss and a penalty that need not be convex: guarantees and exact counts, checked numerically.

mAIHT, plain proximal gradient, the CG refit, splicing, and ADMM with a rising rho.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.losses.quadratic import largest_eigenvalue_bound
from sparseopt.layers.methods.admm import AdmmPruning, QuadraticAdmm
from sparseopt.layers.methods.splice import Splice
from tests.jitted import Jitted
from tests.tiers import often

PATTERNS = [so.TopK(150), so.RowTopK(13), so.NM(2, 4), so.BlockTopK(17, (4, 3))]


def make_problem(rng, penalty=None, n=40, columns=12, ridge=0.01):
    inputs = rng.standard_normal((3 * n, n)) @ (np.eye(n) + 0.5 * rng.standard_normal((n, n)))
    gram = inputs.T @ inputs
    scale = np.sqrt(np.diag(gram))
    hessian = gram / np.outer(scale, scale) + ridge * np.eye(n)
    center = rng.standard_normal((n, columns))
    loss = so.Quadratic(jnp.asarray(hessian, jnp.float32), jnp.asarray(center, jnp.float32))
    return so.Problem(loss, penalty or so.L0(0.2))


@pytest.fixture(scope="module")
def loss():
    return make_problem(np.random.default_rng(20251125)).loss


@jax.jit
def value_at(problem, x):
    return problem.loss.value(x) + problem.penalty.value(x)


def objective(problem, x):
    return float(value_at(problem, x))


def rising(problem, levels=5, growth=2.0, period=4, rho=0.1, **options):
    method = AdmmPruning(rho=rho, growth=growth, levels=levels, period=period, **options)
    return method.rising(problem, problem.loss.center)


def least(hessian, center, chosen):
    """The least loss over all x on a support of one column, float64."""
    inside, change = list(chosen), -center
    change[inside] += np.linalg.solve(hessian[np.ix_(inside, inside)], (hessian @ center)[inside])
    return 0.5 * change @ hessian @ change


def test_the_bound_of_an_eigenvalue_is_above_and_tight(rng):
    factors = [rng.standard_normal((2 * 60, 60)), np.eye(60), rng.standard_normal((1, 60)), np.diag([3, 1, *[0] * 58])]
    bound = jax.jit(jax.vmap(largest_eigenvalue_bound, (None, 0)))
    for factor in factors:
        matrix = factor.T @ factor
        exact = np.linalg.eigvalsh(matrix)[-1]
        bounds = np.asarray(bound(jnp.asarray(matrix, jnp.float32), jax.random.split(jax.random.key(0), 5)))
        assert ((exact * (1 - 1e-5) <= bounds) & (bounds <= exact * 1.01)).all()


ALWAYS, PLAIN = so.Maiht(monitor="always"), so.ProximalGradient()
SMOOTH = [so.Maiht(), ALWAYS, so.AcceleratedProximalGradient(cadence=1)]
MONOTONE = [
    *[(solver, penalty, 1e-6, 1e-5) for solver in SMOOTH for penalty in (so.L0(0.2), so.L1(0.2), so.NM(2, 4))],
    *[(Splice(), pattern, 0.0, 0.0) for pattern in PATTERNS],
    (so.Refit(), so.Support(np.random.default_rng(0).random((40, 12)) < 0.5), 1e-5, 1e-5),
]
FAST = [MONOTONE[0], MONOTONE[2], MONOTONE[6], MONOTONE[10], MONOTONE[13]]


@pytest.mark.parametrize(("solver", "penalty", "tol", "rounding"), often(MONOTONE, *FAST), ids=lambda part: None)
def test_the_objective_never_increases_and_is_that_of_the_answer(loss, solver, penalty, tol, rounding):
    problem, start = so.Problem(loss, penalty), loss.center
    if not isinstance(solver, so.Maiht):
        start = Jitted(penalty).prox(start, 1.0)
    answer = so.solve(problem, solver, start, tol=tol, max_steps=200, history=True)
    values, steps = np.asarray(answer.history.objective), int(answer.steps)
    assert steps > 3
    first = [] if isinstance(solver, so.Maiht) else [objective(problem, start)]
    assert (np.diff([*first, *values[:steps]]) <= rounding * abs(values[0])).all()
    assert np.isnan(values[steps:]).all()
    assert values[steps - 1] == pytest.approx(objective(problem, answer.value), rel=1e-3)
    assert not first or values[steps - 1] < first[0]


def test_plain_step_descends_by_the_promised_amount(loss):
    problem, x = so.Problem(loss, so.L0(0.2)), loss.center
    top = np.linalg.eigvalsh(np.asarray(loss.hessian, np.float64))[-1]
    step, found = 0.97 / top, []
    for steps in range(1, 12):
        found.append(so.solve(problem, so.ProximalGradient(step_size=step), x, tol=-1.0, max_steps=steps))
    for before, after in itertools.pairwise(found):
        promised = (1 / (2 * step) - top / 2) * float(jnp.sum((after.value - before.value) ** 2))
        assert objective(problem, before.value) - objective(problem, after.value) >= promised - 1e-4


@pytest.mark.parametrize("solver", [so.Maiht(), ALWAYS, PLAIN])
def test_fixed_point_is_l_stationary(loss, solver):
    weight = 0.2
    answer = so.solve(so.Problem(loss, so.L0(weight)), solver, loss.center, tol=1e-6, max_steps=3000).check()
    step = float(answer.state.step_size)
    x, gradient = np.asarray(answer.value), np.asarray(loss.gradient(answer.value))
    kept = x != 0
    assert 0.1 < kept.mean() < 0.9
    assert np.abs(x[kept]).min() >= np.sqrt(2 * weight * step) * (1 - 1e-4)
    assert np.abs(gradient[kept]).max() <= 1e-3
    assert np.abs(gradient[~kept]).max() <= np.sqrt(2 * weight / step) * (1 + 1e-3)


def test_acceleration_needs_fewer_steps_than_the_plain_iteration(rng):
    problem = make_problem(rng, so.L1(0.05), n=60, ridge=0.0)
    start = jnp.zeros_like(problem.loss.center)
    plain, fast, best = (
        so.solve(problem, solver, start, tol=-1.0, max_steps=steps).objective
        for solver, steps in ((PLAIN, 150), (so.Maiht(), 150), (so.Maiht(), 4000))
    )
    assert fast - best < 0.2 * (plain - best)


def test_adaptive_level_reaches_the_sparsity_asked_for(rng):
    problem = make_problem(rng, so.L0(1e-3), n=64, columns=64)
    for target in (0.3, 0.5, 0.7):
        answer = so.solve(problem, so.Maiht(target_sparsity=target), problem.loss.center, tol=-1.0, max_steps=80)
        assert abs(float((answer.value == 0).mean()) - target) < 0.08


def test_support_rule_stops_when_the_support_rests(loss):
    problem, solver = so.Problem(loss, so.L0(0.2)), so.Maiht(stop="support")
    answer = so.solve(problem, solver, loss.center, tol=0.0, max_steps=500).check()
    again = jax.jit(solver.step)(problem, answer.state)
    assert ((again.x != 0) == (answer.value != 0)).mean() > 0.99


def test_refit_equals_least_squares_on_small_supports(rng):
    loss = make_problem(rng, n=7, columns=1).loss
    hessian, center = (np.asarray(part, np.float64) for part in (loss.hessian, loss.center[:, 0]))
    for chosen in itertools.combinations(range(7), 3):
        mask = np.isin(np.arange(7), chosen)[:, None]
        fixed = so.Problem(loss, so.Support(jnp.asarray(mask)))
        answer = so.solve(fixed, so.Refit(), loss.center, tol=1e-6, max_steps=20).check()
        assert float(loss.value(answer.value)) == pytest.approx(least(hessian, center, chosen), rel=1e-4)
        assert (np.asarray(answer.value)[~mask] == 0).all()


def test_refit_leaves_solved_and_empty_columns_alone(loss):
    mask = jnp.ones_like(loss.center, bool).at[:, 1].set(False)
    answer = so.solve(so.Problem(loss, so.Support(mask)), so.Refit(), loss.center, tol=1e-6, max_steps=5)
    assert int(answer.status) == so.Status.STATIONARY
    assert (answer.value[:, 1] == 0).all()
    np.testing.assert_array_equal(answer.value[:, 0], loss.center[:, 0])


def test_tiny_problems_end_at_the_best_subset_most_times_and_never_worse_than_they_began(rng):
    penalty, losses = so.TopK(4), [make_problem(rng, n=8, columns=1).loss for _ in range(80)]

    @jax.jit
    @jax.vmap
    def run(loss):
        start = penalty.prox(loss.center, 1.0)
        refit = so.solve(so.Problem(loss, so.Support(start != 0)), so.Refit(), start, tol=-1.0, max_steps=8)
        spliced = so.solve(so.Problem(loss, penalty), Splice(refit_steps=8), start, tol=0.0, max_steps=40)
        return refit.value, spliced.value

    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *losses)
    hessians, centers = (np.asarray(part, np.float64) for part in (together.hessian, together.center))
    changes = [np.asarray(x, np.float64) - centers for x in run(together)]
    before, after = (0.5 * np.sum(change * (hessians @ change), axis=(1, 2)) for change in changes)
    supports = list(itertools.combinations(range(8), 4))
    best = np.array([min(least(h, c[:, 0], s) for s in supports) for h, c in zip(hessians, centers, strict=True)])
    assert (after >= best * (1 - 1e-4)).all()
    assert (after <= before * (1 + 1e-4)).all()
    share_before, share_after = (np.mean(reached <= best * 1.001) for reached in (before, after))
    assert share_after >= 0.5
    assert share_after > 1.5 * share_before
    assert np.mean(np.log(after / best)) < 0.5 * np.mean(np.log(before / best))


def test_a_start_with_too_many_entries_is_cut_and_one_with_too_few_is_filled(loss):
    begun = jax.jit(Splice().init)
    for start in (loss.center, np.zeros(loss.center.shape, np.float32)):
        assert np.count_nonzero(begun(so.Problem(loss, so.TopK(100)), start).mask) == 100


def test_rejections_in_a_row_end_the_search(loss):
    answer = so.solve(so.Problem(loss, so.TopK(150)), Splice(patience=3), loss.center, tol=0.0, max_steps=200)
    assert int(answer.status) == so.Status.STATIONARY
    assert int(answer.state.rejected) == 3 or float(answer.state.swapped) == 0
    assert int(answer.steps) < 200


def test_with_l1_admm_reaches_the_optimum_that_monotone_fista_reaches(rng):
    problem = make_problem(rng, so.L1(0.2), ridge=0.1)
    start = jnp.zeros_like(problem.loss.center)
    theirs = so.solve(problem, so.Maiht(), start, tol=1e-7, max_steps=3000)
    ours = so.solve(problem, QuadraticAdmm(rho=0.5), start, tol=-1.0, max_steps=400)
    assert objective(problem, ours.value) == pytest.approx(objective(problem, theirs.value), rel=1e-5)
    np.testing.assert_allclose(ours.value, theirs.value, atol=2e-3)
    # The fixed point is one: b and x agree, and v is the gradient there with its sign turned.
    np.testing.assert_allclose(ours.state.dual, -problem.loss.gradient(ours.value), atol=2e-3)


@pytest.fixture(scope="module")
def wide(loss):
    return so.Problem(loss, so.TopK(200))


def test_a_rising_rho_closes_the_gap_between_both_copies(wide):
    apart = []
    for levels in (1, 8):
        state = rising(wide, levels).state
        last = jax.jit(QuadraticAdmm().step)(wide, state)
        b = last.x + (last.dual - state.dual) / last.rho
        apart.append(float(jnp.linalg.norm(b - last.x) / jnp.linalg.norm(last.x)))
    assert apart[1] < 1e-2 * apart[0]


def test_the_objective_is_the_loss_at_b_and_the_residual_the_share_of_the_support_that_moved(wide):
    hessian, center = (np.asarray(part, np.float64) for part in (wide.loss.hessian, wide.loss.center))
    for rho in (1.0, 0.2):
        solver = QuadraticAdmm(rho=rho)
        state, step = solver.init(wide, wide.loss.center), jax.jit(solver.step)
        for _ in range(9):
            previous, state = state, step(wide, state)
            right = float(state.rho) * (np.asarray(previous.x, np.float64) - center) - np.asarray(previous.dual)
            moved = np.linalg.solve(hessian + float(state.rho) * np.eye(len(hessian)), right)
            assert float(state.objective) == pytest.approx(0.5 * np.sum(moved * (hessian @ moved)), rel=1e-3)
            changed = np.mean((np.asarray(state.x) != 0) != (np.asarray(previous.x) != 0))
            assert float(state.residual) == pytest.approx(changed, abs=1e-6)


def test_a_level_starts_where_the_one_before_ended_and_ends_early_where_the_support_rests(wide):
    """At a growth of 1 the levels are one solve in pieces; the last rho is that of the last level."""
    whole = so.solve(wide, QuadraticAdmm(rho=0.2), wide.loss.center, tol=-1.0, max_steps=9)
    parts = rising(wide, 3, 1.0, 3, rho=0.2)
    np.testing.assert_array_equal(parts.value != 0, whole.value != 0)
    np.testing.assert_allclose(parts.value, whole.value, rtol=1e-3, atol=1e-5)
    grown = rising(wide, 3, 3.0, 2, rho=0.2)
    assert float(grown.state.rho) == pytest.approx(0.2 * 9)
    assert int(grown.steps) == 6
    # With a share of 1 every step is at rest, and every level has one step, the first after which it is known.
    assert int(rising(wide, 4, period=5, rho=0.2, rest=1.0).steps) == 4
    assert 4 < int(rising(wide, 4, period=5, rho=0.2, rest=0.0).steps) <= 20


def test_without_watching_the_answer_is_the_same(wide):
    watched, blind = (
        so.solve(wide, QuadraticAdmm(watch=watch), wide.loss.center, tol=-1.0, max_steps=12) for watch in (True, False)
    )
    np.testing.assert_array_equal(blind.value, watched.value)
    assert int(blind.steps) == 12
    assert np.isfinite(float(blind.objective))
