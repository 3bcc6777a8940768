"""D of a grid that is cut into slabs along one axis, one slab per device.

All slabs have one size: the last ones are filled up by rows of padding, which carry no edges and stay 0. Every number
is computed by the same operations as on one device. A slab is computed as if it were alone, then its border rows are
overwritten: the exchange can overlap with the computation, and XLA for CPUs (jaxlib 0.10.2) makes faster loops of it
than of a stencil that checks for every node whether it is on a border.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool

from sparseopt.core.base.mesh import AXIS
from sparseopt.core.base.types import FloatArray, pytree, static
from sparseopt.core.operators.differences import GridBase


@pytree
class SlabBase:
    """D of a grid over several devices; nodes `[*padded]`, edges `[dimensions, *padded]`, cut along one of its axes.

    As `GridBase`, except for the padded rows. Those, and rows of the cut axis without an edge, are 0 in its inputs and
    outputs.
    """

    shape: tuple[int, ...] = static()  # of the grid
    axis: int = static()  # the axis that is cut
    mesh: Mesh = static()  # of one axis, the devices in the order of the slabs
    spacing: tuple[float, ...] | None = static(default=None)  # as in `GridBase`

    @property
    def rows(self) -> int:
        return -(-self.shape[self.axis] // self.mesh.size)

    @property
    def node_shape(self) -> tuple[int, ...]:
        return tuple(self.rows * self.mesh.size if i == self.axis else n for i, n in enumerate(self.shape))

    @property
    def edge_shape(self) -> tuple[int, ...]:
        return (len(self.shape), *self.node_shape)

    def difference(self, x: FloatArray) -> FloatArray:
        return self._apart(GridBase.difference, 0, 1)(x)

    def divergence(self, e: FloatArray) -> FloatArray:
        return self._apart(GridBase.divergence, 1, 0)(e)

    def laplacian(self, x: FloatArray) -> FloatArray:
        return self._apart(GridBase.laplacian, 0, 0)(x)

    def cut_axis(self, on_edges: int) -> int:
        """The axis along which an array on the nodes (0) or the edges (1) is cut."""
        return self.axis + on_edges

    def padding(self, on_edges: int) -> float:
        """The number of entries of an array over the number without padding."""
        return self.node_shape[self.axis] / self.shape[self.axis]

    def pad(self, values: np.ndarray, on_edges: int, fill: Any) -> np.ndarray:
        """Values in the layout of `GridBase` in that of all slabs, with `fill` in padded places."""
        axis = self.cut_axis(on_edges)
        rows = self.node_shape[self.axis] - values.shape[axis]
        if rows == 0:
            return values
        more = np.full([rows if i == axis else n for i, n in enumerate(values.shape)], fill, values.dtype)
        return np.concatenate([values, more], axis=axis)

    def gather(self, values: np.ndarray, on_edges: int) -> np.ndarray:
        """The inverse of `pad`."""
        return np.take(values, range(self.shape[self.axis]), axis=self.cut_axis(on_edges))

    def _apart(self, product: Callable[..., Any], given: int, found: int) -> Callable[..., Any]:
        """A product of `GridBase` over all slabs, of arrays on the nodes (0) or the edges (1) to such arrays."""
        grid, size, pads = GridBase(self.shape, self.spacing), self.shape[self.axis], self.padding(0) > 1
        along, across = self.cut_axis(given), self.cut_axis(found)

        def local(x: FloatArray) -> FloatArray:
            first_row = jax.lax.axis_index(AXIS) * self.rows

            def exists(x: FloatArray, axis: int) -> Bool[Array, "..."]:
                return first_row + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < size

            if pads and not given:
                end = jnp.clip(size - 1 - first_row, 0, self.rows - 1)
                x = jnp.where(exists(x, along), x, jax.lax.dynamic_slice_in_dim(x, end, 1, along))
            first, last = _part(x, 0, 1, along), _part(x, -1, None, along)
            # Only what the product reads is exchanged. Beyond the ends a node repeats the last one and an edge is 0.
            before, after = first, last
            if given:
                before = jnp.zeros_like(first).at[self.axis].set(self._sent(last[self.axis], 1))
            elif not found:
                before = jnp.where(first_row > 0, self._sent(last, 1), first)
            if not given:
                after = jnp.where(first_row + self.rows < size, self._sent(first, -1), last)
            two = min(2, self.rows)
            top = product(grid, jnp.concatenate([before, _part(x, 0, two, along), after], along))
            bottom = product(grid, jnp.concatenate([before, _part(x, -two, None, along), after], along))
            image, update = product(grid, x), jax.lax.dynamic_update_slice_in_dim
            image = update(image, _part(top, 1, 2, across), 0, across)
            image = update(image, _part(bottom, -2, -1, across), self.rows - 1, across)
            return jnp.where(exists(image, across), image, 0) if pads and not given else image

        specs = [PartitionSpec(*[None] * axis, AXIS) for axis in (along, across)]
        return jax.shard_map(local, mesh=self.mesh, in_specs=specs[0], out_specs=specs[1])

    def _sent(self, row: FloatArray, step: int) -> FloatArray:
        """The row that the slab `step` places before sends; zeros where there is none."""
        slabs = range(self.mesh.size)
        return jax.lax.ppermute(row, AXIS, [(i, i + step) for i in slabs if i + step in slabs])


def _part(x: FloatArray, start: int, stop: int | None, axis: int) -> FloatArray:
    return jax.lax.slice_in_dim(x, start, stop, axis=axis)
