"""Every front end of the trend filter returns a status, is reproducible, and agrees in float32 and float64."""

import functools
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from tests.tiers import often

GRID, CHAIN = so.Graph.grid((4, 5)), so.Graph.chain(20)
SIGNAL = np.random.default_rng(6).standard_normal(20).round(3)
STEPS = np.repeat([0.0, 5.0, 2.0, 3.0], 5) + 0.1 * SIGNAL
TOL, NODES = 1e-5, np.arange(20)[:, None]
TWO_LEVELS = {"weights": [1.0, 0.3], "tol": TOL, "method": "interior"}
PARTS = ("value", "gap", "steps", "objective", "status")
# By the dtype of the signal: what each front end finds, and the names of what is compared.
FRONT_ENDS = {
    "fit": (lambda kind: so.trend_filter(SIGNAL.astype(kind), GRID, so.L1(0.3), 1, "doge", tol=TOL), PARTS),
    "mcp": (lambda kind: so.trend_filter(SIGNAL.astype(kind), GRID, so.MCP(0.3), 0, "doge", tol=TOL), PARTS),
    "counts": (lambda kind: so.trend_filter(STEPS.round().astype(kind), GRID, so.L1(0.3), loss="poisson"), PARTS),
    "path": (
        lambda kind: so.trend.trend_path(SIGNAL.astype(kind), GRID, order=1, num=4, ratio=0.1, tol=TOL),
        ("values", "gaps", "weights", "statuses"),
    ),
    "cross_validate": (
        lambda kind: so.cross_validate(so.trend.trend_path(SIGNAL.astype(kind), CHAIN, **TWO_LEVELS), 2),
        ("value", "errors", "folds", "path.statuses", "statuses"),
    ),
    # One unit in the last place of a step of 5 costs its penalty 1e-5 of this small objective in float32.
    "reweighted": (
        lambda kind: so.trend.reweighted(STEPS.astype(kind), CHAIN, so.MCP(0.3), tol=5 * TOL),
        ("value", "objectives", "weights", "status", "solution.status"),
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


@pytest.mark.parametrize("name", often(FRONT_ENDS, "fit", "mcp", "counts", "path", "largest_weight", "noise_level"))
def test_two_runs_agree_to_the_last_bit_and_say_how_they_ended(runs, name):
    for part in FRONT_ENDS[name][1]:
        one, other = (attrgetter(part)(runs(name, np.float64, run)) for run in (0, 1))
        np.testing.assert_array_equal(one, other, err_msg=part)
        if "status" in part:
            assert set(np.ravel(one).astype(int)) <= {so.Status.CONVERGED, so.Status.STATIONARY}, part


def test_fits_of_two_compilations_agree_to_the_last_bit(runs, compiled_afresh):
    first, again = runs("fit", np.float64), compiled_afresh(FRONT_ENDS["fit"][0], np.float64)
    for part in PARTS:
        np.testing.assert_array_equal(getattr(again, part), getattr(first, part))


@pytest.mark.thorough
def test_front_ends_agree_in_float32_and_float64(runs):
    wide, short = ({name: runs(name, kind) for name in FRONT_ENDS} for kind in (np.float64, np.float32))
    for objective, one, other in zip(wide["path"].objectives, wide["path"].values, short["path"].values, strict=True):
        assert np.linalg.norm(one - other) <= 2 * np.sqrt(2 * TOL * objective)
    assert wide["cross_validate"].index == short["cross_validate"].index
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


def test_values_that_are_not_finite_are_named_by_every_front_end():
    found = so.trend_filter(SIGNAL, GRID, Fragile(0.3), 0, so.trend.Admm(rho=1.0))
    assert found.status == so.Status.NONFINITE
    assert 10 <= int(found.steps) <= 20  # rho changes at step 10
    options = {"weights": [1.0, 0.5], "method": "admm"}
    path = so.trend.trend_path(SIGNAL, GRID, Fragile(1.0), **options)
    assert set(path.statuses) == {int(so.Status.NONFINITE)}
    model = so.GraphTrendFilter(graph=GRID, penalty=Fragile, method="admm")
    for call, said in (
        (found.check, "NONFINITE"),
        (path.check, "NONFINITE"),
        (lambda: so.select(path, "gcv"), "2 levels of the path"),
        (lambda: so.cross_validate(path, 2), "levels of the folds"),
        (lambda: model.fit(NODES, SIGNAL), "NONFINITE"),
    ):
        with pytest.raises(RuntimeError, match=said):
            call()


def test_a_large_signal_is_solved_in_float32_and_certified_in_float64():
    rng, y, graph, penalty = np.random.default_rng(3), np.zeros((104, 104)), so.Graph.grid((104, 104)), so.L1(15.0)
    y[20:60, 30:90] = 100
    y[50:95, 10:50] += 60
    y += 10 * rng.standard_normal(y.shape)
    short = so.trend_filter(y, graph, penalty, tol=1e-6).check()
    assert (short.value.dtype, short.steps.dtype) == (np.float64, np.int32)
    rows = graph.matrix(1) @ short.value.reshape(-1)
    pull = (graph.matrix(1).T @ short.dual).reshape(y.shape)
    assert np.abs(short.dual).max() <= 15.0
    objective = 0.5 * np.sum((y - short.value) ** 2) + 15.0 * np.abs(rows).sum()
    lower = np.sum(y * pull) - 0.5 * np.sum(pull**2)
    assert float(short.objective) == pytest.approx(objective, rel=1e-12)
    assert objective / lower - 1 <= 1.01e-6
