"""The path of fits from the largest weight down; its facts at every case are in `test_facts.py`."""

import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.solvers.admm import Admm
from sparseopt.trend import largest_weight, trend_path
from tests.trend.problems import Problem, two_parts

CHAIN, GRID = so.Graph.chain(15), so.Graph.grid((4, 5))


def test_small_largest_weights_by_hand():
    step = np.array([0.0, 0.0, 3.0, 3.0])
    assert largest_weight(step, so.Graph.chain(4)) == pytest.approx(3)  # 1.5 above the mean, two nodes
    assert largest_weight(step, so.Graph.from_edges([(0, 1), (2, 1), (3, 2)], 4)) == pytest.approx(3)  # as a tree
    # A corner of a triangle lies 2 above the mean and sends 1 along either edge.
    triangle = so.Graph.from_edges([(0, 1), (1, 2), (0, 2)])
    assert largest_weight(np.array([0.0, 0.0, 3.0]), triangle) == pytest.approx(1)
    # Two nodes at order 1: L u = (-1, 1) has u = (-1/2, 1/2) plus a constant.
    assert largest_weight(np.array([0.0, 2.0]), so.Graph.chain(2, ends="graph"), 1) == pytest.approx(0.5)
    # A row of D is sqrt(w) times the difference: weight 4 halves the flow.
    heavy = so.Graph.from_edges([(0, 1)], weights=[4.0])
    assert largest_weight(np.array([0.0, 2.0]), heavy) == pytest.approx(0.5)


def test_the_largest_weight_scales_and_ignores_what_the_means_take(rng):
    graph = two_parts(rng)
    y = rng.standard_normal(11)
    first = largest_weight(y, graph)
    assert largest_weight(-40 * y, graph) == pytest.approx(40 * first, rel=1e-5)
    assert largest_weight(y + 100 * graph.components, graph) == pytest.approx(first, rel=1e-5)
    assert largest_weight(y, graph, node_weights=np.full(11, 3.0)) == pytest.approx(3 * first, rel=1e-5)
    both = np.stack([y, 0.1 * y], axis=1)
    assert largest_weight(both, graph) == pytest.approx(first, rel=1e-5)
    assert largest_weight(np.full(11, 0.1) + graph.components, graph) == 0


def test_a_long_thin_graph_has_its_largest_weight(rng):
    # Conjugate gradients need as many steps as there are nodes here: the factor takes over.
    n = 3000
    place = rng.permutation(n)
    graph = so.Graph.from_edges(np.stack([place[:-1], place[1:]], axis=1), n)
    y = np.empty(n)
    y[place] = np.repeat([0.0, 1.0], n // 2)
    assert largest_weight(y, graph) == pytest.approx(n / 4, rel=1e-6)
    chain = so.Graph.chain(n, ends="graph")
    assert largest_weight(y, graph, 1) == pytest.approx(largest_weight(y[place], chain, 1), rel=1e-6)


def test_a_path_of_a_chain_is_exact_and_its_pieces_only_merge(rng):
    y = 5 * rng.standard_normal(15)
    for w in (None, rng.uniform(0.5, 2.0, 15)):
        path = trend_path(y, CHAIN, num=12, node_weights=w).check()
        assert path.gaps.max() <= 1e-12
        assert "<th>levels</th><td>12 CONVERGED</td>" in path._repr_html_()
        for value, weight in zip(path.values, path.weights, strict=True):
            np.testing.assert_allclose(value, Problem(y, CHAIN, so.L1(weight), 0, w).exact, atol=1e-8)
        jumps = np.diff(path.values, axis=1) != 0
        assert np.all(jumps[1:] | ~jumps[:-1])  # a jump at a weight is one at every smaller weight
        np.testing.assert_array_equal(path.degrees_of_freedom, jumps.sum(axis=1) + 1)
    # Also where the pull of the penalty is below the rounding of the signal.
    assert trend_path(y, CHAIN, weights=[1e-16]).gaps[0] <= 1e-12
    assert so.trend_filter(y, CHAIN, so.L1(1e-16)).check().gap <= 1e-12
    alone = so.trend_filter(y, CHAIN, so.L1(path.weights[5]))
    np.testing.assert_allclose(trend_path(y, CHAIN, weights=path.weights[5:6]).values[0], alone.value, rtol=1e-12)


def test_levels_of_a_picture_take_the_means_of_their_pieces_and_are_the_cold_solves(rng):
    y = 5 * rng.standard_normal((4, 5))
    path = trend_path(y, GRID, num=6, tol=1e-6).check()
    assert [len(np.unique(value)) for value in path.values] == path.degrees_of_freedom.tolist()
    assert [path.at(i).pieces().max() + 1 for i in range(6)] == path.degrees_of_freedom.tolist()
    weights = [0.3, 4.0, 1.0, 0.1]
    path = trend_path(y, GRID, so.L1(77.0), 1, weights=weights, tol=1e-8).check()
    assert path.largest_weight is None
    assert path.values.shape == (4, 4, 5)
    np.testing.assert_array_equal(path.weights, sorted(weights, reverse=True))
    cold, level = so.trend_filter(y, GRID, so.L1(1.0), 1, tol=1e-8), path.at(1)
    assert path.objectives[1] == pytest.approx(float(cold.objective), rel=2e-8)
    np.testing.assert_allclose(level.value, cold.value, atol=2e-3)
    assert level.check() is level


def test_a_path_costs_fewer_steps_than_its_levels_alone(rng):
    y = 5 * rng.standard_normal((4, 5))
    path = trend_path(y, GRID, order=1, num=60)
    alone = [int(so.trend_filter(y, GRID, so.L1(weight), 1, "admm", tol=1e-4).steps) for weight in path.weights]
    assert path.steps.sum() < 0.8 * sum(alone)


@pytest.mark.parametrize("order", [2, 3])
def test_levels_near_the_largest_weight_of_a_series_with_gaps_converge(rng, order):
    """The smallest eigenvalue of `Δ Δᵀ` is about 1e-12 and 1e-16 here."""
    y = np.sin(np.linspace(0, 6, 400)) + 0.2 * rng.standard_normal(400)
    y[rng.random(400) < 0.2] = np.nan
    y[100:130] = np.nan
    path = trend_path(y, so.Graph.chain(400), so.L1, order, num=3, ratio=0.7, tol=1e-6, missing="nan").check()
    assert (path.gaps <= 1e-6).all()
    assert path.degrees_of_freedom[0] == order + 1


def test_one_program_serves_all_levels_and_takes_the_relaxation_that_is_given(rng, traces_of):
    seen = traces_of(Admm)
    graph = so.Graph.chain(17)  # a shape that no other test has compiled
    for scale, num in ((1.0, 5), (7.0, 9)):
        trend_path(scale * rng.standard_normal(17), graph, num=num, tol=10.0**-num, method="doge")
    y = rng.standard_normal(17)
    paths = [
        trend_path(y, graph, num=9, tol=1e-9, method=so.trend.Doge(relaxation=relaxation)) for relaxation in (1.7, 0.5)
    ]
    assert len(seen) == 1
    assert paths[1].steps.sum() > 1.2 * paths[0].steps.sum()


def test_channels_share_a_path_and_coupled_ones_begin_at_their_means_and_jump_together(rng):
    y = 5 * rng.standard_normal((15, 2))
    path = trend_path(y, CHAIN, num=5, tol=1e-7).check()
    assert path.weights[0] == pytest.approx(max(largest_weight(column, CHAIN) for column in y.T))
    alone = [trend_path(column, CHAIN, weights=path.weights, tol=1e-7) for column in y.T]
    np.testing.assert_array_equal(path.degrees_of_freedom, sum(part.degrees_of_freedom for part in alone))
    np.testing.assert_allclose(path.values, np.stack([part.values for part in alone], axis=-1), atol=2e-2)
    path = trend_path(y, CHAIN, so.GroupL2, num=5, tol=1e-7).check()
    np.testing.assert_allclose(path.values[0], np.broadcast_to(y.mean(axis=0), (15, 2)), rtol=1e-12)
    below = so.trend_filter(y, CHAIN, so.GroupL2(0.95 * path.weights[0]), tol=1e-7).check()
    assert np.ptp(below.value, axis=0).min() > 1e-3
    assert abs(path.degrees_of_freedom[0] - 2) < 1  # two means, along 16 times 30 random signs
    jumps = np.abs(np.diff(path.values, axis=1))
    assert np.all(jumps.min(axis=-1)[jumps.max(axis=-1) > 1e-2] > 1e-5)


def test_a_nonconvex_path_starts_where_l1_does_and_shrinks_less(rng):
    y = np.repeat([0.0, 20.0, 6.0], 5) + rng.standard_normal(15)
    path = trend_path(y, CHAIN, so.MCP(1.0, 2.0), num=8, tol=1e-6, method="doge")
    assert set(path.statuses) == {so.Status.STATIONARY}
    assert np.isnan(path.gaps).all()
    assert path.residuals.max() <= 1e-6
    np.testing.assert_allclose(path.values[0], y.mean(), atol=1e-6)
    convex = trend_path(y, CHAIN, weights=path.weights, method="fused_lasso")
    # Until the two large jumps are free of shrinkage MCP fits the data better with no more pieces.
    both = (path.degrees_of_freedom == 3) & (convex.degrees_of_freedom >= 3)
    assert both.any()
    assert np.all(path.deviances[both] < convex.deviances[both] + 1e-9)


def test_float32_stays_float32(rng):
    y = (100 + 5 * rng.standard_normal(15)).astype(np.float32)
    path = trend_path(y, CHAIN, num=4).check()
    assert path.values.dtype == np.float32
    exact = trend_path(y.astype(float), CHAIN, weights=path.weights)
    np.testing.assert_allclose(path.values, exact.values, atol=0.2)
    np.testing.assert_array_equal(path.degrees_of_freedom, exact.degrees_of_freedom)


def test_a_level_takes_no_more_steps_than_the_limit_and_check_names_those_that_did_not_converge(rng):
    y = 5 * rng.standard_normal((4, 5))
    path = trend_path(y, GRID, order=1, num=6, tol=1e-12, max_steps=5)
    with pytest.raises(RuntimeError, match=r"5 of 6 levels did not converge: level 1 \(weight .*MAX_STEPS.*raise"):
        path.check()
    assert path.steps.max() == 5
    assert trend_path(y, GRID, order=1, num=3, method="doge", max_steps=2).steps.max() == 2
    with pytest.raises(IndexError, match=r"levels 0..5, given 6"):
        path.at(6)


COUNTS = np.array([0, 1, 0, 2, 1, 4, 6, 5, 3, 7, 0, 1, 1, 0, 2.0])


def test_a_path_takes_channels_with_missing_nodes_and_weights_for_every_loss():
    y = np.stack([COUNTS, COUNTS[::-1]], axis=-1)
    w = np.where(np.arange(15) != 7, np.linspace(0.5, 2, 15), 0)
    holes = np.where(w[:, None] > 0, y, np.nan)
    path = trend_path(holes, CHAIN, num=3, node_weights=w + 1.0 * (w == 0), missing="nan").check()
    assert path.observations == 28
    np.testing.assert_allclose(path.deviances, (w[:, None] * (path.values - y) ** 2).sum(axis=(1, 2)))
    path = trend_path(y, CHAIN, num=3, node_weights=w, loss="poisson", tol=1e-6).check()
    means = (w @ y) / w.sum()
    np.testing.assert_allclose(path.values[0], np.broadcast_to(np.log(means), (15, 2)))
    assert path.observations == 28
    assert path.degrees_of_freedom[0] == 2
