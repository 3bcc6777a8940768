"""What is known of jumps: intervals that hold as often as they say, p-values and parts of data thinning."""

import numpy as np
import pytest
from scipy import stats

import sparseopt as so

LAWS = {
    "gaussian": (so.trend.Thinning("gaussian", noise=1.0), lambda rng, mean: mean + rng.standard_normal(len(mean))),
    "poisson": (so.trend.Thinning("poisson"), lambda rng, mean: rng.poisson(50 + 10 * mean)),
    "binomial": (so.trend.Thinning("binomial", trials=60), lambda rng, mean: rng.binomial(60, (4 + mean) / 12)),
}
STEP = 3.0 * (np.arange(60) >= 24)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, held = np.random.default_rng(0), []
    for _ in range(120):
        found = so.trend.jumps(STEP + rng.standard_normal(60), max_jumps=2)
        for i in range(len(found.places)) if not found.line and len(found.places) == 1 else ():
            held.append((found.low[i] <= 3 <= found.high[i], found.first[i] <= 24 <= found.last[i]))
    assert len(held) > 80
    assert np.all(np.abs(np.mean(held, axis=0) - 0.95) < 0.05)


@pytest.mark.parametrize("law", LAWS)
def test_the_part_that_did_not_choose_the_places_says_what_is_there(law):
    thin, draw = LAWS[law]
    rng, held, p = np.random.default_rng(1), [], []
    scale = {"gaussian": 1, "poisson": 10, "binomial": 1 / 12}[law]
    for seed in range(90):
        thin = so.trend.Thinning(law, thin.noise, thin.trials, seed=seed)
        found = so.trend.jumps(draw(rng, STEP), max_jumps=2, thin=thin)
        for low, high, left, place, right in zip(
            found.low, found.high, [0, *found.places], found.places, [*found.places[1:], 60], strict=False
        ):
            truth = scale * (STEP[place:right].mean() - STEP[left:place].mean())
            held.append(found.line or low <= truth <= high)
        p.extend(found.p)
    assert len(held) > 50
    assert 0.9 <= np.mean(held) <= 0.99
    assert np.median(p) < 1e-4


def test_p_values_are_uniform_where_the_other_part_chose_a_jump_that_is_not_there(monkeypatch):
    from sparseopt.trend.segments import find

    chosen = find._Model(0, 0, np.array([22]), np.zeros(1, bool), False)
    monkeypatch.setattr(find, "_choose", lambda *_: chosen)
    for law, (thin, draw) in LAWS.items():
        rng, p = np.random.default_rng(2), []
        for seed in range(200):
            thin = so.trend.Thinning(law, thin.noise, thin.trials, seed=seed)
            p.extend(so.trend.jumps(draw(rng, np.zeros(60)), thin=thin).p)
        assert stats.kstest(p, "uniform").pvalue > 0.01, law


@pytest.mark.parametrize("law", LAWS)
def test_parts_add_up_and_are_independent(law):
    thin, draw = LAWS[law]
    y = draw(np.random.default_rng(0), np.zeros(20_000)).astype(float)[:, None]
    weights = np.ones(20_000)
    y[7], weights[7] = 0, 0  # a missing node
    (one, first), (other, rest) = so.trend.Thinning(law, thin.noise, thin.trials, share=0.3).parts(y, weights)
    whole = 1 if thin.trials is None else thin.trials
    np.testing.assert_allclose(first + rest, whole * weights)
    np.testing.assert_allclose(first[:, None] * one + rest[:, None] * other, y, atol=1e-12)
    assert (one[7], other[7]) == (0, 0)
    one, other, seen = np.delete(one, 7), np.delete(other, 7), np.delete(y, 7)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.025
    assert one.mean() == pytest.approx(seen.mean() / whole, abs=0.03 * seen.std() / whole)
    # A value of an independent part with a share of the information varies as much as one of as many values.
    variance = {"gaussian": 1.0, "poisson": 50.0, "binomial": 2 / 9 / 60}[law]
    assert one.var() == pytest.approx(variance / 0.3, rel=0.05)
    assert other.var() == pytest.approx(variance / 0.7, rel=0.05)


def test_few_counts_have_the_p_value_of_fishers_exact_test(monkeypatch):
    from sparseopt.trend.segments import find

    monkeypatch.setattr(find, "_choose", lambda *_: find._Model(0, 0, np.array([4]), np.zeros(1, bool), False))
    y, trials = np.array([0, 1, 2, 0, 3, 4, 2, 5]), np.array([4, 6, 5, 4, 5, 6, 4, 7])
    thin = so.trend.Thinning("binomial", trials=trials)
    rest, left = thin.parts(y[:, None].astype(float), np.ones(8))[1]
    rest = np.round(rest[:, 0] * left)
    table = [[part.sum(), n.sum() - part.sum()] for part, n in ((rest[:4], left[:4]), (rest[4:], left[4:]))]
    found = so.trend.jumps(y, thin=thin)
    assert found.p[0] == pytest.approx(stats.fisher_exact(table)[1])
    assert found.sizes[0] == pytest.approx(rest[4:].sum() / left[4:].sum() - rest[:4].sum() / left[:4].sum())


def test_more_trials_than_an_exact_test_can_count_have_a_p_value():
    y = np.random.default_rng(0).binomial(10**9, np.repeat([0.4, 0.4001], 20))
    found = so.trend.jumps(y, thin=so.trend.Thinning("binomial", trials=10**9))
    assert found.places.tolist() == [20]
    assert found.p[0] < 1e-9


def test_odd_series_have_intervals_around_their_places():
    rng = np.random.default_rng(4)
    step = np.repeat([0.0, 9.0], [94, 6]) + rng.standard_normal(100)
    gap = np.where(np.abs(np.arange(100) - 90) < 4, np.nan, step)
    times = np.cumsum(rng.uniform(0.5, 2, 100))
    for y, given in (
        (step, {}),
        (gap, {}),
        (np.column_stack([step, -step, np.ones(100)]), {}),
        (step, {"node_weights": rng.uniform(0.5, 2, 100)}),
        (step, {"graph": so.Graph.chain(100, times)}),
        (np.abs(times - 60) + step / 50, {"graph": so.Graph.chain(100, times)}),
        (np.repeat([0.0, 1.0], 3), {}),
        (np.ones(6), {}),
    ):
        for thin in (None, so.trend.Thinning("gaussian", noise=1.0)):
            found = so.trend.jumps(y, **given, thin=thin)
            assert np.all((found.first <= found.places) & (found.places <= found.last))
            assert np.all(np.isfinite(found.low) & (found.low <= found.sizes) & (found.sizes <= found.high))
            assert found.low.shape == found.high.shape == found.sizes.shape
            assert np.isnan(found.p).all() == (thin is None or not len(found.p))
    # A jump in a gap may be anywhere in it.
    assert so.trend.jumps(gap).first[0] == 87


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"law": "normal"}, "unknown law 'normal'"),
        ({"law": "gaussian"}, "needs noise, the standard deviation.*approximate"),
        ({"law": "gaussian", "noise": -1}, "a positive number.*given -1"),
        ({"law": "poisson", "noise": 1}, "has no noise"),
        ({"law": "binomial"}, "needs trials"),
        ({"law": "binomial", "trials": 1}, "at least 2"),
        ({"law": "poisson", "share": 1}, "share is between"),
        ({"law": "poisson", "seed": -1}, "seed"),
    ],
)
def test_a_law_that_cannot_be_is_a_sentence(given, says):
    with pytest.raises(ValueError, match=says):
        so.trend.Thinning(**given)


@pytest.mark.parametrize(
    ("thin", "y", "says"),
    [
        (so.trend.Thinning("poisson"), np.full(9, 1.5), "counts 0, 1, 2.*given 1.5 .9 such"),
        (so.trend.Thinning("binomial", trials=3), np.r_[np.zeros(8), 4], "up to their trials, given 4.0"),
        (
            so.trend.Thinning("binomial", trials=[3, 4]),
            np.zeros(9),
            "9 nodes need trials of one number or as many, given 2",
        ),
        (so.trend.Thinning("poisson"), np.full(9, -1), "given -1"),
        (so.trend.Thinning("gaussian", noise=[1, 2]), np.zeros(9), "1 channels need noise of one number"),
    ],
)
def test_values_that_a_law_has_not_are_a_sentence(thin, y, says):
    with pytest.raises(ValueError, match=says):
        so.trend.jumps(y, thin=thin)


def test_what_cannot_be_thinned_is_said_before_any_work():
    counts = np.arange(9)
    with pytest.raises(ValueError, match="have the weight 1, or 0 if missing: leave out node_weights"):
        so.trend.jumps(counts, node_weights=np.full(9, 2.0), thin=so.trend.Thinning("poisson"))
    with pytest.raises(TypeError, match="thin is a so"):
        so.trend.jumps(counts, thin="poisson")
