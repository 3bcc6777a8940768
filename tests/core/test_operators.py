import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseopt.core.base.sums import total
from sparseopt.core.base.types import precision
from sparseopt.core.operators.differences import Difference, GridBase, edge_base
from sparseopt.core.operators.maps import Identity, Stack
from sparseopt.core.operators.row_tables import edge_grid
from tests.jitted import Jitted
from tests.trend.problems import GRAPHS

ORDERS = [(order, from_edges) for order in range(1, 5) for from_edges in (False, True)]


def in_rows(graph, values, on_edges):
    """Rows in the matrix's order as an array of the operator's layout."""
    if graph.shape is None:
        return values
    return edge_grid(values, graph.shape, 0.0) if on_edges else values.reshape(graph.shape)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(("order", "from_edges"), ORDERS)
def test_products_are_those_of_the_matrix(rng, name, order, from_edges):
    with precision(np.dtype(np.float64)):
        graph = GRAPHS[name](rng)
        operator = Jitted(Difference(graph.base(np.float64), order, from_edges))
        matrix = graph.matrix(order, from_edges)
        ends_on_edges = (order - from_edges) % 2 == 1
        x, e = rng.standard_normal(matrix.shape[1]), rng.standard_normal(matrix.shape[0])
        image = operator.mv(np.asarray(in_rows(graph, x, from_edges)))
        np.testing.assert_allclose(image, in_rows(graph, matrix @ x, ends_on_edges), atol=1e-12)
        back = operator.rmv(np.asarray(in_rows(graph, e, ends_on_edges)))
        np.testing.assert_allclose(back, in_rows(graph, matrix.T @ e, from_edges), atol=1e-12)
        assert image.shape == operator.out_shape
        assert back.shape == operator.in_shape


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_transpose_is_adjoint_with_channels(rng, name, order):
    operator = Jitted(Difference(GRAPHS[name](rng).base(np.float32), order))
    x = rng.standard_normal((*operator.in_shape, 3)).astype(np.float32)
    e = rng.standard_normal((*operator.out_shape, 3)).astype(np.float32)
    image = operator.mv(x)
    assert np.vdot(image, e) == pytest.approx(np.vdot(x, operator.rmv(e)), rel=2e-4, abs=2e-3)
    alone = np.stack([operator.mv(x[..., i]) for i in range(3)], axis=-1)
    np.testing.assert_allclose(image, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["grid", "random"])
def test_a_stack_has_the_rows_of_its_parts_and_their_transpose(rng, name):
    base = GRAPHS[name](rng).base(np.float32)
    parts = (Identity(base.node_shape), Difference(base, 1), Difference(base, 2))
    stack = Jitted(Stack(parts))
    x = rng.standard_normal((*stack.in_shape, 3)).astype(np.float32)
    image = stack.mv(x)
    assert image.shape == (*stack.out_shape, 3)
    np.testing.assert_array_equal(image, np.concatenate([Jitted(part).mv(x).reshape(-1, 3) for part in parts]))
    e = rng.standard_normal(image.shape).astype(np.float32)
    assert np.vdot(image, e) == pytest.approx(np.vdot(x, stack.rmv(e)), rel=2e-4, abs=2e-3)


@pytest.mark.parametrize("name", GRAPHS)
def test_constants_vanish_exactly_in_float32(rng, name):
    for order in (1, 2, 3):
        operator = Jitted(Difference(GRAPHS[name](rng).base(np.float32), order))
        assert not np.any(operator.mv(np.full(operator.in_shape, 123.456, np.float32)))


def test_index_tables_are_arguments_of_the_compiled_function(rng):
    traces = []

    @jax.jit
    def apply(operator, x):
        traces.append(1)
        return operator.mv(x)

    edges = np.array([(0, 1), (1, 2), (2, 3)])
    x = jnp.arange(4.0)
    first = apply(Difference(edge_base(edges, 4, None, np.float32), 1), x)
    second = apply(Difference(edge_base(edges[::-1].copy(), 4, None, np.float32), 1), x * x)
    assert len(traces) == 1
    np.testing.assert_array_equal(first, [-1, -1, -1])
    np.testing.assert_array_equal(second, [-5, -3, -1])


def test_a_hub_sums_ten_thousand_edges_in_float32():
    n = 10_001
    edges = np.stack([np.zeros(n - 1, int), np.arange(1, n)], axis=1)
    base = edge_base(edges, n, None, np.float32)
    at_hub = float(base.laplacian(jnp.asarray(np.arange(n), jnp.float32))[0])
    assert at_hub == pytest.approx(-n * (n - 1) / 2, rel=1e-4)


def test_float32_sums_of_stencils_are_right_under_64_bit_types(rng):
    base = GridBase((32, 32, 32))
    x = rng.standard_normal(base.shape).astype(np.float32)
    rows = x.astype(np.float64)
    exact = np.abs(
        sum(-np.diff(rows, axis=i, prepend=rows.take([0], i), append=rows.take([-1], i), n=2) for i in range(3))
    )
    with precision(np.dtype(np.float64)):
        found = jax.jit(lambda x: total(jnp.abs(base.laplacian(x))))(jnp.asarray(x))
    assert found.dtype == jnp.float32
    assert float(found) == pytest.approx(exact.sum(), rel=1e-5)
