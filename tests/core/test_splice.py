"""Splicing: the loss never increases, tiny problems reach the best subset, patterns are kept."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.solvers.splice import Splice
from tests.core.test_solvers import make_problem
from tests.tiers import often

PATTERNS = [so.TopK(150), so.RowTopK(13), so.NM(2, 4), so.BlockTopK(17, (4, 3))]


def best_subset(hessian, center, k):
    """The least loss over all supports of k entries of one column, float64."""
    n = len(center)
    least = np.inf
    for chosen in itertools.combinations(range(n), k):
        inside = list(chosen)
        change = -center.copy()
        change[inside] += np.linalg.solve(hessian[np.ix_(inside, inside)], (hessian @ center)[inside])
        least = min(least, 0.5 * change @ hessian @ change)
    return least


@pytest.mark.parametrize("penalty", often(PATTERNS, PATTERNS[0], PATTERNS[2]), ids=repr)
def test_the_loss_never_increases_and_the_pattern_holds(rng, penalty):
    problem = so.Problem(make_problem(rng).loss, penalty)
    start = penalty.prox(problem.loss.center, 1.0)
    answer = so.solve(problem, Splice(), start, tol=0.0, max_steps=30, history=True)
    losses = np.asarray(answer.history.objective)[: int(answer.steps)]
    assert (np.diff(losses) <= 0).all()
    assert losses[-1] < float(problem.loss.value(start))
    assert losses[-1] == pytest.approx(float(problem.loss.value(answer.value)), rel=1e-3)
    assert float(penalty.value(answer.value)) == 0
    count = np.count_nonzero(penalty.mask(jnp.ones_like(start)))
    assert np.count_nonzero(answer.state.mask) == count
    assert ((answer.value == 0) | answer.state.mask).all()


def test_exchanges_beat_a_refit_of_the_first_support(rng):
    problem = so.Problem(make_problem(rng).loss, so.TopK(150))
    start = so.TopK(150).prox(problem.loss.center, 1.0)
    fixed = so.Problem(problem.loss, so.Support(start != 0))
    refit = so.solve(fixed, so.Refit(), start, tol=1e-6, max_steps=60)
    spliced = so.solve(problem, Splice(), start, tol=0.0, max_steps=30)
    assert float(spliced.objective) < 0.95 * float(refit.objective)


def test_tiny_problems_end_at_the_best_subset_most_times_and_never_worse_than_they_began(rng):
    k, penalty = 4, so.TopK(4)
    problems = [make_problem(rng, n=8, columns=1).loss for _ in range(80)]

    @jax.jit
    @jax.vmap
    def run(loss):
        start = penalty.prox(loss.center, 1.0)
        refit = so.solve(so.Problem(loss, so.Support(start != 0)), so.Refit(), start, tol=-1.0, max_steps=8)
        spliced = so.solve(so.Problem(loss, penalty), Splice(refit_steps=8), start, tol=0.0, max_steps=40)
        return refit.value, spliced.value

    answers = run(jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems))
    hessians, centers = (
        np.stack([np.asarray(getattr(loss, name), np.float64) for loss in problems]) for name in ("hessian", "center")
    )
    changes = [np.asarray(x, np.float64) - centers for x in answers]
    before, after = (0.5 * np.sum(change * (hessians @ change), axis=(1, 2)) for change in changes)
    least = np.array([best_subset(h, c[:, 0], k) for h, c in zip(hessians, centers, strict=True)])
    assert (after >= least * (1 - 1e-4)).all()
    assert (after <= before * (1 + 1e-4)).all()
    best_before, best_after = (np.mean(loss <= least * 1.001) for loss in (before, after))
    assert best_after >= 0.5
    assert best_after > 1.5 * best_before
    assert np.mean(np.log(after / least)) < 0.5 * np.mean(np.log(before / least))


def test_a_start_with_too_many_entries_is_cut_and_one_with_too_few_is_filled(rng):
    problem = so.Problem(make_problem(rng).loss, so.TopK(100))
    for start in (problem.loss.center, jnp.zeros_like(problem.loss.center)):
        assert np.count_nonzero(Splice().init(problem, start).mask) == 100


def test_rejections_in_a_row_end_the_search(rng):
    problem = so.Problem(make_problem(rng).loss, so.TopK(150))
    solver = Splice(patience=3)
    answer = so.solve(problem, solver, problem.loss.center, tol=0.0, max_steps=200)
    assert so.Status(int(answer.status)) is so.Status.STATIONARY
    assert int(answer.state.rejected) == 3 or float(answer.state.swapped) == 0
    assert int(answer.steps) < 200


def test_counts_are_leaves_one_trace_serves_all(rng):
    problem = make_problem(rng)
    traces = []

    @jax.jit
    def run(penalty, x):
        traces.append(1)
        return so.solve(so.Problem(problem.loss, penalty), Splice(), x, tol=0.0, max_steps=3).state.mask

    for k in (40, 90, 200):
        assert np.count_nonzero(run(so.TopK(k), problem.loss.center)) == k
    assert len(traces) == 1
