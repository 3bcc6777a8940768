"""Pieces at a price for each edge between them, on graphs that are no chain."""

import numpy as np
import pytest
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
