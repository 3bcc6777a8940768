"""Doge-ADMM as the paper stores it: a copy of the signal and a dual for every group of rows.

It has the iterates of `doge.py` with the paper's metric, at the cost of its copies, each moved along the rows of its
group alone: for studying the method, for comparisons, for trying another prox of a group. For fits use "doge".
"""

import dataclasses
import math
from typing import Any

import numpy as np

from sparseopt.core.base.arguments import require_memory
from sparseopt.core.base.mesh import on_device
from sparseopt.core.base.types import pytree
from sparseopt.core.operators.normal_solves import Diagonal
from sparseopt.core.solvers import doge
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.ground import couples_axes
from sparseopt.trend.base.job import Job, Method, Settings
from sparseopt.trend.methods.admm_plan import node_solve
from sparseopt.trend.methods.doge_plan import CADENCE, place, refuses_block, split_of
from sparseopt.trend.methods.plan import Plan


@pytree
class GroupsPlan(Plan):
    """A plan with the groups of rows, as of the solver."""

    groups: Any = None

    def refuses(self, penalty: Any, weighted: bool) -> str | None:
        return _refuses(penalty) or super().refuses(penalty, weighted)

    def solver(self, rho: Any, relaxation: Any = 1.7) -> doge.DogeGroups:
        return doge.DogeGroups(self.node_solve, rho, relaxation, self.cadence, groups=self.groups)


@dataclasses.dataclass(frozen=True)
class DogeGroups(Settings, Method):
    """Doge-ADMM with its copies; B as of `Doge`."""

    B: int | None = None
    name = "doge_groups"
    single = True

    def refuses(self, job: Job) -> str | None:
        if job.graph.free:
            return (
                f'method="{self.name}" needs the ends of the graph: take ends="graph", or with free ends "doge", '
                '"admm" or "interior"'
            )
        return _refuses(job.penalty) or super().refuses(job) or refuses_block(self.B, job)

    def plan(self, job: Job) -> GroupsPlan:
        """The plan, if the copies fit in memory: a hub makes them many."""
        # Given edges that are those of a grid have the layout of the grid.
        graph = job.graph if job.graph.shape is None else Graph.grid(job.graph.shape, job.graph.spacing)
        kind, block = job.dtype, job.order + 1 if self.B is None else int(self.B)
        cosines = graph.shape is not None and not job.weighted and block <= job.order
        key = (self.name, job.order, block, cosines, kind.name, bool(job.channels))

        def build() -> GroupsPlan:
            on_edges = (job.order + 1 - block) % 2 == 1
            matrix, labels = graph.matrix(block, on_edges), graph.groups(block, on_edges)
            count = int(labels.max(initial=0)) + 1
            # Every group has alpha and theta, and while it moves, a value and a move of each row.
            needed = 2 * count * sum(matrix.shape) * math.prod(job.channels) * kind.itemsize
            require_memory(needed, f"Doge-ADMM with its {count:,} groups", 'method="doge" stores no copies')
            split = split_of(job, block, count)
            solve: Any = Diagonal()
            if split.inner.order:
                solve = node_solve(job, (split.inner.order,), np.asarray(split.column_scale), cosines)
            # 0 where there is no row.
            rows = job.layout.grid_rows(labels + 1, job.order + 1)[..., None]
            groups = (rows[..., None] if job.channels else rows) == np.arange(1, count + 1)
            return on_device(GroupsPlan(job.ground, place(job, split), solve, CADENCE, groups=groups))

        return job.layout.cache(key, build)


def _refuses(penalty: Any) -> str | None:
    if couples_axes(penalty):
        return 'method="doge_groups" has its rows in separate groups; for isotropic total variation use "doge"'
    return None
