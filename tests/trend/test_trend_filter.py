"""What single penalties, orders, graphs and methods add to the facts of every fit, which `test_facts.py` has."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from tests.tiers import often
from tests.trend.problems import VALUES, Problem, random_graph, two_parts


@pytest.mark.thorough
def test_the_gap_comes_down_with_the_suboptimality(rng):
    problem = Problem(50 * rng.standard_normal(144), so.Graph.grid((12, 12)), so.L1(10.0), 1)
    found, early = (problem.fit("doge", tol=tol) for tol in (1e-11, 1e-3))
    true = float(early.objective) / float(found.objective) - 1
    assert true <= float(early.gap) <= 3 * true


SMALL, FEW = np.array([0.0, 3, 1, 5, 2, 4]), np.array([0.0, 0.2, 3.0, 3.1, 0.4, 0.1])
FALLING = np.random.default_rng(20251125).standard_normal((40, 2)) - 0.05 * np.arange(40)[:, None]
# Signal, penalty, loss, tolerance of the fit, and how far its objective may be from the optimum.
CONSTRAINED = {
    "rises of at most a half": (FEW, so.Box(-0.5, 0.5), "square", 1e-6, 1e-4),
    "no weight is no missing penalty": (np.array([0.0, 100.0]), so.Box(-5.0, 5.0), "square", 1e-6, 1e-4),
    "of values": (np.array([1.0, 98, 51]), {-1: so.Box(-5.0, 5.0), 0: so.L1(0.1)}, "square", 1e-6, 1e-4),
    "a small ridge": (1e6 * SMALL, so.ElasticNet(0.0, 1e-8), "square", 1e-6, 1e-3),
    "another loss": (SMALL, so.Box(-0.5, 0.5), "huber", 1e-7, 1e-4),
    "without constants": (np.ones(4), so.Box(1.0, 2.0), "huber", 1e-7, 1e-4),
    "isotonic": (FALLING, so.Nonnegative(), "square", 1e-9, 1e-8),
}


@pytest.mark.parametrize(
    "case", often(CONSTRAINED, "rises of at most a half", "of values", "another loss", "without constants", "isotonic")
)
def test_rows_in_a_set_and_penalties_of_weight_0_end_at_the_optimum(case):
    y, penalty, loss, tol, near = CONSTRAINED[case]
    problem = Problem(y, so.Graph.chain(len(y)), penalty, loss=loss)
    found = problem.fit(tol=tol).check()
    assert float(found.objective) == pytest.approx(problem.least, rel=near)
    if "isotonic" in case:
        np.testing.assert_allclose(found.value, problem.exact, atol=1e-6)
    if isinstance(penalty, so.Box):
        # The rows of a chain are those from a node to the next.
        rows = -np.diff(np.asarray(found.value), axis=0)
        assert np.all((rows >= penalty.low - 1e-3) & (rows <= penalty.high + 1e-3))
    if loss == "square" and isinstance(penalty, so.Box):
        assert np.linalg.norm(found.value - problem.exact) <= 1e-2


@pytest.mark.parametrize(("graph", "order"), [(so.Graph.grid((3, 4)), 0), (so.Graph.chain(12, ends="graph"), 1)])
def test_the_nuclear_norm_is_of_the_differences_of_all_channels(rng, graph, order):
    y = rng.standard_normal((12, 2))
    found = so.trend_filter(y, graph, so.NuclearNorm(1.0), order).check()
    rows = graph.matrix(order + 1) @ found.value
    price = np.linalg.svd(rows, compute_uv=False).sum()
    assert float(found.objective) == pytest.approx(0.5 * np.sum((y - found.value) ** 2) + price, rel=1e-6)
    assert float(found.gap) <= 1e-6


def test_a_sparse_group_of_weight_0_is_a_group(rng):
    graph, y = so.Graph.chain(40), rng.standard_normal((40, 2))
    same = (so.SparseGroup(0.0, 0.8), so.GroupL2(0.8))
    one, other = (so.trend_filter(y, graph, penalty, 0, tol=1e-9).check() for penalty in same)
    np.testing.assert_allclose(one.value, other.value, atol=1e-4)


@pytest.mark.parametrize("penalty", [so.MCP(2.0, 3.0), so.SCAD(2.0, 3.7), so.L0(8.0)], ids=lambda p: type(p).__name__)
def test_nonconvex_penalties_end_at_a_stationary_point_without_a_certificate(rng, penalty):
    graph = so.Graph.grid((8, 8))
    image = np.where(np.arange(64) % 8 < 4, 0.0, 20.0) + rng.standard_normal(64)
    # Without a method, L0 merges pieces instead, which has no dual.
    method = "doge" if isinstance(penalty, so.L0) else "auto"
    found = so.trend_filter(image, graph, penalty, 0, method, tol=1e-6)
    assert (found.check().status, np.isnan(found.gap)) == (so.Status.STATIONARY, True)
    b = np.asarray(found.value)
    rows, pulled = jnp.asarray(graph.matrix(1) @ b), graph.matrix(1).T @ found.dual
    direct = 0.5 * np.sum((image - b) ** 2) + float(penalty.value(rows))
    assert float(found.objective) == pytest.approx(direct, rel=1e-5)
    # Both conditions hold to the tolerance: the loss balances the dual, which is one of the penalty.
    assert np.linalg.norm(b - image + pulled) <= 1e-6 * np.linalg.norm(image)
    step = 1 / found.state.rho
    assert np.linalg.norm(rows - penalty.prox(rows + step * found.dual, step)) <= 1e-6 * np.linalg.norm(rows)
    # The fold between the halves is found, and not shrunk as L1 shrinks it.
    assert np.mean(b.reshape(8, 8)[:, 4:]) - np.mean(b.reshape(8, 8)[:, :4]) == pytest.approx(20, abs=0.7)


@pytest.mark.parametrize(("loss", "weight"), [("square", 0.8), ("poisson", 0.8), ("huber", 0.4)])
def test_a_nonconvex_fit_balances_loss_and_penalty_flow_by_flow_along_a_chain(rng, loss, weight):
    half = np.arange(40) >= 20
    # Without a count of 0: it may run off to minus infinity where a penalty that levels off holds it.
    y = 1 + rng.poisson(np.where(half, 20.0, 2.0)) if loss == "poisson" else 10 * half + rng.standard_normal(40)
    problem = Problem(y.astype(float), so.Graph.chain(40), so.MCP(weight, 3.0), loss=loss)
    found = problem.fit(tol=1e-6)
    assert (found.status, np.isnan(found.gap)) == (so.Status.STATIONARY, True)
    b = np.asarray(found.value)
    rows, flow = -np.diff(b), np.cumsum(-VALUES[loss](b, y)[1])[:-1]
    jumps = abs(rows) > 1e-3
    expected = np.sign(rows) * np.maximum(weight - abs(rows) / 3, 0)
    np.testing.assert_allclose(flow[jumps], expected[jumps], atol=1e-3)
    assert 0 < jumps.sum() < len(jumps)
    assert np.all(abs(flow) <= weight + 1e-3)
    both = so.trend_filter(y, problem.graph, {-1: so.L1(0.01), 0: problem.penalty}) if loss == "square" else found
    assert (both.status, np.isnan(both.gap)) == (so.Status.STATIONARY, True)


def test_nonconvex_penalties_of_a_large_weight_end_at_the_means_and_move_with_them(rng):
    # The iteration itself is stuck at several pieces, whose edges cost far more than the means.
    graph, y = so.Graph.grid((8, 8)), rng.standard_normal((8, 8)).astype(np.float32)
    # Nor can the differences, which are 0 there, be the measure of the residual of others.
    for method, penalty in (("doge", so.MCP(100.0)), ("admm", so.SCAD(100.0))):
        found = so.trend_filter(y.astype(float), graph, penalty, 0, method, tol=1e-8)
        assert found.status == so.Status.STATIONARY
        np.testing.assert_allclose(found.value, y.astype(float).mean(), atol=1e-6)
    solver = so.trend_solver(graph, 0, "doge", jnp.float32)
    found = solver(y, so.L0(30.0))
    np.testing.assert_allclose(found.value, y.mean(), rtol=1e-6)
    assert float(found.objective) == pytest.approx(0.5 * np.sum((y - y.mean()) ** 2), rel=1e-5)
    assert not np.any(found.nonzero)
    turned = jax.grad(lambda y: solver(y, so.L0(30.0)).value[3, 3])(y)
    np.testing.assert_allclose(turned, np.full((8, 8), 1 / 64), rtol=1e-4)


def test_a_fit_of_a_constraint_has_a_finite_objective(rng):
    # At the fit itself, which violates the constraint by rounding, the indicator is infinite.
    found = so.trend_filter(rng.standard_normal(20), so.Graph.chain(20), so.Simplex(), 0)
    assert found.status == so.Status.STATIONARY
    rows = so.Graph.chain(20).matrix(1) @ np.asarray(found.value)
    assert rows.sum() == pytest.approx(1, abs=3e-5)
    assert rows.min() > -1e-5
    assert np.isfinite(found.objective)


@pytest.mark.thorough
def test_rho_stops_changing(rng):
    y, method = 10 * rng.standard_normal(400), so.trend.Doge(cadence=5)
    found = so.trend_filter(y, so.Graph.chain(400), so.L1(500.0), 1, method, tol=1e-14, history=True, max_steps=4000)
    rho = np.asarray(found.history.extra["rho"])[4 : int(found.steps) : 5]  # of every check
    changes = 5 * (2 + np.flatnonzero(np.diff(rho)))
    assert set(changes) <= {10 * 2**i for i in range(9)}
    assert np.all(rho[2560 // 5 :] == rho[-1])


def test_float32_says_when_precision_limits_the_answer(rng):
    y = (128 + 20 * rng.standard_normal(1024)).astype(np.float32)
    problem = Problem(y, so.Graph.grid((32, 32)), so.L1(10.0), 1)
    found = problem.fit("doge", tol=1e-9)
    assert found.status == so.Status.PRECISION
    assert int(found.steps) < 2000
    assert float(found.gap) < 3e-6
    with pytest.raises(RuntimeError, match=r"PRECISION.*use float64"):
        found.check()
    assert problem.fit("doge", tol=1e-9, dtype=np.float64).status == so.Status.CONVERGED


def test_paper_sized_grid_needs_few_steps():
    # A stand-in for the 256 x 256 image: weight 10, noise 20, at a quarter of the side.
    rng = np.random.default_rng(7)
    i, j = np.mgrid[:64, :64]
    image = 120 + 60 * ((i - 30) ** 2 + (j - 36) ** 2 < 300) + i + 20 * rng.standard_normal((64, 64))
    for tol, limit in ((1e-4, 100), (1e-5, 150)):
        found = so.trend_filter(image, so.Graph.grid((64, 64)), so.L1(10.0), 1, "doge", tol=tol)
        assert found.status == so.Status.CONVERGED
        assert int(found.steps) <= limit


def test_an_exact_fit_of_a_long_chain_is_not_lost_in_float32(rng, monkeypatch):
    y = np.cumsum(rng.standard_normal(1500) * (rng.random(1500) < 0.02)) + 0.1 * rng.standard_normal(1500)
    for kind in (so.trend.Doge, so.trend.Admm):
        monkeypatch.setattr(kind, "short_from", 1)
    found = so.trend_filter(y, so.Graph.chain(1500), so.L1(0.5), tol=1e-10).check()
    assert int(found.steps) == 0
    beyond = so.trend_filter(y, so.Graph.chain(1500), so.L1(0.5), tol=1e-18)
    assert int(beyond.steps) == 0
    assert abs(float(beyond.gap)) <= 1e-15


@pytest.mark.thorough
def test_a_loose_fit_of_a_large_grid_has_pieces_as_well():
    """Here the iterate is good enough before the means of its pieces are."""
    i, j = np.mgrid[:128, :128]
    image = np.where((i - 96) ** 2 + (j - 32) ** 2 < 26**2, -1.0, 0.0)
    image[32:64, 32:96] += 1
    image += 0.7 * (j >= 112) + np.random.default_rng(1).standard_normal((128, 128))
    found = so.trend_filter(image, so.Graph.grid((128, 128)), so.L1(1.5), tol=1e-3).check()
    assert len(np.unique(found.value)) <= np.ptp(found.pieces()) + 1 < 400


# Several penalties at once, and a weight for each row.

CHAIN = so.Graph.chain(12)
Y = np.array([0, 0.2, -0.1, 3, 3.2, 2.9, 3.1, 0.1, 0, -0.2, 0.1, 0.0])


def test_the_sparse_fused_lasso_is_the_fused_lasso_thresholded(rng):
    # Friedman, Hastie, Höfling, Tibshirani, "Pathwise coordinate optimization", 2007, proposition 1.
    graph = so.Graph.grid((6, 7))
    y = rng.standard_normal((6, 7)) + np.where(np.arange(7) > 3, 2.0, 0.0)
    fused = so.trend_filter(y, graph, so.L1(0.8), tol=1e-10).check()
    terms = {-1: so.L1(0.4), 0: so.L1(0.8)}
    both = so.trend_filter(y, graph, terms, tol=1e-10).check()
    expected = np.sign(fused.value) * np.maximum(np.abs(fused.value) - 0.4, 0)
    np.testing.assert_allclose(both.value, expected, atol=1e-4)
    # The zeros are exact, and all there, also where the steps did not suffice; so are the pieces.
    stopped = so.trend_filter(y, graph, terms, tol=1e-10, max_steps=20)
    assert stopped.status == so.Status.MAX_STEPS
    for found in (both, stopped):
        np.testing.assert_array_equal(found.value == 0, expected == 0)
    assert 0 < np.sum(both.value == 0) < y.size
    ends = np.asarray(both.value).reshape(-1)[graph.edges]
    np.testing.assert_array_equal(np.diff(both.pieces()[graph.edges])[:, 0] == 0, ends[:, 0] == ends[:, 1])


def test_a_large_weight_on_the_values_gives_zero_and_terms_of_weight_0_are_left_out():
    found = so.trend_filter(Y, CHAIN, {-1: so.L1(10.0), 0: so.L1(0.1)}).check()
    np.testing.assert_array_equal(found.value, 0)
    plain = so.trend_filter(Y, CHAIN, so.L1(0.5), 1)
    for penalty in ({1: so.L1(0.5)}, {-1: so.L1(0.0), 1: so.L1(0.5)}):
        np.testing.assert_array_equal(so.trend_filter(Y, CHAIN, penalty).value, plain.value)
    np.testing.assert_array_equal(so.trend_filter(Y, CHAIN, {-1: so.L1(0.0), 1: so.L1(0.0)}).value, Y)


# Isotropic total variation.


def test_a_straight_edge_costs_what_it_costs_l1_and_a_slanted_one_less():
    (rows, columns), graph = np.indices((24, 24)), so.Graph.grid((24, 24))
    isotropic, by_entries = so.TotalVariation(graph, 1.0, axis=0), so.TotalVariation(graph, 1.0)
    straight, slanted = jnp.asarray(10.0 * (rows > 11)), jnp.asarray(10.0 * (rows + columns > 23))
    assert isotropic.value(straight) == by_entries.value(straight)
    assert 0.7 < isotropic.value(slanted) / by_entries.value(slanted) < 0.75  # 1 / sqrt(2), but for the border


@pytest.mark.thorough
def test_derivatives_of_isotropic_fits_and_their_divergence_are_known():
    graph, rng = so.Graph.grid((12, 12)), np.random.default_rng(0)
    y = 3.0 * (np.indices((12, 12)) > 4).sum(axis=0) + 0.7 * rng.standard_normal((12, 12))
    path = so.trend.trend_path(y, graph, so.GroupL2(1.0, axis=0), weights=[100.0, 1.0, 1e-3], tol=1e-9)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (14, 12, 12))
    with jax.enable_x64(True):
        solver = so.trend_solver(graph, 0)
        fit = jax.jit(lambda y: solver(y, so.GroupL2(1.0, axis=0), tol=1e-12).value)
        slopes = jax.vmap(lambda along: jax.jvp(fit, (jnp.asarray(y),), (along,))[1])(jnp.asarray(signs))
        apart = (fit(y + 1e-4 * signs[0]) - fit(y - 1e-4 * signs[0])) / 2e-4
    assert np.linalg.norm(slopes[0] - apart) < 0.02 * np.linalg.norm(apart)
    of_means, middle, all_free = path.degrees_of_freedom
    assert of_means == pytest.approx(np.mean(signs.sum(axis=(1, 2)) ** 2) / 144, abs=1e-6)
    assert middle == pytest.approx(float(np.sum(signs * np.asarray(slopes))) / 14, rel=0.05)
    assert all_free == pytest.approx(144, rel=0.02)


# The interior point method and the choice of a method.


def test_many_edges_a_node_and_constant_signals_are_no_trouble_for_interior_points(rng):
    problem = Problem(5 * rng.standard_normal(20), random_graph(rng, n=20, extra=60), so.L1(0.7))
    np.testing.assert_allclose(problem.fit("interior", tol=1e-9).check().value, problem.exact, atol=2e-3)
    problem = Problem(rng.standard_normal(40), random_graph(rng, n=40, extra=20), so.L1(0.5), 1)
    assert problem.fit("interior", max_steps=2).status == so.Status.MAX_STEPS
    single = problem.fit("interior", y=problem.y.astype(np.float32), tol=1e-5).check()
    assert single.value.dtype == np.float32
    np.testing.assert_array_equal(problem.fit("interior", y=np.full(40, 3.0)).check().value, 3.0)
    # Its dual starts other methods.
    parts = Problem(rng.standard_normal(11), two_parts(rng), so.L1(0.3))
    assert int(parts.fit("doge", tol=1e-6, start=parts.fit("interior", tol=1e-9)).steps) <= 10


@pytest.mark.parametrize("order", [0, 1])
def test_the_level_of_a_signal_with_gaps_makes_no_difference_to_interior_points(rng, order):
    y, graph, options = rng.standard_normal(60), so.Graph.chain(60), {"missing": "nan", "method": "interior"}
    y[::3] = np.nan
    low, high = (so.trend_filter(level + y, graph, so.L1(2.0), order, **options).check() for level in (0.0, 1e6))
    assert float(high.objective) == pytest.approx(float(low.objective), rel=1e-5)


@pytest.mark.parametrize("seed", [0, 4])
def test_auto_takes_interior_points_for_weights_of_many_sizes_and_keeps_the_better_of_two_fits(seed):
    """Doge-ADMM ends at the step limit, with gaps up to 0.8."""
    edges = [(i, i + 1) for i in range(14)] + [(0, 7)]
    weights, y = 10 ** np.random.default_rng(seed).uniform(-4, 4, 15), np.random.default_rng(100 + seed).normal(size=15)
    graph = so.Graph.from_edges(edges, 15, weights)
    assert so.trend_filter(y, graph, so.L1(0.5), 1).check().steps < 50
    auto, interior = (
        so.trend_filter(y, graph, so.L1(0.5), 2, method, tol=1e-9, max_steps=500) for method in ("auto", "interior")
    )
    assert auto.gap <= interior.gap


def test_auto_takes_interior_points_on_narrow_graphs_alone(rng, monkeypatch):
    road, y = so.Graph.from_edges(so.Graph.grid((30, 40)).edges[1:], 1200), rng.standard_normal(1200)
    tangle = so.Graph.from_edges(rng.integers(0, 600, (3000, 2)), 600, merge=True)
    chain = so.Graph.chain(1200)
    for graph, penalty, order, tol, method in (
        (road, so.L1(3.0), 1, 1e-6, "interior"),
        (road, so.L1(2.0), 1, 1e-6, "interior"),
        (road, so.L1(2.0), 1, 1e-4, "doge"),
        (road, so.L1(0.1), 2, 1e-6, "interior"),
        (tangle, so.L1(3.0), 1, 1e-6, "doge"),
        (road, so.MCP(3.0), 1, 1e-6, "doge"),
        (road, so.L1(1.0), 0, 1e-6, "doge"),
        (road, so.L1(100.0), 0, 1e-6, "interior"),
        (chain, so.L1(1.0), 1, 1e-6, "doge"),
        (chain, so.MCP(100.0), 1, 1e-6, "admm"),
        (chain, so.L1(100.0), 1, 1e-6, "interior"),
        (CHAIN, {0: so.L1(1.0), 1: so.L1(1.0)}, 0, 1e-6, "admm"),
        (CHAIN, {-1: so.L1(1.0), 0: so.L1(1.0)}, 0, 1e-6, "doge"),
    ):
        given = Y if graph is CHAIN else y[: graph.num_nodes]
        assert so.trend.chosen_method(given, graph, penalty, order, tol=tol) == method, (graph, penalty, order, tol)
    assert so.trend.chosen_method(y, so.Graph.grid((30, 40)), so.L1(1.0), 1) != "interior"
    assert so.trend.chosen_method(Y, CHAIN, so.L1(np.ones(11))) == "fused_lasso"
    # Paths take it by themselves too.
    paths = [
        so.trend.trend_path(y, road, order=1, num=3, ratio=0.3, method=method).check()
        for method in ("auto", "interior")
    ]
    np.testing.assert_array_equal(paths[0].values, paths[1].values)
    # A warm start is what it cannot use.
    first = so.trend_filter(y, road, so.L1(3.0), 1)
    assert first.state is None  # that of the others has a rho
    assert so.trend_filter(y, road, so.L1(3.0), 1, start=first).state is not None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert so.trend.chosen_method(y, road, so.L1(3.0), 1) == "doge"
    with pytest.raises(ImportError, match=r'pip install "sparseopt\[interior\]"'):
        so.trend_filter(y, road, so.L1(1.0), 1, "interior")
