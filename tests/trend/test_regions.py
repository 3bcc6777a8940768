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


@pytest.fixture(scope="module")
def picture():
    """Four parts with noise of 1/2."""
    i, j = np.mgrid[:24, :24]
    truth = np.where((i >= 6) & (i < 12) & (j >= 6) & (j < 18), 2.0, 0.0)
    truth[(i - 18) ** 2 + (j - 6) ** 2 < 20] = -2.0
    truth[:, 21:] += 1.4
    return truth, truth + 0.5 * np.random.default_rng(3).standard_normal((24, 24))


def test_a_picture_of_steps_has_its_parts_and_no_small_change_is_better(picture):
    truth, y = picture
    graph, price = so.Graph.grid(y.shape), 1.0
    found = so.trend_filter(y, graph, so.L0(price)).check()
    assert so.Status(int(found.status)) is so.Status.STATIONARY
    assert np.isnan(found.gap)
    pieces, parts = found.pieces().reshape(-1), np.unique(truth, return_inverse=True)[1].reshape(-1)
    assert pieces.max() == 3
    assert np.mean(found.nonzero == (np.diff(parts[graph.edges])[:, 0] != 0)) > 0.99
    flat, ones = y.reshape(-1), np.ones(y.size)
    level = np.bincount(pieces, flat) / np.bincount(pieces)
    np.testing.assert_allclose(found.value, level[pieces].reshape(y.shape), rtol=1e-12)
    merged = [np.where(pieces == b, a, pieces) for a in range(4) for b in range(a)]
    edges = graph.edges[found.nonzero]
    moved = [np.where(np.arange(y.size) == i, pieces[j], pieces) for i, j in np.concatenate([edges, edges[:, ::-1]])]
    others = objectives(np.array([parts, *merged, *moved]), graph, flat, ones, price)
    assert objectives(pieces[None], graph, flat, ones, price)[0] <= others.min()
    np.testing.assert_allclose(found.objective, objectives(pieces[None], graph, flat, ones, price)[0])


def test_the_unit_the_order_of_nodes_and_other_channels_do_not_matter(picture, rng):
    _, y = picture
    graph, price = so.Graph.grid(y.shape), 1.0
    found = so.trend_filter(y, graph, so.L0(price))
    scaled = so.trend_filter(1024 * y, graph, so.L0(1024**2 * price))
    np.testing.assert_allclose(scaled.value, 1024 * found.value, rtol=1e-9)
    order = rng.permutation(y.size)
    mixed = so.Graph.from_edges(np.argsort(order)[graph.edges], num_nodes=y.size)
    other = so.trend_filter(y.reshape(-1)[order], mixed, so.L0(price))
    np.testing.assert_allclose(other.objective, found.objective, rtol=1e-2)
    both = so.trend_filter(np.stack([y, -2 * y], axis=-1), graph, so.L0(price))
    np.testing.assert_allclose(both.value[..., 0], found.value, rtol=1e-9)


def test_a_missing_part_joins_its_neighbours_and_a_start_can_only_help(picture):
    _, y = picture
    graph, holes = so.Graph.grid(y.shape), y.copy()
    holes[8:10, 8:16] = np.nan
    found = so.trend_filter(holes, graph, so.L0(1.0), missing="nan").check()
    assert len(np.unique(found.value[6:12, 6:18])) == 1
    again = so.trend_filter(holes, graph, so.L0(1.0), missing="nan", start=found)
    assert float(again.objective) <= float(found.objective)


# Regions, with nothing to set.


def test_the_regions_of_a_picture_are_its_parts_with_their_means(picture):
    truth, y = picture
    found = so.trend.regions(y, so.Graph.grid(y.shape))
    parts = np.unique(truth, return_inverse=True)[1].reshape(y.shape)
    assert len(found.levels) == len(found.counts) == found.pieces.max() + 1 == 4
    assert found.counts.sum() == y.size
    assert not found.smooth
    held = [np.bincount(parts[found.pieces == k]).max() for k in range(4)]
    assert sum(held) >= 0.99 * y.size
    np.testing.assert_allclose(found.fit, found.levels[found.pieces])
    np.testing.assert_allclose(found.levels, [y[found.pieces == k].mean() for k in range(4)])
    assert 0.45 < found.noise < 0.55
    table = found.table()
    # The background meets the three others.
    assert [(row["first"], row["second"]) for row in table] == [(0, 1), (0, 2), (0, 3)]
    assert sum(row["edges"] for row in table) == len(found.edges)
    np.testing.assert_allclose(sorted(row["step"] for row in table), [-2, 1.4, 2], atol=0.25)
    assert str(found).splitlines()[0].startswith("Regions: 4 parts, ")
    assert len(str(found).splitlines()) == 5


def test_the_regions_do_not_depend_on_units_and_kinds_of_graph_and_channels_share_them(picture, rng):
    _, y = picture
    graph = so.Graph.grid(y.shape)
    pieces = so.trend.regions(y, graph).pieces
    np.testing.assert_array_equal(so.trend.regions(1e6 - 512 * y, graph).pieces, pieces)
    edges = so.Graph.from_edges(graph.edges, num_nodes=y.size)
    assert np.mean(so.trend.regions(y.reshape(-1), edges).pieces == pieces.reshape(-1)) > 0.99
    both = so.trend.regions(np.stack([y, rng.standard_normal(y.shape)], axis=-1), graph)
    assert both.levels.shape == (4, 2)
    assert np.mean(both.pieces == pieces) > 0.98
    holes = np.where(rng.random(y.shape) < 0.1, np.nan, y)
    seen = so.trend.regions(holes, graph)
    assert np.mean(seen.pieces == pieces) > 0.98
    assert seen.counts.sum() == np.isfinite(holes).sum()


def test_noise_and_smooth_signals_have_no_parts(rng):
    graph, (i, j) = so.Graph.grid((24, 24)), np.mgrid[:24, :24]
    for turn in range(12):
        noise = rng.standard_normal((24, 24))
        noise = ndimage.gaussian_filter(noise, 0.5, mode="wrap") if turn % 2 else noise
        assert len(so.trend.regions(noise, graph).counts) == 1
    for smooth in (i / 4, 2 * np.sin(i / 5) * np.cos(j / 6)):
        for size in (0.3, 1.0):
            found = so.trend.regions(smooth + size * rng.standard_normal((24, 24)), graph)
            assert found.smooth
            assert len(found.counts) == 1
            assert found.table() == []
    assert len(so.trend.regions(np.full((24, 24), 7.0), graph).counts) == 1


def test_a_plot_of_regions_draws_their_boundaries(picture):
    _, y = picture
    found = so.trend.regions(y, so.Graph.grid(y.shape))
    line = found.plot().lines[0]
    x, z = line.get_data()
    assert np.isfinite(x).sum() == 2 * len(found.edges)
    # Each stroke has the length 1, between two nodes of different parts.
    assert np.allclose(np.hypot(x[1::3] - x[0::3], z[1::3] - z[0::3]), 1)
    with pytest.raises(ValueError, match="two axes"):
        so.trend.regions(y[0], so.Graph.chain(24)).plot()


def test_an_observer_hears_how_far_the_search_is(picture):
    _, y = picture
    heard = []
    edges = so.Graph.from_edges(so.Graph.grid(y.shape).edges, num_nodes=y.size)
    so.trend.regions(y.reshape(-1), edges, observer=lambda *state: heard.append(state))
    assert list(dict.fromkeys(what for what, _, _ in heard)) == ["first parts", "turn", "smooth signal"]
    for what in ("first parts", "turn", "smooth signal"):
        done, totals = zip(*(state[1:] for state in heard if state[0] == what), strict=True)
        assert done == tuple(range(len(done)))
        assert len(set(totals)) == 1
        assert done[-1] < totals[0]


def test_regions_need_an_edge():
    with pytest.raises(ValueError, match="edges"):
        so.trend.regions([1.0], so.Graph.chain(1))
