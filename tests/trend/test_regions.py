"""Parts of graphs that are no chain: at a price for each edge between them, and as a person would mark them."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.special import xlogy

import sparseopt as so

GRID = so.Graph.grid((3, 3))


def divisions(n):
    """All ways to divide n nodes into pieces, `[count, n]`."""
    found = np.zeros((1, 1), int)
    for _ in range(1, n):
        last = found.max(axis=1)
        found = np.concatenate(
            [np.column_stack([found[last + 1 >= k], np.full(np.sum(last + 1 >= k), k)]) for k in range(n)]
        )
    return found


def objectives(pieces, graph, y, mass, price, counts=False):
    """The objective of the best levels of divisions `[count, n]`."""
    total = price * np.sum(np.diff(pieces[:, graph.edges], axis=2) != 0, axis=(1, 2))
    for piece in range(pieces.max() + 1):
        inside = pieces == piece
        m, s = inside @ mass, inside @ (mass * y)
        seen = np.where(m > 0, m, 1)
        total = total + (s - s * np.log(np.where(s > 0, s, 1) / seen) if counts else -s * s / seen / 2)
    return total if counts else total + np.sum(mass * y**2) / 2


@pytest.mark.parametrize("counts", [False, True], ids=["square", "counts"])
def test_small_grids_have_mostly_the_best_of_all_divisions(rng, counts):
    everything, ratios = divisions(9), []
    assert len(everything) == 21_147  # Bell's number
    for turn in range(30):
        level = rng.choice([0.0, 2, 4], 9) * (turn % 2)
        y = rng.poisson(np.exp(level)).astype(float) if counts else level + rng.standard_normal(9)
        mass = rng.uniform(0.5, 2, 9) if turn % 3 == 0 else np.ones(9)
        price = np.exp(rng.uniform(-2, 1))
        loss = "poisson" if counts else "square"
        found = so.trend_filter(y, GRID, so.L0(price), node_weights=mass, loss=loss)
        labels = np.unique(found.value, return_inverse=True)[1].reshape(1, -1)
        ours, best = (objectives(some, GRID, y, mass, price, counts).min() for some in (labels, everything))
        if counts:
            ours, best = (value + np.sum(mass * (xlogy(y, y) - y)) for value in (ours, best))
        np.testing.assert_allclose(found.objective, ours, rtol=1e-9)
        ratios.append(ours / best)
    assert min(ratios) >= 1 - 1e-9
    assert np.mean(np.array(ratios) <= 1 + 1e-9) >= 0.85
    assert max(ratios) <= 1.1


def four_parts():
    """Four parts, and with noise of 1/2."""
    i, j = np.mgrid[:24, :24]
    truth = np.where((i >= 6) & (i < 12) & (j >= 6) & (j < 18), 2.0, 0.0)
    truth[(i - 18) ** 2 + (j - 6) ** 2 < 20] = -2.0
    truth[:, 21:] += 1.4
    return truth, truth + 0.5 * np.random.default_rng(3).standard_normal((24, 24))


(TRUTH, Y), PLANE = four_parts(), so.Graph.grid((24, 24))
PARTS = np.unique(TRUTH, return_inverse=True)[1].reshape(24, 24)
AS_EDGES = so.Graph.from_edges(PLANE.edges, num_nodes=576)


def test_a_picture_of_steps_has_its_parts_and_no_small_change_is_better():
    found = so.trend_filter(Y, PLANE, so.L0(1.0)).check()
    assert (found.status, np.isnan(found.gap)) == (so.Status.STATIONARY, True)
    pieces, parts, edges = found.pieces().reshape(-1), PARTS.reshape(-1), PLANE.edges[found.nonzero]
    assert pieces.max() == 3
    assert np.mean(found.nonzero == (np.diff(parts[PLANE.edges])[:, 0] != 0)) > 0.99
    level = np.bincount(pieces, Y.reshape(-1)) / np.bincount(pieces)
    np.testing.assert_allclose(found.value, level[pieces].reshape(Y.shape), rtol=1e-12)
    merged = [np.where(pieces == b, a, pieces) for a in range(4) for b in range(a)]
    moved = [np.where(np.arange(Y.size) == i, pieces[j], pieces) for i, j in np.concatenate([edges, edges[:, ::-1]])]
    ours, *others = objectives(np.array([pieces, parts, *merged, *moved]), PLANE, Y.reshape(-1), np.ones(Y.size), 1.0)
    assert ours <= min(others)
    np.testing.assert_allclose(found.objective, ours)


def test_the_unit_the_order_of_nodes_and_other_channels_do_not_matter(rng):
    found = so.trend_filter(Y, PLANE, so.L0(1.0))
    scaled = so.trend_filter(1024 * Y, PLANE, so.L0(1024.0**2))
    np.testing.assert_allclose(scaled.value, 1024 * found.value, rtol=1e-9)
    order = rng.permutation(Y.size)
    mixed = so.Graph.from_edges(np.argsort(order)[PLANE.edges], num_nodes=Y.size)
    other = so.trend_filter(Y.reshape(-1)[order], mixed, so.L0(1.0))
    np.testing.assert_allclose(other.objective, found.objective, rtol=1e-2)
    both = so.trend_filter(np.stack([Y, -2 * Y], axis=-1), PLANE, so.L0(1.0))
    np.testing.assert_allclose(both.value[..., 0], found.value, rtol=1e-9)


def test_a_missing_part_joins_its_neighbours_and_a_start_can_only_help():
    holes = Y.copy()
    holes[8:10, 8:16] = np.nan
    found = so.trend_filter(holes, PLANE, so.L0(1.0), missing="nan").check()
    assert len(np.unique(found.value[6:12, 6:18])) == 1
    again = so.trend_filter(holes, PLANE, so.L0(1.0), missing="nan", start=found)
    assert float(again.objective) <= float(found.objective)


# Regions, with nothing to set.


def test_the_regions_of_a_picture_are_its_parts_with_their_means_and_a_plot_draws_their_boundaries():
    found = so.trend.regions(Y, PLANE)
    assert len(found.levels) == len(found.counts) == found.pieces.max() + 1 == 4
    assert found.counts.sum() == Y.size
    assert not found.smooth
    held = [np.bincount(PARTS[found.pieces == k]).max() for k in range(4)]
    assert sum(held) >= 0.99 * Y.size
    np.testing.assert_allclose(found.fit, found.levels[found.pieces])
    np.testing.assert_allclose(found.levels, [Y[found.pieces == k].mean() for k in range(4)])
    assert 0.45 < found.noise < 0.55
    table = found.table()
    # The background meets the three others.
    assert [(row["first"], row["second"]) for row in table] == [(0, 1), (0, 2), (0, 3)]
    assert sum(row["edges"] for row in table) == len(found.edges)
    np.testing.assert_allclose(sorted(row["step"] for row in table), [-2, 1.4, 2], atol=0.25)
    assert str(found).splitlines()[0].startswith("Regions: 4 parts, ")
    assert len(str(found).splitlines()) == 5
    # A plot draws a stroke of length 1 between every two neighbours of different parts.
    x, z = found.plot().lines[0].get_data()
    assert np.isfinite(x).sum() == 2 * len(found.edges)
    assert np.allclose(np.hypot(x[1::3] - x[0::3], z[1::3] - z[0::3]), 1)


def test_the_regions_do_not_depend_on_units_and_kinds_of_graph_and_channels_share_them(rng):
    pieces = so.trend.regions(Y, PLANE).pieces
    np.testing.assert_array_equal(so.trend.regions(1e6 - 512 * Y, PLANE).pieces, pieces)
    assert np.mean(so.trend.regions(Y.reshape(-1), AS_EDGES).pieces == pieces.reshape(-1)) > 0.99
    both = so.trend.regions(np.stack([Y, rng.standard_normal(Y.shape)], axis=-1), PLANE)
    assert both.levels.shape == (4, 2)
    assert np.mean(both.pieces == pieces) > 0.98
    holes = np.where(rng.random(Y.shape) < 0.1, np.nan, Y)
    seen = so.trend.regions(holes, PLANE)
    assert np.mean(seen.pieces == pieces) > 0.98
    assert seen.counts.sum() == np.isfinite(holes).sum()


def test_noise_and_smooth_signals_have_no_parts(rng):
    i, j = np.mgrid[:24, :24]
    for turn in range(12):
        noise = rng.standard_normal((24, 24))
        noise = ndimage.gaussian_filter(noise, 0.5, mode="wrap") if turn % 2 else noise
        assert len(so.trend.regions(noise, PLANE).counts) == 1
    for smooth in (i / 4, 2 * np.sin(i / 5) * np.cos(j / 6)):
        for size in (0.3, 1.0):
            found = so.trend.regions(smooth + size * rng.standard_normal((24, 24)), PLANE)
            assert (found.smooth, len(found.counts), found.table()) == (True, 1, [])
    assert len(so.trend.regions(np.full((24, 24), 7.0), PLANE).counts) == 1


def test_an_observer_hears_how_far_the_search_is():
    heard = []
    so.trend.regions(Y.reshape(-1), AS_EDGES, observer=lambda *state: heard.append(state))
    assert list(dict.fromkeys(what for what, _, _ in heard)) == ["first parts", "turn", "smooth signal"]
    for what in ("first parts", "turn", "smooth signal"):
        done, totals = zip(*(state[1:] for state in heard if state[0] == what), strict=True)
        assert done == tuple(range(len(done)))
        assert len(set(totals)) == 1
        assert done[-1] < totals[0]
