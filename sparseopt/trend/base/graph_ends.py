"""The geometries with the ends of the graph: a list of edges, and grids and chains, with stencils and transforms."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sparseopt.core.operators.differences import EdgeBase, GridBase, edge_base
from sparseopt.core.operators.normal_solves import cosine_solve
from sparseopt.core.operators.parts import Cut, SlabBase, cut_graph
from sparseopt.core.operators.row_tables import (
    Sums,
    edge_grid,
    edge_rows,
    edge_sums,
    grid_edges,
    grid_groups,
    grid_sums,
    grid_weights,
    matrix_sums,
)
from sparseopt.trend.base.geometry import Geometry
from sparseopt.trend.base.ground import EdgeGround, GridGround, Ground


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Edges(Geometry):
    """Any graph, as a list of edges."""

    num_nodes: int
    edges: np.ndarray
    weights: np.ndarray | None = None
    kind = "edges"

    def __repr__(self) -> str:
        return f"<Graph of {self.num_nodes:,} nodes and {self.num_edges:,} edges>"

    @functools.cached_property
    def components(self) -> np.ndarray:
        from scipy.sparse import csgraph

        return csgraph.connected_components(self.adjacency, directed=False)[1]

    def between(self, values: np.ndarray) -> np.ndarray:
        tails, heads = self.edges.T
        return values[tails] != values[heads]

    def labels(self, joined: np.ndarray) -> np.ndarray:
        return Edges(self.num_nodes, self.edges[joined]).components

    def base(self, dtype: Any) -> EdgeBase:
        build = functools.partial(edge_base, self.edges, self.num_nodes, self.weights, dtype)
        return self.cache(("base", np.dtype(dtype).name), build)

    def cut(self, mesh: Mesh) -> Cut:
        if self.num_nodes < mesh.size:
            raise ValueError(
                f"{self.num_nodes} nodes are too few for {mesh.size} devices: use no more devices than nodes"
            )
        return cut_graph(self.edges, self.near_order, mesh.size)

    def _sums(self, order: int, from_edges: bool) -> Sums:
        if order in (1, 2) and not from_edges:
            return edge_sums(self.edges, self.num_nodes, self.weights, order)
        return matrix_sums(self.matrix(order, from_edges))

    def _ground(self, common: dict[str, Any], orders: tuple[int, ...], dtype: Any, channels: bool) -> Ground:
        return EdgeGround(**common, **self._component_tables(dtype, channels))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Grid(Geometry):
    """A grid of 1 to 3 axes with the ends of the graph, of one axis a `Chain`."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...] | None = None
    kind = "grid"
    fills_rows = transforms = True

    @property
    def node_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def or_shape(self) -> str:
        return f" or {self.shape}"

    def __repr__(self) -> str:
        return f"Graph.grid({self.shape}{'' if self.spacing is None else f', spacing={self.spacing}'})"

    @functools.cached_property
    def num_nodes(self) -> int:  # type: ignore[override]
        return math.prod(self.shape)

    @functools.cached_property
    def num_edges(self) -> int:
        return sum(self.num_nodes // n * (n - 1) for n in self.shape)

    @functools.cached_property
    def edges(self) -> np.ndarray:
        return grid_edges(self.shape)

    @functools.cached_property
    def weights(self) -> np.ndarray | None:
        return grid_weights(self.shape, self.spacing) if self.spacing else None

    def as_edges(self) -> Geometry:
        return self.cache("edges", lambda: Edges(self.num_nodes, self.edges, self.weights))

    def base(self, dtype: Any) -> GridBase:
        return GridBase(self.shape, self.spacing)

    def cut(self, mesh: Mesh) -> SlabBase:
        longest = max(self.shape)
        if longest < mesh.size:
            raise ValueError(
                f"a grid is cut along its longest axis, and the one of {self.shape} has {longest} nodes for "
                f"{mesh.size} devices: use no more devices than that"
            )
        return SlabBase(self.shape, self.shape.index(longest), mesh, self.spacing)

    def _sums(self, order: int, from_edges: bool) -> Sums:
        return grid_sums(self.shape, order, from_edges, self.spacing)

    def doge_sums(self, block: int, from_edges: bool) -> Sums:
        sums = self.sums(block, from_edges)
        if self.spacing is None or block > 1 or from_edges:
            return sums
        # The lemma with exponent 2: one S for all axes, since isotropic total variation needs one at a node. For L1 the
        # steps were 0.7 to 1.9 times those of exponent 1.
        rows = np.full_like(sums.row_absolute, 2)
        return dataclasses.replace(sums, row_absolute=rows, column_absolute=sums.column_squares)

    def _groups(self, block: int, from_edges: bool) -> np.ndarray | None:
        return grid_groups(self.shape, block, from_edges)

    def rows(self, values: Any, order: int) -> Any:
        if order % 2:
            return edge_grid(values, self.shape, 0.0)
        return values.reshape(*self.shape, *values.shape[1:])

    def list_rows(self, values: Any, order: int) -> Any:
        if order % 2:
            return edge_rows(values, self.shape)
        return values.reshape(self.num_nodes, *values.shape[len(self.shape) :])

    def _transform(self, dtype: Any) -> Any:
        """The transform that makes the Laplacian diagonal."""
        build = functools.partial(cosine_solve, self.shape, (1,), dtype, self.spacing)
        return self.cache(("transform", np.dtype(dtype).name), build)

    def _ground(self, common: dict[str, Any], orders: tuple[int, ...], dtype: Any, channels: bool) -> Ground:
        return GridGround(**common, degrees=self._degrees(dtype, channels), transform=self._transform(dtype))

    def exact_step(self, weighted: bool) -> bool:
        return not weighted

    def x_step(self, orders: tuple[int, ...], columns: np.ndarray, weighted: bool, channels: bool, dtype: Any) -> Any:
        if weighted:
            return super().x_step(orders, columns, weighted, channels, dtype)
        return dataclasses.replace(self._transform(dtype), powers=orders)

    def between(self, values: np.ndarray) -> np.ndarray:
        on_grid = values.reshape(*self.shape, -1)
        found = np.zeros((len(self.shape), *on_grid.shape), bool)
        for axis, size in enumerate(self.shape):
            before = (slice(None),) * axis
            low, high = on_grid[*before, : size - 1], on_grid[*before, 1:]
            np.not_equal(low, high, out=found[axis][*before, : size - 1])
        return found

    def labels(self, joined: np.ndarray) -> np.ndarray:
        from scipy import ndimage

        # An image with a pixel for each node and each edge: its regions are found in a fraction of the time.
        shape = self.shape
        pixels = np.zeros([2 * size - 1 for size in shape], bool)
        nodes = (slice(None, None, 2),) * len(shape)
        pixels[nodes] = True
        for axis, size in enumerate(shape):
            between = tuple(slice(i == axis, None, 2) for i in range(len(shape)))
            pixels[between] = joined[axis][*(slice(None),) * axis, : size - 1]
        return ndimage.label(pixels)[0][nodes].reshape(-1) - 1


class Chain(Grid):
    """A chain with the ends of the graph."""

    kind = "chain"
    line = True

    def __repr__(self) -> str:
        return f"Graph.chain({self.num_nodes}, ends='graph')"

    def labels(self, joined: np.ndarray) -> np.ndarray:
        return np.cumsum(np.append(False, ~joined[0][:-1]))

    def knots(self, changed: np.ndarray, order: int) -> np.ndarray:
        # Row j belongs to node j, for even orders to the edge from j to j + 1. Rows that reach beyond an end say
        # nothing about a knot.
        first, shift = (order + 1) // 2, (order + 1) % 2
        inside = changed.reshape(-1)[first : max(first, self.num_nodes - first - shift)]
        return np.flatnonzero(inside) + first + shift
