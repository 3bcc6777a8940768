"""Jumps of series: segmentations against all others, broken lines against least squares, what is known of them."""

import itertools

import numpy as np
import pytest
from scipy import stats

import sparseopt as so
from sparseopt.trend.segments import find, functional, segmentation
from sparseopt.trend.segments.joined import fit_pieces, values_of
from sparseopt.trend.segments.segmentation import Sums, best_segmentations
from tests.trend.problems import LOSSES, VALUES

# The annual flow at Aswan, 1871 to 1970, in 10^8 m³ (Cobb, Biometrika 65, 1978).
NILE = """
1120 1160 963 1210 1160 1160 813 1230 1370 1140 995 935 1110 994 1020 960 1180 799 958 1140 1100 1210 1150 1250 1260
1220 1030 1100 774 840 874 694 940 833 701 916 692 1020 1050 969 831 726 456 824 702 1120 1100 832 764 821 768 845 864
862 698 845 744 796 1040 759 781 865 845 944 984 897 822 1010 771 676 649 846 812 742 801 1040 860 874 848 890 744 749
838 1050 918 986 797 923 975 815 1020 906 901 1170 912 746 919 718 714 740
"""


def noise(rng, n, correlation=0.0):
    z = rng.standard_normal(n + 50)
    for i in range(1, len(z)):
        z[i] = correlation * z[i - 1] + np.sqrt(1 - correlation**2) * z[i]
    return z[50:]


def all_costs(y, w, t, line, least):
    """The smallest cost for every number of jumps, from least squares on every piece of every segmentation."""
    n = len(y)

    def cost(i, j):
        design = np.vander(t[i:j], 1 + line) * np.sqrt(w[i:j, None])
        seen = np.sqrt(w[i:j, None]) * y[i:j]
        return np.sum((seen - design @ np.linalg.lstsq(design, seen)[0]) ** 2) if j - i >= least else np.inf

    costs = {(i, j): cost(i, j) for i, j in itertools.combinations(range(n + 1), 2)}
    return [
        min(sum(costs[piece] for piece in itertools.pairwise((0, *places, n))) for places in segmentations)
        for segmentations in (itertools.combinations(range(1, n), k) for k in range(n))
    ]


@pytest.mark.parametrize("line", [False, True])
def test_no_segmentation_of_a_short_series_is_better(line):
    rng = np.random.default_rng(0)
    for number in range(12):
        least, d = 1 + number % 3, 1 + number % 2
        y, w, t = rng.standard_normal((8, d)), rng.choice([0.5, 1, 2], 8), np.cumsum(rng.uniform(0.5, 2, 8)) - 5
        found = best_segmentations(Sums.of(y, w, t), 7, line, least)
        expected = [cost for cost in all_costs(y, w, t, line, least) if np.isfinite(cost)]
        np.testing.assert_allclose([cost for cost, _ in found], expected, atol=1e-10)
        assert [len(places) for _, places in found] == list(range(len(found)))


@pytest.mark.parametrize("room", [1, functional.FIRST_ROOM])
def test_the_jumps_at_a_price_are_the_optimum_of_short_series(room, monkeypatch):
    monkeypatch.setattr(functional, "FIRST_ROOM", room)
    rng = np.random.default_rng(1)
    for _ in range(250):
        # Rounded values give equal optima.
        y = np.round(np.repeat(2 * rng.standard_normal(3), 3) + rng.standard_normal(9), rng.integers(0, 4))
        w, price = rng.choice([0.0, 0.5, 1.0, 2.0], 9), rng.choice([0.05, 0.5, 2.0, 5.0])
        seen = np.flatnonzero(w)
        if not seen.size:
            continue
        found, sums = functional.optimal_jumps(y, price, w), Sums.of(y[seen, None], w[seen])
        assert set(found) <= set(seen)
        ends = np.searchsorted(seen, [-1, *found, 9])
        best = min(cost + price * len(places) for cost, places in best_segmentations(sums, 8))
        assert sums.cost(ends[:-1], ends[1:], False).sum() + price * len(found) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("ends", ["free", "graph"])
def test_l0_on_a_chain_has_its_global_minimum(ends):
    rng = np.random.default_rng(8)
    y = rng.standard_normal((9, 2)) + np.repeat([0, 3, -1], 3)[:, None]
    w, price = rng.choice([0.0, 1.0, 2.0], 9), 1.5
    fit = so.trend_filter(y, so.Graph.chain(9, ends=ends), so.L0(price), node_weights=w).check()
    best = 0.0
    for channel in y.T:
        seen = w > 0
        costs = all_costs(channel[seen, None], w[seen], np.arange(seen.sum()), False, 1)
        best += min(cost / 2 + price * k for k, cost in enumerate(costs))
    jumps = np.count_nonzero(np.diff(fit.value, axis=0))
    assert np.sum(w[:, None] * (y - fit.value) ** 2) / 2 + price * jumps == pytest.approx(best)
    assert float(fit.objective) == pytest.approx(best)
    assert (float(fit.gap), int(fit.steps), np.count_nonzero(fit.nonzero)) == (0, 0, jumps)
    named = so.trend_filter(y, so.Graph.chain(9, ends=ends), so.L0(price), node_weights=w, method="doge")
    assert np.isnan(named.gap)
    assert float(named.objective) >= best


@pytest.mark.parametrize("loss", ["poisson", "absolute", "quantile"])
def test_l0_with_a_loss_has_its_global_minimum(loss):
    rng, n = np.random.default_rng(10), 9
    for _ in range(15):
        y = np.round(np.repeat(2 * rng.standard_normal(3), 3) + rng.standard_normal(n), rng.integers(0, 3))
        w, price = rng.choice([0.0, 0.5, 1.0, 2.0], n), rng.choice([0.05, 0.5, 2.0])
        y, w[4] = (np.floor(np.exp(y)) if loss == "poisson" else y), 1.0
        y[4] = max(y[4], 1)
        seen = np.flatnonzero(w)

        def cost(i, j, y=y[seen], w=w[seen]):
            levels = np.unique(y[i:j])
            if loss == "poisson":
                levels = np.log(np.maximum(np.average(y[i:j], weights=w[i:j], keepdims=True), 1e-18))
            return min(np.sum(w[i:j] * VALUES[loss](np.full(j - i, m), y[i:j])[0]) for m in levels)

        best = [-price]
        for j in range(1, len(seen) + 1):
            best.append(min(best[i] + price + cost(i, j) for i in range(j)))
        fit = so.trend_filter(y, so.Graph.chain(n), so.L0(price), loss=LOSSES[loss], node_weights=w).check()
        spent = np.sum(w * VALUES[loss](fit.value, y)[0]) + price * np.count_nonzero(np.diff(fit.value))
        assert spent == pytest.approx(best[-1], rel=1e-5, abs=1e-5)
        assert float(fit.objective) == pytest.approx(best[-1], rel=1e-5, abs=1e-5)
        assert float(fit.gap) == 0


def test_a_long_series_with_outliers_has_the_jumps_of_its_medians():
    rng = np.random.default_rng(11)
    y = np.repeat([0.0, 3.0, 1.0], 1000) + rng.standard_t(3, 3000)
    fit = so.trend_filter(y, so.Graph.chain(3000), so.L0(40.0), loss="absolute")
    first, last = fit.knots()
    assert max(abs(first - 1000), abs(last - 2000)) <= 10
    medians = np.median(y[:first]), np.median(y[first:last]), np.median(y[last:])
    np.testing.assert_allclose(fit.value[[0, first, last]], medians, atol=0.02)


def test_lines_that_meet_are_the_least_squares_fit():
    rng = np.random.default_rng(2)
    y, w, t = rng.standard_normal((30, 2)), rng.uniform(0.5, 2, 30), np.cumsum(rng.uniform(0.5, 2, 30))
    places, sums = np.array([8, 15, 22]), Sums.of(y, w, t)
    for joined in itertools.product([False, True], repeat=3):
        steps = np.arange(30)[:, None] >= places
        design = np.column_stack([np.ones(30), t, steps * (t[:, None] - t[places]), steps[:, ~np.array(joined)]])
        root = np.sqrt(w)[:, None]
        expected = design @ np.linalg.lstsq(root * design, root * y)[0]
        cost, ends = fit_pieces(sums, places, np.array(joined), True)
        np.testing.assert_allclose(values_of(sums, places, ends, t), expected, atol=1e-9)
        assert cost == pytest.approx(np.sum(w[:, None] * (y - expected) ** 2))


def test_a_long_series_has_the_optimum_of_its_price():
    rng = np.random.default_rng(3)
    truth = np.sort(rng.choice(np.arange(100, 9900, 50), 20, replace=False)) + rng.integers(-9, 9, 20)
    assert len(truth) < segmentation.MOST_CUTS < 10_000
    y = np.searchsorted(truth, np.arange(10_000), side="right") % 2 * 6 + rng.standard_normal(10_000)
    found = so.trend.jumps(y)
    np.testing.assert_array_equal(found.places, functional.optimal_jumps(y, 10 * np.log(10_000)))
    assert np.abs(found.places - truth).max() <= 2


def test_the_nile_has_one_jump():
    flow = np.array(NILE.split(), float)
    found = so.trend.jumps(flow)
    assert ((1871 + found.places).tolist(), found.kinds) == ([1899], ("jump",))
    assert found.sizes == pytest.approx(flow[28:].mean() - flow[:28].mean())
    (row,) = found.table()
    assert (row["place"], row["kind"], row["size"]) == (28, "jump", found.sizes[0])
    assert row["low"] < row["size"] < row["high"]
    assert row["first"] <= 28 <= row["last"]
    assert np.isnan(row["p"])
    assert "jump at 1899: -247" in "\n".join(map(str, found.facts(np.arange(1871, 1971))))


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("rise", [0, 5])
def test_noise_has_no_jump_whether_flat_or_on_a_line(correlation, rise):
    rng = np.random.default_rng(4)
    found = [so.trend.jumps(noise(rng, 100, correlation) + np.linspace(0, rise, 100)) for _ in range(40)]
    assert sum(len(each.places) > 0 for each in found) <= 2


@pytest.mark.parametrize(
    "curve", [lambda t: 3 * (2 * t - 1) ** 2, lambda t: np.sin(6 * t), lambda t: np.sin(4 * np.pi * t)]
)
def test_a_curve_bends_and_never_jumps(curve):
    rng = np.random.default_rng(5)
    found = [so.trend.jumps(curve(np.arange(200) / 200) + 0.3 * rng.standard_normal(200)) for _ in range(20)]
    assert sum("jump" in each.kinds for each in found) <= 1
    assert all("bend" in each.kinds for each in found)


def test_a_step_is_found_in_any_unit_with_weights_and_beside_missing_values():
    rng = np.random.default_rng(6)
    y = 3.0 * (np.arange(200) >= 80) + rng.standard_normal(200)
    places = so.trend.jumps(y).places
    assert len(places) == 1
    assert abs(places[0] - 80) <= 2
    np.testing.assert_array_equal(so.trend.jumps(1e6 - 1e-3 * y).places, places)
    np.testing.assert_array_equal(so.trend.jumps(y, node_weights=np.full(200, 7.0)).places, places)
    both = so.trend.jumps(np.column_stack([y, rng.standard_normal(200)]))
    assert (both.sizes.shape, both.fit.shape) == ((1, 2), (200, 2))
    gap = np.where((np.arange(200) >= 70) & (np.arange(200) < 90), np.nan, y)
    found = so.trend.jumps(gap)
    assert found.places.tolist() == [90]
    assert np.isfinite(found.fit).all()


def test_outliers_are_named_and_move_nothing():
    y = 4.0 * (np.arange(100) >= 60) + np.random.default_rng(9).standard_normal(100)
    wild = y.copy()
    wild[[20, 21, 80]] = [60, 70, -90]
    found, beside = so.trend.jumps(wild), so.trend.jumps(np.where(wild == y, y, np.nan))
    assert found.outliers.tolist() == [20, 21, 80]
    assert "3 outliers" in repr(found)
    assert found.places.tolist() == beside.places.tolist() == [60]
    np.testing.assert_array_equal(found.fit, beside.fit)
    # Three together are a piece, and many are the signal.
    assert so.trend.jumps(np.repeat([0.0, 60, 0], [30, 3, 30]) + y[:63] / 4).places.tolist()[:2] == [30, 33]
    assert not so.trend.jumps(np.arange(100) % 5 == 0).outliers.size


def test_bends_follow_the_times_of_the_chain_and_stand_at_their_node():
    times = np.cumsum(np.random.default_rng(7).uniform(0.5, 2, 60))
    y = np.maximum(times - times[25], 0) * 2 - times
    found = so.trend.jumps(y, so.Graph.chain(60, times))
    assert (found.places.tolist(), found.kinds) == ([25], ("bend",))
    np.testing.assert_allclose(found.sizes, [2], atol=1e-9)
    np.testing.assert_allclose(found.fit, y, atol=1e-9)
    assert "bend at 25: slope +2" in repr(found)
    assert "bend at 25" in found._repr_html_()


def test_what_has_no_jump_to_find():
    for y in (np.ones(50), [1.0], np.arange(4.0), np.where(np.arange(9) == 4, 2.0, np.nan)):
        assert so.trend.jumps(y).table() == []
    assert so.trend.jumps(np.repeat([0.0, 1.0], 20), max_jumps=0).table() == []


def test_a_picture_marks_jumps_and_bends_and_has_no_stroke_across_a_jump():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    years, rng = np.arange(1950, 2040), np.random.default_rng(3)
    y = np.r_[np.arange(45.0), 100 - 2 * np.arange(45.0)] + 0.3 * rng.standard_normal(90)
    found = so.trend.jumps(y)
    assert found.kinds == ("jump",)
    axis = found.plot(y, years)
    dots, fit, mark = axis.lines
    np.testing.assert_array_equal(dots.get_ydata(), y)
    place = int(found.places[0])
    assert (mark.get_xdata()[0], mark.get_label()) == (years[place], "jump")
    drawn = np.asarray(fit.get_ydata(), float)
    assert np.flatnonzero(np.isnan(drawn)).tolist() == [place]
    np.testing.assert_array_equal(np.delete(drawn, place), found.fit)


# What is known of them: intervals that hold as often as they say, p-values and parts of data thinning.

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
