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
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.ground import couples_axes
from sparseopt.trend.base.method import Method, Settings
from sparseopt.trend.base.penalties import couples_rows
from sparseopt.trend.base.signal import MOST_ORDER
from sparseopt.trend.methods.split_plan import COUPLED, SplitPlan

# Steps between two checks, up to this many nodes and above. A check, with the two steps before it, costs as much as a
# dozen other steps: fits on grids and roads of 65,536 nodes and more take 0.83 of the time with the second. But a start
# near the answer, as in a loop of proxes on a small graph, often needs no more than the first.
CADENCES, MOST_SMALL = (10, 20), 10_000


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

    def refuses(self, asked: Fit) -> str | None:
        return COUPLED if asked.coupled else refuses_block(self.B, asked) or asked.geometry.refuses_method(asked, self)

    def plan(self, asked: Fit) -> SplitPlan:
        geometry, kind, block = asked.geometry, asked.dtype, asked.order + 1 if self.B is None else int(self.B)
        weighted = _needs_weights(asked, block)
        key = (self.name, tuple(asked.terms), block, weighted, kind.name, bool(asked.channels))

        def build() -> SplitPlan:
            if not asked.several:
                split = split_of(asked, block)
                return on_device(
                    SplitPlan(asked.ground, place(asked, split), _x_step(asked, split, weighted), _cadence(asked))
                )
            sums, operator = [geometry.sums(k + 1) for k in asked.terms], asked.ground.operator
            rows = np.concatenate([part.row_absolute.reshape(-1) for part in sums])
            columns = np.sum([part.column_absolute.reshape(geometry.node_shape) for part in sums], axis=0)
            rows = np.where(rows > 0, rows, 1).astype(kind)
            split = Split(operator, Identity(operator.in_shape), rows, columns.astype(kind))
            return on_device(SplitPlan(asked.ground, place(asked, split), Diagonal(), _cadence(asked)))

        return geometry.cache(key, build)


def _cadence(asked: Fit) -> int:
    return CADENCES[asked.geometry.num_nodes > MOST_SMALL]


def _needs_weights(asked: Fit, block: int) -> bool:
    """Whether the x-step depends on whether nodes have weights."""
    return asked.weighted and asked.geometry.transforms and block <= asked.order


def _x_step(asked: Fit, split: Split, weighted: bool) -> Any:
    if not split.inner.order:
        return Diagonal()
    orders, columns = (split.inner.order,), np.asarray(split.column_scale)
    return asked.geometry.x_step(orders, columns, weighted, bool(asked.channels), asked.dtype)


def refuses_block(block: int | None, asked: Fit) -> str | None:
    """Why a number of differences that are treated row by row does not suit a request, or None."""
    if block is None:
        return None
    whole_number("B", block, 1, asked.order + 1, "up to order + 1; B = 0 is the standard ADMM")
    if asked.several:
        return f"several penalties have all their differences treated row by row, given B={block}: leave out B"
    if asked.geometry.wide and block <= asked.order:
        return (
            f"with free ends Doge-ADMM treats all differences row by row, given B={block}: leave out B, or use "
            'ends="graph"'
        )
    return None


def split_of(asked: Fit, block: int, groups: int | None = None) -> Split:
    """The split with `block` differences treated row by row, as host tables; `groups` as in `doge_split`."""
    geometry, order = asked.geometry, asked.order + 1
    on_edges = (order - block) % 2 == 1
    outer: Any = geometry.difference(order, asked.dtype)
    inner: Any = Identity(outer.in_shape)
    if block < order:
        base = geometry.base(asked.dtype)
        outer, inner = Difference(base, block, on_edges), Difference(base, order - block)
    split = doge.doge_split(outer, inner, geometry.doge_sums(block, on_edges), asked.dtype, groups)
    if geometry.transforms and block < order:  # one C for all columns keeps the x-step diagonal
        split = dataclasses.replace(split, column_scale=split.column_scale.max())
    return split


def place(asked: Fit, split: Split) -> Split:
    """A split with its metrics on the devices."""

    def put(leaf: Any, order: int) -> jax.Array:
        return asked.geometry.put(leaf[..., None] if asked.channels and leaf.ndim else leaf, order)

    rows, columns = put(split.row_scale, asked.order + 1), put(split.column_scale, split.inner.order)
    return dataclasses.replace(split, row_scale=rows, column_scale=columns)


@pytree
class GroupsPlan(SplitPlan):
    """A plan with the groups of rows, as in the solver."""

    groups: Any = None

    def refuses(self, penalty: Any, weighted: bool) -> str | None:
        return _refuses(penalty) or super().refuses(penalty, weighted)

    def solver(self, rho: Any, relaxation: Any = 1.7, settles: Any = False, sets: Any = None) -> doge.DogeGroups:
        more: Any = {"groups": self.groups, "settles": settles, "sets": sets}
        return doge.DogeGroups(self.node_solve, rho, relaxation, self.cadence, **more)


@dataclasses.dataclass(frozen=True)
class DogeGroups(Settings, Method):
    """Doge-ADMM with its copies; B as in `Doge`."""

    B: int | None = None
    name = "doge_groups"
    single = True

    def refuses(self, asked: Fit) -> str | None:
        if asked.geometry.wide:
            return (
                f'method="{self.name}" needs the ends of the graph: use ends="graph", or with free ends "doge", '
                '"admm" or "interior"'
            )
        return _refuses(asked.penalty) or super().refuses(asked) or refuses_block(self.B, asked)

    def plan(self, asked: Fit) -> GroupsPlan:
        """The plan, if the copies fit in memory: a hub needs many."""
        geometry, kind, block = asked.geometry, asked.dtype, asked.order + 1 if self.B is None else int(self.B)
        weighted = _needs_weights(asked, block)
        key = (self.name, asked.order, block, weighted, kind.name, bool(asked.channels))

        def build() -> GroupsPlan:
            on_edges = (asked.order + 1 - block) % 2 == 1
            matrix, labels = geometry.matrix(block, on_edges), geometry.groups(block, on_edges)
            count = int(labels.max(initial=0)) + 1
            # Every group has alpha and theta, and while it moves, a value and a move of each row.
            needed = 2 * count * sum(matrix.shape) * math.prod(asked.channels) * kind.itemsize
            require_memory(needed, f"Doge-ADMM with its {count:,} groups", 'method="doge" stores no copies')
            split = split_of(asked, block, count)
            # 0 where there is no row.
            rows = geometry.rows(labels + 1, asked.order + 1)[..., None]
            groups = (rows[..., None] if asked.channels else rows) == np.arange(1, count + 1)
            x_step = _x_step(asked, split, weighted)
            return on_device(GroupsPlan(asked.ground, place(asked, split), x_step, _cadence(asked), groups=groups))

        return geometry.cache(key, build)


def _refuses(penalty: Any) -> str | None:
    if couples_rows(penalty):
        return COUPLED
    if couples_axes(penalty):
        return 'method="doge_groups" has its rows in separate groups; for isotropic total variation use "doge"'
    return None
