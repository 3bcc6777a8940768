import copy
import pickle

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest

import sparseopt as so

Y = np.arange(6.0)
CHAIN = so.Graph.chain(6)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"y": np.zeros(5)}, r"6 nodes.*given \(5,\)"),
        ({"y": Y + 1j}, "real numbers, given dtype complex128"),
        ({"penalty": so.L1(np.ones(5))}, r"one for each of the 4 rows.*given the shape \(5,\)"),
        ({"penalty": so.MCP(np.ones(6))}, r"one number here, given the shape \(6,\)"),
        ({"penalty": so.SparseGroup(1.0, 1.0)}, "couples the channels"),
        ({"penalty": so.GroupL2(1.0, groups=[0, 0, 1, 1, 1])}, "labelled groups of differences are not supported"),
        ({"order": -1}, "order is a whole number from 0 .*given -1"),
        ({"order": 0.5}, "given 0.5"),
        ({"method": "newton"}, "unknown method 'newton'; known are auto, doge, admm, fast_admm, interior"),
        ({"method": {"name": "doge", "B": 0}}, r"B is a whole number from 1 to 2 .*given 0"),
        ({"method": so.trend.Doge(B=3)}, "1 to 2 .*given 3"),
        ({"max_steps": 0}, "max_steps is a whole number from 1 .*given 0"),
        ({"method": {"name": "doge", "relaxation": 2.0}}, r"relaxation in \(0, 2\)"),
        ({"method": {"name": "admm", "rho": -1.0}}, "must be positive"),
        ({"node_weights": np.ones(5)}, r"6 nodes need as many node weights, \[6\] or \(6,\), given 5"),
        ({"node_weights": -Y}, "not negative, given -1.0 at node 1"),
        ({"missing": "drop"}, 'missing must be "error" or "nan"'),
        ({"graph": so.Graph.grid((2, 3)), "method": "fast_admm"}, 'needs a chain.*"doge" or "admm"'),
        ({"method": "fast_admm", "penalty": so.MCP(1.0)}, "solves the L1 penalty"),
    ],
)
def test_bad_input_is_an_error_that_names_it(arguments, match):
    call = {"y": Y, "graph": CHAIN, "penalty": so.L1(1.0), "order": 1, **arguments}
    with pytest.raises(ValueError, match=match):
        so.trend_filter(**call)


def test_an_integer_of_numpy_is_a_number_of_devices():
    np.testing.assert_array_equal(so.trend_filter(Y, CHAIN, so.L1(0.0), devices=np.int64(1)).value, Y)


def test_a_number_is_no_penalty():
    with pytest.raises(TypeError, match=r"such as sparseopt\.L1"):
        so.trend_filter(Y, CHAIN, 10.0)


def test_a_component_without_observation_is_named():
    graph = so.Graph.from_edges([(0, 1), (2, 3)], 4)
    with pytest.raises(ValueError, match=r"1 components have no observed node \(one holds node 2\)"):
        so.trend_filter([1.0, 2.0, np.nan, np.nan], graph, so.L1(1.0), missing="nan")


def test_merge_adds_duplicates_and_drops_loops():
    graph = so.Graph.from_edges([(0, 1), (1, 1), (1, 0), (1, 2)], weights=[1.0, 5.0, 2.0, 4.0], merge=True)
    assert dict(zip(map(tuple, graph.edges.tolist()), graph.weights, strict=True)) == {(0, 1): 3.0, (1, 2): 4.0}


def test_scipy_and_networkx_graphs_are_the_same_graph(rng):
    named = nx.Graph()
    named.add_nodes_from("dacb")
    named.add_edge("a", "b", weight=2.0)
    named.add_edge("d", "c")
    graph = so.Graph.from_networkx(named)
    assert graph.nodes == ("d", "a", "c", "b")
    assert graph.num_components == 2
    same = so.Graph.from_scipy(nx.to_scipy_sparse_array(named))
    np.testing.assert_allclose(same.matrix(2).toarray(), graph.matrix(2).toarray())
    laplacian = nx.laplacian_matrix(named).toarray()
    np.testing.assert_allclose(graph.matrix(2).toarray(), laplacian)


def test_components_and_isolated_nodes():
    graph = so.Graph.from_edges([(0, 1), (3, 4)], 6)
    assert graph.num_components == 4
    np.testing.assert_array_equal(graph.isolated, [2, 5])
    assert so.Graph.grid((3, 4)).num_components == 1


@pytest.mark.parametrize("shape", [(7,), (3, 4), (4, 3), (2, 5)])
def test_grids_given_by_edges_are_recognised(rng, shape):
    grid = so.Graph.grid(shape)
    order = rng.permutation(grid.num_edges)
    for weights in (None, np.ones(grid.num_edges)):
        assert so.Graph.from_edges(grid.edges[order][:, ::-1], grid.num_nodes, weights).shape == shape
    assert so.Graph.from_edges(grid.edges[1:], grid.num_nodes).shape is None


def test_a_stored_graph_leaves_its_tables_out_and_a_copy_shares_them():
    graph = so.Graph.from_edges([(0, 1), (1, 2), (3, 4)], weights=[1.0, 2.0, 3.0], nodes="abcde")
    stored = pickle.dumps(graph)
    fit = so.trend_filter(np.arange(5.0), graph, so.L1(0.1), 1)
    assert pickle.dumps(graph) == stored
    assert copy.deepcopy([graph]) == [graph]
    thawed = pickle.loads(stored)
    assert (thawed.num_nodes, thawed.shape, thawed.nodes) == (5, None, tuple("abcde"))
    np.testing.assert_array_equal(thawed.matrix(2).toarray(), graph.matrix(2).toarray())
    np.testing.assert_array_equal(so.trend_filter(np.arange(5.0), thawed, so.L1(0.1), 1).value, fit.value)


@pytest.mark.processes
def test_importing_the_package_stays_light():
    import subprocess
    import sys

    code = (
        "import sparseopt, sys; print([m for m in ('flax', 'transformers', 'matplotlib', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("turned", [slice(None), slice(2)])
def test_the_direction_of_edges_counts_where_the_sign_does(turned):
    """A chain is recognised by its edges, whose signs only other penalties than norms see."""
    edges = np.stack([np.arange(5), np.arange(1, 6)], axis=1)
    edges[turned] = edges[turned, ::-1]
    graph, y = so.Graph.from_edges(edges), np.array([0.1, 0.9, 2.1, 2.9, 4.2, 5.0])
    other = so.Graph.from_edges(edges, weights=np.full(5, 1 + 1e-9))  # no chain
    assert (graph.shape, other.shape) == ((6,), None)
    for penalty in (so.Nonnegative(), so.Box(-0.5, 0.25), so.Box(-np.inf, 0.0), so.Box(0.125, 9.0), so.L1(0.25)):
        fits = [so.trend_filter(y, each, penalty, tol=1e-9).value for each in (graph, other)]
        np.testing.assert_allclose(*fits, atol=1e-4)
    so.trend_solver(graph, 0)(y, so.L1(0.25))
    with pytest.raises(ValueError, match=r"Nonnegative does not act: plan one on graph\.as_edges\(\)"):
        so.trend_solver(graph, 0)(y, so.Nonnegative())
    fit = so.trend_solver(graph.as_edges(), 0)(y, so.Nonnegative()).value
    np.testing.assert_allclose(fit, so.trend_filter(y, other, so.Nonnegative()).value, atol=1e-4)


@so.pytree
class Uneven:
    """`weight * (2 sum of rises + 1/2 sum of falls)`."""

    weight: object

    def value(self, x):
        return self.weight * jnp.sum(jnp.where(x > 0, 2 * x, -x / 2))

    def prox(self, x, step):
        level = step * self.weight
        return jnp.where(x > 2 * level, x - 2 * level, jnp.where(x < -level / 2, x + level / 2, 0))


@so.pytree
class OwnL1:
    weight: object
    even = True

    def value(self, x):
        return self.weight * jnp.sum(jnp.abs(x))

    def prox(self, x, step):
        return jnp.sign(x) * jnp.maximum(jnp.abs(x) - step * self.weight, 0)


def test_paths_and_starts_know_the_direction_of_edges_too(rng):
    edges = np.array(so.Graph.grid((3, 4)).row_edges)
    edges[[2, 9]] = edges[[2, 9], ::-1]
    graph, y = so.Graph.from_edges(edges, 12), rng.standard_normal((3, 4))
    fit = so.trend_filter(y, graph, Uneven(0.3), tol=1e-8)
    np.testing.assert_allclose(
        so.trend.trend_path(y, graph, Uneven(1.0), weights=[0.3], tol=1e-8).values[0], fit.value, atol=1e-4
    )
    so.trend_filter(y, graph, so.L1(0.3), start=fit).check()
    # L1 does not see it, also as the class that is the default: the path of a chain is merged, without steps.
    turned, line = so.Graph.from_edges(np.array(CHAIN.edges)[:, ::-1]), rng.standard_normal(6)
    paths = [so.trend.trend_path(line, each, num=3) for each in (turned, CHAIN)]
    np.testing.assert_array_equal(paths[0].values, paths[1].values)
    assert paths[0].steps.tolist() == [0, 0, 0]
    # A penalty of one's own that says that it is the same for both signs has the rows of the grid, also under jit.
    solver = so.trend_solver(graph, 0)
    wanted = so.trend_filter(y, graph, so.L1(0.3), tol=1e-9).value
    for fitted in (solver(y, OwnL1(0.3)), jax.jit(lambda weight: solver(y, OwnL1(weight)))(0.3)):
        np.testing.assert_allclose(fitted.value, wanted, atol=1e-3)


class Registered:
    """A penalty that is a pytree and no dataclass."""

    def __init__(self, weight):
        self.weight = weight

    value, prox = OwnL1.value, OwnL1.prox


jax.tree_util.register_pytree_node(
    Registered, lambda each: ((each.weight,), None), lambda _, leaves: Registered(*leaves)
)


@so.pytree
class Unweighted:
    """A norm that names its weight otherwise."""

    size: object

    def value(self, x):
        return so.L1(self.size).value(x)

    def prox(self, x, step):
        return so.L1(self.size).prox(x, step)

    def project_dual(self, dual):
        return so.L1(self.size).project_dual(dual)

    def slack(self, x, dual):
        return so.L1(self.size).slack(x, dual)


def test_a_penalty_of_your_own_needs_neither_a_dataclass_nor_a_weight(rng):
    y = rng.standard_normal(6)
    np.testing.assert_array_equal(
        so.trend_filter(y, CHAIN, Registered(0.0)).value, so.trend_filter(y, CHAIN, so.L1(0.0)).value
    )
    for penalty in (Registered(0.3), Unweighted(0.3)):
        fit = so.trend_filter(y, CHAIN, penalty, tol=1e-7)
        np.testing.assert_allclose(fit.value, so.trend_filter(y, CHAIN, so.L1(0.3), tol=1e-7).value, atol=1e-4)
    fits = [so.trend_filter(y, CHAIN, {-1: first, 0: so.L1(0.3)}, tol=1e-7) for first in (Unweighted(0.2), so.L1(0.2))]
    np.testing.assert_allclose(fits[0].value, fits[1].value, atol=1e-4)


def test_solutions_without_a_dual_are_starts_too(rng):
    y = rng.standard_normal(6)
    wanted = so.trend_filter(y, CHAIN, so.L1(0.2), tol=1e-9).value
    without = so.trend_filter(y, CHAIN, so.L1(0.0))
    for start in (without, so.trend.trend_path(y, CHAIN, num=3).at(1)):
        found = so.trend_filter(y, CHAIN, so.L1(0.2), tol=1e-9, start=start)
        np.testing.assert_allclose(found.value, wanted, atol=1e-4)
    solver = so.trend_solver(CHAIN, 0)
    np.testing.assert_allclose(solver(y, so.L1(0.2), tol=1e-9, start=without).value, wanted, atol=1e-3)
    with pytest.raises(ValueError, match="a solution of the same graph and order"):
        so.trend_filter(y, CHAIN, so.L1(0.2), start=so.trend_filter(y, CHAIN, so.L1(0.2), order=1))


def test_a_signal_that_a_device_cannot_hold_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("sparseopt.core.base.arguments.device_memory_left", lambda: 2**20)
    signal, graph = np.zeros(2**20), so.Graph.chain(2**20)
    for fit in (lambda: so.trend_filter(signal, graph, so.L1(1.0)), lambda: so.trend.trend_path(signal, graph)):
        with pytest.raises(
            ValueError, match=r"takes at least 128\.0 MiB of the device, and 1\.0 MiB are free there: .*CPU"
        ):
            fit()


def test_a_traced_penalty_is_told_of_the_solver():
    with pytest.raises(TypeError, match=r"a penalty's numbers, .* make a solver by sparseopt\.trend_solver"):
        jax.jit(lambda weight: so.trend_filter(Y, CHAIN, so.L1(weight)).value)(1.0)


def test_a_renumbered_graph_has_the_same_fit(rng):
    n = 60
    numbers = rng.permutation(n)
    edges = numbers[np.stack([np.arange(n - 1), np.arange(1, n)], axis=1)]
    names = [f"node {i}" for i in range(n)]
    graph = so.Graph.from_edges(edges, n, rng.uniform(0.5, 2.0, n - 1), nodes=names)
    local, order = graph.renumber()
    assert np.ptp(local.edges, axis=1).max() == 1  # a chain again
    assert local.nodes == tuple(names[i] for i in order)
    np.testing.assert_allclose(local.matrix(2).toarray(), graph.matrix(2).toarray()[np.ix_(order, order)], rtol=1e-12)
    y = rng.standard_normal(n)
    fit = np.empty(n)
    fit[order] = so.trend_filter(y[order], local, so.L1(0.5), tol=1e-10).value
    np.testing.assert_allclose(fit, so.trend_filter(y, graph, so.L1(0.5), tol=1e-10).value, atol=1e-4)
