"""sparseopt: sparse optimisation in JAX.

One problem, `minimise 1/2 <x - c, H (x - c)> + penalty(K x)`, one family of penalties, one `solve`, and two
front-ends: l0 pruning of language models (`sparseopt.pruning`) and trend filtering on graphs.
"""

import importlib
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING

from sparseopt.core.losses import Quadratic
from sparseopt.core.patterns import NM, BlockTopK, RowTopK, TopK
from sparseopt.core.penalties import L0, L1, MCP, SCAD, GroupL2, Penalty, Support, lift
from sparseopt.core.proximal import proximal, proximal_adam
from sparseopt.core.solve import Measure, Problem, Solution, Solver, Status, solve
from sparseopt.core.solvers.aiht import Maiht
from sparseopt.core.solvers.proximal_gradient import ProximalGradient
from sparseopt.core.solvers.refit import Refit
from sparseopt.core.types import pytree, static
from sparseopt.trend.filter import trend_filter
from sparseopt.trend.graph import Graph

if TYPE_CHECKING:
    from sparseopt import models, pruning

__version__ = version("sparseopt")

__all__ = [
    "L0",
    "L1",
    "MCP",
    "NM",
    "SCAD",
    "BlockTopK",
    "Graph",
    "GroupL2",
    "Maiht",
    "Measure",
    "Penalty",
    "Problem",
    "ProximalGradient",
    "Quadratic",
    "Refit",
    "RowTopK",
    "Solution",
    "Solver",
    "Status",
    "Support",
    "TopK",
    "lift",
    "models",
    "proximal",
    "proximal_adam",
    "pruning",
    "pytree",
    "solve",
    "static",
    "trend_filter",
]


def __getattr__(name: str) -> ModuleType:
    """Load the pruner and the models on first use: the core must not import flax."""
    if name in ("models", "pruning"):
        return importlib.import_module(f"sparseopt.{name}")
    raise AttributeError(f"module 'sparseopt' has no attribute {name!r}; it has {', '.join(__all__)}")
