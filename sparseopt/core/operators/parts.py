"""D of a graph over several devices: a grid is cut into slabs along one axis, any other graph into parts of near nodes.

All slabs have one size: the last ones are filled up by rows of padding, which carry no edges and stay 0. Every number
is computed by the same operations as on one device. A slab is computed as if it were alone, then its border rows are
overwritten: the exchange can overlap with the computation, and XLA for CPUs (jaxlib 0.10.2) makes faster loops of it
than of a stencil that checks for every node whether it is on a border.

An edge belongs to the first of the parts of its ends. If its other end lies in another part, the edge reads it from a
ghost, a copy that its owner sends: D needs the values of the ghosts, and Dᵀ sends back their sums. Everything that goes
from part p + s to part p, for all p at once, is one message.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool

from sparseopt.core.base.mesh import AXIS, over, put
from sparseopt.core.base.types import FloatArray, pytree, static
from sparseopt.core.operators.differences import EdgeBase, GridBase


@dataclasses.dataclass(frozen=True)
class Cut:
    """A graph cut into parts, as host tables."""

    parts: int  # the number of parts
    nodes: np.ndarray  # the place of every node, `[n]`, in arrays of `parts * part_nodes`
    edges: np.ndarray  # the place of every edge, `[m]`, in arrays of `parts * part_edges`
    part_nodes: int  # the largest number of nodes of a part
    part_edges: int  # the largest number of edges of a part
    tails: np.ndarray  # int32 `[parts * part_edges]`, within the part, ghosts after the nodes; padding is loops
    heads: np.ndarray  # the same for the other ends
    shifts: tuple[int, ...]  # s of every message
    pairs: tuple[tuple[tuple[int, int], ...], ...]  # for every message, which parts send to which
    # For every message, int32 `[parts * width]`, the nodes that a part sends, padded with its first node.
    sent: tuple[np.ndarray, ...]

    def cut_axis(self, on_edges: int) -> int:
        """The axis along which an array on the nodes (0) or the edges (1) is cut."""
        return 0

    def padding(self, on_edges: int) -> float:
        """The number of entries of an array over the number without padding."""
        place, most = self._places(on_edges)
        return self.parts * most / place.size

    def pad(self, values: np.ndarray, on_edges: int, fill: Any) -> np.ndarray:
        """Convert values from the layout of `EdgeBase` to the layout of all parts, with `fill` in padded places."""
        place, most = self._places(on_edges)
        found = np.full((self.parts * most, *values.shape[1:]), fill, values.dtype)
        found[place] = values
        return found

    def gather(self, values: np.ndarray, on_edges: int) -> np.ndarray:
        """The inverse of `pad`."""
        return values[self._places(on_edges)[0]]

    def base(self, weights: np.ndarray | None, dtype: Any, mesh: Mesh) -> "PartBase":
        """D for the graph's weights `[m]` or None, over a mesh with one device per part."""
        root = None if weights is None else put(self.pad(np.sqrt(weights).astype(dtype), 1, 0), over(mesh))
        tails, heads, *sent = (put(table, over(mesh)) for table in (self.tails, self.heads, *self.sent))
        local_nodes = self.part_nodes + sum(table.size for table in self.sent) // self.parts
        return PartBase(EdgeBase(tails, heads, root, local_nodes), tuple(sent), self.pairs, self.part_nodes, mesh)

    def _places(self, on_edges: int) -> tuple[np.ndarray, int]:
        return (self.edges, self.part_edges) if on_edges else (self.nodes, self.part_nodes)


def cut_graph(edges: np.ndarray, order: np.ndarray, parts: int) -> Cut:
    """Cut a graph without loops into parts of about equal work.

    Each part is a run of `order`, which lists the nodes `[n]` with neighbours close to each other.
    """
    num_nodes = order.size
    place = np.empty(num_nodes, np.int64)
    place[order] = np.arange(num_nodes)
    # The work of an edge counts in the part of its first end.
    work = 1 + np.bincount(place[edges].min(axis=1), minlength=num_nodes)
    middle = np.cumsum(work) - work / 2
    part = np.minimum(middle * parts / work.sum(), parts - 1).astype(np.int64)[place]
    ends = part[edges]
    owner = ends.min(axis=1)
    node_place, part_nodes = places_within(part, parts)
    edge_place, part_edges = places_within(owner, parts)
    local = np.where(ends == owner[:, None], node_place[edges], -1)

    crossing = np.flatnonzero(ends[:, 0] != ends[:, 1])
    far = edges[crossing, ends[crossing].argmax(axis=1)]
    ghost, of_edge = np.unique(owner[crossing] * num_nodes + far, return_inverse=True)
    reader, node = np.divmod(ghost, num_nodes)
    shift = part[node] - reader
    slots = np.empty(ghost.size, np.int64)
    pairs, sent, start = [], [], part_nodes
    shifts = tuple(int(s) for s in np.unique(shift))
    for step in shifts:
        chosen = np.flatnonzero(shift == step)
        within, width = places_within(reader[chosen], parts)
        slots[chosen] = start + within
        start += width
        table = np.zeros((parts, width), np.int32)
        table[part[node[chosen]], within] = node_place[node[chosen]]
        sent.append(table.reshape(-1))
        pairs.append(tuple((int(p) + step, int(p)) for p in np.unique(reader[chosen])))
    local[crossing] = np.where(local[crossing] < 0, slots[of_edge][:, None], local[crossing])

    places = owner * part_edges + edge_place
    tables = np.zeros((2, parts * part_edges), np.int32)
    tables[:, places] = local.T
    return Cut(
        parts,
        part * part_nodes + node_place,
        places,
        part_nodes,
        part_edges,
        tables[0],
        tables[1],
        shifts,
        tuple(pairs),
        tuple(sent),
    )


def places_within(owner: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """The place of every item among its owner's items, in the given order, and the largest number that one owns."""
    counts = np.bincount(owner, minlength=count)
    order = np.argsort(owner, kind="stable")
    place = np.empty(owner.size, np.int64)
    place[order] = np.arange(owner.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return place, int(np.max(counts, initial=0))


@pytree
class PartBase:
    """D of a graph over several devices; nodes `[parts * part_nodes]`, edges `[parts * part_edges]`, see `Cut`.

    Padded places are 0 in its inputs and outputs.
    """

    edges: EdgeBase  # of every part, cut like the edges; its nodes are the nodes of one part, then its ghosts
    sent: tuple[Any, ...]
    pairs: tuple[tuple[tuple[int, int], ...], ...] = static()
    part_nodes: int = static()
    mesh: Mesh = static()

    @property
    def node_shape(self) -> tuple[int, ...]:
        return (self.part_nodes * self.mesh.size,)

    @property
    def edge_shape(self) -> tuple[int, ...]:
        return self.edges.edge_shape

    def difference(self, x: FloatArray) -> FloatArray:
        return self._apart(PartBase._local_difference)(self, x)

    def divergence(self, e: FloatArray) -> FloatArray:
        return self._apart(PartBase._local_divergence)(self, e)

    def laplacian(self, x: FloatArray) -> FloatArray:
        return self.divergence(self.difference(x))

    def _apart(self, local: Callable[..., Any]) -> Callable[..., Any]:
        """A function of one part as a function of all."""
        each = PartitionSpec(AXIS)
        # The initial zeros of sums are the same in all parts, which the check of varying types does not accept.
        return jax.shard_map(local, mesh=self.mesh, in_specs=each, out_specs=each, check_vma=False)

    def _local_difference(self, x: FloatArray) -> FloatArray:
        ghosts = [jax.lax.ppermute(x[table], AXIS, pairs) for table, pairs in zip(self.sent, self.pairs, strict=True)]
        return self.edges.difference(jnp.concatenate([x, *ghosts]))

    def _local_divergence(self, e: FloatArray) -> FloatArray:
        sums = self.edges.divergence(e)
        nodes, start = sums[: self.part_nodes], self.part_nodes
        for table, pairs in zip(self.sent, self.pairs, strict=True):
            stop = start + table.shape[0]
            returned = jax.lax.ppermute(sums[start:stop], AXIS, [(to, by) for by, to in pairs])
            nodes = nodes.at[table].add(returned, mode="promise_in_bounds")
            start = stop
        return nodes


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

    def base(self, weights: np.ndarray | None, dtype: Any, mesh: Mesh) -> "SlabBase":
        """As in `Cut`: returns itself."""
        return self

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
        """Convert values from the layout of `GridBase` to the layout of all slabs, with `fill` in padded places."""
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
        """The row that the slab `step` places before sends; zeros if there is none."""
        slabs = range(self.mesh.size)
        return jax.lax.ppermute(row, AXIS, [(i, i + step) for i in slabs if i + step in slabs])


def _part(x: FloatArray, start: int, stop: int | None, axis: int) -> FloatArray:
    return jax.lax.slice_in_dim(x, start, stop, axis=axis)
