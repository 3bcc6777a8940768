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
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool

from sparseopt.core.base.mesh import AXIS
from sparseopt.core.base.types import FloatArray, pytree, static
from sparseopt.core.operators.differences import ahead, ahead_transpose, by_spacing, padded, summed


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
        def local(x: FloatArray) -> FloatArray:
            last, after = self._part(x, -1, None), self._from_next(self._part(x, 0, 1))
            border = last - jnp.where(self._joined(last, self.rows - 1), after, last)
            inner = [self._along(x, 0) if i == self.axis else ahead(x, i) for i in range(len(self.shape))]
            inner = by_spacing(inner, self.spacing, 1)
            if self.spacing is not None:
                border = border * self.spacing[self.axis] ** -1
            start = [self.axis, *(self.rows - 1 if i == self.axis else 0 for i in range(x.ndim))]
            return jax.lax.dynamic_update_slice(jnp.stack(inner), border[None], start)

        return self._apart(local, 0, 1)(x)

    def divergence(self, e: FloatArray) -> FloatArray:
        def local(e: FloatArray) -> FloatArray:
            along = e[self.axis]
            first, before = self._part(along, 0, 1), self._from_previous(self._part(along, -1, None))

            def of(along: FloatArray, stop: int | None) -> FloatArray:
                return self._summed(along, lambda i: ahead_transpose(self._part(e[i], 0, stop), i), 1)

            inner = along - padded(self._part(along, 0, -1), self.axis, 1, 0)
            return self._with_row(of(inner, None), of(first - before, 1), 0)

        return self._apart(local, 1, 0)(e)

    def laplacian(self, x: FloatArray) -> FloatArray:
        def stencil(x: FloatArray, place: int) -> FloatArray:
            along = ahead_transpose(self._along(x, place), self.axis)
            return self._summed(along, lambda i: ahead_transpose(ahead(x, i), i), 2)

        def local(x: FloatArray) -> FloatArray:
            first, last = self._part(x, 0, 1), self._part(x, -1, None)
            before, after = self._from_previous(last), self._from_next(first)
            before = jnp.where(self._joined(first, -1), before, first)
            after = jnp.where(self._joined(last, self.rows - 1), after, last)
            if self.rows == 1:
                return self._part(stencil(jnp.concatenate([before, x, after], self.axis), -1), 1, 2)
            top = stencil(jnp.concatenate([before, self._part(x, 0, 2)], self.axis), -1)
            bottom = stencil(jnp.concatenate([self._part(x, -2, None), after], self.axis), self.rows - 2)
            image = self._with_row(stencil(x, 0), self._part(top, 1, 2), 0)
            return self._with_row(image, self._part(bottom, 1, 2), self.rows - 1)

        return self._apart(local, 0, 0)(x)

    def _apart(self, local: Callable[..., Any], before: int, after: int) -> Callable[..., Any]:
        """A function of one slab as a function of all; `before` and `after` count the axes that precede the grid's."""
        specs = [PartitionSpec(*[None] * (extra + self.axis), AXIS) for extra in (before, after)]
        return jax.shard_map(local, mesh=self.mesh, in_specs=specs[0], out_specs=specs[1])

    def _from_next(self, row: FloatArray) -> FloatArray:
        """The row of the next slab; zeros for the last slab."""
        return jax.lax.ppermute(row, AXIS, [(i + 1, i) for i in range(self.mesh.size - 1)])

    def _from_previous(self, row: FloatArray) -> FloatArray:
        return jax.lax.ppermute(row, AXIS, [(i, i + 1) for i in range(self.mesh.size - 1)])

    def _joined(self, x: FloatArray, place: int) -> Bool[Array, "..."]:
        """Which rows of x, the rows of the slab from `place` on, have an edge to the next row."""
        first = jax.lax.axis_index(AXIS) * self.rows + place
        index = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, self.axis)
        return (index >= 0) & (index < self.shape[self.axis] - 1)

    def _along(self, x: FloatArray, place: int) -> FloatArray:
        """`x[i] - x[i + 1]` within the rows from `place` on, 0 in the last row and where there is no edge."""
        own, after = self._part(x, 0, -1), self._part(x, 1, None)
        if self.rows * self.mesh.size > self.shape[self.axis]:
            after = jnp.where(self._joined(own, place), after, own)
        return padded(own - after, self.axis, 0, 1)

    def _summed(self, along: FloatArray, across: Callable[[int], FloatArray], power: int) -> FloatArray:
        """The sum over all axes."""
        terms = [along if i == self.axis else across(i) for i in range(len(self.shape))]
        return summed(by_spacing(terms, self.spacing, power))

    def _part(self, x: FloatArray, start: int, stop: int | None) -> FloatArray:
        return jax.lax.slice_in_dim(x, start, stop, axis=self.axis)

    def _with_row(self, x: FloatArray, row: FloatArray, place: int) -> FloatArray:
        return jax.lax.dynamic_update_slice_in_dim(x, row, place, self.axis)
