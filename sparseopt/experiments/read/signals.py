"""A signal and its graph from the files of a user: a table with edges, a series with times, or a picture.

signal, edges, times -> values, covariates, `Graph`, and notes of how they were read
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from sparseopt.experiments.read.graph_files import TIME_NAMES, NodeTable, read_edges, read_signal
from sparseopt.experiments.read.images import IMAGE_KINDS, read_image
from sparseopt.trend.base.graph import Graph

# Steps of times that differ by less than this fraction are equal.
EVEN = 1e-6
Ends = Literal["free", "graph"]


class Given(NamedTuple):
    """What files hold; `notes` say how they were read."""

    table: NodeTable
    graph: Graph
    notes: tuple[str, ...]
    covariates: np.ndarray | None = None  # `[n, covariates]`


def is_picture(signal: Path) -> bool:
    """Whether a file is a picture by its ending."""
    return signal.suffix.lower() in IMAGE_KINDS


def read_given(
    signal: Path,
    edges: Path | None,
    times: Path | None,
    ends: Ends | None,
    covariates: Sequence[str],
    order: int,
    merge: bool,
) -> Given:
    """Read files; without edges the signal is a series or a picture, and the columns of `covariates` are no channels.

    Raises:
        ValueError: for what cannot be used.
    """
    table, shape = _picture(signal) if is_picture(signal) else (read_signal(signal, edges is None), ())
    table, beside = table.split(covariates) if covariates else (table, None)
    count = len(table.names)
    notes = [f"{count} channel{'s' * (count > 1)}: {', '.join(table.names)}"]
    if edges is not None:
        pairs, weights = read_edges(edges, table.nodes)
        graph = Graph.from_edges(pairs, len(table.values), weights, merge=merge)
    elif shape:
        graph = Graph.grid(shape)
    else:
        named = [name for name in table.names if count > 1 and name.lower() in TIME_NAMES]
        notes += [f"the column {name} is taken as a channel: times must increase" for name in named]
        notes += [f"times: the column {table.times_name}"] if table.times is not None else []
        graph = _series(table, times, ends, order)
    size = f"{graph.num_nodes:,} nodes and {graph.num_edges:,} edges, order {order}"
    return Given(table, graph, (*notes, f"{signal.name}: {size}"), beside)


def _picture(signal: Path) -> tuple[NodeTable, tuple[int, ...]]:
    """The pixels of a picture row by row, without opacity, and its height and width."""
    image = read_image(signal)
    height, width, *_ = image.shape
    colours = np.asarray(image, float).reshape(height * width, -1)
    if colours.shape[1] < 3:
        return NodeTable(colours[:, 0], ("value",)), (height, width)
    return NodeTable(colours[:, :3], ("red", "green", "blue")), (height, width)


def _series(table: NodeTable, file: Path | None, ends: Ends | None, order: int) -> Graph:
    """The chain of a series, at the times of a file of their own or of a column of the signal."""
    times, ends, count = table.times, ends or "free", len(table.values)
    if times is None:
        return Graph.chain(count, None if file is None else read_signal(file).values, ends)
    if file is not None:
        raise ValueError(f"the signal has its times in the column {table.times_name!r}: leave out times")
    steps = np.diff(times)
    if ends == "graph" and order and np.ptp(steps) > EVEN * steps.max():
        raise ValueError(
            f"the times of the column {table.times_name!r} are uneven: leave out ends=graph, since free ends count "
            "them, or leave the column out"
        )
    return Graph.chain(count, times if ends == "free" else None, ends)
