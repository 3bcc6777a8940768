"""The standard ADMM of the trend filter, whose x-step solves over the whole graph.

The solve is exact and cheap with transforms on grids without node weights and with bands on chains with free ends;
elsewhere it uses conjugate gradients. It pays if conditioning decides: if smoothing is strong, and from order 3 on.
"""

import dataclasses

import numpy as np

from sparseopt.core.base.mesh import on_device
from sparseopt.core.operators.maps import standard_split
from sparseopt.trend.base.fit import Fit
from sparseopt.trend.base.method import Method, Settings
from sparseopt.trend.methods.split_plan import SplitPlan

# With an exact x-step a check is cheap.
CADENCE = 5


@dataclasses.dataclass(frozen=True)
class Admm(Settings, Method):
    """The standard ADMM, with the split `z = Δ^(k+1) b`; it solves over the whole graph in every step."""

    name = "admm"
    one_metric = True
    short_from = 500_000

    def plan(self, asked: Fit) -> SplitPlan:
        geometry, weighted = asked.geometry, asked.weighted and asked.geometry.transforms
        key = (self.name, tuple(asked.terms), weighted, asked.dtype.name, bool(asked.channels))

        def build() -> SplitPlan:
            unit = 1.0 if asked.several else geometry.unit(asked.order + 1)
            split = standard_split(asked.ground.operator, asked.dtype, unit)
            orders, columns = tuple(k + 1 for k in asked.terms), np.asarray(split.column_scale)
            x_step = geometry.x_step(orders, columns, weighted, bool(asked.channels), asked.dtype)
            return on_device(SplitPlan(asked.ground, split, x_step, CADENCE))

        return geometry.cache(key, build)
