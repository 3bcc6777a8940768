"""Pieces and knots of a fit: exactly equal values, and labels by an independent search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from tests.trend.problems import searched


@pytest.mark.parametrize("shape", [(40,), (7, 8), (3, 4, 5)])
def test_regions_of_a_grid_are_components_of_its_edges(rng, shape):
    graph, values = so.Graph.grid(shape), rng.integers(0, 2, shape).astype(float)
    np.testing.assert_array_equal(so.trend_filter(values, graph, so.L1(0.0)).pieces(), searched(graph, values))


@pytest.mark.parametrize(("penalty", "tol"), [(so.L1(20.0), 1e-2), (so.L1(20.0), 1e-6), (so.MCP(20.0), 1e-4)])
def test_equal_values_never_raise_the_objective(rng, penalty, tol):
    """A fit of a solver that was planned keeps the small differences of its last step."""
    graph = so.Graph.grid((12, 12))
    y = np.kron(rng.uniform(0, 200, (3, 3)), np.ones((4, 4))) + 20 * rng.standard_normal((12, 12))
    weights = rng.uniform(0.5, 2, (12, 12))
    with jax.enable_x64(True):
        before = so.trend_solver(graph, 0, "doge")(y, penalty, weights, tol=tol)
        after = so.trend_filter(y, graph, penalty, 0, "doge", tol=tol, node_weights=weights)
        values = np.asarray(before.value), np.asarray(after.value)
        rows = [graph.matrix(1) @ value.reshape(-1) for value in values]
        costs = [
            0.5 * np.sum(weights * (value - y) ** 2) + float(penalty.value(jnp.asarray(row)))
            for value, row in zip(values, rows, strict=True)
        ]
    assert int(before.steps) == int(after.steps)
    assert costs[1] <= costs[0] * (1 + 1e-15)
    assert np.count_nonzero(rows[1]) < np.count_nonzero(rows[0])
    assert float(after.objective) == pytest.approx(costs[1], rel=1e-12)
    if isinstance(penalty, so.L1):
        # The dual point is the same, and with it the lower bound.
        bounds = [float(fit.objective) / (1 + float(fit.gap)) for fit in (before, after)]
        assert bounds[0] == pytest.approx(bounds[1], rel=1e-9)


def test_pieces_of_channels_apart_are_those_in_which_all_channels_agree(rng):
    graph = so.Graph.grid((6, 5))
    y = 5 * rng.standard_normal((6, 5, 2))
    apart = so.trend_filter(y, graph, so.L1(2.0))
    np.testing.assert_array_equal(apart.pieces(), searched(graph, apart.value))
    alone = [so.trend_filter(y[..., i], graph, so.L1(2.0)) for i in (0, 1)]
    counts = [so.trend.degrees_of_freedom(fit.nonzero, graph) for fit in alone]
    assert counts == [fit.pieces().max() + 1 for fit in alone]
    assert so.trend.degrees_of_freedom(apart.nonzero, graph) == sum(counts)


def test_breakpoints_and_bends_without_noise_are_knots_and_a_notebook_counts_them():
    bend = so.trend_filter(np.abs(np.arange(21.0) - 10), so.Graph.chain(21), so.L1(1.0), order=1)
    assert bend.knots().tolist() == [10]
    assert "<th>differences not zero</th><td>1 of 19</td>" in bend._repr_html_()
    y = np.repeat([1.0, 5.0, 2.0], 10)
    found = so.trend_filter(y, so.Graph.chain(30), so.L1(0.1))
    assert found.knots().tolist() == [10, 20]
    shown = found._repr_html_()
    for name, text in (("status", "CONVERGED"), ("pieces", "3"), ("zeros", "0 of 30"), ("steps", str(found.steps))):
        assert f"<tr><th>{name}</th><td>{text}</td></tr>" in shown
    still = so.trend_filter(y, so.Graph.chain(30), so.L1(1e3))
    assert (still.knots().size, still.pieces().max()) == (0, 0)
    for loss in ("square", "huber"):
        alone = so.trend_filter(y, so.Graph.chain(30), so.L1(0.0), loss=loss)
        np.testing.assert_array_equal(alone.pieces(), np.repeat([0, 1, 2], 10))
    # XLA reads a difference below the smallest normal number as 0.
    tiny = so.trend_filter(np.array([1, 0, 1e-40], np.float32), so.Graph.chain(3), so.L1(0.0))
    assert tiny.pieces().tolist() == [0, 1, 2]


def test_a_planned_fit_has_pieces_and_a_batch_none(rng):
    graph = so.Graph.grid((4, 5))
    y = 5 * rng.standard_normal((2, 4, 5)).astype(np.float32)
    solver = so.trend_solver(graph, order=0)
    batch = jax.jit(jax.vmap(lambda y: solver(y, so.L1(2.0))))(y)
    with pytest.raises(ValueError, match=r"given a batch of \(2,\): select one"):
        batch.pieces()
    assert f"<td>{min(batch.objective):.5g} to {max(batch.objective):.5g}</td>" in batch._repr_html_()
    for lane in range(2):
        one = jax.tree.map(lambda leaf, lane=lane: leaf[lane], batch)
        np.testing.assert_array_equal(one.pieces(), so.trend_filter(y[lane], graph, so.L1(2.0)).pieces())
