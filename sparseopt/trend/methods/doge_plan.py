"""Doge-ADMM in its fused form, the method for every graph, penalty and loss; and as the paper stores it.

A step costs two sparse products, at most a tenth of a cosine transform. It is the fastest method at order 0 on every
graph but a chain, and at orders 1 and 2 unless smoothing is strong.

The paper stores a copy of the signal and a dual for every group of rows. `DogeGroups` has the iterates of `doge.py`
with the paper's metric at the cost of these copies, each moved along the rows of its group alone: for studying the
method, for comparisons, for trying another prox of a group.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from sparseopt.core.base.arguments import require_memory, whole_number
from sparseopt.core.base.mesh import on_device
from sparseopt.core.base.types import pytree
from sparseopt.core.operators.differences import Difference
from sparseopt.core.operators.maps import Identity, Split
from sparseopt.core.operators.normal_solves import Diagonal
from sparseopt.core.solvers import doge
from sparseopt.trend.base.graph import Graph
from sparseopt.trend.base.ground import couples_axes
from sparseopt.trend.base.job import Job, couples_rows
from sparseopt.trend.base.method import Method, Settings
from sparseopt.trend.base.signal import MOST_ORDER
from sparseopt.trend.methods.admm_plan import node_solve
from sparseopt.trend.methods.plan import COUPLED, Plan

# A check costs two steps.
CADENCE = 10


@dataclasses.dataclass(frozen=True)
class Doge(Settings, Method):
    """Doge-ADMM, which treats rows of differences separately.

    Args:
        B: the number of the k + 1 difference factors that it treats row by row, `1..k+1`; None for all. A smaller B
            solves over the whole graph for the others.
    """

    B: int | None = None
    name = "doge"
    balances_rho = over_devices = True
    keeps_rho_from = MOST_ORDER + 1  # never
    short_from = 10_000

    def refuses(self, job: Job) -> str | None:
        return COUPLED if job.coupled else refuses_block(self.B, job) or job.layout.refuses(job, self)

    def plan(self, job: Job) -> Plan:
        layout, kind = job.layout, job.dtype
        block = job.order + 1 if self.B is None else int(self.B)
        cosines = job.graph.shape is not None and not job.weighted and block <= job.order
        key = (self.name, tuple(job.terms), block, cosines, kind.name, bool(job.channels))

        def build() -> Plan:
            operator = job.ground.operator
            if job.several:
                sums = [layout.sums(k + 1) for k in job.terms]
                rows = np.concatenate([part.row_absolute.reshape(-1) for part in sums])
                columns = np.sum([part.column_absolute.reshape(job.graph.node_shape) for part in sums], axis=0)
                rows = np.where(rows > 0, rows, 1).astype(kind)
                split = Split(operator, Identity(operator.in_shape), rows, columns.astype(kind))
            else:
                split = split_of(job, block)
            solve: Any = Diagonal()
            if split.inner.order:
                if job.graph.shape is not None:  # one C for all columns keeps the x-step diagonal under cosines
                    split = dataclasses.replace(split, column_scale=split.column_scale.max())
                solve = node_solve(job, (split.inner.order,), split.column_scale, cosines)
            plan = Plan(job.ground, place(job, split), solve, CADENCE)
            return on_device(plan)

        return layout.cache(key, build)


def refuses_block(block: int | None, job: Job) -> str | None:
    """Why a number of differences that are treated row by row does not suit a job, or None."""
    if block is None:
        return None
    whole_number("B", block, 1, job.order + 1, "up to order + 1; B = 0 is the standard ADMM")
    if job.several:
        return f"several penalties have all their differences treated row by row, given B={block}: leave out B"
    if job.graph.free and block <= job.order:
        return (
            f"with free ends Doge-ADMM treats all differences row by row, given B={block}: leave out B, or use "
            'ends="graph"'
        )
    return None


def split_of(job: Job, block: int, groups: int | None = None) -> Split:
    """The split with `block` differences treated row by row, as host tables; `groups` as in `doge_split`."""
    layout, order = job.layout, job.order + 1
    if block == order:
        outer, sums = layout.difference(order, job.dtype), layout.sums(order)
        if order == 1 and job.graph.spacing is not None:
            # The lemma with exponent 2: one S for all axes, since isotropic total variation needs one at a node. For
            # L1 the steps were 0.7 to 1.9 times those of exponent 1.
            sums = dataclasses.replace(
                sums, row_absolute=np.full_like(sums.row_absolute, 2), column_absolute=sums.column_squares
            )
        return doge.doge_split(outer, Identity(outer.in_shape), sums, job.dtype, groups)
    base, on_edges = layout.base(job.dtype), (order - block) % 2 == 1
    outer, inner = Difference(base, block, on_edges), Difference(base, order - block)
    return doge.doge_split(outer, inner, layout.sums(block, on_edges), job.dtype, groups)


def place(job: Job, split: Split) -> Split:
    """A split with its metrics on the devices."""

    def put(leaf: Any, order: int) -> jax.Array:
        return job.layout.put(leaf[..., None] if job.channels and leaf.ndim else leaf, order)

    rows, columns = put(split.row_scale, job.order + 1), put(split.column_scale, split.inner.order)
    return dataclasses.replace(split, row_scale=rows, column_scale=columns)


@pytree
class GroupsPlan(Plan):
    """A plan with the groups of rows, as in the solver."""

    groups: Any = None

    def refuses(self, penalty: Any, weighted: bool) -> str | None:
        return _refuses(penalty) or super().refuses(penalty, weighted)

    def solver(self, rho: Any, relaxation: Any = 1.7) -> doge.DogeGroups:
        return doge.DogeGroups(self.node_solve, rho, relaxation, self.cadence, groups=self.groups)


@dataclasses.dataclass(frozen=True)
class DogeGroups(Settings, Method):
    """Doge-ADMM with its copies; B as in `Doge`."""

    B: int | None = None
    name = "doge_groups"
    single = True

    def refuses(self, job: Job) -> str | None:
        if job.graph.free:
            return (
                f'method="{self.name}" needs the ends of the graph: use ends="graph", or with free ends "doge", '
                '"admm" or "interior"'
            )
        return _refuses(job.penalty) or super().refuses(job) or refuses_block(self.B, job)

    def plan(self, job: Job) -> GroupsPlan:
        """The plan, if the copies fit in memory: a hub needs many."""
        # Given edges that form a grid have the layout of the grid.
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
    if couples_rows(penalty):
        return COUPLED
    if couples_axes(penalty):
        return 'method="doge_groups" has its rows in separate groups; for isotropic total variation use "doge"'
    return None
