"""The layout of arrays on the nodes, edges and rows of a graph: on one device, or over several.

Over several devices a grid is cut into slabs along its longest axis, any other graph into parts of near nodes. In an
iteration of Doge-ADMM only the products with Ψ and Ψᵀ, Ψ = Δ^(k+1), exchange data: once with the neighbours for each of
their k + 1 factors. A check needs two more products, and sums of single numbers over all devices.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparseopt.core.base.mesh import at_work, over, put, whole
from sparseopt.core.operators.differences import Difference
from sparseopt.core.operators.maps import Identity
from sparseopt.core.operators.normal_solves import cosine_solve, free_solve
from sparseopt.core.operators.parts import Cut, SlabBase, cut_graph
from sparseopt.core.operators.row_tables import Sums, edge_grid, edge_rows, grid_edges
from sparseopt.core.penalties.entries import L1
from sparseopt.trend.base.graph import Graph

T = TypeVar("T")
# The sums of Ψ at a padded row or column: negligible in a mean, but a valid divisor.
PADDING = 2.0**-40


class Layout:
    """Arrays on one device: nodes `[*shape]` of a grid and `[n]` else, edges `[dimensions, *shape]` and `[m]`.

    Arrays of an order are on the rows of `graph.matrix(order)`: on nodes for an even order, on edges for an odd one.
    """

    several_devices = False
    mesh: Mesh | None = None

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def working(self) -> contextlib.AbstractContextManager[Any]:
        """A context for programs that work on these arrays."""
        return contextlib.nullcontext()

    def refuses(self, job: Any, method: Any) -> str | None:
        """Why a method cannot fit a job in this layout, or None."""
        return None

    def require_penalty(self, penalty: Any, channels: tuple[int, ...]) -> None:
        """Raise a ValueError for a penalty that cannot act on rows in this layout."""

    def transform(self, order: int, dtype: Any) -> Any:
        """The transform that makes a grid's Laplacian diagonal, with free ends `ΔᵀΔ`; None for other graphs.

        None also for a chain with free ends, whose bands are solved.
        """
        graph = self.graph
        return None if graph.shape is None else cosine_solve(graph.shape, (1,), dtype, graph.spacing)

    def cache(self, key: tuple[Any, ...], build: Callable[[], T]) -> T:
        key = (*key, self.mesh)
        found = self.graph.tables.get(key)
        return self.graph.cache(key, build) if found is None else found

    def base(self, dtype: Any) -> Any:
        return self.graph.base(dtype)

    def difference(self, order: int, dtype: Any) -> Any:
        """`Δ^(order)` as a linear map."""
        base = self.base(dtype)
        return Difference(base, order) if order else Identity(base.node_shape)

    def sums(self, order: int, from_edges: bool = False) -> Sums:
        return self.graph.sums(order, from_edges)

    def count(self, order: int) -> int:
        """The number of rows without padding."""
        return self.graph.num_edges if order % 2 else self.graph.num_nodes

    def rows(self, values: Any, order: int) -> Any:
        """Values `[rows, ...]` of the rows of `graph.matrix(order)` in this layout, 0 where it has no row."""
        graph = self.graph
        if order % 2 and graph.shape is not None and graph.given_edges is not None:
            values = values[self._grid_order]
        return self.grid_rows(values, order)

    def grid_rows(self, values: Any, order: int) -> Any:
        """As `rows` on one device, for values in the order of `graph.row_edges`."""
        graph = self.graph
        if order % 2 == 0:
            return values.reshape(*graph.node_shape, *values.shape[1:])
        return values if graph.shape is None else edge_grid(values, graph.shape, 0.0)

    def list_rows(self, values: Any, order: int) -> Any:
        """The inverse of `rows` on one device: an array on the rows of an order as `[rows, ...]`, without padding."""
        graph = self.graph
        if order % 2 == 0:
            return values.reshape(graph.num_nodes, *values.shape[len(graph.node_shape) :])
        if graph.shape is None:
            return values
        found = edge_rows(values, graph.shape)
        return found if graph.given_edges is None else found[np.argsort(self._grid_order)]

    def list_dual(self, dual: Any, order: int) -> Any:
        """As `list_rows` for a dual, with the signs of the given edges."""
        return self._turn(self.list_rows(dual, order), order)

    def lay_out_dual(self, dual: Any, order: int) -> Any:
        """The inverse of `list_dual`."""
        return self.rows(self._turn(dual, order), order)

    def _turn(self, dual: Any, order: int) -> Any:
        """Convert a dual `[rows, ...]` from the given edges to the grid that they form, or back."""
        graph = self.graph
        if order % 2 == 0 or not graph.turned:
            return dual
        signs = np.where(np.diff(graph.edges) < 0, -1, 1).astype(dual.dtype)
        return dual * signs.reshape(-1, *(1 for _ in dual.shape[1:]))

    @functools.cached_property
    def _grid_order(self) -> np.ndarray:
        """For each of the grid's edges its number among the given ones."""

        def sorting(edges: np.ndarray) -> np.ndarray:
            return np.argsort(np.sort(edges, axis=1) @ [self.graph.num_nodes, 1])

        assert self.graph.shape is not None
        place = np.empty(self.graph.num_edges, np.int64)
        place[sorting(grid_edges(self.graph.shape))] = sorting(self.graph.edges)
        return place

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
        """A solution as the caller gets it: unchanged, or as host arrays if JAX's current types are shorter.

        On several devices all but its state and its dual are host arrays.
        """
        # A third of the time of `device_get`, which matters for small fits.
        return solution if native else jax.tree.map(np.asarray, solution)

    def holds(self, dual: Any) -> bool:
        """Whether the dual of an earlier solution lies in this layout over several devices; a ValueError for others."""
        if len(found := _devices_of(dual)) > 1:
            count = len(found)
            raise ValueError(f"start was found by {count} devices, and its state lies on them: give devices={count}")
        return False


class FreeLayout(Layout):
    """Arrays of a chain or a grid with free ends on one device: nodes `[*node_shape]`, differences `[rows]`."""

    def difference(self, order: int, dtype: Any) -> Any:
        return self.graph.free_difference(order, dtype) if order else super().difference(order, dtype)

    def transform(self, order: int, dtype: Any) -> Any:
        graph = self.graph
        return None if graph.is_chain else free_solve(graph.node_shape, (order,), dtype, graph.spacing)

    def count(self, order: int) -> int:
        return math.prod(self.difference(order, np.float64).out_shape)

    def grid_rows(self, values: Any, order: int) -> Any:
        return values if order else super().grid_rows(values, order)

    def list_rows(self, values: Any, order: int) -> Any:
        return values if order else super().list_rows(values, order)


class LayoutOver(Layout):
    """Arrays over the devices of a mesh of one axis, in equal parts, filled up by padding."""

    several_devices = True
    mesh: Mesh

    def __init__(self, graph: Graph, mesh: Mesh) -> None:
        if graph.shape is not None and max(graph.shape) < mesh.size:
            raise ValueError(
                f"a grid is cut along its longest axis, and the one of {graph.shape} has {max(graph.shape)} nodes for "
                f"{mesh.size} devices: use no more devices than that"
            )
        if graph.num_nodes < mesh.size:
            raise ValueError(
                f"{graph.num_nodes} nodes are too few for {mesh.size} devices: use no more devices than nodes"
            )
        super().__init__(graph)
        self.mesh = mesh

    def working(self) -> contextlib.AbstractContextManager[Any]:
        return at_work(self.mesh)

    def refuses(self, job: Any, method: Any) -> str | None:
        if not method.over_devices:
            return (
                f'several devices work with method="doge", given method="{method.name}": leave out devices, or use '
                '"doge" or "auto"'
            )
        if job.several:
            return "several devices fit one penalty, given penalties of several orders: leave out devices, or give one"
        if not job.square:
            return f"several devices fit the square loss, given {job.loss}: leave out devices, or leave out loss"
        if method.B not in (None, job.order + 1):
            return (
                f"several devices need B = order + 1 = {job.order + 1}, which needs no solve over the whole graph, "
                f"given B={method.B}: leave out devices, or leave out B"
            )
        return None

    def require_penalty(self, penalty: Any, channels: tuple[int, ...]) -> None:
        """Every row is penalised separately, and rows of padding cost nothing and stay 0."""
        numbers = dataclasses.replace(penalty, weight=0.0) if isinstance(penalty, L1) else penalty
        for leaf in jax.tree.leaves(numbers):
            if np.ndim(leaf) and np.shape(leaf) != channels:
                raise ValueError(
                    "over several devices a penalty's parameters are numbers, and the weight of L1 may be one per row; "
                    f"given the shape {np.shape(leaf)} in {type(penalty).__name__}: leave out devices, or use L1"
                )
        zero = jnp.zeros((2, *channels), jnp.float32)
        if numbers.value(zero) != 0 or np.any(numbers.prox(zero, 1.0) != 0):
            raise ValueError(
                f"over several devices a penalty costs nothing at 0 and keeps 0 unchanged, unlike {penalty}: leave out "
                "devices"
            )

    def transform(self, order: int, dtype: Any) -> Any:
        return None

    @functools.cached_property
    def parts(self) -> SlabBase | Cut:
        graph = self.graph
        if graph.shape is None:
            return cut_graph(graph.edges, graph.near_order, self.mesh.size)
        return SlabBase(graph.shape, int(np.argmax(graph.shape)), self.mesh, graph.spacing)

    def base(self, dtype: Any) -> Any:
        build = functools.partial(self.parts.base, self.graph.weights, dtype, self.mesh)
        return self.cache(("base", np.dtype(dtype).name), build)

    def rows(self, values: np.ndarray, order: int) -> np.ndarray:
        return self.pad(super().rows(values, order), order)

    def pad(self, values: np.ndarray, order: int, fill: Any = 0.0) -> np.ndarray:
        """Convert values from the layout of one device to the layout over all, with `fill` in padded places."""
        return self.parts.pad(values, order % 2, fill)

    def sums(self, order: int, from_edges: bool = False) -> Sums:
        def build() -> Sums:
            plain, columns = self.graph.sums(order, from_edges), int(from_edges)
            along = {"row": order - columns, "column": columns}
            names = [field.name for field in dataclasses.fields(Sums)]
            return Sums(*(self.pad(getattr(plain, name), along[name.split("_")[0]], PADDING) for name in names))

        return self.cache(("sums", order, from_edges), build)

    def put(self, values: Any, order: int = 0) -> jax.Array:
        values = np.asarray(values)
        return put(values, over(self.mesh, self.parts.cut_axis(order % 2) if values.ndim else None))

    def padding(self, order: int) -> float:
        return self.parts.padding(order % 2)

    def gather(self, values: Any, order: int) -> np.ndarray:
        return self.parts.gather(whole(values), order % 2)

    def fetch(self, solution: Any, native: bool) -> Any:
        kept = dataclasses.replace(solution, state=None, dual=None)
        here = jax.tree.map(lambda leaf: whole(leaf) if isinstance(leaf, jax.Array) else leaf, kept)
        return dataclasses.replace(here, state=solution.state, dual=solution.dual)

    def holds(self, dual: Any) -> bool:
        return _devices_of(dual) == set(self.mesh.devices.flat) or super().holds(dual)


def layout_of(graph: Graph, mesh: Mesh | None = None) -> Layout:
    """The layout of a graph's arrays on one device, or over a mesh; made once per graph."""
    if graph.free and mesh is not None:
        raise ValueError('several devices need the ends of the graph: leave out devices, or use ends="graph"')
    found = graph.tables.get(("layout", mesh))
    if found is None:
        alone = FreeLayout if graph.free else Layout
        found = graph.tables["layout", mesh] = alone(graph) if mesh is None else LayoutOver(graph, mesh)
    return found


def _devices_of(array: Any) -> set[jax.Device]:
    return array.sharding.device_set if isinstance(array, jax.Array) else set()
