"""The choice of a weight: degrees of freedom, criteria, cross-validation and the noise level."""

import dataclasses

import numpy as np
import pytest

import sparseopt as so
from sparseopt.trend import choose_weight, degrees_of_freedom, noise_level, trend_path, unlike_channels
from tests.trend.problems import FREE, GRAPHS, VALUES, two_parts

CHAIN = so.Graph.chain(60)
CLEAN = np.repeat([0.0, 4.0, 1.0], 20)


@pytest.mark.parametrize("name", GRAPHS | FREE)
@pytest.mark.parametrize("order", range(4))
def test_degrees_of_freedom_are_the_nullity_of_the_zero_rows(rng, name, order):
    graph = (GRAPHS | FREE)[name](rng)
    matrix = graph.matrix(order + 1).toarray()
    for share in (0.0, 0.1, 0.3, 0.6, 1.0):
        nonzero = rng.random(len(matrix)) < share
        if order % 2:
            nonzero[graph.isolated] = False  # a row without entries is zero at every fit
        rank = np.linalg.matrix_rank(matrix[~nonzero], tol=1e-9) if not nonzero.all() else 0
        assert degrees_of_freedom(nonzero, graph, order) == graph.num_nodes - rank


def test_degrees_of_freedom_are_those_of_every_channel_and_of_what_was_observed():
    chain, jump = so.Graph.chain(5), np.array([False, True, False, False])
    assert degrees_of_freedom(np.stack([jump, ~jump], axis=1), chain) == 2 + 4
    # A piece that nobody has seen is not free.
    assert degrees_of_freedom(jump, chain, observed=[True, True, False, False, False]) == 1
    assert degrees_of_freedom([True] * 3, chain, 1, observed=[True, True, True, False, False]) == 3


def test_sure_is_an_unbiased_estimate_of_the_loss(rng):
    # Over the noise SURE less the loss has the mean 0 at every fixed weight; a wrong count would show.
    weights, repeats, differences = [8.0, 2.0, 0.7, 0.2], 150, []
    for _ in range(repeats):
        path = trend_path(CLEAN + rng.standard_normal(60), CHAIN, weights=weights, tol=1e-6)
        loss = ((path.values - CLEAN) ** 2).mean(axis=1)
        differences.append(so.select(path, "sure", sigma=1.0).curve - loss)
    mean, error = np.mean(differences, axis=0), np.std(differences, axis=0, ddof=1) / np.sqrt(repeats)
    assert np.all(np.abs(mean) < 3.5 * error)
    assert np.all(error < 0.04)  # of a price of 2 df / 60, which goes up to 1


@pytest.fixture(scope="module")
def path():
    return trend_path(CLEAN + np.random.default_rng(5).standard_normal(60), CHAIN, num=15, tol=1e-6)


def test_criteria_are_their_formulas(path):
    rss, df, n = path.deviances, path.degrees_of_freedom, 60
    assert n / 2 < df.max() < n - 2
    expected = {
        ("gcv", None): np.where(df <= n / 2, n * rss / (n - df) ** 2, np.inf),
        ("sure", 0.9): rss / n + 2 * 0.81 * df / n - 0.81,
        ("aic", 0.9): rss / 0.81 + 2 * df,
        ("bic", 0.9): rss / 0.81 + np.log(n) * df,
        ("aic", None): n * np.log(rss / n) + 2 * n * (df + 1) / (n - df - 2),
        ("bic", None): rss / path.noise**2 + np.log(n) * df,
    }
    for (criterion, sigma), curve in expected.items():
        found = so.select(path, criterion, sigma)
        np.testing.assert_allclose(found.curve, curve)
        assert found.index == np.argmin(curve)
        assert found.weight == path.weights[found.index]
        np.testing.assert_array_equal(found.value, path.values[found.index])
    assert so.select(path, "sure").sigma == so.select(path, "bic").sigma == path.noise
    profiled = so.select(dataclasses.replace(path, noise=np.nan), "bic")
    np.testing.assert_allclose(profiled.curve, np.where(df <= n / 2, n * np.log(rss / n) + np.log(n) * df, np.inf))
    assert so.select(path, "bic", 1.0).weight >= so.select(path, "aic", 1.0).weight


def test_a_fit_that_uses_up_the_data_is_never_chosen_by_a_criterion_without_sigma(rng):
    y = rng.standard_normal(60)
    path = dataclasses.replace(trend_path(y, CHAIN, weights=[1.0, 0.5, 1e-6], tol=1e-10), noise=np.nan)
    assert path.degrees_of_freedom[-1] == 60
    for criterion in ("gcv", "aic", "bic"):
        found = so.select(path, criterion)
        assert found.curve[-1] == np.inf
        assert found.index < 2


def test_no_level_is_best_where_all_use_up_the_data(rng):
    pairs = so.Graph.from_edges([(2 * i, 2 * i + 1) for i in range(5)], 12)
    path = trend_path(rng.standard_normal(12), pairs, num=3)
    with pytest.raises(ValueError, match=r"no level best: .* \(7 or more of 12 values\)"):
        so.select(path)
    assert np.isfinite(so.select(path, "sure", sigma=1.0).curve).all()


@pytest.mark.parametrize("order", [0, 1])
def test_the_noise_level_sees_noise_and_not_jumps_or_weights(rng, order):
    graph = so.Graph.grid((40, 50))
    jumps = 100.0 * (np.arange(40)[:, None] > 20) * np.ones(50)
    noise = 2.5 * rng.standard_normal((40, 50))
    assert noise_level(jumps + noise, graph, order) == pytest.approx(2.5, rel=0.1)
    assert noise_level(jumps + noise, graph, order) > noise_level(noise, graph, order)
    assert noise_level(np.stack([noise, noise], axis=-1), graph, order) == noise_level(noise, graph, order)
    w = rng.uniform(0.2, 4.0, 2000)
    unequal = noise / np.sqrt(w).reshape(40, 50)
    assert noise_level(jumps + unequal, graph, order, w) == pytest.approx(2.5, rel=0.1)
    # A missing node is one of weight 0.
    w, wild = np.ones(2000), noise.reshape(-1).copy()
    w[777], wild[777] = 0, np.nan
    assert noise_level(wild, graph, order, missing="nan") == noise_level(noise, graph, order, w)


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_are_balanced_over_nodes_and_components(rng, folds):
    observed = np.ones(11, bool)
    observed[[2, 10]] = False
    graph = so.Graph.from_edges(np.concatenate([two_parts(rng).edges, [[9, 10]]]), 11)  # no isolated node
    call = {"node_weights": observed, "weights": [1.0], "tol": 0.1, "method": "doge"}
    path = trend_path(np.arange(11.0) % 4, graph, **call)
    held, again, other = (so.cross_validate(path, folds, seed=seed).folds for seed in (0, 0, 1))
    np.testing.assert_array_equal(held < 0, ~observed)
    assert np.ptp(np.bincount(held[observed], minlength=folds)) <= 1
    for part in range(graph.num_components):
        inside = held[(graph.components == part) & observed]
        assert np.ptp(np.bincount(inside, minlength=folds)) <= 1
        assert np.unique(inside).size >= 2  # whichever fold is held out, another stays
    np.testing.assert_array_equal(held, again)
    assert np.any(held != other)
    regions = np.arange(11) // 4
    np.testing.assert_array_equal(so.cross_validate(path, regions).folds, np.where(observed, regions, -1))
    alone = trend_path(np.arange(3.0), so.Graph.from_edges([(0, 1)], 3), weights=[0.1])
    with pytest.raises(ValueError, match=r"1 components have one observed node only .* node 2\)"):
        so.cross_validate(alone, 2)


@pytest.fixture(scope="module")
def validated(path):
    return so.cross_validate(path)


def test_cross_validation_predicts_held_out_nodes(validated):
    assert validated.check() is validated
    broken = dataclasses.replace(validated, statuses=np.where(np.eye(5, 15), 1, 0))
    with pytest.raises(RuntimeError, match=r"5 of 75 levels.*fold 0 at level 0 \(weight .*MAX_STEPS"):
        broken.check()
    y = CLEAN + np.random.default_rng(5).standard_normal(60)
    held, index = validated.folds == 2, 6
    weight = float(validated.path.weights[index])
    blind = so.trend_filter(y, CHAIN, so.L1(weight), tol=1e-8, node_weights=(~held).astype(float))
    # Between its neighbours any value of a missing node is optimal; a path of a chain takes the line.
    nodes = np.arange(60)
    line = np.interp(nodes, nodes[~held], np.asarray(blind.value)[~held])
    error = np.mean((line - y)[held] ** 2)
    assert validated.fold_errors[2, index] == pytest.approx(error, rel=1e-2)
    np.testing.assert_allclose(validated.errors, validated.fold_errors.mean(axis=0))
    np.testing.assert_allclose(validated.standard_errors, validated.fold_errors.std(axis=0, ddof=1) / np.sqrt(5))


def test_cross_validation_comes_near_the_oracle_and_the_rule_is_kept(validated):
    losses = ((validated.path.values - CLEAN) ** 2).mean(axis=1)
    assert losses[validated.index] <= 1.5 * losses.min()
    assert losses[validated.index] < 0.3 * min(losses[0], losses[-1])
    best = validated.index_by("min")
    for rule, share in (("one_se", 1.0), ("half_se", 0.5)):
        limit = validated.errors[best] + share * validated.standard_errors[best]
        simple = validated.index_by(rule)
        assert simple <= best
        assert validated.errors[simple] <= limit
        assert np.all(validated.errors[:simple] > limit)
    assert validated.weight == validated.path.weights[best]
    np.testing.assert_array_equal(validated.value, validated.path.values[best])


def test_cross_validation_weighs_the_held_out_nodes(rng):
    # Two groups of nodes whose errors differ: their weights decide the mean.
    y = CLEAN + rng.standard_normal(60) * np.where(np.arange(60) % 2, 0.1, 2.0)
    w = np.where(np.arange(60) % 2, 20.0, 0.05)
    found = so.cross_validate(trend_path(y, CHAIN, weights=[4.0, 2.0], node_weights=w), rule="one_se")
    plain = so.cross_validate(trend_path(y, CHAIN, weights=[4.0, 2.0]))
    assert np.all(found.errors < 0.5 * plain.errors)
    assert found.index == found.index_by("one_se")


COUNTS = np.random.default_rng(4).poisson(np.exp(CLEAN / 2)).astype(float)


def test_deviances_of_counts_are_chosen_by_their_own_dispersion():
    path = trend_path(COUNTS, CHAIN, num=12, loss="poisson")
    deviance, freedom = path.deviances, path.degrees_of_freedom
    np.testing.assert_allclose(so.select(path, "aic").curve, deviance + 2 * freedom)
    np.testing.assert_allclose(so.select(path, "bic").curve, deviance + np.log(60) * freedom)
    np.testing.assert_allclose(so.select(path, "aic", 2.0).curve, deviance / 4 + 2 * freedom)
    gcv = np.where(freedom <= 30, deviance / 60 / (1 - freedom / 60) ** 2, np.inf)
    np.testing.assert_allclose(so.select(path).curve, gcv)
    with pytest.raises(ValueError, match="sure estimates a mean squared error"):
        so.select(path, "sure")
    labels = trend_path((COUNTS > 1).astype(float), CHAIN, num=3, loss="logistic")
    with pytest.raises(ValueError, match=r"gcv does not choose among fits of labels.*cross_validate"):
        so.select(labels)
    assert (so.select(labels, "bic").sigma, so.cross_validate(labels, 2).rule) == (1, "half_se")
    best = so.select(path)
    assert np.mean(np.abs(best.value - CLEAN / 2)) < 0.4 < np.mean(np.abs(path.values[0] - CLEAN / 2))


@pytest.mark.thorough
def test_held_out_counts_are_judged_by_their_deviance():
    heard: list[tuple[str, int, int]] = []
    path = trend_path(COUNTS, CHAIN, num=4, loss="poisson")
    chosen = so.cross_validate(path, 2, observer=lambda *each: heard.append(each))
    assert heard == [("weight", done, 2 * 4) for done in range(2 * 4)]  # of both folds
    held = chosen.folds == 1
    kept = np.where(held, 0.0, 1.0)
    fit = trend_path(COUNTS, CHAIN, weights=chosen.path.weights, node_weights=kept, loss="poisson").values[2]
    deviances = 2 * VALUES["poisson"](fit[held], COUNTS[held])[0]
    assert chosen.fold_errors[1, 2] == pytest.approx(np.mean(deviances), rel=1e-3)


def test_a_rule_suits_loss_and_penalty_and_a_path_that_ends_too_early_goes_on(rng):
    y = CLEAN + rng.standard_normal(60)
    assert choose_weight(y, CHAIN).weight == so.select(trend_path(y, CHAIN), "gcv").weight
    levels = [4.0, 2.0, 0.1]
    few = {"weights": levels, "folds": 2}
    path = trend_path(y, CHAIN, so.MCP, weights=levels)
    assert choose_weight(y, CHAIN, so.MCP, **few).weight == so.cross_validate(path, 2).weight
    assert choose_weight(np.sign(y), CHAIN, loss="huber", **few).errors.size == 3
    found = choose_weight(y, CHAIN, num=2, ratio=0.9)
    assert (len(found.path), found.path.weights[0] < found.weight) == (50, False)
    assert 0 < found.index < 49


def test_channels_of_unlike_units_are_named(rng):
    y = rng.standard_normal((60, 2))
    assert unlike_channels(y, CHAIN) is unlike_channels(y[:, 0], CHAIN) is None
    y *= [1, 100]
    y[:3] = np.nan
    assert "smooths them all: bring them to one unit" in unlike_channels(y, CHAIN, missing="nan")
    with pytest.warns(UserWarning, match="bring them to one unit"):
        choose_weight(y, CHAIN, missing="nan", weights=[400.0, 200.0])


def test_the_bends_of_a_path_at_defaults_are_those_of_the_optimum(rng):
    """The rules count them; a gap of 1e-4 misses half."""
    y, chain = np.linspace(0, 3, 1000) + rng.standard_normal(1000), so.Graph.chain(1000)
    paths = [so.trend.trend_path(y, chain, order=1, num=12, **tol) for tol in ({}, {"tol": 1e-11}, {"tol": 1e-4})]
    default, exact, coarse = ([path.at(i).nonzero.sum() for i in range(12)] for path in paths)
    np.testing.assert_allclose(default, exact, atol=2)
    assert 2 * sum(coarse[:7]) < sum(exact[:7])
