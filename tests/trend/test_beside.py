"""Covariates and a season beside a trend: one problem, optimal for Clarabel, whose gap is never below the truth."""

import numpy as np
import pytest
from scipy import sparse
from scipy.special import xlogy

import sparseopt as so
from tests.core import conic
from tests.tiers import often
from tests.trend.problems import LOSSES, TERMS, VALUES, observations, random_graph

CHAIN, FREE, GRID = so.Graph.chain(24, ends="graph"), so.Graph.chain(24), so.Graph.grid((4, 6))
UNEVEN = so.Graph.chain(24, times=np.cumsum(np.random.default_rng(1).uniform(0.3, 2, 24)))
OTHER = random_graph(np.random.default_rng(2), n=24, weighted=True)


def part_of(period, n):
    """A basis of the periodic signals whose sum over a period is 0."""
    phases = np.eye(period)[np.arange(n) % period]
    return phases[:, :-1] - phases[:, -1:]


def least(y, graph, weight, order, loss, mass, columns):
    """The least objective over the trend and the coefficients of the columns, by Clarabel."""
    seen, n, rows = mass > 0, len(y), graph.matrix(order + 1)
    form = conic.Conic(n + columns.shape[1])
    image = sparse.hstack([sparse.eye_array(n), sparse.csr_array(columns)], format="csr")
    TERMS[loss](form, image[seen], y[seen], mass[seen])
    none = sparse.csr_array((rows.shape[0], columns.shape[1]))
    conic.absolute(form, sparse.hstack([rows, none], format="csr"), np.full(rows.shape[0], weight))
    own = np.sum((mass * (xlogy(y, y) + xlogy(1 - y, 1 - y)))[seen]) if loss == "logistic" else 0.0
    return form.least() + own


# Graph, order, loss, weight, number of covariates, season, share of missing nodes.
CASES = {
    "a season": (FREE, 1, "square", 3.0, 0, 4, 0.0),
    "steps, and both": (CHAIN, 0, "square", 2.0, 2, 4, 0.0),
    "curves at uneven times": (UNEVEN, 2, "square", 1.0, 2, None, 0.0),
    "weights and missing nodes": (FREE, 1, "square", 1.0, 2, 4, 0.2),
    "a grid": (GRID, 0, "square", 1.5, 2, None, 0.0),
    "edges": (OTHER, 1, "square", 0.5, 2, None, 0.0),
    "outliers": (FREE, 1, "huber", 1.0, 2, 4, 0.0),
    "counts": (CHAIN, 0, "poisson", 0.8, 2, 4, 0.0),
    "labels": (GRID, 0, "logistic", 0.3, 1, None, 0.0),
    "outliers on edges": (OTHER, 0, "huber", 0.5, 2, None, 0.2),
    "rates at uneven times": (UNEVEN, 2, "poisson", 0.5, 1, 6, 0.0),
    "labels with a season": (FREE, 1, "logistic", 0.5, 1, 3, 0.0),
}


@pytest.mark.parametrize("case", often(CASES, *[*CASES][:9]))
def test_the_fit_is_optimal(case, rng):
    graph, order, loss, weight, count, season, absent = CASES[case]
    x, y, mass = rng.standard_normal((24, count)), 1.0 * observations(rng, loss, 24), np.ones(24)
    if loss in ("square", "huber"):
        y = y + x @ [2.0, -1.0][:count] + (3 * np.sin(np.arange(24) * 2 * np.pi / season) if season else 0)
    holes = y.copy()
    if absent:
        mass = rng.uniform(0.5, 2, 24)
        holes[rng.permutation(24)[: int(absent * 24)]] = np.nan
    options = {"covariates": x if count else None, "season": season, "loss": LOSSES[loss]}
    fit = so.trend_filter(holes, graph, so.L1(weight), order, node_weights=mass, missing="nan", **options)
    mass = np.where(np.isnan(holes), 0, mass)
    best = least(y, graph, weight, order, loss, mass, np.hstack([x, part_of(season, 24)] if season else [x]))
    trend, fitted = np.ravel(fit.value), np.ravel(fit.fitted)
    objective = np.sum((mass * VALUES[loss](fitted, y)[0])[mass > 0])
    objective += weight * np.abs(graph.matrix(order + 1) @ trend).sum()
    assert fit.status == so.Status.CONVERGED
    assert float(fit.objective) == pytest.approx(objective, rel=1e-9)
    assert best - 1e-7 * abs(best) <= objective <= (1 + float(fit.gap)) * best + 1e-7 * abs(best)
    beside = fitted - trend - (x @ fit.beta if count else 0)
    if season:
        np.testing.assert_allclose(beside, fit.season, atol=1e-9)
        np.testing.assert_allclose(fit.season[season:], fit.season[:-season], atol=1e-12)
        assert abs(fit.season[:season].sum()) < 1e-9
    else:
        assert fit.season is None
        np.testing.assert_allclose(beside, 0, atol=1e-9)


def test_what_the_covariates_and_the_season_explain_leaves_the_trend_as_it_is(rng):
    x, y, wave = rng.standard_normal((24, 2)), rng.standard_normal(24), np.tile([1.0, -3.0, 0.5, 1.5], 6)
    first, second = (
        so.trend_filter(each, FREE, so.L1(1.0), 1, tol=1e-10, covariates=x, season=4)
        for each in (y, y + x @ [5.0, -7.0] + wave)
    )
    np.testing.assert_allclose(second.value, first.value, atol=1e-7)
    np.testing.assert_allclose(second.beta - first.beta, [5.0, -7.0], atol=1e-7)
    np.testing.assert_allclose(second.season - first.season, wave, atol=1e-7)


def test_a_large_weight_is_least_squares_on_a_line_the_covariates_and_the_season(rng):
    x, y = rng.standard_normal((24, 2)), 5 * rng.standard_normal(24)
    fit = so.trend_filter(y, FREE, so.L1(1e4), 1, covariates=x, season=4).check()
    design = np.column_stack([np.ones(24), np.arange(24), x, part_of(4, 24)])
    found = np.linalg.lstsq(design, y)[0]
    np.testing.assert_allclose(fit.beta, found[2:4], atol=1e-8)
    np.testing.assert_allclose(fit.fitted, design @ found, atol=1e-8)
    assert not fit.nonzero.any()


def test_a_covariate_that_jumps_with_the_trend_gets_no_gap_it_has_not_earned(rng):
    """No coefficient but 0 has been tried where the first trend filter already meets its tolerance."""
    y = np.repeat([0.0, 4.0], 12) + 0.1 * rng.standard_normal(24)
    step = np.repeat([0.0, 1.0], 12)
    fit = so.trend_filter(y, CHAIN, so.L1(0.5), 0, covariates=step).check()
    best = least(y, CHAIN, 0.5, 0, "square", np.ones(24), step[:, None])
    assert float(fit.objective) <= best * (1 + float(fit.gap)) + 1e-9
    assert fit.beta[0] == pytest.approx(y[12:].mean() - y[:12].mean(), abs=1e-6)
    assert not fit.nonzero.any()


def test_a_signal_that_they_explain_wholly_is_fitted(rng):
    x, wave = rng.standard_normal((24, 2)), np.tile([1.0, -3.0, 0.5, 1.5], 6)
    fit = so.trend_filter(x @ [5.0, -7.0] + wave, FREE, so.L1(1.0), 1, covariates=x, season=4).check()
    np.testing.assert_allclose(fit.beta, [5, -7], atol=1e-9)
    np.testing.assert_allclose(fit.season, wave, atol=1e-9)


def test_rows_of_a_grid(rng):
    image, x = rng.standard_normal((4, 6)), rng.standard_normal((4, 6, 2))
    fit = so.trend_filter(image, GRID, so.L1(0.5), covariates=x)
    flat = so.trend_filter(image.ravel(), GRID, so.L1(0.5), covariates=x.reshape(24, 2))
    assert fit.value.shape == fit.fitted.shape == (4, 6)
    np.testing.assert_allclose(fit.fitted.ravel(), flat.fitted, atol=1e-12)
    np.testing.assert_allclose(fit.fitted, fit.value + x @ fit.beta, atol=1e-12)


def test_a_weight_is_chosen_beside_them_as_without_them(rng):
    x, wave = rng.standard_normal((96, 1)), np.tile([2.0, 1.0, -1.0, -2.0], 24)
    truth = np.interp(np.arange(96), [0, 40, 95], [0, 6, 1])
    y, chain = truth + 0.5 * rng.standard_normal(96), so.Graph.chain(96)
    alone = so.trend.choose_weight(y, chain, order=1)
    beside = so.trend.choose_weight(y + 3 * x[:, 0] + wave, chain, order=1, covariates=x, season=4)
    errors = [np.mean((np.asarray(chosen.value) - truth) ** 2) for chosen in (alone, beside)]
    assert errors[1] < 3 * errors[0] < 0.2
