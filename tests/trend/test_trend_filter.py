import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import isotonic_regression

import sparseopt as so
from sparseopt.core.base.types import precision
from sparseopt.core.problem import iterate as iterate_module
from sparseopt.core.solvers.admm import Admm
from sparseopt.trend.filter import chosen_method
from sparseopt.trend.methods import plan as plan_module
from tests.programs import forget
from tests.tiers import often
from tests.trend.problems import GRAPHS, exact_fit, objective, of_block, random_graph, two_parts


def status(solution):
    return so.Status(int(solution.status))


@pytest.mark.parametrize(
    ("name", "order"),
    often(
        [("chain", 0), ("chain", 1), ("chain", 2), ("grid", 1), ("grid", 2), ("weighted", 0), ("parts", 1)]
        + [("random", order) for order in range(4)],
        *[("chain", 1), ("weighted", 0)],
    ),
)
def test_every_method_and_block_finds_the_exact_answer(rng, name, order):
    graph = GRAPHS[name](rng)
    y, weight = 5 * rng.standard_normal(graph.num_nodes), 0.7
    expected = exact_fit(y, graph, weight, order)
    best = objective(expected, y, graph, weight, order)
    methods = [("doge", block) for block in range(1, order + 2)] + [("admm", None), ("auto", None)]
    methods += [("fast_admm", None)] if name == "chain" else [("interior", None)]
    for method, block in methods:
        found = so.trend_filter(y, graph, so.L1(weight), order, of_block(method, block), tol=1e-9)
        assert status(found) is so.Status.CONVERGED, (method, block)
        assert objective(found.value, y, graph, weight, order) / best - 1 <= 1.1e-9, (method, block)
        np.testing.assert_allclose(found.value, expected, atol=2e-3, err_msg=f"{method} {block}")


@pytest.mark.parametrize(
    ("kind", "order"),
    often(itertools.product([np.float32, np.float64], [0, 1]), (np.float32, 0)),
)
def test_the_gap_is_never_below_the_true_suboptimality(rng, order, kind):
    graph = random_graph(rng, n=30, extra=20)
    y = (100 + 5 * rng.standard_normal(30)).astype(kind)
    best = objective(exact_fit(y.astype(float), graph, 2.0, order), y, graph, 2.0, order)
    for steps in (5, 10, 20, 40, 80, 400):
        found = so.trend_filter(y, graph, so.L1(2.0), order, "doge", tol=1e-15, max_steps=steps)
        true = objective(found.value, y, graph, 2.0, order) / best - 1
        assert true <= float(found.gap) * (1 + 1e-3) + 1e-12
        assert float(found.objective) == pytest.approx(objective(found.value, y, graph, 2.0, order), rel=1e-5)


@pytest.mark.thorough
def test_the_gap_comes_down_with_the_suboptimality(rng):
    graph = so.Graph.grid((12, 12))
    y = 50 * rng.standard_normal(144)
    found = so.trend_filter(y, graph, so.L1(10.0), 1, "doge", tol=1e-11)
    early = so.trend_filter(y, graph, so.L1(10.0), 1, "doge", tol=1e-3)
    true = float(early.objective) / float(found.objective) - 1
    assert true <= float(early.gap) <= 3 * true


@pytest.mark.parametrize("order", often([0, 1, 2], 0))
def test_node_weights_and_missing_values(rng, order):
    graph = so.Graph.grid((5, 6))
    y = 5 * rng.standard_normal(30)
    w = rng.uniform(0.3, 3.0, 30)
    expected = exact_fit(y, graph, 0.6, order, w)
    for method in ("doge", "admm"):
        found = so.trend_filter(y, graph, so.L1(0.6), order, method, tol=1e-9, node_weights=w)
        np.testing.assert_allclose(found.value, expected, atol=2e-3)
    w[[3, 17]] = 0
    light = np.where(w == 0, 1e-7, w)
    nearly = objective(exact_fit(y, graph, 0.6, order, light), y, graph, 0.6, order, w)
    y[[3, 17]] = np.nan
    found = so.trend_filter(y, graph, so.L1(0.6), order, "doge", tol=1e-7, node_weights=w, missing="nan")
    assert status(found) is so.Status.CONVERGED
    filled = np.where(np.isnan(y), 0, y)
    assert objective(found.value, filled, graph, 0.6, order, w) <= nearly * (1 + 1e-5)
    if order == 0:
        assert np.nanmin(y) <= found.value[3] <= np.nanmax(y)


@pytest.mark.parametrize(
    ("order", "method"),
    often([(0, "doge"), (1, "doge"), (2, "doge"), (3, "doge"), (1, "admm")], (0, "doge"), (1, "admm")),
)
def test_a_large_weight_gives_component_means_exactly(rng, order, method):
    graph = two_parts(rng)
    y = rng.standard_normal(11)
    means = np.array([y[graph.components == part].mean() for part in graph.components])
    found = so.trend_filter(y, graph, so.L1(1e3), order, method, tol=1e-8)
    assert status(found) is so.Status.CONVERGED
    np.testing.assert_allclose(found.value, means, rtol=1e-13)
    for part in range(graph.num_components):
        assert np.ptp(found.value[graph.components == part]) == 0


def test_a_line_stays_a_line_between_its_ends():
    # At order 1 the end rows of DᵀD are first differences: they flatten the ends of a chain, and nothing else.
    n = 60
    found = so.trend_filter(3.0 * np.arange(n), so.Graph.chain(n, ends="graph"), so.L1(1e-2), 1, tol=1e-12)
    bends = np.abs(np.diff(found.value, 2))
    assert np.count_nonzero(bends > 1e-5) <= 4
    np.testing.assert_allclose(found.value, 3.0 * np.arange(n), atol=0.1)
    np.testing.assert_allclose(np.diff(found.value)[3:-3], 3.0, atol=1e-4)


@pytest.mark.parametrize("order", often([0, 1], 1))
def test_a_symmetric_image_gets_a_symmetric_answer(rng, order):
    image = rng.standard_normal((8, 8))
    image = image + image[::-1] + image[:, ::-1] + image[::-1, ::-1]
    image = image + image.T
    value = np.asarray(so.trend_filter(image, so.Graph.grid((8, 8)), so.L1(0.5), order, tol=1e-9).value)
    for other in (value[::-1], value[:, ::-1], value.T):
        np.testing.assert_allclose(value, other, atol=1e-6)


@pytest.mark.parametrize("order", often([0, 1], 1))
def test_relabelling_the_nodes_relabels_the_answer(rng, order):
    graph = random_graph(rng, n=25, extra=15, weighted=True)
    y = 4 * rng.standard_normal(25)
    place = rng.permutation(25)
    moved = so.Graph.from_edges(place[graph.edges][rng.permutation(graph.num_edges)][:, ::-1], 25)
    plain = so.Graph.from_edges(graph.edges, 25)
    relabelled = np.empty(25)
    relabelled[place] = y
    first = so.trend_filter(y, plain, so.L1(0.8), order, tol=1e-10).value
    second = so.trend_filter(relabelled, moved, so.L1(0.8), order, tol=1e-10).value
    np.testing.assert_allclose(second[place], first, atol=1e-4)


def test_channels_are_solved_together_and_apart(rng):
    graph = so.Graph.grid((6, 7))
    y = 5 * rng.standard_normal((42, 3))
    together = so.trend_filter(y, graph, so.L1(1.5), 1, tol=1e-9).value
    for channel in range(3):
        alone = so.trend_filter(y[:, channel], graph, so.L1(1.5), 1, tol=1e-9).value
        np.testing.assert_allclose(together[:, channel], alone, atol=2e-3)
    coupled = so.trend_filter(y, graph, so.GroupL2(1.5), 0, tol=1e-9)
    assert status(coupled) is so.Status.CONVERGED
    edges = so.Graph.grid((6, 7)).matrix(1) @ np.asarray(coupled.value)
    flat = np.abs(edges) < 1e-5
    assert np.all(flat.all(axis=1) == flat.any(axis=1))
    assert 0 < flat.all(axis=1).sum() < len(flat)


ELASTIC = so.ElasticNet(0.4, ridge=0.7)


@pytest.mark.parametrize(
    ("order", "method", "loss"),
    [(0, "doge", "square"), (1, "admm", "square"), (0, "doge_groups", "square"), (0, "doge", "huber")],
)
def test_an_elastic_net_is_certified_as_in_solve(rng, order, method, loss):
    graph, y = so.Graph.grid((4, 5)), 2 * rng.standard_normal(20)
    found = so.trend_filter(y, graph, ELASTIC, order, method, tol=1e-8, loss=loss).check()
    assert status(found) is so.Status.CONVERGED
    data = so.LeastSquares(None, y) if loss == "square" else so.HuberLoss(None, y)
    with precision(np.dtype(np.float64)):
        wanted = so.solve(so.Problem(data, ELASTIC, graph.matrix(order + 1)), tol=1e-8).check()
    np.testing.assert_allclose(float(found.objective), float(wanted.objective), rtol=2e-8)
    np.testing.assert_allclose(np.asarray(found.value), np.asarray(wanted.value), atol=1e-3)
    assert (float(found.objective) - float(wanted.objective)) / float(wanted.objective) <= float(found.gap) <= 1e-8


def test_rows_in_a_set_are_certified_where_they_lie_inside(rng):
    """Rises of at most a half along a chain: the projection on a set."""
    y = np.array([0.0, 0.2, 3.0, 3.1, 0.4, 0.1])
    found = so.trend_filter(y, so.Graph.chain(6), so.Box(-0.5, 0.5), tol=1e-6)
    assert status(found) in (so.Status.CONVERGED, so.Status.STATIONARY)
    assert np.abs(np.diff(np.asarray(found.value))).max() <= 0.5 + 1e-5


def test_a_constraint_of_weight_0_is_no_missing_penalty():
    chain = so.Graph.chain(2)
    found = so.trend_filter(np.array([0.0, 100.0]), chain, so.Box(-5.0, 5.0)).check()
    np.testing.assert_allclose(found.value, [47.5, 52.5], atol=1e-2)
    both = so.trend_filter(
        np.array([1.0, 98.0, 51.0]), so.Graph.chain(3), {-1: so.Box(-5.0, 5.0), 0: so.L1(0.1)}
    ).check()
    assert np.abs(np.asarray(both.value)).max() <= 5.001
    y = 1e6 * np.array([0.0, 3, 1, 5, 2, 4])
    ridge = so.trend_filter(y, so.Graph.chain(6), so.ElasticNet(0.0, 1e-8))
    assert float(ridge.objective) == pytest.approx(0.5e-8 * np.sum(np.diff(y) ** 2), rel=1e-3)


@pytest.mark.parametrize("penalty", [so.Box(-0.5, 0.5), so.Nonnegative(0.3)])
def test_a_constraint_with_another_loss_ends_at_the_fit(penalty):
    y, chain = np.array([0.0, 3, 1, 5, 2, 4]), so.Graph.chain(6)
    found = so.trend_filter(y, chain, penalty, tol=1e-7, loss="huber").check()
    with precision(np.dtype(np.float64)):
        problem = so.Problem(so.HuberLoss(None, y), penalty, chain.matrix(1))
        wanted = so.solve(problem, tol=1e-8, max_steps=50_000).check()
    np.testing.assert_allclose(float(found.objective), float(wanted.objective), rtol=1e-4)


def test_a_constant_is_no_fit_where_zeros_are_excluded():
    found = so.trend_filter(np.ones(4), so.Graph.chain(4), so.Box(1.0, 2.0), tol=1e-7, loss="huber").check()
    assert float(found.objective) > 1
    np.testing.assert_allclose(-np.diff(np.asarray(found.value)), 1, atol=1e-3)


@so.pytree
class AroundOne:
    weight: object

    def value(self, x):
        return self.weight * jnp.sum(jnp.abs(x - 1))

    def prox(self, x, step):
        return 1 + jnp.sign(x - 1) * jnp.maximum(jnp.abs(x - 1) - step * self.weight, 0)


def test_rows_of_padding_do_not_count_where_zero_costs_something(rng):
    y, graph = rng.standard_normal(6), so.Graph.grid((2, 3))
    fits = [so.trend_filter(y, at, AroundOne(0.4), tol=1e-8) for at in (graph, graph.as_edges())]
    assert float(fits[0].objective) == pytest.approx(float(fits[1].objective), rel=1e-5)


@pytest.mark.parametrize("penalty", [so.MCP(2.0, 3.0), so.SCAD(2.0, 3.7), so.L0(8.0)], ids=lambda p: type(p).__name__)
def test_nonconvex_penalties_end_at_a_stationary_point_without_a_certificate(rng, penalty):
    graph = so.Graph.grid((8, 8))
    image = np.where(np.arange(64) % 8 < 4, 0.0, 20.0) + rng.standard_normal(64)
    found = so.trend_filter(image, graph, penalty, 0, tol=1e-6)
    assert status(found) is so.Status.STATIONARY
    assert np.isnan(found.gap)
    assert "no certificate" in status(found).advice
    found.check()
    b, rows = np.asarray(found.value), np.asarray(found.state.rows.prox)
    direct = 0.5 * np.sum((image - b) ** 2) + float(penalty.value(jnp.asarray(rows)))
    assert float(found.objective) == pytest.approx(direct, rel=1e-5)
    # The fold between the halves is found, and not shrunk as L1 shrinks it.
    assert np.mean(b.reshape(8, 8)[:, 4:]) - np.mean(b.reshape(8, 8)[:, :4]) == pytest.approx(20, abs=0.7)


@pytest.mark.parametrize(
    ("method", "penalty"),
    often(itertools.product(["doge", "admm"], [so.MCP, so.SCAD]), ("doge", so.MCP), ("admm", so.SCAD)),
)
def test_a_nonconvex_penalty_of_a_large_weight_ends_at_the_mean(rng, penalty, method):
    # All differences are 0 there, so they cannot be the measure of the residual.
    graph = so.Graph.grid((6, 6))
    y = rng.standard_normal(36)
    found = so.trend_filter(y, graph, penalty(100.0), 0, method, tol=1e-8)
    assert status(found) is so.Status.STATIONARY
    np.testing.assert_allclose(found.value, y.mean(), atol=1e-6)


def test_l0_of_a_large_weight_ends_at_the_means_and_moves_with_them(rng):
    # The iteration itself is stuck at several pieces, whose edges cost far more than the means.
    graph, y = so.Graph.grid((6, 6)), rng.standard_normal((6, 6)).astype(np.float32)
    solver = so.trend_solver(graph, 0, "doge", jnp.float32)
    found = solver(y, so.L0(30.0))
    np.testing.assert_allclose(found.value, y.mean(), rtol=1e-6)
    assert float(found.objective) == pytest.approx(0.5 * np.sum((y - y.mean()) ** 2), rel=1e-5)
    assert not np.any(found.nonzero)
    turned = jax.grad(lambda y: solver(y, so.L0(30.0)).value[3, 3])(y)
    np.testing.assert_allclose(turned, np.full((6, 6), 1 / 36), rtol=1e-4)


def test_a_fit_of_a_constraint_has_a_finite_objective(rng):
    # At the fit itself, which violates the constraint by rounding, the indicator is infinite.
    found = so.trend_filter(rng.standard_normal(20), so.Graph.chain(20), so.Simplex(), 0)
    assert status(found) is so.Status.STATIONARY
    rows = so.Graph.chain(20).matrix(1) @ np.asarray(found.value)
    assert rows.sum() == pytest.approx(1, abs=3e-5)
    assert rows.min() > -1e-5
    assert np.isfinite(found.objective)


@pytest.mark.parametrize(("kind", "size"), [(np.float64, 1e150), (np.float32, 1e15), (np.float32, 1e-12)])
def test_a_signal_of_any_size_whose_squares_have_room_is_solved(rng, kind, size):
    # RuntimeWarnings of the package are errors in tests.
    y = rng.standard_normal(20)
    found = so.trend_filter((size * y).astype(kind), so.Graph.chain(20), so.L1(0.3 * size), tol=1e-5)
    assert status(found) is so.Status.CONVERGED
    plain = so.trend_filter(y, so.Graph.chain(20), so.L1(0.3), tol=1e-8)
    np.testing.assert_allclose(np.asarray(found.value, float) / size, plain.value, atol=1e-2)


def test_the_memory_of_the_acceleration_does_not_come_back(rng):
    found = so.trend_filter(rng.standard_normal(30), so.Graph.chain(30), so.L1(0.5), 1, "admm")
    assert found.state.past is None


@pytest.mark.parametrize(
    ("name", "order", "weight"),
    often(
        [("chain", 0, 0.1), ("chain", 2, 1.0), ("grid", 0, 0.1), ("grid", 1, 50.0), ("random", 2, 1.0)],
        *[("chain", 0, 0.1), ("grid", 0, 0.1), ("grid", 1, 50.0)],
    ),
)
def test_the_chosen_method_is_the_one_that_auto_takes(rng, name, order, weight):
    graph = GRAPHS[name](rng)
    y = rng.standard_normal(graph.num_nodes)
    method = chosen_method(y, graph, so.L1(weight), order)
    assert method in ("doge", "admm", "fast_admm", "interior")
    auto = so.trend_filter(y, graph, so.L1(weight), order, tol=1e-7)
    named = so.trend_filter(y, graph, so.L1(weight), order, method, tol=1e-7)
    np.testing.assert_array_equal(auto.value, named.value)
    assert int(auto.steps) == int(named.steps)


def test_a_penalty_of_weight_0_with_more_to_it_does_not_vanish(rng):
    graph, y = so.Graph.chain(40), rng.standard_normal((40, 2)) - 0.05 * np.arange(40)[:, None]
    # The differences of a chain are those from a node to the next: not negative where the fit falls.
    falling = [isotonic_regression(column, increasing=False).x for column in y.T]
    for penalty in (so.Nonnegative(), so.Box(0.0, 100.0)):
        found = so.trend_filter(y, graph, penalty, 0, tol=1e-9).check()
        np.testing.assert_allclose(found.value.T, falling, atol=1e-6)
    same = (so.SparseGroup(0.0, 0.8), so.GroupL2(0.8))
    one, other = (so.trend_filter(y, graph, penalty, 0, tol=1e-9).check() for penalty in same)
    np.testing.assert_allclose(one.value, other.value, atol=1e-4)


def test_a_users_penalty_is_ten_lines(rng):
    @jax.tree_util.register_pytree_node_class
    @dataclasses.dataclass
    class Huber:
        weight: float

        def value(self, x):
            size = jnp.abs(x)
            return self.weight * jnp.sum(jnp.where(size < 1, 0.5 * x * x, size - 0.5))

        def prox(self, x, step):
            level = step * self.weight
            return jnp.where(jnp.abs(x) <= 1 + level, x / (1 + level), x - level * jnp.sign(x))

        def tree_flatten(self):
            return (self.weight,), None

        @classmethod
        def tree_unflatten(cls, _, leaves):
            return cls(*leaves)

    y = 5 * rng.standard_normal(20)
    graph = so.Graph.chain(20)
    found = so.trend_filter(y, graph, Huber(2.0), tol=1e-9)
    assert status(found) is so.Status.STATIONARY
    rows = graph.matrix(1) @ found.value
    np.testing.assert_allclose(found.value - y + 2.0 * graph.matrix(1).T @ np.clip(rows, -1, 1), 0, atol=1e-5)


@pytest.mark.parametrize("method", often(["doge", "admm", "fast_admm"], "doge"))
def test_a_warm_start_is_quicker(rng, method):
    graph = so.Graph.chain(200)
    y = rng.standard_normal(200).cumsum()
    cold = so.trend_filter(y, graph, so.L1(1.0), 1, method, tol=1e-8)
    warm = so.trend_filter(y, graph, so.L1(1.0), 1, method, tol=1e-8, start=cold)
    assert int(warm.steps) <= 10 < int(cold.steps)
    nearby = so.trend_filter(y + 3, graph, so.L1(1.01), 1, method, tol=1e-6, start=cold)
    afresh = so.trend_filter(y + 3, graph, so.L1(1.01), 1, method, tol=1e-6)
    assert int(nearby.steps) < int(afresh.steps)
    with pytest.raises(ValueError, match="whose dual has the shape"):
        so.trend_filter(
            y[:50],
            so.Graph.chain(50),
            so.L1(1.0),
            1,
            method,
            start=dataclasses.replace(cold, value=cold.value[:50]),
        )


def test_history_shows_gap_and_rho_at_every_check(rng):
    y = 10 * rng.standard_normal(100)
    found = so.trend_filter(
        y, so.Graph.chain(100), so.L1(2.0), 0, so.trend.Doge(cadence=5), tol=1e-6, history=True, max_steps=500
    )
    steps = int(found.steps)
    gaps = np.asarray(found.history.gap)
    assert np.all(np.isfinite(gaps[4:steps:5]))
    assert np.all(np.isnan(np.delete(gaps[:steps], np.arange(4, steps, 5))))
    assert gaps[4] > gaps[steps - 1]
    rho = np.asarray(found.history.extra["rho"])[:steps]
    assert np.all(rho[np.isfinite(gaps[:steps])] > 0)


@pytest.mark.thorough
def test_rho_stops_changing(rng):
    y = 10 * rng.standard_normal(400)
    found = so.trend_filter(
        y, so.Graph.chain(400), so.L1(500.0), 1, so.trend.Doge(cadence=5), tol=1e-14, history=True, max_steps=4000
    )
    rho = np.asarray(found.history.extra["rho"])[4 : int(found.steps) : 5]  # of every check
    changes = 5 * (2 + np.flatnonzero(np.diff(rho)))
    assert set(changes) <= {10 * 2**i for i in range(9)}
    assert np.all(rho[2560 // 5 :] == rho[-1])


@pytest.fixture
def traces(traces_of):
    """An entry for each trace of a step, from none on."""
    forget(iterate_module._iterate)
    forget(plan_module.fit)
    return traces_of(Admm)


def test_one_compile_for_all_signals_weights_and_tolerances(traces):
    graph = so.Graph.grid((7, 9))
    for seed in range(3):
        y = np.random.default_rng(seed).standard_normal(63)
        so.trend_filter(y, graph, so.L1(0.1 + seed), tol=10.0 ** -(3 + seed), max_steps=50 + seed)
    assert len(traces) == 1


@pytest.mark.thorough
def test_one_compile_for_each_shape_dtype_order_and_method(rng, traces):
    graph, path = so.Graph.grid((7, 9)), random_graph(rng, n=63, extra=10)
    for kind, order, method, where in (
        (np.float32, 0, "doge", graph),
        (np.float64, 1, "doge", graph),
        (np.float64, 1, "admm", graph),
        (np.float64, 1, "admm", path),
    ):
        before = len(traces)
        for seed in range(2):
            y = np.random.default_rng(seed).standard_normal(63).astype(kind)
            so.trend_filter(y, where, so.L1(0.3 + seed), order, method, tol=1e-3)
        assert len(traces) == before + 1


def test_float32_says_when_precision_limits_the_answer(rng):
    graph = so.Graph.grid((32, 32))
    y = (128 + 20 * rng.standard_normal(1024)).astype(np.float32)
    found = so.trend_filter(y, graph, so.L1(10.0), 1, "doge", tol=1e-9)
    assert status(found) is so.Status.PRECISION
    assert int(found.steps) < 2000
    assert float(found.gap) < 3e-6
    with pytest.raises(RuntimeError, match=r"PRECISION.*use float64"):
        found.check()
    sharp = so.trend_filter(y, graph, so.L1(10.0), 1, "doge", tol=1e-9, dtype=np.float64)
    assert status(sharp) is so.Status.CONVERGED


@pytest.mark.parametrize("order", often([0, 1], 1))
def test_paper_sized_grid_needs_few_steps(order):
    # A stand-in for the 256 x 256 image: weight 10, noise 20, at a quarter of the side.
    rng = np.random.default_rng(7)
    i, j = np.mgrid[:64, :64]
    image = 120 + 60 * ((i - 30) ** 2 + (j - 36) ** 2 < 300) + i + 20 * rng.standard_normal((64, 64))
    for tol, limit in ((1e-4, 100), (1e-5, 150)):
        found = so.trend_filter(image, so.Graph.grid((64, 64)), so.L1(10.0), order, "doge", tol=tol)
        assert status(found) is so.Status.CONVERGED
        assert int(found.steps) <= limit


@pytest.mark.parametrize(
    ("name", "order", "method"),
    often([("grid", 0, "doge"), ("cube", 1, "admm"), ("weighted", 1, "doge")], ("grid", 0, "doge")),
)
def test_a_start_in_float32_ends_at_the_float64_fit(rng, name, order, method, monkeypatch):
    graph = GRAPHS[name](rng)
    y = 50 + 10 * rng.standard_normal(graph.num_nodes)
    exact = exact_fit(y, graph, 3.0, order)
    for kind in (so.trend.Doge, so.trend.Admm):
        monkeypatch.setattr(kind, "short_from", 1)
    found = so.trend_filter(y, graph, so.L1(3.0), order, method, tol=1e-10).check()
    np.testing.assert_allclose(found.value, exact, atol=1e-3)
    assert found.gap <= 1e-10
    assert found.dual.dtype == np.float64
    limited = so.trend_filter(y, graph, so.L1(3.0), order, method, tol=1e-13, max_steps=20)
    assert int(limited.steps) == 20
    assert so.Status(int(limited.status)) is so.Status.MAX_STEPS
    # Squares of these are beyond float32.
    large = so.trend_filter(1e30 * y, graph, so.L1(3e30), order, method, tol=1e-10).check()
    np.testing.assert_allclose(large.value / 1e30, exact, atol=1e-3)


def test_an_exact_fit_of_a_long_chain_is_not_lost_in_float32(rng, monkeypatch):
    y = np.cumsum(rng.standard_normal(1500) * (rng.random(1500) < 0.02)) + 0.1 * rng.standard_normal(1500)
    for kind in (so.trend.Doge, so.trend.Admm):
        monkeypatch.setattr(kind, "short_from", 1)
    found = so.trend_filter(y, so.Graph.chain(1500), so.L1(0.5), tol=1e-10).check()
    assert int(found.steps) == 0
    beyond = so.trend_filter(y, so.Graph.chain(1500), so.L1(0.5), tol=1e-18)
    assert int(beyond.steps) == 0
    assert abs(float(beyond.gap)) <= 1e-15


@pytest.mark.parametrize("name", often(GRAPHS, "cube"))
def test_float32_is_certified_alike_whatever_the_global_precision(rng, name):
    # XLA was seen to add up float32 stencils of three axes wrongly in float64.
    graph = GRAPHS[name](rng)
    y = (50 + 10 * rng.standard_normal(graph.num_nodes)).astype(np.float32)
    narrow = so.trend_filter(y, graph, so.L1(3.0), 1, "doge", tol=1e-4, max_steps=30)
    with precision(np.dtype(np.float64)):
        wide = so.trend_filter(y, graph, so.L1(3.0), 1, "doge", tol=1e-4, max_steps=30)
        assert wide.value.dtype == jnp.float32
        assert float(wide.gap) == pytest.approx(float(narrow.gap), rel=1e-3, abs=1e-6)
        assert float(wide.objective) == pytest.approx(float(narrow.objective), rel=1e-6)
