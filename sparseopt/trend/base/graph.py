"""Graphs as the trend filter uses them, checked on the host before any work."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from sparseopt.core.base.arguments import require_memory, unknown, whole_number
from sparseopt.core.operators.divided_differences import check_times
from sparseopt.core.operators.edge_lists import (
    check_adjacency,
    check_edges,
    check_spacing,
    require_positive,
)
from sparseopt.trend.base.free_ends import FreeChain, FreeGrid
from sparseopt.trend.base.geometry import Geometry
from sparseopt.trend.base.graph_ends import Chain, Edges, Grid

ENDS = ("graph", "free")


def _are_free(ends: Any) -> bool:
    if ends not in ENDS:
        raise ValueError(unknown("ends", ends, ENDS))
    return ends == "free"


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """An undirected graph; make one with `grid`, `chain`, `from_edges`, `from_scipy` or `from_networkx`.

    Attributes:
        geometry: what is special about its kind; not for callers.
        nodes: node names in the order of the signal, or None for `0..n-1`.

    Example:
        >>> graph = so.Graph.from_edges([(0, 1), (1, 2), (3, 4)])
        >>> graph.num_nodes, graph.num_edges, graph.num_components
        (5, 3, 2)
    """

    geometry: Geometry
    nodes: tuple[Hashable, ...] | None = None

    def __post_init__(self) -> None:
        what = f"one signal on a graph of {self.num_nodes:,} nodes"
        require_memory(8 * self.num_nodes, what, "use a smaller graph, or a part of it")

    def __repr__(self) -> str:
        return repr(self.geometry)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Graph":
        """The graph itself: it is immutable, and a copy of an estimator shares its tables."""
        return self

    @property
    def num_nodes(self) -> int:
        return self.geometry.num_nodes

    @property
    def num_edges(self) -> int:
        return self.geometry.num_edges

    @property
    def num_components(self) -> int:
        """The number of components, isolated nodes included."""
        return self.geometry.num_components

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of a grid, with nodes in row-major order; `(n,)` for a chain, None for other graphs."""
        return getattr(self.geometry, "shape", None)

    @property
    def edges(self) -> np.ndarray:
        """The edges `[m, 2]` in the given order; for a grid axis by axis in row-major order."""
        return self.geometry.edges

    @property
    def weights(self) -> np.ndarray | None:
        """Positive `[m]`, or None for ones.

        An edge of weight w has the row `sqrt(w) (x_i - x_j)` in D, so that `DᵀD` is the weighted Laplacian.
        """
        return self.geometry.weights

    @property
    def times(self) -> np.ndarray | None:
        """The times of the nodes of a chain with free ends, increasing `[n]`, or None for 0, 1, 2, ..."""
        return getattr(self.geometry, "times", None)

    @property
    def free(self) -> bool:
        """Whether the ends of a chain or a grid are free, see `chain` and `grid`."""
        return self.geometry.wide

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """The spacing of a grid's axes, or None for ones; see `grid`."""
        return getattr(self.geometry, "spacing", None)

    @property
    def components(self) -> np.ndarray:
        """The component number of every node, `[n]`."""
        return self.geometry.components

    @property
    def degrees(self) -> np.ndarray:
        """The number of edges at every node, `[n]`."""
        return np.bincount(self.edges.reshape(-1), minlength=self.num_nodes)

    @property
    def isolated(self) -> np.ndarray:
        """The nodes without an edge, whose values a trend filter leaves unchanged."""
        return np.flatnonzero(self.degrees == 0)

    def matrix(self, order: int, from_edges: bool = False) -> sparse.csr_array:
        """`Δ^(order)` (or `Δ^(order-1) Dᵀ`) as a sparse matrix; its rows follow `edges` or the nodes.

        With free ends it is `D^(order)` of `chain`; on a grid, of the lines along the first axis, then along the next.

        Example:
            >>> so.Graph.from_edges([(0, 1), (1, 2)]).matrix(2).toarray().tolist()  # the Laplacian
            [[1.0, -1.0, 0.0], [-1.0, 2.0, -1.0], [0.0, -1.0, 1.0]]
        """
        return self.geometry.matrix(order, from_edges)

    def groups(self, block: int, from_edges: bool = False) -> np.ndarray:
        """The group of every row of `matrix(block, from_edges)`: rows of a group share no column.

        In closed form on grids for D, L, D L and Dᵀ, else by a greedy colouring.

        Example:
            >>> so.Graph.chain(5).groups(1).tolist()  # edges by parity: those of one group share no node
            [0, 1, 0, 1]
        """
        return self.geometry.groups(block, from_edges)

    @classmethod
    def grid(cls, shape: Sequence[int], spacing: Sequence[float] | None = None, ends: str = "graph") -> "Graph":
        """A grid of 1, 2 or 3 dimensions: each node joined to its neighbours along the axes.

        With the default ends, even on a grid of one axis, a trend filter uses the differences of the graph: order 1
        penalises the Laplacian, which adds up the bends along all axes, and at the borders a slope. With `ends="free"`
        it is the Kronecker trend filter, along each axis separately: order k penalises the differences of order k + 1
        of all lines of the grid, as `chain` does of one line. They are 0 for the sums of products of polynomials of
        degree k in each axis, and for no other signal, so these sums are unchanged at any weight. Order 0 has the same
        fits with either ends.

        Args:
            shape: the number of nodes along each axis.
            spacing: the distance h of neighbours along each axis, as between voxels of a scan; None for ones. The
                differences along an axis are divided by h, so its edges have the weight `1 / h²`. A penalty's weight
                has the unit of y times the unit of distance, so scaling all spacings scales it. For edge weights w
                along an axis, give the spacing `w^-1/2`. The fast transforms of a grid are kept. With free ends the
                differences of order m are divided by `h^m`.
            ends: "graph" or "free".

        Raises:
            ValueError: for other numbers of axes, an axis without nodes, a spacing that is not positive or not one
                number for each axis, a spacing of a single axis, or unknown ends.

        Source: Sadhanala, Wang, Hu, Tibshirani, "Multivariate trend filtering for lattice data", 2021, for free ends.

        Example:
            >>> so.Graph.grid((2, 2)).edges.tolist()
            [[0, 2], [1, 3], [0, 1], [2, 3]]
            >>> so.Graph.grid((2, 2), spacing=(1, 2)).weights.tolist()
            [1.0, 1.0, 0.25, 0.25]
            >>> so.Graph.grid((3, 2), ends="free").matrix(2).toarray().tolist()  # down the two columns
            [[1.0, 0.0, -2.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, -2.0, 0.0, 1.0]]
        """
        free = _are_free(ends)
        given = tuple(shape) if np.iterable(shape) else ()
        if not 1 <= len(given) <= 3:
            raise ValueError(f"a grid has 1 to 3 axes of at least one node, as in (480, 640); given {shape!r}")
        sizes = tuple(whole_number(f"axis {i} of a grid of 1 to 3 axes", n, 1) for i, n in enumerate(given))
        step = check_spacing(spacing, len(sizes))
        if len(sizes) == 1:
            return cls(FreeChain(sizes) if free else Chain(sizes))
        return cls(FreeGrid(sizes, step) if free else Grid(sizes, step))

    @classmethod
    def chain(cls, n: int, times: Any = None, ends: str = "free") -> "Graph":
        """A path of n nodes.

        With the default ends, which are free, the differences of a trend filter are the divided differences of the
        usual trend filter on a line (genlasso, glmgen, l1 trend filtering):

            (D^(1) x)_i = x_i - x_(i+1),        D^(m+1) = D^(1) diag( m / (t_(i+m) - t_i) ) D^(m)

        Order k penalises `D^(k+1) b`, of `n - k - 1` rows. It is 0 for every polynomial in t of degree k, and for no
        other signal, so those are left unchanged at any weight. At even times of step h it is `h^-k` times the plain
        differences. With `ends="graph"` they are `Δ^(k+1)` of the graph, made of its Laplacian, as in papers on graphs:
        at orders of 1 and more they penalise a slope at the two ends, and so move a straight line. Order 0 has plain
        differences at any times, and the same fits with either ends.

        Args:
            n: the number of nodes.
            times: increasing, `[n]`, for free ends; None for 0, 1, 2, ... From order 1 on nearly equal times make the
                fit raise an error, since its solves would lose their digits.
            ends: "free" or "graph".

        Raises:
            ValueError: for times that are not finite or do not increase, or for times with the ends of the graph, whose
                edges have weights and no lengths.

        Source: Kim, Koh, Boyd, Gorinevsky, "l1 trend filtering", SIAM Review 51 (2009); Tibshirani, "Adaptive piecewise
        polynomial estimation via trend filtering", Annals of Statistics 42 (2014); for uneven times Ramdas and
        Tibshirani, "Fast and flexible ADMM algorithms for trend filtering", 2016.

        Example:
            >>> so.Graph.chain(3).edges.tolist()
            [[0, 1], [1, 2]]
            >>> so.Graph.chain(4, times=[0.0, 1.0, 2.0, 4.0]).matrix(2).toarray().tolist()
            [[1.0, -2.0, 1.0, 0.0], [0.0, 1.0, -1.5, 0.5]]
            >>> so.Graph.chain(3, ends="graph").matrix(2).toarray().tolist()  # the Laplacian
            [[1.0, -1.0, 0.0], [-1.0, 2.0, -1.0], [0.0, -1.0, 1.0]]
        """
        free = _are_free(ends)
        if times is not None and not free:
            raise ValueError(
                'times need ends="free", whose divided differences use them; with the ends of the graph an edge has a '
                "weight, which Graph.from_edges accepts"
            )
        size = whole_number("the number of nodes of a chain", n, 1)
        if not free:
            return cls(Chain((size,)))
        return cls(FreeChain((size,), times=None if times is None else check_times(times, size)))

    @classmethod
    def from_edges(
        cls,
        edges: Any,
        num_nodes: int | None = None,
        weights: Any = None,
        *,
        merge: bool = False,
        nodes: Sequence[Hashable] | None = None,
    ) -> "Graph":
        """A graph from pairs of node numbers; of a grid or a chain, `grid` and `chain` make a faster one.

        Args:
            edges: integers `[m, 2]`.
            num_nodes: n, at least 1; None uses the largest number plus one. Nodes without an edge are kept.
            weights: positive `[m]`, or None for ones. The difference along an edge of weight w is
                `sqrt(w) (x_i - x_j)`: give `c²` for a penalty of `c |x_i - x_j|`.
            merge: drop self-loops and add up the weights of duplicates (1 each without weights) instead of raising a
                ValueError.
            nodes: names in node order.

        Example:
            >>> so.Graph.from_edges([(0, 1), (1, 2), (1, 0)], merge=True).weights.tolist()
            [2.0, 1.0]
        """
        pairs, count, level = check_edges(edges, num_nodes, weights)
        loops = pairs[:, 0] == pairs[:, 1]
        if loops.any() and not merge:
            first = int(np.argmax(loops))
            raise ValueError(
                f"edge {first} joins node {pairs[first, 0]} to itself ({int(loops.sum())} self-loops in all); "
                "merge=True drops them"
            )
        low_high = np.sort(pairs, axis=1)
        keys = low_high[:, 0] * count + low_high[:, 1]
        unique, first_place, owner = np.unique(keys, return_index=True, return_inverse=True)
        if unique.size < keys.size and not merge:
            repeated = int(np.setdiff1d(np.arange(keys.size), first_place)[0])
            raise ValueError(
                f"edge {repeated}, {tuple(int(v) for v in pairs[repeated])}, was given before "
                f"({keys.size - unique.size} duplicates in all); merge=True adds their weights"
            )
        if merge and (loops.any() or unique.size < keys.size):
            merged = np.bincount(owner, weights=np.ones(keys.size) if level is None else level)
            kept = ~loops[first_place]
            pairs, level = pairs[first_place][kept], merged[kept]
            require_positive(level)  # a sum of finite weights may be infinite
        if level is not None and np.all(level == 1):
            level = None
        if nodes is not None and len(nodes) != count:
            raise ValueError(f"{count} nodes need as many names, given {len(nodes)}")
        return cls(Edges(count, pairs, level), None if nodes is None else tuple(nodes))

    @classmethod
    def from_scipy(cls, adjacency: Any, *, merge: bool = False) -> "Graph":
        """A graph from a symmetric sparse (or dense) adjacency matrix; its entries are the weights, as in
        `from_edges`.

        `merge` drops the diagonal (self-loops) instead of raising a ValueError.

        Example:
            >>> graph = so.Graph.from_scipy(np.array([[0, 2], [2, 0]]))
            >>> graph.edges.tolist(), graph.weights.tolist()
            ([[0, 1]], [2.0])
        """
        matrix = check_adjacency(adjacency)
        upper = matrix.row < matrix.col
        diagonal = matrix.row == matrix.col
        if diagonal.any() and not merge:
            raise ValueError(
                f"the adjacency matrix has {int(diagonal.sum())} diagonal entries (self-loops), the first at node "
                f"{int(matrix.row[diagonal][0])}; merge=True drops them"
            )
        edges = np.stack([matrix.row[upper], matrix.col[upper]], axis=1)
        return cls.from_edges(edges, matrix.shape[0], matrix.data[upper])

    @classmethod
    def from_networkx(cls, graph: Any, weight: str | None = "weight", *, merge: bool = False) -> "Graph":
        """A graph from networkx; `.nodes` holds its nodes in the order of the signal.

        Args:
            graph: undirected; a multigraph only with `merge`.
            weight: the edge attribute that holds weights, 1 where absent; None ignores it.
            merge: as in `from_edges`.
        """
        if not hasattr(graph, "is_directed"):
            raise TypeError(f"from_networkx needs a networkx.Graph, given {type(graph).__name__}")
        if graph.is_directed():
            raise ValueError("the trend filter needs an undirected graph; pass graph.to_undirected()")
        nodes = list(graph.nodes)
        place = {node: index for index, node in enumerate(nodes)}
        edges = np.array([(place[tail], place[head]) for tail, head in graph.edges()], np.int64).reshape(-1, 2)
        level = [value for *_, value in graph.edges(data=weight, default=1)] if weight else None
        return cls.from_edges(edges, len(nodes), level, merge=merge, nodes=nodes)

    def as_edges(self) -> "Graph":
        """The same graph with one row per edge, even if it is a grid."""
        return Graph(self.geometry.as_edges(), self.nodes)

    def renumber(self) -> tuple["Graph", np.ndarray]:
        """The graph with neighbours numbered close to each other, which speeds up signals that exceed the caches.

        Returns:
            The graph, and `order` `[n]`: its node i is node `order[i]` of this graph, so a signal y becomes `y[order]`,
            and a fit b is mapped back by `fit[order] = b`.

        Example:
            >>> ring = so.Graph.from_edges([(0, 3), (3, 1), (1, 2)])
            >>> path, order = ring.renumber()
            >>> order.tolist(), path.edges.tolist()
            ([2, 1, 3, 0], [[1, 0], [2, 1], [3, 2]])
        """
        if self.free:  # free ends are numbered along its axes
            return self, np.arange(self.num_nodes)
        order = self.geometry.near_order
        place = np.empty(self.num_nodes, np.int64)
        place[order] = np.arange(self.num_nodes)
        pairs = place[self.edges]
        ends = np.sort(pairs, axis=1)
        rows = np.lexsort((ends[:, 1], ends[:, 0]))
        weights = None if self.weights is None else self.weights[rows]
        names = None if self.nodes is None else [self.nodes[i] for i in order]
        return Graph.from_edges(pairs[rows], self.num_nodes, weights, nodes=names), order
