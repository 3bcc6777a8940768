"""The task of figures 2 to 4: the groups of rows that Doge-ADMM treats in parallel on a grid, counted and drawn.

Source: Bu, Wu, Zuo, "Doge-ADMM", section 2.3.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

import sparseopt as so
from sparseopt.core.base.types import Observer
from sparseopt.core.operators.row_tables import check_groups
from sparseopt.experiments import plots
from sparseopt.experiments.task import FinishedRun, Record, Task

LARGEST_DRAWN = 400
PAD = 0.22  # of a patch around its nodes, in grid steps; patches of a group are at least 0.7 apart


class Groups(Task):
    """Group the rows of a grid's difference operator, and check that the groups are disjoint and complete.

    Attributes:
        shape: of the grid.
        blocks: how many difference factors are treated row by row: B of the paper.
    """

    columns: ClassVar[tuple[str, ...]] = ("groups", "rows", "smallest_group", "largest_group", "disjoint", "complete")
    row_by: ClassVar[tuple[str, ...]] = ("block",)

    task: Literal["doge_groups.Groups"]
    shape: tuple[int, ...] = Field(default=(8, 8), min_length=1, max_length=2)
    blocks: list[Literal[1, 2, 3]] = Field(default=[1, 2, 3], min_length=1)

    @field_validator("blocks")
    @classmethod
    def _blocks_differ(cls, blocks: list[int]) -> list[int]:
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"blocks must differ, given {blocks}")
        return blocks

    def units(self) -> list[str]:
        return [f"block-{block}" for block in self.blocks]

    def check(self) -> None:
        if min(self.shape) < 1 or int(np.prod(self.shape)) < 2:
            raise ValueError(f"a grid with an edge has two nodes or more, given the shape {self.shape}")

    def run_unit(self, key: str, folder: Path, observer: Observer) -> Record:
        del folder
        block = self.blocks[self.units().index(key)]
        observer(f"B = {block}", 0, 0)
        graph = so.Graph.grid(self.shape)
        matrix, labels = graph.matrix(block), graph.groups(block)
        sizes = np.bincount(labels)
        owner = np.repeat(labels.astype(np.int64), np.diff(matrix.indptr))
        touched = np.unique(owner * matrix.shape[1] + matrix.indices)
        return {
            "block": block, "groups": check_groups(matrix, labels), "rows": matrix.shape[0],
            "smallest_group": int(np.min(sizes)), "largest_group": int(np.max(sizes)),
            "disjoint": touched.size == matrix.nnz,
            "complete": int(sizes.sum()) == matrix.shape[0] and bool((labels >= 0).all()),
        }  # fmt: skip

    @classmethod
    def draw(cls, runs: Sequence[FinishedRun]) -> dict[str, Any]:
        """A figure for each grid and block, with a panel for each group; grids too large to see are skipped."""
        pictures: dict[str, Any] = {}
        for run in runs:
            if int(np.prod(run.task.shape)) > LARGEST_DRAWN:
                continue
            size = "x".join(map(str, run.task.shape))
            for record in run.records:
                stem = f"groups-{size}-B{record['block']}"
                if stem not in pictures:
                    pictures[stem] = plot_groups(run.task.shape, record["block"])
        return pictures


def plot_groups(shape: Sequence[int], block: int) -> np.ndarray:
    """The rows of a grid's difference operator in groups that share no node, one panel per group.

    Rows of D are edges, rows of L stars, rows of D L two joined stars. On a large two-dimensional grid they form 4, 5
    and 16 groups.
    """
    graph = so.Graph.grid(shape)
    height, width = (1, *shape) if len(shape) == 1 else shape
    places = np.stack(np.divmod(np.arange(graph.num_nodes), width)[::-1], axis=1).astype(float)
    matrix, labels = graph.matrix(block), graph.groups(block)
    members = [np.flatnonzero(labels == group) for group in np.unique(labels)]
    columns = 8 if len(members) > 8 else min(len(members), 5 if block == 2 else 4)
    rows = -(-len(members) // columns)
    side = 2.2 / max(height, width)
    size = (columns * max(side * width, 1.3), rows * (max(side * height, 0.3) + 0.35) + 0.1)
    panels = plots.style.axes_or_new(None, len(members), columns, size)
    for number, (panel, group) in enumerate(zip(panels, members, strict=True), start=1):
        touched = [matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]] for row in group]
        _draw_group(panel, graph, places, touched, block)
        panel.set_title(f"group {number}: {len(group)} row{'s' if len(group) != 1 else ''}", fontsize=10)
    return panels


def _draw_group(axis: Any, graph: so.Graph, places: np.ndarray, touched: list[np.ndarray], block: int) -> None:
    from matplotlib.collections import LineCollection, PolyCollection

    axis.add_collection(LineCollection(list(places[graph.edges]), colors="#cccccc", linewidths=0.8, zorder=1))
    if block == 1:
        lines = [places[nodes] for nodes in touched]
        axis.add_collection(LineCollection(lines, colors=plots.COLOURS[0], linewidths=3, zorder=2))
    else:
        outlines = [_padded_hull(places[nodes]) for nodes in touched]
        face, edge = plots.COLOURS[4] + "80", plots.COLOURS[0]
        axis.add_collection(PolyCollection(outlines, facecolors=face, edgecolors=edge, linewidths=1, zorder=2))
    used = np.zeros(len(places), bool)
    used[np.concatenate(touched)] = True
    size = float(np.clip(400 / len(places), 4, 16))
    axis.scatter(*places[~used].T, s=size, color="white", edgecolors="#999999", linewidths=0.8, zorder=3)
    axis.scatter(*places[used].T, s=size, color=plots.style.INK, zorder=3)
    axis.set_xlim(-0.6, places[:, 0].max() + 0.6)
    axis.set_ylim(places[:, 1].max() + 0.6, -0.6)  # the first row on top, as in a matrix
    plots.style.bare(axis)


def _padded_hull(points: np.ndarray) -> np.ndarray:
    """The convex hull of discs around points: round corners, and no special case for points in a line."""
    from scipy.spatial import ConvexHull

    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    disc = PAD * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    ring = (points[:, None] + disc).reshape(-1, 2)
    return ring[ConvexHull(ring).vertices]
