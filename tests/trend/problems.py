"""Small graphs, and an independent solver: the dual as a box-constrained least-squares problem."""

import numpy as np
from scipy import sparse
from scipy.optimize import lsq_linear

import sparseopt as so


def random_graph(rng, n=14, extra=8, weighted=False):
    """A random tree with some more edges."""
    tree = np.stack([np.arange(1, n), rng.integers(0, np.arange(1, n))], axis=1)
    more = np.array([(i, j) for i in range(n) for j in range(i) if not ((tree == (i, j)).all(axis=1)).any()])
    edges = np.concatenate([tree, more[rng.permutation(len(more))[:extra]]])
    weights = rng.uniform(0.5, 2.0, len(edges)) if weighted else None
    return so.Graph.from_edges(edges, n, weights)


def two_parts(rng):
    """A chain of 6, a triangle with a tail, and an isolated node."""
    edges = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (6, 7), (7, 8), (6, 8), (8, 9)]
    return so.Graph.from_edges(edges, 11)


GRAPHS = {
    "chain": lambda rng: so.Graph.chain(15, ends="graph"),
    "grid": lambda rng: so.Graph.grid((4, 5)),
    "cube": lambda rng: so.Graph.grid((3, 2, 3)),
    "random": lambda rng: random_graph(rng),
    "weighted": lambda rng: random_graph(rng, weighted=True),
    "parts": two_parts,
}


def rows_of(graph, order):
    return sparse.eye_array(graph.num_nodes) if order == -1 else graph.matrix(order + 1)


def exact_sum(y, graph, weights, node_weights=None):
    """`argmin 1/2 sum w (y - b)² + sum of |weight Δ b|` for `weights` by order, each a number or one a row.

    By its dual, a box-constrained least squares, solved to rounding by active sets.
    """
    matrix = sparse.vstack([rows_of(graph, k) for k in weights]).toarray()
    box = np.concatenate([np.broadcast_to(w, rows_of(graph, k).shape[0]) for k, w in weights.items()]).astype(float)
    w = np.ones(graph.num_nodes) if node_weights is None else node_weights
    root, free = np.sqrt(w), box > 0
    scaled = matrix[free].T / root[:, None]
    found = lsq_linear(scaled, root * y, (-box[free], box[free]), method="bvls", tol=1e-15, max_iter=5000)
    return y - matrix[free].T @ found.x / w


def exact_fit(y, graph, weight, order, node_weights=None):
    return exact_sum(y, graph, {order: weight}, node_weights)


def objective(b, y, graph, weight, order, node_weights=None):
    """The L1 objective in float64."""
    w = 1.0 if node_weights is None else node_weights
    b, y = np.asarray(b, float), np.asarray(y, float)
    return 0.5 * np.sum(w * (y - b) ** 2) + weight * np.abs(graph.matrix(order + 1) @ b).sum()


def of_block(method, block):
    """A method with B of the differences row by row, or by its name."""
    return method if block is None else {"name": method, "B": block}
