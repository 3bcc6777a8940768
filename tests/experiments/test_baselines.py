"""The baselines of the Doge-ADMM paper solve the same problem as `trend_filter`, by the named algorithms."""

import numpy as np
import pytest

import sparseopt as so
from doge_baselines import Method, assemble, fit
from sparseopt.core.base.types import precision
from sparseopt.core.solve import solve
from tests.tiers import often

SHAPE, WEIGHT = (9, 8), so.L1(4.0)
GRID = so.Graph.grid(SHAPE)


@pytest.fixture(scope="module")
def signal() -> np.ndarray:
    i, j = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return 20.0 * (i > 4) + 2.0 * j + 5 * np.random.default_rng(0).standard_normal(SHAPE)


def above(found: so.Solution, best: so.Solution) -> float:
    return float(found.objective) / float(best.objective) - 1


NESTED = [("fast_admm", "tuned", order) for order in (0, 1, 2)]
PUBLISHED = [("doge", 0), ("doge", 1), ("admm", 1), ("fast_admm", 1), ("doge_groups", 1)]
CASES = [*NESTED, *((method, "published", order) for method, order in PUBLISHED)]


@pytest.mark.parametrize(("method", "settings", "order"), often(CASES, NESTED[1], ("doge_groups", "published", 1)))
def test_a_method_reaches_the_certified_optimum(signal: np.ndarray, method: Method, settings: str, order: int) -> None:
    nested = settings == "tuned"
    accuracy = {"tol": 1e-8, "inner_tol": 1e-11} if nested else {"tol": 1e-7}
    found = fit(signal, GRID, WEIGHT, order, method, settings=settings, **accuracy)
    best = so.trend_filter(signal, GRID, WEIGHT, order, tol=1e-11).check()
    assert so.Status(int(found.status)) is so.Status.CONVERGED
    assert float(found.objective) - float(best.objective) >= -1e-9
    assert above(found, best) <= min(float(found.gap) + 1e-10, 1e-7)
    np.testing.assert_allclose(np.asarray(found.value), best.value, atol=0.02)
    assert nested or float(found.state.rho) == 1.0
    # The gap is a bound with a coarse inner solve too.
    for steps in (5, 15) if nested and order == 1 else ():
        found = fit(signal, GRID, WEIGHT, order, method, tol=1e-12, max_steps=steps, inner_tol=1e-2)
        assert float(found.gap) >= above(found, best) - 1e-10


@pytest.mark.parametrize("method", ["doge", "doge_groups"])
def test_doge_with_published_settings_is_the_published_iteration(signal: np.ndarray, method: Method) -> None:
    """Copies `alpha_i`, duals `theta_i` for each group, as equations 9 to 11 of the paper have them."""
    matrix, labels = GRID.matrix(2).toarray(), GRID.groups(2)
    groups = [matrix[labels == group] for group in range(labels.max() + 1)]
    y = signal.reshape(-1)
    b, theta = y.copy(), [np.zeros_like(y) for _ in groups]
    for _ in range(10):
        alpha = []
        for rows, dual in zip(groups, theta, strict=True):
            v = b - dual
            s, squares = rows @ v, (rows**2).sum(axis=1)
            u = np.sign(s) * np.maximum(np.abs(s) - WEIGHT.weight * squares, 0)
            alpha.append(v + rows.T @ ((u - s) / squares))
        b = (y + sum(theta) + sum(alpha)) / (1 + len(groups))
        theta = [dual + copy - b for dual, copy in zip(theta, alpha, strict=True)]
    with precision(np.dtype(np.float64)):
        made = assemble(signal, GRID, WEIGHT, 1, method, "published")
        found = solve(made.problem, made.solver, made.start, tol=-1.0, max_steps=10)
        np.testing.assert_allclose(np.asarray(found.value).reshape(-1), b, atol=1e-10)


def test_what_a_baseline_cannot_do_is_said(signal: np.ndarray) -> None:
    with pytest.raises(ValueError, match="L1"):
        fit(signal, GRID, so.MCP(4.0), 1, "fast_admm")
    with pytest.raises(ValueError, match=r"one channel, given shape \(9, 8, 2\)"):
        fit(np.stack([signal, signal], axis=-1), GRID, WEIGHT, 1, "fast_admm")
