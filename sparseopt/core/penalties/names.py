"""The short names of penalties, the same in configs, on the command line and in the estimator."""

from collections.abc import Callable, Mapping
from typing import Any

from sparseopt.core.base.arguments import unknown
from sparseopt.core.penalties.entries import L0, L1, MCP, SCAD, ElasticNet, LHalf, LogSum
from sparseopt.core.penalties.groups import GroupL2, NuclearNorm, SparseGroup
from sparseopt.core.penalties.patterns import NM, TopK
from sparseopt.core.penalties.sets import Box, Nonnegative, Simplex

PENALTIES: Mapping[str, Callable[..., Any]] = {
    "l0": L0,
    "l1": L1,
    "elastic_net": ElasticNet,
    "mcp": MCP,
    "scad": SCAD,
    "log_sum": LogSum,
    "l_half": LHalf,
    "group_l2": GroupL2,
    "sparse_group": SparseGroup,
    "nuclear": NuclearNorm,
    "nonnegative": Nonnegative,
    "box": Box,
    "simplex": Simplex,
    "top_k": TopK,
    "n_of_m": NM,
}
# Penalties that need only a weight, and that every front end accepts.
BY_WEIGHT: Mapping[str, Callable[[Any], Any]] = {
    name: PENALTIES[name] for name in ("l1", "l0", "mcp", "scad", "group_l2")
}


def penalty_of_weight(name: str, weight: float) -> Any:
    """The penalty with a name in `BY_WEIGHT`; a ValueError for another name, with the known ones."""
    if name not in BY_WEIGHT:
        raise ValueError(unknown("penalty", name, BY_WEIGHT))
    return BY_WEIGHT[name](weight)
