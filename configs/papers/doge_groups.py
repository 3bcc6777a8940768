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
                    columns = 8 if record["groups"] > 8 else None
                    pictures[stem] = plots.plot_groups(run.task.shape, record["block"], columns=columns)
        return pictures
