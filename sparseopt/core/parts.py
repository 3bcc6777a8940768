"""Floor 1.5: D of any graph that is cut into parts, one a device, whose edges across are found through copies of nodes.

An edge belongs to the first of the parts of its ends. It reads the other end, where that is another part's, from a
ghost, a copy that its owner sends: D needs the ghosts' values, Dᵀ sends back what the part summed up for them. All
that goes from part p + s to part p, for every p at once, is one message.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from sparseopt.core.mesh import AXIS, over, put
from sparseopt.core.operators import spread
from sparseopt.core.types import pytree, static

FloatArray = Float[Array, "..."]


@dataclasses.dataclass(frozen=True)
class Cut:
    """A graph cut into parts, as host tables.

    Attributes:
        parts: how many.
        nodes: the place of every node, `[n]`, in arrays of `parts` times `part_nodes`.
        edges: the place of every edge, `[m]`, in arrays of `parts` times `part_edges`.
        part_nodes: the most nodes of a part.
        part_edges: the most edges of a part.
        tails: int32 `[parts * part_edges]`, within the part, ghosts behind the nodes; places of padding are loops.
        heads: the same of the other ends.
        shifts: s of every message.
        pairs: of every message, which parts send to which.
        sent: of every message int32 `[parts * width]`, the nodes of a part that it sends, filled up by its first.
    """

    parts: int
    nodes: np.ndarray
    edges: np.ndarray
    part_nodes: int
    part_edges: int
    tails: np.ndarray
    heads: np.ndarray
    shifts: tuple[int, ...]
    pairs: tuple[tuple[tuple[int, int], ...], ...]
    sent: tuple[np.ndarray, ...]


def _places(owner: np.ndarray, parts: int) -> tuple[np.ndarray, int]:
    """The place of every item among those of its owner, in the order given, and the most that one owns."""
    counts = np.bincount(owner, minlength=parts)
    order = np.argsort(owner, kind="stable")
    place = np.empty(owner.size, np.int64)
    place[order] = np.arange(owner.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return place, int(np.max(counts))


def cut_graph(edges: np.ndarray, order: np.ndarray, parts: int) -> Cut:
    """Cut a graph into runs of about as many nodes and edges each.

    Args:
        edges: of a graph without loops, `[m, 2]`.
        order: the nodes, neighbours close to each other, `[n]`; each part gets a run of them.
        parts: how many.
    """
    num_nodes = order.size
    place = np.empty(num_nodes, np.int64)
    place[order] = np.arange(num_nodes)
    # Edges belong to the part of their first end, so that is where their work is counted.
    work = 1 + np.bincount(place[edges].min(axis=1), minlength=num_nodes)
    middle = np.cumsum(work) - work / 2
    part = np.minimum(middle * parts / work.sum(), parts - 1).astype(np.int64)[place]
    ends = part[edges]
    owner = ends.min(axis=1)
    node_place, part_nodes = _places(part, parts)
    edge_place, part_edges = _places(owner, parts)
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
        within, width = _places(reader[chosen], parts)
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


@pytree
class PartBase:
    """D of a graph over several devices; nodes `[parts * part_nodes]`, edges `[parts * part_edges]`, see `Cut`.

    As `EdgeBase` on every part. Padded places are 0 in what it takes and gives.
    """

    tails: Any
    heads: Any
    root_weights: Any  # as the edges, sqrt(w), or None for weights of 1
    sent: tuple[Any, ...]
    pairs: tuple[tuple[tuple[int, int], ...], ...] = static()
    part_nodes: int = static()
    mesh: Mesh = static()

    @property
    def node_shape(self) -> tuple[int, ...]:
        """The shape of a node array without channels."""
        return (self.part_nodes * self.mesh.size,)

    @property
    def edge_shape(self) -> tuple[int, ...]:
        """The shape of an edge array without channels."""
        return (self.tails.shape[0],)

    def difference(self, x: FloatArray) -> FloatArray:
        """`D x`."""
        return self._apart(PartBase._local_difference)(self, x)

    def divergence(self, e: FloatArray) -> FloatArray:
        """`Dᵀ e`."""
        return self._apart(PartBase._local_divergence)(self, e)

    def laplacian(self, x: FloatArray) -> FloatArray:
        """`DᵀD x`, from differences, so that constants vanish exactly."""
        return self.divergence(self.difference(x))

    def _apart(self, local: Callable[..., Any]) -> Callable[..., Any]:
        """The function of a part as one of all parts."""
        each = PartitionSpec(AXIS)
        # The zeros that sums begin with are the same in all parts: types of what varies are left unchecked.
        return jax.shard_map(local, mesh=self.mesh, in_specs=each, out_specs=each, check_vma=False)

    def _weighted(self, e: FloatArray) -> FloatArray:
        return e if self.root_weights is None else e * spread(self.root_weights, e)

    def _local_difference(self, x: FloatArray) -> FloatArray:
        ghosts = [jax.lax.ppermute(x[table], AXIS, pairs) for table, pairs in zip(self.sent, self.pairs, strict=True)]
        x = jnp.concatenate([x, *ghosts])
        return self._weighted(x[self.tails] - x[self.heads])

    def _local_divergence(self, e: FloatArray) -> FloatArray:
        e = self._weighted(e)
        widths = [table.shape[0] for table in self.sent]
        zero = jnp.zeros((self.part_nodes + sum(widths), *e.shape[1:]), e.dtype)
        sums = zero.at[self.tails].add(e, mode="promise_in_bounds").at[self.heads].add(-e, mode="promise_in_bounds")
        nodes, start = sums[: self.part_nodes], self.part_nodes
        for table, pairs, width in zip(self.sent, self.pairs, widths, strict=True):
            returned = jax.lax.ppermute(sums[start : start + width], AXIS, [(to, by) for by, to in pairs])
            nodes = nodes.at[table].add(returned, mode="promise_in_bounds")
            start += width
        return nodes


def part_base(cut: Cut, weights: np.ndarray | None, dtype: Any, mesh: Mesh) -> PartBase:
    """The `PartBase` of a cut graph and its weights `[m]` or None, laid out over a mesh of as many devices as parts."""
    root = None
    if weights is not None:
        padded = np.zeros(cut.parts * cut.part_edges, dtype)
        padded[cut.edges] = np.sqrt(weights)
        root = put(padded, over(mesh))
    tails, heads, *sent = (put(table, over(mesh)) for table in (cut.tails, cut.heads, *cut.sent))
    return PartBase(tails, heads, root, tuple(sent), cut.pairs, cut.part_nodes, mesh)
