"""The standard ADMM of the trend filter, whose x-step solves over the whole graph.

The solve is exact and cheap by transforms on grids without node weights and by bands on chains with free ends, and uses
conjugate gradients elsewhere. It pays where conditioning decides: where smoothing is strong, and from order 3 on.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparseopt.core.base.mesh import on_device
from sparseopt.core.operators.maps import Identity, Split
from sparseopt.core.operators.normal_solves import ConjugateGradient, banded_solve, free_solve
from sparseopt.core.solvers.admm import standard_split
from sparseopt.trend.base.job import Job, Method, Settings
from sparseopt.trend.methods.plan import Plan

# With an exact x-step a check is cheap.
CADENCE = 5


@dataclasses.dataclass(frozen=True)
class Admm(Settings, Method):
    """The standard ADMM, with the split `z = Δ^(k+1) b`; it solves over the whole graph in every step."""

    name = "admm"
    one_metric = True
    short_from = 500_000

    def plan(self, job: Job) -> Plan:
        even = job.ground.transform is not None and not job.weighted
        key = (self.name, tuple(job.terms), even, job.dtype.name, bool(job.channels))

        def build() -> Plan:
            operator, kind = job.ground.operator, job.dtype
            split = standard_split(operator, Identity(operator.out_shape), kind)
            split = split if job.several else in_unit(split, job)
            columns = np.asarray(split.column_scale)
            solve = node_solve(job, tuple(k + 1 for k in job.terms), columns, even)
            plan = Plan(job.ground, split, solve, CADENCE)
            return on_device(plan)

        return job.layout.cache(key, build)


def in_unit(split: Split, job: Job) -> Split:
    """The split of a job, with metrics that make rho the same in every unit of the times or the spacing."""
    unit = np.asarray(job.graph.unit(job.order + 1), job.dtype)
    if unit == 1:
        return split
    return dataclasses.replace(split, row_scale=unit, column_scale=1 / unit)


def node_solve(job: Job, orders: tuple[int, ...], columns: np.ndarray, even: bool) -> Any:
    """The x-step for inner differences of these orders, with C a number, or one per column of a single difference.

    With free ends C is a number. `even` says that the nodes have one weight, on a graph with a transform.
    """
    graph, kind = job.graph, job.dtype
    if graph.free and not graph.is_chain:
        single = orders == (job.order + 1,)
        transform = job.ground.transform if single else free_solve(graph.node_shape, orders, kind, graph.spacing)
        return transform if even else ConjugateGradient(None, jnp.asarray(1e-2, kind), transform)
    if even:
        return dataclasses.replace(job.ground.transform, powers=orders)
    if graph.free and kind == np.float64:  # in float32 rounding may leave the matrix indefinite
        matrices = [graph.matrix(order) for order in orders]
        return banded_solve(sum(matrix.T @ matrix for matrix in matrices), kind)
    shape = graph.node_shape
    if columns.ndim:
        matrix = graph.matrix(orders[0])
        diagonal = np.asarray(matrix.multiply(matrix).T @ columns).reshape(shape)
    else:
        diagonal = columns * np.sum([graph.sums(order).column_squares.reshape(shape) for order in orders], axis=0)
    diagonal = diagonal[..., None] if job.channels else diagonal
    return ConjugateGradient(diagonal.astype(kind), jnp.asarray(1e-2, kind))
