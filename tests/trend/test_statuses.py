"""Every front end of the trend filter returns a status, is reproducible, and agrees in float32 and float64."""

import functools
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.trend.methods import piece_means
from tests.tiers import often

GRID, CHAIN = so.Graph.grid((4, 5)), so.Graph.chain(20)
SIGNAL = np.random.default_rng(6).standard_normal(20).round(3)
STEPS = np.repeat([0.0, 5.0, 2.0, 3.0], 5) + 0.1 * SIGNAL
TOL, NODES = 1e-5, np.arange(20)[:, None]
IN_TWO_FOLDS = {"folds": 2, "tol": TOL, "method": "interior"}


# By the dtype of the signal: what each front end finds, and the names of what is compared; fits are in `test_facts.py`.
FRONT_ENDS = {
    "path": (
        lambda kind: so.trend.trend_path(SIGNAL.astype(kind), GRID, order=1, num=4, ratio=0.1, tol=TOL),
        ("values", "gaps", "weights", "statuses"),
    ),
    "cross_validate": (
        lambda kind: so.trend.cross_validate(SIGNAL.astype(kind), CHAIN, weights=[1.0, 0.3], **IN_TWO_FOLDS),
        ("value", "errors", "folds", "path.statuses", "statuses"),
    ),
    # One unit in the last place of a step of 5 costs its penalty 1e-5 of this small objective in float32.
    "reweighted": (
        lambda kind: so.trend.reweighted(STEPS.astype(kind), CHAIN, so.MCP(0.3), tol=5 * TOL),
        ("value", "objectives", "weights", "status", "solution.status"),
    ),
    "mcp": (
        lambda kind: so.trend_filter(SIGNAL.astype(kind), GRID, so.MCP(0.3), 0, "doge", tol=TOL),
        ("value", "gap", "steps", "status"),
    ),
    "estimator": (
        lambda kind: so.GraphTrendFilter(1, 0.3, GRID, tol=TOL, method="doge").fit(NODES, SIGNAL.astype(kind)),
        ("fitted_values_", "gap_", "n_iter_", "solution_.status"),
    ),
    "largest_weight": (lambda kind: so.trend.largest_weight(SIGNAL.astype(kind), GRID, 1), ("real",)),
    "noise_level": (lambda kind: so.trend.noise_level(SIGNAL.astype(kind), GRID), ("real",)),
}


@pytest.fixture(scope="module")
def runs():
    """What a front end finds in a dtype, in the first or in a second run; each computed when it is asked for."""
    return functools.cache(lambda name, kind, run=0: jax.device_get(FRONT_ENDS[name][0](kind)))


@pytest.mark.parametrize("name", often(FRONT_ENDS, "path", "mcp", "largest_weight", "noise_level"))
def test_two_runs_agree_to_the_last_bit_and_say_how_they_ended(runs, name):
    for part in FRONT_ENDS[name][1]:
        one, other = (attrgetter(part)(runs(name, np.float64, run)) for run in (0, 1))
        np.testing.assert_array_equal(one, other, err_msg=part)
        if "status" in part:
            assert set(np.ravel(one).astype(int)) <= {so.Status.CONVERGED, so.Status.STATIONARY}, part


def test_fits_of_two_compilations_agree_to_the_last_bit(compiled_afresh):
    first, again = (
        call(so.trend_filter, SIGNAL, GRID, so.L1(0.3), 1, "doge")
        for call in (lambda function, *arguments: function(*arguments), compiled_afresh)
    )
    np.testing.assert_array_equal(again.value, first.value)
    np.testing.assert_array_equal(again.gap, first.gap)


@pytest.mark.thorough
def test_front_ends_agree_in_float32_and_float64(runs):
    wide, short = ({name: runs(name, kind) for name in FRONT_ENDS} for kind in (np.float64, np.float32))
    for objective, one, other in zip(wide["path"].objectives, wide["path"].values, short["path"].values, strict=True):
        assert np.linalg.norm(one - other) <= 2 * np.sqrt(2 * TOL * objective)
    assert wide["cross_validate"].index == short["cross_validate"].index
    np.testing.assert_array_equal(wide["cross_validate"].folds, short["cross_validate"].folds)
    np.testing.assert_allclose(short["cross_validate"].errors, wide["cross_validate"].errors, rtol=0.02)
    np.testing.assert_allclose(short["reweighted"].value, wide["reweighted"].value, atol=0.02)
    # These compute in float64 whatever they are given: only the rounding of the signal is left.
    for name in ("largest_weight", "noise_level"):
        assert short[name] == pytest.approx(wide[name], rel=1e-5)
    np.testing.assert_allclose(short["estimator"].fitted_values_, wide["estimator"].fitted_values_, atol=1e-3)


@so.pytree
class Fragile:
    """A penalty of a user's own whose prox is NaN once its step is no longer 1: when rho has changed."""

    weight: Any

    def value(self, x):
        return jnp.nansum(self.weight * jnp.abs(x))

    def prox(self, x, step):
        return jnp.where(step == 1, so.L1(self.weight).prox(x, step), jnp.nan)


def test_a_users_prox_that_returns_nan_on_the_way_is_named():
    found = so.trend_filter(SIGNAL, GRID, Fragile(0.3), 0, so.trend.Admm(rho=1.0))
    assert so.Status(int(found.status)) is so.Status.NONFINITE
    assert 10 <= int(found.steps) <= 20  # rho changes at step 10
    with pytest.raises(RuntimeError, match="NONFINITE"):
        found.check()


def test_a_path_through_nan_says_so_and_nothing_is_chosen_from_it():
    path = so.trend.trend_path(SIGNAL, GRID, Fragile(1.0), weights=[1.0, 0.5], method="admm")
    assert set(path.statuses) == {int(so.Status.NONFINITE)}
    with pytest.raises(RuntimeError, match="NONFINITE"):
        path.check()
    with pytest.raises(RuntimeError, match="2 levels of the path ended in values that are not finite, the first at"):
        so.trend.select(path, "gcv")
    with pytest.raises(RuntimeError, match="levels of the folds"):
        so.trend.cross_validate(SIGNAL, GRID, Fragile(1.0), weights=[1.0, 0.5], method="admm", folds=2)


def test_an_estimator_raises_where_the_fit_is_not_finite():
    model = so.GraphTrendFilter(graph=GRID, penalty=Fragile, method="admm")
    with pytest.raises(RuntimeError, match="NONFINITE"):
        model.fit(NODES, SIGNAL)


def test_reweighting_says_whether_it_settled():
    done = so.trend.reweighted(STEPS, CHAIN, so.MCP(0.3))
    assert (done.settled, done.status) == (True, so.Status.STATIONARY)
    cut = so.trend.reweighted(STEPS, CHAIN, so.MCP(0.3), rounds=1)
    assert (cut.settled, cut.status) == (False, so.Status.MAX_STEPS)


def blocks(side=104):
    """A picture in float64 that is large enough to be solved in float32 first."""
    rng, clean = np.random.default_rng(3), np.zeros((side, side))
    clean[20:60, 30:90] = 100
    clean[50:95, 10:50] += 60
    return clean + 10 * rng.standard_normal(clean.shape)


def test_a_large_signal_is_solved_in_float32_and_certified_in_float64(monkeypatch):
    y, graph, penalty = blocks(), so.Graph.grid((104, 104)), so.L1(15.0)
    short = so.trend_filter(y, graph, penalty, tol=1e-6).check()
    assert short.value.dtype == np.float64
    assert short.steps.dtype == np.int32
    rows = graph.matrix(1) @ short.value.reshape(-1)
    pull = (graph.matrix(1).T @ short.dual).reshape(y.shape)
    assert np.abs(short.dual).max() <= 15.0
    objective = 0.5 * np.sum((y - short.value) ** 2) + 15.0 * np.abs(rows).sum()
    lower = np.sum(y * pull) - 0.5 * np.sum(pull**2)
    assert float(short.objective) == pytest.approx(objective, rel=1e-12)
    assert objective / lower - 1 <= 1.01e-6

    # Where float32 is not enough the solve goes on from there, in float64.
    monkeypatch.setattr(piece_means, "BELOW", 1e5)
    resumed = so.trend_filter(y, graph, penalty, tol=1e-6).check()
    assert resumed.steps > 0
    np.testing.assert_allclose(resumed.value, short.value, atol=0.05)
    stopped = so.trend_filter(y, graph, penalty, tol=1e-6, max_steps=10)
    assert so.Status(int(stopped.status)) == so.Status.MAX_STEPS
    assert stopped.steps == 10

    # What overflows float32 does not overflow float64.
    huge = so.trend_filter(1e30 * y, graph, so.L1(15e30), tol=1e-5).check()
    np.testing.assert_allclose(huge.value / 1e30, short.value, atol=0.05)
