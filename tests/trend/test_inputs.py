"""Signals and penalties as they are given: the same problem has the same fit, up to the edges of the range."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseopt as so
from sparseopt.core.base import arguments
from sparseopt.core.operators import row_tables
from tests.trend.problems import random_graph, two_parts

Y = np.arange(6.0)
CHAIN = so.Graph.chain(6)


def test_the_direction_of_edges_counts_where_the_sign_does():
    edges = np.stack([np.arange(5), np.arange(1, 6)], axis=1)
    edges[:2] = edges[:2, ::-1]
    graph, y = so.Graph.from_edges(edges), np.array([0.1, 0.9, 2.1, 2.9, 4.2, 5.0])
    for penalty in (so.Box(-np.inf, 0.0), so.Box(0.125, 9.0)):
        fit = so.trend_filter(y, graph, penalty, tol=1e-9).value
        rows = jnp.asarray(graph.matrix(1) @ fit)
        np.testing.assert_allclose(rows, penalty.prox(rows, 1.0), atol=1e-4)
        np.testing.assert_allclose(so.trend_solver(graph, 0)(y, penalty).value, fit, atol=1e-3)
    fits = [so.trend_filter(y, each, so.L1(0.25), tol=1e-9).value for each in (graph, CHAIN)]
    np.testing.assert_allclose(*fits, atol=1e-4)
    # Rows of padding do not count where zero costs something.
    grid = so.Graph.grid((2, 3))
    fits = [so.trend_filter(y, each, AboveOne(0.4), tol=1e-8) for each in (grid, grid.as_edges())]
    assert float(fits[0].objective) == pytest.approx(float(fits[1].objective), rel=1e-5)
    with pytest.raises(ValueError, match=r"AboveOne does not act on them: plan one on graph\.as_edges\(\)"):
        so.trend_solver(CHAIN, 0)(y, AboveOne(0.5))


@so.pytree
class AboveOne:
    """`weight * sum of what lies below 1`, which is not 0 at 0."""

    weight: object

    def value(self, x):
        return self.weight * jnp.sum(jnp.maximum(1 - x, 0))

    def prox(self, x, step):
        return jnp.where(x < 1, jnp.minimum(x + step * self.weight, 1), x)


def test_paths_starts_and_solvers_know_the_direction_of_edges_too(rng):
    edges = np.array(so.Graph.grid((3, 4)).edges)
    edges[[2, 9]] = edges[[2, 9], ::-1]
    graph, y = so.Graph.from_edges(edges, 12), rng.standard_normal(12)
    fit = so.trend_filter(y, graph, AboveOne(0.3), tol=1e-8)
    path = so.trend.trend_path(y, graph, AboveOne(1.0), weights=[0.3], tol=1e-8)
    np.testing.assert_allclose(path.values[0], fit.value, atol=1e-4)
    wanted = so.trend_filter(y, graph, so.L1(0.3), start=fit, tol=1e-9).check().value
    solver = so.trend_solver(graph, 0)
    found = jax.jit(lambda weight: solver(y, so.L1(weight)).value)(0.3)
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    # As a grid it is another program with the same fit.
    on_grid = so.trend_filter(y.reshape(3, 4), so.Graph.grid((3, 4)), so.L1(0.3), tol=1e-9).value
    np.testing.assert_allclose(on_grid.reshape(-1), wanted, atol=1e-4)


class Named(NamedTuple):
    """A penalty that is a pytree and no dataclass."""

    weight: Any
    value, prox = so.L1.value, so.L1.prox


def test_a_penalty_of_your_own_needs_no_dataclass(rng):
    y = rng.standard_normal(6)
    np.testing.assert_array_equal(so.trend_filter(y, CHAIN, Named(0.0)).value, y)
    wanted = so.trend_filter(y, CHAIN, so.L1(0.3), tol=1e-7).value
    np.testing.assert_allclose(so.trend_filter(y, CHAIN, Named(0.3), tol=1e-7).value, wanted, atol=1e-4)
    both = so.trend_filter(y, CHAIN, {-1: Named(0.2), 0: so.L1(0.3)}, tol=1e-7).value
    np.testing.assert_allclose(both, np.sign(wanted) * np.maximum(abs(wanted) - 0.2, 0), atol=1e-4)


def test_solutions_without_a_dual_are_starts_too(rng):
    y = rng.standard_normal(6)
    wanted = so.trend_filter(y, CHAIN, so.L1(0.2), tol=1e-9).value
    without = so.trend_filter(y, CHAIN, so.L1(0.0))
    for start in (without, so.trend.trend_path(y, CHAIN, num=3).at(1)):
        found = so.trend_filter(y, CHAIN, so.L1(0.2), tol=1e-9, start=start)
        np.testing.assert_allclose(found.value, wanted, atol=1e-4)
    solver = so.trend_solver(CHAIN, 0)
    np.testing.assert_allclose(solver(y, so.L1(0.2), tol=1e-9, start=without).value, wanted, atol=1e-3)
    with pytest.raises(ValueError, match="a solution of the same graph and order, with 6 values and whose dual"):
        so.trend_filter(y, CHAIN, so.L1(0.2), start=so.trend_filter(y, CHAIN, so.L1(0.2), order=1))


@pytest.mark.parametrize(
    "graph", [so.Graph.chain(1, ends="graph"), so.Graph.grid((1, 1, 1)), so.Graph.from_edges([], 4)], ids=repr
)
@pytest.mark.parametrize("order", [0, 1])
def test_without_edges_the_fit_is_the_signal(rng, graph, order):
    y = rng.standard_normal((graph.num_nodes, 2))
    for penalty in (so.L1(1.0), so.MCP(1.0), so.SCAD(1.0), so.L0(1.0), so.GroupL2(1.0)):
        found = so.trend_filter(y, graph, penalty, order)
        np.testing.assert_array_equal(found.value, y)
        assert (found.status, found.gap) == (so.Status.CONVERGED, 0)
    for method in ("doge", "admm", "fused_lasso", "interior"):
        np.testing.assert_array_equal(so.trend_filter(y, graph, so.L1(1.0), order, method).value, y)
    both = so.trend_filter(y, graph, {0: so.L1(1.0), 1: so.L1(1.0)})
    np.testing.assert_array_equal(both.value, y)
    again = so.trend.reweighted(y[:, 0], graph, so.MCP(1.0), order)
    np.testing.assert_array_equal(again.value, y[:, 0])
    assert again.status is so.Status.STATIONARY
    assert so.trend.largest_weight(y, graph, order) == 0
    assert np.isnan(so.trend.noise_level(y, graph, order))
    rows = graph.num_nodes if order % 2 else 0
    assert so.trend.degrees_of_freedom(np.zeros(rows, bool), graph, order) == graph.num_nodes


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("name", ["L1", "MCP", "SCAD", "L0", "GroupL2", "row weights"])
def test_weight_0_returns_the_signal_to_the_last_bit(rng, order, name):
    graph, y = so.Graph.chain(12), rng.standard_normal((12, 2))
    penalty = so.L1(np.zeros(11 - order)) if name == "row weights" else getattr(so, name)(0.0)
    found = so.trend_filter(y, graph, penalty, order)
    np.testing.assert_array_equal(found.value, y)
    assert (found.status, found.gap) == (so.Status.CONVERGED, 0)


GIVEN = {
    "a list": list,
    "bool": lambda y: y > 4,
    "big-endian": lambda y: y.astype(">f8"),
    "every second": lambda y: np.repeat(y, 2)[::2],
    "backwards": lambda y: y[::-1].copy()[::-1],
    "read-only": lambda y: np.broadcast_to(y, (2, y.size))[0],
}
for name in ("int8", "uint8", "uint16", "int32", "int64", "float16", "float32", "longdouble"):
    GIVEN[name] = partial(lambda kind, y: y.astype(kind), name)
TREE = so.Graph.from_edges([(i, i // 2) for i in range(1, 12)])


@pytest.mark.parametrize("name", GIVEN)
def test_numbers_of_every_kind_give_the_fit_of_their_values(rng, name):
    given = GIVEN[name](rng.integers(0, 9, 12).astype(float))
    kind = np.float32 if name in ("float16", "float32") else np.float64
    plain = np.array(given, np.float64)
    found = so.trend_filter(given, TREE, so.L1(1.0), 1, "doge", tol=1e-4)
    assert found.value.dtype == kind
    expected = so.trend_filter(plain, TREE, so.L1(1.0), 1, "doge", tol=1e-4, dtype=kind)
    np.testing.assert_array_equal(found.value, expected.value)
    np.testing.assert_array_equal(np.array(given, np.float64), plain)  # what the caller holds is left alone
    assert so.trend.largest_weight(given, TREE, 1) == so.trend.largest_weight(plain, TREE, 1)
    assert so.trend.noise_level(given, TREE) == so.trend.noise_level(plain, TREE)


def test_layouts_in_memory_do_not_matter(rng):
    graph, y, weights = so.Graph.grid((3, 4)), rng.standard_normal((3, 4, 2)), rng.uniform(0.5, 2.0, (3, 4))

    def fit(y, **keywords):
        return np.asarray(so.trend_filter(y, graph, so.L1(0.3), 1, "doge", **keywords).value)

    expected = fit(y)
    for given in (np.asfortranarray(y), y.transpose(2, 0, 1).copy().transpose(1, 2, 0), y.tolist()):
        np.testing.assert_array_equal(fit(given), expected)
    np.testing.assert_array_equal(fit(y.reshape(12, 2)).reshape(3, 4, 2), expected)
    np.testing.assert_array_equal(fit(y, devices=np.int64(1)), expected)  # an integer of NumPy is a number
    np.testing.assert_array_equal(fit(y, node_weights=weights), fit(y, node_weights=weights.reshape(-1)))


@pytest.mark.parametrize("order", [0, 2])
def test_one_observation_a_component_is_enough(rng, order):
    # Only constants of a component cost nothing, so one value determines it, at every order.
    graph, y = two_parts(rng), np.full(11, np.nan)
    y[[2, 8, 10]] = 1.0, -3.0, 7.0
    found = so.trend_filter(y, graph, so.L1(0.5), order, missing="nan", tol=1e-10)
    np.testing.assert_array_equal(found.value, np.repeat([1.0, -3.0, 7.0], [6, 4, 1]))
    assert (found.status, found.objective, found.gap) == (so.Status.CONVERGED, 0, 0)
    whole = so.trend_filter(np.asarray(found.value), graph, so.L1(0.5), order)
    np.testing.assert_array_equal(whole.value, found.value)


def test_masked_entries_and_nan_and_weights_of_0_are_the_same_missing_values(rng):
    graph, y = so.Graph.grid((3, 4)), rng.standard_normal(12)
    absent = np.isin(np.arange(12), [1, 7])
    expected = so.trend_filter(y, graph, so.L1(0.3), node_weights=np.where(absent, 0.0, 1.0)).value
    holes = so.trend_filter(np.where(absent, np.nan, y), graph, so.L1(0.3), missing="nan").value
    masked = so.trend_filter(np.ma.array(y, mask=absent), graph, so.L1(0.3), missing="nan").value
    np.testing.assert_array_equal(holes, expected)
    np.testing.assert_array_equal(masked, expected)
    whole = np.arange(12)
    weight = so.trend.largest_weight(whole, graph, 1)
    assert so.trend.largest_weight(np.ma.array(whole, mask=False), graph, 1) == weight
    assert np.isnan(so.trend.noise_level([1.0, np.nan], so.Graph.chain(2), missing="nan"))  # without differences


@pytest.fixture
def machine(monkeypatch):
    """`machine(free, device)`: the bytes that are free in memory and on the device."""

    def has(free, device=None):
        monkeypatch.setattr(arguments, "ALWAYS_FREE", 0)
        monkeypatch.setattr(arguments, "available_memory_bytes", lambda: free)
        monkeypatch.setattr(arguments, "device_memory_left", lambda: device)

    return has


def test_an_order_that_fills_the_operator_is_refused_before_it_is_formed(rng, machine):
    machine(2**24)
    tree = np.stack([np.arange(1, 2000), rng.integers(0, np.arange(1, 2000))], axis=1)
    for graph in (so.Graph.grid((12, 12, 12)), so.Graph.from_edges(tree)):
        y = np.arange(float(graph.num_nodes))
        with pytest.raises(ValueError, match=r"difference matrix of order 16 .* rows of .* entries and more takes"):
            so.trend_filter(y, graph, so.L1(1.0), 15, "doge")


def test_the_estimated_entries_are_a_lower_bound_near_the_truth(rng, monkeypatch):
    asked = []
    monkeypatch.setattr(row_tables, "require_memory", lambda needed, *_: asked.append(needed))
    for graph in (so.Graph.chain(200, ends="graph"), so.Graph.grid((15, 15)), random_graph(rng, n=200, extra=100)):
        for order in (4, 5, 6):
            truth = graph.matrix(order).nnz * row_tables.ENTRY_BYTES
            assert 0.5 * truth <= asked[-1] <= 1.15 * truth


def test_what_needs_more_memory_than_there_is_is_refused(machine):
    y, graph = np.arange(10_000.0), so.Graph.chain(10_000)
    needed = 24 * y.nbytes
    machine(needed - 1)
    for call in (so.trend_filter, so.trend.trend_path):
        with pytest.raises(ValueError, match=r"10,000 values, takes at least 1\.8 MiB, and 1\.8 MiB are free"):
            call(y, graph, so.L1(1.0))
    assert so.trend.noise_level(y, graph) > 0  # which needs fewer copies
    machine(needed)
    with pytest.raises(ValueError, match="a history of max_steps=1,000,000 steps takes"):
        so.trend_filter(y, graph, so.L1(1.0), history=True, max_steps=10**6)
    machine(2**40, device=2**20)
    y, graph = np.zeros(2**20), so.Graph.chain(2**20)
    for call in (so.trend_filter, so.trend.trend_path):
        with pytest.raises(ValueError, match=r"at least 128\.0 MiB of the device, and 1\.0 MiB are free there: .*CPU"):
            call(y, graph, so.L1(1.0))


def test_the_unit_of_the_spacing_does_not_matter(rng):
    y = rng.standard_normal((12, 10))
    levels = [so.trend.noise_level(y, so.Graph.grid(y.shape, spacing=(h, 2 * h)), order=3) for h in (1e-7, 1.0, 1e7)]
    np.testing.assert_allclose(levels, levels[1], rtol=1e-9)
