"""The geometry of a graph whose arrays lie over several devices, with the ends of the graph.

A grid is cut into slabs along its longest axis, any other graph into parts of near nodes. In an iteration of Doge-ADMM
only the products with Ψ and Ψᵀ, Ψ = Δ^(k+1), exchange data: once with the neighbours for each of their k + 1 factors. A
check needs two more products, and sums of single numbers over all devices.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparseopt.core.base.mesh import at_work, over, put, whole
from sparseopt.core.base.types import pytree
from sparseopt.core.operators.parts import Cut, SlabBase
from sparseopt.core.operators.row_tables import Sums
from sparseopt.core.penalties.entries import L1
from sparseopt.trend.base.geometry import Geometry, devices_of
from sparseopt.trend.base.ground import EdgeGround, Ground

# The sums of Ψ at a padded row or column: negligible in a mean, but a valid divisor.
PADDING = 2.0**-40


class Parts(Geometry):
    """A geometry over the devices of a mesh of one axis, in equal parts, filled up by padding."""

    several_devices = True

    def __init__(self, alone: Geometry, mesh: Mesh, parts: SlabBase | Cut) -> None:
        self.alone, self.mesh, self.parts = alone, mesh, parts
        self.kind, self.num_nodes, self.weights = alone.kind, alone.num_nodes, alone.weights
        self.line, self.fills_rows, self.null_name = alone.line, alone.fills_rows, alone.null_name

    @property
    def node_shape(self) -> tuple[int, ...]:
        return self.alone.node_shape

    @property
    def edges(self) -> np.ndarray:
        return self.alone.edges

    @property
    def num_edges(self) -> int:
        return self.alone.num_edges

    @functools.cached_property
    def components(self) -> np.ndarray:
        return self.alone.components

    def __repr__(self) -> str:
        return repr(self.alone)

    def base(self, dtype: Any) -> Any:
        name = np.dtype(dtype).name
        return self.cache(("base", name), lambda: self.parts.base(self.weights, dtype, self.mesh))

    def rows(self, values: np.ndarray, order: int) -> np.ndarray:
        return self._pad(self.alone.rows(values, order), order)

    def list_rows(self, values: Any, order: int) -> Any:
        """The inverse of `rows` of one device, after `gather`."""
        return self.alone.list_rows(values, order)

    def _pad(self, values: np.ndarray, order: int, fill: Any = 0.0) -> np.ndarray:
        """Convert values from the layout of one device to the layout over all, with `fill` in padded places."""
        return self.parts.pad(values, order % 2, fill)

    def _sums(self, order: int, from_edges: bool) -> Sums:
        return self._padded_sums(self.alone.sums(order, from_edges), order, from_edges)

    def doge_sums(self, block: int, from_edges: bool) -> Sums:
        return self._padded_sums(self.alone.doge_sums(block, from_edges), block, from_edges)

    def _padded_sums(self, sums: Sums, order: int, from_edges: bool) -> Sums:
        columns = int(from_edges)
        along = {"row": order - columns, "column": columns}
        names = [field.name for field in dataclasses.fields(Sums)]
        return Sums(*(self._pad(getattr(sums, name), along[name.split("_")[0]], PADDING) for name in names))

    def _ground(self, common: dict[str, Any], orders: tuple[int, ...], dtype: Any, channels: bool) -> Ground:
        return PartsGround(**common, **self._component_tables(dtype, channels))

    def between(self, values: np.ndarray) -> np.ndarray:
        return self.alone.between(values)

    def labels(self, joined: np.ndarray) -> np.ndarray:
        return self.alone.labels(joined)

    def working(self) -> contextlib.AbstractContextManager[Any]:
        return at_work(self.mesh)

    def put(self, values: Any, order: int = 0) -> jax.Array:
        values = np.asarray(values)
        return put(values, over(self.mesh, self.parts.cut_axis(order % 2) if values.ndim else None))

    def padding(self, order: int) -> float:
        return self.parts.padding(order % 2)

    def gather(self, values: Any, order: int) -> np.ndarray:
        return self.parts.gather(whole(values), order % 2)

    def fetch(self, solution: Any, native: bool) -> Any:
        """All but its state and its dual as host arrays."""
        kept = dataclasses.replace(solution, state=None, dual=None)
        here = jax.tree.map(lambda leaf: whole(leaf) if isinstance(leaf, jax.Array) else leaf, kept)
        return dataclasses.replace(here, state=solution.state, dual=solution.dual)

    def holds(self, dual: Any) -> bool:
        return devices_of(dual) == set(self.mesh.devices.flat) or super().holds(dual)

    def refuses_method(self, fit: Any, method: Any) -> str | None:
        if not method.over_devices:
            return (
                f'several devices work with method="doge", given method="{method.name}": leave out devices, or use '
                '"doge" or "auto"'
            )
        if fit.several:
            return "several devices fit one penalty, given penalties of several orders: leave out devices, or give one"
        if not fit.square:
            return f"several devices fit the square loss, given {fit.loss}: leave out devices, or leave out loss"
        if method.B not in (None, fit.order + 1):
            return (
                f"several devices need B = order + 1 = {fit.order + 1}, which needs no solve over the whole graph, "
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


@pytree
class PartsGround(EdgeGround):
    """A graph over several devices, whose fits of signals that only rise or fall have no gap."""

    def within(self, penalty: Any, x: Any) -> Any:
        return x


def over_devices(geometry: Geometry, mesh: Mesh | None) -> Geometry:
    """A geometry over the devices of a mesh, made once; itself without a mesh."""
    if mesh is None:
        return geometry
    if geometry.wide:
        raise ValueError('several devices need the ends of the graph: leave out devices, or use ends="graph"')
    return geometry.cache(("over", mesh), lambda: Parts(geometry, mesh, geometry.cut(mesh)))
