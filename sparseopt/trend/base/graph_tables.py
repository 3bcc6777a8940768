"""What is known about a graph: edges, degrees, components, and the matrices of its differences with their sums."""

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
import numpy as np
from scipy import sparse

from sparseopt.core.base.arguments import require_memory
from sparseopt.core.operators.differences import EdgeBase, GridBase, edge_base
from sparseopt.core.operators.divided_differences import (
    DividedDifference,
    axis_differences,
    divided_difference,
    polynomial_basis,
)
from sparseopt.core.operators.maps import Stack
from sparseopt.core.operators.row_tables import (
    Sums,
    check_groups,
    colour_rows,
    difference_matrix,
    edge_sums,
    grid_edges,
    grid_groups,
    grid_sums,
    grid_weights,
    matrix_sums,
    require_matrix_memory,
)

T = TypeVar("T")


class Tables:
    """The tables of a `Graph`, each built when it is first needed."""

    num_nodes: int
    given_edges: np.ndarray | None
    given_weights: np.ndarray | None
    shape: tuple[int, ...] | None
    times: np.ndarray | None
    free: bool
    spacing: tuple[float, ...] | None

    @functools.cached_property
    def step(self) -> float:
        """The median step between times, or with free ends the smallest spacing of a grid; 1 without them."""
        if self.free and self.spacing is not None:
            return min(self.spacing)
        return 1.0 if self.times is None else float(np.median(np.diff(self.times)))

    def unit(self, order: int) -> float:
        """The size of `Δ^(order)` with free ends over that at steps of 1, for the typical step."""
        return self.step ** (int(self.is_chain) - order)

    @functools.cached_property
    def is_chain(self) -> bool:
        """Whether it is a chain whose nodes are numbered along it."""
        return self.shape is not None and len(self.shape) == 1

    def free_difference(self, order: int, dtype: Any) -> DividedDifference | Stack:
        """`Δ^(order)` with free ends as a linear map, of an order of at least 1."""
        if self.is_chain:
            return divided_difference(self.times, self.num_nodes, order, dtype)
        return axis_differences(self.node_shape, order, self.spacing)

    def polynomials(self, order: int) -> np.ndarray:
        """Orthonormal columns `[n, count]` that span the signals that a trend filter of free ends does not penalise."""

        def build() -> np.ndarray:
            counts = [min(n, order + 1) for n in self.node_shape]
            count = math.prod(counts)
            what = f"the {count:,} products of polynomials that order {order} with free ends does not penalise"
            require_memory(8 * count * self.num_nodes, what, 'lower the order, or use ends="graph"')
            along = [polynomial_basis(self.times, *sizes) for sizes in zip(self.node_shape, counts, strict=True)]
            return functools.reduce(np.kron, along)

        return self.cache(("polynomials", order), build)

    @functools.cached_property
    def node_shape(self) -> tuple[int, ...]:
        """The shape of an array on the nodes: the grid's, else `[n]`."""
        return self.shape or (self.num_nodes,)

    @functools.cached_property
    def array_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of an array on the nodes that a caller may give: the grid's, and `[n]`."""
        return tuple(dict.fromkeys([self.node_shape, (self.num_nodes,)]))

    @functools.cached_property
    def num_edges(self) -> int:
        if self.given_edges is not None:
            return len(self.given_edges)
        return sum(self.num_nodes // n * (n - 1) for n in self.node_shape)

    @functools.cached_property
    def edges(self) -> np.ndarray:
        """The edges `[m, 2]` in the given order; for a grid axis by axis in row-major order."""
        return grid_edges(self.node_shape) if self.given_edges is None else self.given_edges

    @functools.cached_property
    def weights(self) -> np.ndarray | None:
        """Positive `[m]`, or None for ones.

        An edge of weight w has the row `sqrt(w) (x_i - x_j)` in D, so that `DᵀD` is the weighted Laplacian.
        """
        return grid_weights(self.node_shape, self.spacing) if self.spacing else self.given_weights

    @functools.cached_property
    def turned(self) -> bool:
        """Whether edges in which a grid was recognised point the other way than its rows do."""
        return self.given_edges is not None and self.shape is not None and bool(np.any(np.diff(self.given_edges) < 0))

    @functools.cached_property
    def row_edges(self) -> np.ndarray:
        """The edges in the order of the rows of `base`: on a grid as in `grid_edges`, even if edges were given."""
        return self.edges if self.shape is None else grid_edges(self.shape)

    @property
    def adjacency(self) -> sparse.csr_array:
        """Booleans `[n, n]`, with each edge in one direction, as it was given."""
        return sparse.csr_array((np.ones(self.num_edges, bool), self.edges.T), shape=(self.num_nodes,) * 2)

    @functools.cached_property
    def components(self) -> np.ndarray:
        """The component number of every node, `[n]`."""
        if self.shape is not None:
            return np.zeros(self.num_nodes, np.int32)
        from scipy.sparse import csgraph

        return csgraph.connected_components(self.adjacency, directed=False)[1]

    @functools.cached_property
    def num_components(self) -> int:
        """The number of components, isolated nodes included."""
        return int(self.components.max(initial=-1)) + 1

    @functools.cached_property
    def degrees(self) -> np.ndarray:
        """The number of edges at every node, `[n]`."""
        return np.bincount(self.edges.reshape(-1), minlength=self.num_nodes)

    @property
    def isolated(self) -> np.ndarray:
        """The nodes without an edge, whose values a trend filter leaves unchanged."""
        return np.flatnonzero(self.degrees == 0)

    @functools.cached_property
    def tables(self) -> dict[Any, Any]:
        return {}

    def cache(self, key: Hashable, build: Callable[[], T]) -> T:
        """The result of `build`, built once per key: for tables that depend only on the graph."""
        if key not in self.tables:
            with jax.ensure_compile_time_eval():  # a table made under jit would belong to that one program
                self.tables[key] = build()
        return self.tables[key]

    def base(self, dtype: Any) -> GridBase | EdgeBase:
        if self.shape is not None:
            return GridBase(self.shape, self.spacing)
        build = functools.partial(edge_base, self.edges, self.num_nodes, self.weights, dtype)
        return self.cache(("base", np.dtype(dtype).name), build)

    def matrix(self, order: int, from_edges: bool = False) -> sparse.csr_array:
        """`Δ^(order)` (or `Δ^(order-1) Dᵀ`) as a sparse matrix; its rows follow `edges` or the nodes.

        With free ends it is `D^(order)` of `chain`; on a grid, of the lines along the first axis, then along the next.

        Example:
            >>> so.Graph.from_edges([(0, 1), (1, 2)]).matrix(2).toarray().tolist()  # the Laplacian
            [[1.0, -1.0, 0.0], [-1.0, 2.0, -1.0], [0.0, -1.0, 1.0]]
        """
        if self.free and order >= max(self.node_shape):
            return sparse.csr_array((0, self.num_nodes))  # no axis has order + 1 nodes
        if self.free and order:
            return self.free_difference(order, np.float64).matrix()
        require_matrix_memory(self.edges, self.num_nodes, order)
        return difference_matrix(self.edges, self.num_nodes, self.weights, order, from_edges)

    def sums(self, order: int, from_edges: bool = False) -> Sums:
        """Row and column sums of that matrix in the layout of `base`."""

        def build() -> Sums:
            if self.shape is not None and not self.free:
                return grid_sums(self.shape, order, from_edges, self.spacing)
            if order in (1, 2) and not (from_edges or self.free):
                return edge_sums(self.edges, self.num_nodes, self.weights, order)
            return matrix_sums(self.matrix(order, from_edges), self.node_shape if self.free else (-1,))

        return self.cache(("sums", order, from_edges), build)

    @functools.cached_property
    def near_order(self) -> np.ndarray:
        """The nodes `[n]` in an order that keeps neighbours close: Cuthill and McKee, 1969, reversed."""
        from scipy.sparse import csgraph

        both = sparse.csr_array(self.adjacency + self.adjacency.T)
        return csgraph.reverse_cuthill_mckee(both, symmetric_mode=True)

    def groups(self, block: int, from_edges: bool = False) -> np.ndarray:
        """The group of every row of `matrix(block, from_edges)`: rows of a group share no column.

        In closed form on grids for D, L, D L and Dᵀ, else by `colour_rows`.

        Example:
            >>> so.Graph.chain(5).groups(1).tolist()  # edges by parity: those of one group share no node
            [0, 1, 0, 1]
        """
        matrix = self.matrix(block, from_edges)
        # The formula does not hold for the given order of edges, even if they form a grid.
        formula = self.shape if self.given_edges is None and (block == 1 or not self.free) else None
        labels = None if formula is None else grid_groups(formula, block, from_edges)
        labels = colour_rows(matrix) if labels is None else labels
        check_groups(matrix, labels)
        return labels
