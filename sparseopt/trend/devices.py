"""Floor 5: a graph over several devices, in whose layout the trend filter's solver works as on one.

A grid is cut into slabs along its longest axis, any other graph into parts of near nodes. All of an iteration of
Doge-ADMM but its products with Ψ and Ψᵀ, Ψ = Δ^(k+1), stays within a device. Each of the k + 1 factors of a product
is one `Exchange` with the neighbours. A check takes two products more, and sums of single numbers over all devices.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparseopt.core.grouping import Sums
from sparseopt.core.mesh import Exchange, over, put, whole
from sparseopt.core.parts import Cut, cut_graph, part_base
from sparseopt.core.penalties import L1
from sparseopt.core.problem import Solution
from sparseopt.core.slabs import SlabBase
from sparseopt.trend.graph import Graph
from sparseopt.trend.options import Options

# What the sums of Ψ count a padded row or column with: next to nothing in a mean, and still a divisor.
PADDING = 2.0**-40


@dataclasses.dataclass(frozen=True, eq=False)
class GraphOver(Graph):
    """A graph whose arrays lie over a mesh; make one with `over_devices`.

    Attributes:
        mesh: the devices.
        given: the graph as it was given.
    """

    mesh: Mesh = dataclasses.field(kw_only=True)
    given: Graph = dataclasses.field(kw_only=True)

    @property
    def components(self) -> np.ndarray:
        """The component number of every node, `[n]`."""
        return self.given.components

    @functools.cached_property
    def axis(self) -> int:
        """The axis of a grid that is cut: the longest."""
        assert self.shape is not None
        return int(np.argmax(self.shape))

    @functools.cached_property
    def cut(self) -> Cut:
        """Any other graph, cut."""
        return cut_graph(self.edges, self.given.near_order, self.mesh.size)

    def base(self, dtype: Any) -> Any:
        """D, Dᵀ and L for arrays of a dtype."""
        if self.shape is not None:
            return SlabBase(self.shape, self.axis, self.mesh)
        build = functools.partial(part_base, self.cut, self.weights, dtype, self.mesh)
        return self.cached(("base", np.dtype(dtype).name), build)

    def row_layout(self, values: np.ndarray, order: int, fill: Any = 0.0) -> np.ndarray:
        """As that of `Graph`, padded with `fill`."""
        return self._padded(self.given.row_layout(values, order), order, fill)

    def _padded(self, values: np.ndarray, order: int, fill: Any) -> np.ndarray:
        """Values as one device has them in the layout over all, with what is to stand in padded places."""
        on_edges = order % 2
        if self.shape is None:
            place, most = (self.cut.edges, self.cut.part_edges) if on_edges else (self.cut.nodes, self.cut.part_nodes)
            padded = np.empty((self.mesh.size * most, *values.shape[1:]), values.dtype)
            padded[:] = fill
            padded[place] = values
            return padded
        axis = self.axis + on_edges
        rows = -values.shape[axis] % self.mesh.size
        if rows == 0:
            return values
        more = np.empty([rows if i == axis else n for i, n in enumerate(values.shape)], values.dtype)
        more[...] = fill
        return np.concatenate([values, more], axis=axis)

    def sums(self, order: int, from_edges: bool = False) -> Sums:
        """As those of `Graph`, padded with next to nothing."""

        def build() -> Sums:
            plain = self.given.sums(order, from_edges)
            columns = int(from_edges)
            along = {field.name: columns if "column" in field.name else order - columns for field in _SUMS}
            return Sums(**{name: self._padded(getattr(plain, name), of, PADDING) for name, of in along.items()})

        return self.cached(("sums", order, from_edges), build)

    def place(self, values: Any, order: int = 0) -> jax.Array:
        """Over the devices: what `row_layout(..., order)` gives; a number on all of them."""
        values = np.asarray(values)
        cut = None if values.ndim == 0 else 0 if self.shape is None else self.axis + order % 2
        return put(values, over(self.mesh, cut))

    def taken_up(self, start: Solution | None, order: int) -> Solution | None:
        """An earlier solution with its dual in the layout over these devices, if it has one device's.

        Raises:
            ValueError: if its dual lies over other devices.
        """
        dual = None if start is None else getattr(start.state, "candidate", None)
        if start is None or dual is None or (found := _devices_of(dual)) == set(self.mesh.devices.flat):
            return start
        if len(found) > 1:
            raise _elsewhere(found)
        dual, count = np.asarray(dual), self.num_nodes if order % 2 else self.num_edges
        rows = self.given.row_layout(np.zeros(count), order + 1)
        if dual.shape[: rows.ndim] != rows.shape:
            return start  # what reads it refuses it
        placed = self.place(self._padded(dual, order + 1, 0.0), order + 1)
        state = dataclasses.replace(start.state, candidate=placed, rho=np.asarray(start.state.rho))
        return dataclasses.replace(start, state=state)

    def padding(self, order: int) -> float:
        """How many entries an array in the layout of `row_layout` has for each that it has on one device."""
        if self.shape is not None:
            rows = self.shape[self.axis]
            return (rows + -rows % self.mesh.size) / rows
        most, count = (self.cut.part_edges, self.num_edges) if order % 2 else (self.cut.part_nodes, self.num_nodes)
        return self.mesh.size * most / count

    def shaped(self, values: Any, shape: tuple[int, ...]) -> np.ndarray:
        """An array on the nodes as `base` has them, on the host in the shape of the caller's signal."""
        found = whole(values)
        if self.shape is None:
            return found[self.cut.nodes].reshape(shape)
        return np.take(found, range(self.shape[self.axis]), axis=self.axis).reshape(shape)


_SUMS = dataclasses.fields(Sums)


def over_devices(graph: Graph, mesh: Mesh) -> GraphOver:
    """The graph over a mesh, kept for the next call.

    Raises:
        ValueError: if it cannot be cut into as many parts as there are devices.
    """
    if graph.shape is not None and max(graph.shape) < mesh.size:
        raise ValueError(
            f"a grid is cut along its longest axis, and that of {graph.shape} has {max(graph.shape)} nodes for "
            f"{mesh.size} devices: take no more devices than that"
        )
    if graph.num_nodes < mesh.size:
        raise ValueError(
            f"{graph.num_nodes} nodes are too few for {mesh.size} devices: take no more devices than nodes"
        )

    def build() -> GraphOver:
        fields = (graph.num_nodes, graph.given_edges, graph.weights, graph.shape, graph.nodes)
        return GraphOver(*fields, mesh=mesh, given=graph)

    return graph.cached(("over", mesh), build)


def require_doge(options: Options, order: int, loss: Any, several: bool) -> None:
    """See that a fit is one that several devices can do.

    Raises:
        ValueError: if not.
    """
    instead = "leave out devices, or "
    if several:
        raise ValueError(f"several devices fit one penalty, given penalties of several orders: {instead}give one")
    if loss is not None:
        raise ValueError(f"several devices fit the square loss, given {loss}: {instead}leave out loss")
    if options.method not in ("auto", "doge"):
        raise ValueError(
            f'several devices work by method="doge", given method={options.method!r}: {instead}take "doge" or "auto"'
        )
    if options.block != order + 1:
        raise ValueError(
            f"several devices take B = order + 1 = {order + 1}, which needs no solve over the whole graph, given "
            f"B={options.block}: {instead}leave out B"
        )


def require_local(penalty: Any, channels: tuple[int, ...]) -> None:
    """See that a penalty acts on every row alone, and that rows of padding cost nothing and stay 0.

    Raises:
        ValueError: if not.
    """
    numbers = dataclasses.replace(penalty, weight=0.0) if isinstance(penalty, L1) else penalty
    for leaf in jax.tree.leaves(numbers):
        if np.ndim(leaf) and np.shape(leaf) != channels:
            raise ValueError(
                "over several devices a penalty's parameters are numbers, and the weight of L1 may be one a row; given "
                f"the shape {np.shape(leaf)} in {type(penalty).__name__}: leave out devices, or take L1"
            )
    zero = jnp.zeros((2, *channels), jnp.float32)
    if numbers.value(zero) != 0 or np.any(numbers.prox(zero, 1.0) != 0):
        raise ValueError(
            f"over several devices a penalty costs nothing at 0 and leaves 0 as it is, unlike {penalty}: leave out "
            "devices"
        )


def require_at_hand(start: Solution | None) -> None:
    """See that one device can go on from an earlier solution.

    Raises:
        ValueError: if its state lies over several.
    """
    found = _devices_of(getattr(start.state, "candidate", None)) if start is not None else set()
    if len(found) > 1:
        raise _elsewhere(found)


def _elsewhere(found: set[jax.Device]) -> ValueError:
    return ValueError(
        f"warm_start was found by {len(found)} devices, and its state lies on them: give devices={len(found)}"
    )


def _devices_of(array: Any) -> set[jax.Device]:
    return array.sharding.device_set if isinstance(array, jax.Array) else set()


def fetched(solution: Solution) -> Solution:
    """A solution with all but its state on the host."""
    state = solution.state
    return dataclasses.replace(jax.tree.map(_fetched, dataclasses.replace(solution, state=None)), state=state)


def _fetched(leaf: Any) -> Any:
    return whole(leaf) if isinstance(leaf, jax.Array) else leaf


def step_exchange(
    graph: Graph, mesh: Mesh, order: int, cadence: int = 10, channels: int = 1, dtype: Any = np.float64
) -> Exchange:
    """What a device sends in `cadence` iterations of Doge-ADMM and the check after them, one with two neighbours.

    Each makes one product with Ψ and one with Ψᵀ, of `order + 1` factors each: `2 (order + 1) (cadence + 1)` times what
    `base.exchange` says of one factor.

    Args:
        graph: the graph.
        mesh: the devices.
        order: k.
        cadence: the iterations.
        channels: of the signal.
        dtype: of the computation.
    """
    one = over_devices(graph, mesh).base(dtype).exchange(channels, np.dtype(dtype).itemsize)
    return one.repeated(2 * (order + 1) * (cadence + 1))
