"""Floor 5: what is too large for the machine is refused before it is begun.

All figures are lower bounds: what they refuse cannot be done, what they let pass may still be too much.
"""

import math

import numpy as np
from scipy import sparse

from sparseopt.machine import available_memory_bytes, format_bytes

# What a fit holds at its peak, in arrays of the signal's size and dtype: 30 to 120 were measured, over methods, orders
# and graphs. Without a solve, as for the noise, it is fewer.
FIT_COPIES = 24
PLAIN_COPIES = 6
# Bytes for each entry of a sparse matrix, its square and its size, with indices.
ENTRY_BYTES = 36
SAMPLED_NODES = 64


def require_memory(needed: int, what: str, advice: str) -> None:
    """See that so many bytes are free.

    Args:
        needed: at least so many will be taken.
        what: what takes them, for the error.
        advice: what to do.

    Raises:
        ValueError: if they are not.
    """
    free = available_memory_bytes()
    if needed > free:
        raise ValueError(f"{what} takes at least {format_bytes(needed)}, and {format_bytes(free)} are free: {advice}")


def require_signal_memory(shape: tuple[int, ...], dtype: np.dtype, copies: int) -> None:
    """See that there is room to work on a signal.

    Raises:
        ValueError: if there is not.
    """
    count = math.prod(shape)
    require_memory(
        copies * count * dtype.itemsize,
        f"work on a {dtype} signal of the shape {shape}, {count:,} values,",
        "solve channels one by one, split the graph, or take dtype=np.float32",
    )


def require_matrix_memory(edges: np.ndarray, num_nodes: int, order: int) -> None:
    """See that there is room for `Δ^(order)` as a sparse matrix, whose rows reach `order // 2` edges far.

    How many nodes that are is counted from a sample of the nodes.

    Raises:
        ValueError: if there is not.
    """
    if order <= 2:
        return  # not much larger than the edges
    ends = np.concatenate([edges, edges[:, ::-1], np.repeat(np.arange(num_nodes)[:, None], 2, axis=1)])
    ones = np.ones(len(ends), np.float32)
    near = sparse.csr_array((ones, ends.T), shape=(num_nodes, num_nodes))
    start = np.unique(np.linspace(0, num_nodes - 1, SAMPLED_NODES).astype(np.int64))
    reached = near[start]
    rows = len(edges) if order % 2 else num_nodes
    for _ in range(order // 2 - 1):
        reached = reached @ near
        reached.data[:] = 1
        # It only grows, so the first excess decides.
        each = reached.nnz // len(start)
        what = f"a difference matrix of order {order} with {rows:,} rows of {each:,} entries and more"
        require_memory(ENTRY_BYTES * rows * each, what, "take a lower order, or a graph of fewer edges")
