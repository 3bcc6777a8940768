"""Floor 5: what "auto" takes: the method that is to be expected to be the quickest. The numbers are measured ones."""

from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from sparseopt.core.penalties import L1, Norm
from sparseopt.trend.graph import Graph
from sparseopt.trend.interior import is_available

# Above these ratios of weight to noise the interior point method beats Doge-ADMM on narrow graphs: at order 0; and at
# order 1, divided by the square of the digits that are asked for, since the steps of Doge-ADMM grow with both.
VERY_STRONG, STRONG_PER_DIGIT = 20.0, 40.0
# A graph is narrow if no layer of a breadth-first search has more than this multiple of sqrt(nodes). Planar graphs
# have layers of one or two, random graphs of sqrt(nodes) / 3.
WIDEST_LAYER = 8.0
# Factors of larger ones are slow, and large.
MOST_NODES = 1_000_000


def choose_method(
    graph: Graph,
    penalty: Any,
    order: int,
    weighted: bool,
    strength: float,
    tol: float,
    dtype: Any = np.float64,
    cold: bool = True,
) -> str:
    """The method for one fit of the square loss.

    Args:
        graph: the graph.
        penalty: the penalty.
        order: k.
        weighted: whether there are node weights or missing values.
        strength: the penalty's weight over the noise of the signal.
        tol: of the duality gap.
        dtype: of the computation.
        cold: whether a method will do that starts cold and keeps no history.
    """
    method = _splitting(graph, penalty, order, weighted, strength, dtype)
    return "interior" if cold and _interior_wins(graph, penalty, order, method, strength, tol) else method


def choose_path_method(
    graph: Graph, penalty: Any, order: int, weighted: bool, strength: float, tol: float, dtype: Any
) -> str:
    """The method for the levels of a path, from its first one down; arguments as in `choose_method`."""
    method = _splitting(graph, penalty, order, weighted, strength, dtype)
    if method == "doge" and order >= 1 and isinstance(penalty, Norm):
        # A path spends its steps where smoothing is strong: there the conditioning decides.
        method = "admm"
    # Levels of order 0 are quick by a warm start.
    return "interior" if _interior_wins(graph, penalty, order, method, np.inf if order else 0.0, tol) else method


def _splitting(graph: Graph, penalty: Any, order: int, weighted: bool, strength: float, dtype: Any) -> str:
    """The quickest of the splitting methods.

    A step of Doge costs two sparse products, a tenth and less of a cosine transform. At order 0 it is the fastest on
    every graph but a chain, at orders 1 and 2 unless smoothing is strong. There, and from order 3, conditioning
    decides: an exact x-step pays where it is cheap, by cosines on grids without node weights. On chains there is the
    exact fused lasso as well: at order 0 it is the fit, at others it saves steps. In float32 it loses its accuracy
    over long chains.
    """
    if graph.shape is None or weighted:
        return "doge"
    strong = strength > _strong_from(graph.shape, order)
    one_weight = isinstance(penalty, L1) and np.ndim(penalty.weight) == 0
    chain = len(graph.shape) == 1 and one_weight and dtype == np.float64
    if chain and (order == 0 or strong):
        return "fast_admm"
    return "admm" if strong else "doge"


def _strong_from(shape: tuple[int, ...], order: int) -> float:
    """The ratio of weight to noise above which an exact x-step saves so many steps that it wins in time too."""
    if order == 0:
        return np.inf
    chain = len(shape) == 1
    if order == 1:
        return 2.0 if chain else 10.0
    if order == 2 and chain:
        return 1.0
    # On small pictures an exact x-step is cheap; on grids of three axes Doge needs many steps.
    return 0.5 if order == 2 and len(shape) == 2 and min(shape) >= 128 else 0.0


def _interior_wins(graph: Graph, penalty: Any, order: int, chosen: str, strength: float, tol: float) -> bool:
    """Whether the interior point method is to be expected to beat the method chosen among the others.

    Doge-ADMM gets there in few steps at order 0, and at order 1 where smoothing is weak. On chains, where all are
    quick, strong smoothing decides.
    """
    if not (isinstance(penalty, L1) and is_available()):
        return False
    if graph.shape is not None:
        return len(graph.shape) == 1 and order >= 1 and chosen != "doge"
    limits = (VERY_STRONG, STRONG_PER_DIGIT / np.log10(min(tol, 0.1)) ** 2, 0.0)
    return strength > limits[min(order, 2)] and graph.num_nodes <= MOST_NODES and is_narrow(graph)


def is_narrow(graph: Graph) -> bool:
    """Whether factors on the graph stay sparse, told from the layers of a breadth-first search."""

    def build() -> bool:
        ones = np.ones(graph.num_edges, np.int8)
        adjacency = sparse.csr_array((ones, graph.edges.T), shape=(graph.num_nodes,) * 2)
        # The largest component, searched from an end of it.
        inside = np.flatnonzero(graph.components == np.argmax(np.bincount(graph.components)))
        start = inside[0]
        for _ in range(2):
            distance = csgraph.dijkstra(adjacency, directed=False, indices=start, unweighted=True)[inside]
            start = inside[np.argmax(distance)]
        widest = np.max(np.bincount(distance.astype(np.int64)))
        return bool(widest <= WIDEST_LAYER * np.sqrt(graph.num_nodes))

    # A planar graph has at most three edges a node.
    return graph.num_edges <= 3 * graph.num_nodes and graph.cached("narrow", build)
