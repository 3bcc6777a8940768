"""What is special about a kind of graph: its differences, their sums and null space, x-steps, and the order of rows.

`graph_ends.py` has lists of edges, grids and chains with the ends of the graph, `free_ends.py` grids and chains with
free ends, `parts.py` arrays over several devices. A `Graph` makes its geometry once, and everything else asks that.

Arrays of an order are on the rows of `matrix(order)`: on nodes for an even order, on edges for an odd one. They lie on
nodes `[n]`, on a grid `[*shape]`, and on edges `[m]`, on a grid `[dimensions, *shape]` with zeros where there is none.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import sparse

from sparseopt.core.base.mesh import on_device
from sparseopt.core.operators.differences import Difference
from sparseopt.core.operators.maps import Identity, Stack
from sparseopt.core.operators.normal_solves import ConjugateGradient
from sparseopt.core.operators.row_tables import (
    Sums,
    check_groups,
    colour_rows,
    difference_matrix,
    require_matrix_memory,
)
from sparseopt.trend.base.ground import Ground

T = TypeVar("T")
# The x-step's inner error, as a fraction of the residual at its start.
CG_TOLERANCE = 1e-2
# Up to this many edges per node the Hessian of an interior point method is D Dᵀ at order 0.
EDGES_A_NODE = 2


class Geometry:
    """One interface for all kinds; every table is built when it is first needed, and kept."""

    kind: str
    num_nodes: int
    edges: Any  # `[m, 2]`; on a grid axis by axis in row-major order
    weights: Any  # positive `[m]`, or None for ones
    several_devices = False
    null_name = "the mean of its component everywhere"  # of a signal that no penalty sees
    line = False  # whether the nodes are numbered along a line
    wide = False  # whether float32 would lose the digits of the differences
    fills_rows = False  # whether arrays on edges are filled up by zeros
    transforms = False  # whether the x-step of nodes of one weight is diagonal under transforms

    def __getstate__(self) -> dict[str, Any]:
        """The fields without the tables, which are built again when they are needed."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    @functools.cached_property
    def tables(self) -> dict[Any, Any]:
        return {}

    def cache(self, key: Hashable, build: Callable[[], T]) -> T:
        """The result of `build`, built once per key: for tables that depend only on the geometry."""
        if key not in self.tables:
            with jax.ensure_compile_time_eval():  # a table made under jit would belong to that one program
                self.tables[key] = build()
        return self.tables[key]

    def at(self, order: int) -> "Geometry":
        """The geometry for the trend filter of an order; a ValueError if it has too few nodes for it."""
        return self

    def require_determined(self, order: int, seen: np.ndarray) -> None:
        """Raise a ValueError if the observed nodes do not determine a signal that no penalty sees."""

    def refuses_loss(self, loss: Any, order: int) -> str | None:
        """Why fits with a loss have no method here, or None."""
        return None

    # Nodes and edges.

    @property
    def node_shape(self) -> tuple[int, ...]:
        """The shape of an array on the nodes."""
        return (self.num_nodes,)

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of an array on the nodes that a caller may give: the grid's, and `[n]`."""
        return tuple(dict.fromkeys([self.node_shape, (self.num_nodes,)]))

    @property
    def or_shape(self) -> str:
        """What a message adds to the shape `[n]`."""
        return ""

    @property
    def num_edges(self) -> int:
        return len(self.edges)

    @property
    def adjacency(self) -> sparse.csr_array:
        """Booleans `[n, n]`, with each edge in one direction, as it was given."""
        return sparse.csr_array((np.ones(self.num_edges, bool), self.edges.T), shape=(self.num_nodes,) * 2)

    @functools.cached_property
    def components(self) -> np.ndarray:
        """The component number of every node, `[n]`."""
        return np.zeros(self.num_nodes, np.int32)

    @functools.cached_property
    def num_components(self) -> int:
        return int(self.components.max(initial=-1)) + 1

    @functools.cached_property
    def near_order(self) -> np.ndarray:
        """The nodes `[n]` in an order that keeps neighbours close: Cuthill and McKee, 1969, reversed."""
        from scipy.sparse import csgraph

        both = sparse.csr_array(self.adjacency + self.adjacency.T)
        return csgraph.reverse_cuthill_mckee(both, symmetric_mode=True)

    def as_edges(self) -> "Geometry":
        """The same graph with one row per edge."""
        return self

    # Differences.

    def base(self, dtype: Any) -> Any:
        raise NotImplementedError

    def difference(self, order: int, dtype: Any) -> Any:
        """`Δ^(order)` as a linear map."""
        base = self.base(dtype)
        return Difference(base, order) if order else Identity(base.node_shape)

    def unit(self, order: int) -> float:
        """The size of `Δ^(order)` over that at steps of 1, for the typical step."""
        return 1.0

    def matrix(self, order: int, from_edges: bool = False) -> sparse.csr_array:
        """`Δ^(order)` (or `Δ^(order-1) Dᵀ`) as a sparse matrix."""
        require_matrix_memory(self.edges, self.num_nodes, order)
        return difference_matrix(self.edges, self.num_nodes, self.weights, order, from_edges)

    def sums(self, order: int, from_edges: bool = False) -> Sums:
        """Row and column sums of that matrix in the layout of arrays."""
        return self.cache(("sums", order, from_edges), lambda: self._sums(order, from_edges))

    def _sums(self, order: int, from_edges: bool) -> Sums:
        raise NotImplementedError

    def doge_sums(self, block: int, from_edges: bool) -> Sums:
        """The sums from which Doge-ADMM takes its metrics."""
        return self.sums(block, from_edges)

    def groups(self, block: int, from_edges: bool = False) -> np.ndarray:
        """The group of every row of `matrix(block, from_edges)`: rows of a group share no column."""
        matrix, labels = self.matrix(block, from_edges), self._groups(block, from_edges)
        labels = colour_rows(matrix) if labels is None else labels
        check_groups(matrix, labels)
        return labels

    def _groups(self, block: int, from_edges: bool) -> np.ndarray | None:
        """The groups in closed form, if there is one."""
        return None

    def factors(self, order: int) -> list[sparse.csr_array]:
        """Sparse matrices whose product, the last factor applied first, is `Δ^(k+1)` over `unit(k + 1)`."""

        def part(factors: int) -> sparse.csr_array:
            return difference_matrix(self.edges, self.num_nodes, self.weights, factors)

        if order == 0:
            # D Dᵀ couples all edges of a node, which is expensive if there are many: then the last factor is the
            # identity.
            apart = self.num_edges > EDGES_A_NODE * self.num_nodes
            return [part(1), part(0)] if apart else [part(1)]
        return [part(1)] * (order % 2 == 0) + [part(2)] * ((order + 1) // 2)

    # Rows, as callers list them and as arrays hold them.

    def count(self, order: int) -> int:
        """The number of rows of `matrix(order)`."""
        return self.num_edges if order % 2 else self.num_nodes

    def rows(self, values: Any, order: int) -> Any:
        """Values `[rows, ...]` of the rows of `matrix(order)` in the layout of arrays, 0 where it has no row."""
        return values

    def list_rows(self, values: Any, order: int) -> Any:
        """The inverse of `rows`."""
        return values

    # Arrays on devices: one here, many in `parts.py`.

    def cut(self, mesh: Mesh) -> Any:
        """The graph cut into one part for each device; a ValueError if it has too few nodes."""
        raise NotImplementedError

    def working(self) -> contextlib.AbstractContextManager[Any]:
        """A context for programs that work on these arrays."""
        return contextlib.nullcontext()

    def put(self, values: Any, order: int = 0) -> jax.Array:
        """The result of `rows(..., order)`, or a number, on the devices."""
        return jax.device_put(values)  # `asarray` would compile a program for each shape

    def padding(self, order: int) -> float:
        """The number of entries of an array over the number without padding."""
        return 1.0

    def gather(self, values: Any, order: int) -> Any:
        """An array on the rows of an order as it is laid out on one device."""
        return values

    def fetch(self, solution: Any, native: bool) -> Any:
        """A solution as the caller gets it: unchanged, or as host arrays if JAX's current types are shorter."""
        # A third of the time of `device_get`, which matters for small fits.
        return solution if native else jax.tree.map(np.asarray, solution)

    def holds(self, dual: Any) -> bool:
        """Whether the dual of an earlier solution lies in this layout over several devices; a ValueError for others."""
        if len(found := devices_of(dual)) > 1:
            count = len(found)
            raise ValueError(f"start was found by {count} devices, and its state lies on them: give devices={count}")
        return False

    def refuses_method(self, fit: Any, method: Any) -> str | None:
        """Why a method cannot do a fit on these devices, or None."""
        return None

    def require_penalty(self, penalty: Any, channels: tuple[int, ...]) -> None:
        """Raise a ValueError for a penalty that cannot act on rows in this layout."""

    # Null space.

    def null_fit(self, values: np.ndarray, mass: np.ndarray, order: int) -> np.ndarray:
        """The best fit of least squares that no penalty sees, `[n, channels]`, on the host: the component means."""
        sums = np.stack([np.bincount(self.components, mass * column) for column in values.T], axis=1)
        return (sums / np.bincount(self.components, mass)[:, None])[self.components]

    def as_null_fit(self, asked: Any) -> np.ndarray | None:
        """The signal of a `Fit`, if it is such a fit up to rounding, with its values at missing nodes; or None.

        With the ends of the graph it is left to a method, whose differences of such a signal are exactly 0.
        """
        return None

    def inverses(self, order: int) -> int:
        """How many inverse Laplacians turn a pull into the demand, what the last factor of `Δ^(k+1)ᵀ` has to meet."""
        return (order + 1) // 2

    def only_dual(self, z: np.ndarray, order: int) -> np.ndarray | None:
        """The u of the smallest `max |u|` that meets the demand, if it has a closed form: for odd orders."""
        if order % 2 == 0:
            return None
        top = np.full((self.num_components, z.shape[1]), -np.inf)
        bottom = -top
        np.maximum.at(top, self.components, z)
        np.minimum.at(bottom, self.components, z)
        return z - ((top + bottom) / 2)[self.components]

    def flow_order(self, order: int) -> tuple[int, int]:
        """The order of the last factor, and the dimension of its null space."""
        return 0, self.num_components

    def cut_ratio(self, b: np.ndarray, demand: np.ndarray, order: int) -> float:
        """The largest `|demand(S)| / cut(S)` over the level sets S of b, at least `<demand, b> / ||D b||_1`."""
        down = np.argsort(-b, kind="stable")
        place = np.empty(b.size, np.int64)
        place[down] = np.arange(b.size)
        root = np.ones(self.num_edges) if self.weights is None else np.sqrt(self.weights)
        ends = np.sort(place[self.edges], axis=1)
        opened = np.bincount(ends[:, 0], root, b.size) - np.bincount(ends[:, 1], root, b.size)
        cuts, inside = np.cumsum(opened)[:-1], np.abs(np.cumsum(demand[down]))[:-1]
        # A set that cuts no edge is a union of components: its demand is 0, and so is its cut, up to rounding.
        proper = cuts > 0.5 * np.min(root)
        return float(np.max(inside[proper] / cuts[proper], initial=0))

    def subtract_null(self, values: np.ndarray, order: int) -> np.ndarray:
        """Columns minus their projection onto the null space."""
        return values - self.null_fit(values, np.ones(self.num_nodes), order)

    def ground(self, orders: tuple[int, ...], dtype: Any, channels: bool) -> Ground:
        """What programs see at these orders, made once; the dtype must be enabled."""

        def build() -> Ground:
            order = max(0, *orders)
            maps = tuple(self.difference(k + 1, dtype) for k in orders)
            norms = np.sqrt(self.sums(order + 1).row_squares)
            present = self.rows(np.ones(self.num_nodes, bool), 0) if self.padding(0) > 1 else None
            common = {
                "operator": maps[0] if orders == (order,) else Stack(maps),
                "highest": self.difference(order + 1, dtype),
                "row_norms": self._put_number(np.where(norms > 0, norms, 1).astype(dtype), order + 1, channels),
                "present": None if present is None else self._put_number(present, 0, channels),
                "padding": (self.padding(0), self.padding(order + 1)),
                "anchored": -1 in orders,
            }
            return on_device(self._ground(common, orders, dtype, channels))

        return self.cache(("ground", orders, np.dtype(dtype).name, channels), build)

    def _put_number(self, values: np.ndarray, order: int, channels: bool) -> jax.Array:
        """One number for each row, on the devices."""
        return self.put(values[..., None] if channels else values, order)

    def _ground(self, common: dict[str, Any], orders: tuple[int, ...], dtype: Any, channels: bool) -> Ground:
        raise NotImplementedError

    def _degrees(self, dtype: Any, channels: bool) -> jax.Array:
        found = self.sums(1).column_squares
        return self._put_number(np.where(found > 0, found, 1).astype(dtype), 0, channels)

    def _component_tables(self, dtype: Any, channels: bool) -> dict[str, Any]:
        """The fields of an `EdgeGround`."""
        labels = self.put(self.rows(self.components.astype(np.int32), 0)) if self.num_components > 1 else None
        return {"degrees": self._degrees(dtype, channels), "labels": labels, "components": self.num_components}

    # The x-step.

    def exact_step(self, weighted: bool) -> bool:
        """Whether the x-step over the whole graph has an exact solve, or a nearly exact one."""
        return False

    def one_metric(self, channels: bool) -> bool:
        """Whether exact x-steps with another loss need one metric for all nodes."""
        return self.transforms

    def x_step(self, orders: tuple[int, ...], columns: np.ndarray, weighted: bool, channels: bool, dtype: Any) -> Any:
        """The solve of `(W + rho Δᵀ C Δ) x` for differences of these orders, with C a number, or one per column."""
        if columns.ndim:
            matrix = self.matrix(orders[0])
            diagonal = np.asarray(matrix.multiply(matrix).T @ columns).reshape(self.node_shape)
        else:
            squares = [self.sums(order).column_squares.reshape(self.node_shape) for order in orders]
            diagonal = columns * np.sum(squares, axis=0)
        diagonal = diagonal[..., None] if channels else diagonal
        return ConjugateGradient(diagonal.astype(dtype), jnp.asarray(CG_TOLERANCE, dtype))

    # Pieces.

    def between(self, values: np.ndarray) -> np.ndarray:
        """Whether the ends of an edge have different values, in the layout of D's rows; values are `[n, channels]`."""
        raise NotImplementedError

    def labels(self, joined: np.ndarray) -> np.ndarray:
        """The component of every node in the graph of the joined edges, `[n]`, numbered by their first nodes.

        `joined` is in the layout of D's rows, with any entry off the edges.
        """
        raise NotImplementedError

    def refuses_count(self) -> str | None:
        """Why degrees of freedom cannot be counted, or None."""
        return None

    def freedom(self, nonzero: np.ndarray, order: int, observed: np.ndarray | None) -> int:
        """The degrees of freedom of one channel, at order 0 without the pieces in which nothing is observed."""
        if order % 2:
            counts = np.bincount(self.components, nonzero.reshape(-1), self.num_components)
            return int(np.maximum(counts, 1).sum())
        seen = observed if order == 0 else None
        if seen is None and self.num_edges == self.num_nodes - self.num_components:
            # A forest: each edge joins two pieces.
            return self.num_components + int(self.list_rows(nonzero, order + 1).sum())
        labels = self.labels(~nonzero)
        return int(labels.max()) + 1 if seen is None else np.unique(labels[seen]).size

    def knots(self, changed: np.ndarray, order: int) -> np.ndarray:
        """The nodes of a chain at which a new polynomial begins, from the rows of order k + 1 >= 2 that are not 0."""
        raise ValueError(
            f"knots are ordered along a chain, and {self!r} is not a chain: at order 0 `pieces()` gives its pieces"
        )


def devices_of(array: Any) -> set[jax.Device]:
    """The devices on which an array of JAX lies."""
    return array.sharding.device_set if isinstance(array, jax.Array) else set()
