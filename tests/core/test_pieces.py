import jax
import numpy as np
import pytest
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from sparseopt.core.operators.component_means import piece_labels, piece_means
from sparseopt.core.operators.differences import GridBase, edge_base

NODES, EDGES = 400, 500


def expected(tails, heads, joins):
    """The least node of each component, by SciPy."""
    matrix = sparse.coo_array((np.ones(joins.sum()), (tails[joins], heads[joins])), (NODES, NODES))
    count, labels = connected_components(matrix, directed=False)
    least = np.full(count, NODES)
    np.minimum.at(least, labels, np.arange(NODES))
    return least[labels]


@pytest.mark.parametrize("shuffled", [False, True])
def test_pieces_are_the_connected_components(rng, shuffled):
    """Lanes: edges of a long path and random ones, few and many of which join."""
    name = rng.permutation(NODES) if shuffled else np.arange(NODES)
    path = np.stack([name[:-1], name[1:]])
    tails, heads = np.concatenate([path, rng.integers(0, NODES, (2, EDGES - NODES + 1))], 1).astype(np.int32)
    joins = rng.random((3, EDGES)) < np.array([[0.3], [0.95], [1.0]])
    found = jax.jit(jax.vmap(lambda joins: piece_labels(tails, heads, joins, NODES)))(joins)
    np.testing.assert_array_equal(found, [expected(tails, heads, lane) for lane in joins])


def test_means_are_those_of_the_pieces(rng):
    labels = rng.integers(0, 5, 30)
    sums, weights = rng.standard_normal(30).astype(np.float32), rng.uniform(0.5, 1, 30).astype(np.float32)
    weights[labels == 3] = 0
    over = np.bincount(labels, weights, 5)
    means = np.divide(np.bincount(labels, sums, 5), over, out=np.zeros(5), where=over > 0)
    np.testing.assert_allclose(jax.jit(piece_means)(sums, weights, labels), means[labels], atol=1e-5)


def test_ends_are_those_of_the_differences(rng):
    edges = edge_base(rng.permuted(np.arange(24)).reshape(12, 2), 24, np.arange(12.0), np.float32)
    for base, scale in ((GridBase((4, 6)), 1), (edges, np.sqrt(np.arange(12)))):
        x = rng.standard_normal(base.node_shape).astype(np.float32)
        tails, heads = base.ends()
        apart = scale * (x.ravel()[np.asarray(tails)] - x.ravel()[np.asarray(heads)])
        np.testing.assert_allclose(base.difference(x), apart, atol=1e-6)
